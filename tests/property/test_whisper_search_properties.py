"""What the search may write, and that beams find what is likeliest, on toy decoders."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transcribe.engines.whisper_search import TextRules, beams, greedy
from transcribe.engines.whisper_tokens import MAX_NEW_TOKENS

# Words 0 to 5, end 6, special tokens 7 to 9, timestamps 10 to 29.
END, START, FIRST_TIME, VOCABULARY = 6, 7, 10, 30
WORD_NEVER_WRITTEN, WORD_NEVER_FIRST = 5, 4


class Tokens:
    end_of_text = END
    first_timestamp = FIRST_TIME

    def never_written(self):
        return list(range(START, FIRST_TIME))


RULES = TextRules(Tokens(), VOCABULARY, [WORD_NEVER_WRITTEN], [WORD_NEVER_FIRST])


class Random:
    """Logits that depend on a window's seed and its text so far, and on nothing else."""

    def __init__(self, seeds, end_bias=0.0):
        self.rows = [(seed, ()) for seed in seeds]
        self.end_bias = end_bias

    def logits(self):
        return torch.stack([self.of(*row) for row in self.rows])

    def of(self, seed, text):
        values = np.random.default_rng([seed, *text]).normal(0, 3, VOCABULARY)
        values[END] += self.end_bias
        return torch.tensor(values, dtype=torch.float32)

    def next_logits(self, tokens):
        self.rows = [(s, (*t, n)) for (s, t), n in zip(self.rows, tokens.tolist(), strict=True)]
        return self.logits()

    def keep_windows(self, windows):
        """What is listened to goes with the row here; a writer may stand them as it likes."""
        return windows[::-1]

    def take_rows(self, rows):
        self.rows = [self.rows[i] for i in rows.tolist()]


def written_by_greedy(seeds, end_bias=0.0):
    writer = Random(seeds, end_bias)
    return greedy(writer, RULES, writer.logits(), END)


def written_by_beams(seeds, end_bias=0.0, n_beams=4, ngram=0):
    writer = Random(seeds, end_bias)
    return beams(writer, RULES, writer.logits(), END, n_beams, ngram)


few = settings(deadline=None, max_examples=12)  # a search is a few hundred steps
seeds = st.lists(st.integers(0, 10_000), min_size=1, max_size=6)


@few
@given(seeds, st.sampled_from([written_by_greedy, written_by_beams]))
def test_timestamps_come_in_pairs_and_in_order(seeds, search) -> None:
    for text in search(seeds):
        times = [t for t in text.ids if t >= FIRST_TIME]
        assert times == sorted(times)
        assert text.ids[0] >= FIRST_TIME
        assert not set(text.ids) & {WORD_NEVER_WRITTEN, END, *range(START, FIRST_TIME)}
        kinds = "".join("t" if t >= FIRST_TIME else "w" for t in text.ids)
        assert "ttt" not in kinds
        for at in range(1, len(kinds) - 1):  # a timestamp after a word is followed by another
            if kinds[at - 1 : at + 1] == "wt":
                assert kinds[at + 1] == "t"


@few
@given(seeds, st.sampled_from([written_by_greedy, written_by_beams]))
def test_a_window_is_written_the_same_in_any_company(seeds, search) -> None:
    alone = [search([seed])[0] for seed in seeds]
    for one, other in zip(search(seeds), alone, strict=True):
        assert one.ids == other.ids
        assert one.total_logprob == pytest.approx(other.total_logprob, rel=1e-5)


@few
@given(st.integers(0, 10_000))
def test_one_beam_is_greedy(seed) -> None:
    (one,), (other,) = written_by_greedy([seed], 3.0), written_by_beams([seed], 3.0, n_beams=1)
    assert one.ids == other.ids
    assert one.total_logprob == pytest.approx(other.total_logprob, rel=1e-4)


@few
@given(st.integers(0, 10_000))
def test_many_beams_find_the_likeliest_of_all_short_texts(seed) -> None:
    """With the end likely, the best mean log-probability of texts up to three tokens."""
    bias = 12.0
    writer = Random([seed], bias)

    def allowed(text):
        logits = writer.of(seed, text)[None]
        RULES.apply(logits, torch.tensor([text], dtype=torch.int64).reshape(1, len(text)))
        return logits.log_softmax(dim=1)[0]

    first = allowed(())
    ends = {}
    for a in torch.isfinite(first).nonzero()[:, 0].tolist():
        second = allowed((a,))
        if torch.isfinite(second[END]):
            ends[a,] = float(first[a] + second[END]) / 2
    best = max(ends.values())
    (found,) = written_by_beams([seed], bias, n_beams=16)
    assert found.total_logprob / (len(found.ids) + 1) >= best - 1e-4


@few
@given(st.integers(0, 10_000))
def test_no_three_tokens_are_written_twice_if_they_may_not(seed) -> None:
    (text,) = written_by_beams([seed], -4.0, n_beams=2, ngram=3)
    runs = list(zip(text.ids, text.ids[1:], text.ids[2:], strict=False))
    assert len(set(runs)) == len(runs)


class Parrot(Random):
    """Says the same two words for ever."""

    def of(self, seed, text):
        values = torch.zeros(VOCABULARY)
        values[(len(text) % 2) if text else FIRST_TIME] = 50.0
        return values


def test_a_text_that_only_repeats_itself_is_given_up() -> None:
    writer = Parrot([1, 2])
    texts = greedy(writer, RULES, writer.logits(), END)
    assert all(len(text.ids) < MAX_NEW_TOKENS // 2 for text in texts)
    assert all(len(text.ids) > 32 for text in texts)  # not before it is sure


class OneParrot(Parrot):
    """The window of seed 0 repeats itself; the others go on writing something new."""

    def of(self, seed, text):
        return Random.of(self, seed, text) if seed else Parrot.of(self, seed, text)


@few
@given(st.lists(st.integers(1, 10_000), min_size=4, max_size=8))
def test_a_loop_is_cut_at_the_same_token_in_any_company(seeds) -> None:
    def written(some):
        writer = OneParrot(some, -100.0)
        return greedy(writer, RULES, writer.logits(), END)[0].ids

    assert written([0, *seeds]) == written([0])
