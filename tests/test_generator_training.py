"""Fine-tuning of generators: the objective, low-rank updates, mixture of samples, folders, checkpoints, refusals."""

from __future__ import annotations

import dataclasses
import errno
import json
import resource
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from engine.data.images.digits import training_batch
from engine.errors import JobError, OutputError
from engine.job.spec import RuntimeSpec
from engine.methods.sampling.loop import sample
from engine.methods.sampling.spec import SamplingSpec
from engine.models.addresses import resolve
from engine.models.classifier import Classifier
from engine.models.diffusion import load_pipeline
from engine.models.digests import model_digest
from engine.models.hardware import choose_hardware
from engine.models.library_logging import quiet_libraries
from engine.models.pipelines.base import EMBEDDINGS, LATENTS
from engine.models.pipelines.stable_diffusion import StableDiffusion
from engine.studies.loop.finetuning import checkpoints, publishing, training
from engine.studies.loop.finetuning.batches import TrainingImages, batches, num_curated
from engine.studies.loop.finetuning.encoding import image_tensors
from engine.studies.loop.finetuning.lora import Adapter, is_projection
from engine.studies.loop.finetuning.objective import Batch, Draws, NoiseSchedule, denoising_loss
from engine.studies.loop.finetuning.program import fine_tune_pipeline
from engine.studies.loop.finetuning.recipe import FineTuneRecipe
from engine.studies.loop.pipelines import prompted_real
from tests.strike import kill_at
from tests.tiny_pipelines import BETAS, edit, save_lcm_pipeline, save_pipeline, save_xl_pipeline

DIGITS = "zoo:digits/stable-diffusion"
LABELS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PROMPT = "a photo of a digit"
RUN = {"uri": "runs/curated", "plan_digest": "5d"}
SHORT = FineTuneRecipe(num_steps=5, batch_size=4, learning_rate=1e-3, checkpoint_every=2)


