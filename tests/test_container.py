"""The container's scripts: what they ask of Docker and Podman; the lock; and, where asked for, the container itself."""

import itertools
import os
import pty
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from pytorch import machine
from tests.conftest import ROOT

SCRIPTS = ROOT / "pytorch" / "docker"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DEPENDENCIES = [Requirement(line) for line in PROJECT["dependencies"]]

ROOTLESS = {"docker": "Security Options:\n  rootless\n", "podman": "security:\n    rootless: true\n"}
WITH_ROOT = {"docker": "Security Options:\n  seccomp\n", "podman": "security:\n    rootless: false\n"}


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with the arguments of `run`, one a line, after a script ran with the stand-ins that this puts on PATH."""
    log, programs = tmp_path / "asked", tmp_path / "programs"
    programs.mkdir()
    for engine in ("docker", "podman"):
        write_program(
            programs / engine,
            f'case "$1" in --version) echo "{engine} version 9" ;; info) cat "{tmp_path}/facts" ;;'
            f' image) echo sha256:1234 ;; run) printf "%s\\n" "$@" >"{log}" ;;'
            f' build) printf "%s\\n" "$@" >"{tmp_path}/built" ;; esac',
        )
    write_program(programs / "nvidia-smi", "exit 9")
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    for variable in ("DATASET_DIR", "DATASET_MODE", "RESULTS_DIR", "GPUS", "IMAGE", "ENGINE"):
        monkeypatch.delenv(variable, raising=False)
    return log


def write_program(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def run_dev(
    asked: Path, engine: str = "docker", facts: dict[str, str] = WITH_ROOT, root: Path = ROOT, **variables: str
) -> list[str]:
    (asked.parent / "facts").write_text(facts[engine])
    command = ["sh", str(root / "pytorch" / "docker" / "run-dev.sh")]
    environment = {**os.environ, "ENGINE": engine, **variables}
    run = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return asked.read_text().splitlines()


def build(asked: Path, root: Path = ROOT) -> list[str]:
    command = ["sh", str(root / "pytorch" / "docker" / "build-docker.sh")]
    subprocess.run(command, env={**os.environ, "ENGINE": "docker"}, check=True, capture_output=True)
    return (asked.parent / "built").read_text().splitlines()


def value(arguments: list[str], option: str) -> str:
    return arguments[arguments.index(option) + 1]


@pytest.mark.parametrize(
    ("engine", "option", "all_and_one"),
    [("docker", "--gpus", ["all", "device=1"]), ("podman", "--device", ["nvidia.com/gpu=all", "nvidia.com/gpu=1"])],
)
def test_gpus_are_asked_for_where_there_are_some(engine: str, option: str, all_and_one: list[str], asked: Path) -> None:
    assert option not in run_dev(asked, engine)
    write_program(asked.parent / "programs" / "nvidia-smi", 'echo "GPU 0: a GPU"')
    assert [value(run_dev(asked, engine, GPUS=gpus), option) for gpus in ("", "device=1")] == all_and_one
    assert option not in run_dev(asked, engine, GPUS="none")
    several = run_dev(asked, engine, GPUS='"device=0,1"')  # a name of a device is one device's
    words = ['"device=0,1"'] if engine == "docker" else ["nvidia.com/gpu=1", "nvidia.com/gpu=0"]
    assert [word for before, word in itertools.pairwise(several) if before == option] == words


def test_files_are_the_callers_whatever_rights_the_engine_has(asked: Path) -> None:
    caller = f"{os.getuid()}:{os.getgid()}"
    for engine in ("docker", "podman"):
        arguments = run_dev(asked, engine)
        assert value(arguments, "--user") == caller
        assert "memlock=-1" in arguments
    # A rootless Docker's root is the caller; a rootless Podman can keep the caller. Neither may lift the limit.
    assert value(run_dev(asked, "docker", ROOTLESS), "--user") == "0:0"
    arguments = run_dev(asked, "podman", ROOTLESS)
    assert (value(arguments, "--userns"), value(arguments, "--user")) == ("keep-id", caller)
    assert "memlock=-1" not in arguments


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A folder with what the container's scripts need, not yet under version control."""
    root = tmp_path / "around" / "a clone"
    shutil.copytree(SCRIPTS, root / "pytorch" / "docker")
    shutil.copy(ROOT / "pytorch" / "revision.sh", root / "pytorch")
    shutil.copy(ROOT / "pyproject.toml", root)
    return root


