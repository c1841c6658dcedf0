"""Whole runs on a GPU through the command line and real Ray actors: half precision, checkpointing, resume, bytes."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from engine.models.hardware import CPU_ROWS
from tests.conftest import REPOSITORY
from tests.gpu.conftest import IS_REHEARSAL

RISKFORGE = [sys.executable, "-c", "from engine.cli import console; console()"]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
HALF = {"precision": "fp32" if IS_REHEARSAL else "fp16"}
DEVICE = {"device": "cpu" if IS_REHEARSAL else "cuda"}
RUNTIME = DEVICE | HALF | {"gradient_checkpointing": "on", "workers": 1, "batch_size": 4}
UNCLIP = {
    "diffusion": "zoo:digits/stable-unclip",
    "conditioning": "zoo:digits/conditioning",
    "classes": ["three", "one"],
}
BOUNDARY = {"boundary": ["three", "eight"], "count": 8, "seed_group": "between"}
GUIDED = ("between", "through", "risky", "conditioned")


def write_job(folder: Path, **runtime) -> Path:
    """Boundary guidance by both presets, risk guidance with and without an embedding, and what the prompt gives."""
    job = {
        "name": "gpu",
        "models": {
            "diffusion": "zoo:digits/stable-diffusion",
            "clip": "zoo:digits/clip",
            "target": "zoo:digits/classifier",
            "oracle": "zoo:digits/oracle",
        },
        "requests": [
            {"name": "plain", "method": "prompt", **BOUNDARY},
            {"name": "between", "method": "boundary", "guidance": {"boundary": {"gradient": "detached"}}, **BOUNDARY},
            {"name": "through", "method": "boundary", **BOUNDARY},
            {"name": "risky", "method": "risky", "classes": ["three", "one"], "count": 4},
            {"name": "conditioned", "method": "risky", "count": 4, **UNCLIP},
        ],
        "sampling": {"scheduler": "ddim", "num_inference_steps": 20, "guidance_scale": 3.0},
        "guidance": {"risky": {"conformity_floor": 0.2}},
        "output": {"uri": str(folder / "run"), "samples_per_shard": 4},
        "runtime": RUNTIME | runtime,
    }
    path = folder / "job.yaml"
    path.write_text(json.dumps(job))
    return path


def riskforge(*arguments, code=0):
    """Run the command as a user does."""
    done = subprocess.run(
        [*RISKFORGE, *map(str, arguments)], cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def rows_of(output: Path):
    return pq.read_table(output / "metadata.parquet").to_pylist()


def tars(output: Path):
    return {path.name: path.read_bytes() for path in sorted(output.glob("shards/*.tar"))}


def check_run(output: Path):
    """Every sample is there, guided where it should be, with finite gradients, and guidance did what it is for."""
    rows = rows_of(output)
    assert (output / "_SUCCESS").exists() and len(rows) == 40
    assert {row["status"] for row in rows} == {"ok"}
    assert {row["batch_size"] for row in rows} == {CPU_ROWS if IS_REHEARSAL else RUNTIME["batch_size"]}
    assert all(row["nonfinite_gradients"] == 0 for row in rows)
    assert all((row["guided_steps"] > 0) == (row["request"] in GUIDED) for row in rows)
    kldb = {name: statistics.median(row["kldb"] for row in rows if row["request"] == name) for name in GUIDED}
    plain = statistics.median(row["kldb"] for row in rows if row["request"] == "plain")
    assert kldb["between"] < 0.5 * plain and kldb["through"] < 0.5 * plain, (kldb, plain)


def test_half_precision_and_checkpointing_through_ray(tmp_path):
    """fp16 with PyTorch's attention: underflowing gradients would leave samples unguided, overflowing be counted."""
    riskforge("run", write_job(tmp_path, attention="sdpa"), "--executor", "ray")
    check_run(tmp_path / "run")
    # Scores of the same images on a CPU: a GPU that rounded them to TF32 would be off by up to 3e-3.
    riskforge("verify", tmp_path / "run", "--deep")


def test_xformers_through_ray(tmp_path, gpu, xformers):
    """The same with xformers, forward and backward, in an actor's process."""
    riskforge("run", write_job(tmp_path, attention="xformers"), "--executor", "ray")
    check_run(tmp_path / "run")


def test_an_interrupted_run_is_continued(tmp_path):
    """Interrupted after the first commit, then the same command: nothing lost, nothing twice, old bytes kept."""
    path, output = write_job(tmp_path, attention="sdpa"), tmp_path / "run"
    command = [*RISKFORGE, "run", str(path), "--executor", "ray"]
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # What a shell starts in the background ignores interrupts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 300
    while not tars(output):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.wait(120)
    before = tars(output)
    assert not (output / "_SUCCESS").exists() and 0 < len(before) < 10
    riskforge("run", path, "--executor", "ray")
    check_run(output)
    after = tars(output)
    assert len(after) == 10 and {name: after[name] for name in before} == before
    keys = [row["key"] for row in rows_of(output)]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("precision", sorted({"fp32", HALF["precision"]}))
def test_deterministic_runs_have_equal_bytes(precision, tmp_path):
    """Two runs of one job with `deterministic: true` and a fixed batch size, each in processes of its own."""
    found = []
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        riskforge("run", write_job(folder, precision=precision, deterministic=True), "--executor", "ray")
        check_run(folder / "run")
        found.append(tars(folder / "run"))
    assert found[0] == found[1]
