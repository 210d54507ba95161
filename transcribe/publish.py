"""Shard results -> Parquet files, and what is already there.

Owns the layout of OUT and the rules that keep it right: a shard's file appears whole or not
at all, its name comes from the shard's content, and one recording ends with one row. Knows
nothing of audio or Ray.

    OUT/settings.json            what the transcripts were made with; one OUT, one settings
    OUT/transcripts/<shard>.parquet
    OUT/runs/<run_id>/           config.json, log.txt, progress.json, metrics.parquet, report.json,
                                 report.html
    OUT/runs/alive-<...>.json    while a run is at work; see claims.py
"""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from transcribe import schema, storage
from transcribe.archive import in_threads
from transcribe.config import fingerprint
from transcribe.errors import Fatal, Transient

Row = dict[str, Any]


def transcripts_url(out: str) -> str:
    """Folder of the transcripts."""
    return storage.join(out, "transcripts")


def run_url(out: str, run_id: str, name: str) -> str:
    """A file of one run."""
    return storage.join(out, "runs", run_id, name)


def parquet_bytes(rows: Sequence[Row], table_schema: pa.Schema) -> bytes:
    """Rows as one zstd-compressed Parquet file."""
    return _table_bytes(pa.Table.from_pylist(list(rows), schema=table_schema))


