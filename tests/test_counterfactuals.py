"""The jobs that start from real images, from the command to the files, and the tools that go with them."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import contact_sheet
import counterfactual_figures
import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
from gpu_steps import counterfactuals

import engine
from engine.data.images import decode_rgb, open_images
from engine.data.run.shards import read_shard
from engine.models.classifier import Classifier
from tests.conftest import REPOSITORY

DIGITS = REPOSITORY / "jobs/counterfactuals-digits.yaml"
PHOTOGRAPHS = REPOSITORY / "jobs/counterfactuals-cifar10.yaml"
DATA = os.environ.get("RISKFORGE_DATA", "")
needs_data = pytest.mark.skipif(not (DATA and Path(DATA, "cifar10").is_dir()), reason="RISKFORGE_DATA is not set")
STRENGTHS = {"s000": 0, "s030": 0.3, "s100": 1}
JUDGES = ["zoo:digits/oracle", "zoo:digits/classifier-b"]


def smaller(classes: str) -> list[str]:
    """Overrides that leave few samples and steps, but every kind of request."""
    values = {"classes": classes, "count": 2, "start.strength": list(STRENGTHS.values())}
    changes: dict[str, Any] = {
        f"requests.{number}.{key}": value for number in range(2) for key, value in values.items()
    }
    changes |= {"sampling.num_inference_steps": 10, "runtime.batch_size": 4}
    return [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]


def samples_of(run: Path, folder: str) -> dict[str, list[tuple[dict[str, Any], bytes]]]:
    """Records and image files by request, in the order of their keys."""
    found: dict[str, list[tuple[dict[str, Any], bytes]]] = {}
    for path in sorted((run / folder).glob("*.tar")):
        for _, data, record, _ in read_shard(path):
            found.setdefault(record["request"], []).append((record, data))
    return found


def check_run(run: Path) -> None:
    """Every sample has what its strength gives it, and guided samples have twins that are the samples without."""
    names = [f"{method}-{strength}" for method in ("risky", "plain") for strength in STRENGTHS]
    files = {
        folder: {name: [data for _, data in some] for name, some in samples_of(run, folder).items()}
        for folder in ("shards", "twins", "starts")
    }
    assert list(files["shards"]) == names and list(files["twins"]) == names[:3]
    assert list(files["starts"]) == [name for name in names if not name.endswith("s100")]
    for strength in STRENGTHS:
        unguided = files["shards"][f"plain-{strength}"]
        assert files["twins"][f"risky-{strength}"] == unguided
        assert (files["shards"][f"risky-{strength}"] == unguided) == (strength == "s000")


def figures(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """The rows of the table by request."""
    monkeypatch.setattr(sys, "argv", ["figures", *map(str, arguments)])
    counterfactual_figures.main()
    _, _, *lines = (line for line in capsys.readouterr().out.splitlines() if line.startswith("|"))
    return {cells[1]: cells[2:-1] for line in lines if (cells := [cell.strip() for cell in line.split("|")])}


def test_the_job_of_the_digits_gives_pairs_and_figures(call, tmp_path, monkeypatch, capsys):
    """From the job file to the table: a row a request, the real images first, counted as the files have it."""
    run = tmp_path / "run"
    code, _, errors = call("run", DIGITS, "--executor", "local", "--output", run, *smaller("[three, eight]"))
    assert code == 0, errors
    check_run(run)
    assert call("verify", run)[0] == 0 and '<section id="pairs">' in (run / "report.html").read_text()
    pairs = list(engine.open_run(str(run)).filter("request == 'risky-s030'").pairs())
    assert len(pairs) == 4 and all(pair.twin and pair.start for pair in pairs)
    assert call("export", run, "--format", "pairs", "--output", tmp_path / "pairs")[0] == 0
    exported = pq.read_table(tmp_path / "pairs/train-00000-of-00001.parquet", columns=["start", "twin"])
    # Of each strength below 1 two requests of four samples, of 1 the guided one alone.
    assert [len(exported) - column.null_count for column in exported.columns] == [16, 12]
    rows = figures(monkeypatch, capsys, run, "--judges", *JUDGES)
    assert list(rows) == ["the real images", *samples_of(run, "shards")]
    assert [row[:2] for row in rows.values()] == [["", "4"], *([["0", "4"], ["0.3", "4"], ["1", "4"]] * 2)]
    # At strength 0 guidance does nothing; without a start there is no distance to one, without a twin none to it.
    assert rows["risky-s000"][:8] == rows["plain-s000"][:8] and rows["risky-s000"][-1] == "100.0"
    assert rows["risky-s100"][-3] == "" and rows["plain-s030"][-2:] == ["", ""] and "" not in rows["risky-s030"]
    assert rows["risky-s030"][2:6] == shares_of(samples_of(run, "shards")["risky-s030"])
    check_sheet(run, tmp_path / "sheet.png", monkeypatch)


def shares_of(samples: list[tuple[dict[str, Any], bytes]]) -> list[str]:
    """What the columns of errors, valid failures and agreements should have, one sample at a time."""
    target, *judges = [Classifier.load(address) for address in ("zoo:digits/classifier", *JUDGES)]
    counts = np.zeros(4, dtype=int)
    for record, data in samples:
        label, image = record["class_index"], decode_rgb(data)
        is_error, *agrees = (int(model.score([image]).argmax()) == label for model in (target, *judges))
        counts += [not is_error, not is_error and all(agrees), *agrees]
    flags = [np.arange(len(samples)) < count for count in counts]
    return [counterfactual_figures.share(each) for each in flags]


def check_sheet(run: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns of start, twin, sample and difference; the difference is ten times that of the other two."""
    starts, twins, samples, differences = contact_sheet.pairs_of(run, "risky-s030", 3)
    assert [image.size for image in (*starts, *twins, *samples, *differences)] == [(32, 32)] * 12
    changed = np.asarray(samples[0], dtype=int) - np.asarray(twins[0], dtype=int)
    assert np.array_equal(np.asarray(differences[0]), np.clip(128 + 10 * changed, 0, 255))
    assert len(contact_sheet.pairs_of(run, "risky-s100", 3)) == 3
    monkeypatch.setattr(sys, "argv", ["sheet", str(run), str(path), "--pairs", "risky-s030", "--count", "3"])
    contact_sheet.main()
    assert PIL.Image.open(path).size == (3 * 100 + 4, 4 * 100 + 4)


