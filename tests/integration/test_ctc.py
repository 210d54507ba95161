"""The CTC engine with a checkpoint trained here: what it reads, when, batched and in a job."""

from __future__ import annotations

import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    HubertConfig,
    HubertForCTC,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    WavLMConfig,
    WavLMForCTC,
)
from typer.testing import CliRunner

from tests.integration import tiny_ctc
from transcribe.cli import app
from transcribe.engines.base import EngineInput
from transcribe.engines.ctc import CTC
from transcribe.engines.fitting import Fitting
from transcribe.errors import Fatal
from transcribe.models import Model
from transcribe.score import score_texts

N_HELD_OUT = 30


@pytest.fixture(scope="module")
def checkpoint(tiny_ctc_checkpoint: Path) -> Model:
    return Model("tiny", tiny_ctc_checkpoint, "0" * 16, "ctc-transformers")


@pytest.fixture(scope="module")
def held_out() -> list[tuple[list[str], np.ndarray, list[tuple[float, float]]]]:
    """Digit strings never trained on, said at a pace never trained on."""
    rng = np.random.default_rng(99)
    voices = tiny_ctc.digit_sounds(tiny_ctc.HELD_OUT_RATE)
    made = []
    for index in range(N_HELD_OUT):
        digits = [str(d) for d in rng.choice(tiny_ctc.DIGITS, 5)]
        sound, times = tiny_ctc.sentence(digits, voices[index % len(voices)], rng)
        made.append((digits, (sound * 32_767).clip(-32_768, 32_767).astype(np.int16), times))
    return made


@pytest.fixture(scope="module")
def engine(checkpoint) -> CTC:
    torch.set_num_threads(1)
    return CTC(checkpoint, words=True)


@pytest.fixture(scope="module")
def heard(engine, held_out):
    return engine.recognise([EngineInput(sound, i) for i, (_, sound, _) in enumerate(held_out)])


def test_it_reads_digits_it_was_not_trained_on(held_out, heard) -> None:
    said = [" ".join(digits) for digits, _, _ in held_out]
    assert score_texts(said, [h.text for h in heard], [None] * len(said)).wer < 0.10


def test_words_stand_where_they_were_said(held_out, heard) -> None:
    errors = []
    for (digits, _, times), hypothesis in zip(held_out, heard, strict=True):
        words = [w for s in hypothesis.segments for w in s.words]
        if [w.word for w in words] == digits:
            for word, (start, end) in zip(words, times, strict=True):
                errors += [abs(word.start_s - start), abs(word.end_s - end)]
    assert len(errors) > 5 * N_HELD_OUT  # most strings are read right, so most words count
    assert np.median(errors) <= 0.060


def test_words_lie_inside_their_segments_in_order(held_out, heard) -> None:
    for (_, sound, _), hypothesis in zip(held_out, heard, strict=True):
        for segment in hypothesis.segments:
            check_words(segment, len(sound) / 16_000)


def check_words(segment, duration_s: float) -> None:
    assert " ".join(w.word for w in segment.words) == segment.text
    times = [t for w in segment.words for t in (w.start_s, w.end_s)]
    assert all(a <= b for a, b in pairwise(times))
    assert 0 <= segment.start_s <= times[0] and times[-1] <= segment.end_s <= duration_s
    assert all(0 < w.probability <= 1 for w in segment.words)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 48_000), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_any_sound_gives_words_in_order_or_none(engine, n_samples, loudness, seed) -> None:
    noise = np.random.default_rng(seed).uniform(-loudness, loudness, n_samples)
    (hypothesis,) = engine.recognise([EngineInput((noise * 32_767).astype(np.int16), 0)])
    for segment in hypothesis.segments:
        check_words(segment, n_samples / 16_000)


def test_a_long_pause_ends_a_segment(engine, held_out) -> None:
    (first, a, _), (second, b, _) = held_out[0], held_out[3]
    pause = np.zeros(20_000, dtype=np.int16)
    (hypothesis,) = engine.recognise([EngineInput(np.concatenate([a, pause, b]), 0)])
    texts = [segment.text for segment in hypothesis.segments]
    assert len(texts) >= 2
    assert score_texts([" ".join(first + second)], [" ".join(texts)], [None]).wer <= 0.3


