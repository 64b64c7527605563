"""What all commands of tools/ share."""

import pytest

from tests.processes import run_module_for_text
from tests.test_architecture import COMMANDS_OF_TOOLS


@pytest.mark.parametrize("module", sorted(COMMANDS_OF_TOOLS - {"tools.hyperparameters"}))  # which has no options
def test_help_is_laid_out_in_a_terminal_of_any_width(module: str) -> None:
    run = run_module_for_text(module, "--help", environment={"COLUMNS": "5"}, timeout=60)
    assert (run.returncode, run.stderr) == (0, "")
    assert f"python -m {module}" in " ".join(run.stdout.split())
