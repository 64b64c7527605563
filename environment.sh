# shellcheck shell=sh disable=SC2154
# Sourced by the scripts beside it, which set `root` (this repository) first: POSIX sh cannot tell a sourced file's path.
# Defines use_environment, which sets `python` to an interpreter that has this project's dependencies.

PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH
export PYTHONSAFEPATH=1 # else `python -m` would take a data.py of the current folder for ours
has_dependencies='
import sys
from importlib.util import find_spec
names = "torchaudio Levenshtein espeakng_loader mlperf_logging soundfile soxr tqdm tyro urllib3".split()
sys.exit(sys.version_info < (3, 11) or not all(map(find_spec, names)))'

# use_environment run|test: the environment in .venv, made or updated where needed. To run, python3 will do where there
# is no .venv and it has the dependencies already. In our container it is always the image's python3.
use_environment() {
    extra=''
    if [ "$1" != run ]; then
        extra="[$1]"
    fi
    base="${PYTHON:-python3}"
    if [ -n "${DEEPSPEECH2_CONTAINER:-}" ]; then # set by the image; a .venv in the mounted repository is the host's
        python="$base"
        if [ "$1" != run ]; then
            echo "error: the image has what a run needs, not the extra '$1'. Do this outside of the container." >&2
            return 1
        fi
        return 0
    fi
    python="$root/.venv/bin/python"
    stamp="$root/.venv/installed-$1"
    if [ -x "$python" ] && cmp -s "$root/pyproject.toml" "$stamp"; then
        return 0
    fi
    if [ ! -x "$python" ] && [ "$1" = run ] && "$base" -c "$has_dependencies" 2>/dev/null; then
        python="$base"
        return 0
    fi
    if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "error: '$base' is not Python 3.11 or newer. Set PYTHON to one that is, such as PYTHON=python3.12." >&2
        return 1
    fi
    echo "Installing into $root/.venv (once; PyTorch is large: some minutes) ..." >&2
    # Without Debian's python3-venv, or interrupted, it is left without pip.
    if ! "$python" -m pip --version >/dev/null 2>&1 && ! "$base" -m venv "$root/.venv"; then
        echo "error: could not make $root/.venv. On Debian and Ubuntu: apt-get install python3-venv" >&2
        return 1
    fi
    if ! "$python" -m pip install --quiet --disable-pip-version-check --editable "$root$extra" >&2; then
        echo "error: installing the dependencies failed; see the lines above. Run the command again to continue." >&2
        return 1
    fi
    for installed in run "$1"; do # every extra has what a run needs
        cp "$root/pyproject.toml" "$root/.venv/installed-$installed"
    done
}
