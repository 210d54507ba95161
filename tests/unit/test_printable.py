"""What others wrote reaches a terminal or a log without secrets and without commands."""

from __future__ import annotations

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from transcribe.printable import printable, redacted, without_secrets


@given(st.text())
def test_no_control_character_is_left(text: str) -> None:
    shown = printable(text)
    assert not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in shown)
    assert printable(shown) == shown
    shown.encode()


def test_a_name_is_shown_as_what_it_is() -> None:
    assert printable("\x1b[2Jcall\r\n\x07.wav") == r"\x1b[2Jcall\r\n\x07.wav"
    assert printable("invoice\u202egpj.wav") == r"invoice\u202egpj.wav"
    assert printable("\udcff.wav") == r"\udcff.wav"
    for name in ("Gespräch 1.wav", "通話\u3000三.wav", "می\u200cخواهم", "a\u00a0b"):
        assert printable(name) == name


def test_secrets_of_addresses_are_left_out() -> None:
    assert redacted("cannot read https://u:p@ss@h.org/a.wav?sig=S&x=1: HTTP status 500; x") == (
        "cannot read https://h.org/a.wav: HTTP status 500; x"
    )
    assert redacted("(https://h/a?sig=S), gs://u:p@b/q?x=1") == "(https://h/a), gs://b/q?x=1"
    assert redacted("https://h/a b.wav?x=1&sig=S c") == "https://h/a b.wav?x=1&sig=... c"
    assert redacted("s3://KEY:SECRET@bucket/a@b.wav") == "s3://bucket/a@b.wav"
    for name in ("/calls/a@b.wav", "gs://calls/what?.wav", "/x/https:/a?b", "me@example.org"):
        assert redacted(name) == name


def test_a_signature_is_no_part_of_a_name_but_a_query_is() -> None:
    signed = "https://u:p@h/get?id=7&X-Amz-Signature=S&X-Goog-Credential=C&Expires=9&sig=T"
    assert without_secrets(signed) == "https://h/get?id=7"
    assert without_secrets("https://h/a.wav?Signature=S") == "https://h/a.wav"
    for uri in ("gs://b/q?sig=1.wav", "/calls/q?sig=1", "https://h/get?key=a/b&token=c"):
        assert without_secrets(uri) == uri
