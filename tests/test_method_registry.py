"""The registry of methods: what its records promise, and that a method is added by a folder and a record alone."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import PIL.Image
import pytest
import yaml

from engine.data.run.shards import read_shard
from engine.job.spec import GuidanceSpec
from engine.methods.boundary.spec import BoundaryGuidanceSpec
from engine.methods.parameters import MethodParameters
from engine.methods.registry import CRITERIA, METHODS, USER_CODE, Method, find_method, method_of
from engine.methods.risky.spec import RiskyGuidanceSpec
from tests import commands
from tests.conftest import REPOSITORY

GUIDED = [method for method in METHODS if method.is_guided]

SPEC = '''
"""Parameters of method `bright`."""

from pydantic import Field

from engine.methods.fields import Number
from engine.methods.boundary.spec import BoundaryGuidanceSpec
from engine.methods.parameters import MethodParameters, on_schedule


class BrightGuidanceSpec(MethodParameters):
    """Guidance to a mean brightness."""

    level: Number = Field(default=0.8, ge=0, le=1, description="Mean of the image to reach.")
    every: int = Field(default=1, ge=1, description="Guide at steps i with i % every == 0.")

    def is_guided(self, index: int, total: int) -> bool:
        return on_schedule(index, total, every=self.every, skip_last=True)

    @property
    def schedule_remedy(self) -> str:
        return "lower `every`"
'''
GUIDE = '''
"""Guidance to a mean brightness."""

from engine.methods.guidance.guided import GuidedDenoiser
from engine.methods.guidance.rules import polyak, shifting


def guide_to_brightness(denoiser, spec, scene):
    return GuidedDenoiser(
        denoiser,
        criteria=lambda images, _scene: (images.mean((1, 2, 3)) - spec.level).abs()[None],
        scene=scene,
        update=shifting(lambda loss, gradient, latents: polyak(loss, gradient, latents, alpha=1.0, cap=0.2)),
        is_guided=lambda step: spec.is_guided(step.index, step.total),
        source="conditional",
    )
'''
RECORD = """
    Method(
        name="bright",
        title="guidance to a brightness",
        caption="guided to a mean brightness",
        spec="engine.methods.bright.spec:BrightGuidanceSpec",
        guide="engine.methods.bright.guide:guide_to_brightness",
        class_fields=("classes",),
    ),
"""
REQUEST = {"name": "bright", "method": "bright", "classes": ["three"], "count": 3, "seed_group": "g"}
PARTS = {"diffusion": "stable-diffusion", "clip": "clip", "target": "classifier"}
JOB: dict[str, Any] = {
    "name": "toy",
    "models": {
        "diffusion": "zoo:digits/stable-diffusion",
        "clip": "zoo:digits/clip",
        "target": "zoo:digits/classifier",
    },
    "requests": [REQUEST, REQUEST | {"name": "plain", "method": "prompt"}],
    "sampling": {"num_inference_steps": 8, "guidance_scale": 2.0},
    "output": {"uri": "run"},
    "runtime": {"device": "cpu"},
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the code with one more method: a folder and a record."""
    home = tmp_path_factory.mktemp("copy")
    shutil.copytree(REPOSITORY / "engine", home / "engine", ignore=shutil.ignore_patterns("zoo", "__pycache__"))
    (home / "engine/zoo").symlink_to(REPOSITORY / "engine/zoo")
    for page in ("docs/job-file.md", "docs/metadata.md", "tools/docs.py"):
        (home / page).parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / page, home / page)
    folder = home / "engine/methods/bright"
    folder.mkdir()
    for name, text in (("__init__", '"""Guidance to a brightness."""\n'), ("spec", SPEC), ("guide", GUIDE)):
        (folder / f"{name}.py").write_text(text)
    registry = home / "engine/methods/registry.py"
    before, custom = registry.read_text(), '    Method(\n        name="custom",'
    assert before.count(custom) == 1
    registry.write_text(before.replace(custom, RECORD.lstrip("\n") + custom))
    return home


def riskforge(*arguments: str, folder: Path, code: int = 0) -> str:
    """The output of a command of the copy."""
    return output(commands.run(*arguments, folder=folder, PYTHONPATH=str(folder)), code)


def python(*arguments: str, folder: Path, code: int = 0) -> str:
    return output(commands.python(*arguments, folder=folder, PYTHONPATH=str(folder)), code)


def output(done: subprocess.CompletedProcess[str], code: int) -> str:
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def write_job(folder: Path, **changes: Any) -> None:
    (folder / "job.yaml").write_text(yaml.safe_dump(JOB | changes))


