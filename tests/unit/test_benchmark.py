"""The benchmark's arithmetic: shares, medians, spreads, ratios, warm time; and its protocol."""

from __future__ import annotations

import io
import json
import math
import struct
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("psutil", reason="needs the bench extra")

from jobs.benchmark import worker
from jobs.benchmark.archives import Clip, middling, shares, subset
from jobs.benchmark.bench import Options
from jobs.benchmark.contenders import BARE, CONTENDERS, ONE_WORKER, OURS, SCALING, Layout, layouts
from jobs.benchmark.ggml import _q8_0, _tokens, write_ggml
from jobs.benchmark.ours import warm_seconds
from jobs.benchmark.processes import Measured
from jobs.benchmark.results import Entry, Round, as_row, is_slow, ratios
from jobs.benchmark.weights import _openai_name
from jobs.benchmark.worker import Answer, Setup
from transcribe.errors import Fatal

NAMED = {contender.name: contender for contender in (*CONTENDERS, *SCALING)}


def clip(path: str, seconds: float, reference: str | None = "good morning dear friend") -> Clip:
    return Clip(path, seconds, reference, "en")


clips = st.lists(st.floats(1, 600), min_size=1, max_size=40).map(
    lambda lengths: [clip(f"f{i:03d}", length) for i, length in enumerate(lengths)]
)


# ---- who hears what -------------------------------------------------------------------------


@given(clips, st.integers(1, 8))
def test_every_recording_goes_to_one_process(archive: list[Clip], n: int) -> None:
    parts = shares(archive, n)
    assert len(parts) == n
    assert sorted(c.path for part in parts for c in part) == [c.path for c in archive]
    lengths = [sum(c.duration_s for c in part) for part in parts]
    assert max(lengths) - min(lengths) <= max(c.duration_s for c in archive) + 1e-6


@given(clips, st.floats(1, 2_000))
def test_a_subset_is_as_long_as_asked_for(archive: list[Clip], seconds: float) -> None:
    chosen = subset(archive, seconds)
    assert chosen and {c.path for c in chosen} <= {c.path for c in archive}
    got, whole = sum(c.duration_s for c in chosen), sum(c.duration_s for c in archive)
    assert got <= max(min(seconds, whole), min(c.duration_s for c in archive)) + 300
    assert subset(archive, seconds) == chosen


def test_a_subset_has_short_and_long_recordings() -> None:
    archive = [clip(f"{i}", 10.0 if i % 2 else 100.0) for i in range(20)]
    assert {c.duration_s for c in subset(archive, 400)} == {10.0, 100.0}


@given(clips, st.integers(1, 8))
def test_a_trial_is_fair_to_layouts_of_several_processes(archive: list[Clip], n: int) -> None:
    chosen = middling(archive, n)
    lengths = sorted(c.duration_s for c in archive)
    assert len({c.path for c in chosen}) == len(chosen) == min(n, len(archive))
    spread = max(c.duration_s for c in chosen) - min(c.duration_s for c in chosen)
    neighbours = [b - a for a, b in zip(lengths, lengths[len(chosen) - 1 :], strict=False)]
    assert any(spread == pytest.approx(each) for each in neighbours)


def test_peers_may_choose_their_layout_and_we_may_not() -> None:
    peer = NAMED["faster-whisper"]
    assert list(layouts(peer, 2, "cpu")) == [Layout(2, 1), Layout(1, 2)]
    assert list(layouts(NAMED[OURS], 4, "cpu")) == [Layout(1, 4, on_ray=True)]
    assert list(layouts(NAMED[BARE], 4, "cpu")) == [Layout(4, 1)]
    assert list(layouts(NAMED[ONE_WORKER], 4, "cpu")) == [Layout(1, 1, cores=1, on_ray=True)]
    assert list(layouts(peer, 16, "cuda")) == [Layout(1, 1)]


def test_every_contender_can_be_loaded_by_name() -> None:
    assert set(worker._LOADERS) == set(NAMED)


# ---- what came out --------------------------------------------------------------------------


def entry(name: str, *seconds: float, text: str = "good morning dear friend") -> Entry:
    """A contender that took so many seconds for 100 s of audio, round after round."""
    heard = (clip("a", 100.0),)
    rounds = [Round(heard, Measured(s, s + 5, 2 * s, int(1e9 * s), {"a": text})) for s in seconds]
    return Entry(NAMED[name], Layout(2, 1), rounds=rounds)


def test_a_row_has_the_median_and_the_spread_of_its_rounds() -> None:
    row = as_row(
        entry("faster-whisper", 4.0, 10.0, 5.0, text="good morning deer friend"), 40.0, 2.0
    )
    assert (row["rtfx"], row["rtfx_min"], row["rtfx_max"]) == (20.0, 10.0, 25.0)
    assert row["spread"] == pytest.approx(15 / 20)
    assert row["cpu_seconds_per_audio_hour"] == pytest.approx(3600 * 10 / 100)
    assert row["peak_bytes"] == 10e9
    assert row["wer"] == pytest.approx(1 / 4)
    assert row["ratio"] == 2.0
    assert row["cost_per_1000_hours"] == pytest.approx(100.0)  # 50 machine hours at 2


