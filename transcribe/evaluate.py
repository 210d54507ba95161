"""`transcribe score`: the rows of OUT against references, counted in groups.

Owns: which rows are compared with which text, what is left out and counted, the groups, and the
JSON form of the result. How two texts differ is in `score.py`, wording in `scoreboard.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from transcribe import publish, storage
from transcribe.errors import Fatal
from transcribe.references import Reference, match, read_references
from transcribe.score import Comparison, Score, compare, pooled, primary_subtag

UNKNOWN_LANGUAGE = "unknown"


@dataclass(frozen=True, slots=True)
class Scored:
    """One recording beside its reference.

    Attributes:
        kind: the reference's.
        language: of the reference, else as detected; without region or script.
        status: the row's; a `failed` one has no text, so all words of its reference are deleted.
        duration_s: seconds; 0 of a failed row.
    """

    uri: str
    kind: str
    language: str
    status: str
    duration_s: float
    comparison: Comparison

    @property
    def score(self) -> Score:
        """Its errors."""
        return self.comparison.score

    @property
    def is_spoken(self) -> bool:
        """Whether the reference has any word; without one there is no rate, only invention."""
        return self.score.words > 0


@dataclass(frozen=True, slots=True)
class Group:
    """Errors of some recordings: those with words, and apart from them those without.

    Attributes:
        spoken: recordings whose reference has words.
        n_silent: recordings whose reference is empty.
        silent_s: seconds of these.
        invented: words written for these.
    """

    spoken: Score
    n_silent: int
    silent_s: float
    invented: int

    @property
    def invented_per_minute(self) -> float:
        """Words written per minute in which nobody speaks; nan without such a minute."""
        return 60 * self.invented / self.silent_s if self.silent_s else math.nan


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What came out, and what went in.

    Attributes:
        recordings: in order of their uri.
        references: entries of the file.
        repeated: of these naming a recording again; the first one counts.
        unknown: of these with null for a text; skipped.
        without_row: of these with a text, but without a row.
        by_ending: compared ones that matched by the end of their path only.
        rows_without_reference: rows of OUT that no entry names.
    """

    out: str
    file: str
    recordings: list[Scored]
    references: int
    repeated: int
    unknown: int
    without_row: int
    by_ending: int
    rows_without_reference: int

    @property
    def failed(self) -> int:
        """Compared rows that failed."""
        return sum(r.status == "failed" for r in self.recordings)

    @property
    def total(self) -> Group:
        """All recordings."""
        return _group(self.recordings)

    @property
    def kinds(self) -> dict[str, Group]:
        """The recordings by kind."""
        return _grouped(self.recordings, lambda r: r.kind)

    @property
    def languages(self) -> dict[str, Group]:
        """The recordings by language."""
        return _grouped(self.recordings, lambda r: r.language)


def evaluate(out: str, file: str) -> Evaluation:
    """Compare the rows of OUT with the references in `file`.

    Raises:
        Fatal: there is no OUT or nothing in it, the file cannot be used, no reference matches a
            row or it is not clear which one, or the `score` extra is not installed.
        Transient: a store stayed out of reach through all retries.
    """
    out = storage.absolute(out)
    entries = read_references(file)
    references: dict[str, Reference] = {}
    for entry in entries:
        references.setdefault(entry.uri, entry)
    published = _published(out)
    uris = set(published.table["uri"].to_pylist())
    matched = match(references, uris)
    if not matched:
        raise Fatal(
            f"no reference in {file} matches a row of {out}; its `uri` must be the recording's"
            f" path, for example {min(uris)}"
        )
    wanted = {row: references[uri] for uri, row in matched.items()}
    known = {row: reference for row, reference in wanted.items() if reference.text is not None}
    if not known:
        raise Fatal(f"no reference in {file} of a row of {out} has a text; all are null")
    columns = ("status", "language", "duration", "text")
    return Evaluation(
        out=out,
        file=file,
        recordings=[
            _scored(row, known[row["uri"]])
            for row in publish.read_rows(published, set(known), columns)
        ],
        references=len(entries),
        repeated=len(entries) - len(references),
        unknown=sum(r.text is None for r in references.values()),
        without_row=sum(r.text is not None for u, r in references.items() if u not in matched),
        by_ending=sum(reference.uri != row for row, reference in known.items()),
        rows_without_reference=len(uris - set(matched.values())),
    )


