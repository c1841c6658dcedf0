"""What `prepare --only neighbours` prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from engine.commands.output import print_artefact, print_some, warn
from engine.errors import JobError
from engine.job.columns import MIN_ORACLE_P_LABEL
from engine.models.configurations import NEIGHBOURS_DOCUMENT
from engine.terminal import show as print

if TYPE_CHECKING:
    from engine.job.spec import JobSpec
    from engine.studies.prepare.program import Prepared


def print_neighbours(prepared: Prepared, job: JobSpec) -> None:
    """Print how well the images predict each other, and how a job uses the artefact."""
    from engine.driver.progress import duration

    neighbours = prepared.neighbours
    evaluation, vote = neighbours.evaluation, neighbours.fit.vote
    print(f"images         {sum(neighbours.counts)} of {len(neighbours.labels)} classes, from {prepared.source}")
    print(f"encoder        {prepared.encoder}")
    if neighbours.num_duplicates:
        print(f"duplicates     {neighbours.num_duplicates} left out")
    print(f"unusable       {len(neighbours.unusable)}")
    print_some([f"{image.name}: {image.reason}" for image in neighbours.unusable], NEIGHBOURS_DOCUMENT)
    if prepared.advice:
        warn(prepared.advice)
    print(f"vote           of {vote.k} neighbours, temperature of similarities {vote.tau:g}")
    print(f"temperature    {neighbours.fit.calibration:.4g}")
    print(
        f"accuracy       {evaluation.accuracy:.1%} of {evaluation.num_images} images by the others, NLL"
        f" {evaluation.nll:.4f}"
    )
    if evaluation.confident_accuracy is not None:
        print(
            f"               at p >= {MIN_ORACLE_P_LABEL}: {evaluation.confident_accuracy:.1%}, for"
            f" {evaluation.confident_share:.1%} of them"
        )
    origin = "existed already, equal" if prepared.was_there else duration(prepared.seconds)
    if print_artefact(prepared.address, origin):
        _print_oracle(prepared.path, job)


def _print_oracle(path: Path, job: JobSpec) -> None:
    """Print what to write into a job, and why not into this one where it cannot be."""
    from engine.models.independence import check_independent

    shown = path.absolute()
    shown = shown.relative_to(Path.cwd()) if shown.is_relative_to(Path.cwd()) else shown
    if str(shown) in job.models.all_oracles or str(shown.parent) in job.models.all_oracles:
        return
    others = job.models.all_oracles
    try:
        models = job.models.model_copy(update={"oracle": None, "oracles": (*others, str(path))})
        check_independent(models, oracle_guides=job.oracle_guides)
    except JobError as error:
        print_some([f"not for this job: {problem}" for problem in error.problems])
    else:
        print(f"               for a job with these classes: models: {{oracles: [{', '.join((*others, str(shown)))}]}}")
