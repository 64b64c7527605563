#!/bin/sh
# Opens a shell in the container, in pytorch/; runs commands from standard input, or from the command line:
#     sh run-dev.sh
#     printf 'sh run_and_time.sh\n' | sh run-dev.sh | tee mlperf_ds2.log
#     sh run-dev.sh sh run_and_time.sh --config synthetic
# Files are the caller's, inside and outside. Variables, all optional:
#     DATASET_DIR   a packed data set that is elsewhere. It appears in the repository, read-only, by its own name if that
#                   ends in _dataset, else as LibriSpeech_dataset: where commands look for it.
#     DATASET_MODE  rw: it may be written to
#     RESULTS_DIR   another place for logs and checkpoints than results/
#     GPUS          all, none or what --gpus takes, such as device=0; else all if there are any
#     IMAGE, ENGINE another image; docker or podman
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "$0")")/../.." && pwd)
. "$root/pytorch/docker/engine.sh"

fail() {
    echo "error: $1" >&2
    exit 1
}

if ! id=$("$engine" image inspect --format '{{.Id}}' "$image" 2>/dev/null); then
    fail "there is no image $image: sh '$root/pytorch/docker/build-docker.sh' builds it"
fi
podman=$("$engine" --version 2>/dev/null | grep -i '^podman' || true)
rootless=$(printf "%s\n" "$facts" | grep -E '^ *rootless(: true)?$' || true)

# From here on, "$@" grows to the front.
grace=180 # seconds that a command has to save its work when it is told to stop
if [ $# -eq 0 ]; then
    set -- bash
    grace=0 # bash would not heed it
fi
set -- "$id" "$@"

# --mount takes a comma for the end of a path.
no_comma() {
    case "$1" in *,*) fail "$1: a folder whose path has a comma cannot be mounted" ;; esac
}
no_comma "$root"

# mount_on NAME FOLDER MODE: sets `mount` to show a folder by its name in the repository. Where that name is a link, the
# folder is mounted where the link leads in the container. A folder to mount on is made here: the engine would make it
# too, but root's.
mounted=' '
mount_on() {
    mounted="$mounted$1 "
    source=$(CDPATH='' cd -- "$2" && pwd -P)
    no_comma "$source"
    target="/deepspeech2/$1"
    if [ -L "$root/$1" ]; then
        link=$(readlink "$root/$1")
        case "$link" in /*) target="$link" ;; *) target="/deepspeech2/$link" ;; esac
    elif [ "$source" != "$root/$1" ]; then
        mkdir -p "$root/$1"
    fi
    mount="type=bind,source=$source,target=$target$3"
}

if [ -n "${RESULTS_DIR:-}" ]; then
    mkdir -p "$RESULTS_DIR" || fail "RESULTS_DIR=$RESULTS_DIR cannot be made"
    mount_on results "$RESULTS_DIR" ''
    set -- --mount "$mount" "$@"
fi
if [ -n "${DATASET_DIR:-}" ]; then
    [ -d "$DATASET_DIR" ] || fail "DATASET_DIR=$DATASET_DIR is not a folder; download_dataset.sh makes packed data sets"
    name=$(basename -- "$(CDPATH='' cd -- "$DATASET_DIR" && pwd)")
    case "$name" in *_dataset) ;; *) name=LibriSpeech_dataset ;; esac
    case "${DATASET_MODE:-ro}" in
    ro) mode=,readonly ;;
    rw) mode='' ;;
    *) fail "DATASET_MODE is '$DATASET_MODE'; it must be ro or rw" ;;
    esac
    mount_on "$name" "$DATASET_DIR" "$mode"
    set -- --mount "$mount" "$@"
fi
for link in "$root"/*; do # such as data sets and results on a larger disk
    name=$(basename -- "$link")
    case "$mounted" in *" $name "*) continue ;; esac
    if [ -L "$link" ] && [ -d "$link" ]; then
        mount_on "$name" "$link" ''
        set -- --mount "$mount" "$@"
    fi
done

# GPUs.
gpus="${GPUS:-}"
if [ -z "$gpus" ]; then
    gpus=none
    if nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
        gpus=all
    fi
fi
if [ "$gpus" = none ]; then
    echo "Without GPUs: nvidia-smi lists none, or GPUS=none." >&2
elif [ -n "$podman" ]; then
    echo "With GPUs: $gpus" >&2
    for gpu in $(printf %s "${gpus#*device=}" | tr ',"' '  '); do
        set -- --device "nvidia.com/gpu=$gpu" "$@"
    done
else
    echo "With GPUs: $gpus" >&2
    set -- --gpus "$gpus" "$@"
fi

# User and limits. Without root's rights an engine cannot raise the limit of locked memory, and maps users: the caller is
# root inside a rootless Docker container, and is kept by Podman if asked to.
if [ -z "$rootless" ]; then
    set -- --user "$(id -u):$(id -g)" --ulimit memlock=-1 "$@"
elif [ -n "$podman" ]; then
    set -- --userns keep-id --user "$(id -u):$(id -g)" "$@"
else
    set -- --user 0:0 "$@"
fi

for variable in $proxies; do
    set -- --env "$variable" "$@"
done
commit=$(sh "$root/pytorch/revision.sh" "$root") # the log names it, for which the image would need git
user=$(id -un 2>/dev/null) || user=$(id -u)
set -- --rm --interactive --ipc host --ulimit stack=67108864 --security-opt label=disable \
    --env "USER=$user" --env "DEEPSPEECH2_IMAGE_ID=$id" --env "DEEPSPEECH2_COMMIT=$commit" \
    --env CUDA_VISIBLE_DEVICES --env OMP_NUM_THREADS --env NPROC_PER_NODE --env MAX_RESTARTS \
    --env SUBMISSION_ORG --env SUBMISSION_DIVISION --env SUBMISSION_STATUS --env SUBMISSION_PLATFORM \
    --mount "type=bind,source=$root,target=/deepspeech2" "$@"
if [ -t 0 ] && [ -t 1 ]; then
    exec "$engine" run --tty "$@"
fi

# Without a terminal, signals to this script do not reach the container: whoever stops it would leave the run going. So
# the container is stopped by its name, by SIGTERM, and after a while by SIGKILL.
name="deepspeech2-$$"
exec 3<&0
"$engine" run --name "$name" --sig-proxy=false "$@" <&3 3<&- &
client=$!
trap '"$engine" stop -t "$grace" "$name" >/dev/null 2>&1; wait "$client" && exit 0 || exit $?' INT TERM HUP
wait "$client"
