"""What all command lines share."""

import pytest

from tests.processes import run_module_for_text
from tests.test_architecture import COMMANDS_OF_TOOLS

OTHERS = {"data.download", "data.verify", "pytorch.train", "pytorch.run_and_time"}


@pytest.mark.parametrize("module", sorted(OTHERS | COMMANDS_OF_TOOLS - {"tools.hyperparameters"}))  # without options
def test_every_command_prints_its_help(module: str) -> None:
    run = run_module_for_text(module, "--help", timeout=60)
    assert (run.returncode, run.stderr) == (0, "")
    assert "show this help message" in " ".join(run.stdout.replace("│", "").split())
