"""The steps of a fine-tuning: AdamW, warm-up and cosine, clipped gradients, mixed precision on a GPU."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.driver.progress import Display, duration
from engine.errors import JobError
from engine.methods.heartbeat import beat
from engine.models.pipelines.base import Pipeline
from engine.studies.loop.finetuning.batches import ADAPTER_STREAM, Rows
from engine.studies.loop.finetuning.checkpoints import Checkpoint
from engine.studies.loop.finetuning.encoding import TrainingData
from engine.studies.loop.finetuning.lora import Adapter
from engine.studies.loop.finetuning.objective import Draws, NoiseSchedule, denoising_loss, step_seed
from engine.studies.loop.finetuning.recipe import FineTuneRecipe

MIXED = {"float32": "no", "float16": "fp16", "bfloat16": "bf16"}


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Task:
    """A training, before its first step.

    Attributes:
        pipeline: in float32.
        schedule: of its network.
        batches: of every step.
        num_levels: noise levels of image embeddings; 0 where the pipeline takes none.
        precision: name of the torch type that the network computes in.
        identity: digest of what decides the training.
        folder: of the checkpoint.
    """

    pipeline: Pipeline
    schedule: NoiseSchedule
    data: TrainingData
    batches: Sequence[Rows]
    num_levels: int
    recipe: FineTuneRecipe
    seed: int
    precision: str
    identity: str
    folder: Path


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Trained:
    """What a training leaves.

    Attributes:
        weights: of the network, by name, with the updates of an adapter merged into them.
        adapter: updates by diffusers' keys; empty where the whole network was trained.
        losses: of every step.
        num_parameters: that were trained.
    """

    weights: dict[str, Tensor]
    adapter: dict[str, Tensor]
    losses: list[float]
    num_parameters: int


def train(task: Task, display: Display, part: str) -> Trained:
    """Train a pipeline's network in place, from its checkpoint where there is one.

    Args:
        part: of the pipeline: the network.

    Raises:
        JobError: the loss is not finite, or a GPU's memory does not hold a batch.
        OutputError: a checkpoint cannot be written.
    """
    network, adapter = task.pipeline.network, None
    if task.recipe.lora_rank is None:
        network.requires_grad_(True)
    else:
        generator = torch.Generator().manual_seed(step_seed(task.seed, ADAPTER_STREAM))
        adapter = Adapter(network, rank=task.recipe.lora_rank, scale=task.recipe.lora_scale, generator=generator)
    loop = _Loop(task, network if adapter is None else adapter)
    network.train()
    # Dropout draws from the global stream, which is restored afterwards.
    with torch.random.fork_rng(), _within_memory(task.recipe):
        loop.run(display)
    network.requires_grad_(False).eval()
    if adapter is not None:
        adapter.merge()
    return Trained(
        weights=network.state_dict(),
        adapter={} if adapter is None else adapter.tensors(part),
        losses=loop.losses,
        num_parameters=sum(parameter.numel() for parameter in loop.parameters.values()),
    )


class _Loop:
    """Parameters and optimizer of a training, and their checkpoint.

    Args:
        trained: the network, or the adapter of a frozen one.
    """

    def __init__(self, task: Task, trained: nn.Module) -> None:
        self._task = task
        self.parameters = dict(trained.named_parameters())
        self.losses = list[float]()
        self._accelerator = _accelerator(task.pipeline.hardware.is_cpu, MIXED[task.precision])
        optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=task.recipe.learning_rate, weight_decay=task.recipe.weight_decay
        )
        self._optimizer: Any = self._accelerator.prepare(optimizer)
        self._resume()

    def run(self, display: Display) -> None:
        """All steps that are not done."""
        recipe, first, started = self._task.recipe, len(self.losses), time.monotonic()
        for step in range(first, recipe.num_steps):
            self.losses.append(self._step(step))
            beat()
            done, left = step + 1 - first, recipe.num_steps - step - 1
            text = f"fine-tuning: step {step + 1}/{recipe.num_steps}, loss {self.losses[-1]:.4g}"
            display.advance(f"{text}, ETA {duration((time.monotonic() - started) / done * left)}" if left else text)
            if left and (step + 1) % recipe.checkpoint_every == 0:
                self._checkpoint().write(self._task.folder)

    def _step(self, step: int) -> float:
        task, recipe = self._task, self._task.recipe
        torch.manual_seed(step_seed(task.seed, step))
        batch = task.data.batch(task.batches[step], task.pipeline.hardware.device)
        draws = Draws.of_step(
            task.seed,
            step,
            tuple(batch.latents.shape),
            num_timesteps=task.schedule.num_timesteps,
            empty_share=recipe.empty_prompt_share,
            num_levels=max(1, task.num_levels),
            embedding_dim=0 if batch.embeds is None else batch.embeds.shape[1],
        )
        for group in self._optimizer.param_groups:
            group["lr"] = recipe.rate_at(step)
        with self._accelerator.autocast():
            loss = denoising_loss(task.pipeline, task.schedule, batch, draws)
        self._accelerator.backward(loss)
        self._accelerator.clip_grad_norm_(list(self.parameters.values()), recipe.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        if not math.isfinite(value := float(loss.detach())):
            raise not_finite(recipe, f"the loss of step {step + 1}")
        return value

    def _checkpoint(self) -> Checkpoint:
        scaler = self._accelerator.scaler
        return Checkpoint(
            identity=self._task.identity,
            weights={name: parameter.detach() for name, parameter in self.parameters.items()},
            optimizer=self._optimizer.state_dict(),
            scaler=scaler.state_dict() if scaler is not None else {},
            losses=self.losses,
        )

    def _resume(self) -> None:
        found = Checkpoint.read(self._task.folder, self._task.identity)
        if found is None:
            return
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(found.weights[name])
        self._optimizer.load_state_dict(found.optimizer)
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(found.scaler)
        self.losses = list(found.losses)


def _accelerator(on_cpu: bool, mixed_precision: str) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # accelerate refuses a second precision in a process; here each training has its own.
    if AcceleratorState._shared_state.get("_mixed_precision", mixed_precision) != mixed_precision:
        AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=on_cpu, mixed_precision=mixed_precision)


@contextlib.contextmanager
def _within_memory(recipe: FineTuneRecipe) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise JobError(
            f"training.batch_size: {recipe.batch_size} samples do not fit into the GPU's memory; use fewer, train with"
            " lora_rank, or set runtime.gradient_checkpointing to on"
        ) from None


def not_finite(recipe: FineTuneRecipe, what: str) -> JobError:
    """The error for values beyond all numbers, with the remedy."""
    return JobError(
        f"training.learning_rate: {recipe.learning_rate:g} makes {what} grow beyond all numbers; use a smaller one"
    )
