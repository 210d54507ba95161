"""The sample archive: what it promises in its reference is what lies in its files."""

from __future__ import annotations

import itertools
import json
import sys
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

pytest.importorskip("espeakng_loader", reason="needs the demo extra")

from jobs import sample_archive
from jobs.sample_archive import SYNTH_RATE, make_sample_archive, speak
from transcribe.errors import Fatal


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    return make_sample_archive(tmp_path_factory.mktemp("sample") / "archive")


@pytest.fixture(scope="module")
def rows(reference) -> list[dict]:
    return [json.loads(line) for line in reference.read_text().splitlines()]


def _samples(path: str) -> tuple[np.ndarray, int]:
    """Channels (n_channels, n) and sample rate, by whichever library reads the format."""
    if not path.endswith(".m4a"):
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        return samples.T, rate
    with av.open(path) as container:
        blocks = [frame.to_ndarray() for frame in container.decode(audio=0)]
        return np.concatenate(blocks, axis=1), container.streams.audio[0].rate


def _of_kind(rows: list[dict], kind: str) -> list[dict]:
    return [row for row in rows if row["kind"] == kind]


def test_speech_has_the_length_of_its_words():
    samples = speak("Thank you for calling, how can I help you today?", "en-us+victor")
    assert samples.dtype == np.float32
    assert 2.0 < len(samples) / SYNTH_RATE < 6.0
    assert 0.05 < np.abs(samples).max() <= 1.0
    assert speak("Thank you.", "en-us+victor", 100).size > speak("Thank you.", "en-us", 200).size


def test_an_unknown_voice_is_named():
    with pytest.raises(Fatal, match="no-such-voice"):
        speak("Hello.", "no-such-voice")


def test_a_missing_synthesiser_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(Fatal, match=r"\.\[demo\]"):
        make_sample_archive(tmp_path / "archive")


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "archive").write_text("a file is in the way")
    with pytest.raises(Fatal, match="archive"):
        make_sample_archive(tmp_path / "archive")


def test_the_reference_lists_every_file_and_lies_beside_the_archive(reference, rows):
    archive = reference.parent / "archive"
    assert reference == reference.parent / "archive-reference.jsonl"
    assert sorted(row["uri"] for row in rows) == sorted(
        str(path) for path in archive.rglob("*") if path.is_file()
    )


def test_it_is_a_quarter_hour_of_calls_in_mixed_formats(rows):
    calls = _of_kind(rows, "call")
    lengths_s = [samples.shape[1] / rate for samples, rate in map(_samples, _uris(calls))]
    assert len(calls) >= 24
    assert all(30 < length_s < 60 for length_s in lengths_s)
    assert 15 * 60 < sum(lengths_s) < 20 * 60
    suffixes = Counter(Path(uri).suffix for uri in _uris(calls))
    assert set(suffixes) == {".wav", ".flac", ".mp3", ".ogg", ".m4a"}
    assert suffixes.most_common(1)[0][0] == ".wav"
    wavs = [soundfile.info(uri).subtype for uri in _uris(calls) if uri.endswith(".wav")]
    assert {"ULAW", "ALAW"} <= set(wavs)


def test_text_channels_and_turns_tell_the_same(rows):
    for row in rows:
        turns = row["turns"]
        assert row["text"] == " ".join(turn["text"] for turn in turns)
        for channel, text in row["channels"].items():
            said = [turn["text"] for turn in turns if turn["channel"] == int(channel)]
            assert text == " ".join(said)
        gaps_s = [b["start"] - a["end"] for a, b in itertools.pairwise(turns)]
        assert all(0.49 < gap_s < 4.01 for gap_s in gaps_s)
        assert "{" not in row["text"]


def test_speech_is_where_the_turns_say_and_only_there(rows):
    for row in _of_kind(rows, "call"):
        samples, rate = _samples(row["uri"])
        for turn in row["turns"]:
            at = slice(int((turn["start"] + 0.1) * rate), int((turn["end"] - 0.1) * rate))
            level = np.sqrt(np.mean(samples[:, at] ** 2, axis=1))
            assert level[turn["channel"]] > 0.01, row["uri"]
            if len(row["channels"]) == 2:
                assert level[1 - turn["channel"]] < 0.005, row["uri"]


def test_one_stereo_recording_says_the_same_on_both_channels(rows):
    same = []
    for row in _of_kind(rows, "call"):
        samples, _ = _samples(row["uri"])
        if len(samples) == 2 and np.array_equal(samples[0], samples[1]):
            same.append(row)
    assert len(same) == 1
    assert list(same[0]["channels"]) == ["0"]


def test_the_odd_files_are_what_they_are_called(rows):
    silent, _ = _samples(_of_kind(rows, "silence")[0]["uri"])
    assert silent.shape[1] == 20 * 8000
    assert not silent.any()
    noisy, _ = _samples(_of_kind(rows, "noise")[0]["uri"])
    assert 20 * np.log10(np.sqrt(np.mean(noisy**2))) == pytest.approx(-30, abs=1)
    assert Path(_of_kind(rows, "empty_file")[0]["uri"]).stat().st_size == 0
    with pytest.raises(soundfile.LibsndfileError):
        soundfile.info(_of_kind(rows, "not_audio")[0]["uri"])
    assert Counter(row["expect"] for row in rows if row["kind"] != "call") == {
        "ok": 1,
        "empty": 2,
        "failed": 2,
    }


def test_the_truncated_file_breaks_its_headers_promise_after_its_last_turn(rows):
    (row,) = _of_kind(rows, "truncated")
    data = Path(row["uri"]).read_bytes()
    at = data.index(b"data")
    promised = int.from_bytes(data[at + 4 : at + 8], "little")
    there = len(data) - at - 8
    assert there < 0.7 * promised
    # Two bytes a frame at 8 kHz: the cut lies in the pause after the last turn.
    assert 0 < there / 16000 - row["turns"][-1]["end"] < 2.1


def test_the_same_seed_gives_the_same_samples_whatever_was_spoken_before(
    monkeypatch, tmp_path, reference, rows
):
    # Two recordings are enough: the state that could leak is the synthesiser's.
    monkeypatch.setattr(sample_archive, "CALL_FORMATS", sample_archive.CALL_FORMATS[:2])
    speak("Something else is said here.", "en-us+f5", 170)
    again = make_sample_archive(tmp_path / "again")
    for line, first in zip(again.read_text().splitlines()[:2], rows[:2], strict=True):
        row = json.loads(line)
        assert row["turns"] == first["turns"]
        assert Path(row["uri"]).read_bytes() == Path(first["uri"]).read_bytes()
    before = {path: path.read_bytes() for path in (tmp_path / "again").rglob("*.*")}
    assert make_sample_archive(tmp_path / "again") == again
    assert {path: path.read_bytes() for path in (tmp_path / "again").rglob("*.*")} == before
    other = make_sample_archive(tmp_path / "other", seed=2)
    assert json.loads(other.read_text().splitlines()[0])["text"] != rows[0]["text"]


def _uris(rows: list[dict]) -> list[str]:
    return [row["uri"] for row in rows]
