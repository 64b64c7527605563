#!/bin/sh
# The timed run under Slurm, on a file system that all nodes share: from the repository's folder
#     sbatch pytorch/cluster/slurm.sh --config librispeech --seed 1                  (options as of run_and_time.sh)
# Lines to change have an arrow. Before the first job: download_dataset.sh, verify_dataset.sh. Variables, all optional:
#     DATASET_DIR   the packed data set, where it is not in the repository
#     RESULTS_DIR   for logs and checkpoints, instead of results/; a job's are in its folder slurm-<job number>
#     MAX_RESTARTS  how many times torchrun restarts failed processes (see docs/runs.md)
# The log is there too: mlperf_ds2_node<n>.log of the one node, not always 0, whose process torchrun made the first; those
# of the others are empty. Slurm sends SIGTERM before the time limit and, where it is set up with
# PreemptParameters=send_user_signal, before it preempts the job. Training then finishes its step, saves and exits with
# status 75: this script queues the job again, which continues from the checkpoint. So it does after a node has failed.
#
# ---> number of nodes, GPUs and cores of each, and time limit; then partition and account:
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
##SBATCH --partition=gpu
##SBATCH --account=project
#
# One torchrun per node, which starts a process for each GPU.
#SBATCH --job-name=deepspeech2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --signal=TERM@180
#SBATCH --output=results/slurm-%j.out
#SBATCH --open-mode=append
set -eu
preempted=75

# Slurm runs a copy of this script, so its own path says nothing.
root="${SLURM_SUBMIT_DIR:?sbatch sets it: submit this script, do not run it}"
if [ ! -f "$root/pytorch/run_and_time.sh" ]; then
    echo "error: $root is not the repository: submit the job from there" >&2
    exit 2
fi
# ---> what your cluster needs for Python 3.11 and the GPU's driver, such as: module load python/3.12
. "$root/environment.sh"
use_environment run # once, here, and not on all nodes at the same time

output="${RESULTS_DIR:-$root/results}/slurm-$SLURM_JOB_ID"
mkdir -p "$output"
set -- "$@" --output-dir "$output"
if [ -n "${DATASET_DIR:-}" ]; then
    set -- "$@" --dataset-dir "$DATASET_DIR"
fi
# The folder is this job's alone, so a checkpoint in it is from before the job was queued again.
for checkpoint in "$output"/checkpoint_*.pt; do
    if [ -e "$checkpoint" ]; then
        set -- "$@" --resume
        break
    fi
done

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) # another one for each job that shares the node
NNODES="$SLURM_JOB_NUM_NODES"
RUN_ID="slurm-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" # another one for each time the job is queued: see docs/runs.md
export MASTER_ADDR MASTER_PORT NNODES RUN_ID
if [ -n "${SLURM_GPUS_ON_NODE:-}" ]; then
    export NPROC_PER_NODE="$SLURM_GPUS_ON_NODE"
fi
# ---> the network, where NCCL finds the wrong one, such as: export NCCL_SOCKET_IFNAME=ib0

# Since Slurm 22.05, srun does not take the cores of a task from sbatch: all ranks of a node would share one.
# Tasks get this script's environment and all of its cores, whatever the one that sbatch was called in says of its own.
# Nodes end at slightly different times, and the checkpoint is written by one: the first to end must not stop the others.
status=0
# shellcheck disable=SC2016 # the node's number is known on the node
srun --export=ALL --cpu-bind=none --kill-on-bad-exit=0 --wait=600 --open-mode=append \
    ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
    --output="$output/mlperf_ds2_node%n.log" --error="$output/progress_node%n.log" \
    sh -c 'NODE_RANK="$SLURM_NODEID" exec sh "$0/pytorch/run_and_time.sh" "$@"' "$root" "$@" || status=$?
if [ "$status" -eq "$preempted" ]; then
    echo "Preempted: the job is requeued and will continue from its checkpoint in $output." >&2
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
