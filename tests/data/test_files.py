import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from data.cli import UserError
from data.files import DOWNLOADS, MARK, atomic_open, locked, work_folder
from tests.data.made_up import REPOSITORY, files_below


def test_a_file_system_that_cannot_flush_a_folder_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", fsync)
    with atomic_open(tmp_path / "a.txt") as stream:
        stream.write(os.fsdecode(b"caf\xe9 box"))
    assert (tmp_path / "a.txt").read_text() == "caf\\udce9 box"  # what is not Unicode has escapes
    assert files_below(tmp_path) == ["a.txt"]


def test_a_work_folder_leaves_downloads_alone_and_removes_what_a_killed_run_left(tmp_path: Path) -> None:
    with work_folder(tmp_path) as work:
        (work / DOWNLOADS / "a.part").touch()
        (work / "unpacked").mkdir()
    assert files_below(tmp_path) == ["unfinished/downloads/a.part", f"unfinished/{MARK}"]
    (work / "killed" / "deep").mkdir(parents=True)
    (work / DOWNLOADS / "a.part").unlink()
    with work_folder(tmp_path) as work:
        assert not (work / "killed").exists()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_is_shared_by_readers_and_ends_with_its_process(tmp_path: Path) -> None:
    with (
        locked(tmp_path, "download", shared=True),
        locked(tmp_path, "download", shared=True),
        pytest.raises(UserError, match=f"another download is working in {tmp_path}"),
        locked(tmp_path, "download"),
    ):
        pass
    code = "import sys,time; from pathlib import Path; from data.files import locked\n"
    code += "with locked(Path(sys.argv[1]), 'download'): print('locked', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=REPOSITORY, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"locked\n"
        with pytest.raises(UserError, match="is working in"), locked(tmp_path, "download", shared=True):
            pass
        holder.kill()
        holder.wait()
        with locked(tmp_path, "download"):
            pass
