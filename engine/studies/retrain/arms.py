"""The arms of a retraining: which generated samples each of them is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.errors import JobError
from engine.studies.retrain.arm_records import (
    ACCEPTED,
    DEFAULT_ARMS,
    ENTROPY,
    NONE,
    PLAIN,
    UNFILTERED,
    ArmChoice,
    parse_arm,
)
from engine.studies.retrain.finetune import Samples, choose_rows, predict
from engine.studies.retrain.held_out import choose_held_out
from engine.studies.retrain.image_tensors import GeneratedSet
from engine.studies.retrain.options import RetrainOptions
from engine.studies.samples import StudiedRun, choose_requests, is_plain

NO_ARM = "--arm: none is trained anyway, as what the others are compared with; name another arm, such as accepted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arms:
    """The arms with generated samples.

    Attributes:
        pools: by arm with generated samples, the rows of the generated set that it draws from.
        counts: by arm with generated samples, how many it draws: as many as the others where it asks for no number.
        names: of all arms that are trained, `none` first.
        left_out: by arm that cannot be compared, the reason.
        held_out: the rows of the generated set that none draws from, and that are tested.
    """

    pools: dict[str, Tensor]
    counts: dict[str, int]
    names: tuple[str, ...]
    left_out: dict[str, str]
    held_out: Tensor

    @property
    def num_samples(self) -> int:
        """Generated samples of the arm with the fewest; 0 where none has any."""
        return min(self.counts.values(), default=0)

    @property
    def main(self) -> str:
        """The arm that findings are about, and whose model is kept: accepted samples, else the last that is named."""
        return next((arm for arm in self.names if parse_arm(arm).record.name == ACCEPTED), self.names[-1])


def choose_arms(run: StudiedRun, options: RetrainOptions) -> tuple[list[str], list[str]]:
    """Names of the plain and of the risky requests.

    Raises:
        JobError: the run has no request of such a name, none has an `accept` rule, or a joint prompt has no hard label.
    """
    plain = choose_requests(run, "--plain", options.plain)
    risky = choose_requests(run, "--risky", options.risky)
    requests = run.job.requests
    plain = plain or [request.name for request in requests if is_plain(request)]
    risky = risky or [request.name for request in requests if request.accept]
    named = {*plain, *risky}
    joint = [request.name for request in requests if request.boundary is not None and request.name in named]
    if joint and options.labels == "hard":
        raise JobError(
            f"--labels: the samples of {', '.join(joint)} are of a joint prompt and have no single class; use soft, or"
            " name other requests with --plain and --risky"
        )
    if not risky:
        names = ", ".join(request.name for request in requests)
        raise JobError(f"--risky: no request of the run has an `accept` rule; name those whose samples to add: {names}")
    return plain, risky


def make_arms(
    run: StudiedRun,
    generated: GeneratedSet,
    plain: list[str],
    risky: list[str],
    held_out_share: float,
    names: Sequence[str] = DEFAULT_ARMS,
    network: Any = None,
) -> Arms:
    """Which generated samples each arm has, and which are tested.

    Args:
        names: of the arms, as `parse_arm` takes them.
        network: the target, whose predictions the arm `entropy` needs.

    Raises:
        JobError: none is accepted, no arm is left, or an arm has fewer samples than it is to have.
    """
    is_tested = _are_tested(run, generated, risky)
    held_out = choose_held_out(generated.origins, generated.classes, is_tested.tolist(), held_out_share)
    of_plain, of_risky = (rows[~held_out[rows]] for rows in map(generated.rows_of, (plain, risky)))
    accepted = of_risky[generated.accepted[of_risky]]
    pools = {PLAIN: of_plain, UNFILTERED: of_risky, ACCEPTED: accepted, ENTROPY: of_risky}
    choices = [parse_arm(name) for name in dict.fromkeys(names)]
    missing = _missing(run, plain, risky, pools)
    if ACCEPTED in missing and any(choice.record.samples in (ACCEPTED, UNFILTERED, ENTROPY) for choice in choices):
        raise JobError(f"RUN: {missing[ACCEPTED]}")
    left_out = {choice.label: missing[choice.record.samples] for choice in choices if choice.record.samples in missing}
    kept = [choice for choice in choices if choice.label not in left_out and choice.record.name != NONE]
    if not kept:
        raise JobError(
            [f"--arm: {arm} has nothing to train on: {reason}" for arm, reason in left_out.items()] or NO_ARM
        )
    drawing = [choice for choice in kept if choice.record.samples]
    counts = _counts(drawing, pools)
    if any(choice.record.samples == ENTROPY for choice in kept):
        pools[ENTROPY] = of_risky[by_entropy(network, generated.samples.pixels[of_risky])]
    return Arms(
        # The most uncertain samples are no random draw: all of their pool are drawn.
        pools={
            choice.label: pools[choice.record.samples][
                : counts[choice.label] if choice.record.samples == ENTROPY else None
            ]
            for choice in drawing
        },
        counts=counts,
        names=tuple(dict.fromkeys([NONE, *(choice.label for choice in kept)])),
        left_out=left_out,
        held_out=(held_out & is_tested).nonzero()[:, 0],
    )


def draw_samples(generated: GeneratedSet, arms: Arms, arm: str, seed: int) -> Samples | None:
    """The generated samples of an arm, drawn with the seed; None where it has real images alone."""
    if arm not in arms.pools:
        return None
    pool = arms.pools[arm]
    return generated.samples.take(pool[choose_rows(len(pool), arms.counts[arm], seed)])


def _missing(run: StudiedRun, plain: list[str], risky: list[str], pools: dict[str, Tensor]) -> dict[str, str]:
    """Pools that cannot be compared, with the reason."""
    missing = {}
    if not len(pools[ACCEPTED]):
        missing[ACCEPTED] = (
            f"no sample of {', '.join(risky)} is accepted so far; make more with a higher `count`, loosen their"
            " `accept`, or name other requests with --risky"
        )
    if not plain:
        missing[PLAIN] = "no request has method prompt and no `accept` rule; name one with --plain"
    elif not len(pools[PLAIN]):
        missing[PLAIN] = f"no sample of {', '.join(plain)} has an image so far"
    if len(pools[UNFILTERED]) == len(pools[ACCEPTED]):
        missing[UNFILTERED] = missing[ENTROPY] = _why_filtered(run, risky)
    return missing


def _counts(choices: list[ArmChoice], pools: dict[str, Tensor]) -> dict[str, int]:
    """How many samples each arm has: those that it asks for, or as many as the smallest pool; of `entropy` as many as
    are accepted.

    Raises:
        JobError: an arm asks for more than there are.
    """
    sizes = {choice.label: len(pools[choice.record.samples]) for choice in choices}
    problems = [
        f"--arm: '{choice.label}': the run has {sizes[choice.label]} such samples to train on; ask for as many or fewer"
        for choice in choices
        if (choice.num_samples or 0) > sizes[choice.label]
    ]
    if problems:
        raise JobError(problems)
    shared = [len(pools[ACCEPTED]), *(sizes[choice.label] for choice in choices if choice.num_samples is None)]
    equal = min((size for size in shared if size), default=0)
    return {choice.label: choice.num_samples or equal for choice in choices}


def by_entropy(network: Any, pixels: Tensor) -> Tensor:
    """Rows of preprocessed images [N, 3, h, w] in falling order of the entropy of a network's prediction."""
    log_p = predict(network, pixels).log_softmax(1)
    return (-(log_p.exp() * log_p).sum(1)).argsort(descending=True, stable=True)


def _are_tested(run: StudiedRun, generated: GeneratedSet, risky: list[str]) -> Tensor:
    """Whether each sample would be tested where it is held out, [N]: accepted ones, which have a single right class."""
    joint = [request.name for request in run.job.requests if request.boundary is not None]
    is_tested = torch.zeros(len(generated.requests), dtype=torch.bool)
    is_tested[generated.rows_of([name for name in risky if name not in joint])] = True
    return is_tested & generated.accepted


def _why_filtered(run: StudiedRun, risky: list[str]) -> str:
    """Why the run has no images of rejected samples."""
    num_rejected = sum(record.counts.rejected for record in run.commits_of(risky))
    if not num_rejected:
        return f"no sample of {', '.join(risky)} is rejected, so it would be the arm `{ACCEPTED}`"
    return (
        f"the images of the {num_rejected} rejected samples are not stored; set output.store_rejected: true in the job"
        " and make a new run"
    )
