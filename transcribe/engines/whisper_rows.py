"""Whisper's decoder, one token at a time, on fixed buffers of a device that must never wait.

Owns the decoder's arithmetic for one token of every row, and the buffers it reads and writes: each
window's cross-attention keys and values, projected once, and each row's own. Every call has one
shape, so it can be part of a CUDA graph. Which window sits where, and what is written, is for
`whisper_decoding.py` and `whisper_beams.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from transcribe.engines.whisper_tokens import MAX_NEW_TOKENS

MAX_PROMPT = 4


def slot_bytes(config: Any, dtype: torch.dtype) -> int:
    """Bytes that one slot takes on the device, its row of logits included."""
    frames = config.max_source_positions + _n_positions(config)
    kept = 2 * config.decoder_layers * frames * config.d_model * dtype.itemsize
    return int(kept + 3 * 4 * config.vocab_size)


def _n_positions(config: Any) -> int:
    """Length of the decoder's own cache, a multiple of 8 where the model allows (alignment)."""
    wanted = -(-(MAX_PROMPT + MAX_NEW_TOKENS) // 8) * 8
    return int(min(config.max_target_positions, wanted))


class DecoderRows:
    """A checkpoint's decoder with so many windows and as many rows."""

    def __init__(self, model: Any, n_rows: int) -> None:
        """Lay out the buffers.

        Args:
            model: a `WhisperForConditionalGeneration`, loaded on its device.
            n_rows: texts that are written at once, and windows that are heard.
        """
        config = model.config
        self.n_rows = n_rows
        self.device = str(model.device)
        self.n_positions = _n_positions(config)
        self._weights = _DecoderWeights.of(model)
        heads, width = self._weights.heads, config.d_model // self._weights.heads
        layers, frames = config.decoder_layers, config.max_source_positions
        kept: dict[str, Any] = {"device": model.device, "dtype": model.dtype}
        # keys and values (2), layer, window or row, head, frame or position, width of a head
        self._cross = torch.zeros(2, layers, n_rows, heads, frames, width, **kept)
        self._own = torch.zeros(2, layers, n_rows, heads, self.n_positions, width, **kept)
        self._axis = torch.arange(self.n_positions, device=model.device)

    def listen(self, window: int, output: Tensor, rows_each: int = 1) -> None:
        """Cross-attention keys and values of all layers, in one product.

        Args:
            window: which one.
            output: of the encoder, `[1500, d_model]`.
            rows_each: as many rows, side by side, begin to write about each window.
        """
        # What is masked must be a number all the same.
        self._own[:, :, window * rows_each : (window + 1) * rows_each] = 0
        weights = self._weights
        made = functional.linear(output, weights.cross, weights.cross_bias)
        made = made.view(len(output), 2, self._own.shape[1], weights.heads, -1)
        self._cross[:, :, window].copy_(made.permute(1, 2, 3, 0, 4))

    def move(self, source: int, target: int) -> None:
        """Copy a window and the row of the same number to another place."""
        for buffer in (self._cross, self._own):
            buffer[:, :, target].copy_(buffer[:, :, source])

    def take(self, rows: Tensor) -> None:
        """Let the first rows go on from the texts of these: `[n]`."""
        for layer in range(self._own.shape[1]):  # one at a time: the copy takes memory
            own = self._own[:, layer]
            own[:, : len(rows)] = own.index_select(1, rows)

    def logits(self, token: Tensor, position: Tensor, n_windows: int) -> Tensor:
        """What may come after a token of each of the first rows; in place, nothing that lasts.

        Args:
            token, position: `[n]`; what the row reads now, and where in its text.
            n_windows: the first windows are heard, each by `n / n_windows` rows side by side.

        Returns:
            float32 `[n, vocabulary]`.
        """
        weights, n = self._weights, len(token)
        heads, width = weights.heads, self._own.shape[-1]
        hidden = functional.embedding(token, weights.embedding)
        hidden = hidden + functional.embedding(position, weights.positions)
        mask = (self._axis <= position[:, None])[:, None, None]
        at = position[:, None, None, None].expand(n, heads, 1, width)
        for index, layer in enumerate(weights.layers):
            made = functional.linear(layer.own_norm(hidden), layer.own, layer.own_bias)
            query, key, value = made.view(n, 3, heads, 1, width).unbind(1)
            keys, values = self._own[0, index, :n], self._own[1, index, :n]
            keys.scatter_(2, at, key)
            values.scatter_(2, at, value)
            hidden = hidden + layer.own_out(_attended(query, keys, values, mask))
            made = functional.linear(layer.cross_norm(hidden), layer.query, layer.query_bias)
            query = made.view(n_windows, -1, heads, width).transpose(1, 2)
            keys, values = self._cross[0, index, :n_windows], self._cross[1, index, :n_windows]
            hidden = hidden + layer.cross_out(_attended(query, keys, values, None))
            hidden = hidden + feed_forward(layer.last, hidden)
        return functional.linear(weights.norm(hidden), weights.projection).float()


def _attended(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of `[n_windows, heads, rows_each, width]`, scaled already: `[n, d_model]`."""
    heard = functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=1.0)
    return heard.transpose(1, 2).flatten(0, 1).flatten(1)


def fused(attention: Any, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Weight and bias of queries (times `scale`), keys and values in one product."""
    query, key, value = attention.q_proj, attention.k_proj, attention.v_proj
    weight = torch.cat([query.weight * scale, key.weight, value.weight])
    bias = torch.cat([query.bias * scale, torch.zeros_like(value.bias), value.bias])
    return weight, bias


def feed_forward(layer: Any, hidden: Tensor) -> Tensor:
    """A layer's second half, without the sum."""
    made: Tensor = layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(hidden))))
    return made


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
        weight, bias = fused(own, own.scaling)
        return cls(
            own_norm=layer.self_attn_layer_norm,
            own=weight,
            own_bias=bias,
            own_out=own.out_proj,
            cross_norm=layer.encoder_attn_layer_norm,
            query=cross.q_proj.weight * cross.scaling,
            query_bias=cross.q_proj.bias * cross.scaling,
            cross_out=cross.out_proj,
            last=layer,
        )


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
