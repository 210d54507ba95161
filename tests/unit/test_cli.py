"""What the command makes of a signal: in processes of its own, for that is what it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

COMMAND = """
import signal, threading, time
from transcribe import ending, run
from transcribe.cli import app

def transcribe(*anything):
    {interrupt}
    raise AssertionError("not interrupted")

run.transcribe = transcribe
ending.IN_TIME_S = {in_time_s}
app(["run", "archive", "out"])
"""

# ray.get and ray.wait swallow what a handler raises, and raise this
AS_IN_RAY = """
    try:
        signal.raise_signal(signal.SIGTERM)
    except KeyboardInterrupt:
        raise KeyboardInterrupt from None
"""
# the exception is lost, and a lock with it
HUNG = """
    try:
        signal.raise_signal(signal.{name})
    except KeyboardInterrupt:
        print("hung", flush=True)
        threading.Event().wait()
"""


def start(interrupt, in_time_s=18.0):
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND.format(interrupt=interrupt, in_time_s=in_time_s)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test started in the background would hand down that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def ended(process):
    _, stderr = process.communicate(timeout=60)
    assert stderr.count("\n") == 1, stderr
    return process.returncode, stderr


def test_sigterm_is_told_from_ctrl_c_also_where_ray_hides_it():
    code, sentence = ended(start(AS_IN_RAY))
    assert code == 143
    assert sentence.startswith("Error: Told to end (SIGTERM); what is published stays.")


def test_ctrl_c_is_told_as_such():
    code, sentence = ended(start("signal.raise_signal(signal.SIGINT)"))
    assert code == 130
    assert sentence.startswith("Error: Interrupted; what is published stays.")


@pytest.mark.parametrize(("name", "expected"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_run_that_hangs_is_ended_all_the_same(name, expected):
    code, sentence = ended(start(HUNG.format(name=name), in_time_s=0.5))
    assert code == expected
    assert "Run the same command again" in sentence


def test_a_second_ctrl_c_ends_at_once():
    with start(HUNG.format(name="SIGINT"), in_time_s=600.0) as process:
        assert process.stdout is not None and process.stdout.readline() == "hung\n"
        process.send_signal(signal.SIGINT)
        begun = time.monotonic()
        code, _ = ended(process)
    assert code == 130
    assert time.monotonic() - begun < 60


WHOLE_PROCESS = """
import atexit, sys
from transcribe.ending import process_of

class Left:
    def __del__(self):
        print("the interpreter is taken down")

left = Left()
with process_of():
    atexit.register(print, "what was registered is done")
    {body}
"""


@pytest.mark.parametrize(
    ("body", "expected", "complaint"),
    [
        ("pass", 0, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit('sentence')", 1, "sentence"),
        ("raise ValueError('sentence')", 1, "ValueError: sentence"),
    ],
)
def test_a_command_is_its_whole_process(body, expected, complaint):
    command = [sys.executable, "-c", WHOLE_PROCESS.format(body=body)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert process.returncode == expected
    assert process.stdout == "what was registered is done\n"
    assert process.stderr.strip().endswith(complaint)
