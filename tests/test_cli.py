"""The command line: messages, exit codes, start-up time; and what progress looks like."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import PIL.Image
import pytest
import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from engine.data.run.counts import ShardCounts
from engine.data.run.summary import GroupSummary, TransferSummary
from engine.data.stores.lease import hold
from engine.data.stores.opening import open_store
from engine.driver.checks import plan_job
from engine.driver.executors.local import LocalExecutor
from engine.driver.progress import MAX_GROUP_ROWS, LiveDisplay, PlainDisplay, Tally, byte_size, duration, medians_table
from engine.errors import EXIT_DRAINED, EXIT_INCOMPLETE, EXIT_OWNED, EXIT_USER
from engine.job.columns import Role, columns_with
from engine.job.plan import Extent
from engine.terminal import safe_console
from tests.conftest import REPOSITORY
from tests.job_cases import ENGINE_JOBS
from tests.sleepy import Faults, make_job, make_sleepy, run_sleepy

RISKFORGE = str(Path(sys.executable).with_name("riskforge"))
QUICKSTART = str(REPOSITORY / "jobs/quickstart.yaml")


def refused(call, *arguments: str) -> list[str]:
    """The lines of a refusal."""
    code, _, err = call(*arguments)
    assert code == EXIT_USER and "Traceback" not in err
    return err.splitlines()


# What the command line is built on; torch alone takes ten times as long.
LIBRARIES = [sys.executable, "-c", "import numpy, pydantic, rich.table, typer, yaml"]


@pytest.mark.parametrize(("arguments", "limit"), [(["--help"], 2.5), (["plan", QUICKSTART, "--validate"], 5.0)])
def test_start_up_is_quick(arguments, limit):
    """CPU time of a fresh interpreter, as a multiple of what loading light libraries takes on this machine, the best
    of three: about one and two of them, less than a second."""
    ratios = [cpu_seconds([RISKFORGE, *arguments]) / cpu_seconds(LIBRARIES) for _ in range(3)]
    assert min(ratios) < limit, ratios


def cpu_seconds(command: list[str]) -> float:
    """CPU time of a command: what else the machine does is not counted."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_utime + usage.ru_stime


def test_closed_streams_are_opened():
    """What a command opens must not get the numbers of standard streams, which libraries print to."""
    code = "import os, sys; from engine.cli import main; sys.argv = ['riskforge', 'schema']\n"
    code += "try: main()\nfinally: assert [os.fstat(one) for one in range(3)] and open(os.devnull).fileno() > 2"
    for closed in ("<&-", ">&-", "<&- >&-", "<&- >&- 2>&-"):
        assert os.system(f'{sys.executable} -c "{code}" {closed}') == 0, closed


def test_a_full_disk_under_the_output_of_a_command():
    """One sentence and exit code 2, not a traceback and that of damage."""
    for arguments in (["--version"], ["schema"], ["plan", QUICKSTART]):
        with Path("/dev/full").open("w") as full:
            ended = subprocess.run([RISKFORGE, *arguments], stdout=full, stderr=subprocess.PIPE, text=True)
        assert ended.returncode == EXIT_USER
        assert re.fullmatch("error: standard output .*No space left on device.*; free some space\n", ended.stderr)


def test_version_and_schema(call):
    """`--version` names the version, `schema` is JSON of the whole job."""
    assert call("--version")[1].startswith("riskforge ")
    assert "requests" in json.loads(call("schema")[1])["properties"]


def test_the_quickstart_is_planned(call):
    """Shards, samples, bytes; for people and as JSON; `--set` counts."""
    code, out, _ = call("plan", QUICKSTART)
    assert code == 0 and re.search(r"all\s+4\s+88\s+\d+ kB", out)
    planned = json.loads(call("plan", QUICKSTART, "--json", "--set", "requests.0.count=100")[1])
    assert (planned["samples"], planned["shards"]) == (164, 7) and planned["device_hours"] is None
    assert [one["num_samples"] for one in planned["requests"]] == [100, 24, 40]


