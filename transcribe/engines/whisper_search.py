"""How a Whisper decoder looks for the text: rules of its token language, greedy, beams.

Owns what may be written next (Radford et al. 2022, section 2.3) and which continuation is
taken. Knows no layers: a `Writer` has them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from transcribe.engines.whisper_tokens import (
    LAST_FIRST_TIMESTAMP,
    MAX_NEW_TOKENS,
    WhisperTokens,
)

T = TypeVar("T")

_LOOP_TOKENS = 40  # a text that repeats itself so long, and so often, will not stop
_LOOP_TURNS = 4
_WORTH_DROPPING = 0.25  # share of ended rows from which copying the others pays


class TextRules:
    """Which tokens may follow: timestamps in pairs and in order, nothing that is suppressed."""

    def __init__(
        self,
        tokens: WhisperTokens,
        vocabulary: int,
        suppressed: Sequence[int],
        suppressed_first: Sequence[int],
    ) -> None:
        self._end = tokens.end_of_text
        self.first_timestamp = tokens.first_timestamp
        self._never = torch.zeros(vocabulary)
        self._never[[*suppressed, *tokens.never_written()]] = -torch.inf
        self._first = torch.zeros(vocabulary)
        self._first[list(suppressed_first)] = -torch.inf
        self._first[: self.first_timestamp] = -torch.inf
        self._first[self.first_timestamp + LAST_FIRST_TIMESTAMP + 1 :] = -torch.inf

    def apply(self, logits: Tensor, written: Tensor) -> None:
        """Set what may not follow to minus infinity.

        Args:
            logits: `[n_rows, vocabulary]`, changed in place.
            written: tokens so far without the prompt, `[n_rows, n]`.
        """
        logits += self._never
        if not written.shape[1]:
            logits += self._first
            return
        times = logits[:, self.first_timestamp :]
        times.masked_fill_(self._impossible_times(written, times.shape[1]), -torch.inf)
        closed = self._must_close(written)
        if closed.any():
            logits[closed.nonzero()[:, 0], : self._end] = -torch.inf
        likelier = times.logsumexp(dim=1) > logits[:, : self.first_timestamp].amax(dim=1)
        if likelier.any():
            logits[likelier.nonzero()[:, 0], : self.first_timestamp] = -torch.inf

    def _is_time(self, written: Tensor) -> tuple[Tensor, Tensor]:
        """Whether the last token and the one before are timestamps; before the first, yes."""
        last = written[:, -1] >= self.first_timestamp
        if written.shape[1] < 2:
            return last, torch.ones_like(last)
        return last, written[:, -2] >= self.first_timestamp

    def _must_close(self, written: Tensor) -> Tensor:
        """After text and a timestamp comes another timestamp or the end."""
        last, before = self._is_time(written)
        return last & ~before

    def _impossible_times(self, written: Tensor, n_times: int) -> Tensor:
        """Timestamps before the latest, it too unless it may open what follows; all after two."""
        last, before = self._is_time(written)
        latest = (written - self.first_timestamp).amax(dim=1)
        floor = torch.where(last & ~before, latest, latest + 1)
        floor = torch.where(last & before, n_times, floor)
        return torch.arange(n_times) < floor[:, None]


@dataclass(frozen=True, slots=True)
class Written:
    """A text that was found.

    Attributes:
        ids: without prompt and end token.
        total_logprob: of all its tokens, the end token's included.
    """

    ids: list[int]
    total_logprob: float


class Writer(Protocol):
    """A decoder in the middle of a batch of rows."""

    def next_logits(self, tokens: Tensor) -> Tensor:
        """Add a token to each row, `[n_rows]`; what may come next, `[n_rows, vocabulary]`."""
        ...

    def keep_windows(self, windows: Sequence[int]) -> list[int]:
        """Listen to these windows only (ascending); the rows that remain are taken next.

        Returns:
            The same windows in the order in which their rows have to stand.
        """
        ...

    def take_rows(self, rows: Tensor) -> None:
        """Go on with copies of these rows: as many of every window, which stand together."""
        ...


def greedy(writer: Writer, rules: TextRules, logits: Tensor, end: int) -> list[Written]:
    """The likeliest token, again and again.

    Args:
        writer: a row for each window.
        rules: what may be written.
        logits: of each row's first token, `[n_rows, vocabulary]`.
        end: the end token.
    """
    found: dict[int, Written] = {}
    windows = torch.arange(len(logits))
    written = torch.empty(len(logits), 0, dtype=torch.int64)
    total = torch.zeros(len(logits))
    length = torch.full((len(logits),), MAX_NEW_TOKENS)  # of what counts: others may go on longer
    for _ in range(MAX_NEW_TOKENS):
        rules.apply(logits, written)
        token = logits.argmax(dim=1)
        logprob = logits.log_softmax(dim=1).gather(1, token[:, None])[:, 0]
        ended = length < MAX_NEW_TOKENS
        total += torch.where(ended, 0.0, logprob)
        written = torch.cat([written, token[:, None]], dim=1)
        ends = (token == end) | _loops(written, rules.first_timestamp)
        length[ends & ~ended] = written.shape[1]
        ended |= ends
        if ended.float().mean() >= _WORTH_DROPPING:
            found |= _written(windows[ended], written[ended], length[ended], total[ended], end)
            left = (~ended).nonzero()[:, 0].tolist()
            if not left:
                return [found[i] for i in range(len(found))]
            going = torch.tensor(writer.keep_windows(left))
            writer.take_rows(going)
            windows, written, token = windows[going], written[going], token[going]
            total, length = total[going], length[going]
        logits = writer.next_logits(token)
    found |= _written(windows, written, length, total, end)
    return [found[i] for i in range(len(found))]


def _loops(written: Tensor, first_timestamp: int) -> Tensor:
    """Whether each row has said nothing new for long; it would go on to the last token.

    What counts as one is far above what `whisper.py` tries again, so no sound text is cut.

    Args:
        written: `[n_rows, n]`.
        first_timestamp: this and the tokens above are all alike here.
    """
    n = written.shape[1]
    loops = torch.zeros(len(written), dtype=torch.bool)
    if n >= _LOOP_TOKENS and n % 8 == 0:
        recent = written[:, -_LOOP_TOKENS:].clamp(max=first_timestamp)
        for period in range(1, _LOOP_TOKENS // _LOOP_TURNS + 1):
            loops |= (recent[:, period:] == recent[:, :-period]).all(dim=1)
    return loops


def _written(
    windows: Tensor, written: Tensor, length: Tensor, total: Tensor, end: int
) -> dict[int, Written]:
    """The first `length` tokens of each row, without the end token."""
    found = {}
    for window, ids, n, logprob in zip(
        windows.tolist(), written.tolist(), length.tolist(), total.tolist(), strict=True
    ):
        found[window] = Written(ids[: n - 1] if ids[n - 1 : n] == [end] else ids[:n], logprob)
    return found


def beams(
    writer: Writer,
    rules: TextRules,
    logits: Tensor,
    end: int,
    n_beams: int,
    no_repeat_ngram_size: int = 0,
) -> list[Written]:
    """Follow the likeliest `n_beams` texts of each window; the best mean per token wins.

    As in Whisper: a window is done when `n_beams` of its texts have ended.

    Args:
        writer: a row for each window; becomes `n_beams` rows for each.
        rules, logits, end: as for `greedy`.
        n_beams: texts followed.
        no_repeat_ngram_size: so many tokens are never written twice in the same order; 0: may.
    """
    found: dict[int, Written] = {}
    windows = list(range(len(logits)))
    going = [[Written([], 0.0)] for _ in windows]
    ended: list[list[Written]] = [[] for _ in windows]
    for _ in range(MAX_NEW_TOKENS):
        texts = [text for window in going for text in window]
        _forbid_repeats(logits, texts, no_repeat_ngram_size)
        rules.apply(logits, torch.tensor([text.ids for text in texts], dtype=torch.int64))
        best = logits.log_softmax(dim=1).topk(n_beams + 1, dim=1)
        rows: list[list[int]] = [[] for _ in going]
        for window, likely in enumerate(_likeliest(texts, best.values, best.indices, len(going))):
            going[window] = []
            for row, text in likely:
                if len(going[window]) == n_beams:
                    break
                if text.ids[-1] == end:
                    ended[window].append(Written(text.ids[:-1], text.total_logprob))
                else:
                    going[window].append(text)
                    rows[window].append(row)
        kept = [i for i, texts_ in enumerate(ended) if len(texts_) < n_beams]
        if not kept:
            break
        if len(kept) <= (1 - _WORTH_DROPPING) * len(windows):
            found |= _bests(windows, ended, going, n_beams)
            kept = writer.keep_windows(kept)
            windows, going = _at(kept, windows), _at(kept, going)
            ended, rows = _at(kept, ended), _at(kept, rows)
        writer.take_rows(torch.tensor([row for own in rows for row in own]))
        logits = writer.next_logits(torch.tensor([t.ids[-1] for w in going for t in w]))
    found |= _bests(windows, ended, going, n_beams)
    return [found[i] for i in range(len(found))]


def _bests(
    windows: Sequence[int],
    ended: Sequence[Sequence[Written]],
    going: Sequence[Sequence[Written]],
    n_beams: int,
) -> dict[int, Written]:
    """The text of each window whose mean log-probability is best; an ended one if there is any."""
    return {
        window: max(
            done[:n_beams] or open_, key=lambda text: text.total_logprob / (len(text.ids) + 1)
        )
        for window, done, open_ in zip(windows, ended, going, strict=True)
    }


def _at(kept: Sequence[int], values: Sequence[T]) -> list[T]:
    return [values[i] for i in kept]


def _likeliest(
    texts: Sequence[Written], logprobs: Tensor, tokens: Tensor, n_windows: int
) -> Iterable[list[tuple[int, Written]]]:
    """For each window: its texts, each one token longer, with the row of each, best first.

    Args:
        texts: of all rows; a window's stand together.
        logprobs, tokens: the best tokens of each row, `[n_rows, n]`.
        n_windows: the rows belong to so many.
    """
    longer = [
        (row, Written([*text.ids, token], text.total_logprob + logprob))
        for row, (text, logprobs_, tokens_) in enumerate(
            zip(texts, logprobs.tolist(), tokens.tolist(), strict=True)
        )
        for logprob, token in zip(logprobs_, tokens_, strict=True)
    ]
    each = len(longer) // n_windows
    for first in range(0, len(longer), each):
        yield sorted(longer[first : first + each], key=lambda found: -found[1].total_logprob)


def _forbid_repeats(logits: Tensor, texts: Sequence[Written], size: int) -> None:
    """Set what would end a run of `size` tokens that a text has already to minus infinity."""
    if not size:
        return
    for row, text in enumerate(texts):
        latest = text.ids[len(text.ids) - size + 1 :]
        for at in range(len(text.ids) - size + 1):
            if text.ids[at : at + size - 1] == latest:
                logits[row, text.ids[at + size - 1]] = -torch.inf
