"""A method of the user's own: the example of the docs as it stands, what is recorded of it, and what is refused."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import yaml

from engine.commands.jobfile import read_job
from engine.data.run.shards import read_shard
from engine.data.run.stored_plan import stored_plan
from engine.data.stores.opening import open_store
from engine.errors import JobError
from engine.generation.generator import Generator
from engine.generation.guidance import RequestGuides
from engine.job.parsing import parse_job
from engine.job.plan import build_plan
from engine.models import factories
from engine.models.custom_methods import method_digest, method_digests
from engine.models.digests import model_digests
from engine.models.job_checks import check_addresses
from engine.models.labels import read_labels
from tests.conftest import REPOSITORY
from tests.guidance_scenes import unused
from tests.program_cases import FACTORY, riskforge

PAGE = REPOSITORY / "docs/extending.md"
MAX_LINES = 60
RISKFORGE = str(Path(sys.executable).with_name("riskforge"))
SMALL = ("--executor", "local", "--set", "requests.0.count=4", "--set", "requests.1.count=4")


def block(language: str) -> str:
    """The first block of a language in the section on guidance methods."""
    section = PAGE.read_text().split("\n## A guidance method\n")[1]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the two files of the page, and the run of them, smaller."""
    home = tmp_path_factory.mktemp("method")
    (home / "my_methods.py").write_text(block("python"))
    (home / "job.yaml").write_text(block("yaml"))
    riskforge("run", "job.yaml", *SMALL, folder=home)
    return home


def test_the_example_is_short_and_does_what_it_says(finished: Path) -> None:
    """Under sixty lines; the same noise comes out nearer to the highest entropy, sample for sample mostly."""
    assert len(block("python").splitlines()) < MAX_LINES
    [tar] = sorted((finished / "runs/doubt/shards").glob("*-000000.tar"))
    others = [path for path in sorted(tar.parent.glob("*.tar")) if path != tar]
    records = [record for path in (tar, *others) for _, _, record, _ in read_shard(path)]
    doubt, plain = ([one for one in records if one["request"] == name] for name in ("doubt", "plain"))
    assert [one["seed"] for one in doubt] == [one["seed"] for one in plain] and len(doubt) == 8
    assert median(one["entropy"] for one in doubt) > 2 * median(one["entropy"] for one in plain)
    assert all(one["guided_steps"] > 0 and one["nonfinite_gradients"] == 0 for one in doubt)


@pytest.mark.slow
def test_actors_of_ray_run_the_users_code(tmp_path: Path) -> None:
    """Method and target factory lie beside the job alone, and the command is given elsewhere: actors import both, and
    make the bytes that one process makes, which may use more cores: the order of sums must not go by that."""
    job = tmp_path / "beside/job.yaml"
    job.parent.mkdir()
    (job.parent / "my_methods.py").write_text(block("python"))
    (job.parent / "digit_nets.py").write_text(FACTORY)
    job.write_text(block("yaml"))
    changes = (
        "models.target=digit_nets:net", "requests.0.count=1", "requests.1.count=1", "output.samples_per_shard=1",
        "sampling.num_inference_steps=6", "guidance.custom.parameters.share=1.0", "runtime.device=cpu",
    )  # fmt: skip
    own = [part for change in changes for part in ("--set", change)]
    riskforge("run", job, *own, "--executor", "ray", "--workers", 1, "--output", tmp_path / "ray", folder=tmp_path)
    # An interpreter of its own, as this number is read when torch is imported.
    command = [RISKFORGE, "run", job, *own, "--executor", "local", "--workers", "1", "--output", tmp_path / "local"]
    subprocess.run(command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "2"}, check=True)
    manifest = json.loads((tmp_path / "ray/manifest.json").read_text())
    assert manifest["hardware"]["executor"] == "ray" and manifest["models"]["target"]["address"] == "digit_nets:net"
    tars = sorted((tmp_path / "ray/shards").glob("*.tar"))
    assert len(tars) == 4
    assert all(tar.read_bytes() == (tmp_path / "local/shards" / tar.name).read_bytes() for tar in tars)
    steps = [record["guided_steps"] for tar in tars for _, _, record, _ in read_shard(tar)]
    assert sum(one > 0 for one in steps) == 2, "the method guided its own request"


