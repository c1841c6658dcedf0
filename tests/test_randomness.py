"""Code of the user's own that draws random numbers, or answers otherwise when asked again: refused, whatever it draws.

A sample is decided by its seed alone; a criterion or a target that is not would break equal bytes without a word.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import JobError
from engine.generation.generator import Generator
from engine.generation.guidance import RequestGuides, WatchedCriterion
from engine.job.parsing import parse_job
from engine.job.plan import Plan, build_plan
from engine.job.spec import JobSpec
from engine.methods.custom.criterion import criterion_problem
from engine.models import program_description
from engine.models.classifier import Classifier
from engine.models.custom_methods import method_digest, method_digests
from engine.models.digests import model_digests
from engine.models.labels import read_labels
from engine.models.randomness import watched
from tests.guidance_scenes import unused
from tests.program_cases import SETTINGS
from tests.test_custom_methods import job_of

HEAD = """
import itertools, os, random, secrets, time, uuid
import numpy as np
import torch
from torch.nn import functional as F

def mean(images):
    return images.mean((1, 2, 3))

def like(images, values):
    return mean(images) + torch.tensor(values, dtype=torch.float32)

count = itertools.count()
own_torch, own_numpy, own_random = torch.Generator().manual_seed(0), np.random.default_rng(0), random.Random(0)
net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5))
"""
# What a criterion adds to an honest one, for images [B, 3, H, W].
RANDOM = {
    "torch.rand": "mean(images) + torch.rand(len(images))",
    "torch.randn_like": "mean((images + 0.1 * torch.randn_like(images)).abs())",
    "torch.randperm": "mean(images) + torch.randperm(5)[0]",
    "Tensor.uniform_": "mean(images) + torch.empty(len(images)).uniform_()",
    "torch.multinomial": "mean(images) + torch.multinomial(torch.ones(9), 1)",
    "functional dropout": "mean(F.dropout(images, 0.5))",
    "dropout in training mode": "net.train()(images).mean(1)",
    "numpy.random.rand": "like(images, np.random.rand(len(images)))",
    "numpy's unseeded generator": "like(images, np.random.default_rng().random(len(images)))",
    "numpy's kept generator": "like(images, own_numpy.random(len(images)))",
    "torch's kept generator": "mean(images) + torch.rand(len(images), generator=own_torch)",
    "random.random": "mean(images) + random.random()",
    "random's kept generator": "mean(images) + own_random.random()",
    "the system's": "mean(images) + int.from_bytes(os.urandom(2)) / 2**16",
    "secrets": "mean(images) + secrets.randbelow(10**6) / 10**6",
    "uuid": "mean(images) + uuid.uuid4().int / 2**128",
    "clock": "mean(images) + time.perf_counter() % 1",
    "counter": "mean(images) + next(count)",
    "a seed for all": "mean(images) + torch.rand(len(images), generator=torch.Generator().manual_seed(0))",
    "a seed of torch's": "[torch.manual_seed(0), mean(images) + torch.rand(len(images))][1]",
}
# What a factory makes anew for every worker.
OF_FACTORIES = {
    "random.random": "random.random()",
    "numpy's": "float(np.random.default_rng().random())",
    "torch.rand": "float(torch.rand(()))",
    "clock": "time.perf_counter() % 1",
}
HONEST = {
    "mean": "mean(images)",
    "target": "scene.logits(images).logsumexp(1).clamp_min(0) + 1 - scene.conformity(images, scene.labels)",
    "by the image": "(mean(images) - torch.sin(1e3 * mean(images).detach())).abs()",
    "dropout switched off": "net.eval()(images).mean(1)",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a module of criteria."""
    folder, lines = tmp_path_factory.mktemp("chance"), [HEAD]
    for prefix, criteria in (("random", RANDOM), ("honest", HONEST)):
        lines += [
            f"def {prefix}_{place}():\n    return lambda images, scene: {text}"
            for place, text in enumerate(criteria.values())
        ]
    lines += [
        f"def made_{place}():\n    offset = {text}\n    return lambda images, scene: mean(images) + offset"
        for place, text in enumerate(OF_FACTORIES.values())
    ]
    lines.append("def fixed():\n    table = torch.rand(9, generator=own_torch.manual_seed(7))")
    lines.append("    return lambda images, scene: mean(images) + table[3]")
    (folder / "by_chance.py").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def generator(home: Path) -> Any:
    """A generator of a job with an honest method; its models serve all others."""
    before, sys.path = sys.path, [*sys.path, str(home)]
    method_digest.cache_clear()
    yield made(job_of("by_chance:honest_0", home))
    sys.path = before


def made(raw: dict[str, Any]) -> Generator:
    job = parse_job(raw)
    return Generator(job, planned(job))


def planned(job: JobSpec) -> Plan:
    return build_plan(job, read_labels(job.models.target) or [], model_digests(job) | method_digests(job))


def load(name: str, generator: Generator, home: Path) -> Any:
    """The criterion of a method, as a worker loads it."""
    job = parse_job(job_of(f"by_chance:{name}", home))
    plan = planned(job)
    guides = RequestGuides(job, plan, generator._scorer, "cpu")
    return guides.criterion(plan.requests[0], (3, 32, 32), unused)


