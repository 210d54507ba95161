"""A whole file and a number -> a broken file: the same number breaks it in the same way."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from tests.fuzz.corpus import corpus
from tests.fuzz.lies import LIES
from tests.fuzz.ogg import mend_pages

_HEAD = 600  # where most headers are
INTERESTING = (
    0, 1, 2, 7, 8, 16, 255, 256, 4096, 65_535, 65_536, 2**24, 2**31 - 1, 2**31, 2**32 - 2,
    2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1,
)  # fmt: skip


def case(seed: int) -> tuple[str, bytes]:
    """Name and bytes of the broken file with this number."""
    rng = random.Random(seed)
    if rng.random() < 0.25:
        lie = rng.choice(list(LIES))
        name, data = f"{lie}.{lie.partition('-')[0]}", LIES[lie](rng)
        n_mutations = rng.choice((0, 0, 1))
    else:
        name = rng.choice(list(corpus()))
        data = corpus()[name]
        n_mutations = rng.choice((1, 1, 1, 2, 3, 6))
    broken = bytearray(data)
    for _ in range(n_mutations):
        rng.choice(_MUTATIONS)(rng, broken)
    if broken[:4] == b"OggS" and rng.random() < 0.7:
        mend_pages(broken)
    if rng.random() < 0.1:  # an extension that lies
        name = f"{name}.{rng.choice(('raw', 'g722', 'g729', 'gsm', 'ulaw', 'sln', 'mp3', 'wav'))}"
    return name, bytes(broken)


def _somewhere(rng: random.Random, data: bytearray) -> int:
    end = len(data) if rng.random() < 0.5 else min(len(data), _HEAD)
    return rng.randrange(max(1, end))


def _flip_bits(rng: random.Random, data: bytearray) -> None:
    for _ in range(rng.choice((1, 1, 2, 5, 20, 200))):
        if data:
            data[_somewhere(rng, data) % len(data)] ^= 1 << rng.randrange(8)


def _number(rng: random.Random, data: bytearray) -> None:
    """An interesting number, in either byte order, anywhere."""
    at, width = _somewhere(rng, data), rng.choice((1, 2, 4, 8))
    value = rng.choice(INTERESTING) & (1 << 8 * width) - 1
    data[at : at + width] = value.to_bytes(width, rng.choice(("little", "big")))


def _lie_beside_a_name(rng: random.Random, data: bytearray) -> None:
    """An interesting number before or after the name of a chunk, atom or page."""
    names = list(re.finditer(rb"[A-Za-z][A-Za-z0-9]{2}[A-Za-z0-9 ]", bytes(data[: 1 << 16])))
    if names:
        at = rng.choice(names).start() + rng.choice((-4, -8, 4, 4, 8, 12, 16, 20, 24))
        width = rng.choice((2, 4, 4, 8))
        value = rng.choice(INTERESTING) & (1 << 8 * width) - 1
        if at >= 0:
            data[at : at + width] = value.to_bytes(width, rng.choice(("little", "big")))


def _truncate(rng: random.Random, data: bytearray) -> None:
    del data[_somewhere(rng, data) :]


def _remove(rng: random.Random, data: bytearray) -> None:
    at = _somewhere(rng, data)
    del data[at : at + rng.choice((1, 2, 4, 100, 5000))]


def _insert(rng: random.Random, data: bytearray) -> None:
    at, n = _somewhere(rng, data), rng.choice((1, 2, 4, 100, 5000))
    data[at:at] = rng.randbytes(n) if rng.random() < 0.5 else bytes(n)


def _repeat(rng: random.Random, data: bytearray) -> None:
    at, n = _somewhere(rng, data), rng.choice((4, 32, 1000))
    data[at:at] = bytes(data[at : at + n]) * rng.choice((1, 2, 50))


def _blot(rng: random.Random, data: bytearray) -> None:
    at, n = _somewhere(rng, data), rng.choice((8, 64, 1000))
    data[at : at + n] = rng.choice((bytes(n), b"\xff" * n, rng.randbytes(n)))


def _swap(rng: random.Random, data: bytearray) -> None:
    a, b, n = _somewhere(rng, data), _somewhere(rng, data), rng.choice((4, 8, 500))
    if abs(a - b) >= n:
        data[a : a + n], data[b : b + n] = data[b : b + n], data[a : a + n]


def _splice(rng: random.Random, data: bytearray) -> None:
    """The end of another file, of the same kind or not."""
    other = corpus()[rng.choice(list(corpus()))]
    data[_somewhere(rng, data) :] = other[rng.randrange(len(other)) :]


def _glue(rng: random.Random, data: bytearray) -> None:
    """Another whole file behind this one, or before it."""
    other = corpus()[rng.choice(list(corpus()))]
    at = rng.choice((0, len(data)))
    data[at:at] = other


_MUTATIONS: tuple[Callable[[random.Random, bytearray], None], ...] = (
    _flip_bits,
    _flip_bits,
    _number,
    _number,
    _lie_beside_a_name,
    _lie_beside_a_name,
    _lie_beside_a_name,
    _truncate,
    _remove,
    _insert,
    _repeat,
    _blot,
    _swap,
    _splice,
    _glue,
)
