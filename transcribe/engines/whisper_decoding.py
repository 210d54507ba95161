"""Whisper's greedy search on a device that must never wait: slots, one step, rules as masks.

Owns the rules of the token language on the device, and which window sits in which slot. Knows no
layers (`whisper_rows.py`), no sound, no encoder, no retries.

A *slot* is a row of the decoder's fixed buffers, and what it has written. One step adds one token
to every slot, reads and writes those buffers only, and has the same shape each time, so it is
captured as a CUDA graph.
Every slot has its own position: a window that is finished makes room for the next at once while
the others go on. Prompts take the same step as text, their next token given instead of chosen.

The host looks at the slots every few steps, and then at a copy made a block of steps ago: it never
waits for what the device is doing now.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from transcribe.engines.lanes import Lane, Mark, Replay, on_host, to_device
from transcribe.engines.whisper_rows import MAX_PROMPT, DecoderRows
from transcribe.engines.whisper_tokens import (
    LAST_FIRST_TIMESTAMP,
    MAX_NEW_TOKENS,
    WhisperTokens,
)

_NOBODY = -1


class Feed(Protocol):
    """Windows that wait for a slot; empty (false) when there are none left."""

    def __bool__(self) -> bool:
        """Whether more windows will come."""
        ...

    def take(self, most: int, must: bool) -> list[int]:
        """Up to `most` windows that are ready; at least one, waited for, if it `must`."""
        ...


@dataclass(frozen=True, slots=True)
class Written:
    """What was written for one window.

    Attributes:
        ids: token ids without prompt and end token.
        total_logprob: sum of the tokens' natural log-probabilities, the end token's included.
        no_speech_prob: probability of `<|nospeech|>` after the start token alone.
    """

    ids: list[int]
    total_logprob: float
    no_speech_prob: float


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What the rules need to know of a checkpoint's tokens.

    Attributes:
        suppressed: ids that are never written.
        languages: ids of the language tokens.
    """

    start: int
    end: int
    first_timestamp: int
    no_speech: int
    suppressed: tuple[int, ...]
    languages: tuple[int, ...]

    @classmethod
    def of(cls, tokens: WhisperTokens, suppressed: Sequence[int]) -> Vocabulary:
        """Of a tokenizer, with what its checkpoint suppresses besides the special tokens."""
        return cls(
            start=tokens.start_of_transcript,
            end=tokens.end_of_text,
            first_timestamp=tokens.first_timestamp,
            no_speech=tokens.no_speech,
            suppressed=tuple(sorted({*suppressed, *tokens.never_written()})),
            languages=tuple(tokens.language_tokens().values()),
        )


