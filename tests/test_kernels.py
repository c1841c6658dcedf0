"""Kernels: what a GPU worker sets, and that scores are full float32 whatever was set; torch's settings need no GPU."""

import contextlib
import functools
import inspect
import json
import subprocess
import sys
import threading

import pytest
import torch

from engine.generation.generator import Generator
from engine.job.parsing import parse_job
from engine.job.plan import build_plan
from engine.models import program_loading
from engine.models.classifier import load_network
from engine.models.clip import Clip
from engine.models.diffusion import load_image_encoder
from engine.models.digests import model_digests
from engine.models.kernels import full_float32
from engine.models.labels import read_labels
from engine.models.program_loading import open_program
from engine.models.program_settings import TargetSettings
from engine.models.trainable import load_trainable
from engine.studies.evaluate.extractors import Inception
from engine.studies.retrain.finetune import predict
from tests.program_cases import DIGITS, images

TARGET = "zoo:digits/classifier"
BACKENDS = torch.backends
OPERATORS = (
    BACKENDS.cuda.matmul, BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn, BACKENDS.mkldnn.matmul, BACKENDS.mkldnn.conv,
    BACKENDS.mkldnn.rnn,
)  # fmt: skip


def settings():
    """Everything that makes a product of float32 inexact, by both of torch's interfaces; None where one raises."""
    found = [operator.fp32_precision for operator in OPERATORS]
    for read in (
        lambda: BACKENDS.cuda.matmul.allow_tf32,
        lambda: BACKENDS.cudnn.allow_tf32,
        torch.get_float32_matmul_precision,
        lambda: BACKENDS.cudnn.benchmark,
        lambda: torch.is_autocast_enabled("cpu"),
    ):
        try:
            found.append(read())
        except RuntimeError:
            found.append(None)
    return found


FULL = ["ieee"] * 6 + [False, False, "highest", False, False]


@pytest.fixture
def restored():
    """The settings of this process, whatever a test does to them."""
    generic, precision = BACKENDS.fp32_precision, torch.get_float32_matmul_precision()
    benchmark, by_operator = BACKENDS.cudnn.benchmark, [operator.fp32_precision for operator in OPERATORS]
    yield
    BACKENDS.fp32_precision = generic
    torch.set_float32_matmul_precision(precision)
    BACKENDS.cudnn.allow_tf32 = True
    for operator, value in zip(OPERATORS, by_operator, strict=True):
        operator.fp32_precision = value
    BACKENDS.cudnn.benchmark = benchmark


def leave_alone():
    """torch as it starts."""


def by_the_older_interface():
    BACKENDS.cuda.matmul.allow_tf32 = BACKENDS.cudnn.allow_tf32 = BACKENDS.cudnn.benchmark = True


def by_matmul_precision():
    torch.set_float32_matmul_precision("medium")


def by_the_newer_interface():
    BACKENDS.cuda.matmul.fp32_precision = BACKENDS.cudnn.conv.fp32_precision = "tf32"


def by_all_operators():
    BACKENDS.fp32_precision = "tf32"
    BACKENDS.cudnn.allow_tf32 = False


def by_both_against_each_other():
    BACKENDS.cuda.matmul.allow_tf32 = BACKENDS.cudnn.allow_tf32 = True
    BACKENDS.cuda.matmul.fp32_precision = BACKENDS.cudnn.rnn.fp32_precision = "ieee"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "change",
    [
        leave_alone,
        by_the_older_interface,
        by_matmul_precision,
        by_the_newer_interface,
        by_all_operators,
        by_both_against_each_other,
    ],
)
def test_whatever_was_set_is_off_within_and_restored_after(restored, change):
    """By either interface, or by both against each other; either can be read within, without a warning."""
    change()
    before = settings()
    with contextlib.suppress(KeyError), full_float32("cuda"):
        assert settings() == FULL
        raise KeyError
    assert settings() == before != FULL


def test_one_thread_does_not_end_what_another_needs(restored):
    """Two threads that score at overlapping times: the settings return when the last is done."""
    by_the_older_interface()
    before, has_begun, may_end = settings(), threading.Event(), threading.Event()

    def score():
        with full_float32("cpu"):
            has_begun.set()
            may_end.wait(30)

    thread = threading.Thread(target=score)
    with full_float32("cpu"):
        thread.start()
        assert has_begun.wait(30)
    assert settings() == FULL
    may_end.set()
    thread.join()
    assert settings() == before


