"""The generator with the real zoo: formats, padding, and what becomes of samples and batches that fail."""

import io
import math
from xml.etree import ElementTree

import numpy as np
import PIL.Image
import pytest
import torch

from engine.data.images import decode_rgb
from engine.data.images.encoding import encode, quantise
from engine.errors import JobError
from engine.generation.generator import Generator
from engine.job.parsing import parse_job
from engine.job.plan import build_plan
from engine.models.digests import model_digests
from engine.models.labels import read_labels

ZOO = "zoo:digits/"


def make_generator(**changes):
    """A small job of one prompt request, its generator and its samples."""
    raw = {
        "name": "job",
        "models": {"diffusion": f"{ZOO}stable-diffusion", "clip": f"{ZOO}clip", "target": f"{ZOO}classifier"},
        "requests": [{"name": "a", "method": "prompt", "classes": ["three", "one"], "count": 10}],
        "sampling": {"num_inference_steps": 3, "guidance_scale": 2.0},
        "output": {"uri": "runs/job"},
    }
    job = parse_job(raw | changes)
    plan = build_plan(job, read_labels(job.models.target), model_digests(job))
    return Generator(job, plan), list(plan.samples(plan.shard(0)))


@pytest.fixture(scope="module")
def made():
    return make_generator()


def failing_for(generator, monkeypatch, culprits, error):
    """Let sampling raise for batches that hold one of the samples."""
    sample = generator.sample

    def raising(request, specs, *more):
        if any(spec.index in culprits for spec in specs):
            raise error
        return sample(request, specs, *more)

    monkeypatch.setattr(generator, "sample", raising)


def test_batches_are_padded_and_padding_is_dropped(made):
    """Twenty samples: a batch of 16 and one of 4 in the same shape; a sample's bytes do not depend on its place."""
    generator, specs = made
    first = generator.next_batch(0, specs)
    rest = generator.next_batch(0, specs[len(first) :])
    assert (len(first), len(rest)) == (16, 4)
    assert [one.record["key"] for one in first + rest] == [spec.key for spec in specs]
    moved = generator.next_batch(0, specs[3:5])
    assert [one.image for one in moved] == [one.image for one in first[3:5]]
    assert [one.record for one in moved] == [one.record for one in first[3:5]]


def test_one_bad_sample_fails_alone(made, monkeypatch):
    """An exception of one sample names itself in that sample; its neighbours keep their bytes."""
    generator, specs = made
    clean = generator.next_batch(0, specs[:4])
    failing_for(generator, monkeypatch, {specs[2].index}, ValueError("bad prompt"))
    good, bad = specs[0], specs[2]
    results = generator.next_batch(0, [good, bad])
    assert [one.record["status"] for one in results] == ["ok", "failed"]
    assert results[1].record["error_message"] == "ValueError: bad prompt" and results[1].image == b""
    assert results[0].image == clean[0].image


@pytest.mark.parametrize(
    "error", [torch.AcceleratorError("device-side assert"), RuntimeError("CUDA error: x"), MemoryError(), JobError("x")]
)
def test_a_fault_of_the_machine_is_not_laid_to_samples(made, monkeypatch, error):
    """A broken device fails every sample that follows: the shard must come back, not be committed as failures."""
    generator, specs = made
    failing_for(generator, monkeypatch, {0}, error)
    with pytest.raises(type(error)):
        generator.next_batch(0, specs[:4])


def test_what_fails_with_every_sample_is_raised(made, monkeypatch):
    """A defect of code or model is the shard's fault, so that it is tried elsewhere and seen."""
    generator, specs = made
    failing_for(generator, monkeypatch, set(range(100)), ValueError("broken model"))
    with pytest.raises(ValueError, match="broken model"):
        generator.next_batch(0, specs[:4])


def test_an_operator_that_is_not_deterministic_is_named(made, monkeypatch):
    """Torch refuses it with every sample: neither the samples' fault nor the machine's, but the job's."""
    generator, specs = made
    error = RuntimeError("some_backward_cuda does not have a deterministic implementation, but you set")
    failing_for(generator, monkeypatch, {0}, error)
    with pytest.raises(JobError, match=r"runtime\.deterministic: some_backward_cuda of these models"):
        generator.next_batch(0, specs[:2])


