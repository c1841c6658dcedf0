"""From labelled images to a conditioning artefact: every kind of source, hostile files, real models, equal bytes."""

from __future__ import annotations

import errno
import io
import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import torch

from engine import cli
from engine.commands.jobfile import read_job
from engine.data.images import ImageSource, LabelledImage, ReadResult, open_images
from engine.data.stores import artefact_folders
from engine.driver.progress import PlainDisplay
from engine.errors import EXIT_DRAINED, JobError, OutputError
from engine.generation import artefact
from engine.generation.artefact import load_conditioning, save_conditioning
from engine.methods.conditioning.gaussians import ClassMoments
from engine.methods.temperature import fit_temperature
from engine.models.classifier import Classifier
from engine.models.clip import Clip
from engine.models.digests import image_encoder_digest
from engine.models.job_checks import check_addresses
from engine.studies.prepare.encoders import encoder_address
from engine.studies.prepare.fitting import fit_conditioning
from engine.studies.prepare.folders import artefact_folder
from engine.studies.prepare.observation import GPU_ROWS, Observations, Observer, observe
from engine.studies.prepare.program import prepare_conditioning
from tests.conftest import REPOSITORY
from tests.prepare_cases import (
    LABELS,
    NUM_IMAGES,
    QUICKSTART,
    Sample,
    drawn_digits,
    plain_image,
    prepare,
    same_bytes,
    write_folder,
    write_run,
    write_tables,
)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return drawn_digits(NUM_IMAGES)


@pytest.fixture(scope="module")
def folder(samples, tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("folder"), samples)


