"""Commands that read runs as data, and make data sets of them."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import engine
from engine.commands.arguments import JsonOption
from engine.commands.output import MAX_LISTED, complain, make_console, make_display, print_json
from engine.errors import EXIT_DRAINED, JobError
from engine.terminal import printable
from engine.terminal import show as print

if TYPE_CHECKING:
    from engine.data.reading.export_options import ExportOptions
    from engine.data.reading.inspection import Inspection

RunsArgument = Annotated[
    list[str], typer.Argument(metavar="RUN", help="Folders of runs or merged data sets.", show_default=False)
]
ExportOutput = Annotated[
    str, typer.Option("--output", metavar="URI", help="Folder of the new data set; must be empty.", show_default=False)
]
FilterOption = Annotated[
    str | None, typer.Option("--filter", metavar="EXPR", help='Such as "risk > 2 and oracle_agrees"; docs/reading.md.')
]
NameOption = Annotated[str, typer.Option(metavar="NAME", help="Prefix of shards and of keys of real images.")]
OrderOption = Annotated[int, typer.Option("--seed", metavar="N", help="Decides the order, and which real images.")]
ReshardOption = Annotated[int, typer.Option(metavar="N", help="Samples in each tar or parquet file.")]
DeduplicateOption = Annotated[
    float | None,
    typer.Option(metavar="X", help="Leave out samples as near as this cosine to an earlier one of their class."),
]
ClipOption = Annotated[
    str | None, typer.Option("--clip", metavar="A", help="CLIP model for --deduplicate. Default: the runs' own.")
]
MixOption = Annotated[
    str | None, typer.Option(metavar="DATA", help="Labelled images to mix in, as for prepare.", show_default=False)
]
RatioOption = Annotated[
    float | None, typer.Option(metavar="X", help="Share of the images that is real, with --mix-real. Default: 0.5.")
]
RejectedOption = Annotated[bool, typer.Option("--with-rejected", help="Stored images of rejected samples, too.")]
SurplusOption = Annotated[bool, typer.Option("--with-surplus", help="Accepted samples beyond their quota, too.")]
TargetsOption = Annotated[
    bool, typer.Option("--allow-different-targets", help="Scores of different targets may stand side by side.")
]


def inspect(
    runs: RunsArgument,
    filter_: FilterOption = None,
    key: Annotated[str | None, typer.Option(metavar="KEY", help="One sample, with its whole record.")] = None,
    save: Annotated[Path | None, typer.Option(metavar="FILE", help="With --key: write its image.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what is in runs, finished or not."""
    from engine.data.reading import inspection

    if save is not None and key is None:
        raise JobError("--save: writes the image of one sample; name it by --key")
    corpus = engine.open_run(*runs)
    corpus = corpus if filter_ is None else corpus.filter(filter_, "--filter")
    if key is None:
        found = inspection.inspect(corpus)
        if as_json:
            print_json(found.document)
        else:
            _print_inspection(found)
        return
    source, row = inspection.find_sample(corpus, key)
    if save is not None:
        data, _ = inspection.read_image(source, row)
        inspection.save_image(save, data)
    if as_json:
        print_json(row)
        return
    for name, value in row.items():
        print(f"{name:<20} {printable(str(value))}")
    if save is not None:
        print(f"image written to {save}")


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
    with_rejected: RejectedOption = False,
    with_surplus: SurplusOption = False,
    allow_different_targets: TargetsOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make one data set of the accepted samples of runs: `export` to WebDataset without a filter."""
    export(
        runs, output, samples_per_shard=samples_per_shard, seed=seed, name=name, deduplicate=deduplicate, clip=clip,
        mix_real=mix_real, real_ratio=real_ratio, with_rejected=with_rejected, with_surplus=with_surplus,
        allow_different_targets=allow_different_targets, as_json=as_json,
    )  # fmt: skip


def export(
    runs: RunsArgument,
    output: ExportOutput,
    filter_: FilterOption = None,
    format_: Annotated[
        Literal["webdataset", "imagefolder", "parquet"], typer.Option("--format", help="How images are stored.")
    ] = "webdataset",
    folders: Annotated[
        Literal["index", "name"],
        typer.Option(
            help="What imagefolder calls the folders of classes: their index (0003), in whose order torchvision numbers"
            " them, or their name; classes.json has the label of each."
        ),
    ] = "index",
    samples_per_shard: ReshardOption = 1000,
    seed: OrderOption = 0,
    name: NameOption = "corpus",
    deduplicate: DeduplicateOption = None,
    clip: ClipOption = None,
    mix_real: MixOption = None,
    real_ratio: RatioOption = None,
    with_rejected: RejectedOption = False,
    with_surplus: SurplusOption = False,
    allow_different_targets: TargetsOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write the samples of runs that pass a filter as a data set of their own."""
    from engine.data.reading.export_options import ExportOptions

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
        real_ratio=_real_ratio(real_ratio, mix_real),
        allow_different_targets=allow_different_targets,
    )
    _export(runs, options, as_json)


