# shellcheck shell=sh disable=SC2154
# Sourced by the scripts beside it, which set `root` (this repository) first: POSIX sh cannot tell a sourced file's path.
# Defines use_environment, which sets `python` to an interpreter that has this project's dependencies.

PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH
export PYTHONSAFEPATH=1 # else `python -m` would take a data.py of the current folder for ours
# Arguments: pyproject.toml, and an extra or run. Exits with 0 if this interpreter has all that they ask for.
has_dependencies='
import sys
from importlib.metadata import version
import tomllib

try:
    from packaging.requirements import Requirement
except ImportError:
    from pip._vendor.packaging.requirements import Requirement
with open(sys.argv[1], "rb") as file:
    project = tomllib.load(file)["project"]
extras = project.get("optional-dependencies", {})

def check(lines):
    for wanted in map(Requirement, lines):
        if wanted.name == project["name"]:
            for extra in wanted.extras:
                check(extras[extra])
        elif wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
            if not wanted.specifier.contains(version(wanted.name), prereleases=True):
                sys.exit(f"{wanted} is not installed")

check([*project.get("dependencies", []), *extras.get(sys.argv[2], [])])'

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
    if "$python" -c "$has_dependencies" "$root/pyproject.toml" "$1" 2>/dev/null; then
        return 0
    fi
    if [ ! -x "$python" ] && [ "$1" = run ] && "$base" -c "$has_dependencies" "$root/pyproject.toml" run 2>/dev/null; then
        python="$base"
        return 0
    fi
    if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "error: '$base' is not Python 3.11 or newer. Set PYTHON to one that is, such as PYTHON=python3.12." >&2
        return 1
    fi
    echo "Installing into $root/.venv (once; PyTorch is large: some minutes) ..." >&2
    # Without Debian's python3-venv, interrupted, or of a Python that is no longer there, it has no working pip.
    clear=''
    if [ ! -x "$python" ]; then # a link to a Python that is gone would stay
        clear=--clear
    fi
    if ! "$python" -m pip --version >/dev/null 2>&1 && ! "$base" -m venv $clear "$root/.venv"; then
        echo "error: could not make $root/.venv. On Debian and Ubuntu: apt-get install python3-venv" >&2
        return 1
    fi
    # pip's settings say where packages come from. Those that say where they go, or what is left out, are for others.
    if ! PIP_USER=0 PIP_REQUIRE_HASHES=0 PIP_NO_DEPS=0 PIP_DRY_RUN=0 \
        "$python" -m pip install --quiet --disable-pip-version-check --editable "$root$extra" >&2; then
        echo "error: installing the dependencies failed; see the lines above. Run the command again to continue." >&2
        return 1
    fi
    if ! "$python" -c "$has_dependencies" "$root/pyproject.toml" "$1" >&2; then
        echo "error: pip has installed them elsewhere; '$python -m pip config list' and PIP_* variables say where." >&2
        return 1
    fi
}