def _published(out: str) -> publish.Published:
    if not storage.exists(out):
        raise Fatal(f"there is no {out}; name the OUT of a run")
    published = publish.read_published(out)
    if not len(published.table):
        raise Fatal(f"{out} has no transcripts; name the OUT of a run that has published some")
    return published


def _scored(row: dict[str, Any], reference: Reference) -> Scored:
    assert reference.text is not None
    language = primary_subtag(reference.language) or row["language"]
    return Scored(
        uri=row["uri"],
        kind=reference.kind,
        language=language or UNKNOWN_LANGUAGE,
        status=row["status"],
        duration_s=row["duration"] or 0.0,
        comparison=compare(reference.text, row["text"] or "", language),
    )


def _grouped(recordings: Iterable[Scored], key: Callable[[Scored], str]) -> dict[str, Group]:
    members: dict[str, list[Scored]] = {}
    for recording in recordings:
        members.setdefault(key(recording), []).append(recording)
    return {name: _group(members[name]) for name in sorted(members)}


def _group(recordings: list[Scored]) -> Group:
    silent = [r for r in recordings if not r.is_spoken]
    return Group(
        spoken=pooled(r.score for r in recordings if r.is_spoken),
        n_silent=len(silent),
        silent_s=sum(r.duration_s for r in silent),
        invented=sum(r.score.insertions for r in silent),
    )


# ---------------------------------------------------------------- as JSON


def json_bytes(evaluation: Evaluation) -> bytes:
    """The whole result, every recording with every difference; docs/output.md names the fields."""
    e = evaluation
    content = {
        "out": e.out,
        "reference": e.file,
        "references": e.references,
        "repeated": e.repeated,
        "unknown": e.unknown,
        "without_row": e.without_row,
        "matched_by_ending": e.by_ending,
        "rows_without_reference": e.rows_without_reference,
        "failed": e.failed,
        "total": _group_dict(e.total),
        "kinds": {name: _group_dict(group) for name, group in e.kinds.items()},
        "languages": {name: _group_dict(group) for name, group in e.languages.items()},
        "recordings": [_recording_dict(r) for r in e.recordings],
    }
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False).encode()


def _group_dict(group: Group) -> dict[str, Any]:
    return {
        "recordings": group.spoken.n_recordings,
        **_score_dict(group.spoken),
        "silent_recordings": group.n_silent,
        "silent_seconds": group.silent_s,
        "invented_words": group.invented,
        "invented_words_per_minute": _or_none(group.invented_per_minute),
    }


def _score_dict(score: Score) -> dict[str, Any]:
    return {
        "words": score.words,
        "wer": _or_none(score.wer),
        "substitutions": score.substitutions,
        "deletions": score.deletions,
        "insertions": score.insertions,
        "characters": score.characters,
        "cer": _or_none(score.cer),
        "character_errors": score.character_errors,
    }


def _recording_dict(recording: Scored) -> dict[str, Any]:
    return {
        "uri": recording.uri,
        "kind": recording.kind,
        "language": recording.language,
        "status": recording.status,
        "duration": recording.duration_s,
        **_score_dict(recording.score),
        "differences": _differences(recording.comparison),
    }


def _differences(comparison: Comparison) -> list[dict[str, Any]]:
    """Each with the number of reference words before it."""
    found, at = [], 0
    for piece in comparison.pieces:
        if piece.kind != "equal":
            texts = {"reference": piece.reference, "hypothesis": piece.hypothesis}
            joined = {name: " ".join(words) for name, words in texts.items()}
            found.append({"kind": piece.kind, "at_word": at, **joined})
        at += len(piece.reference)
    return found


def _or_none(ratio: float) -> float | None:
    return None if math.isnan(ratio) else ratio
