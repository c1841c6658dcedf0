"""Hardware: impossible values of `runtime` are refused; threads and kernels are fixed where bytes depend on them."""

import functools
import subprocess
import sys

import pytest
import torch

import engine.generation.calibrate
import engine.generation.generator
import engine.generation.worker
import engine.studies.prepare.observation
from engine.errors import JobError
from engine.job.spec import RuntimeSpec
from engine.models.hardware import compiled, hardware_problems, head_sizes, xformers_problem
from tests.sleepy import make_job


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
def test_code_that_affects_output_bytes_uses_one_thread_on_a_cpu(monkeypatch, tmp_path, module, inner, call):
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
        "from engine.models.hardware import fix_kernels\n"
        "torch.backends.cudnn.benchmark = torch.backends.cuda.matmul.allow_tf32 = True\n"
        "fix_kernels()\n"
        "assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic\n"
        "assert not torch.backends.cudnn.benchmark and not torch.backends.cudnn.allow_tf32\n"
        "assert not torch.backends.cuda.matmul.allow_tf32 and os.environ['CUBLAS_WORKSPACE_CONFIG'] == ':4096:8'\n"
        "assert not torch.backends.cuda.mem_efficient_sdp_enabled() and torch.backends.cuda.math_sdp_enabled()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_missing_compiler_is_reported(monkeypatch):
    """What torch raises where its backend lacks a tool: the job's fault, in a line, and not a sample's."""

    def without_tools(graph, inputs):
        raise ModuleNotFoundError("No module named 'setuptools'")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=without_tools))
    with pytest.raises(
        JobError, match=r"runtime\.compile: 'on' is not available .*No module named 'setuptools'.*use off"
    ):
        compiled(torch.nn.Linear(2, 2))(torch.ones(1, 2))


def test_the_reason_why_xformers_cannot_run_is_reported(diffusion):
    """The head sizes of UNet and VAE are found in the models; without kernels the reason is returned."""
    assert head_sizes(diffusion._network) == {16, 24} and head_sizes(diffusion._vae) == {64}
    assert xformers_problem({16}, "float16", "cpu")
