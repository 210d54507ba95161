"""The Whisper engine with the embedded weights: what it hears, and that batches do not matter."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchaudio

from jobs.sample_archive import SYNTH_RATE, speak
from transcribe.engines.base import EngineInput
from transcribe.engines.whisper import Whisper, load_whisper
from transcribe.models import resolve
from transcribe.score import score_texts

SENTENCES = [
    "Thank you for calling, how can I help you today?",
    "My internet connection has been down since yesterday evening.",
    "Please send the invoice to my new address before Friday.",
    "Yes, that is correct.",
]


def spoken(text: str, voice: str = "en-us+rob", group: int = 0) -> EngineInput:
    audio = torchaudio.functional.resample(torch.from_numpy(speak(text, voice)), SYNTH_RATE, 16_000)
    return EngineInput((audio.numpy() * 32_767).clip(-32_768, 32_767).astype(np.int16), group)


@pytest.fixture(scope="module")
def engine() -> Whisper:
    torch.set_num_threads(1)
    return load_whisper(resolve("whisper-base"), language="en")  # one thread, as a worker has it


@pytest.fixture(scope="module")
def windows() -> list[EngineInput]:
    return [spoken(s) for s in SENTENCES]  # espeak-ng never says a thing twice alike


@pytest.fixture(scope="module")
def heard(engine, windows):
    return engine.recognise(windows)


def test_it_reads_clear_speech(heard):
    score = score_texts(SENTENCES, [h.text for h in heard], ["en"] * len(heard))
    assert score.wer < 0.15


def test_its_time_is_accounted_for(engine, windows):
    before, started = replace(engine.work), time.perf_counter()
    engine.recognise(windows)
    spent, work = time.perf_counter() - started, engine.work.since(before)
    assert min(work.features_s, work.encoder_s, work.decoder_s) > 0
    assert 0.5 * spent < work.features_s + work.encoder_s + work.decoder_s <= spent
    # An unlikely text is heard twice.
    assert sum(len(w.samples) for w in windows) <= work.heard_samples < work.padded_samples
    assert 0 < work.tokens <= work.token_slots


def test_times_lie_in_the_window(windows, heard):
    for window, hypothesis in zip(windows, heard, strict=True):
        duration = len(window.samples) / 16_000
        assert 0 <= hypothesis.segments[0].start_s < hypothesis.segments[-1].end_s
        assert hypothesis.segments[-1].end_s <= duration + 0.02


def test_a_window_reads_the_same_alone_and_in_any_batch(engine, windows, heard):
    alone = [engine.recognise([w])[0] for w in windows]
    assert alone == heard  # to the last digit
    backwards = engine.recognise(windows[::-1])[::-1]
    assert backwards == heard


def test_a_long_monologue_is_heard_to_its_end(engine):
    text = " ".join(SENTENCES[:3] * 2)
    (hypothesis,) = engine.recognise([spoken(text)])
    assert score_texts([text], [hypothesis.text], ["en"]).wer < 0.2


def test_the_language_is_detected_for_a_whole_recording():
    engine = load_whisper(resolve("whisper-base"), threads=2)
    english = [spoken(s, group=0) for s in SENTENCES[:2]]
    # Of the synthesiser's languages the one that is told from others whichever way it says it.
    text = "Buenos días, le llamo porque quiero saber cuándo llega mi paquete. Muchas gracias."
    spanish = spoken(text, "es", group=1)
    found = engine.recognise([english[0], spanish, english[1]])
    assert [h.language for h in found] == ["en", "es", "en"]
    assert found[0].language_probability == found[2].language_probability
    assert all(0 < h.language_probability <= 1 for h in found)


def test_nothing_in_nothing_out(engine):
    assert engine.recognise([]) == []