class SlotDecoder:
    """A Whisper decoder with so many slots."""

    def __init__(
        self,
        model: Any,
        vocabulary: Vocabulary,
        n_slots: int,
        *,
        steps_per_look: int,
        looks_behind: int,
        max_new_tokens: int = MAX_NEW_TOKENS,
        ignore_end: bool = False,
    ) -> None:
        """Lay out the buffers.

        Args:
            model: a `WhisperForConditionalGeneration`, loaded on its device.
            vocabulary: its tokens.
            n_slots: windows that are decoded at once.
            steps_per_look: steps between two looks of the host at what is finished.
            looks_behind: how many looks ago the one was begun that the host reads; 0 waits.
            max_new_tokens: most tokens of one window, end token included.
            ignore_end: write `max_new_tokens` whatever comes; for measuring speed only.
        """
        self.n_slots = n_slots
        self.lane = Lane(model.device.type, urgent=True)
        self.slots_stepped = 0
        self.rows = DecoderRows(model, n_slots)
        self._device = str(model.device)
        self._vocabulary = vocabulary
        self._ignore_end = ignore_end
        self._steps_per_look = steps_per_look
        self._looks_behind = looks_behind
        self._max_new = min(max_new_tokens, self.rows.n_positions - MAX_PROMPT)
        self._state = _State.empty(n_slots, self._max_new, len(vocabulary.languages), self._device)
        self.rules = Rules(vocabulary, model.config.vocab_size, self._device)
        self._languages = torch.tensor(vocabulary.languages, device=self._device)
        self._steps = {n: Replay(partial(self._step, n), self.lane) for n in buckets(n_slots)}
        self._looks = itertools.cycle([_Look(self._state) for _ in range(looks_behind + 1)])
        if self.lane.is_cuda:  # the buffers were filled in another lane
            torch.cuda.synchronize()

    # ---- which window sits where --------------------------------------------------------

    @torch.inference_mode()
    def write(
        self,
        feed: Feed,
        output: Callable[[int], Tensor],
        prompts: Sequence[Sequence[int]],
    ) -> list[Written]:
        """The likeliest text of each window.

        Args:
            feed: gives each index into `prompts` once, in any order.
            output: encoder output `[1500, d_model]` of a window that `feed` has given; called
                inside this decoder's lane.
            prompts: at most four tokens before each window's text.
        """
        found: dict[int, Written] = {}
        sitting: list[int | None] = [None] * self.n_slots
        looking: deque[_Look] = deque()
        with self.lane.entered():
            while feed or any(window is not None for window in sitting):
                self._seat(feed, output, prompts, sitting)
                n = self._narrow(sitting, bool(feed))
                for _ in range(self._steps_per_look):
                    self._steps[n]()
                self.slots_stepped += self._steps_per_look * n
                looking.append(next(self._looks))
                looking[-1].begin(self._state, self.lane)
                if len(looking) > self._looks_behind:
                    self._collect(looking.popleft(), sitting, found)
            while looking:  # until nothing reads the buffers any more
                looking.popleft().wait()
        return [found[i] for i in range(len(prompts))]

    def _seat(
        self,
        feed: Feed,
        output: Callable[[int], Tensor],
        prompts: Sequence[Sequence[int]],
        sitting: list[int | None],
    ) -> None:
        """Give free slots, lowest first, to windows that are ready."""
        free = [slot for slot, window in enumerate(sitting) if window is None]
        if not free or not feed:
            return
        windows = feed.take(len(free), must=len(free) == self.n_slots)
        slots = free[: len(windows)]
        for slot, window in zip(slots, windows, strict=True):
            sitting[slot] = window
            self.rows.listen(slot, output(window))
        if slots:
            self._state.begin(slots, windows, [prompts[w] for w in windows], self._device)

    def _narrow(self, sitting: list[int | None], more: bool) -> int:
        """Move windows together once no others come; how many slots the next steps take."""
        busy = [slot for slot, window in enumerate(sitting) if window is not None]
        fewest = min(n for n in self._steps if n >= len(busy))
        if not more:
            free = [slot for slot in range(fewest) if sitting[slot] is None]
            for slot in (s for s in busy if s >= fewest):
                target = free.pop(0)
                for rows in self._state.tensors():
                    rows[target].copy_(rows[slot])
                self.rows.move(slot, target)
                self._state.leave(slot)
                sitting[target], sitting[slot] = sitting[slot], None
            return fewest
        last = max(busy, default=0)
        return min(n for n in self._steps if n > last)

    def _collect(self, look: _Look, sitting: list[int | None], found: dict[int, Written]) -> None:
        """Texts that were finished when `look` was begun; their slots are free."""
        state = look.wait()
        ended, seen = state.ended.tolist(), state.window.tolist()
        for slot, window in enumerate(sitting):
            # A look may be older than who sits there now.
            if window is None or not ended[slot] or seen[slot] != window:
                continue
            ids = state.written[slot, : int(state.count[slot])].tolist()
            if not self._ignore_end and ids and ids[-1] == self._vocabulary.end:
                ids.pop()
            found[window] = Written(ids, float(state.total[slot]), float(state.no_speech[slot]))
            sitting[slot] = None

    @torch.inference_mode()
    def language_probabilities(self, outputs: Sequence[Tensor]) -> list[list[float]]:
        """Probability of each of the vocabulary's languages, told by the first step.

        Args:
            outputs: encoder outputs, `[1500, d_model]` each, ready for this decoder's lane.
        """
        told: list[list[float]] = []
        with self.lane.entered():
            for begin in range(0, len(outputs), self.n_slots):
                some = outputs[begin : begin + self.n_slots]
                slots = list(range(len(some)))
                for slot, output in enumerate(some):
                    self.rows.listen(slot, output)
                prompts = [[self._vocabulary.start]] * len(some)
                self._state.begin(slots, slots, prompts, self._device)
                self._steps[min(n for n in self._steps if n >= len(some))]()
                told += self._state.languages[: len(some)].softmax(dim=1).tolist()
                for slot in slots:
                    self._state.leave(slot)
        return told

    # ---- one step -----------------------------------------------------------------------

    def _step(self, n: int) -> None:
        """One token more for the first `n` slots. In place, without allocations that last."""
        state = self._state.first(n)
        logits = self.rows.logits(state.token, state.position, n)
        at_start = state.position == 0
        silence = logits[:, self._vocabulary.no_speech] - logits.logsumexp(dim=1)
        state.no_speech.copy_(torch.where(at_start, silence.exp(), state.no_speech))
        languages = logits.index_select(1, self._languages)
        state.languages.copy_(torch.where(at_start[:, None], languages, state.languages))
        self.rules.apply(logits, state)
        best, token = logits.max(dim=1)
        self._advance(state, token, best - logits.logsumexp(dim=1))

    def _advance(self, state: _State, token: Tensor, logprob: Tensor) -> None:
        """Write the chosen token where the prompt is over; go on by one position."""
        going = ~state.ended
        following = state.position + 1
        writing = going & (following >= state.prompt_length)
        at = state.count.clamp(max=self._max_new - 1)[:, None]
        there = state.written.gather(1, at)
        state.written.scatter_(1, at, torch.where(writing[:, None], token[:, None], there))
        state.total.add_(torch.where(writing, logprob, 0.0))
        state.count.add_(writing)
        is_time = token >= self._vocabulary.first_timestamp
        state.before_was_time.copy_(
            torch.where(writing, state.last_was_time, state.before_was_time)
        )
        state.last_was_time.copy_(torch.where(writing, is_time, state.last_was_time))
        state.latest_time.copy_(torch.where(writing & is_time, token, state.latest_time))
        over = state.count >= self._max_new
        if not self._ignore_end:
            over = over | (token == self._vocabulary.end)
        state.ended.logical_or_(writing & over)
        following_token = torch.where(writing, token, state.given(following))
        state.token.copy_(torch.where(going, following_token, state.token))
        state.position.copy_(torch.where(state.ended, state.position, following))


