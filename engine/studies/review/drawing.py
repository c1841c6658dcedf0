"""Drawing a design from a run: samples in proportion to request, class and score, controls, and repetitions.

The draw is decided by the seed and the rows of the run, so that the same command finds its design again.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from engine.data.images import LabelledImage, open_images
from engine.data.reading.corpus import Corpus
from engine.data.reading.pairs import FOUND, START, TWIN, PairRows
from engine.data.review.answers import CHOICE, CONTROL_PLAIN, CONTROL_REAL, PAIR, REPEAT, SAMPLE, Kind
from engine.data.run.counts import class_code
from engine.data.run.outcomes import asked_classes
from engine.errors import JobError
from engine.job.columns import ASKED, PAIR_COLUMNS
from engine.job.records import REAL
from engine.job.spec_messages import nearest
from engine.methods.registry import UNGUIDED
from engine.studies.review.design import Design, Item, ItemImage, Stratum, make_ids
from engine.studies.review.images import png_bytes, reading_samples
from engine.studies.review.options import DrawOptions, check_options
from engine.studies.review.strata import Drawn, draw_stratified

if TYPE_CHECKING:
    import numpy as np

# Scores by which a run is divided into thirds; the first that it has.
SCORES = ("oracle_p_label_min", "risk")
THIRDS = ("low", "middle", "high")
NO_SCORE = "unscored"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A sample that can be shown.

    Attributes:
        subset: classes that were asked for.
        traits: request, class and third of the score, from coarse to fine.
        is_plain: whether it is of a request without guidance.
        start: the real image that it started from; empty without one.
    """

    key: str
    label: int
    subset: tuple[int, ...]
    traits: tuple[str, str, str]
    is_plain: bool
    start: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnDesign:
    """A design and the images that it brings along, by the ids of their items."""

    design: Design
    images: dict[str, bytes]


def draw_design(
    corpus: Corpus, options: DrawOptions, advance: Callable[[str], None] = lambda text: None
) -> DrawnDesign:
    """Draw the items of a review.

    Args:
        corpus: one run, without a filter.
        advance: progress callback.

    Raises:
        JobError: an option cannot be used, or the run has no image to show.
        CorruptShardError: the run's files are damaged.
    """
    check_options(options)
    if not corpus.labels:
        raise JobError("RUN: its class names are not known, so there is nothing to choose from; finish the run first")
    advance("reading the rows of the run")
    score = _score_of(corpus)
    rows = _population(corpus, options, score)
    draw = random.Random(f"{options.seed} review")
    reviewed, plain = _divided(rows, options)
    if options.is_pairs:
        strata, items = _draw_pairs(reviewed, corpus.labels, options, draw)
        images: dict[str, bytes] = {}
    else:
        drawn = draw_stratified([row.traits for row in reviewed], options.num_samples, draw)
        strata, items = _strata(drawn), _samples(reviewed, drawn, SAMPLE)
        controls, images = _draw_controls(corpus, rows, plain, items, options, draw, advance)
        items += controls
    items += _repetitions([item for item in items if item.kind == SAMPLE], options.repeats, draw)
    order = list(range(len(items)))
    draw.shuffle(order)
    source = corpus.runs[0]
    ids = make_ids(len(items), source.digest, options, [item.key for item in items])
    names = {item.id: ids[number] for number, item in enumerate(items)}
    design = Design(
        mode=PAIR if options.is_pairs else CHOICE,
        run=source.name,
        run_digest=source.digest,
        seed=options.seed,
        labels=corpus.labels,
        population=_population_text(options),
        requests=tuple(sorted({row.traits[0] for row in reviewed})),
        condition=options.condition,
        is_all=options.is_all,
        score=score,
        strata=strata,
        items=tuple(_renamed(items[place], names) for place in order),
    )
    return DrawnDesign(design=design, images={names[item]: data for item, data in images.items()})


def _renamed(item: Item, names: dict[str, str]) -> Item:
    """An item under its random id, and its image where the design stores it."""
    images = tuple(
        image.model_copy(update={"name": names[image.name]}) if image.source == "stored" else image
        for image in item.images
    )
    return item.model_copy(update={"id": names[item.id], "images": images, "repeats": names.get(item.repeats, "")})


def _population_text(options: DrawOptions) -> str:
    what = "scored attempts with an image" if options.is_all else "accepted samples"
    what += f" of {', '.join(options.requests)}" if options.requests else ""
    return what + (f" ({options.condition})" if options.condition else "")


# The population ----------------------------------------------------------------------------------------------------


def _score_of(corpus: Corpus) -> str:
    """The score by which strata are divided: the first of `SCORES` that any sample has."""
    return next((name for name in SCORES if name in corpus.columns and len(corpus.filter(f"{name} >= 0"))), "")


