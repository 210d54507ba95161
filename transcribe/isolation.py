"""A generator function in a child process: what ends the process costs one recording, not the run.

Decoders are C code that meets bytes nobody has checked: they may crash, hang, or ask for all the
memory there is. They run here, in a child that is started once and used for recording after
recording. The parent hands it a function of this package with its arguments, takes what the
function yields, and watches: no sign of life for too long, or too much memory, ends the child, as
a crash does by itself. The recording gets a second, fresh child; if it ends that one too, it is
`BadAudio`.

Owns the child's life and the wire to it. Must not know: audio, storage, Ray.

The child is a new interpreter, never a fork: the parent has threads (reading ahead, Ray, torch),
and a fork would inherit their locks. It dies with its parent (PR_SET_PDEATHSIG), writes nowhere
(no standard output or error, no core dump), and is the kernel's first choice when memory runs out.

Memory is watched from outside, ten times a second, as anonymous resident memory (statm's resident
minus shared). A limit set inside (setrlimit) was left alone: RLIMIT_AS counts the gigabytes that
torch maps and never touches, and a refused allocation looks to a decoder like a damaged file, so
the row would blame the recording's bytes. Where there is no /proc, nothing is watched.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from transcribe.errors import BadAudio, Fatal

T = TypeVar("T")
_Why = Literal["crash", "timeout", "memory", "start"]

_TRIES = 2
_TRIES_IF_IT_MAY_PASS = 5
_PAUSE_S = 1.0  # before such a try, doubled each time: 15 s in all
_START_S = 300.0  # importing torch takes 2 s, from a cold network disk minutes
_TICK_S = 0.1


@dataclass(frozen=True, slots=True)
class Limits:
    """What a task may take before its child is ended.

    Attributes:
        wait_s: seconds without a sign of life; each result and `alive()` start them anew.
        memory_bytes: anonymous memory of the child, what it had before the task included.
    """

    wait_s: float
    memory_bytes: int


def results(
    function: Callable[..., Iterator[T]],
    args: tuple[Any, ...],
    limits: Limits,
    prepare: Callable[[], object] | None = None,
) -> Iterator[T]:
    """What `function(*args)` yields, made in a child process.

    Args:
        function: found by its name in its module; the child imports that. It must yield the same
            when it is called again: a second child's results go on where the first one's ended.
        args: pickled, like what the function yields; arrays in it are copied once.
        limits: what it may take.
        prepare: run before it, outside its limits: loads what the first task would load.

    Raises:
        BadAudio: `crashed_worker`, `decode_timeout`, `decode_memory`: two children were lost to it.
        Fatal: no child can be started.
        Exception: what the function raised, with the child's traceback as a note.
    """
    request = _packed((prepare, function, args))
    tries = n_had = 0
    while True:
        tries += 1
        try:
            for n, result in enumerate(_run(request, limits)):
                if n == n_had:
                    n_had += 1
                    yield result
            return
        except _Lost as lost:
            if tries >= (_TRIES_IF_IT_MAY_PASS if lost.may_pass else _TRIES):
                raise lost.verdict() from None
            if lost.may_pass:
                time.sleep(_PAUSE_S * 2 ** (tries - 1))


def alive() -> None:
    """Say that work goes on; for functions that can work long between results."""
    if _TO_PARENT is not None:
        _send(_TO_PARENT, _packed(("alive", None)), _no_look)


def peak_bytes() -> int:
    """Largest resident memory of this thread's children when they had done a task; 0 before."""
    peak: int = getattr(_OF_THREAD, "peak_bytes", 0)
    return peak


class _Lost(Exception):
    """A child is gone, had to go, or did not come, before its task was done.

    `may_pass`: the task is hardly to blame, so that more tries are worth their while.
    """

    def __init__(self, why: _Why, how: str, may_pass: bool = False) -> None:
        super().__init__(why, how)
        self.why, self.how, self.may_pass = why, how, may_pass

    def verdict(self) -> BadAudio | Fatal:
        """What this says of the recording, once there is nothing left to try."""
        if self.why == "timeout":
            return BadAudio("decode_timeout", f"Decoding was given up, twice: {self.how}.")
        if self.why == "memory":
            return BadAudio("decode_memory", f"Decoding was given up: {self.how}.")
        if self.why == "start":
            return Fatal(
                f"The process that decodes does not start ({self.how});"
                " check this machine's memory and installation."
            )
        return BadAudio(
            "crashed_worker", f"Decoding ends the process that does it, each time ({self.how})."
        )


