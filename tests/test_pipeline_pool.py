"""Pipelines of a worker: which of them are held at a time."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from typing import Any

import pytest

from engine.generation import loading
from engine.job.spec import ModelsSpec, RuntimeSpec
from engine.models.diffusion import load_pipeline
from engine.models.hardware import choose_hardware

ADDRESS = "zoo:digits/stable-diffusion"


@pytest.mark.parametrize(("device", "num_held"), [("cuda", 0), ("cpu", 1)])
def test_a_gpu_holds_one_pipeline_at_a_time(monkeypatch: pytest.MonkeyPatch, device: str, num_held: int) -> None:
    """Its weights are gone when those of the next one are loaded, also if guidance has decoded with it."""
    cpu = choose_hardware(RuntimeSpec(device="cpu"))
    weights: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def load(address: str, hardware: Any, *, checks_safety: bool, models: ModelsSpec) -> Any:
        alive.append(sum(reference() is not None for reference in weights))
        return load_pipeline(ADDRESS, cpu, checks_safety=checks_safety)

    monkeypatch.setattr(loading, "load_pipeline", load)
    models = ModelsSpec(diffusion="d", clip="c", target="t")
    pool = loading.PipelinePool(dataclasses.replace(cpu, device=device), models)
    model = pool.get("one")
    decode = model.decoder.decoding(model.latent_shape).decode
    assert callable(decode)
    weights += [weakref.ref(next(part.parameters())) for part in (model._vae, model._network)]
    gc.collect()
    # What is let go of must not wait for the collector.
    gc.disable()
    try:
        del model, decode
        pool.get("other")
    finally:
        gc.enable()
    assert alive == [0, num_held * len(weights)]
