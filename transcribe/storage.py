"""Objects by name: list, read, read a range, put whole, delete; local folders and buckets alike.

Owns every call to fsspec and gcsfs, and the one place where the errors of file systems, HTTP and
credentials become `BadAudio`, `Transient` or `Fatal`. It must not know what a recording, a
manifest or a Parquet row is, and it must not import anything else of this package but the error
tree, `printable.py`, and `retries.py`, which says how long a failure that may pass is tried again.

What was read is whole or it is an error: its length, and on a bucket its checksum, are compared
with what the store says of the object.

Local files never pass through fsspec: its URL parsing stumbles over `#`, `?`, `%` and brackets in
names. A local name that is not UTF-8 is listed as a percent-encoded `file://` URL, so that every
`uri` is text that can be written to Parquet; all functions here take both spellings.

File systems are made on first use, per process and per emulator address, so functions of this
module work in forked and spawned workers. Buckets use Google's default credentials; with
STORAGE_EMULATOR_HOST set they use none.
"""

from __future__ import annotations

import base64
import errno
import fcntl
import functools
import hashlib
import io
import json
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import quote, unquote_to_bytes

import fsspec

from transcribe import retries
from transcribe.errors import BadAudio, Fatal, TranscribeError, Transient
from transcribe.printable import redacted

log = logging.getLogger(__name__)

T = TypeVar("T")
Action = Literal["read", "list", "write", "write to", "delete", "open"]

MISSING = "missing"
"""`ObjectInfo.version` of a name behind which no content was found (a broken symlink)."""

_CONNECT_S, _SILENCE_S, _REQUEST_S = 20, 30, 300
"""A request to a bucket ends after so many seconds without a connection, without a byte, in all:
what comes slower than that is tried again. Whoever reads large objects reads them in ranges."""

# Network mounts answer with these when a server is away for a moment.
_PASSING_ERRNOS = frozenset(
    {errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENETDOWN}
    | {errno.ENETUNREACH, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.EHOSTUNREACH}
)
_ABSENT_ERRNOS = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG})
_FORBIDDEN_ERRNOS = frozenset({errno.EACCES, errno.EPERM})

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_TEMPORARY = re.compile(r"\.([0-9a-f]{16}\.tmp|write-check-[0-9a-f]{16})")
_LOCKED_WITHIN_S = 2.0  # between being made and being locked

