"""The decoder's gradient in half precision: as true as it is measured to be, and used only where it is."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest
import torch

from engine.data.images.encoding import quantise
from engine.errors import JobError
from engine.generation.decoder_precision import DecoderPrecisions, Subject, in_words, keeps_direction
from engine.generation.generator import Generator
from engine.generation.notices import Notices
from engine.job.parsing import parse_job
from engine.job.plan import build_plan
from engine.job.spec import RuntimeSpec
from engine.methods.guidance import precision
from engine.methods.guidance.comparison import cosines, in_8_bits
from engine.methods.guidance.half_precision import in_half_precision
from engine.methods.scores import kldb
from engine.models.decoding import Decoder
from engine.models.digests import model_digests
from engine.models.hardware import hardware_problems
from engine.models.job_checks import check_addresses
from engine.models.labels import read_labels
from tests.cuda_failures import BROKEN, OF_SIZE, OUT_OF_MEMORY
from tests.meta_models import meta_hardware

ZOO = "zoo:digits/"
HALVES = ("bfloat16", "float16")
SUBJECT = Subject("pipeline", "", "boundary")


def job_of(*methods, runtime=None, decoder=None):
    models = {"diffusion": f"{ZOO}stable-diffusion", "clip": f"{ZOO}clip", "target": f"{ZOO}classifier"}
    return parse_job(
        {
            "name": "job",
            "models": models | ({"guidance_decoder": decoder} if decoder else {}),
            "requests": [
                {"name": f"r{place}", "method": method, "boundary": ["three", "eight"], "count": 3}
                for place, method in enumerate(methods)
            ],
            "sampling": {"num_inference_steps": 6, "guidance_scale": 3.0},
            "guidance": {"boundary": {"every": 2}},
            "output": {"uri": "runs/job"},
            "runtime": runtime or {},
        }
    )


def generator_of(job):
    return Generator(job, build_plan(job, read_labels(job.models.target), model_digests(job)))


def gradient_of(decode, latents, classifier):
    leaf = latents.clone().requires_grad_(True)
    loss = kldb(classifier.logits(decode(leaf).clamp(0, 1)), (3, 8))
    return torch.autograd.grad(loss.sum(), leaf)[0]


@pytest.fixture(scope="module")
def latents(diffusion):
    """Of digits: encoded random blobs, so that gradients are those of images."""
    grey = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)).expand(4, 3, 8, 8)
    return diffusion.encode_images(torch.nn.functional.interpolate(grey, 32).round())


@pytest.mark.parametrize("half", HALVES)
def test_half_precision_keeps_the_direction(half, diffusion, classifier, latents, monkeypatch):
    """Real decoder and target; a gradient 2^-40 as large keeps it too, which unscaled float16 would lose."""
    decode = diffusion.decoder.decoding(diffusion.latent_shape, half).decode
    exact = gradient_of(diffusion.decode, latents, classifier)
    made = gradient_of(decode, latents, classifier)
    assert made.dtype == torch.float32 and decode(latents).dtype == torch.float32
    assert (cosines(exact, made) > {"bfloat16": 0.98, "float16": 0.9995}[half]).all()

    def faint(decode):
        leaf = latents.clone().requires_grad_(True)
        images = decode(leaf)
        cotangent = torch.ones_like(images) * images.detach() * 2**-40
        return torch.autograd.grad(images, leaf, cotangent)[0]

    assert (cosines(faint(diffusion.decode), faint(decode)) > 0.98).all()
    monkeypatch.setattr(precision, "SCALED_EXPONENT", -40)
    unscaled = cosines(faint(diffusion.decode), faint(decode))
    assert (unscaled > 0.98).all() if half == "bfloat16" else (unscaled < 0.9).all()


def test_the_scale_is_each_samples_own():
    """Rows with gradients 2^60 apart, and a poisoned one: each is exact, as powers of two are."""
    leaf = torch.zeros(4, 1, 2, 2, requires_grad=True)
    decode = in_half_precision(lambda latents: latents * 0.5, torch.float16)
    cotangent = torch.tensor([2.0**-50, 2.0**10, 0.0, torch.nan]).reshape(4, 1, 1, 1).expand(4, 1, 2, 2)
    (gradient,) = torch.autograd.grad(decode(leaf), leaf, cotangent)
    assert gradient[:3, 0, 0, 0].tolist() == [2.0**-51, 2.0**9, 0.0] and gradient[3].isnan().all()


def test_a_copy_leaves_the_exact_decoder_alone(diffusion, latents):
    """Stored images are decoded in float32, by weights that no copy has rounded; the copy has no encoder."""
    before = diffusion.decode(latents)
    diffusion.decoder.decoding(diffusion.latent_shape, "bfloat16").decode(latents)
    assert torch.equal(before, diffusion.decode(latents))
    assert {parameter.dtype for parameter in diffusion._vae.parameters()} == {torch.float32}


def test_directions_are_compared_where_guidance_can_follow_them():
    """Not where the exact gradient is zero or not finite; a lost one is NaN or 0, and tiny ones do not underflow."""
    exact = torch.tensor([[1.0, 0.0], [0.0, 0.0], [torch.nan, 1.0], [3e-30, 4e-30], [1.0, 1.0], [1.0, 1.0]])
    other = torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0], [4e-30, 3e-30], [torch.inf, 1.0], [0.0, 0.0]])
    found = cosines(exact.reshape(6, 1, 1, 2), other.reshape(6, 1, 1, 2))
    assert found[:2].tolist() == pytest.approx([0.5**0.5, 0.96]) and found[2].isnan() and found[3] == 0


def trial_of(half, in_8_bits=1.0):
    """Cosines of a trial: of half precision, and of images in 8 bits; numbers stand for 40 equal ones."""
    return torch.stack([value if torch.is_tensor(value) else torch.full((40,), value) for value in (half, in_8_bits)])


def test_what_may_guide():
    """One gradient in twenty may be off; none may be lost; nothing measured is no proof."""
    one_off, three_off, lost = torch.full((3, 40), 0.999).unbind()
    one_off[0], three_off[:3], lost[7] = 0.5, 0.5, torch.nan
    assert keeps_direction(trial_of(0.999)) and keeps_direction(trial_of(one_off))
    assert not keeps_direction(trial_of(three_off)) and not keeps_direction(trial_of(0.98))
    assert not keeps_direction(trial_of(lost)) and not keeps_direction(torch.empty(2, 0))
    assert not keeps_direction(trial_of(lost, 0.0)) and not keeps_direction(trial_of(0.98, lost))
    assert "1 of 40 gradients were not finite" in in_words(trial_of(lost), "float16")
    assert "no gradient" in in_words(torch.empty(2, 0), "float16")


@pytest.mark.parametrize(
    ("half", "in_8_bits", "may_guide"), [(14, 8, True), (20, 8, False), (7, 1, True), (25, 80, True), (27, 80, False)]
)
def test_half_precision_may_cost_what_storing_an_image_costs(half, in_8_bits, may_guide):
    """Angles in degrees: twice that of 8 bits at most, unless it is small anyway; and never a quarter turn."""
    cosines = trial_of(*(math.cos(math.radians(angle)) for angle in (half, in_8_bits)))
    assert keeps_direction(cosines) == may_guide
    assert f"are within {half:.1f} degrees of float32's" in in_words(cosines, "bfloat16")
    assert f"and within {in_8_bits:.1f} where the image is rounded to the 8 bits" in in_words(cosines, "bfloat16")


def test_images_in_8_bits_are_those_that_are_stored(diffusion, classifier, latents):
    """To the bit; the gradient is that of the exact decoder, taken at such an image."""
    exact = diffusion.decoder.decoding(diffusion.latent_shape)
    stored = torch.from_numpy(quantise(exact.decode(latents))).permute(0, 3, 1, 2) / 255
    leaf = latents.clone().requires_grad_(True)
    images = in_8_bits(exact).decode(leaf)
    assert torch.equal(images, stored)
    (made,) = torch.autograd.grad(kldb(classifier.logits(images), (3, 8)).sum(), leaf)
    at_stored = stored.clone().requires_grad_(True)
    (cotangent,) = torch.autograd.grad(kldb(classifier.logits(at_stored), (3, 8)).sum(), at_stored)
    again = latents.clone().requires_grad_(True)
    (expected,) = torch.autograd.grad(exact.decode(again).clamp(0, 1), again, cotangent)
    assert torch.allclose(made, expected, rtol=1e-4, atol=1e-7)


class OnGpu:
    """A decoder on a GPU, where half precision may be tried."""

    def __init__(self, half="bfloat16", is_safe=True):
        self.half, self.is_safe_in_float16, self.asked = half, is_safe, []

    def trial_precision(self):
        return self.half

    def decoding(self, shape, precision):
        self.asked.append(precision)
        return precision


def decided(trial, decoder=None, **hardware):
    notices = Notices()
    precisions = DecoderPrecisions(meta_hardware(**hardware), notices)
    for _ in range(2):
        precisions.decide("requests.0", SUBJECT, decoder or OnGpu(), (4, 8, 8), trial)
    return precisions.of(SUBJECT), notices.take()


def test_a_decision_is_made_once_and_reported_with_its_figures():
    calls = []
    chosen, notices = decided(lambda decoding: calls.append(decoding) or trial_of(0.998))
    assert chosen == "bfloat16" and calls == ["bfloat16"] and len(notices) == 1
    assert notices[0].startswith("requests.0: the decoder's gradient is computed in bfloat16:")
    assert "(cosine 0.9980; median 0.9980)" in notices[0] and "runtime.decoder_precision" in notices[0]
    chosen, notices = decided(lambda decoding: trial_of(0.95))
    assert chosen == "float32" and "computed in float32" in notices[0] and "0.9500" in notices[0]


@pytest.mark.parametrize(
    "error",
    [OUT_OF_MEMORY["allocator"](), OUT_OF_MEMORY["runtime"](), OF_SIZE["engine"](), ValueError("no such image")],
)
def test_a_trial_that_fails_keeps_float32(error):
    """The memory did not hold it, or a sample raised, which fails by itself in its batch."""

    def failing(decoding):
        raise error

    chosen, notices = decided(failing)
    assert chosen == "float32" and str(error).splitlines()[0] in notices[0]


@pytest.mark.parametrize("error", [JobError("wrong"), *(make() for make in BROKEN.values())])
def test_a_trial_shows_what_no_precision_would_help(error):
    """A wrong job is refused; of a broken device another machine is asked."""

    def failing(decoding):
        raise error

    with pytest.raises(type(error), match=str(error).splitlines()[0]):
        decided(failing)


def test_the_job_overrules_without_a_trial():
    """float16 is refused for a decoder that overflows in it."""

    def never(decoding):
        raise AssertionError("tried")

    for wanted in ("float32", "bfloat16", "float16"):
        assert decided(never, decoder_precision=wanted) == (wanted, [])
    with pytest.raises(JobError, match=r"runtime\.decoder_precision: the decoder of 'pipeline' overflows in fp16"):
        decided(never, decoder=OnGpu(is_safe=False), decoder_precision="float16")
    assert decided(never, decoder=OnGpu(half="float32")) == ("float32", [])


@pytest.mark.parametrize(
    ("changes", "config", "expected"),
    [
        ({}, {}, "bfloat16"),
        ({}, {"force_upcast": False}, "float16"),
        ({"dtype": "float32"}, {}, "float32"),
        ({"deterministic": True}, {"force_upcast": False}, "float32"),
        ({"device": "cpu"}, {"force_upcast": False}, "float32"),
    ],
)
def test_which_precision_is_tried(changes, config, expected, monkeypatch):
    """bfloat16, or float16 where the configuration calls it safe; none on a CPU and in full precision."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    hardware = dataclasses.replace(meta_hardware(), device="cuda")
    autoencoder = type("Autoencoder", (), {"config": config})()
    assert Decoder(autoencoder, dataclasses.replace(hardware, **changes)).trial_precision() == expected
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    older = Decoder(autoencoder, dataclasses.replace(hardware, **changes)).trial_precision()
    assert older == ("float32" if expected == "bfloat16" else expected)