def _population(corpus: Corpus, options: DrawOptions, score: str) -> list[Row]:
    """The samples that can be drawn, plain ones too where they are controls.

    Raises:
        JobError: no sample is left, or the run has no request of a name.
    """
    _check_requests(corpus, options.requests)
    if re.search(r"\bhuman_agreement\b", options.condition):
        raise JobError(
            "--filter: human_agreement changes with every answer, and the design with it; draw without it, or go on"
            " with --design"
        )
    chosen = corpus.with_images(rejected=options.is_all, surplus=options.is_all)
    if options.condition:
        chosen = chosen.filter(options.condition, "--filter")
    if options.is_all:
        chosen = chosen.filter("scored")
    rows = list(_rows(chosen, score))
    if not rows:
        remedies = ["loosen --filter (what is unknown everywhere passes none)"] if options.condition else []
        remedies += ["let the run make some" if options.is_all else "give --all to review rejected ones"]
        remedy = ", or ".join(remedies)
        raise JobError(f"RUN: '{corpus.runs[0].uri}' has no {_population_text(options)}, so nothing to show; {remedy}")
    return rows


def _check_requests(corpus: Corpus, requests: Sequence[str]) -> None:
    import pyarrow.compute as pc

    if not requests:
        return
    known = sorted(pc.unique(corpus.to_table(["request"])["request"]).to_pylist())
    if unknown := [name for name in requests if name not in known]:
        has = ", ".join(known)
        raise JobError(
            [f"--request: the run has no request '{name}'{nearest(name, known)}; it has {has}" for name in unknown]
        )


def _rows(chosen: Corpus, score: str) -> Iterator[Row]:
    names = ["request", "method", *ASKED, *([score] if score else []), "start_key"]
    table = chosen.run_table(0, [name for name in names if name in chosen.columns])
    columns = {name: table[name].to_pylist() for name in table.column_names}
    empty = [None] * len(table)
    starts = columns.get("start_key", empty)
    thirds = _thirds(columns["request"], columns.get(score, empty))
    for place, key in enumerate(columns["key"]):
        if columns["method"][place] == REAL:
            continue
        record = {name: columns[name][place] for name in ASKED}
        subset = tuple(asked_classes(record))
        request, label = columns["request"][place], columns["class_index"][place]
        yield Row(
            key=key,
            label=label,
            subset=subset,
            traits=(request, class_code(key), thirds[place]),
            is_plain=columns["method"][place] == UNGUIDED.name,
            start=starts[place] or "",
        )


def _thirds(requests: Sequence[str], values: Sequence[float | None]) -> list[str]:
    """The third of its request in which each score lies; equal scores lie in the same one."""
    import numpy as np

    thirds = [NO_SCORE] * len(values)
    groups = np.asarray(requests, dtype=object)
    numbers = np.asarray([-1.0 if value is None else value for value in values], dtype=np.float64)
    for request in dict.fromkeys(requests):
        places: np.ndarray = np.flatnonzero((groups == request) & (numbers >= 0))
        if not len(places):
            continue
        cuts = np.quantile(numbers[places], [1 / 3, 2 / 3])
        for place, third in zip(places, np.searchsorted(cuts, numbers[places], side="left"), strict=True):
            thirds[place] = THIRDS[third]
    return thirds


# Items of a choice -------------------------------------------------------------------------------------------------


def _divided(rows: list[Row], options: DrawOptions) -> tuple[list[Row], list[Row]]:
    """What is reviewed, and the samples without guidance that are controls of it.

    Raises:
        JobError: there is nothing to review.
    """
    reviewed = [row for row in rows if row.traits[0] in options.requests]
    if options.requests and not reviewed:
        raise JobError(f"--request: no sample of {', '.join(options.requests)} has an image to show; leave it out")
    if not options.requests:
        guided = [row for row in rows if not row.is_plain]
        reviewed = rows if options.is_pairs or not guided else guided
    keys = {row.key for row in reviewed}
    return reviewed, [row for row in rows if row.is_plain and row.key not in keys]


def _draw_controls(
    corpus: Corpus,
    rows: list[Row],
    plain: list[Row],
    samples: Sequence[Item],
    options: DrawOptions,
    draw: random.Random,
    advance: Callable[[str], None],
) -> tuple[list[Item], dict[str, bytes]]:
    """Items of both kinds of controls, and the images that the design stores."""
    keys = {item.key for item in samples}
    controls = _plain_controls(corpus, plain, keys, options.controls, draw)
    advance("reading real images for controls")
    real, images = _real_controls(corpus, rows, keys, options, draw)
    return controls + real, images


