"""Made-up corpora in the layouts of the real ones, and the commands as a user types them."""

import gzip
import hashlib
import subprocess
import tarfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

REPOSITORY = Path(__file__).resolve().parent.parent.parent
SPOKEN = {
    "84-1-0000": (3000, "THE LONGEST ONE"),
    "84-1-0001": (1000, "SHORT"),
    "84-2-0000": (2000, "IT'S BETWEEN"),
    "7-3-0000": (2000, "AS LONG"),
}


def sound(samples: int, channels: int = 1) -> np.ndarray:
    """Noise of a low level, the same for the same length: int16 [samples, channels]."""
    return np.random.default_rng(samples).integers(-3000, 3000, (samples, channels)).astype(np.int16)


def flac(frames: np.ndarray, rate: int = 16000, subtype: str = "PCM_16") -> bytes:
    return encoded(frames, rate, "FLAC", subtype)


def encoded(frames: np.ndarray, rate: int, form: str, subtype: str) -> bytes:
    stream = BytesIO()
    if subtype == "FLOAT" and frames.dtype == np.int16:
        frames = frames / 32768
    soundfile.write(stream, frames, rate, format=form, subtype=subtype)
    return stream.getvalue()


def with_sizes(wav: bytes, size: int) -> bytes:
    """The same WAV with this size of its samples, and of all, in its header."""
    number = size.to_bytes(4, "little")
    return wav[:4] + number + wav[8:40] + number + wav[44:]


def tone(rate: int, channels: int = 1) -> np.ndarray:
    """Half a second of 500 Hz: int16 [frames, channels]."""
    wave = 8000 * np.sin(2 * np.pi * 500 * np.arange(rate // 2) / rate)
    return np.repeat(wave.astype(np.int16)[:, None], channels, axis=1)


def librispeech_files(subset: str, spoken: Mapping[str, tuple[int, str]] = SPOKEN) -> dict[str, bytes]:
    """Files of a subset by name; `spoken` gives samples and transcript by utterance id."""
    files: dict[str, bytes] = {"LibriSpeech/README.TXT": b"made up\n"}
    for name, (samples, transcript) in spoken.items():
        speaker, chapter, _ = name.split("-")
        folder = f"LibriSpeech/{subset}/{speaker}/{chapter}"
        files[f"{folder}/{name}.flac"] = flac(sound(samples))
        transcripts = f"{folder}/{speaker}-{chapter}.trans.txt"
        files[transcripts] = files.get(transcripts, b"") + f"{name} {transcript}\n".encode()
    return files


def an4_files() -> dict[str, bytes]:
    files = {}
    for subset, folder, names in (("train", "an4_clstk", ("an1-aaaa-b", "an2-aaaa-b")), ("test", "t", ("an3-bbbb-b",))):
        paths = [f"{folder}/{name.split('-')[1]}/{name}" for name in names]
        files[f"an4/etc/an4_{subset}.fileids"] = "".join(f"{path}\n" for path in paths).encode()
        lines = "".join(f"<s> go to {letter} </s> ({name})\n" for letter, name in zip("AB", names, strict=False))
        files[f"an4/etc/an4_{subset}.transcription"] = lines.encode()
        for index, path in enumerate(paths):
            files[f"an4/wav/{path}.raw"] = sound(1000 + index)[:, 0].astype(">i2").tobytes()
    return files


def tarball(*members: tuple[Any, ...]) -> bytes:
    """A .tar.gz of members: name and content, and of what is no file also its type, and where a link leads."""
    stream = BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content, *special in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            if special:
                entry.type, entry.linkname = special
            tar.addfile(entry, BytesIO(content))
    return gzip.compress(stream.getvalue(), 1, mtime=0)


def write_mirror(folder: Path, archives: Mapping[str, Mapping[str, bytes] | bytes]) -> Path:
    """Writes archives and their md5sum.txt into a folder, which then serves as --mirror; returns that md5sum.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for archive, files in archives.items():
        content = files if isinstance(files, bytes) else tarball(*files.items())
        (folder / archive).write_bytes(content)
        lines.append(f"{hashlib.md5(content).hexdigest()}  {archive}\n")
    (folder / "md5sum.txt").write_text("".join(lines))
    return folder / "md5sum.txt"


def command(script: str, *arguments: str | Path, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a script of the repository's top folder, from `folder`."""
    line = ["sh", str(REPOSITORY / script), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=300, cwd=folder)


def files_below(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