def test_values_that_are_not_finite_fail_their_sample(made, monkeypatch):
    """A NaN in one image, or in one score, is told of that sample; the others are stored."""
    generator, specs = made
    sample = generator.sample

    def spoiled(request, some, *more):
        images, health = sample(request, some, *more)
        images[1] = math.nan
        return images, health

    monkeypatch.setattr(generator, "sample", spoiled)
    statuses = [one.record["status"] for one in generator.next_batch(0, specs[:3])]
    assert statuses == ["ok", "failed", "ok"]
    monkeypatch.undo()
    score = generator._scorer.score
    monkeypatch.setattr(generator._scorer, "score", lambda *args: [one | {"risk": math.nan} for one in score(*args)])
    result = generator.next_batch(0, specs[:1])[0]
    assert result.record["status"] == "failed" and "risk" in result.record["error_message"]


@pytest.mark.parametrize("image_format", ["jpg", "webp"])
def test_scores_belong_to_the_stored_file(image_format):
    """Also where compression changes pixels: scoring what a reader decodes gives the stored risk."""
    generator, specs = make_generator(output={"uri": "runs/job", "image_format": image_format})
    result = generator.next_batch(0, specs[:1])[0]
    image = decode_rgb(result.image)
    log_p = generator._scorer.target.score([image]).log_softmax(1)
    assert result.record["risk"] == pytest.approx(-log_p[0, specs[0].cell.classes[0]].item(), abs=1e-4)
    assert image.format is None and image.size == (32, 32)


def test_pixels_are_rounded_and_lossless_formats_keep_them():
    """Truncation would darken by half a level; PNG and WebP give back every pixel."""
    images = torch.tensor([0.0, 0.5 / 255 + 1e-4, 254.6 / 255, 1.2, -0.1]).reshape(1, 1, 1, 5).expand(1, 3, 4, 5)
    pixels = quantise(images)
    assert pixels[0, 0, :, 0].tolist() == [0, 1, 255, 255, 0]
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    for image_format in ("png", "webp"):
        assert (np.asarray(decode_rgb(encode(noise, image_format))) == noise).all()


@pytest.mark.parametrize("image_format", ["png", "webp", "jpg"])
def test_files_say_that_they_are_synthetic_and_pixels_do_not_change(image_format):
    """XMP as Pillow and other readers find it; the same packet and the same bytes every time; nothing without it."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    plain, marked = (encode(pixels, image_format, provenance=flag) for flag in (False, True))
    assert encode(pixels, image_format, provenance=True) == marked != plain
    assert (np.asarray(decode_rgb(marked)) == np.asarray(decode_rgb(plain))).all()
    with PIL.Image.open(io.BytesIO(marked)) as image:
        packet = image.info["xmp"] if "xmp" in image.info else image.info["XML:com.adobe.xmp"]
    packet = packet if isinstance(packet, str) else packet.decode()
    assert packet.startswith("<?xpacket begin=") and packet.endswith('<?xpacket end="r"?>')
    [found] = ElementTree.fromstring(packet).iter("{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType")
    assert found.text == "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    with PIL.Image.open(io.BytesIO(plain)) as image:
        assert not {"xmp", "XML:com.adobe.xmp"} & image.info.keys()


def test_a_prompt_that_would_be_cut_off_is_refused():
    """The text encoder reads so many tokens and drops the rest without a word."""
    request = {"name": "a", "method": "prompt", "classes": ["three"], "count": 1, "contexts": ["red ink " * 40]}
    with pytest.raises(JobError, match=r"has \d+ tokens, the text encoder reads \d+; shorten it"):
        make_generator(requests=[request])


def test_risk_guidance_and_acceptance_on_real_models():
    """The dial raises the risk of the same noise; a rule that nothing meets rejects, and stores no image."""
    common = {"classes": ["three"], "count": 2, "seed_group": "same"}
    requests = [
        {"name": "plain", "method": "prompt"} | common,
        {"name": "dial", "method": "risky", "guidance": {"risky": {"target_risk": 3.0, "every": 3}}} | common,
        {"name": "never", "method": "prompt", "accept": {"risk": ">= 49"}} | common,
    ]
    generator, _ = make_generator(requests=requests, sampling={"num_inference_steps": 10, "guidance_scale": 2.0})
    plan = generator._plan
    plain, dial, never = (generator.next_batch(one.number, [one.sample(0), one.sample(1)]) for one in plan.requests)
    assert all(one.record["guided_steps"] > 0 and one.record["nonfinite_gradients"] == 0 for one in dial)
    assert all(high.record["risk"] > low.record["risk"] for high, low in zip(dial, plain, strict=True))
    assert all(one.record["status"] == "rejected" and not one.record["accepted"] and one.image == b"" for one in never)
