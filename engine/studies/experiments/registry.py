"""The studies that share `engine.studies.experiments`, by name; as addresses, so that none is imported unused."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.studies.experiments.spec import StudySpec


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRecord:
    """A study.

    Attributes:
        spec: its fields, a subclass of `StudySpec`.
        check: `(spec, job) -> str`: checks what files can tell, and says in a line what will be made.
        program: `(spec, job, context) -> StudyOutcome`.
        growing: fields that a study may be continued with larger values of; its runs extend.
    """

    kind: str
    spec: str
    check: str
    program: str
    growing: tuple[str, ...] = ("count",)

    def load(self, part: str) -> Any:
        """The object that `spec`, `check` or `program` names."""
        module, _, name = getattr(self, part).partition(":")
        return getattr(importlib.import_module(module), name)

    def spec_class(self) -> type[StudySpec]:
        """The class of its fields."""
        loaded: type[StudySpec] = self.load("spec")
        return loaded


def _record(kind: str, **options: Any) -> StudyRecord:
    home = f"engine.studies.{kind}"
    return StudyRecord(
        kind=kind,
        spec=f"{home}.spec:{kind.capitalize()}Spec",
        check=f"{home}.program:check_{kind}",
        program=f"{home}.program:{kind}",
        **options,
    )


STUDIES = {kind: _record(kind) for kind in ("sweep", "transfer", "ablate")}
STUDIES["rounds"] = _record("rounds", growing=("count", "rounds", "seeds"))
