#!/bin/sh
# Builds and uses the container for real, with this repository's own scripts as another user would: image, data set,
# training to the target, results. Takes about 5 GB of TMPDIR (/var/tmp), which are removed afterwards.
#     sh tests/container.sh [options of the training run]          as root, on Debian 12 or newer
# Exit status: 0 passed, 77 skipped because something cannot be had here, any other failed.
#
# Docker comes from Debian; its daemon is private. The base image is a stand-in, made of Debian and the CPU build of
# PyTorch from where apt and pip of this machine have them (TORCH names the build). What cannot be had in a sandbox is
# dropped between our scripts and Docker, and logged: GPUs, memory that may be locked, a network of the container's own.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "$0")")/.." && pwd)
TORCH="${TORCH:-torch==2.13.0+cpu}"
caller=12345 # user and group that call the scripts, and nobody's else
daemon=''

skip() {
    echo "SKIPPED, the container was NOT tested: $1" >&2
    exit 77
}

step() {
    now=$(date +%s)
    echo "== $((now - started)) s: $1"
}

check() { # check <what> <command ...>
    what="$1"
    shift
    if ! "$@"; then
        echo "FAILED: $what" >&2
        exit 1
    fi
    checks=$((checks + 1))
    echo "ok: $what"
}

fails() {
    if "$@"; then
        return 1
    fi
}

cleanup() {
    status=$?
    trap - EXIT
    if [ "$status" -ne 0 ] && [ "$status" -ne 77 ]; then
        tail -n 20 "$work"/*.log "$work"/*.out >&2 2>/dev/null || true
    fi
    if [ -n "$daemon" ]; then
        kill "$daemon" 2>/dev/null || true
        wait "$daemon" || true
    fi
    awk -v work="$work/" 'index($2, work) == 1 { print $2 }' /proc/mounts | sort -r | while read -r mounted; do
        umount "$mounted"
    done
    rm -rf --one-file-system "$work"
    exit "$status"
}

started=$(date +%s)
checks=0
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    skip "it needs root on Debian"
fi
work=$(mktemp -d "${TMPDIR:-/var/tmp}/container-test.XXXXXX")
chmod 755 "$work"
trap cleanup EXIT
trap 'exit 130' INT TERM HUP

step "Docker"
if ! command -v dockerd >/dev/null || ! command -v debootstrap >/dev/null; then
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends docker.io debootstrap
    } >"$work/apt.log" 2>&1 || skip "docker.io and debootstrap could not be installed: $(tail -n 1 "$work/apt.log")"
fi
docker=$(command -v docker)
export DOCKER_HOST="unix://$work/docker.sock"
dockerd --iptables=false --ip6tables=false --ip-forward=false --ip-masq=false --bridge=none --storage-driver=overlay2 \
    --data-root "$work/docker" --exec-root "$work/exec" --pidfile "$work/docker.pid" --host "$DOCKER_HOST" \
    --group "$caller" >"$work/dockerd.log" 2>&1 &
daemon=$!
waited=0
until "$docker" info >/dev/null 2>&1; do
    waited=$((waited + 1))
    if [ "$waited" -gt 60 ] || ! kill -0 "$daemon" 2>/dev/null; then
        skip "no Docker daemon can start here: $(tail -n 1 "$work/dockerd.log")"
    fi
    sleep 1
done

step "stand-in for the base image: Debian"
codename=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
# shellcheck disable=SC2016 # apt's variables
mirror=$(apt-get indextargets --format '$(SITE) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' |
    awk -v release="$codename" '$2 == release && $3 == "main" { print $1; exit }')
debian="$work/debian"
debootstrap --variant=minbase --include=python3,python3-pip,ca-certificates "$codename" "$debian" "$mirror" \
    >"$work/debootstrap.log" 2>&1 || skip "debootstrap $codename fails: $(tail -n 1 "$work/debootstrap.log")"

step "stand-in for the base image: PyTorch"
for file in /etc/resolv.conf /etc/pip.conf /etc/ssl/certs/ca-certificates.crt; do
    if [ -f "$file" ]; then
        cp -L "$file" "$debian$file"
    fi
done
if [ -f "${XDG_CONFIG_HOME:-$HOME/.config}/pip/pip.conf" ]; then
    mkdir -p "$debian/root/.config/pip"
    cp "${XDG_CONFIG_HOME:-$HOME/.config}/pip/pip.conf" "$debian/root/.config/pip"
fi
mkdir "$debian/wheels"
minor=$(chroot "$debian" python3 -c 'import sys; print(sys.version_info.minor)')
python3 -m pip download --no-deps --only-binary :all: --python-version "3.$minor" --dest "$debian/wheels" "$TORCH" \
    >"$work/pip.log" 2>&1 || skip "pip finds no $TORCH (PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL says where it is)"
# The official images have torchaudio. For the CPU there is none to be had everywhere, so the stand-in has torchaudio
# without its compiled parts, which serve other things than spectrograms. Debian's mark against pip stays.
chroot "$debian" sh -c 'python3 -m pip install --no-cache-dir --break-system-packages /wheels/*.whl numpy &&
    python3 -m pip install --no-cache-dir --break-system-packages --no-deps torchaudio==2.11.0 &&
    rm -r /wheels /usr/local/lib/python3*/dist-packages/torchaudio/lib/*.so &&
    test -f /usr/lib/python3.*/EXTERNALLY-MANAGED' >"$work/pip.log" 2>&1 ||
    skip "PyTorch cannot be installed in the stand-in: $(tail -n 1 "$work/pip.log")"
tar -C "$debian" -c . | "$docker" import - stand-in >/dev/null
rm -rf --one-file-system "$debian"

# From here on, nothing is skipped. Our scripts call these instead of Docker and of NVIDIA's tool.
mkdir "$work/bin" "$work/home"
cat >"$work/bin/docker" <<END
#!/bin/sh
echo "\$*" >>'$work/asked.log'
for word in "\$@"; do
    shift
    case "\$before \$word" in
    *' --gpus' | '--gpus '* | *' --ulimit') ;;
    '--ulimit memlock='*) ;;
    '--ulimit '*) set -- "\$@" --ulimit "\$word" ;;
    ' build' | ' run') set -- "\$@" "\$word" --network host ;;
    *) set -- "\$@" "\$word" ;;
    esac
    before="\$word"
