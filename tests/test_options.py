"""Options of the command line reach what they are for; what programs give back becomes exit codes."""

from __future__ import annotations

import errno
import importlib
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from engine import cli
from engine.commands.arguments import load_job, make_executor
from engine.commands.jobfile import let_import
from engine.data.reading.people.review import NO_PEOPLE
from engine.data.run.verify import Finding, Verdict
from engine.driver.run_summary import RunSummary
from engine.errors import EXIT_DAMAGED, EXIT_INCOMPLETE, EXIT_OK, EXIT_USER, JobError, StoreLostError
from engine.job.resources import ResourcesSpec
from engine.studies.curate.selection import SelectionOptions
from tests.sleepy import make_job


class Reached(Exception):
    """Ends a command where it calls its program."""


@pytest.fixture
def reach(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a command line up to a call; gives what was passed, by name, the fields of options among it."""

    def run(place: str, *arguments: Any) -> dict[str, Any]:
        passed: dict[str, Any] = {}

        def program(*positional: Any, **named: Any) -> None:
            passed.update({str(number): value for number, value in enumerate(positional)} | named)
            for value in positional:
                fields = getattr(type(value), "__dataclass_fields__", {})
                passed.update({name: getattr(value, name) for name in fields})
            raise Reached

        monkeypatch.setattr(place, program)
        monkeypatch.setattr(sys, "argv", ["riskforge", *map(str, arguments)])
        with pytest.raises(Reached):
            cli.main()
        return passed

    before = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A job file of ten samples."""
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(make_job(tmp_path / "out", 1).model_dump(mode="json", exclude_unset=True)))
    return path


RETRAIN = {
    "real": "r", "test": "t", "plain": ("a", "b"), "risky": ("c",), "num_seeds": 3, "num_steps": 7, "mix": 0.4,
    "labels": "soft", "batch_size": 9, "learning_rate": 0.01, "calibrate": "k",
    "held_out": 0.3, "folder": "f", "0": "run",
}  # fmt: skip
EVALUATE = {
    "real": "r", "train": "t", "reference": "q", "clip": "c", "features": "clip", "inception": "i", "failures": "all",
    "limit": 5, "folder": "f", "0": "run",
}  # fmt: skip
EXPORT = {
    "output": "f", "samples_per_shard": 3, "seed": 4, "name": "n", "deduplicate": 0.9, "clip": "c", "real": "d",
    "real_ratio": 0.0, "real_classes": "all", "license": "MIT", "authors": ("e", "g"),
    "with_rejected": True, "with_surplus": False, "allow_different_targets": True,
}  # fmt: skip
MERGE = EXPORT | {"condition": "", "format": "webdataset", "0": ("a", "b")}
RESCORE = {"0": "run", "1": "t", "transfer": ["a", "b"], "oracles": ["o"], "output": "f"}
CURATE = {
    "0": "run", "2": "f", "preferences": "p", "reward": "r", "model": "network", "trusted": "t", "after": "a",
    "on_alarm": "continue", "defence": "group",
    "selection": SelectionOptions(num_candidates=5, among="class", seed=7, scale=0.5),
}  # fmt: skip
EXPORTED = ("a", "b", "--output", "f", "--samples-per-shard", 3, "--seed", 4, "--name", "n", "--deduplicate", 0.9)
MIXED = ("--clip", "c", "--mix-real", "d", "--real-ratio", 0, "--real-classes", "all", "--with-rejected")
NAMED = ("--license", "MIT", "--author", "e", "--author", "g", "--allow-different-targets")


