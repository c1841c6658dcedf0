"""The page of a review: one document for the server's raters, and one that holds its images for others."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.data.review.answers import PAIR
from engine.errors import JobError
from engine.studies.review.design import NUM_FILE_ORDERS, Design, Item, ItemImage, order_of

if TYPE_CHECKING:
    from jinja2 import Template

FORMAT = "riskforge-review"
FORMAT_VERSION = 1
# A browser on a telephone still opens it.
MAX_FILE_BYTES = 100 * 10**6
# Above these numbers of classes a class takes a letter, two letters, or the beginning of its name.
MAX_DIGITS, MAX_LETTERS, MAX_CODES = 10, 26, 200
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_HERE = Path(__file__).parent


def class_keys(labels: Sequence[str]) -> list[str]:
    """What is typed for each class; empty texts where there are so many that names are typed."""
    number = len(labels)
    if number <= MAX_DIGITS:
        own = [_digit_of(label) for label in labels]
        if all(own) and len(set(own)) == number:
            return own
        return [str((place + 1) % 10) for place in range(number)]
    if number <= MAX_LETTERS:
        return _codes(labels, lambda name: (*name, *string.ascii_lowercase))
    if number <= MAX_CODES:
        letters = string.ascii_lowercase
        return _codes(labels, lambda name: (*_pairs(name), *(a + b for a in (*name[:1], *letters) for b in letters)))
    return [""] * number


def _digit_of(label: str) -> str:
    name = label.strip().lower()
    return str(_DIGITS.index(name)) if name in _DIGITS else name if name in tuple(string.digits) else ""


def _pairs(name: str) -> Iterator[str]:
    """The first letter of a name with each later one."""
    return (name[0] + letter for letter in name[1:])


def _codes(labels: Sequence[str], candidates: Callable[[str], Sequence[str]]) -> list[str]:
    """For each class the first candidate that is free."""
    taken: set[str] = set()
    codes = []
    for label in labels:
        plain = unicodedata.normalize("NFKD", label).lower()
        code = next(one for one in candidates(re.sub("[^a-z]", "", plain)) if one not in taken)
        taken.add(code)
        codes.append(code)
    return codes


def shown_labels(labels: Sequence[str]) -> list[str]:
    """Class names as buttons have them; of equal ones with their index."""
    counts = Counter(labels)
    return [label if counts[label] == 1 else f"{label} ({place})" for place, label in enumerate(labels)]


def entries(design: Design, rater: str) -> list[list[Any]]:
    """The items for a browser, in the order of a rater: id, whether the images change sides, and the question."""
    return [[item.id, is_swapped, item.question] for item, is_swapped in order_of(design, rater)]


def image_ids(item: Item) -> list[str]:
    """The names of an item's images in a browser."""
    return [item.id] if len(item.images) == 1 else [f"{item.id}-{side}" for side in range(len(item.images))]


def images_by_id(design: Design) -> dict[str, ItemImage]:
    """All images of a design by the names that browsers have for them."""
    return {name: image for item in design.items for name, image in zip(image_ids(item), item.images, strict=True)}


def _config(design: Design, rater: str) -> dict[str, Any]:
    """What every page has. Nothing of labels, kinds, keys or the run's name: that may name the method."""
    is_pair = design.mode == PAIR
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "design": design.digest,
        "mode": design.mode,
        "labels": [] if is_pair else shown_labels(design.labels),
        "keys": [] if is_pair else class_keys(design.labels),
        "rater": rater,
        "num_items": len(design.items),
    }


def server_page(design: Design, rater: str) -> tuple[bytes, str]:
    """The page of the server, and the content policy that it is sent with."""
    page, script, style = _page(_config(design, rater) | {"is_file": False}, {})
    policy = (
        f"default-src 'none'; img-src blob: data:; style-src '{style}'; script-src '{script}'; connect-src 'self';"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy


def file_page(design: Design, rater: str, png: Callable[[ItemImage], bytes]) -> bytes:
    """A document that holds all images, and collects the answers itself.

    Args:
        rater: whose order it has; without one it has some orders, of which the rater's name selects one.
        png: reads an image.

    Raises:
        JobError: it would be too large.
    """
    names = images_by_id(design)
    images: dict[str, str] = {}
    num_bytes = 0
    for name, image in sorted(names.items()):
        images[name] = f"data:image/png;base64,{base64.b64encode(png(image)).decode()}"
        num_bytes += len(images[name])
        if num_bytes > MAX_FILE_BYTES:
            fitting = len(images) * len(design.items) // len(names)
            raise JobError(
                f"--html: the {len(names)} images have more than {MAX_FILE_BYTES / 1e6:.0f} MB, which browsers may not"
                f" open; give --samples of at most {max(1, int(0.8 * fitting))}, or several files by --seed"
            )
    names_of_orders = [rater] if rater else [f"order {number}" for number in range(NUM_FILE_ORDERS)]
    config = _config(design, rater) | {"is_file": True, "orders": [entries(design, name) for name in names_of_orders]}
    return _page(config, images)[0]


def _page(config: dict[str, Any], images: dict[str, str]) -> tuple[bytes, str, str]:
    """The document, and the digests of its script and style for a content policy."""
    from markupsafe import Markup

    script, style = _text("page.js"), _text("page.css")
    digests = [
        f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}" for text in (script, style)
    ]
    page = _template().render(
        script=Markup(script), style=Markup(style), script_hash=digests[0], style_hash=digests[1],
        is_file=config["is_file"], config=Markup(_script_json(config)), images=Markup(_script_json(images)),
    )  # fmt: skip
    return page.encode(), digests[0], digests[1]


@functools.cache
def _template() -> Template:
    """The document; it is compiled once in a process."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(_text("page.html.j2"))


@functools.cache
def _text(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _script_json(value: Any) -> str:
    """JSON that ends no script element, whatever texts it holds."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
