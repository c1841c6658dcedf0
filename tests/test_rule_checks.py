"""Rules of acceptance in a job file: what is refused, where, and with which remedy."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from engine.commands.jobfile import parse_override
from engine.errors import JobError
from engine.job.parsing import apply_overrides, parse_job
from engine.job.plan import build_plan
from tests.conftest import REPOSITORY
from tests.run_cases import DIGESTS, LABELS

MODELS = {"diffusion": "zoo:digits/stable-diffusion", "clip": "zoo:digits/clip", "target": "zoo:digits/classifier"}
ORACLE = {"oracle": "zoo:digits/oracle"}
GUIDED: dict[str, Any] = {"method": "risky"}
START = {"images": "digits:test", "strength": 0.5}
VALIDITY = "models.validity (`riskforge prepare JOB --answers FILE` makes it)"
NEITHER = "is neither a condition, such as 'is_error and risk >= 1', nor a mapping of conditions"


def raw_job(accept: Any, models: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    request = {"name": "a", "method": "prompt", "classes": [3, 8], "count": 4, "accept": accept} | changes
    return {"name": "j", "models": MODELS | (models or {}), "requests": [request], "output": {"uri": "runs/j"}}


def problems(raw: Any) -> list[str]:
    with pytest.raises(JobError) as refused:
        parse_job(raw)
    assert all(problem.isprintable() and len(problem) < 2000 for problem in refused.value.problems)
    return refused.value.problems


NO_RULES: list[tuple[Any, str]] = [
    ("", ": '' is nothing, not a condition, such as"),
    ("   ", ": '   ': it is empty; write such as risk > 2"),
    (" risk >", ": ' risk >': at its end: invalid syntax; write such as risk > 2"),
    (" risk > 2)", ": at character 10: unmatched ')'; write such as risk > 2"),
    (None, ": None is nothing, not a condition, such as"),
    (True, f": True {NEITHER}"),
    (1.5, f": 1.5 {NEITHER}"),
    (["is_error"], f": ['is_error'] {NEITHER}"),
    ("\ud800", f": '\\ud800' {NEITHER}"),
    ("risk", ": 'risk': at character 1: 'risk' is a number; a condition is needed, such as risk > 2"),
    ("'three'", "is a text; a condition is needed"),
    ("is_error and rsik > 1", ": at character 14: 'rsik' is not a column; did you mean 'risk'?"),
    ("is_eror", "did you mean 'is_error'?"),
    ("qqq", "is not a column; the columns are schema_version, key, request,"),
    ("is_error and risk > 'high'", "compares a number with a text"),
    ("risk + kldb > 2", "'risk + kldb' is not of this language"),
    ("__import__('os').system('x')", "is not of this language"),
    ("oracles", "'oracles' is a column of lists, which cannot be compared"),
    ("status == 'ok'", "'status' says whether the rule accepted the sample, and is known only after it"),
    ("not accepted", "'accepted' says whether the rule accepted the sample"),
    ("error_message == ''", "'error_message' is of failed samples, which no rule sees"),
    ("not surplus", "'surplus' is known only when the run is closed; filter by it when reading"),
    ("human_agreement > 0.5", "'human_agreement' is known only when people have answered, after the run"),
    ("batch_size > 1", "'batch_size' depends on how the run went; a rule must give the same on every machine"),
    ("sha256 != ''", "'sha256' depends on how the run went"),
    ("is_error or " * 10_000 + "is_error", ": it has 120008 characters; up to 100000 are read"),
    (" and ".join(["is_error"] * 501), "is one part too many; up to 500 are read"),
    ("not " * 300 + "is_error", "nested too deep"),
    ("(" * 300 + "is_error" + ")" * 300, "too many nested parentheses"),
    ("(" * 50_000 + "is_error" + ")" * 40_000, "too many nested parentheses"),
    ("risk > 1" + "0" * 400, "is too large for a number"),
    ("risk > 1" + "0" * 5000, "requests.0.accept: 'risk > 1000"),
    ("risk > 1e999", "is too large for a number"),
    ("risk > 2\0", ": it has the control character '\\x00'; leave it out, or write it so within quotes"),
    ("context == '\x1b[31m'", ": it has the control character '\\x1b'"),
    ("context == '\\ud800'", "is not a text in Unicode"),
    ("is_error and\nrisk > 1", "invalid syntax"),
    ({"is_error": "risk > 1"}, "requests.0.accept.is_error: 'risk > 1' is not true or false"),
    ({"status": "x"}, "requests.0.accept.status: unknown condition; use is_error, screened, oracle, risk"),
    ({"rsik": "> 1"}, "requests.0.accept.rsik: unknown condition; use is_error, screened, oracle, risk"),
    *(
        ({name: wanted}, f"accept.{name}: a mapping has no such condition; write the rule as a text, such as {text}")
        for name, wanted, text in (
            ("key", "x", "accept: \"key == 'a'\""),
            ("label_is_valid", True, 'accept: "label_is_valid"'),
            ("target_errs", False, 'accept: "not target_errs"'),
            ("class_index", 3, 'accept: "class_index >= 1"'),
        )
    ),
    ("oracle_p_label_min == -1", ": 'oracle_p_label_min == -1' compares with the value that stands for unknown"),
    ("is_error or not (-1.0 != p_valid)", ": 'p_valid != -1' compares with the value that stands for unknown"),
    ({"risk": float("nan")}, "requests.0.accept.risk: nan is not a finite number"),
]


@pytest.mark.parametrize(("accept", "message"), NO_RULES, ids=[str(place) for place in range(len(NO_RULES))])
def test_what_is_no_rule_is_refused(accept: Any, message: str) -> None:
    """Texts of any kind, also such that YAML makes of a slip, with the field and what is wrong."""
    found = problems(raw_job(accept, ORACLE))
    assert len(found) == 1 and found[0].startswith("requests.0.accept") and message in found[0]


@pytest.mark.parametrize(
    ("accept", "changes", "expected"),
    [
        ("oracle_agrees", {}, ["'oracle_agrees' is of the oracle, and there is no oracle; name one in models.oracle"]),
        ("not oracle_class == 3", {}, ["'oracle_class' is of the oracle, and there is no oracle; *"]),
        ("is_error and (valid_failure or label_is_valid)", {},
         ["'valid_failure' is of the oracle, and there is no oracle; *",
          "'label_is_valid' is of the oracle, and there is no oracle; *"]),
        ("oracle_p_label_min >= 0.99", {}, ["'oracle_p_label_min' is of the oracle, and there is no oracle; *"]),
        ("oracle_p_label_min >= 0.99 and label_is_valid", {"models": ORACLE}, []),
        ("oracle_agrees", {"models": {"oracles": ["a", "b"]}}, []),
        ("judge_conformity > 0.2", {},
         ["'judge_conformity' is of the judge, and there is no judge; name one in models.judge"]),
        ("judge_conformity > 0.2", {"models": {"judge": "zoo:digits/clip"}}, []),
        ("p_valid >= 0.9", {"models": ORACLE}, [f"'p_valid' is not known without *{VALIDITY}*"]),
        ({"p_valid": ">= 0.9"}, {"models": ORACLE}, [f"is not known without *{VALIDITY}*"]),
        ("p_valid >= 0.9", {"models": ORACLE | {"validity": "v"}}, []),
        ("start_distance < 0.4 or start_key == 'x'", {},
         ["'start_distance' says nothing, as there is no start; *", "'start_key' says nothing, as *"]),
        ("start_distance < 0.4", {"start": START | {"strength": 1}},
         ["'start_distance' says nothing, as there is no start at strength 1; *"]),
        ("start_distance < 0.4 and strength < 0.6", {"start": START}, []),
        ("twin_risk < 1 or twin_key == ''", {} | GUIDED,
         ["'twin_risk' says nothing, as there is no twin; *add twin: true",
          "'twin_key' says nothing, as there is no twin; *"]),
        ("twin_risk < 1", {"twin": True} | GUIDED, []),
        ("is_error and not screened", {},
         ["'screened' says nothing, as nothing screens samples; leave it out, or give an artefact in `conditioning`"]),
        ("screened", {"conditioning": "zoo:digits/conditioning"}, []),
        ("class_name == 'three' and context == '' and request == 'a' and key != 'x' and strength == 1", {}, []),
    ],
)  # fmt: skip
def test_names_without_a_value_are_refused(accept: Any, changes: dict[str, Any], expected: list[str]) -> None:
    """What no model measures and no sample has, under every name that needs it; a mapping has its key in the path."""
    raw = raw_job(accept, **changes)
    if not expected:
        assert parse_job(raw).requests[0].accept == accept
        return
    place = "requests.0.accept: " if isinstance(accept, str) else f"requests.0.accept.{next(iter(accept))}: "
    for problem, wanted in zip(problems(raw), expected, strict=True):
        head, *rest = wanted.split("*")
        assert problem.startswith(place + head) and all(part in problem for part in rest)


def test_a_text_is_stored_as_it_was_written() -> None:
    """In the job, in its JSON and in the identity of its plan; a mapping as before."""
    texts = {"text": "is_error  and (risk > 1)", "mapping": {"is_error": True, "risk": ["> 1"]}}
    digests = {}
    for name, rule in texts.items():
        job = parse_job(raw_job(rule, classes="all"))
        again = parse_job(json.loads(job.model_dump_json()))
        assert again == job and again.requests[0].accept == rule == job.model_dump()["requests"][0]["accept"]
        plan = build_plan(job, LABELS, DIGESTS | {"diffusion": {MODELS["diffusion"]: "0"}})
        assert plan.identity["requests"][0]["accept"] == rule
        digests[name] = plan.digest
    assert digests["text"] != digests["mapping"]


def test_rules_are_yaml_of_every_style() -> None:
    for text in ("is_error and risk > 1", '"is_error and risk > 1"', ">-\n  is_error\n  and risk > 1"):
        assert yaml.safe_load(f"accept: {text}") == {"accept": "is_error and risk > 1"}


@pytest.mark.parametrize("rule", ["is_error and risk > 1", "risk >= 1", "not is_error", "context in ['', 'red ink']"])
def test_a_rule_is_set_on_the_command_line(call: Any, rule: str) -> None:
    """The first `=` ends the name, whatever the rule compares by."""
    raw = apply_overrides(raw_job({}), [parse_override(f"requests.0.accept={rule}")])
    assert parse_job(raw).requests[0].accept == rule
    path = REPOSITORY / "jobs/quickstart.yaml"
    code, _, errors = call("plan", path, "--validate", "--set", f"requests.0.accept={rule}")
    assert code == 0, errors
    code, _, errors = call("plan", path, "--validate", "--set", "requests.0.accept=is_error and rsik > 1")
    assert code == 2 and "requests.0.accept: 'is_error and rsik > 1': at character 14: 'rsik'" in errors
