"""Base class and field types of what a job file may hold. No torch: jobs are checked before it is imported."""

from __future__ import annotations

import json
from typing import Annotated, Any

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from engine.methods.strict_json import parse_json

# Of a value of the user's own; in a stored plan it stands some levels down.
MAX_VALUE_DEPTH = 40

Context = Annotated[str, Field(max_length=400)]
Number = Annotated[float, Field(strict=True)]
Identifier = Annotated[str, Field(pattern=r"^[^\W\d]\w*$", max_length=100)]


def _storable(value: Any) -> Any:
    """A plain value, if JSON in UTF-8 holds it as every reader understands it: a job is stored as such."""
    try:
        parse_json(json.dumps(value, ensure_ascii=False).encode(), MAX_VALUE_DEPTH)
    except UnicodeEncodeError:
        raise ValueError("it holds half a character, which no text in UTF-8 has") from None
    return value


# Whatever JSON has: what a job is read with must be what it is stored with.
Plain = Annotated[pydantic.JsonValue, pydantic.AfterValidator(_storable)]
Plains = dict[Annotated[str, pydantic.AfterValidator(_storable)], Plain]


class Spec(BaseModel):
    """Frozen; refuses unknown keys and numbers that are not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
