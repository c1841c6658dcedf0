"""Peaks that are counted on `meta`: those that torch measures with real weights, and what follows for a job."""

from __future__ import annotations

import dataclasses
import itertools
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from engine.commands.jobs import _gpu_bytes, _show_memory, plan
from engine.errors import JobError
from engine.generation.memory_plan import _batch, memory_fields, memory_lines, memory_plan, text_encoder_bytes
from engine.models.addresses import resolve
from engine.models.diffusion import load_pipeline
from engine.models.memory_model import on_meta
from engine.models.peak_memory import StepParts, denoising_step, step_peak
from engine.models.pipelines.base import BareNetwork
from engine.models.pipelines.lookup import family_of
from tests.flow_cases import save_pixart, save_sd3
from tests.tiny_pipelines import edit, job_of, save_lcm_pipeline, save_pipeline, save_xl_pipeline

GIB = 2**30


def parts_of(model, network, vae, **more):
    """The parts of a step with a network, whose inputs are those of its family."""
    bare = type(model).bare_network(model.folder)
    return StepParts(network=BareNetwork(module=network, inputs=bare.inputs), vae=vae, **more)


def step_peaks(model, rows, *, is_guided, through, slice_rows=None):
    """Peak of a step with real weights on a CPU, and its estimate."""
    network, vae = model._network, model._vae
    real = parts_of(model, network, vae, guide=vae if is_guided else None, slice_rows=slice_rows)
    latents = torch.randn(rows, *model.latent_shape)

    def step():
        held = latents.clone()
        denoising_step(real, held, num_halves=2, through_network=through)
        with torch.no_grad():
            for part in range(0, rows, slice_rows or rows):
                vae.decode(held[part : part + (slice_rows or rows)])

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [one for one in profiler.profiler.kineto_results.events() if one.name() == "[memory]"]
    measured = max(itertools.accumulate(one.nbytes() for one in sorted(events, key=lambda one: one.start_ns())))
    fake, fake_vae = on_meta(network, torch.float32), on_meta(vae, torch.float32)
    parts = parts_of(model, fake, fake_vae, guide=fake_vae if is_guided else None, slice_rows=slice_rows)
    return measured, step_peak(parts, model.latent_shape, rows, num_halves=2, through_network=through)


