"""Resampling of a stream of sound to 16 kHz, block by block, as if it were resampled whole.

Owns the filters (torchaudio's) and the edges between blocks. Knows nothing of files.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:  # 2 s and 250 MB, which only a process that decodes should pay: see `load`
    import torch

SAMPLE_RATE = 16_000

Floats = npt.NDArray[np.float32]

_LOWPASS_WIDTH, _ROLLOFF = 6, 0.99  # torchaudio's defaults
_MAX_KERNEL_VALUES = 1 << 21


def load() -> None:
    """Load torch, which the first resampling would do."""
    import torchaudio.transforms  # noqa: F401


class Resampler:
    """Resamples a stream to 16 kHz, giving the same as resampling it whole.

    Blocks are cut at multiples of the reduced source rate, where an input sample and an output
    sample coincide, and every block is resampled together with its neighbours' edges.
    """

    def __init__(self, sample_rate: int) -> None:
        divisor = math.gcd(sample_rate, SAMPLE_RATE)
        self.step_in, self.step_out = sample_rate // divisor, SAMPLE_RATE // divisor
        width = math.ceil(_LOWPASS_WIDTH * max(1.0, self.step_in / self.step_out) / _ROLLOFF) + 1
        self.context = math.ceil(width / self.step_in) * self.step_in
        self.buffer: Floats | None = None  # starts `n_left` samples before what is due
        self.n_left = 0
        self.n_in = self.n_out = 0

    @property
    def started(self) -> bool:
        """Whether anything was pushed."""
        return self.buffer is not None

    def push(self, block: Floats) -> Floats:
        """Take float32 [n_channels, n]; return the 16 kHz samples that are now certain."""
        self.n_in += block.shape[1]
        joined = [block] if self.buffer is None else [self.buffer, block]
        self.buffer = buffer = np.concatenate(joined, axis=1)
        if self.step_in == self.step_out:
            self.n_out += buffer.shape[1]
            self.buffer = buffer[:, :0]
            return buffer
        due = (buffer.shape[1] - self.n_left - self.context) // self.step_in * self.step_in
        if due <= 0:
            return buffer[:, :0]
        out = self._take(due // self.step_in * self.step_out)
        start = max(0, self.n_left + due - self.context)
        self.n_left, self.buffer = self.n_left + due - start, buffer[:, start:].copy()
        return out

    def finish(self) -> Floats:
        """The last samples: in all ceil(n * 16000 / sample_rate) for n pushed."""
        assert self.buffer is not None
        return self._take(-(-self.n_in * self.step_out // self.step_in) - self.n_out)

    def _take(self, n: int) -> Floats:
        assert self.buffer is not None
        if n == 0:
            return self.buffer[:, :0]
        skip = self.n_left // self.step_in * self.step_out
        self.n_out += n
        return _resample(self.buffer, self.step_in, self.step_out)[:, skip : skip + n]


def _resample(x: Floats, step_in: int, step_out: int) -> Floats:
    """float32 [n_channels, n] -> [n_channels, ceil(n * step_out / step_in)]."""
    if step_in * step_out > _MAX_KERNEL_VALUES:
        return _interpolate(x, step_in, step_out)
    import torch

    filters, width, stride = _filters(step_in, step_out)
    n_out = -(-x.shape[1] * step_out // step_in)
    with torch.inference_mode():
        padded = torch.nn.functional.pad(torch.from_numpy(x), (width, width + stride))
        out = torch.nn.functional.conv1d(padded[:, None], filters, stride=stride)
        result: Floats = out.transpose(1, 2).reshape(x.shape[0], -1)[:, :n_out].numpy()
    return result


@lru_cache(maxsize=16)
def _filters(step_in: int, step_out: int) -> tuple[torch.Tensor, int, int]:
    """torchaudio's filters [n, 1, taps], its padding, and the stride they are applied with.

    `Resample` computes them in float64 (`functional.resample` does not). For 8, 32 or 48 kHz
    they are one or two short rows, on which conv1d is slow: they are repeated, shifted, so
    that one step gives many output samples. Same numbers, about ten times as fast.
    """
    import torch
    from torchaudio.transforms import Resample

    resample = Resample(step_in, step_out, lowpass_filter_width=_LOWPASS_WIDTH, rolloff=_ROLLOFF)
    rows, width = resample.kernel[:, 0], int(resample.width)
    n_taps, repeats = rows.shape[1], max(1, 48 // step_in)
    filters = torch.zeros(repeats * step_out, (repeats - 1) * step_in + n_taps)
    for i in range(repeats):
        filters[i * step_out : (i + 1) * step_out, i * step_in : i * step_in + n_taps] = rows
    return filters[:, None], width, repeats * step_in


def _interpolate(x: Floats, step_in: int, step_out: int) -> Floats:
    """The same Hann-windowed sinc as torchaudio's, evaluated tap by tap.

    For rates such as 7999 Hz, that share no factor with 16 kHz, torchaudio's table of filters
    has step_in * step_out entries: gigabytes. Formula: J. O. Smith, "Digital Audio Resampling".
    """
    n_in = x.shape[1]
    n_out = -(-n_in * step_out // step_in)
    cutoff = min(1.0, step_out / step_in) * _ROLLOFF
    reach = math.ceil(_LOWPASS_WIDTH / cutoff)
    taps = np.arange(-reach, reach + 1)
    padded = np.pad(x, ((0, 0), (reach, reach + 1)))
    out = np.empty((x.shape[0], n_out), np.float32)
    chunk = max(1, (1 << 20) // len(taps))
    for at in range(0, n_out, chunk):
        ticks = np.arange(at, min(at + chunk, n_out), dtype=np.int64) * step_in
        whole, part = ticks // step_out, (ticks % step_out) / step_out
        t = np.clip((taps - part[:, None]) * cutoff, -_LOWPASS_WIDTH, _LOWPASS_WIDTH)
        weights = cutoff * np.sinc(t) * np.cos(t * (np.pi / 2 / _LOWPASS_WIDTH)) ** 2
        weights = weights.astype(np.float32)
        index = whole[:, None] + (taps + reach)
        for channel in range(x.shape[0]):
            out[channel, at : at + len(ticks)] = np.einsum(
                "nt,nt->n", weights, padded[channel][index]
            )
    return out
