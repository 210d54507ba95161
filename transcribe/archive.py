"""Archive -> recordings: what there is to transcribe, each with an id and an estimated duration.

Owns: which objects of a folder are recordings, manifests, the recording id, duration estimates.
Must not know: how objects are stored (`storage.py`), what is already transcribed, shards, Ray.

An archive is a folder or prefix, a glob, a single file, or a manifest: a `.csv`, `.jsonl` or
`.parquet` file with a column `uri`, whose other columns travel along as JSON.

In a folder or glob, hidden files (a part of the path below the archive starts with ".") and files
whose extension says that they are no recordings (`NOT_RECORDINGS`) are left out, and one warning
counts them. Everything else is a recording, also without an extension or with an unknown one: if
it turns out not to be audio, it ends as a `failed` row. A file named as the archive itself, or in
a manifest, is never left out.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import logging
import math
import posixpath
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from transcribe import storage
from transcribe.errors import BadAudio, Fatal, Transient
from transcribe.headerless import Headerless
from transcribe.printable import without_secrets
from transcribe.recordings import Recording as Recording
from transcribe.recordings import Recordings

log = logging.getLogger(__name__)

A = TypeVar("A")
B = TypeVar("B")

MANIFESTS = frozenset({".csv", ".jsonl", ".parquet"})
_DOCUMENTS = {".txt", ".md", ".rst", ".log", ".htm", ".html", ".pdf", ".doc", ".docx", ".xlsx"}
_TABLES = {".json", ".jsonl", ".csv", ".tsv", ".xml", ".parquet", ".db", ".sqlite"}
_PICTURES = {".jpg", ".jpeg", ".png", ".gif", ".bmp", ".svg"}
_LABELS = {".srt", ".vtt", ".ass", ".rttm", ".textgrid", ".ctm", ".stm", ".lab", ".eaf"}
_MACHINERY = {".yaml", ".yml", ".toml", ".ini", ".md5", ".sha1", ".sha256", ".py", ".sh", ".tmp"}
NOT_RECORDINGS = frozenset(_DOCUMENTS | _TABLES | _PICTURES | _LABELS | _MACHINERY)

_LONGEST_FIELD = 1 << 26  # characters in a field of a CSV manifest
N_SAMPLED_PER_EXTENSION = 16
_PROBED_AT_ONCE = 8192
N_LISTED_INSTEAD_OF_LOOKED_UP = 1000
SHORTEST_S = 1.0
# Speech costs more than this in every codec: a header that claims longer is wrong.
LEAST_BYTES_PER_SECOND = 25.0

# Bytes per second of sound as call centres commonly store it; only for what cannot be probed.
TYPICAL_BYTES_PER_SECOND = {
    ".wav": 16_000.0,  # G.711 in two channels, or 16-bit PCM in one, at 8 kHz
    ".flac": 16_000.0,
    ".mp3": 8_000.0,
    ".m4a": 8_000.0,
    ".mp4": 16_000.0,
    ".aac": 8_000.0,
    ".ogg": 4_000.0,
    ".opus": 4_000.0,
    ".webm": 6_000.0,
    ".amr": 1_600.0,
    ".gsm": 1_650.0,
    ".g729": 1_000.0,
}
OTHERWISE_BYTES_PER_SECOND = 8_000.0


def list_archive(archive: str, unlisted: list[str] | None = None) -> Recordings:
    """List the recordings of `archive`, sorted by uri, each uri once.

    Durations are told from size and extension alone; `estimate_durations` looks closer, and is
    best asked about those recordings only that are still to be done.

    Args:
        archive: as the user wrote it.
        unlisted: takes the folders that could not be listed.

    Raises:
        Fatal: there is no such archive, nothing in it is a recording, or the manifest is wrong.
        Transient: the store does not answer, after retries.
    """
    url = storage.absolute(archive)
    if _extension(url) in _TABLES and storage.info(url) is not None:
        if _extension(url) not in MANIFESTS:
            raise Fatal(
                f"{url} is neither audio nor a manifest; a manifest is CSV, JSONL (an object on"
                " each line) or Parquet."
            )
        return Recordings.of(_from_manifest(url)).sorted()
    return Recordings.of(_from_listing(url, unlisted)).sorted()


def _recording(found: storage.ObjectInfo, metadata: str | None) -> Recording:
    identity = json.dumps([without_secrets(found.uri), found.version, found.size_bytes])
    return Recording(
        recording_id=hashlib.sha256(identity.encode()).hexdigest()[:32],
        uri=found.uri,
        generation=found.version,
        size_bytes=found.size_bytes,
        content_md5=found.md5,
        metadata=metadata,
        duration_s=max(SHORTEST_S, found.size_bytes / _typical_rate(_extension(found.uri))),
    )


def _extension(uri: str) -> str:
    # As PurePosixPath(uri).suffix, which takes five times as long.
    name = uri.rpartition("/")[2]
    at = name.rfind(".")
    return name[at:].lower() if 0 < at < len(name) - 1 else ""


# ---------------------------------------------------------------- folders, globs, single files


def _from_listing(url: str, unlisted: list[str] | None) -> Iterator[Recording]:
    skipped: Counter[str] = Counter()
    n_kept = 0
    for found in storage.list_objects(url, unlisted):
        reason = None if found.uri == url else _why_not_recording(found.uri, url)
        if reason is None:
            n_kept += 1
            yield _recording(found, None)
        else:
            skipped[reason] += 1
    counted = ", ".join(f"{reason} {n}" for reason, n in sorted(skipped.items()))
    if n_kept == 0:
        seen = f"only files that are none by their names: {counted}" if skipped else "it is empty"
        raise Fatal(f"no recordings in {url} ({seen}); name a folder, glob or manifest of audio")
    if skipped:
        n = skipped.total()
        log.warning("left out in %s, as no recordings: %s (%d in all)", url, counted, n)


def _why_not_recording(uri: str, archive: str) -> str | None:
    """The extension, or "hidden", for which a listed file is left out; None for a recording."""
    # What the user spelled out is not hidden: /home/me/.audio, or /home/me/*/.audio.
    named = archive.removeprefix("file://").split("/")
    for i, part in enumerate(uri.removeprefix("file://").split("/")):
        if part.startswith(".") and not (i < len(named) and named[i].startswith(".")):
            return "hidden"
    extension = _extension(uri)
    return extension if extension in NOT_RECORDINGS else None


# ---------------------------------------------------------------- manifests


def _from_manifest(url: str) -> Iterator[Recording]:
    folder = url.rpartition("/")[0] or "/"
    metadata: dict[str, str] = {}
    repeated: list[str] = []
    named: set[str] = set()
    for row in manifest_rows(url):
        uri = resolved(row.pop("uri"), folder)
        if without_secrets(uri) in named:
            repeated.append(uri)
        else:
            named.add(without_secrets(uri))
            metadata[uri] = _json(row)
    if repeated:
        log.warning(
            "%s names %d recordings again (the first: %s); kept the first row of each",
            url, len(repeated), repeated[0],
        )  # fmt: skip
    if not metadata:
        raise Fatal(f"{url} lists no recordings; write one row for each")
    objects = _look_up(list(metadata))
    n_missing = sum(found.version == storage.MISSING for found in objects)
    if n_missing:
        log.warning("%s names %d objects that cannot be found", url, n_missing)
    return (_recording(found, metadata[found.uri]) for found in objects)


def manifest_rows(url: str, names: Sequence[str] = ("uri",)) -> Iterator[dict[str, Any]]:
    """The rows of a CSV, JSONL or Parquet file, every one with a usable `uri`.

    Args:
        url: absolute name of an object whose extension is one of `MANIFESTS`.
        names: columns that may say the uri, the preferred one first; whichever of them a row
            has comes out as `uri`.

    Raises:
        Fatal: it cannot be read, or a row says no uri.
        Transient: the store does not answer, after retries.
    """
    readers = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}
    with storage.open_parquet_source(url) as file:
        for where, row in readers[_extension(url)](url, file, names):
            name = next((name for name in names if name in row), None)
            if name is None:
                raise _no_column(f"{url}, {where}", names, sorted(row))
            if not _is_usable(row[name]):
                raise Fatal(f"{url}, {where}: `{name}` must be the path or URL of a recording")
            uri = row.pop(name)
            yield {"uri": uri, **row}


def _no_column(where: str, names: Sequence[str], found: Sequence[str]) -> Fatal:
    wanted = " or ".join(f"`{name}`" for name in names)
    return Fatal(f"{where}: no column {wanted} (found: {', '.join(found) or 'none'}); add it")


def _check_header(url: str, names: Sequence[str], header: Sequence[str]) -> None:
    if not any(name in header for name in names):
        raise _no_column(url, names, header)
    twice = sorted(name for name, n in Counter(header).items() if n > 1)
    if twice:
        raise Fatal(f"{url}: column `{twice[0]}` is there twice; rename one of the two")


def _is_usable(uri: object) -> bool:
    return isinstance(uri, str) and bool(uri.strip()) and "\0" not in uri and is_text(uri)


def is_text(value: object) -> bool:
    """Whether `value` is a string that UTF-8 can say."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, from a JSON escape
        return False
    return True


