"""Stored images under another target, and the two runs compared: on composed digits and the zoo's two classifiers."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest

from engine.data.run.repair import repair
from engine.data.run.resume import open_output
from engine.data.run.shards import read_shard
from engine.data.run.verify import verify
from engine.data.stores.lease import hold
from engine.data.stores.opening import open_store
from engine.driver.status import read_status
from engine.errors import EXIT_DAMAGED, EXIT_OK, EXIT_OWNED, EXIT_USER, CorruptShardError, JobError, OutputError
from engine.generation.rescorer import rescore
from engine.job.plan import build_plan
from engine.models.classifier import Classifier
from engine.models.digests import model_digest
from engine.studies.rescore.program import rescore_run
from engine.studies.rescore.scoring import NOT_STORED
from tests.composed import composed_job, make_run
from tests.image_cases import EPS, bend, bomb, file_member
from tests.test_report import base64_of, sha256_of

OTHER = "zoo:digits/classifier-b"
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
# What does not depend on the target.
KEPT = (
    "schema_version", "key", "request", "method", "class_name", "class_index", "prompt", "context", "seed", "index",
    "conformity", "conformity_margin", "soft_label", "oracle_class", "transfer", "judge", "batch_size",
    "duration_seconds", "attempt", "worker", "sha256",
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stores accepted samples alone, some shards of it."""
    output = tmp_path_factory.mktemp("runs") / "made"
    raw = composed_job(output, count=3, store_rejected=False).model_dump(mode="json")
    return make_run(composed_job(output, count=3, output=raw["output"] | {"samples_per_shard": 64}))


@pytest.fixture(scope="module")
def rescored(made: Path) -> Path:
    """The same images under the other classifier."""
    done = rescore_run(str(made), OTHER)
    assert done.is_complete and done.num_scored == done.num_images and done.comparison is not None
    return Path(done.folder)


@pytest.fixture
def copy(made: Path, rescored: Path, tmp_path: Path) -> Path:
    """A copy of the run, with its rescoring inside."""
    return shutil.copytree(made, tmp_path / "copy")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(folder / "metadata.parquet").to_pylist()


def images_of(run: Path) -> dict[str, PIL.Image.Image]:
    tars = sorted((run / "shards").glob("*.tar"))
    return {key: PIL.Image.open(io.BytesIO(data)).convert("RGB") for tar in tars for key, data, _, _ in read_shard(tar)}


def test_rows_are_those_of_the_run_with_the_scores_of_the_other_target(made, rescored):
    """Same schema, rows and order; new scores are what the classifier says of the file; all else is kept."""
    old, new, images = rows_of(made), rows_of(rescored), images_of(made)
    assert pq.read_schema(made / "metadata.parquet").equals(pq.read_schema(rescored / "metadata.parquet"))
    assert [row["key"] for row in old] == [row["key"] for row in new] and len(old) == 3 * 10 * 7
    scores = dict(zip(images, Classifier.load(OTHER).score(list(images.values())).log_softmax(1), strict=True))
    for before, after in zip(old, new, strict=True):
        if before["key"] not in images:
            assert after["status"] == "failed" and after["error_message"] == NOT_STORED
            assert all(after[name] == before[name] for name in KEPT if name not in ("oracle_class", "soft_label"))
            continue
        assert all(after[name] == before[name] for name in KEPT)
        row, label = scores[before["key"]], before["class_index"]
        assert after["risk"] == pytest.approx(-float(row[label]), abs=1e-4)
        assert after["predicted_class"] == int(row.argmax()) and after["is_error"] == (int(row.argmax()) != label)
        assert after["kldb"] >= 0 and label in after["kldb_classes"]
        wanted = before["request"] == "baseline" or (after["is_error"] and after["oracle_class"] == label)
        assert after["accepted"] == wanted and after["status"] == ("ok" if wanted else "rejected")
    stored = [row for row in new if row["sha256"]]
    assert len(stored) == len(images) < len(new) and len({row["is_error"] for row in stored}) == 2


