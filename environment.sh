# Sourced by the scripts beside it. Sets `root` (this repository) and `python` (the environment's interpreter),
# and defines make_environment, which creates or updates .venv.
# The sourcing script sets `root` first: POSIX sh cannot tell a sourced file's own path.

PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH

if [ -x "$root/.venv/bin/python" ]; then
    python="$root/.venv/bin/python"
else
    python="${PYTHON:-python3}"
fi

# make_environment [EXTRA]: .venv with this project's dependencies; does nothing when they are installed already.
make_environment() {
    stamp="$root/.venv/installed-${1:-run}"
    if [ -x "$root/.venv/bin/python" ] && cmp -s "$root/pyproject.toml" "$stamp"; then
        python="$root/.venv/bin/python"
        return 0
    fi
    base="${PYTHON:-python3}"
    if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "error: Python 3.11 or newer is needed; '$base' is not. Set PYTHON to one, such as PYTHON=python3.12." >&2
        return 1
    fi
    echo "Installing into $root/.venv (once; PyTorch is large, this takes a few minutes) ..." >&2
    if [ ! -x "$root/.venv/bin/python" ] && ! "$base" -m venv "$root/.venv"; then
        echo "error: could not create $root/.venv. On Debian and Ubuntu: apt-get install python3-venv" >&2
        return 1
    fi
    python="$root/.venv/bin/python"
    "$python" -m pip install --quiet --disable-pip-version-check --editable "$root${1:+[$1]}" >&2 || {
        echo "error: installing the dependencies failed; the lines above say why." >&2
        return 1
    }
    cp "$root/pyproject.toml" "$stamp"
}
