"""The container's scripts: what they ask of Docker and Podman; the lock; and, where asked for, the container itself."""

import os
import pty
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

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
            f' image) echo sha256:1234 ;; run) printf "%s\\n" "$@" >"{log}" ;; esac',
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
    run = subprocess.run(
        ["sh", root / "pytorch" / "docker" / "run-dev.sh"],
        env={**os.environ, "ENGINE": engine, **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return asked.read_text().splitlines()


def value(arguments: list[str], option: str) -> str:
    return arguments[arguments.index(option) + 1]


@pytest.mark.parametrize(
    ("engine", "option", "of_all", "of_one"),
    [("docker", "--gpus", "all", "device=1"), ("podman", "--device", "nvidia.com/gpu=all", "nvidia.com/gpu=1")],
)
def test_gpus_are_asked_for_where_there_are_some(
    engine: str, option: str, of_all: str, of_one: str, asked: Path
) -> None:
    assert option not in run_dev(asked, engine)
    write_program(asked.parent / "programs" / "nvidia-smi", 'echo "GPU 0: a GPU"')
    assert value(run_dev(asked, engine), option) == of_all
    assert value(run_dev(asked, engine, GPUS="device=1"), option) == of_one
    assert option not in run_dev(asked, engine, GPUS="none")


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


def test_the_commit_is_told_to_the_image_which_has_no_git(asked: Path) -> None:
    (told,) = [argument for argument in run_dev(asked) if argument.startswith("DEEPSPEECH2_COMMIT=")]
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert told.removesuffix("-dirty") == f"DEEPSPEECH2_COMMIT={head}"


def test_only_what_the_program_would_run_makes_a_commit_dirty(asked: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    git = ["git", "-C", str(clone)]
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    for script in ("run-dev.sh", "engine.sh"):  # as they are now
        (clone / "pytorch" / "docker" / script).write_bytes((SCRIPTS / script).read_bytes())
    subprocess.run([*git, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-a", "-m", "-"])
    (clone / ".venv").symlink_to(tmp_path)
    (clone / "before.log").touch()
    for source, dirty in (("notes.txt", False), ("pytorch/extra.py", True)):
        (clone / source).touch()
        (told,) = [word for word in run_dev(asked, root=clone) if word.startswith("DEEPSPEECH2_COMMIT=")]
        assert told.endswith("-dirty") is dirty, source


@pytest.mark.parametrize("variable", ["RESULTS_DIR", "DATASET_DIR"])
def test_a_folder_that_docker_would_split_at_its_comma_is_refused(variable: str, asked: Path, tmp_path: Path) -> None:
    (tmp_path / "a,b").mkdir()
    folder: dict[str, Any] = {variable: str(tmp_path / "a,b")}
    with pytest.raises(AssertionError, match="a,b: a folder whose path has a comma cannot be mounted"):
        run_dev(asked, **folder)


def test_a_terminal_is_passed_on_only_if_there_is_one(asked: Path) -> None:
    assert "--tty" not in run_dev(asked)
    outside, inside = pty.openpty()
    subprocess.run(["sh", SCRIPTS / "run-dev.sh"], stdin=inside, stdout=inside, stderr=inside, check=True)
    os.close(inside)
    os.close(outside)
    assert "--tty" in asked.read_text().splitlines()


def locked() -> list[Requirement]:
    lines = (SCRIPTS / "requirements.lock").read_text().splitlines()
    return [Requirement(line.removesuffix(" \\")) for line in lines if line[:1] not in ("#", " ", "")]


def test_the_lock_has_what_the_project_wants_except_pytorch_pinned_and_hashed() -> None:
    text = (SCRIPTS / "requirements.lock").read_text()
    assert not re.search(r"^(torch|triton|nvidia|cuda)(-\S*)?==", text, re.MULTILINE)
    pins = {(pin.name, next(iter(pin.specifier)).version) for pin in locked()}
    assert all(re.search(rf"^{name}=={re.escape(pin)}\b.*\\\n    --hash=sha256:", text, re.M) for name, pin in pins)
    for wanted in DEPENDENCIES:
        versions = [pin for name, pin in pins if name == wanted.name.lower()]
        assert bool(versions) is (wanted.name != "torch"), f"{wanted}: CONTRIBUTING.md says how to make the lock"
        assert all(wanted.specifier.contains(version) for version in versions), wanted


def test_the_base_image_is_pinned_to_a_version_of_pytorch_that_the_project_takes() -> None:
    dockerfile = (SCRIPTS / "Dockerfile").read_text()
    base = re.search(
        r"^ARG BASE_IMAGE=docker.io/pytorch/pytorch:([\d.]+)-cuda[\d.]+-cudnn\d+-runtime$", dockerfile, re.M
    )
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
