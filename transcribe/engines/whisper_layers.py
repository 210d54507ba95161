"""Whisper's layers on a CPU: eight-bit products, attention in 16 bits where the CPU has them.

Owns the arithmetic of encoder and decoder (Radford et al. 2022, section 2.2; Vaswani et al.
2017). What is decoded, and when it ends, is `whisper_search.py`'s matter.

The decoder listens to 30 s, of which a window mostly fills a part; the rest is silence, the
same for all. Its keys and values are made once (docs/decisions.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional

from transcribe.engines.int8 import Int8Linear, float_for_products
from transcribe.engines.whisper_weights import WhisperWeights

N_FRAMES = 1500  # of the encoder's output: 30 s
_SILENT_FRAMES_PER_KEY = 50


@dataclass(frozen=True, slots=True)
class _Norm:
    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias)


class _Reader:
    """Takes layers out of a checkpoint by name."""

    def __init__(self, weights: WhisperWeights, prefix: str) -> None:
        self._tensors = weights.tensors
        self._prefix = prefix
        self._scale = (weights.d_model // weights.n_heads) ** -0.5

    def tensor(self, name: str) -> Tensor:
        return self._tensors[f"{self._prefix}.{name}"]

    def norm(self, name: str) -> _Norm:
        return _Norm(self.tensor(f"{name}.weight"), self.tensor(f"{name}.bias"))

    def linear(self, *names: str) -> Int8Linear:
        """One layer for several that hear the same; queries come out scaled for attention."""
        weights, biases = [], []
        for name in names:
            weight = self.tensor(f"{name}.weight")
            bias = self._tensors.get(f"{self._prefix}.{name}.bias")
            bias = torch.zeros(len(weight)) if bias is None else bias
            scale = self._scale if name.endswith("q_proj") else 1.0
            weights.append(weight * scale)
            biases.append(bias * scale)
        return Int8Linear(torch.cat(weights), torch.cat(biases))


# ---- encoder ------------------------------------------------------------------------------


class Encoder:
    """Log-mel features -> what the decoder listens to."""

    def __init__(self, weights: WhisperWeights) -> None:
        self._dtype = float_for_products()
        self._n_heads = weights.n_heads
        top = _Reader(weights, "model.encoder")
        self._convs = [
            (
                top.tensor(f"{name}.weight").to(self._dtype),
                top.tensor(f"{name}.bias").to(self._dtype),
            )
            for name in ("conv1", "conv2")
        ]
        self._positions = top.tensor("embed_positions.weight")
        self._layers = [
            _EncoderLayer(_Reader(weights, f"model.encoder.layers.{i}"))
            for i in range(weights.n_layers("encoder"))
        ]
        self._norm = top.norm("layer_norm")
        self._scores = torch.empty(N_FRAMES * N_FRAMES, dtype=self._dtype)

    def __call__(self, features: Tensor) -> Tensor:
        """`[1, n_mels, 2 * n_frames]` -> `[n_frames, d_model]`, float32."""
        x = features.to(self._dtype)
        for stride, (weight, bias) in enumerate(self._convs, start=1):
            x = functional.gelu(functional.conv1d(x, weight, bias, padding=1, stride=stride))
        # In this order the sum lies in memory as the positions do, not across it.
        x = self._positions[: x.shape[2]] + x[0].T
        for layer in self._layers:
            x += layer.attention_out(self._attention(layer.qkv(layer.attention_norm(x))))
            x += layer.fc2(functional.gelu(layer.fc1(layer.fc_norm(x))))
        return self._norm(x)

    def _attention(self, qkv: Tensor) -> Tensor:
        """`[n, 3 * d_model]` -> `[n, d_model]`. A head at a time stays in the cache."""
        n, width = qkv.shape
        heads = qkv.view(n, 3, self._n_heads, -1).permute(1, 2, 0, 3)
        if self._dtype == torch.float32:
            q, k, v = heads[:, None]
            out = functional.scaled_dot_product_attention(q, k, v, scale=1.0)[0]
            return out.transpose(0, 1).reshape(n, width // 3)
        q, k, v = heads.to(self._dtype).contiguous()
        scores = self._scores[: n * n].view(n, n)
        out = torch.empty_like(q)
        for head in range(self._n_heads):
            torch.mm(q[head], k[head].T, out=scores)
            torch.mm(torch.softmax(scores, dim=-1), v[head], out=out[head])
        return out.transpose(0, 1).reshape(n, width // 3).float()


class _EncoderLayer:
    def __init__(self, read: _Reader) -> None:
        self.attention_norm = read.norm("self_attn_layer_norm")
        self.qkv = read.linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self.attention_out = read.linear("self_attn.out_proj")
        self.fc_norm = read.norm("final_layer_norm")
        self.fc1 = read.linear("fc1")
        self.fc2 = read.linear("fc2")


# ---- decoder ------------------------------------------------------------------------------


class _DecoderLayer(_EncoderLayer):
    def __init__(self, read: _Reader) -> None:
        super().__init__(read)
        self.listening_norm = read.norm("encoder_attn_layer_norm")
        self.listening_q = read.linear("encoder_attn.q_proj")
        self.listening_kv = read.linear("encoder_attn.k_proj", "encoder_attn.v_proj")
        self.listening_out = read.linear("encoder_attn.out_proj")


@dataclass(slots=True)
class _Heard:
    """Keys and values of windows of one length, by layer: `[n_windows, n_heads, n_keys, d]`.

    Attributes:
        weight: log of how many frames each key stands for: `[n_keys]`.
    """

    keys: list[Tensor]
    values: list[Tensor]
    weight: Tensor

    @property
    def n_windows(self) -> int:
        return len(self.keys[0])

    def attend(self, layer: int, queries: Tensor) -> tuple[Tensor, Tensor]:
        """What `queries` `[n_windows, n_heads, n, d]` hear, and how much of it where."""
        shape = queries.shape
        keys, values = self.keys[layer].flatten(0, 1), self.values[layer].flatten(0, 1)
        scores = torch.bmm(queries.flatten(0, 1).to(keys.dtype), keys.transpose(1, 2))
        share = torch.softmax(scores.add_(self.weight), dim=-1)
        return torch.bmm(share, values).view(shape), share.view(*shape[:3], -1)

    def take(self, windows: Sequence[int]) -> None:
        """Become these windows by index, in this order."""
        rows, n_keys = torch.tensor(windows), len(self.weight)
        self.keys = [_taken(k, rows, n_keys) for k in self.keys]
        self.values = [_taken(v, rows, n_keys) for v in self.values]


@dataclass(slots=True)
class Memory:
    """What a batch of windows listens to; windows of one length stand together."""

    parts: list[_Heard]

    @property
    def n_windows(self) -> int:
        """Windows that are still listened to."""
        return sum(part.n_windows for part in self.parts)

    def keep(self, windows: Sequence[int]) -> list[int]:
        """Forget all windows but these; returns them in the order in which they stand now."""
        kept, first = [], 0
        for part in self.parts:
            own = [i - first for i in windows if first <= i < first + part.n_windows]
            placed = _without_holes(own)
            kept += [first + i for i in placed]
            first += part.n_windows
            part.take(placed)
        self.parts = [part for part in self.parts if part.n_windows]
        return kept


@dataclass(slots=True)
class Cache:
    """Keys and values of the tokens so far, by layer: `[n_rows, n_heads, capacity, d]`."""

    keys: list[Tensor]
    values: list[Tensor]
    length: int = 0

    def take(self, rows: Tensor) -> None:
        """Rows by index; some may be gone, some doubled."""
        self.keys = [_taken(k, rows, self.length) for k in self.keys]
        self.values = [_taken(v, rows, self.length) for v in self.values]

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add `[n_rows, n_heads, n, d]` behind what is there; all keys and values so far."""
        end = self.length + keys.shape[2]
        for store, new in ((self.keys, keys), (self.values, values)):
            if end > store[layer].shape[2]:
                room = torch.empty_like(new[:, :, :1]).repeat(1, 1, max(64, new.shape[2]), 1)
                store[layer] = torch.cat([store[layer], room], dim=2)
            store[layer][:, :, self.length : end] = new
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