def _samples(rows: Sequence[Row], drawn: Drawn, kind: Kind) -> list[Item]:
    return [
        _item(rows[place], kind, stratum, drawn.weight(stratum))
        for place, stratum in zip(drawn.places, drawn.strata, strict=True)
    ]


def _item(row: Row, kind: Kind, stratum: str, weight: float) -> Item:
    image = ItemImage(source="samples", name=row.key)
    return _raw(kind, row.key, (image,), row.label, row.subset, stratum, weight)


def _raw(
    kind: Kind,
    key: str,
    images: tuple[ItemImage, ...],
    label: int,
    subset: Sequence[int],
    stratum: str,
    weight: float,
    **others: Any,
) -> Item:
    """An item whose id is to be made: until then it is its kind and name."""
    return Item.model_construct(
        id=f"{kind}:{key}{others.get('other_key', '')}",
        kind=kind, key=key, images=images, label=label, subset=tuple(subset), stratum=stratum, weight=weight, **others,
    )  # fmt: skip


def _plain_controls(corpus: Corpus, plain: list[Row], shown: set[str], number: int, draw: random.Random) -> list[Item]:
    """Samples of requests without guidance, in proportion to their strata; where there are none, unguided twins."""
    if plain:
        drawn = draw_stratified([row.traits for row in plain], number, draw)
        return _samples(plain, drawn, CONTROL_PLAIN)
    twins = _with_companion(corpus, (TWIN, FOUND))
    # A twin resembles its sample, so that of another one is preferred.
    others = _preferring(twins, lambda key: key not in shown, number, draw)
    rows = {row.key: row for row in _rows_of(corpus, others)}
    return [
        _raw(
            CONTROL_PLAIN, f"twins/{key}", (ItemImage(source="twins", name=key),), rows[key].label, rows[key].subset,
            f"{rows[key].traits[0]}/twins", 1.0,
        )
        for key in others
    ]  # fmt: skip


def _real_controls(
    corpus: Corpus, rows: Sequence[Row], shown: set[str], options: DrawOptions, draw: random.Random
) -> tuple[list[Item], dict[str, bytes]]:
    """Real images: those of an address, brought to the size of the samples, or else starts of the run."""
    if options.real is not None:
        size = _common_size(corpus, rows)
        return _given_images(corpus.labels, options.real, size, options.controls, draw)
    shown_starts = {row.start for row in rows if row.key in shown}
    starts = {row.key: row.start for row in rows if row.start}
    known = set(_with_companion(corpus, (START,)))
    # Once each, however many samples started from it.
    unique = {start: key for key, start in starts.items() if key in known}
    keys = _preferring(sorted(unique.values()), lambda key: starts[key] not in shown_starts, options.controls, draw)
    by_key = {row.key: row for row in rows}
    items = [
        _raw(
            CONTROL_REAL, f"starts/{key}", (ItemImage(source="starts", name=key),), by_key[key].label,
            by_key[key].subset, "starts", 1.0,
        )
        for key in keys
    ]  # fmt: skip
    return items, {}


def _preferring(keys: Sequence[str], is_better: Callable[[str], bool], number: int, draw: random.Random) -> list[str]:
    """Some of the keys at random; those that are better first."""
    mixed = draw.sample(list(keys), len(keys))
    return sorted(sorted(mixed, key=is_better, reverse=True)[:number])


def _with_companion(corpus: Corpus, places: Sequence[str]) -> list[str]:
    """Keys of the stored samples that have a start or a twin."""
    if any(name not in corpus.columns for name in PAIR_COLUMNS):
        return []
    stored = corpus.with_images(rejected=True, surplus=True)
    pairs = PairRows(corpus.runs[0], stored.run_table(0, PAIR_COLUMNS))
    return pairs.keys_of(*places)


def _rows_of(corpus: Corpus, keys: Iterable[str]) -> Iterator[Row]:
    wanted = set(keys)
    return (row for row in _rows(corpus.with_images(rejected=True, surplus=True), "") if row.key in wanted)


