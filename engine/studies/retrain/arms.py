"""The arms of a retraining: which generated samples each of them is trained on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.errors import JobError
from engine.studies.retrain.accuracy import ACCEPTED, PLAIN, UNFILTERED
from engine.studies.retrain.held_out import choose_held_out
from engine.studies.retrain.image_tensors import GeneratedSet
from engine.studies.retrain.options import RetrainOptions
from engine.studies.samples import StudiedRun, choose_requests, is_plain


@dataclass(frozen=True, slots=True, kw_only=True)
class Arms:
    """The arms with generated samples.

    Attributes:
        pools: by arm, the rows of the generated set that it draws from.
        left_out: by arm that cannot be compared, the reason.
        held_out: the rows of the generated set that none draws from, and that are tested.
    """

    pools: dict[str, Tensor]
    left_out: dict[str, str]
    held_out: Tensor

    @property
    def num_samples(self) -> int:
        """Generated samples of every arm: as many as the smallest has."""
        return min(len(rows) for rows in self.pools.values())


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
    run: StudiedRun, generated: GeneratedSet, plain: list[str], risky: list[str], held_out_share: float
) -> Arms:
    """Which generated samples each arm has, and which are tested.

    Raises:
        JobError: none is accepted, so there is nothing to study.
    """
    is_tested = _are_tested(run, generated, risky)
    held_out = choose_held_out(generated.origins, generated.classes, is_tested.tolist(), held_out_share)
    of_plain, of_risky = (rows[~held_out[rows]] for rows in map(generated.rows_of, (plain, risky)))
    pools = {PLAIN: of_plain, UNFILTERED: of_risky, ACCEPTED: of_risky[generated.accepted[of_risky]]}
    if not len(pools[ACCEPTED]):
        raise JobError(
            f"RUN: no sample of {', '.join(risky)} is accepted so far; make more with a higher `count`, loosen their"
            " `accept`, or name other requests with --risky"
        )
    left_out = {}
    if not plain:
        left_out[PLAIN] = "no request has method prompt and no `accept` rule; name one with --plain"
    elif not len(pools[PLAIN]):
        left_out[PLAIN] = f"no sample of {', '.join(plain)} has an image so far"
    if len(pools[UNFILTERED]) == len(pools[ACCEPTED]):
        left_out[UNFILTERED] = _why_filtered(run, risky)
    return Arms(
        pools={arm: rows for arm, rows in pools.items() if arm not in left_out},
        left_out=left_out,
        held_out=(held_out & is_tested).nonzero()[:, 0],
    )


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
