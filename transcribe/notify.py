"""News of a run to the outside: a webhook, a command, or both.

Owns what a message looks like, its signature and its delivery. A message that cannot be delivered
is a warning; it never ends a run, nor holds one up. Neither the URL (it often is a secret) nor the
signing secret is ever logged. Knows nothing of Ray or shards.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import queue
import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from transcribe.errors import Fatal

_LOG = logging.getLogger(__name__)

SECRET_VARIABLE = "TRANSCRIBE_NOTIFY_SECRET"
_TRIES = 4
_FIRST_WAIT_S = 0.5
_TIMEOUT_S = 5.0
_COMMAND_TIMEOUT_S = 30.0
_MESSAGE_S = 40.0  # for one message, whatever its receiver does
_LAST_MESSAGES_S = 45.0
_LAST_MESSAGES_INTERRUPTED_S = 5.0
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True, repr=False)
class Notifier:
    """Where news goes; without a URL and a command, nowhere.

    Attributes:
        url: http or https address that takes a POST of JSON; its `text` is what Slack and those
            compatible with it show.
        command: program and arguments, split like a shell would but run without one; it gets the
            same JSON on its standard input.
        secret: signs what is posted; None posts unsigned.
    """

    url: str | None = None
    command: tuple[str, ...] = ()
    secret: str | None = None

    def send(self, event: str, text: str, facts: Mapping[str, Any]) -> None:
        """Deliver one message, trying again where that may help; at most about half a minute.

        Args:
            event: `budget`, `finished`, `stopped`, `failed` or `interrupted`.
            text: the message in a sentence.
            facts: plain JSON values for programs.
        """
        body = json.dumps({"event": event, "text": text, **facts}, sort_keys=True).encode()
        if self.url is not None:
            self._post(self.url, body)
        if self.command:
            self._run(body)

    def _post(self, url: str, body: bytes) -> None:
        import requests  # takes a third of a second to import

        problem = ""
        for attempt in range(_TRIES):
            if attempt:
                time.sleep(_FIRST_WAIT_S * 2 ** (attempt - 1))
            try:
                # A redirect is not followed: it would carry the message somewhere else.
                answer = requests.post(
                    url,
                    data=body,
                    headers=signed_headers(body, self.secret, int(time.time())),
                    timeout=_TIMEOUT_S,
                    allow_redirects=False,
                    stream=True,  # the body of the answer says nothing, and may never end
                )
                answer.close()
            except requests.RequestException as error:
                problem = type(error).__name__  # its text holds the URL
                continue
            if answer.ok and not answer.is_redirect:
                return
            problem = f"HTTP {answer.status_code}"
            if answer.status_code not in _PASSING:
                break
        _LOG.warning("--notify: %s did not take the message (%s)", _host(url), problem)

    def _run(self, body: bytes) -> None:
        environment = {k: v for k, v in os.environ.items() if k != SECRET_VARIABLE}
        try:
            done = subprocess.run(
                self.command,
                input=body,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=_COMMAND_TIMEOUT_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            _LOG.warning("--notify-command: %s (%s)", self.command[0], type(error).__name__)
            return
        if done.returncode:
            _LOG.warning("--notify-command: %s ended with %d", self.command[0], done.returncode)


class Outbox:
    """Delivers messages in their order, beside the run; a context manager.

    At its end the last messages are waited for: 45 s, or 5 s if the body was interrupted.
    """

    def __init__(self, notifier: Notifier) -> None:
        self._notifier = notifier
        self._waiting: queue.SimpleQueue[tuple[str, str, Mapping[str, Any]] | None]
        self._waiting = queue.SimpleQueue()
        self._postman = threading.Thread(target=self._deliver, name="news", daemon=True)

    def __enter__(self) -> Outbox:
        self._postman.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._waiting.put(None)
        is_interrupted = isinstance(error, KeyboardInterrupt)
        self._postman.join(_LAST_MESSAGES_INTERRUPTED_S if is_interrupted else _LAST_MESSAGES_S)

    def put(self, event: str, text: str, facts: Mapping[str, Any]) -> None:
        """Have a message delivered; as `Notifier.send`, but nothing is waited for."""
        self._waiting.put((event, text, facts))

    def _deliver(self) -> None:
        while (message := self._waiting.get()) is not None:
            # By a thread of its own: an answer that drips has no time-out that requests knows.
            sending = threading.Thread(target=self._notifier.send, args=message, daemon=True)
            sending.start()
            sending.join(_MESSAGE_S)
            if sending.is_alive():
                _LOG.warning("--notify: a message was not taken within %.0f s", _MESSAGE_S)


def _host(url: str) -> str:
    return urlsplit(url).hostname or "the host"


def signed_headers(body: bytes, secret: str | None, at: int) -> dict[str, str]:
    """HTTP headers of a message.

    `X-Transcribe-Signature` is `sha256=` and the hex HMAC-SHA256, keyed with the secret, of the
    timestamp (`X-Transcribe-Timestamp`, seconds since 1970), a full stop, and the body. The
    receiver computes the same and refuses old timestamps.
    """
    headers = {"Content-Type": "application/json", "X-Transcribe-Timestamp": str(at)}
    if secret is not None:
        signed = str(at).encode() + b"." + body
        digest = hmac.new(secret.encode(), signed, hashlib.sha256).hexdigest()
        headers["X-Transcribe-Signature"] = f"sha256={digest}"
    return headers


def notifier(url: str | None, command: str | None) -> Notifier:
    """A notifier as the flags say, signing with the secret of the environment if there is one.

    Raises:
        Fatal: the URL or the command cannot be.
    """
    if url is not None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise Fatal("--notify must be an http:// or https:// URL.")
    try:
        words = tuple(shlex.split(command)) if command is not None else ()
    except ValueError:
        raise Fatal("--notify-command has an open quotation mark.") from None
    if command is not None and not words:
        raise Fatal("--notify-command is empty.")
    if words and shutil.which(words[0]) is None:  # found out now, not when there is news
        raise Fatal(f"--notify-command: there is no program {words[0]!r} here.")
    return Notifier(url, words, os.environ.get(SECRET_VARIABLE) or None)
