"""Language models: estimated, decoded with, and their weights tuned."""

import gzip
import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pytorch.ctc import BLANK, LABELS, encode
from pytorch.errors import RunError
from tests.conftest import ROOT
from tests.processes import run_module_for_text
from tests.tools.conftest import Trained
from tools.language_model.__main__ import arpa_lines, estimate_ngrams
from tools.language_model.beam_search import LanguageModel, beam_search, read_words
from tools.language_model.tune import leave_one_out
from tools.recognizer import align, greedy

needs_flashlight = pytest.mark.skipif(
    importlib.util.find_spec("flashlight") is None, reason="flashlight-text is not installed (extra lm)"
)
TRANSCRIPTS = ["THE CAT SAT", "THE CAT RAN", "A CAT SAT DOWN", "THE DOG SAT"]
SENTENCES = st.lists(st.lists(st.sampled_from("ABCD"), max_size=5).map(" ".join), min_size=1, max_size=6)


def estimate(dataset: Path, output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = "tools.language_model", "estimate", "--dataset-dir", dataset, "--output", output
    return run_module_for_text(*map(str, command), *options)


def write_arpa(path: Path, transcripts: Sequence[str] = TRANSCRIPTS, order: int = 3) -> Path:
    path.write_text("".join(f"{line}\n" for line in arpa_lines(estimate_ngrams(transcripts, order))))
    return path


class Arpa:
    """An ARPA file read back: probabilities by the rule of the format."""

    def __init__(self, lines: Sequence[str]) -> None:
        self.entries = {}
        for line in lines:
            if line.count("\t"):
                logarithm, ngram, *backoff = line.split("\t")
                self.entries[tuple(ngram.split())] = (float(logarithm), float(backoff[0]) if backoff else 0.0)

    def log10(self, word: str, history: tuple[str, ...]) -> float:
        if (*history, word) in self.entries:
            return self.entries[(*history, word)][0]
        if not history:
            return self.entries[("<unk>",)][0]
        return self.entries.get(history, (0.0, 0.0))[1] + self.log10(word, history[1:])


def test_a_bigram_of_two_sentences_is_what_witten_and_bell_s_formula_says_by_hand() -> None:
    unigrams, bigrams = estimate_ngrams(["A B", "A"], 2)
    # 5 tokens (A, B, </s>, A, </s>) of 3 types; uniform over 3 types and the unknown word
    a, b = (2 + 3 / 4) / 8, (1 + 3 / 4) / 8
    assert unigrams[("A",)][0] == pytest.approx(a)
    assert unigrams[("B",)][0] == pytest.approx(b)
    assert unigrams[("<unk>",)][0] == pytest.approx(3 / 4 / 8)
    # A was followed by B once and by the end once
    assert bigrams[("A", "B")][0] == pytest.approx((1 + 2 * b) / 4)
    assert unigrams[("A",)][1] == pytest.approx(2 / 4)
    assert bigrams[("<s>", "A")][0] == pytest.approx((2 + 1 * a) / 3)


@given(SENTENCES, st.integers(1, 4))
def test_the_probabilities_of_all_words_sum_to_one_after_every_history(sentences: list[str], order: int) -> None:
    arpa = Arpa(list(arpa_lines(estimate_ngrams(sentences, order))))
    words = [ngram[0] for ngram in arpa.entries if len(ngram) == 1 and ngram != ("<s>",)]
    histories = [ngram for ngram in arpa.entries if len(ngram) < order and ngram[-1] not in ("</s>", "<unk>")]
    for history in [(), *histories]:
        assert sum(10 ** arpa.log10(word, history) for word in words) == pytest.approx(1, abs=1e-5)


def test_a_model_is_estimated_from_the_training_transcripts_alone(trained: Trained, tmp_path: Path) -> None:
    run = estimate(trained.dataset, tmp_path / "lm.arpa")
    assert run.returncode == 0, run.stderr
    assert "from 240 transcripts" in run.stderr
    assert {"AN", "OLD", "BELL", "RINGS", "IT'S", "NOON"} <= set(read_words(tmp_path / "lm.arpa"))
    assert [path.name for path in tmp_path.iterdir()] == ["lm.arpa"]
    again = estimate(trained.dataset, tmp_path / "lm.arpa")
    assert (again.returncode, "lm.arpa exists already" in again.stderr) == (1, True)
    assert estimate(trained.dataset, tmp_path / "new" / "lm.arpa.gz").returncode == 0
    assert gzip.decompress((tmp_path / "new" / "lm.arpa.gz").read_bytes()) == (tmp_path / "lm.arpa").read_bytes()


@pytest.mark.parametrize(
    "content", [b"", b"no model", b"\x1f\x8b cut short", b"\\data\\\n\\2-grams:\n", b"\xff\xfe\x00"]
)
def test_what_is_no_arpa_file_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "lm").write_bytes(content)
    with pytest.raises(RunError, match="lm is not an ARPA file"):
        read_words(tmp_path / "lm")
    with pytest.raises(RunError, match="language model not found"):
        read_words(tmp_path / "absent")


