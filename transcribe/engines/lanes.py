"""Work on a device: lanes that run beside each other, and work that is replayed as a CUDA graph.

Owns every call to CUDA's streams, events and graphs; knows no model. On a CPU a lane is only the
order of the calls, a mark is reached when it is made, and nothing is captured, so whatever is
built on this runs there too.

What a captured graph demands, and where it is kept:

- Fixed buffers: work reads and writes tensors that live as long as the graph and never move.
- Nothing waits for the host inside, nothing is drawn at random, and every shape is the same.
- The libraries' workspaces exist before: the first calls of a `Replay` run as they are, on the
  lane on which it is captured later. They are real work and not repeated, so the state that the
  work advances is advanced once for every call.
- A library's workspace belongs to its stream: two lanes that run at once share none, since each
  captures on its own stream. Nor do they share memory: each lane has a pool of its own. Graphs of
  one lane may share it, because they never run at once and nobody reads a result of one after
  another has begun.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_LOG = logging.getLogger(__name__)

_WARM_UP_CALLS = 2


class Mark:
    """A point in a lane's work: reached or not yet, and when."""

    def __init__(self, event: Any) -> None:  # a torch.cuda.Event; None on a CPU
        self._event = event
        self._made_at = time.perf_counter()

    def is_reached(self) -> bool:
        """Whether the device has come this far; does not wait."""
        return self._event is None or bool(self._event.query())

    def wait(self) -> None:
        """Make the host wait until the device has come this far."""
        if self._event is not None:
            self._event.synchronize()

    def hold_back(self) -> None:
        """Make the lane that is in use wait, not the host."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)

    def seconds_since(self, earlier: Mark) -> float:
        """Seconds of the device between two marks of one lane, both reached."""
        if self._event is None or earlier._event is None:
            return self._made_at - earlier._made_at
        return float(earlier._event.elapsed_time(self._event)) / 1000


class Lane:
    """One order of work on a device, beside other lanes."""

    def __init__(self, device: str, *, urgent: bool = False) -> None:
        """Open it.

        Args:
            device: `cpu` or `cuda`.
            urgent: whether its kernels go before those of other lanes.
        """
        self.is_cuda = torch.device(device).type == "cuda"
        self.captures = self.is_cuda
        self._stream: Any = None
        self._pool: Any = None
        if self.is_cuda:
            self._stream = torch.cuda.Stream(priority=-1 if urgent else 0)  # type: ignore[no-untyped-call]
            self._stream.wait_stream(torch.cuda.current_stream())  # weights on their way
            self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """What is done inside goes into this lane."""
        if not self.is_cuda:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield

    def mark(self) -> Mark:
        """The end of what is in this lane by now."""
        if not self.is_cuda:
            return Mark(None)
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return Mark(event)

    def capture(self, work: Callable[[], None]) -> Callable[[], None] | None:
        """`work` as a graph, not run yet; None, with a warning, if it cannot be captured.

        Other threads of the process may use CUDA meanwhile; this one must not.
        """
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                work()
        except torch.OutOfMemoryError:  # a smaller batch may be captured
            raise
        except RuntimeError as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            _LOG.warning("no CUDA graph could be captured, going on without: %s", reason)
            self.captures = False
            return None
        return graph.replay


class Replay:
    """Work on fixed buffers: captured on a lane that captures, called as it is elsewhere."""

    def __init__(self, work: Callable[[], None], lane: Lane) -> None:
        self._work = work
        self._lane = lane
        self._calls = 0
        self._captured: Callable[[], None] | None = None

    def __call__(self) -> None:
        """Do the work once, inside its lane."""
        if self._captured is None and self._lane.captures and self._calls >= _WARM_UP_CALLS:
            self._captured = self._lane.capture(self._work)
        self._calls += 1
        (self._captured or self._work)()


def precision(device: str) -> torch.dtype:
    """What a device computes fast: float32 on a CPU, bfloat16 on a GPU, float16 on an older one.

    Before Ampere PyTorch would emulate bfloat16.
    """
    if torch.device(device).type != "cuda":
        return torch.float32
    is_native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if is_native else torch.float16


def host_buffer(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Host memory, not filled, that `device` reads and writes without stalling the host.

    It may be dropped while a copy from it is on its way: PyTorch keeps it until then.
    """
    is_pinned = torch.device(device).type == "cuda"
    return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=is_pinned)


def on_host(tensor: Tensor) -> Tensor:
    """An empty copy of `tensor` on the host, which the device can write without stalling."""
    return host_buffer(tuple(tensor.shape), tensor.dtype, str(tensor.device))


def to_device(values: Tensor, device: str) -> Tensor:
    """A host tensor on the device, copied in the lane in use without stalling the host.

    The pinned copy may be dropped at once: PyTorch keeps its memory until the device has it.
    """
    if torch.device(device).type != "cuda":
        return values
    return values.pin_memory().to(device, non_blocking=True)
