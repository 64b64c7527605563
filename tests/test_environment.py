"""environment.sh finds, makes and mends the environment; scripts may be called through links."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.test_container import write_program

# Stands in for .venv's Python: `broken` says whether it lacks packages; pip's call and settings go to a file.
PYTHON = """
here=$(dirname "$0")
case "$*" in
-c*) if [ -e "$here/broken" ]; then echo "torch is not installed" >&2; exit 1; fi ;;
"-m pip --version") ;;
"-m pip install"*)
    env | grep ^PIP_ >"$here/installed"
    [ -e "$here/elsewhere" ] || rm "$here/broken" ;;
esac"""


@pytest.fixture
def bin_folder(tmp_path: Path) -> Path:
    """Of a .venv with a stand-in, beside a copy of environment.sh."""
    folder = tmp_path / ".venv" / "bin"
    folder.mkdir(parents=True)
    write_program(folder / "python", PYTHON)
    (tmp_path / "environment.sh").write_bytes((ROOT / "environment.sh").read_bytes())
    return folder


def use(root: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    script = f"root='{root}'; . '{root}/environment.sh'; use_environment run && echo \"$python\""
    environment = {**os.environ, **variables}
    return subprocess.run(["sh", "-c", script], capture_output=True, text=True, env=environment)


def test_an_environment_that_lost_its_packages_is_installed_again_whatever_pip_is_set_to(
    tmp_path: Path, bin_folder: Path
) -> None:
    python = f"{bin_folder / 'python'}\n"
    assert use(tmp_path).stdout == python
    assert not (bin_folder / "installed").exists()
    (bin_folder / "broken").touch()
    settings = {"PIP_USER": "1", "PIP_REQUIRE_HASHES": "1", "PIP_INDEX_URL": "http://mirror.example"}
    assert use(tmp_path, **settings).stdout == python
    installed = (bin_folder / "installed").read_text().splitlines()
    assert {"PIP_USER=0", "PIP_REQUIRE_HASHES=0", "PIP_INDEX_URL=http://mirror.example"} <= set(installed)


def test_packages_that_pip_put_elsewhere_are_an_error(tmp_path: Path, bin_folder: Path) -> None:
    for name in ("broken", "elsewhere"):
        (bin_folder / name).touch()
    run = use(tmp_path)
    assert run.returncode != 0 and run.stdout == ""
    assert "torch is not installed" in run.stderr and "pip config list" in run.stderr


@pytest.mark.parametrize("script", ["verify_dataset.sh", "download_dataset.sh", "pytorch/run_and_time.sh"])
def test_a_script_may_be_called_through_a_link_from_a_folder_with_modules_of_our_names(
    tmp_path: Path, script: str
) -> None:
    for name in ("data", "tools", "pytorch"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not this one')\n")
    (tmp_path / "link.sh").symlink_to(ROOT / script)
    run = subprocess.run(["sh", tmp_path / "link.sh", "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0 and "--dataset-dir" in run.stdout, run.stderr


def test_scripts_keep_their_line_ends_in_a_clone_made_for_windows() -> None:
    scripts = subprocess.run(["git", "ls-files", "*.sh", ".ci/run"], cwd=ROOT, capture_output=True, text=True)
    command = ["git", "check-attr", "eol", *scripts.stdout.split()]
    attributes = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert attributes and all(line.endswith(": eol: lf") for line in attributes)