def test_ratios_are_ours_over_theirs_and_the_best_peer_is_the_fastest() -> None:
    entries = [
        entry(OURS, 2.0, 2.0, 2.5),
        entry(BARE, 1.9),
        entry("faster-whisper", 10.0),
        entry("faster-whisper-batched", 6.0, text="good morning dear"),
        entry(ONE_WORKER, 3.9),
        Entry(NAMED["whisper.cpp"], not_run="not installed (pywhispercpp)"),
    ]
    found = ratios(entries)
    assert found["best_peer"] == "faster-whisper-batched"
    assert found["ratio_to_best_peer"] == pytest.approx(3.0)
    assert found["wer_above_best_peer"] == pytest.approx(-0.25)
    assert found["ratio_to_bare_pipeline"] == pytest.approx(0.95)
    assert found["ratio_to_one_worker"] == pytest.approx(1.95)


def test_without_a_side_there_is_no_ratio() -> None:
    assert set(ratios([entry(OURS, 1.0)]).values()) == {None}
    peer_alone = ratios([entry("faster-whisper", 1.0)])
    assert peer_alone.pop("best_peer") == "faster-whisper"
    assert set(peer_alone.values()) == {None}


def test_what_failed_counts_as_no_text() -> None:
    made = entry("faster-whisper", 1.0)
    made.rounds[0].measured.texts["a"] = None
    row = as_row(made, None, None)
    assert (row["failed"], row["wer"], row["ratio"]) == (1, 1.0, None)


def test_who_did_not_run_says_why() -> None:
    row = as_row(Entry(NAMED["whisper.cpp"], not_run="not installed (x)"), 3.0, None)
    assert row["not_run"] == "not installed (x)" and "rtfx" not in row
    json.dumps(row, allow_nan=False)


def test_a_peer_below_half_of_the_best_one_is_slow() -> None:
    def tried(name: str, *rates: float) -> Entry:
        return Entry(NAMED[name], trials={str(i): r for i, r in enumerate(rates)})

    best, half = tried("faster-whisper", 4.0, 20.0), tried("openai-whisper", 10.0)
    slow, ours = tried("whisper.cpp", 3.0, 9.9), Entry(NAMED[OURS])
    entries = [best, half, slow, ours]
    assert [e for e in entries if is_slow(e, entries)] == [slow]


# ---- a run's time without its start -----------------------------------------------------------


def shard(
    decode_from: float, decoding: float, recognise_from: float, end: float
) -> dict[str, float]:
    """`decoding` seconds of decoding; published a second after recognition ended."""
    stages = {"read": 0.0, "decode": decoding, "resample": 0.0, "speech_detection": 0.0}
    stages |= {"recognise": end - 1 - recognise_from, "assemble": 0.0}
    stages |= {"publish_queue": 0.5, "publish": 0.5, "decode_cpu": decoding / 2}
    seconds = {f"{name}_seconds": value for name, value in stages.items()}
    return {**seconds, "started_at": decode_from, "finished_at": end}


def test_warm_time_begins_with_recognition_and_counts_what_was_decoded_before() -> None:
    shards = [
        shard(100, 4, 110, 130),  # all 2 CPU seconds of its decoding came before 110
        shard(108, 4, 130, 150),  # half of them
        shard(120, 4, 131, 149),  # none
    ]
    assert warm_seconds(shards, cores=2) == pytest.approx(40 + (2 + 1) / 2)
    assert warm_seconds(shards, cores=1) == pytest.approx(40 + 3)


# ---- protocol ---------------------------------------------------------------------------------

SETUP = Setup("transcribe-bare", "fake", "", 1, "cpu", "en", "warm.wav", "/nowhere")


def talk(monkeypatch: pytest.MonkeyPatch, load: object, *files: list[str]) -> list[dict]:
    monkeypatch.setattr(worker, "_load", load)
    told = "".join(
        json.dumps(line) + "\n" for line in [asdict(SETUP), *({"files": f} for f in files)]
    )
    answers = io.StringIO()
    worker.main(io.StringIO(told), answers)
    return [json.loads(line) for line in answers.getvalue().splitlines()]


def test_a_worker_warms_up_and_answers_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []

    def transcribe(file: str) -> str:
        heard.append(file)
        if file == "bad":
            raise ValueError("no audio")
        return file.upper()

    greeting, first, second = talk(
        monkeypatch, lambda setup: worker.one_by_one(transcribe), ["a", "bad"], ["b"]
    )
    assert greeting == {"ready": True}
    assert (first["texts"], second["texts"]) == (["A", None], ["B"])
    assert heard == ["warm.wav", "a", "bad", "b"]


