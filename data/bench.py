"""How fast data is prepared, checked and read on this machine, and what an index of LibriSpeech's size costs.

    python -m data.bench                                     on speech of the embedded corpus
    python -m data.bench --archive dev-clean.tar.gz          on the files of an archive in LibriSpeech's layout
    python -m data.bench --utterances 10000,50000,281241     the index, with made-up utterances of 0.1 s

Nothing is timed twice: everything is a single run, so leave the machine alone. Files have just been written when they
are read, so unless memory is short they come from the page cache: the figures are the code's, not the disk's. Figures
"per core" are those of one process on one core. The way of the benchmark's predecessor, which ran one `sox` process
for each file and one `soxi` to learn its length, is timed on the first files of the same archive, if sox is installed.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import partial
from io import BytesIO, StringIO
from pathlib import Path

import numpy as np
import soundfile
import tyro

from data.corpora import Corpus, find_corpus
from data.packed import SAMPLE_RATE, TRANSCRIPT_CHARACTERS, DataError, PackedDataset, Subset, open_dataset, read_dataset
from data.prepare import CheckedArchive, available_cores, finish_dataset, prepare_subset, unpack
from data.readers import Utterance, read_utterances
from data.verify import find_problems

SOX_FILES = 100
MADE_UP_SAMPLES, MADE_UP_CHARACTERS = 1600, 180  # LibriSpeech's transcripts have about 180 characters
CHAPTER = 100


@dataclass(frozen=True)
class Options:
    """Measure how fast data is prepared, checked and read."""

    archive: Path | None = None
    """archive in LibriSpeech's layout, named after its subset, such as dev-clean.tar.gz; by default it is made"""
    utterances: str = ""
    """comma-separated numbers of utterances to show time and memory of the index for; nothing else is measured then"""


