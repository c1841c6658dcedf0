"""Fine-tuning of generators on a GPU: each precision near float32 on a CPU, whole and by LoRA, and continued."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.job.spec import RuntimeSpec
from engine.studies.loop.finetuning.batches import TrainingImages
from engine.studies.loop.finetuning.program import fine_tune_pipeline
from engine.studies.loop.finetuning.recipe import FineTuneRecipe
from tests.test_generator_training import RUN, Shown, digit_images
from tests.tiny_pipelines import edit, save_pipeline

# Half precision is nothing for a CPU.
PRECISIONS = {"cuda": ("auto", "fp32", "fp16", "bf16"), "cpu": ("fp32",)}


class Stopped(Exception):
    """In place of a kill."""


class Stopping(Shown):
    """Stops a training at its fourth step."""

    def advance(self, text: str) -> None:
        if "step 4/" in text:
            raise Stopped


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "unclip"])
def parent(request, tmp_path_factory) -> Path:
    folder = save_pipeline(tmp_path_factory.mktemp("parent") / "pipeline", is_unclip=request.param)
    if request.param:
        sides = {"height": 16, "width": 16}
        edit(folder / "feature_extractor" / "preprocessor_config.json", size=sides, crop_size=sides)
    return folder


def train(parent: Path, output: Path, rank: int | None, device: str, display: Shown, **runtime: object) -> torch.Tensor:
    """The change of all weights."""
    fine_tune_pipeline(
        parent,
        TrainingImages(digit_images(None, 8)),
        FineTuneRecipe(num_steps=6, batch_size=4, learning_rate=1e-3, lora_rank=rank, checkpoint_every=2),
        output,
        parent_run=RUN,
        seed=1,
        device=device,
        display=display,
        runtime=RuntimeSpec(**runtime),
    )
    before, after = (load_file(folder / "unet/diffusion_pytorch_model.safetensors") for folder in (parent, output))
    return torch.cat([(after[name] - before[name]).flatten() for name in before])


@pytest.mark.parametrize("rank", [None, 2])
def test_a_gpu_trains_as_a_cpu_does(parent, rank, device, tmp_path):
    """In every precision, with and without recomputed activations; the first steps of AdamW turn signs alone."""
    expected = train(parent, tmp_path / "cpu", rank, "cpu", Shown())
    for precision in PRECISIONS[device]:
        for switch in ("off", "on"):
            options = {"precision": precision, "gradient_checkpointing": switch}
            found = train(parent, tmp_path / f"{precision}-{switch}", rank, device, Shown(), **options)
            similarity = float(torch.cosine_similarity(expected, found, dim=0))
            assert similarity > (0.99 if precision == "fp32" else 0.8), (precision, switch, similarity)


def test_a_stopped_training_continues_on_a_gpu(parent, device, tmp_path):
    """With the scaler of the loss in float16; kernels of a GPU may round differently."""
    precision = PRECISIONS[device][-2] if device == "cuda" else "fp32"
    expected = train(parent, tmp_path / "whole", None, device, Shown(), precision=precision)
    with pytest.raises(Stopped):
        train(parent, tmp_path / "stopped", None, device, Stopping(), precision=precision)
    shown = Shown()
    found = train(parent, tmp_path / "stopped", None, device, shown, precision=precision)
    assert shown.steps()[0] == "3/6"
    assert float(torch.cosine_similarity(expected, found, dim=0)) > 0.99
