"""Every file under a path is used, or counted and named: extensions, layouts, splits, systems' files, tars, links."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.data.images import LabelledImage, Unusable, nothing_usable, open_images, some_of
from engine.data.images.decode import EXTENSIONS, FORMATS
from engine.data.images.splits import KEYWORDS, is_same_split
from engine.data.reading.export import export
from engine.data.reading.export_options import ExportOptions
from engine.errors import JobError
from engine.generation.given_images import CheckedImages
from engine.report.evaluated import _unusable_text
from engine.studies.evaluate.memorisation import source_of as _source
from engine.studies.evaluate.summary_lines import _unusable_lines
from tests.corpus_cases import make_run
from tests.image_cases import DIGITS, grey, level_of, read, split, write_files, write_table, write_tar

REGISTERED = sorted(PIL.Image.registered_extensions())


def saved(extension: str) -> bytes:
    """A file of the format that Pillow has for an extension, or a PNG where it writes none."""
    form = PIL.Image.registered_extensions()[extension]
    buffer = io.BytesIO()
    try:
        PIL.Image.new("L", (32, 32), 60).convert("RGB").save(buffer, form)
    except (KeyError, OSError, ValueError):
        return grey(60)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_files_of_all_extensions_are_used_or_reported(tmp_path, kind):
    """Those of Pillow, in both cases, with what they stand for in them: the formats of the allow-list are all used."""
    files = {f"{number}{write(extension)}": saved(extension) for number, (extension, write) in
             enumerate(itertools.product(REGISTERED, (str.lower, str.upper)))}  # fmt: skip
    if kind == "folder":
        found = read(write_files(tmp_path, {f"three/{name}": data for name, data in files.items()}), DIGITS)
        assert len(found) == len(files)
    else:
        pairs = [[(name, data), (f"{name.partition('.')[0]}.cls", b"3")] for name, data in files.items()]
        found = read(write_tar(tmp_path / "a.tar", itertools.chain(*pairs)), DIGITS)
        assert len(found) == len(files)
    used = {name.rpartition(".")[2].lower() for name in split(found)[0]}
    readable = {one[1:] for one in REGISTERED if PIL.Image.registered_extensions()[one] in (*FORMATS, "MPO")}
    # PFM holds floats, whose range is not known; a file with a name alone is read in a folder alone.
    assert used >= readable - {"pfm"} and {one[1:] for one in REGISTERED} >= EXTENSIONS


OTHERS = {
    "three/noextension": grey(1), "three/a.image": grey(2), "three/deep/er/b.png": grey(3), "c.png": grey(4),
    "three/x.txt": b"words", "three/x.json": b"{}", "three/x.svg": b"<svg xmlns='x'/>", "notes.md": b"# notes",
    "three/x.heic": b"\0\0\0\x18ftypheic" + bytes(40), "three/x.avif": b"\0\0\0\x18ftypavif" + bytes(40),
    "three/x.jp2": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40), "three/x.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n",
    "three/empty.png": b"", "three/x.arrow": b"\xff\xff\xff\xff\x40\x02\x00\x00" + bytes(40),
    "three/x.zip": b"PK\x03\x04" + bytes(40), "three/lfs.png": b"version https://git-lfs.github.com/spec/v1\n",
    ".DS_Store": b"\0", "three/.DS_Store": b"\0", "three/Thumbs.db": b"\0", "Desktop.ini": b"", ".git/config": b"",
    "__MACOSX/three/._a.png": grey(5), "three/._a.png": b"\0", "three/.hidden.png": grey(6),
    ".ipynb_checkpoints/a.png": grey(7), "labels.csv": b"a,b\n", "three/a.png": grey(8), "cat/d.png": grey(9),
}  # fmt: skip


def test_every_file_of_a_folder_is_found_once(tmp_path):
    """Used are images of whatever name in class folders; all others are named, each by itself, with a reason."""
    found = read(write_files(tmp_path, OTHERS), DIGITS)
    assert sorted(one.name for one in found) == sorted(OTHERS)
    used, reasons = split(found)
    assert set(used) == {"three/noextension", "three/a.image", "three/deep/er/b.png", "three/a.png"}
    for name, text in (("x.heic", "HEIF"), ("x.avif", "AVIF"), ("x.jp2", "JPEG 2000"), ("x.eps", "EPS"),
                       ("x.svg", "SVG"), ("lfs.png", "git lfs pull"), ("x.zip", "archive"),
                       ("x.arrow", "store it as parquet")):  # fmt: skip
        assert text in reasons[f"three/{name}"]
    assert "operating system" in reasons["three/Thumbs.db"] and "operating system" in reasons["__MACOSX/three/._a.png"]


def test_links_end_and_what_cannot_be_listed_is_reported(tmp_path):
    """A loop, a link to another class, a broken link, a pipe; a class may lie elsewhere."""
    write_files(tmp_path / "elsewhere", {"a.png": grey(1)})
    root = write_files(tmp_path / "data", {"three/a.png": grey(0), "eight/deep/b.png": grey(2)})
    (root / "eight/loop").symlink_to(root)
    (root / "eight/deep/up").symlink_to(root / "eight")
    (root / "four").symlink_to(tmp_path / "elsewhere")
    (root / "five").symlink_to(root / "three")
    (root / "six").symlink_to(tmp_path / "nowhere")
    (root / "seven").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(root / "three/pipe")
    used, reasons = split(read(root, DIGITS))
    assert set(used) == {"three/a.png", "eight/deep/b.png", "four/a.png"}
    assert set(reasons) == {"eight/loop", "eight/deep/up", "five", "six", "seven", "three/pipe"}
    assert all("read already" in reasons[name] for name in ("eight/loop", "eight/deep/up", "five", "seven"))


@pytest.mark.parametrize(
    "name", ["a.tar", "a.parquet", "metadata.csv", "three/a.png", "README.md", "dataset_infos.json"]
)
@pytest.mark.parametrize("kind", ["pipe", "device", "link"])
def test_what_is_no_file_is_not_opened(tmp_path, name, kind):
    """Reading a pipe or a device may never end."""
    root = write_files(tmp_path / "data", {"three/b.png": grey(0)})
    ends = {"device": "/dev/zero", "link": "nowhere"}
    os.mkfifo(root / name) if kind == "pipe" else (root / name).symlink_to(ends[kind])
    used, reasons = split(read(root, DIGITS))
    assert used == {"three/b.png": 3}
    assert reasons == {name: "there is no such file" if kind == "link" else "is not a file"}
    with pytest.raises(JobError, match="there is no" if kind == "link" else "is neither a file nor a folder"):
        read(root / name, DIGITS)


@pytest.mark.parametrize("name", ["shards/surplus.txt", "metadata.parquet"])
@pytest.mark.parametrize("kind", ["pipe", "device", "text"])
def test_a_run_whose_surplus_is_not_known_is_refused(tmp_path, name, kind):
    write_tar(tmp_path / "shards/a-000000.tar", [("b.png", grey(2)), ("b.cls", b"3")])
    path = tmp_path / name
    {"pipe": lambda: os.mkfifo(path), "device": lambda: path.symlink_to("/dev/zero"),
     "text": lambda: path.write_text("words")}[kind]()  # fmt: skip
    if (name, kind) == ("shards/surplus.txt", "text"):
        assert len(read(tmp_path, DIGITS)) == 1
    else:
        with pytest.raises(JobError, match=f"cannot be read \\(its {path.name}: "):
            read(tmp_path, DIGITS)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_what_may_not_be_read_is_reported(tmp_path):
    """A file and a folder without permission."""
    write_files(tmp_path, {"three/a.png": grey(0), "three/b.png": grey(1), "four/c.png": grey(2)})
    (tmp_path / "three/b.png").chmod(0)
    (tmp_path / "four").chmod(0)
    assert set(split(read(tmp_path, DIGITS))[1]) == {"three/b.png", "four"}
    (tmp_path / "four").chmod(0o700)


def test_two_kinds_in_one_folder_are_not_mixed_without_a_word(tmp_path):
    """Tars, parquet and class folders: the first is read, all else is named."""
    write_files(tmp_path, {"three/a.png": grey(0), "README.md": b"words"})
    write_table(tmp_path / "a.parquet", [grey(1)], pa.array([3]))
    used, reasons = split(read(tmp_path, DIGITS))
    assert list(used) == ["a.parquet row 0"] and set(reasons) == {"three/a.png", "README.md"}
    write_tar(tmp_path / "in/a.tar", [("b.png", grey(2)), ("b.cls", b"3")])
    used, reasons = split(read(tmp_path, DIGITS))
    assert list(used) == ["in/a.tar/b.png"] and set(reasons) == {"three/a.png", "README.md", "a.parquet"}
    assert all("is next to tars" in reason for reason in reasons.values())


def test_a_table_without_images_does_not_hide_class_folders(tmp_path):
    write_files(tmp_path, {"three/a.png": grey(0)})
    pa.parquet.write_table(pa.table({"x": [1]}), tmp_path / "notes.parquet")
    used, reasons = split(read(tmp_path, DIGITS))
    assert used == {"three/a.png": 3} and set(reasons) == {"notes.parquet"}


def test_the_files_of_a_run_are_no_news_and_others_in_it_are(tmp_path):
    """Its rows, its card and its state are the engine's own; foreign images there are reported."""
    write_tar(tmp_path / "shards/a-000000.tar", [("b.png", grey(2)), ("b.cls", b"3")])
    own = ("manifest.json", "README.md", "_SUCCESS", "report.html", "_state/plan/0.json", "shards/wids.json",
           "shards/new-file.txt", "rescored/x/manifest.json")  # fmt: skip
    write_files(tmp_path, dict.fromkeys(own, b"{}") | {"three/a.png": grey(0)})
    write_table(tmp_path / "metadata.parquet", [b""], pa.array([0]))
    write_table(tmp_path / "shards/a-000000.parquet", [b""], pa.array([0]))
    for path in (tmp_path, tmp_path / "shards"):
        used, reasons = split(read(path, DIGITS))
        assert list(used) == ["a-000000.tar/b.png"]
        assert set(reasons) == ({"three/a.png"} if path == tmp_path else {"new-file.txt"})


