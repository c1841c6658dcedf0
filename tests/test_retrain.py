"""`riskforge retrain`: what true samples of missing contexts teach, fair arms, stored model, refusals, interruption.

The samples of the run are composed digits (`tests/composed.py`), so that what retraining should do is known.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from engine import cli
from engine.data.images import LabelledImage, digits
from engine.data.images.image_source import ImageSource
from engine.data.reading.corpus import open_run
from engine.data.stores.fresh_folder import fresh_folder
from engine.data.stores.opening import open_store
from engine.driver.progress import PlainDisplay
from engine.errors import EXIT_DRAINED, EXIT_USER, CorruptShardError, JobError, OutputError
from engine.job.parsing import parse_job
from engine.models import factories, program_description
from engine.models.addresses import resolve
from engine.models.classifier import Classifier, load_network
from engine.models.digests import model_digest
from engine.models.job_checks import check_addresses
from engine.models.trainable import load_trainable
from engine.studies.retrain.arms import choose_arms, draw_samples, make_arms
from engine.studies.retrain.finetune import predict
from engine.studies.retrain.image_tensors import read_generated, read_images
from engine.studies.retrain.options import RetrainOptions
from engine.studies.retrain.program import retrain
from engine.studies.retrain.results import Retrained
from engine.studies.samples import StudiedRun, is_plain, open_study
from tests.composed import HOLES, KNOWN, TARGET, composed_job, make_run
from tests.conftest import REPOSITORY
from tests.program_cases import FACTORY

RISKFORGE = str(Path(sys.executable).with_name("riskforge"))
CONTEXTS = [*KNOWN, *HOLES]
# What the target lacks in its holes is about 80 points; what nothing teaches it should stay so.
MIN_GAIN, MAX_DRIFT = 0.4, 0.15


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("retrain")


@pytest.fixture(scope="module")
def target(home) -> Path:
    """A copy of the target, that a test may change."""
    return Path(shutil.copytree(resolve(TARGET), home / "target"))


@pytest.fixture(scope="module")
def run(home, target) -> Path:
    """A finished run with stored rejected samples."""
    job = composed_job(home / "run", count=12)
    return make_run(job.model_copy(update={"models": job.models.model_copy(update={"target": str(target)})}))


def write_images(path: Path, split: str, contexts: list[str], num_sources: int) -> Path:
    """A parquet of composed digits, every source once in every context."""
    single, sources = digits.single_contexts(), digits.load_sources(split)
    texts = [digits.context_text(single, row) for row in range(len(single))]
    chosen = np.tile([texts.index(one) for one in contexts], num_sources)
    rows = np.repeat(np.arange(num_sources), len(contexts))
    drawn = digits.compose(sources, rows, single.take(chosen), rng=np.random.default_rng(5))
    table = pa.table(
        {
            "image": [png(PIL.Image.fromarray(pixels)) for pixels in drawn.images],
            "label": drawn.labels,
            "context": [texts[one] for one in chosen],
        }
    )
    pq.write_table(table, path)
    return path


def png(image: PIL.Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def test_set(home) -> Path:
    return write_images(home / "test.parquet", "test", CONTEXTS, 100)


@pytest.fixture(scope="module")
def small(home, test_set) -> RetrainOptions:
    """A study of a few seconds."""
    real = write_images(home / "real.parquet", "train", list(KNOWN), 60)
    return RetrainOptions(real=str(real), test=str(test_set), num_seeds=2, num_steps=5, batch_size=16)


def study(run: Path, options: RetrainOptions, output: Path, **changes: object) -> Retrained:
    return logged_study(run, options, output, **changes)[0]


def logged_study(run: Path, options: RetrainOptions, output: Path, **changes: object) -> tuple[Retrained, str]:
    """A study, and what it showed on its way."""
    log, changed = io.StringIO(), dataclasses.replace(options, **changes)  # type: ignore[arg-type]
    done = retrain(str(run), changed, display=PlainDisplay(log, every_seconds=0), folder=str(output))
    return done, log.getvalue()


@pytest.fixture(scope="module")
def studied(run, test_set, home) -> Retrained:
    """A study that is long enough to learn something."""
    options = RetrainOptions(
        real="digits:train-seen",
        test=str(test_set),
        calibrate="digits:validation",
        num_seeds=2,
        num_steps=40,
        mix=0.5,
        batch_size=32,
        learning_rate=1e-3,
    )
    return study(run, options, home / "studied")


def refusal(run: Path | str, options: RetrainOptions, output: Path | None = None, **changes: object) -> list[str]:
    """The lines with which a study is refused."""
    with pytest.raises(JobError) as refused:
        changed = dataclasses.replace(options, **changes)  # type: ignore[arg-type]
        retrain(str(run), changed, display=PlainDisplay(io.StringIO()), folder=str(output) if output else None)
    return refused.value.problems


# What it is for ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_true_samples_of_missing_contexts_repair_them_and_real_images_alone_do_not(studied):
    """The one property that the command exists for; labels or pixels that go astray anywhere on the way lose it."""
    rows = {row.context: row for row in studied.comparison.contexts}
    assert set(rows) == set(CONTEXTS) and {row.context for row in studied.comparison.contexts[:2]} == set(HOLES)
    for hole in HOLES:
        row = rows[hole]
        assert row.before.value < 0.5
        assert abs(row.mean("none") - row.before.value) < MAX_DRIFT and abs(row.mean("plain") - row.before.value) < 0.2
        assert min(row.mean("accepted"), row.mean("unfiltered")) > row.before.value + MIN_GAIN
    for known in KNOWN:
        assert rows[known].mean("accepted") > 0.85
    assert studied.comparison.overall.mean("accepted") > studied.comparison.overall.before.value + 0.1


@pytest.mark.slow
def test_the_weak_contexts_are_found_by_the_generated_samples(studied):
    """Errors on all attempts are counted, not on the stored or the accepted ones, which err by definition."""
    found = {row.context: row for row in studied.agreement.rows}
    assert set(found) == set(CONTEXTS) and studied.agreement.num_ranked == 5
    for hole in HOLES:
        assert 0.5 < found[hole].generated.value < 1 and found[hole].generated.low < found[hole].test.value
    for known in KNOWN:
        assert found[known].generated.value < 0.1
    # Where the plain samples stand in a context too, they count: nothing guided them.
    assert all(100 < row.num_generated <= 240 and row.num_test == 100 for row in found.values())
    assert studied.agreement.spearman > 0.5


@pytest.mark.slow
def test_all_arms_get_equal_numbers_of_samples(studied, run):
    """The smallest pool decides; the pools themselves are what the run's metadata says."""
    arms = studied.document["arms"]
    rows = pq.read_table(run / "metadata.parquet", columns=["request", "accepted"]).to_pylist()
    errors = [row for row in rows if row["request"] == "errors"]
    num_accepted = sum(row["accepted"] for row in errors)
    num_held_out = arms["held_out"]
    assert abs(num_held_out - 0.2 * num_accepted) < 0.5 and arms["available"]["accepted"] == num_accepted - num_held_out
    # Requests without a common seed group share no noise.
    assert arms["available"]["plain"] == 240 and arms["available"]["unfiltered"] == len(errors) - num_held_out
    assert arms["samples_of_each"] == num_accepted - num_held_out < 240 and not arms["left_out"]


