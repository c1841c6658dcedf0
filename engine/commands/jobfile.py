"""Job files: from YAML to a validated job, with messages that locate the error in the file."""

from __future__ import annotations

import contextlib
import datetime
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from engine.data.run.stored_plan import read_run
from engine.data.stores.opening import open_store
from engine.errors import JobError, first_line
from engine.job.parsing import MAX_KEYS, apply_overrides, list_limit, parse_job
from engine.job.spec import JobSpec
from engine.models.custom_methods import custom_methods
from engine.models.factories import add_import_folders
from engine.models.factory_cache import kept_import_folders
from engine.models.factory_folders import runs_code
from engine.terminal import redacted

MAX_JOB_BYTES = 16 * 2**20
# Values of a job with its aliases expanded, and digits of a number; no real job has more.
MAX_JOB_VALUES = 10**6
MAX_DIGITS = 300
MAX_SHOWN = 100
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


def read_job(
    path: Path, overrides: list[tuple[str, Any]], *, continues: bool = True, date: datetime.date | None = None
) -> JobSpec:
    """Read and validate a job file. The date is filled in if the job requests it (`dated`).

    Args:
        overrides: dotted paths and the values to set there.
        continues: whether a run in the output is continued, with the dates that it started with.
        date: of the night; today, in local time, where not given.

    Raises:
        JobError: the file cannot be read, is not YAML (with line and column), is no valid job, or has no use for a
            date that is given.

    Side effects: if a model or a method is a factory, adds the working folder and the folder of the file to
        `sys.path`.
    """
    raw = read_raw(path, overrides)
    job = parse_job(raw)
    if date is not None and not _is_dated(job):
        raise JobError(
            f"--date {date}: nothing in the job depends on the date: no {{date}} in output.uri, and no request with"
            " fresh: true; omit it, or add one of them"
        )
    # A date that was given is that of all: a run of another one in the output is then refused.
    job = dated(job, date or datetime.date.today(), continues=continues and date is None)
    let_import(job, Path.cwd(), path.parent)
    return job


def read_raw(path: Path, overrides: list[tuple[str, Any]]) -> Any:
    """The content of a job file with overrides, which is not checked yet.

    Raises:
        JobError: the file cannot be read, is not YAML (with line and column), is empty, or contains a password.
    """
    raw = _parse(path, _text(path))
    if raw is None:
        raise JobError(f"{path}: is empty; `riskforge schema` prints the schema of a job")
    if isinstance(raw, dict):
        raw = apply_overrides(raw, overrides)
    if problems := credential_problems(raw, ""):
        raise JobError(problems)
    return raw


def beside(path: Path, given: str) -> Path:
    """The path of a job file that a study's file names: from the working folder, or from the folder of that file."""
    own = Path(given).expanduser()
    return own if own.is_file() or own.is_absolute() else path.parent / own


def read_label_maps(path: Path, option: str) -> dict[str, dict[str, str | None]]:
    """Label maps by address, from a file in YAML or JSON with the content of a job's `models.label_map`.

    Args:
        option: that gave the file, for messages.

    Raises:
        JobError: it cannot be read, or has something else.
    """
    from engine.job.label_maps import checked_entries

    raw = _parse(path, _text(path))
    if not isinstance(raw, dict) or not all(isinstance(address, str) for address in raw):
        raise JobError(
            f"{option}: {path}: is not a mapping of addresses to label maps, such as {{models/net: {{cats: cat}}}}"
        )
    try:
        return {address: checked_entries(entries) for address, entries in raw.items()}
    except ValueError as error:
        raise JobError(f"{option}: {path}: a label map {error}") from None


def credential_problems(value: Any, where: str) -> list[str]:
    """Addresses with a password, anywhere in a job: it would be stored with the run and appear in its card."""
    if isinstance(value, dict):
        return [
            line for key, inner in value.items() for line in credential_problems(inner, f"{where}.{key}".strip("."))
        ]
    if isinstance(value, list):
        return [line for key, inner in enumerate(value) for line in credential_problems(inner, f"{where}.{key}")]
    if not isinstance(value, str) or redacted(value) == value:
        return []
    return [
        f"{where}: '{redacted(value)}' contains a user name or password, and a job is stored with its run; leave it"
        " out, and pass credentials by the environment (docs/operations.md)"
    ]


