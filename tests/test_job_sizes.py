"""Lists of a job are counted before they are read: a file of any size is refused in a moment."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import yaml

from engine.commands.jobfile import read_job
from engine.errors import JobError
from engine.job.parsing import LIST_LIMITS, MAX_ENTRIES, MAX_KEYS, MAX_PROBLEMS, parse_job

JOB: dict[str, Any] = {
    "name": "a",
    "models": {"diffusion": "d", "clip": "c", "target": "t"},
    "requests": [{"name": "r", "method": "m:f", "classes": "all", "count": 1}],
    "output": {"uri": "out"},
}
REQUEST = ("requests", 0)
WHERE: dict[str, tuple[Any, ...]] = {
    "requests": (), "contexts": REQUEST, "classes": REQUEST, "boundary": REQUEST, "transfer": ("models",),
    "strength": (*REQUEST, "start"), "further_targets": ("models",), "oracles": ("models",), "adapters": ("models",),
}  # fmt: skip
TEXT = "x: &a {name: r, method: prompt, classes: all, count: 1}\n"


def with_value(*path: Any, value: Any) -> dict[str, Any]:
    raw: Any = copy.deepcopy(JOB)
    current = raw
    for part in path[:-1]:
        current = current.setdefault(part, {}) if isinstance(current, dict) else current[part]
    current[path[-1]] = value
    return raw


def refused(read, seconds: float = 3.0) -> str:
    started = time.process_time()
    with pytest.raises(JobError) as caught:
        read()
    assert time.process_time() - started < seconds
    assert len(caught.value.problems) <= MAX_PROBLEMS + 1
    return str(caught.value)


def test_every_list_of_the_schema_has_a_limit():
    """A list that is added to the schema without one fails here."""
    import typing

    from pydantic import BaseModel

    from engine.job.spec import JobSpec

    waiting: list[Any] = [JobSpec]
    lists = set()
    while waiting:
        one = waiting.pop()
        if isinstance(one, type) and issubclass(one, BaseModel):
            for name, field in one.model_fields.items():
                parts = [field.annotation]
                while parts:
                    part = parts.pop()
                    lists |= {name} if typing.get_origin(part) is tuple else set()
                    parts += typing.get_args(part)
                    waiting += [part]
    # A list of strengths becomes single numbers before the schema is asked.
    assert lists | {"strength"} == set(LIST_LIMITS) == set(WHERE)


@pytest.mark.parametrize("name", LIST_LIMITS)
def test_a_list_above_its_limit_is_refused_by_its_length_alone(name, tmp_path):
    """With entries that are all wrong, in YAML and as plain data; as long as it may be, it is looked at."""
    limit = LIST_LIMITS[name]
    raw = with_value(*WHERE[name], name, value=[None] * (limit + 1))
    text = refused(lambda: parse_job(raw))
    assert text == f"{'.'.join(map(str, (*WHERE[name], name)))}: has {limit + 1} entries; give {limit} or fewer"
    text = refused(lambda: parse_job(with_value(*WHERE[name], name, value=[None] * limit)), 200)
    assert "entries; give" not in text
    if limit <= 10_000:
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump(raw))
        text = refused(lambda: read_job(path, []))
        assert f"'{name}' has more than {limit} entries; give fewer" in text and "line " in text


@pytest.mark.parametrize("entries", ["*a, ", "{name: r, method: prompt, classes: all, count: 1}, "])
def test_a_hundred_thousand_requests_are_counted_first(entries, tmp_path):
    """Written out, or as aliases of one; nothing behind the limit is read."""
    path = tmp_path / "job.yaml"
    path.write_text(f"{TEXT}requests: [{entries * 100_000}]")
    assert "'requests' has more than 1000 entries" in refused(lambda: read_job(path, []))


@pytest.mark.parametrize("value", [dict.fromkeys(map(str, range(MAX_KEYS + 1)), 1), [0] * (MAX_ENTRIES + 1)], ids=type)
@pytest.mark.parametrize(
    "place",
    [("x",), ("models", "x"), (*REQUEST, "accept", "risk"), (*REQUEST, "guidance", "custom", "parameters", "a")],
)
def test_any_other_collection_has_a_limit_too(place, value):
    """Keys that are not known, rules, parameters."""
    text = refused(lambda: parse_job(with_value(*place, value=value)))
    assert text.startswith(f"{'.'.join(map(str, place))}: has {len(value)} ")


def test_many_problems_are_cut(tmp_path):
    """What is wrong in every one of many entries is told for the first of them."""
    text = refused(lambda: parse_job(with_value(*REQUEST, "classes", value=[1.5] * 90_000)), 20)
    assert text.startswith("requests.0.classes.0: 1.5 is not text")
    text = refused(lambda: parse_job(JOB | {f"k{place}": 1 for place in range(9000)}))
    assert text.startswith("k0: unknown key")
