"""Results in words: goals met and missed, a Markdown table, progress."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.arms import DIVIDED, METHODS, PLAIN, PROMPT
from bench.checks import Check
from bench.measure import Measured
from engine.models.arithmetic import Arithmetic

# What guidance may cost on a CPU, in what the prompt alone costs: both presets.
COST_GOALS = {"kldb-polyak": 1.15, "risky-polyak": 1.15, "kldb-perceptible": 1.6, "risky-perceptible": 1.6}
# Guidance that is judged: the presets, and the paper's step of RiskyDiff.
JUDGED = (*COST_GOALS, "risky-paper")
NAIVE_GOAL = {"cpu": 10.0, "cuda": 5.0}
FLOOR_GOAL, RATE_GOAL = 1.15, 0.35
# Images a second of a data-centre GPU of the Hopper generation, the median of five batches: Stable Diffusion 1.x. The
# decoder's gradient in bfloat16 is asked for: random weights may fail the trial that trained ones are meant to pass.
SPEED_GOALS = (
    ("prompt", 4.7),
    ("prompt@compile-on", 7.1),
    ("kldb-polyak-unet-every-2nd@decoder-bf16", 1.5),
    ("risk-polyak@decoder-bf16", 1.0),
    ("kldb-polyak-unet-every-2nd@tiny", 3.0),
    ("risk-polyak@tiny", 2.5),
)
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
        notices: what the hardware made the engine do otherwise than it was asked to.
    """

    about: dict[str, Any]
    measured: list[Measured]
    checks: list[Check]
    arithmetic: dict[str, Arithmetic]
    rates: dict[str, float]
    notices: list[str] = field(default_factory=list)

    def find(self, name: str) -> Measured | None:
        """A measured arm by its name."""
        return next((one for one in self.measured if one.arm.name == name and one.seconds), None)

    def cost(self, one: Measured) -> float:
        """Seconds an image: of the processor on a CPU, which others' work disturbs less than the clock."""
        return one.cpu_seconds_per_image if self.about["device"] == "cpu" else one.seconds_per_image

    def ratio(self, one: Measured) -> float | None:
        """What an image costs, in what one of the prompt alone costs on the same runtime."""
        reference = self.find(one.arm.reference)
        return self.cost(one) / self.cost(reference) if reference else None

    def twins(self) -> list[tuple[Measured, Measured]]:
        """The published loops, each with the engine's arm for the same samples in as many processes."""
        pairs = [(one, self.find(one.arm.twin)) for one in self.measured if one.seconds and one.arm.twin]
        return [(published, twin) for published, twin in pairs if twin]

    def floor(self, one: Measured) -> float:
        """The least that the ratio could be if time went into arithmetic alone."""
        counted = self.arithmetic[one.arm.family + ("/tiny" if one.arm.tiny else "")]
        guidance, num_steps = one.arm.guidance, self.about["num_steps"][one.arm.family]
        if guidance is None:
            return 1.0
        is_risky = METHODS[one.arm.family] == "risky"
        guided, parameters = one.arm.guided_steps(num_steps), one.arm.parameters
        needs_two = guidance.get("conformity_floor") is not None
        work = counted.guided(
            num_steps,
            len(guided),
            num_through_unet=sum(parameters.is_through_unet(index, num_steps) for index in guided),
            # A dial without a floor under conformity asks CLIP for nothing.
            uses_clip=is_risky and (needs_two or guidance.get("step") == "paper"),
            num_criteria=2 if needs_two else 1,
        )
        return work / counted.prompt(num_steps)

    def goals(self) -> list[Goal]:
        """The goals that apply to this size and machine."""
        device, found = self.about["device"], list[Goal]()
        if self.about["size"] == "tiny":
            return found
        for family, name in PLAIN.items():
            plain, prompt = self.find(name), self.find(PROMPT[family])
            if plain and prompt:
                faster = self.cost(plain) / self.cost(prompt)
                found.append(
                    Goal(what=f"{prompt.arm.name} against {plain.arm.name}, times", value=faster, threshold=1.0)
                )
        for published, twin in self.twins():
            faster = self.cost(published) / self.cost(twin)
            what = f"{twin.arm.name} against {published.arm.name}, times"
            found.append(Goal(what=what, value=faster, threshold=NAIVE_GOAL[device]))
        for one in self.measured:
            name = one.arm.name.removesuffix(f"@{DIVIDED}")
            ratio = self.ratio(one) if one.seconds and name in JUDGED else None
            if ratio is not None and device == "cpu" and name in COST_GOALS:
                what = f"{one.arm.name} against the prompt alone, times"
                found.append(Goal(what=what, value=ratio, threshold=COST_GOALS[name], at_most=True))
            if ratio is not None and device == "cuda":
                what = f"{one.arm.name} against its arithmetic floor, times"
                found.append(Goal(what=what, value=ratio / self.floor(one), threshold=FLOOR_GOAL, at_most=True))
        found += [
            Goal(what=f"UNet of {name}, share of the bf16 rate", value=self.share(rate), threshold=RATE_GOAL)
            for name, rate in self.rates.items()
            if name != "bf16 matmul"
        ]
        return found + (self.speeds() if device == "cuda" and self.about["size"] == "sd1" else [])

    def speeds(self) -> list[Goal]:
        """Images a second of the arms for which there are goals."""
        timed = [(self.find(name), threshold) for name, threshold in SPEED_GOALS]
        return [
            Goal(what=f"{one.arm.name}, images/s", value=one.median_images_per_second, threshold=threshold)
            for one, threshold in timed
            if one
        ]

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
        checks = [dataclasses.asdict(check) | {"holds": check.holds} for check in self.checks]
        counted = {
            name: {field: getattr(one, field) for field in one.__slots__} for name, one in self.arithmetic.items()
        }
        return self.about | {
            "arms": measured,
            "checks": checks,
            "goals": goals,
            "operations_per_sample": counted,
            "operations_per_second": self.rates,
            "notices": self.notices,
        }

    def as_markdown(self) -> str:
        """Tables of the arms, with goals, checks and what was skipped."""
        about = self.about
        versions = ", ".join(f"{name} {one}" for name, one in about["versions"].items())
        lines = [f"{about['date']}, {about['hardware']}, {about['cores']} cores; {versions}.", ""]
        lines += ["```bash", about["command"], "```"]
        timed = [one for one in self.measured if one.seconds]
        alone, divided = ([one for one in timed if one.arm.is_divided == flag] for flag in (False, True))
        threads = f" of {about['threads']} thread{'s' * (about['threads'] != 1)}" if about["device"] == "cpu" else ""
        alone_title = f"One process{threads}"
        divided_title = f"The engine in {about['processes']} processes of one thread: not comparable with one process"
        lines += _table("Published loops and the engine, one process each", self._factors())
        lines += _table(alone_title, [self._cells(one) for one in alone])
        lines += _table(divided_title, [self._cells(one) for one in divided])
        blocks = {
            "Goals": [str(goal) for goal in self.goals()],
            "The same samples": [str(one) for one in self.checks],
            "Operations of a sample": [_counted(name, one) for name, one in self.arithmetic.items()],
            "Rates": [
                f"{name}: {rate / 1e12:.1f} TFLOP/s ({self.share(rate):.0%})" for name, rate in self.rates.items()
            ],
            "Where the time goes": [line for one in self.measured if one.profile for line in _profile(one)],
            "Notices of the engine": self.notices,
            "Skipped": self._skipped(),
        }
        for title, entries in blocks.items():
            lines += ["", f"**{title}**", "", *(f"- {entry}" for entry in entries)] if entries else []
        return "\n".join(lines) + "\n"

    def _factors(self) -> list[dict[str, str]]:
        """What a published loop costs, in what the engine costs for the same samples."""
        return [
            {
                "published loop": f"`{published.arm.name}`",
                "its s/image": f"{self.cost(published):.3g}",
                "the engine, same samples": f"`{twin.arm.name}`",
                "its own s/image": f"{self.cost(twin):.3g}",
                "times faster": f"{self.cost(published) / self.cost(twin):.2f}",
                "by the clock": f"{published.seconds_per_image / twin.seconds_per_image:.2f}",
            }
            for published, twin in self.twins()
        ]

    def _skipped(self) -> list[str]:
        """A line for each reason, with the arms, or the runtimes, that it holds for."""
        by_reason: dict[str, dict[str, None]] = {}
        for one in self.measured:
            if one.reason:
                name, mark, variant = one.arm.name.partition("@")
                by_reason.setdefault(one.reason, {})[mark + variant if one.arm.runtime else name + mark + variant] = (
                    None
                )
        return [f"{reason}: {', '.join(names)}" for reason, names in by_reason.items()]

    def _cells(self, one: Measured) -> dict[str, str]:
        ratio, floor, on_cpu = self.ratio(one), self.floor(one), self.about["device"] == "cpu"
        return {
            "arm": f"`{one.arm.name}`",
            "images": str(one.num_samples),
            "samples a call": str(one.batch_size),
            "CPU s/image": f"{one.cpu_seconds_per_image:.3g}" if on_cpu else "",
            "s/image": f"{one.seconds_per_image:.3g}",
            "images/s, median": "" if on_cpu else f"{one.median_images_per_second:.3g}",
            "peak GiB": f"{one.peak_bytes / GIB:.2f}" if one.peak_bytes else "",
            "of prompt-only": "" if ratio is None else f"{ratio:.2f}",
            "floor": f"{floor:.2f}",
            "of the floor": "" if ratio is None else f"{floor / ratio:.0%}",
            "KLDB or risk": "" if one.score is None else f"{one.score:.3g}",
            "on a classifier that guided nothing": "" if one.transfer is None else f"{one.transfer:.3g}",
        }


