"""Runs whose rule of acceptance is a text: what they keep is what a filter by the same text selects."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import engine
from engine.data.run.stored_plan import stored_plan
from engine.data.run.verify import verify
from engine.data.stores.opening import open_store
from engine.driver.cost import job_cost
from engine.driver.executors.local import LocalExecutor
from engine.driver.progress import PlainDisplay
from engine.driver.run import run_job
from engine.errors import OutputError
from engine.job.parsing import parse_job
from engine.job.spec import JobSpec
from engine.models.library_logging import quiet_libraries
from engine.studies.rescore.program import rescore_run
from engine.studies.samples import is_plain

# With quotes and backquotes, which the card must not take for its own.
TEXT = (
    "oracle_p_label_min > 0.5 and (is_error or context == '' and conformity > 0.83)"
    " or class_name in ['a `b` | c'] or entropy > 0.002 and risk < 1"
)
JOINT = "not is_error and oracle_agrees and kldb > 1.1 or is_error and entropy > 0.5"
MAPPING = {"oracle": "agrees", "conformity": ["> 0.75", "< 0.9"], "is_error": False}
AS_TEXT = "oracle_agrees and 0.75 < conformity < 0.9 and not is_error"


def make_job(folder: Path, **changes: Any) -> JobSpec:
    common = {"count": 2, "max_attempts": "1x", "seed_group": "one"}
    single = common | {"method": "prompt", "classes": ["three", "eight"], "contexts": ["", "red ink"]}
    joint = common | {"method": "prompt", "boundary": ["three", "eight"], "count": 6}
    raw = {
        "name": "texts",
        "models": {"diffusion": "zoo:digits/stable-diffusion", "clip": "zoo:digits/clip",
                   "target": "zoo:digits/classifier", "oracle": "zoo:digits/oracle"},
        "requests": [
            {"name": "text", "accept": TEXT} | single,
            {"name": "joint", "accept": JOINT} | joint,
            {"name": "mapping", "accept": MAPPING} | single,
            {"name": "as-text", "accept": AS_TEXT} | single,
        ],
        "sampling": {"scheduler": "lms", "num_inference_steps": 6, "guidance_scale": 3.0},
        "output": {"uri": str(folder)},
        "runtime": {"device": "cpu"},
    }  # fmt: skip
    return parse_job(raw | changes)


def run(job: JobSpec) -> None:
    display = PlainDisplay(io.StringIO())
    run_job(job, executor=LocalExecutor(1), resume="auto", confirmed=False, display=display)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Single classes by a text, by a mapping and by its text with the same noise, and a joint prompt."""
    quiet_libraries()
    folder = tmp_path_factory.mktemp("texts") / "run"
    run(make_job(folder))
    return folder


def test_a_filter_by_the_rule_selects_what_it_accepted(made: Path) -> None:
    """Of a joint prompt `is_error` is what filters call `target_errs`."""
    assert verify(open_store(str(made))).findings == ()
    corpus = engine.open_run(str(made))
    rules = {"text": TEXT, "joint": JOINT.replace("is_error", "target_errs"), "as-text": AS_TEXT}
    for name, rule in rules.items():
        rows = corpus.filter(f"request == '{name}'")
        accepted = rows.filter("accepted").to_table(["key"])["key"].to_pylist()
        assert rows.filter(rule).to_table(["key"])["key"].to_pylist() == accepted
        assert 0 < len(accepted) < len(rows), name


def test_a_mapping_accepts_what_its_text_does(made: Path) -> None:
    rows = pq.read_table(made / "metadata.parquet").to_pylist()
    kept = {name: [(row["class_index"], row["index"], row["accepted"]) for row in rows if row["request"] == name]
            for name in ("mapping", "as-text")}  # fmt: skip
    assert kept["mapping"] == kept["as-text"] and {row[-1] for row in kept["mapping"]} == {True, False}


def test_all_that_reads_a_rule_reads_a_text(made: Path) -> None:
    """The card prints it, the stored job has it, studies know that there is one."""
    card = (made / "README.md").read_text(encoding="utf-8")
    assert f"accepted when: ``{TEXT}``" in card and f"accepted when: `{JOINT}`" in card
    assert "accepted when: oracle `agrees`, conformity `['> 0.75', '< 0.9']`, is_error `False`" in card
    job, plan = stored_plan(open_store(str(made)))
    assert [request.accept for request in job.requests] == [TEXT, JOINT, MAPPING, AS_TEXT]
    assert not any(is_plain(request) or request.has_quota for request in job.requests)
    assert [cost.num_samples for cost in job_cost(job, plan).requests] == [8, 6, 8, 8]


def test_scores_of_another_target_are_accepted_by_the_text(made: Path, tmp_path: Path) -> None:
    """And those of the run's own target as before."""
    for target in ("zoo:digits/classifier", "zoo:digits/oracle"):
        rescored = rescore_run(str(made), target, output=str(tmp_path / target.rpartition("/")[2]))
        corpus = engine.open_run(rescored.folder)
        rows = corpus.filter("request == 'text' and status != 'failed'")
        accepted = rows.filter("accepted").to_table(["key"])["key"].to_pylist()
        assert rows.filter(TEXT).to_table(["key"])["key"].to_pylist() == accepted and accepted


def test_another_text_is_another_run(made: Path) -> None:
    """A run goes on by the rule that it began with, also where the other one means the same."""
    job = make_job(made)
    run(job)
    requests = [request.model_dump(mode="json") for request in job.requests]
    requests[3]["accept"] = f"({AS_TEXT})"
    with pytest.raises(OutputError, match=r"requests\.3\.accept: \"oracle_agrees and .*\" -> \"\(oracle_agrees and"):
        run(make_job(made, requests=requests))
