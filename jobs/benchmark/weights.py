"""The same Whisper weights in every format a contender reads; nothing is lost on the way.

A CTranslate2 Whisper turns back into a transformers checkpoint, and that into OpenAI's names and
whisper.cpp's file. Nothing here is a pickle.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from jobs.benchmark.contenders import Weights
from jobs.benchmark.ggml import write_ggml
from transcribe.engines.whisper_weights import read_weights
from transcribe.models import Model

_LANGUAGE = re.compile(r"<\|[a-z]{2,3}\|>")


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


def make_transformers_checkpoint(model: Model, folder: Path) -> Path:
    """Write `model` (CTranslate2 Whisper) into `folder` as transformers reads it."""
    weights = read_weights(model.path)
    state = dict(weights.tensors)
    told = json.loads((model.path / "config.json").read_text())
    config = {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "vocab_size": weights.vocabulary,
        "num_mel_bins": weights.n_mels,
        "d_model": weights.d_model,
        "encoder_layers": weights.n_layers("encoder"),
        "decoder_layers": weights.n_layers("decoder"),
        "encoder_attention_heads": weights.n_heads,
        "decoder_attention_heads": weights.n_heads,
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
    _write_processor(model.path / "tokenizer.json", weights.n_mels, folder)
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
