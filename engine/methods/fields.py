"""Base class and field types of job files. No torch: jobs are checked before it is imported."""

from __future__ import annotations

import json
from typing import Annotated, Any

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from engine.methods.strict_json import parse_json

# Depth of a value of the user's own, which a stored plan has some levels down.
MAX_VALUE_DEPTH = 40

Context = Annotated[str, Field(max_length=400)]
Number = Annotated[float, Field(strict=True)]
Identifier = Annotated[str, Field(pattern=r"^[^\W\d]\w*$", max_length=100)]


def _storable(value: Any) -> Any:
    """A plain value that JSON in UTF-8 can hold and all readers parse alike, as jobs are stored in it."""
    try:
        parse_json(json.dumps(value, ensure_ascii=False).encode(), MAX_VALUE_DEPTH)
    except UnicodeEncodeError:
        raise ValueError("it has a lone surrogate, which UTF-8 cannot encode") from None
    return value


# Any JSON value: a job must be stored as it was read.
Plain = Annotated[pydantic.JsonValue, pydantic.AfterValidator(_storable)]
Text = Annotated[str, Field(min_length=1), pydantic.AfterValidator(_storable)]
Plains = dict[Annotated[str, pydantic.AfterValidator(_storable)], Plain]


class Spec(BaseModel):
    """Frozen; refuses unknown keys and numbers that are not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
