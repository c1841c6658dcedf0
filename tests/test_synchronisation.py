"""What the sampling loop makes a host wait for: on the `meta` device, whose tensors have no values that one could read.

`.item()`, `nonzero`, a mask as an index and a copy to the host raise there, as they would stop a graph of CUDA from
being captured. Copies from the host do not: they are recorded.
"""

import copy
import functools

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from engine.generation.scorer import Scorer
from engine.methods.boundary.guide import guide_to_boundary
from engine.methods.boundary.spec import BoundaryGuidanceSpec
from engine.methods.guidance.half_precision import in_half_precision
from engine.methods.guidance.scene import Decoding, GuidanceScene
from engine.methods.risky.guide import guide_to_risk
from engine.methods.risky.spec import RiskyGuidanceSpec
from engine.methods.sampling.denoiser import ClassifierFreeDenoiser, Condition
from engine.methods.sampling.families import KINDS, ModelScheduler
from engine.methods.sampling.loop import Start, sample
from engine.methods.sampling.schedulers import make_sampler
from engine.methods.sampling.spec import SamplingSpec
from engine.models.classifier import Classifier, load_network
from engine.models.clip import Clip
from engine.models.diffusion import load_pipeline

NUM_SAMPLES, NUM_STEPS = 3, 5
# The second of three is guided.
WARM_UP_STEPS = 3
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
META = torch.device("meta")


class Lists(TorchFunctionMode):
    """Records tensors that are made on the device from lists, which is a copy that no operator shows."""

    def __init__(self, copies):
        super().__init__()
        self.copies = copies

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.tensor, torch.as_tensor) and result.device == META and result is not args[0]:
            self.copies.append(function.__name__)
        return result


