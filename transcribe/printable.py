"""Foreign text -> text that may be shown: no secrets of URLs, nothing that a terminal obeys.

Names of recordings, manifests and messages of stores are written by others. They are data in the
output, and pass through here before they reach a terminal or a log. Pure.
"""

from __future__ import annotations

import re
import unicodedata

_USER_INFO = re.compile(r"(\b[A-Za-z][A-Za-z0-9+.-]*://)[^/\s]*@")
_WEB_QUERY = re.compile(r"(\bhttps?://[^\s?]*)\?[^\s]*?(?=[;,:.)\"']*(?:\s|$))", re.IGNORECASE)

_SIGNATURE = re.compile(
    r"([?&](?:x-(?:amz|goog|ms)-[\w-]+|[\w-]*(?:sig|signature|token|key|secret|password))=)[^&\s]*",
    re.IGNORECASE,
)

_DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Text after one of these is shown in another order than it is in."""

_SIGNING = ("x-amz-", "x-goog-", "x-ms-")
_SECRETS = frozenset(
    {"sig", "signature", "expires", "awsaccesskeyid", "googleaccessid"}
    | {"access_token", "api_key", "apikey", "password"}
)
"""Only what never tells one object from another: "key" or "token" alone might."""


def redacted(text: str) -> str:
    """`text` without the user:password@ of URLs and the query of web addresses in it."""
    if "://" not in text:
        return text
    text = _WEB_QUERY.sub(r"\1", _USER_INFO.sub(r"\1", text))
    return _SIGNATURE.sub(r"\1...", text)  # of an address with a space in it


def printable(text: str) -> str:
    r"""`text` as one line that says what it is: redacted, control characters written as `\x1b`."""
    text = redacted(text)
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escaped(c) if _is_obeyed(c) else c for c in text)


def _is_obeyed(character: str) -> bool:
    is_control = unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
    return is_control or character in _DIRECTIONS


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def without_secrets(uri: str) -> str:
    """The name of an object without what only lets one in: the same next week, signed anew.

    Drops user:password@, and from the query of a web address what signs it; other parts of a query
    may be what tells objects apart.
    """
    if "://" not in uri:
        return uri
    uri = _USER_INFO.sub(r"\1", uri)
    address, mark, query = uri.partition("?")
    if not mark or uri[:4].lower() != "http":
        return uri
    kept = [part for part in query.split("&") if not _is_signing(part.partition("=")[0].lower())]
    return f"{address}?{'&'.join(kept)}" if kept else address


def _is_signing(name: str) -> bool:
    return name in _SECRETS or name.startswith(_SIGNING)
