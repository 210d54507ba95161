"""A proxy in front of the emulator that breaks requests, and does what the emulator leaves out.

Passed on, unless a fault is due. What it adds, as Google's own service has it: answers to a
listing come in pages by name, `ifGenerationMatch` decides about writing and deleting,
`generation` about reading, and a download says the stored length.
"""

from __future__ import annotations

import http.client
import json
import random
import socket
import struct
import threading
import time
import urllib.parse
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Operation = Literal["list", "info", "read", "range", "write", "delete"]
Fault = Literal[
    "400", "403", "404", "429", "500", "503",
    "reset",  # the connection is reset before an answer
    "cut",    # half of the body, then the end
    "short",  # Content-Length and body agree on half of what there is
    "long",   # Content-Length claims more than comes
    "slow",   # a byte now and then
    "after",  # done, but 503 is the answer
    "lost",   # done, but the connection is reset
]  # fmt: skip

PASSING: tuple[Fault, ...] = ("429", "500", "503", "reset", "cut", "short", "long", "slow")
DONE_BUT_UNSAID: tuple[Fault, ...] = ("after", "lost")


class FaultyBucket:
    """The proxy.

    Attributes:
        due: the next faults of an operation, used up one by one.
        odds: probability of a fault for any request; its kind is drawn from those that fit.
        random: what draws, seeded.
        is_down: every connection is reset.
        is_refusing: every answer is this status, if set.
        page_size: names in one answer to a listing.
        between_pages: called before every page but the first.
        seen: requests by operation.
        injected: faults by operation and kind.
    """

    def __init__(self, upstream: str, seed: int = 0) -> None:
        self.due: dict[Operation, deque[Fault]] = {}
        self.odds = 0.0
        self.is_down = False
        self.is_refusing: int | None = None
        self.page_size = 1000
        self.between_pages: Callable[[], None] = lambda: None
        self.seen: Counter[Operation] = Counter()
        self.injected: Counter[tuple[Operation, Fault]] = Counter()
        self.lock = threading.Lock()
        self.writing = threading.Lock()
        self.random = random.Random(seed)
        self._upstream = urllib.parse.urlsplit(upstream).netloc
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"

    @contextmanager
    def serving(self) -> Iterator[FaultyBucket]:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()

    def next_fault(self, operation: Operation) -> Fault | None:
        with self.lock:
            self.seen[operation] += 1
            fault: Fault | None = None
            if self.is_down:
                return "reset"
            if self.is_refusing:
                return str(self.is_refusing)  # type: ignore[return-value]
            if self.due.get(operation):
                fault = self.due[operation].popleft()
            elif self.random.random() < self.odds:
                kinds = PASSING + (DONE_BUT_UNSAID if operation in ("write", "delete") else ())
                fault = self.random.choice(kinds)
            if fault is not None:
                self.injected[operation, fault] += 1
            return fault

    def upstream(
        self, method: str, path: str, body: bytes | None = None, headers: Any = None
    ) -> tuple[int, dict[str, str], bytes]:
        """One request to the emulator."""
        connection = http.client.HTTPConnection(self._upstream, timeout=60)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()


def _operation(method: str, path: str, headers: Any) -> Operation:
    if method == "DELETE":
        return "delete"
    if method != "GET":
        return "write"
    if path.startswith("/download"):
        return "range" if headers.get("Range") else "read"
    return "list" if urllib.parse.urlsplit(path).path.endswith("/o") else "info"


def _handler(bucket: FaultyBucket) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _any(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length) if length else None
            operation = _operation(self.command, self.path, self.headers)
            fault = bucket.next_fault(operation)
            if fault == "reset":
                self._reset()
            elif fault is not None and fault.isdigit():
                self._say(int(fault), {}, json.dumps({"error": {"message": "no"}}).encode())
            else:
                status, headers, content = self._answer(operation, body)
                self._send(fault, status, headers, content)

        do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _any

        def _answer(
            self, operation: Operation, body: bytes | None
        ) -> tuple[int, dict[str, str], bytes]:
            url = urllib.parse.urlsplit(self.path)
            asked = {k: v[0] for k, v in urllib.parse.parse_qs(url.query).items()}
            passed = {
                k: v for k, v in self.headers.items() if k in ("Content-Type", "Range", "Accept")
            }
            if operation == "list":
                return _page(bucket, self.path, asked)
            # As the service does: nobody comes between the condition and what it is for.
            with bucket.writing:
                if not _holds(bucket, url.path, asked):
                    is_write = operation in ("write", "delete")
                    return (412 if is_write else 404), {}, b'{"error": {"message": "condition"}}'
                status, headers, content = bucket.upstream(self.command, self.path, body, passed)
            kept = {
                k: v
                for k, v in headers.items()
                if k in ("X-Goog-Hash", "Content-Range", "Location")
            }
            if operation == "read" and status == 200:
                kept["X-Goog-Stored-Content-Length"] = str(len(content))
            return status, kept, content

        def _send(
            self, fault: Fault | None, status: int, headers: dict[str, str], content: bytes
        ) -> None:
            half = content[: len(content) // 2]
            if fault is None:
                self._say(status, headers, content)
            elif fault == "after":
                self._say(503, {}, b"{}")
            elif fault == "lost":
                self._reset()
            elif fault == "short":
                self._say(status, headers, half)
            elif fault == "flip":
                self._say(status, headers, bytes([content[0] ^ 1]) + content[1:])
            elif fault == "slow":
                self._say(status, headers, content, drip_s=0.5)
            else:
                claimed = len(content) + (10 if fault == "long" else 0)
                self._say(status, headers, half if fault == "cut" else content, claimed)
                self.close_connection = True

        def _say(
            self,
            status: int,
            headers: dict[str, str],
            content: bytes,
            claimed: int | None = None,
            drip_s: float = 0.0,
        ) -> None:
            with suppress(OSError):
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header(
                    "Content-Length", str(len(content) if claimed is None else claimed)
                )
                self.end_headers()
                for n in range(4 if drip_s else 0):
                    self.wfile.write(content[n : n + 1])
                    self.wfile.flush()
                    time.sleep(drip_s)
                self.wfile.write(content[4 if drip_s else 0 :])

        def _reset(self) -> None:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RD)
            self.connection.close()

        def finish(self) -> None:
            with suppress(OSError, ValueError):
                super().finish()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


def _page(
    bucket: FaultyBucket, path: str, asked: dict[str, str]
) -> tuple[int, dict[str, str], bytes]:
    """A page of a listing: names after the token, as they are now."""
    after = asked.get("pageToken", "")
    if after:
        bucket.between_pages()
    status, _, content = bucket.upstream("GET", path)
    if status != 200:
        return status, {}, content
    items = [each for each in json.loads(content).get("items", []) if each["name"] > after]
    page = items[: bucket.page_size]
    answer: dict[str, Any] = {"items": page}
    if len(items) > len(page):
        answer["nextPageToken"] = page[-1]["name"]
    return 200, {}, json.dumps(answer).encode()


def _holds(bucket: FaultyBucket, path: str, asked: dict[str, str]) -> bool:
    """Whether the object is of the generation that the request asks for."""
    wanted = asked.get("ifGenerationMatch", asked.get("generation"))
    if wanted is None:
        return True
    name = asked.get("name")
    if name is not None:  # an upload: .../b/BUCKET/o?name=NAME
        path = f"{path}/{urllib.parse.quote(name, safe='')}"
    for prefix in ("/upload", "/download"):
        path = path.removeprefix(prefix)
    status, _, content = bucket.upstream("GET", path)
    there = str(json.loads(content)["generation"]) if status == 200 else "0"
    return there == wanted
