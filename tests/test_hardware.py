"""Hardware: impossible values of `runtime` are refused; threads are fixed where bytes depend on them."""

import pytest
import torch

import engine.generation.calibrate
import engine.generation.generator
import engine.generation.worker
import engine.studies.prepare.observation
from engine.job.spec import RuntimeSpec
from engine.models.hardware import hardware_problems
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
