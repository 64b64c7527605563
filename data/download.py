"""Downloads a corpus and prepares it: archives -> packed data set.

    python -m data.download                                         all of LibriSpeech into ./LibriSpeech_dataset
    python -m data.download --subsets dev-clean,test-clean          only these; others can be added later
    python -m data.download --mirror part --checksums part/md5sum.txt       archives other than the published ones

Each archive is prepared as soon as it is complete, then removed. After any interruption, the same command resumes.
"""

import errno
import sys
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from data.cli import UserError, available_cores, exit_status
from data.corpora import CORPORA, REPOSITORY, Archive, Corpus, CorpusSubset, find_corpus, rehearsal
from data.fetch import obtain_archives, read_checksums
from data.files import UNFINISHED, check_space, locked, work_folder
from data.own_speech import digest, read_own_speech
from data.packed import DATASET_FILE, PackedDataset, content_files, read_dataset
from data.prepare import SYNTHESIZERS, Preparation, check_place

PACKED_BYTES_PER_HOUR = 116e6  # 16-bit samples at 16 kHz, and the index


@dataclass(frozen=True)
class Options:
    """Download a corpus and prepare it for training; what is there already is not done again."""

    corpus: Annotated[str, tyro.conf.arg(help=f"which one: {', '.join(CORPORA)}")] = "librispeech"
    subsets: str = ""
    """comma-separated subsets, such as train-clean-100,dev-clean; empty: all of the corpus (of a manifest: train)"""
    mirror: str = ""
    """folder, or comma-separated addresses, tried in this order, that hold the archives; empty: the corpus's own"""
    checksums: Path | None = None
    """md5sum-format file whose sums replace the official ones, for archives that are not the published ones"""
    manifest: Path | None = None
    """for --corpus manifest: a list (TSV, CSV, JSON lines) or a folder of your own speech; see data/README.md"""
    hours: float | None = None
    """for --corpus rehearsal: hours of training speech, 0.1 to 960; default: those of the configuration rehearsal"""
    dataset_dir: Path | None = None
    """where the data set goes; by default a folder in the repository, such as LibriSpeech_dataset"""
    jobs: int = available_cores()
    """threads that decode audio"""


def main() -> int:
    said = "Interrupted. Run the same command to resume."
    return exit_status(lambda: download(tyro.cli(Options, prog="download_dataset.sh")), None, interrupted=said)


def download(options: Options) -> PackedDataset:
    """Bring the data set that `options` describe to completion; UserError where that is impossible."""
    corpus = find_corpus(options.corpus) if options.hours is None else rehearsal(options.hours)
    names = [name.strip() for name in options.subsets.split(",") if name.strip()]
    subsets = corpus.select(names)
    _check_options(options, corpus, names)
    subsets = subsets[:1] if options.manifest else subsets
    path = options.dataset_dir or REPOSITORY / corpus.folder
    try:
        archives = _expected_archives(subsets, options)
        path.mkdir(parents=True, exist_ok=True)
        with locked(path, "download or verification"):
            dataset = _complete(path, corpus, subsets, archives, options)
    except OSError as error:
        advice = "; 'ulimit -f' or the file system limits a file's size" if error.errno == errno.EFBIG else ""
        raise UserError(f"{error.filename or f'writing in {path}'}: {error.strerror}{advice}") from error
    counts = [f"{name} {each.utterances} utterances ({each.hours:.2f} h)" for name, each in dataset.summary.items()]
    print(f"{path} is complete: {', '.join(counts)}")
    return dataset


def _check_options(options: Options, corpus: Corpus, names: Sequence[str]) -> None:
    if options.jobs < 1:
        raise UserError(f"--jobs is {options.jobs}; at least 1 is needed")
    if options.hours is not None and options.corpus != "rehearsal":
        raise UserError("--hours is for --corpus rehearsal alone")
    if (corpus.layout == "manifest") != (options.manifest is not None):
        raise UserError("--corpus manifest and --manifest FILE go together")
    if options.manifest and len(names) > 1:
        raise UserError("a manifest makes one subset: --subsets train, validation or test")
    if not corpus.mirrors and (options.mirror or options.checksums):
        raise UserError(f"{corpus.name} has no archives: --mirror and --checksums do not apply")


