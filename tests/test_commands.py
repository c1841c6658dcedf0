"""Commands that run, retry and plan: options about time, overrides, exit codes, and what they print."""

from __future__ import annotations

import datetime
import json
import signal
import time
from functools import partial

import pytest
import typer
import yaml

from engine.commands.runs import _limits
from engine.commands.stopping import stop_on_signals
from engine.data.run.stored_plan import stored_plan
from engine.data.stores.opening import open_store
from engine.driver.executors.local import LocalExecutor
from engine.errors import EXIT_DAMAGED, EXIT_DRAINED, EXIT_INCOMPLETE, EXIT_OK
from engine.generation.calibrate import Measurement
from tests.sleepy import Faults, make_job, make_sleepy, run_sleepy


@pytest.fixture
def job(tmp_path):
    """A job file of ten samples; its output is `out` next to it."""
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(make_job(tmp_path / "out", 1).model_dump(mode="json", exclude_unset=True)))
    return path


@pytest.fixture
def sleepy(monkeypatch):
    """Sleepy workers in place of real ones, with these faults from now on."""

    def use(**faults) -> None:
        monkeypatch.setattr("engine.driver.run.default_worker", partial(make_sleepy, faults=Faults(**faults)))

    use()
    return use


def test_the_earlier_of_deadline_and_duration_counts():
    """On the monotonic clock; without either there is no deadline. The grace period is that of its option."""
    limits = _limits("90s", "2099-01-01T00:00", "1h")
    assert limits.grace_seconds == 90.0 and limits.deadline == pytest.approx(time.monotonic() + 3600, abs=60)
    assert _limits("60s", None, None).deadline is None
    assert _limits("60s", None, "2h").deadline == pytest.approx(time.monotonic() + 7200, abs=60)


def test_a_block_that_is_interrupted_ends_with_its_message(capsys):
    """Exit code 75; SIGTERM interrupts like Ctrl-C."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            with pytest.raises(typer.Exit) as end, stop_on_signals("stopped; nothing is stored"):
                signal.raise_signal(number)
            assert end.value.exit_code == EXIT_DRAINED
            assert capsys.readouterr().err == "stopped; nothing is stored\n"
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_retry_makes_what_was_quarantined(call, job, sleepy):
    """And only a retry does; its options go into the job that the run has stored."""
    sleepy(error=(1,))
    code, _, err = call("run", job, "--executor", "local")
    assert code == EXIT_INCOMPLETE and "error: shards in quarantine: 1\n" in err and "`riskforge retry " in err
    sleepy()
    output = job.parent / "out"
    assert call("run", job, "--executor", "local")[0] == EXIT_INCOMPLETE
    assert call("retry", output, "--executor", "local", "--workers", "2")[0] == EXIT_OK
    assert json.loads((output / "manifest.json").read_text())["hardware"]["workers"] == 2


def test_a_run_that_is_out_of_time_says_how_to_go_on(call, job, sleepy):
    """Exit code 75, with the reason; the same command without a limit completes it."""
    code, _, err = call("run", job, "--executor", "local", "--max-duration", "0.0001s", "--grace", "0")
    assert code == EXIT_DRAINED and "stopped (deadline); the same command continues" in err
    code, out, _ = call("run", job, "--executor", "local")
    assert code == EXIT_OK and "3 of 3 shards in " in out and "report: " in out
    assert "is complete: all 3 shards exist, nothing to do" in call("run", job, "--executor", "local")[1]


@pytest.mark.parametrize("option", [(), ("--json",)])
def test_verify_ends_with_one_where_a_run_is_damaged(call, tmp_path, option):
    """In any form of output; an intact run ends with zero."""
    run_sleepy(tmp_path, 1, LocalExecutor(1))
    assert call("verify", tmp_path, *option)[0] == EXIT_OK
    next(tmp_path.glob("shards/*000001.tar")).write_bytes(b"torn")
    assert call("verify", tmp_path, *option)[0] == EXIT_DAMAGED


@pytest.fixture
def measured(monkeypatch):
    """A measured batch of four samples, one of which is accepted: an hour each."""
    measurement = Measurement(
        seconds_per_sample=(3600.0,), bytes_per_sample=(10.0,), num_accepted=(1,), num_attempted=(4,),
        load_seconds=3600.0, device="one GPU",
    )  # fmt: skip
    monkeypatch.setattr("engine.generation.calibrate.measure", lambda job, plan: measurement)


def test_a_price_is_that_of_all_hours(call, job, measured):
    """Ten hours of sampling and one of loading."""
    planned = json.loads(call("plan", job, "--calibrate", "--price-per-hour", "2", "--json")[1])
    assert (planned["device_hours"], planned["price"], planned["load_seconds"]) == (11.0, 22.0, 3600.0)
    out = call("plan", job, "--calibrate", "--price-per-hour", "2")[1]
    assert "measured on one GPU: 11 device-hours, 3600 s of them to load the models" in out
    assert "price at 2 an hour: 22.00" in out
    planned = json.loads(call("plan", job, "--json")[1])
    assert planned["device_hours"] is planned["price"] is planned["load_seconds"] is planned["device"] is None


def test_the_yield_of_a_rule_is_printed(call, job, measured):
    """Roughly, from one batch: four attempts of an hour for an accepted sample."""
    rule = ("--set", "requests.0.accept={is_error: true}", "--set", "requests.0.max_attempts=10x")
    out = call("plan", job, "--calibrate", *rule)[1]
    assert "all: 1 of 4 accepted in the measured batch: 4 device-hours per accepted sample" in out


def test_a_run_that_is_overwritten_gets_a_new_date(call, job, sleepy):
    """`fresh: true` keeps the date of a run that is continued, not of one that is removed."""
    output = job.parent / "out"
    run_sleepy(output, 1, LocalExecutor(1), request={"fresh": "2020-01-01"})
    arguments = ("run", job, "--executor", "local", "--set", "requests.0.fresh=true")
    assert "nothing to do" in call(*arguments)[1]
    assert call(*arguments, "--resume", "overwrite", "--yes")[0] == EXIT_OK
    spec, _ = stored_plan(open_store(str(output)))
    assert spec.requests[0].fresh == datetime.date.today().isoformat()