class Shown:
    """A display that keeps what it is given."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def phase(self, text: str) -> None:
        self.texts.append(text)

    advance = notice = phase

    def steps(self) -> list[str]:
        return [text.split(",")[0].rpartition(" ")[2] for text in self.texts if text.startswith("fine-tuning")]


def digit_images(wanted: int | None, count: int, prompt: str = PROMPT) -> list[tuple[PIL.Image.Image, str]]:
    """Composed digits, of one class or of all."""
    batch = training_batch(40 * count if wanted is not None else count, rng=np.random.default_rng(0), plain_share=1.0)
    rows = [row for row, label in enumerate(batch.labels) if wanted in (None, label)][:count]
    return [(PIL.Image.fromarray(batch.images[row]), prompt) for row in rows]


def fine_tune(parent: Any, output: Path, recipe: FineTuneRecipe = SHORT, **changes: Any) -> Shown:
    """One call with few images; the display that it used."""
    quiet_libraries()
    display = Shown()
    arguments = {"samples": TrainingImages(digit_images(None, 6)), "seed": 3, "parent_run": RUN} | changes
    fine_tune_pipeline(parent, recipe=recipe, output=output, device="cpu", display=display, **arguments)
    return display


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("tiny") / "pipeline")


@pytest.fixture(scope="module")
def threes(tmp_path_factory) -> SimpleNamespace:
    """The digits pipeline, trained on threes alone, for a prompt that names no class."""
    output = tmp_path_factory.mktemp("threes") / "model"
    recipe = FineTuneRecipe(num_steps=20, batch_size=16, learning_rate=3e-4)
    return SimpleNamespace(
        output=output,
        shown=fine_tune(DIGITS, output, recipe, samples=TrainingImages(digit_images(3, 48))),
        document=json.loads((output / "training.json").read_text()),
    )


# Which samples, in which proportion.


@given(st.floats(0, 50), st.integers(1, 40), st.integers(1, 60))
def test_the_mixture_is_exact_over_a_training(weight, batch_size, num_steps):
    """Every step has its samples; curated ones are lambda / (1 + lambda) of all, to the nearest, at any step."""
    recipe = FineTuneRecipe(num_steps=num_steps, batch_size=batch_size, curated_weight=weight)
    counts = [num_curated(step, recipe.curated_share, batch_size) for step in range(num_steps)]
    assert all(0 <= count <= batch_size for count in counts)
    for done in range(1, num_steps + 1):
        assert abs(sum(counts[:done]) - weight / (1 + weight) * batch_size * done) <= 0.5 + 1e-6
    assert max(counts) - min(counts) <= 1


def test_samples_come_in_shuffled_rounds():
    """No sample twice before all of its kind came once; equal seeds draw equally, others otherwise."""
    recipe = FineTuneRecipe(num_steps=9, batch_size=8, curated_weight=3.0)
    images = TrainingImages(curated=digit_images(None, 7), real=digit_images(None, 5))
    drawn = list(batches(images, recipe, 1))
    for kind, number, total in (("curated", 7, 54), ("real", 5, 18)):
        counts = Counter(row for rows in drawn for row in getattr(rows, kind))
        assert sum(counts.values()) == total and set(counts) == set(range(number))
        assert max(counts.values()) - min(counts.values()) <= 1
    assert drawn == list(batches(images, recipe, 1)) != list(batches(images, recipe, 2))
    alone = list(batches(TrainingImages(images.curated), recipe, 1))
    assert all(len(rows.curated) == 8 and not rows.real for rows in alone)


def test_real_images_have_prompts_as_requests_make_them(tmp_path):
    for name in ("three", "eight"):
        (tmp_path / name).mkdir()
        digit_images(None, 1)[0][0].save(tmp_path / name / "a.png")
    assert sorted(prompt for _, prompt in prompted_real(str(tmp_path), LABELS, None)) == [
        "a photo of a eight",
        "a photo of a three",
    ]
    assert {prompt for _, prompt in prompted_real(str(tmp_path), LABELS, PROMPT)} == {PROMPT}
    (tmp_path / "three" / "a.png").write_bytes(b"no image")
    (tmp_path / "eight" / "a.png").unlink()
    prompted_real.cache_clear()
    with pytest.raises(JobError, match=r"training\.real: .* has no usable image"):
        prompted_real(str(tmp_path), LABELS, None)


def test_images_of_another_size_are_fitted():
    """The middle of a wide image, in the pipeline's size."""
    wide = np.zeros((20, 60, 3), dtype=np.uint8)
    wide[:, 20:40] = 255
    tensor = image_tensors([PIL.Image.fromarray(wide)], (3, 8, 8))
    assert tensor.shape == (1, 3, 8, 8) and float(tensor.min()) > 0.9


# What is learned.


def draws_of(step: int, rows: int = 64, **changes: Any) -> Draws:
    options = {"num_timesteps": 1000, "empty_share": 0.1} | changes
    return Draws.of_step(5, step, (rows, 4, 8, 8), **options)


def test_the_numbers_of_a_step_depend_on_seed_and_step_alone():
    for name in ("noise", "timesteps", "is_unconditional"):
        first, same, other = (getattr(draws_of(step), name) for step in (1, 1, 2))
        assert torch.equal(first, same) and not torch.equal(first, other)