@pytest.mark.slow
def test_the_kept_model_is_the_target_of_the_next_job(studied, home, small, test_set):
    """It loads where any target does, has a temperature of its own, scores as it did, and a run is made with it."""
    folder = studied.path / "model"
    kept = Classifier.load(str(folder))
    config = json.loads((folder / "config.json").read_text())
    assert kept.temperature == config["temperature"] == studied.document["temperature"]["used"] != 1.4773
    assert kept.labels == Classifier.load(TARGET).labels
    assert studied.document["model"]["digest"] == model_digest(str(folder))
    rows = pq.read_table(test_set).to_pylist()
    images = [PIL.Image.open(io.BytesIO(row["image"])).convert("RGB") for row in rows]
    right = kept.score(images).argmax(1).numpy() == np.array([row["label"] for row in rows])
    assert float(right.mean()) == studied.comparison.overall.accuracies["accepted"][0]
    job = composed_job(home / "next", count=1)
    job = job.model_copy(update={"models": job.models.model_copy(update={"target": str(folder)})})
    check_addresses(job)
    made = pq.read_table(make_run(job) / "metadata.parquet", columns=["temperature", "is_error"]).to_pylist()
    assert len(made) == 70 and sum(row["is_error"] for row in made) < 35
    # Of that run the model is the target, which a second study must not replace.
    with pytest.raises(OutputError, match="holds the run's target"):
        study(home / "next", small, studied.path)


