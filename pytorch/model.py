"""DeepSpeech2: log spectrogram -> 2 convolutions -> 5 GRU layers -> label logits (arXiv 1512.02595).

    features [B, 161, T]
    Conv2d  C x (41, 11), stride (2, 2), batch norm, Hardtanh(0, 20)
    Conv2d  C x (21, 11), stride (2, 1), batch norm, Hardtanh(0, 20)
    5 x     bidirectional GRU of H, directions summed, batch norm
    Linear  H -> 29 labels (no bias), for CTC with blank 0

Axes: B batch, T time (frames), F frequency, C channels, N valid frames of all utterances, H hidden, V labels.

**Padding never changes a result**: frames beyond an utterance's end are zero before every convolution. Everything else
works on the N valid frames alone, kept as the rows of a packed sequence, so every batch norm is sequence-wise and no
statistic sees padding.

Weights are initialized as PyTorch does: convolutions U(-1/sqrt(fan_in), 1/sqrt(fan_in)), the GRUs'
biases and the weights of their inputs U(-1/sqrt(H), 1/sqrt(H)), batch norm scale 1 and shift 0. But the GRUs' recurrent
weights are orthogonal, gate by gate (Saxe et al., arXiv 1312.6120), and so are the labels' weights in the linear layer,
each of norm 3; and the last batch norm's shift makes blank likely. CTC training first learns to emit only blanks, and
in that phase the hidden layers lose much of what they tell apart. Starting with a likely blank skips it:
docs/recipes.md says what that gains.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from pytorch.ctc import BLANK, LABELS
from pytorch.layers import kernels
from pytorch.layers.batch_norm import BatchNorm
from pytorch.layers.convolution import Convolution
from pytorch.layers.gru import GRU
from pytorch.layers.rows import pad_rows

GRU_LAYERS = 5
TIME_STRIDE = 2
HARDTANH = 0.0, 20.0  # range of the activation after a convolution
LABEL_NORM = 3.0  # of a label's initial weights; PyTorch's have 0.6
BLANK_LOGIT = 6.0  # of blank, at the beginning and in the mean; those of the other labels are 0
OUTPUT_FREQUENCIES = 41  # 161 bins, halved twice and rounded up


def output_frames(frames: Tensor) -> Tensor:
    """Return the output frames for these input frames: 'same' padding, stride 2 in the first convolution."""
    return (frames - 1) // TIME_STRIDE + 1


class DeepSpeech2(nn.Module):
    """The network. Its smaller configurations change widths only."""

    def __init__(self, conv_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.conv1 = Convolution(1, conv_channels, kernel=(41, 11), stride=(2, TIME_STRIDE))
        self.norm1 = BatchNorm(conv_channels, HARDTANH)
        self.conv2 = Convolution(conv_channels, conv_channels, kernel=(21, 11), stride=(2, 1))
        self.norm2 = BatchNorm(conv_channels, HARDTANH)
        sizes = [OUTPUT_FREQUENCIES * conv_channels] + [hidden_size] * (GRU_LAYERS - 1)
        self.grus = nn.ModuleList(GRU(size, hidden_size) for size in sizes)
        _make_gates_orthogonal(self.grus)
        self.norms = nn.ModuleList(BatchNorm(hidden_size) for _ in sizes)
        self.classifier = nn.Linear(hidden_size, len(LABELS), bias=False)
        _make_blank_likely(self.classifier.weight, self.norms[-1].get_parameter("bias"))

    def forward(self, features_BFT: Tensor, frames_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits [T', B, V] in float32 and output frames [B] of features. The frames are int64 on the CPU.

        Features and logits are zero beyond each utterance's end.
        """
        output_frames_B = output_frames(frames_B)
        utterance_N, time_N, batch_sizes, offsets = _pack_layout(output_frames_B, features_BFT.device)
        x_BTFC = self.conv1(features_BFT.transpose(1, 2).unsqueeze(3))  # time first, so that valid frames are rows
        batch, time = x_BTFC.shape[:2]
        # Where each packed row lies in [B, T]; padding is left out of the norms, and zero again before conv2.
        index_into_BT_N = time_N + utterance_N * time
        x_NFC = _norm_rows(x_BTFC, index_into_BT_N, self.norm1)
        x_BTFC = x_NFC.new_zeros(batch * time, *x_NFC.shape[1:]).index_copy_(0, index_into_BT_N, x_NFC)
        x_BTFC = self.conv2(x_BTFC.unflatten(0, (batch, time)))
        x_NFC = _norm_rows(x_BTFC, index_into_BT_N, self.norm2)

        x_NH = x_NFC.flatten(1)
        for gru, norm in zip(self.grus, self.norms, strict=True):
            x_NH = norm(gru(PackedSequence(x_NH, batch_sizes), offsets).data)
        rows_NH = pad_rows(x_NH, kernels.product_dtype(self.classifier.weight))
        logits_NV = self.classifier(rows_NH).float()
        if len(rows_NH) > len(x_NH):  # on a CPU; a slice of all rows would cost a GPU a copy of its gradient
            logits_NV = logits_NV[: len(x_NH)]

        index_into_TB_N = time_N * batch + utterance_N
        logits_TBV = logits_NV.new_zeros(time * batch, len(LABELS)).index_copy_(0, index_into_TB_N, logits_NV)
        return logits_TBV.unflatten(0, (time, batch)), output_frames_B


