"""The design of a review: the items that are shown, what stands behind each, and the order in which a rater has them.

A design is stored once, as `_review/designs/DIGEST.json`, with the real images of its controls next to it. A rater's
browser receives ids and pixels alone; labels, kinds, keys and scores stay here.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engine.data.review.answers import DESIGNS, PAIR, REPEAT, Kind, Mode
from engine.data.stores.base import Store
from engine.errors import JobError, OutputError, first_line
from engine.methods.strict_json import parse_json
from engine.models.untrusted_files import MAX_DOCUMENT_BYTES

if TYPE_CHECKING:
    import pyarrow as pa

# Of a digest, in a file's name.
DIGEST_CHARS = 16
# Between an item and its repetition, where there are enough others.
MIN_DISTANCE = 12
# Of files for people whose names are not known.
NUM_FILE_ORDERS = 8

Id = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
Text = Annotated[str, Field(max_length=1000)]
Index = Annotated[int, Field(ge=-1, lt=10**6)]
# Where an image lies: the run's shards, `starts/`, the unguided twins, and the images that the design stores.
Source = Literal["samples", "starts", "twins", "stored"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ItemImage(_Record):
    """An image of an item: the key of the sample, or the id under which the design stores it."""

    source: Source
    name: Text


class Item(_Record):
    """An item, as `engine.data.review.answers.Answer` describes its fields.

    Attributes:
        id: random; all that a rater's browser receives of it, with the pixels.
        images: the image, or the two of a pair.
        question: of a pair, the class that is asked for in words; empty otherwise.
        repeats: id of the item that this one repeats; empty otherwise.
    """

    id: Id
    kind: Kind
    key: Text
    other_key: Text = ""
    images: Annotated[tuple[ItemImage, ...], Field(min_length=1, max_length=2)]
    question: Text = ""
    question_class: Index = -1
    label: Index
    subset: Annotated[tuple[Index, ...], Field(max_length=10**5)]
    stratum: Text
    weight: Annotated[float, Field(gt=0, lt=1e12)]
    repeats: Id | Literal[""] = ""


class Stratum(_Record):
    """A part of the population: how many images it has, and how many of them are shown."""

    name: Text
    num_images: Annotated[int, Field(ge=0)]
    num_drawn: Annotated[int, Field(ge=0)]


class Design(_Record):
    """The design of a review.

    Attributes:
        run: name of the run.
        run_digest: of its plan; empty where that is not known.
        labels: class names in index order.
        population: what the items stand for, in words.
        requests: that are reviewed.
        condition: filter that the samples pass; empty for none.
        is_all: whether rejected and surplus samples are in the population.
        score: the column whose thirds are strata; empty without.
        strata: of the population.
        items: in an order that says nothing.
    """

    version: Literal[1] = 1
    mode: Mode
    run: Text
    run_digest: Text
    seed: Annotated[int, Field(ge=0)]
    labels: Annotated[tuple[Text, ...], Field(min_length=1, max_length=10**5)]
    population: Text
    requests: tuple[Text, ...]
    condition: Annotated[str, Field(max_length=100_000)] = ""
    is_all: bool = False
    score: Text = ""
    strata: Annotated[tuple[Stratum, ...], Field(max_length=10**6)]
    items: Annotated[tuple[Item, ...], Field(min_length=1, max_length=10**6)]

    @property
    def by_id(self) -> dict[str, Item]:
        """The items by their ids."""
        return {item.id: item for item in self.items}

    def to_json(self) -> bytes:
        """The document as it is stored; equal designs give equal bytes."""
        return json.dumps(self.model_dump(mode="json"), ensure_ascii=False, sort_keys=True, indent=1).encode()

    @property
    def digest(self) -> str:
        """Digest of the stored bytes, in as many characters as names have."""
        return hashlib.sha256(self.to_json()).hexdigest()[:DIGEST_CHARS]


def make_ids(number: int, *about: object) -> list[str]:
    """Random ids, which are equal for equal designs and tell nothing about them."""
    draw = random.Random(hashlib.sha256(repr(about).encode()).hexdigest())
    ids = dict.fromkeys(f"{draw.getrandbits(64):016x}" for _ in range(number))
    assert len(ids) == number, "64 bits"
    return list(ids)


def order_of(design: Design, rater: str) -> list[tuple[Item, bool]]:
    """The items in the order of a rater, each with whether its two images change sides.

    An item that is repeated comes in the first half, and its repetition well after it.
    """
    digest = design.digest
    draw = random.Random(f"{digest} {rater}")
    repeats = [item for item in design.items if item.kind == REPEAT]
    repeated = {item.repeats for item in repeats}
    first = [item for item in design.items if item.kind != REPEAT]
    draw.shuffle(first)
    half = (len(first) + 1) // 2
    early = [place for place in range(half) if first[place].id not in repeated]
    draw.shuffle(early)
    for place in range(half, len(first)):
        if first[place].id in repeated and early:
            other = early.pop()
            first[place], first[other] = first[other], first[place]
    order = first
    for item in draw.sample(repeats, len(repeats)):
        place = next(number for number, other in enumerate(order) if other.id == item.repeats)
        order.insert(draw.randint(min(place + 1 + MIN_DISTANCE, len(order)), len(order)), item)
    return [(item, design.mode == PAIR and draw.random() < 0.5) for item in order]


# Storing -----------------------------------------------------------------------------------------------------------


def store_design(store: Store, design: Design, images: Mapping[str, bytes]) -> None:
    """Store a design, unless it is there already, and the images that it brings along, by their ids.

    Raises:
        OutputError: the store cannot be written to, or has another file under the name.
    """
    if images:
        store.publish(_images_name(design.digest), _images_bytes(images))
    name = f"{DESIGNS}/{design.digest}.json"
    if not store.publish(name, design.to_json()) and store.read(name) != design.to_json():
        raise OutputError(f"{store.address(name)}: is not the design of this name; move it away")


def _images_name(digest: str) -> str:
    return f"{DESIGNS}/{digest}.images.parquet"


def _images_bytes(images: Mapping[str, bytes]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.table({"id": list(images), "image": list(images.values())}, schema=_images_schema()), buffer)
    return buffer.getvalue()


def _images_schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema([pa.field("id", pa.string(), nullable=False), pa.field("image", pa.binary(), nullable=False)])


def stored_images(store: Store, design: Design) -> dict[str, bytes]:
    """The images that a design brings along, by their ids.

    Raises:
        OutputError: they are missing or damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    wanted = {image.name for item in design.items for image in item.images if image.source == "stored"}
    if not wanted:
        return {}
    name = _images_name(design.digest)
    data = store.read(name, max_bytes=2**30)
    try:
        table = pq.read_table(io.BytesIO(data)).cast(_images_schema())
    except (pa.ArrowException, OSError, ValueError) as error:
        raise OutputError(f"{store.address(name)}: is damaged ({first_line(error)}); draw another design") from None
    images = dict(zip(table["id"].to_pylist(), table["image"].to_pylist(), strict=True))
    if missing := wanted - images.keys():
        raise OutputError(f"{store.address(name)}: lacks the image {min(missing)!r}; draw another design")
    return images


