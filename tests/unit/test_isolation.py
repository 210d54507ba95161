"""A recording that ends, stops or fills the process that decodes it is one failed row."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests import deeds, poison
from transcribe import isolation, pipeline
from transcribe.archive import list_archive
from transcribe.config import RunConfig
from transcribe.errors import BadAudio, Fatal
from transcribe.isolation import Limits, results
from transcribe.shards import Shard

ROOT = Path(__file__).parents[2]
GIB = 1 << 30
ENOUGH = Limits(wait_s=60, memory_bytes=2 * GIB)


def collect(function, args, limits):
    return list(results(function, args, limits))


def children() -> set[int]:
    """Processes whose parent this one is, zombies included."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == os.getpid():
            found.add(int(stat.parent.name))
    return found


def is_gone(pid: int) -> bool:
    for _ in range(200):
        if not Path(f"/proc/{pid}").exists():
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(autouse=True)
def own_child(monkeypatch):
    """A child of this test's own, and short pauses."""
    monkeypatch.setattr(isolation, "_OF_THREAD", threading.local())
    monkeypatch.setattr(isolation, "_PAUSE_S", 0.01)


# ---- shards with poison in them ---------------------------------------------------------


def decoded(folder: Path, job: pipeline.Job) -> list[pipeline.DecodedPart]:
    return list(pipeline.decode_shard(Shard("s", tuple(list_archive(str(folder)))), job))


@pytest.fixture
def job(tmp_path):
    config = RunConfig(archive=str(tmp_path), out="out")
    return pipeline.Job(config, "run", "revision", "fake", "fingerprint", "cpu")


def test_poison_is_a_row_and_its_mates_are_decoded(tmp_path, job, monkeypatch, capfd, caplog):
    monkeypatch.setattr(pipeline, "listen", poison.listen)
    monkeypatch.setattr(pipeline, "decoding_limits", lambda *_: Limits(30.0, GIB))
    expected = {
        "defect": ("internal_error", "IndexError"),
        "eat": ("decode_memory", "1.0 GiB"),
        "segfault": ("crashed_worker", "SIGSEGV"),
    }
    mates = ["a", "e", "rest", "zz"]
    for name in [*expected, *mates]:
        soundfile.write(tmp_path / f"{name}.wav", np.zeros(16_000), 16_000)
    (part,) = decoded(tmp_path, job)
    outcomes = [piece.outcome for piece in part.pieces]
    got = {Path(o.recording.uri).stem: o for o in outcomes if o is not None}
    assert list(got) == sorted([*expected, *mates])
    for name, (kind, word) in expected.items():
        problem = got[name].problem
        assert problem is not None and problem.kind == kind, name
        assert word in problem.message, name
        assert got[name].recording.content_md5, name
    for name in mates:
        assert got[name].problem is None
        assert got[name].facts is not None and got[name].facts.duration_s == 1.0
    assert part.peak_bytes > 0
    assert capfd.readouterr() == ("", "")
    assert "IndexError" in caplog.text  # a defect of ours, and where it is
    assert "in listen" in caplog.text
    assert len(caplog.records) == 1


def test_a_child_that_cannot_start_stops_the_run(monkeypatch, tmp_path, job):
    """It is no recording's fault, and would fail every one."""
    soundfile.write(tmp_path / "a.wav", np.zeros(16_000), 16_000)
    for executable in ("/bin/false", "/nonexistent"):
        monkeypatch.setattr(sys, "executable", executable)
        with pytest.raises(Fatal, match="process that decodes does not start"):
            decoded(tmp_path, job)


# ---- what can become of a child ---------------------------------------------------------

VERDICTS = {
    "abort": ("crashed_worker", "SIGABRT"),
    "exit": ("crashed_worker", "exit code 7"),
    "killed": ("crashed_worker", "SIGKILL"),
    "segfault": ("crashed_worker", "SIGSEGV"),
    "eat": ("decode_memory", "1.0 GiB"),
    "refused": ("decode_memory", "did not give"),
    "sleep": ("decode_timeout", "1 s"),
    "spin": ("decode_timeout", "1 s"),
    "stop": ("decode_timeout", "1 s"),
}


@pytest.mark.parametrize("deed", VERDICTS)
def test_each_end_has_its_verdict_after_more_than_one_child(deed, capfd, monkeypatch):
    made = []
    real = isolation._Child
    monkeypatch.setattr(isolation, "_Child", lambda: (made.append(real()), made[-1])[1])
    before = children()
    with pytest.raises(BadAudio) as caught:
        collect(deeds.do, (deed,), Limits(60.0 if "memory" in VERDICTS[deed][0] else 1.0, GIB))
    kind, word = VERDICTS[deed]
    assert caught.value.kind == kind
    assert word in caught.value.message and caught.value.message.endswith(".")
    if deed != "refused":  # memory that is not given ends nothing
        assert len(made) == (5 if deed == "killed" else 2)
    assert collect(deeds.give_back, (deed,), ENOUGH) == [(deed,)]
    assert children() - before == {made[-1]._process.pid}  # no zombies
    assert capfd.readouterr() == ("", "")  # whatever a decoder writes there


def test_a_child_killed_once_costs_nothing():
    (before,) = collect(deeds.own_pid, (), ENOUGH)

    def kill_soon():
        time.sleep(0.3)
        os.kill(before, signal.SIGKILL)

    killer = threading.Thread(target=kill_soon)
    killer.start()
    assert collect(deeds.count_slowly, (8,), ENOUGH) == list(range(8))
    killer.join()
    assert collect(deeds.own_pid, (), ENOUGH) != [before]