def _expected_archives(subsets: Sequence[CorpusSubset], options: Options) -> dict[str, Archive]:
    """Return by subset the published archive, or one with the sum of --checksums; a manifest stands for its archive."""
    if options.manifest:
        if not (options.manifest.is_file() or options.manifest.is_dir()):  # a pipe could not be read again
            raise UserError(f"the manifest {options.manifest} is missing, or is neither a regular file nor a folder")
        return {subsets[0].name: Archive(str(options.manifest), md5=digest(options.manifest))}
    if not options.checksums:
        return {subset.name: subset.archive for subset in subsets}
    sums = read_checksums(options.checksums)
    if absent := [subset.archive.file for subset in subsets if subset.archive.file not in sums]:
        raise UserError(f"{options.checksums} has no line for {absent[0]}")
    return {subset.name: Archive(subset.archive.file, md5=sums[subset.archive.file]) for subset in subsets}


def _complete(
    path: Path, corpus: Corpus, subsets: Sequence[CorpusSubset], archives: dict[str, Archive], options: Options
) -> PackedDataset:
    """Add the subsets that are missing to the data set in `path`."""
    dataset = PackedDataset(path, corpus.name, corpus.synthetic, corpus.splits([]))
    if (path / DATASET_FILE).exists():
        dataset = read_dataset(path)
    if dataset.corpus != corpus.name:
        raise UserError(f"{path} holds the corpus {dataset.corpus}, not {corpus.name}: give another --dataset-dir")
    missing = [subset for subset in subsets if not _is_prepared(dataset, subset.name, archives[subset.name].md5)]
    check_place(dataset, [subset.name for subset in missing])
    complete = dataset.digest != "" and not missing
    # A folder that a killed run has left is removed even then, but none is made, as the disk may be read-only.
    with work_folder(path) if not complete or (path / UNFINISHED).exists() else nullcontext(path) as work:
        if complete:
            return dataset
        preparation = Preparation(dataset, corpus, work, options.jobs)
        if options.manifest and missing:
            utterances = read_own_speech(options.manifest, options.jobs)
            check_space(path, 2 * sum(utterance.num_samples for utterance in utterances))
            preparation.add_subset(archives[missing[0].name], missing[0].name, utterances)
        elif missing and corpus.synthetic:
            check_space(path, sum(PACKED_BYTES_PER_HOUR * (subset.hours or 0) for subset in missing))
            for subset in missing:
                utterances = SYNTHESIZERS[corpus.layout].list_utterances(corpus, subset)
                preparation.add_subset(Archive(""), subset.name, utterances)
        elif missing:
            wanted = list(dict.fromkeys(archives[subset.name] for subset in missing))  # one may hold several subsets
            verified = obtain_archives(wanted, corpus, work, options.mirror)
            with closing(verified):  # whatever goes wrong in here must end the downloads that run beside it
                for archive, file in verified:
                    members = [subset for subset in missing if subset.archive.file == archive.file]
                    preparation.add_archive(archive, file, members)
        return preparation.finish()


def _is_prepared(dataset: PackedDataset, name: str, md5: str) -> bool:
    """Return whether a subset is there already; UserError if it was made from another archive than is asked for now."""
    others = [other for other, each in dataset.summary.items() if each.archive_md5 == md5 and other != name]
    if others and dataset.corpus == "manifest":
        print(f"warning: {name} and {others[0]} of {dataset.path} are one list: its WER says nothing", file=sys.stderr)
    if name not in dataset.summary:
        return False
    found = dataset.summary[name].archive_md5
    if md5 not in ("", found):
        made_from = f"a list with MD5 {found}" if dataset.corpus == "manifest" else f"an archive with MD5 {found}"
        raise UserError(f"{dataset.path} holds {name} from {made_from}, not {md5}: give another --dataset-dir")
    return all((dataset.path / file).is_file() for file in content_files([name]))


if __name__ == "__main__":
    sys.exit(main())