done
echo "\$*" >>'$work/given.log'
exec '$docker' "\$@"
END
cat >"$work/bin/nvidia-smi" <<END
#!/bin/sh
cat '$work/gpus'
END
chmod 755 "$work/bin"/*
: >"$work/gpus"
: >"$work/asked.log"
: >"$work/given.log"
export PATH="$work/bin:$PATH" HOME="$work/home"

# The repository, cloned, in a folder with a space, with an environment of the host's that must not be used inside.
clone="$work/a clone"
git clone --quiet "$root" "$clone"
mkdir -p "$clone/.venv/bin"
printf '#!/bin/sh\necho "this Python is the host'\''s" >&2\nexit 99\n' >"$clone/.venv/bin/python"
chmod 755 "$clone/.venv/bin/python"
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' "$clone/pyproject.toml")
commit=$(git -C "$clone" rev-parse --short=12 HEAD)
chown -R "$caller:$caller" "$clone" "$work/home" "$work/asked.log" "$work/given.log"
cd /

small='--max-steps 1 --hidden-size 8 --target-wer 1000'

as_caller() {
    setpriv --reuid "$caller" --regid "$caller" --clear-groups "$@"
}

build() {
    BASE_IMAGE="$1" as_caller sh "$clone/pytorch/docker/build-docker.sh"
}

run_dev() {
    as_caller sh "$clone/pytorch/docker/run-dev.sh" "$@"
}

inspect() {
    "$docker" image inspect --format "$1" "deepspeech2-benchmark:$version"
}

step "build"
build stand-in >"$work/build.out" 2>&1 || check "the image is built" false
image=$(inspect '{{.Id}}')
check "tagged with version and commit" [ "$image" = \
    "$("$docker" image inspect --format '{{.Id}}' "deepspeech2-benchmark:$version-$commit")" ]
for label in "version=$version" "revision=$commit" base.name=stand-in licenses=Apache-2.0; do
    check "labeled $label" [ "$(inspect "{{index .Config.Labels \"org.opencontainers.image.${label%%=*}\"}}")" = "${label#*=}" ]
done
check "what is sent to the builder is small" grep -q 'context.* [0-9.]*kB' "$work/build.out"
check "the default user is not root" [ "$(docker run --rm "$image" id -u)" -ne 0 ]

freeze() { # freeze <image>: what is installed, normalized
    docker run --rm "$1" python3 -m pip freeze | tr 'A-Z_' 'a-z-' | sort
}
freeze stand-in >"$work/base.freeze"
freeze "$image" >"$work/image.freeze"
docker run --rm --interactive "$image" python3 - >"$work/lock.freeze" <<'END'
from pip._vendor.packaging.requirements import Requirement

for line in open("/opt/deepspeech2/requirements.lock"):
    if line[0] not in "# \n":
        requirement = Requirement(line.rstrip("\\\n "))
        if requirement.marker is None or requirement.marker.evaluate():
            print(f"{requirement.name}{requirement.specifier}".lower())
END
sort -o "$work/lock.freeze" "$work/lock.freeze"
check "the lock is not empty" [ "$(wc -l <"$work/lock.freeze")" -gt 10 ]
check "all of the lock is installed" [ -z "$(comm -23 "$work/lock.freeze" "$work/image.freeze")" ]
sort "$work/base.freeze" "$work/lock.freeze" >"$work/expected.freeze"
check "nothing else is" [ -z "$(comm -23 "$work/image.freeze" "$work/expected.freeze")" ]
check "PyTorch is the base's" [ "$(grep '^torch @' "$work/base.freeze")" = "$(grep '^torch @' "$work/image.freeze")" ]
check "no dependency is broken" docker run --rm "$image" python3 -m pip check

step "build again"
build stand-in >"$work/build.out" 2>&1
check "nothing was built anew" [ "$(inspect '{{.Id}}')" = "$image" ]

step "download and verify, inside"
echo 'GPU 0: pretended' >"$work/gpus"
printf '%s\n' 'set -e' 'sh ../download_dataset.sh --corpus synthetic' \
    'sh ../verify_dataset.sh --dataset-dir ../Synthetic_dataset' |
    run_dev >"$work/data.out" 2>&1 || check "the data set is made and verified" false
check "the data set is verified" grep -q 'Dataset Checksum Passed' "$work/data.out"

step "train"
printf 'sh run_and_time.sh --config synthetic %s\n' "$*" | run_dev >"$work/mlperf_ds2.log" 2>"$work/train.out" ||
    check "the target is reached" false
tail -n 1 "$work/mlperf_ds2.log"
check "standard output is the log" [ "$(grep -cv '^:::MLLOG' "$work/mlperf_ds2.log")" -eq 1 ]
check "it ends with the result, and who had it" \
    sh -c "tail -n 1 '$work/mlperf_ds2.log' | grep -q '^RESULT,DEEPSPEECH2,1,[0-9]*,$caller,'"
check "it names the image" grep -q "\"container_image\".*\"$image\"" "$work/mlperf_ds2.log"
check "the recurrent layers run compiled" grep -q '"gru_implementation".*fused kernel' "$work/mlperf_ds2.log"
check "GPUs were asked for, each time" [ "$(grep -c '^run .*--gpus all' "$work/asked.log")" -eq 2 ]
check "the script says so" grep -q 'With GPUs: all' "$work/train.out"
for option in '--ulimit memlock=-1' '--ulimit stack=67108864' '--ipc host'; do
    check "$option was asked for, each time" [ "$(grep -c "^run .*$option" "$work/asked.log")" -eq 2 ]
done
check "the checkpoint is in the repository" [ -f "$clone/results/synthetic/checkpoint_best.pt" ]

step "at a terminal, as in README.md"
printf '%s\n' "sh run_and_time.sh --config synthetic $small --output-dir ../results/small | tee mlperf_ds2.log" exit |
    as_caller script --quiet --return --command "sh '$clone/pytorch/docker/run-dev.sh'" /dev/null >"$work/terminal.out" 2>&1 ||
    check "a run at a terminal ends well" false
check "the log is in pytorch/" grep -q '^RESULT,' "$clone/pytorch/mlperf_ds2.log"
check "all files are the caller's" [ -z "$(find "$clone" ! -uid "$caller" -print -o ! -gid "$caller" -print)" ]

step "without GPUs; data set and results elsewhere"
: >"$work/gpus"
: >"$work/asked.log"
mkdir "$work/elsewhere" "$work/results"
mv "$clone/Synthetic_dataset" "$work/elsewhere"
chown "$caller:$caller" "$work/results"
export DATASET_DIR="$work/elsewhere/Synthetic_dataset" RESULTS_DIR="$work/results"
printf '%s\n' 'touch ../Synthetic_dataset/written && exit 1' \
    "sh run_and_time.sh --config synthetic $small" |
    run_dev >"$work/elsewhere.out" 2>&1 || check "training reads a read-only data set" false
check "the data set is read-only" grep -q 'Read-only file system' "$work/elsewhere.out"
check "results are where they were asked for" [ -f "$work/results/synthetic/checkpoint_best.pt" ]
check "the script says that there is no GPU" grep -q 'Without GPUs' "$work/elsewhere.out"
check "none was asked for" fails grep -q -e '--gpus' "$work/asked.log"
export DATASET_MODE=rw
check "commands may be arguments, and write where they may" run_dev touch ../Synthetic_dataset/written

step "errors"
for variable in DATASET_DIR=/not/there RESULTS_DIR=/proc/not/there IMAGE=not:there ENGINE=not-there; do
    if (export "${variable?}" && run_dev true </dev/null >"$work/error.out" 2>&1); then
        check "$variable is an error" false
    fi
    check "$variable is an error that names it" \
        sh -c "grep '^error: ' '$work/error.out' | grep -q '${variable#*=}'"
done

step "stopped from outside"
unset DATASET_DIR RESULTS_DIR
setpriv --reuid "$caller" --regid "$caller" --clear-groups sh "$clone/pytorch/docker/run-dev.sh" \
    sh -c 'trap "exit 75" TERM; while :; do sleep 1; done' </dev/null &
script=$!
waited=0
until [ -n "$("$docker" ps --quiet)" ] || [ "$waited" -ge 30 ]; do
    waited=$((waited + 1))
    sleep 1
done
check "a container runs" [ -n "$("$docker" ps --quiet)" ]
kill "$script"
status=0
wait "$script" || status=$?
check "the command was told, and its status is the script's" [ "$status" -eq 75 ]
check "it ends with the script" [ -z "$("$docker" ps --quiet)" ]

step "a base image whose Python is a virtual environment, and which wants TF32"
mkdir "$work/environment"
cat >"$work/environment/Dockerfile" <<END
FROM $image
USER 0
RUN userdel deepspeech2 && python3 -m pip uninstall --yes --break-system-packages numpy soundfile tyro && \
    python3 -m venv --without-pip --system-site-packages /opt/venv
ENV PATH=/opt/venv/bin:\$PATH TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1
END
docker build --tag stand-in:venv "$work/environment" >"$work/build.out" 2>&1
build stand-in:venv >"$work/build.out" 2>&1 || check "the image is built" false
check "what was lacking is in the environment" [ /opt/venv = \
    "$(docker run --rm "deepspeech2-benchmark:$version" python3 -c 'import numpy, tyro; print(numpy.__file__[:9])')" ]

check "matrix products are in full precision, whatever the base says" [ highest = \
    "$(docker run --rm "deepspeech2-benchmark:$version" python3 -c 'import torch; print(torch.get_float32_matmul_precision())')" ]

step "passed: $checks checks"
