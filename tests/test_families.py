"""A family of pipelines is one file and one line of the registry: the whole program samples with it, or refuses it.

Stable Diffusion XL stands for all: it is taken out of a copy of the engine, and put back. Flow matching is another
sampler, one adapter; its noise levels and its predictions are tested here too.
"""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch

from engine.methods.sampling.denoiser import Prediction, predicted_eps, predicted_x0
from engine.methods.sampling.flow import FlowMatching
from engine.methods.sampling.loop import Start, sample
from engine.methods.sampling.noise import draw_noise
from engine.models.pipelines.registry import FAMILIES
from tests import commands
from tests.conftest import REPOSITORY
from tests.tiny_pipelines import load_reference, save_xl_pipeline

LINE = '    "StableDiffusionXLPipeline": "engine.models.pipelines.stable_diffusion_xl:StableDiffusionXL",\n'
FILE = "models/pipelines/stable_diffusion_xl.py"
REGISTRY = "models/pipelines/registry.py"


@pytest.fixture
def package(tmp_path) -> Path:
    """A copy of the package without the family: without its file, and without its line in the registry."""
    root = tmp_path / "package"
    shutil.copytree(REPOSITORY / "engine", root / "engine", ignore=shutil.ignore_patterns("zoo", "__pycache__"))
    (root / "engine/zoo").symlink_to(REPOSITORY / "engine/zoo")
    (root / "engine" / FILE).unlink()
    registry = root / "engine" / REGISTRY
    before, after = registry.read_text().split(LINE)
    registry.write_text(before + after)
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny Stable Diffusion XL with random weights, as diffusers saves it."""
    return save_xl_pipeline(tmp_path_factory.mktemp("pipeline") / "xl")


def program(package: Path, *arguments, code: int = 0) -> str:
    """What the command line of a copy of the package prints."""
    done = commands.run(*arguments, folder=package, PYTHONPATH=str(package))
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def write_job(path: Path, folder: Path) -> Path:
    models = {"diffusion": str(folder), "clip": "zoo:digits/clip", "target": "zoo:digits/classifier"}
    plain = {"name": "plain", "method": "prompt", "classes": ["three"], "count": 1}
    guided = {"name": "guided", "method": "boundary", "boundary": ["three", "eight"], "count": 1}
    job = {"name": "job", "models": models, "requests": [plain, guided], "output": {"uri": str(path.parent / "run")}}
    job["sampling"] = {"scheduler": "euler", "num_inference_steps": 6, "guidance_scale": 3.0}
    path.write_text(json.dumps(job))
    return path


def members_of(run: Path) -> dict[str, bytes]:
    """Contents of the members of all tars of a run, by name."""
    members: dict[str, bytes] = {}
    for path in sorted(run.rglob("*.tar")):
        with tarfile.open(path) as tar:
            members |= {info.name: tar.extractfile(info).read() for info in tar.getmembers()}
    return members


@pytest.mark.slow
def test_a_family_is_one_file_and_one_line(package, folder, tmp_path):
    """Refused by name without them, sampled with and without guidance with them, equal to diffusers' own pipeline."""
    job = write_job(tmp_path / "job.json", folder)
    assert "is a StableDiffusionXLPipeline; what runs: a StableDiffusionPipeline" in program(
        package, "plan", job, code=2
    )
    for path in (FILE, REGISTRY):
        shutil.copy(REPOSITORY / "engine" / path, package / "engine" / path)
    program(package, "run", job, "--executor", "local", "--set", "runtime.device=cpu")
    members = members_of(tmp_path / "run")
    records = [json.loads(content) for name, content in members.items() if name.endswith(".json")]
    assert {record["status"] for record in records} == {"ok"} and len(records) == 2
    [record] = [record for record in records if record["request"] == "plain"]
    [image] = [content for name, content in members.items() if name == f"{record['key']}.png"]
    expected = load_reference(folder)(
        prompt=record["prompt"],
        generator=torch.Generator().manual_seed(record["seed"]),
        num_inference_steps=6,
        guidance_scale=3.0,
        output_type="np",
    ).images[0]
    made = np.asarray(PIL.Image.open(io.BytesIO(image)).convert("RGB"), dtype=float)
    assert made.shape == (32, 32, 3) and made.std() > 2
    assert np.abs(made - expected * 255).max() < 1


