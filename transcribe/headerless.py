"""What `--headerless` says: how files without a header are encoded.

Pure; light enough to be read with the settings.
"""

from __future__ import annotations

from dataclasses import dataclass

from transcribe.errors import Fatal

# Encoding -> bytes per sample of one channel. The names are FFmpeg's.
ENCODINGS = {
    "mulaw": 1,
    "alaw": 1,
    "u8": 1,
    "s8": 1,
    "s16le": 2,
    "s16be": 2,
    "s24le": 3,
    "s32le": 4,
    "f32le": 4,
}
# What `--headerless` is about, where no header is found.
EXTENSIONS = frozenset(".raw .pcm .ul .ulaw .mulaw .pcmu .al .alaw .pcma .sln".split())
_MAX_CHANNELS = 32


@dataclass(frozen=True, slots=True)
class Headerless:
    """How samples without a header are to be read; channels are interleaved."""

    encoding: str
    sample_rate: int
    channels: int

    @property
    def bytes_per_second(self) -> float:
        """Of all channels together."""
        return float(ENCODINGS[self.encoding] * self.sample_rate * self.channels)


def parse_headerless(text: str) -> Headerless:
    """Read `encoding:rate:channels`, such as `mulaw:8000:1`.

    Raises:
        Fatal: it is written otherwise.
    """
    encoding, *numbers = text.strip().lower().split(":")
    if encoding not in ENCODINGS or len(numbers) != 2 or not all(n.isdecimal() for n in numbers):
        raise Fatal(
            f"--headerless {text!r} must be encoding:rate:channels, such as mulaw:8000:1;"
            f" encodings are {', '.join(ENCODINGS)}."
        )
    sample_rate, channels = (int(number) for number in numbers)
    if not 1_000 <= sample_rate <= 768_000 or not 1 <= channels <= _MAX_CHANNELS:
        raise Fatal(
            f"--headerless {text!r}: the rate must be 1000 to 768000 Hz and the channels 1 to"
            f" {_MAX_CHANNELS}."
        )
    return Headerless(encoding, sample_rate, channels)
