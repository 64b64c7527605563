"""DeepSpeech2: log spectrogram -> 2 convolutions -> 5 GRU layers -> label logits (arXiv 1512.02595).

    features [B, 161, T]
    Conv2d  C x (41, 11), stride (2, 2), masked batch norm, Hardtanh(0, 20)
    Conv2d  C x (21, 11), stride (2, 1), masked batch norm, Hardtanh(0, 20)
    5 x     bidirectional GRU of H, directions summed, sequence-wise batch norm
    Linear  H -> 29 labels (no bias), for CTC with blank 0

Axes: B batch, C channels, F frequency, T time (frames), N valid frames of all utterances, H hidden, V labels.

**Padding never changes a result**: frames beyond an utterance's end are zero before every convolution, in no batch-norm
statistic, and, from the first GRU layer on, absent: the layers work on the N valid frames of a packed sequence.

Weights are initialised as PyTorch does: convolutions and linear layer U(-1/sqrt(fan_in), 1/sqrt(fan_in)), GRU
U(-1/sqrt(H), 1/sqrt(H)), batch norm scale 1 and shift 0.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from pytorch.decoder import LABELS
from pytorch.gru import GRU

GRU_LAYERS = 5
TIME_STRIDE = 2


def output_frames(frames: Tensor) -> Tensor:
    """Output frames of utterances of so many input frames: 'same' padding, stride 2 in the first convolution."""
    return (frames - 1) // TIME_STRIDE + 1


class MaskedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm of [B, C, F, T] whose statistics leave padding out; parameters and state of `nn.BatchNorm2d`."""

    def forward(self, input: Tensor, mask_B11T: Tensor, count: Tensor) -> Tensor:  # type: ignore[override]
        """Normalise.

        Args:
            input: [B, C, F, T].
            mask_B11T: 1 on valid frames, else 0.
            count: number of valid values of one channel: valid frames times F.
        """
        if not self.training:
            return super().forward(input)
        mean_C = (input * mask_B11T).sum((0, 2, 3)) / count
        centred = (input - mean_C[:, None, None]) * mask_B11T
        variance_C = centred.square().sum((0, 2, 3)) / count
        with torch.no_grad():
            assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
            self.running_mean.lerp_(mean_C, self.momentum)
            self.running_var.lerp_(variance_C * (count / (count - 1)), self.momentum)
        scale_C = self.weight * torch.rsqrt(variance_C + self.eps)
        return centred * scale_C[:, None, None] + self.bias[:, None, None]


class DeepSpeech2(nn.Module):
    """The network. Its smaller configurations change widths only.

    Args:
        conv_channels: C.
        hidden_size: H, units of each direction of each GRU layer.
    """

    def __init__(self, conv_channels: int = 32, hidden_size: int = 800) -> None:
        super().__init__()
        channels = conv_channels
        # No bias: the batch norm that follows would take it out again.
        self.conv1 = nn.Conv2d(1, channels, (41, 11), stride=(2, TIME_STRIDE), padding=(20, 5), bias=False)
        self.norm1 = MaskedBatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, (21, 11), stride=(2, 1), padding=(10, 5), bias=False)
        self.norm2 = MaskedBatchNorm2d(channels)
        sizes = [41 * channels] + [hidden_size] * (GRU_LAYERS - 1)  # 161 bins, halved twice
        self.grus = nn.ModuleList(GRU(size, hidden_size) for size in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm1d(hidden_size) for _ in sizes)
        self.classifier = nn.Linear(hidden_size, len(LABELS), bias=False)

    def forward(self, features_BFT: Tensor, frames_B: Tensor) -> tuple[Tensor, Tensor]:
        """Label logits.

        Args:
            features_BFT: zero beyond each utterance's end.
            frames_B: int64 on the CPU.

        Returns:
            Logits [T', B, V] in float32, arbitrary beyond each utterance's end, and output frames [B] (CPU).
        """
        output_frames_B = output_frames(frames_B)
        time = int(output_frames(torch.tensor(features_BFT.shape[-1])))
        valid_BT = torch.arange(time) < output_frames_B[:, None]
        mask_B11T = valid_BT[:, None, None].to(features_BFT.device, features_BFT.dtype, non_blocking=True)
        valid_frames = output_frames_B.sum().to(features_BFT.device, non_blocking=True)

        x = features_BFT[:, None]
        for conv, conv_norm in ((self.conv1, self.norm1), (self.conv2, self.norm2)):
            x = conv(x)
            x = conv_norm(x, mask_B11T, valid_frames * x.shape[2])
            x = nn.functional.hardtanh(x, 0.0, 20.0) * mask_B11T

        x_TBF = x.permute(3, 0, 1, 2).flatten(2)
        packed = pack_padded_sequence(x_TBF, output_frames_B, enforce_sorted=False)
        for gru, norm in zip(self.grus, self.norms, strict=True):
            packed = gru(packed)
            packed = _with_data(packed, norm(packed.data))
        logits_TBV, _ = pad_packed_sequence(_with_data(packed, self.classifier(packed.data)), total_length=time)
        return logits_TBV.float(), output_frames_B


def _with_data(packed: PackedSequence, data: Tensor) -> PackedSequence:
    return PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
