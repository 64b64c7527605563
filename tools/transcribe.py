"""Text from recordings, by a trained model.

    python -m tools.transcribe results/synthetic/checkpoint_best.pt recording.wav
    python -m tools.transcribe CHECKPOINT talks/ --format srt --output-dir subtitles
    python -m tools.transcribe CHECKPOINT recording.flac --lm lm.arpa.gz --alpha 0.5 --beta 1
    arecord -t raw -f S16_LE -r 16000 | python -m tools.transcribe CHECKPOINT - --raw-rate 16000 --batch-size 1

Files may have any rate, any number of channels (they are mixed) and any length. FLAC and uncompressed WAV need nothing
more, other formats PyAV (the extra `recordings`). From folders, all files with an audio or video suffix are taken. `-`
is standard input: a file, or with --raw-rate headerless little-endian 16-bit mono audio, transcribed as it arrives. The
first SIGINT (Ctrl-C) ends a recording on standard input, not the work: what came is transcribed.

Formats: text (a line per segment between two pauses, after the file's name and a tab if there are several files), json
(one object per line and segment, with the times in seconds and the confidences of its words; one without words if
nothing was heard), srt and vtt (captions).
Times come from the most probable CTC path; a confidence is the geometric mean of the network's probabilities over a
word's frames (recognizer.py): it ranks words, but is not a probability of being right.

Exit status: 0; 1 if something went wrong: a file that cannot be read to its end is named, what was recognized of it is
written, and the others are still transcribed; 2 the command line was not understood; 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from data.cli import DataError, exit_status, progress_bar
from pytorch.config import Device
from pytorch.errors import RunError
from tools.language_model.beam_search import Decode, Decoding
from tools.output_files import output_file, prepare_outputs
from tools.recognizer import Recognizer, Word, align, speed
from tools.segments import Segment, join, read_file, read_raw, read_until_interrupt, segments

Format = Literal["text", "json", "srt", "vtt"]

STANDARD_INPUT = "-"
AUDIO_SUFFIXES = (
    "3gp aac ac3 aif aifc aiff amr amr-nb amr-wb ape au avi awb caf flac flv gsm m4a m4b m4v mka mkv mov mp2 mp3 mp4 "
    "mpc mpeg mpg nist oga ogg ogv opus rf64 snd sph spx tta voc w64 wav wave webm wma wmv wv"
)
SUFFIXES = {"text": ".txt", "json": ".jsonl", "srt": ".srt", "vtt": ".vtt"}
CAPTION_LINES, CAPTION_WIDTH = 2, 42  # characters
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
    """format of the transcripts"""
    output_dir: Path | None = None
    """folder for one transcript a recording, of the recording's name; without one they go to standard output"""
    overwrite: bool = False
    """replace transcripts that are in the folder already"""
    raw_rate: int | None = None
    """standard input is headerless little-endian 16-bit mono audio of this rate in Hz"""
    batch_size: int = 8
    """segments recognized together; 1 shows each as soon as it is recognized"""
    device: Device = "auto"
    """where to compute; auto: the GPU if there is one"""
    decoding: Annotated[Decoding, tyro.conf.arg(name="")] = Decoding()


