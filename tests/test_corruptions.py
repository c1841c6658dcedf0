"""Corruptions after ImageNet-C: what each does to pixels, how strong it is, and that it depends on the image alone."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest

from engine.data.images import LabelledImage, digits
from engine.data.images.corruptions import CORRUPTIONS, SEVERITIES, Corruption, corrupted_item


@pytest.fixture(scope="module")
def image() -> PIL.Image.Image:
    return PIL.Image.fromarray(digits.compose_single("test", seed=0).images[5])


def distance(first: PIL.Image.Image, second: PIL.Image.Image) -> float:
    return float(np.abs(np.asarray(first, float) - np.asarray(second, float)).mean())


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_severity_is_further_from_the_image_and_depends_on_it_alone(image, name):
    copies = [Corruption(name, severity).apply(image) for severity in range(1, SEVERITIES + 1)]
    assert all(copy.size == image.size and copy.mode == "RGB" for copy in copies)
    distances = [distance(image, copy) for copy in copies]
    # JPEG and pixelation of 32 pixels are not strictly ordered.
    assert distances[0] > 0 and distances[-1] > distances[0] and distances[-1] == max(distances)
    again = Corruption(name, 3).apply(PIL.Image.fromarray(np.asarray(image).copy()))
    assert np.array_equal(np.asarray(again), np.asarray(copies[2]))
    other = PIL.Image.fromarray(np.asarray(image)[::-1].copy())
    assert not np.array_equal(np.asarray(Corruption(name, 3).apply(other)), np.asarray(copies[2]))


def test_formulas_of_brightness_contrast_and_noise():
    """By hand: V of HSV grows by 0.15, ratios of the channels stay; contrast is halved about the channel's mean."""
    pixels = np.zeros((2, 2, 3), np.uint8)
    pixels[0, 0] = (100, 50, 0)
    image = PIL.Image.fromarray(pixels)
    brighter = np.asarray(Corruption("brightness", 3).apply(image), float)
    assert brighter[0, 0] == pytest.approx([100 + 0.15 * 255, 50 * (1 + 0.15 * 255 / 100), 0], abs=0.51)
    assert brighter[1, 1] == pytest.approx([0.15 * 255] * 3, abs=0.51)
    flat = np.asarray(Corruption("contrast", 2).apply(image), float)
    assert flat[0, 0] == pytest.approx([62.5, 31.25, 0], abs=0.51)
    grey = PIL.Image.new("RGB", (64, 64), (128, 128, 128))
    noisy = np.asarray(Corruption("gaussian noise", 5).apply(grey), float) / 255
    assert noisy.std() == pytest.approx(0.10, abs=0.005) and noisy.mean() == pytest.approx(0.502, abs=0.005)


def test_large_images_have_the_strengths_of_imagenet_c():
    grey = PIL.Image.new("RGB", (65, 65), (128, 128, 128))
    assert np.asarray(Corruption("gaussian noise", 2).apply(grey), float).std() / 255 == pytest.approx(0.12, abs=0.005)


def test_a_corrupted_image_keeps_name_and_class_and_has_the_corruption_as_its_only_context(image):
    found = corrupted_item(Corruption("jpeg", 4), LabelledImage("scan 5", image, 3, ("small", "red ink")))
    assert (found.name, found.class_index, found.contexts) == ("scan 5", 3, ("jpeg 4",))
