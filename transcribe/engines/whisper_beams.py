"""Whisper's beams on a device that must never wait: one step for all texts of all windows.

Owns which texts are followed, on the device. The search is that of `whisper_search.beams`, which
decides on the host and says what it does; this one has its results, but for rounding and ties,
from fixed buffers, so that a step is a CUDA graph. Windows are written in batches: few need beams,
and they end alike.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from transcribe.engines.lanes import Lane, Mark, Replay, on_host, to_device
from transcribe.engines.whisper_decoding import (
    Rules,
    Texts,
    Vocabulary,
    Written,
    buckets,
    told,
)
from transcribe.engines.whisper_rows import MAX_PROMPT, DecoderRows
from transcribe.engines.whisper_tokens import MAX_NEW_TOKENS

_STEPS_PER_LOOK = 8


class BeamDecoder:
    """A Whisper decoder that follows so many texts of each window."""

    def __init__(
        self,
        rows: DecoderRows,
        vocabulary: Vocabulary,
        rules: Rules,
        lane: Lane,
        n_beams: int,
        max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> None:
        """Share the buffers of `rows` with whoever writes there at other times.

        Args:
            rows: at least `n_beams`.
            vocabulary: the checkpoint's tokens.
            rules: what may be written.
            lane: where all that use `rows` work.
            n_beams: texts followed in each window.
            max_new_tokens: most tokens of one text, end token included.
        """
        self.n_windows = rows.n_rows // n_beams
        self._rows, self._rules, self._lane = rows, rules, lane
        self._vocabulary, self._n_beams = vocabulary, n_beams
        self._max_new = min(max_new_tokens, rows.n_positions - MAX_PROMPT)
        with lane.entered():  # where it is written later
            self._state = _State.empty(self.n_windows, n_beams, self._max_new, rows.device)
        self._steps: dict[tuple[int, int], Replay] = {}

    @torch.inference_mode()
    def write(
        self,
        output: Callable[[int], Tensor],
        prompts: Sequence[Sequence[int]],
        no_repeat_ngram_size: int = 0,
    ) -> list[Written]:
        """The text of each window whose mean log-probability a token is best.

        Args:
            output: encoder output `[1500, d_model]` of a window; called inside the lane.
            prompts: at most four tokens before each window's text; `n_windows` of them at most.
            no_repeat_ngram_size: so many tokens are never written twice in the same order; 0: may.
        """
        if not prompts:
            return []
        n = min(size for size in buckets(self.n_windows) if size >= len(prompts))
        work = partial(self._step, n, no_repeat_ngram_size)
        step = self._steps.setdefault((n, no_repeat_ngram_size), Replay(work, self._lane))
        with self._lane.entered():
            for window in range(len(prompts)):
                self._rows.listen(window, output(window), self._n_beams)
            self._state.begin(prompts)
            self._search(step, max(map(len, prompts)) - 1 + self._max_new)
            return self._state.chosen(len(prompts))

    def _search(self, step: Replay, n_steps: int) -> None:
        """Step until every window is done, which the host knows a look or two late."""
        looks: deque[tuple[Tensor, Mark]] = deque()
        for number in range(1, n_steps + 1):
            step()
            if number % _STEPS_PER_LOOK:
                continue
            looks.append(self._look())
            if len(looks) > 1:
                n_ended, mark = looks.popleft()
                mark.wait()
                if bool((n_ended >= self._n_beams).all()):
                    break
        while looks:
            looks.popleft()[1].wait()

    def _look(self) -> tuple[Tensor, Mark]:
        copy = on_host(self._state.n_ended)
        copy.copy_(self._state.n_ended, non_blocking=True)
        return copy, self._lane.mark()

    # ---- one step -----------------------------------------------------------------------

    def _step(self, n: int, no_repeat_ngram_size: int) -> None:
        """One token more for every text of the first `n` windows. In place, nothing that lasts."""
        state, n_beams = self._state.first(n), self._n_beams
        logits = self._rows.logits(state.token, state.position, n)
        self._note_silence(state, logits)
        following = state.position + 1
        searching = (following >= state.prompt_length) & (state.count < self._max_new)
        if no_repeat_ngram_size:
            _forbid_repeats(logits, state, no_repeat_ngram_size, self._vocabulary.start)
        self._rules.apply(logits, state)
        likely = logits.log_softmax(dim=1).topk(n_beams + 1, dim=1)
        totals = (state.total[:, None] + likely.values).view(n, -1)
        # A row has one end at most, so among twice as many there are enough that go on.
        best = totals.topk(2 * n_beams, dim=1)
        tokens = likely.indices.view(n, -1).gather(1, best.indices)
        parents = best.indices // (n_beams + 1) + state.first_rows[:, None]
        ends = tokens == self._vocabulary.end
        n_before = (~ends).cumsum(dim=1) - (~ends).long()
        # What comes after those that go on is worse than all of them.
        ended = ends & (n_before < n_beams) & (best.values > -torch.inf)
        self._note_ended(state, ended, parents, best.values, searching)
        # Those that go on, first; a stable order, so the likeliest of them.
        chosen = ends.long().sort(dim=1, stable=True).indices[:, :n_beams]
        parent = parents.gather(1, chosen).flatten()
        self._go_on(
            state,
            searching,
            torch.where(searching, parent, state.own_rows),
            tokens.gather(1, chosen).flatten(),
            best.values.gather(1, chosen).flatten(),
        )

    def _note_silence(self, state: _State, logits: Tensor) -> None:
        first = logits[:: self._n_beams]
        silence = (first[:, self._vocabulary.no_speech] - first.logsumexp(dim=1)).exp()
        at_start = state.position[:: self._n_beams] == 0
        state.no_speech.copy_(torch.where(at_start, silence, state.no_speech))

    def _note_ended(
        self, state: _State, ended: Tensor, parents: Tensor, totals: Tensor, searching: Tensor
    ) -> None:
        """Of the texts that end in this step, all of one length, the likeliest may be the best."""
        searching, count = searching[:: self._n_beams], state.count[:: self._n_beams]
        n_now = torch.where(searching & (state.n_ended < self._n_beams), ended.sum(dim=1), 0)
        first = ended.long().argmax(dim=1, keepdim=True)
        total = totals.gather(1, first)[:, 0]
        row = parents.gather(1, first)[:, 0]
        is_better = (n_now > 0) & (total / (count + 1) > state.best_mean)
        state.best_mean.copy_(torch.where(is_better, total / (count + 1), state.best_mean))
        state.best_total.copy_(torch.where(is_better, total, state.best_total))
        state.best_count.copy_(torch.where(is_better, count, state.best_count))
        written = state.written.index_select(0, row)
        state.best.copy_(torch.where(is_better[:, None], written, state.best))
        state.n_ended.add_(n_now)

    def _go_on(
        self, state: _State, searching: Tensor, parent: Tensor, token: Tensor, total: Tensor
    ) -> None:
        """Every row goes on from its parent's text."""
        self._rows.take(parent)
        at = state.count.clamp(max=self._max_new - 1)[:, None]
        written = state.written.index_select(0, parent)
        there = written.gather(1, at)
        written.scatter_(1, at, torch.where(searching[:, None], token[:, None], there))
        state.written.copy_(written)
        last = state.last_was_time.index_select(0, parent)
        latest = state.latest_time.index_select(0, parent)
        is_time = token >= self._vocabulary.first_timestamp
        state.before_was_time.copy_(torch.where(searching, last, state.before_was_time))
        state.last_was_time.copy_(torch.where(searching, is_time, last))
        state.latest_time.copy_(torch.where(searching & is_time, token, latest))
        state.total.copy_(torch.where(searching, total, state.total))
        state.count.add_(searching)
        following = state.position + 1
        state.token.copy_(torch.where(searching, token, state.given(following)))
        state.position.copy_(following.clamp(max=self._rows.n_positions - 1))


