"""Text for terminals: without passwords, and printable."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine.terminal import redacted

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