def test_timesteps_cover_the_schedule_whatever_the_row():
    """One in each of 64 equal parts of the schedule; rows, of which curated ones are first, decide nothing."""
    steps = torch.stack([draws_of(step).timesteps for step in range(60)])
    assert torch.equal((steps.sort(1).values * 64).div(1000, rounding_mode="floor").float().mean(0).round(),
                       torch.arange(64.0))  # fmt: skip
    assert (steps.float().mean(0) - 500).abs().max() < 150
    empty = torch.stack([draws_of(step).is_unconditional for step in range(60)]).float().mean()
    assert 0.08 < empty < 0.12
    levels = torch.cat([draws_of(step, num_levels=500, embedding_dim=3).noise_levels for step in range(60)])
    assert levels.max() > 450 and 0.45 < (levels < 10).float().mean() < 0.6


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_target_gives_the_latents_back(prediction_type):
    """What a perfect network predicts is what DDIM, in one step to no noise, turns into the latents without noise."""
    config = dict(diffusers.EulerDiscreteScheduler(**BETAS, prediction_type=prediction_type).config)
    schedule = NoiseSchedule(config)
    latents, noise, times = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([5, 500, 990])
    noisy, target = schedule.noised(latents, noise, times), schedule.target(latents, noise, times)
    solver = diffusers.DDIMScheduler.from_config(config, clip_sample=False)
    solver.set_timesteps(1000)
    for row, time in enumerate(times):
        found = solver.step(target[row], int(time), noisy[row]).pred_original_sample
        assert torch.allclose(found, latents[row], atol=1e-3)


def test_unknown_predictions_are_no_objective():
    schedule = NoiseSchedule({**BETAS, "prediction_type": "flow_prediction"})
    with pytest.raises(ValueError, match="flow_prediction"):
        schedule.target(torch.zeros(1), torch.zeros(1), torch.zeros(1, dtype=torch.int64))


def test_samples_without_condition_have_the_unconditional_half(diffusion):
    """Its loss is that of the empty prompt, row by row: classifier-free guidance keeps both halves."""
    schedule = NoiseSchedule(dict(BETAS))
    draws = draws_of(0, rows=4)
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    prompts = ["a photo of a three"] * 4

    @torch.no_grad()
    def loss(prompts: list[str], unconditional: list[bool]) -> float:
        chosen = dataclasses.replace(draws, is_unconditional=torch.tensor(unconditional))
        return float(denoising_loss(diffusion, schedule, Batch(latents=latents, prompts=prompts), chosen))

    mixed = loss(prompts, [True, False, True, False])
    assert mixed == pytest.approx(loss(["", prompts[1], "", prompts[3]], [False] * 4), abs=1e-6)
    assert abs(mixed - loss(prompts, [False] * 4)) > 1e-4


# Low-rank updates.