def emission_of(text: str, confusable: dict[int, str] | None = None) -> torch.Tensor:
    """Log probabilities of output frames that spell a text; at some characters another is a little more probable."""
    rows = []
    for position, label in enumerate(encode(text)):
        row = torch.full((len(LABELS),), 1e-4)
        row[label] = 0.4
        if confusable and position in confusable:
            row[encode(confusable[position])[0]] = 0.5
        blank = torch.full((len(LABELS),), 1e-4)
        blank[BLANK] = 1.0
        rows += [row, blank]
    probabilities = torch.stack(rows)
    return (probabilities / probabilities.sum(1, keepdim=True)).log()


@needs_flashlight
@pytest.mark.parametrize("name", ["lm.arpa", "lm.arpa.gz"])
def test_the_language_model_decides_between_what_sounds_alike(name: str, tmp_path: Path) -> None:
    path = write_arpa(tmp_path / "lm.arpa")
    if name.endswith(".gz"):
        (tmp_path / name).write_bytes(gzip.compress(path.read_bytes()))
    emission_TV = emission_of("THE CAT SAT", {4: "B", 10: "D"})
    assert greedy(emission_TV) == "THE BAT SAD"
    decode = beam_search(LanguageModel(tmp_path / name), alpha=1.0, beta=0.0, beam=20)
    assert decode(emission_TV) == "THE CAT SAT"
    assert [word.text for word in align(decode(emission_TV), emission_TV)] == ["THE", "CAT", "SAT"]
    silence_TV = torch.full((30, len(LABELS)), math.log(1e-4))
    silence_TV[:, BLANK] = -0.003
    assert decode(silence_TV) == ""


@needs_flashlight
def test_a_word_bonus_and_the_weight_of_the_model_do_what_they_say(tmp_path: Path) -> None:
    model = LanguageModel(write_arpa(tmp_path / "lm.arpa", ["A B", "AB", "A B A"]))
    probabilities = torch.full((3, len(LABELS)), 1e-5)
    probabilities[0, encode("A")[0]] = probabilities[2, encode("B")[0]] = 1.0
    probabilities[1, BLANK] = 0.5
    probabilities[1, encode(" ")[0]] = 0.5
    emission_TV = probabilities.log()
    assert beam_search(model, 0.0, 5.0, 50)(emission_TV) == "A B"
    assert beam_search(model, 0.0, -5.0, 50)(emission_TV) == "AB"


@needs_flashlight
def test_tuning_and_evaluation_with_a_language_model_agree(trained: Trained, tmp_path: Path) -> None:
    lm = tmp_path / "lm.arpa"
    assert estimate(trained.dataset, lm, "--order", "2").returncode == 0
    model = [trained.checkpoint, "--dataset-dir", trained.dataset]
    tuned = run_module_for_text("tools.language_model.tune", *model, "--lm", lm, "--beam", "20")
    assert tuned.returncode == 0, tuned.stderr
    assert "****" not in tuned.stderr  # KenLM's
    *_, best, _, options = tuned.stdout.splitlines()
    run = run_module_for_text("tools.evaluate", *model, *options.split(), "--output", tmp_path / "out")
    assert run.returncode == 0, run.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["scores"]["all"]["wer"] == pytest.approx(float(best.split("WER")[1]), abs=0.01)
    assert summary["decoding"]["beam"] == "20"


@needs_flashlight
@pytest.mark.parametrize("order", [1, 2, 6, 7])
def test_a_model_is_estimated_where_the_search_can_read_it(order: int, tones: Path, tmp_path: Path) -> None:
    lm = tmp_path / "lm.arpa"
    run = estimate(tones, lm, "--order", str(order))
    if run.returncode == 0:
        LanguageModel(lm)
    else:
        assert run.stderr == f"error: --order is {order}; it must be from 2 to 6, as KenLM reads no others\n"
        with pytest.raises(RunError, match="KenLM cannot read it"):
            LanguageModel(write_arpa(lm, order=order))


def test_what_is_left_out_has_no_say_in_the_choice() -> None:
    errors_PN = np.array([[0, 0, 5], [1, 1, 0]])  # each pair is best for somebody
    assert leave_one_out(errors_PN, ["x", "x", "y"]) == 2 + 5
    assert leave_one_out(errors_PN[:1], ["x", "x", "y"]) == 5


def test_without_the_library_the_error_says_what_to_install(tmp_path: Path) -> None:
    path = write_arpa(tmp_path / "lm.arpa")
    code = (
        "import sys; sys.modules['flashlight'] = None; from pathlib import Path; from pytorch.config import RunError\n"
        f"from tools.language_model.beam_search import LanguageModel\ntry:\n    LanguageModel(Path({str(path)!r}))\n"
        "except RunError as error:\n    print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "pip install -e '.[lm]'" in run.stdout
    assert run.stdout.count("\n") == 1