@pytest.mark.parametrize(("data", "reason"), [(EPS, "EPS"), (bomb(), "million pixels")], ids=["EPS", "bomb"])
def test_a_hostile_image_is_damage_with_its_key(copy, tmp_path, data, reason):
    """Whoever scores it again: no foreign program is started, nothing is unpacked, and the sample is named."""
    bend(copy, file_member(data))
    rows = min((copy / "shards").glob("*.parquet"))
    table = pq.read_table(rows)
    sums = table["sha256"].to_pylist()
    sums[next(place for place, text in enumerate(sums) if text)] = hashlib.sha256(data).hexdigest()
    rows.chmod(0o644)
    pq.write_table(table.set_column(table.column_names.index("sha256"), table.schema.field("sha256"), [sums]), rows)
    with pytest.raises(CorruptShardError, match=f"its image .*{reason}"):
        rescore_run(str(copy), OTHER, output=str(tmp_path / "scores"))
    findings = [one.text for one in rescore(open_store(str(copy)), num_samples=1000)]
    assert [one for one in findings if reason in one and one.startswith("composed-")]


def test_the_manifest_tells_where_images_and_models_are(made, rescored):
    """As a run's, with `rescored_from`: relative inside the run, absolute elsewhere; `_SUCCESS` is there."""
    assert rescored.parent == made / "rescored" and rescored.name == f"classifier-b-{model_digest(OTHER)[:8]}"
    manifest, own = (json.loads((folder / "manifest.json").read_text()) for folder in (rescored, made))
    assert (rescored / manifest["rescored_from"]["uri"]).resolve() == made.resolve()
    assert manifest["rescored_from"]["target"]["digest"] == own["models"]["target"]["digest"]
    assert manifest["models"]["target"]["digest"] == model_digest(OTHER)
    assert manifest["models"]["target"]["labels"] == own["models"]["target"]["labels"]
    assert manifest["models"]["oracle"] == own["models"]["oracle"] and manifest["complete"]
    assert manifest["job"]["models"]["target"] == OTHER and manifest.keys() >= own.keys()
    samples = manifest["counts"]["samples"]
    assert samples["ok"] + samples["rejected"] + samples["failed"] == samples["attempted"] == 210
    assert {row["request"] for row in manifest["comparison"]["requests"]} == {"baseline", "errors"}
    assert (rescored / "_SUCCESS").exists()


def test_its_report_shows_the_images_of_the_run(call, copy, tmp_path):
    """The image of each row with one, also where run and scores have moved; without the run it is said once."""
    [folder] = (copy / "rescored").iterdir()
    outside = Path(rescore_run(str(copy), OTHER, output=str(tmp_path / "scores")).folder)
    for moved in (folder, outside):
        assert call("report", str(moved))[::2] == (EXIT_OK, "")
        rows = {row["key"]: row for row in rows_of(moved)}
        page = (moved / "report.html").read_text()
        shown = {key: base64_of(page, key) for key in re.findall(r'class="tile" data-key="([^"]*)"', page)}
        assert {key: sha256_of(image) for key, image in shown.items()} == {key: rows[key]["sha256"] for key in shown}
        assert sum(map(bool, shown.values())) > 20 and "zoo:digits/classifier." in page
    home = tmp_path / "elsewhere"
    home.mkdir()
    shutil.move(copy, home / copy.name)
    moved = Path(shutil.move(outside, home / "scores"))
    assert call("report", str(moved))[::2] == (EXIT_OK, "")
    # Runs with the same name and another plan are not taken for it.
    shutil.rmtree(home / copy.name / "_state" / "plan")
    code, _, err = call("report", str(moved))
    assert code == EXIT_OK and err.count("\n") == 1 and "no images: these scores are of the images of the run" in err
    page = (moved / "report.html").read_text()
    assert page.count("no images: these scores") == 1 and 'class="tile"' in page and "data:image/png" not in page


def test_it_goes_on_where_it_was_stopped(copy, monkeypatch):
    """Shards that are there are not scored again, a missing one is, and so is one whose images were made anew."""
    [folder] = (copy / "rescored").iterdir()
    before = (folder / "metadata.parquet").read_bytes()
    assert rescore_run(str(copy), OTHER).num_scored == 0
    shard = sorted(folder.glob("shards/*.parquet"))[0]
    shard.unlink()
    (folder / "_SUCCESS").unlink()
    done = rescore_run(str(copy), OTHER)
    assert 0 < done.num_scored < done.num_images and (folder / "_SUCCESS").exists()
    assert (folder / "metadata.parquet").read_bytes() == before
    table = pq.read_table(shard)
    changed = ["other", *table["sha256"].to_pylist()[1:]]
    place = table.schema.get_field_index("sha256")
    pq.write_table(table.set_column(place, table.schema.field(place), [changed]), shard)
    assert rescore_run(str(copy), OTHER).num_scored > 0
    assert (folder / "metadata.parquet").read_bytes() == before