@pytest.fixture(scope="module")
def tars(samples, tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"), samples)


@pytest.fixture(scope="module")
def table(samples, tmp_path_factory) -> Path:
    return write_tables(tmp_path_factory.mktemp("parquet"), samples)


def source_of(read: Callable[[], Iterator[ReadResult]]) -> ImageSource:
    """A source of findings that are there already."""
    return ImageSource("test", None, (lambda: (partial(lambda one: one, found) for found in read()),))


@pytest.fixture(scope="module")
def prepared(folder, tmp_path_factory):
    return prepare(folder, tmp_path_factory.mktemp("artefacts"))


def test_all_kinds_give_the_same_artefact(prepared, tars, table, tmp_path, s3_server):
    """Byte for byte: order, names and files of the images have no part in it, nor has its place, an address or not."""
    shutil.copytree(prepared.path, tmp_path / prepared.path.name)
    for data, home in ((tars, "s3://bucket/artefacts"), (table, tmp_path)):
        other = prepare(data, home)
        assert other.address == f"{home}/{prepared.path.name}" and same_bytes(other.path, prepared.path)
        assert other.was_there == (data is table) and not prepared.was_there
    assert len(list(tmp_path.iterdir())) == 1


def test_the_artefact_says_what_plain_models_say(prepared, samples, classifier):
    """Means, spreads, counts and errors against a direct computation, image by image."""
    loaded = load_conditioning(prepared.path)
    clip = Clip.load("zoo:digits/clip")
    embeds = torch.cat([clip.image_embeds([image]) for image, _ in samples]).double()
    wrong = torch.tensor([int(classifier.score([image]).argmax()) != index for image, index in samples])
    classes = torch.tensor([index for _, index in samples])
    assert isinstance(loaded.statistics, ClassMoments)
    for index in range(10):
        rows = embeds[classes == index]
        assert torch.allclose(loaded.statistics.mean[index], rows.mean(0), atol=1e-5)
        variance = loaded.statistics.squares[index] / loaded.statistics.count[index]
        assert torch.allclose(variance, rows.var(0, correction=0), atol=1e-5)
    assert loaded.counts == tuple(torch.bincount(classes).tolist())
    assert loaded.num_errors == tuple(torch.bincount(classes[wrong], minlength=10).tolist())
    assert 0 < sum(loaded.num_errors) < NUM_IMAGES
    assert loaded.temperature.current == classifier.temperature
    logits = torch.cat([classifier.score([image]) for image, _ in samples])
    nll = float(torch.nn.functional.cross_entropy(logits, classes))
    assert loaded.temperature.current_nll == pytest.approx(nll, abs=1e-4)
    assert loaded.temperature.fitted_nll <= loaded.temperature.current_nll


def test_an_artefact_is_read_as_it_was_written(prepared):
    """Digest, draws, predictor and evaluation."""
    loaded, made = load_conditioning(prepared.path), prepared.conditioning
    assert loaded.digest == made.digest and prepared.path.name == f"conditioning-{loaded.digest[:12]}"
    draws = [one.distributions().draw(3, torch.Generator().manual_seed(1)) for one in (loaded, made)]
    assert torch.equal(*draws)
    assert loaded.fit.predictor is not None and made.fit.predictor is not None
    assert torch.equal(loaded.fit.predictor.confidence(draws[0][None]), made.fit.predictor.confidence(draws[0][None]))
    assert loaded.fit.evaluation == made.fit.evaluation and loaded.temperature == made.temperature
    assert loaded.models["target"]["address"] == "zoo:digits/classifier" and loaded.models["encoder"]["digest"]


def test_mixtures_are_stored_as_well(folder, prepared, tmp_path):
    """Another digest, the same predictor; the number of components is kept."""
    mixed = prepare(folder, tmp_path, components=3)
    loaded = load_conditioning(mixed.path)
    assert loaded.kind == "mixtures" and mixed.path.name != prepared.path.name
    assert loaded.options["statistics"]["components"] == 3 and loaded.digest == mixed.conditioning.digest
    assert loaded.fit.verdict == prepared.conditioning.fit.verdict
    assert loaded.distributions().draw(0, torch.Generator().manual_seed(0)).shape == (64,)


def test_unusable_images_are_listed_and_change_nothing_else(folder, prepared, tmp_path):
    """Statistics are those of the good images; the list has every bad one."""
    data = shutil.copytree(folder, tmp_path / "data")
    for number in range(25):
        (data / "one" / f"bad-{number:02d}.png").write_bytes(b"bad")
    worse = prepare(data, tmp_path / "home")
    document = json.loads((worse.path / artefact.DOCUMENT).read_text())
    assert [one["name"] for one in document["unusable"]] == [f"one/bad-{number:02d}.png" for number in range(25)]
    statistics = [one / artefact.STATISTICS for one in (worse.path, prepared.path)]
    assert statistics[0].read_bytes() == statistics[1].read_bytes()
    assert document["images_digest"] == prepared.conditioning.images_digest


def test_the_name_does_not_depend_on_the_number_of_threads():
    """Sums of another order moved the predictor in its last digits, and with them the digest."""
    generator, names = torch.Generator().manual_seed(0), set()
    embeds, classes = torch.randn(3000, 64, generator=generator), torch.arange(3000) % 10
    seen = Observations(
        embeds=embeds,
        logits=torch.nn.functional.one_hot(classes, 10) * 2.0 + torch.randn(3000, 10, generator=generator),
        classes=classes,
        temperature=1.0,
        images_digest="0" * 32,
        unusable=(),
    )
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        names.add(fit_conditioning(seen, LABELS, {}, 3).digest)
    torch.set_num_threads(before)
    assert len(names) == 1


def test_prepare_does_not_ask_of_the_artefacts_that_it_makes(folder, prepared, tmp_path):
    """A job whose artefact is missing, damaged or one of several can be prepared; it could not be mended otherwise."""
    home = tmp_path / "artefacts"
    for name in ("conditioning-a", "conditioning-b"):
        (home / name).mkdir(parents=True)
        (home / name / "conditioning.json").write_text("{}")
    unclip = {"diffusion": "zoo:digits/stable-unclip", "conditioning": str(home), "method": "prompt", "count": 1}
    requests = [{"name": "a", "classes": "all", **unclip}]
    with pytest.raises(JobError, match="holds 2 artefacts"):
        check_addresses(read_job(QUICKSTART, [("requests", requests)]))
    job = read_job(QUICKSTART, [("runtime.device", "cpu"), ("requests", requests)])
    made = prepare_conditioning(job, str(folder), display=PlainDisplay(io.StringIO()), folder=str(home))
    assert made.path.parent == home and made.encoder == "image encoder of zoo:digits/stable-unclip"


def test_classes_without_a_spread_are_said(tmp_path, samples):
    """One image, or none: the artefact is made, and a note names the class."""
    few = [*[one for one in samples if one[1] in (3, 8)][:30], next(one for one in samples if one[1] == 5)]
    made = prepare(write_folder(tmp_path / "data", few), tmp_path).conditioning
    notes = made.notes()
    assert len(notes) == 8 and any("class 5 ('five') has one image" in note for note in notes)
    document = json.loads(next(tmp_path.glob("conditioning-*/conditioning.json")).read_text())
    assert document["notes"] == notes


def test_values_that_are_not_finite_lose_an_image_and_no_more(samples, classifier):
    """An encoder that overflows on one image: named, and left out of everything."""

    class Overflowing:
        def image_embeds(self, images: list[PIL.Image.Image]) -> torch.Tensor:
            means = torch.tensor([np.asarray(one).mean() for one in images])
            return torch.where(means == 0, torch.inf, means)[:, None].expand(-1, 4).float()

    def read():
        yield LabelledImage("black", plain_image(size=(32, 32)), 0)
        yield from (LabelledImage(str(row), image, index) for row, (image, index) in enumerate(samples[:20]))

    observer = Observer(source_of(read), classifier, Overflowing(), 16)
    seen = observe(observer, "test", PlainDisplay(io.StringIO()))
    assert [one.name for one in seen.unusable] == ["black"] and len(seen.classes) == 20
    assert torch.isfinite(seen.embeds).all() and seen.errors.dtype == torch.bool


def test_shapes_of_all_kinds_go_through_the_models(classifier):
    """The smallest and the longest that are let in, among others, in one batch."""
    shapes = [(4, 4), (4, 200), (200, 4), (33, 31), (300, 500), (5, 4)]

    def read():
        yield from (LabelledImage(str(shape), plain_image(size=shape), 0) for shape in shapes)

    observer = Observer(source_of(read), classifier, Clip.load("zoo:digits/clip"), 16)
    seen = observe(observer, "test", PlainDisplay(io.StringIO()))
    assert len(seen.classes) == len(shapes) and not seen.unusable


def test_progress_is_told_in_plain_lines(folder, classifier):
    """How many of how many; batches of a GPU's size give the same figures."""
    stream = io.StringIO()
    source, clip = open_images(str(folder), LABELS), Clip.load("zoo:digits/clip")
    display = PlainDisplay(stream, every_seconds=0.0)
    seen = observe(Observer(source, classifier, clip, GPU_ROWS), str(folder), display)
    assert f"/{NUM_IMAGES} images, " in stream.getvalue() and "ETA" in stream.getvalue()
    assert len(seen.classes) == NUM_IMAGES


def test_the_space_of_a_stable_unclip_pipeline_is_that_of_its_own_encoder(folder, prepared, tmp_path):
    """An encoder that says twice of what CLIP says: the statistics are twice CLIP's, and its digest is on record.

    That the encoder of the zoo's pipeline is CLIP's own would hide which of the two was asked.
    """
    pipeline = Path(shutil.copytree(REPOSITORY / "engine/zoo/digits/stable-unclip", tmp_path / "unclip"))
    weights = pipeline / "image_encoder/model.safetensors"
    doubled = safetensors.torch.load_file(weights)
    doubled["visual_projection.weight"] *= 2
    safetensors.torch.save_file(doubled, weights, metadata={"format": "pt"})
    later = {"name": "a", "method": "prompt", "classes": "all", "count": 1, "conditioning": {"artefact": "later"}}
    made = prepare(folder, tmp_path / "home", changes=[("models.diffusion", str(pipeline)), ("requests", [later])])
    ours, clips = made.conditioning, prepared.conditioning
    assert torch.equal(ours.statistics.mean, 2 * clips.statistics.mean)
    assert ours.models["encoder"] == {"address": str(pipeline), "digest": image_encoder_digest(str(pipeline))}
    assert clips.models["encoder"]["address"] == "zoo:digits/clip"
    assert made.encoder == f"image encoder of {pipeline}" and prepared.encoder == "zoo:digits/clip"


def test_the_encoder_is_that_of_the_first_pipeline_that_has_one():
    """Of the job, else of its first such request; one of the hub that is not here is known by its request."""
    unclip = {"name": "b", "method": "prompt", "classes": "all", "count": 1, "conditioning": {"artefact": "later"}}
    plain = {"name": "a", "method": "prompt", "classes": "all", "count": 1}
    for requests, encoder in (
        ([plain], "zoo:digits/clip"),
        ([plain, unclip | {"diffusion": "zoo:digits/stable-unclip"}], "zoo:digits/stable-unclip"),
        ([plain, unclip | {"diffusion": "somebody/pipeline-of-the-hub"}], "somebody/pipeline-of-the-hub"),
    ):
        assert encoder_address(read_job(QUICKSTART, [("requests", requests)])) == encoder


@pytest.mark.parametrize("name", [artefact.STATISTICS, artefact.DOCUMENT])
def test_a_changed_artefact_is_refused(prepared, tmp_path, name):
    """A bit anywhere, in either file, a file that is missing; and it is not taken for the one that is to be stored."""
    home = shutil.copytree(prepared.path, tmp_path / prepared.path.name)
    data = bytearray((home / name).read_bytes())
    for place in range(0, len(data), max(1, len(data) // 23)):
        changed = bytearray(data)
        changed[place] ^= 4
        (home / name).write_bytes(changed)
        with pytest.raises(JobError, match="riskforge prepare"):
            load_conditioning(home)
    with pytest.raises(OutputError, match="damaged; remove it"):
        save_conditioning(prepared.conditioning, tmp_path)
    (home / name).unlink()
    with pytest.raises(JobError, match="is not a conditioning artefact"):
        load_conditioning(home)


@pytest.mark.parametrize("document", ["[]", "{}", "{", '"\\ud800"', '{"schema_version": 2}', '{"schema_version": 1}'])
def test_documents_of_something_else_are_refused(tmp_path, document):
    """With one line each."""
    (tmp_path / artefact.STATISTICS).write_bytes(b"")
    (tmp_path / artefact.DOCUMENT).write_text(document)
    with pytest.raises(JobError, match="riskforge prepare"):
        load_conditioning(tmp_path)


def test_a_full_disk_leaves_nothing_behind(prepared, tmp_path, monkeypatch):
    """The message names path and remedy; no folder that could be taken for an artefact."""

    def full(path: Path, data: bytes) -> None:
        path.write_bytes(data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(artefact_folders, "_write", full)
    with pytest.raises(OutputError, match="the disk is full"):
        save_conditioning(prepared.conditioning, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_refused_before_the_pass(tmp_path, folder):
    """A file in its place."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"--output: .*file is a file"):
        prepare(folder, tmp_path / "file/inside")


def test_artefacts_go_beside_the_output():
    """Not into it: an output holds a run and nothing else."""
    job = read_job(QUICKSTART, [("output.uri", "/data/runs/night")])
    assert artefact_folder(job) == Path("/data/runs/night-conditioning")


def test_the_fitted_temperature_is_one_that_the_target_can_be_given(folder, prepared, tmp_path):
    """Written into config.json it is what the next pass finds, and nothing is left to gain."""
    target = Path(shutil.copytree(REPOSITORY / "engine/zoo/digits/classifier", tmp_path / "target"))
    config = json.loads((target / "config.json").read_text())
    fitted = prepared.conditioning.temperature.fitted
    (target / "config.json").write_text(json.dumps(config | {"temperature": fitted}))
    source = open_images(str(folder), LABELS)
    again = Classifier.load(str(target))
    observer = Observer(source, again, Clip.load("zoo:digits/clip"), 16)
    seen = observe(observer, "", PlainDisplay(io.StringIO()))
    fit = fit_temperature(seen.logits.double() * fitted, seen.classes, again.temperature)
    assert fit.fitted == pytest.approx(fitted, rel=1e-3) and "as good as any" in fit.verdict


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no '.*data'; give class folders"),
        ({}, "has no image .read as a folder by class.; give class folders"),
        ({"cat/a.png": b""}, "has no usable image .read as a folder by class.: cat/a.png: 'cat' is not a class"),
        ({"a.tar": b""}, "has no usable image .read as WebDataset tars.: a.tar: cut short"),
        ({"a.parquet": b""}, "has no usable image .read as parquet.: a.parquet: cannot be read"),
    ],
)
def test_data_without_a_usable_image_is_refused(tmp_path, content, message):
    """Naming the path, what was found and what was looked for; nothing is written."""
    for name, data in (content or {}).items():
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes(data)
    if content is not None:
        (tmp_path / "data").mkdir(exist_ok=True)
    with pytest.raises(JobError, match=message):
        prepare(tmp_path / "data", tmp_path / "home")
    assert not (tmp_path / "home").exists()


# The command ---------------------------------------------------------------------------------------------------------


def test_the_command_tells_what_it_found(call, folder, tmp_path):
    """A table, what was left out, the verdicts, the path; the second time it is there already."""
    data = shutil.copytree(folder, tmp_path / "data")
    for number in range(25):
        (data / "one" / f"bad-{number:02d}.png").write_bytes(b"bad")
    command = ("prepare", QUICKSTART, "--data", data, "--output", tmp_path / "home")
    code, out, err = call(*command)
    assert code == 0, err
    (path,) = (tmp_path / "home").iterdir()
    assert f"artefact       {path} (" in out
    for text in (
        "images         240 in 10 of 10 classes",
        "unusable       25",
        "target errors",
        "AUC",
        "recall",
        "temperature",
        "encoder        zoo:digits/clip",
    ):
        assert text in out
    assert out.count("bad-") == 20 and "and 5 more in conditioning.json" in out
    assert "three" in out and "/265 images" in err
    assert "265 images, no more than 20000: read by this process" in err
    assert f"artefact       {path} (existed already, equal)" in call(*command)[1]


def test_a_worthless_predictor_comes_with_what_to_do(call, folder, tmp_path):
    """Of a few images nothing can be learnt: on the terminal in lines that fit, and in the artefact."""
    for path in sorted(folder.rglob("*1.png")):
        target = tmp_path / "data" / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    code, out, err = call("prepare", QUICKSTART, "--data", tmp_path / "data", "--output", tmp_path / "home")
    assert code == 0, err
    (path,) = (tmp_path / "home").iterdir()
    advice = json.loads((path / "conditioning.json").read_text())["predictor"]["advice"]
    assert load_conditioning(path).fit.advice == advice
    assert "prepare from more images: the target errs on" in advice and "method: risky" in advice
    assert advice in " ".join(out.split())
    assert max(len(line) for line in out.splitlines() if line.startswith(("predictor", " " * 15))) <= 100


def test_an_interrupt_stores_nothing_and_says_so(monkeypatch, capsys, tmp_path):
    """The exit code for later, one line."""

    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("engine.studies.prepare.program.prepare_conditioning", interrupted)
    monkeypatch.setattr(sys, "argv", ["riskforge", "prepare", str(QUICKSTART), "--data", str(tmp_path)])
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        cli.main()
    signal.signal(signal.SIGTERM, handler)
    assert end.value.code == EXIT_DRAINED and "nothing is stored" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "/tmp", "--executor", "local", "--workers", "2"], "error: --address and --workers: apply to"),
        (["--data", "nowhere"], "error: --data: there is no 'nowhere'"),
        (["--data", "/tmp", "--components", "0"], "components"),
        (["--data", "/tmp", "--set", "models.clip=zoo:digits/clipp"], "error: models.clip: 'zoo:digits/clipp'"),
        (["--data", "/tmp", "--set", "output.uri=s3://bucket/run"], "give a folder or an address with --output"),
        ([], "--data"),
    ],
)
def test_wrong_commands_end_with_one_clear_line(call, arguments, message):
    """Exit code 2, and no traceback."""
    code, _, err = call("prepare", QUICKSTART, *arguments)
    assert code == 2 and message in err and "Traceback" not in err
