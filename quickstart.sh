#!/bin/sh
# From nothing to a trained model: environment, synthetic corpus, checksum, training to WER 23.0 on this machine's CPU
# or GPU. Needs Python 3.11 or newer and a network for the Python packages. Usage: sh quickstart.sh [overrides of the run]
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "$0")")" && pwd)
. "$root/environment.sh"

results="$root/results/synthetic"
log="$results/last_run.log"
if [ $# -eq 0 ] && [ -f "$results/checkpoint_best.pt" ] && tail -n 1 "$log" 2>/dev/null | grep -Eq '^(RESULT|RESUMED),'; then
    echo "Already done: $(tail -n 1 "$log")"
    echo "Log: $log    Checkpoint: $results/checkpoint_best.pt    Report: $results/report.html"
    echo "To train again: sh pytorch/run_and_time.sh --config synthetic    To start over: rm -r '$results'"
    exit 0
fi

use_environment run
echo "== 1 of 3: speech synthesis, packed data set (about a minute)"
sh "$root/download_dataset.sh" --corpus synthetic
echo "== 2 of 3: checksum of the data set"
sh "$root/verify_dataset.sh" --dataset-dir "$root/Synthetic_dataset"
echo "== 3 of 3: training until the validation WER is 23.0 or less (half a minute to three on two CPU cores)"
output=$(sh "$root/pytorch/run_and_time.sh" --config synthetic "$@") # its log, which last_run.log has too
printf '%s\n' "$output" | tail -n 1
if [ $# -eq 0 ]; then # overrides may name another folder
    echo "Log: $log    Checkpoint: $results/checkpoint_best.pt    Report: $results/report.html"
fi
echo "This corpus is synthetic: it shows that everything works, but its time is not a benchmark result. See README.md."
