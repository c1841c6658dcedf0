"""A copy of the engine with one score more, and what a run of it comes to: run by `test_new_score` in a process.

The score is added as docs/extending.md says: a formula, a line in the scorer and a row in the table of columns.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent
# The schema version after that of the engine which is copied.
SINCE = 5
NAME, TITLE, MEANING = "lead", "Lead", "probability of the class less that of its strongest rival"
# File of the copy -> text before which a piece is inserted, and the piece.
PIECES = {
    "methods/scores.py": (
        "def entropy(logits: Tensor)",
        '''def lead(logits: Tensor, labels: Tensor) -> Tensor:
    """Probability of y less that of its strongest rival, [B], in [-1, 1]."""
    p = _log_softmax(logits).exp()
    rivals = strongest_rival(logits, labels)[:, None]
    return (p.gather(-1, labels[:, None]) - p.gather(-1, rivals))[:, 0]


''',
    ),
    "generation/scorer.py": (
        '        "entropy": scores.entropy(logits),\n',
        f'        "{NAME}": scores.lead(logits, labels),\n',
    ),
    "job/columns.py": (
        '    Column(\n        name="soft_label"',
        f'''    Column(
        name="{NAME}", type="float", since={SINCE}, measured_by="target", title="{TITLE}", description="{MEANING}",
        roles=SCORE | Role.COMPARED,
    ),
''',
    ),
}


def copy_engine(folder: Path) -> None:
    """A copy of the engine's code with the score in it; the models are those of the repository."""
    shutil.copytree(REPOSITORY / "engine", folder / "engine", ignore=shutil.ignore_patterns("zoo", "__pycache__"))
    (folder / "engine/zoo").symlink_to(REPOSITORY / "engine/zoo")
    shutil.copytree(REPOSITORY / "tools", folder / "tools", ignore=shutil.ignore_patterns("__pycache__"))
    for name, (place, piece) in PIECES.items():
        path = folder / "engine" / name
        before, after = path.read_text(encoding="utf-8").split(place)
        path.write_text(before + piece + place + after, encoding="utf-8")


def make_run(home: Path) -> str:
    """A run of a few digits whose rule of acceptance asks for the score."""
    from engine.driver.executors.local import LocalExecutor
    from engine.driver.progress import PlainDisplay
    from engine.driver.run import run_job
    from engine.job.parsing import parse_job

    models = {"diffusion": "zoo:digits/stable-diffusion", "clip": "zoo:digits/clip", "target": "zoo:digits/classifier"}
    shared = {"classes": ["three", "eight"], "count": 4, "seed_group": "one"}
    guided = {"name": "guided", "method": "risky", "accept": {NAME: "< 0"}, "max_attempts": "1x"}
    job = parse_job(
        {
            "name": "scored",
            "models": models,
            "requests": [{"name": "plain", "method": "prompt", **shared}, guided | shared],
            "sampling": {"num_inference_steps": 6, "guidance_scale": 2.0},
            "output": {"uri": str(home / "run"), "samples_per_shard": 8, "store_rejected": True},
        }
    )
    run_job(job, executor=LocalExecutor(1), resume="auto", confirmed=False, display=PlainDisplay(io.StringIO()))
    return job.output.uri


def outcome(home: Path) -> dict[str, Any]:
    """What every place that shows or checks scores makes of a run, as plain data."""
    from rich.console import Console

    import engine
    from engine.data.reading.inspection import inspect
    from engine.data.run.summary import summarise
    from engine.data.run.verify import verify
    from engine.data.stores.opening import open_store
    from engine.driver.progress import medians_table
    from engine.generation.rescorer import rescore
    from engine.job.acceptance import rule_problems
    from engine.report.render import write_report
    from tests.corpus_cases import make_run as make_earlier_run

    uri = make_run(home)
    store, corpus = open_store(uri), engine.open_run(uri)
    table, stream = corpus.to_table(), io.StringIO()
    groups = summarise(store.path("metadata.parquet"))
    Console(file=stream, width=200).print(medians_table(groups))
    names = ["key", "request", "class_index", "status", "risk", NAME]
    made = {
        "engine": engine.__file__,
        "rows": table.select(names).to_pylist(),
        "records": [record for path in sorted(store.path("shards").glob("*.tar")) for record in _records(path)],
        "unknown_condition": rule_problems({"x": True})[0][1],
        "filtered": corpus.filter(f"{NAME} < 0").to_table(["key"])["key"].to_pylist(),
        "inspection": inspect(corpus).document,
        "verified": [finding.text for finding in (*verify(store).findings, *rescore(store))],
        "manifest": json.loads(store.read("manifest.json")),
        "card": store.read("README.md").decode(),
        "report": store.read("report.html").decode(),
        "terminal": stream.getvalue(),
        "pages": _pages(),
        "compared": _compared(uri, home / "baseline.json"),
        "bent": _bent(store),
    }
    # A run of the version before has no such column, alone or together with one that has.
    earlier = str(make_earlier_run(home / "earlier", name="earlier", version=3))
    write_report(open_store(earlier))
    both = engine.open_run(earlier, uri)
    return made | {
        "earlier": {
            "findings": [finding.text for finding in verify(open_store(earlier)).findings],
            "report": open_store(earlier).read("report.html").decode(),
            "card": open_store(earlier).read("README.md").decode(),
            "filtered": both.filter(f"{NAME} >= -1").to_table(["key"])["key"].to_pylist(),
            "groups": inspect(both).document["groups"],
            "alone": inspect(engine.open_run(earlier)).document,
        }
    }


def _compared(uri: str, path: Path) -> list[str]:
    """The metrics of a comparison of a run with its own baseline."""
    from engine.studies.compare.baseline import pin_run, read_baseline
    from engine.studies.compare.program import compare_runs
    from engine.studies.compare.scored_run import read_scored_run

    run = read_scored_run(uri)
    pin_run(run, path)
    return list(compare_runs(read_baseline(path), run).rows[0].differences)


def _records(tar: Path) -> list[dict[str, Any]]:
    from engine.data.run.shards import read_shard

    return [record for _, _, record, _ in read_shard(tar)]


def _pages() -> dict[str, str]:
    """The pages of the documentation that are made from the code."""
    import runpy

    import engine

    script = Path(engine.__file__).parent.parent / "tools/docs.py"
    return {name: make() for name, make in runpy.run_path(str(script))["PAGES"].items()}


def _bent(store: Any) -> list[str]:
    """What scoring again finds where a stored value of the score is another one."""
    from engine.data.run.shard_writing import stage_shard
    from engine.data.run.shards import read_shard
    from engine.generation.rescorer import rescore
    from engine.job.records import SampleResult

    run = {"batch_size": 1, "duration_seconds": 0.1, "attempt": 1, "worker": "w"}
    for tar in store.path("shards").glob("*.tar"):
        samples = [(image, record | {NAME: record[NAME] - 0.25}) for _, image, record, _ in read_shard(tar)]
        results = [SampleResult(record, image, run) for image, record in samples]
        tar.write_bytes(stage_shard(store.staging(), "bent", results, "png").tar.read_bytes())
    return [finding.text for finding in rescore(store)]


if __name__ == "__main__":
    print(json.dumps(outcome(Path(sys.argv[1]))))
