"""Beam search over CTC outputs with an n-gram language model.

    decode = beam_search(LanguageModel(Path("an4.arpa")), alpha=1.0, beta=1.0, beam=100)
    transcript = decode(emission_TV)

A transcript's score is log p(labels | audio) + alpha * log p(words) + beta * number of words, as in Deep Speech (arXiv
1412.5567, section 2.2), with natural logarithms. Only words of the language model can be recognized. The search is
flashlight-text's, which brings KenLM to read the model; it is the extra `lm` (pip install -e '.[lm]').
"""

import gzip
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from pytorch.ctc import BLANK, LABELS, encode
from pytorch.errors import RunError
from pytorch.evaluation import Decoder
from tools.cli import require_positive
from tools.recognizer import copy_emissions, greedy

SCORE_THRESHOLD = 50.0  # nats by which a kept transcript may be worse than the best one at an output frame
MARKERS = ("<s>", "</s>", "<unk>", "<UNK>")
_SPACE = LABELS.index(" ")
_CHARACTERS = set(LABELS) - {LABELS[BLANK], " "}

Decode = Callable[[Tensor], str]  # emission [T, V] -> transcript


@dataclass(frozen=True)
class Decoding:
    """How transcripts are found: greedily, or by beam search with a language model."""

    lm: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """n-gram language model: an ARPA file, plain or gzip; without one decoding is greedy, as in a timed run"""
    alpha: float = 0.5
    """weight of the language model"""
    beta: float = 1.0
    """what each word adds to a transcript's score"""
    beam: int = 100
    """transcripts kept at each output frame"""

    def make(self) -> Decode:
        """Return what decodes an emission.

        Raises:
            RunError: a weight is not a number, or the language model cannot be read.
        """
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            if not math.isfinite(value):
                raise RunError(f"--{name} is {value}; it must be a finite number")
        require_positive(beam=self.beam)
        if self.lm is None:
            if self != Decoding():
                raise RunError("--alpha, --beta and --beam are for decoding with a language model: give --lm as well")
            return greedy
        return beam_search(LanguageModel(self.lm), self.alpha, self.beta, self.beam)


@contextmanager
def _silent() -> Iterator[None]:
    """Have nobody see what C++ writes to standard error: while it reads a model, KenLM draws a line of asterisks."""
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)


def decode_each(decode: Decode) -> Decoder:
    """Make a decoder of batches from one of emissions."""

    def start(logits_TBV: Tensor, frames_B: Tensor) -> Callable[[], list[str]]:
        emissions = copy_emissions(logits_TBV, frames_B)
        return lambda: [decode(emission_TV) for emission_TV in emissions()]

    return start


class LanguageModel:
    """An n-gram model with its words as a tree of labels.

    RunError if the extra `lm` is not installed, or the file is not an ARPA model with words of our labels.
    """

    def __init__(self, path: Path) -> None:
        words = read_words(path)  # first: a mistyped name needs no package to be found
        try:
            from flashlight.lib.text import decoder, dictionary
            from flashlight.lib.text.decoder.kenlm import KenLM
        except ImportError as error:
            raise RunError(
                f"--lm needs flashlight-text, which has packages for Python 3.11 and 3.12 ({error}): "
                "install it with pip install -e '.[lm]'"
            ) from None
        self.library = decoder
        spelled = {word: word.upper() for word in words if word not in MARKERS and set(word.upper()) <= _CHARACTERS}
        if not spelled:
            raise RunError(f"{path}: none of its words is spelled with only A to Z and apostrophe")
        indices = dictionary.Dictionary()
        for word in (*spelled, "<unk>"):
            indices.add_entry(word)
        self.unknown = indices.get_index("<unk>")
        self.spellings = list(spelled.values())  # by index
        try:
            with _silent():
                self.kenlm = KenLM(str(path), indices)
        except (RuntimeError, UnicodeDecodeError) as error:
            raise RunError(f"{path}: KenLM cannot read it: {str(error).splitlines()[-1]}") from error
        self.words = decoder.Trie(len(LABELS), _SPACE)
        start = self.kenlm.start(False)
        for index, spelling in enumerate(self.spellings):
            # A space ends every word, so that a word and its beginnings differ.
            self.words.insert(encode(f"{spelling} "), index, self.kenlm.score(start, index)[1])
        self.words.smear(decoder.SmearingMode.MAX)


def beam_search(model: LanguageModel, alpha: float, beta: float, beam: int) -> Decode:
    """Return the decoder for one language model and one pair of weights."""
    library = model.library
    options = library.LexiconDecoderOptions(
        beam_size=beam,
        beam_size_token=len(LABELS),
        beam_threshold=SCORE_THRESHOLD,
        lm_weight=alpha * math.log(10),  # KenLM's logarithms are decimal
        word_score=beta,
        unk_score=-math.inf,
        sil_score=0.0,
        log_add=True,
        criterion_type=library.CriterionType.CTC,
    )
    decoder = library.LexiconDecoder(options, model.words, model.kenlm, _SPACE, BLANK, model.unknown, [], False)
    # One frame more, in which a space or nothing costs nothing: the last word must end too.
    end_1V = torch.full((1, len(LABELS)), -1e4)
    end_1V[0, [BLANK, _SPACE]] = 0.0

    def decode(emission_TV: Tensor) -> str:
        emission_TV = torch.cat([emission_TV, end_1V]).contiguous()
        best = decoder.decode(emission_TV.data_ptr(), *emission_TV.shape)[0]
        return " ".join(model.spellings[index] for index in best.words if index >= 0)  # which keeps the model alive

    return decode


def read_words(path: Path) -> list[str]:
    """Return the words of an ARPA file, in its order; RunError where there is none."""
    words: list[str] = []
    try:
        with path.open("rb") as probe:
            compressed = probe.read(2) == b"\x1f\x8b"
        with (gzip.open if compressed else open)(path, "rt", encoding="utf-8") as lines:  # type: ignore[operator]
            if not any(line.strip() == "\\1-grams:" for line in lines):
                raise RunError(f"{path} is not an ARPA file (no line \\1-grams:); KenLM binaries do not work")
            for line in lines:
                if re.match(r"\\.*[-a-z]", line):  # the next section
                    break
                if fields := line.split():
                    words.append(fields[1])
    except FileNotFoundError:
        raise RunError(f"{path}: language model not found") from None
    except (OSError, EOFError, UnicodeDecodeError, zlib.error, IndexError) as error:
        why = getattr(error, "strerror", None) or type(error).__name__
        raise RunError(f"{path} is not an ARPA file, or is damaged ({why})") from error
    return words
