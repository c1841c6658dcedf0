"""The options of an export, and their checks against output and runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from engine.data.reading.corpus import Corpus
from engine.data.reading.format_registry import DEFAULT_FORMAT, FORMATS, check_format
from engine.data.reading.formats import check_folders
from engine.data.reading.selection import Chosen
from engine.data.run.shards import is_key
from engine.data.stores.base import Store
from engine.data.stores.built_output import occupying_names
from engine.data.stores.opening import open_store
from engine.errors import CorruptShardError, JobError, OutputError
from engine.job.spec_messages import nearest

# What builds the output, for the mark of an unfinished one.
EXPORT = "export"
DEFAULT_NAME = "corpus"
DEFAULT_REAL_RATIO = 0.5
# Of which classes real images are taken.
REAL_CLASSES = ("corpus", "all")
MAX_REAL_PER_CLASS = 10**7
# Of data and models, for hints.
COMMON_LICENCES = (
    "Apache-2.0", "BSD-3-Clause", "CC0-1.0", "CC-BY-4.0", "CC-BY-SA-4.0", "CC-BY-NC-4.0", "CC-BY-NC-SA-4.0",
    "CDLA-Permissive-2.0", "GPL-3.0-only", "GPL-3.0-or-later", "MIT", "ODbL-1.0",
)  # fmt: skip
MAX_LICENCE_CHARS = 200
MAX_AUTHORS = 100
MAX_AUTHOR_CHARS = 200

# Shard, real and class parts of a key come after the name.
MAX_NAME_CHARS = 60
MAX_SAMPLES_PER_SHARD = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """The options of an export.

    Attributes:
        output: folder of the new data set; empty, or not there yet.
        format: name of a format, of `engine.data.reading.format_registry`.
        folders: what `imagefolder` calls the folders of classes: `index` or `name`.
        condition: filter on the rows; empty for all samples.
        name: prefix of shards, and of the keys of real images.
        seed: of the order, and of the draw of real images.
        samples_per_shard: in each tar or parquet file.
        with_rejected, with_surplus: as for `Corpus.with_images`.
        deduplicate: cosine from which on two samples of a class are duplicates; None keeps all.
        clip: address of the CLIP model for it; None for the runs' own.
        real: labelled images to mix in, as for `engine.data.images.open_images`.
        real_ratio: their share of the images of the new data set.
        real_per_class: how many of each class the new data set has, in place of a share.
        real_classes: `corpus` for those of the synthetic images, `all` for all of the target's.
        license: SPDX identifier or expression of the new data set; empty where it is not known.
        authors: of the new data set, for its card.
        allow_different_targets: whether scores of different targets may be mixed.
    """

    output: str
    format: str = DEFAULT_FORMAT
    folders: str = "index"
    condition: str = ""
    name: str = DEFAULT_NAME
    seed: int = 0
    samples_per_shard: int = 1000
    with_rejected: bool = False
    with_surplus: bool = False
    deduplicate: float | None = None
    clip: str | None = None
    real: str | None = None
    real_ratio: float = DEFAULT_REAL_RATIO
    real_per_class: int | None = None
    real_classes: str = REAL_CLASSES[0]
    license: str = ""
    authors: tuple[str, ...] = ()
    allow_different_targets: bool = False


def check_options(options: ExportOptions) -> None:
    """Check the options that do not depend on the runs.

    Raises:
        JobError: a line for each option.
    """
    problems = []
    if not is_key(options.name) or len(options.name) > MAX_NAME_CHARS:
        problems.append(
            f"--name: {options.name!r} is not of a-z, 0-9 and hyphens with at most {MAX_NAME_CHARS} characters"
        )
    if not 1 <= options.samples_per_shard <= MAX_SAMPLES_PER_SHARD:
        problems.append(
            f"--samples-per-shard: {options.samples_per_shard} is not between 1 and {MAX_SAMPLES_PER_SHARD:,}"
        )
    if options.deduplicate is not None and not 0 < options.deduplicate <= 1:
        problems.append(f"--deduplicate: {options.deduplicate:g} is not a cosine above 0 and up to 1")
    if options.clip is not None and options.deduplicate is None:
        problems.append("--clip: is for --deduplicate; give both, or leave it out")
    if not (math.isfinite(options.real_ratio) and 0 < options.real_ratio < 1):
        problems.append(f"--real-ratio: {options.real_ratio:g} is not between 0 and 1")
    if options.real_per_class is not None and not 1 <= options.real_per_class <= MAX_REAL_PER_CLASS:
        problems.append(f"--real-per-class: {options.real_per_class} is not between 1 and {MAX_REAL_PER_CLASS:,}")
    if options.real_classes not in REAL_CLASSES:
        problems.append(f"--real-classes: '{options.real_classes}' is not one of {', '.join(REAL_CLASSES)}")
    problems += _author_problems(options.authors)
    if options.real is not None and options.format in FORMATS and FORMATS[options.format].has_pairs:
        problems.append(
            f"--mix-real: real images have no pair; leave it out, or choose another format than {options.format}"
        )
    if problems:
        raise JobError(problems)
    spdx_licence(options.license)
    check_format(options.format)
    check_folders(options.folders)


def _author_problems(authors: tuple[str, ...]) -> list[str]:
    problems = [
        f"--author: {author[:MAX_AUTHOR_CHARS]!r} is not a name of 1 to {MAX_AUTHOR_CHARS} printable characters"
        for author in authors
        if not (author.strip() and author.isprintable() and len(author) <= MAX_AUTHOR_CHARS)
    ]
    if len(authors) > MAX_AUTHORS:
        problems.append(f"--author: there are {len(authors)}; give at most {MAX_AUTHORS}")
    return problems


def spdx_licence(text: str) -> str:
    """A licence as SPDX writes it; empty stays empty.

    Args:
        text: an identifier such as `cc-by-4.0`, in capitals or not, or an expression such as `MIT OR Apache-2.0`.

    Raises:
        JobError: SPDX has no such licence; with those of similar names.
    """
    if not text:
        return ""
    from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

    try:
        if len(text) > MAX_LICENCE_CHARS:
            raise InvalidLicenseExpression
        return str(canonicalize_license_expression(text))
    except InvalidLicenseExpression:
        similar = nearest(text, list(COMMON_LICENCES))
        raise JobError(
            f"--license: {text[:MAX_LICENCE_CHARS]!r} is not a licence of SPDX{similar}; give an identifier of"
            " https://spdx.org/licenses, such as CC-BY-4.0, or LicenseRef-NAME for one of your own"
        ) from None


def check_export_output(options: ExportOptions, corpus: Corpus) -> Store:
    """The place of the output, which is empty or absent, and does not overlap with a run.

    Raises:
        OutputError: it is not.
    """
    store = open_store(options.output)
    resolved, shown = store.place, store.address()
    for source in corpus.runs:
        places = [store.place for store in source.stores]
        if any(resolved.is_relative_to(place) or place.is_relative_to(resolved) for place in places):
            raise OutputError(f"--output: {shown} is in the folder of '{source.uri}', or around it; choose one outside")
    if options.real is not None and resolved.is_relative_to(Path(options.real).expanduser().resolve()):
        raise OutputError(f"--output: {shown} is in the folder of --mix-real; choose one outside")
    if names := occupying_names(store, EXPORT):
        raise OutputError(f"--output: {shown} is not empty ({names[0]!r}); choose another, or remove it first")
    if resolved.parent == resolved:
        raise OutputError(f"--output: {shown} is the root of the file system; choose a folder")
    return store


def check_sources(corpus: Corpus, options: ExportOptions) -> None:
    """Check that the runs are compatible.

    Raises:
        JobError: they have different classes or targets.
    """
    _ = corpus.labels
    known = [source for source in corpus.runs if source.targets]
    targets = frozenset[str]().union(*(source.targets for source in known))
    if len(targets) > 1 and not options.allow_different_targets:
        first = known[0]
        other = next((source for source in known if source.targets != first.targets), first)
        shown = ", ".join(map(repr, sorted(targets)))
        raise JobError(
            f"RUN: '{first.uri}' and '{other.uri}' are scored by different targets ({shown}), so"
            " their risk and KLDB cannot be compared; --allow-different-targets takes them nevertheless"
        )


def check_classes(samples: list[Chosen], labels: tuple[str, ...]) -> None:
    """Check that every sample is of a class that there is.

    Raises:
        CorruptShardError: one is not.
    """
    for sample in samples:
        if not 0 <= sample.class_index < len(labels):
            raise CorruptShardError(
                f"RUN: the row of {sample.key} has class {sample.class_index} of {len(labels)} classes"
            )


def only_clip(corpus: Corpus) -> str:
    """The CLIP model of all runs.

    Raises:
        JobError: they have several, or none is known.
    """
    clips = sorted(frozenset[str]().union(*(source.clips for source in corpus.runs)))
    if len(clips) != 1:
        has = (
            f"have different CLIP models ({', '.join(map(repr, clips))})" if clips else "do not state their CLIP model"
        )
        raise JobError(f"--clip: the runs {has}; give the one that finds the near duplicates")
    return clips[0]
