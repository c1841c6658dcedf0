"""Commands that inspect runs as data and export data sets from them."""

from __future__ import annotations

import contextlib
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import engine
from engine.commands.arguments import JsonOption, written_here
from engine.commands.output import MAX_LISTED, complain, make_console, make_display, print_json
from engine.commands.sample_list import print_samples
from engine.commands.stopping import NOTHING_STORED, stop_on_signals
from engine.data.reading.format_registry import DEFAULT_FORMAT, FORMATS
from engine.errors import EXIT_DAMAGED, CorruptShardError, JobError
from engine.terminal import ELLIPSIS, printable
from engine.terminal import show as print

if TYPE_CHECKING:
    from rich.table import Table

    from engine.data.reading.corpus import Corpus
    from engine.data.reading.export_options import ExportOptions
    from engine.data.reading.inspection import Inspection
    from engine.data.reading.listing import SavedImages

    # A type checker takes no literals that are computed.
    FormatName = str
else:
    FormatName = Literal[tuple(FORMATS)]

# Of a value of a record, on a terminal.
MAX_VALUE_CHARS = 1000
MAX_COLUMNS = 100

RunsArgument = Annotated[
    list[str],
    typer.Argument(metavar="RUN", help="Folders or addresses of runs or merged data sets.", show_default=False),
]
ExportOutput = Annotated[
    str,
    typer.Option(
        "--output", metavar="URI", help="Folder or address for the new data set; must be empty.", show_default=False
    ),
]
FilterOption = Annotated[
    str | None,
    typer.Option(
        "--filter", metavar="EXPR", help='Filter samples, e.g. "risk > 2 and oracle_agrees"; see docs/reading.md.'
    ),
]
NameOption = Annotated[str, typer.Option(metavar="NAME", help="Name prefix of shards and of the keys of real images.")]
OrderOption = Annotated[
    int, typer.Option("--seed", metavar="N", help="Seed of the order and of the choice of real images.")
]
ReshardOption = Annotated[int, typer.Option(metavar="N", help="Samples per tar or parquet file.")]
DeduplicateOption = Annotated[
    float | None,
    typer.Option(
        metavar="X", help="Drop samples whose cosine similarity to an earlier sample of their class is at least this."
    ),
]
ClipOption = Annotated[
    str | None, typer.Option("--clip", metavar="A", help="CLIP model for --deduplicate. Default: the runs'.")
]
MixOption = Annotated[
    str | None,
    typer.Option(
        metavar="DATA", help="Real labelled images to mix in; the same forms as `prepare --data`.", show_default=False
    ),
]
RatioOption = Annotated[
    float | None,
    typer.Option(metavar="X", help="Share of real images, balanced by class, with --mix-real. Default: 0.5."),
]
PerClassOption = Annotated[
    int | None,
    typer.Option("--real-per-class", metavar="N", help="Real images of each class, in place of --real-ratio."),
]
RealClassesOption = Annotated[
    Literal["corpus", "all"] | None,
    typer.Option(
        "--real-classes",
        help="Classes of real images: those of the runs' samples (corpus, the default), or all of the target.",
    ),
]
LicenceOption = Annotated[
    str | None,
    typer.Option("--license", metavar="SPDX", help="Licence of the data set for its card, e.g. CC-BY-4.0."),
]
AuthorOption = Annotated[
    list[str] | None,
    typer.Option("--author", metavar="NAME", help="Author of the data set, for its card; repeatable."),
]
DryOption = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Show what would be taken and which keys would change; look for no duplicates, write nothing."
    ),
]
RejectedOption = Annotated[bool, typer.Option("--with-rejected", help="Include stored images of rejected samples.")]
SurplusOption = Annotated[bool, typer.Option("--with-surplus", help="Include accepted samples beyond their quota.")]
TargetsOption = Annotated[
    bool, typer.Option("--allow-different-targets", help="Allow scores of different targets in one data set.")
]