# The command ---------------------------------------------------------------------------------------------------------


def call(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    """The command line in this process: exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["riskforge", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return (end.value.code or 0, *capsys.readouterr())


def test_equal_seeds_give_equal_figures_and_an_earlier_result_is_replaced(run, small, home, monkeypatch, capsys):
    """In a second process state, through the command line; all but the time is the same, as are the model's bytes."""
    output = home / "small"
    first = study(run, small, output)
    weights = (output / "model/model.safetensors").read_bytes()
    (output / "model/stale.txt").write_text("of the earlier result")
    before = torch.random.get_rng_state()
    options = ("--real", small.real, "--test", small.test, "--seeds", 2, "--steps", 5, "--batch-size", 16)
    code, out, _ = call(monkeypatch, capsys, "retrain", run, *options, "--output", output, "--json")
    assert code == 0 and torch.equal(before, torch.random.get_rng_state())
    printed, stored = json.loads(out), json.loads((output / "retrain.json").read_text())
    expected = json.loads(json.dumps(first.document))
    assert printed == stored and {name for name in stored if stored[name] != expected[name]} == {"timing"}
    assert (output / "model/model.safetensors").read_bytes() == weights
    assert sorted(one.name for one in (output / "model").iterdir()) == [
        "config.json", "model.safetensors", "preprocessor_config.json",
    ]  # fmt: skip
    assert not [one for one in home.iterdir() if one.name.startswith(".")]


def test_soft_labels_and_chosen_requests(run, small, home, monkeypatch, capsys):
    """What is printed for people; one request may be baseline and risky, and then nothing is filtered."""
    options = ("--real", small.real, "--test", small.test, "--seeds", 2, "--steps", 2, "--batch-size", 8)
    chosen = ("--risky", "baseline", "--labels", "soft", "--mix", "0.25", "--output", home / "soft")
    code, out, err = call(monkeypatch, capsys, "retrain", run, *options, *chosen)
    assert code == 0 and "soft labels are the hard ones" in err and "the target's; --calibrate DATA fits it" in out
    assert "small, bottom right" in out and "accepted - none, points" in out and "All test images: " in out
    assert "left out     unfiltered: no sample of baseline is rejected" in out
    assert "generated    192 samples in each of plain, accepted" in out and f"model        {home / 'soft/model'}" in out


def test_chosen_arms_and_protection(run, small, home, monkeypatch, capsys):
    """Each arm by name; one with a number of its own; what a protection keeps, and whose model is stored."""
    options = ("--real", small.real, "--test", small.test, "--seeds", 2, "--steps", 2, "--batch-size", 8)
    arms = ("entropy", "augment", "random:9", "unfiltered:9")
    chosen = [word for arm in arms for word in ("--arm", arm)]
    protect = ("--protect", "arithmetic", "--protect-weight", 0.25, "--output", home / "arms")
    code, out, _ = call(monkeypatch, capsys, "retrain", run, *options, *chosen, *protect)
    document = json.loads((home / "arms/retrain.json").read_text())
    assert code == 0 and list(document["overall"]["accuracies"]) == ["none", "entropy", "augment", "unfiltered:9"]
    assert document["model"]["arm"] == "unfiltered:9" and document["protection"]["strength"] == 0.25
    assert document["arms"]["samples"]["unfiltered:9"] == 9 < document["arms"]["samples"]["entropy"]
    # Without samples nothing is added to the old weights.
    before = document["overall"]["before"]["value"]
    assert document["overall"]["accuracies"]["none"] == [before, before]
    changes = {(change["arm"], change["base"]): change for change in document["changes"]}
    assert len(changes) == 7 and changes["augment", "none"]["others"] == changes["augment", "before"]["others"]
    assert changes["augment", "none"]["weak"] == sorted(HOLES)
    assert "generated    9 samples in each of unfiltered:9" in out and "unfiltered:9 - none, points" in out
    assert "protection   arithmetic, weight 0.25, in every arm" in out and "unfiltered:9 less before: mean " in out
    assert max(map(len, out.split("Changes in points")[1].split("Errors of")[0].splitlines()[1:])) <= 100


def test_the_most_uncertain_samples_are_those_that_the_target_says(run):
    """Of accepted and rejected ones alike, as many as are accepted, without held-out ones; no seed draws others."""
    source = open_study(str(run))
    target = load_trainable(source.job.models.target, "cpu")
    display = PlainDisplay(io.StringIO())
    generated = read_generated(
        source, ["baseline", "errors"], target.preprocessing, num_classes=10, soft=False, display=display
    )
    names = ("entropy", "entropy:5", "accepted", "random")
    arms = make_arms(source, generated, ["baseline"], ["errors"], 0.2, names, target.network)
    log_p = torch.log_softmax(predict(target.network, generated.samples.pixels), 1)
    entropy = -(log_p.exp() * log_p).sum(1)
    candidates = arms.pools["unfiltered"]
    chosen = arms.pools["entropy"]
    assert len(chosen) == len(arms.pools["accepted"]) == arms.counts["entropy"] and set(chosen.tolist()) < set(
        candidates.tolist()
    )
    assert entropy[chosen].min() >= entropy[[row for row in candidates.tolist() if row not in chosen.tolist()]].max()
    assert arms.pools["entropy:5"].tolist() == chosen[:5].tolist()
    assert 0 < sum(generated.accepted[chosen].tolist()) < len(chosen)
    drawn = [draw_samples(generated, arms, "entropy", seed) for seed in (0, 1)]
    assert drawn[0] is not None and drawn[1] is not None
    assert torch.equal(drawn[0].pixels.sort(0).values, drawn[1].pixels.sort(0).values)
    assert draw_samples(generated, arms, "none", 0) is None and arms.names == ("none", *arms.pools)


def test_images_of_one_origin_are_known():
    """Of an image that names none, its own pixels are its origin: the same image twice is one."""
    black, white = PIL.Image.new("RGB", (32, 32)), PIL.Image.new("RGB", (32, 32), (255, 255, 255))
    given = [("a", black, "scan"), ("b", white, "scan"), ("c", white, ""), ("d", white, ""), ("e", black, "")]
    items = [partial(LabelledImage, name, image, 0, (), False, origin) for name, image, origin in given]
    source = ImageSource("some images", len(items), (lambda: iter(items),))
    preprocessing = load_trainable(TARGET, "cpu").preprocessing
    read = read_images(source, "--test", "x", preprocessing, PlainDisplay(io.StringIO()))
    one, other, third, same, last = read.without(torch.ones(5, dtype=torch.bool), "").origins
    assert one == other and third == same and len({one, third, last}) == 3


def test_joint_prompts_have_no_hard_label_and_tell_of_no_context(run, small, home):
    """Images between two classes trained as one of them would make the plain arm look worse than it is."""
    job = parse_job(json.loads((run / "manifest.json").read_text())["job"])
    joint = job.requests[0].model_copy(update={"name": "joint", "classes": None, "boundary": ("three", "eight")})
    assert is_plain(job.requests[0]) and not is_plain(joint)
    mixed = job.model_copy(update={"requests": (*job.requests, joint)})
    study_of = StudiedRun(store=open_store(str(run)), job=mixed, plan_digest="", target_digest="", commits=())
    with pytest.raises(JobError, match="joint prompt"):
        choose_arms(study_of, dataclasses.replace(small, plain=("joint",)))
    assert choose_arms(study_of, dataclasses.replace(small, plain=("joint",), labels="soft")) == (["joint"], ["errors"])


def test_unusable_images_and_overlap_are_told(run, small, home):
    """A foreign class and a damaged file take nothing else with them; test images among the real ones are counted."""
    folder = home / "folder"
    table = pq.read_table(small.real).to_pylist()[:20]
    for number, row in enumerate(table):
        place = folder / str(row["label"])
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.png").write_bytes(row["image"])
    (folder / "cat").mkdir()
    (folder / "cat/1.png").write_bytes(table[0]["image"])
    (folder / "0/broken.png").write_bytes(b"no image")
    done = study(run, small, home / "told", test=str(folder), num_steps=1)
    told = done.document["data"]
    assert told["test"]["images"] == 20 and told["test"]["num_unusable"] == 2 and done.document["images_in_both"] == 20
    assert {one["name"] for one in told["test"]["unusable"]} == {"cat/1.png", "0/broken.png"}
    assert done.findings[-1].startswith("Not independent: 20") and not done.comparison.contexts
    shutil.rmtree(folder / "0")
    for one in folder.glob("[1-9]"):
        shutil.rmtree(one)
    assert refusal(run, small, home / "not", test=str(folder))[0].startswith(f"--test: '{folder}' has no usable image")


def test_images_without_finite_logits_are_left_out_and_the_target_is_named(run, small, home, monkeypatch):
    """They would count as class 0; where there are no others, the study is refused."""
    limit, seen = [-9.0], []

    def spoil(module, _args, given, output):
        seen.append(given["pixel_values"].mean((1, 2, 3)))
        bright = seen[-1] > limit[0]
        output.logits = output.logits.masked_fill(bright[:, None] & (not module.training), torch.nan)
        return output

    def load(address):
        network = load_network(address)
        network.register_forward_hook(spoil, with_kwargs=True)
        return network

    monkeypatch.setattr("engine.models.trainable.load_network", load)
    reason = r"models\.target '.*target' gives logits that are not finite"
    assert re.match(rf"RUN: its {reason}.* for all \d+ samples of the run", refusal(run, small, home / "none")[0])
    limit[0] = float(torch.cat(seen).median())
    done, log = logged_study(run, small, home / "some", num_steps=1)
    for option, told in done.document["data"].items():
        assert told["num_unusable"] and told["images"] and re.match(reason, told["unusable"][0]["reason"])
        assert re.search(rf"{told['num_unusable']} of \d+ images of --{option} are left out: {reason}", log)


def test_without_rejected_images_there_is_no_unfiltered_arm(home, target, small):
    """The reason names the job's key; nor is there a plain arm without plain requests."""
    job = composed_job(home / "filtered", count=2, store_rejected=False)
    made = make_run(job.model_copy(update={"requests": job.requests[1:]}))
    done, log = logged_study(made, small, home / "filtered-out", num_steps=3)
    assert re.search(r"arm accepted, seed 2 of 2, step 2/3, ETA \d+ s", log)
    assert "arm plain is left out: no request has method prompt" in log
    left_out = done.document["arms"]["left_out"]
    assert set(left_out) == {"plain", "unfiltered"} and "output.store_rejected: true" in left_out["unfiltered"]
    assert list(done.comparison.overall.accuracies) == ["none", "accepted"]
    # Also before the run is closed, when there is no manifest yet.
    (made / "manifest.json").unlink()
    assert study(made, small, home / "filtered-out", num_steps=3).comparison == done.comparison


# Targets of other kinds ----------------------------------------------------------------------------------------------


@pytest.fixture
def own_nets(home, monkeypatch) -> Path:
    """A factory that can be imported, forgotten afterwards."""
    folder = home / "own"
    folder.mkdir(exist_ok=True)
    (folder / "retrained_nets.py").write_text(FACTORY)
    monkeypatch.setattr(program_description, "_KNOWN", {})
    monkeypatch.setattr(factories, "_FOLDERS", [])
    monkeypatch.setattr(sys, "path", [*sys.path])
    factories.add_import_folders([str(folder)])
    return folder


def test_a_factory_is_fine_tuned_and_its_weights_are_a_target(own_nets, small, home):
    """Named in a job, tuned again, compared with the run pair by pair; the held-out samples have a row."""
    job = composed_job(home / "of-factory", count=4)
    job = job.model_copy(update={"models": job.models.model_copy(update={"target": "retrained_nets:net"})})
    made = make_run(job)
    done = study(made, small, home / "tuned", num_steps=2, learning_rate=0.01)
    folder = done.path / "model"
    assert sorted(path.name for path in folder.iterdir()) == ["factory.json", "model.safetensors"]
    kept, plain = Classifier.load(str(folder)), Classifier.load("retrained_nets:net")
    images = [PIL.Image.new("RGB", (32, 32), (40 * row, 200, 20)) for row in range(4)]
    assert kept.temperature == 2.0 and kept.labels == plain.labels
    assert not torch.allclose(kept.score(images), plain.score(images), atol=1e-4)
    assert done.document["model"]["digest"] == model_digest(str(folder)) != model_digest("retrained_nets:net")
    row, rescored = done.document["held_out"], done.document["rescore"]
    assert row["num_images"] == done.document["arms"]["held_out"] > 0 and row["before"]["value"] == 0.0
    assert rescored["target"] == str(folder) and rescored["folder"] == "rescored" and rescored["comparison"]["requests"]
    manifest = json.loads((done.path / "rescored/manifest.json").read_text())
    assert manifest["models"]["target"]["address"] == manifest["job"]["models"]["target"] == str(folder)
    # A job names the folder; its run is the next study's, whose result has the same factory.
    job = job.model_copy(
        update={"models": job.models.model_copy(update={"target": str(folder)}),
                "output": job.output.model_copy(update={"uri": str(home / "of-tuned")})}
    )  # fmt: skip
    check_addresses(job)
    again = study(make_run(job), small, home / "tuned-again", num_steps=1)
    assert json.loads((again.path / "model/factory.json").read_text())["factory"] == "retrained_nets:net"


def test_weights_that_a_factory_does_not_take_are_refused(own_nets, tmp_path):
    """Other classes, a damaged document or file, another network: each names what to restore."""
    trained = load_trainable("retrained_nets:net", "cpu")
    trained.store(trained.network, tmp_path / "model", 1.5)
    address, document = str(tmp_path / "model"), tmp_path / "model/factory.json"
    text = document.read_text()
    assert Classifier.load(address).temperature == 1.5 and model_digest(address) != model_digest("retrained_nets:net")
    for changed, message in (
        (text.replace("three", "tree"), "has other classes"),
        ("{", "cannot be read"),
        (text.replace("1.5", "-1"), "does not name a factory"),
        (text.replace("retrained_nets:net", "../x"), "does not name a factory"),
    ):
        document.write_text(changed)
        with pytest.raises(JobError, match=message):
            Classifier.load(address)
    document.write_text(text)
    (tmp_path / "model/model.safetensors").write_bytes(b"torn")
    with pytest.raises(JobError, match=r"does not hold the weights of 'retrained_nets:net'.*restore the factory"):
        Classifier.load(address)


def test_what_timm_saved_is_stored_as_timm_stores_it(tmp_path):
    """The network of the next job, and of timm itself."""
    timm = pytest.importorskip("timm")
    network = timm.create_model("test_resnet", pretrained=False, num_classes=3)
    named = {"label_names": ["cat", "dog", "ship"]}
    timm.models.save_for_hf(network, str(tmp_path / "a"), model_config=named, safe_serialization=True)
    trained = load_trainable(str(tmp_path / "a"), "cpu")
    with torch.no_grad():
        for weight in trained.network.parameters():
            weight.mul_(1.1)
    trained.store(trained.network, tmp_path / "b", 1.5)
    pixels = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    again = timm.create_model(f"local-dir:{tmp_path / 'b'}", pretrained=True).eval()
    assert torch.allclose(again(pixels), trained.network(pixels), atol=1e-4)
    assert Classifier.load(str(tmp_path / "b")).temperature == 1.5


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_seeds": 1}, "--seeds: 1 is too few"),
        ({"num_steps": 0}, "--steps: 0 trains nothing"),
        ({"num_seeds": 10**6}, "--seeds: 1000000 is too many"),
        ({"num_steps": 10**12}, "--steps: 1000000000000 is too many"),
        ({"mix": 0.0}, "--mix: 0 is not between 0 and 1"),
        ({"mix": float("nan")}, "--mix: nan is not between 0 and 1"),
        ({"mix": 0.01}, "--mix: 0.01 of a batch of 16 leaves 0 generated"),
        ({"mix": 0.999}, "--mix: 0.999 of a batch of 16 leaves 16 generated"),
        ({"batch_size": 1}, "--batch-size: 1 is not between 2"),
        ({"learning_rate": -1.0}, "--learning-rate: -1 is not a positive number"),
        ({"learning_rate": float("inf")}, "--learning-rate: inf is not a positive number"),
        ({"arms": ("acepted",)}, "--arm: there is no arm 'acepted'; did you mean 'accepted'?"),
        ({"arms": ("accepted:100000",)}, "--arm: 'accepted:100000': the run has "),
        ({"arms": ("none",)}, "--arm: none is trained anyway"),
        ({"protect": "averge"}, "--protect: 'averge' is none of"),
        ({"protect": "average", "protect_weight": 1.5}, "--protect-weight: 1.5 is not above 0 and up to 1"),
        ({"protect_weight": 0.5}, "--protect-weight: 0.5 has no meaning without --protect"),
        ({"pgd_eps": 0.0}, "--pgd-eps: 0 is not above 0"),
        ({"pgd_steps": 0}, "--pgd-steps: 0 is not between 1 and"),
        ({"plain": ("base",)}, "--plain: the run has no request 'base'; did you mean 'baseline'?"),
        ({"risky": ("eror", "baseline")}, "--risky: the run has no request 'eror'; did you mean 'errors'?"),
        ({"real": "digits:trian"}, "--real: there is no 'digits:trian'; did you mean 'digits:train'?"),
        ({"test": "/nowhere"}, "--test: there is no '/nowhere'"),
        ({"learning_rate": 1e30}, "--learning-rate: 1e+30 makes the loss grow beyond all numbers"),
    ],
)
def test_bad_options_are_named_with_their_value(run, small, home, change, message):
    """Each problem by its option, before anything is written."""
    assert refusal(run, small, home / "never", **change)[0].startswith(message)
    assert not (home / "never").exists()