def _table(title: str, rows: Sequence[dict[str, str]]) -> list[str]:
    """Lines of a table, without the columns that have nothing to say; none without rows."""
    if not rows:
        return []
    heads = [head for head in rows[0] if any(row[head] for row in rows)]
    lines = ["", f"**{title}**", "", _row(heads), _row(["---"] * len(heads))]
    return [*lines, *(_row([row[head] for head in heads]) for row in rows)]


def _row(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def write_into(page: Path, size: str, tables: str) -> None:
    """Put tables into a page, between `<!-- measured: SIZE -->` and `<!-- end of SIZE -->`.

    Raises:
        ValueError: the page does not have the two marks.
    """
    begin, end = f"<!-- measured: {size} -->\n", f"<!-- end of {size} -->"
    before, mark, rest = page.read_text(encoding="utf-8").partition(begin)
    _, end_mark, after = rest.partition(end)
    if not mark or not end_mark:
        raise ValueError(f"{page} has no place for tables: `{begin.strip()}` and then `{end}`")
    page.write_text(before + begin + "\n" + tables + "\n" + end + after, encoding="utf-8")


def _counted(name: str, counted: Arithmetic) -> str:
    parts = [f"{field.replace('_', ' ')} {getattr(counted, field) / 1e9:.4g}" for field in counted.__slots__]
    return f"{name}, GFLOP: {', '.join(parts)}"


def _profile(one: Measured) -> list[str]:
    shares = ", ".join(f"{kind} {share:.0%}" for kind, share in one.profile["shares"].items())
    top = ", ".join(f"`{entry['name'][:60]}` {entry['seconds']:.3g} s" for entry in one.profile["top"][:6])
    return [f"{one.arm.name}: {shares}", f"{one.arm.name}, costliest: {top}"]
