"""A loop over the digits pipeline: on real Ray, killed and resumed, against the same loop in one process."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import PIL.Image
import pyarrow.parquet as pq
import pytest

from engine import cli
from engine.data.run.verify import verify
from engine.data.stores.opening import open_store
from tests.conftest import REPOSITORY
from tests.loop_cases import DIGITS, digits_job, write_job
from tests.strike import arm

WAIT_SECONDS = 240


def start(path: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "engine.cli", "study", "loop", str(path), *options]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"{path} was not made in time"
        time.sleep(0.02)


def measures_in(home: Path) -> list[list[dict]]:
    lanes = json.loads((home / "loop.json").read_text())["lanes"]
    return [[{**measures, "seconds": None} for measures in lane["rounds"]] for lane in lanes]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The loop in this process, without an interruption; all models kept."""
    folder = tmp_path_factory.mktemp("undisturbed")
    job = digits_job(output={"uri": str(folder / "loop")}, keep_models="all")
    path = write_job(folder / "job.yaml", job)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr("sys.argv", ["riskforge", "study", "loop", str(path), "--executor", "local"])
        cli.main()
    assert not end.value.code
    return folder / "loop"


@pytest.mark.slow
def test_a_killed_loop_on_ray_ends_with_the_figures_of_one_in_a_process(undisturbed, call, tmp_path):
    """SIGTERM hits a driver that generates, SIGKILL one on Ray whose task fine-tunes; Ray's processes are real."""
    home = tmp_path / "loop"
    path = write_job(tmp_path / "job.yaml", digits_job(output={"uri": str(home)}))
    arm(signal.SIGTERM, "os.link", f"{home}/*/generated/shards/*.tar", 1)
    code, _, stderr = call("study", "loop", path, "--executor", "local")
    assert code == 75 and "run the same command again" in stderr, stderr

    killed = start(path, "--executor", "ray", "--workers", "1")
    wait_for(home / "clean/seed-0/round-00/curated/_SUCCESS", killed)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (home / "report.html").exists()

    code, _, stderr = call("study", "loop", path, "--executor", "ray", "--workers", "1")
    assert code == 0, stderr
    assert measures_in(home) == measures_in(undisturbed)
    for part in (
        "round-01/curated/curation/selection.parquet",
        "round-01/model/unet/diffusion_pytorch_model.safetensors",
    ):
        own, other = (base / "clean/seed-0" / part for base in (home, undisturbed))
        assert own.read_bytes() == other.read_bytes(), part
    # Of the models only the last one is kept.
    assert not (home / "clean/seed-0/round-00/model").exists()
    assert (undisturbed / "clean/seed-0/round-00/model").is_dir()


@pytest.mark.slow
def test_rounds_are_runs_that_name_where_they_come_from(undisturbed):
    rounds = undisturbed / "clean" / "seed-0"
    [measures] = measures_in(undisturbed)
    assert [record["round"] for record in measures] == [0, 1, 2]
    assert [record["trained"] for record in measures] == [True, True, False]
    for number in (0, 1):
        generated, curated = rounds / f"round-{number:02d}" / "generated", rounds / f"round-{number:02d}" / "curated"
        for run in (generated, curated):
            assert not verify(open_store(str(run))).findings
        curation = json.loads((curated / "manifest.json").read_text())["curation"]
        assert curation["parent"]["uri"] == "../generated"
        training = json.loads((rounds / f"round-{number:02d}" / "model" / "training.json").read_text())
        assert training["parent_run"]["uri"] == "../curated"
        assert (
            training["parent_run"]["plan_digest"] == json.loads((curated / "manifest.json").read_text())["plan_digest"]
        )
        following = json.loads((rounds / f"round-{number + 1:02d}" / "generated" / "manifest.json").read_text())
        [model] = following["models"]["diffusion"]
        assert model["trained_on"]["parent_run"]["plan_digest"] == training["parent_run"]["plan_digest"]
    page = (undisturbed / "report.html").read_text()
    assert page.count('src="data:image/') == 2 * 6


@pytest.mark.slow
def test_a_damaged_model_is_named_and_made_again_with_the_rounds_that_it_needs(undisturbed, call, tmp_path):
    """As `keep_models: last` leaves it: the model before the damaged one is gone as well."""
    home = tmp_path / "loop"
    shutil.copytree(undisturbed, home)
    rounds = home / "clean" / "seed-0"
    shutil.rmtree(rounds / "round-02")
    shutil.rmtree(rounds / "round-00" / "model")
    weights = rounds / "round-01" / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:9000])
    path = write_job(tmp_path / "job.yaml", digits_job(output={"uri": str(home)}))
    code, _, stderr = call("study", "loop", path, "--executor", "local")
    assert code == 2 and f"remove {rounds / 'round-01' / 'model'} where it is damaged" in stderr, stderr
    # The next run was planned by it.
    shutil.rmtree(rounds / "round-01" / "model")
    shutil.rmtree(rounds / "round-02" / "generated")
    code, _, stderr = call("study", "loop", path, "--executor", "local")
    assert code == 0 and "made again from round 0 on" in stderr, stderr
    assert measures_in(home) == measures_in(undisturbed)
    assert weights.read_bytes() == data