def test_text_is_the_same_with_and_without_word_times(checkpoint, engine, held_out) -> None:
    windows = [EngineInput(sound, 0) for _, sound, _ in held_out[:5]]
    plain = CTC(checkpoint, language="en").recognise(windows)
    assert [h.text for h in plain] == [h.text for h in engine.recognise(windows)]
    assert {h.language for h in plain} == {"en"}
    assert all(s.words is None for h in plain for s in h.segments)


def test_nothing_in_nothing_out(engine) -> None:
    assert engine.recognise([]) == []
    tiny = [EngineInput(np.zeros(n, dtype=np.int16), 0) for n in (0, 1, 399)]
    assert [h.text for h in engine.recognise(tiny)] == ["", "", ""]


def test_the_whole_job_reads_digits(tiny_ctc_checkpoint, held_out, tmp_path) -> None:
    archive, out = tmp_path / "archive", tmp_path / "out"
    archive.mkdir()
    for index, (_, sound, _) in enumerate(held_out):
        soundfile.write(archive / f"{index:02}.wav", sound, 16_000)
    flags = ["--model", str(tiny_ctc_checkpoint), "--words"]
    result = CliRunner().invoke(app, ["run", str(archive), str(out), *flags])
    assert result.exit_code == 0, result.output
    rows = {Path(r["uri"]).stem: r for r in pq.read_table(out / "transcripts").to_pylist()}
    said = [" ".join(digits) for digits, _, _ in held_out]
    read = [rows[f"{index:02}"]["text"] for index in range(len(said))]
    assert score_texts(said, read, [None] * len(said)).wer < 0.10
    for row in rows.values():
        assert (row["engine"], row["language"]) == ("ctc-transformers", None)
        words = [w["word"] for s in row["segments"] for w in s["words"]]
        assert " ".join(words) == row["text"]


def test_a_checkpoint_that_only_a_worker_finds_unusable_ends_the_run_in_a_sentence(
    tiny_ctc_checkpoint, held_out, tmp_path
) -> None:
    folder = shutil.copytree(tiny_ctc_checkpoint, tmp_path / "model")
    (folder / "preprocessor_config.json").write_text('{"sampling_rate": "fast"}')
    (tmp_path / "archive").mkdir()
    soundfile.write(tmp_path / "archive" / "a.wav", held_out[0][1], 16_000)
    run = subprocess.run(
        [sys.executable, "-m", "jobs.transcribe", str(tmp_path / "archive"), str(tmp_path / "out"),
         "--model", str(folder)],
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert run.returncode == 2
    assert run.stderr.count("Error: --model") == 1
    assert "Traceback" not in run.stdout + run.stderr


# ---- random weights: shapes, padding, batches -------------------------------------------

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "conv_dim": (32, 32, 32),
    "conv_stride": (5, 8, 8),
    "conv_kernel": (10, 8, 8),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": len(tiny_ctc.VOCABULARY),
    "pad_token_id": 0,
}
FAMILIES = {
    "wav2vec2-base": (Wav2Vec2ForCTC, Wav2Vec2Config, "group", False),
    "wav2vec2-large": (Wav2Vec2ForCTC, Wav2Vec2Config, "layer", True),
    "hubert": (HubertForCTC, HubertConfig, "layer", True),
    "wavlm": (WavLMForCTC, WavLMConfig, "group", False),
}


@pytest.fixture(scope="module", params=FAMILIES)
def random_engine(request, checkpoint, tmp_path_factory) -> CTC:
    model_class, config_class, norm, has_mask = FAMILIES[request.param]
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    shutil.copy(checkpoint.path / "vocab.json", folder)
    Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(return_attention_mask=has_mask).save_pretrained(folder)
    config = config_class(feat_extract_norm=norm, do_stable_layer_norm=has_mask, **SMALL)
    model_class(config).save_pretrained(folder)
    return CTC(Model(request.param, folder, "0" * 16, "ctc-transformers"), words=True)


