"""What lies in a directory of weights: which engine runs it, and whether it is whole.

Owns the formats that are accepted: CTranslate2's `model.bin` (Whisper) and safetensors (Whisper
or CTC, as transformers writes them). Weights are data: pickles are refused, code beside weights
is never run. Knows nothing of where a directory came from.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transcribe.config import EngineName
from transcribe.errors import Fatal

# All that an engine may need of a checkpoint; everything else stays where it is.
FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "model.bin")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")


def engine_of(path: Path, name: str, wanted: EngineName | None = None) -> EngineName:
    """Check a checkpoint and tell what runs it.

    Args:
        path: its directory.
        name: what the user called it, for messages.
        wanted: the engine that `--engine` asks for.

    Raises:
        Fatal: files are missing, damaged or pickled, no engine runs them, or not this one.
    """
    config = _config(path, name)
    if _is_ctranslate2(path):
        _check_ctranslate2(path, name)
        found: EngineName = "whisper-ctranslate2"
    else:
        _check_safetensors(path, name)
        found = _transformers_engine(config, name)
        _check_companions(path, name, found)
    if wanted == "whisper-int8" and found.startswith("whisper"):
        return wanted  # reads either format
    if wanted is not None and wanted != found:
        raise Fatal(_wrong_engine(name, wanted, found))
    return found


def _wrong_engine(name: str, wanted: EngineName, found: EngineName) -> str:
    told = f"--model {name}: its files are for {found}, --engine {wanted} cannot run them"
    if (wanted, found) == ("whisper-ctranslate2", "whisper-transformers"):
        return f"{told}; ct2-transformers-converter --copy_files tokenizer.json converts them."
    return f"{told}; leave --engine out."


def revision_of(path: Path) -> str:
    """16 hex digits of SHA-256 that change with whatever changes the text.

    For CTranslate2 the hash of `model.bin`; for transformers a hash over the names and hashes
    of weights, configuration and tokenizer.
    """
    if _is_ctranslate2(path):
        return sha256(path / "model.bin")[:16]
    files = sorted({file for pattern in FILES[:-1] for file in path.glob(pattern)})
    listed = json.dumps([[file.name, sha256(file)] for file in files])
    return hashlib.sha256(listed.encode()).hexdigest()[:16]


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _config(path: Path, name: str) -> dict[str, Any]:
    file = path / "config.json"
    if not file.is_file():
        raise Fatal(f"--model {name}: {path} has no config.json; give the folder of a checkpoint.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise Fatal(f"--model {name}: its config.json is not JSON.") from None
    if not isinstance(config, dict):
        raise Fatal(f"--model {name}: its config.json is no JSON object.")
    return config


# ---- CTranslate2 ------------------------------------------------------------------------


def _is_ctranslate2(path: Path) -> bool:
    return (path / "model.bin").is_file() and not any(path.glob("*.safetensors"))


def _check_ctranslate2(path: Path, name: str) -> None:
    if not (path / "tokenizer.json").is_file():
        raise Fatal(
            f"--model {name} has no tokenizer.json; ct2-transformers-converter"
            " --copy_files tokenizer.json puts it beside model.bin."
        )
    kind = _ctranslate2_kind(path / "model.bin")
    if kind is None:
        raise Fatal(f"--model {name}: its model.bin is not CTranslate2's; pickles are not loaded.")
    if kind != "WhisperSpec":
        raise Fatal(f"--model {name} is a {kind} of CTranslate2; only Whisper runs there.")


def _ctranslate2_kind(file: Path) -> str | None:
    """The specification's name in a `model.bin`: a version, then a string with its length."""
    head = file.open("rb").read(64)
    if len(head) < 7:
        return None
    version, length = struct.unpack_from("<IH", head)
    text = head[6 : 6 + length]
    if not 0 < version < 100 or not text.endswith(b"Spec\0"):
        return None
    return text[:-1].decode("ascii", errors="replace")


# ---- safetensors ------------------------------------------------------------------------


def _check_safetensors(path: Path, name: str) -> None:
    """All weight files are there and whole."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise Fatal(_no_weights(path, name))
    missing = [file for file in _indexed(path, name) if not (path / file).is_file()]
    if missing:
        raise Fatal(f"--model {name} lacks {missing[0]}, one of {len(missing)} missing parts.")
    from safetensors import SafetensorError, safe_open

    for file in files:
        try:
            with safe_open(file, framework="numpy"):
                pass  # opening reads the header and compares it with the file's length
        except (SafetensorError, OSError) as error:
            raise Fatal(f"--model {name}: {file.name} is damaged ({error}).") from None


def _no_weights(path: Path, name: str) -> str:
    pickled = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if not pickled:
        return f"--model {name}: {path} holds neither *.safetensors nor CTranslate2's model.bin."
    return (
        f"--model {name} has its weights in {pickled[0]}, a pickle, which can run code and is never"
        " loaded; save them as safetensors (model.save_pretrained of transformers does)."
    )


def _indexed(path: Path, name: str) -> Iterator[str]:
    """The files that the index of a checkpoint in parts names."""
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        parts = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    except (ValueError, LookupError, AttributeError, TypeError):
        raise Fatal(f"--model {name}: {index.name} cannot be read.") from None
    yield from sorted({str(part) for part in parts})


def _transformers_engine(config: dict[str, Any], name: str) -> EngineName:
    kind = str(config.get("model_type", ""))
    architectures = [str(a) for a in config.get("architectures") or []]
    if "auto_map" in config and not _is_known(kind):
        raise Fatal(
            f"--model {name} needs code of its own ({kind or 'no model_type'}), which is never run;"
            " give a checkpoint that transformers knows."
        )
    if kind == "whisper":
        return "whisper-transformers"
    if any(a.endswith("ForCTC") for a in architectures):
        return "ctc-transformers"
    if not architectures and _has_ctc(kind):
        return "ctc-transformers"
    told = ", ".join(architectures) or kind or "nothing told"
    raise Fatal(f"--model {name} is neither Whisper nor a CTC model ({told}).")


def _check_companions(path: Path, name: str, engine: EngineName) -> None:
    """What an engine needs beside the weights; better missed here than on a worker."""
    needed: list[tuple[str, ...]] = [("tokenizer.json",)]
    if engine == "ctc-transformers":
        needed = [
            ("preprocessor_config.json", "processor_config.json"),
            ("vocab.json", "tokenizer.json", "tokenizer.model"),
        ]
    for choice in needed:
        if not any((path / file).is_file() for file in choice):
            raise Fatal(
                f"--model {name} has no {' or '.join(choice)};"
                " copy what came with the weights beside them."
            )


def _is_known(kind: str) -> bool:
    from transformers import CONFIG_MAPPING

    return kind in CONFIG_MAPPING


def _has_ctc(kind: str) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CTC_MAPPING_NAMES

    return kind in MODEL_FOR_CTC_MAPPING_NAMES