def test_the_quickstart_is_valid(call):
    """Also as JSON."""
    assert "is valid" in call("plan", QUICKSTART, "--validate")[1]
    assert json.loads(call("plan", QUICKSTART, "--validate", "--json")[1])["valid"]


@pytest.mark.parametrize("job", ENGINE_JOBS, ids=lambda path: path.stem)
def test_every_job_is_valid_offline(call, job, tmp_path, monkeypatch):
    """Also those of real size, whose models are not here: an example with a stale key would greet its first user."""
    if (photographs := "runs/cifar10-photographs") in job.read_text():
        # Data of others, which are not in the repository: one image of each class that the jobs name.
        monkeypatch.chdir(tmp_path)
        for name in ("airplane", "cat", "dog", "ship"):
            (tmp_path / photographs / name).mkdir(parents=True)
            PIL.Image.new("RGB", (32, 32)).save(tmp_path / photographs / name / "0.png")
    code, out, err = call("plan", job, "--validate")
    assert (code, err) == (0, "") and out.startswith(f"{job} is valid")
    assert ("not on this machine yet" in out) == job.stem.startswith("imagenet")


def test_options_are_spelled_with_hyphens_or_underscores(call):
    """Both reach the same option; values are left alone."""
    for spelling in ("--price-per-hour", "--price_per_hour"):
        assert refused(call, "plan", QUICKSTART, spelling, "2") == [
            "error: --price-per-hour: requires measured hours; add --calibrate"
        ]
    lines = refused(call, "plan", QUICKSTART, "--set", "sampling.num_inference_steps=0")
    assert lines[0].startswith("error: sampling.num_inference_steps: 0")


def test_all_problems_come_at_once_a_line_each(call):
    """Unknown keys and values, with the nearest spelling; then, where the job stands, unknown classes."""
    lines = refused(call, "plan", QUICKSTART, "--set", "sampling.sheduler=lms", "--set", "requests.0.count=none")
    assert len(lines) == 2 and all(line.startswith("error: ") for line in lines)
    assert "did you mean 'scheduler'?" in lines[0] + lines[1]
    lines = refused(call, "run", QUICKSTART, "--set", "requests.0.boundary=[thre, eight]")
    assert lines[-1].startswith("error: requests.0.boundary.0: 'thre'") and "'three'" in lines[-1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"# nothing\n", "is empty"),
        (b"name: [a\nseed: 0\n", "line 2, column 5"),
        (b"a: b: c\n", "line 1, column 5: mapping values are not allowed here"),
        (b"name: a\nname: b\n", "line 2, column 1: duplicate key 'name'"),
        (b"name: *x\n", "line 1, column 7: found undefined alias"),
        (b"name: !!python/object:os.system a\n", "line 1, column 7: could not determine a constructor"),
        (b"\x00\x01\x02", "characters that are not allowed in text"),
        (b"\xff\xfe\xfa" * 50, "is not text in UTF-8"),
        (b"- a\n- b\n", "a mapping of keys is expected"),
        (b"just words\n", "a mapping of keys is expected"),
        (b"[" * 1000, "nested too deeply"),
        (b"{? [a]: b}\n", "unhashable"),
    ],
)
def test_files_that_are_no_job(call, tmp_path, content, message):
    """Each is one clear line with the place, never a traceback."""
    path = tmp_path / "job.yaml"
    path.write_bytes(content)
    lines = refused(call, "plan", path)
    assert len(lines) == 1 and message in lines[0] and lines[0].startswith("error: ")


def test_paths_that_are_no_file(call, tmp_path):
    """Missing, and a folder."""
    assert "no such file" in refused(call, "run", tmp_path / "no.yaml")[0]
    assert "is a folder" in refused(call, "run", tmp_path)[0]