def test_a_family_is_checked_without_torch_and_named_in_refusals(folder, tmp_path):
    """Its options are checked from configurations alone, and a refused pipeline is told that it runs."""
    code = (
        "import sys, json; from pathlib import Path\n"
        "from engine.errors import JobError; from engine.models.pipelines.lookup import check_pipeline\n"
        "folder = Path(sys.argv[1]); check_pipeline(folder, 'x')\n"
        "assert not {'torch', 'diffusers', 'transformers'} & sys.modules.keys()\n"
        "unet, index = ('unet/config.json', 'cross_attention_dim', 16), ('model_index.json', '_class_name', 'Y')\n"
        "for part, key, value in (unet, index):\n"
        "    path = folder / part; content = path.read_text()\n"
        "    path.write_text(json.dumps(json.loads(content) | {key: value}))\n"
        "    try: check_pipeline(folder, 'x')\n"
        "    except JobError as error: print(error)\n"
        "    path.write_text(content)\n"
    )
    copy = shutil.copytree(folder, tmp_path / "copy")
    command = [sys.executable, "-c", code, copy]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert "cross_attention_dim: 16, the embeddings of the text encoders have 40 entries" in first
    assert (
        second.startswith("'x' is a Y; what runs: a StableDiffusionPipeline, ")
        and "StableDiffusionXLPipeline" in second
    )


def test_nothing_else_in_the_engine_names_a_family():
    """Neither by its class in diffusers, nor by its module; a family may build on another."""
    for class_name, address in FAMILIES.items():
        module = address.partition(":")[0]
        for path in sorted((REPOSITORY / "engine").rglob("*.py")):
            is_family = path.parent.name == "pipelines" and path.name != "lookup.py"
            # The server that workers are forked from imports what the usual family imports.
            if is_family or (path.name == "fork_server.py" and module.endswith(".stable_diffusion")):
                continue
            code = path.read_text()
            assert not re.search(rf"\b{re.escape(class_name)}\b|{re.escape(module)}\b", code), path


@pytest.fixture
def flow():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(8)
    return FlowMatching(scheduler)


def test_a_sampler_of_flow_matching_is_one_adapter(flow):
    """The velocity of one clean image brings the loop exactly to it, and stands for it and its noise at every step."""
    clean = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    [noise] = draw_noise([1, 2], (4, 2, 2))
    seen = []

    def denoise(latents, step):
        output = noise - clean
        seen.append((predicted_x0(output, latents, step, "flow"), predicted_eps(output, latents, step, "flow")))
        return Prediction(output=output, conditional=output, latents=latents, prediction=flow.prediction)

    assert torch.allclose(sample(denoise, flow, noise), clean, atol=1e-5)
    assert len(seen) == 8
    flow._scheduler.set_timesteps(8)
    assert torch.allclose(sample(denoise, flow, noise, Start(latents=clean, strength=0.25)), clean, atol=1e-5)
    assert len(seen) == 10
    assert all(torch.allclose(x0, clean, atol=1e-5) and torch.allclose(eps, noise, atol=1e-5) for x0, eps in seen)


def test_guidance_moves_latents_of_flow_matching(flow):
    """A shift of the latents keeps their noise, and one of the noise keeps the latents, as with eps and v."""
    step = list(flow.steps())[3]
    latents, output = (torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    base = Prediction(output=output, conditional=output, latents=latents, prediction="flow")
    moved, bent = base.moved(torch.ones_like(latents), step), base.with_eps_moved(torch.ones_like(latents), step)
    eps = predicted_eps(output, latents, step, "flow")
    assert torch.allclose(predicted_eps(moved.output, moved.latents, step, "flow"), eps, atol=1e-5)
    assert torch.equal(moved.latents, latents + 1)
    assert torch.allclose(predicted_eps(bent.output, latents, step, "flow"), eps + 1, atol=1e-5)
    assert torch.equal(bent.latents, latents)
