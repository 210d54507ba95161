"""Whisper's layers by transformers: any Whisper checkpoint in safetensors.

Owns what is PyTorch's own: loading, precision, the search (transformers'), cross-attention.
What is done with it is in `whisper.py`. bfloat16 or float16 on a GPU, float32 on CPU.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transcribe.batching import plan_batches
from transcribe.engines.base import EngineWork
from transcribe.engines.log_mel import LogMel
from transcribe.engines.whisper import (
    FULL_SAMPLES,
    SECONDS_PER_FRAME,
    Generated,
    Samples,
    Search,
)
from transcribe.engines.whisper_tokens import WhisperTokens
from transcribe.engines.whisper_words import Alignment, time_warping_path, token_starts
from transcribe.errors import Fatal
from transcribe.models import Model

_MAX_NEW_TOKENS = 224  # half of Whisper's text context, as in its reference decoding
_LAST_FIRST_TIMESTAMP = 50  # text begins in the first second (max_initial_timestamp)
_MEDIAN_FILTER_FRAMES = 7


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
        self.batch_windows = 8 if device == "cpu" else 64
        self._model = _load(model, device)
        config = self._model.config
        self._dtype: torch.dtype = self._model.dtype
        # Multilingual vocabularies have one token more before the special ones.
        self.is_multilingual: bool = config.vocab_size >= 51_865
        self._tokens = WhisperTokens.load(model.path, self.is_multilingual)
        self._features = LogMel(config.num_mel_bins, device)
        self._alignment_heads = _alignment_heads(self._model)
        self._silence = self._encoder_output([np.zeros(0, dtype=np.int16)], FULL_SAMPLES)

    @torch.inference_mode()
    def encode(self, windows: Sequence[Samples], padded: Sequence[int]) -> list[Tensor]:
        """See `WhisperRuntime`: each `[1500, d_model]`, on the device."""
        encoded: dict[int, Tensor] = {}
        # On a CPU one window at a time is as fast, and never depends on its neighbours.
        budget = self.batch_windows * FULL_SAMPLES if self.device != "cpu" else 1
        for batch in plan_batches(padded, budget):
            heard = self._encoder_output([windows[i] for i in batch], padded[batch[0]])
            silence = self._silence[:, heard.shape[1] :].expand(len(batch), -1, -1)
            whole = torch.cat([heard, silence], dim=1)
            encoded.update(zip(batch, whole, strict=True))
        return [encoded[i] for i in range(len(windows))]

    @torch.inference_mode()
    def _encoder_output(self, windows: Sequence[Samples], length: int) -> Tensor:
        """Windows padded to `length` through the encoder: `[n, length / 320, d_model]`.

        The encoder's own `forward` takes 30 s only, so its layers are called one by one.
        """
        encoder = self._model.model.encoder
        started = time.perf_counter()
        features = self._features(windows, length).to(self._dtype)
        self.work.features_s += time.perf_counter() - started
        hidden = torch.nn.functional.gelu(encoder.conv1(features))
        hidden = torch.nn.functional.gelu(encoder.conv2(hidden)).transpose(1, 2)
        hidden = hidden + encoder.embed_positions.weight[: hidden.shape[1]]
        for layer in encoder.layers:
            hidden = layer(hidden, None)
        result: Tensor = encoder.layer_norm(hidden)
        return result

    def language_probabilities(self, encoded: Tensor) -> dict[str, float]:
        """See `WhisperRuntime`."""
        tokens = self._tokens.language_tokens()
        logits = self._first_logits(encoded[None])[0, list(tokens.values())]
        return dict(zip(tokens, logits.softmax(dim=-1).tolist(), strict=True))

    @torch.inference_mode()
    def _first_logits(self, encoded: Tensor) -> Tensor:
        """What the decoder expects after the start token alone: `[n, vocabulary]`."""
        start = torch.full(
            (len(encoded), 1), self._tokens.start_of_transcript, device=encoded.device
        )
        return self._logits(encoded, start)[:, 0]

    def _logits(self, encoded: Tensor, ids: Tensor) -> Tensor:
        output = self._model(
            encoder_outputs=_encoder_outputs(encoded), decoder_input_ids=ids, use_cache=False
        )
        logits: Tensor = output.logits.float()
        return logits

    @torch.inference_mode()
    def generate(
        self, encoded: Sequence[Tensor], prompts: Sequence[Sequence[int]], search: Search
    ) -> list[Generated]:
        """See `WhisperRuntime`."""
        from transformers import GenerationMixin, LogitsProcessorList

        batch = torch.stack(list(encoded))
        silent = self._first_logits(batch).softmax(dim=-1)[:, self._tokens.no_speech].tolist()
        prompt = torch.tensor([list(p) for p in prompts], device=self.device)
        likelihood = _GreedyLikelihood(len(batch), self._tokens.end_of_text)
        rules: list[Any] = [_timestamp_rules(self._tokens, prompt.shape[1])]
        if search.beam_size == 1:
            rules.append(likelihood)
        # Whisper's own generate() cuts, pads and tries again by itself; only the search is wanted.
        output: Any = GenerationMixin.generate(
            self._model,
            encoder_outputs=_encoder_outputs(batch),
            attention_mask=torch.ones(batch.shape[:2], device=self.device),
            decoder_input_ids=prompt,
            logits_processor=LogitsProcessorList(rules),
            generation_config=self._generation_config(search),
        )
        ids = [self._text(row) for row in output.sequences[:, prompt.shape[1] :].tolist()]
        if search.beam_size == 1:
            sums = likelihood.sums()
        else:
            # transformers divides by the number of generated tokens, end token included.
            sums = [
                score * (len(text) + 1)
                for score, text in zip(output.sequences_scores.tolist(), ids, strict=True)
            ]
        return [
            Generated(text, total / (len(text) + 1), no_speech)
            for text, total, no_speech in zip(ids, sums, silent, strict=True)
        ]

    def _generation_config(self, search: Search) -> Any:
        from transformers import GenerationConfig

        end = self._tokens.end_of_text
        told = self._model.generation_config
        never = {*(told.suppress_tokens or []), *self._tokens.never_written()}
        beams = {"early_stopping": True, "output_scores": True} if search.beam_size > 1 else {}
        return GenerationConfig(
            max_new_tokens=_MAX_NEW_TOKENS,
            num_beams=search.beam_size,
            no_repeat_ngram_size=search.no_repeat_ngram_size,
            do_sample=False,
            suppress_tokens=sorted(never),
            begin_suppress_tokens=told.begin_suppress_tokens,
            eos_token_id=end,
            pad_token_id=end,
            decoder_start_token_id=self._tokens.start_of_transcript,
            return_dict_in_generate=True,
            **beams,
        )  # type: ignore[no-untyped-call]

    def _text(self, generated: Sequence[int]) -> list[int]:
        """What was generated before the end token."""
        end = self._tokens.end_of_text
        return list(generated[: generated.index(end)] if end in generated else generated)

    @torch.inference_mode()
    def align(
        self,
        encoded: Sequence[Tensor],
        prompts: Sequence[Sequence[int]],
        texts: Sequence[Sequence[int]],
        n_frames: Sequence[int],
    ) -> list[Alignment]:
        """See `WhisperRuntime`.

        The cross-attention of the checkpoint's alignment heads, normalised over tokens,
        smoothed over frames and averaged, then time-warped; as in Whisper's word timestamps.
        """
        return [self._align(*one) for one in zip(encoded, prompts, texts, n_frames, strict=True)]

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


def _load(model: Model, device: str) -> Any:
    from transformers import WhisperForConditionalGeneration

    dtype = torch.float32
    if device != "cpu":
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    try:
        loaded: Any = WhisperForConditionalGeneration.from_pretrained(
            str(model.path), use_safetensors=True, local_files_only=True, dtype=dtype
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Fatal(f"--model {model.name}: transformers cannot load it ({reason}).") from None
    return loaded.to(device).eval()


def _alignment_heads(model: Any) -> list[tuple[int, int]]:
    """The checkpoint's (layer, head) pairs that follow the speech; else the upper half of all."""
    told = getattr(model.generation_config, "alignment_heads", None)
    if told:
        return [(int(layer), int(head)) for layer, head in told]
    layers, heads = model.config.decoder_layers, model.config.decoder_attention_heads
    return [(layer, head) for layer in range(layers // 2, layers) for head in range(heads)]


def _timestamp_rules(tokens: WhisperTokens, begin: int) -> Any:
    """Timestamps come in pairs and in order (Radford et al. 2022, section 2.3)."""
    from transformers import GenerationConfig, WhisperTimeStampLogitsProcessor

    told: Any = GenerationConfig(
        eos_token_id=tokens.end_of_text,
        no_timestamps_token_id=tokens.no_timestamps,
        max_initial_timestamp_index=_LAST_FIRST_TIMESTAMP,
    )  # type: ignore[no-untyped-call]
    return WhisperTimeStampLogitsProcessor(told, begin_index=begin)


class _GreedyLikelihood:
    """Adds up the log-probabilities of greedily chosen tokens as they are chosen.

    Sits last among the logits processors. Keeping every step's scores instead, as transformers
    offers, takes gigabytes.
    """

    def __init__(self, n_windows: int, end_of_text: int) -> None:
        self._end = end_of_text
        self._total = torch.zeros(n_windows)
        self._ended = torch.zeros(n_windows, dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        best, token = scores.float().log_softmax(dim=-1).max(dim=-1)
        self._total, self._ended = self._total.to(best.device), self._ended.to(best.device)
        self._total += torch.where(self._ended, 0.0, best)
        self._ended |= token == self._end
        return scores

    def sums(self) -> list[float]:
        """Natural log-likelihood of each window's tokens."""
        total: list[float] = self._total.tolist()
        return total


def _encoder_outputs(encoded: Tensor) -> Any:
    from transformers.modeling_outputs import BaseModelOutput

    return BaseModelOutput(last_hidden_state=encoded)


def _median_filter(weights: Tensor) -> Tensor:
    """Running median over the last axis, edges mirrored; short inputs stay as they are."""
    half = _MEDIAN_FILTER_FRAMES // 2
    if weights.shape[-1] <= half:
        return weights
    padded = torch.nn.functional.pad(weights, (half, half), mode="reflect")
    return padded.unfold(-1, _MEDIAN_FILTER_FRAMES, 1).median(dim=-1).values
