"""Pipelines of the engine as generators of a loop: a round is a run, a curated run, and a fine-tuned model."""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.data.images import LabelledImage, decode_stored, nothing_usable, open_images
from engine.data.run.curated import MonitorRecord, Proportion, RewardRecord
from engine.data.stores.base import Store
from engine.data.stores.opening import open_store
from engine.driver.executors.base import Executor
from engine.driver.executors.local import LocalExecutor
from engine.driver.progress import Display
from engine.driver.run import run_job
from engine.errors import JobError, OwnedError, RiskforgeError, fault
from engine.job.plan import Cell, make_prompt
from engine.job.spec import JobSpec
from engine.methods.curation.learning import standardise
from engine.models.clip import Clip
from engine.models.hardware import choose_hardware, fix_threads
from engine.models.labels import target_labels
from engine.models.library_logging import quiet_libraries
from engine.studies.curate.candidates import Candidates, open_candidates
from engine.studies.curate.program import CuratedRun, SelectionOptions, SignalRecord, curate_run
from engine.studies.curate.rewards import find_reward
from engine.studies.curate.selection import values_digest
from engine.studies.curate.writing import OtherCurationError
from engine.studies.evaluate.image_features import batched, unit
from engine.studies.evaluate.inputs import draw_images
from engine.studies.loop.finetuning.batches import PromptedImage, TrainingImages
from engine.studies.loop.finetuning.program import fine_tune_pipeline
from engine.studies.loop.finetuning.recipe import FineTuneRecipe
from engine.studies.loop.memory import read_memory, write_memory
from engine.studies.loop.parsing import OPTIONS, LoopJob, renamed, run_name
from engine.studies.loop.recorded import NoRecordsError, RecordedSignal, learn_recorded
from engine.studies.loop.results import CURATED, GENERATED, MODEL, ROUND_DOCUMENT, WAITS, LoopFolder, round_bytes
from engine.studies.loop.rounds import PlayedRound, RoundSignal, derived_seed, play_round
from engine.studies.loop.samples import Real, RoundSamples
from engine.studies.loop.signal import MAX_E_VALUE, Memory, Signal
from engine.studies.loop.spec import CLASS_INDEX, MAX_REWARD, LoopSpec
from engine.studies.loop.state import Lane
from engine.studies.nested_display import NestedDisplay
from engine.studies.samples import open_study, read_samples

SIGNAL_FILE = "signal.safetensors"
# Real images that a process keeps to draw from.
MAX_REAL = 10_000
# How long processes of a driver that was killed may outlive it.
ORPHAN_SECONDS = 60.0
MakeExecutor = Callable[[], Executor]