def test_a_generator_measures_before_its_first_batch_and_guides_as_it_decided(monkeypatch):
    """As on a GPU, with real models: each method once, guidance through the copy, stored images in float32."""
    monkeypatch.setattr(Decoder, "trial_precision", lambda self: "bfloat16")
    generator = generator_of(job_of("boundary", "prompt", "boundary"))
    (notice,) = generator.notices.take()
    assert "requests.0: the decoder's gradient is computed in" in notice and "of 9 gradients" in notice
    assert generator._decoding(0) is generator._decoding(2)
    chosen = generator._precisions.of(generator._subject(0))
    assert generator._decoding(0) is generator._model(0).decoder.decoding(generator._model(0).latent_shape, chosen)
    (result,) = generator.next_batch(0, [generator._plan.requests[0].sample(0)])
    assert result.record["guided_steps"] == 3


def test_a_trial_tells_the_decoding_from_8_bits():
    """Real models and loop, the last step too: the exact decoding agrees with itself, rounded images not quite; 3 bits
    are refused."""
    generator = generator_of(job_of("boundary"))
    exact = generator._decoding(0)
    same, in_8_bits = trial = generator._compared(0, exact)
    assert trial.shape == (2, 9) and keeps_direction(trial)
    assert (1 - same).abs().max() < 1e-6 and (1 - in_8_bits).min() > 1e-6 and (in_8_bits > 0.9).all()

    def in_3_bits(latents):
        images = exact.decode(latents).clamp(0, 1)
        return images + ((images * 7).round() / 7 - images).detach()

    assert not keeps_direction(generator._compared(0, dataclasses.replace(exact, decode=in_3_bits)))


