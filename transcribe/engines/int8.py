"""Matrix products in eight bits on a CPU.

Owns the quantisation: weights per output channel, inputs per row, both symmetric, sums exact in
32 bits. A row's result depends on the row alone, whatever else is in its batch. The kernels are
oneDNN's, in PyTorch; they need a CPU with VNNI (docs/decisions.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

_LEVELS = 127.0
_ZERO = 128  # the kernels take inputs without a sign


def is_supported() -> bool:
    """Whether this machine's CPU has the instructions that make eight bits fast and exact.

    Older ones add two products in 16 bits, which overflow.
    """
    return bool(torch.cpu._is_vnni_supported())


def float_for_products() -> torch.dtype:
    """For what is not in eight bits: bfloat16 where the CPU multiplies it, else float32."""
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


class Int8Linear:
    """`x @ weight.T + bias`, in eight bits."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Quantise a layer.

        Args:
            weight: float32 `[n_out, n_in]`.
            bias: float32 `[n_out]`.
        """
        scales = weight.abs().amax(dim=1).clamp_(min=1e-12) / _LEVELS
        quantised = (weight / scales[:, None]).round_().to(torch.int8)
        self._weight = torch.ops.onednn.qlinear_prepack(quantised, None)
        self._scales = scales
        self._zeros = torch.zeros(len(weight), dtype=torch.int64)
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """`[n_rows, n_in]` float32 -> `[n_rows, n_out]` float32."""
        top = torch.maximum(x.amax(1, True), x.amin(1, True).neg_()).clamp_(min=1e-8)
        levels = torch.quantize_per_tensor(x * (_LEVELS / top), 1.0, _ZERO, torch.quint8)
        product: Tensor = torch.ops.onednn.qlinear_pointwise(
            _bytes_of(levels), 1 / _LEVELS, _ZERO, self._weight, self._scales, self._zeros,
            None, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        product.mul_(top)
        return product if self._bias is None else product.add_(self._bias)


def _bytes_of(quantised: Tensor) -> Tensor:
    """The bytes that a quantised tensor holds, not copied."""
    whole: Tensor = torch.empty(0, dtype=torch.uint8)
    whole.set_(quantised.untyped_storage())
    return whole.view(quantised.shape)