def container(path: Path, level: int) -> Path:
    """A tar or a parquet file with one image."""
    if path.suffix == ".tar":
        return write_tar(path, [("a.png", grey(level)), ("a.cls", b"3")])
    return write_table(path, [grey(level)], pa.array([3]))


@pytest.mark.parametrize("suffix", [".tar", ".parquet"])
@pytest.mark.parametrize(
    "pattern",
    [
        "{}-00000-of-00001",
        "data/{}-00000-of-00001",
        "{}",
        "{}/part-0",
        "set-{}-0",
        "split={}/0",
        "data/{}/1",
        "a_{}",
        "{}.1",
    ],
)
@pytest.mark.parametrize("pair", [("train", "test"), ("training", "val"), ("Train", "dev"), ("valid", "evaluation")])
def test_tars_and_tables_of_two_splits_are_not_read_together(tmp_path, pair, pattern, suffix):
    """The message lists what to give, and giving it reads that split alone."""
    for level, name in enumerate(pair):
        container(tmp_path / (pattern.format(name) + suffix), level)
    with pytest.raises(JobError) as error:
        open_images(str(tmp_path), DIGITS)
    for level, name in enumerate(pair):
        assert f"'{tmp_path}/{name}'" in str(error.value)
        [found] = read(tmp_path / name, DIGITS)
        assert isinstance(found, LabelledImage) and level_of(found) == level