def test_merging_adds_the_updates_to_the_weights(diffusion):
    """Output with the updates beside the weights and in them; base + scale * up @ down; nothing at first."""
    network = diffusers.UNet2DConditionModel.from_pretrained(resolve(DIGITS) / "unet").requires_grad_(False).eval()
    base = {name: weight.clone() for name, weight in network.state_dict().items()}
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), diffusion.encode(["", PROMPT])["encoder_hidden_states"]

    def output() -> torch.Tensor:
        with torch.no_grad():
            return network(*inputs, return_dict=False)[0]

    before = output()
    adapter = Adapter(network, rank=3, scale=0.5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(output(), before)
    with torch.no_grad():
        for update in adapter.updates:
            update.up.normal_(std=0.3)
    beside, keys = output(), adapter.tensors("unet")
    adapter.merge()
    assert torch.allclose(output(), beside, atol=1e-4) and not torch.allclose(beside, before, atol=1e-2)
    for name, weight in network.state_dict().items():
        if not is_projection(name):
            assert torch.equal(weight, base[name])
            continue
        stem = f"unet.{name.removesuffix('.weight')}"
        product = keys[f"{stem}.lora_B.weight"] @ keys[f"{stem}.lora_A.weight"]
        assert torch.allclose(weight, base[name] + product, atol=1e-5) and bool(product.any())
    assert len(keys) == 2 * sum(is_projection(name) for name in base) == 2 * len(list(adapter.updates))


def test_lora_changes_the_attention_projections_alone(tiny, tmp_path):
    """The folder has the merged weights, and the adapter beside them where no pipeline takes it for its own."""
    output = tmp_path / "model"
    fine_tune(tiny, output, dataclasses.replace(SHORT, lora_rank=2, lora_alpha=4.0))
    before, after = weights_of(tiny), weights_of(output)
    updates = load_file(output / "adapter" / "pytorch_lora_weights.safetensors")
    for name, weight in after.items():
        assert torch.equal(weight, before[name]) != is_projection(name)
        if is_projection(name):
            stem = f"unet.{name.removesuffix('.weight')}"
            product = updates[f"{stem}.lora_B.weight"] @ updates[f"{stem}.lora_A.weight"]
            assert torch.allclose(weight, before[name] + product, atol=1e-6)
    keys, alphas = diffusers.StableDiffusionPipeline.lora_state_dict(output / "adapter")
    assert keys.keys() == updates.keys() and alphas is None
    load_pipeline(str(output), cpu())


# Whole trainings of the zoo's pipeline.


def cpu() -> Any:
    return choose_hardware(RuntimeSpec(device="cpu"))


def validation_loss(pipeline: Any) -> float:
    """Of threes that were not trained on, with noise that is the same for all."""
    pairs = digit_images(3, 80)[48:]
    with torch.no_grad():
        latents = pipeline.encode_images(image_tensors([image for image, _ in pairs], pipeline.image_shape))
        batch = Batch(latents=latents, prompts=[prompt for _, prompt in pairs])
        draws = draws_of(0, rows=len(pairs), empty_share=0.0)
        return float(denoising_loss(pipeline, NoiseSchedule(dict(BETAS)), batch, draws))


def generated_threes(pipeline: Any) -> float:
    """Share of threes, as the oracle reads them, among samples of equal seeds."""
    spec = SamplingSpec(scheduler="dpmsolver++", num_inference_steps=6, guidance_scale=1.0)
    sampler, noise = pipeline.sampler(spec), pipeline.draw_noise(range(24))
    with torch.no_grad():
        latents = sample(pipeline.denoiser([PROMPT] * 24, spec, sampler), sampler, noise[LATENTS])
        logits = Classifier.load("zoo:digits/oracle").logits(pipeline.decode(latents).clamp(0, 1))
    return float((logits.argmax(1) == 3).float().mean())


def test_training_on_a_class_makes_more_of_it(diffusion, threes):
    """The loss on others of the class falls, and the share of the class grows by more than a half of all."""
    trained = load_pipeline(str(threes.output), cpu())
    assert validation_loss(trained) < 0.98 * validation_loss(diffusion)
    assert generated_threes(trained) > generated_threes(diffusion) + 0.3


def test_the_folder_is_an_ordinary_pipeline(threes):
    """Other parts are byte by byte the parent's, the network's weights have its types; diffusers reads it as well."""
    parent, found = bytes_of(resolve(DIGITS)), bytes_of(threes.output)
    changed = "unet/diffusion_pytorch_model.safetensors"
    assert found.keys() == parent.keys() | {"training.json"}
    assert {name for name in parent if found[name] != parent[name]} == {changed}
    assert len(found[changed]) == len(parent[changed])
    before, after = weights_of(resolve(DIGITS)), weights_of(threes.output)
    assert {name: (weight.dtype, weight.shape) for name, weight in after.items()} == {
        name: (weight.dtype, weight.shape) for name, weight in before.items()
    }
    assert sum(not torch.equal(after[name], before[name]) for name in before) > 0.9 * len(before)
    diffusers.DiffusionPipeline.from_pretrained(threes.output)
    assert not list(threes.output.parent.glob(".*"))


def test_the_document_names_the_parents(threes):
    document = threes.document
    assert document["parent_run"] == RUN and document["seed"] == 3
    assert document["parent_model"]["digest"] == model_digest(DIGITS) != model_digest(str(threes.output))
    assert document["parent_model"]["address"] == DIGITS and document["parent_model"]["license"] == "apache-2.0"
    assert document["samples"] == {"curated": 48, "real": 0} and document["drawn"] == {"curated": 320, "real": 0}
    assert document["recipe"]["learning_rate"] == 3e-4 and document["precision"] == "float32"
    assert document["trained"]["parameters"] == sum(weight.numel() for weight in weights_of(threes.output).values())
    texts = [text for text in threes.shown.texts if text.startswith("fine-tuning")]
    shown = [float(text.split("loss ")[1].split(",")[0]) for text in texts]
    means = {"first_tenth": np.mean(shown[:2]), "last_tenth": np.mean(shown[-2:]), "mean": np.mean(shown)}
    assert document["losses"] == pytest.approx(means, rel=1e-3)
    assert threes.shown.steps() == [f"{step}/20" for step in range(1, 21)]


def test_a_complete_folder_is_left_alone(threes, monkeypatch):
    """The same call returns before anything is loaded; another training is not written over it."""
    before = bytes_of(threes.output)
    monkeypatch.setattr("engine.studies.loop.finetuning.program.load_pipeline", None)
    recipe = FineTuneRecipe(num_steps=20, batch_size=16, learning_rate=3e-4, checkpoint_every=7)
    samples = TrainingImages(digit_images(3, 48))
    moved = RUN | {"uri": "elsewhere"}
    assert fine_tune(DIGITS, threes.output, recipe, samples=samples, parent_run=moved).texts == []
    for change in ({"seed": 4}, {"parent_run": {"plan_digest": "x"}}, {"recipe": SHORT}):
        with pytest.raises(OutputError, match="another training"):
            fine_tune(DIGITS, threes.output, **{"recipe": recipe, "samples": samples} | change)
    assert bytes_of(threes.output) == before


# Every family.


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_stable_unclip_learns_from_image_embeddings(tmp_path, lora_rank):
    """The layer that reads the embeddings is trained, too; the parent's v-prediction is its objective."""
    scheduler = diffusers.DDIMScheduler(**BETAS, clip_sample=False, prediction_type="v_prediction")
    parent = save_pipeline(tmp_path / "parent", is_unclip=True, scheduler=scheduler)
    sides = {"height": 16, "width": 16}
    edit(parent / "feature_extractor" / "preprocessor_config.json", size=sides, crop_size=sides)
    output = tmp_path / "model"
    fine_tune(parent, output, dataclasses.replace(SHORT, lora_rank=lora_rank))
    before, after = weights_of(parent), weights_of(output)
    reads_embedding = "class_embedding.linear_1.weight"
    assert torch.equal(before[reads_embedding], after[reads_embedding]) == (lora_rank is not None)
    assert load_pipeline(str(output), cpu()).draw_noise([1])[EMBEDDINGS].shape == (1, 8)


def test_another_family_is_trained_too(tmp_path):
    """Stable Diffusion XL, with its pooled embeddings and sizes: nothing here knows of it."""
    parent = save_xl_pipeline(tmp_path / "parent")
    fine_tune(parent, tmp_path / "model")
    reads_pooled = "add_embedding.linear_1.weight"
    assert not torch.equal(weights_of(parent)[reads_pooled], weights_of(tmp_path / "model")[reads_pooled])


def test_a_family_without_trained_part_is_refused_by_name(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(StableDiffusion, "trained_part", "")
    with pytest.raises(JobError, match="is a StableDiffusionPipeline, which can be sampled but not fine-tuned"):
        fine_tune(tiny, tmp_path / "model")


@pytest.mark.parametrize("kind", ["latent consistency", "guidance embedding", "LCM-LoRA"])
def test_models_of_few_steps_are_refused_by_name(kind, tmp_path):
    """Training on noise undoes what they were distilled to: one is a class of its own, others look like their base."""
    if kind == "latent consistency":
        parent, words = (
            save_lcm_pipeline(tmp_path / "parent"),
            "is a LatentConsistencyModelPipeline, which can be sampled",
        )
    else:
        options = {"unet": {"time_cond_proj_dim": 8}} if kind == "guidance embedding" else {}
        scheduler = diffusers.LCMScheduler() if kind == "LCM-LoRA" else None
        parent = save_pipeline(tmp_path / "parent", scheduler=scheduler, **options)
        words = "is distilled to sample in few steps, which training on noise would undo"
    with pytest.raises(JobError, match=words):
        fine_tune(parent, tmp_path / "model")


def test_sharded_weights_keep_their_files(tiny, tmp_path):
    """Names, index and precision of a parent in several fp16 files."""
    parent = tmp_path / "parent"
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tiny, torch_dtype=torch.float16)
    pipeline.save_pretrained(parent)
    for path in (parent / "unet").glob("*.safetensors"):
        path.unlink()
    pipeline.unet.save_pretrained(parent / "unet", max_shard_size="100KB")
    fine_tune(parent, tmp_path / "model")
    old, new = (
        {p.name: p.stat().st_size for p in (folder / "unet").iterdir()} for folder in (parent, tmp_path / "model")
    )
    assert old == new and len(list((parent / "unet").glob("*-of-*.safetensors"))) > 1


def test_later_rounds_share_what_none_of_them_writes(tiny, tmp_path):
    """A parent that is itself a result lends its weights as hard links, configurations are copied."""
    first, second = tmp_path / "first", tmp_path / "second"
    fine_tune(tiny, first)
    fine_tune(first, second)
    assert (second / "vae" / "diffusion_pytorch_model.safetensors").stat().st_nlink == 2
    assert (second / "vae" / "config.json").stat().st_nlink == 1
    for name in ("vae", "unet"):
        assert (first / name / "diffusion_pytorch_model.safetensors").stat().st_ino != (
            tiny / name / "diffusion_pytorch_model.safetensors"
        ).stat().st_ino
    assert not all(torch.equal(weights_of(first)[name], weight) for name, weight in weights_of(second).items())


# Stopped and continued.


def test_a_killed_training_ends_with_equal_bytes(tiny, tmp_path):
    """SIGKILL in a process of its own before the third checkpoint gets its name: two are done.

    The same call continues after the second; its folder is, byte by byte, that of a training without a stop, of real
    and curated samples, with dropout.
    """
    parent = tmp_path / "parent"
    save_pipeline(parent, unet={"dropout": 0.1})
    killed, whole = tmp_path / "killed" / "model", tmp_path / "whole" / "model"
    kill_at("os.rename", "*checkpoint.pt*", 3, partial(train_mixed, parent, killed))
    assert not killed.exists() and (killed.parent / ".model.training" / "checkpoint.pt").is_file()
    state = torch.random.get_rng_state()
    assert train_mixed(parent, killed).steps() == ["5/8", "6/8", "7/8", "8/8"]
    assert train_mixed(parent, whole).steps()[0] == "1/8"
    assert torch.equal(torch.random.get_rng_state(), state)
    assert bytes_of(killed) == bytes_of(whole)
    assert not list(killed.parent.glob(".*"))


def train_mixed(parent: Path, output: Path) -> Shown:
    recipe = FineTuneRecipe(num_steps=8, batch_size=4, learning_rate=1e-3, checkpoint_every=2, curated_weight=1.5)
    images = digit_images(None, 9)
    return fine_tune(parent, output, recipe, samples=TrainingImages(images[:5], images[5:]))


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 not a checkpoint"])
def test_a_damaged_or_foreign_checkpoint_is_not_continued(tiny, tmp_path, damage):
    """The training starts again; a checkpoint of another recipe, which would be mixed in, as well."""
    work = tmp_path / ".model.training"
    work.mkdir()
    (work / checkpoints.CHECKPOINT).write_bytes(damage)
    if not damage:
        foreign = checkpoints.Checkpoint(identity="other", weights={}, optimizer={}, losses=[0.1] * 3)
        foreign.write(work)
    assert fine_tune(tiny, tmp_path / "model").steps()[0] == "1/5"


def test_a_full_disk_keeps_the_last_checkpoint(tiny, tmp_path, monkeypatch):
    """The message has the remedy; the same call ends with the bytes of a training without the fault."""
    output, good = tmp_path / "model", tmp_path / "good"
    save, calls = torch.save, []

    def full(*arguments: Any) -> None:
        calls.append(0)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*arguments)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OutputError, match=r"disk is full.*same command continues"):
        fine_tune(tiny, output)
    assert [path.name for path in (tmp_path / ".model.training").iterdir()] == [checkpoints.CHECKPOINT]
    assert fine_tune(tiny, output).steps()[0] == "3/5"
    fine_tune(tiny, good)
    assert bytes_of(output) == bytes_of(good)


