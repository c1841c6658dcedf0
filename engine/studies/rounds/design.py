"""What a study of rounds makes: its arms, the requests of their runs, and the jobs. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from engine.data.images.corruptions import CORRUPTIONS, Corruption
from engine.errors import JobError
from engine.job.plan import sample_seed
from engine.job.spec import JobSpec, RequestSpec
from engine.job.spec_messages import nearest
from engine.studies.retrain.arm_records import ACCEPTED, BEFORE, NONE, PLAIN, ArmChoice, Protection, parse_arm
from engine.studies.rounds.spec import RoundsSpec
from engine.studies.samples import is_plain


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """A study of rounds, checked as far as its fields tell.

    Attributes:
        arms: in their order.
        plain, risky: names of the requests of either kind; none where no arm needs them.
        corruptions: of test images.
    """

    spec: RoundsSpec
    job: JobSpec
    arms: tuple[ArmChoice, ...]
    plain: tuple[str, ...]
    risky: tuple[str, ...]
    corruptions: tuple[Corruption, ...]

    @property
    def sampled(self) -> tuple[ArmChoice, ...]:
        """The arms with generated samples, which have runs of their own from the second round on."""
        return tuple(arm for arm in self.arms if arm.record.samples)

    @property
    def finding(self) -> tuple[ArmChoice, ...]:
        """The arms whose runs find failures: of the arm plain they have plain samples alone."""
        return tuple(arm for arm in self.sampled if arm.record.samples != PLAIN)

    @property
    def base(self) -> str:
        """What arms are compared with: training on real images alone, else the target before."""
        return NONE if NONE in (arm.label for arm in self.arms) else BEFORE

    @property
    def protection(self) -> Protection:
        """How trainings keep what a network could."""
        return Protection(kind=self.spec.protect, strength=self.spec.protect_weight)

    @property
    def num_runs(self) -> int:
        """Runs: of the first round one for all arms, later one for each arm with samples."""
        return 1 + len(self.sampled) * (self.spec.rounds - 1 + self.spec.last_run) if self.sampled else 0

    @property
    def num_trainings(self) -> int:
        """Trainings of all arms, seeds and rounds."""
        return len(self.arms) * self.spec.seeds * self.spec.rounds

    @property
    def num_generated(self) -> int:
        """Generated images of a batch, where there are any."""
        return round(self.spec.mix * self.spec.batch_size)

    def requests_of(self, arm: ArmChoice) -> tuple[str, ...]:
        """Requests whose samples an arm draws from; its runs from the second round on make no others."""
        return self.plain if arm.record.samples == PLAIN else self.risky

    def job_of(self, number: int, arm: ArmChoice | None, target: str) -> JobSpec:
        """The job of a run.

        Args:
            number: of the round, from 1; the first has the seed of the job, and its target.
            arm: None for the first round, whose run all arms share.
            target: address of the classifier.
        """
        wanted = {*self.risky, *self.plain} if arm is None else set(self.requests_of(arm))
        requests = tuple(_counted(request, self.spec.count) for request in self.job.requests if request.name in wanted)
        models: dict[str, str | None] = {"target": target}
        if number > 1:
            # A retrained model is stored with its own temperature.
            models["calibration"] = None
        return self.job.model_copy(
            update={
                "seed": self.job.seed if number == 1 else sample_seed(self.job.seed, "rounds, run", (), number),
                "models": self.job.models.model_copy(update=models),
                "requests": requests,
                "output": self.job.output.model_copy(update={"store_rejected": True}),
            }
        )

    def training_seed(self, seed: int, number: int) -> int:
        """Of a training; the same for all arms, so that they see the same real images in the same order."""
        return sample_seed(self.job.seed, f"rounds, training {seed}", (), number)


def make_design(spec: RoundsSpec, job: JobSpec) -> Design:
    """Arms and requests of a study.

    Raises:
        JobError: all problems, a line each.
    """
    problems: list[str] = []
    arms = tuple(_arms(spec, problems))
    needs = {arm.record.samples for arm in arms} - {""}
    plain = _chosen(spec.plain, "plain", job, problems) or [one.name for one in job.requests if is_plain(one)]
    risky = _chosen(spec.risky, "risky", job, problems) or [one.name for one in job.requests if one.accept]
    if needs and not risky:
        names = ", ".join(request.name for request in job.requests)
        problems.append(
            f"risky: no request of the job has an `accept` rule, which says what counts as a failure to train on; add"
            f" one, or name requests whose samples to use: {names}"
        )
    if PLAIN in needs and not plain:
        problems.append(
            "plain: no request has method prompt and no `accept` rule; name one, or leave the arm plain out"
        )
    if ACCEPTED in needs and risky:
        problems += _without_rule(job, risky)
    plain = plain if PLAIN in needs else []
    problems += _joint(job, {*plain, *risky}) if needs else []
    problems += Protection(kind=spec.protect, strength=spec.protect_weight).problems("protect", "protect_weight")
    problems += _mix(spec)
    corruptions = tuple(_corruptions(spec, problems))
    if problems:
        raise JobError(problems)
    return Design(
        spec=spec,
        job=job,
        arms=arms,
        plain=tuple(plain),
        risky=tuple(risky) if needs else (),
        corruptions=corruptions,
    )


def _arms(spec: RoundsSpec, problems: list[str]) -> Iterator[ArmChoice]:
    known: set[str] = set()
    for name in spec.arms:
        try:
            arm = parse_arm(name, "arms")
        except JobError as error:
            problems += error.problems
            continue
        if arm.label in known:
            problems.append(f"arms: '{name}' is there twice; name each arm once")
        known.add(arm.label)
        yield arm


def _chosen(names: Sequence[str], field: str, job: JobSpec, problems: list[str]) -> list[str]:
    known = [request.name for request in job.requests]
    problems += [
        f"{field}: the job has no request '{name}'{nearest(name, known)}; it has {', '.join(known)}"
        for name in names
        if name not in known
    ]
    return list(dict.fromkeys(names))


def _without_rule(job: JobSpec, risky: Sequence[str]) -> list[str]:
    return [
        f"risky: request '{request.name}' has no `accept` rule, so that every sample of it would be accepted; add one,"
        " or use the arm unfiltered"
        for request in job.requests
        if request.name in risky and not request.accept
    ]


def _joint(job: JobSpec, names: set[str]) -> list[str]:
    return [
        f"requests: '{request.name}' is a joint prompt, whose samples have no single class to train on; name others in"
        " risky and plain"
        for request in job.requests
        if request.name in names and request.boundary is not None
    ]


def _mix(spec: RoundsSpec) -> list[str]:
    generated = round(spec.mix * spec.batch_size)
    if 0 < generated < spec.batch_size:
        return []
    return [
        f"mix: {spec.mix:g} of a batch of {spec.batch_size} leaves {generated} generated images in it; give another"
        " share, or a larger batch_size"
    ]


def _corruptions(spec: RoundsSpec, problems: list[str]) -> Iterator[Corruption]:
    for name in dict.fromkeys(spec.corruptions.names):
        if name in CORRUPTIONS:
            yield Corruption(name, spec.corruptions.severity)
        else:
            known = list(CORRUPTIONS)
            problems.append(
                f"corruptions.names: there is no corruption '{name}'{nearest(name, known)}; give some of"
                f" {', '.join(known)}"
            )


def _counted(request: RequestSpec, count: int | None) -> RequestSpec:
    return request if count is None else request.model_copy(update={"count": count})
