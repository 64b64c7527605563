"""`python -m module` for tests, in a process that is forked from one which has imported PyTorch already.

Importing takes most of the time and of the processor that a short command needs. The forked process has its own
environment, folder, files, arguments and exit status, so that a test sees what a user would.
"""

from __future__ import annotations

import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

_server: subprocess.Popen[str] | None = None


def run_module(
    module: str,
    *arguments: object,
    environment: Mapping[str, str] | None = None,
    folder: Path = ROOT,
    given: bytes = b"",
    timeout: float = 300,
) -> subprocess.CompletedProcess[bytes]:
    """As subprocess.run with captured output. `environment` is added to this process's. TimeoutExpired as there."""
    global _server
    if _server is None or _server.poll() is not None:
        command = [sys.executable, "-m", "tests.processes"]
        _server = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert _server.stdin is not None and _server.stdout is not None
    with tempfile.TemporaryDirectory() as files:
        names = [str(Path(files) / name) for name in ("input", "output", "errors")]
        Path(names[0]).write_bytes(given)
        asked: dict[str, Any] = {
            "module": module,
            "arguments": [str(argument) for argument in arguments],
            "files": names,
        }
        asked |= {"folder": str(folder), "environment": {**os.environ, **(environment or {})}}
        print(json.dumps(asked), file=_server.stdin, flush=True)
        process = int(_server.stdout.readline())
        if not select.select([_server.stdout], [], [], timeout)[0]:
            os.kill(process, signal.SIGKILL)
            _server.stdout.readline()
            raise subprocess.TimeoutExpired(module, timeout)
        status = os.waitstatus_to_exitcode(int(_server.stdout.readline()))
        output, errors = Path(names[1]).read_bytes(), Path(names[2]).read_bytes()
    return subprocess.CompletedProcess([module, *asked["arguments"]], status, output, errors)


def run_module_for_text(module: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """As run_module; what came out is text."""
    run = run_module(module, *arguments, **options)
    return subprocess.CompletedProcess(run.args, run.returncode, run.stdout.decode(), run.stderr.decode())


def _serve() -> None:
    import torch

    import pytorch.launch

    del torch, pytorch.launch
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            _run(**json.loads(line))
        print(process, flush=True)
        print(os.waitpid(process, 0)[1], flush=True)


def _run(module: str, arguments: list[str], files: list[str], folder: str, environment: dict[str, str]) -> None:
    """Never returns."""
    import torch

    for number, file in enumerate(files):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT, 0o600), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if "OMP_NUM_THREADS" in environment:  # which was read when PyTorch was imported
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.argv[1:] = arguments
    sys.modules.pop(module, None)
    status: Any = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        status = ended.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    if not isinstance(status, int):
        print(status, file=sys.stderr)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _serve()
