"""Whisper's token language: prompts in, segments out.

Owns the special tokens and the reading of timestamps (Radford et al. 2022, section 2.3).
Pure: knows no model runtime, so that every Whisper engine can share it.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from transcribe.engines.base import HypothesisSegment
from transcribe.errors import Fatal

SECONDS_PER_TIMESTAMP = 0.02


@dataclass(frozen=True, slots=True)
class WhisperTokens:
    """Token ids of one Whisper checkpoint and the text behind them."""

    tokenizer: Tokenizer
    start_of_transcript: int
    end_of_text: int
    transcribe: int
    first_timestamp: int
    is_multilingual: bool

    @classmethod
    def load(cls, model_path: Path, is_multilingual: bool) -> WhisperTokens:
        """Read `tokenizer.json` of a checkpoint directory.

        Raises:
            Fatal: the file is not a Whisper tokenizer.
        """
        try:
            tokenizer = Tokenizer.from_file(str(model_path / "tokenizer.json"))
        except Exception:  # the Rust library raises bare Exception
            raise Fatal(f"{model_path}/tokenizer.json cannot be read as a tokenizer.") from None
        names = ("startoftranscript", "endoftext", "transcribe", "notimestamps")
        start, end, task, no_timestamps = (tokenizer.token_to_id(f"<|{n}|>") for n in names)
        if start is None or end is None or task is None or no_timestamps is None:
            raise Fatal(f"{model_path}/tokenizer.json lacks Whisper's special tokens.")
        return cls(
            tokenizer=tokenizer,
            start_of_transcript=start,
            end_of_text=end,
            transcribe=task,
            first_timestamp=no_timestamps + 1,
            is_multilingual=is_multilingual,
        )

    def prompt(self, language: str) -> list[int]:
        """Tokens before the text: start, and for multilingual models language and task.

        Raises:
            Fatal: the checkpoint does not know the language.
        """
        if not self.is_multilingual:
            return [self.start_of_transcript]
        token = self.tokenizer.token_to_id(f"<|{language}|>")
        if token is None:
            raise Fatal(f"This model does not know the language {language!r}; see --language.")
        return [self.start_of_transcript, token, self.transcribe]

    def text(self, ids: Sequence[int]) -> str:
        """Text of the ordinary tokens; timestamps and special tokens are left out."""
        ordinary = [i for i in ids if i < self.end_of_text]
        return str(self.tokenizer.decode(ordinary)).strip()

    def segments(self, ids: Sequence[int], duration_s: float) -> tuple[HypothesisSegment, ...]:
        """Cut a generated sequence at its timestamps.

        Args:
            ids: generated token ids, without the prompt.
            duration_s: the window's length; times are kept inside it.

        Returns:
            Segments in time order, none empty, `0 <= start <= end <= duration_s`. Text
            without a closing timestamp runs to the end of the window.
        """
        segments = []
        start = 0.0
        pending: list[int] = []
        for token in [*ids, self.end_of_text]:
            if token < self.end_of_text:
                pending.append(token)
                continue
            if token < self.first_timestamp and token != self.end_of_text:
                continue
            time = duration_s
            if token >= self.first_timestamp:
                time = (token - self.first_timestamp) * SECONDS_PER_TIMESTAMP
                time = max(start, min(time, duration_s))
            if text := self.text(pending):
                segments.append(HypothesisSegment(start, max(start, time), text))
            pending, start = [], time
        return tuple(segments)


def compression_ratio(text: str) -> float:
    """Bytes of the text over bytes of its zlib compression; 0 for no text.

    Whisper's test for repetition (Radford et al. 2022, section 4.5); above 2.4 it tries again.
    """
    data = text.encode()
    return len(data) / len(zlib.compress(data)) if data else 0.0


def says_twice(text: str, min_words: int = 4) -> bool:
    """Whether a phrase of at least `min_words` words is followed at once by itself."""
    words = re.findall(r"\w+", text.lower())
    return any(
        words[start : start + length] == words[start + length : start + 2 * length]
        for length in range(min_words, len(words) // 2 + 1)
        for start in range(len(words) - 2 * length + 1)
    )
