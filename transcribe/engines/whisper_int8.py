"""Whisper's layers in eight bits on a CPU, for checkpoints of either format.

Owns how encoder, decoder and search are put together for `whisper.py`; the layers are in
`whisper_layers.py`, the search in `whisper_search.py`.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from transcribe.engines.base import EngineWork
from transcribe.engines.log_mel import LogMel
from transcribe.engines.whisper import (
    FULL_SAMPLES,
    SECONDS_PER_FRAME,
    Generated,
    Samples,
    Search,
)
from transcribe.engines.whisper_layers import N_FRAMES, Cache, Decoder, Encoder, Memory
from transcribe.engines.whisper_search import TextRules, Written, beams, greedy
from transcribe.engines.whisper_tokens import WhisperTokens
from transcribe.engines.whisper_weights import read_weights
from transcribe.engines.whisper_words import Alignment, attention_path, token_starts
from transcribe.errors import Fatal
from transcribe.models import Model

_MEMORY_BYTES = 1 << 30  # keys and values of the windows that are decoded together, at most
_MOST_ROWS = 96  # texts written together: more do not make a row cheaper


class Int8Runtime:
    """A Whisper checkpoint in eight bits (a `WhisperRuntime`)."""

    name = "whisper-int8"
    device = "cpu"

    def __init__(self, model: Model, *, threads: int = 1) -> None:
        """Load and quantise the weights.

        Raises:
            Fatal: the directory does not hold a Whisper checkpoint.
        """
        torch.set_num_threads(threads)
        self.work = EngineWork()
        _keep_freed_memory()
        try:
            weights = read_weights(model.path)
        except (OSError, ValueError, LookupError) as error:
            raise Fatal(f"--model {model.name}: its weights cannot be read ({error}).") from None
        # Multilingual vocabularies have one token more before the special ones.
        self.is_multilingual = weights.vocabulary >= 51_865
        self._tokens = WhisperTokens.load(model.path, self.is_multilingual)
        self._languages = self._tokens.language_tokens() if self.is_multilingual else {}
        self._features = LogMel(weights.n_mels)
        self._heads = weights.alignment_heads or _upper_half(
            weights.n_layers("decoder"), weights.n_heads
        )
        self._rules = TextRules(
            self._tokens, weights.vocabulary, weights.suppressed, weights.suppressed_first
        )
        with torch.inference_mode():
            self._encoder = Encoder(weights)
            silence = self._encoder(self._features([np.zeros(0, dtype=np.int16)], FULL_SAMPLES))
            self._decoder = Decoder(weights, silence)
        a_window = self._decoder.bytes_heard(N_FRAMES)
        self.batch_windows = max(1, min(_MOST_ROWS, _MEMORY_BYTES // a_window))

    @torch.inference_mode()
    def encode(self, windows: Sequence[Samples], padded: Sequence[int]) -> list[Tensor]:
        """See `WhisperRuntime`: each `[padded / 320, d_model]`; the decoder adds the silence.

        One window at a time: what it works on stays in the cache.
        """
        encoded = []
        for samples, length in zip(windows, padded, strict=True):
            started = time.perf_counter()
            features = self._features([samples], length)
            self.work.features_s += time.perf_counter() - started
            encoded.append(self._encoder(features))
        return encoded

    @torch.inference_mode()
    def language_probabilities(self, encoded: Sequence[Tensor]) -> list[dict[str, float]]:
        """See `WhisperRuntime`."""
        return [self._language_probabilities(output) for output in encoded]

    def _language_probabilities(self, encoded: Tensor) -> dict[str, float]:
        writer = _Writer(self._decoder, [encoded])
        logits = writer.begin([[self._tokens.start_of_transcript]])[0]
        chosen = logits[0, list(self._languages.values())].softmax(dim=0)
        return dict(zip(self._languages, chosen.tolist(), strict=True))

    @torch.inference_mode()
    def generate(
        self, encoded: Sequence[Tensor], prompts: Sequence[Sequence[int]], search: Search
    ) -> list[Generated]:
        """See `WhisperRuntime`."""
        order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
        found: dict[int, Generated] = {}
        size = max(1, _MOST_ROWS // search.beam_size)
        for first in range(0, len(order), size):
            batch = order[first : first + size]
            texts = self._search([encoded[i] for i in batch], [prompts[i] for i in batch], search)
            found.update(zip(batch, texts, strict=True))
        return [found[i] for i in range(len(encoded))]

    def _search(
        self, encoded: Sequence[Tensor], prompts: Sequence[Sequence[int]], search: Search
    ) -> list[Generated]:
        end = self._tokens.end_of_text
        writer = _Writer(self._decoder, encoded)
        first, logits = writer.begin(prompts)
        silent = first.softmax(dim=1)[:, self._tokens.no_speech].tolist()
        if search.beam_size == 1:
            texts = greedy(writer, self._rules, logits, end)
        else:
            texts = beams(
                writer, self._rules, logits, end, search.beam_size, search.no_repeat_ngram_size
            )
        self.work.token_slots += writer.n_stepped
        return [_generated(*each) for each in zip(texts, silent, strict=True)]

    @torch.inference_mode()
    def align(
        self,
        encoded: Sequence[Tensor],
        prompts: Sequence[Sequence[int]],
        texts: Sequence[Sequence[int]],
        n_frames: Sequence[int],
    ) -> list[Alignment]:
        """See `WhisperRuntime`."""
        return [self._align(*one) for one in zip(encoded, prompts, texts, n_frames, strict=True)]

    def _align(
        self, encoded: Tensor, prompt: Sequence[int], text: Sequence[int], frames: int
    ) -> Alignment:
        # Whisper aligns text that was written without timestamps.
        prefix = [*prompt, self._tokens.no_timestamps]
        ids = torch.tensor([[*prefix, *text, self._tokens.end_of_text]])
        shares: list[Tensor] = []
        hidden = self._decoder(ids, self._decoder.cache(1), self._decoder.memory([encoded]), shares)
        spoken = hidden[0, len(prefix) - 1 : -1]
        weights = torch.stack([shares[layer][0, head] for layer, head in self._heads])
        path = attention_path(weights[:, len(prefix) - 1 : -1, :frames].float().numpy())
        ordinary = self._decoder.logits(spoken)[: len(text), : self._tokens.end_of_text].softmax(
            dim=1
        )
        said = ordinary.gather(1, torch.tensor(text)[:, None])[:, 0]
        starts = token_starts(path, len(text) + 1, SECONDS_PER_FRAME)
        return Alignment(starts, said.tolist())


class _Writer:
    """A batch of windows that is being written down (a `Writer`).

    Attributes:
        n_stepped: windows that it has written a token for, summed over the tokens.
    """

    def __init__(self, decoder: Decoder, encoded: Sequence[Tensor]) -> None:
        self._decoder = decoder
        self._memory: Memory = decoder.memory(encoded)
        self._cache: Cache = decoder.cache(len(encoded))
        self.n_stepped = 0

    def begin(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Logits after the first token of the prompts and after all of it."""
        self.n_stepped += self._memory.n_windows
        hidden = self._decoder(torch.tensor([list(p) for p in prompts]), self._cache, self._memory)
        return self._decoder.logits(hidden[:, 0]), self._decoder.logits(hidden[:, -1])

    def next_logits(self, tokens: Tensor) -> Tensor:
        self.n_stepped += self._memory.n_windows
        hidden = self._decoder(tokens[:, None], self._cache, self._memory)
        return self._decoder.logits(hidden[:, -1])

    def keep_windows(self, windows: Sequence[int]) -> list[int]:
        return self._memory.keep(windows)

    def take_rows(self, rows: Tensor) -> None:
        self._cache.take(rows)


def _generated(text: Written, no_speech_prob: float) -> Generated:
    return Generated(text.ids, text.total_logprob / (len(text.ids) + 1), no_speech_prob)


def _upper_half(n_layers: int, n_heads: int) -> tuple[tuple[int, int], ...]:
    """The (layer, head) pairs that Whisper aligns with where a checkpoint names none."""
    return tuple((i, head) for i in range(n_layers // 2, n_layers) for head in range(n_heads))


def _keep_freed_memory() -> None:
    """Let glibc hand freed blocks out again instead of asking the kernel for zeroed pages.

    Every large intermediate result costs page faults otherwise: a third of the encoder's time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
