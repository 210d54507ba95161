"""News by webhook and command, against a real server on loopback and real programs."""

from __future__ import annotations

import hashlib
import hmac
import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from transcribe import notify
from transcribe.errors import Fatal
from transcribe.notify import Notifier, Outbox, notifier

SECRET = "s3cr3t-of-the-test"


class Received(ThreadingHTTPServer):
    """Remembers what is posted; answers with the statuses it is told, then 200."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.statuses: list[int] = []
        self.body_s = 0.0  # how long the body of an answer takes, if nothing ends it
        self.ended = threading.Event()
        self.posts: list[tuple[str, dict[str, str], bytes]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hooks/T000/very-private"


class _Handler(BaseHTTPRequestHandler):
    server: Received

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.posts.append((self.path, dict(self.headers), body))
        self.send_response(self.server.statuses.pop(0) if self.server.statuses else 200)
        self.send_header("Location", "http://127.0.0.1:9/elsewhere")
        if self.server.body_s:
            self.send_header("Content-Length", "1000")
        self.end_headers()
        self.server.ended.wait(self.server.body_s)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Received]:
    monkeypatch.setattr(notify, "_FIRST_WAIT_S", 0.01)
    with Received() as received:
        threading.Thread(target=received.serve_forever, daemon=True).start()
        yield received
        received.shutdown()


def told(caplog: pytest.LogCaptureFixture) -> str:
    """What this package has logged."""
    ours = [r.getMessage() for r in caplog.records if r.name.startswith("transcribe")]
    return "\n".join(ours)


def test_a_message_is_json_that_slack_shows_and_is_signed(server: Received) -> None:
    Notifier(server.url, secret=SECRET).send("finished", "It is finished.", {"usd": 1.5})
    ((path, headers, body),) = server.posts
    assert path == "/hooks/T000/very-private"
    assert json.loads(body) == {"event": "finished", "text": "It is finished.", "usd": 1.5}
    assert headers["Content-Type"] == "application/json"
    signed = headers["X-Transcribe-Timestamp"].encode() + b"." + body
    expected = hmac.new(SECRET.encode(), signed, hashlib.sha256).hexdigest()
    assert headers["X-Transcribe-Signature"] == f"sha256={expected}"


def test_without_a_secret_nothing_is_signed(server: Received) -> None:
    Notifier(server.url).send("finished", "x", {})
    assert "X-Transcribe-Signature" not in server.posts[0][1]


def test_a_server_in_trouble_is_asked_again(server: Received, caplog) -> None:
    server.statuses = [503, 429]
    Notifier(server.url).send("finished", "x", {})
    assert len(server.posts) == 3
    assert told(caplog) == ""


@pytest.mark.parametrize(("statuses", "posts"), [([404], 1), ([302], 1), ([500] * 9, 4)])
def test_a_refusal_is_a_warning_without_the_url(
    server: Received, caplog, statuses: list[int], posts: int
) -> None:
    server.statuses = statuses
    status = statuses[0]
    Notifier(server.url, secret=SECRET).send("finished", "x", {})
    assert len(server.posts) == posts
    assert told(caplog) == f"--notify: 127.0.0.1 did not take the message (HTTP {status})"


def test_nobody_there_is_a_warning_without_the_url(monkeypatch, caplog) -> None:
    monkeypatch.setattr(notify, "_FIRST_WAIT_S", 0.0)
    Notifier("http://127.0.0.1:9/private").send("finished", "x", {})
    assert told(caplog) == "--notify: 127.0.0.1 did not take the message (ConnectionError)"


def test_a_command_gets_the_message_without_a_shell_and_without_the_secret(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv(notify.SECRET_VARIABLE, SECRET)
    script = tmp_path / "told.py"
    script.write_text(
        "import os, pathlib, sys\n"
        "pathlib.Path(sys.argv[1]).write_text(sys.stdin.read() + sys.argv[2] + str(os.environ))\n"
    )
    target = tmp_path / "told"
    page = notifier(None, f"{sys.executable} {script} {target} '$HOME; rm -rf *'")
    page.send("stopped", "It stopped.", {})
    said = target.read_text()
    assert said.startswith('{"event": "stopped", "text": "It stopped."}$HOME; rm -rf *')
    assert SECRET not in said


def test_whoever_takes_no_end_holds_up_neither_the_run_nor_the_next_message(
    server: Received, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(notify, "_MESSAGE_S", 0.5)
    never = threading.Event()
    send = Notifier.send

    def first_hangs(self: Notifier, event: str, text: str, facts: Any) -> None:
        if event == "budget":
            never.wait(60)
        send(self, event, text, facts)

    monkeypatch.setattr(Notifier, "send", first_hangs)
    with Outbox(Notifier(server.url)) as outbox:
        outbox.put("budget", "half", {})
        outbox.put("finished", "all", {})
        assert not server.posts  # nothing was waited for
    assert [json.loads(body)["event"] for _, _, body in server.posts] == ["finished"]
    assert told(caplog) == "--notify: a message was not taken within 0 s"
    never.set()


def test_an_answer_without_an_end_is_an_answer(server: Received, monkeypatch) -> None:
    server.body_s = 60.0
    begun = time.monotonic()
    Notifier(server.url).send("finished", "x", {})
    assert len(server.posts) == 1 and time.monotonic() - begun < 30
    server.ended.set()


def test_a_command_that_fails_is_a_warning(caplog) -> None:
    Notifier(command=("false",)).send("failed", "x", {})
    assert "--notify-command: false ended with 1" in caplog.text
    Notifier(command=("/no/such/program",)).send("failed", "x", {})
    assert "/no/such/program (FileNotFoundError)" in caplog.text


@pytest.mark.parametrize(
    ("url", "command", "named"),
    [
        ("ftp://host/x", None, "--notify must"),
        ("https://", None, "--notify must"),
        ("nonsense", None, "--notify must"),
        (None, "", "--notify-command is empty"),
        (None, "/no/such/program x", "there is no program '/no/such/program' here"),
        (None, "page 'me", "--notify-command has an open quotation"),
    ],
)
def test_what_cannot_be_is_refused(url: str | None, command: str | None, named: str) -> None:
    with pytest.raises(Fatal, match=named):
        notifier(url, command)


def test_a_notifier_does_not_show_its_secret() -> None:
    assert "s3cr3t" not in repr(Notifier("https://hooks/s3cr3t", secret=SECRET))
