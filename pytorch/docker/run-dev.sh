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
root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
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

# Mounts. A folder to mount on is made here: the engine would make it too, but root's.
if [ -n "${RESULTS_DIR:-}" ]; then
    mkdir -p "$RESULTS_DIR" "$root/results" || fail "RESULTS_DIR=$RESULTS_DIR cannot be made"
    results=$(CDPATH='' cd -- "$RESULTS_DIR" && pwd)
    no_comma "$results"
    set -- --mount "type=bind,source=$results,target=/deepspeech2/results" "$@"
fi
if [ -n "${DATASET_DIR:-}" ]; then
    [ -d "$DATASET_DIR" ] || fail "DATASET_DIR=$DATASET_DIR is not a folder; download_dataset.sh makes packed data sets"
    dataset=$(CDPATH='' cd -- "$DATASET_DIR" && pwd)
    no_comma "$dataset"
    name=$(basename -- "$dataset")
    case "$name" in *_dataset) ;; *) name=LibriSpeech_dataset ;; esac
    case "${DATASET_MODE:-ro}" in
    ro) mode=,readonly ;;
    rw) mode='' ;;
    *) fail "DATASET_MODE is '$DATASET_MODE'; it must be ro or rw" ;;
    esac
    if [ "$dataset" != "$root/$name" ]; then
        mkdir -p "$root/$name"
    fi
    set -- --mount "type=bind,source=$dataset,target=/deepspeech2/$name$mode" "$@"
fi

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
    set -- --device "nvidia.com/gpu=${gpus#device=}" "$@"
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

# The log names the commit, for which the image would need git. What differs from it is as in pytorch/machine.py.
commit=$(git -C "$root" rev-parse HEAD 2>/dev/null) || commit=''
changes() {
    git -C "$root" status --porcelain --untracked-files=no
    git -C "$root" ls-files --others --exclude-standard 'data/*.py' 'pytorch/*.py' 'pytorch/*.cpp' 'tools/*.py'
}
if [ -n "$commit" ] && [ -n "$(changes)" ]; then
    commit="$commit-dirty"
fi

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