def _forbid_repeats(logits: Tensor, state: _State, size: int, never: int) -> None:
    """Set what would end a run of `size` tokens that a text has already to minus infinity.

    Args:
        logits: changed in place.
        state: the texts.
        size: 2 or more.
        never: a token that is forbidden anyway.
    """
    written, count = state.written, state.count[:, None]
    n_runs = written.shape[1] - size + 1
    starts = torch.arange(n_runs, device=written.device)
    same = starts + size <= count
    for shift in range(size - 1):
        at = (count - (size - 1) + shift).clamp(min=0)
        same = same & (written[:, shift : shift + n_runs] == written.gather(1, at))
    banned = torch.where(same, written[:, size - 1 :], never)
    logits.scatter_(1, banned, -torch.inf)


@dataclass(frozen=True, slots=True)
class _State(Texts):
    """Small buffers: of each row, a window's rows side by side, and of each window.

    Attributes:
        total: of a row: minus infinity where there is no text.
        n_ended: of a window: texts that have ended; what ends after `n_beams` does not count.
        best, best_count, best_total, best_mean: of a window: the best text that has ended.
        no_speech: of a window.
        own_rows, first_rows: of a row its number, of a window its first row.
    """

    n_ended: Tensor
    best: Tensor
    best_count: Tensor
    best_total: Tensor
    best_mean: Tensor
    no_speech: Tensor
    own_rows: Tensor
    first_rows: Tensor

    @classmethod
    def empty(cls, n_windows: int, n_beams: int, max_new: int, device: str) -> _State:
        n_rows = n_windows * n_beams

        def whole(*shape: int) -> Tensor:
            return torch.zeros(n_windows, *shape, dtype=torch.int64, device=device)

        def floats() -> Tensor:
            return torch.zeros(n_windows, device=device)

        return cls(
            **cls.buffers(n_rows, max_new, device),
            n_ended=whole(),
            best=whole(max_new),
            best_count=whole(),
            best_total=floats(),
            best_mean=floats(),
            no_speech=floats(),
            own_rows=torch.arange(n_rows, device=device),
            first_rows=torch.arange(0, n_rows, n_beams, device=device),
        )

    @property
    def n_beams(self) -> int:
        """Rows of a window."""
        return len(self.token) // len(self.n_ended)

    def first(self, n: int) -> _State:
        """The first `n` windows and their rows: views, not copies."""
        n_windows = len(self.n_ended)
        return _State(*(t[: n * len(t) // n_windows] for t in self.tensors()))

    def begin(self, prompts: Sequence[Sequence[int]]) -> None:
        """Seat a window for each prompt; places that are left are done already."""
        seated = [*prompts, *[[0]] * (len(self.n_ended) - len(prompts))]
        values = to_device(torch.tensor([told(p) for p in seated]), str(self.token.device))
        values = values.repeat_interleave(self.n_beams, dim=0)
        self.prompt_length.copy_(values[:, 0])
        self.prompt.copy_(values[:, 1:])
        self.token.copy_(values[:, 1])
        for rows in (self.position, self.count, self.latest_time, self.n_ended):
            rows.zero_()
        self.n_ended[len(prompts) :] = self.n_beams
        # As if timestamps had come before: the first token is one by another rule.
        self.last_was_time.fill_(True)
        self.before_was_time.fill_(True)
        # Until the first token is chosen a window has one text.
        self.total.fill_(-torch.inf)
        self.total[self.first_rows] = 0.0
        self.best_mean.fill_(-torch.inf)

    def chosen(self, n: int) -> list[Written]:
        """The best text of each of the first `n` windows: one that ended, if any did."""
        going = self.total.view(-1, self.n_beams).argmax(dim=1) + self.first_rows
        has_ended = self.best_mean > -torch.inf
        written = torch.where(has_ended[:, None], self.best, self.written[going])
        count = torch.where(has_ended, self.best_count, self.count[going])
        total = torch.where(has_ended, self.best_total, self.total[going])
        parts = (part[:n].tolist() for part in (written, count, total, self.no_speech))
        return [Written(ids[:length], *rest) for ids, length, *rest in zip(*parts, strict=True)]