def choices_in(run: Path, step: int) -> list[dict]:
    """Records of every `step`-th pair of a run's samples, by raters who prefer the lower class."""
    rows = pq.read_table(run / "metadata.parquet").select(["key", "class_index"]).to_pylist()
    pairs = [(a, b) for a, b in itertools.combinations(rows, 2) if a["class_index"] != b["class_index"]]
    return [
        {"first": a["key"], "second": b["key"], "choice": int(b["class_index"] < a["class_index"]), "rater": "a"}
        | {"time": 1, "group": "all"}
        for a, b in pairs[::step]
    ]


@pytest.mark.slow
def test_records_of_people_add_up_and_each_round_waits_for_its_own(call, tmp_path):
    """Every lane generates before the loop stops for people, and the same command goes on when they have chosen."""
    home, records, trusted = tmp_path / "loop", tmp_path / "records.jsonl", tmp_path / "trusted.jsonl"
    line = {"first": "other-000-mix-00000000", "second": "other-000-mix-00000001", "choice": 0, "rater": "a", "time": 1}
    for path in (records, trusted):
        path.write_text(json.dumps(line) + "\n")
    curation = {"candidates": 4, "preferences": str(records), "trusted": str(trusted)}
    for number, name in enumerate(DIGITS):
        (tmp_path / "real" / name).mkdir(parents=True)
        PIL.Image.new("RGB", (64, 64), (25 * number, 90, 200)).save(tmp_path / "real" / name / "image.png")
    training = {"steps": 3, "batch_size": 6, "real": str(tmp_path / "real"), "curated_weight": 2.0}
    arms = {"clean": {}, "defended": {"defence": "group"}}
    changes = {"rounds": 2, "curation": curation, "monitor": {"level": 0.05}, "training": training, "arms": arms}
    path = write_job(tmp_path / "job.yaml", digits_job(output={"uri": str(home)}, **changes))
    lanes = [home / arm / "seed-0" for arm in arms]

    def command() -> tuple[int, str]:
        code, _, stderr = call("study", "loop", path, "--executor", "local")
        return code, stderr

    def add(number: int, step: int = 1) -> None:
        for lane in lanes:
            chosen = choices_in(lane / f"round-{number:02d}" / "generated", step)
            for file, part in ((records, chosen), (trusted, chosen[::10])):
                file.write_text(file.read_text() + "".join(json.dumps(record) + "\n" for record in part))

    for number in (0, 1):
        code, stderr = command()
        assert code == 2 and "curation.preferences: " in stderr, stderr
        for lane in lanes:
            run = lane / f"round-{number:02d}"
            assert f"  {run / 'generated'}" in stderr
            assert (run / "generated" / "_SUCCESS").exists() and not (run / "curated").exists()
        add(number)
    code, stderr = command()
    assert code == 0, stderr
    [first, second, last] = measures_in(home)[0]
    # Two curated samples for each real one.
    drawn = json.loads((lanes[0] / "round-01" / "model" / "training.json").read_text())["drawn"]
    assert drawn == {"curated": 12, "real": 6} and first["kid"]["value"] > 0
    assert first["trained"] and first["selected"] == 6 and first["correlation"] > 0.5
    chosen = [choices_in(lanes[0] / f"round-0{number}" / "generated", 1) for number in (0, 1)]
    audited = [len(part[::10]) for part in chosen]
    assert first["monitor"]["audited"] == audited[0] and first["monitor"]["differing"] == 0
    assert second["monitor"]["audited"] == sum(audited) and last["monitor"] is None
    rewards = [
        json.loads((lanes[0] / f"round-0{number}/curated/manifest.json").read_text())["curation"]["reward"]
        for number in (0, 1)
    ]
    assert rewards[0]["kind"] == "preferences"
    assert rewards[1]["num_records"] - rewards[0]["num_records"] > 0.6 * (len(chosen[1]) - audited[1])
    # No alarm, no removal; a round that was not finished takes in what was added since.
    assert not list(home.rglob("suspects.jsonl"))
    (lanes[0] / "round-01" / "round.json").unlink()
    add(1, step=7)
    code, stderr = command()
    assert code == 0, stderr
    again = json.loads((lanes[0] / "round-01/curated/manifest.json").read_text())["curation"]["reward"]
    assert again["digest"] != rewards[1]["digest"]
