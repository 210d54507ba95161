"""What a person sees of a score: counts, tables, and where the worst recordings differ.

Owns wording and formatting: plain lines of text, whole however wide they are. Knows nothing of
where rows and references come from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from rich.cells import cell_len

from transcribe.evaluate import Evaluation, Group, Scored
from transcribe.score import Comparison, Piece

CONTEXT = 3
"""Equal words shown on either side of a difference."""

_LONG_RUN = 16
_MOST_STRETCHES = 8
_LINE_CELLS = 100
_MARKS = {"equal": "", "substitute": "S", "delete": "D", "insert": "I"}


def lines(evaluation: Evaluation, n_worst: int) -> Iterator[str]:
    """Everything there is to say, line by line; `n_worst` recordings in detail."""
    yield from _counts(evaluation)
    yield ""
    yield from _spoken_table(evaluation)
    if evaluation.total.n_silent:
        yield ""
        yield from _silent_table(evaluation)
    wrong = [r for r in evaluation.recordings if r.score.errors]
    worst = sorted(wrong, key=lambda r: (-r.score.errors, r.uri))[:n_worst]
    if worst:
        yield ""
        marks = "S substituted, D deleted, I inserted"
        yield f"Most errors, of {_recordings(len(wrong))} with errors ({marks}):"
    for recording in worst:
        yield ""
        yield from _recording(recording)


def _counts(evaluation: Evaluation) -> Iterator[str]:
    e = evaluation
    yield f"{_recordings(len(e.recordings))} of {e.out} compared with {e.file}."
    for count, what in (
        (e.by_ending, "matched by the end of the path only, not by the whole uri"),
        (e.without_row, "with a reference, but without a row"),
        (e.rows_without_reference, "with a row, but without a reference"),
        (e.unknown, "with null for a reference: unknown, skipped"),
        (e.repeated, "named again in the reference file: the first entry counts"),
        (e.failed, "failed: all words of their references count as deleted"),
    ):
        if count:
            yield f"{_recordings(count)} {what}."


def _recordings(count: int) -> str:
    return f"{count:,} recording" + ("s" if count != 1 else "")


# ---------------------------------------------------------------- tables


def _spoken_table(evaluation: Evaluation) -> Iterator[str]:
    header = "recordings words WER CER substituted deleted inserted".split()
    yield from _group_table(evaluation, header, _spoken_cells)


def _spoken_cells(group: Group) -> list[str] | None:
    s = group.spoken
    if not s.n_recordings:
        return None
    counts = (s.substitutions, s.deletions, s.insertions)
    return [
        f"{s.n_recordings:,}", f"{s.words:,}", _percent(s.wer), _percent(s.cer),
        *(f"{n:,}" for n in counts),
    ]  # fmt: skip


def _silent_table(evaluation: Evaluation) -> Iterator[str]:
    yield "Recordings with an empty reference, in which nobody speaks (not part of the WER):"
    header = ["recordings", "minutes", "words invented", "per minute"]
    yield from _group_table(evaluation, header, _silent_cells)


def _silent_cells(group: Group) -> list[str] | None:
    if not group.n_silent:
        return None
    rate = group.invented_per_minute
    return [
        f"{group.n_silent:,}", f"{group.silent_s / 60:,.1f}", f"{group.invented:,}",
        "-" if math.isnan(rate) else f"{rate:,.2f}",
    ]  # fmt: skip


def _group_table(
    evaluation: Evaluation, header: Sequence[str], cells: Callable[[Group], list[str] | None]
) -> Iterator[str]:
    """A line for each kind, each language, and all together; groups without cells are left out."""
    rows = [["", *header]]
    for title, groups in (("kind", evaluation.kinds), ("language", evaluation.languages)):
        rows += [
            [f"{title} {name}", *found]
            for name, group in groups.items()
            if (found := cells(group)) is not None
        ]
    rows.append(["total", *(cells(evaluation.total) or ["0", *["-"] * (len(header) - 1)])])
    widths = [max(cell_len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for name, *figures in rows:
        aligned = [_left(name, widths[0])]
        aligned += [f"{figure:>{w}}" for figure, w in zip(figures, widths[1:], strict=True)]
        yield "  ".join(aligned)


def _percent(ratio: float) -> str:
    return "-" if math.isnan(ratio) else f"{ratio:.1%}"


def _left(text: str, cells: int) -> str:
    return text + " " * (cells - cell_len(text))


# ---------------------------------------------------------------- differences


def _recording(recording: Scored) -> Iterator[str]:
    score = recording.score
    rate = f"WER {_percent(score.wer)}, " if recording.is_spoken else "nobody speaks, "
    failed = ", failed" if recording.status == "failed" else ""
    yield (
        f"{recording.uri}: {rate}{score.errors:,} errors in {score.words:,} words"
        f" ({score.substitutions} S, {score.deletions} D, {score.insertions} I){failed}"
    )
    stretches = differing_stretches(recording.comparison)
    for stretch in stretches[:_MOST_STRETCHES]:
        yield from _aligned(stretch)
    if len(stretches) > _MOST_STRETCHES:
        yield f"  and {len(stretches) - _MOST_STRETCHES} more places (--json has all)"


def differing_stretches(comparison: Comparison) -> list[list[Piece]]:
    """The differing pieces with up to `CONTEXT` equal words before and after each.

    Differences with no more than twice that between them share a stretch.
    """
    stretches: list[list[Piece]] = []
    current: list[Piece] = []
    last = len(comparison.pieces) - 1
    for i, piece in enumerate(comparison.pieces):
        if piece.kind != "equal":
            current.append(piece)
        elif i == 0:
            current = [_cut(piece, -CONTEXT, None)]
        elif i == last:
            current.append(_cut(piece, None, CONTEXT))
        elif len(piece.reference) <= 2 * CONTEXT:
            current.append(piece)
        else:
            stretches.append([*current, _cut(piece, None, CONTEXT)])
            current = [_cut(piece, -CONTEXT, None)]
    return [*stretches, current] if any(p.kind != "equal" for p in current) else stretches


def _cut(piece: Piece, start: int | None, stop: int | None) -> Piece:
    return Piece(piece.kind, piece.reference[start:stop], piece.hypothesis[start:stop])


def _aligned(stretch: Sequence[Piece]) -> Iterator[str]:
    """REF and HYP one above the other, word by word, and below them how they differ."""
    columns = [column for piece in stretch for column in _columns(piece)]
    while any(mark for *_, mark in columns):
        taken, used = 0, 0
        while taken < len(columns) and (taken == 0 or used <= _LINE_CELLS):
            used += max(map(cell_len, columns[taken])) + 1
            taken += 1
        for title, row in zip(
            ("REF", "HYP", "   "), zip(*columns[:taken], strict=True), strict=True
        ):
            widths = [max(map(cell_len, column)) for column in columns[:taken]]
            words = " ".join(_left(word, width) for word, width in zip(row, widths, strict=True))
            yield f"  {title}  {words}".rstrip()
        columns = columns[taken:]


def _columns(piece: Piece) -> list[tuple[str, str, str]]:
    """(reference, hypothesis, mark) of each word; the middle of a long run is only counted."""
    n = max(len(piece.reference), len(piece.hypothesis))
    pairs = list(_padded(piece, n))
    mark = _MARKS[piece.kind]
    columns = [(reference, hypothesis, mark) for reference, hypothesis in pairs]
    if n <= _LONG_RUN:
        return columns
    half = _LONG_RUN // 2
    omitted = f"[{n - 2 * half} words]"
    return [*columns[:half], (omitted, omitted, mark), *columns[-half:]]


def _padded(piece: Piece, n: int) -> Iterator[tuple[str, str]]:
    """Words side by side; asterisks where one side has none."""
    for i in range(n):
        reference = piece.reference[i] if piece.reference else "*" * cell_len(piece.hypothesis[i])
        hypothesis = piece.hypothesis[i] if piece.hypothesis else "*" * cell_len(reference)
        yield reference, hypothesis
