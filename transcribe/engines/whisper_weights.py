"""The weights of a Whisper checkpoint, whichever of the two formats they lie in.

Owns the layouts: CTranslate2's `model.bin` (ctranslate2/specs/model_spec.py, and the mapping of
its converter, reversed) and transformers' safetensors. Knows nothing of how they are computed
with.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_DTYPES = {0: "f4", 1: "i1", 2: "i2", 3: "i4", 4: "f2"}
_NORM = {"layer_norm/gamma": "weight", "layer_norm/beta": "bias"}
_Variables = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class WhisperWeights:
    """A checkpoint's numbers.

    Attributes:
        tensors: float32, under transformers' names (`model.encoder.conv1.weight`).
        n_heads: attention heads of every layer.
        alignment_heads: (layer, head) pairs of the decoder that follow the speech; empty if
            the checkpoint does not say.
        suppressed: tokens that are never written.
        suppressed_first: tokens that a text never begins with.
    """

    tensors: Mapping[str, Tensor]
    n_heads: int
    alignment_heads: tuple[tuple[int, int], ...]
    suppressed: tuple[int, ...]
    suppressed_first: tuple[int, ...]

    @property
    def n_mels(self) -> int:
        """Mel bands of the input."""
        return int(self.tensors["model.encoder.conv1.weight"].shape[1])

    @property
    def d_model(self) -> int:
        """Width of every layer's output."""
        return int(self.tensors["model.encoder.conv1.bias"].shape[0])

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return int(self.tensors["model.decoder.embed_tokens.weight"].shape[0])

    def n_layers(self, side: str) -> int:
        """Layers of the `encoder` or the `decoder`."""
        prefix = f"model.{side}.layers."
        return len({name.split(".")[3] for name in self.tensors if name.startswith(prefix)})


def read_weights(path: Path) -> WhisperWeights:
    """The weights in a directory that `checkpoint.engine_of` took for a Whisper.

    Raises:
        ValueError, LookupError, OSError: it does not hold what it should.
    """
    if any(path.glob("*.safetensors")):
        return _from_safetensors(path)
    return _from_ctranslate2(path)


# ---- safetensors --------------------------------------------------------------------------


def _from_safetensors(path: Path) -> WhisperWeights:
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors.update({name: t.float() for name, t in load_file(file).items()})
    told = json.loads((path / "config.json").read_text(encoding="utf-8"))
    generation = path / "generation_config.json"
    if generation.is_file():  # what it says wins
        told |= json.loads(generation.read_text(encoding="utf-8"))
    return WhisperWeights(
        tensors=tensors,
        n_heads=int(told["encoder_attention_heads"]),
        alignment_heads=_pairs(told.get("alignment_heads")),
        suppressed=tuple(told.get("suppress_tokens") or ()),
        suppressed_first=tuple(told.get("begin_suppress_tokens") or ()),
    )


def _pairs(told: Any) -> tuple[tuple[int, int], ...]:
    return tuple((int(layer), int(head)) for layer, head in told or ())


# ---- CTranslate2 --------------------------------------------------------------------------


def _from_ctranslate2(path: Path) -> WhisperWeights:
    variables = read_model_bin(path / "model.bin")
    told = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return WhisperWeights(
        tensors=state_dict(variables),
        n_heads=int(variables["encoder/num_heads"]),
        alignment_heads=_pairs(told.get("alignment_heads")),
        suppressed=tuple(told.get("suppress_ids") or ()),
        suppressed_first=tuple(told.get("suppress_ids_begin") or ()),
    )


def read_model_bin(file: Path) -> dict[str, npt.NDArray[Any]]:
    """All variables of a CTranslate2 `model.bin`, by name."""
    with file.open("rb") as source:
        source.read(4)  # the format's version
        _string(source)
        _, count = struct.unpack("<II", source.read(8))
        return dict(_variable(source) for _ in range(count))


def _string(source: BinaryIO) -> str:
    (length,) = struct.unpack("<H", source.read(2))
    return source.read(length)[:-1].decode()