_GLOB_SIGNS = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One stored object as its listing describes it.

    Attributes:
        uri: absolute local path (or `file://` URL of a name that is not UTF-8), or full URL.
        size_bytes: length of the content.
        version: generation, else etag, else modification time in ns; changes when the content
            is replaced; `MISSING` where nothing could be read behind the name.
        md5: hex digest of the content when the store gives one.
    """

    uri: str
    size_bytes: int
    version: str
    md5: str | None


# ---------------------------------------------------------------- names


def absolute(url: str) -> str:
    """Give the one spelling of `url` that the rest of the package uses.

    Relative paths, `~` and `file://` URLs (percent-decoded) become absolute local paths; other
    URLs stay as they are. A trailing slash is dropped. Symlinks are not resolved.
    """
    if is_remote(url):
        scheme = _SCHEME.match(url)
        assert scheme is not None
        return url[: scheme.end()] + url[scheme.end() :].rstrip("/")
    # Path.absolute() keeps "..", and resolve() would follow symlinks: names would change.
    # Path.expanduser() raises for a "~name" that is no user.
    return _local_uri(os.path.abspath(os.path.expanduser(_local(url))))  # noqa: PTH100, PTH111


def is_remote(uri: str) -> bool:
    """Say whether `uri` is a URL other than `file://`."""
    scheme = _SCHEME.match(uri)
    return scheme is not None and scheme.group(1).lower() != "file"


def join(base: str, *parts: str) -> str:
    """Put `parts` below `base` with single slashes between them."""
    joined = base
    for part in parts:
        joined = f"{joined.rstrip('/')}/{part.strip('/')}"
    return joined


def _local(uri: str) -> str:
    """The path for the operating system of a local `uri`."""
    if uri[:7].lower() != "file://":
        return uri
    path = uri[7:]
    if not path.startswith("/"):  # file://host/path: the host is this machine or nothing
        path = path[path.find("/") :] if "/" in path else "/" + path
    return os.fsdecode(unquote_to_bytes(path))


def local_path(uri: str) -> Path | None:
    """The path of a local `uri`; None of a remote one."""
    return None if is_remote(uri) else Path(_local(uri))


def _local_uri(path: str) -> str:
    if not path.isascii():
        try:
            path.encode()
        except UnicodeEncodeError:
            return "file://" + quote(os.fsencode(path))
    return path


# ---------------------------------------------------------------- listing


def list_objects(url: str, unlisted: list[str] | None = None) -> Iterator[ObjectInfo]:
    """List what `url` stands for, in order of path, one by one.

    `url` is a single object, a folder or prefix (everything below it, to any depth; a prefix ends
    at a slash: `calls/2026` does not stand for `calls/2026-01`), or a glob (`*`, `?`, `[a-z]`
    within one level, `**` over levels; a folder that matches stands for everything below it). It
    is read as a glob only if nothing has that literal name. Only folders are left out. Symlinks
    are followed, except back to a folder they are in; one that leads nowhere is listed with
    version `MISSING`. A local folder that cannot be read is left out with a warning, and is added
    to `unlisted`. An existing, empty local folder gives nothing.

    Raises:
        Fatal: nothing is there, or it may not be listed.
        Transient: the store did not answer, after retries.
    """
    url = absolute(url)
    if is_remote(url):
        return _list_remote(url)
    return _list_local(_local(url), [] if unlisted is None else unlisted)


def info(uri: str) -> ObjectInfo | None:
    """Describe the single object `uri`; None if it is no object, or may not be seen.

    Raises:
        Fatal: no credentials, or an unknown scheme.
        Transient: the store did not answer, after retries.
    """
    try:
        return _attempt("read", uri, lambda: _info(uri))
    except BadAudio:
        return None


def _info(uri: str) -> ObjectInfo | None:
    if not is_remote(uri):
        path = _local(uri)
        status = Path(path).stat()
        return None if stat.S_ISDIR(status.st_mode) else _local_info(path, status)
    fs, path = _remote(uri)
    if _is_gcs(uri):
        bucket, _, key = path.partition("/")
        if not key:
            return None
        found = fs.call("GET", "b/{}/o/{}", bucket, key, json_out=True, fields=_GCS_FIELDS)
        return _remote_info(uri, found)
    found = fs.info(path)
    return None if found["type"] == "directory" else _remote_info(uri, found)


def _list_local(path: str, unlisted: list[str]) -> Iterator[ObjectInfo]:
    try:
        is_folder = Path(path).is_dir()
    except OSError as error:  # a folder on the way may not be entered
        raise Fatal(f"cannot list {path}: {error.strerror}; {_remedy(error)}") from error
    if is_folder:
        yield from _walk(path, unlisted)
    elif os.path.lexists(path):
        yield _local_info(path)
    elif _GLOB_SIGNS.search(path):
        root, matches, may_contain = _glob(path)
        if Path(root).is_dir():
            yield from _something(_walk(root, unlisted, may_contain, matches), path)
        else:
            raise _nothing_there(path)
    else:
        raise _nothing_there(path)


def _walk(
    root: str,
    unlisted: list[str],
    may_contain: Callable[[str], bool] = lambda folder: True,
    matches: Callable[[str], bool] = lambda path: True,
) -> Iterator[ObjectInfo]:
    """Everything below the folder `root` that `matches`, in the order of the whole path."""
    open_folders = [(iter(_entries(root, unlisted, is_root=True)), _identity(root))]
    while open_folders:
        entry = next(open_folders[-1][0], None)
        if entry is None:
            open_folders.pop()
        elif not _is_folder(entry):
            if matches(entry.path):
                yield _local_info(entry.path)
        elif may_contain(entry.path):
            identity = _identity(entry.path)
            # A symlink to a folder we are inside of would be walked for ever.
            if not any(identity == outer for _, outer in open_folders):
                open_folders.append((iter(_entries(entry.path, unlisted)), identity))


def _entries(folder: str, unlisted: list[str], is_root: bool = False) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            # "a/" sorts after "a.wav", so that the walk as a whole is in the order of the paths.
            return sorted(found, key=lambda e: e.name + "/" if _is_folder(e) else e.name)
    except OSError as error:
        if is_root:
            raise Fatal(f"cannot list {folder}: {error.strerror}; {_remedy(error)}") from error
        log.warning("left out folder %s: %s", _local_uri(folder), error.strerror)
        unlisted.append(_local_uri(folder))
        return []


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _identity(folder: str) -> tuple[int, int] | str:
    try:
        status = Path(folder).stat()
    except OSError:
        return folder
    return status.st_dev, status.st_ino


def _local_info(path: str, status: os.stat_result | None = None) -> ObjectInfo:
    try:
        status = status or os.stat(path)  # noqa: PTH116  (Path() per file costs more than the call)
    except OSError:
        return ObjectInfo(_local_uri(path), 0, MISSING, None)
    return ObjectInfo(_local_uri(path), status.st_size, str(status.st_mtime_ns), None)


def _list_remote(url: str) -> Iterator[ObjectInfo]:
    single = info(url)
    if single is not None:
        yield single
    found = single is not None
    for each in _list_below(url):
        found = True
        yield each
    if found:
        return
    sign = _GLOB_SIGNS.search(url)
    if sign is not None:
        root, matches, _ = _glob(url)
        # A bucket can be asked for names with a beginning, not only for folders.
        beginning = url[: sign.start()]
        below = _list_gcs(beginning) if _is_gcs(url) else _list_below(root)
        yield from _something((each for each in below if matches(each.uri)), url)
    elif "/" in url.partition("://")[2]:  # a bucket's root was listed: it exists and is empty
        raise _nothing_there(url)


def _list_below(root: str) -> Iterator[ObjectInfo]:
    """Every object below the remote folder `root`, sorted."""
    if _is_gcs(root):
        yield from _list_gcs(root + "/")
        return
    for name, found in sorted(_attempt("list", root, lambda: _find(root)).items()):
        # Keep the user's spelling of the root: file systems differ in how they give names back.
        yield _remote_info(root.rstrip("/") + name, found)


def _find(root: str) -> dict[str, dict[str, Any]]:
    fs, path = _remote(root)
    found: dict[str, dict[str, Any]] = fs.find(path, detail=True)
    below = path.rstrip("/") + "/"
    return {n[len(below) - 1 :]: each for n, each in found.items() if n.startswith(below)}


_GCS_FIELDS = "name,size,generation,md5Hash"


def _list_gcs(beginning: str) -> Iterator[ObjectInfo]:
    """Page through the bucket's own listing: constant memory, and one page per retry.

    The store gives the names that start with `beginning` sorted, up to 1,000 an answer.

    (`find` of gcsfs holds every object's whole JSON resource at once: gigabytes for a million.)
    """
    scheme, _, path = beginning.partition("://")
    bucket, _, prefix = path.partition("/")
    token: str | None = ""
    while token is not None:
        ask = functools.partial(_gcs_page, beginning, bucket, prefix, token)
        page = _attempt("list", beginning, ask)
        for found in page.get("items", []):
            if not found["name"].endswith("/"):  # the marker object of an empty folder
                yield _remote_info(f"{scheme}://{bucket}/{found['name']}", found)
        token = page.get("nextPageToken")


def _gcs_page(url: str, bucket: str, prefix: str, token: str) -> dict[str, Any]:
    page: dict[str, Any] = _remote(url)[0].call(
        "GET",
        "b/{}/o",
        bucket,
        json_out=True,
        prefix=prefix or None,
        pageToken=token or None,
        maxResults=1000,
        fields=f"nextPageToken,items({_GCS_FIELDS})",
    )
    return page


def _remote_info(uri: str, found: dict[str, Any]) -> ObjectInfo:
    version = next(
        (found[key] for key in _VERSION_KEYS if found.get(key) is not None), "no version"
    )
    md5 = found.get("md5Hash")
    return ObjectInfo(
        uri=uri,
        size_bytes=int(found.get("size") or 0),
        version=str(version).strip('"'),
        md5=base64.b64decode(md5).hex() if md5 else None,
    )


_VERSION_KEYS = ("generation", "etag", "ETag", "mtime", "LastModified", "last_modified", "created")


def _something(found: Iterator[ObjectInfo], url: str) -> Iterator[ObjectInfo]:
    first = next(found, None)
    if first is None:
        raise _nothing_there(url)
    yield first
    yield from found


def _nothing_there(url: str) -> Fatal:
    what = "nothing matches, so it" if _GLOB_SIGNS.search(url) else "it"
    return Fatal(f"{redacted(_local_uri(url))}: {what} does not exist; check the name")


def _glob(pattern: str) -> tuple[str, Callable[[str], bool], Callable[[str], bool]]:
    """Split a glob into its literal folder, a test for objects, and one for folders to enter.

    Paths are matched level by level; what lies below a matching folder matches too.
    """
    start = _SCHEME.match(pattern)
    levels = pattern[start.end() if start else 0 :].split("/")
    n_literal = next(i for i, level in enumerate(levels) if _GLOB_SIGNS.search(level))
    root = pattern[: start.end() if start else 0] + "/".join(levels[:n_literal])
    root = root or "/"
    objects, folders, closing = re.escape(root.rstrip("/")), re.escape(root.rstrip("/")), ""
    for level in levels[n_literal:]:
        if level == "**":
            objects += "(?:/[^/]+)*?"
            folders += "(?:/.*"
        else:
            objects += "/" + _level_regex(level)
            folders += "(?:/" + _level_regex(level)
        closing += ")?"
    try:
        matching = re.compile(objects + "(?:/.*)?", re.DOTALL)
        entering = re.compile(folders + "(?:/.*)?" + closing, re.DOTALL)
    except re.error as error:
        raise Fatal(
            f"{redacted(pattern)} is not a glob: {error.msg}; check its brackets"
        ) from error
    return (
        root,
        lambda path: matching.fullmatch(path) is not None,
        lambda path: entering.fullmatch(path) is not None,
    )


def _level_regex(level: str) -> str:
    """One level of a glob as a regular expression; `[!x]` excludes, a lone `[` is itself."""
    regex = ""
    for token in re.findall(r"\[!?[^\]]+\]|.", level, re.DOTALL):
        if token == "*":
            regex += "[^/]*"
        elif token == "?":
            regex += "[^/]"
        elif len(token) == 1:
            regex += re.escape(token)
        else:
            negated = token[1] == "!"
            chosen = re.sub(r"([\\^\[&~|])", r"\\\1", token[1 + negated : -1])
            regex += f"[{'^/' if negated else ''}{chosen}]"
    return regex


# ---------------------------------------------------------------- reading and writing


def read(uri: str, listed_bytes: int | None = None) -> bytes:
    """Read a whole object, and make sure that it is whole.

    A bucket says checksum and length of what it sends; they are compared with what arrived, so
    an object that was replaced since it was listed is read as it is now. Objects stored with a
    content encoding (gzip) arrive unpacked and are not checked so. Other stores say nothing, and
    `listed_bytes` is compared instead.

    Args:
        uri: the object.
        listed_bytes: its length by the listing; None or 0 if that is not known.

    Raises:
        BadAudio: it is gone (`missing`), may not be read (`forbidden`), is no regular file
            (`not_a_file`), or the store refuses it (`unreadable`), also by sending something
            else again and again while it answers otherwise.
        Transient: the store did not answer, after retries.
        Fatal: no credentials, or an unknown scheme.
    """
    return _attempt("read", uri, lambda: _read(uri, listed_bytes), of_content=True)


def _read(uri: str, listed_bytes: int | None = None) -> bytes:
    if not is_remote(uri):
        with _open_regular(uri) as file:
            return file.read()
    if _is_gcs(uri):
        content, is_checked = _get_whole(uri)
    else:
        fs, path = _remote(uri)
        content, is_checked = bytes(fs.cat_file(path)), False
    if listed_bytes and not is_checked and len(content) != listed_bytes:
        now = _info(uri)  # replaced since it was listed?
        if now is not None and now.size_bytes != len(content):
            raise _Incomplete(f"{len(content):,} of {now.size_bytes:,} bytes arrived")
    return content


class _Incomplete(Exception):
    """What arrived is not what is stored: a connection that broke unnoticed."""


def _get_whole(uri: str) -> tuple[bytes, bool]:
    """Download from a bucket: the bytes, and whether they could be checked.

    Raises:
        _Incomplete: length or checksum differ from what the store says of the object.
    """
    fs, path = _remote(uri)
    answer, content = fs.call("GET", fs.url(path))
    is_unpacked = answer.get("Content-Encoding", "identity") != "identity"
    is_unpacked |= answer.get("X-Goog-Stored-Content-Encoding", "identity") != "identity"
    if is_unpacked:
        return content, True
    stored = answer.get("X-Goog-Stored-Content-Length")
    if stored is not None and int(stored) != len(content):
        raise _Incomplete(f"{len(content):,} of {int(stored):,} bytes arrived")
    return content, _check_sum(answer, content) or stored is not None


def _get_range(uri: str, start: int, length: int, version: str | None) -> bytes:
    """Download a range from a bucket.

    Raises:
        _Incomplete: it is not the range that was asked for, or not all of it.
    """
    fs, path = _remote(uri)
    url = fs.url(path, generation=version if version and version.isdigit() else None)
    answer, content = fs.call("GET", url, headers={"Range": f"bytes={start}-{start + length - 1}"})
    said = re.match(r"bytes (\d+)-(\d+)/(\d+)", answer.get("Content-Range", ""))
    if said is None:  # an object that comes unpacked comes whole
        return bytes(content[start : start + length])
    size = int(said[3])
    wanted = max(0, min(size, start + length) - start)
    if len(content) != wanted or (wanted and int(said[1]) != start):
        raise _Incomplete(f"{len(content):,} of {wanted:,} bytes arrived")
    return bytes(content)


def _check_sum(answer: Mapping[str, str], content: bytes) -> bool:
    """Compare with the checksum of the answer: CRC32C, which composed objects have too, or MD5."""
    # There are two headers of this name; a plain mapping of a test has one.
    lines = answer.getall("X-Goog-Hash", []) if hasattr(answer, "getall") else []
    sums = dict(each.strip().split("=", 1) for line in lines for each in line.split(",") if each)
    if "crc32c" in sums:
        import google_crc32c

        arrived = google_crc32c.value(content).to_bytes(4, "big")
    elif "md5" in sums:
        arrived = hashlib.md5(content, usedforsecurity=False).digest()
    else:
        return False
    if base64.b64encode(arrived).decode() != sums.get("crc32c", sums.get("md5")):
        raise _Incomplete(f"{len(content):,} bytes arrived, with another checksum")
    return True


def read_range(uri: str, start: int, length: int, version: str | None = None) -> bytes:
    """Read `length` bytes from byte `start`, fewer only where the object ends.

    Args:
        uri: the object.
        start: first byte.
        length: how many.
        version: as listed (`ObjectInfo.version`). On a bucket, an object that was replaced since
            is then `missing`, so that several ranges are of one content.

    Raises:
        As `read`.
    """
    if length <= 0:
        return b""
    asked = functools.partial(_read_range, uri, start, length, version)
    return _attempt("read", uri, asked, of_content=True)


def _read_range(uri: str, start: int, length: int, version: str | None) -> bytes:
    if not is_remote(uri):
        with _open_regular(uri) as file:
            file.seek(start)
            return file.read(length)
    try:
        if _is_gcs(uri):
            return _get_range(uri, start, length, version)
        fs, path = _remote(uri)
        return bytes(fs.cat_file(path, start=start, end=start + length))
    except Exception as error:
        if _http_status(error) == 416:  # the range begins at or after the end
            return b""
        raise


def _open_regular(uri: str) -> io.FileIO:
    """Open a local file, but never wait for the writer of a pipe or read a device without end."""
    file = io.FileIO(os.open(_local(uri), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise BadAudio("not_a_file", f"{uri} is not a regular file")
    return file


def put(uri: str, data: bytes) -> None:
    """Write a whole object in one step: a reader sees the old content or the new, never a part.

    Locally a temporary file whose name starts with "." is written beside it, synced and renamed;
    missing folders are made. Remotely it is a single put.

    Raises:
        Fatal: it may not or cannot be written; the sentence names the path.
        Transient: the store did not answer, after retries.
    """
    _attempt("write", uri, lambda: _put(uri, data))


def _put(uri: str, data: bytes, is_locked: bool = False) -> None:
    if is_remote(uri):
        fs, name = _remote(uri)
        fs.pipe_file(name, data)
        return
    path = Path(_local(uri))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        # Not tempfile: it would leave the published file readable by its owner only.
        with temporary.open("xb") as file:
            with suppress(OSError):  # some network mounts have no locks: `sweep` leaves them alone
                fcntl.flock(file, fcntl.LOCK_SH)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            with nullcontext() if is_locked else _folder_locked(uri):
                temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sweep(url: str) -> int:
    """Remove the temporary files of writers that died below a local folder; returns how many.

    A writer holds a lock on its file, and the lock ends with its process. Buckets have none.
    """
    if is_remote(url):
        return 0
    n_removed = 0
    for folder, _, names in os.walk(_local(url)):
        for name in filter(_TEMPORARY.fullmatch, names):
            with suppress(OSError), (Path(folder) / name).open("rb") as file:
                if time.time() - os.fstat(file.fileno()).st_mtime < _LOCKED_WITHIN_S:
                    continue
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                Path(file.name).unlink()
                n_removed += 1
    return n_removed


def put_if(uri: str, data: bytes, version: str | None) -> str | None:
    """Write a whole object only if what is there is what is known: nobody else came between.

    Buckets decide by themselves (`ifGenerationMatch`); local writers of this package take turns
    by a lock of the folder. On other stores a moment remains between looking and writing.

    Args:
        uri: the object.
        data: its new content.
        version: of the content to replace (`ObjectInfo.version`); None to make a new object.

    Returns:
        The version written; None if something else is there, or nothing any more.

    Raises:
        As `put`.
    """
    return _attempt("write", uri, lambda: _put_if(uri, data, version))


def _put_if(uri: str, data: bytes, version: str | None) -> str | None:
    if not _is_gcs(uri):
        if not is_remote(uri):
            Path(_local(uri)).parent.mkdir(parents=True, exist_ok=True)
        with _folder_locked(uri):
            if _version(uri) != version:
                return None
            _put(uri, data, is_locked=True)
            return _version(uri)
    fs, path = _remote(uri)
    bucket, _, key = path.partition("/")
    conditions = {"uploadType": "media", "name": key, "ifGenerationMatch": version or "0"}
    address = f"{fs._location}/upload/storage/v1/b/{bucket}/o"
    headers = {"Content-Type": "application/octet-stream"}
    try:
        written = fs.call("POST", address, headers=headers, data=data, json_out=True, **conditions)
    except FileExistsError:
        # Perhaps by us: a try before this one was stored and its answer lost.
        there = _found(uri)
        mine = hashlib.md5(data, usedforsecurity=False).hexdigest()
        return there.version if there is not None and there.md5 == mine else None
    return str(written["generation"])


def delete_if(uri: str, version: str) -> bool:
    """Remove an object if it is still of this version; False if another one is there.

    One that is gone already is fine. Raises `Transient`, `Fatal`.
    """
    return _attempt("delete", uri, lambda: _delete_if(uri, version))


def _delete_if(uri: str, version: str) -> bool:
    if not _is_gcs(uri):
        with _folder_locked(uri):
            there = _version(uri)
            if there == version:
                _delete(uri)
            return there in (None, version)
    fs, path = _remote(uri)
    bucket, _, key = path.partition("/")
    try:
        fs.call("DELETE", "b/{}/o/{}", bucket, key, ifGenerationMatch=version)
    except FileNotFoundError:
        return True
    except FileExistsError:  # of another version, or removed by a try whose answer was lost
        return _found(uri) is None
    return True


def _found(uri: str) -> ObjectInfo | None:
    try:
        return _info(uri)
    except FileNotFoundError:
        return None


def _version(uri: str) -> str | None:
    found = _found(uri)
    return None if found is None else found.version


@contextmanager
def _folder_locked(uri: str) -> Iterator[None]:
    """Keep the other writers of this package out of a local folder for the moment of a rename."""
    if is_remote(uri):
        yield
        return
    folder = os.open(Path(_local(uri)).parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # Where the mount knows no locks, a moment remains open between looking and renaming.
        with suppress(OSError):
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def exists(uri: str) -> bool:
    """Say whether an object or a folder has this name. Raises `Transient`, `Fatal`."""
    try:
        _attempt("read", uri, lambda: _stat_any(uri))
    except BadAudio as error:
        if error.kind == "missing":
            return False
        raise Fatal(error.message) from error
    return True


def _stat_any(uri: str) -> None:
    if is_remote(uri):
        fs, path = _remote(uri)
        fs.info(path)
    else:
        Path(_local(uri)).stat()


def delete(uri: str) -> None:
    """Remove an object; one that is not there is fine. Raises `Transient`, `Fatal`."""
    _attempt("delete", uri, lambda: _delete(uri))


def _delete(uri: str) -> None:
    try:
        if is_remote(uri):
            fs, path = _remote(uri)
            fs.rm_file(path)
        else:
            Path(_local(uri)).unlink()
    except FileNotFoundError:
        return


def check_writable(url: str) -> None:
    """Prove that objects can be put below `url` and removed; a local folder is made.

    Raises:
        Fatal: one sentence with the path and what to do.
    """
    url = absolute(url)
    try:
        _attempt("write to", url, lambda: _put_and_delete(url))
    except Transient as error:
        raise Fatal(f"{error}; try again later") from error


def _put_and_delete(url: str) -> None:
    probe = join(url, f".write-check-{secrets.token_hex(8)}")
    _put(probe, b"")
    _delete(probe)


def open_parquet_source(uri: str) -> io.BufferedReader:
    """Open `uri` as a seekable binary file that reads only the ranges it is asked for.

    For Parquet files and manifests, not for recordings: what cannot be read stops the run.

    Raises:
        Fatal, Transient: here or while it is being read.
    """
    if not is_remote(uri):
        return io.BufferedReader(_needed(lambda: _attempt("open", uri, lambda: _open_regular(uri))))
    found = info(uri)
    if found is None:
        raise Fatal(f"{redacted(uri)} does not exist or may not be read; check the name")
    return io.BufferedReader(_Ranges(uri, found.size_bytes), buffer_size=1 << 20)


def _needed(reading: Callable[[], T]) -> T:
    """Without this object the run cannot go on: what would be a failed row is the end."""
    try:
        return reading()
    except BadAudio as error:
        raise Fatal(error.message) from error


class _Ranges(io.RawIOBase):
    """A remote object as a seekable file; every read is one `read_range`."""

    def __init__(self, uri: str, size_bytes: int) -> None:
        self._uri, self._size_bytes, self._position = uri, size_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size_bytes}
        self._position = max(0, origin[whence] + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size_bytes - self._position)
        data = _needed(lambda: read_range(self._uri, self._position, wanted))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


# ---------------------------------------------------------------- file systems


def _is_gcs(uri: str) -> bool:
    return uri.partition("://")[0].lower() in ("gs", "gcs")


def _remote(uri: str) -> tuple[Any, str]:
    """The file system of `uri` and the name it knows the object by."""
    scheme = uri.partition("://")[0].lower()
    fs = _file_system(scheme, os.environ.get("STORAGE_EMULATOR_HOST", ""), os.getpid())
    return fs, fs._strip_protocol(uri)


@functools.lru_cache(maxsize=16)
def _file_system(scheme: str, emulator: str, pid: int) -> Any:
    """Make a file system; `pid` is in the key because one made before a fork is unusable after."""
    if scheme in ("gs", "gcs"):
        return _gcs(emulator)
    try:
        return fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False)
    except ValueError as error:
        raise Fatal(f"unknown kind of address {scheme}://; use a path or gs://") from error
    except ImportError as error:
        raise Fatal(f"{scheme}:// needs a package that is not installed: {error}") from error


def _gcs(emulator: str) -> Any:
    emulated = emulator not in ("", "default")
    if emulated:
        # The question whether a bucket is hierarchical goes to another service, over gRPC; no
        # emulator answers it, and the wait is a minute a bucket.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    # Here, not at the head: a run on local files is spared their second of start-up.
    import aiohttp
    import gcsfs
    import gcsfs.core

    # It logs whole tracebacks of what is translated and reported here.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    kind = gcsfs.core.GCSFileSystem if emulated else gcsfs.GCSFileSystem
    timeout = aiohttp.ClientTimeout(_REQUEST_S, sock_connect=_CONNECT_S, sock_read=_SILENCE_S)
    return _with_single_tries(kind)(
        token="anon" if emulated else "google_default",
        consistency="md5",
        requests_timeout=timeout,  # a timeout of its session would be overridden with none at all
        use_listings_cache=False,
        skip_instance_cache=True,
    )


def _with_single_tries(kind: Any) -> Any:
    """`kind` without the retries of gcsfs: half a minute a call that nobody can shorten or see."""

    from gcsfs.retry import HttpError

    single_try = kind._request.__wrapped__

    class SingleTries(kind):  # type: ignore[misc]
        async def _request(self, *args: Any, **kwargs: Any) -> Any:
            try:
                return await single_try(self, *args, **kwargs)
            except HttpError as error:
                if _http_status(error) != 401:
                    raise
            return await single_try(self, *args, **kwargs)  # the token ended on its way

    return SingleTries


# ---------------------------------------------------------------- errors


def _attempt(action: Action, uri: str, operation: Callable[[], T], of_content: bool = False) -> T:
    """Run `operation`, again after a passing failure (`retries.py`), and translate what it raises.

    If reading a content failed to the end while the store answers otherwise, that is the object's
    own matter: one row fails, not the run.
    """

    def blame(failure: Transient) -> TranscribeError:
        if of_content and _answers(uri):
            return BadAudio("unreadable", f"{failure}, while its store answers otherwise")
        return failure

    return retries.attempt(operation, lambda error: _translated(error, action, uri), blame)


def _answers(uri: str) -> bool:
    """Whether the store of an object says anything of it, be it that it is not there."""
    try:
        if is_remote(uri):
            _info(uri)
        else:
            next(iter(os.scandir(Path(_local(uri)).parent)), None)
    except Exception as error:
        return not isinstance(_translated(error, "read", uri), Transient)
    return True


def _translated(error: Exception, action: Action, uri: str) -> TranscribeError | None:
    """The consequence of a foreign error; None for what is a bug of ours."""
    if not is_remote(uri):
        return _translated_local(error, action, uri) if isinstance(error, OSError) else None
    return _translated_remote(error, action, uri)


def _translated_local(error: OSError, action: Action, uri: str) -> TranscribeError:
    reason = error.strerror or type(error).__name__
    if action != "read":
        if error.errno in _PASSING_ERRNOS:
            return Transient(f"cannot {action} {uri}: {reason}")
        return Fatal(f"cannot {action} {uri}: {reason}; {_remedy(error)}")
    if error.errno in _ABSENT_ERRNOS:
        return BadAudio("missing", f"{uri} does not exist")
    if error.errno in _FORBIDDEN_ERRNOS:
        return BadAudio("forbidden", f"{uri} may not be read: {reason}")
    if error.errno in _PASSING_ERRNOS:
        return Transient(f"cannot read {uri}: {reason}")
    # A directory, a socket, a device without a driver.
    return BadAudio("not_a_file", f"{uri} cannot be read: {reason}")


def _remedy(error: OSError) -> str:
    if error.errno in (errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP):
        return "check the name or choose another folder"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free some space or choose another folder"
    if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        return "a file stands where a folder is needed, or the reverse: choose another path"
    return "check its permissions or choose another folder"


def _translated_remote(error: Exception, action: Action, uri: str) -> TranscribeError | None:
    status = _http_status(error)
    if isinstance(error, FileNotFoundError) or status == 404:
        if action == "read":
            return BadAudio("missing", f"{redacted(uri)} does not exist")
        bucket = "/".join(redacted(uri).split("/")[:3])
        return Fatal(f"cannot {action} {redacted(uri)}: {bucket} does not exist; check the name")
    if isinstance(error, PermissionError) or status == 403 or str(error).startswith("Forbidden"):
        if action == "read":
            return BadAudio("forbidden", f"{redacted(uri)} may not be read with these credentials")
        role = "roles/storage.objectViewer" if action == "list" else "roles/storage.objectUser"
        return Fatal(f"no permission to {action} {redacted(uri)}; on Google Cloud grant {role}")
    if status == 401 or _is_credential_error(error):
        return Fatal(
            f"no valid credentials for {redacted(uri)}; run"
            " `gcloud auth application-default login` or give the machine a service account"
        )
    reason = _reason(error, status)
    if isinstance(error, (_Incomplete, json.JSONDecodeError)) or _is_passing(error, status):
        return Transient(f"cannot {action} {redacted(uri)}: {reason}")
    if isinstance(error, OSError) or status is not None or _is_bad_request(error):
        if action == "read":
            return BadAudio("unreadable", f"{redacted(uri)} cannot be read: {reason}")
        return Fatal(f"cannot {action} {redacted(uri)}: {reason}; check the address")
    return None


def _http_status(error: Exception) -> int | None:
    """The HTTP status an error of gcsfs (`code`, number or text) or aiohttp (`status`) carries."""
    for name in ("code", "status"):
        value = getattr(error, name, None)
        if isinstance(value, (int, str)) and str(value).isdigit():
            return int(value)
    return None


def _is_credential_error(error: Exception) -> bool:
    import google.auth.exceptions
    from gcsfs.retry import NonRetryableError

    if isinstance(error, google.auth.exceptions.GoogleAuthError):
        return not (error.retryable or isinstance(error, google.auth.exceptions.TransportError))
    return isinstance(error, NonRetryableError)


def _is_passing(error: Exception, status: int | None) -> bool:
    import socket

    import aiohttp
    import google.auth.exceptions
    import requests
    from gcsfs.retry import ChecksumError

    if status is not None:
        return status in (408, 429) or status >= 500
    network = (ConnectionError, TimeoutError, socket.gaierror)
    clients = (aiohttp.ClientError, requests.RequestException, ChecksumError)
    auth = google.auth.exceptions.GoogleAuthError
    passing_errno = isinstance(error, OSError) and error.errno in _PASSING_ERRNOS
    return passing_errno or isinstance(error, (*network, *clients, auth))


def _is_bad_request(error: Exception) -> bool:
    return isinstance(error, ValueError) and str(error).startswith("Bad Request")


def _reason(error: Exception, status: int | None) -> str:
    """Why, without the text of client errors: it may hold a signed address."""
    if isinstance(error, _Incomplete):
        return str(error)
    if status is not None:
        return f"HTTP status {status}"
    return type(error).__name__
