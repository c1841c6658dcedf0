"""What all studies share: parsing, folders that resume and refuse, and the files that they end in."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import yaml

from engine.commands.experiments import StudyCall, call_study
from engine.data.run.study_document import Interval, StudyColumn, StudyTable, cell_text, read_study
from engine.data.stores.opening import open_store
from engine.errors import JobError, OutputError
from engine.studies.experiments.figures import draw
from engine.studies.experiments.registry import STUDIES
from tests import study_cases
from tests.conftest import REPOSITORY
from tests.study_cases import CALLS, HOSTILE, RECORD, write_job


@pytest.fixture(autouse=True, scope="module")
def demo_study():
    STUDIES["demo"] = RECORD
    yield
    del STUDIES["demo"]


def call_demo(file: Path, output: Path | None = None, **changes) -> None:
    arguments = {
        "fields": {}, "executor": "local", "address": None, "validate": False, "sets": None, "as_json": False,
    } | changes  # fmt: skip
    call_study(StudyCall(kind="demo", file=file, output=None if output is None else str(output), **arguments))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished study of two samples."""
    folder = tmp_path_factory.mktemp("study")
    call_demo(write_job(folder / "job.yaml"), folder / "study", fields={"count": 2})
    return folder / "study"


def test_a_study_ends_in_tables_a_figure_a_paragraph_and_a_page(finished):
    table = pq.read_table(finished / "table.parquet")
    assert table.column_names == ["cell", "n", "risk", "risk_low", "risk_high", "marked"]
    assert table["cell"].to_pylist() == ["plain", HOSTILE] and table["n"].to_pylist() == [2, 0]
    assert (
        table["risk_low"][0].as_py() == pytest.approx(table["risk"][0].as_py() - 1) and table["risk"][1].as_py() is None
    )
    assert (
        pyarrow.csv.read_csv(
            finished / "table.csv", parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True)
        ).num_rows
        == 2
    )
    document = read_study(open_store(str(finished)))
    assert document.status == "complete" and document.seconds > 0 and "CPU core" in document.hardware
    text = (finished / "results.md").read_text()
    assert document.command in text and document.date in text and document.findings[0] in text
    # A hostile cell opens no tag and ends no cell.
    [line] = [line for line in text.splitlines() if "script" in line and line.startswith("|")]
    assert "\\<script" in line and line.replace("\\|", "").count("|") == 5
    page = (finished / "report.html").read_text()
    assert 'href="runs/only/report.html"' in page
    assert "<script" not in page and "&lt;script" in page and document.findings[0] in page


def test_the_report_of_each_run_has_the_study_as_a_section(finished):
    page = (finished / "runs" / "only" / "report.html").read_text()
    assert '<section id="study">' in page and "the least risk is" in page and "&lt;script&gt;alert" in page


def test_a_finished_study_does_nothing_and_a_larger_count_extends_its_run(finished, tmp_path, capsys):
    home = tmp_path / "study"
    shutil.copytree(finished, home)
    job = write_job(tmp_path / "job.yaml")
    before = (home / "study.json").read_bytes()
    num_calls = len(CALLS)
    call_demo(job, home, fields={"count": 2})
    assert "complete already" in capsys.readouterr().out
    assert (home / "study.json").read_bytes() == before and len(CALLS) == num_calls
    (home / "table.csv").unlink()
    # A file that is lost is written again; the step is kept.
    call_demo(job, home, fields={"count": 2})
    assert (home / "table.csv").read_bytes() == (finished / "table.csv").read_bytes() and len(CALLS) == num_calls
    (home / "steps" / "risk" / "least.json").write_text('{"inputs": ')
    (home / "table.csv").unlink()
    call_demo(job, home, fields={"count": 2})
    assert len(CALLS) == num_calls + 1
    call_demo(job, home, fields={"count": 3})
    assert pq.read_table(home / "table.parquet")["n"].to_pylist() == [3, 0] and len(CALLS) == num_calls + 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fields": {"count": 1}}, "count: 2 -> 1"),
        ({"fields": {"count": 2, "text": "other"}}, 'text: "plain" -> "other"'),
        ({"fields": {"count": 2}, "sets": ["sampling.num_inference_steps=3"]}, "num_inference_steps: 2 -> 3"),
    ],
)
def test_a_folder_of_another_study_is_refused_with_the_differences(finished, tmp_path, changes, message):
    before = (finished / "study.json").read_bytes()
    with pytest.raises(OutputError, match="choose another") as error:
        call_demo(write_job(tmp_path / "job.yaml"), finished, **changes)
    assert message in str(error.value) and (finished / "study.json").read_bytes() == before


