"""The catalog of corpora: which archives make up which subsets, their checksums, counts, licenses and mirrors.

Figures of LibriSpeech are those published on openslr.org/12 and /31. A corpus is added by adding an entry here and,
where its archives have a layout of their own, a reader in readers.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.cli import DataError
from data.packed import SPLITS

REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Archive:
    """A published file; `bytes` and sums are empty for archives that are made on this machine."""

    file: str
    bytes: int = 0
    md5: str = ""
    sha256: str = ""


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
    license: str
    subsets: tuple[CorpusSubset, ...]
    layout: str = "librispeech"
    mirrors: tuple[str, ...] = ()
    synthetic: bool = False
    reference_digest: str = ""

    @property
    def default_dataset_dir(self) -> Path:
        return REPOSITORY / self.folder

    def select(self, names: Sequence[str]) -> list[CorpusSubset]:
        """Return the subsets of these names, in the catalog's order, or all if none is given. DataError if unknown."""
        known = [subset.name for subset in self.subsets]
        if unknown := [name for name in names if name not in known]:
            raise DataError(f"{self.name} has no subset '{unknown[0]}'; it has: {', '.join(known)}")
        return [subset for subset in self.subsets if not names or subset.name in names]

    def published(self, md5: str) -> bool:
        """Return whether this is the MD5 of one of the published archives."""
        return md5 != "" and any(subset.archive.md5 == md5 for subset in self.subsets)

    def splits(self, prepared: Sequence[str]) -> dict[str, list[str]]:
        """Return the names of the prepared subsets by split."""
        return {
            split: [subset.name for subset in self.subsets if subset.split == split and subset.name in prepared]
            for split in SPLITS
        }


def _librispeech(
    name: str, split: str, size: int, md5: str, counts: tuple[int, float, int] | None = None, sha256: str = ""
) -> CorpusSubset:
    """`counts` are those of utterances, hours and speakers."""
    return CorpusSubset(name, split, Archive(f"{name}.tar.gz", size, md5, sha256), *(counts or (None,)))


TRAIN_CLEAN_100 = _librispeech(
    "train-clean-100", "train", 6387309499, "2a93770f6d5c6c964bc36631d331a522", (28539, 100.6, 251),
    "d4ddd1d5a6ab303066f14971d768ee43278a5f2a0aa43dc716b0e64ecbbbf6e2",
)  # fmt: skip
TRAIN_CLEAN_360 = _librispeech(
    "train-clean-360", "train", 23049477885, "c0e676e450a7ff2f54aeade5171606fa", (104014, 363.6, 921),
    "146a56496217e96c14334a160df97fffedd6e0a04e66b9c5af0d40be3c792ecf",
)  # fmt: skip
TRAIN_OTHER_500 = _librispeech(
    "train-other-500", "train", 30593501606, "d1a0fd59409feb2c614ce4d30c387708", (148688, 496.7, 1166),
    "ddb22f27f96ec163645d53215559df6aa36515f26e01dd70798188350adcb6d2",
)  # fmt: skip
DEV_CLEAN = _librispeech(
    "dev-clean", "validation", 337926286, "42e2234ba48799c1f50f24a7926300a1", (2703, 5.4, 40),
    "76f87d090650617fca0cac8f88b9416e0ebf80350acb97b343a85fa903728ab3",
)  # fmt: skip
DEV_OTHER = _librispeech(
    "dev-other", "validation", 314305928, "c8d0bcc9cca99d4f8b62fcc847357931", (2864, 5.3, 33),
    "12661c48e8c3fe1de2c1caa4c3e135193bfb1811584f11f569dd12645aa84365",
)  # fmt: skip
TEST_CLEAN = _librispeech(
    "test-clean", "test", 346663984, "32fa31d27d2e1cad72775fee3f4849a9", (2620, 5.4, 40),
    "39fde525e59672dc6d1551919b1478f724438a95aa55f874b576be21967e6c23",
)  # fmt: skip
TEST_OTHER = _librispeech(
    "test-other", "test", 328757843, "fb5a50374b501bb3bac4815ee91d3135", (2939, 5.1, 33),
    "d09c181bba5cf717b3dee7d4d592af11a3ee3a09e08ae025c5506f6ebe961c29",
)  # fmt: skip
HELD_OUT = (DEV_CLEAN, DEV_OTHER, TEST_CLEAN, TEST_OTHER)