def commit(folder: Path) -> str:
    author = "-c user.name=a -c user.email=a@b"
    script = f"git init --quiet; git add .; git {author} commit --quiet --message -; git rev-parse HEAD"
    return subprocess.run(["sh", "-ec", script], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def test_log_container_and_image_have_the_commit_of_this_repository_and_of_no_other(
    asked: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def revision() -> str:
        (passed,) = [word for word in run_dev(asked, root=repository) if word.startswith("DEEPSPEECH2_COMMIT=")]
        name, _, dirty = passed.partition("=")[2].partition("-")
        tag = f"deepspeech2-benchmark:{PROJECT['version']}-{name[:12]}{dirty and '-'}{dirty}"
        assert tag in build(asked, repository)
        assert machine.git_revision() == (name, None if name == "unknown" else dirty == "dirty")
        return passed.partition("=")[2]

    monkeypatch.setattr(machine, "ROOT", repository)
    monkeypatch.delenv("DEEPSPEECH2_COMMIT", raising=False)
    (repository.parent / "other.txt").touch()
    (repository.parent / ".gitignore").write_text("a clone\n")
    another = commit(repository.parent)
    assert revision() == "unknown"
    head = commit(repository)
    assert head != another and revision() == head
    for source, dirty in (("notes.txt", ""), ("pytorch/extra.py", "-dirty"), ("pyproject.toml", "-dirty")):
        with (repository / source).open("a") as stream:
            stream.write("\n")
        assert revision() == head + dirty, source
    monkeypatch.setenv("GIT_DIR", str(repository.parent / ".git"))  # as a hook of the other repository has it
    monkeypatch.setenv("GIT_WORK_TREE", str(repository.parent))
    assert revision() == f"{head}-dirty"


def test_links_in_the_repository_lead_to_the_same_folders_in_the_container(
    asked: Path, repository: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    for name in ("AN4", "results", "other results"):
        (disk / name).mkdir(parents=True)
    (repository / "AN4_dataset").symlink_to(disk / "AN4")
    (repository / "results").symlink_to("../../disk/results")

    def mounts(**variables: Any) -> set[str]:
        words = run_dev(asked, root=repository, **variables)
        return {word for option, word in itertools.pairwise(words) if option == "--mount"}

    whole = f"type=bind,source={repository},target=/deepspeech2"
    an4 = f"type=bind,source={disk}/AN4,target={disk}/AN4"
    assert mounts() == {whole, an4, f"type=bind,source={disk}/results,target=/deepspeech2/../../disk/results"}
    elsewhere = f"type=bind,source={disk}/other results,target=/deepspeech2/../../disk/results"
    assert mounts(RESULTS_DIR=str(disk / "other results")) == {whole, an4, elsewhere}
    assert mounts(DATASET_DIR=str(repository / "AN4_dataset")) - mounts() == {f"{an4},readonly"}


def test_proxies_are_passed_to_the_build_and_to_the_container(asked: Path) -> None:
    container, image = itertools.pairwise(run_dev(asked)), itertools.pairwise(build(asked))
    names = {"http_proxy", "HTTPS_PROXY", "no_proxy"}
    assert names <= {name for option, name in container if option == "--env"}
    assert names <= {name for option, name in image if option == "--build-arg"}


def test_an_image_that_was_built_but_is_not_there_is_an_error(asked: Path) -> None:
    program = asked.parent / "programs" / "docker"
    write_program(program, 'case "$1" in image) exit 1 ;; esac')  # as with a builder that loads nothing
    built = subprocess.run(["sh", SCRIPTS / "build-docker.sh"], capture_output=True, text=True)
    assert built.returncode == 1 and "--load" in built.stderr


@pytest.mark.parametrize("variable", ["RESULTS_DIR", "DATASET_DIR"])
def test_a_folder_that_docker_would_split_at_its_comma_is_refused(variable: str, asked: Path, tmp_path: Path) -> None:
    (tmp_path / "a,b").mkdir()
    with pytest.raises(AssertionError, match="a,b: a folder whose path has a comma cannot be mounted"):
        run_dev(asked, "docker", WITH_ROOT, ROOT, **{variable: str(tmp_path / "a,b")})


def test_a_terminal_is_passed_on_only_if_there_is_one(asked: Path) -> None:
    assert "--tty" not in run_dev(asked)
    outside, inside = pty.openpty()
    subprocess.run(["sh", SCRIPTS / "run-dev.sh"], stdin=inside, stdout=inside, stderr=inside, check=True)
    os.close(inside)
    os.close(outside)
    assert "--tty" in asked.read_text().splitlines()


def test_the_lock_has_what_the_project_wants_except_pytorch_pinned_and_hashed() -> None:
    text = (SCRIPTS / "requirements.lock").read_text()
    assert not re.search(r"^(torch|triton|nvidia|cuda)(-\S*)?==", text, re.MULTILINE)
    pins = re.findall(r"^([\w.-]+)==([^ ;]+).*\\\n    --hash=sha256:", text, re.MULTILINE)
    assert len(pins) == len(re.findall(r"^\w", text, re.MULTILINE))  # lines that are neither comments nor hashes
    for wanted in DEPENDENCIES:
        versions = [pin for name, pin in pins if name == wanted.name.lower()]
        assert bool(versions) is (wanted.name != "torch"), f"{wanted}: CONTRIBUTING.md says how to make the lock"
        assert all(wanted.specifier.contains(version) for version in versions), wanted


def test_the_base_image_is_pinned_to_a_version_of_pytorch_that_the_project_takes() -> None:
    pattern = r"^ARG BASE_IMAGE=docker.io/pytorch/pytorch:([\d.]+)-cuda[\d.]+-cudnn\d+-runtime$"
    base = re.search(pattern, (SCRIPTS / "Dockerfile").read_text(), re.MULTILINE)
    assert base is not None
    assert next(wanted for wanted in DEPENDENCIES if wanted.name == "torch").specifier.contains(base[1])


@pytest.mark.skipif("CONTAINER_TEST" not in os.environ, reason="tests/container.sh runs only with CONTAINER_TEST=1")
def test_the_container_is_built_trains_and_leaves_the_callers_files() -> None:
    """To the target with CONTAINER_TEST=1, for a few steps with CONTAINER_TEST=short."""
    options = ["--max-steps", "10", "--target-wer", "1000"] if os.environ["CONTAINER_TEST"] == "short" else []
    run = subprocess.run(["sh", ROOT / "tests" / "container.sh", *options], capture_output=True, text=True)
    print(run.stdout, run.stderr)
    if run.returncode == 77:
        pytest.skip(run.stderr.splitlines()[-1])
    assert run.returncode == 0
