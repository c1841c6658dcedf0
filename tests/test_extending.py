"""The worked examples of docs/extending.md: quotes are those of the files, and what has no test of its own runs.

`test_new_score`, `test_custom_methods`, `test_method_registry` and `test_families` run the other examples of the page.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
import textwrap
from pathlib import Path

import pytest
import yaml

from engine.data.reading.corpus import open_run
from engine.driver.executors.local import LocalExecutor
from tests import commands, corpus_cases, new_score, test_method_registry
from tests.conftest import REPOSITORY
from tests.extensions.process import ProcessExecutor
from tests.sleepy import Faults, run_sleepy, tars

PAGE = (REPOSITORY / "docs/extending.md").read_text(encoding="utf-8")
EXTENSIONS = REPOSITORY / "tests/extensions"
# Section of the page -> what its blocks quote.
QUOTED = {
    "A pipeline family": (REPOSITORY / "engine/models/pipelines/stable_diffusion_xl.py").read_text(encoding="utf-8"),
    "An executor": (EXTENSIONS / "process.py").read_text(encoding="utf-8"),
    "A study": (EXTENSIONS / "confusions.py").read_text(encoding="utf-8"),
    "An export format": (EXTENSIONS / "table.py").read_text(encoding="utf-8"),
}
# File of an example -> its folder in the engine.
PLACES = {"process.py": "driver/executors", "confusions.py": "studies", "table.py": "data/reading"}


def section(heading: str) -> str:
    """The text below a heading of the second or third level."""
    found = re.search(rf"^(##+) {heading}\n(.*?)(?=^##+ |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    assert found, heading
    return found[2]


def blocks(heading: str) -> list[str]:
    """The Python blocks of a section."""
    return re.findall(r"^```python\n(.*?)^```", section(heading), re.DOTALL | re.MULTILINE)


def lines(text: str) -> set[str]:
    """The lines of code, without indentation."""
    return {line.strip().rstrip(",") for line in text.splitlines()} - {"", "..."}


@pytest.mark.parametrize("heading", QUOTED)
def test_quotes_are_lines_of_the_file(heading: str) -> None:
    """But for the record of the registry, which the last block of a section shows."""
    assert lines(blocks(heading)[0]) <= lines(QUOTED[heading])


def test_quotes_of_score_and_method_are_those_of_their_tests() -> None:
    pieces = {name: piece for name, (_, piece) in new_score.PIECES.items()}
    formula, row = blocks("A score")
    assert lines(formula) == lines(pieces["methods/scores.py"])
    assert re.sub(r"\s", "", row) == re.sub(r"\s", "", pieces["job/columns.py"]).rstrip(",")
    assert pieces["generation/scorer.py"].strip() in section("A score")
    guide, record = blocks("A built-in method")
    assert guide in test_method_registry.GUIDE.lstrip("\n")
    assert lines(record) == lines(test_method_registry.RECORD)


def test_the_table_at_the_end_has_every_section() -> None:
    rows = re.findall(r"^\| ([^|]+) \|", section("Files by kind"), re.MULTILINE)[1:]
    headings = [heading.lower() for heading in re.findall(r"^##+ An? (.+)$", PAGE, re.MULTILINE)]
    assert set(headings) - set(rows) == {"guidance method"} and set(rows) - set(headings) == {"criterion of your own"}


# The executor --------------------------------------------------------------------------------------------------------


def test_an_executor_makes_the_bytes_of_another(tmp_path: Path) -> None:
    """Also where the process of a worker is killed: its death is noticed, and another one is started."""
    executor = ProcessExecutor(address=None, num_workers=2, device="cpu")
    assert run_sleepy(tmp_path / "process", 2, executor, faults=Faults(die_once=(1,))).exit_code == 0
    run_sleepy(tmp_path / "local", 2, LocalExecutor(1))
    assert tars(tmp_path / "process") == tars(tmp_path / "local")


# A copy of the engine ------------------------------------------------------------------------------------------------


def install(path: Path, end: str, addition: str) -> None:
    """Insert lines before the only place with a text."""
    before, after = path.read_text(encoding="utf-8").split(end)
    path.write_text(before + addition + end + after, encoding="utf-8")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the code with the examples: the files, and the blocks of the page."""
    home = tmp_path_factory.mktemp("copy")
    engine = home / "engine"
    shutil.copytree(REPOSITORY / "engine", engine, ignore=shutil.ignore_patterns("zoo", "__pycache__"))
    (engine / "zoo").symlink_to(REPOSITORY / "engine/zoo")
    for name, place in PLACES.items():
        shutil.copy(EXTENSIONS / name, engine / place)
    for heading, name in (
        ("An executor", "driver/executors/registry"),
        ("An export format", "data/reading/format_registry"),
    ):
        record = textwrap.indent(blocks(heading)[-1].rstrip(), " " * 8) + ",\n"
        install(engine / f"{name}.py", "    )\n}\nDEFAULT", record)
    [command] = blocks("A command")
    with (engine / "commands/studies.py").open("a", encoding="utf-8") as file:
        file.write("\n\n" + command)
    install(engine / "cli.py", "):  # fmt: skip\n", "    studies.confusions,\n")
    return home


