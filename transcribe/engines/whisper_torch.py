"""Whisper's layers by transformers: any Whisper checkpoint in safetensors.

Owns what is PyTorch's own: loading, precision, the encoder and how far it works ahead of the
decoder (`whisper_decoding.py`, `whisper_beams.py`), cross-attention. What is done with it is in
`whisper.py`. bfloat16 or float16 on a GPU, float32 on CPU.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from transcribe.batching import plan_batches
from transcribe.engines.base import EngineWork
from transcribe.engines.lanes import Lane, Mark, precision
from transcribe.engines.log_mel import LogMel
from transcribe.engines.whisper import (
    FULL_SAMPLES,
    SECONDS_PER_FRAME,
    Generated,
    Samples,
    Search,
)
from transcribe.engines.whisper_beams import BeamDecoder
from transcribe.engines.whisper_decoding import SlotDecoder, Vocabulary, Written
from transcribe.engines.whisper_rows import feed_forward, fused, slot_bytes
from transcribe.engines.whisper_tokens import WhisperTokens
from transcribe.engines.whisper_words import Alignment, time_warping_path, token_starts
from transcribe.errors import Fatal
from transcribe.models import Model

_WINDOWS_PER_SLOT = 4
_FEWEST_SLOTS = 8  # a window's beams need five
_MOST_SLOTS = 128
_MEMORY_SHARE_OF_SLOTS = 0.5
_STEPS_PER_LOOK = 4  # on a GPU; a text is known to be finished 4 to 8 steps late
# Samples in a batch of the encoder. On a CPU one window at a time is as fast.
_CHUNK_SAMPLES = {"cpu": 1, "cuda": 16 * FULL_SAMPLES}
_CHUNKS_AHEAD = {"cpu": 1, "cuda": 2}
_MEDIAN_FILTER_FRAMES = 7


@dataclass(slots=True)
class Heard:
    """A window and, once somebody needed it, its encoder output `[1500, d_model]`.

    Attributes:
        padded: samples that the encoder hears; silence follows up to 30 s.
        ready: reached when the device has made `output`.
    """

    samples: Samples
    padded: int
    output: Tensor | None = None
    ready: Mark | None = None


class TorchRuntime:
    """A Whisper checkpoint loaded into transformers (a `WhisperRuntime`)."""

    name = "whisper-transformers"

    def __init__(self, model: Model, *, device: str = "cpu", threads: int = 1) -> None:
        """Load the weights.

        Raises:
            Fatal: the directory does not hold a Whisper checkpoint in safetensors.
        """
        if device == "cpu":
            torch.set_num_threads(threads)
        self.device = device
        self.work = EngineWork()
        self._model = _load(model, device)
        config = self._model.config
        # Multilingual vocabularies have one token more before the special ones.
        self.is_multilingual: bool = config.vocab_size >= 51_865
        self._tokens = WhisperTokens.load(model.path, self.is_multilingual)
        self._alignment_heads = _alignment_heads(self._model)
        self._encoder = Encoder(self._model, device, self.work)
        suppressed = self._model.generation_config.suppress_tokens or []
        self._vocabulary = Vocabulary.of(self._tokens, suppressed)
        # On a CPU a look at the slots costs nothing.
        steps, behind = (1, 0) if device == "cpu" else (_STEPS_PER_LOOK, 1)
        self._decoder = SlotDecoder(
            self._model,
            self._vocabulary,
            slots_for(self._model),
            steps_per_look=steps,
            looks_behind=behind,
        )
        self._beams: dict[int, BeamDecoder] = {}
        # Slots are refilled from what else is there, so there should be several windows for each.
        self.batch_windows = _WINDOWS_PER_SLOT * self._decoder.n_slots

    def encode(self, windows: Sequence[Samples], padded: Sequence[int]) -> list[Heard]:
        """See `WhisperRuntime`: encoded when first needed, so that decoding need not wait."""
        return [Heard(*one) for one in zip(windows, padded, strict=True)]

    def language_probabilities(self, encoded: Sequence[Heard]) -> list[dict[str, float]]:
        """See `WhisperRuntime`. Keeps as many outputs as one `generate` would."""
        names = self._tokens.language_tokens()
        told: list[dict[str, float]] = []
        for begin in range(0, len(encoded), self._decoder.n_slots):
            some = encoded[begin : begin + self._decoder.n_slots]
            self._encoder.hear_all(some)
            with self._decoder.lane.entered():
                outputs = [output_of(heard) for heard in some]
            found = self._decoder.language_probabilities(outputs)
            told += [dict(zip(names, row, strict=True)) for row in found]
            if begin + len(some) > self.batch_windows:
                for heard in some:
                    heard.output = heard.ready = None
        self._encoder.count()
        return told

    def generate(
        self, encoded: Sequence[Heard], prompts: Sequence[Sequence[int]], search: Search
    ) -> list[Generated]:
        """See `WhisperRuntime`."""
        if search.beam_size > 1:
            return self._by_beams(encoded, prompts, search)
        stepped = self._decoder.slots_stepped
        feed = Ahead(encoded, self._encoder)
        written = self._decoder.write(feed, lambda i: output_of(encoded[i]), prompts)
        self._encoder.count()
        self.work.token_slots += self._decoder.slots_stepped - stepped
        return [_generated(text) for text in written]

    def _by_beams(
        self, encoded: Sequence[Heard], prompts: Sequence[Sequence[int]], search: Search
    ) -> list[Generated]:
        """The windows that are tried again, as many at once as there is room for."""
        decoder = self._beams.get(search.beam_size)
        if decoder is None:
            slots = self._decoder
            decoder = BeamDecoder(
                slots.rows, self._vocabulary, slots.rules, slots.lane, search.beam_size
            )
            self._beams[search.beam_size] = decoder
        found: list[Generated] = []
        for begin in range(0, len(encoded), decoder.n_windows):
            some = encoded[begin : begin + decoder.n_windows]
            self._encoder.hear_all(some)
            asked = prompts[begin : begin + decoder.n_windows]
            output = partial(_output_at, some)
            texts = decoder.write(output, asked, search.no_repeat_ngram_size)
            found += map(_generated, texts)
        self._encoder.count()
        return found

    def _outputs(self, encoded: Sequence[Heard]) -> list[Tensor]:
        self._encoder.hear_all(encoded)
        outputs = [output_of(heard) for heard in encoded]
        self._encoder.count()
        return outputs

    @torch.inference_mode()
    def align(
        self,
        encoded: Sequence[Heard],
        prompts: Sequence[Sequence[int]],
        texts: Sequence[Sequence[int]],
        n_frames: Sequence[int],
    ) -> list[Alignment]:
        """See `WhisperRuntime`.

        The cross-attention of the checkpoint's alignment heads, normalised over tokens,
        smoothed over frames and averaged, then time-warped; as in Whisper's word timestamps.
        """
        outputs = self._outputs(encoded)
        return [self._align(*one) for one in zip(outputs, prompts, texts, n_frames, strict=True)]

    def _align(
        self, encoded: Tensor, prompt: Sequence[int], text: Sequence[int], frames: int
    ) -> Alignment:
        # Whisper aligns text that was written without timestamps.
        prefix = [*prompt, self._tokens.no_timestamps]
        ids = torch.tensor([[*prefix, *text, self._tokens.end_of_text]], device=encoded.device)
        output = self._with_attention(encoded[None], ids)
        chosen = [output.cross_attentions[layer][0, head] for layer, head in self._alignment_heads]
        weights = torch.stack(chosen)[:, len(prefix) - 1 : -1, :frames].float()
        std, mean = torch.std_mean(weights, dim=-2, keepdim=True, unbiased=False)
        smooth = _median_filter((weights - mean) / std.clamp(min=1e-6)).mean(dim=0)
        path = time_warping_path(smooth.cpu().numpy())
        logits = output.logits[0, len(prefix) - 1 : len(prefix) - 1 + len(text)].float()
        ordinary = logits[:, : self._tokens.end_of_text].softmax(dim=-1)
        said = ordinary.gather(1, torch.tensor(text, device=encoded.device)[:, None])[:, 0]
        starts = token_starts(path, len(text) + 1, SECONDS_PER_FRAME)
        return Alignment(starts, said.tolist())

    def _with_attention(self, encoded: Tensor, ids: Tensor) -> Any:
        """A forward pass that also returns attention, which only the eager kernels do."""
        fast = self._model.config._attn_implementation
        self._model.set_attn_implementation("eager")
        try:
            return self._model(
                encoder_outputs=_encoder_outputs(encoded),
                decoder_input_ids=ids,
                use_cache=False,
                output_attentions=True,
            )
        finally:
            self._model.set_attn_implementation(fast)


class Encoder:
    """A checkpoint's encoder in a lane of its own, beside the decoder's."""

    def __init__(self, model: Any, device: str, work: EngineWork) -> None:
        """Take the encoder of a loaded `WhisperForConditionalGeneration`.

        Args:
            model: on its device.
            device: `cpu` or `cuda`.
            work: where its seconds are counted.
        """
        self.ahead = _CHUNKS_AHEAD[device]
        self._encoder = model.model.encoder
        self._own = [_EncoderLayer.of(layer) for layer in self._encoder.layers]
        self._dtype: torch.dtype = model.dtype
        self._chunk_samples = _CHUNK_SAMPLES[device]
        self._features = LogMel(model.config.num_mel_bins, device)
        self._work = work
        self._marks: list[tuple[Mark, Mark, Mark]] = []
        self._silence: Tensor | None = None
        self._lane = Lane(device)
        nothing = Heard(np.zeros(0, dtype=np.int16), FULL_SAMPLES)
        self.hear([nothing])
        assert nothing.output is not None
        self._silence = nothing.output[None]
        self.count()

    def chunks(self, windows: Sequence[Heard]) -> list[list[int]]:
        """Indices of the windows without output, in batches for `hear`."""
        missing = [i for i, heard in enumerate(windows) if heard.output is None]
        planned = plan_batches([windows[i].padded for i in missing], self._chunk_samples)
        return [[missing[position] for position in batch] for batch in planned]

    def hear_all(self, windows: Sequence[Heard]) -> None:
        """`hear` those without output, whatever their lengths."""
        for chunk in self.chunks(windows):
            self.hear([windows[i] for i in chunk])

    @torch.inference_mode()
    def hear(self, windows: Sequence[Heard]) -> None:
        """Give windows of one padded length their output; does not wait for the device."""
        with self._lane.entered():
            started = self._lane.mark()
            samples = [heard.samples for heard in windows]
            features = self._features(samples, windows[0].padded).to(self._dtype)
            between = self._lane.mark()
            output = self._layers(features)
            if self._silence is not None:
                silence = self._silence[:, output.shape[1] :].expand(len(windows), -1, -1)
                output = torch.cat([output, silence], dim=1)
            ready = self._lane.mark()
        self._marks.append((started, between, ready))
        for heard, own in zip(windows, output, strict=True):
            heard.output, heard.ready = own, ready

    def _layers(self, features: Tensor) -> Tensor:
        """`[n, n_mels, n_frames]` -> `[n, n_frames / 2, d_model]`."""
        encoder = self._encoder
        hidden = functional.gelu(encoder.conv1(features))
        hidden = functional.gelu(encoder.conv2(hidden)).transpose(1, 2)
        positions = encoder.embed_positions.weight[: hidden.shape[1]]
        # In this order in memory too: else every layer would read and add across rows.
        hidden = (hidden + positions).contiguous()
        for layer in self._own:
            hidden = layer(hidden)
        result: Tensor = encoder.layer_norm(hidden)
        return result

    def count(self) -> None:
        """Add the seconds of what was heard to `work`; waits for it."""
        for started, between, ready in self._marks:
            ready.wait()
            self._work.features_s += between.seconds_since(started)
            self._work.encoder_s += ready.seconds_since(between)
        self._marks.clear()


@dataclass(frozen=True, slots=True)
class _EncoderLayer:
    """One encoder layer: queries, keys and values in one product, and none of them copied.

    transformers' own layer makes them contiguous for each head, which on a GPU takes as long as
    half of the products, and takes 30 s only.
    """

    heads: int
    own: Tensor
    own_bias: Tensor
    layer: Any

    @classmethod
    @torch.inference_mode()
    def of(cls, layer: Any) -> _EncoderLayer:
        return cls(layer.self_attn.num_heads, *fused(layer.self_attn), layer)

    def __call__(self, hidden: Tensor) -> Tensor:
        """`[n, n_frames, d_model]` -> the same shape."""
        layer, (n, frames, width) = self.layer, hidden.shape
        made = functional.linear(layer.self_attn_layer_norm(hidden), self.own, self.own_bias)
        made = made.view(n, frames, 3, self.heads, width // self.heads)
        query, key, value = made.permute(2, 0, 3, 1, 4)
        heard = functional.scaled_dot_product_attention(query, key, value)
        hidden = hidden + layer.self_attn.out_proj(heard.transpose(1, 2).flatten(2))
        hidden = hidden + feed_forward(layer, hidden)
        if hidden.dtype == torch.float16:  # large checkpoints leave its range
            limit = torch.finfo(torch.float16).max - 1000
            hidden = hidden.clamp(-limit, limit)
        return hidden


class Ahead:
    """Windows on their way to the decoder, encoded some batches ahead of it (a `Feed`)."""

    def __init__(self, windows: Sequence[Heard], encoder: Encoder) -> None:
        self._windows = windows
        self._encoder = encoder
        heard = [i for i, window in enumerate(windows) if window.output is not None]
        self._begun: deque[list[int]] = deque([heard] if heard else [])
        self._waiting = deque(encoder.chunks(windows))

    def __bool__(self) -> bool:
        return bool(self._begun or self._waiting)

    def take(self, most: int, must: bool) -> list[int]:
        """See `Feed`."""
        taken: list[int] = []
        while len(taken) < most and self:
            self._go_on()
            batch = self._begun[0]
            ready = self._windows[batch[0]].ready
            if not (ready is None or ready.is_reached() or (must and not taken)):
                break
            room = most - len(taken)
            taken += batch[:room]
            self._begun[0] = batch[room:]
            if not self._begun[0]:
                self._begun.popleft()
                self._go_on()
        return taken

    def _go_on(self) -> None:
        """Have the encoder busy, but not far ahead: its outputs take memory."""
        while self._waiting and len(self._begun) < self._encoder.ahead:
            batch = self._waiting.popleft()
            self._encoder.hear([self._windows[i] for i in batch])
            self._begun.append(batch)


def output_of(heard: Heard) -> Tensor:
    """Encoder output of a window that was heard, for the lane in use."""
    assert heard.output is not None and heard.ready is not None
    heard.ready.hold_back()
    return heard.output


def _output_at(windows: Sequence[Heard], index: int) -> Tensor:
    return output_of(windows[index])


def slots_for(model: Any) -> int:
    """How many slots the device has room for: on a GPU a power of two, in half of what is free."""
    if model.device.type == "cpu":
        return _FEWEST_SLOTS
    free, _ = torch.cuda.mem_get_info()
    room = int(free * _MEMORY_SHARE_OF_SLOTS) // slot_bytes(model.config, model.dtype)
    return int(1 << (max(_FEWEST_SLOTS, min(_MOST_SLOTS, room)).bit_length() - 1))


def _load(model: Model, device: str) -> Any:
    from transformers import WhisperForConditionalGeneration

    try:
        loaded: Any = WhisperForConditionalGeneration.from_pretrained(
            str(model.path), use_safetensors=True, local_files_only=True, dtype=precision(device)
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Fatal(f"--model {model.name}: transformers cannot load it ({reason}).") from None
    return loaded.to(device).eval()


def _generated(text: Written) -> Generated:
    return Generated(text.ids, text.total_logprob / (len(text.ids) + 1), text.no_speech_prob)


def _alignment_heads(model: Any) -> list[tuple[int, int]]:
    """The checkpoint's (layer, head) pairs that follow the speech; else the upper half of all."""
    told = getattr(model.generation_config, "alignment_heads", None)
    if told:
        return [(int(layer), int(head)) for layer, head in told]
    layers, heads = model.config.decoder_layers, model.config.decoder_attention_heads
    return [(layer, head) for layer in range(layers // 2, layers) for head in range(heads)]


def _encoder_outputs(encoded: Tensor) -> Any:
    from transformers.modeling_outputs import BaseModelOutput

    return BaseModelOutput(last_hidden_state=encoded)


def _median_filter(weights: Tensor) -> Tensor:
    """Running median over the last axis, edges mirrored; short inputs stay as they are."""
    half = _MEDIAN_FILTER_FRAMES // 2
    if weights.shape[-1] <= half:
        return weights
    padded = functional.pad(weights, (half, half), mode="reflect")
    return padded.unfold(-1, _MEDIAN_FILTER_FRAMES, 1).median(dim=-1).values