class PipelineGenerator:
    """The pipeline of a lane in one of its rounds.

    Args:
        job: the loop, whose spec has the output.
        lane: arm and seed.
        number: of the round.
        make_executor: makes the executor that generates.
        display: of the round.
    """

    def __init__(self, job: LoopJob, lane: Lane, number: int, make_executor: MakeExecutor, display: Display) -> None:
        assert job.job is not None
        self._loop = job
        self._job: JobSpec = job.job
        self._lane = lane
        self._number = number
        self._make_executor = make_executor
        self._display = display
        self._folder = LoopFolder(Path(job.spec.output.uri))
        self._device = choose_hardware(self._job.runtime).device
        self._labels = tuple(target_labels(self._job))
        self._candidates: Candidates | None = None

    @property
    def num_classes(self) -> int:
        """Classes of the target."""
        return len(self._labels)

    @property
    def home(self) -> Path:
        """The folder of the round."""
        return self._folder.round(self._lane, self._number)

    @property
    def seed(self) -> int:
        """Of the choices of the round; the same for all arms."""
        return derived_seed(self._loop.spec.seed, "lane", self._lane.seed, self._number)

    @property
    def model(self) -> str:
        """Address of the pipeline that generates in this round."""
        if not self._number:
            return self._job.models.diffusion
        return str(self._folder.round(self._lane, self._number - 1) / MODEL)

    def samples(self) -> RoundSamples:
        """The round's run, generated if need be, with CLIP embeddings of length one as features."""
        self._generate()
        candidates = open_candidates(open_store(str(self.home / GENERATED)))
        self._candidates = candidates
        images = (image for _, image in candidates.images())
        classes = torch.tensor(candidates.class_indices)
        return RoundSamples(
            features=embed(self._job.models.clip, self._device, images),
            rewards=self._rewards(candidates),
            classes=classes,
            keys=candidates.keys,
            agreement=_agreement(candidates),
            oracle_reward=self._oracle_reward(candidates),
        )

    def real(self) -> Real | None:
        """CLIP embeddings of real images, of length sqrt(d) as in `evaluate`."""
        own, training = self._loop.spec.measure.real, self._loop.spec.training.real
        address, field = (own, "measure.real") if own else (training, "training.real")
        if address is None:
            return None
        clip = self._job.models.clip
        limit = self._loop.spec.measure.images
        return Real(real_features(address, self._labels, clip, self._device, limit, field), f"CLIP {clip}")

    def recorded(self) -> RoundSignal:
        """The reward of people's records; they name samples of this round's run."""
        assert self._candidates is not None
        before = [self._folder.round(self._lane, number) for number in range(self._number)]
        with renamed(OPTIONS):
            return learn_recorded(
                self._loop.spec,
                self._lane.arm,
                self._candidates,
                before,
                derived_seed(self.seed, "split"),
                self._display,
            )

    def retrain(self, rewards: Tensor, signal: RoundSignal | None) -> dict[str, Any]:
        """Curate into a run, and fine-tune the pipeline on what was selected."""
        started = time.monotonic()
        curated = self._curate(rewards, signal)
        curating, started = time.monotonic() - started, time.monotonic()
        self._train(curated)
        return {
            "selected": curated.num_selected,
            "seconds": {"curate": curating, "train": time.monotonic() - started},
        }

    def _generate(self) -> None:
        seed = derived_seed(self.seed, GENERATED)
        output = self._job.output.model_copy(update={"uri": str(self.home / GENERATED)})
        job = self._job.model_copy(
            update={
                "name": run_name(self._loop.spec, self._lane.arm, self._lane.seed, self._number),
                "seed": seed,
                "models": self._job.models.model_copy(update={"diffusion": self.model}),
                "output": output,
            }
        )
        summary = run_job(job, executor=self._make_executor(), resume="auto", confirmed=False, display=self._display)
        if summary.drained:
            raise KeyboardInterrupt
        if summary.exit_code:
            reason = summary.failure or "; ".join(summary.short) or "shards are in quarantine"
            self._display.notice(f"its run has fewer samples than asked for ({reason})")

    def _rewards(self, candidates: Candidates) -> Tensor:
        """[N] the users' reward of the candidates; n less the class index, which is above 0."""
        name = self._loop.spec.curation.reward
        with renamed(OPTIONS):
            values = find_reward(name, self._display).rewards(candidates)
            if (largest := max(map(abs, values))) > MAX_REWARD:
                raise JobError(f"--reward: '{name}' gives {largest:.3g}; give values of {MAX_REWARD:g} at most")
        offset = self.num_classes if name == CLASS_INDEX else 0
        return torch.tensor(values, dtype=torch.float64) + offset

    def _oracle_reward(self, candidates: Candidates) -> float | None:
        """The reward by an independent reading of the classes: what curation by CLIP's labels alone would not move."""
        if self._loop.spec.curation.reward != CLASS_INDEX or not self._job.independent_oracles:
            return None
        read = [index for index in candidates.column("oracle_class") if index >= 0]
        return sum(self.num_classes - index for index in read) / len(read) if read else None

    def _curate(self, rewards: Tensor, signal: RoundSignal | None) -> CuratedRun:
        spec = self._loop.spec
        values = rewards.tolist()
        assert self._candidates is not None
        digest = values_digest(self._candidates.keys, values)
        options = SelectionOptions(
            num_candidates=spec.curation.candidates,
            among=spec.curation.among,
            seed=derived_seed(self.seed, "selection"),
        )
        arguments = (
            open_store(str(self.home / GENERATED)),
            lambda candidates: values,
            options,
            str(self.home / CURATED),
            _signal_record(spec, digest, signal),
            self._display,
        )
        try:
            return curate_run(*arguments)
        except OtherCurationError:
            # Left by an interrupted call: people have added records since, or another machine computes other digits.
            # Nothing but a model of this round is built on it.
            for name in (CURATED, MODEL):
                shutil.rmtree(self.home / name, ignore_errors=True)
            return curate_run(*arguments)

    def _train(self, curated: CuratedRun) -> None:
        spec, training = self._loop.spec, self._loop.spec.training
        study = open_study(curated.store.uri)
        real: Sequence[PromptedImage] = ()
        weight = spec.weight_of(self._lane.arm)
        if weight is not None and training.real is not None:
            template = self._job.requests[0].prompt
            real = prompted_real(training.real, self._labels, template)
        recipe = FineTuneRecipe(
            num_steps=spec.arms[self._lane.arm].steps or training.steps,
            batch_size=training.batch_size,
            learning_rate=training.learning_rate,
            lora_rank=training.lora_rank,
            curated_weight=1.0 if weight is None else weight,
        )
        fine_tune_pipeline(
            self.model,
            TrainingImages(curated=_curated_images(curated.store), real=real),
            recipe,
            self.home / MODEL,
            parent_run={
                "uri": f"../{CURATED}",
                "name": study.job.name,
                "plan_digest": study.plan_digest,
                "shards_digest": study.shards_digest,
            },
            seed=derived_seed(self.seed, MODEL),
            device=self._job.runtime.device,
            display=self._display,
            runtime=self._job.runtime,
        )


