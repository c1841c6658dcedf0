"""Text for terminals: without passwords, and printable."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine.terminal import json_text, printable, redacted

SECRET = "Sekret"

SCHEMES = ("https://", "http://", "s3://", "gs://", "ray://", "file://", "hdfs+x.y://", "https:/")

PASSWORDS = st.text("abcXYZ019+/=%@:!$&*()-_.~#?,;'", max_size=12).map(lambda text: f"{text}{SECRET}{text}")

USERS = st.text("abcXYZ019._-%", min_size=1, max_size=8)


@given(st.sampled_from(SCHEMES), USERS, PASSWORDS, st.sampled_from(["", "a text, then '", "x ("]))
@example("s3://", "AKIA", "wJalr/K7MDENG+bPx/" + SECRET, "")
def test_no_part_of_a_password_is_left(scheme, user, password, before):
    """With slashes and more at-signs, as keys of S3 have them; what is around an address stays."""
    text = redacted(f"{before}{scheme}{user}:{password}@host/path' is no folder; choose another")
    assert SECRET not in text and text.startswith(f"{before}{scheme}")
    assert text.endswith("***@host/path' is no folder; choose another")


@pytest.mark.parametrize(
    "text",
    ["zoo:digits/clip", "runs/2026@x", "https://host/model", "s3://bucket/a", "mail me@host", "a: /b and c@d",
     "package.module:factory", "C:/Users/x", "{'a': 1}"],
)  # fmt: skip
def test_what_holds_no_password_stays(text):
    """Paths, hub ids and addresses without one are shown as they are."""
    assert redacted(text) == text


def test_long_texts_are_looked_through_in_no_time():
    """A megabyte of one word, and of nothing but signs."""
    many = 10**5
    for text in ("a" * 10**6 + "@:/", ":/" * many + "@", "@" * 10**6, "@" + "://a:" * many, "a@b " + "://:" * many):
        started = time.process_time()
        redacted(text)
        assert time.process_time() - started < 2, text[:20]


@pytest.mark.parametrize(
    ("text", "keep", "shown"),
    [
        ("a\x1b[2Jb", "", r"a\x1b[2Jb"),
        ("a\nb\r", "\n", "a\nb\\r"),
        ("a\nb", "", r"a\nb"),
        ("\u202ea", "", r"\u202ea"),
        ("\ud800", "", r"\ud800"),
        ("Zürich 東京 🙂", "", "Zürich 東京 🙂"),
    ],
)
def test_nothing_steers_a_terminal(text: str, keep: str, shown: str) -> None:
    """Control and direction characters and broken Unicode become escapes; other letters stay."""
    assert printable(text, keep=keep) == shown


def test_json_for_a_terminal_is_read_back_unchanged() -> None:
    """Escapes of JSON, not of Python."""
    value = {"a\x1b": ["\u202e", "b\n", "é"]}
    text = json_text(value)
    assert json.loads(text) == value and text.replace("\n", "").isprintable() and "é" in text
