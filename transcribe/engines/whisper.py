"""Whisper, whatever runs it: languages, padding, batches, retries and word times.

Owns everything about recognising with a Whisper checkpoint but the arithmetic of its layers,
which a `WhisperRuntime` does (`whisper_int8.py`, `whisper_ct2.py`, `whisper_torch.py`). Knows
nothing of recordings or files.

What makes it fast (docs/decisions.md): the encoder hears only a window's own length class,
speech and a second, instead of 30 s; the rest of its output is taken from an encoding of
silence made once. Without that rest Whisper misses the end of the speech and repeats itself.
A result that looks wrong is tried again, first with more silence to hear, then with all 30 s.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from transcribe.config import EngineName, Task
from transcribe.decode import SAMPLE_RATE
from transcribe.engines import int8
from transcribe.engines.base import (
    VOTERS_PER_CHANNEL,
    EngineInput,
    EngineWork,
    Hypothesis,
    HypothesisSegment,
)
from transcribe.engines.fitting import Fitting
from transcribe.engines.whisper_tokens import WhisperTokens, compression_ratio, says_twice
from transcribe.engines.whisper_words import Alignment, timed_segments
from transcribe.errors import Fatal
from transcribe.models import Model

Samples = npt.NDArray[np.int16]
Encoded = Any  # 30 s of encoder output, in whatever form the runtime likes

FULL_SAMPLES = 30 * SAMPLE_RATE
SECONDS_PER_FRAME = 0.02  # of the encoder's output
_MARGIN = SAMPLE_RATE  # silence after the speech, by which Whisper knows that it has ended
_LENGTH_CLASS = 2 * SAMPLE_RATE

# A channel is taken for another language than its recording only on good evidence.
_OWN_LANGUAGE_PROBABILITY = 0.8
_OWN_LANGUAGE_SAMPLES = 5 * SAMPLE_RATE

# Whisper's own thresholds (Radford et al. 2022, section 4.5).
_MAX_COMPRESSION_RATIO = 2.4
_MIN_AVG_LOGPROB = -1.0
_MAX_NO_SPEECH_PROB = 0.6
# A sound text below this is searched for once more, with beams (docs/decisions.md). Other languages
# than English, of which Whisper has heard far less, gain from it more often.
_UNSURE_LOGPROB = {"en": -0.6}
_UNSURE_LOGPROB_ELSEWHERE = -0.4
# Nobody speaks faster than this; 20 is a fast reader. Repeated text shows here first.
_MAX_CHARACTERS_PER_SECOND = 30.0
# A window ends in speech, but for 0.2 s. Text that ends much earlier has lost some of it.
_MAX_UNHEARD_S = 1.0


@dataclass(frozen=True, slots=True)
class Search:
    """How the decoder looks for the text; one beam is greedy."""

    beam_size: int = 1
    no_repeat_ngram_size: int = 0


@dataclass(frozen=True, slots=True)
class Generated:
    """What the decoder wrote for one window.

    Attributes:
        ids: token ids without prompt and end token.
        avg_logprob: sum of the tokens' natural log-probabilities, the end token's included,
            over their number.
        no_speech_prob: probability of `<|nospeech|>` as the first token.
    """

    ids: list[int]
    avg_logprob: float
    no_speech_prob: float


class WhisperRuntime(Protocol):
    """A loaded checkpoint: the arithmetic, and nothing else.

    It counts `features_s` of `work`, `encoder_s` of what it encodes later than in `encode`, and
    `token_slots` if its batches change while they are decoded; whoever calls it counts the rest.
    """

    work: EngineWork
    name: str
    device: str
    is_multilingual: bool
    batch_windows: int

    def encode(self, windows: Sequence[Samples], padded: Sequence[int]) -> list[Encoded]:
        """Encoder output of each window, silence behind its padded samples up to 30 s."""
        ...

    def language_probabilities(self, encoded: Sequence[Encoded]) -> list[dict[str, float]]:
        """For each window, the probability of each language token (`<|en|>`)."""
        ...

    def generate(
        self, encoded: Sequence[Encoded], prompts: Sequence[Sequence[int]], search: Search
    ) -> list[Generated]:
        """Text of each window."""
        ...

    def align(
        self,
        encoded: Sequence[Encoded],
        prompts: Sequence[Sequence[int]],
        texts: Sequence[Sequence[int]],
        n_frames: Sequence[int],
    ) -> list[Alignment]:
        """When each token of each text was said, heard in its first `n_frames` of 20 ms."""
        ...


@dataclass(frozen=True, slots=True)
class _Attempt:
    """One way to decode: samples of silence behind the length class, and how to search."""

    more: int
    search: Search = Search()


# Deterministic on purpose: the same window always gives the same text, on any worker and in
# any order. Sampling at a temperature cannot promise that here (docs/decisions.md).
_FIRST = _Attempt(0)
_UNSURE = _Attempt(0, Search(beam_size=5))
_RETRIES = (
    _Attempt(_LENGTH_CLASS),
    _Attempt(FULL_SAMPLES),
    _Attempt(FULL_SAMPLES, Search(beam_size=5)),
    _Attempt(FULL_SAMPLES, Search(beam_size=5, no_repeat_ngram_size=3)),
)


def load_whisper(
    model: Model,
    *,
    device: str = "cpu",
    engine: EngineName | None = None,
    language: str | None = None,
    task: Task = "transcribe",
    words: bool = False,
    threads: int = 1,
) -> Whisper:
    """Load a Whisper checkpoint into the runtime that is fastest here, or that was asked for.

    Args:
        model: the weights.
        device: `cpu` or `cuda`.
        engine: the runtime; None takes eight bits of our own on a CPU that is made for them,
            and else what the files are for (`model.engine`).
        language: code of all speech; None detects it for each recording.
        task: transcribe, or translate into English.
        words: whether words get their own times.
        threads: CPU threads.

    Raises:
        Fatal: the checkpoint cannot be loaded, or cannot do what is asked.
    """
    runtime = _load_runtime(model, device, engine, threads)
    tokens = WhisperTokens.load(model.path, runtime.is_multilingual)
    return Whisper(runtime, tokens, language=language, task=task, words=words)


def runtime_name(model: Model, device: str, engine: EngineName | None) -> EngineName:
    """What runs a Whisper checkpoint on this machine.

    Raises:
        Fatal: it cannot be what was asked for.
    """
    if engine in (None, "whisper-int8") and device == "cpu" and int8.is_supported():
        return "whisper-int8"
    if engine == "whisper-int8":
        raise Fatal(
            "--engine whisper-int8 needs --device cpu and a CPU with VNNI instructions;"
            " leave --engine out."
        )
    return model.engine


def _load_runtime(
    model: Model, device: str, engine: EngineName | None, threads: int
) -> WhisperRuntime:
    name = runtime_name(model, device, engine)
    if name == "whisper-int8":
        from transcribe.engines.whisper_int8 import Int8Runtime

        return Int8Runtime(model, threads=threads)
    if name == "whisper-transformers":
        from transcribe.engines.whisper_torch import TorchRuntime

        return TorchRuntime(model, device=device, threads=threads)
    from transcribe.engines.whisper_ct2 import CTranslate2Runtime

    return CTranslate2Runtime(model, device=device, threads=threads)


class Whisper:
    """A Whisper checkpoint as an engine (see `Engine`)."""

    def __init__(
        self,
        runtime: WhisperRuntime,
        tokens: WhisperTokens,
        *,
        language: str | None = None,
        task: Task = "transcribe",
        words: bool = False,
    ) -> None:
        """Put an engine on a loaded checkpoint.

        Raises:
            Fatal: the checkpoint does not know the language or the task.
        """
        self.name = runtime.name
        self.device = runtime.device
        self.fitting = Fitting(runtime.batch_windows)
        self.work = runtime.work
        self._runtime = runtime
        self._tokens = tokens
        self._language = language
        self._task: Task = task
        self._words = words
        tokens.prompt(language or "en", task)  # refuse now what it cannot do

    def recognise(self, windows: Sequence[EngineInput]) -> list[Hypothesis]:
        """One hypothesis per window, in order (see `Engine`)."""
        encoded: dict[int, Encoded] = {}
        languages = self._languages(windows, encoded)
        results = self._first_texts(windows, languages, encoded)
        started = time.perf_counter()
        self._try_again(windows, languages, results, encoded)
        self.work.retries_s += time.perf_counter() - started
        return [results[i] for i in range(len(windows))]

    def _first_texts(
        self,
        windows: Sequence[EngineInput],
        languages: Sequence[tuple[str, float]],
        encoded: dict[int, Encoded],
    ) -> dict[int, Hypothesis]:
        """What one attempt makes of each window, by its index; nothing of those nobody wants.

        `encoded` may hold some of them already; it is left with those whose text is unsure.
        """
        results = {i: Hypothesis(()) for i, window in enumerate(windows) if not window.is_wanted}
        for unwanted in results:
            encoded.pop(unwanted, None)
        wanted = [i for i in range(len(windows)) if i not in results]
        results.update(self._attempt(windows, wanted, languages, _FIRST, encoded, _is_unsure))
        return results

    def _try_again(
        self,
        windows: Sequence[EngineInput],
        languages: Sequence[tuple[str, float]],
        results: dict[int, Hypothesis],
        encoded: dict[int, Encoded],
    ) -> None:
        """Attempt after attempt on what still looks wrong; then the tails that were not heard."""

        def attempt(how: _Attempt, indices: Sequence[int]) -> None:
            for i, hypothesis in self._attempt(
                windows, indices, languages, how, encoded, _is_suspicious
            ):
                results[i] = _better(results[i], hypothesis, windows[i])

        todo = [i for i, window in enumerate(windows) if window.is_wanted]
        attempt(_UNSURE, [i for i in todo if _is_unsure(results[i], windows[i])])
        for before, retry in pairwise((_FIRST, *_RETRIES)):
            if retry.more != before.more:
                encoded.clear()
            todo = [i for i in todo if _is_suspicious(results[i], windows[i])]
            attempt(retry, [i for i in todo if _differ(retry, before, windows[i])])
        todo = [i for i in todo if _is_suspicious(results[i], windows[i])]
        self._hear_on(windows, languages, results, todo)

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
            replace(
                windows[i],
                samples=windows[i].samples[round(_heard_s(results[i]) * SAMPLE_RATE) :],
            )
            for i in cut
        ]
        spoken = [languages[i] for i in cut]
        encoded: dict[int, Encoded] = {}
        heard = self._first_texts(tails, spoken, encoded)
        self._try_again(tails, spoken, heard, encoded)
        for index, result in enumerate(cut):
            results[result] = _joined(results[result], heard[index])

    def _attempt(
        self,
        windows: Sequence[EngineInput],
        indices: Sequence[int],
        languages: Sequence[tuple[str, float]],
        attempt: _Attempt,
        encoded: dict[int, Encoded],
        is_for_later: Callable[[Hypothesis, EngineInput], bool],
    ) -> Iterator[tuple[int, Hypothesis]]:
        """Decode the windows at `indices` once.

        `encoded` may hold some of them already, and gets those that `is_for_later`, to be heard
        again; no more of them than fit into a batch.
        """
        # Like with like: windows of one length end together.
        longest_first = sorted(indices, key=lambda i: -padded_length(windows[i], attempt.more))

        def decode(batch: list[int]) -> list[Hypothesis]:
            members = [longest_first[position] for position in batch]
            outputs = self._encode(windows, members, attempt.more, encoded)
            spoken = [languages[i][0] for i in members]
            prompts = [self._tokens.prompt(language, self._task) for language in spoken]
            slots_before = self.work.token_slots
            with self._decoding():
                found = self._runtime.generate(outputs, prompts, attempt.search)
            written = [len(result.ids) + 1 for result in found]
            self.work.tokens += sum(written)
            if self.work.token_slots == slots_before:
                self.work.token_slots += len(written) * max(written)
            inputs = [windows[i] for i in members]
            phrased = self._segments(inputs, outputs, spoken, found)
            hypotheses = [
                self._hypothesis(result, segments, languages[index])
                for index, result, segments in zip(members, found, phrased, strict=True)
            ]
            for index, output, hypothesis in zip(members, outputs, hypotheses, strict=True):
                if is_for_later(hypothesis, windows[index]) and len(encoded) < self.fitting.budget:
                    encoded[index] = output
            return hypotheses

        for position, hypothesis in self.fitting.over([1] * len(indices), decode):
            yield longest_first[position], hypothesis

    def _encode(
        self,
        windows: Sequence[EngineInput],
        members: Sequence[int],
        more: int,
        encoded: dict[int, Encoded],
    ) -> list[Encoded]:
        """Encoder output of `members`; what `encoded` holds is taken out of it."""
        missing = [i for i in members if i not in encoded]
        samples = [windows[i].samples for i in missing]
        padded = [padded_length(windows[i], more) for i in missing]
        started, features_before = time.perf_counter(), self.work.features_s
        made = self._runtime.encode(samples, padded)
        features = self.work.features_s - features_before
        self.work.encoder_s += time.perf_counter() - started - features
        self.work.heard_samples += sum(map(len, samples))
        self.work.padded_samples += sum(padded)
        encoded.update(zip(missing, made, strict=True))
        return [encoded.pop(i) for i in members]

    @contextmanager
    def _decoding(self) -> Iterator[None]:
        """Count what is done inside as the decoder's, but for what the runtime encodes there."""
        started, encoding = time.perf_counter(), self.work.features_s + self.work.encoder_s
        yield
        encoding = self.work.features_s + self.work.encoder_s - encoding
        self.work.decoder_s += max(0.0, time.perf_counter() - started - encoding)

    def _segments(
        self,
        windows: Sequence[EngineInput],
        outputs: Sequence[Encoded],
        languages: Sequence[str],
        found: Sequence[Generated],
    ) -> list[tuple[HypothesisSegment, ...]]:
        """Phrases of each window, with word times if they are wanted."""
        durations = [_duration_s(window) for window in windows]
        if not self._words:
            return [
                self._tokens.segments(result.ids, duration)
                for result, duration in zip(found, durations, strict=True)
            ]
        phrases = [
            self._tokens.phrases(result.ids, duration)
            for result, duration in zip(found, durations, strict=True)
        ]
        speaking = [i for i, spoken in enumerate(phrases) if spoken]
        with self._decoding():
            alignments = self._runtime.align(
                [outputs[i] for i in speaking],
                [self._tokens.prompt(languages[i], self._task) for i in speaking],
                [[token for phrase in phrases[i] for token in phrase.ids] for i in speaking],
                [max(1, round(durations[i] / SECONDS_PER_FRAME)) for i in speaking],
            )
        aligned = dict(zip(speaking, alignments, strict=True))
        return [
            timed_segments(self._tokens, spoken, aligned[i], languages[i], windows[i].samples)
            if spoken
            else ()
            for i, spoken in enumerate(phrases)
        ]

    def _hypothesis(
        self,
        result: Generated,
        segments: tuple[HypothesisSegment, ...],
        language: tuple[str, float],
    ) -> Hypothesis:
        return Hypothesis(
            segments=segments,
            language=language[0],
            language_probability=language[1],
            avg_logprob=result.avg_logprob,
            compression_ratio=compression_ratio(self._tokens.text(result.ids)),
            no_speech_prob=result.no_speech_prob,
        )

    def _languages(
        self, windows: Sequence[EngineInput], encoded: dict[int, Encoded]
    ) -> list[tuple[str, float]]:
        """Language and its probability for each window.

        A recording's channels vote together; one that surely speaks another language than
        the recording as a whole keeps its own.
        """
        if self._language is not None or not self._runtime.is_multilingual:
            return [(self._language or "en", 1.0)] * len(windows)
        channels: dict[tuple[int, int], list[int]] = {}
        for index, window in enumerate(windows):
            members = channels.setdefault((window.group, window.channel), [])
            if window.votes:
                members.append(index)
        voters = {key: _voters(windows, members) for key, members in channels.items()}
        told = self._told(windows, [i for some in voters.values() for i in some], encoded)
        votes = {
            key: sum((told[i] for i in some), start=LanguageVote({}, 0))
            for key, some in voters.items()
        }
        decided = decide_languages(votes)
        return [decided[window.group, window.channel] for window in windows]

    def _told(
        self, windows: Sequence[EngineInput], indices: list[int], encoded: dict[int, Encoded]
    ) -> dict[int, LanguageVote]:
        """The word of each window at `indices`, asked together.

        What was encoded for it is kept in `encoded`, so that it is not done twice.
        """
        outputs = self._encode(windows, indices, 0, encoded)
        encoded.update(zip(indices, outputs, strict=True))
        with self._decoding():
            told = self._runtime.language_probabilities(outputs)
        return {
            i: LanguageVote.of(probabilities, len(windows[i].samples))
            for i, probabilities in zip(indices, told, strict=True)
        }