@pytest.mark.parametrize("place", range(len(RANDOM)), ids=list(RANDOM))
def test_a_criterion_by_chance_is_refused_before_samples_are_made(place: int, generator: Generator, home: Path) -> None:
    """Whatever it draws from, and whether or not it draws the same each time."""
    with pytest.raises(JobError, match=r"requests\.0\.method: the criterion of 'by_chance:random_.* draw no"):
        load(f"random_{place}", generator, home)


@pytest.mark.parametrize("place", range(len(OF_FACTORIES)), ids=list(OF_FACTORIES))
def test_a_factory_by_chance_is_refused(place: int, generator: Generator, home: Path) -> None:
    """Each worker would guide by another criterion."""
    with pytest.raises(JobError, match="other distances when its factory is called again"):
        load(f"made_{place}", generator, home)


@pytest.mark.parametrize("name", [*(f"honest_{place}" for place in range(len(HONEST))), "fixed"])
def test_an_honest_criterion_is_taken(name: str, generator: Generator, home: Path) -> None:
    """Constants that a seed of its own made, too."""
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    criterion, scene = load(name, generator, home), generator._guides.scene([(3,), (3,)], unused)
    assert torch.equal(criterion(images, scene), criterion(images, scene))


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: torch.rand(()), r"draws random numbers \(torch\)"),
        (lambda: torch.rand((), generator=KEPT), "gives other distances when it is called again"),
    ],
)
def test_what_it_draws_later_is_seen_while_samples_are_made(draw: Any, message: str, generator: Generator) -> None:
    """On the grey images of the trial it drew nothing."""

    def criterion(images: torch.Tensor, scene: Any) -> torch.Tensor:
        return images.mean((1, 2, 3)) + (draw() if images.std() > 0.2 else 0)

    scene = generator._guides.scene([(3,), (3,)], unused)
    assert criterion_problem([criterion], scene, (3, 32, 32)) is None
    with pytest.raises(JobError, match=f"my method {message}"):
        WatchedCriterion(criterion, "my method")(torch.rand(2, 3, 32, 32, generator=KEPT), scene)


KEPT = torch.Generator().manual_seed(0)


def test_every_global_generator_is_watched() -> None:
    """And reading their states moves none of them."""
    import random

    import numpy as np

    for name, draw in {"torch": lambda: torch.rand(1), "random": random.random, "numpy.random": np.random.rand}.items():
        assert watched(draw)[1] == [name]
    assert watched(lambda: torch.rand(1, generator=KEPT))[1] == []


def test_another_threads_draw_is_not_laid_to_the_code() -> None:
    """A worker's other threads may draw at any moment; what draws by itself does so each time."""
    others = iter([True, False])
    result, drawn = watched(lambda: torch.rand(1) if next(others) else 7)
    assert (result, drawn) == (7, [])


# Targets -------------------------------------------------------------------------------------------------------------

NETWORK = """
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.convolution = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.register_buffer("calls", torch.zeros(()), persistent=False)
        self.head = torch.nn.Linear(8, 10)

    def forward(self, pixels):
        features = torch.relu(self.convolution(pixels)).mean((2, 3))
        logits = self.head(features)
        return {}

def net():
    return Net(), {}
"""
TARGETS = {
    "dropout": ("self.head(F.dropout(features, 0.3))", "draws random numbers"),
    "noise": ("logits + torch.randn_like(logits)", "draws random numbers"),
    "numpy's unseeded generator": (
        "logits + float(np.random.default_rng().random())", "gives other values for equal images",
    ),
    "state": ("logits + self.calls.add_(1)", "gives other values for equal images"),
    "statistics of the batch": (
        "self.head(F.batch_norm(features, None, None, training=True))", "Expected more than 1 value|in another batch",
    ),
    "neighbours": ("logits - logits.mean(0)", "gives an image other logits in another batch"),
    "softmax": ("logits.softmax(1)", "probabilities; .* before the softmax"),
    "sharp softmax": ("(50 * logits).softmax(1)", "probabilities; .* before the softmax"),
    "sigmoid": ("logits.sigmoid()", "probabilities of independent classes; .* before the sigmoid"),
    "one-hot": ("F.one_hot(logits.argmax(1), 10).float()", "probabilities"),
}  # fmt: skip


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("form", ["factory", "script"])
def test_a_target_by_chance_or_without_logits_is_refused(
    kind: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the job is checked, or when a file is opened."""
    text, message = TARGETS[kind]
    code = HEAD + NETWORK.format(text, repr(SETTINGS))
    if form == "factory":
        (tmp_path / "own_net.py").write_text(code)
        monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
        monkeypatch.setattr(program_description, "_KNOWN", {})
        monkeypatch.delitem(sys.modules, "own_net", raising=False)
        address = "own_net:net"
    else:
        if "numpy" in kind or kind == "state":
            pytest.skip("a trace cannot hold it")
        space: dict[str, Any] = {}
        exec(code, space)
        address = str(tmp_path / "net.pt")
        torch.jit.trace(space["net"]()[0], torch.randn(4, 3, 32, 32), check_trace=False).save(address)
        Path(f"{address}.json").write_text(json.dumps(SETTINGS))
    with pytest.raises(JobError, match=message):
        read_labels(address) if form == "factory" else Classifier.load(address)