def test_a_trial_compiles_nothing(monkeypatch):
    """Its few rows would cost a compilation of their own, which here would be refused."""

    def compiling(graph, inputs):
        raise AssertionError("compiled")

    monkeypatch.setattr(Decoder, "trial_precision", lambda self: "bfloat16")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=compiling))
    generator = generator_of(job_of("boundary", runtime={"compile": "on"}))
    assert "of 9 gradients" in generator.notices.take()[0]


def test_a_cpu_neither_measures_nor_copies(monkeypatch):
    """Its bytes are those of float32."""
    generator = generator_of(job_of("boundary"))
    assert generator.notices.take() == []
    assert generator._decoding(0) is generator._model(0).decoder.decoding(generator._model(0).latent_shape)


@pytest.mark.parametrize("value", ["fp16", "bf16"])
def test_half_precision_is_refused_on_a_cpu(value):
    spec = RuntimeSpec.model_validate({"decoder_precision": value})
    (problem,) = hardware_problems(spec, has_gpu=False)
    assert problem == f"runtime.decoder_precision: '{value}' saves nothing on a CPU; use auto or fp32"
    assert hardware_problems(spec, has_gpu=True) == []


def test_float16_is_refused_where_files_tell_that_it_overflows():
    """The zoo's large decoder says nothing of float16; its tiny one is safe by its class, and prompts need none."""
    runtime = {"decoder_precision": "fp16"}
    with pytest.raises(JobError, match=r"runtime\.decoder_precision: the decoder of 'zoo:digits/stable-diffusion'"):
        check_addresses(job_of("boundary", runtime=runtime))
    check_addresses(job_of("boundary", runtime=runtime, decoder=f"{ZOO}tiny-autoencoder"))
    check_addresses(job_of("prompt", runtime=runtime))
    check_addresses(job_of("boundary", runtime={"decoder_precision": "bf16"}))