def buckets(n_slots: int) -> list[int]:
    """How many slots, or windows, a step may take: all, half of them, and so on."""
    sizes = [n_slots]
    while sizes[-1] > 1:
        sizes.append((sizes[-1] + 1) // 2)
    return sizes


# ---- what a slot knows --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Texts:
    """Small buffers of the texts that are being written, a row each.

    Attributes:
        token, position: what the next step reads, and where.
        written, count: its tokens without the prompt, and how many.
        total: sum of their log-probabilities.
        last_was_time, before_was_time: of the last two tokens written; before the first, true.
        latest_time: the latest timestamp written, else 0.
    """

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

    @staticmethod
    def buffers(n_rows: int, max_new: int, device: str) -> dict[str, Tensor]:
        """Its fields for so many rows, of so many tokens at most."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(n_rows, *shape, dtype=dtype, device=device)

        return {
            "token": zeros(),
            "position": zeros(),
            "prompt": zeros(MAX_PROMPT),
            "prompt_length": zeros() + 1,
            "written": zeros(max_new),
            "count": zeros(),
            "total": zeros(dtype=torch.float32),
            "last_was_time": zeros(dtype=torch.bool),
            "before_was_time": zeros(dtype=torch.bool),
            "latest_time": zeros(),
        }

    def tensors(self) -> list[Tensor]:
        """All of it, in the order of the fields."""
        return [getattr(self, field.name) for field in fields(self)]

    def given(self, position: Tensor) -> Tensor:
        """The prompt's token at a position of each row; behind the prompt, no matter what."""
        return self.prompt.gather(1, position.clamp(max=MAX_PROMPT - 1)[:, None])[:, 0]


def told(prompt: Sequence[int]) -> list[int]:
    """A prompt's length and its tokens, filled up."""
    return [len(prompt), *prompt, *[0] * (MAX_PROMPT - len(prompt))]


@dataclass(frozen=True, slots=True)
class _State(Texts):
    """Every slot's small buffers, the slot first.

    Attributes:
        window: who sits there; `_NOBODY` is -1.
        ended: nothing more is written; also true where nobody sits.
        languages: logits of the language tokens after the start token alone.
    """

    window: Tensor
    ended: Tensor
    no_speech: Tensor
    languages: Tensor

    @classmethod
    def empty(cls, n_slots: int, max_new: int, n_languages: int, device: str) -> _State:
        def floats(*shape: int) -> Tensor:
            return torch.zeros(n_slots, *shape, device=device)

        return cls(
            **cls.buffers(n_slots, max_new, device),
            window=torch.full((n_slots,), _NOBODY, device=device),
            ended=torch.ones(n_slots, dtype=torch.bool, device=device),
            no_speech=floats(),
            languages=floats(n_languages),
        )

    def first(self, n: int) -> _State:
        """The first `n` slots: views, not copies."""
        return _State(*(rows[:n] for rows in self.tensors()))

    def begin(
        self,
        slots: Sequence[int],
        windows: Sequence[int],
        prompts: Sequence[Sequence[int]],
        device: str,
    ) -> None:
        """Seat windows; one copy to the device, then only work on it."""
        seated = [
            [slot, window, *told(prompt)]
            for slot, window, prompt in zip(slots, windows, prompts, strict=True)
        ]
        values = to_device(torch.tensor(seated), device)
        at = values[:, 0]
        self.window.index_copy_(0, at, values[:, 1])
        self.prompt_length.index_copy_(0, at, values[:, 2])
        self.prompt.index_copy_(0, at, values[:, 3:])
        self.token.index_copy_(0, at, values[:, 3])
        for rows in (self.position, self.count, self.latest_time, self.total, self.ended):
            rows.index_fill_(0, at, 0)
        # As if timestamps had come before: the first token is one by another rule.
        for rows in (self.last_was_time, self.before_was_time):
            rows.index_fill_(0, at, 1)

    def leave(self, slot: int) -> None:
        """Nobody sits there."""
        self.window[slot : slot + 1].fill_(_NOBODY)
        self.position[slot : slot + 1].zero_()
        self.ended[slot : slot + 1].fill_(True)


class _Look:
    """A copy of the slots on the host, made without waiting."""

    def __init__(self, state: _State) -> None:
        self._copy = _State(*(on_host(rows) for rows in state.tensors()))
        self._mark: Mark | None = None

    def begin(self, state: _State, lane: Lane) -> None:
        for copy, rows in zip(self._copy.tensors(), state.tensors(), strict=True):
            copy.copy_(rows, non_blocking=True)
        self._mark = lane.mark()

    def wait(self) -> _State:
        """The copy, once it is there."""
        assert self._mark is not None
        self._mark.wait()
        return self._copy


# ---- what may be written ------------------------------------------------------------------


class Rules:
    """Timestamps come in pairs and in order (Radford et al. 2022, section 2.3); masks only."""

    def __init__(self, vocabulary: Vocabulary, size: int, device: str) -> None:
        ids = torch.arange(size, device=device)
        times = vocabulary.first_timestamp
        self._end, self._times, self._size = vocabulary.end, times, size
        self._time_ids = ids[times:]
        self._never = torch.isin(ids, torch.tensor(vocabulary.suppressed, device=device))
        self._not_first = (ids < times) | (ids > times + LAST_FIRST_TIMESTAMP)

    def apply(self, logits: Tensor, state: Texts) -> None:
        """Set what may not follow to minus infinity, in place."""
        is_first = state.count == 0
        logits.masked_fill_(self._never | (self._not_first & is_first[:, None]), -torch.inf)
        text, times = logits[:, : self._times], logits[:, self._times :]
        last, before = state.last_was_time, state.before_was_time
        # After text and a timestamp comes its twin, which opens the next phrase, or the end.
        closing = last & ~before
        logits[:, : self._end].masked_fill_(closing[:, None], -torch.inf)
        # No way back in time; the same time only as the twin; after twins comes text.
        floor = torch.where(closing, state.latest_time, state.latest_time + 1)
        floor = torch.where(last & before, self._size, floor)
        floor = torch.where(is_first, 0, floor)
        times.masked_fill_(self._time_ids < floor[:, None], -torch.inf)
        # A timestamp, if all of them together are likelier than any one text token.
        likelier = times.logsumexp(dim=1) > text.amax(dim=1)
        text.masked_fill_(likelier[:, None], -torch.inf)
