"""`study sweep` on the digits zoo: one run for all cells, and figures that are those of the stored samples."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from engine import cli
from engine.data.images import decode_rgb
from engine.errors import JobError, OutputError
from engine.methods.scores import kldb
from engine.models.classifier import Classifier
from engine.studies.samples import open_study, read_samples
from tests.conftest import REPOSITORY

JOB = {
    "name": "tiny",
    "models": {
        "diffusion": "zoo:digits/stable-diffusion",
        "clip": "zoo:digits/clip",
        "target": "zoo:digits/classifier",
        "transfer": ["zoo:digits/classifier-b"],
        "oracle": "zoo:digits/oracle",
    },
    "requests": [
        {"name": "guided", "method": "boundary", "boundary": ["three", "eight"], "count": 1},
        {"name": "risky", "method": "risky", "classes": ["three", "eight"], "count": 1},
    ],
    "sampling": {"scheduler": "ddim", "num_inference_steps": 2},
    "guidance": {"boundary": {"every": 1}, "risky": {"every": 1}},
    "output": {"uri": "runs/tiny", "samples_per_shard": 10},
}
FIELDS = ["sampling.guidance_scale=1,4", "guidance.boundary.alpha=0,1"]
OPTIONS = ["--count", "10", "--real", "digits:test-plain", "--executor", "local"]
CELLS = [
    "guided-guidance-scale-1-alpha-0", "guided-guidance-scale-1-alpha-1",
    "guided-guidance-scale-4-alpha-0", "guided-guidance-scale-4-alpha-1",
    "risky-guidance-scale-1", "risky-guidance-scale-4",
]  # fmt: skip


def call_sweep(*arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["riskforge", "study", "sweep", *map(str, arguments)])
        cli.app(sys.argv[1:], standalone_mode=False)


def write_job(folder: Path, **changes: object) -> Path:
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(JOB | changes))
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A finished sweep of six cells of ten samples."""
    folder = tmp_path_factory.mktemp("sweep")
    call_sweep(write_job(folder), *FIELDS, *OPTIONS, "--output", folder / "study")
    return folder / "study"


@pytest.fixture(scope="module")
def table(home) -> dict[str, dict]:
    rows = pq.read_table(home / "table.parquet").to_pylist()
    return {row["cell"]: row for row in rows}


def test_all_cells_are_requests_of_one_run_on_the_same_noise(home, table):
    """Seeds of cells with the same classes are equal, and no two cells have the same images."""
    assert list(table) == CELLS and {row["n"] for row in table.values()} == {10}
    run = open_study(str(home / "runs/cells"))
    stored = {cell: [(record["seed"], data) for data, record in read_samples(run, [cell])] for cell in CELLS}
    seeds = {cell: [seed for seed, _ in samples] for cell, samples in stored.items()}
    assert all(seeds[cell] == seeds[CELLS[0]] for cell in CELLS[:4])
    assert seeds[CELLS[4]] == seeds[CELLS[5]] != seeds[CELLS[0]]
    assert len({tuple(data for _, data in samples) for samples in stored.values()}) == len(CELLS)


@pytest.mark.parametrize("cell", ["guided-guidance-scale-4-alpha-0", "guided-guidance-scale-4-alpha-1"])
def test_figures_of_joint_prompts_are_those_of_the_stored_images(home, table, cell):
    """Scored here from the files; a run does not keep the KLDB of a classifier that guided nothing."""
    run = open_study(str(home / "runs/cells"))
    images = [decode_rgb(data) for data, _ in read_samples(run, [cell])]
    for prefix, address in (("", "zoo:digits/classifier"), ("transfer_", "zoo:digits/classifier-b")):
        logits = Classifier.load(address).score(images)
        measured = kldb(logits, [3, 8]).numpy()
        row = {name: table[cell][f"{prefix}kldb{end}"] for name, end in (("low", "_low"), ("high", "_high"), ("", ""))}
        quartiles = np.quantile(measured, (0.25, 0.75, 0.5))
        assert [row["low"], row["high"], row[""]] == pytest.approx(quartiles.tolist(), abs=1e-4)
        top = [set(one.topk(2).indices.tolist()) == {3, 8} for one in logits]
        assert table[cell][f"{prefix}top_in_subset"] == pytest.approx(np.mean(top))
    assert table[cell]["target_errs"] is None and table[cell]["risk"] is None


def test_each_cell_has_the_columns_that_apply_and_distances_to_real_images(table):
    risky, guided = table["risky-guidance-scale-4"], table["guided-guidance-scale-1-alpha-1"]
    assert risky["kldb"] is None and 0 <= risky["target_errs_low"] <= risky["target_errs"] <= risky["target_errs_high"]
    for row in (risky, guided):
        assert row["kid_low"] <= row["kid"] <= row["kid_high"]
        assert all(0 <= row[f"{name}_low"] <= row[name] <= row[f"{name}_high"] <= 1 for name in ("recall", "coverage"))
    # KLDB against KID of the four cells between the classes, risk against conformity of the two others.
    assert [name for name in risky if name.startswith("frontier")] == [
        "frontier", "frontier_share", "frontier_2", "frontier_share_2", "frontier_3", "frontier_share_3",
        "frontier_4", "frontier_share_4",
    ]  # fmt: skip


