"""Fields of a sweep: how the command line splits them, which are refused and why, and the cells that they make."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from engine.commands.jobfile import read_job
from engine.commands.sweeps import parse_fields, split_values
from engine.errors import JobError
from engine.job.parsing import parse_job
from engine.studies.experiments.parsing import validated
from engine.studies.sweep.cells import MAX_CELLS, SEED_GROUP, cross
from engine.studies.sweep.fields import field_problems, known_fields, value_text
from engine.studies.sweep.program import check_sweep
from engine.studies.sweep.spec import SweepSpec
from tests.conftest import REPOSITORY

MODELS = {"diffusion": "zoo:digits/stable-diffusion", "clip": "zoo:digits/clip", "target": "zoo:digits/classifier"}
PAIR = {"boundary": ["three", "eight"], "count": 5}


def job_of(*requests: dict, **changes):
    raw = {"name": "job", "models": MODELS, "requests": list(requests), "output": {"uri": "runs/job"}}
    return parse_job(raw | changes)


PLAIN = {"name": "plain", "method": "prompt", **PAIR}
GUIDED = {"name": "guided", "method": "boundary", **PAIR}
RISKY = {"name": "risky", "method": "risky", "classes": "all", "count": 5}


def spec_of(fields: dict, **changes) -> SweepSpec:
    return validated(SweepSpec, {"study": "sweep", "job": {}, "fields": fields, **changes})


def crossed(job, fields: dict, *, requests=None, count: int = 24):
    spec = spec_of(fields)
    assert not list(field_problems(spec.values))
    return cross(job, spec.values, spec.texts, requests, count, 10)


def refusal(job, fields: dict, **changes) -> str:
    with pytest.raises(JobError) as error:
        check_sweep(spec_of(fields, **changes), job)
    return "\n".join(error.value.problems)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("3,10,30", [3, 10, 30]),
        ("0.5, 1", [0.5, 1]),
        ("paper,polyak", ["paper", "polyak"]),
        ("true,null,~", [True, None, None]),
        ("[three, eight],[three,five,eight]", [["three", "eight"], ["three", "five", "eight"]]),
        ("{step: paper, alpha: 0.1},{step: polyak}", [{"step": "paper", "alpha": 0.1}, {"step": "polyak"}]),
        ("a cat's photo of a {class},b", ["a cat's photo of a {class}", "b"]),
        ("'a, b',\"c, d\"", ["a, b", "c, d"]),
        ("'it''s, b',''", ["it's, b", ""]),
        ("a=b,c==", ["a=b", "c=="]),
        ("7", [7]),
    ],
)
def test_values_are_split_at_commas_outside_brackets_and_quotes(text, values):
    assert parse_fields([f"prompt={text}"]) == {"prompt": values}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a=1,,2"], "a: has an empty value"),
        (["a="], "a: has an empty value"),
        (["a"], "write it as FIELD=VALUE,VALUE"),
        (["=1"], "write it as FIELD=VALUE,VALUE"),
        (["a=1", "a=2"], "a: is given twice"),
        (["a=[1,2"], "a: '[1,2' is not a YAML value"),
        (["a=" + "[" * 1200], "nested too deeply"),
        (["a=&x [*x]"], "an alias is inside the value"),
        (["a=!!python/object:os.system x"], "is not a YAML value"),
        (["diffusion=https://me:secret@host/model"], "contains a user name or password"),
    ],
)
def test_what_is_no_field_with_values_is_refused(texts, message):
    with pytest.raises(JobError) as error:
        parse_fields(texts)
    assert message in str(error.value) and "secret" not in str(error.value)


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused(text):
    """Nothing that a shell can pass ends in a traceback; the pieces are the whole text."""
    assert ",".join(split_values(text)) == text
    try:
        fields = parse_fields([f"prompt={text}"])
        check = list(field_problems(spec_of(fields).values))
    except JobError as error:
        check = error.problems
    assert all(isinstance(line, str) and len(line) < 2000 for line in check)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"guidance.risky.scael": [1]}, "is no field of a request; did you mean 'guidance.risky.scale'?"),
        ({"scale": [1]}, "did you mean guidance.risky.scale?"),
        ({"guidance_scael": [1]}, "did you mean sampling.guidance_scale?"),
        ({"models.target": ["a", "b"]}, "targets are compared by `riskforge study transfer`"),
        ({"models.diffusion": ["a"]}, "sweep `diffusion`"),
        ({"models.clip": ["a"]}, "make a sweep with each"),
        ({"seed": [1, 2]}, "--set seed=N"),
        ({"output.uri": ["x"]}, "--output FOLDER"),
        ({"runtime.device": ["cpu"]}, "does not change samples"),
        ({"count": [1]}, "--count N"),
        ({"max_attempts": [1]}, "--count N"),
        ({"seed_group": ["a"]}, "same noise"),
        ({"requests.0.prompt": ["a"]}, "give prompt and choose requests by --request NAME"),
        ({"sampling.guidance_scale": []}, "has no value"),
        ({"sampling.guidance_scale": [3, 3.0]}, "has the value 3.0 twice"),
        ({"twin": [True, True]}, "has the value True twice"),
        ({"accept..risk": [1]}, "has an empty part"),
        ({"guidance.boundary": [{}], "guidance.boundary.alpha": [1]}, "is part of guidance.boundary"),
        ({"a\x1b[31m" * 40: [1]}, "is no field of a request"),
    ],
)
def test_fields_that_cannot_differ_are_refused_with_what_to_do(fields, message):
    [problem] = field_problems(fields)
    assert message in problem and "\x1b" not in problem and len(problem) < 400


def test_one_and_true_are_different_values_and_all_known_fields_are_accepted():
    assert not list(field_problems({"accept.risk": [1, True, "1", None, [1], {"a": 1}]}))
    assert all(not list(field_problems({field: [1]})) for field in known_fields())
    assert [value_text(value) for value in (0.1, 1e-7, None, True, ["a", 1], {"step": "paper", "alpha": 0.1})] == [
        "0.1", "1e-07", "none", "true", "a, 1", "step paper, alpha 0.1",
    ]  # fmt: skip


def test_cells_are_all_combinations_on_the_same_noise_named_by_their_values():
    made = crossed(
        job_of(PLAIN, GUIDED), {"sampling.guidance_scale": [3, 6.5], "guidance.boundary.alpha": [0.05, 1]}, count=7
    )
    assert [cell.name for cell in made.cells] == [
        "plain-guidance-scale-3", "plain-guidance-scale-6-5",
        "guided-guidance-scale-3-alpha-0-05", "guided-guidance-scale-3-alpha-1",
        "guided-guidance-scale-6-5-alpha-0-05", "guided-guidance-scale-6-5-alpha-1",
    ]  # fmt: skip
    assert {request.seed_group for request in made.job.requests} == {SEED_GROUP}
    assert {request.count for request in made.job.requests} == {7}
    last = made.job.requests[-1]
    assert (made.job.sampling_of(last).guidance_scale, made.job.parameters_of(last).alpha) == (6.5, 1)
    assert made.label(made.cells[2]) == "guided, guidance_scale=3, alpha=0.05"


def test_a_cell_has_equally_many_samples_of_each_class_and_context():
    """Its count is that of the cell, whatever its classes: rounded up, so that none is left out."""
    job = job_of(RISKY | {"contexts": ["", "small"]}, RISKY | {"name": "two", "classes": ["one", "two"]})
    made = crossed(job, {"guidance.risky.target_risk": [1, 2]}, count=24)
    assert [request.count for request in made.job.requests] == [2, 2, 12, 12]
    assert list(made.samples_of(["x"] * 10).values()) == [40, 40, 24, 24]


def test_rules_of_acceptance_do_not_change_the_number_of_attempts():
    made = crossed(job_of(RISKY | {"accept": {"is_error": True}}), {"guidance.risky.target_risk": [1, 2]})
    assert {request.attempts_limit for request in made.job.requests} == {3} and made.job.output.store_rejected


def test_requests_make_cells_of_the_fields_that_they_use():
    """Unguided ones of the same classes stay for reference; others are left out and named."""
    other = {"name": "all", "method": "prompt", "classes": "all", "count": 1}
    job = job_of(PLAIN, GUIDED, other, RISKY)
    made = crossed(job, {"guidance.boundary.alpha": [0.5, 1]})
    assert [cell.name for cell in made.cells] == ["plain", "guided-alpha-0-5", "guided-alpha-1"]
    assert made.left_out == ("all", "risky")
    only = crossed(job, {"guidance.boundary.alpha": [0.5]}, requests=["guided"])
    assert [cell.name for cell in only.cells] == ["alpha-0-5"]
    # The method of a cell decides which of the other fields it has.
    methods = crossed(job_of(GUIDED), {"method": ["prompt", "boundary"], "guidance.boundary.alpha": [0.5, 1]})
    assert [cell.name for cell in methods.cells] == ["prompt", "boundary-alpha-0-5", "boundary-alpha-1"]


def test_fields_of_a_step_rule_make_cells_of_that_rule_alone():
    job = job_of(RISKY)
    steps = {"guidance.risky.step": ["paper", "polyak"]}
    made = crossed(job, steps | {"guidance.risky.scale": [3, 10], "guidance.risky.target_risk": [1, 2]})
    assert [cell.name for cell in made.cells] == [
        "paper-scale-3", "paper-scale-10", "polyak-target-risk-1", "polyak-target-risk-2",
    ]  # fmt: skip
    assert "is read by step paper alone" in refusal(job, {"guidance.risky.scale": [3, 10]})


def test_named_values_and_long_ones_have_names():
    fields = {"guidance.boundary": {"paper 0.1": {"step": "paper", "alpha": 0.1}, "ours": {}}}
    made = crossed(job_of(GUIDED), fields)
    assert [(cell.name, cell.texts["guidance.boundary"]) for cell in made.cells] == [
        ("paper-0-1", "paper 0.1"), ("ours", "ours"),
    ]  # fmt: skip
    assert made.job.parameters_of(made.job.requests[0]).step == "paper"
    long = crossed(job_of(RISKY), {"prompt": [f"{'very ' * 60}{{class}}", "猫 {class}", "{class}"]})
    assert [cell.name for cell in long.cells] == ["prompt-1", "prompt-2", "prompt-3"]
    deep = {f"sampling.{name}": [1, 2] for name in ("guidance_scale", "num_inference_steps")}
    many = crossed(job_of(RISKY | {"name": "r" * 60}, RISKY), deep | {"guidance.risky.target_risk": [1, 2]})
    names = [cell.name for cell in many.cells]
    assert len(set(names)) == len(names) == 16 and max(map(len, names)) <= 64


def test_cells_are_checked_before_anything_starts_and_errors_name_them():
    job = job_of(PLAIN, GUIDED, RISKY)
    text = refusal(job, {"guidance.risky.target_risk": [1, -1], "sampling.guidance_scale": [3, 6]})
    assert text.startswith("cell target_risk=-1, guidance_scale=3 (and 1 more cell): guidance.risky.target_risk: -1")
    assert "cell boundary=three, ten: boundary.1: 'ten' is not a class" in refusal(
        job_of(PLAIN), {"boundary": [["three", "ten"]]}
    )
    assert "no request has it: plain (prompt)" in refusal(job_of(PLAIN), {"guidance.risky.target_risk": [1]})
    assert "no request has `start`" in refusal(job, {"start.strength": [0.5]})
    assert "sweep `boundary`" in refusal(job_of(PLAIN), {"classes": ["all"]})
    assert "did you mean 'guided'?" in refusal(job, {"sampling.guidance_scale": [3]}, requests=["guide"])
    assert "did you mean 'guided'?" in refusal(job, {"sampling.guidance_scale": [3]}, baseline="guide")
    assert "--real: there is no 'nowhere'" in refusal(job, {"sampling.guidance_scale": [3]}, real="nowhere")


def test_too_many_cells_are_refused_with_their_number():
    numbers = list(range(1, 22))
    fields = {"sampling.guidance_scale": numbers, "guidance.risky.target_risk": numbers}
    assert f"441 cells are more than {MAX_CELLS}" in refusal(job_of(RISKY), fields)
    huge = {f"guidance.risky.{name}": list(range(1, 300)) for name in ("target_risk", "tolerance", "cap", "every")}
    assert "cells are more than" in refusal(job_of(RISKY), huge)


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("jobs/*.yaml")), ids=lambda path: path.stem)
def test_every_job_can_be_swept(path: Path):
    """By the field that every job has; loops are studies of their own."""
    if "study" not in yaml.safe_load(path.read_text()):
        job = read_job(path, [])
        made = crossed(job, {"sampling.guidance_scale": [3, 6]})
        assert len(made.cells) == 2 * len(job.requests) and not made.left_out
