"""From labelled images to a conditioning artefact: every kind of source, hostile files, real models, equal bytes."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from engine import cli
from engine.commands.jobfile import read_job
from engine.data.images import (
    ImageSource,
    LabelledImage,
    ReadResult,
    Unusable,
    UnusableImageError,
    decode,
    decode_rgb,
    digits,
    open_images,
)
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
from engine.studies.prepare.observation import GPU_ROWS, Observations, Observer, observe
from engine.studies.prepare.program import artefact_folder, prepare_conditioning
from tests.conftest import REPOSITORY
from tests.prepare_cases import (
    LABELS,
    NUM_IMAGES,
    QUICKSTART,
    Sample,
    drawn_digits,
    plain_image,
    png,
    prepare,
    same_bytes,
    write_folder,
    write_parquet,
    write_run,
    write_tables,
    write_tar,
)

RISKFORGE = str(Path(sys.executable).with_name("riskforge"))


# Sources -------------------------------------------------------------------------------------------------------------


def found_in(path: Path) -> tuple[list[LabelledImage], list[Unusable]]:
    found = list(open_images(str(path), LABELS).read())
    return (
        [one for one in found if isinstance(one, LabelledImage)],
        [one for one in found if isinstance(one, Unusable)],
    )


def reason(path: Path) -> str:
    """Why the only image of a source cannot be used."""
    usable, unusable = found_in(path)
    assert not usable and len(unusable) == 1, (usable, unusable)
    return unusable[0].reason


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


def test_a_source_is_known_by_what_it_holds(folder, tars, table):
    """A run is its tars, although parquet lies beside them; a single file does as well."""
    for path, kind, number in (
        (folder, "a folder", NUM_IMAGES),
        (tars, "WebDataset", None),
        (table, "parquet", NUM_IMAGES),
    ):
        source = open_images(str(path), LABELS)
        assert source.kind.startswith(kind) and source.num_images == number
        assert len(list(source.read())) == NUM_IMAGES == len(list(source.read()))
    assert len(found_in(tars / "shards/a-000000.tar")[0]) == 100
    assert len(found_in(table / "validation-00000-of-00002.parquet")[0]) == 90


def test_named_sets_stand_beside_paths():
    """Composed digits under a name: labels by class name, contexts as captions say them; a near name is offered."""
    names = digits.CLASS_NAMES[::-1]
    source = open_images("digits:test-single", names)
    first = list(itertools.islice(source.read(), 21))
    assert source.num_images == 347 * 21 and len({one.contexts for one in first}) == 21
    label = int(digits.load_sources("test").labels[0])
    assert {one.class_index for one in first} == {names.index(digits.CLASS_NAMES[label])}
    mixed = list(itertools.islice(open_images("digits:validation", names).read(), 50))
    assert all(one.contexts for one in mixed) and {one.image.size for one in mixed} == {(32, 32)}
    with pytest.raises(JobError, match="did you mean 'digits:validation'"):
        open_images("digits:validatoin", names)
    with pytest.raises(JobError, match="no class 'zero'"):
        open_images("digits:test", ("cat", "dog"))


def test_the_seen_set_has_the_holes_of_the_classifier():
    """What the zoo's target was trained on: nothing in the bottom corners, no light ground."""
    seen = digits.compose_seen(500, seed=1)
    assert (digits.seen_share(seen.contexts) > 0).all()
    assert digits.POSITIONS.index("top left") in seen.contexts.position
    assert digits.POSITIONS.index("bottom left") not in seen.contexts.position