class Decoder:
    """Token ids and what was heard -> what comes next."""

    def __init__(self, weights: WhisperWeights, silence: Tensor) -> None:
        """Take the decoder out of a checkpoint.

        Args:
            weights: the checkpoint.
            silence: encoder output of 30 s of silence: `[1500, d_model]`.
        """
        self._dtype = float_for_products()
        self._n_heads = weights.n_heads
        top = _Reader(weights, "model.decoder")
        self._embedding = top.tensor("embed_tokens.weight")
        self._positions = top.tensor("embed_positions.weight")
        self._layers = [
            _DecoderLayer(_Reader(weights, f"model.decoder.layers.{i}"))
            for i in range(weights.n_layers("decoder"))
        ]
        self._norm = top.norm("layer_norm")
        self._vocabulary = Int8Linear(self._embedding)
        self._silence = self._keys_and_values(silence[None])
        self._silence_from: dict[int, tuple[list[Tensor], list[Tensor], Tensor]] = {}

    # -- listening

    def memory(self, encoded: Sequence[Tensor]) -> Memory:
        """Keys and values of windows (each `[n_frames, d_model]`), the silence behind them.

        Windows of one length must stand together.
        """
        runs = groupby(encoded, key=len)
        return Memory([self._heard(torch.stack(list(run))) for _, run in runs])

    def _heard(self, encoded: Tensor) -> _Heard:
        n = encoded.shape[1]
        silent_keys, silent_values, silent_weight = self._silence_behind(n)
        keys, values = self._keys_and_values(encoded, len(silent_weight))
        for own, silent in zip(keys + values, silent_keys + silent_values, strict=True):
            own[:, :, n:] = silent
        return _Heard(keys, values, torch.cat([torch.zeros(n), silent_weight]).to(self._dtype))

    def _keys_and_values(
        self, encoded: Tensor, n_behind: int = 0
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Of windows `[n_windows, n, d_model]`, by layer: `[n_windows, n_heads, n + n_behind, d]`.

        What lies behind the first `n` is for the caller to fill.
        """
        windows, n, width = encoded.shape
        keys, values = [], []
        for layer in self._layers:
            both = layer.listening_kv(encoded.view(windows * n, width))
            split = both.view(windows, n, 2, self._n_heads, -1).permute(2, 0, 3, 1, 4)
            held = torch.empty(*split.shape[:3], n + n_behind, split.shape[4], dtype=self._dtype)
            held[:, :, :, :n] = split
            keys.append(held[0])
            values.append(held[1])
        return keys, values

    def _silence_behind(self, frame: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Silence from `frame` to the end: keys, values and the keys' weights."""
        if frame not in self._silence_from:
            step = _SILENT_FRAMES_PER_KEY
            counts = [min(step, N_FRAMES - at) for at in range(frame, N_FRAMES, step)]
            keys, values = ([_means(t[:, :, frame:], counts) for t in s] for s in self._silence)
            weight = torch.tensor(counts, dtype=torch.float32).log()
            self._silence_from[frame] = keys, values, weight
        return self._silence_from[frame]

    def bytes_heard(self, n_frames: int) -> int:
        """What keys and values of a window of so many frames take."""
        return 2 * len(self._layers) * n_frames * self._embedding.shape[1] * self._dtype.itemsize

    # -- speaking

    def cache(self, n_rows: int) -> Cache:
        """For so many rows, empty."""
        d = self._embedding.shape[1] // self._n_heads
        empty = [torch.empty(n_rows, self._n_heads, 0, d) for _ in self._layers]
        return Cache(empty, list(empty))

    def __call__(
        self, ids: Tensor, cache: Cache, memory: Memory, shares: list[Tensor] | None = None
    ) -> Tensor:
        """Go on by some tokens.

        Args:
            ids: `[n_rows, n]`; rows are the windows of `memory`, each as many times as there
                are beams.
            cache: of the tokens before; these are added.
            memory: what the rows listen to.
            shares: takes each layer's attention to the windows, `[n_rows, n_heads, n, n_keys]`;
                all windows must then be of one length.

        Returns:
            `[n_rows, n, d_model]`, for `logits`.
        """
        rows, n = ids.shape
        x = self._embedding[ids] + self._positions[cache.length : cache.length + n]
        x = x.view(rows * n, -1)
        for index, layer in enumerate(self._layers):
            spoken = self._speak(index, layer.qkv(layer.attention_norm(x)), rows, cache)
            x += layer.attention_out(spoken)
            queries = layer.listening_q(layer.listening_norm(x))
            x += layer.listening_out(self._listen(index, queries, rows, memory, shares))
            x += layer.fc2(functional.gelu(layer.fc1(layer.fc_norm(x))))
        cache.length += n
        return self._norm(x).view(rows, n, -1)

    def logits(self, hidden: Tensor) -> Tensor:
        """`[n_rows, d_model]` -> `[n_rows, vocabulary]`, float32."""
        return self._vocabulary(hidden)

    def _speak(self, layer: int, qkv: Tensor, rows: int, cache: Cache) -> Tensor:
        """Attention to the tokens so far: `[n_rows * n, 3 * d_model]` -> `[..., d_model]`."""
        n, width = len(qkv) // rows, qkv.shape[1] // 3
        q, k, v = qkv.view(rows, n, 3, self._n_heads, -1).permute(2, 0, 3, 1, 4)
        keys, values = cache.extend(layer, k, v)
        scores = q @ keys.transpose(2, 3)
        if n > 1:  # a token does not hear those behind it
            later = torch.ones(n, scores.shape[3], dtype=torch.bool).triu_(scores.shape[3] - n + 1)
            scores.masked_fill_(later, -torch.inf)
        out = torch.softmax(scores, dim=-1) @ values
        return out.transpose(1, 2).reshape(rows * n, width)

    def _listen(
        self,
        layer: int,
        queries: Tensor,
        rows: int,
        memory: Memory,
        shares: list[Tensor] | None,
    ) -> Tensor:
        """Attention to the windows: `[n_rows * n, d_model]` -> the same."""
        windows = memory.n_windows
        per_window = len(queries) // windows
        split = queries.view(windows, per_window, self._n_heads, -1).transpose(1, 2)
        heard, first = [], 0
        for part in memory.parts:
            out, share = part.attend(layer, split[first : first + part.n_windows])
            heard.append(out)
            first += part.n_windows
            if shares is not None:
                shares.append(share)
        return torch.cat(heard).transpose(1, 2).reshape(queries.shape).float()


def _taken(store: Tensor, rows: Tensor, length: int) -> Tensor:
    """`[n, n_heads, capacity, d]` -> its rows by index; copies those alone that move.

    Args:
        store: changed, unless there must be more rows than it has.
        rows: which, `[n_rows]`.
        length: how much of the capacity is in use.
    """
    if len(rows) > len(store):
        return store.index_select(0, rows)
    moved = (rows != torch.arange(len(rows))).nonzero()[:, 0]
    if len(moved):
        used = store[:, :, :length]
        used.index_copy_(0, moved, used.index_select(0, rows[moved]))
    return store[: len(rows)]


def _without_holes(kept: Sequence[int]) -> list[int]:
    """The same indices so ordered that those at the end fill the places of those that are gone."""
    n = len(kept)
    behind = iter(i for i in kept if i >= n)
    staying = {i for i in kept if i < n}
    return [place if place in staying else next(behind) for place in range(n)]


def _means(frames: Tensor, counts: Sequence[int]) -> Tensor:
    """Means over `counts` frames each: `[1, n_heads, n, d]` -> `[1, n_heads, len(counts), d]`."""
    if not counts:
        return frames
    parts = torch.split(frames.float(), list(counts), dim=2)
    return torch.cat([p.mean(dim=2, keepdim=True) for p in parts], dim=2).to(frames.dtype)
