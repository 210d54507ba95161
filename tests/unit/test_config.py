"""Settings: each wrong flag gives one sentence; the fingerprint follows what changes results."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transcribe.config import RunConfig, fingerprint, result_settings
from transcribe.errors import Fatal
from transcribe.languages import LANGUAGES

NAN = float("nan")


@pytest.mark.parametrize(
    ("field", "value", "flag"),
    [
        ("archive", "", "ARCHIVE"),
        ("out", " ", "OUT"),
        ("language", "english", "--language"),
        ("language", "", "--language"),
        ("language", "EN", "--language"),
        ("channels", "stereo", "--channels"),
        ("device", "gpu", "--device"),
        ("workers", 0, "--workers"),
        ("workers", -1, "--workers"),
        ("shard_minutes", 0.0, "--shard-minutes"),
        ("shard_minutes", -1.0, "--shard-minutes"),
        ("shard_minutes", 1441.0, "--shard-minutes"),
        ("shard_minutes", NAN, "--shard-minutes"),
        ("max_failed", -0.01, "--max-failed"),
        ("max_failed", 1.01, "--max-failed"),
        ("max_failed", NAN, "--max-failed"),
        ("wait_for_workers_s", -1.0, "--wait-for-workers"),
        ("wait_for_workers_s", NAN, "--wait-for-workers"),
        ("speakers", ("agent", ""), "--speakers"),
        ("speakers", (" ",), "--speakers"),
    ],
)
def test_a_wrong_flag_gives_one_sentence_that_names_it(field: str, value: Any, flag: str) -> None:
    given_flags: dict[str, Any] = {"archive": "a", "out": "o", field: value}
    with pytest.raises(Fatal) as refused:
        RunConfig(**given_flags)
    sentence = str(refused.value)
    assert sentence.startswith(flag) and sentence.endswith(".") and "\n" not in sentence


def test_the_edges_of_each_range_are_allowed() -> None:
    RunConfig("a", "o", max_failed=0.0, wait_for_workers_s=0.0, workers=1, shard_minutes=1440)
    RunConfig("a", "o", max_failed=1.0, shard_minutes=0.01)
    for language in LANGUAGES:
        RunConfig("a", "o", language=language)


def test_a_config_cannot_be_changed_and_is_plain_json() -> None:
    config = RunConfig("a", "o", speakers=("agent", "customer"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.out = "x"  # type: ignore[misc]
    plain = config.as_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert set(plain) == {f.name for f in dataclasses.fields(RunConfig)}


# Every setting is in one of the two: a new one must be thought about.
CHANGES_RESULTS: dict[str, Any] = {
    "task": "translate",
    "words": True,
    "headerless": "mulaw:8000:1",
    "language": "de",
    "channels": "mix",
    "speakers": ("agent",),
}
CHANGES_NOTHING: dict[str, Any] = {
    "model": "elsewhere",  # its revision counts
    "language_model": "elsewhere.arpa",  # a part of that revision
    "engine": "whisper-transformers",  # the engine that ran counts
    "archive": "elsewhere",
    "out": "elsewhere",
    "device": "cuda",
    "workers": 7,
    "shard_minutes": 3.0,
    "max_failed": 0.5,
    "wait_for_workers_s": 1.0,
    "max_workers": 3,
    "price_per_hour": 2.0,
    "machine_type": "g2-standard-4",
    "max_spend": 5.0,
    "max_hours": 1.0,
}


def _fingerprint(config: RunConfig, revision: str = "r", engine: str = "e") -> str:
    return fingerprint(result_settings(config, revision, engine))


def test_the_fingerprint_changes_exactly_with_what_changes_results() -> None:
    assert set(CHANGES_RESULTS) | set(CHANGES_NOTHING) == {
        f.name for f in dataclasses.fields(RunConfig)
    }
    plain = RunConfig("a", "o")
    for name, value in CHANGES_NOTHING.items():
        assert _fingerprint(dataclasses.replace(plain, **{name: value})) == _fingerprint(plain)
    different = [dataclasses.replace(plain, **{n: v}) for n, v in CHANGES_RESULTS.items()]
    prints = [_fingerprint(config) for config in [plain, *different]]
    prints += [_fingerprint(plain, revision="r2"), _fingerprint(plain, engine="e2")]
    assert len(set(prints)) == len(prints)
    assert all(len(p) == 16 and int(p, 16) >= 0 for p in prints)


settings = st.dictionaries(
    st.text(max_size=4), st.one_of(st.none(), st.text(max_size=4), st.integers()), max_size=4
)


@given(settings, settings, st.randoms(use_true_random=False))
def test_fingerprints_are_equal_when_settings_are(one: Any, other: Any, random: Any) -> None:
    assert (fingerprint(one) == fingerprint(other)) == (one == other)
    items = list(one.items())
    random.shuffle(items)
    assert fingerprint(dict(items)) == fingerprint(one)