# Both subsets of AN4 lie in one archive. CMU publishes no sums; these were taken from the complete archive
# (948 + 130 utterances), so a mismatch may also mean a repacked copy: --checksums then states the sum to expect.
AN4_ARCHIVE = Archive("an4_raw.bigendian.tar.gz", 64075473, "c7349bfe32988f04d09e13f2f1044689")


def openslr_mirrors(number: int) -> tuple[str, ...]:
    """Return the addresses of a resource of OpenSLR."""
    hosts = ("www.openslr.org", "openslr.elda.org", "openslr.trmal.net", "openslr.magicdatatech.com")
    return tuple(f"https://{host}/resources/{number}" for host in hosts)


CORPORA = {
    corpus.name: corpus
    for corpus in (
        Corpus(
            name="librispeech",
            folder="LibriSpeech_dataset",
            license="CC BY 4.0",
            mirrors=openslr_mirrors(12),
            subsets=(TRAIN_CLEAN_100, TRAIN_CLEAN_360, TRAIN_OTHER_500, *HELD_OUT),
        ),
        Corpus(
            name="librispeech-100",
            folder="LibriSpeech-100_dataset",
            license="CC BY 4.0",
            mirrors=openslr_mirrors(12),
            subsets=(TRAIN_CLEAN_100, *HELD_OUT),
        ),
        Corpus(
            name="mini-librispeech",  # overlaps LibriSpeech, for smoke runs only
            folder="Mini_dataset",
            license="CC BY 4.0",
            mirrors=openslr_mirrors(31),
            subsets=(
                # No utterance counts and only rough hours are published for these two, so none are checked.
                _librispeech("train-clean-5", "train", 332954390, "5df7d4e78065366204ca6845bb08f490"),
                _librispeech("dev-clean-2", "validation", 126046265, "6d7ab67ac6a1d2c993d050e16d61080d"),
            ),
        ),
        Corpus(
            name="an4",  # its test set is the validation split
            folder="AN4_dataset",
            layout="an4",
            license="CMU, free for any use",
            mirrors=("http://www.speech.cs.cmu.edu/databases/an4",),
            subsets=(
                CorpusSubset("train", "train", AN4_ARCHIVE, 948, 0.71, 74),
                CorpusSubset("test", "validation", AN4_ARCHIVE, 130, 0.10, 10),
            ),
        ),
        Corpus(
            name="synthetic",  # sentences spoken by eSpeak NG, made on this machine
            folder="Synthetic_dataset",
            license="Apache-2.0 (the sentences); spoken by eSpeak NG, GPL-3.0-or-later",
            subsets=(
                _librispeech("synthetic-train", "train", 0, "", (1800, 1.05, 76)),
                _librispeech("synthetic-validation", "validation", 0, "", (240, 0.14, 16)),
                _librispeech("synthetic-test", "test", 0, "", (200, 0.12, 16)),
            ),
            synthetic=True,
            reference_digest="14f6b62443c4c1f6636a032994d8c3167df9fb2740299fab065985dab00f22fb",
        ),
        Corpus(
            name="manifest",  # your own speech, listed in a file
            folder="Manifest_dataset",
            layout="manifest",
            license="yours",
            # One manifest makes one of these; what stands for the archive is the manifest.
            subsets=tuple(CorpusSubset(split, split, Archive(""), None) for split in SPLITS),
        ),
    )
}


def find_corpus(name: str) -> Corpus:
    """Return the corpus of this name; DataError lists the names there are."""
    if name not in CORPORA:
        raise DataError(f"unknown corpus '{name}'; there are: {', '.join(CORPORA)}")
    return CORPORA[name]
