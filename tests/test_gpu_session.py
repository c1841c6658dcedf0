"""The GPU session without a GPU: it goes on, ends in time, packs what it found, and its steps run at a tiny size."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import bench_sampling
import gpu_session
import pytest
from bench.arms import arms_of
from bench.sizes import random_setting
from gpu_session import LIMIT_SECONDS, NO_TIME, Step, pack, parse, run_steps, session_steps
from gpu_steps import common, compiling, counterfactuals, decoder, runs, sharing, versions
from gpu_steps.common import parser

from engine.job.parsing import parse_job
from tests.conftest import REPOSITORY

PROGRAMS = {
    "versions": versions, "decoder": decoder, "run": runs, "sharing": sharing, "compile": compiling,
    "counterfactuals": counterfactuals,
}  # fmt: skip
FIRST_TEN_MINUTES = ("versions", "decoder", "precision", "run", "benchmark", "sharing")
BENCHMARKS = ("benchmark", "goals", "digits", "sd21-unclip")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folder of the tiny models, drawn once."""
    folder = tmp_path_factory.mktemp("models")
    random_setting("tiny", folder, "cpu")
    return folder


def python(code):
    return (sys.executable, "-c", code)


def steps_of(*arguments):
    return {step.name: step for step in session_steps(sys.executable, parse(list(map(str, arguments))))}


def test_a_session_goes_on_after_failures_and_is_resumed(tmp_path, capsys):
    """A failing step, one that hangs with a child of its own, one that works: only what is not done runs again."""
    child = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(3600)'])"
    # What these two have found by the time they end; the one of them while it wrote.
    (tmp_path / "slow.json").write_text('{"cosine": 0.5}')
    (tmp_path / "broken.json").write_text('{"cosine": ')
    steps = [
        Step(name="broken", command=python("print('seen'); raise SystemExit(3)"), limit_seconds=300),
        Step(name="slow", command=python(f"{child}; time.sleep(3600)"), limit_seconds=1),
        Step(name="fine", command=python("import engine, gpu_steps, os; print(engine.__file__)"), limit_seconds=300),
    ]
    started = time.monotonic()
    states = [one.state for one in run_steps(steps, tmp_path)]
    assert states == ["failed (exit code 3)", "ran out of time", "done"] and time.monotonic() - started < 1800
    assert "seen" in (tmp_path / "broken.log").read_text()
    said = capsys.readouterr().err
    assert f"; its log: {tmp_path / 'broken.log'}\n" in said and "fine.log" not in said
    assert str(REPOSITORY) in (tmp_path / "fine.log").read_text()
    found = {one["name"]: one["figures"] for one in json.loads((tmp_path / "summary.json").read_text())}
    assert found == {"broken": {"unreadable": "Expecting value"}, "slow": {"cosine": 0.5}, "fine": {}}
    steps[0] = Step(name="broken", command=python("pass"), limit_seconds=300)
    again = run_steps([steps[0], steps[2]], tmp_path)
    assert [one.state for one in again] == ["done", "done before"] and all(one.is_good for one in again)
    assert [one["name"] for one in json.loads((tmp_path / "summary.json").read_text())] == ["broken", "fine"]


def test_a_budget_ends_the_session_and_not_the_results(tmp_path, monkeypatch):
    """A step gets what is left of it; what would get next to nothing is not started, and does not count as done."""
    monkeypatch.setattr(gpu_session, "KILL_SECONDS", 1.0)
    monkeypatch.setattr(gpu_session, "LEAST_SECONDS", 1.0)
    steps = [
        Step(name="long", command=python("import time; time.sleep(3600)"), limit_seconds=3600),
        Step(name="late", command=python("pass"), limit_seconds=300),
    ]
    started = time.monotonic()
    outcomes = run_steps(steps, tmp_path, budget_seconds=3)
    assert [one.state for one in outcomes] == ["ran out of time", NO_TIME] and not outcomes[1].is_good
    assert time.monotonic() - started < 300
    assert not (tmp_path / "late.log").exists() and not (tmp_path / "late.done").exists()


def test_the_first_ten_minutes_are_ten_minutes():
    """In this order, and a step at its limit leaves the next its own time."""
    assert tuple(LIMIT_SECONDS)[: len(FIRST_TEN_MINUTES)] == FIRST_TEN_MINUTES
    assert sum(LIMIT_SECONDS[name] for name in FIRST_TEN_MINUTES) <= 570
    assert "cifar10" not in steps_of()
    with_data = steps_of("--cifar10-data", "data", "--first", "cifar10")
    assert list(with_data) == ["cifar10", *[name for name in LIMIT_SECONDS if name != "cifar10"]]
    assert list(steps_of("--only", "sharing", "decoder")) == ["decoder", "sharing"]


