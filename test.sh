#!/bin/sh
# All tests, in an environment of their own. Usage: sh test.sh [pytest options, such as -k verify or tests/data]
# Without options two at a time, each with one thread: most of them wait for processes that they start.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "$0")")" && pwd)
. "$root/environment.sh"
use_environment test
cd "$root"
if [ $# -eq 0 ]; then
    set -- --numprocesses 2 --dist loadfile --no-loadscope-reorder # else files of one long test come last
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
fi
exec "$python" -m pytest "$@"