@pytest.mark.parametrize("name", ["three", "THREE", "3", "003"])
def test_class_folders_are_names_or_indices(tmp_path, name):
    """In any case, with leading zeros."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "a.PNG").write_bytes(png(plain_image()))
    usable, unusable = found_in(tmp_path)
    assert [one.class_index for one in usable] == [3] and not unusable


def test_names_come_before_indices_and_underscores_are_blanks(tmp_path):
    """Where a class is called by a number, its folder is that class; synonyms count."""
    for name in ("1", "0", "great_white", "white_shark"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(png(plain_image()))
    found = list(open_images(str(tmp_path), ("1", "0", "great white, white shark")).read())
    assert {one.name: one.class_index for one in found if isinstance(one, LabelledImage)} == {
        "1/a.png": 0,
        "0/a.png": 1,
        "great_white/a.png": 2,
        "white_shark/a.png": 2,
    }


def test_what_a_folder_cannot_give_is_named(tmp_path):
    """Unknown class, no class, a dead link, a pipe, damage, notes and hidden files; deep folders are of their class."""
    good = png(plain_image())
    for name in ("three/a.png", "thre/b.png", "c.png", "three/deep/d.png", "three/.e.png", ".g/h.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(good)
    (tmp_path / "three/i.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "three/j.png")
    (tmp_path / "three/k.png").write_bytes(good[:-24])
    (tmp_path / "three/l.jpg").write_text("not an image")
    (tmp_path / "three/f.txt").write_text("notes")
    (tmp_path / "three/m.png").symlink_to("/dev/zero")
    usable, unusable = found_in(tmp_path)
    assert [one.name for one in usable] == ["three/a.png", "three/deep/d.png"]
    reasons = {one.name: one.reason for one in unusable}
    assert "did you mean 'three'" in reasons.pop("thre/b.png")
    assert "has no label" in reasons.pop("c.png")
    assert "is hidden" in reasons.pop("three/.e.png") and "is hidden" in reasons.pop(".g/h.png")
    assert reasons.pop("three/i.png") == "there is no such file"
    assert reasons.pop("three/j.png") == reasons.pop("three/m.png") == "is not a file"
    assert "is damaged" in reasons.pop("three/k.png")
    assert "is not an image" in reasons.pop("three/l.jpg") and "is not an image" in reasons.pop("three/f.txt")
    assert not reasons


def test_links_out_of_the_folder_are_followed(tmp_path):
    """Files and whole classes may lie elsewhere."""
    write_folder(tmp_path / "elsewhere", [(plain_image(), 3), (plain_image(), 4)])
    (tmp_path / "data/four").mkdir(parents=True)
    (tmp_path / "data/three").symlink_to(tmp_path / "elsewhere/three")
    (tmp_path / "data/four/x.png").symlink_to(tmp_path / "elsewhere/four/0001.png")
    assert [one.class_index for one in found_in(tmp_path / "data")[0]] == [4, 3]


def test_extensions_do_not_decide_what_a_file_is(tmp_path):
    """A JPEG called .png is read; a file that would start a foreign program is not."""
    (tmp_path / "one").mkdir()
    plain_image().save(tmp_path / "one/a.png", "JPEG")
    assert len(found_in(tmp_path)[0]) == 1
    plain_image().save(tmp_path / "one/a.png", "EPS")
    assert "is an EPS" in reason(tmp_path)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_odd_modes_become_rgb(mode):
    """Whatever the file has: 8-bit RGB comes out."""
    buffer = io.BytesIO()
    plain_image(mode).save(buffer, "TIFF" if mode in ("CMYK", "YCbCr") else "PNG")
    image = decode_rgb(buffer.getvalue())
    assert (image.mode, image.size) == ("RGB", (8, 8))


def test_sixteen_bits_are_scaled_and_a_palette_is_looked_up():
    """Where PIL would clip 16 bits to 255; transparent pixels keep their colour, as torchvision has it."""
    values = np.full((8, 8), 32768, dtype=np.uint16)
    assert decode_rgb(png(PIL.Image.fromarray(values))).getpixel((0, 0)) == (128, 128, 128)
    palette = PIL.Image.new("RGB", (8, 8), (200, 10, 20)).convert("P", palette=PIL.Image.Palette.ADAPTIVE)
    assert decode_rgb(png(palette, transparency=0)).getpixel((0, 0)) == (200, 10, 20)


def test_images_of_no_use_are_refused_with_a_reason(tmp_path):
    """Bombs before they are unpacked, shapes that no classifier is made for, pixels without a range."""

    def refusal(data: bytes) -> str:
        with pytest.raises(UnusableImageError) as error:
            decode_rgb(data)
        return str(error.value)

    assert "million pixels" in refusal(png(plain_image("1", (20_000, 20_000))))
    assert "million pixels" in refusal(png(plain_image("1", (10_000, 9_000))))
    assert "both sides" in refusal(png(plain_image("L", (3, 8))))
    assert "too long" in refusal(png(plain_image("L", (4, 1000))))
    assert "truncated" in refusal(png(drawn_digits(2)[1][0])[:-200])
    buffer = io.BytesIO()
    plain_image("F").save(buffer, "TIFF")
    assert "range is not known" in refusal(buffer.getvalue())
    for data in (b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\x00\x00\x00\x00WEBP", b"P6 8 8 255 "):
        assert "0x" not in refusal(data)


def test_files_that_are_too_big_are_not_read(tmp_path, monkeypatch):
    """In a folder, a tar and a parquet."""
    monkeypatch.setattr(decode, "MAX_FILE_BYTES", 50)
    data = png(plain_image())
    (tmp_path / "folder/one").mkdir(parents=True)
    (tmp_path / "folder/one/a.png").write_bytes(data)
    write_tar(tmp_path / "a.tar", [("a.png", data), ("a.cls", b"1")])
    write_parquet(tmp_path / "a.parquet", [(data, 1)])
    for name in ("folder", "a.tar", "a.parquet"):
        assert f"is a file of {len(data)} bytes" in reason(tmp_path / name)


def test_members_with_odd_names_are_read_and_never_written(tmp_path, monkeypatch):
    """Names that lead out of a folder, or that a terminal would obey."""
    monkeypatch.chdir(tmp_path)
    data = png(plain_image())
    names = ["../../evil", "/tmp/evil-riskforge", "a\x1b[2Jb", "x" * 500, "o\u0308\u202e"]
    write_tar(
        tmp_path / "t.tar", [(name + end, one) for name in names for end, one in ((".png", data), (".cls", b"1"))]
    )
    usable, unusable = found_in(tmp_path / "t.tar")
    assert len(usable) == len(names) and not unusable
    assert all(one.name.isprintable() and len(one.name) <= 300 for one in usable)
    assert [path.name for path in tmp_path.iterdir()] == ["t.tar"] and not Path("/tmp/evil-riskforge.png").exists()


def test_what_a_tar_cannot_give_is_named(tmp_path):
    """No label, one that is no class, a label alone, a link, a member without a label, notes."""
    data = png(plain_image())
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w") as tar:

        def add(name: str, content: bytes = b"", link: str = "") -> None:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if link:
                info.type, info.linkname = tarfile.SYMTYPE, link
            tar.addfile(info, io.BytesIO(content))

        for key, label in (("b", b"12"), ("c", b"thre"), ("d", b"\xff"), ("e", b"-1"), ("f", b" eight \n")):
            add(f"{key}.png", data)
            add(f"{key}.cls", label)
        add("g.png", data)
        add("h.json", b'{"class_index": 1}')
        add("i.png", link="/etc/passwd")
        add("i.cls", b"1")
        for key, document in (
            ("j", b"[1]"),
            ("k", b"{"),
            ("l", b'{"class_index": true}'),
            ("m", b'{"class_index": 2}'),
        ):
            add(f"{key}.webp", data)
            add(f"{key}.json", document)
        add("n.seg.png", data)
        add("README", b"words")
    usable, unusable = found_in(path)
    assert {one.name: one.class_index for one in usable} == {"t.tar/f.png": 8, "t.tar/m.webp": 2}
    reasons = {one.name.removeprefix("t.tar/"): one.reason for one in unusable}
    assert sorted(reasons) == [
        "README",
        *("b.png", "c.png", "d.png", "e.png", "g.png", "h", "i", "i.png", "j.webp", "k.webp", "l.webp", "n.seg.png"),
    ]
    assert "12 is not a class index" in reasons["b.png"] and "did you mean 'three'" in reasons["c.png"]
    assert all("has no label" in reasons[name] for name in ("d.png", "g.png", "j.webp", "k.webp", "n.seg.png"))
    assert "is a link" in reasons["i.png"] and "has no extension" in reasons["README"]
    assert reasons["h"] == reasons["i"] == "has a label and no image"


@pytest.mark.parametrize("damage", ["inside an image", "inside a header", "before the end", "a header that is not one"])
def test_a_torn_tar_gives_what_is_whole(tmp_path, damage):
    """And says so, also where tarfile itself stops without a word; the next tar is read as well."""
    data = png(plain_image())
    members = [(f"{key}{end}", one) for key in "abc" for end, one in ((".png", data), (".cls", b"1"))]
    whole = write_tar(tmp_path / "1.tar", members).read_bytes()
    sample = 512 * (2 + -(-len(data) // 512) + 1)
    torn = {
        "inside an image": whole[: 2 * sample + 512 + 10],
        "inside a header": whole[: 2 * sample + 100],
        "before the end": whole[: 2 * sample],
        "a header that is not one": whole[: 2 * sample] + b"x" * 512 + whole[2 * sample + 512 :],
    }
    (tmp_path / "1.tar").write_bytes(torn[damage])
    write_tar(tmp_path / "2.tar", members[:2])
    usable, unusable = found_in(tmp_path)
    assert [one.name for one in usable] == ["1.tar/a.png", "1.tar/b.png", "2.tar/a.png"]
    assert "cut short or damaged" in unusable[-1].reason and all(one.name.startswith("1.tar") for one in unusable)


def test_what_a_parquet_cannot_give_is_named(tmp_path):
    """Labels that are none, cells without bytes, columns that are missing, files that are no parquet."""
    data = png(plain_image())
    write_parquet(tmp_path / "a.parquet", [(data, 3), (data, None), (data, -1), (None, 3), (data, 10)])
    usable, unusable = found_in(tmp_path / "a.parquet")
    assert [one.class_index for one in usable] == [3]
    assert [one.name for one in unusable] == [f"a.parquet row {row}" for row in (1, 2, 3, 4)]
    write_parquet(tmp_path / "b.parquet", [(data, "three"), (data, "thre")])
    assert [one.class_index for one in found_in(tmp_path / "b.parquet")[0]] == [3]
    write_parquet(tmp_path / "c.parquet", [({"bytes": None, "path": "x.png"}, 0)])
    assert "holds no bytes" in reason(tmp_path / "c.parquet")
    write_parquet(tmp_path / "d.parquet", [(data, -1)], ["nine"])
    assert "has no label" in reason(tmp_path / "d.parquet")
    write_parquet(tmp_path / "e.parquet", [(data, 0)], ["cat"])
    assert "'cat' is not a class" in reason(tmp_path / "e.parquet")
    pq.write_table(pa.table({"img": [data]}), tmp_path / "f.parquet")
    assert reason(tmp_path / "f.parquet") == "has no column label; it has img: rename what holds them"
    broken = pa.table({"image": [data], "label": pa.array([b"\xff"], pa.binary()).view(pa.string())})
    pq.write_table(broken, tmp_path / "h.parquet")
    assert "cannot be read as parquet" in reason(tmp_path / "h.parquet")
    (tmp_path / "g.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-40])
    assert "cannot be read as parquet" in reason(tmp_path / "g.parquet")


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


def test_a_file_of_another_kind_is_refused(tmp_path):
    """At once, with what there could be."""
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(JobError, match=r"neither a \.tar nor a \.parquet"):
        open_images(str(tmp_path / "a.zip"), LABELS)


# The artefact --------------------------------------------------------------------------------------------------------


def test_all_kinds_give_the_same_artefact(prepared, tars, table, tmp_path):
    """Byte for byte: order, names and files of the images have no part in it."""
    for data in (tars, table):
        other = prepare(data, tmp_path)
        assert other.path.name == prepared.path.name and same_bytes(other.path, prepared.path)
    assert other.was_there and not prepared.was_there
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

    monkeypatch.setattr(artefact, "_write", full)
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


# The command ---------------------------------------------------------------------------------------------------------


def riskforge(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [RISKFORGE, "prepare", str(QUICKSTART), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_tells_what_it_found(folder, tmp_path):
    """A table, what was left out, the verdicts, the path; the second time it is there already."""
    data = shutil.copytree(folder, tmp_path / "data")
    for number in range(25):
        (data / "one" / f"bad-{number:02d}.png").write_bytes(b"bad")
    done = riskforge("--data", data, "--output", tmp_path / "home")
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "home").iterdir()
    assert f"artefact       {path} (" in done.stdout
    for text in (
        "images         240 in 10 of 10 classes",
        "unusable       25",
        "target errors",
        "AUC",
        "recall",
        "temperature",
        "encoder        zoo:digits/clip",
    ):
        assert text in done.stdout
    assert done.stdout.count("bad-") == 20 and "and 5 more in conditioning.json" in done.stdout
    assert "three" in done.stdout and "/265 images" in done.stderr
    assert "265 images, no more than 20000: read by this process" in done.stderr
    again = riskforge("--data", data, "--output", tmp_path / "home")
    assert f"artefact       {path} (existed already, equal)" in again.stdout


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
        (["--data", "/tmp", "--set", "output.uri=s3://bucket/run"], "give the artefact's folder with --output"),
        ([], "--data"),
    ],
)
def test_wrong_commands_end_with_one_clear_line(arguments, message):
    """Exit code 2, and no traceback."""
    done = riskforge(*arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
