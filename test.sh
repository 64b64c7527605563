#!/bin/sh
# All tests, in an environment of their own. Usage: sh test.sh [pytest options, such as -k verify or tests/data]
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
. "$root/environment.sh"
use_environment test
cd "$root"
exec "$python" -m pytest "$@"