def test_what_is_missing_or_broken_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(setup: Setup) -> None:
        raise ModuleNotFoundError("No module named 'x'", name="x")

    def broken(setup: Setup) -> None:
        raise RuntimeError("no such weights")

    assert talk(monkeypatch, missing, ["a"]) == [{"missing": "x"}]
    assert talk(monkeypatch, broken, ["a"]) == [{"failed": "RuntimeError: no such weights"}]


def test_a_round_that_breaks_is_told_and_the_next_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_of(files: list[str]) -> Answer:
        if files == ["bad"]:
            raise MemoryError("full")
        return Answer([""] * len(files))

    _, first, second = talk(monkeypatch, lambda setup: all_of, ["bad"], ["a"])
    assert first == {"failed": "MemoryError: full"}
    assert second["texts"] == [""]


# ---- flags --------------------------------------------------------------------------------------

OPTIONS = Options(
    None, Path("x"), None, "calls", None, "fake", "en", "cpu", 3, (), False, False, None
)


@pytest.mark.parametrize(
    ("wrong", "flag"),
    [
        ({"shape": "songs"}, "--shape"),
        ({"device": "tpu"}, "--device"),
        ({"minutes": 0.0}, "--minutes"),
        ({"price": math.nan}, "--price"),
        ({"language": "klingon"}, "--language"),
        ({"reference": "x.csv"}, "--reference"),
    ],
)
def test_a_wrong_flag_is_named(wrong: dict, flag: str) -> None:
    with pytest.raises(Fatal, match=flag):
        replace(OPTIONS, **wrong)


# ---- weights for whisper.cpp and openai-whisper -------------------------------------------------


def test_eight_bit_blocks_give_the_values_back() -> None:
    values = np.random.default_rng(1).standard_normal((4, 64), dtype=np.float32)
    values[0, :32] = 0
    packed = np.frombuffer(_q8_0(values), np.dtype([("scale", "<f2"), ("values", "i1", 32)]))
    back = (packed["scale"][:, None].astype(np.float32) * packed["values"]).reshape(values.shape)
    assert np.abs(back - values).max() < np.abs(values).max() / 127
    assert len(packed.tobytes()) == values.size // 32 * 34


def test_tokens_are_bytes_again(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    vocabulary = {"!": 0, "Ġthe": 1, "Ã": 2}
    file.write_text(json.dumps({"model": {"vocab": vocabulary}}))
    assert _tokens(file) == [b"!", b" the", b"\xc3"]


def test_a_ggml_file_begins_with_its_numbers(tmp_path: Path) -> None:
    tokenizer, file = tmp_path / "tokenizer.json", tmp_path / "model.bin"
    tokenizer.write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    names = "n_vocab n_audio_ctx n_audio_state n_audio_head n_audio_layer n_text_ctx"
    names += " n_text_state n_text_head n_text_layer n_mels"
    dimensions = {name: i for i, name in enumerate(names.split(), start=80)}
    state = {"encoder.conv1.bias": torch.ones(3), "decoder.w": torch.ones(2, 32)}
    write_ggml(state, dimensions, tokenizer, file)
    data = file.read_bytes()
    assert struct.unpack_from("<12i", data) == (0x67676D6C, *range(80, 90), 2007)
    assert struct.unpack_from("<2i", data, 48) == (89, 201)
    after_filters = 48 + 8 + 4 * 89 * 201
    assert data[after_filters : after_filters + 9] == struct.pack("<2i", 1, 1) + b"a"
    # conv1.bias: two dimensions (a column), float32
    assert struct.unpack_from("<5i", data, after_filters + 9) == (2, 18, 0, 1, 3)
    assert data.endswith(struct.pack("<e", 1 / 127) + bytes([127] * 32))


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("model.encoder.layers.0.self_attn.k_proj.weight", "encoder.blocks.0.attn.key.weight"),
        (
            "model.decoder.layers.1.encoder_attn.q_proj.bias",
            "decoder.blocks.1.cross_attn.query.bias",
        ),
        (
            "model.decoder.layers.1.encoder_attn_layer_norm.bias",
            "decoder.blocks.1.cross_attn_ln.bias",
        ),
        ("model.encoder.layer_norm.weight", "encoder.ln_post.weight"),
        ("model.decoder.layer_norm.weight", "decoder.ln.weight"),
        ("model.encoder.layers.2.final_layer_norm.bias", "encoder.blocks.2.mlp_ln.bias"),
        ("model.decoder.embed_positions.weight", "decoder.positional_embedding"),
    ],
)
def test_openai_names(theirs: str, ours: str) -> None:
    assert _openai_name(theirs) == ours
