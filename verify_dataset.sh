#!/bin/sh
# Checks a packed data set against its checksums. Usage: sh verify_dataset.sh [--dataset-dir DIR] (see --help)
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "$0")")" && pwd)
. "$root/environment.sh"
use_environment run
exec "$python" -m data.verify "$@"
