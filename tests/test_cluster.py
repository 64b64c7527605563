"""The job files for Slurm and Kubernetes: linted, checked against the schemas, and run with stand-ins."""

import os
import re
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from tests.conftest import ROOT
from tests.test_container import write_program

SLURM = ROOT / "pytorch" / "cluster" / "slurm.sh"
KUBERNETES = ROOT / "pytorch" / "cluster" / "kubernetes.yaml"
CLAIM, JOB_SET = yaml.safe_load_all(KUBERNETES.read_text())
JOB = JOB_SET["spec"]["replicatedJobs"][0]["template"]
POD = JOB["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
PREEMPTED = 75

# Stand-ins. The run says what it was asked for, and ends with a status of choice; srun starts it for two nodes in turn.
RUN = """
printf '%s\\n' "$@"
for name in NNODES NODE_RANK NPROC_PER_NODE MASTER_ADDR MASTER_PORT CORES RUN_ID; do eval "echo $name=\\$$name"; done
exit "${STATUS:-0}"
"""
SCONTROL = 'case "$1" in show) printf "node7\\nnode9\\n" ;; requeue) echo "$2" >>"$SLURM_SUBMIT_DIR/requeued" ;; esac'
SRUN = """
export=${SLURM_EXPORT_ENV:-ALL} bind=${SLURM_CPU_BIND:-none}
while :; do
    case "$1" in
    --export=*) export=${1#--export=} ;;
    --cpu-bind=*) bind=${1#--cpu-bind=} ;;
    --output=*) output=${1#--output=} ;;
    --cpus-per-task=*) export CORES="${1#--cpus-per-task=}" ;;
    --*) ;;
    *) break ;;
    esac
    shift
done
[ "$bind" = none ] || exit 1
[ "$export" = ALL ] || unset NNODES NPROC_PER_NODE MASTER_ADDR MASTER_PORT RUN_ID
for node in 0 1; do
    SLURM_NODEID=$node "$@" >>"$(echo "$output" | sed "s/%n/$node/")" || status=$?
done
exit "${status:-0}"
"""
VARIABLES = {
    "SLURM_JOB_ID": "412345",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "node[7,9]",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_CPUS_PER_TASK": "64",
}


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A folder that looks like the repository, with a stand-in for the run."""
    (tmp_path / "repository" / "pytorch").mkdir(parents=True)
    write_program(tmp_path / "repository" / "pytorch" / "run_and_time.sh", RUN)
    (tmp_path / "repository" / "environment.sh").write_text('use_environment() { echo "environment: $1"; }\n')
    return tmp_path / "repository"


def sbatch(
    repository: Path, *options: str, **variables: str
) -> tuple[subprocess.CompletedProcess[str], dict[str, list[str]]]:
    """Run the batch script as Slurm would on two nodes; its result, and the lines that the run on each node printed."""
    programs = repository.parent / "programs"
    programs.mkdir(exist_ok=True)
    write_program(programs / "scontrol", SCONTROL)
    write_program(programs / "srun", SRUN)
    unset = ("DATASET_DIR", "RESULTS_DIR", "NPROC_PER_NODE", "MAX_RESTARTS")
    environment = {name: value for name, value in os.environ.items() if name not in unset} | VARIABLES
    environment |= {"PATH": f"{programs}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(repository), **variables}
    done = subprocess.run(["sh", SLURM, *options], env=environment, capture_output=True, text=True, cwd="/")
    output = Path(environment.get("RESULTS_DIR", repository / "results"), "slurm-412345")
    return done, {log.name: log.read_text().splitlines() for log in output.glob("mlperf_ds2_node*.log")}


def test_every_directive_of_the_batch_script_stands_before_its_first_command() -> None:
    lines = SLURM.read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    directives = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert directives
    assert max(directives) < first


def test_what_slurm_writes_leaves_the_repository_as_it_was() -> None:
    (output,) = re.findall(r"^#SBATCH --output=(.*)/", SLURM.read_text(), re.MULTILINE)
    assert f"/{output}/*" in (ROOT / ".gitignore").read_text().splitlines()
    assert (ROOT / output).is_dir()  # Slurm makes no folder, and the job would fail without a word


# What sbatch has from --export=NONE, and from the step that it is called in.
@pytest.mark.parametrize("inherited", [{}, {"SLURM_EXPORT_ENV": "NONE", "SLURM_CPU_BIND": "quiet,mask_cpu:0x1"}])
def test_slurm_starts_one_run_a_node_with_its_number_and_the_first_nodes_address(
    repository: Path, inherited: dict[str, str]
) -> None:
    done, logs = sbatch(repository, "--config", "an4", **inherited)
    assert done.returncode == 0, done.stderr
    assert "environment: run" in done.stdout
    output = repository / "results" / "slurm-412345"
    for node in (0, 1):
        launch = [f"NODE_RANK={node}", "NPROC_PER_NODE=8", "MASTER_ADDR=node7", "MASTER_PORT=22345", "CORES=64"]
        asked = ["--config", "an4", "--output-dir", str(output), "NNODES=2", *launch, "RUN_ID=slurm-412345-0"]
        assert logs[f"mlperf_ds2_node{node}.log"] == asked


def test_a_preempted_job_is_queued_again_and_goes_on_from_its_checkpoint_if_it_has_one(repository: Path) -> None:
    log, requeued = "mlperf_ds2_node0.log", repository / "requeued"
    done, logs = sbatch(repository, STATUS=str(PREEMPTED))
    assert done.returncode == PREEMPTED
    assert requeued.read_text() == "412345\n"
    assert "--resume" not in logs[log]
    done, logs = sbatch(repository, SLURM_RESTART_COUNT="1", STATUS="1")
    assert done.returncode == 1
    assert "--resume" not in logs[log] and "RUN_ID=slurm-412345-1" in logs[log]
    (repository / "results" / "slurm-412345" / "checkpoint_last.pt").touch()
    assert sbatch(repository)[1][log].count("--resume") == 1
    assert requeued.read_text() == "412345\n"  # not where it failed


def test_data_and_results_may_be_elsewhere(repository: Path) -> None:
    elsewhere = repository.parent / "with a space"
    done, logs = sbatch(repository, DATASET_DIR="/data/LibriSpeech_dataset", RESULTS_DIR=str(elsewhere))
    assert done.returncode == 0, done.stderr
    asked = logs["mlperf_ds2_node0.log"]
    assert asked[asked.index("--dataset-dir") + 1] == "/data/LibriSpeech_dataset"
    assert asked[asked.index("--output-dir") + 1] == str(elsewhere / "slurm-412345")


def test_a_job_submitted_from_another_folder_says_so(tmp_path: Path) -> None:
    done, _ = sbatch(tmp_path)
    assert done.returncode == 2
    assert "is not the repository" in done.stderr


def test_the_manifest_passes_yamllint_and_its_script_shellcheck() -> None:
    rules = "{extends: default, rules: {line-length: {max: 120}}}"
    for command, text in (
        (["yamllint", "--strict", "--config-data", rules, "-"], KUBERNETES.read_text()),
        (["shellcheck", "--shell=sh", "-"], CONTAINER["command"][2]),
    ):
        command[0] = str(Path(sys.executable).with_name(command[0]))
        done = subprocess.run(command, input=text, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_claim_job_and_job_set_obey_the_schemas_of_kubernetes_and_of_kubeflow() -> None:
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "deepspeech2-node-0"}, **JOB}
    for document in (CLAIM, job):
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    parsed = JobsetV1alpha2JobSet.from_dict(JOB_SET)
    assert parsed is not None
    assert parsed.to_dict() == JOB_SET  # a field that the model does not have would be gone


def test_numbers_and_names_agree_in_the_manifest() -> None:
    given = {variable["name"]: variable.get("value") for variable in CONTAINER["env"]}
    assert JOB["spec"]["parallelism"] == JOB["spec"]["completions"] == int(given["NNODES"])
    gpus = {CONTAINER["resources"][kind]["nvidia.com/gpu"] for kind in ("requests", "limits")}
    assert gpus == {given["NPROC_PER_NODE"]}
    assert CONTAINER["ports"][0]["containerPort"] == int(given["MASTER_PORT"])
    name, job = JOB_SET["metadata"]["name"], JOB_SET["spec"]["replicatedJobs"][0]["name"]
    assert given["MASTER_ADDR"] == f"{name}-{job}-0-0.{name}"
    assert POD["volumes"][0]["persistentVolumeClaim"]["claimName"] == CLAIM["metadata"]["name"]
    (run_id,) = (variable for variable in CONTAINER["env"] if variable["name"] == "RUN_ID")
    assert run_id["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.labels['batch.kubernetes.io/controller-uid']"


def test_a_preempted_pod_restarts_all_pods_without_limit_and_other_failures_with_one() -> None:
    preempted, disrupted = JOB["spec"]["podFailurePolicy"]["rules"]
    assert (preempted["action"], preempted["onExitCodes"]["values"]) == ("FailJob", [PREEMPTED])
    assert (disrupted["action"], disrupted["onPodConditions"][0]["type"]) == ("FailJob", "DisruptionTarget")
    (rule,) = JOB_SET["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("RestartJobSetAndIgnoreMaxRestarts", ["PodFailurePolicy"])
    assert JOB_SET["spec"]["failurePolicy"]["maxRestarts"] > 0
    assert JOB["spec"]["backoffLimit"] == 0
    assert POD["restartPolicy"] == "Never"  # Kubernetes demands it of a podFailurePolicy


def test_a_pod_resumes_only_if_its_job_set_left_a_checkpoint(repository: Path) -> None:
    output = repository / "results" / "jobset-1-2-3"

    def start() -> list[str]:
        done = subprocess.run(
            [*CONTAINER["command"], *CONTAINER["args"]],
            env={**os.environ, "JOBSET_UID": "1-2-3", "NODE_RANK": "1", "STATUS": str(PREEMPTED)},
            cwd=repository / "pytorch",
            capture_output=True,
            text=True,
        )
        assert done.returncode == PREEMPTED, done.stderr
        log = output / "mlperf_ds2_node1.log"
        lines = log.read_text().splitlines()
        log.unlink()
        return lines[: next(number for number, line in enumerate(lines) if line.startswith("NNODES"))]

    options = CONTAINER["args"]
    assert start() == [*options, "--output-dir", "../results/jobset-1-2-3"]
    (output / "checkpoint_best.pt").touch()
    assert start() == [*options, "--resume", "--output-dir", "../results/jobset-1-2-3"]


def test_lines_to_change_are_marked() -> None:
    assert len(re.findall("--->", SLURM.read_text())) >= 3
    changed = r"[^#]*(image|storageClassName|parallelism|completions|args|value: unknown)\b"
    lines = [line for line in KUBERNETES.read_text().splitlines() if re.match(changed, line)]
    assert lines and [line for line in lines if "--->" not in line] == []
