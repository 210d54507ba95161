"""Preflight: what machines say of themselves, judged; stores and archives, tried for real."""

from __future__ import annotations

import time

import pytest
from typer.testing import CliRunner

from transcribe import preflight
from transcribe.cli import app
from transcribe.preflight import Node, NodeFacts

NOW = 1_000_000.0
HERE = preflight.node_facts("fake", None, has_gpu=False)


def facts(**changed):
    known = {name: getattr(HERE, name) for name in NodeFacts.__dataclass_fields__}
    return NodeFacts(**{**known, "clock": NOW, "free_disk": 1 << 40, **changed})


def node(said, **changed):
    given = {"name": "10.0.0.7", "cpus": 8.0, "gpus": 0.0, "object_store": 4e9}
    return Node(**{**given, **changed}, facts=said, asked_at=(NOW - 1, NOW + 1))


def judged(*nodes):
    return {check.name: check for check in preflight.cluster_checks(list(nodes))}


def test_a_sound_machine_is_ok_in_every_line():
    checks = judged(node(facts(), gpus=1.0))
    assert {check.outcome for check in checks.values()} == {"ok"}
    assert set(checks) == {
        f"10.0.0.7 {what}"
        for what in ("versions", "clock", "weights", "disk", "object store", "GPU")
    }


@pytest.mark.parametrize(
    ("changed", "line", "outcome"),
    [
        ({"versions": {**HERE.versions, "ray": "2.9.0"}}, "versions", "failure"),
        ({"versions": {**HERE.versions, "python": "3.12.1"}}, "versions", "failure"),
        ({"versions": {**HERE.versions, "torch": "2.10.0"}}, "versions", "warning"),
        ({"model": "nowhere", "model_found": False}, "weights", "failure"),
        ({"gpu": "no NVIDIA driver"}, "GPU", "failure"),
        ({"clock": NOW - 300}, "clock", "warning"),
        ({"clock": NOW + 300}, "clock", "warning"),
        ({"free_disk": 1 << 30}, "disk", "failure"),
        ({"free_disk": 5 << 30}, "disk", "warning"),
    ],
)
def test_what_is_wrong_is_told_with_a_remedy(changed, line, outcome):
    check = judged(node(facts(**changed), gpus=1.0))[f"10.0.0.7 {line}"]
    assert check.outcome == outcome
    assert check.remedy


def test_a_machine_that_has_gone_meanwhile_is_no_reason_to_refuse():
    assert judged(node("it does not answer"))["10.0.0.7"].outcome == "warning"


def test_a_head_without_workers_needs_no_weights_and_warns_that_nobody_works_yet():
    checks = judged(node(facts(model_found=False, model="none"), cpus=0.0))
    assert checks["workers"].outcome == "warning"
    assert "10.0.0.7 weights" not in checks


def test_this_machine_agrees_with_itself():
    own = preflight.node_facts("fake", None, has_gpu=False)
    asked = Node("me", 2.0, 0.0, 4e9, own, (own.clock, time.time()))
    checks = list(preflight.cluster_checks([asked]))
    assert [c.outcome for c in checks if "disk" not in c.name] == ["ok"] * 4


def test_the_command_lists_reads_writes_and_exits_0(tmp_path):
    archive = tmp_path / "calls"
    archive.mkdir()
    (archive / "a.wav").write_bytes(b"RIFF" * 10)
    out = tmp_path / "out"
    done = CliRunner().invoke(
        app, ["preflight", "local", str(archive), str(out), "--model", "fake"]
    )
    assert done.exit_code == 0, done.output
    assert f"read 40 bytes of {archive / 'a.wav'}" in done.output
    assert list(out.iterdir()) == []


def test_the_command_says_what_is_missing_and_exits_2(tmp_path):
    (tmp_path / "file").write_text("x")
    done = CliRunner().invoke(
        app,
        ["preflight", "local", str(tmp_path / "none"), str(tmp_path / "file"), "--model", "nope"],
    )
    assert done.exit_code == 2
    failures = [line for line in done.output.splitlines() if line.startswith("failure")]
    assert [line.split()[1] for line in failures] == ["weights:", "archive:", "out:"]
    assert all("->" in line for line in failures)