def test_all_bad_values_come_at_once(small, home):
    """A line each, before the run is even looked at."""
    assert len(refusal(home / "no-run", small, num_seeds=0, num_steps=-1, mix=2.0, learning_rate=0.0)) == 4


def test_what_is_no_run_is_refused(run, small, home, tmp_path):
    """No folder, no run in it, no shard, a manifest that is none: each with what to do."""
    assert refusal(home / "no-run", small)[0].startswith("RUN: there is no folder")
    assert "holds no run" in refusal(tmp_path, small)[0]
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    tar = min(copy.glob("shards/*.tar"))
    tar.write_bytes(tar.read_bytes()[:3000])
    with pytest.raises(CorruptShardError, match=tar.name):
        study(copy, small, tmp_path / "out")
    shutil.rmtree(copy / "_state/commits")
    assert "has no committed shard yet" in refusal(copy, small)[0]
    for text, error in (("{", CorruptShardError), ("[]", CorruptShardError), ('{"job": {}}', JobError)):
        (copy / "manifest.json").write_text(text)
        with pytest.raises(error, match="cannot be read"):
            study(copy, small, tmp_path / "out")


def test_a_changed_target_is_refused(run, target, small):
    """Scores in the run are of another model; both digests are named."""
    config = target / "config.json"
    text = config.read_text()
    try:
        config.write_text(text + "\n")
        lines = refusal(run, small)
        assert "has changed since" in lines[0] and model_digest(str(target)) in lines[0]
        config.rename(target / "away.json")
        assert refusal(run, small)[0].startswith("RUN: its target")
    finally:
        (target / "away.json").unlink(missing_ok=True)
        config.write_text(text)


