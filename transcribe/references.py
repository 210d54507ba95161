"""A file of references -> which row of OUT each is the reference of.

Owns: what a file of references looks like, and how its names are matched to the uris of rows.
Must not know: how texts are compared, how rows are stored.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from transcribe import storage
from transcribe.archive import MANIFESTS, is_text, manifest_rows, resolved
from transcribe.errors import Fatal

ONE_KIND = "all"


@dataclass(frozen=True, slots=True)
class Reference:
    """What is known of one recording.

    Attributes:
        uri: absolute; a relative one in the file is below the file's folder.
        text: everything that was said; empty if nobody speaks, None if it is not known.
        language: language tag; None if the file says none.
        kind: the group the recording is counted in.
    """

    uri: str
    text: str | None
    language: str | None
    kind: str


def read_references(file: str) -> list[Reference]:
    """Read a CSV, JSONL or Parquet file, in its order.

    Its columns: `uri` or `path`; `reference` or `text`; `language` and `kind` as one likes;
    others are passed over. A field left empty in a CSV file says that nobody speaks.

    Raises:
        Fatal: there is no such file, it cannot be read, or it lacks a column.
        Transient: the store does not answer, after retries.
    """
    url = storage.absolute(file)
    if PurePosixPath(url).suffix.lower() not in MANIFESTS:
        raise Fatal(f"--reference {file}: must end in {', '.join(sorted(MANIFESTS))}")
    if storage.info(url) is None:
        raise Fatal(f"--reference {file}: there is no such file, or it may not be read")
    folder = url.rpartition("/")[0] or "/"
    rows = list(manifest_rows(url, ("uri", "path")))
    if not rows:
        raise Fatal(f"--reference {file} has no rows; write one for each recording")
    if not any("reference" in row or "text" in row for row in rows):
        found = ", ".join(sorted(rows[0]))
        raise Fatal(f"--reference {file}: no column `reference` or `text` (found: {found}); add it")
    return [_reference(url, row, folder) for row in rows]


def _reference(url: str, row: dict[str, Any], folder: str) -> Reference:
    name = "reference" if "reference" in row else "text"
    for column in (name, "language", "kind"):
        value = row.get(column)
        if value is not None and not is_text(value):
            raise Fatal(f"{url}: `{column}` of {row['uri']} must be text")
    return Reference(
        uri=resolved(row["uri"], folder),
        text=row.get(name),
        language=row.get("language") or None,
        kind=row.get("kind") or ONE_KIND,
    )


def match(references: Collection[str], rows: Iterable[str]) -> dict[str, str]:
    """Find the row of each reference: the same uri, else the longest common end of the path.

    The end is counted in whole levels from the file name on, so that references written on
    another machine, or before the archive was moved, find their recordings. A row has one
    reference at most; the longer end wins.

    Args:
        references: absolute uris, each once.
        rows: uris of the rows.

    Returns:
        The row's uri by the reference's; a reference without a row is left out.

    Raises:
        Fatal: an end fits several references or several rows.
    """
    rows = set(rows)
    matched = {uri: uri for uri in references if uri in rows}
    names = {_levels(uri)[-1] for uri in references}
    left = {uri: _levels(uri) for uri in references if uri not in matched}
    free = {uri: _levels(uri) for uri in rows - matched.keys() if _levels(uri)[-1] in names}
    deepest = min((max(map(len, side.values()), default=0) for side in (left, free)), default=0)
    for depth in range(deepest, 0, -1):
        wanted, offered = _by_ending(left, depth), _by_ending(free, depth)
        for ending in wanted.keys() & offered.keys():
            if len(wanted[ending]) > 1 or len(offered[ending]) > 1:
                raise _ambiguous("/".join(ending), wanted[ending], offered[ending])
            (reference,), (row,) = wanted[ending], offered[ending]
            matched[reference] = row
            del left[reference], free[row]
    return matched


def _levels(uri: str) -> tuple[str, ...]:
    # Windows separates by backslashes; macOS writes accents as characters of their own.
    path = unicodedata.normalize("NFC", uri.removeprefix("file://"))
    return tuple(re.split(r"[/\\]", path))


def _by_ending(uris: dict[str, tuple[str, ...]], depth: int) -> dict[tuple[str, ...], list[str]]:
    found: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for uri, levels in uris.items():
        if len(levels) >= depth:
            found[levels[-depth:]].append(uri)
    return found


def _ambiguous(ending: str, references: list[str], rows: list[str]) -> Fatal:
    if len(rows) > 1:
        first, second = sorted(rows)[:2]
        fits = f"the reference {min(references)} fits the rows {first} and {second}"
    else:
        first, second = sorted(references)[:2]
        fits = f"the references {first} and {second} fit the row {rows[0]}"
    return Fatal(
        f"It is not clear which recording is meant by `{ending}`: {fits};"
        " write absolute uris into the reference file."
    )
