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

from transcribe.config import Task
from transcribe.engines.base import HypothesisSegment
from transcribe.errors import Fatal
from transcribe.languages import UNSPACED_LANGUAGES

SECONDS_PER_TIMESTAMP = 0.02
MAX_NEW_TOKENS = 224  # half of Whisper's text context, as in its reference decoding
LAST_FIRST_TIMESTAMP = 50  # text begins in the first second (max_initial_timestamp)
_FIRST_IDEOGRAPH = "\u2e80"  # what Unicode has before it is alphabets and signs


@dataclass(frozen=True, slots=True)
class Phrase:
    """Text tokens between two timestamps (seconds from the window's start)."""

    start_s: float
    end_s: float
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WhisperTokens:
    """Token ids of one Whisper checkpoint and the text behind them."""

    tokenizer: Tokenizer
    start_of_transcript: int
    end_of_text: int
    tasks: dict[Task, int]
    no_speech: int
    no_timestamps: int
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
        names = ("startoftranscript", "endoftext", "transcribe", "translate", "notimestamps")
        found = {name: tokenizer.token_to_id(f"<|{name}|>") for name in names}
        ids = {name: token for name, token in found.items() if token is not None}
        if len(ids) < len(names):
            raise Fatal(f"{model_path}/tokenizer.json lacks Whisper's special tokens.")
        return cls(
            tokenizer=tokenizer,
            start_of_transcript=ids["startoftranscript"],
            end_of_text=ids["endoftext"],
            tasks={"transcribe": ids["transcribe"], "translate": ids["translate"]},
            no_speech=ids["notimestamps"] - 1,  # called nospeech or nocaptions, never missing
            no_timestamps=ids["notimestamps"],
            is_multilingual=is_multilingual,
        )

    @property
    def first_timestamp(self) -> int:
        """The token of 0.00 s; the others follow in steps of 20 ms."""
        return self.no_timestamps + 1

    def never_written(self) -> list[int]:
        """Special tokens that belong into prompts only."""
        return list(range(self.start_of_transcript, self.first_timestamp))

    def prompt(self, language: str, task: Task = "transcribe") -> list[int]:
        """Tokens before the text: start, and for multilingual models language and task.

        Raises:
            Fatal: the checkpoint does not know the language, or cannot translate.
        """
        if not self.is_multilingual:
            if task == "translate":
                raise Fatal("--task translate needs a multilingual model; this one knows English.")
            return [self.start_of_transcript]
        token = self.tokenizer.token_to_id(f"<|{language}|>")
        if token is None:
            raise Fatal(f"This model does not know the language {language!r}; see --language.")
        return [self.start_of_transcript, token, self.tasks[task]]

    def language_tokens(self) -> dict[str, int]:
        """Tokens of the languages: what stands between start and the first task."""
        first, last = self.start_of_transcript + 1, min(self.tasks.values())
        return {str(self.tokenizer.id_to_token(i)): i for i in range(first, last)}

    def text(self, ids: Sequence[int]) -> str:
        """Text of the ordinary tokens; timestamps and special tokens are left out."""
        ordinary = [i for i in ids if i < self.end_of_text]
        return str(self.tokenizer.decode(ordinary)).strip()

    def segments(self, ids: Sequence[int], duration_s: float) -> tuple[HypothesisSegment, ...]:
        """Cut a generated sequence at its timestamps; see `phrases`."""
        return tuple(
            HypothesisSegment(phrase.start_s, phrase.end_s, self.text(phrase.ids))
            for phrase in self.phrases(ids, duration_s)
        )

    def phrases(self, ids: Sequence[int], duration_s: float) -> tuple[Phrase, ...]:
        """Cut a generated sequence at its timestamps.

        Args:
            ids: generated token ids, without the prompt.
            duration_s: the window's length; times are kept inside it.

        Returns:
            Phrases in time order, none empty, `0 <= start <= end <= duration_s`. Text
            without a closing timestamp runs to the end of the window.
        """
        phrases = []
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
            if self.text(pending):
                phrases.append(Phrase(start, max(start, time), tuple(pending)))
            pending, start = [], time
        return tuple(phrases)

    def words(self, ids: Sequence[int], language: str) -> list[tuple[str, int]]:
        """Split text tokens into words.

        Returns:
            Each word, blanks stripped, and how many tokens it takes; the counts add up to
            `len(ids)`. A character cut over several tokens stays in one word.
        """
        words: list[tuple[str, int]] = []
        pending: list[int] = []
        for token in ids:
            pending.append(token)
            text = str(self.tokenizer.decode(pending))
            if "\ufffd" in text and token != ids[-1]:
                continue  # half a character
            if words and not self._begins_word(text, language):
                last, count = words[-1]
                words[-1] = (last + text, count + len(pending))
            else:
                words.append((text, len(pending)))
            pending = []
        if pending and words:
            last, count = words[-1]
            words[-1] = (last, count + len(pending))
        return [(word.strip(), count) for word, count in words]

    @staticmethod
    def _begins_word(text: str, language: str) -> bool:
        if text.startswith(" "):
            return True
        return language in UNSPACED_LANGUAGES and any(c.isalnum() for c in text)


def compression_ratio(text: str) -> float:
    """Bytes of the text over bytes of its zlib compression; 0 for no text.

    Whisper's test for repetition (Radford et al. 2022, section 4.5); above 2.4 it tries again.
    A letter is one byte here, in every alphabet: the two and three that UTF-8 takes for most
    compress well without repeating anything, and a Russian telephone menu came to 2.6. Chinese,
    Japanese and Korean characters, each a syllable or a word, keep their three.
    """
    data = text.encode()
    if not text.isascii() and max(text) < _FIRST_IDEOGRAPH:
        letters = {letter: number % 256 for number, letter in enumerate(sorted(set(text)))}
        data = bytes(letters[letter] for letter in text)
    return len(data) / len(zlib.compress(data)) if data else 0.0


def says_twice(text: str, min_words: int = 4) -> bool:
    """Whether a phrase of at least `min_words` words is followed at once by itself."""
    words = re.findall(r"\w+", text.lower())
    return any(
        words[start : start + length] == words[start + length : start + 2 * length]
        for length in range(min_words, len(words) // 2 + 1)
        for start in range(len(words) - 2 * length + 1)
    )
