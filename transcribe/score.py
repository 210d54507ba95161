"""How far transcripts are from what was said: word error rate against references.

Owns: the choice of normaliser and of the unit counted, and the pooling of errors over
recordings. Must not know where texts come from, nor what rate is good enough.

Needs the `demo` extra (jiwer, whisper_normalizer), imported when first scored: a transcription
run must not depend on them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transcribe.errors import Fatal

CHARACTER_LANGUAGES = frozenset({"zh", "yue", "ja", "th", "lo", "my", "km"})
"""Languages written without spaces between words: scored by characters."""


@dataclass(frozen=True)
class Score:
    """Errors of a set of transcripts, counted in words.

    For `CHARACTER_LANGUAGES` a word is a character as readers see it (a grapheme).

    Attributes:
        n_recordings: transcripts compared.
        words: words of the references, after normalisation.
        substitutions, insertions, deletions: of the closest alignment of each pair.
    """

    n_recordings: int
    words: int
    substitutions: int
    insertions: int
    deletions: int

    @property
    def errors(self) -> int:
        """Substitutions, insertions and deletions together."""
        return self.substitutions + self.insertions + self.deletions

    @property
    def wer(self) -> float:
        """Errors per reference word; above 1 if much was made up, nan without any word."""
        return self.errors / self.words if self.words else float("nan")


def score_texts(
    references: Sequence[str], hypotheses: Sequence[str], languages: Sequence[str | None]
) -> Score:
    """Pooled score of pairs: the sum of errors over the sum of reference words.

    Texts are normalised first, as in the Whisper paper (Radford et al. 2022, appendix C):
    case, punctuation, bracketed remarks; for English also spelling and spelled numbers. Other
    languages keep their combining marks, which that paper's normaliser turns into word breaks.
    Every word written for an empty reference is an insertion.

    Args:
        references: what was said, one text per recording.
        hypotheses: what was recognised, in the same order.
        languages: codes such as `en` or `pt-BR`; None if unknown (scored as not English).

    Raises:
        ValueError: the three differ in length.
        Fatal: the `demo` extra is not installed.
    """
    pairs = []
    for reference, hypothesis, language in zip(references, hypotheses, languages, strict=True):
        normalise = _normaliser(_primary_subtag(language))
        pairs.append((normalise(reference).strip(), normalise(hypothesis).strip()))
    return _pooled(pairs)


def score_by_kind(
    references: Sequence[str],
    hypotheses: Sequence[str],
    languages: Sequence[str | None],
    kinds: Sequence[str],
) -> dict[str, Score]:
    """`score_texts` for each kind of recording on its own, in order of first appearance."""
    if not len(references) == len(hypotheses) == len(languages) == len(kinds):
        raise ValueError("references, hypotheses, languages and kinds differ in length")
    members: dict[str, list[int]] = {}
    for index, kind in enumerate(kinds):
        members.setdefault(kind, []).append(index)
    return {
        kind: score_texts(
            [references[index] for index in indices],
            [hypotheses[index] for index in indices],
            [languages[index] for index in indices],
        )
        for kind, indices in members.items()
    }


def _primary_subtag(language: str | None) -> str | None:
    return language.lower().replace("_", "-").split("-")[0] if language else None


@functools.cache
def _normaliser(language: str | None) -> Callable[[str], str]:
    try:
        from whisper_normalizer.basic import BasicTextNormalizer
        from whisper_normalizer.english import EnglishTextNormalizer
    except ImportError as error:
        raise _missing() from error
    if language == "en":
        english: Callable[[str], str] = EnglishTextNormalizer()
        return english
    basic: Callable[[str], str] = BasicTextNormalizer(
        preserve_marks=True, split_letters=language in CHARACTER_LANGUAGES
    )
    return basic


def _pooled(pairs: Sequence[tuple[str, str]]) -> Score:
    """Score of normalised (reference, hypothesis) pairs."""
    try:
        import jiwer
    except ImportError as error:
        raise _missing() from error
    # jiwer refuses references without words; all that was written for them is made up.
    spoken = [pair for pair in pairs if pair[0]]
    made_up = sum(len(hypothesis.split()) for reference, hypothesis in pairs if not reference)
    if not spoken:
        return Score(len(pairs), 0, 0, made_up, 0)
    counts = jiwer.process_words([pair[0] for pair in spoken], [pair[1] for pair in spoken])
    return Score(
        n_recordings=len(pairs),
        words=counts.hits + counts.substitutions + counts.deletions,
        substitutions=counts.substitutions,
        insertions=counts.insertions + made_up,
        deletions=counts.deletions,
    )


def _missing() -> Fatal:
    return Fatal("scoring needs jiwer and whisper_normalizer: pip install 'transcribe[demo]'")