def test_nothing_accepted_is_refused(home, small):
    """A rule that nothing meets leaves nothing to study; a request without any is asked for."""
    job = composed_job(home / "strict", count=1)
    strict = job.requests[1].model_copy(update={"accept": {"risk": ">= 900"}, "classes": (0,), "name": "strict"})
    made = make_run(job.model_copy(update={"requests": (strict,)}))
    assert refusal(made, small)[0].startswith("RUN: no sample of strict is accepted so far")


def test_too_few_real_images_are_refused(run, small, home):
    """A handful of images is no training set, and fewer than a hundred fit no temperature."""
    few = write_images(home / "few.parquet", "train", [""], 5)
    assert "has 5 usable images; give 20 or more" in refusal(run, small, home / "never", real=str(few))[0]
    assert "--calibrate: " in (said := refusal(run, small, home / "never", calibrate=str(few))[0]) and "100" in said


def test_a_foreign_folder_is_left_alone(run, target, small, tmp_path):
    """Files of somebody else, the run itself and its target are not replaced; an empty folder is taken."""
    (tmp_path / "thesis.tex").write_text("years of work")
    for place, message in (
        (tmp_path, "thesis.tex"), (run, "holds files"), (target, "holds files"), (tmp_path / "thesis.tex", "is a file"),
    ):  # fmt: skip
        with pytest.raises(OutputError, match=message):
            study(run, small, place)
    (tmp_path / "thesis.tex").rename(tmp_path / "retrain.json")
    with pytest.raises(OutputError, match="holds files"):
        study(run, small, tmp_path)