def _ending(status: int) -> str:
    if status >= 0:
        return f"exit code {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


# ---- the parent's side ------------------------------------------------------------------

_OF_THREAD = threading.local()  # PR_SET_PDEATHSIG binds a child to the thread that made it


def _run(request: list[_Bytes], limits: Limits) -> Iterator[Any]:
    """What the requested function yields, by this thread's child if that is not busy.

    Raises:
        _Lost: the child is gone.
        Exception: what the function raised.
    """
    child: _Child | None = getattr(_OF_THREAD, "idle", None)
    _OF_THREAD.idle = None
    if child is None or not child.is_alive:
        child = _Child()
    try:
        yield from child.run(request, limits)
    finally:
        if child.is_alive:
            _OF_THREAD.idle = child
            _OF_THREAD.peak_bytes = max(peak_bytes(), child.peak_bytes())


class _Child:
    """A child process, ready for a task or on its way there."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = _interpreter(theirs.fileno())
        ours.settimeout(_TICK_S)
        self._wire = ours
        # Also when the thread ends that it belongs to, and when the interpreter does.
        self._end = weakref.finalize(self, _end, self._process, ours)

    @property
    def is_alive(self) -> bool:
        """Whether it can be given a task."""
        return self._process.poll() is None

    def peak_bytes(self) -> int:
        """Largest resident size so far (VmHWM: getrusage would count the parent's, from vfork)."""
        try:
            lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        except OSError:
            return 0
        return next((int(line.split()[1]) * 1024 for line in lines if line[:6] == "VmHWM:"), 0)

    def run(self, request: list[_Bytes], limits: Limits) -> Iterator[Any]:
        """What the requested function yields. Without its end, the child is of no more use.

        Raises:
            _Lost: it is gone.
            Exception: what the function raised.
        """
        is_started = is_done = False
        watch = _Watch(self._process.pid, Limits(_START_S, limits.memory_bytes))
        try:
            _send(self._wire, request, watch.look)
            while not is_done:
                kind, value = _receive(self._wire, watch.look)
                watch.waited_s = 0.0
                if kind == "started":
                    is_started = True
                    watch = _Watch(self._process.pid, limits)
                elif kind == "result":
                    yield value
                elif kind != "alive":
                    is_done = True
        except _Cut:
            self._end()
            status = self._process.returncode
            # SIGKILL comes from outside: from the kernel, short of memory, for example.
            is_killed = status == -signal.SIGKILL
            raise _Lost("crash" if is_started else "start", _ending(status), is_killed) from None
        finally:
            if not is_done:
                self._process.kill()
                self._end()
        _settle(kind, value)


def _settle(kind: str, value: Any) -> None:
    """What the last message means."""
    if isinstance(value, MemoryError):
        raise _Lost("memory", "the machine did not give the memory it asks for")
    if kind == "raised":
        raise value
    if kind == "unready":
        raise Fatal(f"The process that decodes does not start: {value}")


def _interpreter(descriptor: int) -> subprocess.Popen[bytes]:
    """A new Python that finds the modules this one finds, and serves on `descriptor`."""
    try:
        return subprocess.Popen(
            [sys.executable, "-P", "-c", _MAIN, str(descriptor), str(os.getpid())],
            pass_fds=[descriptor],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p or "." for p in sys.path)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    except OSError as error:  # no memory for it, too many processes
        raise _Lost("start", error.strerror or "error", may_pass=True) from None


def _end(process: subprocess.Popen[bytes], wire: socket.socket) -> None:
    wire.close()
    try:  # one that is dying is left its own last words: the signal that it dies of
        process.wait(timeout=_TICK_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class _Watch:
    """Looks at a child while the parent waits for it.

    Time in which the parent itself did not run (a paused container, a machine too busy) is not
    held against the child.
    """

    def __init__(self, pid: int, limits: Limits) -> None:
        self._limits = limits
        self._process = Path(f"/proc/{pid}")
        self._looked_at = time.monotonic()
        self.waited_s = 0.0

    def look(self) -> None:
        """Note that time passes; called at least every `_TICK_S`.

        Raises:
            _Lost: too long, or too large.
        """
        now = time.monotonic()
        if now - self._looked_at < _TICK_S:
            return
        self.waited_s += min(now - self._looked_at, 10 * _TICK_S)
        self._looked_at = now
        if self.waited_s > self._limits.wait_s:
            raise _Lost("timeout", f"no progress for {self._limits.wait_s:.0f} s")
        if self._anonymous_bytes() > self._limits.memory_bytes:
            limit = f"{self._limits.memory_bytes / 2**30:.1f} GiB"
            raise _Lost("memory", f"it needs more than {limit} of memory")

    def _anonymous_bytes(self) -> int:
        try:
            resident, shared = (self._process / "statm").read_text().split()[1:3]
        except (OSError, ValueError):
            return 0
        return (int(resident) - int(shared)) * resource.getpagesize()


# ---- the wire ---------------------------------------------------------------------------
# A message is a pickle and the arrays in it, which travel beside it without being copied into it
# (pickle protocol 5): the number of pieces, then each piece with its length in front. Both ends
# are this module; what arrives is as trustworthy as the child is.

_Bytes = bytes | pickle.PickleBuffer
_LENGTH = struct.Struct("<Q")


class _Cut(Exception):
    """The other end is gone."""


def _packed(message: object) -> list[_Bytes]:
    beside: list[pickle.PickleBuffer] = []
    return [pickle.dumps(message, protocol=5, buffer_callback=beside.append), *beside]


def _send(wire: socket.socket, pieces: list[_Bytes], look: Callable[[], None]) -> None:
    _write(wire, memoryview(_LENGTH.pack(len(pieces))), look)
    for piece in pieces:
        raw = piece.raw() if isinstance(piece, pickle.PickleBuffer) else memoryview(piece)
        _write(wire, memoryview(_LENGTH.pack(raw.nbytes)), look)
        _write(wire, raw, look)


def _write(wire: socket.socket, raw: memoryview, look: Callable[[], None]) -> None:
    while raw.nbytes:
        try:
            raw = raw[wire.send(raw) :]
        except TimeoutError:
            pass
        except OSError:
            raise _Cut from None
        look()


def _receive(wire: socket.socket, look: Callable[[], None]) -> Any:
    """The next message.

    Raises:
        _Cut: there is none.
    """
    pieces = [_read(wire, _read_length(wire, look), look) for _ in range(_read_length(wire, look))]
    return pickle.loads(pieces[0], buffers=pieces[1:])


def _read_length(wire: socket.socket, look: Callable[[], None]) -> int:
    (length,) = _LENGTH.unpack(_read(wire, _LENGTH.size, look))
    return int(length)


def _read(wire: socket.socket, n: int, look: Callable[[], None]) -> bytearray:
    data = bytearray(n)
    left = memoryview(data)
    while left.nbytes:
        try:
            got = wire.recv_into(left)
            if got == 0:
                raise _Cut
            left = left[got:]
        except TimeoutError:
            pass
        except OSError:
            raise _Cut from None
        look()
    return data


# ---- the child's side -------------------------------------------------------------------

_TO_PARENT: socket.socket | None = None
_MAIN = "import sys; from transcribe.isolation import serve; serve(*map(int, sys.argv[1:]))"


def serve(descriptor: int, parent: int) -> None:
    """The child's main: run what is asked for until the parent is gone."""
    global _TO_PARENT
    _bind(parent)
    with socket.socket(fileno=descriptor) as wire:
        _TO_PARENT = wire
        while True:
            try:
                _answer(wire)
            except _Cut:
                return


def _bind(parent: int) -> None:
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:  # it died before that
            os._exit(1)
        Path("/proc/self/oom_score_adj").write_text("1000")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would hold audio
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the parent, which ends us
        signal.signal(number, signal.SIG_IGN)


def _answer(wire: socket.socket) -> None:
    def send(kind: str, value: object = None) -> None:
        _send(wire, _packed((kind, value)), _no_look)

    try:
        prepare, function, args = _receive(wire, _no_look)
        if prepare is not None:
            prepare()
    except _Cut:
        raise
    except Exception as error:  # this package, or what it imports, is not installed here
        return send("unready", f"{type(error).__name__}: {error}")
    send("started")
    try:
        for result in function(*args):
            send("result", result)
    except _Cut:
        raise
    except Exception as error:
        return send("raised", _travelling(error))
    send("done")


def _no_look() -> None:
    pass


def _travelling(error: Exception) -> Exception:
    """The error in a form that can be pickled, its traceback as a note."""
    where = "".join(traceback.format_tb(error.__traceback__))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__} in the decoding process")
    error.add_note(where)
    return error
