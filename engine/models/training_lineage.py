"""What a pipeline's folder says of its own training: the run that it was fine-tuned on, and the model before.

`training.json` is written by the engine's fine-tuning of generators. Others may have files of that name: what is JSON
and does not state `"training": "generator"` says nothing here. The file decides no sample; it is read as anything from
outside is, and one that is damaged is reported where models are described.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from engine.errors import JobError, first_line
from engine.methods.strict_json import parse_json
from engine.models.addresses import locate
from engine.models.untrusted_files import MAX_RECORD_BYTES, read_whole

TRAINING_DOCUMENT = "training.json"
# Of the value of `training` in the documents of generators.
GENERATOR = "generator"
PROBLEM = "problem"
MAX_FIELD_CHARS = 1000
_RUN_FIELDS = ("uri", "name", "plan_digest", "shards_digest")
_MODEL_FIELDS = ("address", "digest")


def training_of(address: str) -> dict[str, Any] | None:
    """The run and the model that a pipeline was fine-tuned from, by its own folder.

    Returns:
        `{"parent_run": {"uri", "name", "plan_digest", "shards_digest"}, "parent_model": {"address", "digest"}}`, as far
        as the file has them; `{"problem": reason}` where it is damaged; None where there is none.
    """
    with suppress(JobError, OSError):
        folder = locate(address).folder
        if folder is not None:
            return _read(folder / TRAINING_DOCUMENT)
    return None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        document = parse_json(read_whole(path, MAX_RECORD_BYTES))
        if not isinstance(document, dict) or document.get("training") != GENERATOR:
            return None
        return {
            "parent_run": _part(document, "parent_run", _RUN_FIELDS, "plan_digest"),
            "parent_model": _part(document, "parent_model", _MODEL_FIELDS, "digest"),
        }
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        return {PROBLEM: f"{TRAINING_DOCUMENT} cannot be read ({first_line(error)[:MAX_FIELD_CHARS]})"}


def _part(document: dict[str, Any], name: str, fields: tuple[str, ...], needed: str) -> dict[str, str]:
    """The known fields of a part of the document.

    Raises:
        ValueError: it lacks the digest, or a field is no text, or too long.
    """
    part = document.get(name)
    if not isinstance(part, dict) or needed not in part:
        raise ValueError(f"{name}.{needed} is missing")
    known = {field: part[field] for field in fields if field in part}
    for field, value in known.items():
        if not isinstance(value, str) or len(value) > MAX_FIELD_CHARS:
            raise ValueError(f"{name}.{field} is not a text of at most {MAX_FIELD_CHARS} characters")
    return known


def training_text(trained_on: Any) -> str:
    """A model's `trained_on` in words; empty where it has none. Holds texts of others: escape it.

    Raises:
        ValueError: it is of another kind than `training_of` gives.
    """
    if trained_on is None:
        return ""
    if not isinstance(trained_on, dict):
        raise ValueError("trained_on is not that of a model")
    if PROBLEM in trained_on:
        return f"trained on an unknown run: {trained_on[PROBLEM]}"
    run = _part(trained_on, "parent_run", _RUN_FIELDS, "plan_digest")
    model = _part(trained_on, "parent_model", _MODEL_FIELDS, "digest")
    where = ", ".join(run[name] for name in ("uri", "name") if run.get(name))
    return (
        f"fine-tuned on the run {where + ', ' if where else ''}plan {run['plan_digest']}, from"
        f" {model.get('address') or 'a model'} with digest {model['digest']}"
    )
