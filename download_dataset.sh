#!/bin/sh
# Downloads a corpus and prepares it as a packed data set. Usage: sh download_dataset.sh [--corpus NAME] (see --help)
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "$0")")" && pwd)
. "$root/environment.sh"
use_environment run
exec "$python" -m data.download "$@"
