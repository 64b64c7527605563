import pytest
import torch
from torch import nn

from pytorch.config import CONFIGS
from pytorch.ctc import BLANK, LABELS, collapse, ctc_loss
from pytorch.features import FREQUENCY_BINS
from pytorch.model import BLANK_LOGIT, DeepSpeech2

FRAMES = torch.tensor([61, 100, 33, 100, 7])


@pytest.fixture(scope="module")
def features() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    made_up = torch.randn(len(FRAMES), FREQUENCY_BINS, 100, generator=generator)
    return made_up * (torch.arange(100) < FRAMES[:, None])[:, None]


@pytest.fixture(scope="module")
def model(features: torch.Tensor) -> DeepSpeech2:
    """A small model with batch-norm statistics that are not the initial ones, for evaluation."""
    torch.manual_seed(0)
    made = DeepSpeech2(conv_channels=4, hidden_size=24)
    made(features, FRAMES)
    return made.eval()


def test_reference_configuration_has_the_stated_topology_and_parameter_count() -> None:
    config = CONFIGS["librispeech"]
    model = DeepSpeech2(config.conv_channels, config.hidden_size)
    wider_input = (1312 - 672) * 3 * 800 * 2  # 'same' padding keeps 41 frequencies, not 21, for the first GRU layer
    conv_biases = 2 * 32  # taken out again by the batch norm after them
    in_2018 = 38_115_968
    assert sum(parameter.numel() for parameter in model.parameters()) == in_2018 + wider_input - conv_biases
    convolutions = [(tuple(m.weight.shape), m.stride) for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert convolutions == [((32, 1, 41, 11), (2, 2)), ((32, 32, 21, 11), (2, 1))]
    grus = [(m.input_size, m.hidden_size, m.bidirectional) for m in model.modules() if isinstance(m, nn.GRU)]
    assert grus == [(1312, 800, True)] + [(800, 800, True)] * 4
    assert tuple(model.classifier.weight.shape) == (29, 800)


def test_loss_and_transcripts_are_the_same_for_batch_one_and_batch_n(
    model: DeepSpeech2, features: torch.Tensor
) -> None:
    targets = torch.randint(1, 29, (len(FRAMES), 3), generator=torch.Generator().manual_seed(1))
    lengths = torch.full((len(FRAMES),), 3)
    with torch.no_grad():
        logits, frames = model(features, FRAMES)
        loss = ctc_loss(logits, frames, targets.flatten(), lengths)
        alone = [model(features[row : row + 1, :, :count], FRAMES[row : row + 1]) for row, count in enumerate(FRAMES)]
    losses = [ctc_loss(output, count, targets[row], lengths[:1]) for row, (output, count) in enumerate(alone)]
    torch.testing.assert_close(torch.stack(losses).mean(), loss, rtol=1e-5, atol=1e-5)
    for row, (logits_alone, frames_alone) in enumerate(alone):
        assert frames_alone.item() == frames[row]
        torch.testing.assert_close(logits[: frames[row], row], logits_alone[:, 0], rtol=1e-4, atol=1e-5)
    assert collapse(logits.argmax(2), frames) == [collapse(one.argmax(2), its)[0] for one, its in alone]


def test_more_padding_changes_no_training_loss_gradient_or_running_statistic(features: torch.Tensor) -> None:
    results = []
    for padding in (0, 57):
        torch.manual_seed(0)
        model = DeepSpeech2(conv_channels=4, hidden_size=24)
        logits, frames = model(nn.functional.pad(features, (0, padding)), FRAMES)
        loss = ctc_loss(logits, frames, torch.arange(1, 6), torch.ones(5, dtype=torch.int64))
        loss.backward()
        gradients = torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])
        statistics = torch.cat([buffer.flatten().float() for buffer in model.buffers()])
        results.append((loss.detach(), gradients, statistics))
    for narrow, wide in zip(*results, strict=True):
        assert (narrow - wide).norm() <= 1e-4 * wide.norm()


def test_every_parameter_has_a_gradient_with_one_channel_too(features: torch.Tensor) -> None:
    model = DeepSpeech2(conv_channels=1, hidden_size=8)
    model(features, torch.full((len(features),), features.shape[2]))[0].square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_at_the_beginning_blank_is_likely_and_the_other_labels_are_alike(features: torch.Tensor) -> None:
    torch.manual_seed(3)
    logits_TBV, frames_B = DeepSpeech2(conv_channels=2, hidden_size=32)(features, FRAMES)
    valid_TB = torch.arange(len(logits_TBV))[:, None] < frames_B
    mean_V = logits_TBV[valid_TB].mean(0)
    torch.testing.assert_close(mean_V, torch.eye(len(LABELS))[BLANK] * BLANK_LOGIT, rtol=0, atol=1e-3)
