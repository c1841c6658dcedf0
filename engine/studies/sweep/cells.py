"""The cells of a sweep: every combination of the values, as requests of one job with common noise. No torch.

A request of the base job makes a cell of each combination of the fields that it uses. One that uses none is a single
cell for reference where nothing guides it and it has the classes of one that does.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from engine.errors import JobError
from engine.job.parsing import parse_job
from engine.job.spec import MAX_NAME, JobSpec, RequestSpec
from engine.job.spec_messages import nearest
from engine.methods.registry import is_guided
from engine.studies.sweep.fields import assign, canonical, shown_field, steps_of_field, uses, value_text

MAX_CELLS = 400
SEED_GROUP = "sweep"
# Fields that change the classes.
CLASS_FIELDS = ("classes", "boundary")
# Characters of a value in the name of a cell.
MAX_SLUG = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepCell:
    """A combination of values.

    Attributes:
        name: of its request in the run.
        request: of the base job.
        values: by field, those of the fields that the request uses.
        texts: what tables call them.
        asked: what its samples are conditioned on, as the job names it: cells with equal ones share noise.
    """

    name: str
    request: str
    values: dict[str, Any]
    texts: dict[str, str]
    asked: str

    def asked_names(self, separator: str) -> str:
        """The classes that it asks for."""
        wanted = json.loads(self.asked)[1]
        return wanted if isinstance(wanted, str) else separator.join(wanted or ())


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossedJob:
    """A job with a request of each cell.

    Attributes:
        titles: of the fields, the shortest ends of their paths that tell them apart.
        left_out: requests of the base job that make no cell.
    """

    job: JobSpec
    cells: tuple[SweepCell, ...]
    titles: dict[str, str]
    left_out: tuple[str, ...]

    def label(self, cell: SweepCell) -> str:
        """A cell in words: its values by title, after its request where there are several."""
        parts = [
            text if isinstance(cell.values[field], dict | list) else f"{self.titles[field]}={text}"
            for field, text in cell.texts.items()
        ]
        is_named = len({one.request for one in self.cells}) > 1 or not parts
        return ", ".join([cell.request] * is_named + parts)

    def named(self, problems: Sequence[str]) -> list[str]:
        """Problems of this job with the cells in place of the numbers of its requests; equal ones once."""
        return list(_cell_problems(problems, self.cells, self.titles))

    def label_without(self, cell: SweepCell, fields: Sequence[str]) -> str:
        """A cell in words without some of its fields."""
        texts = {name: text for name, text in cell.texts.items() if name not in fields}
        return self.label(replace(cell, texts=texts))

    def samples_of(self, labels: Sequence[str]) -> dict[str, int]:
        """Samples of every cell, by name."""
        return {
            cell.name: request.num_wanted * num_classes(request, len(labels))
            for cell, request in zip(self.cells, self.job.requests, strict=True)
        }


def cross(
    job: JobSpec,
    fields: Mapping[str, Sequence[Any]],
    texts: Mapping[str, Mapping[str, str]],
    requests: Sequence[str] | None,
    count: int,
    num_labels: int,
) -> CrossedJob:
    """The job of all cells, checked as a whole.

    Args:
        fields: values by dotted path, which `field_problems` finds nothing wrong with.
        texts: what tables call the values of each field, by `canonical`.
        requests: names of those that make cells; None for all that use a field.
        count: samples of a cell, rounded up to equally many of each class and context.
        num_labels: number of the target's classes.

    Raises:
        JobError: no such request, a field that none uses, too many cells, or a cell that is no valid request.
    """
    chosen = _chosen(job, requests)
    combinations = math.prod(map(len, fields.values()))
    if combinations * len(chosen) > 10 * MAX_CELLS:
        raise JobError(_too_many(combinations * len(chosen)))
    crossed = {request["name"]: _combinations(job, request, fields) for request in chosen}
    if idle := [field for field in fields if not _is_used(field, crossed)]:
        raise JobError([_unused(job, chosen, field) for field in idle])
    kept, left_out = _without_strangers(chosen, crossed, is_chosen=requests is not None)
    cells, raws = _name_cells(kept, crossed, fields, texts)
    if len(cells) > MAX_CELLS:
        raise JobError(_too_many(len(cells)))
    sized = [_sized(raw, count, num_labels) for raw in raws]
    made = _parse(job, sized, cells, _titles(fields))
    return CrossedJob(job=made, cells=tuple(cells), titles=_titles(fields), left_out=tuple(left_out))


def _too_many(number: int) -> str:
    return f"fields: {number} cells are more than {MAX_CELLS}; give fewer values, or choose requests by --request NAME"


def _chosen(job: JobSpec, names: Sequence[str] | None) -> list[dict[str, Any]]:
    """The raw requests of the base job that are chosen."""
    known = [request.name for request in job.requests]
    if unknown := [name for name in names or () if name not in known]:
        has = ", ".join(known)
        raise JobError(
            [f"--request: the job has no request '{name}'{nearest(name, known)}; it has {has}" for name in unknown]
        )
    raws = [request.model_dump(mode="json") for request in job.requests]
    return [raw for raw in raws if names is None or raw["name"] in names]


def _combinations(
    job: JobSpec, request: dict[str, Any], fields: Mapping[str, Sequence[Any]]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The different combinations of the fields that a raw request uses, each with the request that it makes."""
    made: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    for values in itertools.product(*fields.values()):
        own, raw = _applied(job, request, dict(zip(fields, values, strict=True)))
        made.setdefault(canonical(own), (own, raw))
    return list(made.values())


