"""Nearest training images: the search over batches, thresholds from held-out images, and the order of suspects."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest

from engine.studies.evaluate.nearest_images import (
    MIN_HELD_OUT,
    Nearest,
    NearestImages,
    order_by_nearness,
    thresholds_of,
)


def nearest_images(clip, pixel) -> NearestImages:
    names = tuple(map(str, range(len(clip))))
    return NearestImages(np.array(clip, dtype=float), np.array(pixel, dtype=float), names, names)


def test_thresholds_are_first_percentiles_of_held_out_images():
    """Of both distances apart; images that are training images themselves are counted and left out."""
    rng = np.random.default_rng(0)
    clip, pixel = rng.uniform(0.1, 0.9, 200), rng.uniform(0.2, 0.8, 200)
    found = thresholds_of(nearest_images([*clip, 0.0, 9e-6, 0.0], [*pixel, 0.0, 9e-4, 2e-3]))
    clip, pixel = np.r_[clip, 0.0], np.r_[pixel, 2e-3]
    assert found is not None and (found.num_held_out, found.num_shared) == (201, 2)
    assert (found.clip_distance, found.pixel_distance) == (np.quantile(clip, 0.01), np.quantile(pixel, 0.01))
    assert (found.clip_distance_median, found.pixel_distance_median) == (np.median(clip), np.median(pixel))
    assert found.num_suspects == ((clip <= found.clip_distance) & (pixel <= found.pixel_distance)).sum() == 1


def test_too_few_held_out_images_give_no_threshold():
    distances = np.linspace(0.1, 0.9, MIN_HELD_OUT)
    assert thresholds_of(nearest_images(distances, distances)) is not None
    assert thresholds_of(nearest_images(distances[1:], distances[1:])) is None
    assert thresholds_of(nearest_images([0.0, *distances[1:]], [0.0, *distances[1:]])) is None


def test_suspects_are_near_in_both_distances():
    """At the thresholds, too; near in one alone is no suspicion."""
    distances = np.linspace(0.1, 0.9, 101)
    thresholds = thresholds_of(nearest_images(distances, distances / 2))
    assert thresholds is not None
    clip, pixel = thresholds.clip_distance, thresholds.pixel_distance
    images = nearest_images([clip, clip + 1e-9, clip, 0, 1], [pixel, pixel, pixel + 1e-9, 0, 0])
    assert images.suspects(thresholds).tolist() == [True, False, False, True, False]


def test_the_likeliest_copies_come_first():
    """By the larger of both distances in units of what is usual: of held-out images, else of the samples themselves."""
    images = nearest_images([0.4, 0.1, 0.2, 0.3], [0.1, 0.4, 0.2, 0.2])
    held_out = np.linspace(0.1, 0.9, 101)
    thresholds = thresholds_of(nearest_images(held_out, held_out / 10))
    # In units of 0.5 and 0.05 the pixels decide; in those of 0.25 and 0.2 both do.
    assert order_by_nearness(images, thresholds).tolist() == [0, 2, 3, 1]
    assert order_by_nearness(images, None).tolist() == [2, 3, 0, 1]


@pytest.mark.parametrize("size", [1, 3, 7])
def test_the_search_does_not_depend_on_batches(size):
    """Against one product of all; of equal ones the first, and its name, pixels and thumbnail come with it."""
    rng = np.random.default_rng(1)
    queries, training = (rng.normal(size=(number, 5)).astype(np.float32) for number in (6, 7))
    training[4] = training[2]
    queries[0] = training[2]
    queries, training = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (queries, training))
    images = [PIL.Image.new("RGB", (32, 32), (10 * number, 0, 0)) for number in range(7)]
    nearest = Nearest.of(6, np.zeros((6, 32, 32, 3), np.uint8))
    for start in range(0, 7, size):
        batch = [(f"{number}.png", images[number]) for number in range(7)[start : start + size]]
        nearest.update(queries, training[start : start + size], batch)
    cosines = queries @ training.T
    best = cosines.argmax(1)
    assert best[0] == 2 and nearest.names == [f"{number}.png" for number in best]
    assert np.allclose(nearest.cosine, cosines.max(1))
    assert nearest.pixels[:, 0, 0, 0].tolist() == [10 * number for number in best]
    assert all(uri.startswith("data:image/") for uri in nearest.thumbnails)