@pytest.mark.parametrize("asked", ["val", "valid", "validation"])
def test_a_split_is_found_by_any_of_its_names(tmp_path, asked):
    """Files that are called `validation` and `valid` are one split, by whichever name it is requested."""
    for level, name in enumerate(("train-0", "validation-0", "valid-1")):
        container(tmp_path / f"{name}.tar", level)
    assert [level_of(one) for one in read(tmp_path / asked, DIGITS)] == [2, 1]
    assert is_same_split(asked, "Dev") and not is_same_split(asked, "train")


@pytest.mark.parametrize("suffix", [".tar", ".parquet"])
@pytest.mark.parametrize("pattern", ["{}/train-00000-of-00001", "{}/train/0000", "data/{}/train", "{}/split=train/0"])
def test_configurations_are_not_read_together(tmp_path, pattern, suffix):
    """Without a card the same names in two folders tell; parts of one split in two folders have names of their own."""
    for level, name in enumerate(("small", "large")):
        container(tmp_path / "two" / (pattern.format(name) + suffix), level)
        container(tmp_path / "parts" / name / f"train-0000{level}-of-00002{suffix}", level)
    home = tmp_path / "two" / ("data" if pattern.startswith("data") else "")
    with pytest.raises(JobError, match="the same files of one split in 2 folders") as error:
        open_images(str(tmp_path / "two"), DIGITS)
    for level, name in enumerate(("small", "large")):
        assert f"'{home / name}'" in str(error.value)
        assert level_of(read(home / name, DIGITS)[0]) == level
    assert sorted(map(level_of, read(tmp_path / "parts", DIGITS))) == [0, 1]


