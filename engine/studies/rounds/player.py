"""Round by round: find failures of each arm's network, train on them, and test; every step is kept."""

from __future__ import annotations

import base64
import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.data.stores.fresh_folder import fresh_folder
from engine.data.stores.opening import open_store
from engine.errors import JobError
from engine.job.spec import JobSpec
from engine.methods.temperature import fit_temperature
from engine.models.calibration import job_calibration
from engine.models.digests import model_digest
from engine.models.trainable import Trainable, load_trainable
from engine.studies.experiments.program import RUNS, STEPS, StudyContext
from engine.studies.retrain.arm_records import ACCEPTED, BEFORE, ENTROPY, ArmChoice
from engine.studies.retrain.arms import by_entropy
from engine.studies.retrain.batch_changes import Attack, Augmentation
from engine.studies.retrain.finetune import Recipe, Samples, choose_rows, training_device
from engine.studies.retrain.image_tensors import GeneratedSet, read_generated
from engine.studies.retrain.trainer import ArmTrainer
from engine.studies.retrain.training import finite_logits
from engine.studies.rounds.design import Design
from engine.studies.rounds.material import Material, digest_of_images
from engine.studies.samples import StudiedRun, open_study

MODELS = "models"
Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """What all rounds gave.

    Attributes:
        before: whether the target is right on each test image, [N].
        right: by arm, of seed, round from 1 and test image, [S, R, N].
        runs: by arm and round, the run that failures were found in; of round R + 1 where they are counted once more.
        num_samples: by arm and round, the generated samples that a training of the round had.
    """

    before: Flags
    right: dict[str, Flags]
    runs: dict[tuple[str, int], StudiedRun]
    num_samples: dict[tuple[str, int], int]


@dataclass(frozen=True, slots=True)
class Network:
    """A classifier on disk."""

    address: str
    digest: str


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """The samples of an arm's run in a round that it draws from.

    Attributes:
        rows: of the generated set.
        count: how many of them are drawn.
    """

    generated: GeneratedSet
    rows: Tensor
    count: int
    identity: dict[str, Any]


