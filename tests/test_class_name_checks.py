"""Class names: each can be used in a prompt, or is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import JobError
from engine.models.class_name_checks import check_names
from engine.models.program_settings import parse_settings
from tests.program_cases import SETTINGS


@given(
    st.lists(
        st.sampled_from(
            [
                "cat",
                "two words",
                "",
                " ",
                "c\x1b[1mat",
                "a\0b",
                "a\nb",
                "a\u2028b",
                "LABEL_3",
                "label 7",
                "n01440764",
                "3",
                5,
                None,
            ]
        ),
        min_size=2,
    )
)
def test_names_are_refused_or_can_stand_in_a_prompt(names: list[Any]) -> None:
    """No mixture of good names hides a bad one."""
    good = {"cat", "two words", "3"}
    try:
        assert check_names(names, "here") == names and set(names) <= good and len(set(names)) > 1
    except JobError as error:
        assert str(error).startswith("here: ") and (not set(names) <= good or len(set(names)) == 1)


@pytest.mark.parametrize("names", [["a", ""], ["LABEL_0", "LABEL_1"], ["a", " b"], ["a", "a"], ["a", "b\tc"]])
def test_settings_of_files_and_factories_name_their_classes_too(names: list[str]) -> None:
    """The same rule for labels that a side file gives."""
    with pytest.raises(JobError, match="labels: "):
        parse_settings(SETTINGS | {"labels": names}, "here")