def _csv_rows(
    url: str, file: io.BufferedReader, names: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(_LONGEST_FIELD)  # the default, 131,072, is less than a long call's words
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    reader = csv.reader(text, strict=True)
    try:
        header = next(reader, [])
        _check_header(url, names, header)
        for fields in reader:
            where = f"line {reader.line_num}"
            if fields and len(fields) != len(header):
                raise Fatal(f"{url}, {where}: {len(fields)} fields for {len(header)} columns")
            if fields:
                yield where, dict(zip(header, fields, strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise Fatal(f"{url}, line {reader.line_num + 1}: not CSV in UTF-8 ({error})") from error


def _jsonl_rows(
    url: str, file: io.BufferedReader, names: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(file, start=1):
        where = f"line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise Fatal(f"{url}, {where}: not a JSON object on one line") from error
        if not isinstance(row, dict):
            raise Fatal(f"{url}, {where}: not a JSON object on one line")
        yield where, row


def _parquet_rows(
    url: str, file: io.BufferedReader, names: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        parquet = pq.ParquetFile(file)
        _check_header(url, names, parquet.schema_arrow.names)
        number = 0
        for batch in parquet.iter_batches(batch_size=4096, use_threads=False):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except (pa.ArrowException, OSError, UnicodeError) as error:
        # pyarrow says most damage as an OSError without a number; one with a number is the disk's.
        if getattr(error, "errno", None) is not None:
            raise Fatal(f"{url} cannot be read ({error})") from error
        raise Fatal(f"{url}: not a Parquet file that can be read") from error


def resolved(uri: str, folder: str) -> str:
    """The absolute uri of a manifest's entry; a relative one is below the manifest's `folder`."""
    if storage.is_remote(uri) or uri.startswith(("/", "file://")):
        return storage.absolute(uri)
    if not storage.is_remote(folder):
        return storage.absolute(storage.join(folder, uri))
    scheme, _, path = folder.partition("://")
    return f"{scheme}://{posixpath.normpath(posixpath.join(path, uri))}"


def _json(columns: dict[str, Any]) -> str:
    plain = _plain(columns)
    text = json.dumps(plain, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return text if is_text(text) else json.dumps(plain, sort_keys=True, allow_nan=False)


def _plain(value: Any) -> Any:
    """`value` as JSON can say it: no NaN, dates as ISO 8601, bytes in hex, the rest as text."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, bytes):
        return value.hex()
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _look_up(uris: Sequence[str]) -> list[storage.ObjectInfo]:
    """Describe every uri; one that is not there is `MISSING` with size 0.

    A remote folder of which very many objects are wanted is listed, a thousand an answer; the
    rest is asked for one by one.
    """
    wanted: dict[str, list[str]] = defaultdict(list)
    for uri in uris:
        wanted[uri.rpartition("/")[0]].append(uri)
    found: dict[str, storage.ObjectInfo] = {}
    singly: list[str] = []
    for folder, names in wanted.items():
        if storage.is_remote(folder) and len(names) >= N_LISTED_INSTEAD_OF_LOOKED_UP:
            found |= _look_up_in(folder, names)
            # A listing can be forbidden where the objects themselves are not.
            singly += [name for name in names if name not in found]
        else:
            singly += names
    for info in in_threads(storage.info, singly, n_threads=32):
        if info is not None:
            found[info.uri] = info
    return [found.get(uri) or storage.ObjectInfo(uri, 0, storage.MISSING, None) for uri in uris]


def _look_up_in(folder: str, names: list[str]) -> dict[str, storage.ObjectInfo]:
    wanted, last = set(names), max(names)
    found: dict[str, storage.ObjectInfo] = {}
    try:
        for each in storage.list_objects(folder):
            if each.uri in wanted:
                found[each.uri] = each
            if each.uri >= last:
                break
    except Fatal:
        return {}
    return found


# ---------------------------------------------------------------- durations


def estimate_durations(
    recordings: Iterable[Recording], headerless: Headerless | None = None
) -> Recordings:
    """Give every recording a duration in seconds, in the order given; for planning only.

    Local recordings are probed one by one (64 KiB each). Of remote ones, up to
    `N_SAMPLED_PER_EXTENSION` of every extension are, spread evenly over the archive, and their
    median bytes per second stands for the others. What cannot be probed is judged by its size.
    Never less than `SHORTEST_S`, never more than the size allows; the same input gives the same
    result. An object that cannot be read is no error here: it ends as a failed row later.
    """
    recordings = Recordings.of(recordings)
    extensions: dict[str, int] = {}
    code_of = np.fromiter(
        (extensions.setdefault(_extension(r.uri), len(extensions)) for r in recordings),
        np.int64,
        len(recordings),
    )
    seconds = np.full(len(recordings), math.nan)
    probe = functools.partial(_probe, headerless=headerless)
    to_probe = _to_probe(recordings, code_of)
    for start in range(0, len(to_probe), _PROBED_AT_ONCE):
        some = to_probe[start : start + _PROBED_AT_ONCE]
        seconds[some] = in_threads(probe, list(recordings.take(some)), n_threads=8)
    sizes = recordings.sizes
    rate_of = np.array([_typical_rate(extension) for extension in extensions])
    for code in np.unique(code_of[~np.isnan(seconds)]):
        probed = (code_of == code) & ~np.isnan(seconds)
        rate_of[code] = np.median(sizes[probed] / seconds[probed])
    by_size = np.array([]) if not len(sizes) else sizes / rate_of[code_of]
    likely = np.where(np.isnan(seconds), by_size, seconds)
    return recordings.with_durations(
        np.maximum(SHORTEST_S, np.minimum(likely, sizes / LEAST_BYTES_PER_SECOND))
    )


def _to_probe(recordings: Recordings, code_of: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Which ones, by their place; `code_of` tells their extensions apart."""
    is_remote = np.fromiter(
        (storage.is_remote(r.uri) for r in recordings), np.bool_, len(recordings)
    )
    has_bytes = recordings.sizes > 0
    chosen = [np.flatnonzero(has_bytes & ~is_remote)]
    order = recordings.order()
    order = order[(has_bytes & is_remote)[order]]
    for code in np.unique(code_of[order]):
        alike = order[code_of[order] == code]
        n = min(N_SAMPLED_PER_EXTENSION, len(alike))
        chosen.append(alike[np.arange(n) * len(alike) // n])
    return np.concatenate(chosen)


def _probe(recording: Recording, headerless: Headerless | None) -> float:
    """Seconds by the head of the file; NaN if it does not tell."""
    # Here, not at the head: listing alone is spared the seconds that torch takes to load.
    from transcribe import headers, probe

    try:
        head = storage.read_range(recording.uri, 0, headers.HEAD_BYTES)
    except (BadAudio, Transient):
        return math.nan
    seconds = probe.probe_seconds(head, recording.size_bytes, recording.uri, headerless)
    usable = seconds is not None and math.isfinite(seconds) and seconds > 0
    return seconds if usable and seconds is not None else math.nan


def _typical_rate(extension: str) -> float:
    return TYPICAL_BYTES_PER_SECOND.get(extension, OTHERWISE_BYTES_PER_SECOND)


def in_threads(function: Callable[[A], B], items: Sequence[A], n_threads: int) -> list[B]:
    """Map in threads, in order, in slices: a million futures would outweigh what they compute."""
    size = max(1, min(256, len(items) // (4 * n_threads)))
    slices = [items[i : i + size] for i in range(0, len(items), size)]
    with ThreadPoolExecutor(n_threads) as pool:
        mapped = pool.map(lambda some: [function(each) for each in some], slices)
        return [result for some in mapped for result in some]