def test_rows_from_other_images_are_not_compared():
    """Requests with starts must have the same ones; those without any, such as at strength 1, are no matter."""

    def cell(*names: str) -> counterfactual_figures.Cell:
        return counterfactual_figures.Cell([{"start_key": name} for name in names])

    cells = {"risky": cell("a", "b"), "whole": cell("", ""), "plain": cell("b", "a")}
    counterfactual_figures.check_starts(cells)
    with pytest.raises(ValueError, match="plain has 1 samples from other images than the 2 of risky"):
        counterfactual_figures.check_starts(cells | {"plain": cell("a")})


# Photographs ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder_tool(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """`tools/zoo/cifar10_folder.py`, which finds its neighbours as a script does."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools/zoo"))
    return importlib.import_module("cifar10_folder")


def write_photographs(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, *options: object) -> None:
    monkeypatch.setattr(sys, "argv", ["cifar10_folder", *map(str, options)])
    tool.main()


@pytest.fixture
def noise(tmp_path: Path) -> Path:
    """A folder in the form of the real data: noise for 40 images."""
    (tmp_path / "data/cifar10").mkdir(parents=True)
    images = np.random.default_rng(0).integers(256, size=(40, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "data/cifar10/cifar10_test_5000.npz", images=images, labels=np.arange(40) % 10)
    return tmp_path / "data"


def test_photographs_are_written_once_and_read_back(folder_tool, noise, tmp_path, monkeypatch, capsys):
    """The chosen rows under their classes and numbers; the same call again changes nothing, another one is refused."""
    output = tmp_path / "runs/photographs"
    options = ("--data", noise, "--output", output, "--rows", "10:40")
    write_photographs(folder_tool, monkeypatch, *options, "--per-class", 2)
    assert "20 photographs of rows 10 to 39, written" in capsys.readouterr().out
    images = np.load(noise / "cifar10/cifar10_test_5000.npz")["images"]
    read = {image.name: image for image in open_images(str(output), folder_tool.CLASS_NAMES).read()}
    assert len(read) == 20 and {"airplane/00010.png", "airplane/00020.png", "truck/00029.png"} <= read.keys()
    assert (
        np.array_equal(np.asarray(read["cat/00023.png"].image), images[23]) and read["cat/00023.png"].class_index == 3
    )
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    write_photographs(folder_tool, monkeypatch, *options, "--per-class", 2)
    assert "already there, unchanged" in capsys.readouterr().out
    for refused in ((), ("--per-class", 1)):
        with pytest.raises(SystemExit, match=r"--output: .*; remove it, or choose another --output"):
            write_photographs(folder_tool, monkeypatch, *options, *refused)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


def test_a_folder_of_photographs_is_whole_or_not_there(folder_tool, tmp_path):
    """What fails halfway leaves nothing behind; a foreign file is neither overwritten nor joined."""
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    with pytest.raises(TypeError):
        folder_tool.write_folder({"cat/0.png": image, "dog/1.png": image.astype(complex)}, tmp_path / "photographs")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "photographs/cat").mkdir(parents=True)
    for place, content in (("cat/0.png", b"mine"), ("notes.txt", b"mine")):
        path = tmp_path / "photographs" / place
        path.write_bytes(content)
        with pytest.raises(FileExistsError, match=path.name):
            folder_tool.write_folder({"cat/0.png": image}, tmp_path / "photographs")
        assert path.read_bytes() == content
        path.unlink()