def _real_ratio(given: float | None, mix_real: str | None) -> float:
    from engine.data.reading.export_options import DEFAULT_REAL_RATIO

    if given is not None and mix_real is None:
        raise JobError("--real-ratio: is for --mix-real; give both, or leave it out")
    return DEFAULT_REAL_RATIO if given is None else given


def _export(runs: list[str], options: ExportOptions, as_json: bool) -> None:
    import contextlib

    from engine.data.reading.export import export as export_runs

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with contextlib.closing(make_display()) as display:
            done = export_runs(tuple(runs), options, display.advance)
    except KeyboardInterrupt:
        complain("stopped; nothing is stored, the same command begins again")
        raise typer.Exit(EXIT_DRAINED) from None
    if as_json:
        print_json(done.manifest)
        return
    for line in done.remarks:
        print(line)
    counts = done.manifest["counts"]
    real = f", {counts['real']} of them real" if counts["real"] else ""
    print(f"{counts['images']} images{real} in {done.path}")


def _print_inspection(found: Inspection) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from engine.data.reading.inspection import QUANTILES
    from engine.driver.progress import byte_size, medians_table

    document, console = found.document, make_console()
    for run in document["runs"]:
        print(printable(f"{run['uri']}: {run['name']}, {run['state']}; {run['shards']} shards with images"))
        print(f"  disk       {byte_size(run['disk_bytes'])}, of which tars and rows {byte_size(run['data_bytes'])}")
        print(f"  digest     {printable(run['digest']) or 'unknown'}")
        for role, about in run["models"].items():
            for one in about if isinstance(about, list) else [about]:
                print(f"  {role:<10} {printable(_model_line(one))}")
    print(f"rows         {document['rows']}, {_listed(document['status'])}; {document['accepted']} accepted")
    print(f"samples      {document['samples']} accepted, with an image, within their quota")
    print(f"surplus      {document['surplus']}")
    print(f"schema       version {', '.join(document['schema_versions']) or 'unknown'}")
    if image := document["image"]:
        size = f"{image['width']} x {image['height']} pixels, {byte_size(image['bytes'])}"
        print(f"image        {size} ({image['format']}, the first one)")
    print(f"classes      {_listed(document['classes'])}")
    print(f"contexts     {_listed(document['contexts'])}")
    if found.groups:
        console.print(medians_table(found.groups))
    if document["quantiles"]:
        table = Table(title="Quantiles over scored rows", title_justify="left", box=box.SIMPLE_HEAD)
        for head in ("score", *(f"{share:.0%}" for share in QUANTILES)):
            table.add_column(head, justify="left" if head == "score" else "right")
        for score, values in document["quantiles"].items():
            table.add_row(Text(score), *(f"{value:.3g}" for value in values))
        console.print(table)


def _model_line(about: Any) -> str:
    return ", ".join(map(str, about.values())) if isinstance(about, dict) else str(about)


def _listed(counts: dict[str, int]) -> str:
    some = [f"{printable(name) or 'none'} {count}" for name, count in list(counts.items())[:MAX_LISTED]]
    more = [f"and {len(counts) - MAX_LISTED} more"] if len(counts) > MAX_LISTED else []
    return ", ".join(some + more) or "none"
