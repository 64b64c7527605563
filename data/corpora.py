"""The catalog of corpora: which archives make up which subsets, their checksums, counts and mirrors.

Figures of LibriSpeech are those published on openslr.org/12 and /31. A corpus is added by adding an entry here and,
where its archives have a layout of their own, a reader in readers.py.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from math import ceil, sqrt
from pathlib import Path
from typing import Any

import numpy as np

from data.cli import UserError
from data.packed import SPLITS

# Seconds at these percentiles, from k2-fsa/icefall, egs/librispeech/ASR/local/display_manifest_statistics.py. Those of
# the training subsets are of speech at 0.9, 1 and 1.1 times its speed together. Drawn by linear interpolation, each
# subset has its published hours within 2.3 %, and training within 0.1 %.
PERCENTILES = (0, 0.1, 0.5, 1, 5, 10, 25, 50, 75, 90, 95, 99, 99.5, 99.9, 100)
DURATIONS = {
    "train-clean-100": (1.3, 1.9, 2.2, 2.5, 4.2, 6.4, 11.4, 13.8, 15.3, 16.7, 17.3, 18.1, 18.4, 18.8, 27.2),
    "train-clean-360": (1.0, 1.8, 2.2, 2.5, 4.2, 6.2, 11.2, 13.7, 15.3, 16.6, 17.3, 18.1, 18.4, 18.8, 33.0),
    "train-other-500": (0.8, 1.7, 2.1, 2.3, 3.5, 5.0, 9.8, 13.4, 15.1, 16.5, 17.2, 18.1, 18.4, 18.9, 31.0),
    "dev-clean": (1.4, 1.6, 1.8, 1.9, 2.4, 2.7, 3.8, 5.9, 9.3, 13.3, 16.4, 23.8, 28.5, 32.3, 32.6),
    "dev-other": (1.1, 1.3, 1.7, 1.8, 2.2, 2.6, 3.5, 5.3, 7.9, 12.0, 15.0, 22.2, 27.1, 32.4, 35.2),
}
DEFAULT_REHEARSAL_HOURS = 5.0
REHEARSAL_DIGEST = "c39f0f72d9c24fdfdb8b6a0529e60b072c5b988e3a793ff1917f57ac10504da8"
UTTERANCES_PER_SPEAKER = 10  # at least, as long as a subset of the rehearsal has not all of its speakers

REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Archive:
    """A published file; `bytes` and `md5` are empty for archives that are made on this machine."""

    file: str
    bytes: int = 0
    md5: str = ""


@dataclass(frozen=True)
class CorpusSubset:
    """A subset of a corpus: its split, its archive, and the published counts (None: not published)."""

    name: str
    split: str
    archive: Archive
    utterances: int | None
    hours: float | None = None
    speakers: int | None = None


@dataclass(frozen=True)
class Corpus:
    """`layout` is the reader of its archives (readers.py); `reference_digest` that of the packed data set, if known."""

    name: str
    folder: str
    subsets: tuple[CorpusSubset, ...]
    layout: str = "librispeech"
    mirrors: tuple[str, ...] = ()
    synthetic: bool = False
    reference_digest: str = ""

    def select(self, names: Collection[str]) -> list[CorpusSubset]:
        """Return the subsets of these names, in the catalog's order, or all if none is given. UserError if unknown."""
        known = [subset.name for subset in self.subsets]
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"{self.name} has no subset '{unknown[0]}'; it has: {', '.join(known)}")
        return [subset for subset in self.subsets if not names or subset.name in names]

    def splits(self, prepared: Collection[str]) -> dict[str, list[str]]:
        """Return the names of the prepared subsets by split."""
        subsets = [subset for subset in self.subsets if subset.name in prepared]
        return {split: [subset.name for subset in subsets if subset.split == split] for split in SPLITS}


def _subset(name: str, split: str, size: int, md5: str, utterances: int | None = None, *counts: Any) -> CorpusSubset:
    """`counts` are those of hours and speakers."""
    return CorpusSubset(name, split, Archive(f"{name}.tar.gz", size, md5), utterances, *counts)


LIBRISPEECH = (
    _subset("train-clean-100", "train", 6387309499, "2a93770f6d5c6c964bc36631d331a522", 28539, 100.6, 251),
    _subset("train-clean-360", "train", 23049477885, "c0e676e450a7ff2f54aeade5171606fa", 104014, 363.6, 921),
    _subset("train-other-500", "train", 30593501606, "d1a0fd59409feb2c614ce4d30c387708", 148688, 496.7, 1166),
    _subset("dev-clean", "validation", 337926286, "42e2234ba48799c1f50f24a7926300a1", 2703, 5.4, 40),
    _subset("dev-other", "validation", 314305928, "c8d0bcc9cca99d4f8b62fcc847357931", 2864, 5.3, 33),
    _subset("test-clean", "test", 346663984, "32fa31d27d2e1cad72775fee3f4849a9", 2620, 5.4, 40),
    _subset("test-other", "test", 328757843, "fb5a50374b501bb3bac4815ee91d3135", 2939, 5.1, 33),
)

LIBRISPEECH_100 = (LIBRISPEECH[0], *LIBRISPEECH[3:])  # without train-clean-360 and train-other-500

