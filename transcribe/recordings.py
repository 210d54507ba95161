"""Recordings by the million: in columns, some 200 bytes each on the driver instead of 600.

Owns what is known of a recording before it is opened, and how many of them are held. Pure.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

_BATCH = 4096


@dataclass(frozen=True, slots=True)
class Recording:
    """One audio object of the archive.

    Attributes:
        recording_id: 32 hex digits of SHA-256 over (uri, generation, size): a replaced object is
            another recording.
        uri: absolute local path or full URL.
        generation: `storage.ObjectInfo.version`; "missing" if there is no object.
        size_bytes: length of the object.
        content_md5: hex digest when the store gives one, or once the bytes were read.
        metadata: the other columns of the manifest as a JSON object; None without a manifest.
        duration_s: estimated seconds, for planning only, never published.
    """

    recording_id: str
    uri: str
    generation: str
    size_bytes: int
    content_md5: str | None
    metadata: str | None
    duration_s: float


_SCHEMA = pa.schema(
    [
        ("recording_id", pa.string()),
        ("uri", pa.large_string()),
        ("generation", pa.string()),
        ("size_bytes", pa.int64()),
        ("content_md5", pa.string()),
        ("metadata", pa.large_string()),
        ("duration_s", pa.float64()),
    ]
)
_values = attrgetter(*(field.name for field in fields(Recording)))


class Recordings(Sequence[Recording]):
    """A sequence of recordings; each is made when it is looked at. Slices share the columns.

    A slice is no more than two numbers: one of pyarrow's takes 3 KB, and a shard holds ten rows.
    """

    __slots__ = ("_first", "_n", "_whole")

    def __init__(self, table: pa.Table, first: int = 0, n: int | None = None) -> None:
        self._whole = table
        self._first = first
        self._n = table.num_rows - first if n is None else n

    @property
    def _table(self) -> pa.Table:
        if self._n == self._whole.num_rows:
            return self._whole
        return self._whole.slice(self._first, self._n)

    @classmethod
    def of(cls, recordings: Iterable[Recording]) -> Recordings:
        """Take recordings in, one by one."""
        if isinstance(recordings, Recordings):
            return recordings
        rows = map(_values, recordings)
        batches = []
        while batch := list(itertools.islice(rows, _BATCH)):
            batches.append(_batch(batch))
        table = pa.Table.from_batches(batches, _SCHEMA).combine_chunks()
        del batches
        pa.default_memory_pool().release_unused()  # as much again, which it would keep
        return cls(table)

    def __len__(self) -> int:
        return int(self._n)

    def __iter__(self) -> Iterator[Recording]:
        for batch in self._table.to_batches(max_chunksize=_BATCH):
            columns = [column.to_pylist() for column in batch.columns]
            yield from map(Recording, *columns)

    @overload
    def __getitem__(self, index: int) -> Recording: ...
    @overload
    def __getitem__(self, index: slice) -> Recordings: ...
    def __getitem__(self, index: int | slice) -> Recording | Recordings:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                return self.take(np.arange(start, stop, step))
            return Recordings(self._whole, self._first + start, max(0, stop - start))
        at = range(len(self))[index]
        return next(iter(self[at : at + 1]))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return NotImplemented if not isinstance(other, Sequence) else False
        return all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # like a list

    def __reduce__(self) -> tuple[Any, ...]:
        # Not the table itself: a slice of it would take all of its columns along.
        return _rebuilt, (list(map(_values, self)),)

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Lengths in bytes."""
        sizes: npt.NDArray[np.int64] = self._table["size_bytes"].to_numpy()
        return sizes

    @property
    def durations(self) -> npt.NDArray[np.float64]:
        """Estimated seconds."""
        durations: npt.NDArray[np.float64] = self._table["duration_s"].to_numpy()
        return durations

    def with_durations(self, seconds: npt.NDArray[np.float64]) -> Recordings:
        """The same recordings with other durations."""
        column = _SCHEMA.get_field_index("duration_s")
        return Recordings(self._table.set_column(column, "duration_s", pa.array(seconds)))

    def order(self) -> npt.NDArray[np.int64]:
        """Where the recordings are in order of their uri, then of their id."""
        uris = self._table["uri"]
        if pc.all(pc.less(uris[:-1], uris[1:])).as_py() is not False:
            return np.arange(len(self))
        keys = [("uri", "ascending"), ("recording_id", "ascending")]
        order: npt.NDArray[np.uint64] = pc.sort_indices(self._table, sort_keys=keys).to_numpy()
        return order.astype(np.int64)

    def sorted(self) -> Recordings:
        """In order of their uri, then of their id."""
        order = self.order()
        in_order = (order[1:] > order[:-1]).all()
        return self if in_order else self.take(order)

    def take(self, indices: npt.NDArray[np.int64]) -> Recordings:
        """Some of them."""
        return Recordings(self._table.take(pa.array(indices)).combine_chunks())

    def without(self, recording_ids: pa.ChunkedArray | pa.Array) -> Recordings:
        """All but those with one of these ids."""
        if not len(recording_ids):
            return self
        gone = pc.is_in(self._table["recording_id"], recording_ids)
        return Recordings(self._table.filter(pc.invert(gone)).combine_chunks())


def _batch(rows: Sequence[tuple[Any, ...]]) -> pa.RecordBatch:
    columns = zip(*rows, strict=True)
    return pa.RecordBatch.from_arrays(
        [pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)],
        schema=_SCHEMA,
    )


def _rebuilt(rows: Sequence[tuple[Any, ...]]) -> Recordings:
    return Recordings.of(Recording(*row) for row in rows)
