"""Documents that commands keep in a run beside its samples, such as an evaluation: read as far as a model of them."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ValidationError

from engine.data.stores.base import Store
from engine.errors import MAX_REASON_CHARS, CorruptShardError
from engine.methods.strict_json import parse_json

D = TypeVar("D", bound=BaseModel)


def read_kept(store: Store, name: str, model: type[D], what: str, remedy: str) -> D | None:
    """A document of a run, or None where it has none.

    Args:
        what: the document is, with its article, for messages.
        remedy: the command that makes it again.

    Raises:
        CorruptShardError: it cannot be read as `model`.
        OutputError: the store refuses.
    """
    if not store.exists(name):
        return None
    data = store.read(name)
    try:
        # Stricter than pydantic: no name twice, no depth without end.
        parse_json(data)
        return model.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))[:80]}: {first['msg']}"
    except ValueError as error:
        reason = str(error)
    raise CorruptShardError(
        f"{store.address(name)}: cannot be read as {what} ({reason[:MAX_REASON_CHARS]}); remove it, or run `{remedy}`"
        " again"
    )
