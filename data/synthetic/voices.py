"""What both corpora share: lines spoken by eSpeak NG, in one process per speaker, and noise that never changes."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import espeakng_loader
import numpy as np

from data.cli import UserError


@dataclass(frozen=True)
class Line:
    """A sentence to speak: `rate` in words per minute, `pitch` 0-99, `noise` about the amplitude in 16-bit steps."""

    id: str
    text: str
    rate: int
    pitch: int
    noise: int
    seed: int


def speak(voice: str, lines: Sequence[Line], definition: str = "") -> tuple[int, list[np.ndarray]]:
    """Return the sample rate and what is said, by line: int16 [samples]. UserError names a voice that fails.

    `voice` is one of eSpeak NG's, such as en-us+m1; or `definition` is one in the format of eSpeak NG's voice files.
    """
    request = {
        "library": espeakng_loader.get_library_path(),
        "data": espeakng_loader.get_data_path(),
        "voice": voice,
        "definition": definition,
        "lines": [asdict(line) for line in lines],
    }
    command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("speaking.py"))]
    run = subprocess.run(command, input=json.dumps(request).encode(), capture_output=True)
    if run.returncode != 0:
        reason = run.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {run.returncode}"]
        raise UserError(f"eSpeak NG failed for the voice {voice}: {reason[-1]}")
    head, _, sound = run.stdout.partition(b"\n")
    answer = json.loads(head)
    return answer["rate"], np.split(np.frombuffer(sound, dtype="<i2"), np.cumsum(answer["samples"])[:-1])


def add_noise(waveform: np.ndarray, line: Line) -> np.ndarray:
    """Return float64 [samples], rounded, with a line's noise: int16 [samples]."""
    # A bit generator's raw output, unlike numpy's distributions, is guaranteed never to change.
    raw = np.random.PCG64(line.seed).random_raw((len(waveform) + 1) // 2).view("<i2").astype(np.int64)
    noise = (raw.reshape(-1, 2)[: len(waveform)].sum(axis=1) * line.noise) >> 16
    return np.clip(np.rint(waveform).astype(np.int64) + noise, -32768, 32767).astype(np.int16)
