"""`python -m module` for tests, in a process that is forked from one which has imported PyTorch already.

Importing takes most of the time and of the processor that a short command needs: 4 s for each process that trains. The
forked process has its own environment, folder, files, arguments and exit status, so that a test sees what a user would;
so have the ranks and the report that it starts.
"""

import gc
import importlib
import json
import multiprocessing
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Mapping
from multiprocessing import forkserver, popen_fork, resource_tracker
from pathlib import Path
from typing import Any, NoReturn

from pytorch.errors import SIGNALS
from tests.conftest import ROOT

QUIET = "-Wignore:This process:DeprecationWarning"  # Python 3.12 and newer warn of a fork beside threads
_server: socket.socket | None = None


class Popen(subprocess.Popen[Any]):
    """As subprocess.Popen, for commands that are `[sys.executable, "-m", module, ...]`."""

    def _execute_child(self, args: Any, *options: Any) -> None:  # type: ignore[override]
        global _server
        if _server is None:
            _server, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            subprocess.Popen([sys.executable, QUIET, "-m", "tests.processes"], cwd=ROOT, stdin=theirs.fileno())
            theirs.close()
        folder, environment, pipes, (session, group) = options[4], options[5], options[9:15], options[-2:]
        asked = {"command": args[1:], "folder": str(folder or Path.cwd()), "session": session, "group": group}
        asked["environment"] = {**(environment or os.environ)}
        self._status, status = os.pipe()
        files = [number if file == -1 else file for number, file in enumerate((pipes[0], pipes[3], pipes[5]))]
        socket.send_fds(_server, [json.dumps(asked).encode()], [*files, status])
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]
        os.close(status)
        self.pid = int(_server.recv(20))

    def _internal_poll(self, **_: Any) -> int | None:
        return self._ended(0)

    def _wait(self, timeout: float | None) -> int:
        status = self._ended(timeout)
        if status is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(self.args, timeout)
        return status

    def _ended(self, timeout: float | None) -> int | None:
        """The exit status; None if it has none within this many seconds."""
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            self.returncode = os.waitstatus_to_exitcode(int(os.read(self._status, 20)))
            os.close(self._status)
        return self.returncode


def run_module(
    module: str,
    *arguments: object,
    environment: Mapping[str, str] | None = None,
    folder: Path = ROOT,
    given: bytes = b"",
    timeout: float = 300,
) -> subprocess.CompletedProcess[bytes]:
    """As subprocess.run with captured output. `environment` is added to this process's. TimeoutExpired as there."""
    pipe, command = subprocess.PIPE, [sys.executable, "-m", module, *map(str, arguments)]
    variables = {**os.environ, **(environment or {})}
    with Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, cwd=folder, env=variables) as process:
        try:
            output, errors = process.communicate(given, timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def run_module_for_text(module: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """As run_module; what came out is text."""
    run = run_module(module, *arguments, **options)
    return subprocess.CompletedProcess(run.args, run.returncode, run.stdout.decode(), run.stderr.decode())


class _Forked(subprocess.Popen[Any]):
    """As subprocess.Popen, in such a process: another command of the project is forked from it, too."""

    def _execute_child(self, args: Any, *options: Any) -> None:  # type: ignore[override]
        if args[:2] != [sys.executable, "-m"]:
            super()._execute_child(args, *options)  # type: ignore[misc]
            return
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            if options[-2]:  # start_new_session: a terminal's Ctrl-C does not reach it
                os.setsid()
            for number, file in enumerate((options[9], options[12], options[14])):
                if file != -1:
                    os.dup2(file, number)
            _run(args[1:], options[5] or dict(os.environ))
        self._child_created = True


_launch = popen_fork.Popen._launch  # type: ignore[attr-defined]


def _launch_rank(rank: object, process: object) -> None:
    """Fork a rank that has signals blocked, as from a fork server; it does not return from here."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    _launch(rank, process)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _serve() -> None:
    # As pytorch/__init__.py has it until a command begins; and a signal may come as soon as it is forked.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    modules = ["pytorch.train", "torch.distributed.run", "torch._dynamo", "torch.onnx"]  # most of them imported late
    for module in [*modules, "pytorch.run_and_time", "tools.report.__main__"]:
        importlib.import_module(module)
    subprocess.Popen = _Forked  # type: ignore[misc]
    contexts: Any = multiprocessing.context
    contexts._concrete_contexts["forkserver"] = multiprocessing.get_context("fork")  # of ranks
    forkserver.ensure_running = resource_tracker.ensure_running = lambda: None  # type: ignore[assignment]
    popen_fork.Popen._launch = _launch_rank  # type: ignore[attr-defined]
    gc.freeze()  # so that no collection touches, and copies, what all processes share
    tests = socket.socket(fileno=0)
    while True:
        content, files, _, _ = socket.recv_fds(tests, 1 << 20, 4)
        if not content:
            return
        if os.fork() == 0:
            _run_and_tell(tests, files, json.loads(content))
        for file in files:
            os.close(file)
        while os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG):
            pass


def _run_and_tell(tests: socket.socket, files: list[int], asked: dict[str, Any]) -> NoReturn:
    """In a process of its own: fork another that runs the command, tell its id, and write its status at its end."""
    process = os.fork()
    if process == 0:
        if asked["session"]:
            os.setsid()
        if asked["group"] != -1:
            os.setpgid(0, asked["group"])
        for number, file in enumerate(files[:3]):
            os.dup2(file, number)
        os.closerange(3, max(files) + 1)
        os.chdir(asked["folder"])
        _run(asked["command"], asked["environment"])
    tests.send(str(process).encode())
    for file in files[:3]:
        os.close(file)
    os.write(files[3], str(os.waitpid(process, 0)[1]).encode())
    os._exit(0)


def _run(command: list[str], environment: Mapping[str, str]) -> NoReturn:
    """Run `-m module ...` in this process, which ends then."""
    import torch

    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.environ.clear()
    os.environ.update(environment)
    if "OMP_NUM_THREADS" in environment:  # which was read when PyTorch was imported
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    encoding = environment.get("PYTHONIOENCODING")
    sys.stdin = os.fdopen(0, encoding=encoding, closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding=encoding, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding=encoding, errors="backslashreplace", closefd=False)
    _, module, *sys.argv[1:] = command
    for name in (module, f"{module}.__main__"):
        sys.modules.pop(name, None)
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
    try:
        sys.stdout.flush()
    except OSError as error:  # as Python does at its end
        print(f"Exception ignored: {error}", file=sys.stderr)
        status = 120
    os._exit(status)


if __name__ == "__main__":
    _serve()