@torch.no_grad()
def _make_gates_orthogonal(grus: nn.ModuleList) -> None:
    for name, parameter in grus.named_parameters():
        if "weight_hh" in name:
            for gate in parameter.chunk(3):
                nn.init.orthogonal_(gate)


@torch.no_grad()
def _make_blank_likely(labels_VH: Tensor, bias_H: Tensor) -> None:
    """Initialize the labels' weights, and the shift of the batch norm before them.

    The norm's output has this shift as its mean. Its product with blank's weights is BLANK_LOGIT, and with the other
    labels' it is 0, since they are orthogonal.
    """
    nn.init.orthogonal_(labels_VH, LABEL_NORM)
    bias_H.copy_(BLANK_LOGIT * labels_VH[BLANK] / labels_VH[BLANK].square().sum())


class _ValidRows(torch.autograd.Function):
    """Rows of x by their numbers. The gradient of torch's index_select would be a sum, though no row comes twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index_N: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(index_N)
        ctx.shape = x.shape
        return x.index_select(0, index_N)

    @staticmethod
    def backward(ctx: Any, d_rows: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (index_N,) = ctx.saved_tensors
        return d_rows.new_zeros(ctx.shape).index_copy_(0, index_N, d_rows), None


def _norm_rows(x_BTFC: Tensor, index_into_BT_N: Tensor, norm: nn.Module) -> Tensor:
    """Apply a batch norm, and its clipping, to each channel over valid rows and frequencies. Return these rows."""
    x_NFC = _ValidRows.apply(x_BTFC.flatten(0, 1), index_into_BT_N)
    return norm(x_NFC.flatten(0, 1)).view_as(x_NFC)


def _pack_layout(frames_B: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return which utterance and time step each row of a PackedSequence is, batch_sizes (CPU), and offsets for Triton.

    Rows go by time step, the longest utterance first. If utterance 0 has the 2 frames a0 and a1, utterance 1 has the 3
    frames b0, b1 and b2, these are

        row          0   1 | 2   3 | 4        batch_sizes  2 2 1
        frame        b0  a0| b1  a1| b2       offsets      0 2 4 5
        utterance_N  1   0 | 1   0 | 1
        time_N       0   0 | 1   1 | 2

    What has N elements is made on the device, from what has B or T: a larger copy from the CPU would wait for it.
    """
    batch_sizes_T = (torch.arange(int(frames_B.max()))[:, None] < frames_B).sum(1)
    offsets = nn.functional.pad(batch_sizes_T.cumsum(0), (1, 0)).int()
    longest_first_B = torch.argsort(frames_B, descending=True, stable=True).int()
    small = torch.cat([offsets, longest_first_B]).to(device, non_blocking=True)
    offsets, longest_first_B = small.split([len(offsets), len(frames_B)])
    row_N = torch.arange(int(frames_B.sum()), dtype=torch.int32, device=device)
    time_N = torch.searchsorted(offsets[1:], row_N, right=True)
    return longest_first_B[row_N - offsets[time_N]], time_N, batch_sizes_T, offsets
