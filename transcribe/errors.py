"""The three ways a run can go wrong, named by their consequence.

    TranscribeError
    |- BadAudio    one recording cannot be transcribed: it becomes a `failed` row
    |- Transient   worth trying again: storage or network hiccup
    `- Fatal       the run cannot go on: one sentence to the user, exit code 2

Foreign exceptions are translated into these where they arise (`storage.py`,
`decode.py`, `models.py`, `distributed.py`); above those modules nothing else is caught.
"""

from __future__ import annotations


class TranscribeError(Exception):
    """Base of every error this package raises on purpose."""


class BadAudio(TranscribeError):
    """One recording cannot be used; it ends as a `failed` row and the run goes on.

    Args:
        kind: short machine-readable reason, the row's `error_kind`
            (for example `not_audio`, `empty_file`, `unsupported_codec`).
        message: one sentence for a person, the row's `error_message`.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(kind, message)
        self.kind = kind
        self.message = message

    def __str__(self) -> str:
        return self.message


class Transient(TranscribeError):
    """A failure that may pass: the caller tries again with backoff."""


class Fatal(TranscribeError):
    """The run cannot go on; the message is the whole answer the user gets."""
