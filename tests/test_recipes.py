"""The jobs of docs/methods.md that equal the papers make the samples of the authors' loops, as they stand there."""

import dataclasses

import pytest
import torch
import yaml
from bench.arms import KLDB, RISKY, arms_of
from bench.checks import check_published
from bench.programs import Bench
from bench.sizes import digits_setting

from engine.job.parsing import parse_job
from tests.conftest import REPOSITORY
from tests.test_docs import blocks

RECIPES = {
    job["name"]: job
    for _, text in blocks(REPOSITORY / "docs" / "methods.md", "yaml")
    if str((job := yaml.safe_load(text)).get("name")).endswith("-as-published")
}
ARMS = {"kldb-as-published": ("boundary", "published-kldb"), "riskydiff-as-published": ("risky", "published-risky")}


@pytest.fixture(params=ARMS)
def recipe(request):
    """A job of the page."""
    return RECIPES[request.param]


def test_the_benchmark_measures_the_recipes(recipe):
    """What is timed is what the page says: guidance, sampling and models."""
    family, name = ARMS[recipe["name"]]
    setting = digits_setting()
    assert recipe["guidance"][family] == {"boundary": KLDB, "risky": RISKY}[family]
    assert recipe["sampling"] == getattr(setting, f"{family}_sampling")
    diffusion = setting.diffusion if family == "boundary" else setting.unclip
    assert recipe["models"] == {"diffusion": diffusion, "clip": setting.clip, "target": setting.target}
    assert {arm.name: arm.guidance for arm in arms_of(setting)}[name] == recipe["guidance"][family]
    assert parse_job(recipe).requests[0].method == family


def test_a_recipe_makes_the_samples_of_the_authors_loop(recipe):
    """The engine runs the job of the page, the loop makes its samples from the same noise and embeddings."""
    family, name = ARMS[recipe["name"]]
    arms = {arm.name: arm for arm in arms_of(digits_setting())}
    published, twin = arms[name], dataclasses.replace(arms[arms[name].twin], guidance=recipe["guidance"][family])
    bench = Bench(digits_setting(), [twin], device="cpu", num_samples=3, raw=recipe)
    assert bench.job.name == recipe["name"] and len(bench.plan.requests) == 1
    with torch.no_grad():
        check = check_published(bench, published, twin, bench.batch(3))
    assert check.holds, str(check)
