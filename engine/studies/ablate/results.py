"""The results of an ablation by arm, and how its arms differ."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from engine.studies.ablate.arms import Arm, Design, Group
from engine.studies.ablate.artefacts import Predictor
from engine.studies.ablate.measures import ERRORS, VALID, Measure, Samples, adjusted, differences
from engine.studies.ablate.parts import NOTHING, WHOLE
from engine.studies.compare.significance import Difference

ALPHA = 0.05


@dataclass(frozen=True, eq=False, kw_only=True)
class Results:
    """The samples of all arms, and how they differ.

    Attributes:
        samples: by name of the arm.
        predictors: from the best one to chance.
    """

    design: Design
    samples: dict[str, Samples]
    predictors: tuple[Predictor, ...]

    @property
    def main(self) -> Measure:
        """What parts are judged by: valid failures, or errors where no oracle says what is valid."""
        return ERRORS if self.samples[WHOLE].valid is None else VALID

    @cached_property
    def changes(self) -> dict[str, dict[str, Difference]]:
        """Differences of each arm to its reference, by measure: parts to the whole, the others to the first of them."""
        return {
            arm.name: differences(self.samples[reference.name], self.samples[arm.name])
            for reference, arm in self._compared()
        }

    @cached_property
    def p_values(self) -> dict[str, dict[str, float]]:
        """P values of these differences, adjusted by Holm over the arms of one question; none of the prompt alone."""
        questions: dict[tuple[Group, bool], list[str]] = {}
        for _, arm in self._compared():
            if arm.name != NOTHING:
                question = (arm.group, arm.group == "parts" or arm.is_guided)
                questions.setdefault(question, []).append(arm.name)
        families = [adjusted({name: self.changes[name] for name in names}) for names in questions.values()]
        return {name: p_values for family in families for name, p_values in family.items()}

    @property
    def has_changed_parts(self) -> bool:
        """Whether a part was taken away, and enough samples have pairs to say what that does."""
        return any(arm.part and self.changes[arm.name] for arm in self.design.of("parts"))

    def _compared(self) -> Iterable[tuple[Arm, Arm]]:
        """Each arm with the one that it is compared to."""
        for arm in self.design.arms:
            first = next(one for one in self.design.of(arm.group) if _is_like(one, arm))
            if arm.name != first.name:
                yield first, arm

    def is_shown(self, name: str, measure: Measure) -> bool:
        """Whether a difference is significant after Holm."""
        return self.p_values.get(name, {}).get(measure.name, 1.0) < ALPHA


def _is_like(one: Arm, other: Arm) -> bool:
    return other.group == "parts" or one.is_guided == other.is_guided
