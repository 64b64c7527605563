"""Text from recordings, by a trained model.

    python -m tools.transcribe results/synthetic/checkpoint_best.pt recording.wav
    python -m tools.transcribe CHECKPOINT talks/ --format srt --output-dir subtitles
    python -m tools.transcribe CHECKPOINT recording.flac --lm lm.arpa.gz --alpha 0.5 --beta 1
    arecord -t raw -f S16_LE -r 16000 | python -m tools.transcribe CHECKPOINT - --raw-rate 16000 --batch-size 1

Files may have any format that libsndfile or, where it is installed, sox reads, any rate, any number of channels (they
are mixed) and any length; of folders, all audio files below are taken. `-` is standard input: a file, or with
--raw-rate headerless little-endian 16-bit mono audio, transcribed as it arrives.

Formats: text (a line for each piece between two pauses; behind the file's name and a tab if there are several), json
(an object a line for each piece, with the times in seconds and the confidences of its words), srt and vtt (captions).
Times come from the most probable CTC path; a confidence is the geometric mean of the network's probabilities over a
word's frames (recognizer.py): it orders words, it is no probability of being right.

Exit status: 0; 1 if something went wrong: a file that cannot be read, or not to its end, is named, what was heard of it
is written, and the others are still done; 2 the command line was not understood; 130 interrupted.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TextIO

import tyro
from tqdm import tqdm

from data.files import DataError
from pytorch.cli import RunError, exit_status
from tools.language_model.beam_search import Decode, Decoding
from tools.recognizer import Recognizer, Word, align, speed
from tools.recordings import Piece, cut, file_seconds, read_file, read_raw, seam

Format = Literal["text", "json", "srt", "vtt"]

STANDARD_INPUT = "-"
AUDIO_SUFFIXES = {
    *(".aif", ".aifc", ".aiff", ".amr", ".au", ".caf", ".flac", ".gsm", ".mp3", ".nist", ".oga", ".ogg", ".opus"),
    *(".rf64", ".snd", ".sph", ".w64", ".wav"),
}
SUFFIXES = {"text": ".txt", "json": ".jsonl", "srt": ".srt", "vtt": ".vtt"}
LONGEST_CAPTION = 84  # characters: two lines of 42
LONGEST_CAPTION_S = 7.0
CAPTION_GAP_S = 1.0  # a pause of this length ends a caption


@dataclass(frozen=True)
class Options:
    """Text from recordings."""

    checkpoint: tyro.conf.Positional[Path]
    """checkpoint of a training run, such as results/synthetic/checkpoint_best.pt"""
    files: tyro.conf.Positional[tuple[str, ...]]
    """audio files, folders of them, or - for standard input"""
    format: Format = "text"
    """of the transcripts"""
    output_dir: Path | None = None
    """folder for one transcript a recording, of the recording's name; without one they go to standard output"""
    raw_rate: int | None = None
    """standard input is headerless little-endian 16-bit mono audio of this rate in Hz"""
    batch_size: int = 8
    """pieces of recordings recognised together; changes no transcript; 1 shows each as soon as it was heard"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to compute; auto: the GPU if there is one"""
    decoding: Annotated[Decoding, tyro.conf.arg(name="")] = Decoding()


@dataclass(frozen=True)
class Recording:
    """Something to transcribe: its name in messages, that of its transcript (without suffix), and how to read it."""

    name: str
    output: Path
    pieces: Callable[[], Iterator[Piece]]
    seconds: float = 0.0  # by its header; 0: not known