def test_a_worker_that_loads_leaves_the_scores_of_another_exact(program):
    """Threads of a process: the second one's settings, TF32 among them, wait until the first one has scored."""
    program([
        "import threading",
        "from engine.models.kernels import full_float32",
        "thread = threading.Thread(target=fix_kernels, args=(of('cuda'),))",
        "with full_float32('cpu'):",
        "    thread.start()",
        "    thread.join(1)",
        "    assert thread.is_alive() and not cuda.matmul.allow_tf32 and not cudnn.allow_tf32 and not cudnn.benchmark",
        "thread.join(30)",
        "assert not thread.is_alive() and cuda.matmul.allow_tf32 and cudnn.allow_tf32 and cudnn.benchmark",
    ])  # fmt: skip


@contextlib.contextmanager
def recorded(module):
    """The settings during each forward pass of a module."""
    found = []
    hook = module.register_forward_pre_hook(lambda *_: found.append(settings()))
    yield found
    hook.remove()


def network_of(classifier):
    """The module that a classifier of transformers calls."""
    return inspect.getclosurevars(classifier._network).nonlocals["model"]


@pytest.fixture(scope="module")
def clip():
    return Clip.load("zoo:digits/clip")


class WithLayers(torch.nn.Module):
    """In the form of Inception's file."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1))


@pytest.fixture(params=["classifier", "images of CLIP", "texts of CLIP", "image encoder", "Inception", "retrain"])
def scoring(request, classifier, clip, tmp_path):
    """Every way to a number that is stored or compared: the module that computes it, and the call."""
    shown = images(2)
    if request.param == "image encoder":
        encoder = load_image_encoder("zoo:digits/stable-unclip")
        return encoder._model, lambda: encoder.image_embeds(shown)
    if request.param == "Inception":
        torch.jit.script(WithLayers()).save(tmp_path / "inception.pt")
        inception = Inception(tmp_path / "inception.pt")
        inception._layers = torch.nn.Sequential(inception._layers)
        return inception._layers, lambda: torch.from_numpy(inception.features(shown, None))
    if request.param == "retrain":
        network = load_trainable(TARGET, "cpu").network
        return network, lambda: predict(network, torch.linspace(0, 1, 6144).reshape(2, 3, 32, 32))
    return {
        "classifier": (network_of(classifier), lambda: classifier.score(shown)),
        "images of CLIP": (clip._model.vision_model, lambda: clip.image_embeds(shown)),
        "texts of CLIP": (clip._model.text_model, lambda: clip.text_embeds(["a"])),
    }[request.param]


def test_scores_are_full_float32_whatever_was_set(restored, scoring):
    """A worker that samples in TF32, user code with autocast in bfloat16: the bits are those without either."""
    module, score = scoring
    expected = score()
    by_matmul_precision()
    with recorded(module) as found, torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(score(), expected)
    assert found == [FULL]


def test_a_users_network_is_tried_as_it_is_scored(restored, monkeypatch):
    """Whether an image's logits depend on its neighbours is not asked of kernels that make them depend on them."""
    by_matmul_precision()
    network, found = load_network(TARGET), []

    class OfTransformers(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, pixels):
            found.append(settings())
            return self.network(pixel_values=pixels).logits

    described = TargetSettings(labels=DIGITS, image_size=32, mean=[0.5] * 3, std=[0.5] * 3)
    monkeypatch.setattr(program_loading, "call_factory", lambda address: (OfTransformers(), described))
    open_program("package.module:function", "cpu")
    assert len(found) > 3 and all(each == FULL for each in found)


def test_guidance_may_use_what_scores_must_not(restored, classifier, clip):
    """The differentiable paths leave the settings as a worker's process has them."""
    by_the_older_interface()
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with recorded(network_of(classifier)) as target, recorded(clip._model.vision_model) as embeds:
        classifier.logits(pixels)
        clip.embeds_of_tensor(pixels)
    assert target == embeds == [settings()] and settings() != FULL


def test_a_run_guides_with_the_workers_settings_and_scores_without_them(restored):
    """A batch of the real generator: the target is differentiated in TF32, if a GPU has it, and scores are full."""
    raw = {
        "name": "job",
        "models": {"diffusion": "zoo:digits/stable-diffusion", "clip": "zoo:digits/clip", "target": TARGET},
        "requests": [{"name": "a", "method": "risky", "classes": ["three"], "count": 1}],
        "sampling": {"num_inference_steps": 2, "guidance_scale": 2.0},
        "output": {"uri": "runs/job"},
        "runtime": {"device": "cpu"},
    }
    job = parse_job(raw)
    plan = build_plan(job, read_labels(TARGET), model_digests(job))
    generator = Generator(job, plan)
    by_the_older_interface()
    before = settings()
    with (
        recorded(network_of(generator._target)) as target,
        recorded(generator._scorer._clip._model.vision_model) as embeds,
    ):
        generator.next_batch(0, list(plan.samples(plan.shard(0))))
    # Two shapes are compared, and the last of two steps is guided.
    assert target == [before] * 3 + [FULL] and embeds == [FULL]
    assert settings() == before


