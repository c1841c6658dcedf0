"""Acceptance rules: what each condition lets through, and what is refused before a model is loaded."""

import pytest

from engine.job.acceptance import is_accepted, rule_problems

RECORD = {
    "is_error": True,
    "screened": False,
    "oracle_class": 3,
    "risk": 1.5,
    "conformity": 0.3,
    "judge": [{"model": "second", "conformity": 0.25, "conformity_margin": -0.1}],
    "status": "ok",
    "accepted": True,
}


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({}, True),
        ({"is_error": True}, True),
        ({"is_error": False}, False),
        ({"screened": True}, False),
        ({"oracle": "agrees"}, True),
        ({"oracle": "disagrees"}, False),
        ({"conformity": ">= 0.3"}, True),
        ({"conformity": "> 0.3"}, False),
        ({"judge_conformity": ">= 0.2"}, True),
        ({"judge_conformity": ">= 0.3"}, False),
        ({"conformity": ">= 0.3", "judge_conformity_margin": "> 0"}, False),
        ({"risk": [">= 1.2", "<= 1.8"]}, True),
        ({"risk": [">= 1.2", "< 1.5"]}, False),
        ({"is_error": True, "oracle": "agrees", "conformity": "<0.2"}, False),
    ],
)
def test_all_conditions_must_hold(rule, expected):
    """Bounds are inclusive or not as written; several bounds of one score hold together."""
    assert rule_problems(rule) == []
    assert is_accepted(rule, RECORD, (3,)) is expected


def test_the_oracle_agrees_with_any_class_of_a_joint_prompt():
    """Between three and eight, an eight is as right as a three; without an oracle nothing agrees."""
    assert is_accepted({"oracle": "agrees"}, RECORD, (3, 8)) and is_accepted({"oracle": "agrees"}, RECORD, (1, 3))
    assert not is_accepted({"oracle": "agrees"}, RECORD, (1, 8))
    assert not is_accepted({"oracle": "agrees"}, RECORD | {"oracle_class": -1}, (3,))


@pytest.mark.parametrize(
    "rule",
    [
        {"is_error": "yes"},
        {"oracle": "maybe"},
        {"conformity": 0.2},
        {"conformity": "0.2"},
        {"judge_conformity": True},
        {"conformity": ">= nan"},
        {"conformity": []},
        {"conformity": [">= 0.1", None]},
        {"colour": "red"},
    ],
)
def test_wrong_rules_are_explained(rule):
    """A rule that cannot be read would accept or reject everything in silence."""
    assert [name for name, _ in rule_problems(rule)] == list(rule)