def main() -> None:
    options = tyro.cli(Options, prog="data.bench", description=Options.__doc__)
    try:
        with tempfile.TemporaryDirectory() as folder:
            if options.utterances:
                measure_index([int(count) for count in options.utterances.split(",")], Path(folder))
            else:
                measure_speech(options.archive, Path(folder))
    except (DataError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def measure_speech(archive: Path | None, folder: Path) -> None:
    """Prints the rates of preparing, verifying and reading the utterances of one archive."""
    corpus = find_corpus("librispeech" if archive else "synthetic")
    if archive is None:
        from data.synthetic import write_archive  # here, so that eSpeak NG is needed for this alone

        archive = folder / "synthetic-validation.tar.gz"
        write_archive("synthetic-validation", archive, available_cores())
    name = archive.name.removesuffix(".tar.gz")
    subset = corpus.select([name])[0]
    (folder / "unpacked").mkdir()
    unpacking = _seconds(lambda: unpack(archive, folder / "unpacked"))
    utterances: list[Utterance] = []
    reading = _seconds(lambda: utterances.extend(read_utterances(folder / "unpacked", corpus.layout, subset)))
    audio_s = sum(utterance.samples for utterance in utterances) / SAMPLE_RATE
    print(f"{len(utterances)} utterances of {archive.name}, {audio_s / 3600:.2f} h; {available_cores()} cores")
    _line("unpacking the archive", audio_s, unpacking)
    (folder / "dataset").mkdir()
    dataset = PackedDataset(folder / "dataset", corpus.name, corpus.synthetic, corpus.splits([]))
    source = CheckedArchive(archive, "", "", official=False)
    packing = _seconds(lambda: _prepare(dataset, corpus, source, name, utterances, 1))
    _line("preparing, per core: headers, decoding, digests, writing", audio_s, reading + packing)
    if available_cores() > 1:
        parallel = _seconds(lambda: _prepare(dataset, corpus, source, name, utterances, available_cores()))
        _line("preparing, on all cores, with their processes' start", audio_s, reading + parallel)
    _measure_sox(utterances[:SOX_FILES], folder, audio_s / (reading + packing))
    _measure_verification(folder / "dataset")
    _measure_reading(open_dataset(folder / "dataset").subset(name), folder)


def measure_index(counts: Sequence[int], folder: Path) -> None:
    """Prints time and memory of preparing and opening made-up subsets of so many utterances, each in a new process."""
    print("utterances  unpack s  headers s  pack s  digest s  peak MB  index MB  open s  held MB")
    for count in counts:
        archive = folder / "train-clean-100.tar.gz"
        _made_up_archive(archive, count)
        dataset = folder / str(count)
        with ProcessPoolExecutor(
            1, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1
        ) as new_process:
            times, peak = new_process.submit(_prepare_made_up, archive, dataset).result()
            opening, held = new_process.submit(_open_made_up, dataset).result()
        index = (dataset / "train-clean-100" / "utterances.csv").stat().st_size
        shutil.rmtree(dataset)
        print(
            f"{count:10d}  {times[0]:8.1f}  {times[1]:9.1f}  {times[2]:6.1f}  {times[3]:8.1f}  {peak / 1e6:7.0f}"
            f"  {index / 1e6:8.1f}  {opening:6.2f}  {held / 1e6:7.1f}"
        )


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _line(what: str, audio_s: float, seconds: float) -> None:
    print(f"{what}: {seconds:.2f} s, {audio_s / seconds:.0f} x real time")


def _prepare(
    dataset: PackedDataset, corpus: Corpus, source: CheckedArchive, name: str, utterances: list[Utterance], jobs: int
) -> PackedDataset:
    with redirect_stderr(StringIO()):  # made-up utterances are too short for their transcripts, which would be listed
        return finish_dataset(prepare_subset(dataset, corpus, source, name, utterances, jobs))


def _measure_sox(utterances: Sequence[Utterance], folder: Path, ours: float) -> None:
    if shutil.which("sox") is None or shutil.which("soxi") is None:
        print("sox, one process a file: not measured, as it is not installed")
        return

    def convert() -> None:
        for utterance in utterances:
            wav = str(folder / "converted.wav")
            subprocess.run(["sox", utterance.file, "-r", "16000", "-b", "16", "-c", "1", wav], check=True)
            subprocess.run(["soxi", "-D", wav], check=True, capture_output=True)

    audio_s = sum(utterance.samples for utterance in utterances) / SAMPLE_RATE
    seconds = _seconds(convert)
    _line(f"sox and soxi, one process a file, {len(utterances)} files", audio_s, seconds)
    print(f"  per core, preparing is {ours / (audio_s / seconds):.1f} times as fast")


def _measure_verification(path: Path) -> None:
    dataset = open_dataset(path)
    size = sum(file.stat().st_size for file in path.rglob("*.*"))
    cores = os.sched_getaffinity(0)
    for used in ({min(cores)}, cores):
        os.sched_setaffinity(0, used)
        seconds = _seconds(lambda: find_problems(dataset))
        print(f"verifying on {len(used)} of {len(cores)} cores: {size / 1e6 / seconds:.0f} MB/s")
    print(f"  --quick: {_seconds(lambda: find_problems(dataset, quick=True)):.3f} s")


def _measure_reading(subset: Subset, folder: Path) -> None:
    in_order = np.arange(len(subset))
    at_random = np.random.default_rng(0).permutation(in_order)
    wav = [folder / f"{index}.wav" for index in in_order]
    for index, file in enumerate(wav):
        soundfile.write(file, subset.waveform(index), SAMPLE_RATE)

    def packed(order: np.ndarray) -> None:
        for index in order:
            subset.waveform(int(index)).astype(np.float32)

    def files(order: np.ndarray) -> None:
        for index in order:
            soundfile.read(wav[index], dtype="float32")

    audio_s = float(subset.samples.sum()) / SAMPLE_RATE
    for what, read in (("the packed data set", packed), ("WAV files one by one", files)):
        for how, order in (("in order", in_order), ("at random", at_random)):
            read(order)  # into the page cache
            _line(f"reading {what}, {how}", audio_s, _seconds(partial(read, order)))


def _made_up_archive(archive: Path, count: int) -> None:
    """An archive in LibriSpeech's layout of `count` utterances of the same noise, with transcripts of their own."""
    noise = np.random.default_rng(0)
    encoded = BytesIO()
    waveform = noise.integers(-500, 500, MADE_UP_SAMPLES).astype(np.int16)
    soundfile.write(encoded, waveform, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    letters = np.array(list(TRANSCRIPT_CHARACTERS.strip()))
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:

        def add(name: str, content: bytes) -> None:
            entry = tarfile.TarInfo(f"LibriSpeech/train-clean-100/{name}")
            entry.size = len(content)
            tar.addfile(entry, BytesIO(content))

        for chapter in range(-(-count // CHAPTER)):
            folder = f"{chapter // 10}/{chapter}"
            lines = []
            for number in range(min(CHAPTER, count - CHAPTER * chapter)):
                name = f"{chapter // 10}-{chapter}-{number:04d}"
                add(f"{folder}/{name}.flac", encoded.getvalue())
                lines.append(f"{name} {''.join(noise.choice(letters, MADE_UP_CHARACTERS))}\n")
            add(f"{folder}/{chapter // 10}-{chapter}.trans.txt", "".join(lines).encode())


def _prepare_made_up(archive: Path, path: Path) -> tuple[list[float], int]:
    """Seconds of unpacking, headers, packing and digest, and the peak of this process's memory in bytes."""
    corpus = find_corpus("librispeech")
    subset = corpus.select(["train-clean-100"])[0]
    unpacked = path / "unpacked"
    unpacked.mkdir(parents=True)
    utterances: list[Utterance] = []
    source = CheckedArchive(archive, "", "", official=False)
    dataset = PackedDataset(path, corpus.name, False, corpus.splits([]))
    times = [
        _seconds(lambda: unpack(archive, unpacked)),
        _seconds(lambda: utterances.extend(read_utterances(unpacked, corpus.layout, subset))),
    ]
    with redirect_stderr(StringIO()):
        times.append(_seconds(lambda: prepare_subset(dataset, corpus, source, subset.name, utterances, 1)))
    times.append(_seconds(lambda: finish_dataset(read_dataset(path))))
    shutil.rmtree(unpacked)
    return times, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _open_made_up(path: Path) -> tuple[float, int]:
    """Seconds of opening the subset, and the memory in bytes that it holds."""
    dataset = open_dataset(path)
    before = _resident_bytes()
    opened: list[Subset] = []
    seconds = _seconds(lambda: opened.append(dataset.subset("train-clean-100")))
    return seconds, _resident_bytes() - before


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