def pipeline_round(
    job: LoopJob, lane: Lane, number: int, display: Display | None = None, make_executor: MakeExecutor | None = None
) -> dict[str, Any]:
    """Play a round of a lane, or what is left of it, and store its measures.

    Args:
        job: the loop, whose `output.uri` is a folder.
        lane: arm and seed.
        number: of the round.
        display: of the loop, where it runs in this process.
        make_executor: makes the executor that generates; a thread of this process if not given.

    Raises:
        RiskforgeError: a run, a model or a file is not as it must be.

    Returns:
        The measures; `WAITS` with the address of the run where people have to choose first.

    Side effects: writes the round's folder; removes the model of the round before where `keep_models` is `last`.
    """
    assert job.job is not None
    quiet_libraries()
    fix_threads(choose_hardware(job.job.runtime))
    shown = NestedDisplay(display, f"{lane}, round {number}")
    generator = PipelineGenerator(job, lane, number, make_executor or functools.partial(LocalExecutor, 1), shown)
    folder = LoopFolder(Path(job.spec.output.uri))
    memory = _LazyMemory(generator, folder, lane, number)
    try:
        played = _outlive(lambda: play_round(generator, job.spec, lane.arm, number, memory.get, generator.seed))
    except NoRecordsError as error:
        return {WAITS: str(error)}
    except OwnedError:
        raise
    except RiskforgeError as error:
        parts = [folder.round(lane, number - 1) / MODEL] if number else []
        # What is wrong with the job is not wrong with a run.
        names = (MODEL,) if isinstance(error, JobError) else (MODEL, GENERATED, CURATED)
        parts += [generator.home / name for name in names]
        raise _with_remedy(error, parts) from error
    [measures] = played.measures
    if played.memory is not None:
        write_memory(generator.home / SIGNAL_FILE, played.memory)
    store = open_store(str(generator.home))
    store.replace(ROUND_DOCUMENT, round_bytes(measures))
    if job.spec.keep_models == "last" and number > 0 and measures["trained"]:
        shutil.rmtree(folder.round(lane, number - 1) / MODEL, ignore_errors=True)
    return measures


def _with_remedy(error: RiskforgeError, parts: Sequence[Path]) -> RiskforgeError:
    """The error of a part of a round, with what to do in a loop where that part is damaged."""
    named = next((part for part in parts if str(part) in str(error)), None)
    if named is None:
        return error
    remedy = f"remove {named} where it is damaged, or of a model that was: the same loop makes it again"
    return fault(f"{error}\n{remedy}", error.exit_code)


def _outlive(play: Callable[[], PlayedRound]) -> PlayedRound:
    """Play a round once no process of an earlier driver, which was killed, is at work on it any more.

    Raises:
        OwnedError: one still is.
    """
    deadline = time.monotonic() + ORPHAN_SECONDS
    while True:
        try:
            return play()
        except OwnedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)


@dataclass(frozen=True, slots=True)
class _LazyMemory:
    """What the signal needs of the rounds before, read where there is one."""

    generator: PipelineGenerator
    folder: LoopFolder
    lane: Lane
    number: int

    def get(self, samples: RoundSamples) -> Memory:
        """The memory; before the first round the standardisation of its samples' features."""
        if not self.number:
            return Memory(standardise(samples.features))
        return read_memory(self.folder.round(self.lane, self.number - 1) / SIGNAL_FILE)