@pytest.mark.parametrize(("is_guided", "through"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("slice_rows", [None, 4])
def test_peaks_are_those_that_are_measured(diffusion, is_guided, through, slice_rows):
    """With real weights on a CPU, within 15 percent: a step forward, and with both kinds of gradients."""
    measured, estimate = step_peaks(diffusion, 8, is_guided=is_guided, through=through, slice_rows=slice_rows)
    assert estimate == pytest.approx(measured, rel=0.15)


save_unclip = partial(save_pipeline, is_unclip=True)
save_sd3_with_t5 = partial(save_sd3, with_t5=True)


@pytest.mark.parametrize("save", [save_unclip, save_xl_pipeline, save_lcm_pipeline, save_sd3, save_pixart])
def test_peaks_of_every_family_are_those_that_are_measured(save, hardware, tmp_path):
    """Tiny ones, with the gradient through the network."""
    model = load_pipeline(str(save(tmp_path / "pipeline")), hardware)
    measured, estimate = step_peaks(model, 16, is_guided=True, through=True)
    assert estimate == pytest.approx(measured, rel=0.15)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_peaks_are_those_of_a_gpu(diffusion):
    """The same against `torch.cuda.max_memory_allocated`."""
    import copy

    network, vae = copy.deepcopy(diffusion._network).cuda(), copy.deepcopy(diffusion._vae).cuda()
    latents = torch.randn(64, *diffusion.latent_shape, device="cuda")
    real = parts_of(diffusion, network, vae, guide=vae)
    denoising_step(real, latents, num_halves=2, through_network=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    denoising_step(real, latents, num_halves=2, through_network=True)
    measured = torch.cuda.max_memory_allocated() - before
    fake, fake_vae = on_meta(diffusion._network, torch.float32), on_meta(diffusion._vae, torch.float32)
    parts = parts_of(diffusion, fake, fake_vae, guide=fake_vae)
    assert step_peak(parts, diffusion.latent_shape, 64, num_halves=2, through_network=True) == pytest.approx(
        measured, rel=0.15
    )


def bytes_of(part):
    """Of the weights of a part, which may be several models with their tokenizers."""
    if isinstance(part, (list, tuple)):
        return sum(map(bytes_of, part))
    return sum(tensor.nbytes for tensor in part.parameters()) if isinstance(part, torch.nn.Module) else 0


def loaded_encoder_bytes(folder, hardware):
    parts = family_of(folder, str(folder)).load_parts(folder, hardware, checks_safety=False)
    return sum(bytes_of(part) for name, part in parts.items() if name not in ("network", "vae"))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("save", [save_xl_pipeline, save_sd3, save_sd3_with_t5, save_pixart])
def test_text_encoders_weigh_what_is_loaded(save, dtype, hardware, tmp_path):
    """Also T5, of which half precision leaves a part in float32."""
    folder = save(tmp_path / "pipeline")
    loaded = loaded_encoder_bytes(folder, dataclasses.replace(hardware, dtype=dtype))
    assert text_encoder_bytes(folder, getattr(torch, dtype)) == loaded > 0


@pytest.mark.parametrize("is_nested", [False, True])
def test_text_encoders_are_counted_by_any_configuration_that_is_loaded(is_nested, hardware, tmp_path):
    """One within the configuration of a whole CLIP, and one without its type."""
    folder = save_pipeline(tmp_path / "pipeline")
    path = folder / "text_encoder" / "config.json"
    if is_nested:
        path.write_text(json.dumps({"model_type": "clip", "text_config": json.loads(path.read_text())}))
    else:
        edit(path, model_type=...)
    assert text_encoder_bytes(folder, torch.float32) == loaded_encoder_bytes(folder, hardware) > 0


def test_equal_requests_of_a_folder_without_weights_are_computed_once(tmp_path, capsys, monkeypatch):
    folder = save_pipeline(tmp_path / "pipeline")
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    one = job_of(folder)
    [request] = one.requests
    job = one.model_copy(update={"requests": (request, request.model_copy(update={"name": "b"}))})
    _show_memory(tmp_path / "job.yaml", job, 2**24, as_json=True)
    first, second = json.loads(capsys.readouterr().out)["requests"]
    assert (first["request"], second["request"]) == ("a", "b") and first["fits"] == second["fits"]
    counted = []
    monkeypatch.setattr("engine.generation.memory_plan.step_peak", lambda *_, **__: counted.append(1) or 1)
    memory_fields(one, 2**24)
    alone = len(counted)
    memory_fields(job, 2**24)
    assert len(counted) == 2 * alone > 0


@pytest.mark.slow
def test_what_fits_follows_from_memory_and_precision(tmp_path):
    folder = save_pipeline(tmp_path / "pipeline")
    plain = job_of(folder)
    half, single = memory_plan(plain, plain.requests[0], 2**24)
    assert (half.precision, single.precision) == ("fp16", "fp32") and half.batch > single.batch > 1
    assert half.weight_bytes < single.weight_bytes
    assert [fit.batch for fit in memory_plan(plain, plain.requests[0], 2**10)] == [0, 0]


@pytest.mark.slow
def test_what_fits_of_a_guided_request(tmp_path):
    """Checkpointing and half precision never make the batch smaller; larger images do."""
    folder, sampling = save_pipeline(tmp_path / "pipeline"), {"num_inference_steps": 4}
    job = job_of(folder, method="boundary", sampling=sampling)
    large = job_of(folder, method="boundary", sampling=sampling | {"height": 64, "width": 64})
    made = memory_plan(job, job.requests[0], 2**24)
    fits = {(fit.precision, fit.checkpointing, fit.tiny_decoder): fit.batch for fit in made}
    assert len(fits) == 8
    for (precision, checkpointing, tiny), batch in fits.items():
        assert batch <= fits[precision, True, tiny] and batch <= fits["fp16", checkpointing, tiny]
    assert memory_plan(large, large.requests[0], 2**24)[0].batch < made[0].batch


@pytest.mark.parametrize("available", [5, 50, 90, 400, 900, 10_000])
def test_the_batch_is_the_largest_that_fits(available):
    """Where rows up to a slice take more than those beyond it: within a row of the search through all."""

    def peak(rows):
        return 10 * min(rows, 8 if rows % 8 else 7) + 4 * rows

    largest = max((rows for rows in range(1, 65) if peak(rows) <= available), default=0)
    batch = _batch(peak, peak(1), available, 8, 64)
    assert (batch == 0 or peak(batch) <= available) and largest - 3 <= batch <= largest


def test_sizes_of_a_gpu_are_read():
    assert _gpu_bytes("24GB") == _gpu_bytes("24 gib") == 24 * GIB and _gpu_bytes("1.5G") == 1.5 * GIB
    for wrong in ("", "0", "24", "0GB", "-3GB", "GB", "24MB", "1e9GB", "9999.5GB", "0.0000000001GB"):
        with pytest.raises(JobError, match=r"^--gpu-memory: '.*': give a number above 0, up to 9999, with the unit GB"):
            _gpu_bytes(wrong)


def test_the_command_prints_what_fits(capsys):
    with pytest.raises(JobError, match=r"--gpu-memory: .* add --memory"):
        plan(Path("jobs/quickstart.yaml"), gpu_memory="24GB")
    path = Path("jobs/quickstart.yaml")
    others = {"validate": True, "compares": True, "calibrate": True, "price_per_hour": 2.0}
    named = {"compares": "--compare-paths", "price_per_hour": "--price-per-hour"}
    for field, value in others.items():
        with pytest.raises(JobError, match=f"^--memory: .* and {named.get(field, f'--{field}')} .*; use one of them"):
            plan(path, memory=True, **{field: value})
    with pytest.raises(JobError, match="'thre' is not a class of the target"):
        plan(path, memory=True, set_=["requests.0.boundary=[thre, eight]"])
    with pytest.raises(JobError, match=r"^--gpu-memory: ''"):
        plan(path, memory=True, gpu_memory="")
    job = job_of(resolve("zoo:digits/stable-diffusion"))
    _show_memory(path, job, 2**30, as_json=True)
    fields = json.loads(capsys.readouterr().out)
    assert fields["gpu_memory_bytes"] == 2**30 and fields["requests"][0]["request"] == "a"
    assert {fit["precision"] for fit in fields["requests"][0]["fits"]} == {"fp16", "fp32"}
    _show_memory(path, job, 2**30, as_json=False)
    text = capsys.readouterr().out
    assert text.startswith("a GPU of 1 GiB") and "a: fp16, checkpointing off: batch " in text
    assert " MiB for a batch of 1" in text and " 0.0" not in text
    assert memory_lines([], 2**20)[0].startswith("a GPU of 1 MiB,")
