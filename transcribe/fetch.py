"""Recordings -> their bytes, read ahead: in memory, or in a local file if there are many.

Owns what is held of objects while they wait to be decoded. Must not know audio, engines or Ray.

Small objects are read some at a time, which hides a bucket's latency. A large one is fetched when
its turn comes, into a temporary file that goes with it; a large local file is read where it lies.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from transcribe import storage
from transcribe.archive import Recording
from transcribe.errors import BadAudio, Fatal

HELD_BYTES = 32 << 20  # of one object in memory
_READ_AHEAD = 4
_STEP_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Fetched:
    """The bytes of a recording as they are now, which may not be those that were listed.

    Attributes:
        content: the bytes, or the local file that holds them.
        size_bytes: how many.
        md5: of the bytes, hex.
    """

    content: bytes | Path
    size_bytes: int
    md5: str


def fetch(recordings: Sequence[Recording]) -> Iterator[tuple[Recording, Fetched | BadAudio]]:
    """Each recording with its bytes, or why they cannot be had.

    A file is there until the next recording is asked for.

    Raises:
        Transient: the storage stayed unreachable through all retries.
        Fatal: no room for a temporary file.
    """
    with ThreadPoolExecutor(_READ_AHEAD) as pool:
        ahead: deque[tuple[Recording, Future[Fetched | BadAudio] | None]] = deque()
        for recording in recordings:
            is_large = recording.size_bytes > HELD_BYTES
            ahead.append((recording, None if is_large else pool.submit(_read, recording)))
            if len(ahead) > _READ_AHEAD:
                yield from _next(ahead)
        while ahead:
            yield from _next(ahead)


def _next(
    ahead: deque[tuple[Recording, Future[Fetched | BadAudio] | None]],
) -> Iterator[tuple[Recording, Fetched | BadAudio]]:
    recording, reading = ahead.popleft()
    if reading is not None:
        yield recording, reading.result()
        return
    with tempfile.TemporaryDirectory(prefix="transcribe-") as folder:
        yield recording, _fetch_large(recording, Path(folder) / "recording")


def _read(recording: Recording) -> Fetched | BadAudio:
    try:
        data = storage.read(recording.uri, recording.size_bytes)
    except BadAudio as problem:
        return problem
    return Fetched(data, len(data), hashlib.md5(data, usedforsecurity=False).hexdigest())


def _fetch_large(recording: Recording, path: Path) -> Fetched | BadAudio:
    """The object in a file: the very one if it is local, else a copy at `path`."""
    local = storage.local_path(recording.uri)
    digest = hashlib.md5(usedforsecurity=False)
    n_bytes = 0
    try:
        with nullcontext() if local is not None else path.open("xb") as copy:
            while data := storage.read_range(
                recording.uri, n_bytes, _STEP_BYTES, recording.generation
            ):
                digest.update(data)
                n_bytes += len(data)
                if copy is not None:
                    copy.write(data)
    except BadAudio as problem:
        return problem
    except OSError as error:
        raise Fatal(
            f"no room for a copy of {recording.uri} on this worker ({error.strerror});"
            " free some space, or set TMPDIR to a larger disk."
        ) from error
    return Fetched(local or path, n_bytes, digest.hexdigest())
