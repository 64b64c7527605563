"""Recordings that libsndfile does not check, by PyAV, which has FFmpeg in it: strictly, or not at all."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from data.cli import UserError

STRICT = {"err_detect": "crccheck+bitstream+buffer+explode", "protocol_whitelist": "none"}  # no file but this one
DAMAGE = re.compile("corrupt|mismatch|truncated|prematurely")  # in a warning of FFmpeg
TOLERANCE_S = 0.1  # between time stamps and samples
LONGEST_GAP_S = 3600
MOST_DROPPED = 10  # packets in sequence that give no samples, as the encoder's delay does at either end
SILENCE_FRAMES = 1 << 13  # in a block


@contextmanager
def open_av(file: Path, stream: FileIO) -> Iterator[tuple[int, Iterator[np.ndarray], str]]:
    """Open a recording: its rate in Hz, its blocks [frames, channels], and a note for the user.

    UserError where PyAV is not installed, or finds no audio; from the blocks for whatever is amiss.
    """
    try:
        import av
    except ImportError:
        advice = "install PyAV by pip install -e '.[recordings]', or convert it"
        raise UserError(f"{file} is neither FLAC with an MD5 nor uncompressed WAV; {advice}") from None
    av.logging.set_level(av.logging.WARNING)
    av.logging.set_skip_repeated(False)
    stream.seek(0)
    stream.name = ""  # type: ignore[misc]  # a suffix would decide for formats without a header
    with av.logging.Capture() as messages:
        try:
            try:
                container = av.open(stream, options=STRICT)
            except UnicodeDecodeError:  # a title older than UTF-8; PyAV 19 reads it, and lacks this argument
                stream.seek(0)
                container = av.open(stream, options=STRICT, metadata_errors="replace")
        except (av.FFmpegError, ValueError, OSError) as error:
            raise UserError(f"{file} cannot be read (FFmpeg: {_reason(messages, error)})") from error
        with container:
            audio: Any = container.streams.best("audio")
            if audio is None or not getattr(audio, "rate", 0):
                raise UserError(f"{file} holds no audio that FFmpeg can decode")
            audio.codec_context.thread_count = 1  # messages of other threads would not be captured
            count = len(container.streams.audio)
            note = f"it has {count} audio streams, of which stream {audio.index} is used" if count > 1 else ""
            estimated = any("Estimating duration" in text for _, _, text in messages)
            messages.clear()
            yield audio.rate, _blocks(file, container, audio, estimated, messages), note


def _blocks(file: Path, container: Any, audio: Any, estimated: bool, messages: list) -> Iterator[np.ndarray]:
    """Yield blocks of the stream `audio`, silence where the time stamps have a gap; UserError for whatever is amiss."""
    import av

    rate, frames, first, dropped = audio.rate, 0, 0, 0
    absolute = container.format.name.startswith(("mov", "matroska"))  # others have a clock that runs anyhow
    origin = 0.0 if absolute else (container.start_time or 0) / av.time_base
    claim = None
    uncoded = audio.codec_context.name.startswith("pcm_")  # so that an estimate from the bit rate is exact
    if audio.duration and (uncoded or not estimated):
        claim = float(audio.duration * audio.time_base)
    elif container.duration and len(container.streams) == 1 and not estimated:
        claim = container.duration / av.time_base - origin
    try:
        for packet in container.demux(audio):
            decoded = packet.decode()
            dropped = 0 if decoded or packet.is_discard or not packet.size else dropped + 1
            for frame in decoded:
                if frame.sample_rate != rate:
                    raise UserError(f"{file} changes from {rate} Hz to {frame.sample_rate} Hz inside")
                late = 0.0 if frame.pts is None else float(frame.pts * frame.time_base) - origin - frames / rate
                if frames == 0 and abs(late) <= TOLERANCE_S:
                    origin += late
                elif late > LONGEST_GAP_S:
                    raise UserError(f"{file} has a gap of {late:.0f} s after {frames / rate:.2f} s, by its time stamps")
                elif late > TOLERANCE_S:
                    missing = round(late * rate)
                    for start in range(0, missing, SILENCE_FRAMES):
                        yield np.zeros((min(SILENCE_FRAMES, missing - start), 1), dtype=np.int16)
                    first, frames = missing if frames == 0 else first, frames + missing
                block = _frame_samples(frame)
                frames += len(block)
                if len(block):
                    yield block
            graver = [text for level, _, text in messages if level <= av.logging.ERROR or DAMAGE.search(text)]
            if packet.is_corrupt or graver or (frames and dropped > MOST_DROPPED):
                raise av.InvalidDataError(0, "a packet is corrupt")
    except (av.FFmpegError, OSError) as error:
        reason = _reason(messages, error)
        raise UserError(f"{file} is damaged after {frames / rate:.2f} s (FFmpeg: {reason})") from error
    seconds = (frames - (first if audio.duration else 0)) / rate
    missing_s = (claim or 0.0) - seconds
    if claim and (missing_s > TOLERANCE_S or (uncoded and missing_s < -TOLERANCE_S)):  # a second header would be noise
        raise UserError(f"{file} holds {seconds:.2f} s of audio, its header says {claim:.2f} s: cut short, or joined?")


def _frame_samples(frame: Any) -> np.ndarray:
    """Return the samples of a frame of PyAV [frames, channels]: int16, or float32 of full scale 1."""
    samples = frame.to_ndarray()
    samples = samples.T if frame.format.is_planar else samples.reshape(-1, frame.layout.nb_channels)
    if samples.dtype == np.int16:
        return samples
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128) / 128
    return samples.astype(np.float32) / (1 if samples.dtype.kind == "f" else 2.0 ** (8 * samples.itemsize - 1))


def _reason(messages: list, error: Exception) -> str:
    """Return FFmpeg's gravest message, or else the error that PyAV raised."""
    if not messages:
        return str(getattr(error, "strerror", None) or error)
    return str(min(messages, key=lambda message: message[0])[2]).strip()