def test_a_child_killed_between_tasks_is_replaced():
    (before,) = collect(deeds.own_pid, (), ENOUGH)
    os.kill(before, signal.SIGKILL)
    assert collect(deeds.own_pid, (), ENOUGH) != [before]
    assert is_gone(before)


def test_each_result_starts_the_deadline_anew():
    assert collect(deeds.count_slowly, (40,), Limits(2.0, GIB)) == list(range(40))


def test_a_pause_of_the_whole_machine_is_not_held_against_the_child():
    """The parent is stopped for longer than the deadline, as in a container that is paused."""
    code = (
        "from tests import deeds\n"
        "from transcribe.isolation import Limits, results\n"
        "print(*results(deeds.own_pid, (), Limits(60, 1 << 30)), flush=True)\n"
        "print(*results(deeds.count_slowly, (3,), Limits(60, 1 << 30)), flush=True)\n"
        "print(*results(deeds.sleep_for, (4.0,), Limits(3.0, 1 << 30)), flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as parent:
        parent.stdout.readline()
        assert parent.stdout.readline() == "0 1 2\n"
        time.sleep(0.3)
        os.kill(parent.pid, signal.SIGSTOP)
        time.sleep(4.5)
        os.kill(parent.pid, signal.SIGCONT)
        assert parent.stdout.read() == "4.0\n"


def test_a_sign_of_life_starts_the_deadline_anew():
    assert collect(deeds.work_long, (40,), Limits(2.0, GIB)) == ["done"]


def test_results_go_on_where_those_of_a_lost_child_ended(tmp_path):
    """What was handed out is not handed out again."""
    assert collect(deeds.die_once, (tmp_path / "died",), ENOUGH) == [0, 1, 2, 3, 4]
    assert (tmp_path / "died").exists()


def test_streams_may_be_left_or_interleaved():
    first = results(deeds.count_slowly, (5,), ENOUGH)
    second = results(deeds.count_slowly, (5,), ENOUGH)
    assert [next(first), next(second), next(first), next(second)] == [0, 0, 1, 1]
    first.close()  # in the middle: its child must not answer the next request
    assert list(second) == [2, 3, 4]
    assert collect(deeds.give_back, ("mine",), ENOUGH) == [("mine",)]


def test_preparing_is_not_held_against_the_task():
    got = list(results(deeds.own_pid, (), Limits(0.5, GIB), deeds.prepare_slowly))
    assert len(got) == 1


def test_one_child_serves_task_after_task():
    assert len({collect(deeds.own_pid, (), ENOUGH)[0] for _ in range(3)}) == 1


def test_every_thread_has_its_own_child_and_leaves_none():
    pids = []
    threads = [
        threading.Thread(target=lambda: pids.extend(collect(deeds.own_pid, (), ENOUGH)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(pids)) == 2
    assert all(is_gone(pid) for pid in pids)


@pytest.mark.parametrize("deed", ["spin", "sleep", "stop", "none"])
def test_a_child_dies_with_its_parent(deed):
    """However the parent ends, and whatever the child is at."""
    code = (
        "import sys, time\n"
        "from tests import deeds\n"
        "from transcribe.isolation import Limits, results\n"
        "print(*results(deeds.own_pid, (), Limits(60, 1 << 30)), flush=True)\n"
        "if sys.argv[1] != 'none': list(results(deeds.do, (sys.argv[1],), Limits(60, 1 << 30)))\n"
        "time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, deed], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as parent:
        pid = int(parent.stdout.readline())
        time.sleep(0.5)
        assert not is_zombie(pid)
        parent.kill()
    assert is_gone(pid)


def is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


# ---- what goes over the wire ------------------------------------------------------------


def test_arrays_arrive_as_they_were_and_can_be_written():
    sent = [np.arange(n, dtype=np.int16).reshape(1, -1) for n in (0, 1, 70_000, 5_000_000)]
    ((got, text),) = collect(deeds.give_back, (sent, b"x" * 3_000_000), ENOUGH)
    assert text == b"x" * 3_000_000
    for a, b in zip(sent, got, strict=True):
        assert np.array_equal(a, b) and a.dtype == b.dtype
        b += 1


def test_errors_come_back_as_they_are_and_say_where():
    with pytest.raises(BadAudio) as caught:
        collect(deeds.raise_this, (BadAudio("corrupt", "Sentence."),), ENOUGH)
    assert (caught.value.kind, caught.value.message) == ("corrupt", "Sentence.")
    with pytest.raises(FileNotFoundError) as missing:
        collect(deeds.raise_this, (FileNotFoundError("x"),), ENOUGH)
    assert "raise_this" in "".join(missing.value.__notes__)
    with pytest.raises(RuntimeError, match="Local in the decoding process"):
        collect(deeds.do, ("local",), ENOUGH)


def test_an_interrupted_task_does_not_answer_the_next_request(monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(isolation._Watch, "look", interrupted)
        collect(deeds.count_slowly, (3,), ENOUGH)
    assert collect(deeds.give_back, ("mine",), ENOUGH) == [("mine",)]


def test_what_the_child_cannot_import_stops_the_run(monkeypatch):
    def gone():
        yield

    gone.__module__, gone.__qualname__ = "tests.deeds", "gone"
    monkeypatch.setattr(deeds, "gone", gone, raising=False)
    with pytest.raises(Fatal, match="does not start: AttributeError"):
        collect(gone, (), ENOUGH)