def test_the_command_ends_with_the_code_of_a_wrong_line(run, small, monkeypatch, capsys):
    """No traceback, also where the option's value is refused by the parser."""
    code, _, err = call(monkeypatch, capsys, "retrain", run, "--real", small.real, "--test", small.test, "--seeds", "1")
    assert code == EXIT_USER and err.splitlines()[-1].startswith("error: --seeds: 1") and "Traceback" not in err


# Interruption --------------------------------------------------------------------------------------------------------


def test_a_failed_build_leaves_what_was_there(tmp_path):
    """An error while writing, or a file system that refuses the last step, keeps the earlier result whole."""
    home = tmp_path / "result"
    with fresh_folder(home) as built:
        (built / "a").write_text("first")
    with pytest.raises(KeyboardInterrupt), fresh_folder(home) as built:
        (built / "a").write_text("second")
        raise KeyboardInterrupt
    assert (home / "a").read_text() == "first" and list(tmp_path.iterdir()) == [home]
    with fresh_folder(home) as built:
        (built / "b").write_text("third")
    assert [one.name for one in home.iterdir()] == ["b"] and list(tmp_path.iterdir()) == [home]


@pytest.mark.slow
def test_results_go_to_an_address(run, small, s3_server, monkeypatch, capsys):
    """As they do to a folder: twice, and the new model is a target once it is copied."""
    uri, line = "s3://bucket/retrained", ["--real", small.real, "--test", small.test, "--seeds", "2", "--steps", "2"]
    for _ in range(2):
        code, out, err = call(monkeypatch, capsys, "retrain", run, *line, "--output", uri)
        assert code == 0 and f"model        {uri}/model" in out, err
    store = open_store(uri)
    assert set(store.list()) == {"retrain.json", "model", "rescored"}
    assert model_digest(str(store.fetch("model"))) == json.loads(store.read("retrain.json"))["model"]["digest"]
    assert open_run(f"{uri}/rescored").runs[0].is_rescored


@pytest.mark.slow
def test_interrupted_it_ends_with_75_and_leaves_nothing(run, small, home):
    """A real process and a real signal, in the middle of the training."""
    output = home / "interrupted"
    options = ["--real", small.real, "--test", small.test, "--steps", "100000", "--output", str(output)]
    process = subprocess.Popen(
        [RISKFORGE, "retrain", str(run), *options],
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        # A shell's background job ignores SIGINT, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr is not None
    lines = iter(process.stderr.readline, "")
    assert any("seed 1 of 5, step " in line for line in lines)
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(timeout=300) == EXIT_DRAINED and "Traceback" not in rest
    assert "nothing is stored" in rest and not output.exists()
    assert not [one for one in home.iterdir() if one.name.startswith(".")]
