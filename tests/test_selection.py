"""What an export selects: order by seed and key, near duplicates at the threshold, equal pixels of real images once."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from engine.data.images import image_key
from engine.data.reading.deduplicate import near_duplicates
from engine.data.reading.real_images import RealImages, WantedReal
from engine.data.reading.selection import shuffled
from engine.errors import JobError


def wanted(count: int) -> WantedReal:
    """So many of both classes."""
    return WantedReal(classes=frozenset({0, 1}), count=count, per_class=None, there=Counter())


def test_the_order_depends_on_the_seed_and_on_no_third_key() -> None:
    """The relative order of two keys stays where others come in between."""
    keys = [f"key-{number}" for number in range(50)]
    orders = [shuffled(keys, seed) for seed in (0, 1)]
    assert orders[0] != orders[1] and all(sorted(order) == list(range(50)) for order in orders)
    some = [keys[number] for number in shuffled(keys, 0) if number % 3]
    assert some == [keys[1:][number] for number in shuffled(keys[1:], 0) if (number + 1) % 3]


def test_the_order_is_that_of_earlier_versions() -> None:
    """By BLAKE2b digests of seed and key, ascending: the bytes of an export depend on it."""
    keys = ["a", "b", "c", "d"]
    digests = {key: hashlib.blake2b(f"7/{key}".encode(), digest_size=16).hexdigest() for key in keys}
    assert [keys[number] for number in shuffled(keys, 7)] == sorted(keys, key=digests.__getitem__)


def test_real_images_are_drawn_by_their_pixels_and_the_seed(tmp_path: Path) -> None:
    """Those with the smallest digests, wherever they are in the data set; other seeds draw others."""
    folder, levels = tmp_path / "data" / "cat", range(0, 240, 10)
    folder.mkdir(parents=True)
    (tmp_path / "data/dog").mkdir()
    for level in levels:
        PIL.Image.new("RGB", (8, 8), (level,) * 3).save(folder / f"{level:03d}.png")
    drawn = []
    for seed in (0, 1):
        real = RealImages(tmp_path / f"spool-{seed}", "x", "png")
        real.draw(str(tmp_path / "data"), ("cat", "dog"), wanted(5), seed, lambda text: None)
        images = [PIL.Image.open(io.BytesIO(real.read(number, ("cat", "dog")).image)) for number in range(5)]
        ranks = {
            level: hashlib.blake2b(
                f"{seed}/".encode() + image_key(PIL.Image.new("RGB", (8, 8), (level,) * 3)), digest_size=16
            ).digest()
            for level in levels
        }
        drawn.append([image.getpixel((0, 0))[0] for image in images])
        assert drawn[-1] == sorted(sorted(levels, key=ranks.__getitem__)[:5])
    assert drawn[0] != drawn[1]


def test_a_cosine_at_the_threshold_is_a_duplicate() -> None:
    """The first of a class is kept; other classes do not count."""
    embeddings = np.array([[1, 0], [1, 0], [0.5, 0.75**0.5], [1, 0]], dtype=np.float32)
    assert [found[:2] for found in near_duplicates(embeddings, [0, 0, 0, 1], 1.0)] == [(1, 0)]
    assert [found[:2] for found in near_duplicates(embeddings, [0, 0, 0, 1], 0.5)] == [(1, 0), (2, 0)]
    assert [found[:2] for found in near_duplicates(embeddings, [0, 0, 0, 1], 0.51)] == [(1, 0)]


def test_equal_pixels_are_drawn_once(tmp_path: Path) -> None:
    """Under other names and in another format, too; there are no more to draw from than differ."""
    for name, level in (("a.png", 10), ("b.png", 10), ("c.bmp", 10), ("d.png", 20)):
        folder = tmp_path / "data" / "cat"
        folder.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (8, 8), (level,) * 3).save(folder / name)
    (tmp_path / "data/dog").mkdir()
    PIL.Image.new("RGB", (8, 8), (30,) * 3).save(tmp_path / "data/dog/e.png")
    real = RealImages(tmp_path / "spool", "x", "png")
    real.draw(str(tmp_path / "data"), ("cat", "dog"), wanted(3), 0, lambda text: None)
    assert real.usable == {0: 2, 1: 1} and sorted(real.classes) == [0, 0, 1]
    assert len({real.read(number, ("cat", "dog")).image for number in range(3)}) == 3
    with pytest.raises(JobError, match="has 3 that can be used"):
        other = RealImages(tmp_path / "other", "x", "png")
        other.draw(str(tmp_path / "data"), ("cat", "dog"), wanted(4), 0, lambda text: None)
