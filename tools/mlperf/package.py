"""MLCommons' package checker, for which this benchmark's name is added to the package's lists, in memory.

    python -m tools.mlperf check submission --package

Without its name, the checker skips a benchmark's folder. With it, it applies the rules that all benchmarks of the
newest installed round share, counts runs and checks the machine's description; in the closed division, also seeds and
reference convergence points.
"""

import logging
from pathlib import Path
from unittest.mock import patch

from mlperf_logging.compliance_checker import mlp_compliance
from mlperf_logging.package_checker import package_checker
from mlperf_logging.rcp_checker import rcp_checker

from pytorch.config import ROOT
from pytorch.errors import RunError
from tools.mlperf.check import NEWEST, broken_rules
from tools.mlperf.rcp import check_convergence
from tools.mlperf.runlog import RunLog
from tools.mlperf.score import RUNS

RCPS = ROOT / "results" / "rcps" / "librispeech.json"  # of the only corpus of the closed division


class _Checker:
    """What the package checker asks for to check one log."""

    def __init__(self, usage: str, ruleset: str, quiet: bool, werror: bool) -> None:
        self.rules = f"{usage}_{ruleset}/common.yaml"

    def check_file(self, filename: str, _config: str) -> bool:
        found = broken_rules(RunLog.read(Path(filename)), self.rules)
        if found:
            logging.error("%s%s", found[0], f" (and {len(found) - 1} more reasons)" if len(found) > 1 else "")
        return not found


def check_package(folder: Path) -> tuple[list[str], bool]:
    """Let the package checker look at a submission's tree, and say why on standard error. Return verdict and success.

    RunError if the folder is no submission, or a file that the checker needs is missing or damaged.
    """
    names = {path.name for path in folder.glob("results/*/*") if path.is_dir()}  # a small series has its own
    if not names:
        raise RunError(f"{folder}: no submission: it has no folder results/<system>/<series>")
    try:
        with (
            patch.object(package_checker, "get_allowed_benchmarks", lambda *_: names),
            patch.object(package_checker, "get_result_file_counts", lambda _: dict.fromkeys(names, RUNS)),
            patch.object(mlp_compliance, "make_checker", _Checker),
            patch.object(rcp_checker, "check_directory", _check_directory),
        ):
            arguments = str(folder), "training", NEWEST
            passed = package_checker.check_systems(*arguments)
            passed &= package_checker.check_training_result_files(*arguments, *[False] * 5)
    except OSError as error:
        raise RunError(f"{error.filename}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunError(f"{folder}: MLCommons' package checker fails: {error!r:.200}") from error
    verdict = "passes MLCommons' package checker" if passed else "refused by MLCommons' package checker"
    return [f"{folder}: {verdict} under the rules of {NEWEST}"], passed


def _check_directory(folder: str, *_: object, **__: object) -> tuple[bool, str, float]:
    try:
        return (*check_convergence(sorted(Path(folder).glob("result_*.txt")), RCPS), 1.0)
    except RunError as error:
        return False, str(error), 1.0