@pytest.mark.parametrize("text", ["count", "=3", "a.b=[1", "nowhere.0.x=1", "requests.9.count=1"])
def test_overrides_that_lead_nowhere(call, text):
    """`--set` says what it takes."""
    lines = refused(call, "plan", QUICKSTART, "--set", text)
    assert lines and ("--set" in lines[0] or lines[0].startswith("error: nowhere"))


def test_options_that_do_not_go_together(call, tmp_path):
    """An address for threads; an address of Ray's client."""
    assert "--address" in refused(call, "run", QUICKSTART, "--executor", "local", "--address", "auto")[0]
    assert "not supported" in refused(call, "run", QUICKSTART, "--address", "ray://head:10001")[0]


def test_an_output_of_somebody_else_is_refused(call, tmp_path):
    """Before anything is started; and overwriting asks for `--yes`."""
    (tmp_path / "thesis.txt").write_text("")
    assert "thesis.txt" in refused(call, "run", QUICKSTART, "--output", tmp_path)[-1]
    run_sleepy(tmp_path / "run", 1, LocalExecutor(1))
    lines = refused(call, "run", QUICKSTART, "--output", tmp_path / "run", "--resume", "overwrite")
    assert "--yes" in lines[-1]


def test_the_report_is_written_anew(call, tmp_path):
    """And a folder without a run is refused."""
    assert "manifest.json" in refused(call, "report", tmp_path)[0]
    run_sleepy(tmp_path, 1, LocalExecutor(1))
    (tmp_path / "report.html").unlink()
    code, out, _ = call("report", tmp_path)
    assert code == 0 and Path(out.strip()).is_file()