def test_files_of_a_split_and_of_none_are_not_read_together(tmp_path):
    container(tmp_path / "more.tar", 0)
    container(tmp_path / "test.tar", 1)
    with pytest.raises(JobError, match=r"split test, and files of none, such as 'more.tar'"):
        open_images(str(tmp_path), DIGITS)
    assert len(read(tmp_path / "more.tar", DIGITS)) == 1
    with pytest.raises(JobError, match="there is no"):
        open_images(str(tmp_path / "train"), DIGITS)


@pytest.mark.parametrize("prefix", ["", "data/", "archive/images/"])
@pytest.mark.parametrize("first", sorted(KEYWORDS))
def test_folders_of_two_splits_are_not_read_together(tmp_path, first, prefix):
    """Whatever is above them; one split alone is read, as its classes lie in it."""
    write_files(tmp_path, {f"{prefix}{first}/three/a.png": grey(0)})
    assert split(read(tmp_path, DIGITS))[0] == {f"{prefix}{first}/three/a.png": 3}
    second = "test" if KEYWORDS[first] != "test" else "train"
    write_files(tmp_path, {f"{prefix}{second}/three/a.png": grey(0)})
    with pytest.raises(JobError) as error:
        open_images(str(tmp_path), DIGITS)
    assert f"'{tmp_path}/{prefix}{first}'" in str(error.value)
    assert split(read(tmp_path / prefix / second, DIGITS))[0] == {"three/a.png": 3}


def test_splits_inside_class_folders_are_not_read_together(tmp_path):
    write_files(tmp_path, {"three/train/a.png": grey(0), "eight/test/a.png": grey(0)})
    with pytest.raises(JobError, match="splits test, train inside its class folders"):
        open_images(str(tmp_path), DIGITS)


def test_a_class_that_is_called_train_is_a_class(tmp_path):
    """Of trains, or a test; a folder that is both is ambiguous, and named."""
    labels = ("train", "test", "bus")
    write_files(tmp_path, {f"{name}/a.png": grey(0) for name in labels} | {"train/bus/b.png": grey(0)})
    used, reasons = split(read(tmp_path, labels))
    assert used == {"train/a.png": 0, "test/a.png": 1, "bus/a.png": 2}
    assert "two classes" in reasons["train/bus/b.png"]


CARDS = {
    "lists": "configs:\n- config_name: default\n  data_files:\n  - split: one\n    path: a/*.parquet\n"
             "  - split: two\n    path: [b/*.parquet, 'c/**/*.parquet']\n",
    "mapping": "configs:\n- config_name: default\n  data_files:\n    one: a/*\n    two: ['b/*', 'c/**']\n",
    "data_dir": "configs:\n- config_name: x\n  data_dir: a\n  data_files: '*'\n"
                "- config_name: y\n  data_files: ['b/*', 'c/**']\n",
}  # fmt: skip


@pytest.mark.parametrize("form", CARDS)
def test_the_splits_of_a_card_are_kept_apart(tmp_path, form):
    """Where the names of files say nothing; files of none are named."""
    for level, name in enumerate(("a/0", "b/0", "c/deep/0")):
        container(tmp_path / f"{name}.parquet", level)
    (tmp_path / "README.md").write_text(f"---\n{CARDS[form]}---\n# words\n")
    splits = ("x/train", "y/train") if form == "data_dir" else ("one", "two")
    with pytest.raises(JobError) as error:
        open_images(str(tmp_path), DIGITS)
    assert all(f"'{tmp_path}/{name}'" in str(error.value) for name in splits)
    assert [[level_of(one) for one in read(tmp_path / name, DIGITS)] for name in splits] == [[0], [1, 2]]


# Parts of names that a key or an extension may have; an extension of images in a key, too.


@pytest.mark.parametrize("layout", ["folders", "tar", "parquet", "listing"])
def test_a_repository_in_the_hubs_cache_is_read_by_its_snapshot(tmp_path, layout):
    """Files are there by content, too, and again in every snapshot: nothing of it is read twice or without its name."""
    write_files(tmp_path / "set/three", {"a.png": grey(0)})
    if layout == "tar":
        write_tar(tmp_path / "set/a.tar", [("b.png", grey(2)), ("b.cls", b"3")])
    elif layout == "parquet":
        write_table(tmp_path / "set/a.parquet", [grey(1)], pa.array([3]))
    elif layout == "listing":
        write_files(tmp_path / "set", {"metadata.csv": b"file_name,label\nthree/a.png,3\n"})
    home = tmp_path / "datasets--a--b"
    files = [one for one in (tmp_path / "set").rglob("*") if one.is_file()]
    for number, path in enumerate(files):
        write_files(home, {f"blobs/{number:040x}": path.read_bytes(), "refs/main": b"v1"})
        for snapshot in ("v1", "v2"):
            link = home / "snapshots" / snapshot / path.relative_to(tmp_path / "set")
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(home / f"blobs/{number:040x}", link.parent))
    with pytest.raises(JobError, match=r"give '.*/snapshots/v1' or '.*/snapshots/v2'"):
        read(home, DIGITS)
    used, _ = split(read(home / "snapshots/v2", DIGITS))
    assert list(used.values()) == [3]


