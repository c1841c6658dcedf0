"""Results in words: goals met and missed, a Markdown table, progress."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from bench.arms import DIVIDED, PLAIN, PROMPT
from bench.checks import Check
from bench.flops import Arithmetic
from bench.measure import Measured

# Guidance that is judged: what a job gets where it asks for nothing else, and the paper's step of RiskyDiff.
JUDGED = ("kldb-polyak", "risky-polyak", "risky-paper")
NAIVE_GOAL = {"cpu": 10.0, "cuda": 5.0}
COST_GOAL, FLOOR_GOAL, RATE_GOAL = 1.15, 1.15, 0.35
GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """A goal and what was reached.

    Attributes:
        at_most: whether less is better.
    """

    what: str
    value: float
    threshold: float
    at_most: bool = False

    @property
    def is_met(self) -> bool:
        """Whether it was reached."""
        return (operator.le if self.at_most else operator.ge)(self.value, self.threshold)

    def __str__(self) -> str:
        sign = "at most" if self.at_most else "at least"
        return f"{'met' if self.is_met else 'MISSED'}: {self.what} {self.value:.3g} (goal: {sign} {self.threshold:g})"


@dataclass(slots=True, kw_only=True)
class Results:
    """Everything that a run of the benchmark found.

    Attributes:
        about: size, hardware, versions, date, command.
        arithmetic: operations of a sample by family, and of the same behind the tiny autoencoder (`FAMILY/tiny`).
        rates: operations a second on a GPU: `bf16 matmul`, and the UNet of a family.
    """

    about: dict[str, Any]
    measured: list[Measured]
    checks: list[Check]
    arithmetic: dict[str, Arithmetic]
    rates: dict[str, float]

    def find(self, name: str) -> Measured | None:
        """A measured arm by its name."""
        return next((one for one in self.measured if one.arm.name == name and one.seconds), None)

    def ratio(self, one: Measured) -> float | None:
        """Seconds an image, in those of the prompt alone on the same runtime."""
        reference = self.find(one.arm.reference)
        return one.seconds_per_image / reference.seconds_per_image if reference else None

    def floor(self, one: Measured) -> float:
        """The least that the ratio could be if time went into arithmetic alone."""
        counted = self.arithmetic[one.arm.family + ("/tiny" if one.arm.tiny else "")]
        guidance, num_steps = one.arm.guidance, self.about["num_steps"][one.arm.family]
        if guidance is None:
            return 1.0
        is_risky = one.arm.family == "risky"
        every = guidance.get("every", 1 if is_risky else 5)
        num_guided = num_steps // every - (guidance.get("skip_last", True) and num_steps % every == 0)
        needs_two = guidance.get("conformity_floor") is not None
        work = counted.guided(
            num_steps,
            num_guided,
            through_unet=one.arm.is_through_unet,
            # A dial without a floor under conformity asks CLIP for nothing.
            uses_clip=is_risky and (needs_two or guidance["step"] == "paper"),
            num_criteria=2 if needs_two else 1,
        )
        return work / counted.prompt(num_steps)

    def goals(self) -> list[Goal]:
        """The goals that apply to this size and machine."""
        device, found = self.about["device"], list[Goal]()
        if self.about["size"] == "tiny":
            return found
        for family in PROMPT:
            plain, prompt = self.find(PLAIN[family]), self.find(PROMPT[family])
            if plain and prompt:
                faster = plain.seconds_per_image / prompt.seconds_per_image
                found.append(
                    Goal(what=f"{prompt.arm.name} against {plain.arm.name}, times", value=faster, threshold=1.0)
                )
        for one in self.measured:
            # The published loop is one process; the engine has its workers where it has cores.
            twin = None if one.arm.is_divided else self.find(f"{one.arm.twin}@{DIVIDED}") or self.find(one.arm.twin)
            if one.seconds and twin:
                faster = one.seconds_per_image / twin.seconds_per_image
                what = f"{twin.arm.name} against {one.arm.name}, times"
                found.append(Goal(what=what, value=faster, threshold=NAIVE_GOAL[device]))
        for one in self.measured:
            ratio = self.ratio(one) if one.seconds and one.arm.name.removesuffix(f"@{DIVIDED}") in JUDGED else None
            if ratio is not None and device == "cpu" and "risky-paper" not in one.arm.name:
                what = f"{one.arm.name} against the prompt alone, times"
                found.append(Goal(what=what, value=ratio, threshold=COST_GOAL, at_most=True))
            if ratio is not None and device == "cuda":
                what = f"{one.arm.name} against its arithmetic floor, times"
                found.append(Goal(what=what, value=ratio / self.floor(one), threshold=FLOOR_GOAL, at_most=True))
        found += [
            Goal(what=f"UNet of {name}, share of the bf16 rate", value=self.share(rate), threshold=RATE_GOAL)
            for name, rate in self.rates.items()
            if name != "bf16 matmul"
        ]
        return found

    def share(self, rate: float) -> float:
        """A rate as a share of the measured bf16 matrix rate."""
        return rate / self.rates["bf16 matmul"]

    def as_json(self) -> dict[str, Any]:
        """Everything, for a file."""
        measured = []
        for one in self.measured:
            derived = {"ratio_to_prompt": self.ratio(one), "floor": self.floor(one)} if one.seconds else {}
            measured.append(one.as_json() | derived)
        goals = [
            {"what": goal.what, "value": goal.value, "goal": goal.threshold, "met": goal.is_met}
            for goal in self.goals()
        ]
        checks = [{"what": one.what, "difference": one.difference, "holds": one.holds} for one in self.checks]
        counted = {
            name: {field: getattr(one, field) for field in one.__slots__} for name, one in self.arithmetic.items()
        }
        return self.about | {
            "arms": measured,
            "checks": checks,
            "goals": goals,
            "operations_per_sample": counted,
            "operations_per_second": self.rates,
        }

    def as_markdown(self) -> str:
        """A table of the arms, with goals, checks and what was skipped."""
        about = self.about
        heads: tuple[str, ...] = ("arm", "images", "batch", "images/s", "s/image, least (median)", "peak GiB")
        heads = (*heads, "KLDB", "risk", "of prompt-only", "floor", "of the floor")
        lines = [f"## {about['size']}: {about['hardware']}, {about['date']}", "", f"`{about['command']}`", ""]
        lines += [
            f"{about['threads']} threads; {', '.join(f'{name} {one}' for name, one in about['versions'].items())}.",
            "",
        ]
        lines += [_row(heads), _row(["---"] * len(heads))]
        lines += [_row(self._cells(one)) for one in self.measured if one.seconds]
        blocks = {
            "Goals": [str(goal) for goal in self.goals()],
            "The same samples": [f"{one.what}: {one.difference:.1e}, {_verdict(one)}" for one in self.checks],
            "Operations of a sample": [_counted(name, one) for name, one in self.arithmetic.items()],
            "Rates": [
                f"{name}: {rate / 1e12:.1f} TFLOP/s ({self.share(rate):.0%})" for name, rate in self.rates.items()
            ],
            "Where the time goes": [line for one in self.measured if one.profile for line in _profile(one)],
            "Skipped": self._skipped(),
        }
        for title, entries in blocks.items():
            lines += ["", f"**{title}**", "", *(f"- {entry}" for entry in entries)] if entries else []
        return "\n".join(lines) + "\n"

    def _skipped(self) -> list[str]:
        """A line for each reason, with the arms that it holds for."""
        by_reason: dict[str, list[str]] = {}
        for one in self.measured:
            if one.reason:
                by_reason.setdefault(one.reason, []).append(one.arm.name)
        return [f"{reason}: {', '.join(names)}" for reason, names in by_reason.items()]

    def _cells(self, one: Measured) -> list[str]:
        ratio, floor = self.ratio(one), self.floor(one)
        return [
            one.arm.name,
            str(one.num_samples),
            str(one.batch_size),
            f"{1 / one.seconds_per_image:.3g}",
            f"{one.seconds_per_image:.3g} ({one.median_seconds_per_image:.3g})",
            f"{one.peak_bytes / GIB:.2f}" if one.peak_bytes else "",
            "" if one.kldb is None else f"{one.kldb:.3g}",
            "" if one.risk is None else f"{one.risk:.3g}",
            "" if ratio is None else f"{ratio:.2f}",
            f"{floor:.2f}",
            "" if ratio is None else f"{floor / ratio:.0%}",
        ]


def _row(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def _verdict(check: Check) -> str:
    return "equal up to rounding" if check.holds else "DIFFERENT"


def _counted(name: str, counted: Arithmetic) -> str:
    parts = [f"{field.replace('_', ' ')} {getattr(counted, field) / 1e12:.4g}" for field in counted.__slots__]
    return f"{name}, TFLOP: {', '.join(parts)}"


def _profile(one: Measured) -> list[str]:
    shares = ", ".join(f"{kind} {share:.0%}" for kind, share in one.profile["shares"].items())
    top = ", ".join(f"`{entry['name'][:60]}` {entry['seconds']:.3g} s" for entry in one.profile["top"][:6])
    return [f"{one.arm.name}: {shares}", f"{one.arm.name}, costliest: {top}"]
