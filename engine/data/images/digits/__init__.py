"""Composed 32 x 32 RGB images of handwritten digits, with captions.

The strokes are the 8 x 8 scans that scikit-learn ships (UCI "Optical Recognition of Handwritten Digits", CC BY 4.0).
A *source* is one such scan; sources are split once, so no scan serves two splits. A *context* says how a source is
drawn: ink and background colour, background texture, size, position. What a caption does not mention has its default.

Everything is a pure function of its arguments and a seed; arrays are vectorised over samples, `N` below. The models of
the zoo are trained and judged on these images, and `--data digits:...` reads them.
"""

from engine.data.images.digits.caption_texts import (
    BASE_TEMPLATES,
    ZERO_SHOT_TEMPLATE,
    attribute_texts,
    captions,
    context_text,
)
from engine.data.images.digits.contexts import (
    BACKGROUNDS,
    INKS,
    POSITIONS,
    SIZES,
    TEXTURES,
    Contexts,
    plain_contexts,
    random_contexts,
    seen_share,
    single_contexts,
)
from engine.data.images.digits.drawing import IMAGE_SIZE, Composites, compose, digit_centres
from engine.data.images.digits.scans import CLASS_NAMES, Sources, load_sources
from engine.data.images.digits.sets import compose_seen, compose_single, compose_split, training_batch

__all__ = [
    "BACKGROUNDS", "BASE_TEMPLATES", "CLASS_NAMES", "IMAGE_SIZE", "INKS", "POSITIONS", "SIZES", "TEXTURES",
    "ZERO_SHOT_TEMPLATE", "Composites", "Contexts", "Sources", "attribute_texts", "captions", "compose",
    "compose_seen", "compose_single", "compose_split", "context_text", "digit_centres", "load_sources",
    "plain_contexts", "random_contexts", "seen_share", "single_contexts", "training_batch",
]  # fmt: skip