def inspect(
    runs: RunsArgument,
    filter_: FilterOption = None,
    key: Annotated[str | None, typer.Option(metavar="KEY", help="Show one sample with its whole record.")] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help=f"List, or with --save write, at most N samples. Default: list {MAX_LISTED}, write all.",
        ),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            callback=written_here,
            help="Write images: with --key that of the sample to this file, with --filter or --limit those of the"
            " listed samples into this folder.",
        ),
    ] = None,
    image: Annotated[
        Literal["sample", "start", "twin"],
        typer.Option(help="Image that --save writes: the sample, what it started from, or its unguided twin."),
    ] = "sample",
    as_json: JsonOption = False,
) -> None:
    """Show the contents of runs, finished or not; with --filter list the samples, from the highest risk on."""
    is_list = filter_ is not None or limit is not None
    if save is not None and key is None and not is_list:
        raise JobError("--save: select samples with --filter, or one with --key")
    if key is not None and limit is not None:
        raise JobError("--limit: lists several samples, and --key shows one; use one of them")
    if image != "sample" and save is None:
        raise JobError(f"--image {image}: says what --save writes; give --save PATH")
    corpus = engine.open_run(*runs)
    corpus = corpus if filter_ is None else corpus.filter(filter_, "--filter")
    if key is not None:
        _show_sample(corpus, key, save, image, as_json)
    elif is_list:
        _list_samples(corpus, limit, save, image, as_json)
    else:
        _show_contents(corpus, as_json, {})


def _show_contents(corpus: Corpus, as_json: bool, further: dict[str, Any]) -> None:
    """Print what is in runs; `further` are keys of the document."""
    from engine.data.reading import inspection

    inspected = inspection.inspect(corpus)
    if as_json:
        print_json(inspected.document | further)
    else:
        _print_inspection(inspected)


def _show_sample(corpus: Corpus, key: str, save: Path | None, image: str, as_json: bool) -> None:
    """Print the record of a sample, and write its image."""
    from engine.data.reading import inspection

    source, row = inspection.find_sample(corpus, key)
    if save is not None:
        is_own = image == "sample"
        data = inspection.read_image(source, row)[0] if is_own else inspection.read_second_image(corpus, key, image)
        inspection.save_image(save, data)
    if as_json:
        print_json(row)
        return
    for name, value in row.items():
        print(f"{name:<20} {_value_text(value)}")
    if save is not None:
        print(f"image written to {save}")


def _list_samples(corpus: Corpus, limit: int | None, save: Path | None, image: str, as_json: bool) -> None:
    """Print what is in the selected rows, and list them; write their images."""
    from engine.data.reading import listing

    most = limit if as_json or save is not None else limit or MAX_LISTED
    samples = listing.list_samples(corpus, most)
    saved = None if save is None else listing.save_images(corpus, samples, save, image)
    further: dict[str, Any] = {}
    if as_json:
        uris = [source.uri for source in corpus.runs]
        further["listed"] = [sample.to_document(uris[sample.run]) for sample in samples]
        further |= {} if saved is None else {"saved": _saved_document(saved, save)}
    damage = None
    try:
        _show_contents(corpus, as_json, further)
    except CorruptShardError as error:
        # The list and what was written are reported all the same.
        damage = error
    if not as_json:
        print_samples(corpus, samples, limit)
    if saved is not None:
        _report_saved(saved, save, as_json)
    if damage is not None:
        raise damage
    if saved is not None and saved.is_damaged:
        raise typer.Exit(EXIT_DAMAGED)


def _saved_document(saved: SavedImages, folder: Path | None) -> dict[str, Any]:
    missing = [{"key": key, "reason": reason} for key, reason in saved.missing]
    return {"folder": str(folder), "written": saved.num_written, "there": saved.num_equal, "missing": missing}


def _report_saved(saved: SavedImages, folder: Path | None, as_json: bool) -> None:
    """Print how many images were written, and on stderr the samples that have none."""
    if not as_json:
        there = f", {saved.num_equal} were there already" if saved.num_equal else ""
        print(f"{saved.num_written} image{'' if saved.num_written == 1 else 's'} written to {folder}{there}")
    if saved.missing:
        complain(f"no image of {len(saved.missing)} samples:")
        for key, reason in saved.missing[:MAX_LISTED]:
            complain(f"  {key}: {reason}")
        if len(saved.missing) > MAX_LISTED:
            complain(f"  and {len(saved.missing) - MAX_LISTED} more")


def _value_text(value: object) -> str:
    """A value of a record for a terminal, one that is longer than a screen by its beginning."""
    text = printable(str(value))
    if len(text) <= MAX_VALUE_CHARS:
        return text
    return f"{text[:MAX_VALUE_CHARS]}{ELLIPSIS} ({len(text):,} characters; --json prints them all)"