def test_changes_are_against_the_unguided_cell_of_the_same_value(home):
    """A step of no length is no guidance; a request that only guided cells have is compared with its first one."""
    rows = pq.read_table(home / "changes.parquet").to_pylist()
    against = {(row["request"], row["guidance_scale"], row["alpha"]): row["baseline"] for row in rows}
    assert against == {
        ("guided", 1, 1): "guided-guidance-scale-1-alpha-0",
        ("guided", 4, 1): "guided-guidance-scale-4-alpha-0",
        ("risky", 4, None): "risky-guidance-scale-1",
    }
    assert all(row["conformity_low"] <= row["conformity"] <= row["conformity_high"] for row in rows)
    effects = pq.read_table(home / "effects.parquet").to_pylist()
    assert [(row["request"], row["field"], row["pairs"]) for row in effects] == [
        ("guided", "guidance_scale", 2), ("guided", "alpha", 2), ("risky", "guidance_scale", 1),
    ]  # fmt: skip


def test_the_page_has_the_frontier_and_a_lost_file_is_made_from_what_is_kept(home, tmp_path, capsys):
    """Nothing is sampled or scored again."""
    page, figure = (home / "report.html").read_text(), (home / "figure.svg").read_text()
    assert "KLDB on the target against KID" in page and figure.startswith("<?xml") and "KID x 1,000" in figure
    copy = tmp_path / "study"
    shutil.copytree(home, copy)
    (copy / "table.csv").unlink()
    steps = {path: path.stat().st_mtime_ns for path in copy.rglob("steps/**/*.json")}
    tars = {path: path.stat().st_mtime_ns for path in copy.rglob("*.tar")}
    call_sweep(write_job(tmp_path), *FIELDS, *OPTIONS, "--output", copy)
    out = capsys.readouterr().out
    assert (copy / "table.csv").read_bytes() == (home / "table.csv").read_bytes()
    assert len(steps) == 7 and all(path.stat().st_mtime_ns == moment for path, moment in {**steps, **tars}.items())
    assert max(map(len, out.splitlines())) <= 100 or "/" in max(out.splitlines(), key=len)
    call_sweep(write_job(tmp_path), *FIELDS, *OPTIONS, "--output", copy)
    assert "complete already" in capsys.readouterr().out
    with pytest.raises(OutputError, match="differs"):
        call_sweep(write_job(tmp_path), FIELDS[0], *OPTIONS, "--output", copy)


def test_fields_of_the_command_line_take_the_place_of_those_of_a_study_file(tmp_path, capsys):
    study = {"study": "sweep", "job": JOB, "fields": {"sampling.guidance_scale": [1, 4], "twin": [False]}}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study))
    call_sweep(path, "sampling.guidance_scale=3", "--request", "guided", "--validate", "--json")
    assert json.loads(capsys.readouterr().out)["makes"] == "1 cell of 24 samples, 24 in all"
    with pytest.raises(JobError, match="fields: none are given"):
        call_sweep(write_job(tmp_path), "--validate")


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("jobs/sweep-*.yaml")), ids=lambda path: path.stem)
def test_the_studies_of_papers_are_valid_and_small(path, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("cat", "dog"):
        (tmp_path / "runs/cifar10-photographs" / name).mkdir(parents=True)
        shutil.copy(REPOSITORY / "docs/digits.png", tmp_path / "runs/cifar10-photographs" / name / "0.png")
    call_sweep(path, "--validate")
    out = capsys.readouterr().out
    assert "is valid" in out and int(out.split(",")[-1].split()[0]) <= 1200


@pytest.mark.slow
def test_a_sweep_that_is_killed_twice_goes_on_and_ends_in_the_same_table(home, tmp_path):
    """Killed while samples are made, and while their images are scored."""
    job, killed = write_job(tmp_path), tmp_path / "study"
    command = [sys.executable, "-m", "engine.cli", "study", "sweep", job, *FIELDS, *OPTIONS, "--output", killed]
    for until in ("runs/cells/shards/*.tar", "steps/scores/*.json"):
        process = subprocess.Popen(list(map(str, command)), cwd=REPOSITORY, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 400
        while not list(killed.glob(until)):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (killed / "table.csv").exists()
    call_sweep(job, *FIELDS, *OPTIONS, "--output", killed)
    for name in ("table.csv", "changes.csv", "effects.csv", "frontier.csv", "figure.svg"):
        assert (killed / name).read_bytes() == (home / name).read_bytes()


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (JOB, ["a=1", "--set", "job.seed=3"], "--set job.seed: the file is a job; give seed, without `job.`"),
        ({"study": "sweep", "job": JOB}, ["--set", "sampling.eta=0"], "--set sampling.eta: .*; give job.sampling.eta"),
        ({"study": "sweep", "job": "none.yaml", "fields": {"seed": [1]}}, [], "job: .*none.yaml: no such file"),
        (JOB | {"models": JOB["models"] | {"target": "zoo:digits/nope"}}, FIELDS[:1], "models.target: .*digits/nope"),
    ],
)
def test_what_a_study_is_made_of_is_named_where_it_is_wrong(tmp_path, content, options, message):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(JobError, match=message):
        call_sweep(path, *options, "--validate")