def test_a_reader_that_leaves_is_no_error():
    """`riskforge schema | head` is quiet."""
    done = subprocess.run(
        ["bash", "-c", f"'{RISKFORGE}' schema | true; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""


@pytest.mark.parametrize("moment", ["loading models", pytest.param(" samples", marks=pytest.mark.slow)])
def test_an_interrupt_says_how_to_go_on(tmp_path, moment):
    """Ctrl-C while models are loaded, and while threads sample: the exit code for later, no traceback, no abort."""
    command = [RISKFORGE, "run", QUICKSTART, "--output", str(tmp_path / "out"), "--executor", "local", "--grace", "1s"]
    # So many that they are not made before the signal comes.
    command += ["--set", "requests.0.count=10000"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts background commands, and with them this test, with interrupts ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr is not None
    for line in process.stderr:
        if moment in line:
            break
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=400)
    assert process.returncode == EXIT_DRAINED
    assert "the same command continues" in rest and "Traceback" not in rest


@pytest.fixture
def sleepy_job(tmp_path):
    """A job file of ten samples; its output is `out` beside it."""
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(make_job(tmp_path / "out", 1).model_dump(mode="json", exclude_unset=True)))
    return path


def test_failed_samples_are_told(call, monkeypatch, sleepy_job):
    """With the most frequent message, and exit code 3; also by the run that finds nothing to do."""
    faults = Faults(bad_samples=3, bad_message="no [/b] gradient")
    monkeypatch.setattr("engine.driver.run.default_worker", partial(make_sleepy, faults=faults))
    for _ in range(2):
        code, _, err = call("run", sleepy_job, "--executor", "local")
        assert code == EXIT_INCOMPLETE and "error: 3 of 10 samples failed: no [/b] gradient" in err
        assert "quarantine" not in err
    assert (sleepy_job.parent / "out/_SUCCESS").exists()


def test_workers_that_do_not_start_are_told_in_a_line(call, monkeypatch, sleepy_job):
    """Exit code 3; the traceback is on file, and the next run takes it away."""
    monkeypatch.setattr("engine.driver.run.default_worker", partial(make_sleepy, faults=Faults(no_start="defect")))
    code, _, err = call("run", sleepy_job, "--executor", "local")
    assert code == EXIT_INCOMPLETE and "Traceback" not in err
    assert "the last one: ZeroDivisionError: no such kernel\n" in err
    path = sleepy_job.parent / "out/_state/quarantine/workers.txt"
    assert str(path) in err and "Traceback" in path.read_text()
    monkeypatch.setattr("engine.driver.run.default_worker", partial(make_sleepy, faults=Faults()))
    assert call("run", sleepy_job, "--executor", "local")[0] == 0 and not path.exists()


def test_a_second_driver_is_refused(call, sleepy_job):
    """With who is at work; its files are left alone, also by an agreed removal. A finished run needs no driver."""
    output = sleepy_job.parent / "out"
    run_sleepy(output, 1, LocalExecutor(1))
    # So long that it is not renewed meanwhile.
    with hold(open_store(str(output)), length_seconds=3600):
        before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
        code, _, err = call("run", sleepy_job, "--executor", "local", "--resume", "overwrite", "--yes")
        assert code == EXIT_OWNED and f"process {os.getpid()} on " in err and ", since 20" in err
        assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
        assert run_sleepy(output, 1, LocalExecutor(1)).was_complete
    assert run_sleepy(output, 2, LocalExecutor(1)).num_committed == 6


@pytest.fixture
def tally(tmp_path):
    """Twenty samples in shards of four, one shard committed before."""
    return Tally(plan_job(make_job(tmp_path, 2)), {0: ShardCounts(ok=3, failed=1, accepted=3)})


def test_rates_count_this_run_alone(tally):
    """From when the worker began, not from its first answer; what was there before is no speed."""
    row = tally.requests[0]
    assert (row.num_done, row.rate(5.0), row.eta_seconds(5.0)) == (4, 0.0, None)
    tally.ready(7, 10.0)
    tally.progress(7, 1, 2, 12.0)
    assert (row.num_done, row.rate(12.0), row.eta_seconds(12.0)) == (6, 1.0, 14.0)
    tally.commit(7, 1, ShardCounts(ok=4, accepted=4), 14.0)
    assert (row.num_done, row.accepted, row.rate(14.0)) == (8, 7, 1.0)
    tally.progress(7, 2, 3, 15.0)
    tally.drop(2)
    assert row.num_done == 8


def test_late_news_of_a_committed_shard_is_ignored(tally):
    """Also of one that an earlier run committed."""
    tally.commit(7, 1, ShardCounts(ok=4, accepted=4), 14.0)
    tally.progress(7, 1, 4, 15.0)
    tally.progress(7, 0, 4, 15.0)
    assert tally.total.num_done == 8 and not tally.total.in_flight


def group_of(context: str) -> GroupSummary:
    """A group without an image."""
    counts = dict.fromkeys(("attempted", "rejected", "failed", "accepted"), 1) | {"ok": 0}
    rates = dict.fromkeys(("error_rate", "oracle_agreement", "valid_failure_rate"))
    scores = dict.fromkeys(column.name for column in columns_with(Role.SUMMARISED))
    transfer = (TransferSummary(model="[red] model [/b]", error_rate=0.5, risk_median=1.0),)
    return GroupSummary(
        request="all", method="prompt", context=context, transfer=transfer, scores=scores, **counts, **rates
    )


def test_texts_of_the_job_are_no_markup():
    """Contexts and addresses with brackets come out as they are, also in a phase."""
    stream = io.StringIO()
    Console(file=stream, width=200).print(medians_table([group_of("ink [/b]"), group_of("[red] ink")]))
    # The heading has a line for each of its last three parts.
    for text in ("ink [/b]", "[red] ink", "errors of", "[red] model", "[/b] "):
        assert text in stream.getvalue()
    display = LiveDisplay(Console(file=stream, force_terminal=True, width=100))
    display.phase("joining [/b] Ray")
    display.close()
    assert "joining [/b] Ray" in stream.getvalue()


def test_the_end_table_is_bounded():
    """It says how many rows there are."""
    stream = io.StringIO()
    Console(file=stream, width=200).print(medians_table([group_of(f"place {one}") for one in range(1000)]))
    assert stream.getvalue().count("place") == MAX_GROUP_ROWS and f"{MAX_GROUP_ROWS} of 1000" in stream.getvalue()


def test_plain_lines_say_what_changed(tally):
    """Nothing twice, one line for a request, in words that a log can keep."""
    stream = io.StringIO()
    display = PlainDisplay(stream, every_seconds=0.0, clock=lambda: 12.0)
    display.phase("loading models")
    display.phase("")
    tally.ready(0, 10.0)
    display.show(tally)
    tally.progress(0, 1, 2, 12.0)
    display.show(tally)
    display.show(tally)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert re.fullmatch(r"\d\d:\d\d:\d\d all 6/20 samples, 3 of 4 accepted, 1\.0/s, ETA 14 s", lines[1])


def test_the_live_table_shows_requests(tally):
    """On a terminal: the phase first, then done, accepted, rate."""
    stream = io.StringIO()
    display = LiveDisplay(Console(file=stream, force_terminal=True, width=100))
    display.phase("starting Ray")
    tally.ready(0, time.monotonic() - 2)
    tally.progress(0, 1, 2, time.monotonic())
    display.show(tally)
    display.notice("shard 3 [is] late")
    display.close()
    text = stream.getvalue()
    assert "starting Ray" in text and "6/20" in text and "3 of 4" in text and "shard 3 [is] late" in text


def test_progress_of_quotas_is_what_counts_of_what_is_wanted(tmp_path):
    """Ten classes of two each: what one has beyond its quota is not what another lacks. In lines and in the table."""
    job = make_job(tmp_path, 2, request={"accept": {"is_error": True}})
    full, none = ShardCounts(ok=2, accepted=2), ShardCounts(rejected=2)
    tally = Tally(plan_job(job), {0: full, 1: none})
    assert (tally.requests[0].counted, tally.total.wanted) == (2, 20)
    plan = plan_job(job).grown((Extent(request=0, cell=1, start=2, stop=6, samples_per_shard=4),))
    tally.grow(plan)
    tally.commit(0, plan.num_shards - 1, ShardCounts(ok=4, accepted=4), 1.0)
    assert (tally.requests[0].accepted, tally.requests[0].counted) == (6, 4)
    stream = io.StringIO()
    display = PlainDisplay(stream, clock=lambda: 0.0)
    display._shown["all"] = 0
    display.show(tally)
    assert "all 8/24 samples, accepted 4 of 20 wanted" in stream.getvalue()
    live = io.StringIO()
    table = LiveDisplay(Console(file=live, force_terminal=True, width=100))
    table.show(tally)
    table.close()
    assert "4 of 20 wanted" in live.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (99, "99 s"), (150, "2 min"), (7500, "2 h 05 min"), (300_000, "3 d 11 h")]
)
def test_durations_are_read_at_a_glance(seconds, text):
    """From seconds to days."""
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"), [(None, "unknown"), (7, "7 B"), (1_234, "1.2 kB"), (56_000_000, "56 MB"), (3.2e13, "32 TB")]
)
def test_sizes_are_read_at_a_glance(size, text):
    """From bytes to terabytes."""
    assert byte_size(size) == text


@pytest.mark.parametrize("width", [40, 80, 100, 400])
def test_no_figure_of_a_table_is_cut(width: int) -> None:
    """Where a terminal is too narrow for a table, its rows stand one below another, whole."""
    stream = io.StringIO()
    table = Table("request", "context", *(f"score number {place}" for place in range(8)), title="scores")
    table.add_row("between-plain", Text("a…\nb [red]"), *(f"0.00{place}512 -> 1.25" for place in range(8)))
    safe_console(stream, width).print(table)
    said = stream.getvalue()
    assert said.count("…") == 1 and "[red]" in said and "between-plain" in said and "0.007512" in said
    assert ("score number 7" in said) and max(map(len, said.splitlines())) <= width
    assert ("─" in said or "━" in said) == (width == 400)
