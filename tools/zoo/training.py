"""What every trainer of the zoo shares: one resumable loop, and export with half-size weights.

Replica `r` of step `i` of stage `s` draws all its randomness from (seed, s, i, r), so a run that was stopped and
resumed sees the same batches as one that was not.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from replicas import Replicas
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

_SAME_SIGNAL_SECONDS = 2.0

LossFunction = Callable[[np.random.Generator], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How long and how fast to train; the learning rate warms up linearly and decays as a cosine to 2 %."""

    num_steps: int
    learning_rate: float
    warmup_steps: int = 100
    weight_decay: float = 0.02
    ema_decay: float = 0.0
    """Decay of the averaged weights; 0 keeps the last weights."""
    checkpoint_every: int = 200
    num_replicas: int = 1
    """Processes that share a step; each draws a batch of its own."""

    def rate_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.num_steps - self.warmup_steps)
        return self.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def fit(name: str, module: nn.Module, loss: LossFunction, recipe: Recipe, *, seed: int, folder: Path) -> None:
    """Minimise `loss(rng)` over the parameters of `module`, in place, resuming from `folder/NAME.pt` if it is there.

    SIGTERM and Ctrl-C let the step end, write the checkpoint and leave the program (`SystemExit`), so that a training
    can be done in pieces: `timeout 600 python tools/zoo/train_...`.

    Side effects: prints progress, writes the checkpoint, seeds torch's global generator before every step.
    """
    state = _TrainingState(module, recipe, seed)
    first = state.resume(folder / f"{name}.pt")
    module.train()

    def replica_loss(step: int, replica: int) -> Tensor:
        return loss(_seed_step(name, step, replica, seed=seed))

    steps = range(first, recipe.num_steps)
    replicas = Replicas(module, replica_loss, count=recipe.num_replicas, steps=steps)
    # Replicas first: forked with the handlers of an interruption, they could not be terminated.
    with replicas, _Interruption() as interruption:
        _run_steps(name, state, replicas, interruption, checkpoint=folder / f"{name}.pt")
    state.load_average()
    module.eval()


def _run_steps(
    name: str, state: _TrainingState, replicas: Replicas, interruption: _Interruption, *, checkpoint: Path
) -> None:
    recipe, first = state.recipe, replicas.steps.start
    start, recent = time.monotonic(), []
    for step in replicas.steps:
        state.optimizer.zero_grad(set_to_none=True)
        recent.append(replicas.backward(step))
        state.update(step)
        if (step + 1) % 50 == 0 or step + 1 == recipe.num_steps:
            pace = (time.monotonic() - start) / (step + 1 - first)
            print(
                f"{name}: step {step + 1}/{recipe.num_steps} loss {np.mean(recent):.4f} {pace:.2f} s/step", flush=True
            )
            recent.clear()
        is_last = step + 1 == recipe.num_steps
        if (step + 1) % recipe.checkpoint_every == 0 or is_last or interruption.signal:
            state.save(checkpoint, step + 1)
        if interruption.signal:
            print(f"{name}: interrupted after step {step + 1}; the same command goes on from there", flush=True)
            raise SystemExit(128 + interruption.signal)


class _Interruption:
    """Notes SIGTERM and SIGINT while open, in the main thread; a second one, a while later, acts as it always does.

    Attributes:
        signal: its number; 0 until it comes.
    """

    def __init__(self) -> None:
        self.signal, self._noted_at = 0, 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, _: object) -> None:
        # `timeout` and `uv run` both pass a signal on: two within moments are one.
        if self.signal and time.monotonic() - self._noted_at > _SAME_SIGNAL_SECONDS:
            self.__exit__()
            signal.raise_signal(number)
        elif not self.signal:
            self.signal, self._noted_at = number, time.monotonic()


class _TrainingState:
    """Optimiser and averaged weights of one module, and their checkpoint."""

    def __init__(self, module: nn.Module, recipe: Recipe, seed: int) -> None:
        self.module, self.recipe = module, recipe
        shapes = [tuple(p.shape) for p in module.parameters()]
        self.made_with = f"seed {seed}, {recipe}, {len(shapes)} tensors, {zlib.crc32(repr(shapes).encode()):08x}"
        self.parameters: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in self.parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
            {"params": [p for p in self.parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), foreach=True)
        self.average = [p.detach().clone() for p in self.parameters]

    def update(self, step: int) -> None:
        """One AdamW step with the gradient norm clipped to 1, and one of the average."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate_at(step)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        decay = min(self.recipe.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1 - decay)

    def save(self, path: Path, num_steps: int) -> None:
        """Write the checkpoint next to its target and replace that atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "num_steps": num_steps,
            "made_with": self.made_with,
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
        }
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def resume(self, path: Path) -> int:
        """Load the checkpoint if there is one; the number of steps done.

        Ends the program where it was made with another recipe, seed or model.
        """
        if not path.exists():
            return 0
        # Adam's counters stay on the CPU, where they are not waited for.
        state = torch.load(path, weights_only=True, map_location="cpu")
        if state["made_with"] != self.made_with:
            there, wanted = state["made_with"], self.made_with
            raise SystemExit(
                f"error: {path} was made with {there}, not with {wanted}; remove it or choose another --build-folder"
            )
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average = [a.to(p.device) for a, p in zip(state["average"], self.parameters, strict=True)]
        return int(state["num_steps"])

    def load_average(self) -> None:
        """Put the averaged weights into the module (they are the last weights where `ema_decay` is 0)."""
        if self.recipe.ema_decay > 0:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, self.average)


def _seed_step(name: str, step: int, replica: int, *, seed: int) -> np.random.Generator:
    stream = np.random.SeedSequence([seed, zlib.crc32(name.encode()), step, replica])
    torch.manual_seed(int(stream.generate_state(1)[0]))
    return np.random.default_rng(stream)


def pixels(images: NDArray[np.uint8]) -> Tensor:
    """[N, 32, 32, 3] bytes as [N, 3, 32, 32] in -1..1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def batches(total: int, size: int) -> Iterable[slice]:
    """Slices of at most `size` that cover `total`."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def export(model: Any, folder: Path) -> None:
    """`model.save_pretrained(folder)` with weights stored as fp16 and a config that still asks for fp32.

    Running statistics keep their precision: they are few, and small variances lose most.
    """
    model.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        tensors = {
            name: value.half() if value.dtype == torch.float32 and "running_" not in name else value
            for name, value in load_file(path).items()
        }
        save_file(tensors, path, metadata={"format": "pt"})
    edit_json(folder / "config.json", _name_or_path=None)


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes the key."""
    content = json.loads(path.read_text())
    for key, value in changes.items():
        content.pop(key, None)
        if value is not None:
            content[key] = value
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def write_image_processor(folder: Path, kind: str, *, side: int = 32, **extra: Any) -> None:
    """A `preprocessor_config.json` for square RGB images of `side` pixels, scaled to -1..1."""
    config = {
        "image_processor_type": kind,
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        **extra,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
