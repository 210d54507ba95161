"""Greedy decoding in slots: transformers' texts and likelihoods, whoever sits beside a window."""

from __future__ import annotations

import functools
import logging
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import WhisperConfig, WhisperForConditionalGeneration

from tests import whisper_reference
from transcribe.engines.lanes import Lane, Replay
from transcribe.engines.whisper_decoding import SlotDecoder, Vocabulary


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Steps this small only wait for a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


END, START, TIMES, SIZE = 99, 100, 108, 200
VOCABULARY = Vocabulary(
    start=START,
    end=END,
    first_timestamp=TIMES,
    no_speech=TIMES - 2,
    suppressed=(7, *range(START, TIMES)),
    languages=(101, 102, 103),
)
N_WINDOWS, N_NEW = 11, 24
PROMPTS = [[START, 101 + i % 3, 104] if i % 4 else [START] for i in range(N_WINDOWS)]


@functools.cache
def model() -> WhisperForConditionalGeneration:
    torch.manual_seed(3)
    config = WhisperConfig(
        vocab_size=SIZE, d_model=32, encoder_layers=1, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32,
        decoder_ffn_dim=64, max_source_positions=20, num_mel_bins=8, init_std=0.4,
        pad_token_id=END, bos_token_id=END, eos_token_id=END, decoder_start_token_id=START,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    made = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():  # so that some texts end before they must
        made.proj_out.weight[END].normal_(std=0.4)
        made.model.decoder.layer_norm.bias += made.proj_out.weight[END]
    return made


@functools.cache
def outputs() -> torch.Tensor:
    return torch.randn(N_WINDOWS, 20, 32, generator=torch.Generator().manual_seed(5))


@functools.cache
def by_transformers() -> list[tuple[list[int], float, float]]:
    """Ids, summed log-probability and no-speech probability of each window, one by one."""
    return [
        whisper_reference.greedy(model(), VOCABULARY, output, prompt, N_NEW)
        for output, prompt in zip(outputs(), PROMPTS, strict=True)
    ]


class Trickle:
    """Windows that become ready a few at a time, in a given order (a `Feed`)."""

    def __init__(self, order: list[int], portions: list[int]) -> None:
        self.order, self.portions = list(order), list(portions)

    def __bool__(self) -> bool:
        return bool(self.order)

    def take(self, most: int, must: bool) -> list[int]:
        ready = self.portions.pop(0) if self.portions else most
        n = min(most, max(ready, int(must)))
        taken, self.order = self.order[:n], self.order[n:]
        return taken


@functools.cache
def decoder(n_slots: int, steps_per_look: int, looks_behind: int) -> SlotDecoder:
    return SlotDecoder(
        model(), VOCABULARY, n_slots, steps_per_look=steps_per_look, looks_behind=looks_behind,
        max_new_tokens=N_NEW,
    )  # fmt: skip


def check(written, expected) -> None:
    assert [w.ids for w in written] == [ids for ids, _, _ in expected]
    for one, (_, total, silent) in zip(written, expected, strict=True):
        assert one.total_logprob == pytest.approx(total, abs=1e-3)
        assert one.no_speech_prob == pytest.approx(silent, rel=1e-3, abs=1e-7)


def test_the_reference_is_worth_comparing_with() -> None:
    """Texts differ, some end by themselves, some are cut, and they hold pairs of timestamps."""
    texts = [ids for ids, _, _ in by_transformers()]
    lengths = {len(ids) for ids in texts}
    assert len({tuple(ids) for ids in texts}) == N_WINDOWS
    assert len(lengths) >= 4 and max(lengths) == N_NEW
    assert any(a >= TIMES and b >= TIMES for ids in texts for a, b in pairwise(ids))


@settings(max_examples=8, deadline=None)
@given(
    n_slots=st.sampled_from([1, 2, 5, 8, 16]),
    looks=st.sampled_from([(1, 0), (1, 1), (4, 1), (3, 2)]),
    order=st.permutations(range(N_WINDOWS)),
    portions=st.lists(st.integers(0, 6), max_size=8),
)
def test_texts_are_those_of_transformers_whoever_sits_beside(n_slots, looks, order, portions):
    feed = Trickle(order, portions)
    written = decoder(n_slots, *looks).write(feed, lambda i: outputs()[i], PROMPTS)
    check(written, by_transformers())


def test_nothing_to_write() -> None:
    assert decoder(2, 4, 1).write(Trickle([], []), lambda i: outputs()[i], []) == []


def test_fewer_slots_are_stepped_when_the_last_windows_remain() -> None:
    big = decoder(16, 1, 0)
    before = big.slots_stepped
    big.write(Trickle(list(range(N_WINDOWS)), []), lambda i: outputs()[i], PROMPTS)
    steps = [
        len(ids) + 1 + len(p) for (ids, _, _), p in zip(by_transformers(), PROMPTS, strict=True)
    ]
    assert sum(steps) - 2 * N_WINDOWS <= big.slots_stepped - before < 16 * max(steps)


@pytest.mark.parametrize("n_slots", [2, 16])
def test_languages_are_told_by_the_first_step(n_slots) -> None:
    one = decoder(n_slots, 4, 1)
    ids = list(VOCABULARY.languages)
    expected = [
        whisper_reference.first_logits(model(), VOCABULARY, output)[ids].softmax(-1)
        for output in outputs()
    ]
    for _ in range(2):  # and what was decoded in between leaves no trace
        told = one.language_probabilities(list(outputs()))
        torch.testing.assert_close(torch.tensor(told), torch.stack(expected), rtol=1e-3, atol=1e-5)
        check(
            one.write(Trickle(list(range(N_WINDOWS)), []), lambda i: outputs()[i], PROMPTS),
            by_transformers(),
        )


def test_a_fixed_number_of_tokens_for_measuring() -> None:
    fixed = SlotDecoder(
        model(), VOCABULARY, 4, steps_per_look=4, looks_behind=1, max_new_tokens=9, ignore_end=True
    )
    written = fixed.write(Trickle(list(range(N_WINDOWS)), []), lambda i: outputs()[i], PROMPTS)
    assert [len(w.ids) for w in written] == [9] * N_WINDOWS


# ---- graphs: what can be tried without a GPU ------------------------------------------------


class Capturing(Lane):
    """A lane of a CPU that captures: the work is called by the graph, and calls are noted."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.captures = True
        self.replays = 0

    def capture(self, work):
        def replay() -> None:
            self.replays += 1
            work()

        return replay


def test_every_call_is_the_work_once_warm_up_and_capture_included() -> None:
    lane, count = Capturing(), torch.zeros(1)
    replay = Replay(lambda: count.add_(1), lane)
    for _ in range(6):
        replay()
    assert count.item() == 6
    assert lane.replays == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU machine capturing works")
def test_decoding_goes_on_without_a_graph_that_cannot_be_captured(caplog) -> None:
    failing = SlotDecoder(
        model(), VOCABULARY, 4, steps_per_look=4, looks_behind=1, max_new_tokens=N_NEW
    )
    failing.lane.captures = True
    with caplog.at_level(logging.WARNING):
        written = failing.write(
            Trickle(list(range(N_WINDOWS)), []), lambda i: outputs()[i], PROMPTS
        )
    check(written, by_transformers())
    assert [r.message for r in caplog.records if "graph" in r.message]
