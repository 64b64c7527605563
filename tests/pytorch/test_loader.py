import dataclasses
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.packed import open_dataset
from pytorch.config import CONFIGS
from pytorch.ctc import LABELS, encode
from pytorch.distributed import World
from pytorch.errors import RunError
from pytorch.features import Augmentation, LogSpectrogram
from pytorch.loader import CPU, TrainingLoader, Utterances, augmentation, batch_by_padded_size, make_batch, prefetch
from tests.pytorch.test_trainer import small_config

CONFIG = CONFIGS["synthetic"]


@pytest.fixture(scope="module")
def utterances(tones: Path) -> Utterances:
    return Utterances(open_dataset(tones).split("train"))


def epoch(utterances: Utterances, number: int, seed: int = 1) -> list[list[int]]:
    loader = TrainingLoader(utterances, small_config(batch_size=4, seed=seed), World())
    return [batch.tolist() for batch in loader.global_batches(number)]


def test_utterances_of_several_subsets_are_one_sequence_by_length(tones: Path) -> None:
    dataset = open_dataset(tones)
    both = Utterances(dataset.split("train") + dataset.split("validation"))
    assert len(both) == 28
    assert (np.diff(both.num_samples) >= 0).all()
    assert [len(both.waveform(index)) for index in range(28)] == both.num_samples.tolist()
    assert len({both.id(index) for index in range(28)}) == 28


@pytest.mark.parametrize("number", [1, 2, 3])
def test_every_epoch_has_every_utterance_once_among_others_of_like_length(utterances: Utterances, number: int) -> None:
    batches = epoch(utterances, number)
    assert sorted(chain(*batches)) == list(range(21))
    assert sorted(map(len, batches)) == [3, 3, 3, 4, 4, 4]
    lengths = [utterances.num_samples[batch] for batch in batches]
    assert max(batch.max() / batch.min() for batch in lengths) < 2


def test_the_first_epoch_is_in_order_of_length_and_later_ones_are_shuffled_by_seed(utterances: Utterances) -> None:
    assert list(chain(*epoch(utterances, 1))) == list(range(21))
    assert epoch(utterances, 2) == epoch(utterances, 2)
    assert epoch(utterances, 2) != epoch(utterances, 3)
    assert epoch(utterances, 2) != epoch(utterances, 2, seed=2)


def test_a_batch_holds_the_samples_and_transcripts_of_its_utterances(utterances: Utterances) -> None:
    batch = make_batch(utterances, np.array([20, 0, 7]))
    assert batch.augmentation is None
    assert batch.waveforms_BS.shape == (3, utterances.num_samples[20]) and batch.waveforms_BS.dtype == torch.int16
    position = 0
    for row, index in enumerate(batch.indices):
        length = int(batch.num_samples_B[row])
        assert np.array_equal(batch.waveforms_BS[row, :length].numpy(), utterances.waveform(index))
        assert batch.waveforms_BS[row, length:].abs().sum() == 0
        labels = batch.targets[position : position + int(batch.target_lengths_B[row])]
        assert "".join(LABELS[label] for label in labels) == utterances.transcript(index)
        position += len(labels)
    assert position == len(batch.targets)


def test_an_utterance_is_augmented_alike_in_any_batch_and_anew_in_each_epoch(utterances: Utterances) -> None:
    def tempo(indices: list[int], epoch: int) -> list[float]:
        return augmentation(utterances, CONFIG, epoch, np.array(indices)).tempo.tolist()

    assert tempo([3, 9], 2)[1] == tempo([9], 2)[0]
    assert tempo([9], 2) != tempo([9], 3)


def can_align(frames: int, transcript: str) -> bool:
    """Return whether PyTorch's CTC loss is finite, which it is if there is any alignment."""
    targets = torch.tensor([encode(transcript)])
    log_probs = torch.zeros(frames, 1, len(LABELS)).log_softmax(2)
    lengths = torch.tensor([frames]), torch.tensor([len(transcript)])
    return bool(torch.nn.functional.ctc_loss(log_probs, targets, *lengths, reduction="sum").isfinite())


def test_ctc_is_feasible_exactly_where_pytorchs_loss_is_finite(utterances: Utterances) -> None:
    for length in range(1, 70):
        transcripts = [("AAB" * length)[:length]] * 21
        changed = Utterances([dataclasses.replace(utterances.subsets[0], transcripts=transcripts)])
        expected = [can_align(int(count) // 320 + 1, transcripts[0]) for count in changed.num_samples]
        assert changed.ctc_feasible().tolist() == expected


def test_augmentation_never_makes_an_utterance_too_short_for_its_transcript(utterances: Utterances) -> None:
    frames = (utterances.num_samples // 160 // 2 + 1).tolist()
    tight = dataclasses.replace(utterances.subsets[0], transcripts=["AB" * (count // 2) for count in frames])
    fast = dataclasses.replace(CONFIG, tempo_min=1.5, tempo_max=2.0)
    drawn = augmentation(Utterances([tight]), fast, 1, np.arange(21))
    for tempo, samples, transcript in zip(drawn.tempo, utterances.num_samples, tight.transcripts, strict=True):
        new_frames = int((samples // 160) / tempo) + 1
        assert (new_frames - 1) // 2 + 1 >= len(transcript)


def test_an_utterance_of_one_frame_can_be_augmented(utterances: Utterances) -> None:
    subset = utterances.subsets[0]
    short = dataclasses.replace(subset, offsets=np.zeros(21, int), num_samples=np.full(21, 100), transcripts=["A"] * 21)
    augment = partial(augmentation, Utterances([short]), CONFIG, 1)
    batch = make_batch(Utterances([short]), np.arange(3), augment=augment)
    _, frames_B = LogSpectrogram()(batch.waveforms_BS, batch.num_samples_B, batch.augmentation)
    assert frames_B.tolist() == [1, 1, 1]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40).map(sorted), st.integers(1, 200))
def test_batches_by_size_hold_every_utterance_once_and_as_many_as_fit(samples: list[int], capacity: int) -> None:
    batches = [batch.tolist() for batch in batch_by_padded_size(np.array(samples), capacity)]
    assert list(chain(*batches)) == list(range(len(samples)))
    for batch, following in zip(batches, [*batches[1:], []], strict=True):
        assert len(batch) == 1 or len(batch) * samples[batch[-1]] <= capacity
        assert not following or (len(batch) + 1) * samples[following[0]] > capacity


def test_prefetching_keeps_the_order_and_passes_errors_on(utterances: Utterances) -> None:
    plan = np.array_split(np.arange(21), 10)
    prefetched = prefetch(utterances, plan, CPU)
    assert [batch.indices.tolist() for batch in prefetched] == [indices.tolist() for indices in plan]

    def fail(indices: np.ndarray) -> Augmentation:
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        next(prefetch(utterances, plan, CPU, fail))


def test_a_corpus_of_which_every_utterance_is_too_short_says_so(tones: Path) -> None:
    subset = open_dataset(tones).split("train")[0]
    spoken = Utterances([dataclasses.replace(subset, transcripts=["A" * 999] * len(subset))])
    with pytest.raises(RunError, match="all 21 training utterances are too short for their transcripts"):
        TrainingLoader(spoken, small_config(), World())
