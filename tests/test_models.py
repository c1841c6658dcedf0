"""Models from folders: preprocessing both ways, refusals that name the remedy, digests."""

import functools
import json
import shutil
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch

import engine.generation.calibrate
import engine.generation.generator
import engine.generation.worker
import engine.studies.prepare.observation
from engine.errors import JobError
from engine.job.parsing import parse_job
from engine.job.spec import RuntimeSpec
from engine.models.addresses import check_addresses, locate, model_digest, read_labels, resolve
from engine.models.classifier import Classifier
from engine.models.preprocess import Preprocessing
from engine.models.runtime import compiled, hardware_problems, head_sizes, xformers_problem
from tests.sleepy import make_job

PROCESSORS = {
    "vit": {"image_processor_type": "ViTImageProcessor", "size": {"height": 96, "width": 96}, "resample": 2},
    "clip": {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 112},
        "crop_size": {"height": 96, "width": 96},
        "resample": 3,
        "do_center_crop": True,
    },
    "convnext": {
        "image_processor_type": "ConvNextImageProcessor",
        "size": {"shortest_edge": 112},
        "crop_pct": 0.875,
        "resample": 3,
    },
}


def processor_folder(folder, settings):
    common = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
    means = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    folder.mkdir(exist_ok=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(common | means | settings))
    return folder


@pytest.mark.parametrize("kind", PROCESSORS)
@pytest.mark.parametrize("size", [(512, 512), (300, 451), (64, 80)])
def test_tensor_path_equals_pil_path(kind, size, tmp_path):
    """A resize without antialiasing, a shifted crop or a swapped mean would show as a difference of many levels."""
    preprocessing = Preprocessing.load(processor_folder(tmp_path / kind, PROCESSORS[kind]))
    noise = np.random.default_rng(0).integers(0, 256, (size[0] // 8, size[1] // 8, 3), dtype=np.uint8)
    image = PIL.Image.fromarray(noise).resize(size[::-1], PIL.Image.Resampling.BICUBIC)
    tensor = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 255
    exact, ours = preprocessing.of_images([image]), preprocessing.of_tensor(tensor)
    assert exact.shape == ours.shape
    difference = (exact - ours).abs() * 0.225 * 255
    assert difference.mean() < 0.6 and difference.max() < 3


def test_tensor_path_is_differentiable(tmp_path):
    """Guidance needs the gradient of every pixel through resize, crop and normalisation."""
    preprocessing = Preprocessing.load(processor_folder(tmp_path / "clip", PROCESSORS["clip"]))
    image = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)).requires_grad_()
    preprocessing.of_tensor(image).square().sum().backward()
    inner = image.grad[..., 12:-12, 12:-12]
    assert (inner.abs() > 0).float().mean() > 0.99


def test_preprocessing_without_an_equivalent_is_refused(tmp_path):
    """Nearest-neighbour resizing has no differentiable equivalent; silence would guide on other images."""
    with pytest.raises(JobError, match="bilinear and bicubic"):
        Preprocessing.load(processor_folder(tmp_path / "x", PROCESSORS["vit"] | {"resample": 0}))


def test_no_resize_is_exact(classifier):
    """At the classifier's own size both paths agree to float32 rounding."""
    pixels = np.random.default_rng(1).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    scored = classifier.score([PIL.Image.fromarray(one) for one in pixels])
    assert torch.allclose(classifier.logits(tensor), scored, atol=1e-4)


def test_temperature_divides_the_logits(tmp_path):
    """Two copies of a classifier, one at twice the temperature."""
    folder = tmp_path / "copy"
    shutil.copytree(resolve("zoo:digits/classifier"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"temperature": 2 * config["temperature"]}))
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    first, second = Classifier.load("zoo:digits/classifier"), Classifier.load(str(folder))
    assert torch.allclose(first.logits(images), 2 * second.logits(images), atol=1e-5)
    (folder / "config.json").write_text(json.dumps(config | {"temperature": 0}))
    with pytest.raises(JobError, match="temperature 0 "):
        Classifier.load(str(folder))


