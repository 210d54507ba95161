"""Whisper's layers on CTranslate2: int8 on CPU, float16 on GPU.

Owns what is CTranslate2's own: loading, its views of arrays, its results. What is done with
them is in `whisper.py`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from transcribe.engines.base import EngineWork
from transcribe.engines.log_mel import LogMel
from transcribe.engines.whisper import (
    FULL_SAMPLES,
    SECONDS_PER_FRAME,
    Generated,
    Samples,
    Search,
)
from transcribe.engines.whisper_words import Alignment, token_starts
from transcribe.errors import Fatal
from transcribe.models import Model

_Encoded = npt.NDArray[np.float32]


class CTranslate2Runtime:
    """A Whisper checkpoint loaded into CTranslate2 (a `WhisperRuntime`)."""

    name = "whisper-ctranslate2"

    def __init__(self, model: Model, *, device: str = "cpu", threads: int = 1) -> None:
        """Load the weights.

        Raises:
            Fatal: the directory does not hold a Whisper model that CTranslate2 can load.
        """
        import ctranslate2

        self.device = device
        self.work = EngineWork()
        self.batch_windows = 8 if device == "cpu" else 32
        self._ct2 = ctranslate2
        try:
            self._model: Any = ctranslate2.models.Whisper(
                str(model.path),
                device=device,
                compute_type="int8" if device == "cpu" else "float16",
                intra_threads=threads,
            )
        except (RuntimeError, ValueError) as error:
            raise Fatal(f"--model {model.name}: CTranslate2 cannot load it ({error}).") from None
        self.is_multilingual: bool = self._model.is_multilingual
        self._features = LogMel(self._model.n_mels)
        self._silence = self._encoder_output(np.zeros(0, dtype=np.int16), FULL_SAMPLES)

    def encode(self, windows: Sequence[Samples], padded: Sequence[int]) -> list[_Encoded]:
        """See `WhisperRuntime`: each `[1, 1500, d_model]`.

        One window at a time: on a CPU this is faster than a batch (memory traffic), and a
        window's encoding then never depends on its neighbours.
        """
        encoded = []
        for samples, length in zip(windows, padded, strict=True):
            heard = self._encoder_output(samples, length)
            encoded.append(np.concatenate([heard, self._silence[:, heard.shape[1] :]], axis=1))
        return encoded

    def _encoder_output(self, samples: Samples, length: int) -> _Encoded:
        """`samples` padded to `length` through the encoder: `[1, length / 320, d_model]`."""
        started = time.perf_counter()
        features = self._features([samples], length).numpy()
        self.work.features_s += time.perf_counter() - started
        view = self._ct2.StorageView.from_array(features)
        output = self._model.encode(view, to_cpu=self.device != "cpu")
        return np.array(output, dtype=np.float32)

    def language_probabilities(self, encoded: Sequence[_Encoded]) -> list[dict[str, float]]:
        """See `WhisperRuntime`."""
        told = []
        for begin in range(0, len(encoded), self.batch_windows):
            batch = self._batch(encoded[begin : begin + self.batch_windows])
            told += [dict(row) for row in self._model.detect_language(batch)]
        return told

    def generate(
        self, encoded: Sequence[_Encoded], prompts: Sequence[Sequence[int]], search: Search
    ) -> list[Generated]:
        """See `WhisperRuntime`."""
        results = self._model.generate(
            self._batch(encoded),
            [list(prompt) for prompt in prompts],
            beam_size=search.beam_size,
            no_repeat_ngram_size=search.no_repeat_ngram_size,
            return_scores=True,
            return_no_speech_prob=True,
        )
        return [_generated(result) for result in results]

    def align(
        self,
        encoded: Sequence[_Encoded],
        prompts: Sequence[Sequence[int]],
        texts: Sequence[Sequence[int]],
        n_frames: Sequence[int],
    ) -> list[Alignment]:
        """See `WhisperRuntime`. One prompt at a time: CTranslate2 takes one for a batch."""
        alignments = []
        for output, prompt, text, frames in zip(encoded, prompts, texts, n_frames, strict=True):
            # CTranslate2 counts frames of the spectrogram, two for each of the encoder's.
            view = self._ct2.StorageView.from_array(output)
            (result,) = self._model.align(view, list(prompt), [list(text)], 2 * frames)
            starts = token_starts(result.alignments, len(text) + 1, SECONDS_PER_FRAME)
            alignments.append(Alignment(starts, result.text_token_probs[: len(text)]))
        return alignments

    def _batch(self, encoded: Sequence[_Encoded]) -> Any:
        return self._ct2.StorageView.from_array(np.ascontiguousarray(np.concatenate(encoded)))


def _generated(result: Any) -> Generated:
    ids = list(result.sequences_ids[0])
    # CTranslate2 divides by the number of tokens, Whisper counts the end token too.
    avg_logprob = float(result.scores[0]) * len(ids) / (len(ids) + 1)
    return Generated(ids, avg_logprob, float(result.no_speech_prob))