@dataclass(slots=True, eq=False)
class Player:
    """Plays the rounds of all arms."""

    design: Design
    material: Material
    context: StudyContext
    _networks: dict[tuple[str, int, int], Network] = field(default_factory=dict, init=False)
    _runs: dict[tuple[str, int], StudiedRun] = field(default_factory=dict, init=False)
    _pools: dict[tuple[str, int], Pool] = field(default_factory=dict, init=False)
    _right: dict[tuple[str, int, int], Flags] = field(default_factory=dict, init=False)
    _num_samples: dict[tuple[str, int], int] = field(default_factory=dict, init=False)
    _digests: dict[str, str] = field(default_factory=dict, init=False)

    def play(self) -> Played:
        """All rounds of all arms.

        Raises:
            RiskforgeError: a run or a training fails.
            KeyboardInterrupt: it was stopped.
        """
        spec = self.design.spec
        self._digests = {name: digest_of_images(getattr(self.material, name)) for name in ("real", "test")}
        target = self.design.job.models.target
        self._networks |= {
            (arm.label, seed, 0): Network(target, model_digest(target))
            for arm in self.design.arms
            for seed in range(spec.seeds)
        }
        before = self._test(self.material.target.network, BEFORE)
        for number in range(1, spec.rounds + 1):
            self._find(number)
            self._make_pools(number)
            for arm in self.design.arms:
                for seed in range(spec.seeds):
                    self._train(arm, seed, number)
        if spec.last_run:
            self._find(spec.rounds + 1)
        return Played(
            before=before,
            right={arm.label: self._right_of(arm) for arm in self.design.arms},
            runs=dict(self._runs),
            num_samples=dict(self._num_samples),
        )

    def _right_of(self, arm: ArmChoice) -> Flags:
        seeds, rounds = range(self.design.spec.seeds), range(1, self.design.spec.rounds + 1)
        return np.stack([np.stack([self._right[arm.label, seed, number] for number in rounds]) for seed in seeds])

    def _test(self, network: Any, what: str) -> Flags:
        """Whether a network is right on each test image, [N]."""
        logits = finite_logits(network, self.material.test.pixels, f"images of test ({what})")
        return np.asarray((logits.argmax(1) == self.material.test.classes).numpy())

    # Runs

    def _find(self, number: int) -> None:
        """The runs of a round: in the first one for all arms."""
        arms = self.design.sampled
        if number == 1 and arms:
            run = self._run("round-1", None, number)
            self._runs |= {(arm.label, 1): run for arm in arms}
            return
        for arm in arms:
            self._runs[arm.label, number] = self._run(f"{slug(arm)}-round-{number}", arm, number)

    def _run(self, name: str, arm: ArmChoice | None, number: int) -> StudiedRun:
        network = self._networks[(arm or self.design.arms[0]).label, 0, number - 1]
        job = self.design.job_of(number, arm, network.address)
        folder = self.context.home / RUNS / name

        def make() -> dict[str, str]:
            _remove_other(folder, network.digest)
            return {"shards": self.context.make_run(name, job).shards_digest}

        self.context.once(f"runs/{name}", {"target": network.digest, "job": _identity(job)}, make)
        # Kept runs are part of the study as well; their target may be gone.
        self.context.runs.append(name)
        return open_study(str(folder))

    # Samples

    def _make_pools(self, number: int) -> None:
        """What each arm draws from in a round, and how much: as much as the smallest has, unless a number is given."""
        rows: dict[str, tuple[GeneratedSet, Tensor]] = {}
        for arm in self.design.sampled:
            generated = self._generated(arm, number)
            rows[arm.label] = generated, self._rows(arm, generated, number)
        free = [len(rows[arm.label][1]) for arm in self.design.sampled if arm.num_samples is None]
        equal = self.design.spec.samples or min(free, default=0)
        for arm in self.design.sampled:
            generated, pool = rows[arm.label]
            count = min(arm.num_samples or equal, len(pool))
            identity = {
                "shards": self._runs[arm.label, number].shards_digest,
                "count": count,
                "arm": arm.record.samples,
            }
            self._pools[arm.label, number] = Pool(generated, pool, count, identity)

    def _generated(self, arm: ArmChoice, number: int) -> GeneratedSet:
        run = self._runs[arm.label, number]
        return read_generated(
            run,
            self.design.requests_of(arm),
            self.material.target.preprocessing,
            num_classes=len(self.material.labels),
            soft=False,
            display=self.context.display,
        )

    def _rows(self, arm: ArmChoice, generated: GeneratedSet, number: int) -> Tensor:
        """The rows of an arm's pool; of the arm entropy the most uncertain first."""
        everything = torch.arange(len(generated.requests))
        if arm.record.samples == ENTROPY:
            network = self._networks[arm.label, 0, number - 1]
            inputs = {"shards": self._runs[arm.label, number].shards_digest, "target": network.digest}
            name = f"uncertain/{slug(arm)}/round-{number}"
            ranked = self.context.once(name, inputs, lambda: self._ranked(network, generated))
            return torch.tensor(ranked, dtype=torch.int64)
        return everything[generated.accepted] if arm.record.samples == ACCEPTED else everything

    def _ranked(self, network: Network, generated: GeneratedSet) -> list[int]:
        ranked: list[int] = by_entropy(self._load(network).network, generated.samples.pixels).tolist()
        return ranked

    def _drawn(self, arm: ArmChoice, seed: int, number: int) -> Samples | None:
        """The generated samples of a training; None where there are none."""
        parts = []
        for earlier in self._rounds_used(number):
            pool = self._pools[arm.label, earlier]
            if arm.record.samples == ENTROPY:
                rows = pool.rows[: pool.count]
            else:
                rows = pool.rows[choose_rows(len(pool.rows), pool.count, self.design.training_seed(seed, earlier))]
            parts.append(pool.generated.samples.take(rows))
        pixels, targets = (torch.cat([getattr(part, name) for part in parts]) for name in ("pixels", "targets"))
        return Samples(pixels, targets) if len(pixels) else None

    def _rounds_used(self, number: int) -> Sequence[int]:
        return range(1, number + 1) if self.design.spec.keep_samples == "all" else [number]

    # Trainings

    def _train(self, arm: ArmChoice, seed: int, number: int) -> None:
        """A training of a round, from the network of the round before, and its test."""
        spec, parent = self.design.spec, self._networks[arm.label, seed, number - 1]
        pools = [self._pools[arm.label, one] for one in self._rounds_used(number)] if arm.record.samples else []
        self._num_samples[arm.label, number] = sum(pool.count for pool in pools)
        place = self.context.home / MODELS / slug(arm) / f"seed-{seed + 1}"
        inputs = {
            "parent": parent.digest,
            "samples": [pool.identity for pool in pools],
            "recipe": dataclasses.asdict(self.recipe),
            "protect": [self.design.protection.kind, self.design.protection.used],
            "changes": [spec.flip, spec.pgd_eps, spec.pgd_steps] if arm.record.images else [],
            "seed": self.design.training_seed(seed, number),
            "images": self._digests,
            "calibrate": spec.calibrate,
        }
        title = f"arm {arm.label}, seed {seed + 1} of {spec.seeds}, round {number} of {spec.rounds}"
        kept = self.context.once(
            f"trainings/{slug(arm)}/seed-{seed + 1}/round-{number}",
            inputs,
            lambda: self._trained(arm, seed, number, place / f"round-{number}", title),
        )
        self._networks[arm.label, seed, number] = Network(str(place / f"round-{number}"), kept["model"])
        self._right[arm.label, seed, number] = _unpacked(kept["right"], len(self.material.test))
        if spec.keep_models == "last":
            shutil.rmtree(place / f"round-{number - 1}", ignore_errors=True)

    def _trained(self, arm: ArmChoice, seed: int, number: int, folder: Path, title: str) -> dict[str, Any]:
        spec, parent = self.design.spec, self._load(self._networks[arm.label, seed, number - 1])
        trainer = ArmTrainer(
            network=parent.network,
            real=self.material.real.samples(len(self.material.labels)),
            recipe=self.recipe,
            bounds=parent.preprocessing.bounds,
            protection=self.design.protection,
            augmentation=Augmentation(flips=spec.flip),
            attack=Attack(eps=spec.pgd_eps, num_steps=spec.pgd_steps),
            on_cpu=self.design.job.runtime.device == "cpu",
        )
        steps = 0

        def advance() -> None:
            nonlocal steps
            steps += 1
            self.context.display.advance(f"{title}, step {steps}/{self.recipe.num_steps}")

        drawn = self._drawn(arm, seed, number) if arm.record.samples else None
        trained = trainer.train(arm.label, drawn, seed=self.design.training_seed(seed, number), advance=advance)
        right = self._test(trained, title)
        with fresh_folder(folder) as built:
            self.material.target.store(trained, built, self._temperature(trained))
        return {"model": model_digest(str(folder)), "right": _packed(right)}

    @property
    def recipe(self) -> Recipe:
        """Of every training."""
        spec = self.design.spec
        return Recipe(
            num_steps=spec.steps,
            batch_size=spec.batch_size,
            num_generated=self.design.num_generated,
            learning_rate=spec.learning_rate,
        )

    def _load(self, network: Network) -> Trainable:
        """A network, as it was when it was trained.

        Raises:
            JobError: it was removed or changed since.
        """
        if network.address == self.design.job.models.target:
            return self.material.target
        if not Path(network.address).is_dir() or model_digest(network.address) != network.digest:
            raise JobError(
                f"{network.address}: this network of the study is gone or has changed; remove"
                f" {self.context.home / STEPS} to train again from the start"
            )
        return load_trainable(network.address, str(training_device(self.design.job.runtime.device == "cpu")))

    def _temperature(self, network: Any) -> float:
        """Of a trained network: fitted on the images for it, else the target's."""
        calibration, images = job_calibration(self.design.job), self.material.calibration
        current = calibration.temperature if calibration else self.material.target.temperature
        if images is None:
            return current
        fit = fit_temperature(finite_logits(network, images.pixels, "images of calibrate"), images.classes, current)
        return current if fit.bound else fit.fitted


def slug(arm: ArmChoice) -> str:
    """The name of an arm in names of runs and folders."""
    return arm.label.replace(":", "-")


def _identity(job: JobSpec) -> Any:
    """What decides a run, but its target, whose address says nothing."""
    fields = job.model_dump(mode="json", exclude={"name", "runtime"})
    fields["output"].pop("uri")
    fields["models"].pop("target")
    return fields


def _remove_other(folder: Path, target_digest: str) -> None:
    """Remove a run of the study that was made with another target: the samples that it had learnt from have changed."""
    if not folder.is_dir():
        return
    if open_store(str(folder)).list() and open_study(str(folder)).target_digest != target_digest:
        shutil.rmtree(folder)


def _packed(right: Flags) -> str:
    return base64.b64encode(np.packbits(right).tobytes()).decode()


def _unpacked(text: str, count: int) -> Flags:
    bits = np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=count)
    return bits.astype(bool)