def test_digest_follows_content_not_place(tmp_path):
    """A copy has the same digest; one changed byte of a weight or a configuration another; a README none."""
    original, copy = resolve("zoo:digits/classifier"), tmp_path / "copy"
    shutil.copytree(original, copy)
    before = model_digest("zoo:digits/classifier")
    (copy / "README.md").write_text("notes")
    assert model_digest(str(copy)) == before
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert model_digest(str(copy)) != before


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("zoo:digits/clasifier", "did you mean 'digits/classifier'"),
        ("zoo:../../etc", "not in the zoo"),
        ("/nowhere/at/all", "neither a folder nor a hub id"),
        ("owner/name\n", "neither a folder nor a hub id"),
        ("a/my--model", "no hub id either"),
        ("models/sd.git", "no hub id either"),
        ("~nobody-here/x", "cannot be looked at"),
        ("x" * 999, "cannot be looked at"),
        ("a\0b", "neither a folder nor a hub id"),
        ("tests/test_models.py", "is a file"),
    ],
)
def test_wrong_addresses_name_the_remedy(address, message, monkeypatch, request):
    """Typing errors are told apart from hub ids that are not here."""
    monkeypatch.chdir(request.config.rootpath)
    with pytest.raises(JobError, match=message):
        locate(address)


def test_a_pipeline_is_digested_by_its_parts(tmp_path):
    """A stray checkpoint or another precision beside the parts is not loaded and must not change the digest."""
    folder = tmp_path / "pipeline"
    shutil.copytree(resolve("zoo:digits/stable-diffusion"), folder)
    before = model_digest(str(folder))
    (folder / "all-in-one.safetensors").write_bytes(b"x")
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"x")
    assert model_digest(str(folder)) == before == model_digest("zoo:digits/stable-diffusion")
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    assert model_digest(str(folder)) != before


def test_wrong_kinds_are_refused_before_loading(tmp_path):
    """A classifier as diffusion model or as CLIP, and impossible noise, are seen from the configurations."""
    raw = {
        "name": "job",
        "models": {"diffusion": "zoo:digits/clip", "clip": "zoo:digits/oracle", "target": "zoo:digits/classifier"},
        "requests": [{"name": "a", "method": "prompt", "classes": "all", "count": 1}],
        "output": {"uri": "runs/x"},
    }
    with pytest.raises(JobError) as caught:
        check_addresses(parse_job(raw))
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["models.diffusion", "models.clip"]
    raw["models"] |= {"diffusion": "zoo:digits/stable-diffusion", "clip": "zoo:digits/clip"}
    check_addresses(parse_job(raw))
    raw["sampling"] = {"scheduler": "ddim", "rescale_betas_zero_snr": True}
    with pytest.raises(JobError, match=r"requests\.0\.sampling: eps-prediction has no signal"):
        check_addresses(parse_job(raw))


def test_hub_id_that_is_not_here():
    """A hub id is located without a network, has no labels yet, and resolving it offline says why."""
    assert locate("nobody/nothing-here").folder is None
    assert read_labels("nobody/nothing-here") is None
    with pytest.raises(JobError, match="could not be had from the model hub"):
        resolve("nobody/nothing-here")


def test_wrong_kinds_are_refused(tmp_path):
    """A CLIP folder as classifier, an empty folder, broken weights: each says what is wrong."""
    with pytest.raises(JobError, match="id2label"):
        read_labels("zoo:digits/clip")
    with pytest.raises(JobError, match=r"no config\.json"):
        read_labels(str(tmp_path))
    folder = tmp_path / "broken"
    shutil.copytree(resolve("zoo:digits/classifier"), folder)
    (folder / "model.safetensors").write_bytes(b"not a model")
    with pytest.raises(JobError, match="cannot be loaded"):
        Classifier.load(str(folder))


