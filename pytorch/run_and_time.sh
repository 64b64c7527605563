#!/bin/sh
# The timed run. Usage: sh run_and_time.sh [--config NAME] [overrides] | tee mlperf_ds2.log      (--help lists all)
# Several runs and their score: python -m tools.mlperf series --help
# Standard output is the MLPerf log; its last line is RESULT,DEEPSPEECH2,<seed>,<seconds>,<user>,<start time>.
# A page that shows the run, report.html, is in the output folder. Exit status 0 only if the target was reached.
# Environment variables say how many processes on how many machines (default: one a GPU, or one); see launch.py.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
. "$root/environment.sh"
use_environment run
# The GNU C library returns large blocks to the system when they are freed; on a CPU each step then waits for the same
# memory to be mapped again, a page at a time. Kept instead, a step of the an4 configuration took 379 ms, not 457.
export MALLOC_MMAP_MAX_="${MALLOC_MMAP_MAX_:-0}" MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-100000000000}"
exec "$python" -m pytorch.run_and_time "$@"
