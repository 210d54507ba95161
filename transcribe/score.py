"""How far a transcript is from what was said: word and character errors against a reference.

Owns: the choice of normaliser and of the units counted, the alignment of two texts, and the
pooling of errors over recordings. Must not know where texts come from, nor what rate is good
enough.

Needs the `score` extra (jiwer, whisper_normalizer), imported when first scored: a transcription
run must not depend on them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import Any, Literal

from transcribe.errors import Fatal

CHARACTER_LANGUAGES = frozenset({"zh", "yue", "ja", "th", "lo", "my", "km"})
"""Languages written without spaces between words: scored by characters."""


@dataclass(frozen=True, slots=True)
class Score:
    """Errors of a set of transcripts.

    For `CHARACTER_LANGUAGES` a word is a character as readers see it (a grapheme).

    Attributes:
        n_recordings: transcripts compared.
        words: words of the references, after normalisation.
        substitutions, insertions, deletions: words, of the closest alignment of each pair.
        characters: characters of the references, spaces between words included.
        character_errors: of the closest alignment of characters.
    """

    n_recordings: int
    words: int
    substitutions: int
    insertions: int
    deletions: int
    characters: int = 0
    character_errors: int = 0

    @property
    def errors(self) -> int:
        """Substitutions, insertions and deletions together."""
        return self.substitutions + self.insertions + self.deletions

    @property
    def wer(self) -> float:
        """Errors per reference word; above 1 if much was made up, nan without any word."""
        return self.errors / self.words if self.words else float("nan")

    @property
    def cer(self) -> float:
        """Character errors per reference character; nan without any."""
        return self.character_errors / self.characters if self.characters else float("nan")


@dataclass(frozen=True, slots=True)
class Piece:
    """Neighbouring words that are equal in both texts, or that differ in one way.

    Attributes:
        kind: `equal` and `substitute` have as many words on either side, `delete` none in the
            hypothesis, `insert` none in the reference.
        reference, hypothesis: normalised words.
    """

    kind: Literal["equal", "substitute", "delete", "insert"]
    reference: tuple[str, ...]
    hypothesis: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One transcript beside its reference: `pieces` in order make up both texts."""

    pieces: tuple[Piece, ...]
    score: Score


def compare(reference: str, hypothesis: str, language: str | None) -> Comparison:
    """Align one transcript with its reference.

    Both are normalised first, as in the Whisper paper (Radford et al. 2022, appendix C): case,
    punctuation, bracketed remarks; for English also spelling and spelled numbers. Other languages
    keep their combining marks, which that paper's normaliser turns into word breaks. Every word
    written for an empty reference is an insertion.

    Args:
        reference: what was said.
        hypothesis: what was recognised.
        language: a code such as `en` or `pt-BR`; None if unknown (scored as not English).

    Raises:
        Fatal: the `score` extra is not installed.
    """
    subtag = primary_subtag(language)
    normalise = _normaliser(subtag)
    words, heard = normalise(reference).split(), normalise(hypothesis).split()
    pieces = _aligned(words, heard)
    count = {kind: 0 for kind in ("substitute", "insert", "delete")}
    for piece in pieces:
        if piece.kind != "equal":
            count[piece.kind] += max(len(piece.reference), len(piece.hypothesis))
    errors = sum(count.values())
    if subtag in CHARACTER_LANGUAGES:
        characters, character_errors = len(words), errors
    else:
        characters, character_errors = _character_errors(" ".join(words), " ".join(heard))
    return Comparison(
        pieces,
        Score(
            n_recordings=1,
            words=len(words),
            substitutions=count["substitute"],
            insertions=count["insert"],
            deletions=count["delete"],
            characters=characters,
            character_errors=character_errors,
        ),
    )


def pooled(scores: Iterable[Score]) -> Score:
    """The score of all recordings together: sums, so that a long recording weighs more."""
    columns = list(zip(*map(astuple, scores), strict=True))
    return Score(*map(sum, columns)) if columns else _NOTHING


_NOTHING = Score(0, 0, 0, 0, 0)


def score_texts(
    references: Sequence[str], hypotheses: Sequence[str], languages: Sequence[str | None]
) -> Score:
    """Pooled score of pairs, each compared as `compare` does.

    Args:
        references: what was said, one text per recording.
        hypotheses: what was recognised, in the same order.
        languages: their languages, None if unknown.

    Raises:
        ValueError: the three differ in length.
        Fatal: the `score` extra is not installed.
    """
    triples = zip(references, hypotheses, languages, strict=True)
    return pooled([compare(*triple).score for triple in triples])


def primary_subtag(language: str | None) -> str | None:
    """The language of a language tag (RFC 5646): `pt` of `pt-BR`; None if there is none."""
    return language.lower().replace("_", "-").split("-")[0] or None if language else None


_APOSTROPHES = str.maketrans("\u2019\u02bc", "''")


@functools.cache
def _normaliser(language: str | None) -> Callable[[str], str]:
    try:
        from whisper_normalizer.basic import BasicTextNormalizer
        from whisper_normalizer.english import EnglishTextNormalizer
    except ImportError as error:
        raise _missing() from error
    if language == "en":
        english: Callable[[str], str] = EnglishTextNormalizer()
        # It knows contractions by the typewriter's apostrophe only; word processors write others.
        return lambda text: english(text.translate(_APOSTROPHES))
    basic: Callable[[str], str] = BasicTextNormalizer(
        preserve_marks=True, split_letters=language in CHARACTER_LANGUAGES
    )
    return basic


def _aligned(words: list[str], heard: list[str]) -> tuple[Piece, ...]:
    # jiwer refuses references without words; all that was written for them is made up.
    if not words:
        return (Piece("insert", (), tuple(heard)),) if heard else ()
    found = _jiwer().process_words(" ".join(words), " ".join(heard))
    return tuple(
        Piece(
            chunk.type,
            tuple(words[chunk.ref_start_idx : chunk.ref_end_idx]),
            tuple(heard[chunk.hyp_start_idx : chunk.hyp_end_idx]),
        )
        for chunk in found.alignments[0]
    )


def _character_errors(reference: str, hypothesis: str) -> tuple[int, int]:
    """Characters of the reference, and errors."""
    if not reference:
        return 0, len(hypothesis)
    found = _jiwer().process_characters(reference, hypothesis)
    return len(reference), found.substitutions + found.insertions + found.deletions


def _jiwer() -> Any:
    try:
        import jiwer
    except ImportError as error:
        raise _missing() from error
    return jiwer


def _missing() -> Fatal:
    return Fatal("scoring needs jiwer and whisper_normalizer: pip install '.[score]'")
