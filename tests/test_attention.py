"""Attention: what `auto` chooses on which GPU, and xformers where its kernels do not take a model."""

import dataclasses
import importlib.util

import pytest
import torch

from engine.errors import JobError
from engine.job.spec import RuntimeSpec
from engine.models.attention import automatic_attention, head_sizes, xformers_problem
from engine.models.diffusion import load_pipeline
from engine.models.hardware import choose_hardware

PIPELINE = "zoo:digits/stable-diffusion"
WORTH = {"dtype": "float16", "deterministic": False, "compiles": False, "has_xformers": True}


@pytest.mark.parametrize(
    ("capability", "chosen"),
    [
        (None, "sdpa"),
        ((7, 0), "sdpa"),
        ((7, 5), "auto"),
        ((8, 0), "auto"),
        ((8, 9), "auto"),
        ((9, 0), "sdpa"),
        ((10, 0), "sdpa"),
        ((12, 0), "sdpa"),
    ],
)
def test_xformers_is_worth_a_trial_from_turing_to_ada(capability, chosen):
    """Volta, Turing, Ampere, Ada, Hopper, Blackwell; and a CPU."""
    assert automatic_attention(capability, **WORTH) == chosen


@pytest.mark.parametrize(
    "change", [{"dtype": "float32"}, {"deterministic": True}, {"compiles": True}, {"has_xformers": False}]
)
def test_xformers_is_not_tried_where_it_cannot_win(change):
    assert automatic_attention((8, 0), **WORTH | change) == "sdpa"


@pytest.mark.parametrize(("capability", "installed", "chosen"), [((8, 6), True, "auto"), ((9, 0), True, "sdpa"),
                                                                 ((8, 6), False, "sdpa")])  # fmt: skip
def test_auto_goes_by_the_gpu_and_what_is_installed(monkeypatch, capability, installed, chosen):
    """`choose_hardware` on machines whose GPU and packages are given."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    assert choose_hardware(RuntimeSpec()).attention == chosen
    assert choose_hardware(RuntimeSpec(precision="fp32")).attention == "sdpa"
    assert choose_hardware(RuntimeSpec(deterministic=True, batch_size=8)).attention == "sdpa"


def test_where_xformers_has_no_kernels_auto_goes_on_and_a_job_that_asks_for_it_does_not(hardware):
    """On a CPU it has none: the pipeline is loaded with SDPA, or refused with the reason."""
    model = load_pipeline(PIPELINE, dataclasses.replace(hardware, attention="auto"))
    kinds = {type(processor).__name__ for processor in model._network.attn_processors.values()}
    assert kinds == {"AttnProcessor2_0"}
    with pytest.raises(JobError, match=r"runtime\.attention: 'xformers' cannot run here .*use auto or sdpa"):
        load_pipeline(PIPELINE, dataclasses.replace(hardware, attention="xformers"))


@pytest.mark.parametrize("wanted", ["auto", "xformers"])
def test_where_xformers_has_kernels_both_use_them(hardware, monkeypatch, wanted):
    """The trial is of the UNet's head sizes in its precision; the VAE, whose heads are wider, has its own."""
    tried = []

    def problem(sizes, dtype, device):
        tried.append((sizes, dtype))
        return "too wide" if sizes == {64} else ""

    used = []
    monkeypatch.setattr("engine.models.pipelines.base.xformers_problem", problem)
    monkeypatch.setattr(
        "diffusers.models.modeling_utils.ModelMixin.enable_xformers_memory_efficient_attention",
        lambda self: used.append(type(self).__name__),
    )
    load_pipeline(PIPELINE, dataclasses.replace(hardware, attention=wanted))
    assert tried == [({16, 24}, "float32"), ({64}, "float32")] and used == ["UNet2DConditionModel"]


def test_the_reason_why_xformers_cannot_run_is_reported(diffusion):
    """The head sizes of UNet and VAE are found in the models; without kernels the reason is returned."""
    assert head_sizes(diffusion._network) == {16, 24} and head_sizes(diffusion._vae) == {64}
    assert xformers_problem({16}, "float16", "cpu")
