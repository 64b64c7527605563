#!/bin/sh
# Training on two hosts: two network namespaces with their own addresses, joined by a virtual cable (veth), in each of
# which run_and_time.sh is started as on a node of its own. The run is made twice: undisturbed, and with the cable pulled
# for some seconds and then node 1 killed and started again. Both must end with the same weights.
# Usage, as root, with iproute2: sh tests/two_hosts.sh DATASET_DIR [options of the run]
# Exit status 77 where namespaces cannot be made.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
. "$root/environment.sh"
use_environment run
dataset=$(CDPATH='' cd -- "${1:?usage: sh tests/two_hosts.sh DATASET_DIR [options of the run]}" && pwd)
shift

skip() {
    echo "skipped: $1" >&2
    exit 77
}
command -v ip >/dev/null || skip "no 'ip': apt-get install iproute2"
[ "$(id -u)" = 0 ] || skip "only root can make network namespaces"
work=$(mktemp -d)
name="ds2-$$"
# shellcheck disable=SC2329 # called by trap
cleanup() {
    for node in 0 1; do
        ip netns pids "$name-$node" 2>/dev/null | xargs -r kill -9 2>/dev/null || true
        ip netns delete "$name-$node" 2>/dev/null || true
    done
    rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM
ip netns add "$name-0" 2>"$work/why" || skip "network namespaces cannot be made: $(cat "$work/why")"
ip netns add "$name-1"
ip link add cable netns "$name-0" type veth peer name cable netns "$name-1" 2>"$work/why" ||
    skip "virtual cables cannot be made: $(cat "$work/why")"
for node in 0 1; do
    ip -n "$name-$node" link set lo up
    ip -n "$name-$node" address add "10.77.0.1$node/24" dev cable
    ip -n "$name-$node" link set cable up
done

# node NUMBER RUN [options]: one node's part of a run, in the background. Each has its own disk: a folder for results.
node() {
    number="$1" run="$2"
    shift 2
    NNODES=2 NODE_RANK="$number" NPROC_PER_NODE=1 MASTER_ADDR=10.77.0.10 MASTER_PORT=29400 MAX_RESTARTS=9 RUN_ID=two-hosts \
        OMP_NUM_THREADS=1 PET_LOCAL_ADDR="10.77.0.1$number" GLOO_SOCKET_IFNAME=cable \
        ip netns exec "$name-$number" sh "$root/pytorch/run_and_time.sh" --device cpu --dataset-dir "$dataset" \
        --output-dir "$work/$run-$number" --dist-timeout-seconds 60 "$@" \
        >>"$work/$run-$number.log" 2>>"$work/$run-$number.err" &
}

# steps RUN: optimizer steps in the log of its first node
steps() {
    grep -c '"key": "train_loss"' "$work/$1-0.log" || true
}

# wait_for_steps RUN NUMBER
wait_for_steps() {
    waited=0
    while [ "$(steps "$1")" -lt "$2" ]; do
        sleep 0.2
        waited=$((waited + 1))
        if [ "$waited" -gt 3000 ]; then
            echo "error: no $2 steps within 10 minutes" >&2
            cat "$work/$1-0.err" "$work/$1-1.err" >&2
            exit 1
        fi
    done
}

# both_end: waits for the nodes and puts their exit statuses into `ended`
both_end() {
    ended=0
    wait "$first" || ended=$?
    other=0
    wait "$second" || other=$?
    ended="$ended $other"
}

echo "== undisturbed"
node 0 undisturbed "$@"
first=$!
node 1 undisturbed "$@"
second=$!
both_end
undisturbed="$ended"
tail -n 2 "$work/undisturbed-0.err"

echo "== disturbed"
node 0 disturbed --checkpoint-interval-minutes 0.02 "$@"
first=$!
node 1 disturbed --checkpoint-interval-minutes 0.02 "$@"
wait_for_steps disturbed 5
echo "the cable is out for 5 seconds after step $(steps disturbed)"
ip -n "$name-0" link set cable down
sleep 5
ip -n "$name-0" link set cable up
wait_for_steps disturbed $(($(steps disturbed) + 5))
echo "node 1 is killed after step $(steps disturbed), and started again 5 seconds later"
ip netns pids "$name-1" | xargs kill -9
sleep 5
node 1 disturbed --checkpoint-interval-minutes 0.02 "$@"
second=$!
both_end
tail -n 2 "$work/disturbed-0.err"

failed=0
# check WHAT COMMAND...
check() {
    what="$1"
    shift
    if "$@"; then
        echo "ok: $what"
    else
        echo "FAILED: $what" >&2
        failed=1
    fi
}
check "both nodes end alike in both runs ($undisturbed)" [ "$undisturbed" = "$ended" ]
check "the nodes name who is lost" grep -q "ranks that hang or are gone: 1" "$work/disturbed-0.err"
check "the run went on from a checkpoint" grep -q '"key": "resumed"' "$work/disturbed-0.log"
check "a run that was disturbed has no line of a result" sh -c "! grep -q '^RESULT,' '$work/disturbed-0.log'"
check "only the first node's disk has checkpoints" [ ! -e "$work/disturbed-1/checkpoint_last.pt" ]
check "both runs have the same weights" "$python" - "$work" <<'PYTHON'
import sys
from pathlib import Path

import torch

from pytorch import checkpoint

left, right = (checkpoint.load(Path(sys.argv[1]) / f"{run}-0" / checkpoint.LAST) for run in ("undisturbed", "disturbed"))
print("WER", left["progress"]["wer"], right["progress"]["wer"], "after steps", left["progress"]["step"], right["progress"]["step"])
sys.exit(not all(torch.equal(left["model"][name], right["model"][name]) for name in left["model"]))
PYTHON
if [ "$failed" = 1 ]; then
    cat "$work"/*.err >&2
fi
exit "$failed"
