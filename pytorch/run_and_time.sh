#!/bin/sh
# The timed run. Usage: sh run_and_time.sh [--config NAME] [overrides] | tee mlperf_ds2.log      (--help lists all)
# Standard output is the MLPerf log; its last line is RESULT,DEEPSPEECH2,<seed>,<seconds>,<user>,<start time>.
# The log, last_run.log, and a page that shows the run, report.html, are in the output folder.
# Exit status 0 only if the target was reached. Environment variables say how many processes on how many machines
# (default: one for each GPU, or one); see run_and_time.py. Several runs and their score: python -m tools.mlperf series --help
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "$0")")/.." && pwd)
. "$root/environment.sh"
use_environment run
exec "$python" -m pytorch.run_and_time "$@"
