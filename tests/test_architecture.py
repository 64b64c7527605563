"""Which folder and module may import which: `ls` explains the benchmark only as long as these rules hold."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

# A module of pytorch/ imports only from the rows before its own, which are lower.
LAYERS = [
    ["errors", "metrics"],
    ["config", "ctc", "distributed", "layers.kernels", "layers.gru_triton"],
    ["layers.rows"],
    ["device", "memory"],
    ["features", "machine", "layers.batch_norm", "layers.convolution", "layers.gru"],
    ["model", "checkpoint", "mllog"],
    ["loader", "optimizer"],
    ["trainer"],
    ["evaluation", "warmup"],
    ["setup"],
    ["train"],
    ["run_and_time"],
]
DATA_FOR_PYTORCH = {"data.packed", "data.files", "data.cli"}
# Third parties of a timed run; README.md says what each is for.
PACKAGES = {"torch", "torchaudio", "triton", "numpy", "Levenshtein", "tqdm", "tyro", "mlperf_logging"}
FOLDERS = ["data", "pytorch", "tools", "tests"]  # each imports only from itself and from those before it
MODULES = sorted(path for folder in ("data", "pytorch", "tools") for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path, source: str) -> Iterator[str]:
    """Modules that a file imports, those inside of functions and of `if TYPE_CHECKING` too."""
    for node in ast.walk(ast.parse(source, str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{path}:{node.lineno} is a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from names & {*map(name_of, MODULES)} or [node.module]


# What `python -m` can start in tools/: a module that ends with a call of main, or a package with a __main__.
COMMANDS_OF_TOOLS = {
    name_of(path).removesuffix(".__main__")
    for path in MODULES
    if path.is_relative_to(ROOT / "tools") and 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")
}
STARTS = {("pytorch.run_and_time", "tools.report")}  # when the run is over
# A string that begins as a command line: words without punctuation, then the name of a module or the path of a file.
COMMAND_LINE = re.compile(r"\s*(?:[\w./=-]+ )*[\w./-]*?(tools[./][\w./]+)")


def started(source: str) -> Iterator[str]:
    """Commands of tools/ that a string of a file would start, and functions that import by name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and (found := COMMAND_LINE.match(str(node.value))):
            name = found[1].removesuffix(".py").replace("/", ".").removesuffix(".__main__")
            yield from {name} & COMMANDS_OF_TOOLS
        elif isinstance(node, ast.Name | ast.Attribute):
            name = node.id if isinstance(node, ast.Name) else node.attr
            if name in ("import_module", "__import__"):
                yield name


def layer_of(module: str) -> int:
    return next(number for number, row in enumerate(LAYERS) if module.removeprefix("pytorch.") in row)


def violations(path: Path, source: str) -> list[str]:
    module = name_of(path)
    folder = module.split(".")[0]
    found = []
    for imported in {name.removesuffix(".__main__") for name in imports(path, source)}:
        top = imported.split(".")[0]
        if top in FOLDERS and FOLDERS.index(top) > FOLDERS.index(folder):
            found.append(f"{module} imports {imported}: a higher folder")
        elif folder == "data" and top in ("torch", "torchaudio"):
            found.append(f"{module} imports {imported}: data/ knows no framework")
        elif folder == "tools" and imported in COMMANDS_OF_TOOLS and imported not in module:
            found.append(f"{module} imports {imported}: a command of its own")
        elif not module.startswith("pytorch."):
            continue
        elif top == "data" and imported not in DATA_FOR_PYTORCH:
            found.append(f"{module} imports {imported}: pytorch/ reads the packed data set alone")
        elif top not in {*FOLDERS, *PACKAGES, *sys.stdlib_module_names}:
            found.append(f"{module} imports {imported}: not one of a timed run's packages")
        elif top == "pytorch" and layer_of(imported) >= layer_of(module):
            found.append(f"{module} imports {imported}, which is not in a lower layer")
    for name in set(started(source)):
        if name not in module and (module, name) not in STARTS:
            found.append(f"{module} starts {name}: a command of its own, or a module that no import shows")
    return found


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_imports_only_from_below(path: Path) -> None:
    assert violations(path, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "statement"),
    [
        ("data/packed.py", "import pytorch.config"),
        ("data/prepare.py", "import torch"),
        ("pytorch/train.py", "from tools import evaluate"),
        ("pytorch/model.py", "def late():\n    from data.corpora import CORPORA"),
        ("pytorch/metrics.py", "from pytorch.config import Config"),
        ("pytorch/features.py", "import soundfile"),
        ("tools/bench.py", "from tools.evaluate import main"),
        ("tools/bench.py", "from tools.report.__main__ import main"),
        ("pytorch/train.py", "import importlib\nimportlib.import_module('tools' + '.bench')"),
        ("pytorch/train.py", "command = ['-m', 'tools.bench']"),
        ("tools/mlperf/series.py", "import subprocess\nsubprocess.run(['python', '-m', 'tools.report'])"),
        ("tools/mlperf/series.py", "import os\nos.system(f'{sys.executable} -m tools.report {log}')"),
        ("tools/mlperf/series.py", "command = ['python', str(ROOT / 'tools/report/__main__.py')]"),
    ],
)
def test_an_import_from_above_is_found(module: str, statement: str) -> None:
    assert len(violations(ROOT / module, statement)) == 1