class Transfers(TorchDispatchMode):
    """Records reads of the device's values, and what is copied there from the host."""

    def __init__(self):
        super().__init__()
        self.reads, self.copies = [], []
        self.lists = Lists(self.copies)

    def __enter__(self):
        self.lists.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.lists.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        inputs = [value for value in args if isinstance(value, torch.Tensor)]
        if name == "_local_scalar_dense" and inputs[0].device == META:
            self.reads.append(name)
            # The answer to "is any sample pending": none is.
            return False
        result = function(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_") and result.device == META != inputs[-1].device:
            self.copies.append(name)
        return result


def halved(latents, *_):
    """In the place of the UNet."""
    return latents * 0.5


def enlarged(latents):
    """In the place of the VAE's decoder."""
    return torch.nn.functional.interpolate(latents[:, :3], scale_factor=4.0)


class OnDevice:
    """The digits pipeline with target and CLIP on the device, and samples of theirs."""

    def __init__(self, hardware):
        self.pipeline = load_pipeline("zoo:digits/stable-diffusion", hardware)
        text = self.pipeline.encode(["a"] * NUM_SAMPLES).tensors
        self.condition = Condition({name: tensor.to(META) for name, tensor in text.items()})
        self.pipeline._network.to(META)
        self.pipeline._vae.to(META)
        clip, target = Clip.load("zoo:digits/clip"), Classifier.load("zoo:digits/classifier")
        network = load_network("zoo:digits/classifier").to(META)
        self.target = Classifier(
            lambda pixels: network(pixel_values=pixels).logits,
            target._preprocessing,
            name="on the device",
            labels=target.labels,
            temperature=1.0,
            device="meta",
        )
        self.scorer = Scorer(target, clip)
        clip._model.to(META)
        half = copy.deepcopy(self.pipeline._vae).to(torch.bfloat16)
        self.decode = in_half_precision(lambda latents: half.decode(latents).sample, torch.bfloat16)

    def sampled(self, scheduler, method=None, spec=None, is_whole=True, strength=None):
        """Transfers while a batch is sampled; with guidance, after one batch of the kind, which places constants.

        Args:
            is_whole: with the pipeline's networks, whose operators take their time on `meta`; in their place are
                a product and an enlargement else.
            strength: of a start from images, where there is one.
        """
        for num_steps in (WARM_UP_STEPS, NUM_STEPS) if method else (NUM_STEPS,):
            model = ModelScheduler(config=BETAS | {"skip_prk_steps": True}, name=scheduler)
            sampler = make_sampler(SamplingSpec(scheduler="model", num_inference_steps=num_steps), model, META)
            denoiser = ClassifierFreeDenoiser(
                self.pipeline.predict if is_whole else halved,
                conditional=self.condition,
                unconditional=self.condition,
                prediction=sampler.prediction,
                guidance_scale=3.0,
                guidance_rescale=0.7,
            )
            guided = method(denoiser, spec, self.scene(is_whole)) if method else denoiser
            noise = torch.empty(NUM_SAMPLES, *self.pipeline.latent_shape, device=META)
            start = None if strength is None else Start(latents=noise, strength=strength)
            with Transfers() as transfers:
                sample(guided, sampler, noise, start)
        return transfers

    def scene(self, is_whole):
        """Of three samples between two classes."""
        decode = self.decode if is_whole else in_half_precision(enlarged, torch.bfloat16)

        def conformity(images, labels, raw=False):
            return self.scorer.conformity_to(labels, raw=raw)(images)

        return GuidanceScene(
            logits=self.target.logits,
            oracle_logits=self.target.logits,
            conformity=conformity,
            raw_conformity=functools.partial(conformity, raw=True),
            # Two slices, the second one of them smaller.
            decoding=Decoding(decode=decode, slice_rows=2),
            labels=torch.full((NUM_SAMPLES,), 3, device=META),
            classes=((3, 8),) * NUM_SAMPLES,
        )


@pytest.fixture(scope="module")
def on_device(hardware):
    return OnDevice(hardware)


def test_the_recorder_sees_what_waits():
    """Each of the things that the loop must not do."""
    values = torch.ones(3, device=META)
    with Transfers() as transfers:
        assert not (values > 0).any()
        torch.tensor([1, 2], device=META)
        torch.ones(2).to(META)
        for forbidden in (lambda: values.nonzero(), lambda: values[values > 0], lambda: values.cpu()):
            with pytest.raises((NotImplementedError, RuntimeError)):
                forbidden()
    assert len(transfers.reads) == 1 and len(transfers.copies) == 2


@pytest.mark.parametrize("scheduler", [name for name in KINDS if name != "UniPCMultistepScheduler"])
def test_sampling_waits_for_nothing(scheduler, on_device):
    """Places and noise levels are looked up on the host; UniPC of diffusers copies its coefficients at each step."""
    # The UNet is the same for all.
    is_whole = scheduler == "DDIMScheduler"
    transfers = on_device.sampled(scheduler, is_whole=is_whole)
    assert (transfers.reads, transfers.copies) == ([], [])
    begun = on_device.sampled(scheduler, is_whole=is_whole, strength=0.8)
    # PNDM has other timesteps after a start, which are placed once.
    assert (begun.reads, begun.copies) == ([], ["_to_copy"] if scheduler == "PNDMScheduler" else [])


GUIDES = {
    "boundary": (guide_to_boundary, BoundaryGuidanceSpec(every=2)),
    "boundary, detached": (guide_to_boundary, BoundaryGuidanceSpec(every=2, gradient="detached")),
    "boundary, norm": (guide_to_boundary, BoundaryGuidanceSpec(every=2, step="norm")),
    "boundary, unet": (guide_to_boundary, BoundaryGuidanceSpec(every=2, gradient="unet")),
    "risky": (guide_to_risk, RiskyGuidanceSpec(every=2)),
    "risky, detached": (guide_to_risk, RiskyGuidanceSpec(every=2, gradient="detached")),
    "risky, floor": (guide_to_risk, RiskyGuidanceSpec(every=2, conformity_floor=0.25)),
    "risky, floor, oracle floor": (guide_to_risk, RiskyGuidanceSpec(every=2, conformity_floor=0.25, oracle_floor=0.9)),
    "risky, paper": (guide_to_risk, RiskyGuidanceSpec(every=2, step="paper", conformity="raw")),
}


@pytest.mark.parametrize("guide", GUIDES)
def test_guidance_waits_once_for_a_gradient_at_most(guide, on_device):
    """One through the UNet is asked whether it overflowed; three counts go to the device before the first."""
    make, spec = GUIDES[guide]
    steps = [index for index in range(1, NUM_STEPS + 1) if spec.is_guided(index, NUM_STEPS)]
    num_through = sum(spec.is_through_unet(index, NUM_STEPS) for index in steps)
    transfers = on_device.sampled("LMSDiscreteScheduler", make, spec, is_whole=guide == "boundary, unet")
    assert len(transfers.reads) == num_through * (1 + guide.count("floor"))
    assert len(transfers.copies) == 3