def test_the_method_is_recorded(finished: Path) -> None:
    """In metadata, manifest (with the digest of its file and its parameters), card and report."""
    run = finished / "runs/doubt"
    manifest = json.loads((run / "manifest.json").read_text())
    [method] = manifest["models"]["methods"]
    assert method["address"] == "my_methods:entropy" and re.fullmatch(r"[0-9a-f]{32}", method["digest"])
    assert manifest["job"]["guidance"]["custom"]["parameters"] == {"share": 0.9}
    assert "method `my_methods:entropy`, guided by a criterion of its own" in (run / "README.md").read_text()
    assert "my_methods:entropy" in (run / "report.html").read_text()
    methods = {record["method"] for path in run.glob("shards/*.tar") for _, _, record, _ in read_shard(path)}
    assert methods == {"my_methods:entropy", "prompt"}


def test_a_run_is_bound_to_file_and_parameters(finished: Path) -> None:
    """Neither continues with others; a worker whose file is another refuses; a digest without such a method is as it
    was before there were any."""
    parameters = "guidance.custom.parameters.share=0.5"
    done = riskforge("run", "job.yaml", *SMALL, "--set", parameters, folder=finished, code=2)
    assert "requests.0.guidance.parameters.share: 0.9 -> 0.5" in done.stderr
    file, text = finished / "my_methods.py", block("python")
    try:
        file.write_text(text.replace("share * math", "0.5 * share * math"))
        done = riskforge("run", "job.yaml", *SMALL, folder=finished, code=2)
        assert re.search(r"requests\.0\.method_digest: \S+ -> \S+", done.stderr)
        factories.add_import_folders([str(finished)])
        job, plan = stored_plan(open_store(str(finished / "runs/doubt")))
        with pytest.raises(JobError, match=r"requests\.0\.method: the file of 'my_methods:entropy' on this machine is"):
            Generator(job, plan)
    finally:
        file.write_text(text)
    assert [request.keys() & {"method_digest"} for request in plan.identity["requests"]] == [{"method_digest"}, set()]
    assert "methods" not in plan.identity["models"]


@pytest.mark.slow
def test_a_deep_check_does_not_need_the_method(finished: Path) -> None:
    """It only scores: a run can be verified by whoever lacks the file."""
    file, text = finished / "my_methods.py", block("python")
    try:
        file.unlink()
        assert "no damage" in riskforge("verify", "--deep", "runs/doubt", folder=finished).stdout
    finally:
        file.write_text(text)


def job_of(method: str, home: Path, **parameters: Any) -> dict[str, Any]:
    """A small job of a method."""
    raw = yaml.safe_load(block("yaml"))
    raw["requests"] = [raw["requests"][0] | {"method": method}]
    raw["guidance"]["custom"]["parameters"] = parameters
    return raw | {"output": {"uri": str(home / "run")}, "runtime": {"device": "cpu"}}


