"""Pages of the documentation that are made from the code: the job file, and the metadata of a sample.

uv run python tools/docs.py            # writes docs/job-file.md and docs/metadata.md
uv run python tools/docs.py --check    # exit code 1 where one of them is not what it should be
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter

from engine.job import spec
from engine.job.acceptance import FLAGS, LATER, ORACLE, ORACLE_CONDITION, SCORES
from engine.job.columns import COLUMNS, RECORD_COLUMNS, RUN_COLUMNS, SCHEMA_VERSION, SURPLUS, Column, enumerated
from engine.methods.registry import METHODS

DOCS = Path(__file__).parent.parent / "docs"
NOTE = "<!-- Made by tools/docs.py from the code; change it there. -->"

# Sections of the page, in the order of a job file: heading, place in the file, class.
SECTIONS: tuple[tuple[str, type[BaseModel]], ...] = (
    ("The job", spec.JobSpec),
    ("models", spec.ModelsSpec),
    ("models.adapters", spec.AdapterSpec),
    ("requests", spec.RequestSpec),
    ("conditioning", spec.ConditioningSpec),
    ("start", spec.StartSpec),
    ("sampling", spec.SamplingSpec),
    ("guidance", spec.GuidanceSpec),
    *((f"guidance.{method.name}", method.load_spec()) for method in METHODS if method.is_guided),
    ("output", spec.OutputSpec),
    ("runtime", spec.RuntimeSpec),
    ("runtime.resources", spec.ResourcesSpec),
)
# Patterns in words; a new one needs words, too.
PATTERNS = {
    r"^\S+$": "no spaces",
    TypeAdapter(spec.Name).json_schema()["pattern"]: "of a-z, 0-9 and inner hyphens",
    TypeAdapter(spec.MethodAddress).json_schema()["pattern"]: "`package.module:factory`",
    TypeAdapter(spec.Date).json_schema()["pattern"]: "a date such as `2026-11-21`",
    TypeAdapter(spec.Factor).json_schema()["pattern"]: "a multiple such as `4x`",
    "^(auto|cpu|cuda)$": "`auto`, `cpu`, `cuda`",
}

JOB_INTRO = f"""# The job file

{NOTE}

A job is a YAML file. Unknown keys, values out of range, classes that the target does not have and parts that do not
fit together are refused before a model is loaded, all at once: `riskforge plan JOB --validate`. `riskforge schema`
prints the same as JSON Schema, for editors. `--set requests.0.count=6` replaces a value from the command line; a
number counts the items of a list.

```yaml
name: example
models: {{diffusion: zoo:digits/stable-diffusion, clip: zoo:digits/clip, target: zoo:digits/classifier}}
requests:
  - {{name: threes, method: prompt, classes: [three], count: 10}}
output: {{uri: runs/example}}
```

Numbers are written with their digits: YAML reads `1e6` as text. A key that stands twice is an error. Anchors and `<<`
may be used."""

REQUESTS_NOTE = """`count` is for each class (or subset) *and* context. With `accept` it is a quota of *accepted*
samples: a class is sampled, in rounds of what is missing at its measured yield, until it has `count` times the number
of contexts of them, whatever their context, or `max_attempts` are made. The first ones in index order count, later
ones are marked `surplus` in `metadata.parquet`; the others are recorded as `rejected` (`output.store_rejected: true`
keeps their images too). Requests of one `seed_group` share noise sample by sample: that is how methods are compared.
`sampling` and `guidance` override the job's, key by key.