def _applied(job: JobSpec, request: dict[str, Any], values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values of fields that a raw request uses once it has the others, and the request with them."""
    raw, own = request, {}
    for field in sorted(values, key=_order):
        if uses(raw, field):
            raw, own[field] = assign(raw, field, values[field]), values[field]
    idle = [field for field in own if _is_for_other_step(job, raw, field)]
    if idle:
        return _applied(job, request, {field: value for field, value in values.items() if field not in idle})
    return {field: own[field] for field in values if field in own}, raw


def _order(field: str) -> tuple[bool, bool]:
    """Fields that decide which others are used go first: the method, then whole sections."""
    return field != "method", "." in field


def _is_for_other_step(job: JobSpec, raw: dict[str, Any], field: str) -> bool:
    wanted, has = steps_of_field(job, raw, field)
    return wanted != has


def _is_used(field: str, crossed: Mapping[str, Sequence[tuple[dict[str, Any], Any]]]) -> bool:
    return any(field in values for combinations in crossed.values() for values, _ in combinations)


def _unused(job: JobSpec, chosen: Sequence[dict[str, Any]], field: str) -> str:
    """Why no request uses a field, and what to do."""
    section, _, rest = field.partition(".")
    for raw in chosen:
        wanted, _ = steps_of_field(job, raw, field)
        if wanted:
            return (
                f"{field}: is read by step {wanted} alone, and no cell steps by it; sweep another field, or add"
                f" {field.rpartition('.')[0]}.step={wanted}"
            )
    methods = ", ".join(f"{raw['name']} ({raw['method']})" for raw in chosen)
    if section == "guidance":
        name = rest.partition(".")[0]
        return f"{field}: is for method {name}, and no request has it: {methods}; sweep a field of their methods"
    if section in ("conditioning", "start"):
        return f"{field}: no request has `{section}`; add it to the job, or sweep another field"
    other = "boundary" if section == "classes" else "classes"
    return f"{shown_field(field)}: all requests have `{other}` in its place; sweep `{other}`"


def _without_strangers(
    chosen: Sequence[dict[str, Any]],
    crossed: Mapping[str, Sequence[tuple[dict[str, Any], dict[str, Any]]]],
    *,
    is_chosen: bool,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Requests that use a field, and those beside them that are a reference; names of the others."""
    asked = {
        asked_text(raw) for combinations in crossed.values() for values, raw in combinations if values
    }  # fmt: skip
    kept = [
        raw for raw in chosen
        if is_chosen
        or any(values for values, _ in crossed[raw["name"]])
        or (asked_text(raw) in asked and not is_guided(raw["method"]))
    ]  # fmt: skip
    return kept, [raw["name"] for raw in chosen if raw not in kept]


def asked_text(raw: Mapping[str, Any]) -> str:
    """What the samples of a raw request are conditioned on."""
    key = "classes" if raw.get("boundary") is None else "boundary"
    value = raw.get(key)
    wanted = sorted(map(str, value)) if isinstance(value, list | tuple) else value
    return json.dumps([key, wanted], ensure_ascii=False, default=str)


def _name_cells(
    kept: Sequence[dict[str, Any]],
    crossed: Mapping[str, Sequence[tuple[dict[str, Any], dict[str, Any]]]],
    fields: Mapping[str, Sequence[Any]],
    texts: Mapping[str, Mapping[str, str]],
) -> tuple[list[SweepCell], list[dict[str, Any]]]:
    titles, slugs = _titles(fields), {field: _slugs(values, texts[field]) for field, values in fields.items()}
    cells: list[SweepCell] = []
    raws: list[dict[str, Any]] = []
    taken: set[str] = set()
    for request in kept:
        for values, raw in crossed[request["name"]]:
            parts = [request["name"]] if len(kept) > 1 or not values else []
            parts += [_part(titles[field], value, slugs[field][canonical(value)]) for field, value in values.items()]
            name = "-".join(parts)
            if len(name) > MAX_NAME or name in taken:
                name = f"cell-{len(cells):03d}"
            taken.add(name)
            own = {field: texts[field][canonical(value)] for field, value in values.items()}
            cells.append(SweepCell(name=name, request=request["name"], values=values, texts=own, asked=asked_text(raw)))
            raws.append(raw | {"name": name})
    return cells, raws


def _part(title: str, value: Any, slug: str) -> str:
    """The part of a cell's name for a value; words speak for themselves."""
    is_word = isinstance(value, str | list | dict) and not slug.isdecimal()
    return slug if is_word else f"{title.replace('_', '-').replace('.', '-').lower()}-{slug}"


def _slugs(values: Sequence[Any], texts: Mapping[str, str]) -> dict[str, str]:
    """Texts for names, by value: its letters and digits, or its number where they are too many or not its own."""
    called = [texts[canonical(value)] for value in values]
    slugs = [_slug(value if text == value_text(value) else text) for value, text in zip(values, called, strict=True)]
    return {
        canonical(value): slug if slug and len(slug) <= MAX_SLUG and slugs.count(slug) == 1 else str(number + 1)
        for number, (value, slug) in enumerate(zip(values, slugs, strict=True))
    }


def _slug(value: Any) -> str:
    if isinstance(value, dict):
        return "-".join(filter(None, map(_slug, value.values())))
    if isinstance(value, list):
        return "-".join(filter(None, map(_slug, value)))
    if isinstance(value, int | float) and not isinstance(value, bool) and value < 0:
        return f"minus-{_slug(-value)}"
    return re.sub(r"[^a-z0-9]+", "-", value_text(value).lower()).strip("-")


def _titles(fields: Mapping[str, Any]) -> dict[str, str]:
    """The shortest ends of the paths that tell fields apart."""
    titles = {}
    for field in fields:
        parts = field.split(".")
        ends = [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]
        others = [other for other in fields if other != field]
        titles[field] = next(
            (end for end in ends if not any(f".{other}".endswith(f".{end}") for other in others)), field
        )
    return titles


def _sized(raw: dict[str, Any], count: int, num_labels: int) -> dict[str, Any]:
    """A raw request with the noise of all cells, and as many samples of each class and context as give `count`."""
    contexts = raw.get("contexts")
    number = _num_classes(raw, num_labels) * max(1, len(contexts) if isinstance(contexts, list) else 1)
    common = {"seed_group": SEED_GROUP, "fresh": False, "count": math.ceil(count / number)}
    # Equal numbers of attempts, so that cells are compared on the same noise whatever is accepted.
    return raw | common | {"max_attempts": "1x" if raw.get("accept") else None}


def _num_classes(raw: Mapping[str, Any], num_labels: int) -> int:
    classes = raw.get("classes")
    if raw.get("boundary") is not None:
        return 1
    return max(1, len(classes)) if isinstance(classes, list | tuple) else max(1, num_labels)


def num_classes(request: RequestSpec, num_labels: int) -> int:
    """Classes of a request; one for a joint prompt."""
    return _num_classes(request.model_dump(include={"classes", "boundary"}), num_labels)


def _parse(
    job: JobSpec, raws: Sequence[dict[str, Any]], cells: Sequence[SweepCell], titles: Mapping[str, str]
) -> JobSpec:
    """The checked job of all cells.

    Raises:
        JobError: every different problem once, with the first cell that has it.
    """
    output = job.output.model_dump(mode="json") | {"store_rejected": True}
    try:
        return parse_job(job.model_dump(mode="json") | {"requests": list(raws), "output": output})
    except JobError as error:
        raise JobError(list(_cell_problems(error.problems, cells, titles))) from None


def _cell_problems(problems: Sequence[str], cells: Sequence[SweepCell], titles: Mapping[str, str]) -> Iterator[str]:
    first: dict[str, list[str]] = {}
    for problem in problems:
        match = re.match(r"requests\.(\d+)\.?(.*)", problem, re.DOTALL)
        if match is None or int(match[1]) >= len(cells):
            yield problem
            continue
        cell = cells[int(match[1])]
        label = ", ".join(f"{titles[field]}={text}" for field, text in cell.texts.items())
        first.setdefault(match[2], []).append(label or cell.request)
    for text, labels in first.items():
        others = len(labels) - 1
        more = f" (and {others} more cell{'s' * (others > 1)})" if others else ""
        yield f"cell {labels[0]}{more}: {text}"
