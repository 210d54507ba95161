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
    TextState,
    Vocabulary,
    Written,
    buckets,
)
from transcribe.engines.whisper_rows import MAX_NEW_TOKENS, MAX_PROMPT, DecoderRows

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
                self._rows.listen(window, output(window))
            self._rows.forget(slice(0, n * self._n_beams))
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
        self._rules.apply(logits, state.text())
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
        given = state.prompt.gather(1, following.clamp(max=MAX_PROMPT - 1)[:, None])[:, 0]
        state.token.copy_(torch.where(searching, token, given))
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
class _State:
    """Small buffers: of each row, a window's rows side by side, and of each window.

    Attributes:
        n_beams: rows of a window.
        token, position: of a row: what the next step reads, and where.
        prompt, prompt_length: of a row, its window's.
        total: of a row's text: sum of its log-probabilities; minus infinity where there is none.
        written, count, last_was_time, before_was_time, latest_time: of a row's text.
        own_rows: of a row: its number.
        n_ended: of a window: texts that have ended; what ends after `n_beams` does not count.
        best, best_count, best_total, best_mean: of a window: the best text that has ended.
        no_speech: of a window.
        first_rows: of a window: its first row.
    """

    n_beams: int
    token: Tensor
    position: Tensor
    prompt: Tensor
    prompt_length: Tensor
    written: Tensor
    count: Tensor
    total: Tensor
    last_was_time: Tensor
    before_was_time: Tensor
    latest_time: Tensor
    own_rows: Tensor
    n_ended: Tensor
    best: Tensor
    best_count: Tensor
    best_total: Tensor
    best_mean: Tensor
    no_speech: Tensor
    first_rows: Tensor

    @classmethod
    def empty(cls, n_windows: int, n_beams: int, max_new: int, device: str) -> _State:
        n_rows = n_windows * n_beams

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        return cls(
            n_beams=n_beams,
            token=zeros(n_rows),
            position=zeros(n_rows),
            prompt=zeros(n_rows, MAX_PROMPT),
            prompt_length=zeros(n_rows) + 1,
            written=zeros(n_rows, max_new),
            count=zeros(n_rows),
            total=zeros(n_rows, dtype=torch.float32),
            last_was_time=zeros(n_rows, dtype=torch.bool),
            before_was_time=zeros(n_rows, dtype=torch.bool),
            latest_time=zeros(n_rows),
            own_rows=torch.arange(n_rows, device=device),
            n_ended=zeros(n_windows),
            best=zeros(n_windows, max_new),
            best_count=zeros(n_windows),
            best_total=zeros(n_windows, dtype=torch.float32),
            best_mean=zeros(n_windows, dtype=torch.float32),
            no_speech=zeros(n_windows, dtype=torch.float32),
            first_rows=torch.arange(0, n_rows, n_beams, device=device),
        )

    def first(self, n: int) -> _State:
        """The first `n` windows and their rows: views, not copies."""
        n_windows = len(self.n_ended)
        tensors = [getattr(self, name) for name in self.__slots__[1:]]
        return _State(self.n_beams, *(t[: n * len(t) // n_windows] for t in tensors))

    def text(self) -> TextState:
        """For the rules."""
        return TextState(self.count, self.last_was_time, self.before_was_time, self.latest_time)

    def begin(self, prompts: Sequence[Sequence[int]]) -> None:
        """Seat a window for each prompt; places that are left are done already."""
        told = [[len(p), *p, *[0] * (MAX_PROMPT - len(p))] for p in prompts]
        told += [[1] + [0] * MAX_PROMPT] * (len(self.n_ended) - len(prompts))
        values = to_device(torch.tensor(told), str(self.token.device))
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
        told = (part[:n].tolist() for part in (written, count, total, self.no_speech))
        return [Written(ids[:length], *rest) for ids, length, *rest in zip(*told, strict=True)]