@dataclass(frozen=True)
class End:
    """The end of a recording, and what was wrong with it."""

    problem: str | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit status."""
    options = tyro.cli(Options, args=arguments, prog="python -m tools.transcribe", description=__doc__)
    try:
        return exit_status(lambda: transcribe(options))
    except BrokenPipeError:  # such as of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # such as a disk that is full
        print(f"error: transcripts cannot be written: {error.strerror}", file=sys.stderr)
    return 1


def transcribe(options: Options) -> bool:
    """Transcribe everything; returns whether nothing was wrong with any recording.

    Raises:
        RunError: checkpoint, options or output folder will not do.
        DataError: a folder holds no audio.
    """
    if options.batch_size < 1:
        raise RunError(f"--batch-size is {options.batch_size}; it must be a positive integer")
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # names need not be Unicode
    with tempfile.TemporaryDirectory() as scratch:
        recordings = find_recordings(options, Path(scratch))
        recognizer = Recognizer.load(options.checkpoint, options.device)
        decode = options.decoding.make()
        return _transcribe_all(options, recordings, recognizer, decode)


def find_recordings(options: Options, scratch: Path) -> list[Recording]:
    """What the command line names. A file on standard input is first copied into `scratch`: formats need seeking."""
    if not options.files:
        raise RunError("nothing to transcribe: name audio files, folders, or - for standard input")
    if options.raw_rate is not None and options.files != (STANDARD_INPUT,):
        raise RunError("--raw-rate is for standard input alone: give - and no file")
    recordings = []
    for name in options.files:
        if name == STANDARD_INPUT:
            recordings.append(_standard_input(options.raw_rate, scratch / "standard input"))
            continue
        path = Path(name)
        if not path.is_dir():
            recordings.append(_file(path, Path(path.stem)))
            continue
        found = sorted(file for file in path.rglob("*") if file.suffix.lower() in AUDIO_SUFFIXES and file.is_file())
        if not found:
            raise DataError(f"{path} is a folder without audio files")
        recordings += [_file(file, file.relative_to(path).with_suffix("")) for file in found]
    if options.output_dir is None:
        if len(recordings) > 1 and options.format in ("srt", "vtt"):
            raise RunError(f"--format {options.format} of several recordings needs an --output-dir")
        return recordings
    outputs: dict[Path, str] = {}
    for recording in recordings:
        other = outputs.setdefault(recording.output, recording.name)
        if other != recording.name:
            raise RunError(f"{other} and {recording.name} would both be written to {recording.output} in --output-dir")
    return recordings


def _file(path: Path, output: Path) -> Recording:
    return Recording(str(path), output, lambda: cut(read_file(path)), file_seconds(path))


def _standard_input(raw_rate: int | None, copy: Path) -> Recording:
    name = "standard input"
    if raw_rate is not None:
        return Recording(name, Path("stdin"), lambda: cut(read_raw(sys.stdin.buffer, name, raw_rate)))

    def pieces() -> Iterator[Piece]:
        with copy.open("wb") as stream:
            shutil.copyfileobj(sys.stdin.buffer, stream)
        try:
            yield from cut(read_file(copy))
        except DataError as error:
            raise DataError(str(error).replace(str(copy), name)) from error

    return Recording(name, Path("stdin"), pieces)


def _transcribe_all(options: Options, recordings: Sequence[Recording], recognizer: Recognizer, decode: Decode) -> bool:
    """Reads pieces of all recordings in turn, recognises them in batches, and writes them in the same order."""
    started = time.monotonic()
    failures, heard_seconds = 0, 0.0
    writers = iter([_Writer(options, recording, len(recordings) > 1) for recording in recordings])
    writer = next(writers)
    pending: list[Piece | End] = []

    def write_pending() -> None:
        nonlocal writer, failures
        pieces = [event for event in pending if isinstance(event, Piece)]
        words = iter(recognise(recognizer, decode, pieces))
        for event in pending:
            if isinstance(event, Piece):
                writer.add(event, next(words))
                continue
            writer.finish()
            if event.problem is not None:
                failures += 1
                tqdm.write(f"error: {event.problem}", file=sys.stderr)
            writer = next(writers, writer)
        pending.clear()

    with tqdm(
        total=sum(recording.seconds for recording in recordings) or None,
        desc="transcribing",
        unit="s of audio",
        unit_scale=True,
        leave=False,
        disable=None,
    ) as bar:
        try:
            for recording in recordings:
                reached = 0.0
                for event in _events(recording):
                    pending.append(event)
                    if isinstance(event, Piece):
                        end = event.end if event.cut is None else event.cut
                        bar.update(end - reached)
                        heard_seconds += end - reached
                        reached = end
                    if sum(isinstance(event, Piece) for event in pending) == options.batch_size:
                        write_pending()
            write_pending()
        finally:
            writer.abandon()
    seconds = time.monotonic() - started
    if heard_seconds:
        print(f"{heard_seconds:.1f} s of audio in {seconds:.1f} s: {speed(heard_seconds, seconds)}", file=sys.stderr)
    if failures:
        print(f"{failures} of {len(recordings)} recordings could not be read, or not to the end", file=sys.stderr)
    return not failures


def _events(recording: Recording) -> Iterator[Piece | End]:
    try:
        yield from recording.pieces()
    except DataError as error:
        yield End(str(error))
    else:
        yield End(None)


def recognise(recognizer: Recognizer, decode: Decode, pieces: Sequence[Piece]) -> list[list[Word]]:
    """Words of pieces, with times in their recordings."""
    heard = [piece for piece in pieces if not piece.silent]
    emissions = iter(recognizer.emissions([piece.waveform for piece in heard]) if heard else [])
    words: list[list[Word]] = []
    for piece in pieces:
        if piece.silent:
            words.append([])
            continue
        emission_TV = next(emissions)
        words.append(
            [
                Word(word.text, piece.start + word.start, min(piece.end, piece.start + word.end), word.confidence)
                for word in align(decode(emission_TV), emission_TV)
            ]
        )
    return words


@dataclass
class _Writer:
    """Joins the pieces of one recording, and writes its transcript."""

    options: Options
    recording: Recording
    named: bool  # whether its name must stand in each line of text
    _stream: TextIO | None = None
    _held: tuple[Piece, list[Word]] | None = None  # a piece whose end waits for the next one
    _captions: int = 0
    _path: Path | None = field(default=None)

    def add(self, piece: Piece, words: list[Word]) -> None:
        """The next piece of the recording, with its words."""
        if self._held is not None:
            before, held = self._held
            assert before.cut is not None
            joint = seam(before.cut, held, words)
            self._write([word for word in held if word.start + word.end < 2 * joint])
            words = [word for word in words if word.start + word.end >= 2 * joint]
        self._held = piece, words

    def finish(self) -> None:
        """The recording has ended. A transcript in --output-dir gets its name now, if anything was heard."""
        if self._held is None:
            return
        self._write(self._held[1])
        if self._path is not None and self._stream is not None:
            self._stream.close()
            _partial(self._path).replace(self._path)
        self._stream = self._held = None

    def abandon(self) -> None:
        """Remove what is unfinished."""
        if self._path is not None and self._stream is not None:
            self._stream.close()
            _partial(self._path).unlink(missing_ok=True)

    def _write(self, words: Sequence[Word]) -> None:
        if self._stream is None:
            self._stream = self._open()
            if self.options.format == "vtt":
                self._stream.write("WEBVTT\n\n")
        name = self.recording.name
        if self.options.format == "json":
            if words:
                self._stream.write(json.dumps(as_json(name, words)) + "\n")
        elif self.options.format == "text":
            if words:
                start = f"{name}\t" if self.named and self._path is None else ""
                self._stream.write(start + " ".join(word.text for word in words) + "\n")
        else:
            for caption in captions(words):
                self._captions += 1
                self._stream.write(as_caption(self.options.format, self._captions, caption))
        self._stream.flush()

    def _open(self) -> TextIO:
        if self.options.output_dir is None:
            return sys.stdout
        output = self.options.output_dir / self.recording.output
        self._path = output.with_name(output.name + SUFFIXES[self.options.format])
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            return _partial(self._path).open("w", encoding="utf-8")
        except OSError as error:
            raise RunError(f"{self._path} cannot be written: {error.strerror}") from error


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def as_json(name: str, words: Sequence[Word]) -> dict[str, object]:
    """A piece of a transcript, times in seconds."""
    return {
        "file": name,
        "start": round(words[0].start, 2),
        "end": round(words[-1].end, 2),
        "text": " ".join(word.text for word in words),
        "words": [
            {
                "word": word.text,
                "start": round(word.start, 2),
                "end": round(word.end, 2),
                "confidence": round(word.confidence, 4),
            }
            for word in words
        ],
    }


def captions(words: Sequence[Word]) -> list[list[Word]]:
    """Words in groups that can be read at once."""
    groups: list[list[Word]] = []
    for word in words:
        group = groups[-1] if groups else None
        if (
            group is None
            or word.start - group[-1].end >= CAPTION_GAP_S
            or word.end - group[0].start > LONGEST_CAPTION_S
            or sum(len(other.text) + 1 for other in group) + len(word.text) > LONGEST_CAPTION
        ):
            groups.append([])
        groups[-1].append(word)
    return groups


def as_caption(format: Format, number: int, words: Sequence[Word]) -> str:
    """A caption in SubRip or WebVTT."""
    comma = "," if format == "srt" else "."
    start, end = _clock(words[0].start, comma), _clock(max(words[-1].end, words[0].start + 0.001), comma)
    return (f"{number}\n" if format == "srt" else "") + f"{start} --> {end}\n{' '.join(w.text for w in words)}\n\n"


def _clock(seconds: float, comma: str) -> str:
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest // 1000:02d}{comma}{rest % 1000:03d}"


if __name__ == "__main__":
    sys.exit(main())
