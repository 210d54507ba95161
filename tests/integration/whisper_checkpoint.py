"""The embedded CTranslate2 Whisper turned back into a transformers checkpoint, without loss.

Read from CTranslate2's published layout (ctranslate2/specs/model_spec.py) and the mapping of its
converter (ctranslate2/converters/transformers.py, WhisperLoader), reversed.
"""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from safetensors.torch import save_file

from transcribe.models import Model

_DTYPES = {0: "f4", 1: "i1", 2: "i2", 3: "i4", 4: "f2"}
_NORM = {"layer_norm/gamma": "weight", "layer_norm/beta": "bias"}


def read_model_bin(path: Path) -> dict[str, np.ndarray]:
    """All variables of a CTranslate2 `model.bin`."""
    with path.open("rb") as file:
        file.read(4)
        _string(file)
        _, count = struct.unpack("<II", file.read(8))
        return dict(_variable(file) for _ in range(count))


def _string(file: BinaryIO) -> str:
    (length,) = struct.unpack("<H", file.read(2))
    return file.read(length)[:-1].decode()


def _variable(file: BinaryIO) -> tuple[str, np.ndarray]:
    name = _string(file)
    (rank,) = file.read(1)
    shape = struct.unpack(f"<{rank}I", file.read(4 * rank))
    (dtype,) = file.read(1)
    (size,) = struct.unpack("<I", file.read(4))
    return name, np.frombuffer(file.read(size), _DTYPES[dtype]).reshape(shape)


def state_dict(variables: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """CTranslate2's variables under transformers' names, float32."""
    tensors = {n: torch.tensor(v.astype("f4")) for n, v in variables.items() if v.ndim}
    state: dict[str, torch.Tensor] = {}
    for side in ("encoder", "decoder"):
        state[f"model.{side}.embed_positions.weight"] = tensors[
            f"{side}/position_encodings/encodings"
        ]
        _norm(state, tensors, f"{side}", f"model.{side}.layer_norm")
        for layer in range(_n_layers(variables, side)):
            _layer(state, tensors, f"{side}/layer_{layer}", f"model.{side}.layers.{layer}")
    for conv in ("conv1", "conv2"):
        for part in ("weight", "bias"):
            state[f"model.encoder.{conv}.{part}"] = tensors[f"encoder/{conv}/{part}"]
    state["model.decoder.embed_tokens.weight"] = tensors["decoder/embeddings/weight"]
    return state


def _n_layers(variables: dict[str, np.ndarray], side: str) -> int:
    return len(
        {n.split("/")[1] for n in variables if n.startswith(f"{side}/layer_") and n.count("/") > 2}
    )


def _layer(
    state: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor], theirs: str, ours: str
) -> None:
    _attention(state, tensors, f"{theirs}/self_attention", f"{ours}.self_attn")
    if f"{theirs}/attention/linear_0/weight" in tensors:
        _attention(state, tensors, f"{theirs}/attention", f"{ours}.encoder_attn")
    _norm(state, tensors, f"{theirs}/ffn", f"{ours}.final_layer_norm")
    for index, name in ((0, "fc1"), (1, "fc2")):
        for part in ("weight", "bias"):
            state[f"{ours}.{name}.{part}"] = tensors[f"{theirs}/ffn/linear_{index}/{part}"]


def _attention(
    state: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor], theirs: str, ours: str
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


def _norm(
    state: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor], theirs: str, ours: str
) -> None:
    for their_name, our_name in _NORM.items():
        state[f"{ours}.{our_name}"] = tensors[f"{theirs}/{their_name}"]


def make_transformers_checkpoint(model: Model, folder: Path) -> Path:
    """Write `model` (CTranslate2 Whisper) into `folder` as transformers reads it."""
    variables = read_model_bin(model.path / "model.bin")
    state = state_dict(variables)
    told = json.loads((model.path / "config.json").read_text())
    d_model = state["model.encoder.conv1.bias"].shape[0]
    n_heads = int(variables["encoder/num_heads"])
    config = {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "vocab_size": state["model.decoder.embed_tokens.weight"].shape[0],
        "num_mel_bins": state["model.encoder.conv1.weight"].shape[1],
        "d_model": d_model,
        "encoder_layers": _n_layers(variables, "encoder"),
        "decoder_layers": _n_layers(variables, "decoder"),
        "encoder_attention_heads": n_heads,
        "decoder_attention_heads": n_heads,
        "encoder_ffn_dim": state["model.encoder.layers.0.fc1.bias"].shape[0],
        "decoder_ffn_dim": state["model.decoder.layers.0.fc1.bias"].shape[0],
        "pad_token_id": 50257,
        "bos_token_id": 50257,
        "eos_token_id": 50257,
        "decoder_start_token_id": 50258,
    }
    generation = {
        "alignment_heads": told["alignment_heads"],
        "suppress_tokens": told["suppress_ids"],
        "begin_suppress_tokens": told["suppress_ids_begin"],
        "is_multilingual": True,
        "no_timestamps_token_id": 50363,
        "decoder_start_token_id": 50258,
        "eos_token_id": 50257,
        "pad_token_id": 50257,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(generation))
    shutil.copy(model.path / "tokenizer.json", folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