def _table_bytes(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def publish_shard(out: str, shard_id: str, rows: Sequence[Row]) -> str:
    """Write one shard's transcripts in one atomic step; returns the file's URL."""
    url = storage.join(transcripts_url(out), f"{shard_id}.parquet")
    storage.put(url, parquet_bytes(rows, schema.TRANSCRIPT))
    return url


@dataclass(frozen=True, slots=True)
class Content:
    """What is known of the bytes behind a published row; the fields are columns of it."""

    recording_id: str
    uri: str
    size_bytes: int
    content_md5: str
    error_kind: str | None
    duplicate_of: str | None


@dataclass(frozen=True, slots=True)
class Published:
    """Where each published row is.

    Attributes:
        table: parallel columns, newest row last; `file` is an index into `files`.
        files: URLs of the transcript files, sorted.
    """

    table: pa.Table
    files: list[str]

    @property
    def recording_ids(self) -> pa.Array:
        """Ids of the recordings with a row, but for those that their store refused to give.

        Rights are granted and stores mended without the object changing: those are tried again.
        """
        newest = self.table.group_by("recording_id", use_threads=False).aggregate(
            [("error_kind", "last", pc.ScalarAggregateOptions(skip_nulls=False))]
        )
        refused = pc.is_in(newest["error_kind_last"], pa.array(_OF_THE_STORE))
        return newest.filter(pc.invert(refused))["recording_id"]

    @property
    def counts(self) -> dict[str, int]:
        """Number of rows by status."""
        counts: dict[str, int] = {"ok": 0, "empty": 0, "failed": 0}
        for entry in pc.value_counts(self.table["status"]).to_pylist():
            counts[entry["values"]] = counts.get(entry["values"], 0) + entry["counts"]
        return counts

    def lacking(self, uris: Iterable[str]) -> list[str]:
        """Those of `uris` without a row, in their order."""
        wanted = pa.array(uris, pa.string())
        has_row = pc.is_in(wanted, value_set=self.table["uri"])
        lacking: list[str] = wanted.filter(pc.invert(has_row)).to_pylist()
        return lacking

    def contents(self, sizes: npt.NDArray[np.int64]) -> Iterator[Content]:
        """The rows of recordings of one of these sizes whose MD5 is known."""
        wanted = pc.is_in(self.table["size_bytes"], pa.array(sizes, pa.int64()))
        known = pc.and_(wanted, pc.is_valid(self.table["content_md5"]))
        columns = [field.name for field in fields(Content)]
        for batch in self.table.filter(known).select(columns).to_batches(max_chunksize=4096):
            yield from (Content(**row) for row in batch.to_pylist())


_OF_THE_STORE = ("forbidden", "unreadable")

_INDEX_COLUMNS = [*(field.name for field in fields(Content)), "status", "transcribed_at"]


def read_published(out: str) -> Published:
    """Index every published row by recording, without its text.

    Raises:
        Fatal: a transcript file cannot be read.
    """
    return _index(_transcript_files(out))


def _index(urls: Iterable[str]) -> Published:
    files = sorted(urls)
    number = {url: i for i, url in enumerate(files)}
    empty = pa.schema([*(schema.TRANSCRIPT.field(c) for c in _INDEX_COLUMNS), ("file", pa.int32())])
    parts, some = [empty.empty_table()], []
    for url, table in _tables(files, _INDEX_COLUMNS):
        in_file = pa.array(np.full(len(table), number[url], np.int32))
        some.append(table.append_column("file", in_file))
        if len(some) == _READ_AHEAD:
            parts.append(_in_one_piece(some))
            some = []
    table = pa.concat_tables([*parts, *some])
    # The file decides between rows of one moment, so that every run picks the same.
    table = table.sort_by([("transcribed_at", "ascending"), ("file", "ascending")])
    return Published(table, files)


def _in_one_piece(tables: Sequence[pa.Table]) -> pa.Table:
    """A table of ten rows takes as much memory as ten times as many in one with others."""
    return pa.concat_tables(tables).combine_chunks()


def read_rows(published: Published, uris: set[str], columns: Sequence[str]) -> list[Row]:
    """The newest row of each of `uris`, in the order of their uris; other files stay unread.

    Args:
        published: the index of what is there, from `read_published`.
        uris: which recordings; one without a row is passed over.
        columns: wanted besides `uri`.

    Raises:
        Fatal: a transcript file cannot be read.
    """
    index = published.table
    index = index.filter(pc.is_in(index["uri"], pa.array(list(uris), pa.string())))
    newest = {
        uri: (recording_id, published.files[file])
        for uri, recording_id, file in zip(
            *(index[name].to_pylist() for name in ("uri", "recording_id", "file")), strict=True
        )
    }
    found: dict[str, Row] = {}
    for file in sorted({url for _, url in newest.values()}):
        for row in _read(file, ["uri", "recording_id", *columns]).to_pylist():
            if newest.get(row["uri"]) == (row["recording_id"], file):
                found[row["uri"]] = row
    return [found[uri] for uri in sorted(found)]


def read_whole_rows(out: str, recording_ids: Collection[str]) -> Iterator[Row]:
    """The newest rows of these recordings, whole, file by file; those without one are left out."""
    published = read_published(out)
    table = published.table
    table = table.filter(
        pc.is_in(table["recording_id"], pa.array(list(recording_ids), pa.string()))
    )
    ids, files = table["recording_id"].to_pylist(), table["file"].to_pylist()
    newest = dict(zip(ids, files, strict=True))
    ids_in: dict[int, list[str]] = {}
    for recording_id, file in newest.items():
        ids_in.setdefault(file, []).append(recording_id)
    for file, here in sorted(ids_in.items()):
        rows = _read_if_there(published.files[file])
        if rows is None:
            continue
        wanted = pc.is_in(rows["recording_id"], pa.array(here, pa.string()))
        yield from rows.filter(wanted).to_pylist()


def _transcript_files(out: str) -> dict[str, str]:
    """Every transcript file's URL with its version."""
    folder = transcripts_url(out)
    if not storage.exists(folder):
        return {}
    found = {o.uri: o.version for o in storage.list_objects(folder)}
    if folder in found:
        raise Fatal(f"{folder} is a file, and transcripts go into a folder there; move it away.")
    return {url: version for url, version in found.items() if url.endswith(".parquet")}


def _tables(urls: Sequence[str], columns: list[str]) -> Iterator[tuple[str, pa.Table]]:
    """Those files that are still there, in order; a store is asked for many of them at once."""
    read = partial(_read_if_there, columns=columns)
    for start in range(0, len(urls), _READ_AHEAD):
        some = urls[start : start + _READ_AHEAD]
        for url, table in zip(some, in_threads(read, some, _READERS), strict=True):
            if table is not None:
                yield url, table


_READERS = 32  # threads: they wait for the store
_READ_AHEAD = 1024


def _read_if_there(url: str, columns: list[str] | None = None) -> pa.Table | None:
    """As `_read`; None if another run has settled the file away since it was listed."""
    try:
        return _read(url, columns)
    except Fatal:
        if storage.info(url) is None:
            return None
        raise


def _read(url: str, columns: list[str] | None = None) -> pa.Table:
    """A transcript file's table, with all of `columns` (default: of the schema) in place."""
    try:
        # Not in pyarrow's threads: one that still lets go of `source`, a Python file, while the
        # interpreter ends aborts the process, and its exit code is lost. Not by `read_table`,
        # which goes through pyarrow's datasets and takes twice as long for a small file.
        with (
            storage.open_parquet_source(url) as source,
            pq.ParquetFile(source, pre_buffer=False) as file,
        ):
            table = file.read(columns, use_threads=False)
        table.validate(full=True)
    except (pa.ArrowException, OSError, UnicodeError) as error:
        # pyarrow says most damage as an OSError without a number; one with a number is the disk's.
        if isinstance(error, OSError) and error.errno is not None:
            raise Fatal(f"{url} cannot be read ({error.strerror}); try again later.") from None
        raise _not_ours(url, str(error).partition("\n")[0]) from None
    for name in columns or schema.TRANSCRIPT.names:
        # pyarrow passes over a wanted column that is not there.
        if name not in table.column_names:
            raise _not_ours(url, f"it has no column {name}")
        if table.schema.field(name).type != schema.TRANSCRIPT.field(name).type:
            raise _not_ours(url, f"its column {name} has another type")
    return table


def _not_ours(url: str, reason: str) -> Fatal:
    return Fatal(
        f"{url} is not a transcript file of this program ({reason.rstrip('.')});"
        " move it away, and its recordings will be transcribed again."
    )


@dataclass(frozen=True, slots=True)
class Settled:
    """What `settle` left: one row for each recording, and how many it took away."""

    published: Published
    removed: int


def settle(out: str) -> Settled:
    """Leave one row for each recording: the newest row of a URI wins.

    A changed object, a shard that a dying cluster published late, or another run at work in the
    same OUT leaves an older row behind. Files that hold such rows are rewritten without them, each
    in one atomic step, so that a run that ends in the middle of this loses nothing.

    Two runs may settle at once, or one while another publishes: a row is only dropped from the
    very version of the file in which it was seen beside a newer one (a condition that the store
    checks), so the newest row of a URI is never dropped by anybody.

    Raises:
        Fatal: a transcript file cannot be read.
        Transient: files changed each time they had been looked at.
    """
    removed = 0
    for _ in range(_SETTLE_ROUNDS):
        published, dropped, is_settled = _settle_once(out)
        removed += dropped
        if is_settled:
            return Settled(published, removed)
    raise Transient(f"other runs keep changing {transcripts_url(out)}; run the same command again")


_SETTLE_ROUNDS = 20


def _settle_once(out: str) -> tuple[Published, int, bool]:
    """Drop what is superseded: what stays, how much went, and whether nobody came between."""
    versions = _transcript_files(out)  # before they are read: what is newer is left alone
    published = _index(versions)
    table, files = published.table, published.files
    is_newest = _is_newest(table)
    stale_rows = pc.value_counts(table["file"].filter(pc.invert(is_newest)))
    if not len(stale_rows):
        return published, 0, True
    dropped = []
    for entry in stale_rows.to_pylist():
        url = files[entry["values"]]
        keep = table.filter(pc.and_(is_newest, pc.equal(table["file"], entry["values"])))
        if _rewrite(url, versions[url], set(_names(keep))):
            dropped.append(entry["counts"])
    stays = Published(table.filter(is_newest), files)
    return stays, sum(dropped), len(dropped) == len(stale_rows)


def _is_newest(table: pa.Table) -> pa.Array:
    """Whether each row is the last one of its URI."""
    numbered = table.select(["uri"]).append_column("row", pa.array(np.arange(len(table))))
    newest = numbered.group_by("uri", use_threads=False).aggregate([("row", "max")])["row_max"]
    is_newest = np.zeros(len(table), bool)
    is_newest[newest.to_numpy()] = True
    return pa.array(is_newest)


def _names(table: pa.Table) -> list[tuple[str, str]]:
    """Id and URI of each row."""
    ids, uris = (table[c].to_pylist() for c in ("recording_id", "uri"))
    return list(zip(ids, uris, strict=True))


def _rewrite(url: str, version: str, keep: set[tuple[str, str]]) -> bool:
    """Leave `keep` in a file; False if it is not of this version any more."""
    if not keep:
        return storage.delete_if(url, version)
    table = _read_if_there(url)
    if table is None:
        return False
    mask = pa.array([name in keep for name in _names(table)], pa.bool_())
    return storage.put_if(url, _table_bytes(table.filter(mask)), version) is not None


def check_settings(out: str, settings: dict[str, Any]) -> bool:
    """Whether OUT is already claimed for `settings`; nothing is written.

    Raises:
        Fatal: OUT was begun with others, or with nobody knows which; the sentence says so.
    """
    url = storage.join(out, "settings.json")
    if not storage.exists(url):
        _check_rows(out, fingerprint(settings))
        return False
    try:
        before = json.loads(storage.read(url))
    except (ValueError, RecursionError):
        raise Fatal(f"{url} is damaged (not JSON); restore it or choose another OUT.") from None
    if not isinstance(before, dict):
        raise Fatal(f"{url} is damaged (not a JSON object); restore it or choose another OUT.")
    differing = sorted(k for k in {*settings, *before} if settings.get(k) != before.get(k))
    if differing:
        changes = "; ".join(
            f"{k}: {before.get(k)!r} there, {settings.get(k)!r} now" for k in differing
        )
        raise Fatal(
            f"{out} holds transcripts made with other settings ({changes})."
            " Use the same settings to go on with it, or another OUT."
        )
    return True


def _check_rows(out: str, ours: str) -> None:
    """Where settings.json is lost, the rows still tell whether they were made with the same.

    Raises:
        Fatal: they were not.
    """
    for url, table in _tables(sorted(_transcript_files(out)), ["config_fingerprint"]):
        others = set(table["config_fingerprint"].to_pylist()) - {ours}
        if others:
            raise Fatal(
                f"{out} has lost its settings.json, and holds transcripts made with other settings"
                f" ({url}: config_fingerprint {min(map(str, others))}, not {ours})."
                " Use the same settings to go on with it, or another OUT."
            )


def claim_settings(out: str, settings: dict[str, Any]) -> None:
    """Make sure that everything in OUT is made with the same settings.

    Raises:
        Fatal: OUT was begun with others; the sentence names what differs.
    """
    if not check_settings(out, settings):
        url = storage.join(out, "settings.json")
        storage.put(url, json.dumps(settings, indent=2, sort_keys=True).encode())