def _agreement(candidates: Candidates) -> float | None:
    """Share of the samples of which the oracle predicts the class that they are labelled with."""
    read = candidates.column("oracle_class") if "oracle_class" in candidates.column_names else []
    pairs = [(own, label) for own, label in zip(read, candidates.class_indices, strict=False) if own >= 0]
    return sum(own == label for own, label in pairs) / len(pairs) if pairs else None


def _signal_record(spec: LoopSpec, digest: str, signal: RoundSignal | None) -> SignalRecord:
    """How the curated run describes where its rewards come from."""
    name = spec.curation.reward
    if isinstance(signal, RecordedSignal):
        return signal.record
    if not isinstance(signal, Signal):
        return SignalRecord(reward=RewardRecord(name=name, kind="values", digest=digest))
    measures = signal.measures(0)
    accuracy, removed = measures["accuracy"], measures["removed"] or {}
    reward = RewardRecord(
        name=f"simulated raters, {name}",
        kind="values",
        digest=digest,
        model=spec.curation.learned.model if spec.curation.learned else "",
        num_records=signal.records.sizes[0],
        num_removed=removed.get("tampered", 0) + removed.get("honest", 0),
        defence="influence" if signal.is_defended else "",
        accuracy=Proportion(
            value=accuracy["value"], low=accuracy["low"], high=accuracy["high"], total=accuracy["records"]
        ),
    )
    return SignalRecord(reward=reward, monitor=_monitor_record(signal, spec.monitor.level) if spec.monitor else None)


def _monitor_record(signal: Signal, level: float) -> MonitorRecord | None:
    """What the curated run says of the monitor."""
    if signal.memory.audit is None:
        return None
    measures, state = signal.measures(0)["monitor"], signal.memory.audit
    return MonitorRecord(
        e_value=measures["e_value"],
        highest=max(measures["e_value"], min(float(state.highest.exp()), MAX_E_VALUE)),
        alarm=measures["alarm"],
        level=level,
        num_audited=measures["audited"],
        num_differing=measures["differing"],
    )


def _curated_images(store: Store) -> list[PromptedImage]:
    """The selected images with their prompts."""
    study = open_study(store.uri)
    return [
        (decode_stored(data, f"{store.uri}: the image of '{record['key']}'"), record["prompt"])
        for data, record in read_samples(study, [request.name for request in study.job.requests])
    ]


@functools.lru_cache(maxsize=2)
def _clip(address: str, device: str) -> Clip:
    return Clip.load(address, device)


def embed(address: str, device: str, images: Any) -> Tensor:
    """CLIP embeddings [N, d] of length one, in float64.

    Raises:
        RiskforgeError: the model gives values that are not finite.
    """
    clip = _clip(address, device)
    parts = [torch.from_numpy(unit(clip.image_embeds(batch).cpu().numpy())) for batch in batched(images)]
    embeds = torch.cat(parts).double()
    if not bool(embeds.isfinite().all()):
        raise RiskforgeError(f"models.clip: '{address}' gives embeddings that are not finite; replace its weights")
    return embeds


@functools.lru_cache(maxsize=4)
def real_features(address: str, labels: tuple[str, ...], clip: str, device: str, limit: int, field: str) -> Tensor:
    """CLIP embeddings [M, d] of real images, evenly drawn, of length sqrt(d); kept in this process.

    Raises:
        JobError: no image can be used.
    """
    embeds = embed(clip, device, (item.image for item in _drawn(address, labels, limit, field)))
    return embeds * embeds.shape[-1] ** 0.5


@functools.lru_cache(maxsize=2)
def prompted_real(address: str, labels: tuple[str, ...], template: str | None) -> tuple[PromptedImage, ...]:
    """Real images with the prompts of their classes, at most `MAX_REAL` evenly drawn ones; kept in this process.

    Raises:
        JobError: no image can be used.
    """
    return tuple(
        (item.image, make_prompt(template, Cell(classes=(item.class_index,), names=(labels[item.class_index],)), ""))
        for item in _drawn(address, labels, MAX_REAL, "training.real")
    )


def _drawn(address: str, labels: tuple[str, ...], limit: int, field: str) -> list[LabelledImage]:
    source = open_images(address, labels, field)
    items = list(draw_images(source, limit, 0, lambda text: None))
    images = [item for item in items if isinstance(item, LabelledImage)]
    if not images:
        raise JobError(
            nothing_usable(source, field, address, [item for item in items if not isinstance(item, LabelledImage)])
        )
    return images
