"""Samples of WebDataset tars: members are paired by their names, or reported."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.images import LabelledImage
from tests.image_cases import DIGITS, grey, level_of, read, split, write_tar

words = st.sampled_from(["a", "b", "rgb", "2024", "01", "v2", "png", "x y", "é"])
keys = st.lists(words, min_size=1, max_size=4).map(".".join)
folders = st.sampled_from(["", "in/", "./", "2.0/", "../"])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(folders, keys), min_size=1, max_size=5, unique=True), st.data())
def test_samples_with_any_key_keep_their_label_or_are_reported(tmp_path_factory, places, data):
    """Dots in keys, in folders, in dates: no image takes the label of its neighbour, and none is left out."""
    members: list[tuple[str, bytes]] = []
    for level, (folder, key) in enumerate(places):
        pair = [(f"{folder}{key}.{data.draw(st.sampled_from(['png', 'PNG', 'jpg']))}", grey(level)),
                (f"{folder}{key}.cls", str(level).encode())]  # fmt: skip
        members += pair if data.draw(st.booleans()) else pair[::-1]
    found = read(write_tar(tmp_path_factory.mktemp("tar") / "a.tar", members), DIGITS)
    used = [one for one in found if isinstance(one, LabelledImage)]
    assert all(one.class_index == level_of(one) for one in used)
    text = " ".join(f"{one.name} {getattr(one, 'reason', '')}" for one in found)
    names = [name.rpartition("/")[2] for name, _ in members if not name.endswith(".cls")]
    assert all(name in text for name in names)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from(["", "rgb.", "seg.", "label.", "meta."]), min_size=1, max_size=5, unique=True), st.data()
)
def test_composed_extensions_are_one_sample_or_reported(tmp_path_factory, middles, data):
    """`a.rgb.png` beside `a.label.cls`; an image of its own label is a sample, what is ambiguous is not guessed."""
    endings = {
        middle: data.draw(st.sampled_from([("png",), ("cls",), ("png", "cls"), ("json",)])) for middle in middles
    }
    members = [
        (f"a.{middle}{end}", grey(row) if end == "png" else str(row).encode() if end == "cls" else b"{}")
        for row, middle in enumerate(middles) for end in endings[middle]
    ]  # fmt: skip
    found = read(write_tar(tmp_path_factory.mktemp("tar") / "a.tar", members), DIGITS)
    used = [one for one in found if isinstance(one, LabelledImage)]
    images = [row for row, middle in enumerate(middles) if "png" in endings[middle]]
    labels = [row for row, middle in enumerate(middles) if "cls" in endings[middle]]
    for one in used:
        own = level_of(one)
        assert one.class_index == own or (own not in labels and (len(labels) == 1 or middles[one.class_index] == ""))
    assert found and (not images or len(images) == len(used) or len(found) > len(used))


@pytest.mark.parametrize(
    "names", [("2024.01", "2024.02"), ("scan 2.0 a", "scan 2.0 b"), ("st. a", "st. b"), ("v.1", "v.x")]
)
@pytest.mark.parametrize("label", ["cls", "json"])
def test_an_image_does_not_take_the_label_of_a_name_like_its_own(tmp_path, names, label):
    """Where the label of one and the image of the other are missing."""
    content = b"3" if label == "cls" else b'{"class_index": 3}'
    used, reasons = split(
        read(write_tar(tmp_path / "a.tar", [(f"{names[0]}.png", grey(0)), (f"{names[1]}.{label}", content)]), DIGITS)
    )
    assert not used and f"{names[1]}.{label} may be another sample's" in reasons[f"a.tar/{names[0]}.png"]


def test_members_that_are_not_read_are_counted(tmp_path):
    """Captions, other images of a sample, doubles, notes."""
    pairs = [[(f"{row}.png", grey(0)), (f"{row}.txt", b"x"), (f"{row}.seg.png", grey(1)), (f"{row}.cls", b"3")]
             for row in range(5)]  # fmt: skip
    members = [*itertools.chain(*pairs), ("9.png", grey(0)), ("9.PNG", grey(1)), ("9.cls", b"3"), ("LICENSE", b""),
               (".hidden", b""), ("__MACOSX/._0.png", b""), ("a.avif", b""), ("a.cls", b"3")]  # fmt: skip
    used, reasons = split(read(write_tar(tmp_path / "a.tar", members), DIGITS))
    assert len(used) == 6
    assert reasons["a.tar/*.txt"].startswith("5 members") and reasons["a.tar/*.png"].startswith("5 members")
    assert "twice" in reasons["a.tar/9.PNG"] and ".avif" in reasons["a.tar/a"]
    assert {"a.tar/LICENSE", "a.tar/.hidden", "a.tar/__MACOSX/._0.png"} <= set(reasons)