def _voters(windows: Sequence[EngineInput], members: Sequence[int]) -> list[int]:
    """The longest windows of a channel, which hold the most speech."""
    return sorted(members, key=lambda i: -len(windows[i].samples))[:VOTERS_PER_CHANNEL]


@dataclass(frozen=True, slots=True)
class LanguageVote:
    """Log-probabilities of languages, summed over `n_samples` of speech and weighted by them."""

    scores: dict[str, float]
    n_samples: int

    @classmethod
    def of(cls, probabilities: dict[str, float], n_samples: int) -> LanguageVote:
        """One window's vote, `<|en|>` and the like as keys."""
        logs = {
            token.strip("<|>"): n_samples * float(np.log(max(p, 1e-10)))
            for token, p in probabilities.items()
        }
        return cls(logs, n_samples)

    def __add__(self, other: LanguageVote) -> LanguageVote:
        names = self.scores | other.scores
        summed = {n: self.scores.get(n, 0.0) + other.scores.get(n, 0.0) for n in names}
        return LanguageVote(summed, self.n_samples + other.n_samples)

    def winner(self) -> tuple[str, float]:
        """The language ahead and its probability."""
        best = max(self.scores, key=lambda name: self.scores[name])
        weight = max(1, self.n_samples)
        total = sum(np.exp(score / weight) for score in self.scores.values())
        return best, float(np.exp(self.scores[best] / weight) / total)


