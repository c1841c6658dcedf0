"""Job files: YAML to a checked job, with messages that say where the file is wrong."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from engine.dataset.state import read_run
from engine.dataset.store import open_store
from engine.errors import JobError
from engine.models.targets import add_import_folders, factories
from engine.spec import JobSpec, apply_overrides, parse_job

MAX_JOB_BYTES = 16 * 2**20
_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


def read_job(path: Path, overrides: list[tuple[str, Any]], *, continues: bool = True) -> JobSpec:
    """Read and check a job file. Today's date is filled in where the job asks for it (`dated`).

    Args:
        overrides: dotted paths and values that replace what the file has.
        continues: whether a run that the output holds goes on, with the dates that it began with.

    Raises:
        JobError: the file cannot be read or is not YAML (with line and column), or the job is wrong.

    Side effects: where a model is a factory, it can be imported from the working folder and the folder of the file.
    """
    raw = _parse(path, _text(path))
    if raw is None:
        raise JobError(f"{path}: is empty; `riskforge schema` shows what a job has")
    if isinstance(raw, dict):
        raw = apply_overrides(raw, overrides)
    job = dated(parse_job(raw), datetime.date.today(), continues=continues)
    let_import(job, Path.cwd(), path.parent)
    return job


def dated(job: JobSpec, today: datetime.date, *, continues: bool = True) -> JobSpec:
    """A job with `{date}` and `{job}` of its `output.uri` filled in, and with a date where a request is `fresh: true`.

    Args:
        today: in local time.
        continues: whether a run that the output holds keeps its dates, so that it goes on after midnight as it began.

    Raises:
        JobError: another placeholder in `output.uri`.
        OutputError: the output cannot be looked into.
    """
    known = {"date": today.isoformat(), "job": job.name}
    if unknown := [name for name in _PLACEHOLDER.findall(job.output.uri) if name not in known]:
        raise JobError(
            f"output.uri: '{job.output.uri}' has the unknown placeholder {{{unknown[0]}}}; there are {{date}} and"
            " {job}"
        )
    uri = _PLACEHOLDER.sub(lambda found: known[found[1]], job.output.uri)
    job = job.model_copy(update={"output": job.output.model_copy(update={"uri": uri})})
    if not any(request.fresh is True for request in job.requests):
        return job
    held = read_run(open_store(uri)) if continues else None
    begun = {} if held is None else {one["name"]: one.get("fresh") for one in held.identity["requests"]}
    requests = tuple(
        request.model_copy(update={"fresh": begun.get(request.name) or today.isoformat()})
        if request.fresh is True
        else request
        for request in job.requests
    )
    return job.model_copy(update={"requests": requests})


def let_import(job: JobSpec, *folders: Path) -> None:
    """Where a model of a job is a factory, let it be imported from some folders.

    Side effects: adds them to `sys.path`.
    """
    import_factories([job.models.target, *job.models.transfer, job.models.oracle], *folders)


def import_factories(addresses: Iterable[str | None], *folders: Path) -> None:
    """Where one of the addresses is a factory, let it be imported from some folders.

    Side effects: adds them to `sys.path`.
    """
    if any(factories(addresses)):
        add_import_folders(str(folder.resolve()) for folder in folders)


def parse_override(text: str) -> tuple[str, Any]:
    """Split `K=V` of the command line; the value is read as YAML.

    Raises:
        JobError: no `=`, no key, or a value that is not YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise JobError(f"--set {text}: write it as KEY=VALUE, such as requests.0.count=6")
    try:
        return key, yaml.load(value, Loader=StrictLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise JobError(f"--set {key}: {value!r} is not a YAML value ({_problem(error)})") from None


class StrictLoader(yaml.SafeLoader):
    """YAML without silent surprises: a key that stands twice is an error."""


def _mapping(loader: StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        if key.value in seen and isinstance(key, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' stands here twice", key.start_mark)
        seen.add(str(key.value))
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _text(path: Path) -> str:
    try:
        if path.is_file() and path.stat().st_size > MAX_JOB_BYTES:
            raise JobError(f"{path}: is larger than {MAX_JOB_BYTES // 2**20} MB; is it a job file?")
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise JobError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise JobError(f"{path}: is a folder; give a job file in YAML") from None
    except UnicodeDecodeError:
        raise JobError(f"{path}: is not text in UTF-8; give a job file in YAML") from None
    except OSError as error:
        raise JobError(f"{path}: cannot be read ({error.strerror})") from None


def _parse(path: Path, text: str) -> Any:
    try:
        return yaml.load(text, Loader=StrictLoader)
    except yaml.reader.ReaderError:
        raise JobError(f"{path}: holds characters that no text has; give a job file in YAML") from None
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
    return str(error).splitlines()[0]
