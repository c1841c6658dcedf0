"""The arms of a retraining and the ways of keeping what a target could, as records; free of torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.errors import JobError
from engine.job.spec_messages import nearest

# The target as it is; fine-tuned on real samples alone; and with generated ones.
BEFORE, NONE, PLAIN, UNFILTERED, ACCEPTED = "before", "none", "plain", "unfiltered", "accepted"
ENTROPY, AUGMENT, PGD = "entropy", "augment", "pgd"


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmRecord:
    """One way of fine-tuning.

    Attributes:
        name: as in `--arm`.
        summary: in a line.
        samples: the pool of generated samples that it draws from, a name of `engine.studies.retrain.arms`; empty for
            real images alone.
        images: what is done to the real images of a batch: nothing (empty), `augment` or `pgd`.
        aliases: other names that are understood.
    """

    name: str
    summary: str
    samples: str = ""
    images: str = ""
    aliases: tuple[str, ...] = ()


ARMS = {
    record.name: record
    for record in (
        ArmRecord(name=NONE, summary="real images alone"),
        ArmRecord(name=PLAIN, summary="samples of the plain requests", samples=PLAIN),
        ArmRecord(
            name=UNFILTERED,
            summary="a random draw from all stored samples of the risky requests, whatever their rule says",
            samples=UNFILTERED,
            aliases=("random",),
        ),
        ArmRecord(name=ACCEPTED, summary="accepted samples of the risky requests", samples=ACCEPTED),
        ArmRecord(
            name=ENTROPY,
            summary="of all stored samples of the risky requests those on which the target's prediction has the highest"
            " entropy (deliberate practice, Askari-Hemmat et al. 2025)",
            samples=ENTROPY,
        ),
        ArmRecord(
            name=AUGMENT,
            summary="real images alone, shifted and mixed with one another (mixup, Zhang et al. 2018)",
            images=AUGMENT,
        ),
        ArmRecord(
            name=PGD,
            summary="real images alone, attacked at every step (adversarial training, Madry et al. 2018)",
            images=PGD,
        ),
    )
}
MAX_DIGITS = 10
DEFAULT_ARMS = (NONE, PLAIN, UNFILTERED, ACCEPTED)

PROTECT_NOTHING, DISTILL, AVERAGE, ARITHMETIC = "none", "distill", "average", "arithmetic"
PROTECTIONS = (PROTECT_NOTHING, DISTILL, AVERAGE, ARITHMETIC)
# Chosen on validation scans of digits (`docs/results.md`).
DEFAULT_STRENGTHS = {PROTECT_NOTHING: 0.0, DISTILL: 10.0, AVERAGE: 0.5, ARITHMETIC: 0.5}
MAX_STRENGTHS = {DISTILL: 1000.0, AVERAGE: 1.0, ARITHMETIC: 2.0}


def find_arm(name: str, field: str = "--arm") -> ArmRecord:
    """The record of an arm by its name or another name of it.

    Raises:
        JobError: there is none.
    """
    named = ARMS | {alias: record for record in ARMS.values() for alias in record.aliases}
    if name not in named:
        raise JobError(f"{field}: there is no arm '{name}'{nearest(name, list(named))}; give one of {', '.join(ARMS)}")
    return named[name]


@dataclass(frozen=True, slots=True)
class ArmChoice:
    """An arm as it is asked for.

    Attributes:
        num_samples: None for as many as the other arms have.
    """

    record: ArmRecord
    num_samples: int | None = None

    @property
    def label(self) -> str:
        """Its name in tables: `accepted`, or `accepted:30`."""
        return self.record.name if self.num_samples is None else f"{self.record.name}:{self.num_samples}"


def parse_arm(text: str, field: str = "--arm") -> ArmChoice:
    """An arm by its name, and a number of generated samples behind a colon where it is to be another one.

    Raises:
        JobError: there is no such arm, or this is no number of samples.
    """
    name, colon, number = text.partition(":")
    record = find_arm(name, field)
    if not colon:
        return ArmChoice(record)
    if not record.samples:
        raise JobError(f"{field}: '{text}' asks for generated samples, and {record.name} has none; give {record.name}")
    if not (number.isascii() and number.isdecimal() and len(number) < MAX_DIGITS and int(number)):
        raise JobError(f"{field}: '{text}' names no number of samples behind the colon; give one, as {record.name}:100")
    return ArmChoice(record, int(number))


@dataclass(frozen=True, slots=True, kw_only=True)
class Protection:
    """How fine-tuning is kept from losing what the old network could.

    Attributes:
        kind: of `PROTECTIONS`. `distill` adds `strength` times the Kullback-Leibler divergence from the old network's
            prediction to the new one's on the real images of a batch (learning without forgetting, Li and Hoiem 2016).
            `average` takes weights `old + strength (new - old)` (WiSE-FT, Wortsman et al. 2022). `arithmetic` takes
            `old + strength (new - none)`, `none` being fine-tuned on the same real images alone, so that the drift of
            fine-tuning cancels (Robust Weight Signatures, Ge et al. 2023).
        strength: None for the default.
    """

    kind: str = PROTECT_NOTHING
    strength: float | None = None

    @property
    def used(self) -> float:
        """The strength that is used."""
        return DEFAULT_STRENGTHS[self.kind] if self.strength is None else self.strength

    def problems(self, field: str = "--protect", strength_field: str = "--protect-weight") -> list[str]:
        """What is wrong with the values, a line each.

        Args:
            field, strength_field: where the user gave them.
        """
        if self.kind not in PROTECTIONS:
            return [
                f"{field}: '{self.kind}' is none of {', '.join(PROTECTIONS)}{nearest(self.kind, list(PROTECTIONS))}"
            ]
        if self.strength is None:
            return []
        if self.kind == PROTECT_NOTHING:
            return [f"{strength_field}: {self.strength:g} has no meaning without {field}; give {field} too"]
        most = MAX_STRENGTHS[self.kind]
        if not (math.isfinite(self.strength) and 0 < self.strength <= most):
            default = DEFAULT_STRENGTHS[self.kind]
            return [f"{strength_field}: {self.strength:g} is not above 0 and up to {most:g}; give one, as {default:g}"]
        return []
