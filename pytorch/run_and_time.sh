#!/bin/sh
# The timed run. Usage: sh run_and_time.sh [--config NAME] [overrides] | tee mlperf_ds2.log      (--help lists all)
# Standard output is the MLPerf log; its last line is RESULT,DEEPSPEECH2,<seed>,<seconds>,<user>,<start time>.
# Exit status 0 only if the target was reached.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
. "$root/environment.sh"
use_environment run
exec "$python" -m pytorch.train "$@"