def test_a_model_that_the_system_refuses_to_write_is_refused_with_the_remedy(tiny, tmp_path, monkeypatch):
    """safetensors has an error of its own for it; the limit of the process stands for a full disk."""
    replaced, limits = publishing._replaced, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(*arguments: Any) -> Any:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        return replaced(*arguments)

    monkeypatch.setattr(publishing, "_replaced", limited)
    try:
        with pytest.raises(OutputError, match="limit of the process"):
            fine_tune(tiny, tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "model").exists()
    monkeypatch.setattr(publishing, "_replaced", replaced)
    fine_tune(tiny, tmp_path / "model")


# Memory and precision.


def test_activations_are_recomputed_where_the_runtime_asks(tiny, tmp_path, monkeypatch):
    """Gradient checkpointing reaches the blocks in training, and changes nothing but the memory."""
    recomputed, checkpoint = [], torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(
        torch.utils.checkpoint, "checkpoint", lambda *a, **k: recomputed.append(0) or checkpoint(*a, **k)
    )
    runtime = RuntimeSpec(gradient_checkpointing="on")
    fine_tune(tiny, tmp_path / "kept")
    assert not recomputed
    fine_tune(tiny, tmp_path / "recomputed", runtime=runtime)
    assert recomputed
    kept, others = weights_of(tmp_path / "kept"), weights_of(tmp_path / "recomputed")
    assert all(torch.allclose(weight, others[name], atol=1e-6) for name, weight in kept.items())