def test_the_images_of_cifar_are_found_in_their_column(tmp_path):
    """`img`, where no column is called `image`; other names are asked for."""
    for number, names in enumerate((["img", "label"], ["image", "label", "img"], ["picture", "label"], ["img", "y"])):
        values = {"label": [3], "y": [3], "image": [grey(1)], "img": [grey(2)], "picture": [grey(3)]}
        pa.parquet.write_table(pa.table({name: values[name] for name in names}), tmp_path / f"{number}.parquet")
    levels = [level_of(one) for number in range(2) for one in read(tmp_path / f"{number}.parquet", DIGITS)]
    assert levels == [2, 1]
    assert "no column image; it has picture, label" in split(read(tmp_path / "2.parquet", DIGITS))[1]["2.parquet"]
    assert "no column label; it has img, y" in split(read(tmp_path / "3.parquet", DIGITS))[1]["3.parquet"]


def test_every_reason_is_among_the_first(tmp_path):
    """Junk by the thousand hides no reason, and the message stays short."""
    junk = [Unusable(f"{number}.xml", "is not an image") for number in range(5000)]
    text = some_of([*junk, Unusable("n01440764/a.png", "'n01440764' is not a class of the target")])
    assert text == (
        "0.xml: is not an image; n01440764/a.png: 'n01440764' is not a class of the target; 1.xml: is not an image;"
        " and 4998 more"
    )
    assert some_of(junk[:2]) == "0.xml: is not an image; 1.xml: is not an image"
    [found] = read(write_files(tmp_path, {"n01440764/a.png": grey(0)}), ("tench, Tinca tinca", "goldfish"))
    assert isinstance(found, Unusable) and "WordNet id; use class names or indices" in found.reason


def test_every_command_counts_and_names_what_it_cannot_use(tmp_path):
    """`evaluate` in lines and report, `conditioning.images` as a notice, `merge` as a remark; others print a list."""
    unusable = [Unusable(f"{number}.png", "is damaged") for number in range(25)]
    source = _source(str(tmp_path), "a folder by class", 3, unusable)
    lines = _unusable_lines("--real", source)
    assert "25 files" in lines[0] and lines[-1] == "  and 5 more" and "  0.png: is damaged" in lines
    assert "25 other files could not be used: 0.png: is damaged; " in _unusable_text(source)
    files = {"one/a.png": grey(0)} | {f"one/{number}.txt": b"x" for number in range(5)}
    notices: list[str] = []
    cell = SimpleNamespace(classes=(1,), names=("one",))
    request: Any = SimpleNamespace(where="requests.0", cells=[cell])
    path = str(write_files(tmp_path / "given", files))
    CheckedImages(DIGITS, lambda text: None, notices.append).of(request, path, "conditioning.images")
    assert "5 of" in notices[0] and "one/0.txt: is not an image" in notices[0] and "and 2 more" in notices[0]
    run = make_run(tmp_path / "run", count=2, name="h")
    done = export((str(run),), ExportOptions(output=str(tmp_path / "out"), real=path, real_ratio=0.05))
    assert any("5 real files could not be used: one/0.txt" in remark for remark in done.remarks)


# Label maps ----------------------------------------------------------------------------------------------------------