# Imports torch once; each program it is given runs in a fork, before torch has any thread. Answers with its failure.
FORKS = """
import json, os, sys, traceback, warnings, torch
from engine.models.hardware import Hardware
import engine.models.kernels
for line in sys.stdin:
    read, write = os.pipe()
    if not (child := os.fork()):
        os.close(read)
        failure = ""
        try:
            warnings.simplefilter("error")
            exec(json.loads(line), {})
        except BaseException:
            failure = traceback.format_exc()
        os.write(write, failure.encode()[-4000:])
        os._exit(0 if not failure else 1)
    os.close(write)
    with open(read) as pipe:
        failure = pipe.read()
    print(json.dumps([os.waitpid(child, 0)[1], failure]), flush=True)
"""


@pytest.fixture(scope="module")
def forks():
    """A process whose forks run programs."""
    command = [sys.executable, "-c", FORKS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def program(forks):
    """Runs lines of Python in a process of their own, whose settings of torch nobody needs afterwards."""
    return functools.partial(run_program, forks)


def run_program(forks, code):
    """In a fork of that process."""
    lines = (
        "import os, torch",
        "from engine.models.hardware import Hardware",
        "from engine.models.kernels import ALLOCATOR_VARIABLES, fix_kernels",
        "for name in ALLOCATOR_VARIABLES: os.environ.pop(name, None)",
        "asked = []",
        "set_allocator = torch._C._accelerator_setAllocatorSettings",
        "torch._C._accelerator_setAllocatorSettings = lambda text: (asked.append(text), set_allocator(text))",
        "cuda, cudnn, deterministic = torch.backends.cuda, torch.backends.cudnn, torch.utils.deterministic",
        "def of(device, dtype='float16', **more):",
        "    return Hardware(device, dtype, 'sdpa', 'auto', **more)",
        *code,
    )
    print(json.dumps("\n".join(lines)), file=forks.stdin, flush=True)
    status, failure = json.loads(forks.stdout.readline())
    assert status == 0, failure


def test_a_worker_on_a_gpu_samples_in_tf32_with_a_search(program):
    """By both interfaces, and with segments that grow; in `precision: fp32` float32 is what it says."""
    program([
        "fix_kernels(of('cuda'))",
        "assert cuda.matmul.allow_tf32 and cudnn.allow_tf32 and cudnn.benchmark",
        "assert cuda.matmul.fp32_precision == cudnn.conv.fp32_precision == 'tf32'",
        "assert asked == ['expandable_segments:True']",
        "assert not torch.are_deterministic_algorithms_enabled() and not cudnn.deterministic",
        "fix_kernels(of('cuda', 'float32'))",
        "assert not cuda.matmul.allow_tf32 and not cudnn.allow_tf32 and cudnn.benchmark",
    ])  # fmt: skip


def test_equal_bytes_cost_no_more_than_they_must(program):
    """`deterministic`: one order of summation, no search, TF32 all the same, and no new tensor is filled with NaN."""
    program([
        "cudnn.benchmark = True",
        "fix_kernels(of('cuda', deterministic=True))",
        "assert torch.are_deterministic_algorithms_enabled() and cudnn.deterministic and not cudnn.benchmark",
        "assert cuda.matmul.allow_tf32 and cudnn.allow_tf32 and not deterministic.fill_uninitialized_memory",
        "assert os.environ['CUBLAS_WORKSPACE_CONFIG'] == ':4096:8'",
        "assert not cuda.mem_efficient_sdp_enabled() and not cuda.cudnn_sdp_enabled() and cuda.math_sdp_enabled()",
        "with torch.device('meta'): torch.nn.Linear(2, 2)(torch.empty(1, 2))",
    ])  # fmt: skip


def test_what_is_not_for_the_worker_to_set_stays(program):
    """All of torch where models are on a CPU; the allocator where the user set it, who may have a GPU without a VMM."""
    program([
        "fix_kernels(of('cpu', deterministic=True))",
        "assert not cuda.matmul.allow_tf32 and cudnn.allow_tf32 and not cudnn.benchmark and asked == []",
        "assert not torch.are_deterministic_algorithms_enabled() and deterministic.fill_uninitialized_memory",
        "for name in ('PYTORCH_ALLOC_CONF', 'PYTORCH_CUDA_ALLOC_CONF'):",
        "    os.environ[name] = 'expandable_segments:False'",
        "    fix_kernels(of('cuda'))",
        "    assert asked == [] and cuda.matmul.allow_tf32",
        "    del os.environ[name]",
    ])  # fmt: skip