def test_half_precision_computes_and_does_not_store(tiny, tmp_path, monkeypatch):
    """bfloat16 by accelerate's autocast, between two trainings of this process in float32."""
    with monkeypatch.context() as patched:
        patched.setattr("engine.studies.loop.finetuning.program._precision", lambda *_: "bfloat16")
        fine_tune(tiny, tmp_path / "half")
    fine_tune(tiny, tmp_path / "full")
    start, half, full = weights_of(tiny), weights_of(tmp_path / "half"), weights_of(tmp_path / "full")
    change = torch.cat([(full[name] - start[name]).flatten() for name in start])
    other = torch.cat([(half[name] - start[name]).flatten() for name in start])
    assert all(weight.dtype == torch.float32 for weight in half.values())
    assert not torch.equal(change, other) and float(torch.cosine_similarity(change, other, dim=0)) > 0.9
    assert json.loads((tmp_path / "half" / "training.json").read_text())["precision"] == "bfloat16"


def test_a_batch_beyond_the_memory_is_refused(tiny, tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training, "denoising_loss", full)
    with pytest.raises(JobError, match=r"training\.batch_size: 4 samples do not fit"):
        fine_tune(tiny, tmp_path / "model")


# Refusals.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"learning_rate": float("nan")}, r"training\.learning_rate: nan is not a positive number"),
        ({"learning_rate": float("inf")}, r"training\.learning_rate: inf"),
        ({"num_steps": 0}, r"training\.num_steps: 0 is not positive"),
        ({"batch_size": -1}, r"training\.batch_size: -1"),
        ({"curated_weight": -0.1}, r"training\.curated_weight: -0\.1"),
        ({"empty_prompt_share": 1.0}, r"training\.empty_prompt_share: 1 is not a share"),
        ({"lora_rank": 0}, r"training\.lora_rank: 0 is no rank"),
        ({"lora_rank": 2, "lora_alpha": 0.0}, r"training\.lora_alpha: 0"),
    ],
)
def test_impossible_recipes_are_refused(fields, message):
    with pytest.raises(JobError, match=message):
        FineTuneRecipe(**fields)


