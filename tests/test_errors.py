"""Errors: one line for a message, room for the remedy, no password, and the same after a process boundary."""

from __future__ import annotations

import pickle

import pytest

from engine.errors import (
    EXIT_DRAINED,
    EXIT_OWNED,
    EXIT_USER,
    MAX_PROBLEM_CHARS,
    ClusterLostError,
    EverySampleFailedError,
    JobError,
    OutputError,
    OwnedError,
    StoreLostError,
    fault,
    first_line,
)


@pytest.mark.parametrize(
    ("error", "default", "line"),
    [
        (ValueError("a\nb"), None, "a"),
        (ValueError("\n  a  \n b"), None, "a  "),
        (ValueError(" \n"), None, "ValueError"),
        (ValueError(), None, "ValueError"),
        (ValueError(), "no reason given", "no reason given"),
        (ValueError(), "", ""),
        (KeyError("a"), "", "'a'"),
        ("a\nb", "", "a"),
        ("", "OSError", "OSError"),
    ],
)
def test_the_first_line_of_an_error(error: object, default: str | None, line: str) -> None:
    """An empty message must not end in an IndexError, nor leave a message without a reason."""
    assert first_line(error, default) == line


def test_a_long_problem_keeps_its_field_and_its_remedy() -> None:
    """Up to the limit nothing is cut."""
    fits = "f" * MAX_PROBLEM_CHARS
    assert JobError(fits).problems == [fits]
    [short] = JobError(f"models.target: {'x' * MAX_PROBLEM_CHARS}; use another").problems
    assert short.startswith("models.target: x") and short.endswith("x; use another")
    assert len(short) == MAX_PROBLEM_CHARS + len(" ... ")


def test_several_problems_are_lines_without_passwords() -> None:
    """The password of an address is neither in the text nor in the problems."""
    error = JobError(["a: https://u:secret@h", "b"])
    assert error.problems == ["a: https://***@h", "b"] and str(error) == "a: https://***@h\nb"
    assert str(OutputError("no s3://u:secret@h", 3)) == "('no s3://***@h', 3)"


@pytest.mark.parametrize("kind", [JobError, EverySampleFailedError])
def test_a_job_error_is_the_same_in_another_process(kind: type[JobError]) -> None:
    """Workers send their errors pickled."""
    error = pickle.loads(pickle.dumps(kind(["a", "b"])))
    assert type(error) is kind and error.problems == ["a", "b"]


def test_exit_codes() -> None:
    """A run that can be resumed ends with another code than a wrong job."""
    assert JobError("a").exit_code == OutputError("a").exit_code == EXIT_USER
    assert StoreLostError("a").exit_code == ClusterLostError("a").exit_code == EXIT_DRAINED
    assert OwnedError("a").exit_code == EXIT_OWNED and fault("a", 7).exit_code == 7