`accept` says which samples are kept: a condition in the [filter language](reading.md#the-filter-language), as text.

```yaml
accept: is_error and oracle_agrees and (conformity >= 0.2 or context == "")
```

It is asked of every sample as soon as it is scored; where it is unknown, the sample is not accepted. It may name all
columns but lists, and derived names, and nothing that is only known later: {later}. YAML needs quotes around a text
that begins with a quote, a bracket, `-` or `!`, or that has `: ` or ` #` in it.

`is_error` asks for an error of the target: a prediction of another class than the conditioned one, and of a joint
prompt one outside its classes, none of which would be wrong. To filters, which read the column, a joint sample is an
error wherever another class than the closest one was predicted; `target_errs` means the same in both. (In runs that
began before schema version 3 `accept` goes on asking for what the column says.)

A mapping of conditions that must all hold means the same: `{{is_error: true, oracle: agrees, risk: ['>= 1', '< 3']}}`
is `is_error and oracle_agrees and risk >= 1 and risk < 3`; `oracle: disagrees` is `not oracle_agrees`.

| condition | values |
|---|---|
"""

METADATA_INTRO = f"""# The metadata of a sample

{NOTE}

Every sample has a `.json` in its tar and a row in the parquet next to it; `metadata.parquet` has the rows of all
shards. Each field is always there and has one type, so that any reader infers one schema: where a field does not
apply it is empty text, an empty list, 0, false, or -1 for a class. There are no nulls and no NaN. Scores are of the
stored 8-bit image; logarithms are natural. In `transfer`, a model with ` (guides)` after its name is a further target
of an [ensemble](methods.md#ensembles-of-targets), which was guided on. The class that an oracle or transfer model
predicts is -2 where it is none of the target's ([label maps](targets.md#label-maps)).

`scored` is false of failed samples and of real images that were mixed in. What models measure means nothing there,
whatever the columns hold, and filters on them select neither such a row nor, negated, its opposite: {{measured}}.

`schema_version` is now {SCHEMA_VERSION}. Later than version 1 came: {{later}}. All versions from 1 on are read, earlier
ones with `scored` true of all but failed samples and real images, and a run goes on in the version that it began with.
DuckDB reads runs of several versions with `read_parquet([...], union_by_name = true)`."""


def job_page() -> str:
    """docs/job-file.md."""
    parts = [JOB_INTRO]
    for heading, model in SECTIONS:
        parts.append(f"## {heading}\n\n{_first_line(model)}")
        if model is spec.RequestSpec:
            later = ", ".join(f"`{name}`" for name in LATER)
            parts.append(REQUESTS_NOTE.format(later=later) + "\n".join(_conditions()))
        parts.append("\n".join(["| key | values | default | meaning |", "|---|---|---|---|", *_rows(model)]))
    return "\n\n".join(parts) + "\n"


def _first_line(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").strip().splitlines()[0]


def _conditions() -> Iterator[str]:
    yield f"| {_codes(FLAGS)} | `true`, `false` |"
    yield f"| `{ORACLE_CONDITION}` | {_codes(ORACLE)} |"
    yield f"| {_codes(SCORES)} | a comparison such as `'>= 0.2'`, with `<`, `<=`, `>` or `>=` |"


def _codes(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _rows(model: type[BaseModel]) -> Iterator[str]:
    """A row for each key of a section."""
    schema = model.model_json_schema(ref_template="{model}")
    for name, about in schema["properties"].items():
        # The schema leaves out one that its class says, too.
        description = model.model_fields[name].description
        if not description:
            raise ValueError(f"{model.__name__}.{name} has no description")
        default = _default(model, name)
        yield f"| `{name}` | {_cell(_values(about))} | {_cell(default)} | {_cell(description)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _default(model: type[BaseModel], name: str) -> str:
    field = model.model_fields[name]
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or isinstance(value, BaseModel) or value in ((), {}):
        return ""
    text = json.dumps(value) if isinstance(value, tuple | bool) else str(value)
    return f"`{text}`" if text else "empty"


def _values(about: dict[str, Any]) -> str:
    """What a key may hold, in words, from its JSON Schema."""
    if "$ref" in about or "allOf" in about:
        return f"see [{_heading(about)}](#{_anchor(_heading(about))})"
    if "anyOf" in about:
        words = [_values(one) for one in about["anyOf"] if one.get("type") != "null"]
        return ("; or " if any(", " in one for one in words) else " or ").join(words)
    if "enum" in about or "const" in about:
        return ", ".join(f"`{one}`" for one in about.get("enum", [about.get("const")]))
    return _KINDS[about.get("type", "any")](about)


def _heading(about: dict[str, Any]) -> str:
    name = about.get("$ref") or about["allOf"][0]["$ref"]
    return next(heading for heading, model in SECTIONS if model.__name__ == name)


def _anchor(heading: str) -> str:
    return heading.lower().replace(".", "").replace(" ", "-")


def _number(kind: str, about: dict[str, Any]) -> str:
    low, high = about.get("minimum"), about.get("maximum")
    above, below = about.get("exclusiveMinimum"), about.get("exclusiveMaximum")
    parts = [f"from {low:,}" if low is not None else "", f"above {above:,}" if above is not None else ""]
    parts += [f"to {high:,}" if high is not None else "", f"below {below:,}" if below is not None else ""]
    return " ".join([f"{kind},", *filter(None, parts)]) if any(parts) else kind


def _text(about: dict[str, Any]) -> str:
    words = [PATTERNS[about["pattern"]]] if "pattern" in about else []
    if "maxLength" in about and not (words and words[0].startswith("`")):
        words.append(f"up to {about['maxLength']:,} characters")
    if words and not words[0].startswith(("up", "of")):
        return words[0]
    return f"text {', '.join(words)}".strip()


def _list(about: dict[str, Any]) -> str:
    most = f", up to {about['maxItems']:,}" if "maxItems" in about else ""
    items = about["items"]
    return f"list of: {_values(items)}{most}" if "$ref" not in items else f"list; {_values(items)}{most}"


_KINDS: dict[str, Callable[[dict[str, Any]], str]] = {
    "integer": lambda about: _number("whole number", about),
    "number": lambda about: _number("number", about),
    "boolean": lambda about: "`true`, `false`",
    "string": _text,
    "array": _list,
    "object": lambda about: "mapping",
    "any": lambda about: "any value",
}


def metadata_page() -> str:
    """docs/metadata.md."""
    tables = [
        (
            "In the json and in the parquet",
            "Decided by the plan alone, whatever the worker or the attempt.",
            RECORD_COLUMNS,
        ),
        ("In the parquet alone", "They depend on the run.", RUN_COLUMNS),
        ("In metadata.parquet alone", "", (SURPLUS,)),
    ]
    measured = ", ".join(f"`{column.name}`" for column in RECORD_COLUMNS if column.measured_by)
    later = sorted((column for column in COLUMNS if column.since > 1), key=lambda column: column.since)
    names = {version: [f"`{one.name}`" for one in some] for version, some in groupby(later, lambda one: one.since)}
    versions = "; ".join(f"in version {version} {enumerated(some)}" for version, some in names.items())
    parts = [METADATA_INTRO.format(measured=measured, later=versions)]
    for heading, text, columns in tables:
        lines = ["| field | type | since | meaning |", "|---|---|---|---|"]
        lines += [
            f"| `{column.name}` | {_type(column)} | {column.since} | {_cell(column.description)} |"
            for column in columns
        ]
        parts += [f"## {heading}", *([text] if text else []), "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _type(column: Column) -> str:
    """The type of a column in words."""
    if column.parts:
        return "list of {" + ", ".join(f"{part.name}: {part.type}" for part in column.parts) + "}"
    return f"list of {column.type[:-1]}" if column.type.endswith("s") else column.type


PAGES: dict[str, Callable[[], str]] = {"job-file.md": job_page, "metadata.md": metadata_page}


def main() -> int:
    """Write the pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only report which pages are not up to date")
    is_check = parser.parse_args().check
    stale = [name for name, make in PAGES.items() if not _is_current(DOCS / name, make())]
    for name in stale:
        if is_check:
            print(f"docs/{name} is not up to date: run `python tools/docs.py`", file=sys.stderr)
        else:
            (DOCS / name).write_text(PAGES[name](), encoding="utf-8")
            print(f"docs/{name}")
    return 1 if is_check and stale else 0


def _is_current(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    sys.exit(main())
