"""Files that commands write for the user: whole or not at all, and never over the log of a run."""

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from data.files import atomic_open
from pytorch.errors import RunError


def prepare_outputs(files: Collection[Path], overwrite: bool, inputs: Collection[Path] = ()) -> None:
    """Make the folders of files that are to be written.

    RunError if a file exists, and is not to be overwritten or is one of the inputs.
    """
    read = {(status.st_dev, status.st_ino) for path in inputs if path.exists() for status in [path.stat()]}
    for file in files:
        if file.exists() and (file.stat().st_dev, file.stat().st_ino) in read:
            raise RunError(f"{file} is an input of this command, which would replace it; choose another output folder")
    existing = [] if overwrite else [file for file in files if file.exists() or file.is_symlink()]
    if existing:
        more = f", and so do {len(existing) - 1} more" if len(existing) > 1 else ""
        raise RunError(f"{existing[0]} exists already{more}; give another output, or --overwrite to replace it")
    for folder in {file.parent for file in files}:
        folder.mkdir(parents=True, exist_ok=True)


def write_output(path: Path, text: str) -> None:
    """Write the file that a command line names, and make its folder: whole or not at all, and where a link points to.

    Anything but a regular file, such as a pipe or /dev/null, is written to in place. RunError if the file there is the
    log of a run, or cannot be written.
    """
    try:
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
            return
        path = Path(os.path.realpath(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and b":::MLLOG " in path.read_bytes():
            raise RunError(f"{path}: this is the log of a run, which is not replaced; choose another name")
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}") from error
    with output_file(path) as stream:
        stream.write(text)


@contextmanager
def output_file(path: Path) -> Iterator[TextIO]:
    """Open a text file as data.files.atomic_open does; RunError where it cannot be written."""
    try:
        with atomic_open(path) as stream:
            yield stream
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}") from error
