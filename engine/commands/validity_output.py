"""What `prepare --answers` prints."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from engine.commands.output import make_console, print_artefact, print_some
from engine.errors import JobError
from engine.models.configurations import VALIDITY_DOCUMENT
from engine.terminal import show as print

if TYPE_CHECKING:
    from engine.job.spec import JobSpec
    from engine.methods.validity_quality import StratumQuality
    from engine.studies.prepare.validity import PreparedValidity


def print_validity(prepared: PreparedValidity, job: JobSpec) -> None:
    """Print what the answers are, how well the fit predicts held-out ones, and how a job uses the artefact."""
    from engine.driver.progress import duration

    answered, fit = prepared.answered, prepared.fit
    raters = "" if answered.num_raters is None else f" of {answered.num_raters} people"
    print(f"images         {fit.num_images} with {fit.num_answers} answers{raters}, from {answered.source}")
    for note in answered.notes:
        print(f"               {note}")
    print(f"unused         {len(answered.unused)}")
    print_some([f"{image.name}: {image.reason}" for image in answered.unused], VALIDITY_DOCUMENT)
    for number, oracle in enumerate(answered.oracles):
        weight = f"weight {fit.model.weights[number]:.4g}" if fit.model else "without a weight"
        print(f"{'' if number else 'oracles':<15}{oracle.address}: {weight}")
    if fit.quality:
        _print_quality(fit.quality)
    print(f"verdict        {fit.verdict}")
    origin = "existed already, equal" if prepared.was_there else duration(prepared.seconds)
    if print_artefact(prepared.address, origin) and fit.model is not None:
        _print_use(prepared.path, job)


def _print_quality(groups: tuple[StratumQuality, ...]) -> None:
    """Print what becomes of held-out images at thresholds, a line each."""
    from rich import box
    from rich.table import Table

    from engine.methods.validity_quality import AGREED

    table = Table(box=box.SIMPLE_HEAD, title="held-out images", title_justify="left")
    table.add_column("images")
    for name in ("p_valid", "kept", "people who say it", f"said by {AGREED:.0%} of them", "wrong labels that pass"):
        table.add_column(name, justify="right")
    for group in groups:
        for number, line in enumerate(group.thresholds):
            name = "" if number else f"{group.name} ({group.num_images})"
            figures = (line.share_kept, line.people, line.precision, line.wrong_pass)
            table.add_row(name, f">= {line.threshold:g}", *map(_percent, figures))
    make_console().print(table)


def _percent(share: float | None) -> str:
    from engine.driver.progress import ABSENT

    return ABSENT if share is None else f"{share:.1%}"


def _print_use(path: Path, job: JobSpec) -> None:
    """Print what to write into a job, unless this one has it."""
    from engine.models.artefacts import find_artefact

    path, used = path.absolute(), job.models.validity
    if used and Path(used).absolute() in (path, path.parent):
        return
    # The folder's own address where this is all that it holds.
    with contextlib.suppress(JobError):
        find_artefact(str(path.parent), (VALIDITY_DOCUMENT,))
        path = path.parent
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    print(f"               for a job with these oracles: models: {{validity: {shown}}}")