def decide_languages(
    votes: dict[tuple[int, int], LanguageVote],
) -> dict[tuple[int, int], tuple[str, float]]:
    """Language and probability for each (recording, channel).

    Short answers are easily taken for another language: a channel differs from its recording
    only with 5 s of speech and a probability of 0.8.
    """
    together: dict[int, LanguageVote] = {}
    for (group, _), vote in votes.items():
        together[group] = together.get(group, LanguageVote({}, 0)) + vote
    decided = {}
    for key, vote in votes.items():
        own = vote.winner() if vote.n_samples >= _OWN_LANGUAGE_SAMPLES else ("", 0.0)
        is_sure = own[1] >= _OWN_LANGUAGE_PROBABILITY
        decided[key] = own if is_sure else together[key[0]].winner()
    return decided


def padded_length(window: EngineInput, more: int) -> int:
    """Samples that a window is padded to: its length class (speech and a second) and `more`."""
    classes = -(-(len(window.samples) + _MARGIN) // _LENGTH_CLASS)
    return min(FULL_SAMPLES, int(classes) * _LENGTH_CLASS + more)


def _differ(one: _Attempt, other: _Attempt, window: EngineInput) -> bool:
    """Whether two attempts at a window are not the same: one of 29 s is always padded to 30 s."""
    longer = padded_length(window, one.more) != padded_length(window, other.more)
    return longer or one.search != other.search


def _is_silence(hypothesis: Hypothesis) -> bool:
    return (
        hypothesis.no_speech_prob > _MAX_NO_SPEECH_PROB
        and hypothesis.avg_logprob < _MIN_AVG_LOGPROB
    )


def _is_unsure(hypothesis: Hypothesis, window: EngineInput) -> bool:
    """Whether nothing is wrong with the text, but others may be likelier."""
    unsure = _UNSURE_LOGPROB.get(hypothesis.language or "", _UNSURE_LOGPROB_ELSEWHERE)
    return hypothesis.avg_logprob < unsure and not (
        _is_silence(hypothesis) or _is_suspicious(hypothesis, window)
    )


def _is_suspicious(hypothesis: Hypothesis, window: EngineInput) -> bool:
    """Whether the text is likely wrong and worth another attempt."""
    if _is_silence(hypothesis):
        return False
    seconds = _duration_s(window)
    return (
        hypothesis.compression_ratio > _MAX_COMPRESSION_RATIO
        or not hypothesis.avg_logprob >= _MIN_AVG_LOGPROB  # nor is NaN, of float16
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
    moved = [segment.shifted(shift) for segment in tail.segments]
    return replace(
        first,
        segments=(*first.segments, *moved),
        avg_logprob=min(first.avg_logprob, tail.avg_logprob),
        compression_ratio=max(first.compression_ratio, tail.compression_ratio),
        no_speech_prob=min(first.no_speech_prob, tail.no_speech_prob),
    )


def _better(old: Hypothesis, new: Hypothesis, window: EngineInput) -> Hypothesis:
    """The hypothesis to keep: a sound one, else the more probable one that does not loop."""
    if _is_suspicious(old, window) != _is_suspicious(new, window):
        return old if _is_suspicious(new, window) else new
    old_loops = old.compression_ratio > _MAX_COMPRESSION_RATIO
    new_loops = new.compression_ratio > _MAX_COMPRESSION_RATIO
    if old_loops != new_loops:
        return new if old_loops else old
    return new if new.avg_logprob > old.avg_logprob else old
