"""What the command makes of a signal."""

from __future__ import annotations

import signal

import pytest
from typer.testing import CliRunner

from transcribe import run
from transcribe.cli import app


@pytest.fixture
def ended_by(monkeypatch):
    """The result of `transcribe run` when its work is interrupted by `interrupt()`."""

    def invoke(interrupt):
        monkeypatch.setattr(run, "transcribe", lambda *_: interrupt())
        return CliRunner().invoke(app, ["run", "archive", "out"])

    return invoke


def test_sigterm_is_told_from_ctrl_c_also_where_ray_hides_it(ended_by):
    def as_in_ray():  # ray.get and ray.wait swallow what a handler raises, and raise this
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None

    before = signal.getsignal(signal.SIGTERM)
    result = ended_by(as_in_ray)
    assert result.exit_code == 143
    assert "SIGTERM" in result.stderr and result.stderr.count("\n") == 1
    assert signal.getsignal(signal.SIGTERM) is before


def test_ctrl_c_is_told_as_such(ended_by):
    result = ended_by(lambda: signal.raise_signal(signal.SIGINT))
    assert result.exit_code == 130
    assert "Interrupted" in result.stderr and "SIGTERM" not in result.stderr
