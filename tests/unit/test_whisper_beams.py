"""Beams on the device: the texts of the search that decides on the host."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_whisper_decoding import (
    END,
    N_NEW,
    N_WINDOWS,
    PROMPTS,
    SIZE,
    TIMES,
    VOCABULARY,
    Trickle,
    by_transformers,
    check,
    decoder,
    model,
    outputs,
)
from transcribe.engines import whisper_search
from transcribe.engines.whisper_beams import BeamDecoder
from transcribe.engines.whisper_search import TextRules, beams

N_BEAMS = 3


class Tokens:
    end_of_text, first_timestamp = END, TIMES

    def never_written(self):
        return []


RULES = TextRules(Tokens(), SIZE, VOCABULARY.suppressed, [])


class Rereading:
    """A window's texts, read from the beginning by transformers for every token (a `Writer`)."""

    def __init__(self, output: torch.Tensor, prompt: list[int]) -> None:
        self.output, self.rows = output, [list(prompt)]

    def logits(self) -> torch.Tensor:
        ids = torch.tensor(self.rows)
        heard = self.output[None].expand(len(ids), -1, -1)
        with torch.no_grad():
            made = model()(encoder_outputs=(heard,), decoder_input_ids=ids, use_cache=False)
        return made.logits[:, -1].clone()

    def next_logits(self, tokens):
        self.rows = [[*row, token] for row, token in zip(self.rows, tokens.tolist(), strict=True)]
        return self.logits()

    def keep_windows(self, windows):
        return windows  # there is one

    def take_rows(self, rows):
        self.rows = [self.rows[i] for i in rows.tolist()]


@functools.cache
def on_the_host(ngram: int) -> list[whisper_search.Written]:
    found = []
    for output, prompt in zip(outputs(), PROMPTS, strict=True):
        writer = Rereading(output, prompt)
        found += beams(writer, RULES, writer.logits(), END, N_BEAMS, ngram)
    return found


@functools.cache
def on_the_device(n_slots: int) -> BeamDecoder:
    slots = decoder(n_slots, 4, 1)
    return BeamDecoder(slots.rows, VOCABULARY, slots.rules, slots.lane, N_BEAMS, N_NEW)


def output_at(windows: list[int], index: int) -> torch.Tensor:
    return outputs()[windows[index]]


@pytest.fixture(autouse=True)
def short_texts(monkeypatch):
    monkeypatch.setattr(whisper_search, "MAX_NEW_TOKENS", N_NEW)


def test_the_reference_is_worth_comparing_with() -> None:
    """Beams find other texts than the greedy search, some ended and some cut, and obey n-grams."""
    texts = [text.ids for text in on_the_host(0)]
    assert texts != [ids for ids, _, _ in by_transformers()]
    assert {len(ids) == N_NEW for ids in texts} == {True, False}
    assert texts != [text.ids for text in on_the_host(2)]


@settings(max_examples=12, deadline=None)
@given(
    n_slots=st.sampled_from([3, 8, 16]),
    ngram=st.sampled_from([0, 2, 3]),
    order=st.permutations(range(N_WINDOWS)),
    n=st.integers(0, N_WINDOWS),
)
def test_texts_are_those_of_the_host_in_any_company(n_slots, ngram, order, n) -> None:
    chosen, device, written = order[:n], on_the_device(n_slots), []
    for begin in range(0, n, device.n_windows):
        some = chosen[begin : begin + device.n_windows]
        output = functools.partial(output_at, some)
        written += device.write(output, [PROMPTS[i] for i in some], ngram)
    assert len(written) == n
    for window, text in zip(chosen, written, strict=True):
        expected, silent = on_the_host(ngram)[window], by_transformers()[window][2]
        assert text.ids == expected.ids
        assert text.total_logprob == pytest.approx(expected.total_logprob, abs=1e-3)
        assert text.no_speech_prob == pytest.approx(silent, rel=1e-3, abs=1e-7)


def test_greedy_texts_in_the_same_buffers_are_not_disturbed() -> None:
    for _ in range(2):
        on_the_device(8).write(lambda i: outputs()[i], PROMPTS[:2])
        feed = Trickle(list(range(N_WINDOWS)), [])
        check(decoder(8, 4, 1).write(feed, lambda i: outputs()[i], PROMPTS), by_transformers())
