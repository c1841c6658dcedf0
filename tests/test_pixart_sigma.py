"""PixArt-Sigma: what diffusers' own pipeline makes, every method on it, and what is refused.

Every scheduler is in `test_model_differences.py`.
"""

import shutil
from pathlib import Path

import pytest

from engine.driver.checks import plan_job
from engine.errors import JobError
from engine.generation.generator import Generator
from engine.job.parsing import parse_job
from engine.methods.sampling.spec import SamplingSpec
from engine.models.arithmetic import count_folder
from engine.models.diffusion import load_pipeline
from engine.models.job_checks import check_addresses
from tests.flow_cases import diffusers_latents, engine_latents, raw_job, save_pixart
from tests.test_starts import Told
from tests.tiny_pipelines import edit, job_of, load_reference

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny one with random weights."""
    return save_pixart(tmp_path_factory.mktemp("pixart") / "plain")


def assert_equal_images(model, folder, prompts=("A Photo of a TWO ", "three"), *, sampling=None, **options):
    """Engine and diffusers make the same images, with guidance and without."""
    reference = load_reference(folder)
    for scale in (1.0, 3.0):
        more = {"guidance_scale": scale, **options}
        made = engine_latents(model, list(prompts), scheduler="model", **more, **sampling or {})
        expected = diffusers_latents(reference, list(prompts), use_resolution_binning=False, **more, **sampling or {})
        assert made[1].shape == expected[1].shape and (made[1] - expected[1]).abs().max() < TOLERANCE
        assert expected[1].std() > 0.01


@pytest.mark.parametrize("transformer", [{}, {"out_channels": 4, "patch_size": 1}], ids=["variance", "no variance"])
def test_it_gives_what_diffusers_gives(transformer, tmp_path, hardware):
    """With a learned variance, which is cut off, and without; prompts in lower case, and padding that is masked."""
    folder = save_pixart(tmp_path / "made", transformer=transformer)
    check_addresses(job_of(folder, sampling={"scheduler": "model"}))
    assert_equal_images(load_pipeline(str(folder), hardware), folder, negative_prompt="Red ink")


def test_other_sizes_are_those_of_diffusers(folder, hardware):
    """Images that are not square."""
    sampling = {"height": 48, "width": 24}
    model = load_pipeline(str(folder), hardware).in_size(SamplingSpec(**sampling))
    assert_equal_images(model, folder, sampling=sampling)
    with pytest.raises(JobError, match="36 is not a multiple of 8"):
        check_addresses(job_of(folder, sampling={"height": 36}))


@pytest.mark.slow
def test_every_method_runs(folder):
    """Guided steps, a criterion of a user, a start; gradients go through the first half of the output alone."""
    plan = plan_job(job := parse_job(raw_job(folder)), Told())
    generator, guided = Generator(job, plan), {}
    for request in plan.requests:
        records = [one.record for one in generator.next_batch(request.number, [request.sample(0)])]
        assert all(one["status"] == "ok" and one["nonfinite_gradients"] == 0 for one in records)
        guided[request.spec.name] = records[0]["guided_steps"]
    assert guided["plain"] == 0 and guided["own"] == guided["joint"] == 4 and guided["started"] == 2
    assert count_folder(folder).unet > 0


def test_long_prompts_are_refused(folder, hardware):
    """Beyond the 300 tokens of diffusers' `max_sequence_length`."""
    model = load_pipeline(str(folder), hardware)
    model.check_prompts(["eight " * 49])
    with pytest.raises(JobError, match="has 361 tokens, the text encoder reads 300"):
        model.check_prompts(["a", "eight " * 60])


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("transformer", {"in_channels": 8}, "in_channels: 8"),
        ("transformer", {"out_channels": 12}, "out_channels: 12"),
        ("transformer", {"sample_size": 7}, "a multiple of patch_size"),
        ("transformer", {"caption_channels": 32}, "caption_channels: 32, the embeddings of T5 have 24"),
        ("transformer", {"use_additional_conditions": True}, "as PixArt-Alpha does"),
        ("transformer", {"sample_size": 128}, "use_additional_conditions: null"),
        ("transformer", {"attention_type": "gated"}, "attention_type"),
        ("transformer", {"quantization_config": {}}, "quantised"),
        ("vae", {"shift_factor": 0.1}, "shift_factor: 0.1, which the pipeline leaves out"),
        ("text_encoder", {"model_type": "umt5"}, "not of T5"),
        ("text_encoder", {"vocab_size": 20}, "tokenizer has tokens up to number 29"),
        ("scheduler", {"prediction_type": "flow_prediction"}, "prediction_type"),
        ("scheduler", {"use_flow_sigmas": True}, "use_flow_sigmas"),
    ],
    ids=str,
)
def test_what_would_be_sampled_otherwise_is_refused(part, changes, words, folder, tmp_path):
    """By its configurations, with the file and the value."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    edit(copy / part / ("scheduler_config.json" if part == "scheduler" else "config.json"), **changes)
    with pytest.raises(JobError) as caught:
        check_addresses(job_of(copy))
    assert words in "\n".join(caught.value.problems)


def test_tokenizers_that_would_be_converted_are_refused(folder, tmp_path):
    """A vocabulary of SentencePiece alone."""
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "tokenizer" / "tokenizer.json").rename(copy / "tokenizer" / "spiece.model")
    with pytest.raises(JobError, match=r"no tokenizer/tokenizer\.json; load it with transformers' T5TokenizerFast"):
        check_addresses(job_of(copy))