@pytest.mark.parametrize(
    ("place", "arguments", "expected"),
    [
        (
            "engine.studies.retrain.program.retrain",
            ("retrain", "run", "--real", "r", "--test", "t", "--plain", "a", "--plain", "b", "--risky", "c", "--seeds",
             3, "--steps", 7, "--mix", 0.4, "--labels", "soft", "--batch-size", 9, "--learning-rate", 0.01,
             "--calibrate", "k", "--held-out", 0.3, "--output", "f"),
            RETRAIN,
        ),
        (
            "engine.studies.evaluate.program.evaluate",
            ("evaluate", "run", "--real", "r", "--train", "t", "--reference", "q", "--clip", "c", "--features", "clip",
             "--inception", "i", "--failures", "all", "--limit", 5, "--output", "f"),
            EVALUATE,
        ),
        ("engine.data.reading.export.export", ("merge", *EXPORTED, *MIXED, *NAMED), MERGE),
        (
            "engine.data.reading.export.export",
            ("export", *EXPORTED, *MIXED, *NAMED, "--filter", "risk > 1", "--format", "imagefolder",
             "--folders", "name"),
            EXPORT | {"condition": "risk > 1", "format": "imagefolder", "folders": "name"},
        ),
        (
            "engine.studies.rescore.program.rescore_run",
            ("rescore", "run", "--target", "t", "--transfer", "a", "--transfer", "b", "--oracle", "o", "--output", "f"),
            RESCORE,
        ),
        (
            "engine.studies.curate.curation.curate",
            ("curate", "run", "--preferences", "p", "--reward", "r", "--model", "network", "--trusted", "t", "--after",
             "a", "--on-alarm", "continue", "--defence", "group", "--candidates", 5, "--among", "class", "--scale", 0.5,
             "--seed", 7, "--output", "f"),
            CURATE,
        ),
    ],
    ids=["retrain", "evaluate", "merge", "export", "rescore", "curate"],
)  # fmt: skip
def test_every_option_reaches_its_program(
    reach: Any, monkeypatch: pytest.MonkeyPatch, place: str, arguments: tuple[Any, ...], expected: dict[str, Any]
) -> None:
    """No two options have the same value, so none can take the place of another."""
    models = SimpleNamespace(targets=("zoo:t",), transfer=(), all_oracles=())
    study = SimpleNamespace(job=SimpleNamespace(models=models, requests=()))
    # Before the patch: a module that is imported first while it holds would keep it for other tests.
    importlib.import_module(place.rpartition(".")[0])
    monkeypatch.setattr("engine.studies.samples.open_study", lambda run: study)
    passed = reach(place, *arguments)
    assert {name: passed[name] for name in expected} == expected


def test_the_options_of_a_run_reach_the_driver(reach: Any, job: Path, tmp_path: Path) -> None:
    place = "engine.driver.run.run_job"
    plain = reach(place, "run", job, "--executor", "local")
    assert (plain["resume"], plain["confirmed"], plain["retry"]) == ("auto", False, False)
    assert plain["limits"].deadline is None and plain["limits"].grace_seconds == 60.0
    options = ("--output", tmp_path / "other", "--workers", 3, "--resume", "never", "--yes", "--grace", "5s")
    chosen = reach(place, "run", job, "--executor", "local", *options)
    assert (chosen["resume"], chosen["confirmed"], chosen["limits"].grace_seconds) == ("never", True, 5.0)
    assert chosen["0"].output.uri == str(tmp_path / "other") and chosen["0"].runtime.workers == 3
    assert chosen["executor"].open(lambda: None, 99) == 3


def test_options_of_their_own_override_settings(job: Path, tmp_path: Path) -> None:
    """A number of workers that is none is refused, not left out."""
    spec = load_job(job, ["output.uri=set", "runtime.workers=2"], output=str(tmp_path), workers=4)
    assert (spec.output.uri, spec.runtime.workers) == (str(tmp_path), 4)
    with pytest.raises(JobError, match="workers"):
        load_job(job, None, workers=0)


