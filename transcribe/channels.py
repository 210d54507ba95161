"""Which channels of a recording say something of their own.

Owns the comparison of channels, as a stream; pure arithmetic. A call's two sides have nothing in
common, a stereo file of one microphone has it all; between them lies what must not be lost: a
caller who speaks little behind music that both channels carry.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_CHUNK = 1_600  # 0.1 s at 16 kHz: a "yes" fills two or three

_SAME_CORRELATION = 0.9
# Sound of its own, in a tenth of a second: at least so much of it is not in the other channel,
# as the root of its mean square: -60 dBFS, and 40 dB below the channel's own mean.
_LEAST_OWN = 32.0
_LEAST_OWN_SHARE = 0.01
_OWN_CHUNKS = 3  # so many on end make a channel heard; fewer are clicks and artefacts of coding
_LOUDER = 10.0  # in energy, than the other channel then: in one room, both hear much the same
_LEVELS = 2.0 ** np.arange(5, 16, 0.5)  # of what is its own; the first is `_LEAST_OWN`


class Likeness:
    """What channels have in common, as their samples come.

    Attributes:
        products: float64 `[n_channels, n_channels]`, the sum of products of each two channels'
            samples; 0 for a silent one with itself. Whole after `finish`.
    """

    def __init__(self, n_channels: int) -> None:
        """Nothing was heard yet of so many channels."""
        self.products = np.zeros((n_channels, n_channels))
        self._n_samples = 0
        # Whether channel i has had as much beside channel j for so long, and in the chunks just
        # before: [..., i, j, level].
        shape = (n_channels, n_channels, len(_LEVELS))
        self._own = np.zeros(shape, bool)
        self._before = np.zeros((_OWN_CHUNKS - 1, *shape), bool)
        self._rest = np.zeros((n_channels, 0), np.float32)

    def push(self, samples: npt.NDArray[np.float32]) -> None:
        """Take samples in int16 units, `[n_channels, n]`; how they are cut does not matter."""
        self._n_samples += samples.shape[1]
        joined = np.concatenate((self._rest, samples), axis=1)
        n_chunks = joined.shape[1] // _CHUNK
        if not n_chunks:
            self._rest = joined
            return
        self._rest = joined[:, n_chunks * _CHUNK :].copy()
        self._count(joined[:, : n_chunks * _CHUNK].reshape(len(joined), n_chunks, _CHUNK))

    def finish(self) -> None:
        """There are no more samples."""
        if self._rest.shape[1]:
            self._count(self._rest[:, None])
            self._rest = self._rest[:, :0]

    def _count(self, chunks: npt.NDArray[np.float32]) -> None:
        """Add chunks `[n_channels, n_chunks, n]`."""
        by_time = chunks.transpose(1, 0, 2)
        products = (by_time @ by_time.transpose(0, 2, 1)).astype(np.float64)
        self.products += products.sum(axis=0)
        energy = products.diagonal(axis1=1, axis2=2)
        common = products**2
        with np.errstate(divide="ignore", invalid="ignore"):
            explained = np.where(energy[:, None] > 0, common / energy[:, None], 0.0)
        own = np.sqrt(np.maximum(energy[:, :, None] - explained, 0.0) / chunks.shape[2])
        own[energy[:, :, None] < _LOUDER * energy[:, None]] = 0.0
        has_own = np.concatenate((self._before, own[..., None] >= _LEVELS))
        self._before = has_own[len(chunks[0]) :]
        last = len(has_own) - _OWN_CHUNKS + 1
        runs = np.logical_and.reduce([has_own[i : i + last] for i in range(_OWN_CHUNKS)])
        self._own |= runs.any(axis=0)

    def is_silent(self, channel: int) -> bool:
        """Whether a channel has no sound at all."""
        return not self.products[channel, channel]

    def distinct(self) -> list[int]:
        """The channels that say something of their own; the others repeat one of these.

        A channel repeats another if the two correlate over the whole recording (Pearson, 0.9; two
        channels of one room have 0.99 and more, the two sides of a call are near 0), whatever
        their levels and signs, and if it has nothing of its own: three tenths of a second on end
        in which it is 10 dB louder and carries what the other does not.

        Returns:
            Indices of channels, ascending, never empty. Silent channels are left out when
            another one is not silent.
        """
        distinct: list[int] = []
        for channel in range(len(self.products)):
            if not self.is_silent(channel) and not any(self._repeats(channel, i) for i in distinct):
                distinct.append(channel)
        return distinct or [0]

    def _repeats(self, channel: int, other: int) -> bool:
        energy = self.products[channel, channel]
        common = self.products[channel, other] ** 2
        if common < _SAME_CORRELATION**2 * energy * self.products[other, other]:
            return False
        mean = float(np.sqrt(energy / self._n_samples))
        level = int(np.searchsorted(_LEVELS, max(_LEAST_OWN, _LEAST_OWN_SHARE * mean)))
        return not self._own[channel, other, level]