def parse_date(text: str | None, option: str = "--date") -> datetime.date | None:
    """The date of an option; None where it is not given.

    Raises:
        JobError: it is not written as 2026-11-21, or not on the calendar.
    """
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text):
        raise JobError(f"{option} {_shortened(text)}: write it as YEAR-MONTH-DAY, such as 2026-11-21")
    try:
        return datetime.date.fromisoformat(text)
    except ValueError:
        raise JobError(f"{option} {text!r}: is not on the calendar; give a date such as 2026-11-21") from None


def _is_dated(job: JobSpec) -> bool:
    return "date" in _PLACEHOLDER.findall(job.output.uri) or any(request.fresh is True for request in job.requests)


def dated(job: JobSpec, today: datetime.date, *, continues: bool = True) -> JobSpec:
    """A job with `{date}` and `{job}` in its `output.uri` filled in, and with a date in place of `fresh: true`.

    Args:
        today: the date of the night.
        continues: whether a run in the output keeps its dates, so that it continues unchanged after midnight.

    Raises:
        JobError: an unknown placeholder in `output.uri`.
        OutputError: the output cannot be read.
    """
    known = {"date": today.isoformat(), "job": job.name}
    if unknown := [name for name in _PLACEHOLDER.findall(job.output.uri) if name not in known]:
        raise JobError(
            f"output.uri: '{job.output.uri}' has the unknown placeholder {{{unknown[0]}}}; use {{date}} or {{job}}"
        )
    uri = _PLACEHOLDER.sub(lambda match: known[match[1]], job.output.uri)
    job = job.model_copy(update={"output": job.output.model_copy(update={"uri": uri})})
    if not any(request.fresh is True for request in job.requests):
        return job
    earlier = read_run(open_store(uri)) if continues else None
    dates = (
        {} if earlier is None else {request["name"]: request.get("fresh") for request in earlier.identity["requests"]}
    )
    requests = tuple(
        request.model_copy(update={"fresh": dates.get(request.name) or today.isoformat()})
        if request.fresh is True
        else request
        for request in job.requests
    )
    return job.model_copy(update={"requests": requests})


def let_import(job: JobSpec, *folders: Path) -> None:
    """Make the factories among a job's models and methods importable from these folders.

    Side effects: adds the folders to `sys.path` if there is a factory.
    """
    models = job.models
    import_factories([*models.targets, *models.transfer, *models.all_oracles, *custom_methods(job)], *folders)


def let_import_of_run(run: str, job: JobSpec) -> None:
    """Make the factories of a run's job importable: from the working folder, and from where the run had them.

    Side effects: as `let_import`.
    """
    let_import(job, Path.cwd(), *folders_of_run(run))


def folders_of_run(run: str) -> list[Path]:
    """Where the factories of a run were imported from on this machine; empty where that is not known."""
    return kept_import_folders(open_store(run).uri)


def import_factories(addresses: Iterable[str | None], *folders: Path) -> None:
    """Make the factories among these addresses importable from these folders.

    Side effects: adds the folders to `sys.path` if there is a factory.
    """
    if any(runs_code(address) for address in addresses if address):
        add_import_folders(str(folder.resolve()) for folder in folders)


@contextlib.contextmanager
def quoting_comments(path: Path) -> Iterator[None]:
    """Add what a job file says in a comment next to an address to the problem that nothing is there.

    So that whoever shares a job without its images can say how to get them.
    """
    try:
        yield
    except JobError as error:
        problems = [f"{problem}{_comment(path, problem)}" for problem in error.problems]
        if problems == error.problems:
            raise
        raise JobError(problems) from None


def _comment(path: Path, problem: str) -> str:
    """The comment on the line of the missing address in a problem; empty without."""
    if missing := re.search(r"there is no '([^']+)'", problem):
        found = re.search(rf"{re.escape(missing[1])}[^#\n]*\s#\s*(.*\S)", _text(path))
        return f"; {path} says: {found[1]}" if found else ""
    return ""


