"""Storage on local files, and how foreign errors become the three kinds."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import aiohttp
import fsspec
import google.auth.exceptions
import pytest
import requests
from gcsfs.retry import HttpError
from hypothesis import given
from hypothesis import strategies as st

from transcribe import retries, storage
from transcribe.errors import BadAudio, Fatal, Transient

ODD_NAMES = [
    "with space.wav", "line\nbreak.wav", "hash#1.wav", "q?x=1.wav", "pct%20.wav", "[x].wav",
    "star*.wav", "ünï.wav", "-dash", "a:b.wav", "~home.wav", " lead", "tab\t.wav", "{a}", "\\.wav",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _no_emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(retries, "IMPATIENT_S", 0.05)


def _uris(url: object) -> list[str]:
    return [o.uri for o in storage.list_objects(str(url))]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_local_names_are_put_listed_and_read(tmp_path: Path, name: str) -> None:
    uri = storage.join(str(tmp_path), "in", name)
    storage.put(uri, name.encode())
    assert _uris(tmp_path) == _uris(uri) == [uri]
    assert storage.read(uri) == name.encode()
    assert storage.read_range(uri, 1, 2) == name.encode()[1:3]
    storage.delete(uri)
    storage.delete(uri)
    assert not storage.exists(uri)


def test_a_name_that_is_not_utf8_becomes_text_that_reads(tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path) + b"/caf\xe9 %20.wav"
    Path(os.fsdecode(raw)).write_bytes(b"sound")
    (found,) = storage.list_objects(str(tmp_path))
    assert found.uri.encode().endswith(b"/caf%E9%20%2520.wav")
    assert storage.read(found.uri) == b"sound"
    assert storage.absolute(found.uri) == found.uri
    assert _uris(found.uri) == [found.uri]


def test_absolute_gives_one_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert storage.absolute("rel/../x/") == f"{tmp_path}/x"
    assert storage.absolute("~/x") == f"{tmp_path}/x"
    assert storage.absolute(f"file://{tmp_path}/x%20y") == f"{tmp_path}/x y"
    assert storage.absolute("~no-such-user/x") == f"{tmp_path}/~no-such-user/x"
    assert storage.absolute("/") == "/"
    for url in ("gs://b/calls", "s3://b", "memory://"):
        assert storage.absolute(url + "/") in (url, url + "/")
        assert storage.is_remote(url)
    assert not storage.is_remote("file:///x")


def test_listing_is_in_the_order_of_whole_paths(tmp_path: Path) -> None:
    names = ["a.wav", "a/z.wav", "a b.wav", "a/b/c.wav", "a0.wav", ".hidden", "B"]
    for name in names:
        storage.put(storage.join(str(tmp_path), name), b"")
    assert _uris(tmp_path) == sorted(f"{tmp_path}/{n}" for n in names)


def test_broken_links_are_listed_and_end_as_missing(tmp_path: Path) -> None:
    (tmp_path / "broken.wav").symlink_to(tmp_path / "gone")
    (tmp_path / "self.wav").symlink_to(tmp_path / "self.wav")
    found = list(storage.list_objects(str(tmp_path)))
    assert [(o.size_bytes, o.version) for o in found] == [(0, "missing")] * 2
    for each in found:
        with pytest.raises(BadAudio) as caught:
            storage.read(each.uri)
        assert caught.value.kind == "missing"
        assert storage.info(each.uri) is None


def test_linked_folders_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    storage.put(f"{tmp_path}/a/x.wav", b"")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert _uris(tmp_path) == [f"{tmp_path}/a/x.wav", f"{tmp_path}/b/x.wav"]


def test_a_folder_that_cannot_be_read_is_named_in_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("open/a.wav", "shut/b.wav"):
        storage.put(f"{tmp_path}/{name}", b"")
    scandir = os.scandir

    def refusing(path: str):
        if str(path).endswith("shut"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with caplog.at_level(logging.WARNING):
        assert _uris(tmp_path) == [f"{tmp_path}/open/a.wav"]
    assert f"{tmp_path}/shut" in caplog.text
    with pytest.raises(Fatal, match="shut"):
        _uris(tmp_path / "shut")


def test_globs(tmp_path: Path) -> None:
    names = ["1/a.wav", "1/b.mp3", "1/deep/a.wav", "2/a.wav", "a.wav", "[q].wav"]
    for name in names:
        storage.put(f"{tmp_path}/{name}", b"")

    def below(pattern: str) -> list[str]:
        return [u.removeprefix(f"{tmp_path}/") for u in _uris(f"{tmp_path}/{pattern}")]

    assert below("*.wav") == ["[q].wav", "a.wav"]
    assert below("*/*.wav") == ["1/a.wav", "2/a.wav"]
    assert below("**/a.wav") == ["1/a.wav", "1/deep/a.wav", "2/a.wav", "a.wav"]
    assert below("[!2]/*.mp?") == ["1/b.mp3"]
    assert below("1*") == ["1/a.wav", "1/b.mp3", "1/deep/a.wav"]
    assert below("[q].wav") == ["[q].wav"]
    assert below("**") == sorted(names)
    for pattern, sentence in (
        ("*.ogg", "does not exist"),
        ("no/*", "not exist"),
        ("[z-a]*", "glob"),
    ):
        with pytest.raises(Fatal, match=sentence):
            below(pattern)


@given(st.lists(st.text("ab*?[]!^-.", min_size=1, max_size=4), min_size=1, max_size=3))
def test_entering_agrees_with_matching(levels: list[str]) -> None:
    """A folder above a match is always entered, or the match would never be seen."""
    pattern = "/r/" + "/".join([*levels, "*"])
    try:
        root, matches, may_contain = storage._glob(pattern)
    except Fatal:
        return
    for path in ("/r/a/b/a", "/r/ab/a/.b", "/r/b/a/b/a/b", "/r/*/a/b"):
        if matches(path):
            assert path.startswith(root)
            parents = [str(p) for p in Path(path).parents if str(p).startswith(root + "/")]
            assert all(may_contain(p) for p in parents)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(Fatal, match="does not exist"):
        _uris(tmp_path / "none")
    assert _uris(tmp_path) == []


def test_put_replaces_whole_and_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"{tmp_path}/out.parquet"
    storage.put(uri, b"old")

    def full(fd: int) -> None:
        assert all(p.name == "out.parquet" or p.name.startswith(".") for p in tmp_path.iterdir())
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Fatal, match=r"out\.parquet.*No space left"):
        storage.put(uri, b"new")
    monkeypatch.undo()
    assert storage.read(uri) == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["out.parquet"]
    storage.put(uri, b"new")
    assert storage.read(uri) == b"new"
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "out.parquet").stat().st_mode & 0o777 == 0o666 & ~umask


def test_the_version_changes_with_the_content(tmp_path: Path) -> None:
    uri = f"{tmp_path}/a.wav"
    storage.put(uri, b"one")
    before = storage.info(uri)
    time.sleep(0.02)
    storage.put(uri, b"two")
    after = storage.info(uri)
    assert before is not None
    assert after is not None
    assert before.version != after.version


def test_a_pipe_or_folder_is_no_file_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.wav")
    for name in ("pipe.wav", ""):
        with pytest.raises(BadAudio) as caught:
            storage.read(f"{tmp_path}/{name}")
        assert caught.value.kind == "not_a_file"


def test_check_writable(tmp_path: Path) -> None:
    storage.check_writable(f"{tmp_path}/new/folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    storage.put(f"{tmp_path}/file", b"")
    for url in (f"{tmp_path}/file", f"{tmp_path}/file/below"):
        with pytest.raises(Fatal, match=r"cannot write to .*/file.*choose another path"):
            storage.check_writable(url)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a place without new files")
def test_a_place_where_nothing_can_be_made_is_not_about_permissions() -> None:
    with pytest.raises(Fatal, match=r"cannot write to /proc/none: .*check the name") as caught:
        storage.check_writable("/proc/none")
    assert "permission" not in str(caught.value)


def test_a_folder_that_may_not_be_entered_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(self: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "is_dir", forbidden)
    with pytest.raises(Fatal, match=r"cannot list .*/calls: Permission denied; check its perm"):
        _uris(f"{tmp_path}/calls")


def test_a_name_that_cannot_be_is_not_about_permissions(tmp_path: Path) -> None:
    too_long = f"{tmp_path}/{'a' * 300}"
    (tmp_path / "loop").symlink_to("loop")
    refusals = [
        (
            storage.check_writable,
            too_long,
            "cannot write to .*: File name too long; check the name",
        ),
        (_uris, too_long, "cannot list .*: File name too long; check the name"),
        (storage.check_writable, f"{tmp_path}/loop/x", "symbolic links; check the name"),
    ]
    for refuse, url, sentence in refusals:
        with pytest.raises(Fatal, match=sentence) as caught:
            refuse(url)
        assert "permissions" not in str(caught.value)


def test_unknown_and_uninstalled_kinds_of_address_are_named() -> None:
    with pytest.raises(Fatal, match="nosuch://"):
        _uris("nosuch://a/b")
    with pytest.raises(Fatal, match="s3://"):
        storage.read("s3://bucket/key")


def test_other_fsspec_stores_work() -> None:
    storage.put("memory://archive/calls/a.wav", b"sound")
    storage.put("memory://archive/calls/deep/b.wav", b"")
    assert _uris("memory://archive/calls/") == [
        "memory://archive/calls/a.wav",
        "memory://archive/calls/deep/b.wav",
    ]
    assert _uris("memory://archive/calls/*.wav") == ["memory://archive/calls/a.wav"]
    assert _uris("memory://archive/calls/a.wav") == ["memory://archive/calls/a.wav"]
    assert storage.read_range("memory://archive/calls/a.wav", 1, 2) == b"ou"
    with pytest.raises(Fatal, match="does not exist"):
        _uris("memory://archive/none")


def test_without_credentials_the_sentence_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOOGLE_APPLICATION_CREDENTIALS", "CLOUDSDK_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    for use in (lambda: _uris("gs://b/calls"), lambda: storage.read("gs://b/a.wav")):
        with pytest.raises(Fatal, match=r"no valid credentials for gs://b/.*gcloud auth"):
            use()


class FakeBucket:
    """The JSON API as `storage` calls it: two names a page, and errors on request."""

    def __init__(self, names: list[str], errors: list[Exception]) -> None:
        self.names, self.errors, self.n_calls = names, errors, 0

    def _strip_protocol(self, url: str) -> str:
        return url.partition("://")[2]

    def call(self, method: str, path: str, *args: str, **parameters: str | None):
        self._maybe_fail()
        if path.startswith("http"):
            return {}, b"abc"
        if len(args) == 2:
            raise FileNotFoundError(args[1])
        start = int(parameters["pageToken"] or 0)
        prefix = parameters["prefix"] or ""
        page = [n for n in self.names if n.startswith(prefix)][start : start + 2]
        more = {"nextPageToken": str(start + 2)} if start + 2 < len(self.names) else {}
        return {"items": [{"name": n, "size": "3", "generation": "7"} for n in page], **more}

    def cat_file(self, path: str) -> bytes:
        self._maybe_fail()
        return b"abc"

    def url(self, path: str, generation: str | None = None) -> str:
        return f"http://{path}"

    pipe_file = lambda self, path, data: self._maybe_fail()  # noqa: E731

    def _maybe_fail(self) -> None:
        self.n_calls += 1
        if self.errors:
            raise self.errors.pop(0)


def _bucket(monkeypatch: pytest.MonkeyPatch, *errors: Exception, names: list[str] | None = None):
    bucket = FakeBucket(names or [], list(errors))
    monkeypatch.setattr(storage, "_file_system", lambda *key: bucket)
    return bucket


PASSING = [
    HttpError({"code": 503, "message": "backend"}),
    HttpError({"code": "429", "message": "slow down"}),
    aiohttp.ServerDisconnectedError(),
    requests.exceptions.ReadTimeout(),
    TimeoutError(),
    ConnectionResetError(errno.ECONNRESET, "reset"),
    google.auth.exceptions.TransportError("metadata"),
]


@pytest.mark.parametrize("error", PASSING, ids=lambda e: type(e).__name__)
def test_passing_errors_are_tried_again_and_then_transient(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    bucket = _bucket(monkeypatch, error, error)
    assert storage.read("gs://b/a") == b"abc"
    assert bucket.n_calls == 3
    bucket = _bucket(monkeypatch, *[error] * 9999)
    for use in (lambda: storage.read("gs://b/a"), lambda: storage.put("gs://b/a", b"")):
        bucket.n_calls = 0
        with pytest.raises(Transient, match=r"gs://b/a.*\(tried for 0 s\)"):
            use()
        assert bucket.n_calls > 2


def test_a_listing_goes_on_from_the_page_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"calls/{i}.wav" for i in range(5)]
    bucket = _bucket(monkeypatch, names=[*names, "calls/empty/"])
    listing = storage.list_objects("gs://b/calls")
    first = next(listing)
    bucket.errors = [TimeoutError(), TimeoutError()]
    assert [first.uri, *(o.uri for o in listing)] == [f"gs://b/{n}" for n in names]
    assert bucket.n_calls == 1 + 3 + 2


REFUSED = [
    (FileNotFoundError("a"), "missing", "does not exist"),
    (OSError("Forbidden: a"), "forbidden", "no permission"),
    (PermissionError(errno.EACCES, "no"), "forbidden", "no permission"),
    (HttpError({"code": 400, "message": "odd"}), "unreadable", "400"),
    (ValueError("Bad Request: b"), "unreadable", "ValueError"),
]


@pytest.mark.parametrize(("error", "kind", "sentence"), REFUSED)
def test_a_refused_read_is_a_row_and_a_refused_put_is_the_end(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: str, sentence: str
) -> None:
    bucket = _bucket(monkeypatch, error)
    with pytest.raises(BadAudio) as caught:
        storage.read("gs://b/a")
    assert caught.value.kind == kind
    bucket.errors = [error]
    with pytest.raises(Fatal, match=sentence):
        storage.put("gs://b/a", b"")
    assert bucket.n_calls == 2


@pytest.mark.parametrize(
    "error",
    [
        HttpError({"code": 401, "message": "Invalid Credentials"}),
        google.auth.exceptions.RefreshError("expired"),
        google.auth.exceptions.DefaultCredentialsError("none"),
    ],
)
def test_bad_credentials_stop_the_run_also_on_a_read(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    _bucket(monkeypatch, error)
    with pytest.raises(Fatal, match="credentials"):
        storage.read("gs://b/a")


def test_a_bug_is_not_dressed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    _bucket(monkeypatch, TypeError("ours"))
    with pytest.raises(TypeError, match="ours"):
        storage.read("gs://b/a")


def test_secrets_in_addresses_stay_out_of_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    _bucket(monkeypatch, FileNotFoundError("https://u:pw@host/a.wav?sig=SECRET"))
    with pytest.raises(BadAudio) as caught:
        storage.read("https://u:pw@host/a.wav?sig=SECRET")
    assert "host/a.wav" in caught.value.message
    assert "SECRET" not in caught.value.message
    assert "pw" not in caught.value.message


def test_patience_is_longer_in_every_thread_while_a_run_is_at_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retries, "IMPATIENT_S", -1.0)
    monkeypatch.setattr(retries, "PATIENCE_S", 60.0)
    bucket = _bucket(monkeypatch, *[TimeoutError()] * 4)
    with pytest.raises(Transient):
        storage.read("gs://b/a")
    assert bucket.n_calls == 2  # one for the object, one to see whether the store answers
    with retries.patient(), ThreadPoolExecutor(1) as pool:
        assert pool.submit(storage.read, "gs://b/a").result() == b"abc"
    bucket.errors = [TimeoutError()] * 2
    with pytest.raises(Transient):
        storage.read("gs://b/a")


def test_what_cannot_be_read_while_its_store_answers_is_a_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bucket = _bucket(monkeypatch)
    monkeypatch.setattr(bucket, "url", lambda path, generation=None: _raise(TimeoutError()))
    for use in (lambda: storage.read("gs://b/a"), lambda: storage.read_range("gs://b/a", 0, 9)):
        with pytest.raises(BadAudio, match=r"TimeoutError .*while its store answers") as caught:
            use()
        assert caught.value.kind == "unreadable"
    (tmp_path / "a.wav").write_bytes(b"abc")
    monkeypatch.setattr(
        storage, "_open_regular", lambda uri: _raise(OSError(errno.EIO, "Input/output error"))
    )
    with pytest.raises(BadAudio, match="Input/output error"):
        storage.read(f"{tmp_path}/a.wav")


def _raise(error: Exception):
    raise error


def test_a_short_read_of_a_store_without_checksums_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storage.put("memory://archive/short.wav", b"sound of a call")
    fs = fsspec.filesystem("memory")
    whole, answers = fs.cat_file, [b"sound of", b"sound of"]
    monkeypatch.setattr(
        type(fs), "cat_file", lambda self, path: answers.pop() if answers else whole(path)
    )
    assert storage.read("memory://archive/short.wav", listed_bytes=15) == b"sound of a call"
    assert answers == []
    # Replaced since it was listed: what is there now is whole.
    assert storage.read("memory://archive/short.wav", listed_bytes=99) == b"sound of a call"


@pytest.mark.parametrize("folder", ["local", "memory"])
def test_conditional_writing_lets_one_win(tmp_path: Path, folder: str) -> None:
    uri = f"{tmp_path}/a/claim" if folder == "local" else f"memory://claims/{tmp_path.name}/claim"
    first = storage.put_if(uri, b"one", None)
    assert first is not None
    assert storage.put_if(uri, b"two", None) is None
    assert storage.put_if(uri, b"two", "another") is None
    assert storage.read(uri) == b"one"
    if folder == "local":  # MemoryFileSystem's time of creation stays when it is overwritten
        time.sleep(0.02)
        second = storage.put_if(uri, b"two", first)
        assert second not in (None, first)
        assert not storage.delete_if(uri, first)
        assert storage.read(uri) == b"two"
        assert storage.delete_if(uri, second)
    else:
        assert storage.delete_if(uri, first)
    assert storage.delete_if(uri, first)
    assert storage.put_if(uri, b"three", first) is None
    assert not storage.exists(uri)


def test_of_many_local_writers_one_makes_the_object(tmp_path: Path) -> None:
    def claim(n: int) -> str | None:
        return storage.put_if(f"{tmp_path}/claim", str(n).encode(), None)

    with ThreadPoolExecutor(16) as pool:
        versions = list(pool.map(claim, range(64)))
    (winner,) = [n for n, version in enumerate(versions) if version is not None]
    assert storage.read(f"{tmp_path}/claim") == str(winner).encode()
    assert [path.name for path in tmp_path.iterdir()] == ["claim"]


def test_what_dead_writers_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    """A child is killed between writing and renaming; another still writes."""
    script = (
        "import os, sys, time; from transcribe import storage;"
        "os.fsync = lambda fd: (print('written', flush=True), time.sleep(600));"
        "storage.put(sys.argv[1], b'x')"
    )
    folder = tmp_path / "runs" / "r"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(folder / name)], stdout=subprocess.PIPE, text=True
        )
        for name in ("killed.json", "alive.json")
    ]
    try:
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == "written\n"
        killed, _ = children
        killed.kill()
        killed.wait()
        for path in folder.iterdir():
            os.utime(path, (0, 0))
        (folder / "report.json").write_text("{}")
        (folder / ".hidden").write_text("the user's")
        (tmp_path / f".write-check-{'ab' * 8}").touch()
        os.utime(tmp_path / f".write-check-{'ab' * 8}", (0, 0))
        assert storage.sweep(str(tmp_path)) == 2
        left = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())

        assert len(left) == 3 and {".hidden", "report.json"} < set(left)
    finally:
        for child in children:
            child.kill()
            child.wait()