def test_a_cluster_may_have_hardware_that_this_machine_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The device of the job is asked for, and this machine is checked where the cluster is its own."""
    checked: list[bool] = []
    monkeypatch.setattr("engine.driver.checks.check_hardware", lambda job, is_local: checked.append(is_local))
    spec = make_job(tmp_path, 1)
    spec = spec.model_copy(update={"runtime": spec.runtime.model_copy(update={"device": "cuda", "workers": 6})})
    for address in (None, "host:1"):
        executor: Any = make_executor("ray", spec, address)
        assert (executor._address, executor._num_workers, executor._device) == (address, 6, "cuda")
    make_executor("local", spec, None)
    assert checked == [True, False, True]


def test_only_ray_places_workers(tmp_path: Path) -> None:
    """What a worker takes is passed on; a pass without batches measures no memory; threads are refused by name."""
    spec = make_job(tmp_path, 1)
    asked = ResourcesSpec(num_gpus="auto", custom={"slot": 1})
    spec = spec.model_copy(update={"runtime": spec.runtime.model_copy(update={"resources": asked})})
    executor: Any = make_executor("ray", spec, "host:1")
    assert executor._asked == asked
    executor = make_executor("ray", spec, "host:1", measures=False)
    assert executor._asked == ResourcesSpec(custom={"slot": 1})
    with pytest.raises(JobError, match=r"^runtime\.resources: --executor local does not place workers; leave it"):
        make_executor("local", spec, None)


@pytest.mark.parametrize(
    ("options", "components", "has_executor", "only_large"),
    [
        ((), 1, True, True),
        (("--components", 4, "--executor", "local"), 4, False, False),
        (("--executor", "ray"), 1, True, False),
        (("--workers", 2), 1, True, False),
        (("--address", "host:1"), 1, True, False),
    ],
)
def test_prepare_divides_the_images_where_it_is_told_to(
    reach: Any, job: Path, options: tuple[Any, ...], components: int, has_executor: bool, only_large: bool
) -> None:
    passed = reach(
        "engine.studies.prepare.program.prepare_conditioning", "prepare", job, "--data", "d", "--output", "f", *options
    )
    assert (passed["1"], passed["folder"], passed["components"]) == ("d", "f", components)
    assert ((passed["executor"] is not None), passed["only_large"]) == (has_executor, only_large)


@pytest.mark.parametrize(("drained", "is_named"), [("", True), ("deadline", True), ("SIGTERM", False)])
def test_a_report_is_named_unless_a_signal_ended_the_run(
    monkeypatch: pytest.MonkeyPatch, call: Any, job: Path, drained: str, is_named: bool
) -> None:
    """After a signal nobody waits for it; at a deadline it is what was made in time."""
    summary = RunSummary(
        exit_code=9, uri="u", report="r.html", num_shards=2, num_committed=1, num_samples=4, num_failed=0, seconds=1.0,
        drained=drained,
    )  # fmt: skip
    monkeypatch.setattr("engine.driver.run.run_job", lambda *_, **__: summary)
    code, out, _ = call("run", job, "--executor", "local")
    assert code == 9 and ("report: r.html" in out) == is_named


@pytest.mark.parametrize("options", [(), ("--validate",)])
@pytest.mark.parametrize("price", [0, 2])
def test_a_price_needs_measured_hours(call: Any, job: Path, price: int, options: tuple[str, ...]) -> None:
    code, _, err = call("plan", job, "--price-per-hour", price, *options)
    assert code == EXIT_USER and "--price-per-hour: requires measured hours; add --calibrate" in err


def comparison(monkeypatch: pytest.MonkeyPatch, crossed: tuple[str, ...] = ()) -> dict[str, Any]:
    """Replaces the comparison of runs; gives what it was asked for."""
    asked: dict[str, Any] = {}

    def compare_runs(old: Any, new: Any, **options: Any) -> Any:
        asked.update(options, old=old, new=new)
        plain = SimpleNamespace(curation=None, people=NO_PEOPLE)
        return SimpleNamespace(new_failures=(), fixed=(), notes=(), old=plain, new=plain)

    def crossed_limits(comparison: Any, limits: Any) -> list[Any]:
        asked.update(increases=limits.increases, fail_on=limits.fail_on)
        return [SimpleNamespace(text=text) for text in crossed]

    monkeypatch.setattr("engine.studies.compare.baseline.open_pair", lambda runs, baseline: (runs[0], runs[1]))
    monkeypatch.setattr("engine.studies.compare.scored_run.unfinished", lambda runs: [])
    monkeypatch.setattr("engine.studies.compare.program.compare_runs", compare_runs)
    monkeypatch.setattr("engine.studies.compare.limits.crossed_limits", crossed_limits)
    monkeypatch.setattr("engine.studies.compare.tables.comparison_tables", lambda comparison: [])
    monkeypatch.setattr("engine.studies.compare.tables.comparison_title", lambda comparison: "title")
    monkeypatch.setattr("engine.studies.compare.tables.failure_lists", lambda comparison: [])
    monkeypatch.setattr("engine.studies.compare.tables.comparison_document", lambda *_: {})
    return asked


def test_the_options_of_a_comparison_reach_it(monkeypatch: pytest.MonkeyPatch, call: Any) -> None:
    """Limits are of requests: that level is compared wherever there is one."""
    asked = comparison(monkeypatch)
    limits = ("--max-error-increase", 0.1, "--max-valid-failure-increase", 0.2, "--max-risk-increase", 0.3)
    options = ("--fail-on", "any-significant", "--confidence", 0.9, "--by", "class")
    assert call("compare", "a", "b", *limits, *options)[0] == EXIT_OK
    assert asked["increases"] == {"error_rate": 0.1, "valid_failures": 0.2, "risk": 0.3}
    assert (asked["old"], asked["new"], asked["confidence"], asked["fail_on"]) == ("a", "b", 0.9, "any-significant")
    assert set(asked["levels"]) == {"request", "class"}
    call("compare", "a", "b", "--by", "class")
    assert asked["levels"] == ["class"] and asked["increases"] == {} and asked["confidence"] == 0.95


def test_a_comparison_ends_with_one_where_a_limit_is_crossed(monkeypatch: pytest.MonkeyPatch, call: Any) -> None:
    comparison(monkeypatch, ("request a: errors",))
    code, _, err = call("compare", "a", "b")
    assert code == EXIT_DAMAGED and "limit exceeded: request a: errors" in err


@pytest.mark.parametrize(
    ("is_complete", "num_failed", "code"), [(True, 0, 0), (True, 1, EXIT_INCOMPLETE), (False, 0, EXIT_INCOMPLETE)]
)
def test_a_rescoring_that_lacks_something_says_so(
    monkeypatch: pytest.MonkeyPatch, call: Any, is_complete: bool, num_failed: int, code: int
) -> None:
    done = SimpleNamespace(
        folder="f", target="t", temperature="", num_scored=1, num_images=1, num_rows=1, num_accepted=1,
        num_failed=num_failed, failure="x", is_complete=is_complete, comparison=None, reason="y",
    )  # fmt: skip
    monkeypatch.setattr("engine.studies.rescore.program.rescore_run", lambda *_, **__: done)
    assert call("rescore", "run", "--target", "t")[0] == code


DAMAGE = Finding(kind="damage", text="torn")
UNFINISHED = Finding(kind="unfinished", text="later")


@pytest.mark.parametrize(
    ("stored", "scored", "code", "is_scored"),
    [
        ((), (), EXIT_OK, True),
        ((UNFINISHED,), (DAMAGE,), EXIT_DAMAGED, True),
        ((DAMAGE,), (), EXIT_DAMAGED, False),
    ],
)
def test_deep_verification_scores_again_where_nothing_is_damaged(
    monkeypatch: pytest.MonkeyPatch, call: Any, stored: Any, scored: Any, code: int, is_scored: bool
) -> None:
    """Findings of both are listed."""
    verdict = Verdict(findings=stored, num_shards=1, num_committed=1, num_samples=1)
    models = SimpleNamespace(targets=("zoo:t",), transfer=(), all_oracles=())
    calls: list[str] = []
    monkeypatch.setattr("engine.data.run.verify.verify", lambda *_: verdict)
    spec = SimpleNamespace(models=models, requests=())
    # First: its module, if it is imported here, is not to keep the other patch for other tests.
    monkeypatch.setattr("engine.generation.rescorer.rescore", lambda *_, **__: calls.append("") or list(scored))
    monkeypatch.setattr("engine.data.run.stored_plan.stored_plan", lambda store: (spec, None))
    ended, out, _ = call("verify", "run", "--deep")
    assert ended == code and bool(calls) == is_scored
    assert [line for line in out.splitlines() if ": " in line][:-1] == [
        f"{finding.kind}: {finding.text}" for finding in (*stored, *scored)
    ]


@pytest.mark.parametrize(("is_watched", "expected"), [(True, 3), (False, 1)])
def test_a_status_is_repeated_until_the_run_ends(
    monkeypatch: pytest.MonkeyPatch, call: Any, is_watched: bool, expected: int
) -> None:
    states = iter(["running", "running", "stopped", "running"])
    read: list[str] = []

    def read_status(store: Any) -> Any:
        read.append(next(states))
        return SimpleNamespace(state=read[-1])

    monkeypatch.setattr("engine.driver.status.read_status", read_status)
    monkeypatch.setattr("engine.driver.status.status_lines", lambda current: [current.state])
    monkeypatch.setattr("engine.commands.runs.WATCH_SECONDS", 0.0)
    assert call("status", "run", *(["--watch"] if is_watched else []))[0] == EXIT_OK
    assert len(read) == expected


@pytest.mark.parametrize(
    ("error", "code"),
    [(JobError("x"), EXIT_USER), (StoreLostError("x"), StoreLostError.exit_code), (KeyboardInterrupt(), 130)],
)
def test_an_error_ends_with_its_own_exit_code(
    monkeypatch: pytest.MonkeyPatch, call: Any, error: BaseException, code: int
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    assert call("schema")[0] == code
    assert StoreLostError.exit_code != EXIT_USER


@pytest.mark.parametrize(
    ("error", "code"), [(BrokenPipeError(errno.EPIPE, "closed"), 0), (OSError(errno.ENOSPC, "full"), EXIT_USER)]
)
def test_only_a_reader_that_left_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, error: OSError, code: int
) -> None:
    """Output that is lost otherwise is said, and is not a success."""

    def flush() -> None:
        raise error

    monkeypatch.setattr(cli, "app", lambda: None)
    monkeypatch.setattr(cli, "open_closed_streams", lambda: None)
    with (tmp_path / "out").open("w") as file, pytest.raises(SystemExit) as end:
        monkeypatch.setattr(sys, "stdout", SimpleNamespace(flush=flush, fileno=file.fileno))
        cli.main()
    assert (end.value.code or 0) == code
    assert ("cannot be written to (full)" in capsys.readouterr().err) == bool(code)


def test_every_model_of_a_job_may_be_a_factory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each target, transfer model and oracle alike make the folder importable."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    none = {"targets": ("zoo:t",), "transfer": (), "all_oracles": ()}
    for number, model in enumerate(
        ({"targets": ("zoo:t", "m:f")}, {"transfer": ("m:f",)}, {"all_oracles": ("m:f",)}, {})
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        spec: Any = SimpleNamespace(models=SimpleNamespace(**none | model), requests=())
        let_import(spec, folder)
        assert (str(folder) in sys.path) == bool(model), model