def test_the_learning_rate_warms_up_and_falls():
    rates = [FineTuneRecipe(num_steps=20, learning_rate=2.0).rate_at(step) for step in range(20)]
    assert rates[:3] == [1.0, 2.0, 2.0] and rates[2:] == sorted(rates[2:], reverse=True) and 0 < rates[-1] < 0.05


def test_what_cannot_be_trained_is_refused_before_it_is_loaded(tiny, tmp_path, monkeypatch):
    """Each with the field or path, and the remedy."""
    monkeypatch.setattr("engine.studies.loop.finetuning.program.load_pipeline", None)
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (tiny, {"samples": TrainingImages([])}, "no curated image"),
        (tiny, {"recipe": dataclasses.replace(SHORT, lora_rank=17)}, r"lora_rank: 17 is above 16.*give 16 or less"),
        (resolve("zoo:digits/classifier"), {}, "a diffusers pipeline folder is expected"),
        (tmp_path / "nowhere", {}, "neither a folder nor a hub id"),
    ]
    for parent, changes, message in cases:
        with pytest.raises(JobError, match=message):
            fine_tune(parent, tmp_path / "model", **changes)
    sampled = save_pipeline(tmp_path / "x0", scheduler=diffusers.DDIMScheduler(**BETAS, prediction_type="sample"))
    with pytest.raises(JobError, match="prediction_type"):
        fine_tune(sampled, tmp_path / "model")