def test_the_job_of_the_photographs_names_the_tool_that_writes_them(call, tmp_path, monkeypatch):
    """Where the folder is not there yet: the comment next to its address is quoted, before models load."""
    monkeypatch.chdir(tmp_path)
    for command in (("plan", PHOTOGRAPHS, "--validate"), ("run", PHOTOGRAPHS, "--executor", "local")):
        code, _, errors = call(*command)
        [line] = (line for line in errors.splitlines() if line.startswith("error: requests.0.start.images: "))
        assert code == 2 and "there is no 'runs/cifar10-photographs'" in line
        assert line.endswith(f"; {PHOTOGRAPHS} says: written by tools/zoo/cifar10_folder.py")
    assert (REPOSITORY / "tools/zoo/cifar10_folder.py").is_file()
    # What is wrong otherwise is left as it is.
    elsewhere = ("--set", "requests.0.start.images=other", "--set", "requests.1.start.images=other")
    assert "says:" not in call("plan", PHOTOGRAPHS, "--validate", *elsewhere)[2]


@needs_data
def test_the_job_of_the_photographs_runs_where_its_folder_is(call, folder_tool, tmp_path, monkeypatch, capsys):
    """With the photographs that the tool writes, and with judges trained by others."""
    monkeypatch.chdir(tmp_path)
    write_photographs(folder_tool, monkeypatch, "--per-class", 2)
    assert "there is no" not in call("plan", PHOTOGRAPHS, "--validate")[1]
    code, _, errors = call("run", PHOTOGRAPHS, "--executor", "local", "--output", "run", *smaller("[cat, ship]"))
    assert code == 0, errors
    check_run(tmp_path / "run")
    judges = [f"tools.targets.cifar_resnets:{name}" for name in ("resnet20", "resnet32")]
    assert len(figures(monkeypatch, capsys, "run", "--judges", *judges)) == 7


@pytest.mark.slow
def test_the_step_of_a_gpu_runs_without_one(call, tmp_path, monkeypatch):
    """Both runs of a job have equal bytes; without photographs theirs is left out."""

    def riskforge(*arguments: object) -> dict[str, Any]:
        code, output, errors = call(*arguments)
        return {"exit_code": code, "seconds": 0.0, "output": (output + errors).splitlines()}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(counterfactuals, "riskforge", riskforge)
    options = ["--device", "cpu", "--size", "tiny", "--models", "models", "--output", str(tmp_path / "figures.json")]
    assert counterfactuals.main(options) == 0
    assert "left out: there is no runs/cifar10-photographs" in (tmp_path / "figures.json").read_text()
