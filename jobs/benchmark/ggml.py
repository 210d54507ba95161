"""A Whisper checkpoint as whisper.cpp reads it: one file, large matrices in 8 bits (q8_0).

Layout, after whisper.cpp's `whisper_model_load`: magic, 11 numbers, mel filters, vocabulary, then
each tensor as (dimensions, length of its name, type, sizes from the fastest one, name, data).
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import torch
import torchaudio

_MAGIC = 0x67676D6C
_F32, _F16, _Q8_0 = 0, 1, 8
_FILE_TYPE = 2 * 1000 + 7  # version 2 of the quantised formats, mostly q8_0
_BLOCK = 32
_PLAIN_TOKENS = 50_257  # of a multilingual vocabulary, before the special ones
_FULL_PRECISION = ("positional_embedding", "conv1.bias", "conv2.bias")


def write_ggml(
    state: dict[str, torch.Tensor], dimensions: dict[str, int], tokenizer: Path, file: Path
) -> None:
    """Write `state` (OpenAI's names) with the vocabulary of `tokenizer` (tokenizer.json)."""
    d = dimensions
    with file.open("wb") as out:
        header = [
            d["n_vocab"], d["n_audio_ctx"], d["n_audio_state"], d["n_audio_head"],
            d["n_audio_layer"], d["n_text_ctx"], d["n_text_state"], d["n_text_head"],
            d["n_text_layer"], d["n_mels"], _FILE_TYPE,
        ]  # fmt: skip
        out.write(struct.pack("<12i", _MAGIC, *header))
        filters = _mel_filters(d["n_mels"])
        out.write(struct.pack("<2i", *filters.shape))
        out.write(filters.tobytes())
        tokens = _tokens(tokenizer)
        out.write(struct.pack("<i", len(tokens)))
        for token in tokens:
            out.write(struct.pack("<i", len(token)) + token)
        for name, tensor in state.items():
            _write_tensor(out, name, tensor.float().numpy())


def _mel_filters(n_mels: int) -> npt.NDArray[np.float32]:
    """`[n_mels, 201]`, as librosa's that Whisper was trained with."""
    banks = torchaudio.functional.melscale_fbanks(
        201, 0.0, 8000.0, n_mels, 16_000, norm="slaney", mel_scale="slaney"
    )
    return np.ascontiguousarray(banks.numpy().T.astype(np.float32))


def _tokens(tokenizer: Path) -> list[bytes]:
    """The bytes of each plain token, by id."""
    to_byte = {character: byte for byte, character in _byte_characters().items()}
    vocabulary = json.loads(tokenizer.read_text(encoding="utf-8"))["model"]["vocab"]
    by_id = {number: text for text, number in vocabulary.items()}
    plain = [by_id[i] for i in range(min(_PLAIN_TOKENS, len(by_id))) if i in by_id]
    return [
        bytes(to_byte[c] for c in text) if all(c in to_byte for c in text) else text.encode()
        for text in plain
    ]


def _byte_characters() -> dict[int, str]:
    """The printable character that byte-level BPE writes for each byte (as GPT-2 does)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def _write_tensor(out: BinaryIO, name: str, values: npt.NDArray[np.float32]) -> None:
    kind, data = _F32, values
    if name.endswith(("conv1.bias", "conv2.bias")):
        data = values.reshape(-1, 1)  # added to frames side by side
    if values.ndim > 1 and not name.endswith(_FULL_PRECISION):
        kind = _F16 if values.ndim == 3 else _Q8_0
    encoded = name.encode()
    out.write(struct.pack("<3i", data.ndim, len(encoded), kind))
    out.write(struct.pack(f"<{data.ndim}i", *reversed(data.shape)))
    out.write(encoded)
    if kind == _Q8_0:
        out.write(_q8_0(data))
    else:
        out.write(data.astype(np.float16 if kind == _F16 else np.float32).tobytes())


def _q8_0(values: npt.NDArray[np.float32]) -> bytes:
    """Blocks of 32: the scale as float16, then 32 signed bytes."""
    blocks = values.reshape(-1, _BLOCK)
    scales = np.abs(blocks).max(axis=1, keepdims=True) / 127
    rounded = np.rint(np.divide(blocks, scales, out=np.zeros_like(blocks), where=scales > 0))
    packed = np.empty(len(blocks), np.dtype([("scale", "<f2"), ("values", "i1", _BLOCK)]))
    packed["scale"] = scales[:, 0]
    packed["values"] = rounded
    return packed.tobytes()
