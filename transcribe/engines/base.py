"""What every recogniser promises: N windows in, N hypotheses out, in the same order.

Knows nothing of recordings, files or Ray. Times are seconds from the window's start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from transcribe.engines.fitting import Fitting
from transcribe.errors import TranscribeError

VOTERS_PER_CHANNEL = 3  # windows that tell its language: the longest, which hold the most speech


@dataclass(frozen=True, slots=True)
class EngineInput:
    """One window to recognise.

    Attributes:
        samples: int16 mono at 16 kHz, shape `[n_samples]`, at most 30 s.
        group: windows with the same group come from one recording.
        channel: channel of that recording; one channel is spoken in one language.
        votes: whether the recording's language is to be told by this window, too.
        is_wanted: whether it is to be recognised; one that is not is heard for its vote only, and
            its hypothesis is empty.
    """

    samples: npt.NDArray[np.int16]
    group: int
    channel: int = 0
    votes: bool = True
    is_wanted: bool = True


@dataclass(frozen=True, slots=True)
class HypothesisWord:
    """One word and when it was said (seconds from the window's start).

    Attributes:
        word: the word as its segment's text writes it, punctuation included.
        probability: how sure the engine is of the word, 0 to 1.
    """

    word: str
    start_s: float
    end_s: float
    probability: float


@dataclass(frozen=True, slots=True)
class HypothesisSegment:
    """A phrase: text between two times (seconds from the window's start).

    Attributes:
        words: the text's words in time order, inside the segment; None if not asked for.
    """

    start_s: float
    end_s: float
    text: str
    words: tuple[HypothesisWord, ...] | None = None

    def shifted(self, by_s: float) -> HypothesisSegment:
        """The same phrase, said `by_s` seconds later."""
        words = self.words
        if words is not None:
            words = tuple(replace(w, start_s=w.start_s + by_s, end_s=w.end_s + by_s) for w in words)
        return HypothesisSegment(self.start_s + by_s, self.end_s + by_s, self.text, words)


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """What an engine heard in one window.

    Attributes:
        segments: phrases in time order; empty when nothing was heard.
        language: language code the window was read in; None if the model has none.
        language_probability: how sure the engine is of it (1.0 when it was told).
        avg_logprob: mean natural-log probability per token.
        compression_ratio: bytes of text over bytes of its zlib compression (Radford et
            al. 2022, section 4.5): repetition shows as a high ratio.
        no_speech_prob: probability that the window holds no speech.
        temperature: sampling temperature that gave the text; 0 is greedy.
    """

    segments: tuple[HypothesisSegment, ...]
    language: str | None = None
    language_probability: float = 1.0
    avg_logprob: float = 0.0
    compression_ratio: float = 0.0
    no_speech_prob: float = 0.0
    temperature: float = 0.0

    @property
    def text(self) -> str:
        """The segments' text in one line."""
        return " ".join(s.text for s in self.segments)


@dataclass(slots=True)
class EngineWork:
    """Where an engine's time went and how full its batches were: counters that only grow.

    An engine owns one from when it is loaded and adds to it; whoever asks compares two moments
    (`since`). Seconds are wall seconds of `recognise`, or device seconds if the engine measures
    them; what they leave of `recognise` is languages, texts and waiting.

    Attributes:
        features_s: samples -> what the model takes.
        encoder_s: the encoder; of a CTC model the network.
        decoder_s: the search for the text, word times included.
        retries_s: parts of all three spent on windows whose first text looked wrong or unsure.
        heard_samples: samples given to the encoder, retries included.
        padded_samples: the same after padding.
        tokens: tokens written.
        token_slots: decoder steps times rows of their batch; a row that is finished before the
            others of its batch leaves slots empty.
    """

    features_s: float = 0.0
    encoder_s: float = 0.0
    decoder_s: float = 0.0
    retries_s: float = 0.0
    heard_samples: int = 0
    padded_samples: int = 0
    tokens: int = 0
    token_slots: int = 0

    def since(self, before: EngineWork) -> EngineWork:
        """What was added after `before`, an earlier copy of this."""
        return EngineWork(*(a - b for a, b in zip(astuple(self), astuple(before), strict=True)))

    def add(self, other: EngineWork) -> None:
        """Count another's work as well."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


class Engine(Protocol):
    """A loaded recogniser; `fitting` tells how much it hears at once."""

    name: str
    device: str
    fitting: Fitting
    work: EngineWork

    def recognise(self, windows: Sequence[EngineInput]) -> list[Hypothesis]:
        """One hypothesis per window, in order."""
        ...


def recognise_checked(engine: Engine, windows: Sequence[EngineInput]) -> list[Hypothesis]:
    """`engine.recognise`, refusing a result of another length.

    Raises:
        TranscribeError: the engine lost or invented a window.
    """
    hypotheses = engine.recognise(windows)
    if len(hypotheses) != len(windows):
        raise TranscribeError(
            f"engine {engine.name} returned {len(hypotheses)} hypotheses for {len(windows)} windows"
        )
    return hypotheses