def test_folders_of_others_and_unreadable_documents_are_refused(finished, tmp_path):
    job = write_job(tmp_path / "job.yaml")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(OutputError, match=r"thesis\.tex"):
        call_demo(job, tmp_path / "mine")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "study.json").write_text('{"study": "demo", "study": "x"}')
    with pytest.raises(OutputError, match=r"study\.json: cannot be read.*remove it, and the same command"):
        call_demo(job, tmp_path / "torn")
    # As the message says: a folder of a study whose document is gone is its own.
    shutil.copytree(finished, tmp_path / "lost")
    (tmp_path / "lost" / "study.json").unlink()
    call_demo(job, tmp_path / "lost", fields={"count": 2})
    assert (tmp_path / "lost" / "table.csv").read_bytes() == (finished / "table.csv").read_bytes()
    STUDIES["other"] = RECORD.__class__(kind="other", spec=RECORD.spec, check=RECORD.check, program=RECORD.program)
    try:
        with pytest.raises(OutputError, match="of kind 'demo', not 'other'"):
            call_study(
                StudyCall(
                    kind="other", file=job, fields={"count": 2}, output=str(finished), executor="local", address=None,
                    validate=False, sets=None, as_json=False,
                )
            )  # fmt: skip
    finally:
        del STUDIES["other"]
    with pytest.raises(OutputError, match="s3://"):
        call_demo(job, None, fields={"output.uri": "s3://bucket/study"})


def test_a_study_file_names_its_job_and_is_overridden(tmp_path, capsys, monkeypatch):
    write_job(tmp_path / "job.yaml")
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump({"study": "demo", "name": "mine", "job": "job.yaml", "count": 5}))
    call_demo(file, tmp_path / "out", validate=True)
    assert "is valid: 1 run of 5 samples" in capsys.readouterr().out and not (tmp_path / "out").exists()
    call_demo(file, tmp_path / "out", validate=True, fields={"count": 7}, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"valid": True, "makes": "1 run of 7 samples"}


@pytest.mark.parametrize(
    ("raw", "sets", "message"),
    [
        ({"study": "sweep"}, [], "study: 'sweep' is not 'demo'"),
        ({"study": "demo"}, [], "job: missing"),
        ({"study": "demo", "job": 3}, [], "job"),
        ({"study": "demo", "job": "job.yaml", "cuont": 3}, [], "cuont: "),
        ({"study": "demo", "job": "job.yaml", "count": 0}, [], "count: "),
        ({"study": "demo", "job": "job.yaml", "name": "A b"}, [], "name: "),
        ({"study": "demo", "job": "job.yaml"}, ["job.sampling.steps=3"], "job.sampling.steps: "),
        ({"study": "demo", "job": {"models": {}}}, [], "job.models."),
        ({"study": "demo", "job": "job.yaml", "text": "refused"}, [], "text: 'refused'"),
    ],
)
def test_wrong_files_are_refused_by_field(tmp_path, raw, sets, message):
    write_job(tmp_path / "job.yaml")
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(raw))
    with pytest.raises(JobError) as error:
        call_demo(file, tmp_path / "out", sets=sets)
    assert any(line.startswith(message) for line in error.value.problems), error.value.problems
    assert not (tmp_path / "out").exists()


def test_a_table_has_rows_of_as_many_cells_as_columns():
    with pytest.raises(ValueError, match="other than 1 cells"):
        StudyTable(name="table", title="t", columns=(StudyColumn(name="n", title="n"),), rows=((1, 2),))


def test_cells_in_words_and_figures_of_equal_bytes():
    assert [cell_text(cell, 2) for cell in (None, True, 3, 2.345, "x", Interval(value=-0.001, low=-1, high=1))] == [
        "", "yes", "3", "2.35", "x", "0.00 (-1.00 to 1.00)",
    ]  # fmt: skip
    p_value = StudyColumn(name="p", title="p", digits=3, is_p_value=True)
    assert [p_value.text(value) for value in (0.0, 0.0004, 0.0006, 0.5, None)] == [
        "< 0.001", "< 0.001", "0.001", "0.500", "",
    ]  # fmt: skip
    first, second = (draw(3, 2, lambda figure: figure.add_subplot(title="$a$ <b>").plot([1, 2])) for _ in range(2))
    assert first == second and "$a$ &lt;b&gt;" in first


@pytest.mark.slow
def test_a_killed_study_goes_on_and_ends_in_the_same_table(tmp_path):
    job, home = write_job(tmp_path / "job.yaml", output={"uri": "x", "samples_per_shard": 1}), tmp_path / "study"
    command = [sys.executable, study_cases.__file__, str(job), str(home), "6"]
    environment = {
        "PYTHONPATH": str(REPOSITORY),
        "HF_HUB_OFFLINE": "1",
        "PATH": "/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(command, env=environment, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not list(home.glob("runs/only/shards/*.tar")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed = read_study(open_store(str(home)))
    assert killed is None or killed.status == "running"
    call_demo(job, home, fields={"count": 6})
    call_demo(job, tmp_path / "undisturbed", fields={"count": 6})
    assert (home / "table.csv").read_bytes() == (tmp_path / "undisturbed" / "table.csv").read_bytes()