def stored_digests(store: Store) -> list[str]:
    """Digests of the designs of a run."""
    names = [name.rpartition("/")[2] for name in store.list(DESIGNS)]
    return [name.removesuffix(".json") for name in names if name.endswith(".json")]


def read_design(store: Store, digest: str, option: str = "--design") -> Design:
    """A stored design by its digest, or by the beginning of it.

    Raises:
        JobError: there is none, or there are several.
        OutputError: it is damaged.
    """
    known = stored_digests(store)
    matching = [name for name in known if digest and name.startswith(digest)]
    if len(matching) != 1:
        has = f"it has {', '.join(known)}" if known else "it has none; `riskforge review RUN` draws one"
        problem = f"several designs begin with '{digest}'" if matching else f"the run has no design '{digest[:40]}'"
        raise JobError(f"{option}: {problem}; {has}")
    name = f"{DESIGNS}/{matching[0]}.json"
    try:
        design = Design.model_validate_json(json.dumps(parse_json(store.read(name, MAX_DOCUMENT_BYTES))))
        _check_whole(design, matching[0])
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        raise OutputError(f"{store.address(name)}: is no design ({place}); restore it, or draw another") from None
    except ValueError as error:
        raise OutputError(
            f"{store.address(name)}: is no design ({first_line(error)}); restore it, or draw another"
        ) from None
    return design


def _check_whole(design: Design, digest: str) -> None:
    """Check what the types of fields do not.

    Raises:
        ValueError: with the reason.
    """
    if design.digest != digest:
        raise ValueError("its content is not that of its name")
    if len(design.by_id) != len(design.items):
        raise ValueError("it has an id twice")
    num_images = 2 if design.mode == PAIR else 1
    for item in design.items:
        if len(item.images) != num_images or bool(item.other_key) != (design.mode == PAIR):
            raise ValueError(f"item {item.id} has another number of images than its mode")
        if max((item.label, item.question_class, *item.subset)) >= len(design.labels):
            raise ValueError(f"item {item.id} is of a class without a name")
        if item.repeats and design.by_id.get(item.repeats) is None:
            raise ValueError(f"item {item.id} repeats none")