def test_the_run_does_not_mind(copy):
    """`verify`, `repair`, `status` and the same job see a whole run; `overwrite` takes new scores with the images."""
    store = open_store(str(copy))
    assert not verify(store).findings and not repair(store).actions and read_status(store).state == "complete"
    raw = composed_job(copy, count=3, store_rejected=False).model_dump(mode="json")
    job = composed_job(copy, count=3, output=raw["output"] | {"samples_per_shard": 64})
    assert make_run(job) == copy
    planned = build_plan(job, DIGITS, {"diffusion": {job.models.diffusion: ""}, "clip": "", "target": "other"})
    strange = copy / "rescored/mine"
    strange.mkdir()
    with pytest.raises(OutputError, match="rescored/mine"):
        open_output(store, planned, job, "overwrite", confirmed=True)
    strange.rmdir()
    open_output(store, planned, job, "overwrite", confirmed=True)
    assert {path.name for path in copy.iterdir()} == {"_state"}


def test_a_run_with_a_driver_at_work_is_left_alone(made, tmp_path, call):
    """Nothing is written into it; scores that go elsewhere only read it."""
    copy = shutil.copytree(made, tmp_path / "copy", ignore=shutil.ignore_patterns("rescored"))
    with hold(open_store(str(copy))):
        code, _, err = call("rescore", copy, "--target", OTHER)
        assert code == EXIT_OWNED and "another driver is running on it" in err and not (copy / "rescored").exists()
        assert call("rescore", copy, "--target", OTHER, "--output", copy / "rescored/mine")[0] == EXIT_OWNED
        assert rescore_run(str(copy), OTHER, output=str(tmp_path / "elsewhere")).num_scored > 0


def test_the_same_target_changes_nothing(copy, tmp_path):
    """Scored again by the classifier that scored it: the same readings, no failure new or mended."""
    done = rescore_run(str(copy), "zoo:digits/classifier", output=str(tmp_path / "elsewhere"))
    pairs = zip(rows_of(copy), rows_of(Path(done.folder)), strict=True)
    scored = [(old, new) for old, new in pairs if old["sha256"]]
    assert all(old["predicted_class"] == new["predicted_class"] for old, new in scored)
    assert all(old["risk"] == pytest.approx(new["risk"], abs=1e-4) for old, new in scored)
    assert all((old["accepted"], old["status"]) == (new["accepted"], new["status"]) for old, new in scored)
    assert not done.comparison.new_failures and not done.comparison.fixed
    assert json.loads((Path(done.folder) / "manifest.json").read_text())["rescored_from"]["uri"] == str(copy)


def test_other_models_are_scored_where_they_are_named(copy):
    """Transfer and oracle in the places of the run's; another folder than without them."""
    done = rescore_run(str(copy), OTHER, transfer=("zoo:digits/classifier",), oracles=(OTHER, "zoo:digits/oracle"))
    assert len(list((copy / "rescored").iterdir())) == 2
    old = {row["key"]: row for row in rows_of(copy)}
    stored = [row for row in rows_of(Path(done.folder)) if row["sha256"]]
    for row in stored:
        [entry] = row["transfer"]
        assert entry["model"] == "zoo:digits/classifier" and entry["risk"] == pytest.approx(
            old[row["key"]]["risk"], abs=1e-4
        )
        first, second = row["oracles"]
        assert row["oracle_class"] == row["predicted_class"] == first["predicted_class"]
        assert (first["model"], second["model"]) == (OTHER, "zoo:digits/oracle")
        assert first["p_label"] == pytest.approx(row["p_label"], abs=1e-4)
        assert row["oracle_p_label_min"] == min(first["p_label"], second["p_label"]) and row["p_valid"] == -1
    manifest = json.loads((Path(done.folder) / "manifest.json").read_text())
    assert [model["address"] for model in manifest["models"]["oracles"]] == [OTHER, "zoo:digits/oracle"]
    assert "oracle" not in manifest["models"] and manifest["job"]["models"]["oracles"] == [OTHER, "zoo:digits/oracle"]


