"""Composed digits: splits share no scan, contexts are as described, and equal arguments give equal pixels."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits

import engine.digits
from engine.data.images import digits
from engine.data.images.digits import scans
from engine.data.images.digits.contexts import COLOURS, allowed_pairs, default_background, default_ink


def test_no_scan_is_in_two_splits() -> None:
    """Every scan is in exactly one split, with the classes in the same shares."""
    labels = load_digits(return_X_y=True)[1]
    rows = scans._split_rows(labels)
    assert {name: len(own) for name, own in rows.items()} == scans.SPLIT_SIZES
    assert sorted(np.concatenate(list(rows.values())).tolist()) == list(range(len(labels)))
    for own in rows.values():
        shares = np.bincount(labels[own], minlength=10) / len(own)
        assert np.abs(shares - np.bincount(labels) / len(labels)).max() < 0.01


@pytest.mark.parametrize("split", scans.SPLIT_SIZES)
def test_sources_are_the_scans_of_their_split(split: str) -> None:
    """Strokes in 0..1 with an empty margin, in the order of their labels."""
    sources, labels = digits.load_sources(split), load_digits(return_X_y=True)[1]
    assert sources.glyphs.shape == (scans.SPLIT_SIZES[split], 60, 60)
    assert sources.labels.tolist() == labels[scans._split_rows(labels)[split]].tolist()
    assert sources.glyphs.min() >= 0 and sources.glyphs.max() <= 1 and sources.glyphs[:, 0].max() < 0.1


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="choose one of train, validation, test"):
        digits.load_sources("all")


def test_equal_seeds_give_equal_pixels_and_others_do_not() -> None:
    images = digits.compose_split("test", 50, seed=0).images
    assert np.array_equal(images, digits.compose_split("test", 50, seed=0).images)
    assert not np.array_equal(images, digits.compose_split("test", 50, seed=1).images)


def test_every_source_is_drawn_as_often_as_every_other() -> None:
    """To one: the classes of a set are those of its sources."""
    sources = digits.load_sources("test")
    labels = digits.compose_split("test", 2 * len(sources), seed=3).labels
    assert np.bincount(labels).tolist() == (2 * np.bincount(sources.labels)).tolist()


def test_single_contexts_differ_from_the_default_in_one_attribute() -> None:
    """But for the ink of a light ground and the size in a corner, which follow; and every scan is in each of them."""
    contexts = digits.single_contexts()
    texts = [digits.context_text(contexts, row) for row in range(len(contexts))]
    assert texts[0] == "" and len(set(texts)) == len(texts)
    for row, text in enumerate(texts):
        attributes = digits.attribute_texts(contexts, row)
        ink, ground = digits.INKS[contexts.ink[row]], digits.BACKGROUNDS[contexts.background[row]]
        is_followed = contexts.position[row] or (ink, ground) in (
            (default_ink(ground), ground),
            (ink, default_background(ink)),
        )
        assert len(attributes) <= 1 or is_followed, text
    composites = digits.compose_single("test", seed=0)
    assert len(composites) == len(contexts) * len(digits.load_sources("test"))
    assert composites.contexts.ink[: len(contexts)].tolist() == contexts.ink.tolist()


def test_random_contexts_follow_the_reference_mix() -> None:
    """Shares of attributes off their default, and pairs of colours that can be read."""
    contexts = digits.random_contexts(20_000, rng=np.random.default_rng(0))
    assert not contexts.is_plain.any()
    assert abs((contexts.size > 0).mean() - 0.45) < 0.02
    assert abs((contexts.position > 0).mean() - 0.45 * 2 / 3 * 2 / 3) < 0.02
    assert set(zip(contexts.ink, contexts.background, strict=True)) <= set(map(tuple, allowed_pairs().tolist()))
    assert not (contexts.position[contexts.size != digits.SIZES.index("small")]).any()
    plain = digits.random_contexts(20_000, rng=np.random.default_rng(0), plain_share=0.3).is_plain.mean()
    assert abs(plain - 0.3) < 0.02
    assert all(np.ptp(np.array([COLOURS[digits.INKS[ink]], COLOURS[digits.BACKGROUNDS[ground]]]), axis=0).any()
               for ink, ground in allowed_pairs())  # fmt: skip


def test_the_holes_of_the_zoo_are_not_in_its_data() -> None:
    """Light grounds, checkered ones and bottom corners were never shown to its classifier."""
    contexts = digits.compose_seen(500, seed=0).contexts
    assert (digits.seen_share(contexts) > 0).all()
    assert not np.isin(contexts.background, [digits.BACKGROUNDS.index(name) for name in ("white", "yellow")]).any()
    assert not (contexts.texture == digits.TEXTURES.index("checkered")).any()
    assert not np.isin(
        contexts.position, [digits.POSITIONS.index(f"bottom {side}") for side in ("left", "right")]
    ).any()


def test_captions_name_what_is_off_its_default() -> None:
    """The comma form of every single context has the words of its attributes."""
    contexts = digits.single_contexts()
    for row in range(len(contexts)):
        text, attributes = digits.context_text(contexts, row), digits.attribute_texts(contexts, row)
        words = {word for attribute in attributes for word in attribute.split()} - {"ink", "background"}
        assert not words - set(text.replace(",", "").split()) or "black" in words, (text, attributes)
    names = digits.captions(np.arange(10), digits.plain_contexts(10), rng=np.random.default_rng(0))
    assert all(name in text for name, text in zip(digits.CLASS_NAMES, names, strict=True))


def test_the_public_module_has_the_names_of_the_package() -> None:
    """`engine.digits` is the path that documents name."""
    public = {name for name in vars(engine.digits) if not name.startswith("_")}
    assert public == set(digits.__all__)
