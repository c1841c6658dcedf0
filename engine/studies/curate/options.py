"""Options of `riskforge curate`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from engine.errors import JobError
from engine.methods.curation.defences import RemovalOptions
from engine.methods.curation.learning import LearnOptions, ModelKind
from engine.studies.curate.selection import SelectionOptions, check_options

DEFENCES = ("none", "influence", "group")
DEFAULT_MODEL: ModelKind = "linear"


@dataclass(frozen=True, slots=True, kw_only=True)
class CurateOptions:
    """What to select by, and how.

    Attributes:
        preferences: file of preference records, which a reward is learned from.
        reward: `class-index`, a column of the records, or `package.module:function`; instead of preferences.
        model: of a learned reward; None for the default.
        trusted: file of preference records of trusted raters.
        after: earlier curated run whose monitor is continued.
        on_alarm: `stop` or `continue`.
        defence: one of `DEFENCES`.
        defends_at_alarm: whether the defence waits for an alarm of the monitor.
        level: share of honest series of runs in which the monitor may raise an alarm.
        removal: at most how many records a defence removes.
        selection: groups, seed and scale.
    """

    preferences: str | None = None
    reward: str | None = None
    model: ModelKind | None = None
    trusted: str | None = None
    after: str | None = None
    on_alarm: str = "stop"
    defence: str = "none"
    defends_at_alarm: bool = False
    level: float = 0.05
    removal: RemovalOptions = field(default_factory=RemovalOptions)
    selection: SelectionOptions = field(default_factory=SelectionOptions)

    @property
    def learning(self) -> LearnOptions:
        """How the reward is learned."""
        return LearnOptions(model=self.model or DEFAULT_MODEL, seed=self.selection.seed)

    def check(self) -> None:
        """Check what the options alone can tell.

        Raises:
            JobError: all problems, a line each.
        """
        check_options(self.selection)
        if problems := [*self._source_problems(), *self._dependence_problems()]:
            raise JobError(problems)

    def _source_problems(self) -> list[str]:
        if self.preferences is not None and self.reward is not None:
            return ["--preferences, --reward: a run is curated by one of them; leave the other out"]
        if self.preferences is None and self.reward is None:
            return [
                "--preferences: nothing says what to select by; give a file of preference records, or --reward NAME,"
                " such as `--reward conformity`"
            ]
        return []

    def _dependence_problems(self) -> list[str]:
        problems = []
        if self.preferences is None:
            given = {"--model": self.model, "--trusted": self.trusted}
            problems += [
                f"{option}: applies to --preferences alone, from which a reward is learned; leave it out"
                for option, value in given.items()
                if value is not None
            ]
        if self.trusted is None and self.after is not None:
            problems.append("--after: continues a monitor, which needs trusted choices; give --trusted FILE too")
        if self.trusted is None and self.defence != "none":
            problems.append(
                f"--defence: {self.defence} compares records with trusted choices; give --trusted FILE too, or leave it"
                " out"
            )
        return problems

    def identity(self) -> dict[str, Any]:
        """The options that decide a learned reward, for its digest."""
        return {
            "learning": dataclasses.asdict(self.learning),
            "defence": self.defence,
            "removal": dataclasses.asdict(self.removal) if self.defence != "none" else None,
        }
