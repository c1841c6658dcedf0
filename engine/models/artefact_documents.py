"""The JSON documents of artefacts of `riskforge prepare`, with a schema version and a digest of all else in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.errors import MAX_REASON_CHARS, JobError
from engine.job.json_values import digest_of
from engine.methods.strict_json import parse_json
from engine.models.untrusted_files import MAX_DOCUMENT_BYTES, read_whole

SCHEMA_VERSION = 1
REMEDY = "make it again with `riskforge prepare`"


def sealed(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a document with schema version and digest."""
    content = {"schema_version": SCHEMA_VERSION, **fields}
    return {"digest": digest_of(content), **content}


def document_bytes(fields: dict[str, Any]) -> bytes:
    """A document as it is stored."""
    return (json.dumps(fields, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def kind_of(name: str) -> str:
    """The kind of artefact that has a document of this name: `conditioning` or `calibration`."""
    return name.removesuffix(".json")


def read_document(folder: Path, name: str) -> dict[str, Any]:
    """The document of an artefact, checked against its digest.

    Raises:
        JobError: there is none, it is of something else or of another version, or it does not match its digest.
    """
    try:
        fields = parse_json(read_whole(folder / name, MAX_DOCUMENT_BYTES))
    except OSError as error:
        raise unreadable(folder, name, error) from None
    except ValueError as error:
        raise JobError(f"'{folder}': {name} is not JSON ({str(error)[:MAX_REASON_CHARS]}); {REMEDY}") from None
    if not isinstance(fields, dict) or "schema_version" not in fields:
        raise JobError(f"'{folder}': {name} is not of a {kind_of(name)} artefact; {REMEDY}")
    if fields["schema_version"] != SCHEMA_VERSION:
        version = str(fields["schema_version"])[:MAX_REASON_CHARS]
        raise JobError(f"'{folder}': has schema version {version}, this version reads {SCHEMA_VERSION}; {REMEDY}")
    content = {key: value for key, value in fields.items() if key != "digest"}
    if fields.get("digest") != digest_of(content):
        raise JobError(f"'{folder}': {name} is not what it was (digest); {REMEDY}")
    return fields


def unreadable(folder: Path, name: str, error: OSError) -> JobError:
    """The error for an artefact of which a file cannot be read."""
    return JobError(f"'{folder}' is not a {kind_of(name)} artefact ({error.strerror or f'a file {error}'}); {REMEDY}")


def malformed(folder: Path, error: Exception) -> JobError:
    """The error for an artefact whose document has other fields than this version writes."""
    return JobError(f"'{folder}': is not laid out as this version does ({str(error)[:MAX_REASON_CHARS]}); {REMEDY}")