def test_folders_of_others_are_not_written_over(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("engine.studies.loop.finetuning.program.load_pipeline", None)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "note.txt").write_text("mine")
    for name, message in (("file", "is a file"), ("folder", "no fine-tuning has left"), ("file/model", "not a folder")):
        with pytest.raises(OutputError, match=message):
            fine_tune(tiny, tmp_path / name)
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "note.txt").read_text() == "mine"

    def refused(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "write_bytes", refused)
    with pytest.raises(OutputError, match="read-only"):
        fine_tune(tiny, tmp_path / "model")


def test_a_loss_beyond_all_numbers_is_refused(tiny, tmp_path):
    """The message names the learning rate; nothing is published."""
    with pytest.raises(JobError, match=r"training\.learning_rate: 1e\+30 makes .* grow beyond all numbers"):
        fine_tune(tiny, tmp_path / "model", dataclasses.replace(SHORT, learning_rate=1e30))
    assert not (tmp_path / "model").exists()


def test_weights_beyond_the_precision_of_the_parent_are_refused(tiny, tmp_path):
    """Finite in float32, infinite in the float16 that the parent is stored in."""
    parent = tmp_path / "parent"
    diffusers.DiffusionPipeline.from_pretrained(tiny, torch_dtype=torch.float16).save_pretrained(parent)
    weights = {name: weight.float() + 1e5 for name, weight in weights_of(parent).items()}
    trained = training.Trained(weights=weights, adapter={}, losses=[1.0], num_parameters=1)
    document = {"recipe": {"learning_rate": 1.0}, "parent_model": {"address": "x"}}
    publishing.check_writable(tmp_path / "work")
    with pytest.raises(JobError, match=r"training\.learning_rate: 1 makes weights .* float16"):
        publishing.publish(parent, "unet", trained, document, work=tmp_path / "work", output=tmp_path / "model")
    assert not (tmp_path / "model").exists()
