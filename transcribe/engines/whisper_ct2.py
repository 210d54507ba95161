"""Whisper on CTranslate2: int8 on CPU, float16 on GPU.

Owns features, padding, batches and the retries of one checkpoint. Knows nothing of
recordings or files.

What makes it fast (docs/decisions.md): the encoder hears only a window's own length class,
speech and a second, instead of 30 s; the rest of its output is taken from an encoding of
silence made once. Without that rest Whisper misses the end of the speech and repeats itself.
A result that looks wrong is tried again, first with the full 30 s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torchaudio

from transcribe.batching import plan_batches
from transcribe.decode import SAMPLE_RATE
from transcribe.engines.base import EngineInput, Hypothesis, HypothesisSegment
from transcribe.engines.whisper_tokens import WhisperTokens, compression_ratio, says_twice
from transcribe.errors import Fatal
from transcribe.models import Model

_Encoded = npt.NDArray[np.float32]

_FULL = 30 * SAMPLE_RATE
_MARGIN = SAMPLE_RATE  # silence after the speech, by which Whisper knows that it has ended
_LENGTH_CLASS = 2 * SAMPLE_RATE
_BATCH_BUDGET = {"cpu": 8 * _FULL, "cuda": 32 * _FULL}
_WINDOWS_PER_LANGUAGE_VOTE = 3

# Whisper's own thresholds (Radford et al. 2022, section 4.5).
_MAX_COMPRESSION_RATIO = 2.4
_MIN_AVG_LOGPROB = -1.0
_MAX_NO_SPEECH_PROB = 0.6
# Nobody speaks faster than this; 20 is a fast reader. Repeated text shows here first.
_MAX_CHARACTERS_PER_SECOND = 30.0
# A window ends in speech, but for 0.2 s. Text that ends much earlier has lost some of it.
_MAX_UNHEARD_S = 2.0


@dataclass(frozen=True, slots=True)
class _Attempt:
    """One way to decode: whether to pad to 30 s, and how to search."""

    full_padding: bool
    beam_size: int = 1
    no_repeat_ngram_size: int = 0


# Deterministic on purpose: the same window always gives the same text, on any worker and in
# any order. Sampling at a temperature cannot promise that here (docs/decisions.md).
_FIRST = _Attempt(full_padding=False)
_RETRIES = (
    _Attempt(full_padding=True),
    _Attempt(full_padding=True, beam_size=5),
    _Attempt(full_padding=True, beam_size=5, no_repeat_ngram_size=3),
)


class WhisperCT2:
    """A Whisper checkpoint loaded into CTranslate2."""

    name = "whisper-ctranslate2"

    def __init__(
        self, model: Model, *, device: str = "cpu", language: str | None = None, threads: int = 1
    ) -> None:
        """Load the weights.

        Raises:
            Fatal: the directory does not hold a Whisper model that CTranslate2 can load.
        """
        import ctranslate2

        self.device = device
        self._language = language
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
        self._tokens = WhisperTokens.load(model.path, self._model.is_multilingual)
        if language is not None:
            self._tokens.prompt(language)
        self._features = LogMel(self._model.n_mels)
        self._silence = self._encoder_output(np.zeros(0, dtype=np.int16), _FULL)

    def recognise(self, windows: Sequence[EngineInput]) -> list[Hypothesis]:
        """One hypothesis per window, in order (see `Engine`)."""
        encoded: dict[int, _Encoded] = {}
        return self._recognise(windows, self._languages(windows, encoded), encoded)

    def _recognise(
        self,
        windows: Sequence[EngineInput],
        languages: Sequence[tuple[str, float]],
        encoded: dict[int, _Encoded],
    ) -> list[Hypothesis]:
        """Attempt after attempt on what still looks wrong; then the tails that were not heard."""
        results: dict[int, Hypothesis] = {}
        todo = list(range(len(windows)))
        for attempt in (_FIRST, *_RETRIES):
            for index, hypothesis in self._attempt(windows, todo, languages, attempt, encoded):
                results[index] = _better(results.get(index), hypothesis, windows[index])
            encoded.clear()
            todo = [i for i in todo if _is_suspicious(results[i], windows[i])]
        self._hear_on(windows, languages, results, todo)
        return [results[i] for i in range(len(windows))]

    def _hear_on(
        self,
        windows: Sequence[EngineInput],
        languages: Sequence[tuple[str, float]],
        results: dict[int, Hypothesis],
        doubtful: Sequence[int],
    ) -> None:
        """Recognise what lies behind a text that ends too early, and join it to that text.

        Whisper's own long-form decoding goes on from its last timestamp in the same way
        (Radford et al. 2022, section 3.8). A text that has not begun cannot be gone on with.
        """
        cut = [
            i
            for i in doubtful
            if 0 < _heard_s(results[i]) < _duration_s(windows[i]) - _MAX_UNHEARD_S
        ]
        if not cut:
            return
        tails = [
            EngineInput(
                windows[i].samples[round(_heard_s(results[i]) * SAMPLE_RATE) :], windows[i].group
            )
            for i in cut
        ]
        heard = self._recognise(tails, [languages[i] for i in cut], {})
        for index, tail in zip(cut, heard, strict=True):
            results[index] = _joined(results[index], tail)

    def _attempt(
        self,
        windows: Sequence[EngineInput],
        indices: Sequence[int],
        languages: Sequence[tuple[str, float]],
        attempt: _Attempt,
        encoded: dict[int, _Encoded],
    ) -> Iterator[tuple[int, Hypothesis]]:
        """Decode the windows at `indices` once; `encoded` may hold some of them already."""
        for batch in plan_batches([_FULL] * len(indices), _BATCH_BUDGET[self.device]):
            members = [indices[position] for position in batch]
            outputs = [
                encoded.pop(i) if i in encoded else self._encode(windows[i], attempt.full_padding)
                for i in members
            ]
            found = self._generate(outputs, [languages[i][0] for i in members], attempt)
            for index, result in zip(members, found, strict=True):
                yield index, self._hypothesis(result, windows[index], languages[index])

    def _encode(self, window: EngineInput, full_padding: bool = False) -> _Encoded:
        """Encoder output of one window, always 30 s long: `[1, 1500, d_model]`.

        One window at a time: on a CPU this is faster than a batch (memory traffic), and a
        window's encoding then never depends on its neighbours.
        """
        heard = self._encoder_output(window.samples, padded_length(window, full_padding))
        return np.concatenate([heard, self._silence[:, heard.shape[1] :]], axis=1)

    def _encoder_output(self, samples: npt.NDArray[np.int16], length: int) -> _Encoded:
        """`samples` padded to `length` through the encoder: `[1, length / 320, d_model]`."""
        view = self._ct2.StorageView.from_array(self._features(samples, length)[None])
        output = self._model.encode(view, to_cpu=self.device != "cpu")
        return np.array(output, dtype=np.float32)

    def _generate(
        self, outputs: Sequence[_Encoded], languages: Sequence[str], how: _Attempt
    ) -> list[Any]:
        batch = np.ascontiguousarray(np.concatenate(outputs))
        generated: list[Any] = self._model.generate(
            self._ct2.StorageView.from_array(batch),
            [self._tokens.prompt(language) for language in languages],
            beam_size=how.beam_size,
            no_repeat_ngram_size=how.no_repeat_ngram_size,
            return_scores=True,
            return_no_speech_prob=True,
        )
        return generated

    def _hypothesis(
        self, result: Any, window: EngineInput, language: tuple[str, float]
    ) -> Hypothesis:
        ids = result.sequences_ids[0]
        # CTranslate2 divides by the number of tokens, Whisper counts the end token too.
        avg_logprob = float(result.scores[0]) * len(ids) / (len(ids) + 1)
        segments = self._tokens.segments(ids, len(window.samples) / SAMPLE_RATE)
        return Hypothesis(
            segments=segments,
            language=language[0],
            language_probability=language[1],
            avg_logprob=avg_logprob,
            compression_ratio=compression_ratio(self._tokens.text(ids)),
            no_speech_prob=float(result.no_speech_prob),
        )

    def _languages(
        self, windows: Sequence[EngineInput], encoded: dict[int, _Encoded]
    ) -> list[tuple[str, float]]:
        """Language and its probability for each window.

        Each group votes with its longest windows, which hold the most speech: probabilities
        are averaged in the logarithm, weighted by length. What was encoded for the vote is
        kept in `encoded`, so that it is not done twice.
        """
        if self._language is not None or not self._tokens.is_multilingual:
            return [(self._language or "en", 1.0)] * len(windows)
        groups: dict[int, list[int]] = {}
        for index, window in enumerate(windows):
            groups.setdefault(window.group, []).append(index)
        decided = {g: self._vote(windows, members, encoded) for g, members in groups.items()}
        return [decided[window.group] for window in windows]

    def _vote(
        self, windows: Sequence[EngineInput], members: Sequence[int], encoded: dict[int, _Encoded]
    ) -> tuple[str, float]:
        voters = sorted(members, key=lambda i: -len(windows[i].samples))
        scores: dict[str, float] = {}
        weight = 0.0
        for index in voters[:_WINDOWS_PER_LANGUAGE_VOTE]:
            output = self._encode(windows[index])
            encoded[index] = output
            view = self._ct2.StorageView.from_array(output)
            n_samples = len(windows[index].samples)
            weight += n_samples
            for token, probability in self._model.detect_language(view)[0]:
                log = float(np.log(max(probability, 1e-10)))
                scores[token] = scores.get(token, 0.0) + n_samples * log
        best = max(scores, key=lambda token: scores[token])
        total = sum(np.exp(score / weight) for score in scores.values())
        return best.strip("<|>"), float(np.exp(scores[best] / weight) / total)


class LogMel:
    """Whisper's input: log-mel spectrogram (Radford et al. 2022, section 2.2)."""

    def __init__(self, n_mels: int) -> None:
        self._mel = torchaudio.transforms.MelSpectrogram(
            sample_rate=SAMPLE_RATE,
            n_fft=400,
            hop_length=160,
            n_mels=n_mels,
            norm="slaney",
            mel_scale="slaney",
        )

    def __call__(self, samples: npt.NDArray[np.int16], length: int) -> npt.NDArray[np.float32]:
        """Features of `samples` padded with silence to `length`: `[n_mels, length / 160]`."""
        padded = np.zeros(length, dtype=np.float32)
        np.multiply(samples, 1 / 32768, out=padded[: len(samples)])
        with torch.inference_mode():
            power = self._mel(torch.from_numpy(padded))[:, :-1]
            log = power.clamp_(min=1e-10).log10_()
            log = torch.maximum(log, log.max() - 8.0)
            features: npt.NDArray[np.float32] = ((log + 4.0) / 4.0).contiguous().numpy()
        return features


