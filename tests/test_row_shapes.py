"""Batches on a CPU that are denoised in no more rows than their samples need: real models of the zoo, equal bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from engine.generation.generator import Generator
from engine.generation.row_shapes import ROW_MULTIPLE, RowShapes, fewest_rows, gpu_multiple
from engine.job.parsing import parse_job
from engine.job.plan import Plan, build_plan
from engine.job.records import SampleResult
from engine.methods.guidance.precision import pulled_back
from engine.methods.guidance.scene import Decoding
from engine.methods.sampling.loop import sample
from engine.models.digests import model_digests
from engine.models.hardware import CPU_ROWS
from engine.models.labels import read_labels
from engine.models.steady import SteadyConv2d

CLASSES = {"digits": ("three", "eight"), "cifar10": ("cat", "dog")}
NUM_STEPS = 4
METHODS: dict[str, dict[str, Any]] = {
    "prompt": {},
    "boundary": {"every": 1, "tolerance": 2.0},
    "risky": {"every": 1, "tolerance": 1.49},
}
BOUNDARY, RISKY = 1, 2
# That the first sample is below at the first step, and others above; without one there is another step rule.
FLOORS = {"digits": None, "cifar10": 0.3}


class Made:
    """A generator of sixteen samples for each method, with the rows that its network was called with."""

    def __init__(self, zoo: str, methods: dict[str, dict[str, Any]] = METHODS, *further: str, **guidance: str) -> None:
        models: dict[str, Any] = {name: f"zoo:{zoo}/{part}" for name, part in
                  (("diffusion", "stable-diffusion"), ("clip", "clip"), ("target", "classifier"))}  # fmt: skip
        models["target"] = [models["target"], *further]
        first, second, floor = *CLASSES[zoo], {"conformity_floor": FLOORS[zoo]}
        requests = [
            {
                "name": name,
                "method": name,
                "count": 16,
                "seed_group": "same",
                "guidance": ({name: floor | options if name == "risky" else options} if options else {}) | guidance,
            }
            | ({"classes": [first]} if name == "risky" else {"boundary": [first, second]})
            for name, options in methods.items()
        ]
        sampling = {"num_inference_steps": NUM_STEPS, "guidance_scale": 3.0}
        output = {"uri": "runs/job"}
        job = parse_job({"name": "job", "models": models, "requests": requests, "sampling": sampling, "output": output})
        self.plan: Plan = build_plan(job, read_labels(job.models.target), model_digests(job))
        self.generator = Generator(job, self.plan)
        self.rows, self.compared = list[int](), set[int]()
        self.network = self.generator._model(0).network
        self.network.register_forward_pre_hook(lambda _, inputs: self.rows.append(len(inputs[0])))

    def results(self, request: int, num_samples: int, first: int = 0) -> list[SampleResult]:
        """Of the samples of a request from the first one on; `rows` are then those of its batch."""
        specs = list(self.plan.samples(self.plan.shard(request)))[first : first + num_samples]
        # What a comparison of shapes takes is not the batch's.
        if request not in self.compared:
            self.generator.next_batch(request, specs[:1])
            self.compared.add(request)
        self.rows.clear()
        return self.generator.next_batch(request, specs)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As workers on a CPU have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=CLASSES)
def made(request: pytest.FixtureRequest) -> Made:
    return Made(request.param)


def contents(results: list[SampleResult]) -> list[tuple[Any, ...]]:
    return [(result.image, result.record) for result in results]


@pytest.mark.parametrize(
    ("made", "request_number"),
    # Guidance to a boundary differs from that to risk in what is added up alone: once is enough of the larger network.
    [*(("digits", number) for number in range(len(METHODS))), ("cifar10", RISKY)],
    indirect=["made"],
)
def test_samples_have_the_bytes_of_whole_batches(
    made: Made, request_number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first five and the first nine, and one from the middle, in fewer rows: eight, twelve and four."""
    parts = [(5, 0), (9, 0), (1, 9)]
    fewer = []
    for num_samples, first in parts:
        fewer.append((contents(made.results(request_number, num_samples, first)), list(made.rows)))
    monkeypatch.setattr(RowShapes, "agree", lambda *_: False)
    whole = contents(made.results(request_number, 16))
    all_rows = sum(made.rows)
    for (num_samples, first), (found, rows) in zip(parts, fewer, strict=True):
        assert found == whole[first : first + num_samples]
        assert all(number % ROW_MULTIPLE == 0 for number in rows)
        assert sum(rows) == all_rows * fewest_rows(num_samples, 16) / 16