def merge(
    runs: RunsArgument,
    output: ExportOutput,
    samples_per_shard: ReshardOption = 1000,
    seed: OrderOption = 0,
    name: NameOption = "corpus",
    deduplicate: DeduplicateOption = None,
    clip: ClipOption = None,
    mix_real: MixOption = None,
    real_ratio: RatioOption = None,
    real_per_class: PerClassOption = None,
    real_classes: RealClassesOption = None,
    license_: LicenceOption = None,
    author: AuthorOption = None,
    with_rejected: RejectedOption = False,
    with_surplus: SurplusOption = False,
    allow_different_targets: TargetsOption = False,
    dry_run: DryOption = False,
    as_json: JsonOption = False,
) -> None:
    """Merge the accepted samples of runs into one data set: `export` to WebDataset without a filter."""
    export(
        runs, output, samples_per_shard=samples_per_shard, seed=seed, name=name, deduplicate=deduplicate, clip=clip,
        mix_real=mix_real, real_ratio=real_ratio, real_per_class=real_per_class, real_classes=real_classes,
        license_=license_, author=author, with_rejected=with_rejected, with_surplus=with_surplus,
        allow_different_targets=allow_different_targets, dry_run=dry_run, as_json=as_json,
    )  # fmt: skip


def export(
    runs: RunsArgument,
    output: ExportOutput,
    filter_: FilterOption = None,
    format_: Annotated[FormatName, typer.Option("--format", help="Format of the data set.")] = DEFAULT_FORMAT,
    folders: Annotated[
        Literal["index", "name"],
        typer.Option(
            help="Names of class folders in imagefolder: the class index (0003), in torchvision's class order, or"
            " the class name; folders.json has the label of each."
        ),
    ] = "index",
    samples_per_shard: ReshardOption = 1000,
    seed: OrderOption = 0,
    name: NameOption = "corpus",
    deduplicate: DeduplicateOption = None,
    clip: ClipOption = None,
    mix_real: MixOption = None,
    real_ratio: RatioOption = None,
    real_per_class: PerClassOption = None,
    real_classes: RealClassesOption = None,
    license_: LicenceOption = None,
    author: AuthorOption = None,
    with_rejected: RejectedOption = False,
    with_surplus: SurplusOption = False,
    allow_different_targets: TargetsOption = False,
    dry_run: DryOption = False,
    as_json: JsonOption = False,
) -> None:
    """Export the samples of runs that pass a filter as a new data set."""
    from engine.data.reading.export_options import DEFAULT_REAL_RATIO, REAL_CLASSES, ExportOptions

    if mix_real is None:
        _refuse_real({"--real-ratio": real_ratio, "--real-per-class": real_per_class, "--real-classes": real_classes})
    if real_ratio is not None and real_per_class is not None:
        raise JobError("--real-per-class: says how many, as --real-ratio does; give one of them")
    options = ExportOptions(
        output=output,
        format=format_,
        folders=folders,
        condition=filter_ or "",
        name=name,
        seed=seed,
        samples_per_shard=samples_per_shard,
        with_rejected=with_rejected,
        with_surplus=with_surplus,
        deduplicate=deduplicate,
        clip=clip,
        real=mix_real,
        real_ratio=DEFAULT_REAL_RATIO if real_ratio is None else real_ratio,
        real_per_class=real_per_class,
        real_classes=real_classes or REAL_CLASSES[0],
        license=license_ or "",
        authors=tuple(author or ()),
        allow_different_targets=allow_different_targets,
    )
    if dry_run:
        _preview(runs, options, as_json)
    else:
        _export(runs, options, as_json)


def _refuse_real(given: dict[str, Any]) -> None:
    """Refuse options of real images where there are none."""
    if names := [name for name, value in given.items() if value is not None]:
        raise JobError([f"{name}: requires --mix-real; give both, or omit it" for name in names])


def _preview(runs: list[str], options: ExportOptions, as_json: bool) -> None:
    from engine.data.reading.export import preview

    document = preview(tuple(runs), options)
    if as_json:
        print_json(document)
        return
    for run in document["runs"]:
        print(f"{run['uri']}: {run['num_taken']} samples")
    for notice in document["notices"]:
        print(_wrapped(notice))
    real = ", and real ones" if options.real is not None else ""
    more = " before near duplicates are left out" if options.deduplicate is not None else ""
    print(f"{document['images']} images{more}{real} would be in {document['output']}; nothing is written")