def test_what_is_listed_can_be_run_by_hand(capsys):
    """In the environment that is listed with it, which alone makes a step's module known."""
    assert gpu_session.main(["--list", "--only", "versions"]) == 0
    environment, command = map(shlex.split, capsys.readouterr().out.splitlines())
    [module] = [word for word in command if word.startswith("gpu_steps.")]
    seek = python(f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)")
    given = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    listed = given | dict(word.split("=", 1) for word in environment[1:])
    codes = [subprocess.run(seek, env=each, capture_output=True, check=False).returncode for each in (listed, given)]
    assert codes == [0, 1]


@pytest.mark.parametrize("arguments", [["--limit", "sd1=100"], ["--only", "sd1"], ["--only", "cifar10"]])
def test_steps_that_do_not_exist_are_refused(arguments, capsys):
    """Before the GPU has cost anything; data that training lacks, too."""
    with pytest.raises(SystemExit):
        parse(arguments)
    assert "sd1" in (said := capsys.readouterr().err) or "--cifar10-data" in said


@pytest.mark.parametrize("size", ["sd1", "tiny"])
def test_a_session_asks_the_tools_for_what_they_have(size, models, tmp_path):
    """Options or arms that a tool does not know would cost a GPU its time: the real tools parse their command lines."""
    steps = steps_of("--output", tmp_path, "--limit", "goals=100", "--size", size, "--cifar10-data", tmp_path)
    assert tuple(steps) == tuple(LIMIT_SECONDS)
    for name in PROGRAMS:
        module = steps[name].command[2].removeprefix("gpu_steps.")
        assert PROGRAMS[name].__name__.endswith(module)
        options = parser(None).parse_args(steps[name].command[3:])
        assert options.size == size and options.output == tmp_path / f"{name}.json"
    arms = {arm.name for arm in arms_of(random_setting("tiny", models, "cpu"))}
    for name in BENCHMARKS:
        options = bench_sampling.parse(steps[name].command[2:])
        assert options.num_samples == options.batch_size and options.name == name and options.output == tmp_path
        assert all(arm in arms or "*" in arm for arm in (*options.only, *options.profile))
    assert steps["goals"].limit_seconds == 100 and "70" in steps["goals"].command
    for name in ("precision", "tests"):
        paths = [one for one in steps[name].command if "tests/gpu" in one]
        assert paths and all((REPOSITORY / one.removeprefix("--ignore=")).exists() for one in paths)
    script = Path(steps["cifar10"].command[1]).read_text()
    assert all(f'"{one}"' in script for one in steps["cifar10"].command if one.startswith("--"))


def test_results_are_packed_in_parts_and_count_elsewhere(tmp_path, monkeypatch):
    """Parts of the allowed size, joined they are the results; models never, checkpoints only where there is room."""
    output, other = tmp_path / "out", tmp_path / "other"
    for name, num_bytes in {
        "summary.json": 10,
        "cifar10/model": 3000,
        "cifar10-build/x": 4000,
        "models/x": 9**6,
        "runs/a/b": 9**6,
    }.items():
        path = output / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(num_bytes))
    step = Step(name="fine", command=python("pass"), limit_seconds=300)
    run_steps([step], output)

    def unpacked(part_bytes):
        monkeypatch.setattr(gpu_session, "PART_BYTES", part_bytes)
        paths = pack(output, tmp_path / "packed" / f"{part_bytes}.tar.gz")
        assert all(path.stat().st_size <= part_bytes for path in paths)
        folder = other / str(part_bytes)
        folder.mkdir(parents=True)
        joined = b"".join(path.read_bytes() for path in paths)
        subprocess.run(["tar", "-xz", "-C", folder], input=joined, check=True)
        assert (folder / "cifar10/model").read_bytes() == (output / "cifar10/model").read_bytes()
        assert not (folder / "models").exists() and not (folder / "runs").exists()
        assert [one.state for one in run_steps([step], folder)] == ["done before"]
        return len(paths) > 1, (folder / "cifar10-build").exists()

    # Of random bytes nothing is saved: 7000 of them, and 3000 without the checkpoints.
    assert unpacked(2**20) == (False, True)
    assert unpacked(3000) == (True, True)
    assert unpacked(1500) == (True, False)
    monkeypatch.setattr(gpu_session, "PART_BYTES", 100)
    with pytest.raises(ValueError, match="results take"):
        pack(output, tmp_path / "packed" / "none.tar.gz")
    assert not list(tmp_path.glob("packed/none*"))