def _variable(source: BinaryIO) -> tuple[str, npt.NDArray[Any]]:
    name = _string(source)
    (rank,) = source.read(1)
    shape = struct.unpack(f"<{rank}I", source.read(4 * rank))
    (dtype,) = source.read(1)
    (size,) = struct.unpack("<I", source.read(4))
    return name, np.frombuffer(source.read(size), _DTYPES[dtype]).reshape(shape)


def state_dict(variables: _Variables) -> dict[str, Tensor]:
    """CTranslate2's variables under transformers' names, float32."""
    tensors = dict(_floats(variables))
    state: dict[str, Tensor] = {}
    for side in ("encoder", "decoder"):
        state[f"model.{side}.embed_positions.weight"] = tensors[
            f"{side}/position_encodings/encodings"
        ]
        _norm(state, tensors, side, f"model.{side}.layer_norm")
        for layer in range(_n_layers(variables, side)):
            _layer(state, tensors, f"{side}/layer_{layer}", f"model.{side}.layers.{layer}")
    for conv in ("conv1", "conv2"):
        for part in ("weight", "bias"):
            state[f"model.encoder.{conv}.{part}"] = tensors[f"encoder/{conv}/{part}"]
    state["model.decoder.embed_tokens.weight"] = tensors["decoder/embeddings/weight"]
    return state


def _floats(variables: _Variables) -> Iterator[tuple[str, Tensor]]:
    """What is more than a number, as float32; whole numbers come with a scale."""
    for name, values in variables.items():
        if not values.ndim or name.endswith("_scale"):
            continue
        tensor = torch.tensor(values.astype("f4"))
        if values.dtype.kind == "i":
            scale = torch.tensor(variables[f"{name}_scale"].astype("f4"))
            tensor /= scale.reshape(-1, *[1] * (tensor.ndim - 1)) if scale.ndim else scale
        yield name, tensor


def _n_layers(variables: _Variables, side: str) -> int:
    return len(
        {n.split("/")[1] for n in variables if n.startswith(f"{side}/layer_") and n.count("/") > 2}
    )


def _layer(state: dict[str, Tensor], tensors: dict[str, Tensor], theirs: str, ours: str) -> None:
    _attention(state, tensors, f"{theirs}/self_attention", f"{ours}.self_attn")
    if f"{theirs}/attention/linear_0/weight" in tensors:
        _attention(state, tensors, f"{theirs}/attention", f"{ours}.encoder_attn")
    _norm(state, tensors, f"{theirs}/ffn", f"{ours}.final_layer_norm")
    for index, name in ((0, "fc1"), (1, "fc2")):
        for part in ("weight", "bias"):
            state[f"{ours}.{name}.{part}"] = tensors[f"{theirs}/ffn/linear_{index}/{part}"]


def _attention(
    state: dict[str, Tensor], tensors: dict[str, Tensor], theirs: str, ours: str
) -> None:
    """Self-attention fuses q, k, v in linear_0; cross-attention k, v in linear_1."""
    _norm(state, tensors, theirs, f"{ours}_layer_norm")
    fused = ("q_proj", "k_proj", "v_proj")
    is_self = theirs.endswith("self_attention")
    groups = [fused, ("out_proj",)] if is_self else [fused[:1], fused[1:], ("out_proj",)]
    for index, names in enumerate(groups):
        for part in ("weight", "bias"):
            chunks = tensors[f"{theirs}/linear_{index}/{part}"].chunk(len(names))
            for name, chunk in zip(names, chunks, strict=True):
                if (name, part) != ("k_proj", "bias"):  # Whisper's keys have none
                    state[f"{ours}.{name}.{part}"] = chunk.contiguous()


def _norm(state: dict[str, Tensor], tensors: dict[str, Tensor], theirs: str, ours: str) -> None:
    for their_name, our_name in _NORM.items():
        state[f"{ours}.{our_name}"] = tensors[f"{theirs}/{their_name}"]
