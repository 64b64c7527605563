"""Your own speech: a text file of one line an utterance, `path<TAB>transcript`, read as a corpus.

    sh download_dataset.sh --corpus manifest --manifest train.tsv                            training utterances
    sh download_dataset.sh --corpus manifest --manifest dev.tsv --subsets validation         and others, beside them

Paths are absolute or start from the manifest's own folder; a path is also the utterance's id, and the folder in it the
speaker. The rules for transcripts are those of every corpus; audio may be of any format, rate and number of channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data.audio import any_samples
from data.packed import DataError
from data.readers import Utterance, check_transcript


def read_manifest(manifest: Path, jobs: int) -> list[Utterance]:
    """The utterances of a manifest, by id. DataError names the line or the utterance that is wrong."""
    lines = list(_lines(manifest))
    if not lines:
        raise DataError(f"{manifest} holds no utterance")

    def measure(line: tuple[str, str]) -> Utterance:
        path, transcript = line
        file = manifest.parent / path
        try:
            samples = any_samples(file)
        except (DataError, OSError) as error:
            raise DataError(f"{manifest}: utterance {path}: {error}") from error
        return Utterance(path, Path(path).parent.name, transcript, str(file), samples, "any")

    with ThreadPoolExecutor(jobs) as pool:
        try:
            utterances = list(pool.map(measure, lines))
        except DataError:
            pool.shutdown(cancel_futures=True)  # the first error is enough
            raise
    return sorted(utterances, key=lambda utterance: utterance.id)


def _lines(manifest: Path) -> Iterator[tuple[str, str]]:
    """Path and transcript of each line; empty lines do not count."""
    try:
        text = manifest.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the manifest {manifest}: {error}") from error
    seen = set()
    # Not splitlines: it would also split at characters that a file name may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removesuffix("\r")
        if not line.strip():
            continue
        path, tab, transcript = line.partition("\t")
        if not tab or not path.strip() or "\0" in path:
            raise DataError(f"{manifest}, line {number}: not 'path<TAB>transcript': {line[:80]!r}")
        if path in seen:
            raise DataError(f"{manifest}, line {number}: utterance {path} occurs twice")
        seen.add(path)
        yield path, check_transcript(transcript, path, manifest)
