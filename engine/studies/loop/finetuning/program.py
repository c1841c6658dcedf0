"""Fine-tuning of a diffusion pipeline's network on prompted images, from a folder to a folder."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.data.run.manifest import software_versions
from engine.driver.progress import Display
from engine.errors import JobError
from engine.job.json_values import digest_of
from engine.job.spec import RuntimeSpec
from engine.models.addresses import resolve
from engine.models.configurations import read_config
from engine.models.diffusion import load_image_encoder, load_pipeline
from engine.models.digests import model_digest
from engine.models.hardware import Hardware, choose_hardware, fix_threads
from engine.models.kernels import fix_kernels
from engine.models.licences import licence_of
from engine.models.pipelines.base import Pipeline
from engine.models.pipelines.lookup import check_pipeline, check_pipeline_weights, family_of
from engine.models.stored_tensors import tensors_of
from engine.models.training_lineage import GENERATOR
from engine.studies.loop.finetuning.batches import Rows, TrainingImages, batches
from engine.studies.loop.finetuning.encoding import encode_training
from engine.studies.loop.finetuning.lora import check_rank
from engine.studies.loop.finetuning.objective import NoiseSchedule
from engine.studies.loop.finetuning.publishing import check_writable, is_published, publish
from engine.studies.loop.finetuning.recipe import FineTuneRecipe
from engine.studies.loop.finetuning.training import Task, Trained, train

DOCUMENT_VERSION = 1


def fine_tune_pipeline(
    parent: Path | str,
    samples: TrainingImages,
    recipe: FineTuneRecipe,
    output: Path,
    *,
    parent_run: dict[str, Any],
    seed: int,
    device: str = "auto",
    display: Display,
    runtime: RuntimeSpec | None = None,
) -> None:
    """Fine-tune a pipeline, and publish the result as a pipeline's folder with `training.json`.

    It returns at once where `output` has the result already. Where an earlier call was stopped, the same call continues
    from its checkpoint, and ends on a CPU with the bytes of an uninterrupted one.

    Side effects: writes `output`, atomically, and until then a hidden folder next to it; on a CPU one thread computes.

    Args:
        parent: address of a pipeline: `zoo:`, a folder or a hub id.
        samples: images with prompts.
        output: a folder that does not exist or is empty.
        parent_run: what `training.json` says of the curated run; its `uri` does not identify the training.
        device: auto, cpu or cuda.
        runtime: precision, attention and gradient checkpointing, as a job asks for them.

    Raises:
        JobError: the parent is no pipeline that can be fine-tuned, the recipe does not fit it, there are no images, a
            prompt is too long, or the loss is not finite.
        OutputError: `output` is something else, or the file system refuses.
    """
    address = str(parent)
    folder = resolve(address)
    family = check_trainable(folder, address, recipe)
    samples.check(recipe)
    asked = (runtime or RuntimeSpec()).model_copy(update={"device": device})
    hardware = choose_hardware(asked)
    document = _describe(folder, address, samples, recipe, seed, parent_run)
    work = output.with_name(f".{output.name}.training")
    if is_published(output, document["identity"]):
        # Left where a process ended right after publishing.
        shutil.rmtree(work, ignore_errors=True)
        return
    check_writable(work)
    rows = list(batches(samples, recipe, seed))
    with _one_thread(hardware):
        fix_kernels(hardware)
        precision = _precision(hardware, asked)
        # `auto` may have chosen xformers for weights in half precision.
        attention = asked.attention if asked.attention == "xformers" else "sdpa"
        task = _prepare(address, samples, rows, recipe, hardware, attention, display) | {
            "recipe": recipe,
            "seed": seed,
            "precision": precision,
            "identity": document["identity"],
            "folder": work,
        }
        trained = train(Task(**task), display, family.trained_part)
    document |= {"precision": precision, **_summary(trained, rows), "versions": software_versions()}
    publish(folder, family.trained_part, trained, document, work=work, output=output)


def check_trainable(folder: Path, address: str, recipe: FineTuneRecipe) -> type[Pipeline]:
    """Check by its files that a pipeline can be fine-tuned with a recipe, before anything is loaded.

    Raises:
        JobError: it is of no family that runs, or of one whose network is not trained here, or the rank is too large.
    """
    check_pipeline(folder, address, checks_safety=False)
    check_pipeline_weights(folder, address, checks_safety=False)
    family = family_of(folder, address)
    if problem := family.training_problem(folder):
        raise JobError(f"'{address}' {problem}")
    if recipe.lora_rank is not None:
        stored = tensors_of(folder / family.trained_part, address, "a diffusion pipeline")
        check_rank(recipe.lora_rank, {name: tensor.shape for name, tensor in stored.items()}, address)
    return family


def _describe(
    folder: Path, address: str, samples: TrainingImages, recipe: FineTuneRecipe, seed: int, parent_run: dict[str, Any]
) -> dict[str, Any]:
    """What decides a training, with its digest."""
    fields = dataclasses.asdict(recipe)
    counts = {"curated": len(samples.curated), "real": len(samples.real)}
    digest = model_digest(address)
    decisive = {
        "recipe": {name: value for name, value in fields.items() if name != "checkpoint_every"},
        "seed": seed,
        "parent_model": digest,
        # A run that was moved is the same run.
        "parent_run": {name: value for name, value in parent_run.items() if name != "uri"},
        "samples": counts,
    }
    return {
        "training": GENERATOR,
        "document_version": DOCUMENT_VERSION,
        "identity": digest_of(decisive),
        "parent_run": parent_run,
        "parent_model": {
            "address": address,
            "digest": digest,
            "pipeline": family_of(folder, address).class_name,
            "license": licence_of(address),
        },
        "recipe": fields,
        "seed": seed,
        "samples": counts,
    }


def _summary(trained: Trained, rows: list[Rows]) -> dict[str, Any]:
    """What came of a training; no times, so that equal trainings give equal files."""
    losses = trained.losses
    tenth = max(1, len(losses) // 10)
    return {
        "trained": {"parameters": trained.num_parameters, "projections": len(trained.adapter) // 2 or None},
        "drawn": {
            "curated": sum(len(batch.curated) for batch in rows),
            "real": sum(len(batch.real) for batch in rows),
        },
        "losses": {
            "first_tenth": sum(losses[:tenth]) / tenth,
            "last_tenth": sum(losses[-tenth:]) / tenth,
            "mean": sum(losses) / len(losses),
        },
    }


def _prepare(
    address: str,
    samples: TrainingImages,
    rows: list[Rows],
    recipe: FineTuneRecipe,
    hardware: Hardware,
    attention: str,
    display: Display,
) -> dict[str, Any]:
    """Load the pipeline, and encode the images."""
    display.phase("loading the pipeline")
    # Small updates would vanish in half precision: the weights are float32, and autocast computes.
    exact = dataclasses.replace(
        hardware, dtype="float32", attention=attention, compile=False, batch_size=recipe.batch_size
    )
    pipeline = load_pipeline(address, exact, checks_safety=False)
    encoder = load_image_encoder(address, hardware.device) if pipeline.embedding_parts else None
    scheduler = read_config(pipeline.folder / "scheduler" / "scheduler_config.json")
    return {
        "pipeline": pipeline,
        "schedule": NoiseSchedule(scheduler),
        "num_levels": pipeline.num_noise_levels(pipeline.folder),
        "data": encode_training(pipeline, encoder, samples, rows, display),
        "batches": rows,
    }


def _precision(hardware: Hardware, runtime: RuntimeSpec) -> str:
    """The type that the network computes in: on a GPU bfloat16 where it has it, which needs no scaling of the loss."""
    import torch

    if hardware.is_cpu or (runtime.precision != "auto"):
        return hardware.dtype
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


@contextlib.contextmanager
def _one_thread(hardware: Hardware) -> Iterator[None]:
    """Within it a CPU computes with one thread: the order of summation depends on their number."""
    import torch

    before = torch.get_num_threads()
    fix_threads(hardware)
    try:
        yield
    finally:
        torch.set_num_threads(before)
