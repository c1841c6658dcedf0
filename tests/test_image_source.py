"""Labelled images of every kind of source: which are read as what, and which are refused for what reason."""

from __future__ import annotations

import io
import itertools
import os
import tarfile
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.data.images import LabelledImage, Unusable, UnusableImageError, decode, decode_rgb, digits, open_images
from engine.errors import JobError
from tests.prepare_cases import (
    LABELS,
    NUM_IMAGES,
    drawn_digits,
    plain_image,
    png,
    write_folder,
    write_parquet,
    write_run,
    write_tables,
    write_tar,
)


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


def test_a_source_is_known_by_what_it_holds(tmp_path):
    """A run is its tars, although parquet lies beside them; a single file does as well."""
    samples = drawn_digits(NUM_IMAGES)
    folder, tars = write_folder(tmp_path / "folder", samples), write_run(tmp_path / "run", samples)
    table = write_tables(tmp_path / "tables", samples)
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
    # A scan in all contexts is one origin; images of mixed sets have none.
    second = next(itertools.islice(source.read(), 21, None))
    assert {one.origin for one in first} == {"scan 0"} and second.origin == "scan 1"
    assert open_images("digits:validation-single", names).num_images == len(digits.load_sources("validation")) * 21
    label = int(digits.load_sources("test").labels[0])
    assert {one.class_index for one in first} == {names.index(digits.CLASS_NAMES[label])}
    mixed = list(itertools.islice(open_images("digits:validation", names).read(), 50))
    assert all(one.contexts and not one.origin for one in mixed) and {one.image.size for one in mixed} == {(32, 32)}
    with pytest.raises(JobError, match=r"did you mean 'digits:validation'\? Or give class folders"):
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


def test_a_file_of_another_kind_is_refused(tmp_path):
    """At once, with what there could be."""
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(JobError, match=r"neither a \.tar nor a \.parquet"):
        open_images(str(tmp_path / "a.zip"), LABELS)