@pytest.mark.parametrize(
    ("made", "request_number"), [("digits", BOUNDARY), ("digits", RISKY), ("cifar10", RISKY)], indirect=["made"]
)
def test_gradients_by_fours_have_the_bytes_of_whole_batches(made: Made, request_number: int) -> None:
    """Sixteen samples, some of which arrive: through fewer rows with a graph, to the same latents and counts."""
    specs, found = list(made.plan.samples(made.plan.shard(request_number))), []
    for row_multiple in (None, ROW_MULTIPLE):
        made.rows.clear()
        denoiser, sampler, noise = made.generator._denoiser(request_number, specs, [])
        guided = made.generator._guided(request_number, specs, denoiser, row_multiple)
        assert guided is not None
        counted, decode = list[int](), guided._scene.decoding.decode

        def decoded(latents: torch.Tensor, counted: list[int] = counted, decode: Any = decode) -> torch.Tensor:
            counted.extend([len(latents)] * torch.is_grad_enabled())
            return decode(latents)

        guided = guided.through(Decoding(decode=decoded))
        found.append((sample(guided, sampler, noise), guided.health, counted))
    (whole, health, all_rows), (parted, other, rows) = found
    assert torch.equal(whole, parted) and torch.equal(health.guided_steps, other.guided_steps)
    assert all(number % ROW_MULTIPLE == 0 for number in rows) and len(set(rows)) > 1
    assert set(all_rows) == {16} and 0 < health.guided_steps.sum() < 16 * NUM_STEPS


def test_a_shape_that_changes_bytes_is_not_used(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without steady convolutions torch computes short batches by another kernel: the shape stays, and the bytes."""
    expected = contents(made.results(0, 3))
    monkeypatch.setattr(made.generator, "_shapes", RowShapes())
    monkeypatch.setattr(made, "compared", set[int]())
    with monkeypatch.context() as patch:
        patch.setattr(SteadyConv2d, "forward", torch.nn.Conv2d.forward)
        assert contents(made.results(0, 3)) == expected
        assert set(made.rows) == {2 * CPU_ROWS}
        assert list(made.generator._shapes._agree.values()) == [False]


def test_all_that_a_later_step_may_follow_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a target that is never the worst at the step that is compared; a floor that nothing is below cannot be."""
    methods: dict[str, dict[str, Any]] = {
        "boundary": {"every": 1, "tolerance": 0.0},
        "risky": {"conformity_floor": -0.5},
    }
    made = Made("digits", methods, "zoo:digits/classifier-b", ensemble="worst")
    generator, specs = made.generator, list(made.plan.samples(made.plan.shard(0)))
    second = generator._scorer.further_targets[0]
    logits, boundary = second.logits, torch.zeros(10).index_fill(0, torch.tensor([3, 8]), 20.0)
    found = []
    for factor in (lambda _: 1.0, len):
        monkeypatch.setattr(second, "logits", lambda images, by=factor: boundary + logits(images) * 0.001 * by(images))
        monkeypatch.setattr(generator, "_shapes", RowShapes())
        found.append(generator._rows(0, specs, [], 3)[0])
    assert found == [4, 16]
    specs = list(made.plan.samples(made.plan.shard(1)))
    monkeypatch.undo()
    assert generator._rows(1, specs, [], 3)[0] == 16


def test_requests_of_few_steps_are_compared_for_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three steps the last alone is guided, not through the UNet: what it shows holds for no other request."""
    made = Made("digits", {"boundary": {}})
    generator, found = made.generator, []
    request = generator._job.requests[0]
    monkeypatch.setattr(
        "engine.methods.guidance.guided.pulled_back", lambda given, *more: pulled_back(given, *more) * len(given)
    )
    for steps in (3, NUM_STEPS):
        few = request.model_copy(update={"sampling": {"num_inference_steps": steps}})
        generator._job = generator._job.model_copy(update={"requests": (few,)})
        found.append(generator._rows(0, list(made.plan.samples(made.plan.shard(0))), [], 3)[0])
    assert found == [4, 16]


def test_one_comparison_decides_for_a_process() -> None:
    """A tensor that differs, or that there is nothing to compare, keeps the shape."""
    shapes, asked = RowShapes(), list[int]()

    def compute(num_rows: int) -> list[torch.Tensor]:
        asked.append(num_rows)
        return [torch.zeros(num_rows, 2), torch.full((num_rows, 2), float(num_rows))]

    assert [shapes.agree("a", compute, 16) for _ in range(2)] == [False, False] and asked == [16, 4]
    assert shapes.agree("b", lambda num_rows: compute(num_rows)[:1], 16)
    assert not shapes.agree("c", lambda _: None, 16)


def test_shapes() -> None:
    """Multiples of four up to the whole; on a GPU no more than four."""
    assert [fewest_rows(number, 16) for number in (1, 4, 5, 13, 16)] == [4, 4, 8, 16, 16]
    assert [gpu_multiple(number) for number in (8, 32, 64, 100)] == [8, 8, 16, 25]