def test_misuse_is_refused(copy, tmp_path):
    """Other classes, no such model, folders of something else; nothing is left behind."""
    with pytest.raises(JobError) as caught:
        rescore_run(str(copy), "zoo:cifar10/classifier")
    [problem] = caught.value.problems
    assert problem.startswith("--target: 'zoo:cifar10/classifier' has other classes than the run: it has 'airplane', ")
    assert "in a file for --label-map: {'zoo:cifar10/classifier': {airplane: zero}}" in problem
    with pytest.raises(JobError, match="--label-map: 'zoo:digits/oracle' is none of the classifiers"):
        rescore_run(str(copy), OTHER, label_map={"zoo:digits/oracle": {}})
    with pytest.raises(JobError, match=r"--target: .*--oracle: |did you mean"):
        rescore_run(str(copy), "zoo:digits/classifer-b", oracles=("nowhere",))
    with pytest.raises(OutputError, match="there is no run"):
        rescore_run(str(tmp_path / "empty"), OTHER)
    with pytest.raises(OutputError, match="is a run"):
        rescore_run(str(copy), OTHER, output=str(copy))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    with pytest.raises(OutputError, match="no rescoring wrote"):
        rescore_run(str(copy), OTHER, output=str(tmp_path / "mine"))
    [folder] = (copy / "rescored").iterdir()
    with pytest.raises(OutputError, match="by other models"):
        rescore_run(str(copy), "zoo:digits/classifier", output=str(folder))


def test_from_the_command_line(call, copy, tmp_path):
    """Rescore, compare, pin, compare with the pinned; exit codes 0, 1 and 2; JSON and Markdown."""
    code, out, _ = call("rescore", copy, "--target", OTHER)
    assert code == EXIT_OK and "baseline" in out and "0 of them made now" in out
    [folder] = (copy / "rescored").iterdir()
    code, out, _ = call("compare", copy, folder, "--json", "--max-error-increase", "0.9")
    found = json.loads(out)
    assert code == EXIT_OK and found["new"]["target"]["address"] == OTHER
    arisen, mended = len(found["new_failures"]), len(found["mended"])
    back = json.loads(call("compare", folder, copy, "--json")[1])
    assert (len(back["mended"]), len(back["new_failures"])) == (arisen, mended) and arisen + mended > 0
    pinned, table = tmp_path / "baseline.json", tmp_path / "night.md"
    assert "not complete" not in call("compare", copy, folder)[2]
    (Path(copy) / "_SUCCESS").unlink()
    assert f"{copy}: is not complete" in call("compare", copy, folder)[2]
    assert call("compare", folder, "--pin", pinned)[0] == EXIT_OK
    code, out, err = call(
        "compare", copy, "--baseline", pinned, "--fail-on", "any-significant", "--by", "request", "--markdown", table
    )
    assert code == EXIT_DAMAGED and "limit exceeded: " in err and "Past a limit" in table.read_text()
    again = json.loads(call("compare", copy, "--baseline", pinned, "--json")[1])
    assert again["rows"] == back["rows"]
    assert call("compare", copy, "--baseline", pinned, "--max-error-increase", "0.5")[0] in (EXIT_OK, EXIT_DAMAGED)
    whole = (copy / "metadata.parquet").read_bytes()
    code, _, err = call("compare", copy, folder, "--markdown", copy / "metadata.parquet")
    assert code == EXIT_USER and "--markdown: " in err and (copy / "metadata.parquet").read_bytes() == whole
    for command in ("status", "verify", "repair", "retry", "evaluate"):
        code, _, err = call(command, folder)
        assert code == EXIT_USER and "has the scores that `riskforge rescore` made" in err, command
    for arguments in ([copy], [copy, folder, "--pin", pinned], [copy, tmp_path], [copy, folder, "--confidence", "2"]):
        code, _, err = call("compare", *arguments)
        assert code == EXIT_USER and err.startswith("error: ") and "Traceback" not in err
    scores = np.array([row["risk"] for row in rows_of(folder)])
    assert np.isfinite(scores).all()
