"""Several oracles in a job file, `models.oracles: [A, B]`, and the conditions of `accept` that need one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from engine.job.spec import ModelsSpec
from engine.job.spec_messages import Location, Problem, shown

_ORACLES: Location = ("models", "oracles")


def has_oracle(models: Any) -> bool:
    """Whether the raw models of a job name an oracle, be they right or wrong otherwise."""
    return isinstance(models, dict) and bool(models.get("oracle") or models.get("oracles"))


def oracle_fields(models: ModelsSpec) -> Iterator[tuple[str, str]]:
    """Field of the job file and address of every oracle."""
    if models.oracle:
        yield "models.oracle", models.oracle
    for place, address in enumerate(models.oracles):
        yield f"models.oracles.{place}", address


def oracle_problems(raw: dict[str, Any]) -> list[Problem]:
    """Oracles that are named in both fields, or twice."""
    models = raw.get("models")
    listed = models.get("oracles") if isinstance(models, dict) else None
    if not isinstance(models, dict) or not isinstance(listed, list | tuple) or not listed:
        return []
    if models.get("oracle"):
        return [(_ORACLES, "is a list, and oracle is there too; name all of them in the list")]
    return [
        ((*_ORACLES, place), f"{shown(oracle)} is there twice; name each oracle once")
        for place, oracle in enumerate(listed)
        if isinstance(oracle, str) and oracle in listed[:place]
    ]