def padded_length(window: EngineInput, full: bool) -> int:
    """Samples that a window is padded to: 30 s, or its length class (speech and a second)."""
    if full:
        return _FULL
    classes = -(-(len(window.samples) + _MARGIN) // _LENGTH_CLASS)
    return min(_FULL, int(classes) * _LENGTH_CLASS)


def _is_silence(hypothesis: Hypothesis) -> bool:
    return (
        hypothesis.no_speech_prob > _MAX_NO_SPEECH_PROB
        and hypothesis.avg_logprob < _MIN_AVG_LOGPROB
    )


def _is_suspicious(hypothesis: Hypothesis, window: EngineInput) -> bool:
    """Whether the text is likely wrong and worth another attempt."""
    if _is_silence(hypothesis):
        return False
    seconds = _duration_s(window)
    return (
        hypothesis.compression_ratio > _MAX_COMPRESSION_RATIO
        or hypothesis.avg_logprob < _MIN_AVG_LOGPROB
        or len(hypothesis.text) > _MAX_CHARACTERS_PER_SECOND * max(1.0, seconds)
        or seconds - _heard_s(hypothesis) > _MAX_UNHEARD_S
        or says_twice(hypothesis.text)
    )


def _duration_s(window: EngineInput) -> float:
    return len(window.samples) / SAMPLE_RATE


def _heard_s(hypothesis: Hypothesis) -> float:
    """Where the text ends, in seconds from the window's start; 0 without text."""
    return hypothesis.segments[-1].end_s if hypothesis.segments else 0.0


def _joined(first: Hypothesis, tail: Hypothesis) -> Hypothesis:
    """`tail` put behind `first`; the doubtful values of the two stay."""
    if not tail.segments or _is_silence(tail):
        return first
    shift = _heard_s(first)
    moved = [HypothesisSegment(s.start_s + shift, s.end_s + shift, s.text) for s in tail.segments]
    return replace(
        first,
        segments=(*first.segments, *moved),
        avg_logprob=min(first.avg_logprob, tail.avg_logprob),
        compression_ratio=max(first.compression_ratio, tail.compression_ratio),
        no_speech_prob=min(first.no_speech_prob, tail.no_speech_prob),
    )


def _better(old: Hypothesis | None, new: Hypothesis, window: EngineInput) -> Hypothesis:
    """The hypothesis to keep: a sound one, else the more probable one that does not loop."""
    if old is None or not _is_suspicious(new, window):
        return new
    old_loops = old.compression_ratio > _MAX_COMPRESSION_RATIO
    new_loops = new.compression_ratio > _MAX_COMPRESSION_RATIO
    if old_loops != new_loops:
        return new if old_loops else old
    return new if new.avg_logprob > old.avg_logprob else old