@dataclass(frozen=True)
class Recording:
    """Something to transcribe: its name in messages, where its transcript goes in --output-dir, and how to read it."""

    name: str
    transcript: Path
    segments: Callable[[], Iterator[Segment]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; return the exit status."""
    options = tyro.cli(Options, args=arguments, prog="python -m tools.transcribe", description=__doc__)
    return exit_status(lambda: transcribe(options), arguments)


def transcribe(options: Options) -> bool:
    """Transcribe everything; return whether nothing was wrong with any recording.

    Raises:
        RunError: checkpoint, options or output folder will not do.
        DataError: a folder holds no audio.
    """
    if options.batch_size < 1:
        raise RunError(f"--batch-size is {options.batch_size}; it must be a positive integer")
    recordings = find_recordings(options)
    decode = options.decoding.make()
    recognizer = Recognizer.load(options.checkpoint, options.device)
    return _transcribe_all(options, recordings, recognizer, decode)


def find_recordings(options: Options) -> list[Recording]:
    """Return what the command line names.

    Raises:
        RunError: nothing is named, or options do not go together, or a transcript would replace a file.
        DataError: a folder holds no audio.
    """
    if not options.files:
        raise RunError("nothing to transcribe: name audio files, folders, or - for standard input")
    if options.raw_rate is not None and options.files != (STANDARD_INPUT,):
        raise RunError("--raw-rate is for standard input alone: give - and no file")
    recordings = []
    for name in options.files:
        path = Path(name)
        if name == STANDARD_INPUT:
            recordings.append(_standard_input(options))
        elif path.is_dir():
            recordings += [_file(options, file, file.relative_to(path)) for file in _audio_files(path)]
        else:
            recordings.append(_file(options, path, Path(path.name)))
    if options.output_dir is None:
        if len(recordings) > 1 and options.format in ("srt", "vtt"):
            raise RunError(f"--format {options.format} of several recordings needs an --output-dir")
        return recordings
    outputs: dict[Path, str] = {}
    for recording in recordings:
        other = outputs.setdefault(recording.transcript, recording.name)
        if other != recording.name:
            both = f"{other} and {recording.name}"
            raise RunError(f"{both} would both be written to {recording.transcript}; name one of them")
    inputs = [options.checkpoint, options.decoding.lm or options.checkpoint]
    inputs += [Path(recording.name) for recording in recordings]
    prepare_outputs(outputs, options.overwrite, inputs)
    return recordings


def _audio_files(folder: Path) -> list[Path]:
    """Return the files below a folder with the name of audio, and say which others there are."""

    def unreadable(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}")

    files = sorted(Path(path) / name for path, _, names in os.walk(folder, onerror=unreadable) for name in names)
    # What begins with ._ is what macOS knows about another file.
    known = AUDIO_SUFFIXES.split()
    found = [path for path in files if path.suffix.lower()[1:] in known and not path.name.startswith("._")]
    if not found:
        raise DataError(f"{folder} is a folder without audio files")
    others = Counter(path.suffix or path.name for path in set(files).difference(found))
    if others:
        told = ", ".join(f"{count} x {suffix}" for suffix, count in sorted(others.items()))
        print(f"{folder}: left out, as not audio by their names: {told}", file=sys.stderr)
    return found


def _file(options: Options, path: Path, relative: Path) -> Recording:
    return Recording(str(path), _transcript(options, relative), lambda: segments(read_file(path)))


def _standard_input(options: Options) -> Recording:
    name, rate = "standard input", options.raw_rate

    def parts() -> Iterator[Segment]:
        if rate is not None:
            yield from segments(read_raw(sys.stdin.buffer, name, rate))
            return
        with tempfile.TemporaryFile() as copy:  # without a name: it ends with this process, however that ends
            try:
                copy.writelines(read_until_interrupt(sys.stdin.buffer))
                copy.flush()
            except OSError as error:
                raise DataError(f"{name} cannot be copied to {tempfile.gettempdir()}: {error.strerror}") from error
            path = Path(f"/dev/fd/{copy.fileno()}")
            try:
                yield from segments(read_file(path))
            except DataError as error:
                raise DataError(str(error).replace(str(path), name)) from error

    return Recording(name, _transcript(options, Path("stdin")), parts)


def _transcript(options: Options, relative: Path) -> Path:
    return (options.output_dir or Path()) / relative.with_suffix(SUFFIXES[options.format])


def _transcribe_all(options: Options, recordings: Sequence[Recording], recognizer: Recognizer, decode: Decode) -> bool:
    """Read segments of all recordings in turn, recognize them in batches, and write them in the same order."""
    started = time.monotonic()
    failures, heard_seconds = 0, 0.0
    pending: list[tuple[_Writer, Segment | DataError | None]] = []  # a recording ends with what was wrong with it

    def write_pending() -> None:
        nonlocal failures
        words = iter(recognize(recognizer, decode, [event for _, event in pending if isinstance(event, Segment)]))
        for writer, event in pending:
            if isinstance(event, Segment):
                writer.add(event, next(words))
                continue
            writer.finish()
            if event is not None:
                failures += 1
                bar.write(f"error: {_one_line(str(event))}", file=sys.stderr)
        pending.clear()

    with progress_bar("transcribing", None, unit="s of audio") as bar:
        for recording in recordings:
            writer = _Writer(options, recording, named=len(recordings) > 1)
            reached = 0.0
            for event in _events(recording):
                pending.append((writer, event))
                if isinstance(event, Segment):
                    end = event.end if event.cut is None else event.cut
                    bar.update(end - reached)
                    heard_seconds += end - reached
                    reached = end
                if sum(isinstance(event, Segment) for _, event in pending) == options.batch_size:
                    write_pending()
        write_pending()
    seconds = time.monotonic() - started
    if heard_seconds:
        told = f"{speed(heard_seconds, seconds)}, {recognizer.precision}"
        print(f"{heard_seconds:.1f} s of audio in {seconds:.1f} s: {told}", file=sys.stderr)
    if failures:
        print(f"{failures} of {len(recordings)} recordings could not be read, or not to the end", file=sys.stderr)
    return not failures


def _events(recording: Recording) -> Iterator[Segment | DataError | None]:
    problem = None
    try:
        yield from recording.segments()
    except DataError as error:
        problem = error
    yield problem


def recognize(recognizer: Recognizer, decode: Decode, parts: Sequence[Segment]) -> list[list[Word]]:
    """Return the words of segments, with times in their recordings."""
    voiced = [part for part in parts if not part.silent]
    emissions = iter(recognizer.emissions([part.waveform for part in voiced]) if voiced else [])
    words: list[list[Word]] = []
    for part in parts:
        aligned = []
        if not part.silent:
            emission_TV = next(emissions)
            aligned = align(decode(emission_TV), emission_TV)
        words.append(
            [replace(word, start=part.start + word.start, end=min(part.end, part.start + word.end)) for word in aligned]
        )
    return words


@dataclass
class _Writer:
    """Joins the segments of one recording, and writes its transcript: at its end, or at once on standard output."""

    options: Options
    recording: Recording
    named: bool  # whether its name must stand in each line of text
    _held: tuple[Segment, list[Word]] | None = None  # a segment whose end waits for the next one
    _parts: list[str] = field(default_factory=list)  # of the transcript
    _captions: int = 0

    def add(self, segment: Segment, words: list[Word]) -> None:
        """Take the next segment of the recording, with its words."""
        if self._held is not None:
            before, held = self._held
            assert before.cut is not None
            held, words = join(before.cut, held, words)
            self._write(held)
        self._held = segment, words

    def finish(self) -> None:
        """Write the transcript of a recording that has ended, if anything of it could be read."""
        if self._held is None:
            return
        self._write(self._held[1])
        if self.options.format == "json" and not self._parts:
            self._put(as_json(self.recording.name, 0.0, self._held[0].end, []))
        if self.options.format == "vtt" and not self._parts:
            self._put("WEBVTT\n\n")
        if self.options.output_dir is not None:
            with output_file(self.recording.transcript) as stream:
                stream.writelines(self._parts)

    def _write(self, words: Sequence[Word]) -> None:
        if not words:
            return
        if self.options.format == "json":
            self._put(as_json(self.recording.name, words[0].start, words[-1].end, words))
        elif self.options.format == "text":
            start = f"{_one_line(self.recording.name)}\t" if self.named and self.options.output_dir is None else ""
            self._put(start + " ".join(word.text for word in words) + "\n")
        else:
            for caption in captions(words):
                self._captions += 1
                self._put(as_caption(self.options.format, self._captions, caption))

    def _put(self, text: str) -> None:
        self._parts.append(text)
        if self.options.output_dir is None:
            print(text, end="", flush=True)


def _one_line(text: str) -> str:
    """Return a text with escapes for what would end a line or a column, as a file's name may."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def as_json(name: str, start: float, end: float, words: Sequence[Word]) -> str:
    """Return a segment of a transcript as a line, times in seconds."""
    each = [
        {"word": word.text, **_times(word.start, word.end), "confidence": round(word.confidence, 4)} for word in words
    ]
    text = " ".join(word.text for word in words)
    return json.dumps({"file": name, **_times(start, end), "text": text, "words": each}) + "\n"


def _times(start: float, end: float) -> dict[str, float]:
    return {"start": round(start, 2), "end": round(end, 2)}


def _caption_lines(words: Sequence[Word]) -> list[str]:
    return textwrap.wrap(" ".join(word.text for word in words), CAPTION_WIDTH, break_long_words=False)


def captions(words: Sequence[Word]) -> list[list[Word]]:
    """Return the words in groups that can be read at once."""
    groups: list[list[Word]] = []
    for word in words:
        group = groups[-1] if groups else None
        if (
            group is None
            or word.start - group[-1].end >= CAPTION_GAP_S
            or word.end - group[0].start > LONGEST_CAPTION_S
            or len(_caption_lines([*group, word])) > CAPTION_LINES
        ):
            groups.append([])
        groups[-1].append(word)
    return groups


def as_caption(format: Format, number: int, words: Sequence[Word]) -> str:
    """Return a caption in SubRip or WebVTT."""
    mark = "," if format == "srt" else "."
    first = f"{number}\n" if format == "srt" else "WEBVTT\n\n" if number == 1 else ""
    times = f"{_clock(words[0].start, mark)} --> {_clock(words[-1].end, mark)}"
    return f"{first}{times}\n" + "\n".join(_caption_lines(words)) + "\n\n"


def _clock(seconds: float, mark: str) -> str:
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest // 1000:02d}{mark}{rest % 1000:03d}"


if __name__ == "__main__":
    sys.exit(main())