def test_the_schema_knows_an_added_method(copy: Path) -> None:
    schema = json.loads(riskforge("schema", folder=copy))
    method = schema["$defs"]["RequestSpec"]["properties"]["method"]
    assert method["anyOf"][0]["enum"] == ["prompt", "boundary", "risky", "bright", *CRITERIA]
    assert "RiskyDiff guidance, guidance to a brightness, guidance to uncertainty" in method["description"]
    assert list(schema["$defs"]["GuidanceSpec"]["properties"]) == ["boundary", "risky", "bright", "custom", "ensemble"]
    assert schema["$defs"]["BrightGuidanceSpec"]["properties"]["level"]["maximum"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guidance": {"bright": {"level": 2}}}, "guidance.bright.level: 2 is above 1; give 1 or less"),
        ({"guidance": {"bright": {"every": 9}}}, "leaves none of 8 steps guided; lower `every` or add steps"),
        (
            {"requests": [REQUEST | {"classes": None, "boundary": ["three", "eight"]}]},
            "requests.0.boundary: method 'bright' makes samples of single classes; give `classes`",
        ),
        ({"requests": [REQUEST | {"method": "brigth"}]}, "is not one of prompt, boundary, risky, bright, entropy,"),
    ],
)
def test_a_job_with_an_added_method_is_checked_like_any_other(copy: Path, change: dict, message: str) -> None:
    write_job(copy, **change)
    assert message in " ".join(riskforge("plan", "job.yaml", "--validate", folder=copy, code=2).split())


def test_the_reference_has_a_section_for_an_added_method(copy: Path) -> None:
    """The check of the pages fails until they are written again."""
    assert "docs/job-file.md is not up to date" in python("tools/docs.py", "--check", folder=copy, code=1)
    python("tools/docs.py", folder=copy)
    assert "## guidance.bright\n\nGuidance to a mean brightness." in (copy / "docs/job-file.md").read_text()
    python("tools/docs.py", "--check", folder=copy)


@pytest.mark.slow
def test_an_added_method_guides_samples(copy: Path) -> None:
    """The same noise comes out nearer to the brightness; card and report have the method and what it did."""
    write_job(copy)
    riskforge("run", "job.yaml", "--executor", "local", folder=copy)
    rows = [row for tar in sorted((copy / "run/shards").glob("*.tar")) for row in read_shard(tar)]
    levels: dict[str, list[float]] = {"bright": [], "plain": []}
    for _, image, record, _ in rows:
        levels[record["request"]].append(float(np.asarray(PIL.Image.open(io.BytesIO(image))).mean()) / 255)
        assert (record["guided_steps"] > 0) == (record["method"] == "bright")
    distances = {name: mean(abs(value - 0.8) for value in some) for name, some in levels.items()}
    assert len(rows) == 6 and distances["bright"] < 0.5 * distances["plain"], levels
    card = (copy / "run/README.md").read_text()
    assert "method `bright`, guided to a mean brightness; " in card and "guidance-bright" in card
    assert "- guidance: level `0.8`, every `1`\n" in card
    assert "bright" in (copy / "run/report.html").read_text()


@pytest.mark.parametrize("method", GUIDED, ids=lambda method: method.name)
def test_the_addresses_of_a_record_lead_to_spec_and_guide(method: Method) -> None:
    """A wrong guide would be seen when the first sample is made, and not before."""
    assert issubclass(method.load_spec(), MethodParameters) and callable(method.load_guide())
    parameters = method.load_spec()()
    assert any(parameters.is_guided(index, 40) for index in range(1, 41)) and parameters.schedule_remedy
    assert parameters.in_effect().keys() == parameters.model_dump().keys()
    assert parameters.is_guided(40, 40), "the last step corrects what those before it left"


def test_parameters_that_follow_from_the_step_rule() -> None:
    """The card writes out the step size that a job leaves out; only one step of `risky` has a target."""
    sizes = {step: BoundaryGuidanceSpec(step=step).in_effect()["alpha"] for step in ("polyak", "norm", "paper")}
    assert sizes == {"polyak": 1.0, "norm": 0.05, "paper": 0.05}
    assert BoundaryGuidanceSpec(alpha=0.3).in_effect()["alpha"] == 0.3
    assert RiskyGuidanceSpec(target_risk=2.0, tolerance=0.2).risk_target == (2.0, 0.2)
    assert RiskyGuidanceSpec(step="paper").risk_target is None and BoundaryGuidanceSpec().risk_target is None


def test_every_guided_method_has_a_section_of_its_own() -> None:
    """The section of one method is never read for another."""
    guidance = GuidanceSpec()
    assert list(GuidanceSpec.model_fields) == [*(method.name for method in GUIDED), "ensemble"]
    assert all(type(guidance.of(method)) is method.load_spec() for method in GUIDED)
    assert guidance.of(method_of("prompt")) == MethodParameters() and not MethodParameters().is_guided(1, 1)


def test_methods_are_looked_up_by_what_a_job_may_hold() -> None:
    """Also by what nobody has checked yet."""
    assert find_method("risky") is method_of("risky") and find_method("my.module:factory") is USER_CODE
    assert all(find_method(raw) is None for raw in ("riskyy", "custom", "", None, 3, ["risky"], {}))
    with pytest.raises(KeyError):
        method_of("custom")


def test_only_an_address_names_code_of_the_user() -> None:
    """A dotted name alone is none, nor is anything but a text."""
    assert find_method("package.module:factory") is find_method("m:f") is USER_CODE
    assert [find_method(name) for name in ("package.module", "", None, 3, ["m:f"])] == [None] * 5