def test_a_window_reads_the_same_alone_and_in_any_batch(random_engine, monkeypatch) -> None:
    """Also while the batch after it is being heard, and with rows of silence, as on a GPU."""
    rng = np.random.default_rng(5)
    lengths = [3_000, 16_000, 16_001, 20_000, 23_999, 24_000, 47_000, 1]
    windows = [EngineInput(rng.integers(-9_000, 9_000, n, dtype=np.int16), 0) for n in lengths]
    alone = [random_engine.recognise([window])[0] for window in windows]
    monkeypatch.setattr(random_engine, "fitting", Fitting(10**9))
    monkeypatch.setattr(random_engine, "_batches_ahead", 1)
    monkeypatch.setattr("transcribe.engines.ctc._row_bucket", lambda n_windows, _: n_windows + 3)
    together = random_engine.recognise(windows)
    assert len(together) == len(windows)
    assert [h.text for h in together] == [h.text for h in alone]
    assert any(h.text for h in together)
    for one, other in zip(alone, together, strict=True):
        assert one.avg_logprob == pytest.approx(other.avg_logprob, abs=1e-4)


# ---- what cannot be used ----------------------------------------------------------------


@pytest.mark.parametrize("missing", ["vocab.json", "preprocessor_config.json", "model.safetensors"])
def test_an_incomplete_checkpoint_is_refused_in_one_sentence(checkpoint, tmp_path, missing) -> None:
    folder = shutil.copytree(checkpoint.path, tmp_path / "model")
    for file in folder.glob(f"{Path(missing).stem}*"):
        file.unlink()
    for extra in ("processor_config.json", "tokenizer.json"):
        (folder / extra).unlink(missing_ok=True)
    with pytest.raises(Fatal, match=r"^--model tiny") as refusal:
        CTC(Model("tiny", folder, "0" * 16, "ctc-transformers"))
    assert "\n" not in str(refusal.value)


def test_a_language_model_that_cannot_be_used_is_refused(checkpoint, tmp_path) -> None:
    with pytest.raises(Fatal, match=r"^--lm"):
        CTC(checkpoint, language_model=str(tmp_path / "none.arpa"))


ARPA = """\\data\\
ngram 1=5
ngram 2=3

\\1-grams:
-1.0\t<unk>\t0
-1.0\t<s>\t-0.3
-1.0\t</s>\t0
-0.5\tone\t-0.3
-3.0\tnine\t-0.3

\\2-grams:
-0.1\t<s> one
-0.1\tone one
-0.1\tone </s>

\\end\\
"""


def test_a_language_model_decides_what_the_sound_leaves_open(
    checkpoint, tmp_path, monkeypatch
) -> None:
    pytest.importorskip("pyctcdecode", reason="the packages of --lm are not installed")
    pytest.importorskip("kenlm", reason="the packages of --lm are not installed")
    (tmp_path / "digits.arpa").write_text(ARPA)
    engines = [
        CTC(checkpoint, words=True, language_model=path)
        for path in (None, str(tmp_path / "digits.arpa"))
    ]
    letters = tiny_ctc.VOCABULARY
    frames = torch.full((1, 12, len(letters)), -12.0)
    silence = EngineInput(np.zeros(4_000, dtype=np.int16), 0)
    for at, spelled in enumerate(["n", "o", "i", "n", "n", "e", "e"]):  # nine, or nearly one
        frames[0, at, letters[spelled]] = -1.0
    for at in range(12):
        frames[0, at, letters["<pad>"]] = -1.3 if at < 7 else -0.01
    texts = []
    for engine in engines:
        monkeypatch.setattr(engine, "_of_waveforms", lambda *_: frames)
        monkeypatch.setattr(engine, "_n_frames", lambda _: [12])
        texts.append(engine.recognise([silence])[0].text)
    assert texts[0] != texts[1]
    assert texts[1] == "one"
