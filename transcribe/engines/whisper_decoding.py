"""Whisper's greedy search on a device that must never wait: slots, one step, rules as masks.

Owns the decoder's arithmetic for one token of every slot, the rules of the token language on the
device, and which window sits in which slot. Knows no sound, no encoder, no retries.

A *slot* is a row of fixed buffers: the window's cross-attention keys and values (projected once),
its own keys and values, what it has written. One step adds one token to every slot, reads and
writes those buffers only, and has the same shape each time, so it is captured as a CUDA graph.
Every slot has its own position: a window that is finished makes room for the next at once while
the others go on. Prompts take the same step as text, their next token given instead of chosen.

The host looks at the slots every few steps, and then at a copy made a block of steps ago: it never
waits for what the device is doing now.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from transcribe.engines.lanes import Lane, Mark, Replay, on_host, to_device
from transcribe.engines.whisper_tokens import WhisperTokens

MAX_NEW_TOKENS = 224  # half of Whisper's text context, as in its reference decoding
LAST_FIRST_TIMESTAMP = 50  # text begins in the first second (max_initial_timestamp)
_MAX_PROMPT = 4
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


def slot_bytes(config: Any, dtype: torch.dtype) -> int:
    """Bytes that one slot takes on the device, its row of logits included."""
    frames = config.max_source_positions + _n_positions(config)
    kept = 2 * config.decoder_layers * frames * config.d_model * dtype.itemsize
    return int(kept + 3 * 4 * config.vocab_size)


def _n_positions(config: Any) -> int:
    """Length of the decoder's own cache, a multiple of 8 where the model allows (alignment)."""
    wanted = -(-(_MAX_PROMPT + MAX_NEW_TOKENS) // 8) * 8
    return int(min(config.max_target_positions, wanted))


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
        config = model.config
        self.n_slots = n_slots
        self.lane = Lane(model.device.type, urgent=True)
        self.slots_stepped = 0
        self._device = str(model.device)
        self._weights = _DecoderWeights.of(model)
        self._vocabulary = vocabulary
        self._ignore_end = ignore_end
        self._steps_per_look = steps_per_look
        self._looks_behind = looks_behind
        heads, width = self._weights.heads, config.d_model // self._weights.heads
        n_positions = _n_positions(config)
        self._max_new = min(max_new_tokens, n_positions - _MAX_PROMPT)
        layers, frames = config.decoder_layers, config.max_source_positions
        kept: dict[str, Any] = {"device": self._device, "dtype": model.dtype}
        # keys and values (2), layer, slot, head, frame or position, width of a head
        self._cross = torch.zeros(2, layers, n_slots, heads, frames, width, **kept)
        self._own = torch.zeros(2, layers, n_slots, heads, n_positions, width, **kept)
        self._state = _State.empty(n_slots, self._max_new, len(vocabulary.languages), self._device)
        self._rules = _Rules(vocabulary, config.vocab_size, self._device)
        self._axis = torch.arange(n_positions, device=self._device)
        self._languages = torch.tensor(vocabulary.languages, device=self._device)
        self._steps = {n: Replay(partial(self._step, n), self.lane) for n in _buckets(n_slots)}
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
            self._listen(slot, output(window))
        if slots:
            self._state.begin(slots, windows, [prompts[w] for w in windows], self._device)

    def _listen(self, slot: int, output: Tensor) -> None:
        """Cross-attention keys and values of all layers, in one product."""
        weights = self._weights
        made = functional.linear(output, weights.cross, weights.cross_bias)
        made = made.view(len(output), 2, self._own.shape[1], weights.heads, -1)
        self._cross[:, :, slot].copy_(made.permute(1, 2, 3, 0, 4))

    def _narrow(self, sitting: list[int | None], more: bool) -> int:
        """Move windows together once no others come; how many slots the next steps take."""
        busy = [slot for slot, window in enumerate(sitting) if window is not None]
        fewest = min(n for n in self._steps if n >= len(busy))
        if not more:
            free = [slot for slot in range(fewest) if sitting[slot] is None]
            for slot in (s for s in busy if s >= fewest):
                target = free.pop(0)
                for rows in (*self._state.rows(), *self._caches()):
                    rows[target].copy_(rows[slot])
                self._state.leave(slot)
                sitting[target], sitting[slot] = sitting[slot], None
            return fewest
        last = max(busy, default=0)
        return min(n for n in self._steps if n > last)

    def _caches(self) -> tuple[Tensor, Tensor]:
        """The caches with the slot first."""
        return self._cross.movedim(2, 0), self._own.movedim(2, 0)

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
                    self._listen(slot, output)
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
        logits = self._logits(n)
        state = self._state.first(n)
        at_start = state.position == 0
        silence = logits[:, self._vocabulary.no_speech] - logits.logsumexp(dim=1)
        state.no_speech.copy_(torch.where(at_start, silence.exp(), state.no_speech))
        languages = logits.index_select(1, self._languages)
        state.languages.copy_(torch.where(at_start[:, None], languages, state.languages))
        self._rules.apply(logits, state)
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
        given = state.prompt.gather(1, following.clamp(max=_MAX_PROMPT - 1)[:, None])[:, 0]
        following_token = torch.where(writing, token, given)
        state.token.copy_(torch.where(going, following_token, state.token))
        state.position.copy_(torch.where(state.ended, state.position, following))

    def _logits(self, n: int) -> Tensor:
        """What may come after each slot's token: float32 `[n, vocabulary]`."""
        weights, state = self._weights, self._state.first(n)
        heads, width = weights.heads, self._own.shape[-1]
        hidden = functional.embedding(state.token, weights.embedding)
        hidden = hidden + functional.embedding(state.position, weights.positions)
        mask = (self._axis <= state.position[:, None])[:, None, None]
        at = state.position[:, None, None, None].expand(n, heads, 1, width)
        for index, layer in enumerate(weights.layers):
            made = functional.linear(layer.own_norm(hidden), layer.own, layer.own_bias)
            query, key, value = made.view(n, 3, heads, 1, width).unbind(1)
            keys, values = self._own[0, index, :n], self._own[1, index, :n]
            keys.scatter_(2, at, key)
            values.scatter_(2, at, value)
            hidden = hidden + layer.own_out(_attended(query, keys, values, mask))
            made = functional.linear(layer.cross_norm(hidden), layer.query, layer.query_bias)
            query = made.view(n, heads, 1, width)
            keys, values = self._cross[0, index, :n], self._cross[1, index, :n]
            hidden = hidden + layer.cross_out(_attended(query, keys, values, None))
            hidden = hidden + layer.feed_forward(hidden)
        return functional.linear(weights.norm(hidden), weights.projection).float()


def _attended(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of one query a slot; the query is scaled already."""
    heard = functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=1.0)
    return heard.reshape(len(query), -1)


def _buckets(n_slots: int) -> list[int]:
    """How many slots a step may take: all, half of them, and so on."""
    sizes = [n_slots]
    while sizes[-1] > 1:
        sizes.append((sizes[-1] + 1) // 2)
    return sizes


@dataclass(frozen=True, slots=True)
class _Layer:
    """One decoder layer: fused products for queries, keys and values; queries scaled."""

    own_norm: Any
    own: Tensor
    own_bias: Tensor
    own_out: Any
    cross_norm: Any
    query: Tensor
    query_bias: Tensor
    cross_out: Any
    last: Any

    @classmethod
    def of(cls, layer: Any) -> _Layer:
        own, cross = layer.self_attn, layer.encoder_attn
        # 1/8 in every published Whisper: scaling the weights instead loses no bit.
        query, bias = own.q_proj.weight * own.scaling, own.q_proj.bias * own.scaling
        no_bias = torch.zeros_like(own.v_proj.bias)
        return cls(
            own_norm=layer.self_attn_layer_norm,
            own=torch.cat([query, own.k_proj.weight, own.v_proj.weight]),
            own_bias=torch.cat([bias, no_bias, own.v_proj.bias]),
            own_out=own.out_proj,
            cross_norm=layer.encoder_attn_layer_norm,
            query=cross.q_proj.weight * cross.scaling,
            query_bias=cross.q_proj.bias * cross.scaling,
            cross_out=cross.out_proj,
            last=layer,
        )

    def feed_forward(self, hidden: Tensor) -> Tensor:
        layer = self.last
        made: Tensor = layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(hidden))))
        return made


@dataclass(frozen=True, slots=True)
class _DecoderWeights:
    """A checkpoint's decoder, laid out for steps.

    Attributes:
        cross: keys of all layers, then values of all layers, `[2 * layers * d_model, d_model]`.
    """

    heads: int
    embedding: Tensor
    positions: Tensor
    layers: list[_Layer]
    cross: Tensor
    cross_bias: Tensor
    norm: Any
    projection: Tensor

    @classmethod
    @torch.inference_mode()
    def of(cls, model: Any) -> _DecoderWeights:
        decoder = model.model.decoder
        cross = [layer.encoder_attn for layer in decoder.layers]
        keys, values = [c.k_proj for c in cross], [c.v_proj for c in cross]
        biases = [torch.zeros_like(v.bias) for v in values] + [v.bias for v in values]
        return cls(
            heads=model.config.decoder_attention_heads,
            embedding=decoder.embed_tokens.weight,
            positions=decoder.embed_positions.weight,
            layers=[_Layer.of(layer) for layer in decoder.layers],
            cross=torch.cat([part.weight for part in (*keys, *values)]),
            cross_bias=torch.cat(biases),
            norm=decoder.layer_norm,
            projection=model.proj_out.weight,
        )


# ---- what a slot knows --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _State:
    """Every slot's small buffers, the slot first.

    Attributes:
        window: who sits there; `_NOBODY` is -1.
        token, position: what the next step reads, and where.
        ended: nothing more is written; also true where nobody sits.
        last_was_time, before_was_time: of the last two tokens written; before the first, true.
        latest_time: the latest timestamp written, else 0.
        languages: logits of the language tokens after the start token alone.
    """

    window: Tensor
    token: Tensor
    position: Tensor
    prompt: Tensor
    prompt_length: Tensor
    written: Tensor
    count: Tensor
    total: Tensor
    ended: Tensor
    last_was_time: Tensor
    before_was_time: Tensor
    latest_time: Tensor
    no_speech: Tensor
    languages: Tensor

    @classmethod
    def empty(cls, n_slots: int, max_new: int, n_languages: int, device: str) -> _State:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(n_slots, *shape, dtype=dtype, device=device)

        return cls(
            window=zeros() + _NOBODY,
            token=zeros(),
            position=zeros(),
            prompt=zeros(_MAX_PROMPT),
            prompt_length=zeros() + 1,
            written=zeros(max_new),
            count=zeros(),
            total=zeros(dtype=torch.float32),
            ended=~zeros(dtype=torch.bool),
            last_was_time=zeros(dtype=torch.bool),
            before_was_time=zeros(dtype=torch.bool),
            latest_time=zeros(),
            no_speech=zeros(dtype=torch.float32),
            languages=zeros(n_languages, dtype=torch.float32),
        )

    def rows(self) -> list[Tensor]:
        """All of it."""
        return [getattr(self, name) for name in self.__slots__]

    def first(self, n: int) -> _State:
        """The first `n` slots: views, not copies."""
        return _State(*(rows[:n] for rows in self.rows()))

    def begin(
        self,
        slots: Sequence[int],
        windows: Sequence[int],
        prompts: Sequence[Sequence[int]],
        device: str,
    ) -> None:
        """Seat windows; one copy to the device, then only work on it."""
        told = [
            [slot, window, len(prompt), *prompt, *([0] * (_MAX_PROMPT - len(prompt)))]
            for slot, window, prompt in zip(slots, windows, prompts, strict=True)
        ]
        values = to_device(torch.tensor(told), device)
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
        self._copy = _State(*(on_host(rows) for rows in state.rows()))
        self._mark: Mark | None = None

    def begin(self, state: _State, lane: Lane) -> None:
        for copy, rows in zip(self._copy.rows(), state.rows(), strict=True):
            copy.copy_(rows, non_blocking=True)
        self._mark = lane.mark()

    def wait(self) -> _State:
        """The copy, once it is there."""
        assert self._mark is not None
        self._mark.wait()
        return self._copy


# ---- what may be written ------------------------------------------------------------------


class _Rules:
    """Timestamps come in pairs and in order (Radford et al. 2022, section 2.3); masks only."""

    def __init__(self, vocabulary: Vocabulary, size: int, device: str) -> None:
        ids = torch.arange(size, device=device)
        times = vocabulary.first_timestamp
        self._end, self._times, self._size = vocabulary.end, times, size
        self._time_ids = ids[times:]
        self._never = torch.isin(ids, torch.tensor(vocabulary.suppressed, device=device))
        self._not_first = (ids < times) | (ids > times + LAST_FIRST_TIMESTAMP)

    def apply(self, logits: Tensor, state: _State) -> None:
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