def riskforge(copy: Path, *arguments: str | Path) -> str:
    """The output of a command of the copy."""
    done = commands.run(*arguments, folder=copy, PYTHONPATH=str(copy))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_command_prints_what_its_study_counts(copy: Path, tmp_path: Path) -> None:
    """As lines and as JSON, with its help."""
    run = corpus_cases.make_run(tmp_path / "run")
    counted = json.loads(riskforge(copy, "confusions", run, "--json"))
    assert counted and sum(confusion["count"] for confusion in counted) > 1
    first = counted[0]
    line = f"{first['count']:>5}  {first['class_name']} -> {first['predicted']}"
    assert riskforge(copy, "confusions", run).splitlines()[0] == line
    assert "List the classes that the target of a run confuses." in riskforge(copy, "--help")


def test_an_export_has_every_image_and_score(copy: Path, tmp_path: Path) -> None:
    """In the order of any other format, with the card of its own lines."""
    run, folder = corpus_cases.make_run(tmp_path / "run"), tmp_path / "table"
    exported = json.loads(riskforge(copy, "export", run, "--format", "table", "--output", folder, "--json"))
    with (folder / "samples.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == exported["counts"]["images"] > 1 and exported["counts"]["shards"] == {}
    assert all((folder / row["file_name"]).is_file() and row["label"] == row["class_index"] for row in rows)
    assert {float(row["risk"]) for row in rows} <= {row["risk"] for row in open_run(str(run)).to_table().to_pylist()}
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "`samples.csv` has a line for each image" in card and "- path: samples.csv" not in card.split("---")[2]


@pytest.mark.slow
def test_an_executor_is_chosen_by_its_name(copy: Path, tmp_path: Path) -> None:
    """A run of real models in processes has the tars of one in this process."""
    models = {"diffusion": "zoo:digits/stable-diffusion", "clip": "zoo:digits/clip", "target": "zoo:digits/classifier"}
    job = {
        "name": "small", "models": models, "sampling": {"num_inference_steps": 1},
        "requests": [{"name": "plain", "method": "prompt", "classes": ["three", "eight"], "count": 1}],
        "output": {"uri": "run", "samples_per_shard": 1}, "runtime": {"device": "cpu"},
    }  # fmt: skip
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    for name in ("process", "local"):
        output = ("--output", tmp_path / name, "--workers", "1")
        riskforge(copy, "run", tmp_path / "job.yaml", "--executor", name, *output)
    assert len(tars(tmp_path / "process")) == 2 and tars(tmp_path / "process") == tars(tmp_path / "local")
    assert json.loads((tmp_path / "process/manifest.json").read_text())["hardware"]["executor"] == "process"