@pytest.fixture
def importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that methods are imported from, as if for the first time."""
    sys.modules.pop("own", None)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(factories, "_FOLDERS", [])
    importlib.invalidate_caches()
    method_digest.cache_clear()
    yield tmp_path
    sys.modules.pop("own", None)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (None, "there is no module 'own'"),
        ("def methode(): pass", "has no 'method'; did you mean 'methode'"),
        ("1 / 0", r"cannot be imported: ZeroDivisionError: .*own\.py, line 1"),
        ("def method(): return len", "missing|unexpected|share"),
        ("def method(share): return 3", "gave a int; return a function, such as def criterion"),
        ("def method(share): return lambda images: images", "cannot be called so"),
        ("def method(share): raise OSError('no table')", r"failed: OSError: no table \(.*own\.py, line 1"),
        ("def method(share, name): pass", "missing a required argument: 'name'; it takes share, name"),
    ],
)
def test_a_method_that_is_none_is_explained_in_a_line(code: str | None, message: str, importable: Path) -> None:
    """When the job is checked: field, value and remedy."""
    if code is not None:
        (importable / "own.py").write_text(code)
    path = importable / "job.yaml"
    path.write_text(yaml.safe_dump(job_of("own:method", importable, share=0.9)))
    with pytest.raises(JobError) as caught:
        check_addresses(read_job(path, []))
    [line] = caught.value.problems
    assert line.startswith("requests.0.method: 'own:method'") and re.search(message, line), line


CRITERIA = {
    "shape": ("images.mean()", r"gives \[\] for 2 images; return a tensor of shape \[2\]"),
    "negative": ("-images.mean((1, 2, 3))", "a distance is finite, never negative"),
    "nan": ("images.mean((1, 2, 3)) * float('nan')", "a distance is finite"),
    "detached": ("images.detach().mean((1, 2, 3))", "cannot be differentiated"),
    "mixing": ("(images.mean((1, 2, 3)) - images.mean()).abs()", "mixes the samples of a batch"),
    "failing": ("images.nothing", r"failed: AttributeError: .*own\.py, line \d+"),
    "whole": ("scene.logits(images).logsumexp(1).clamp_min(0) + 1 - scene.conformity(images, scene.labels)", ""),
}  # fmt: skip


def test_criteria_are_tried_before_samples_are_made(importable: Path) -> None:
    """What would fail, or depend on the batch, is told by the worker while it loads; one that is well is taken."""
    lines = [f"def {name}(): return lambda images, scene: {text}" for name, (text, _) in CRITERIA.items()]
    (importable / "own.py").write_text("\n".join(lines))
    factories.add_import_folders([str(importable)])
    raw = job_of("own:whole", importable)
    jobs = {name: parse_job(raw | {"requests": [raw["requests"][0] | {"method": f"own:{name}"}]}) for name in CRITERIA}
    labels, generator = read_labels("zoo:digits/classifier"), None
    assert labels is not None
    for name, (_, message) in reversed(CRITERIA.items()):
        job = jobs[name]
        plan = build_plan(job, labels, model_digests(job) | method_digests(job))
        if generator is None:
            generator = Generator(job, plan)
            continue
        # The models are those of the first one: only the criterion is another.
        guides = RequestGuides(job, plan, generator._scorer, "cpu")
        with pytest.raises(JobError, match=message) as caught:
            guides.prepare(plan.requests[0], (3, 32, 32), unused)
        assert str(caught.value).startswith(f"requests.0.method: the criterion of 'own:{name}'")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "own:"}, "requests.0.method: 'own:' is not one of prompt, boundary, risky"),
        ({"method": "../own:method"}, "is not one of prompt, boundary, risky"),
        (
            {"guidance": {"custom": {"parameters": {"a b": 1}}}},
            "parameters.a b: 'a b' cannot be the name of an argument",
        ),
        ({"guidance": {"custom": {"parameters": {"a": float("nan")}}}}, "parameters.a: nan is not a finite number"),
        (
            {"guidance": {"custom": {"every": 99, "skip_last": True}}},
            "requests.0.guidance.custom: leaves none of 20 steps guided",
        ),
        ({"classes": None}, "requests.0.classes: missing; give class names or `all` (or `boundary: [A, B]`)"),
    ],
)
def test_the_job_is_checked_like_any_other(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Before anything of the user's is imported."""
    raw = job_of("own:method", tmp_path)
    raw["requests"][0] |= change
    with pytest.raises(JobError) as caught:
        parse_job(raw)
    assert message in str(caught.value)
