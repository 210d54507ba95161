"""Wav2vec2's positional convolution, as matrix products.

Owns this arithmetic; knows no model. A convolution of 128 frames in 16 groups of channels finds
only slow kernels on a GPU: it took three times as long as all convolutions before it together.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# Neighbouring outputs made at once. They read nearly the same inputs: more of them copy fewer
# inputs and multiply more zeros.
_BLOCK = 16
_MIN_KERNEL = 16  # shorter ones have good kernels


class GroupedConv:
    """A grouped convolution over time: for each group, one product with a banded matrix.

    Outputs `t .. t + _BLOCK - 1` read the inputs `t .. t + _BLOCK + kernel - 2`. Laid out as a
    row, these times a (Toeplitz) matrix that holds the kernel once for each output, shifted by
    one, are all of the outputs. The sums are the same, in another order. The matrix takes as much
    memory as 18 kernels: 170 MB for wav2vec2-base in two bytes, 300 MB for large.
    """

    def __init__(self, conv: torch.nn.Conv1d) -> None:
        """Take the weights of a convolution that `is_slow`, on its device."""
        self._n_groups, self._kernel = conv.groups, conv.kernel_size[0]
        self._padding = int(conv.padding[0])
        self._span = _BLOCK + self._kernel - 1
        with torch.inference_mode():
            _, n_in, kernel = conv.weight.shape
            weight = conv.weight.detach().view(self._n_groups, -1, n_in, kernel)
            n_out = weight.shape[1]
            band = weight.new_zeros(self._n_groups, self._span, n_in, _BLOCK, n_out)
            for shift in range(_BLOCK):
                band[:, shift : shift + self._kernel, :, shift] = weight.permute(0, 3, 2, 1)
            self._band = band.flatten(3).flatten(1, 2)
            bias = weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias.detach()
            self._bias = bias.view(self._n_groups, 1, 1, n_out).expand(-1, 1, _BLOCK, -1).flatten(2)

    def __call__(self, x: Tensor) -> Tensor:
        """`[n, in_channels, n_frames]` -> `[n, out_channels, n_frames + 2 * padding - kernel + 1]`.

        What comes out is laid out with the channels last, as the transformer after it wants it.
        """
        n, channels, frames = x.shape
        n_frames = frames + 2 * self._padding - self._kernel + 1
        n_blocks = -(-n_frames // _BLOCK)
        behind = n_blocks * _BLOCK + self._kernel - 1 - self._padding - frames
        padded = functional.pad(x.transpose(1, 2), (0, 0, self._padding, behind))
        rows = padded.unfold(1, self._span, _BLOCK)
        rows = rows.view(n, n_blocks, self._n_groups, channels // self._n_groups, self._span)
        rows = rows.permute(2, 0, 1, 4, 3).reshape(self._n_groups, n * n_blocks, -1)
        made = torch.baddbmm(self._bias, rows, self._band)
        made = made.view(self._n_groups, n, n_blocks * _BLOCK, -1).permute(1, 2, 0, 3).flatten(2)
        return made[:, :n_frames].transpose(1, 2)


def is_slow(module: torch.nn.Module) -> bool:
    """Whether a module is a convolution that GPUs are slow at and `GroupedConv` can stand for."""
    return (
        isinstance(module, torch.nn.Conv1d)
        and 1 < module.groups < module.in_channels
        and module.kernel_size[0] >= _MIN_KERNEL
        and module.stride == module.dilation == (1,)
        and isinstance(module.padding, tuple)
        and module.padding_mode == "zeros"
    )