def _export(runs: list[str], options: ExportOptions, as_json: bool) -> None:
    from engine.data.reading.export import export as export_runs

    # Before work begins, whatever becomes of it.
    say = complain if as_json else print
    with stop_on_signals(NOTHING_STORED), contextlib.closing(make_display()) as display:
        exported = export_runs(tuple(runs), options, display.advance, lambda notice: say(_wrapped(notice)))
    if as_json:
        print_json(exported.manifest)
        return
    for line in exported.remarks:
        print(_wrapped(line))
    counts = exported.manifest["counts"]
    real = f", {counts['real']} of them real" if counts["real"] else ""
    print(f"{counts['images']} images{real} in {exported.address}")


def _wrapped(text: str) -> str:
    """A line for a terminal, continued below where it is long."""
    return textwrap.fill(text, MAX_COLUMNS, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _print_inspection(inspection: Inspection) -> None:
    """Print an inspection: runs, counts, medians and quantiles."""
    from engine.driver.progress import byte_size, medians_table

    document, console = inspection.document, make_console()
    for run in document["runs"]:
        _print_run(run)
    print(f"rows         {document['rows']}, {_listed(document['status'])}; {document['accepted']} accepted")
    print(f"samples      {document['samples']} accepted, with an image, within their quota")
    print(f"surplus      {document['surplus']}")
    if pairs := document.get("pairs"):
        print(f"pairs        with a start {pairs['starts']}, with an unguided twin {pairs['twins']}")
    print(f"schema       version {', '.join(document['schema_versions']) or 'of no row'}")
    if image := document["image"]:
        size = f"{image['width']} x {image['height']} pixels, {byte_size(image['bytes'])}"
        print(f"image        {size} ({image['format']}, the first one)")
    print(f"classes      {_listed(document['classes'])}")
    print(f"contexts     {_listed(document['contexts'])}")
    if inspection.groups:
        console.print(medians_table(inspection.groups))
    if document["quantiles"]:
        console.print(_quantiles_table(document["quantiles"]))


def _print_run(run: dict[str, Any]) -> None:
    from engine.data.run.curated import KEY, parse_curation
    from engine.data.run.curation_text import curation_facts
    from engine.data.run.notices import notice_lines
    from engine.driver.progress import byte_size

    print(printable(f"{run['uri']}: {run['name']}, {run['state']}; {run['shards']} shards with images"))
    print(f"  disk       {byte_size(run['disk_bytes'])}, of which tars and rows {byte_size(run['data_bytes'])}")
    print(f"  digest     {printable(run['digest']) or 'unknown'}")
    for line in notice_lines(run["notices"]):
        print(f"  notice     {line}")
    if KEY in run:
        for name, text in curation_facts(parse_curation(run[KEY])):
            print(printable(f"  {name.lower():<10} {text}"))
    for role, models in run["models"].items():
        for model in models if isinstance(models, list) else [models]:
            print(f"  {role:<10} {printable(_model_line(model))}")


def _quantiles_table(quantiles: dict[str, list[float]]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from engine.data.reading.inspection import QUANTILES

    table = Table(title="Quantiles over scored rows", title_justify="left", box=box.SIMPLE_HEAD)
    for head in ("score", *(f"{share:.0%}" for share in QUANTILES)):
        table.add_column(head, justify="left" if head == "score" else "right")
    for score, values in quantiles.items():
        table.add_row(Text(score), *(f"{value:.3g}" for value in values))
    return table


def _model_line(model: Any) -> str:
    from engine.models.calibration import NOTED, model_notes

    if not isinstance(model, dict):
        return str(model)
    text = ", ".join(name if value is True else str(value) for name, value in model.items() if name not in NOTED)
    try:
        notes = model_notes(model)
    except ValueError as error:
        # Anybody may have written the manifest.
        notes = [str(error)]
    return "; ".join([text, *notes])


def _listed(counts: dict[str, int]) -> str:
    first = [f"{printable(name) or 'none'} {count}" for name, count in list(counts.items())[:MAX_LISTED]]
    rest = [f"and {len(counts) - MAX_LISTED} more"] if len(counts) > MAX_LISTED else []
    return ", ".join(first + rest) or "none"