MINI_LIBRISPEECH = (  # overlaps LibriSpeech; its utterance counts are not published, its hours only roughly
    _subset("train-clean-5", "train", 332954390, "5df7d4e78065366204ca6845bb08f490"),
    _subset("dev-clean-2", "validation", 126046265, "6d7ab67ac6a1d2c993d050e16d61080d"),
)

# Both subsets of AN4 lie in one archive. CMU publishes no sums; these were taken from the complete archive
# (948 + 130 utterances), so a mismatch may also mean a repacked copy: --checksums then states the sum to expect.
AN4_ARCHIVE = Archive("an4_raw.bigendian.tar.gz", 64075473, "c7349bfe32988f04d09e13f2f1044689")
AN4 = (
    CorpusSubset("train", "train", AN4_ARCHIVE, 948, 0.71, 74),
    CorpusSubset("test", "validation", AN4_ARCHIVE, 130, 0.10, 10),
)

SYNTHETIC = (  # sentences spoken by eSpeak NG, made on this machine
    _subset("synthetic-train", "train", 0, "", 1800, 1.05, 76),
    _subset("synthetic-validation", "validation", 0, "", 240, 0.14, 16),
    _subset("synthetic-test", "test", 0, "", 200, 0.12, 16),
)
SYNTHETIC_DIGEST = "14f6b62443c4c1f6636a032994d8c3167df9fb2740299fab065985dab00f22fb"

# One list of your own speech makes one of these; what stands for the archive is the list.
MANIFEST = tuple(CorpusSubset(split, split, Archive(""), None) for split in SPLITS)


def openslr_mirrors(number: int) -> tuple[str, ...]:
    """Return the addresses of a resource of OpenSLR."""
    hosts = ("www.openslr.org", "openslr.elda.org", "openslr.trmal.net", "openslr.magicdatatech.com")
    return tuple(f"https://{host}/resources/{number}" for host in hosts)


def utterance_seconds(subset: str, count: int) -> np.ndarray:
    """Return the durations of a subset of LibriSpeech of `count` utterances, ascending: float64 [count]."""
    durations = DURATIONS[subset.replace("test", "dev")]
    seconds = np.interp((np.arange(count) + 0.5) / count * 100, PERCENTILES, durations)
    if subset.startswith("train"):  # the longest at 0.9 times its speed is the longest utterance
        seconds = seconds.clip(1.1 * durations[0], 0.9 * durations[-1])
    return seconds


def rehearsal(hours: float) -> Corpus:
    """Return the synthetic corpus of LibriSpeech's shape with these hours of training; UserError for others."""
    if not 0.1 <= hours <= 960:
        raise UserError(f"--hours is {hours:g}; the rehearsal has 0.1 to 960")
    hours = round(hours, 2)  # its name has them all
    subsets, share = [], hours / 960.9  # of LibriSpeech's training
    for subset in LIBRISPEECH:
        count = ceil((subset.utterances or 0) * (share if subset.split == "train" else sqrt(share)))
        speakers = min(subset.speakers or 0, ceil(count / UTTERANCES_PER_SPEAKER))
        spoken = float(utterance_seconds(subset.name, count).sum()) / 3600
        subsets.append(replace(subset, archive=Archive(""), utterances=count, speakers=speakers, hours=spoken))
    return Corpus(
        name="rehearsal" if hours == DEFAULT_REHEARSAL_HOURS else f"rehearsal-{hours:g}h",
        folder="Rehearsal_dataset",
        subsets=tuple(subsets),
        layout="rehearsal",
        synthetic=True,
        reference_digest=REHEARSAL_DIGEST if hours == DEFAULT_REHEARSAL_HOURS else "",
    )


CORPORA = {
    corpus.name: corpus
    for corpus in (
        Corpus("librispeech", "LibriSpeech_dataset", LIBRISPEECH, mirrors=openslr_mirrors(12)),
        Corpus("librispeech-100", "LibriSpeech-100_dataset", LIBRISPEECH_100, mirrors=openslr_mirrors(12)),
        Corpus("mini-librispeech", "Mini-LibriSpeech_dataset", MINI_LIBRISPEECH, mirrors=openslr_mirrors(31)),
        Corpus("an4", "AN4_dataset", AN4, "an4", mirrors=("http://www.speech.cs.cmu.edu/databases/an4",)),
        Corpus(
            "synthetic", "Synthetic_dataset", SYNTHETIC, "embedded", synthetic=True, reference_digest=SYNTHETIC_DIGEST
        ),
        Corpus("manifest", "Manifest_dataset", MANIFEST, "manifest"),
        rehearsal(DEFAULT_REHEARSAL_HOURS),
    )
}


def find_corpus(name: str) -> Corpus:
    """Return the corpus of this name, which may be that of a rehearsal; UserError lists the names there are."""
    if match := re.fullmatch(r"rehearsal-(\d+(?:\.\d+)?)h", name):
        return rehearsal(float(match[1]))
    if name not in CORPORA:
        raise UserError(f"unknown corpus '{name}'; there are: {', '.join(CORPORA)}")
    return CORPORA[name]