def folders_of(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        PIL.Image.new("RGB", (8, 8), (number, 0, 0)).save(root / name / "a.png")
    return root


def test_folders_of_other_names_are_refused_with_both_lists_and_a_map_that_works(tmp_path: Path) -> None:
    """What the message offers makes the folders readable, once what it names as missing is added."""
    root, labels = folders_of(tmp_path / "data", "Cats", "dogs", "avian"), ("cat", "dog", "bird")
    with pytest.raises(JobError) as caught:
        open_images(str(root), labels, "--real")
    text = str(caught.value)
    assert text.startswith(f"--real: '{root}': the labels 'Cats', 'avian', 'dogs' are no classes of the target, whose")
    assert "'cat', 'dog', 'bird' no label names" in text and f"in '{root}/label_map.json': " in text
    offered = json.loads(re.search(r"\{.*\}", text)[0])
    assert offered == {"Cats": "cat", "dogs": "dog"} and "and in it what means 'bird'" in text
    (root / "label_map.json").write_text(json.dumps(offered | {"avian": "bird"}))
    results = list(open_images(str(root), labels).read())
    assert {(result.name, result.class_index) for result in results} == {
        ("Cats/a.png", 0), ("dogs/a.png", 1), ("avian/a.png", 2),
    }  # fmt: skip


def test_a_label_map_goes_before_names_leaves_out_and_is_accounted_for(tmp_path: Path) -> None:
    """Also from a folder above, for several splits; several labels of one class; an idle line is reported."""
    root = folders_of(tmp_path / "data", "train/tabby", "train/siamese", "train/fox", "train/dog")
    entries = {"TABBY": "cat", "siamese": 0, "fox": None, "dog": "1", "wolf": "dog"}
    (root / "label_map.json").write_text(json.dumps(entries))
    results = list(open_images(f"{root}/train", ("cat", "dog")).read())
    images = {result.name: result.class_index for result in results if isinstance(result, LabelledImage)}
    assert images == {"tabby/a.png": 0, "siamese/a.png": 0, "dog/a.png": 1}
    [left] = [result for result in results if isinstance(result, Unusable)]
    assert (left.name, left.reason) == ("fox/a.png", "'fox' is left out by label_map.json")
    shutil.move(root / "label_map.json", root / "train/label_map.json")
    idle = [result for result in open_images(f"{root}/train", ("cat", "dog")).read() if result.name == "label_map.json"]
    assert [one.reason for one in idle] == ["names the label 'wolf', and no folder is called so"]


def test_a_label_map_maps_the_labels_of_tables_too(tmp_path: Path) -> None:
    """Texts, and numbers without names, of a single file as of a folder; unknown ones come with the map to write."""
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (8, 8)).save(buffer, "PNG")
    rows = [{"image": {"bytes": buffer.getvalue()}, "label": label} for label in ("cats", "dogs")]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    source = open_images(str(path), ("cat", "dog"))
    unusable = [result for result in source.read() if isinstance(result, Unusable)]
    text = nothing_usable(source, "--data", str(path), unusable)
    assert f'\'{tmp_path}/label_map.json\': {{"cats": "cat", "dogs": "dog"}}; null leaves a label out' in text
    (tmp_path / "label_map.json").write_text('{"cats": "dog", "dogs": "cat"}')
    for address in (path, tmp_path):
        assert [result.class_index for result in open_images(str(address), ("cat", "dog")).read()] == [1, 0]
    (tmp_path / "label_map.json").write_text('{"0": "dog", "1": "cat"}')
    pq.write_table(pa.Table.from_pylist([row | {"label": place} for place, row in enumerate(rows)]), path)
    assert [result.class_index for result in open_images(str(path), ("cat", "dog")).read()] == [1, 0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1]", "is not a mapping of class names"), (b"{", "property name"),
        (b"\xff\xfe{", "decode"), (b"", "Expecting value"),
        (b'{"a": true}', "has True"), (b'{"a": [1]}', "neither a class name nor an index"), (b'{"": "cat"}', "has ''"),
        (b'{"a": "cta"}', "'cta' is not a class of the target; did you mean 'cat'?"), (b'{"a": 7}', "'7' is not a"),
        (b'{"a": "cat", "A": "dog"}', "names 'A' twice"), (b'{"a": "cat", "a": "dog"}', "it holds 'a' twice"),
        (b'{"a": 1e400}', "too large"), (b'{"a": NaN}', "it holds NaN"), (b"[" * 5000, "nested too deeply"),
        (b" " * (2**22 + 1), "bytes"),
    ],
)  # fmt: skip
def test_a_hostile_label_map_is_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    """With option and file, before any image is read."""
    root = folders_of(tmp_path / "data", "cat")
    (root / "label_map.json").write_bytes(content)
    with pytest.raises(JobError, match=re.escape(message)) as caught:
        open_images(str(root), ("cat", "dog"), "--train")
    assert all(line.startswith(f"--train: {root}/label_map.json: ") for line in caught.value.problems)