def run_program(name, models, output, *more):
    """A step's program at tiny size on a CPU; its exit code and figures."""
    path = output / f"{name}.json"
    command = ["--device", "cpu", "--size", "tiny", "--models", str(models), "--output", str(path), *more]
    return PROGRAMS[name].main(command), json.loads(path.read_text())


def test_versions_are_there(models, tmp_path):
    """And which kernels run, by head size and precision: those of a CPU are known."""
    code, found = run_program("versions", models, tmp_path)
    assert code == 0 and found["versions"]["torch"] and "sdpa" in found["auto"]
    assert found["sdpa"]["512 float32"] == ["flash_attention", "math"] and found["teraflops"]["float32"] > 0
    assert found["decoder_attention"]["bfloat16"]["seconds"] > 0
    assert PROGRAMS["versions"].main(["--models", str(models), "--output", str(tmp_path / "none.json")]) == 1


def test_the_decoders_gradient_is_measured(models, tmp_path, monkeypatch):
    """Finite for every sample; what fails at one size is noted in its words, and the others are measured."""
    whole = decoder.WholeDecoder.gradient

    def gradient(self, rows):
        if rows == 4:
            raise RuntimeError("upsample_nearest_nhwc only supports grad_output with fewer than INT_MAX elements\nmore")
        return whole(self, rows)

    monkeypatch.setattr(decoder.WholeDecoder, "gradient", gradient)
    code, found = run_program("decoder", models, tmp_path)
    assert code == 0
    gradients = {dtype: [found[f"engine {dtype} {rows}"] for rows in (2, 4)] for dtype in ("float32", "bfloat16")}
    assert all([one["finite_samples"] for one in some] == [2, 4] for some in gradients.values())
    assert gradients["float32"][0]["median_cosine"] == pytest.approx(1, abs=1e-4)
    assert 0.9 < gradients["bfloat16"][0]["median_cosine"] < 1
    for layout in ("channels_last", "contiguous_format"):
        assert found[f"all rows at once, {layout} 2"]["finite_samples"] == 2
        assert found[f"all rows at once, {layout} 4"].startswith("RuntimeError: upsample_nearest_nhwc")


def test_commands_are_run_and_their_ends_reported():
    """Of the engine, in processes of their own."""
    version, unknown = common.riskforge("--version"), common.riskforge("no-command")
    assert version["exit_code"] == 0 and version["output"][0].startswith("riskforge ")
    assert unknown["exit_code"] == 2 and "no-command" in " ".join(unknown["output"])


@pytest.mark.slow
def test_runs_are_made_and_verified(models, tmp_path, call, monkeypatch):
    """The digits by every guidance, verified deeply; what is damaged, or not `ok`, fails the step."""

    def riskforge(*arguments):
        """In this process, which has imported everything."""
        code, output, errors = call(*arguments)
        return {"exit_code": code, "output": (output + errors).splitlines()}

    monkeypatch.setattr(runs, "riskforge", riskforge)
    code, found = run_program("run", models, tmp_path, "--executor", "local")
    assert code == 0 and found["summary"]["statuses"] == {"ok": 20} and found["verified"]["exit_code"] == 0
    assert set(found["summary"]["batch_sizes"]) and not found["summary"]["nonfinite_gradients"]


def test_every_worker_has_a_shard_of_what_auto_is_tried_on(models, tmp_path):
    """Of each request as many shards as workers; the shard holds the batches that find the size, and one of it."""
    setting = random_setting("tiny", models, "cpu")
    for workers in (1, 2):
        raw = sharing.auto_job(setting, tmp_path, sharing.SHARDS["sd1"], {"device": "cpu", "workers": workers})
        job = parse_job(raw)
        counts = [request.count * len(request.classes or ["pair"]) for request in job.requests]
        assert counts == [workers * job.output.samples_per_shard] * 3 and job.runtime.batch_size == "auto"
    assert job.output.samples_per_shard == 8 + 8 + 16 + 16 + 64


def test_compilations_beyond_two_shapes_are_faults():
    """Two shapes are what guidance through the UNet needs; a third, a failure or none at all are reported."""
    once, again = ({"failed_because": None, "again_because": reason} for reason in (None, "expected 32, actual 16"))
    assert compiling.faults([once, again]) == []
    assert "3 compilations: expected 32, actual 16; expected" in compiling.faults([once, again, again])[0]
    assert "nothing was compiled" in compiling.faults([])[0]
    assert "no compiler" in compiling.faults([once, again | {"failed_because": "no compiler"}])[0]
