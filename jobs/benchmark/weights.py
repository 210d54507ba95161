"""The same Whisper weights in every format a contender reads; nothing is lost on the way.

A CTranslate2 Whisper turns back into a transformers checkpoint (after CTranslate2's published
layout, ctranslate2/specs/model_spec.py, and the mapping of its converter, reversed), and that
into OpenAI's names and whisper.cpp's file. Nothing here is a pickle.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file

from jobs.benchmark.contenders import Weights
from jobs.benchmark.ggml import write_ggml
from transcribe.models import Model

_DTYPES = {0: "f4", 1: "i1", 2: "i2", 3: "i4", 4: "f2"}
_LANGUAGE = re.compile(r"<\|[a-z]{2,3}\|>")
_NORM = {"layer_norm/gamma": "weight", "layer_norm/beta": "bias"}


_Variables = dict[str, npt.NDArray[Any]]


def prepare(model: Model, folder: Path) -> dict[Weights, Path | str]:
    """`model` in each format, below `folder`; or in words why there is none.

    Args:
        model: a Whisper of CTranslate2 or transformers.
        folder: keeps what is converted from one benchmark to the next.
    """
    folder = folder / f"weights-{model.revision}"
    ggml = folder / "ggml-q8_0.bin"
    found: dict[Weights, Path | str] = {}
    if model.engine == "ctc-transformers":
        return dict.fromkeys(("ctranslate2", "transformers", "ggml"), "it is no Whisper model")
    if model.engine == "whisper-ctranslate2":
        found["ctranslate2"] = model.path
        found["transformers"] = folder / "transformers"
        if not (folder / "done").is_file():
            make_transformers_checkpoint(model, folder / "transformers")
    else:
        found["ctranslate2"] = "these weights are not in its format (ct2-transformers-converter)"
        found["transformers"] = model.path
    checkpoint = found["transformers"]
    assert isinstance(checkpoint, Path)
    if not (folder / "done").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = checkpoint / "tokenizer.json"
        write_ggml(openai_state(checkpoint), openai_dimensions(checkpoint), tokenizer, ggml)
        (folder / "done").touch()
    found["ggml"] = ggml
    return found


def read_model_bin(path: Path) -> _Variables:
    """All variables of a CTranslate2 `model.bin`."""
    with path.open("rb") as file:
        file.read(4)
        _string(file)
        _, count = struct.unpack("<II", file.read(8))
        return dict(_variable(file) for _ in range(count))


def _string(file: BinaryIO) -> str:
    (length,) = struct.unpack("<H", file.read(2))
    return file.read(length)[:-1].decode()


def _variable(file: BinaryIO) -> tuple[str, npt.NDArray[Any]]:
    name = _string(file)
    (rank,) = file.read(1)
    shape = struct.unpack(f"<{rank}I", file.read(4 * rank))
    (dtype,) = file.read(1)
    (size,) = struct.unpack("<I", file.read(4))
    return name, np.frombuffer(file.read(size), _DTYPES[dtype]).reshape(shape)


def state_dict(variables: _Variables) -> dict[str, torch.Tensor]:
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


def _n_layers(variables: _Variables, side: str) -> int:
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
    n_mels = state["model.encoder.conv1.weight"].shape[1]
    n_heads = int(variables["encoder/num_heads"])
    config = {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "vocab_size": state["model.decoder.embed_tokens.weight"].shape[0],
        "num_mel_bins": n_mels,
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
    special = _special_tokens(model.path / "tokenizer.json")
    generation = {
        "alignment_heads": told["alignment_heads"],
        "suppress_tokens": told["suppress_ids"],
        "begin_suppress_tokens": told["suppress_ids_begin"],
        "is_multilingual": True,
        "lang_to_id": {name: i for name, i in special.items() if _LANGUAGE.fullmatch(name)},
        "task_to_id": {name: special[f"<|{name}|>"] for name in ("transcribe", "translate")},
        "max_initial_timestamp_index": 50,
        "prev_sot_token_id": special["<|startofprev|>"],
        "return_timestamps": False,
        "max_length": 448,
        "no_timestamps_token_id": 50363,
        "decoder_start_token_id": 50258,
        "eos_token_id": 50257,
        "pad_token_id": 50257,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(generation))
    _write_processor(model.path / "tokenizer.json", n_mels, folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _special_tokens(tokenizer: Path) -> dict[str, int]:
    added = json.loads(tokenizer.read_text(encoding="utf-8"))["added_tokens"]
    return {token["content"]: token["id"] for token in added}


def _write_processor(tokenizer: Path, n_mels: int, folder: Path) -> None:
    """What transformers needs beside the weights to take sound and give text."""
    shutil.copy(tokenizer, folder)
    told = {
        "tokenizer_class": "WhisperTokenizer",
        "processor_class": "WhisperProcessor",
        **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<|endoftext|>"),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    extractor = {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "processor_class": "WhisperProcessor",
        "feature_size": n_mels,
        "sampling_rate": 16_000,
        "hop_length": 160,
        "n_fft": 400,
        "chunk_length": 30,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": False,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(extractor))


# ---- OpenAI's names ---------------------------------------------------------------------

_OPENAI_NAMES = (
    ("model.", ""),
    (".layers.", ".blocks."),
    ("encoder.layer_norm.", "encoder.ln_post."),
    ("decoder.layer_norm.", "decoder.ln."),
    ("embed_tokens.weight", "token_embedding.weight"),
    ("embed_positions.weight", "positional_embedding"),
    ("self_attn_layer_norm", "attn_ln"),
    ("encoder_attn_layer_norm", "cross_attn_ln"),
    ("final_layer_norm", "mlp_ln"),
    ("self_attn", "attn"),
    ("encoder_attn", "cross_attn"),
    ("q_proj", "query"),
    ("k_proj", "key"),
    ("v_proj", "value"),
    ("out_proj", "out"),
    ("fc1", "mlp.0"),
    ("fc2", "mlp.2"),
)


def openai_state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """A transformers checkpoint's tensors under the names of OpenAI's own code."""
    state = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if name != "proj_out.weight":  # the token embedding again
                state[_openai_name(name)] = tensor
    return state


def _openai_name(name: str) -> str:
    for theirs, ours in _OPENAI_NAMES:
        name = name.replace(theirs, ours)
    return name


def openai_dimensions(checkpoint: Path) -> dict[str, int]:
    """The arguments of OpenAI's `ModelDimensions`."""
    told = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    return {
        "n_mels": told["num_mel_bins"],
        "n_audio_ctx": told.get("max_source_positions", 1500),
        "n_audio_state": told["d_model"],
        "n_audio_head": told["encoder_attention_heads"],
        "n_audio_layer": told["encoder_layers"],
        "n_vocab": told["vocab_size"],
        "n_text_ctx": told.get("max_target_positions", 448),
        "n_text_state": told["d_model"],
        "n_text_head": told["decoder_attention_heads"],
        "n_text_layer": told["decoder_layers"],
    }
