"""Options of a review, checked before anything is read."""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import JobError

# Nobody answers more.
MAX_ITEMS = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawOptions:
    """What a review shows.

    Attributes:
        num_samples: items, or pairs, that are drawn of the population.
        num_controls: controls of each kind that there is; None for a tenth of the samples.
        num_repeats: items that are shown twice; None for a twentieth of the samples.
        real: address of labelled real images for controls; None for the run's starts, where it has some.
        requests: whose samples are reviewed; all that are guided, or all where none is, when empty.
        condition: a filter that samples pass; empty for none.
        is_all: whether every scored attempt with an image is in the population, not the accepted ones alone.
        is_pairs: whether two images of a class are compared.
        seed: of all draws.
    """

    num_samples: int = 200
    num_controls: int | None = None
    num_repeats: int | None = None
    real: str | None = None
    requests: tuple[str, ...] = ()
    condition: str = ""
    is_all: bool = False
    is_pairs: bool = False
    seed: int = 0

    @property
    def controls(self) -> int:
        """Controls of each kind; one at least where real images are named for them."""
        if self.num_controls is not None:
            return self.num_controls
        return max(round(self.num_samples / 10), int(self.real is not None))

    @property
    def repeats(self) -> int:
        """Items that are shown twice."""
        return round(self.num_samples / 20) if self.num_repeats is None else self.num_repeats


def check_options(options: DrawOptions) -> None:
    """Check numbers, and options that exclude each other.

    Raises:
        JobError: a line for each that cannot be used.
    """
    problems: list[str] = []
    for name, value, least in (
        ("--samples", options.num_samples, 1),
        ("--controls", options.controls, 0),
        ("--repeats", options.repeats, 0),
    ):
        if not least <= value <= MAX_ITEMS:
            problems.append(f"{name}: {value} is not from {least} to {MAX_ITEMS:,}")
    if not 0 <= options.seed < 2**53:
        problems.append(f"--seed: {options.seed} is not from 0 to 2^53 - 1")
    if options.is_pairs and (options.real is not None or options.num_controls is not None):
        problems.append("--pairs: compares samples of a class, without controls; omit --real and --controls")
    if problems:
        raise JobError(problems)