def parse_override(text: str) -> tuple[str, Any]:
    """Parse `K=V` of the command line; the value is YAML.

    Raises:
        JobError: no `=`, no key, or a value that is not YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise JobError(f"--set {_shortened(text)}: write it as KEY=VALUE, e.g. requests.0.count=6")
    return key, parse_value(value, f"--set {key}")


def parse_value(text: str, where: str) -> Any:
    """A value of the command line, in YAML.

    Args:
        where: the option and key that it is of, for messages.

    Raises:
        JobError: it is not YAML.
    """
    try:
        return _bounded(yaml.load(text, Loader=StrictLoader))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise JobError(f"{where}: {_shortened(text)} is not a YAML value ({_problem(error)})") from None


def _shortened(text: str) -> str:
    text = redacted(text)
    return repr(text) if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]!r}..."


class StrictLoader(yaml.SafeLoader):
    """Strict YAML: a duplicate key is an error, and so is a value that does not fit its tag.

    Lists and mappings are counted while they are read, so an oversized one is not read to its end.
    """

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        # The keys above the node that is being read; None for an entry of a list.
        self._below: list[str | None] = []

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node, if its list or mapping is below its limit."""
        if isinstance(parent, yaml.CollectionNode) and len(parent.value) >= self._limit(parent):
            kind = "entries" if isinstance(parent, yaml.SequenceNode) else "keys"
            text = f"'{self._nearest_key()}' has more than {self._limit(parent)} {kind}; give fewer"
            raise yaml.constructor.ConstructorError(None, None, text, parent.start_mark)
        self._below.append(getattr(index, "value", None) if isinstance(index, yaml.ScalarNode) else None)
        node = super().compose_node(parent, index)
        self._below.pop()
        return node

    def _limit(self, parent: yaml.CollectionNode) -> int:
        return list_limit(self._below[-1]) if isinstance(parent, yaml.SequenceNode) else MAX_KEYS

    def _nearest_key(self) -> str:
        return next((key for key in reversed(self._below) if key), "the job")

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The value of a node; an exception of PyYAML becomes an error with line and column."""
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception as error:
            kind, reason = node.tag.rpartition(":")[2], str(error).partition(";")[0] or type(error).__name__
            text = f"cannot be read as {kind} ({reason})"
            raise yaml.constructor.ConstructorError(None, None, text, node.start_mark) from None


def _mapping(loader: StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        if key.value in seen and isinstance(key, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, f"duplicate key '{key.value}'", key.start_mark)
        seen.add(str(key.value))
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _bounded(value: Any) -> Any:
    """Check a value from YAML: aliases can make values that contain themselves, or that grow exponentially.

    Raises:
        ValueError: it does, or it has a number with too many digits.
    """
    _num_values(value, {}, set())
    return value


def _num_values(value: Any, known: dict[int, int], inside: set[int]) -> int:
    """Number of values in a value with its aliases expanded."""
    if isinstance(value, int) and value.bit_length() > 4 * MAX_DIGITS:
        raise ValueError(f"a number has more than {MAX_DIGITS} digits")
    if not isinstance(value, dict | list | tuple | set):
        return 1
    if id(value) in inside:
        raise ValueError("an alias is inside the value that it refers to")
    if id(value) not in known:
        inside.add(id(value))
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_num_values(part, known, inside) for part in parts)
        inside.discard(id(value))
    if known[id(value)] > MAX_JOB_VALUES:
        raise ValueError(f"it has more than {MAX_JOB_VALUES} values with its aliases expanded")
    return known[id(value)]


def _text(path: Path) -> str:
    try:
        # Devices report no size, and some have no end.
        with path.open("rb") as file:
            data = file.read(MAX_JOB_BYTES + 1)
        if len(data) > MAX_JOB_BYTES:
            raise JobError(f"{path}: is larger than {MAX_JOB_BYTES // 2**20} MB; is it a job file?")
        return data.decode("utf-8-sig")
    except FileNotFoundError:
        raise JobError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise JobError(f"{path}: is a folder; give a job file in YAML") from None
    except UnicodeDecodeError:
        raise JobError(f"{path}: is not text in UTF-8; give a job file in YAML") from None
    except OSError as error:
        raise JobError(f"{path}: cannot be read ({error.strerror})") from None


def _parse(path: Path, text: str) -> Any:
    try:
        return _bounded(yaml.load(text, Loader=StrictLoader))
    except yaml.reader.ReaderError:
        raise JobError(f"{path}: contains characters that are not allowed in text; give a job file in YAML") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise JobError(f"{path}: {where}{_problem(error)}") from None
    except (RecursionError, ValueError, TypeError) as error:
        raise JobError(f"{path}: is not usable YAML ({_problem(error)})") from None


def _problem(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, yaml.MarkedYAMLError):
        return str(error.problem or error.context)
    return first_line(error)
