"""Who is at work in OUT: one run of an archive at a time, told apart from one that died.

    OUT/runs/alive-<archive>.json    there while a run of that archive is at work

A run makes this object only if it is not there (a condition that the store checks), rewrites it
every few seconds, and removes it at its end. Whoever finds one of a run that lives is refused; one
that is rewritten no more was left by a run that ended without goodbye, which is the normal case on
machines that vanish, and is taken over. No clock of another machine is believed: a sign of life is
that the object changes while it is being watched, and on the same machine the process itself.

That nothing is lost or doubled does not rest on this: `publish.settle` keeps OUT right also
between runs that know nothing of each other. It spares the work done twice.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import logging
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from transcribe import processes, storage
from transcribe.errors import BadAudio, Fatal, TranscribeError
from transcribe.printable import redacted

_LOG = logging.getLogger(__name__)

BEAT_S = 10.0
DEAD_AFTER_S = 35.0
"""Three signs of life missed. A store that is away for longer is away for the watcher, too."""

_LOOK_EVERY_S = 1.0
_LEAVE_S = 5.0


@dataclass(frozen=True, slots=True)
class Holder:
    """The run that holds a claim, as it describes itself."""

    token: str
    archive: str
    user: str
    host: str
    machine: str
    pid: int
    process_started: str
    since: str

    @property
    def sentence(self) -> str:
        """Who, and since when."""
        who = f"process {self.pid} of {self.user} on {self.host}"
        return f"another run of {self.archive} ({who}, since {self.since})"

    def is_gone(self) -> bool:
        """Whether it ran on this machine and its process is no more; False if nobody can tell."""
        here = self.machine == _machine() != ""
        return here and processes.started(self.pid) != self.process_started


class Claim:
    """This run's word that it works on `archive` in `out`; a context manager that takes it back.

    Args:
        out: where transcripts go.
        archive: as the user named it, in its one spelling.
        say: told what is being waited for.
    """

    def __init__(self, out: str, archive: str, say: Callable[[str], None]) -> None:
        self._out, self._say = out, say
        self._url = _url(out, redacted(archive))
        self._me = Holder(
            token=secrets.token_hex(8),
            archive=redacted(archive),
            user=_user(),
            host=platform.node(),
            machine=_machine(),
            pid=os.getpid(),
            process_started=processes.started(os.getpid()),
            since=f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
        )
        self._version: str | None = None
        self._is_over = threading.Event()
        self._beating = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Claim:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._version is None:
            return
        self._is_over.set()
        self._beating.join(_LEAVE_S)
        if self._beating.is_alive():  # waits for a store that does not answer
            return
        try:
            storage.delete_if(self._url, self._version)
        except TranscribeError as problem:  # the next run will find it dead
            _LOG.warning("%s stays behind: %s", self._url, problem)

    def take(self) -> None:
        """Claim the archive, or wait until it is known whether who has claimed it lives.

        Raises:
            Fatal: a run that lives works on this archive in OUT.
            Transient: the store does not answer.
        """
        while self._version is None:
            self._version = storage.put_if(self._url, self._content(), None)
            if self._version is None:
                self._version = self._take_over()
        self._beating.start()
        self._mention_others()

    def _take_over(self) -> str | None:
        found = storage.info(self._url)
        if found is None:
            return None
        holder = _holder(self._url)
        if holder is not None and not holder.is_gone():
            self._say(
                f"OUT is claimed by {holder.sentence};"
                f" watching up to {DEAD_AFTER_S:.0f} s for a sign of life ..."
            )
            end = self._watch(holder, found.version)
            self._say(f"{end}; going on from what it has published.")
        return storage.put_if(self._url, self._content(), found.version)

    def _watch(self, holder: Holder, version: str) -> str:
        """Wait for it to end, or refuse; tells how it ended."""
        until = time.monotonic() + DEAD_AFTER_S
        while time.monotonic() < until:
            time.sleep(_LOOK_EVERY_S)
            now = storage.info(self._url)
            if now is None or holder.is_gone():
                return "It has ended"
            if now.version != version:
                raise Fatal(
                    f"{holder.sentence[0].upper()}{holder.sentence[1:]} is at work in"
                    f" {redacted(self._out)}: wait until it ends, or end it, and run the same"
                    " command again."
                )
        return "There was none"

    def _beat(self) -> None:
        """In a thread: rewrite the object until the run is over or has lost it."""
        while self._version is not None and not self._is_over.wait(BEAT_S):
            try:
                version = storage.put_if(self._url, self._content(), self._version)
            except TranscribeError as problem:  # the run itself finds out when it writes
                _LOG.warning("no sign of life could be given: %s", problem)
                continue
            if version is None:
                _LOG.warning(
                    "another run took this one for dead and works on the same archive in OUT;"
                    " nothing gets lost or doubled, but work is done twice: end one of the two"
                )
                return
            self._version = version

    def _content(self) -> bytes:
        seen = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S.%f} UTC"
        return json.dumps({**asdict(self._me), "seen": seen}, indent=2).encode()

    def _mention_others(self) -> None:
        """Runs of other archives may share an OUT; who does not mean to should know."""
        for url in _claims(self._out):
            holder = _holder(url) if url != self._url else None
            if holder is not None and not holder.is_gone():
                self._say(f"OUT is also claimed by {holder.sentence}.")


def has_died(out: str, archive: str) -> bool:
    """Whether a run of `archive` (as it tells it, without secrets) ended without goodbye.

    Only known on the machine it ran on.
    """
    holder = _holder(_url(out, archive))
    return holder is not None and holder.is_gone()


def _url(out: str, archive: str) -> str:
    name = hashlib.sha256(archive.encode()).hexdigest()[:16]
    return storage.join(out, "runs", f"alive-{name}.json")


def _claims(out: str) -> list[str]:
    try:
        return [o.uri for o in storage.list_objects(storage.join(out, "runs", "alive-*.json"))]
    except Fatal:  # a glob sign in OUT's own name, or the last one has just gone
        return []


def _holder(url: str) -> Holder | None:
    """Who is behind a claim; None if it has just ended, or says nothing that can be read."""
    try:
        said = json.loads(storage.read(url))
        said.pop("seen", None)
        return Holder(**said)
    except (BadAudio, ValueError, TypeError, AttributeError):
        return None


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a number without a name, as in containers
        return str(os.getuid())


def _machine() -> str:
    """This boot of this machine and its space of process numbers; empty where neither is told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""
