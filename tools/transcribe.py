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

A file that cannot be read to its end is named, what was recognized of it is written, and the others are still
transcribed; the exit status is 1 then.
"""

import json
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal, Self

import tyro

from data.audio import read_blocks
from data.cli import UserError, progress_bar
from data.files import files_below
from data.readers import AUDIO_SUFFIXES
from pytorch.config import Device
from pytorch.errors import RunError
from tools.cli import command, require_positive
from tools.language_model.beam_search import Decode, Decoding
from tools.output_files import output_file, prepare_outputs
from tools.recognizer import Recognizer, Word, align, speed
from tools.segments import Segment, join, read_raw, read_until_interrupt, segments

Format = Literal["text", "json", "srt", "vtt"]

STANDARD_INPUT = "-"
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


@dataclass
class Recording:
    """Something to transcribe: it joins the segments and writes the transcript, on standard output at once."""

    options: Options
    name: str  # in messages
    relative: Path  # of the transcript in --output-dir, but for its suffix
    segments: Callable[[], Iterator[Segment]]
    named: bool = False  # whether its name must stand in each line of text
    seconds: float = 0.0  # that were recognized
    words: int = 0  # that were written
    _held: list[Word] | None = None  # of the last segment, whose end waits for the next one
    _parts: list[str] = field(default_factory=list)  # of the transcript
    _captions: int = 0

    @property
    def transcript(self) -> Path:
        """The file, where there is an --output-dir."""
        return (self.options.output_dir or Path()) / self.relative.with_suffix(SUFFIXES[self.options.format])

    def events(self) -> Iterator[tuple[Self, Segment | UserError]]:
        """Yield the segments, and at the end what was wrong with the recording, if anything was."""
        try:
            for segment in self.segments():
                yield self, segment
        except UserError as error:
            yield self, error

    def add(self, segment: Segment, words: list[Word]) -> float:
        """Take the next segment of the recording, with its words; return its seconds between its cuts."""
        before, self.seconds = self.seconds, segment.end if segment.cut is None else segment.cut
        if self._held is not None:
            held, words = join(before, self._held, words)
            self._write(held)
        self._held = words
        if segment.cut is None:
            self._write(words)
            self._finish()
        return self.seconds - before

    def _finish(self) -> None:
        if self.options.format == "json" and not self._parts:
            self._put(as_json(self.name, 0.0, self.seconds, []))
        if self.options.format == "vtt" and not self._parts:
            self._put("WEBVTT\n\n")
        if self.options.output_dir is not None:
            with output_file(self.transcript) as stream:
                stream.writelines(self._parts)

    def _write(self, words: Sequence[Word]) -> None:
        self.words += len(words)
        if not words:
            return
        if self.options.format == "json":
            self._put(as_json(self.name, words[0].start, words[-1].end, words))
        elif self.options.format == "text":
            start = f"{_one_line(self.name)}\t" if self.named else ""
            self._put(start + " ".join(word.text for word in words) + "\n")
        else:
            for caption in captions(words):
                self._captions += 1
                self._put(as_caption(self.options.format, self._captions, caption))

    def _put(self, text: str) -> None:
        self._parts.append(text)
        if self.options.output_dir is None:
            print(text, end="", flush=True)


def find_recordings(options: Options) -> list[Recording]:
    """Return what the command line names.

    UserError if that is nothing, a folder holds no audio, options do not go together, or a transcript would replace a
    file.
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
    for recording in recordings:
        recording.named = len(recordings) > 1 and options.output_dir is None
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
    files = files_below(folder)
    # What begins with ._ is what macOS knows about another file.
    found = [path for path in files if path.suffix.lower() in AUDIO_SUFFIXES and not path.name.startswith("._")]
    if not found:
        raise UserError(f"{folder} is a folder without audio files")
    others = Counter(path.suffix or path.name for path in set(files).difference(found))
    if others:
        told = ", ".join(f"{count} x {suffix}" for suffix, count in sorted(others.items()))
        print(f"{folder}: left out, as not audio by their names: {told}", file=sys.stderr)
    return found


def _file(options: Options, path: Path, relative: Path) -> Recording:
    return Recording(options, str(path), relative, lambda: segments(read_blocks(path)))


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
                copy.raw.close()  # else leaving the block would try to write again, and raise that error
                raise UserError(f"{name} cannot be copied to {tempfile.gettempdir()}: {error.strerror}") from error
            path = Path(f"/dev/fd/{copy.fileno()}")
            try:
                yield from segments(read_blocks(path))
            except UserError as error:
                raise UserError(str(error).replace(str(path), name)) from error

    return Recording(options, name, Path("stdin"), parts)


def transcribe(options: Options) -> bool:
    """Recognize all recordings' segments in batches, write them in order, and return whether nothing was wrong."""
    require_positive(batch_size=options.batch_size)
    recordings = find_recordings(options)
    decode = options.decoding.make()
    recognizer = Recognizer.load(options.checkpoint, options.device)
    started, failures = time.monotonic(), 0
    events = (event for recording in recordings for event in recording.events())
    with progress_bar("transcribing", None, unit="s of audio") as bar:
        while batch := list(islice(events, options.batch_size)):
            words = iter(recognize(recognizer, decode, [event for _, event in batch if isinstance(event, Segment)]))
            for recording, event in batch:
                if isinstance(event, UserError):
                    failures += 1
                    bar.write(f"error: {_one_line(str(event))}", file=sys.stderr)
                    continue
                bar.update(recording.add(event, next(words)))
                if event.cut is None and not recording.words:
                    bar.write(f"{_one_line(recording.name)}: no word was recognized", file=sys.stderr)
    seconds, heard_seconds = time.monotonic() - started, sum(recording.seconds for recording in recordings)
    if heard_seconds:
        told = f"{speed(heard_seconds, seconds)}, {recognizer.precision}"
        print(f"{heard_seconds:.1f} s of audio in {seconds:.1f} s: {told}", file=sys.stderr)
    if failures:
        print(f"{failures} of {len(recordings)} recordings could not be read, or not to the end", file=sys.stderr)
    return not failures


def recognize(recognizer: Recognizer, decode: Decode, parts: Sequence[Segment]) -> list[list[Word]]:
    """Return the words of segments, with times in their recordings."""
    emissions = iter(recognizer.emissions([part.waveform for part in parts if not part.silent]))
    words: list[list[Word]] = []
    for part in parts:
        words.append([])
        if not part.silent:
            emission_TV = next(emissions)
            for word in align(decode(emission_TV), emission_TV):
                words[-1].append(replace(word, start=part.start + word.start, end=min(part.end, part.start + word.end)))
    return words


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


main = command("tools.transcribe", __doc__, Options, transcribe)

if __name__ == "__main__":
    sys.exit(main())