def test_impossible_hardware_is_refused():
    """On a CPU xformers and half precision are refused with the reason, before anything is loaded."""
    spec = RuntimeSpec(attention="xformers", precision="fp16", device="cuda")
    problems = hardware_problems(spec, has_gpu=False)
    assert len(problems) == 3 and all(problem.startswith("runtime.") for problem in problems)
    assert hardware_problems(RuntimeSpec(), has_gpu=False) == []


def test_what_determinism_forbids_is_refused_on_a_gpu_alone():
    """A batch that goes by the free memory, other kernels: each with its remedy; a CPU is deterministic as it is."""
    spec = RuntimeSpec(deterministic=True, attention="xformers", compile="on")
    problems = hardware_problems(spec, has_gpu=True)
    assert [problem.split(":")[0] for problem in problems] == [
        "runtime.batch_size", "runtime.compile", "runtime.attention"
    ]  # fmt: skip
    assert "give a number" in problems[0]
    assert hardware_problems(RuntimeSpec(deterministic=True, batch_size=32), has_gpu=True) == []
    assert hardware_problems(RuntimeSpec(deterministic=True), has_gpu=False) == []
    assert hardware_problems(RuntimeSpec(deterministic=True, device="cpu"), has_gpu=True) == []


@pytest.mark.parametrize(
    ("module", "inner", "call"),
    [
        ("engine.generation.generator", "Generator", lambda job: engine.generation.worker.load_generator(job, None)),
        ("engine.generation.generator", "Generator", lambda job: engine.generation.calibrate.measure(job, None)),
        (
            "engine.studies.prepare.observation",
            "Classifier",
            lambda job: engine.studies.prepare.observation.load_observer(job, None, ""),
        ),
    ],
)
def test_whoever_decides_bytes_on_a_cpu_computes_with_one_thread(monkeypatch, tmp_path, module, inner, call):
    """Before any model is loaded: worker, calibration of one, and the pass over labelled images."""

    class StopHereError(Exception):
        """Far enough."""

    class Loads:
        def __init__(self, *_):
            raise StopHereError(torch.get_num_threads())

        load = __init__

    job, before = make_job(tmp_path, 1), torch.get_num_threads()
    job = job.model_copy(update={"runtime": RuntimeSpec(device="cpu")})
    monkeypatch.setattr(f"{module}.{inner}", Loads)
    try:
        torch.set_num_threads(2)
        with pytest.raises(StopHereError, match=r"^1$"):
            call(job)
    finally:
        torch.set_num_threads(before)


def test_kernels_are_fixed_in_a_process_of_their_own():
    """Torch's global settings after `fix_kernels`, and an operator without a deterministic form still runs on a CPU."""
    code = (
        "import os, torch\n"
        "from engine.models.runtime import fix_kernels\n"
        "torch.backends.cudnn.benchmark = torch.backends.cuda.matmul.allow_tf32 = True\n"
        "fix_kernels()\n"
        "assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic\n"
        "assert not torch.backends.cudnn.benchmark and not torch.backends.cudnn.allow_tf32\n"
        "assert not torch.backends.cuda.matmul.allow_tf32 and os.environ['CUBLAS_WORKSPACE_CONFIG'] == ':4096:8'\n"
        "assert not torch.backends.cuda.mem_efficient_sdp_enabled() and torch.backends.cuda.math_sdp_enabled()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_compiler_that_is_not_there_is_told(monkeypatch):
    """What torch raises where its backend lacks a tool: the job's fault, in a line, and not a sample's."""

    def without_tools(graph, inputs):
        raise ModuleNotFoundError("No module named 'setuptools'")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=without_tools))
    with pytest.raises(JobError, match=r"runtime\.compile: 'on' cannot be had .*No module named 'setuptools'.*use off"):
        compiled(torch.nn.Linear(2, 2))(torch.ones(1, 2))


def test_xformers_that_cannot_run_is_told_with_its_reason(diffusion):
    """The head sizes of UNet and VAE are found in the models; where there are no kernels the reason comes back."""
    assert head_sizes(diffusion._network) == {16, 24} and head_sizes(diffusion._vae) == {64}
    assert xformers_problem({16}, "float16", "cpu")