def _common_size(corpus: Corpus, rows: Sequence[Row]) -> tuple[int, int]:
    """The size that most of some samples have."""
    keys = [row.key for row in rows[:: max(1, len(rows) // 16)]]
    with reading_samples(corpus, keys) as read:
        sizes = Counter(read(key).size for key in keys)
    return sizes.most_common(1)[0][0]


def _given_images(
    labels: tuple[str, ...], address: str, size: tuple[int, int], number: int, draw: random.Random
) -> tuple[list[Item], dict[str, bytes]]:
    """Some of the images at an address, each as likely as any other (reservoir sampling), few of them decoded.

    Raises:
        JobError: none of them can be used.
    """
    import PIL.Image
    import PIL.ImageOps

    source = open_images(address, labels, "--real")
    kept: list[LabelledImage] = []
    num_seen = 0
    for file in source.files:
        for read in file():
            place = len(kept) if len(kept) < number else draw.randrange(num_seen + 1)
            if place >= number:
                num_seen += 1
                continue
            found = read()
            if not isinstance(found, LabelledImage):
                continue
            num_seen += 1
            # Another size or shape would give a real image away.
            fitted = replace(found, image=PIL.ImageOps.fit(found.image, size, PIL.Image.Resampling.LANCZOS))
            kept[place:] = [fitted, *kept[place + 1 :]]
    if number and not kept:
        raise JobError(f"--real: '{address}' has no image that can be used (read as {source.kind})")
    items, images = list[Item](), dict[str, bytes]()
    for place, one in enumerate(kept):
        key = one.name[-300:]
        stored = ItemImage(source="stored", name=f"{CONTROL_REAL}:{place}/{key}")
        item = _raw(CONTROL_REAL, key, (stored,), one.class_index, (one.class_index,), "real", 1.0)
        items.append(item.model_copy(update={"id": stored.name}))
        images[stored.name] = png_bytes(one.image)
    return items, images


# Pairs -------------------------------------------------------------------------------------------------------------


def _draw_pairs(
    rows: list[Row], labels: tuple[str, ...], options: DrawOptions, draw: random.Random
) -> tuple[tuple[Stratum, ...], list[Item]]:
    """Pairs of samples that were asked for the same, in proportion to the samples of each class.

    Raises:
        JobError: no class has two samples.
    """
    groups: dict[tuple[int, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(sorted(row.subset)), []).append(row)
    groups = {subset: some for subset, some in sorted(groups.items()) if len(some) > 1}
    if not groups:
        raise JobError("--pairs: no class has two samples with an image, so there is nothing to compare")
    # As many as there are samples; more would show each image many times.
    traits = [("+".join(map(str, subset)),) for subset, some in groups.items() for _ in some]
    drawn = draw_stratified(traits, options.num_samples, draw)
    counts = Counter(traits[place][0] for place in drawn.places)
    items: list[Item] = []
    for subset, some in groups.items():
        stratum = "+".join(map(str, subset))
        items += [
            _pair(pair, subset, labels, f"pairs/{stratum}", len(some) / counts[stratum])
            for pair in _pairs_of(some, counts[stratum], draw)
        ]
    sizes = Counter(item.stratum for item in items)
    names = {f"pairs/{'+'.join(map(str, subset))}": len(some) for subset, some in groups.items()}
    return _stratum_records(names, sizes), items


def _pairs_of(rows: list[Row], number: int, draw: random.Random) -> Iterator[tuple[Row, Row]]:
    """Different pairs of different samples, each sample in about as many."""
    number = min(number, len(rows) * (len(rows) - 1) // 2)
    seen: set[frozenset[str]] = set()
    while len(seen) < number:
        mixed = draw.sample(rows, len(rows))
        for first, second in zip(mixed[::2], mixed[1::2], strict=False):
            pair = frozenset((first.key, second.key))
            if pair not in seen and len(seen) < number:
                seen.add(pair)
                yield first, second


def _pair(pair: tuple[Row, Row], subset: tuple[int, ...], labels: tuple[str, ...], stratum: str, weight: float) -> Item:
    first, second = pair
    images = tuple(ItemImage(source="samples", name=row.key) for row in pair)
    return _raw(
        SAMPLE, first.key, images, first.label, subset, stratum, weight,
        other_key=second.key,
        question=" and ".join(labels[index] for index in subset)[:1000],
        question_class=subset[0] if len(subset) == 1 else -1,
    )  # fmt: skip


# Common ------------------------------------------------------------------------------------------------------------


def _repetitions(items: Sequence[Item], number: int, draw: random.Random) -> list[Item]:
    """Some items again, to see whether a rater answers the same."""
    chosen = draw.sample(list(items), min(number, len(items)))
    return [
        item.model_copy(update={"id": f"{REPEAT}:{item.id}", "kind": REPEAT, "repeats": item.id}) for item in chosen
    ]


def _strata(drawn: Drawn) -> tuple[Stratum, ...]:
    return _stratum_records(drawn.sizes, Counter(drawn.strata))


def _stratum_records(sizes: dict[str, int], counts: Counter[str]) -> tuple[Stratum, ...]:
    return tuple(Stratum(name=name, num_images=size, num_drawn=counts[name]) for name, size in sizes.items())
