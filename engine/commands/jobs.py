"""Commands for a job before it runs: plan and cost, conditioning, schema."""

from __future__ import annotations

import contextlib
import re
import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from engine.commands.arguments import (
    AddressOption,
    DateOption,
    JobArgument,
    JsonOption,
    SetOption,
    WorkersOption,
    load_job,
    make_executor,
)
from engine.commands.neighbours_output import print_neighbours
from engine.commands.output import (
    MAX_LISTED,
    TERMINAL_COLUMNS,
    complain,
    make_console,
    make_display,
    print_artefact,
    print_json,
    print_some,
    warn,
)
from engine.commands.stopping import NOTHING_STORED, stop_on_signals
from engine.driver.executors.registry import DEFAULT_EXECUTOR, EXECUTORS
from engine.errors import EXIT_DRAINED, JobError
from engine.terminal import show as print

if TYPE_CHECKING:
    from engine.driver.cost import Cost, RequestCost
    from engine.generation.artefact import Conditioning
    from engine.job.plan import Plan
    from engine.job.spec import JobSpec
    from engine.methods.conditioning.predictor_evaluation import PredictorQuality
    from engine.methods.temperature import TemperatureFit
    from engine.models.path_comparison import PathDifference
    from engine.studies.prepare.program import Prepared

MAX_LINE_CHARS = 100
DEFAULT_GPU_MEMORY = "24GB"


def plan(
    job: JobArgument,
    validate: Annotated[bool, typer.Option("--validate", help="Only validate the job.")] = False,
    as_json: JsonOption = False,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure one batch of every request on this machine.")
    ] = False,
    price_per_hour: Annotated[
        float | None, typer.Option(metavar="X", min=0, help="Price of one device-hour; requires --calibrate.")
    ] = None,
    compares: Annotated[
        bool,
        typer.Option(
            "--compare-paths",
            help="Load every target, and compare its probabilities for eight images as guidance sees them (tensors) and"
            " as they are scored (8-bit images).",
        ),
    ] = False,
    memory: Annotated[
        bool, typer.Option("--memory", help="Estimate what fits a GPU, by configurations alone; no GPU is needed.")
    ] = False,
    gpu_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory of the GPU, such as 24GB (GiB); requires --memory.")
    ] = None,
    date: DateOption = None,
    set_: SetOption = None,
) -> None:
    """Show the shards, samples and cost of a job without running it."""
    others = {
        "--validate": validate, "--compare-paths": compares, "--calibrate": calibrate,
        "--price-per-hour": price_per_hour is not None,
    }  # fmt: skip
    if memory and (given := [name for name, is_given in others.items() if is_given]):
        raise JobError(
            f"--memory: estimates by configurations alone, and {given[0]} is of another plan; use one of them"
        )
    if validate and calibrate:
        raise JobError("--calibrate: makes samples, and --validate only checks; use one of them")
    if price_per_hour is not None and not calibrate:
        raise JobError("--price-per-hour: requires measured hours; add --calibrate")
    if gpu_memory is not None and not memory:
        raise JobError("--gpu-memory: is what --memory compares with; add --memory")
    gpu_bytes = _gpu_bytes(DEFAULT_GPU_MEMORY if gpu_memory is None else gpu_memory)
    spec = load_job(job, set_, date=date)
    if memory:
        _show_memory(job, spec, gpu_bytes, as_json)
        return
    if validate:
        _validate(job, spec, as_json, compares=compares)
        return
    from engine.driver.checks import plan_job
    from engine.driver.cost import job_cost

    try:
        planned = plan_job(spec, make_display()) if calibrate else plan_job(spec)
        cost = job_cost(spec, planned, _measure(spec, planned) if calibrate else None)
        advice = _advice(spec) if calibrate else None
        paths = _path_differences(spec) if compares else []
    except KeyboardInterrupt:
        complain("stopped; nothing is stored")
        raise typer.Exit(EXIT_DRAINED) from None
    target = _described_target(spec)
    if as_json:
        fields = _cost_fields(spec, cost, price_per_hour) | {"target": target} | _further_targets(spec)
        fields |= _label_maps(spec) | {"retrain": _described_training(spec)}
        print_json(fields | ({"guidance_decoder": advice} if advice else {}) | _warnings(spec, paths))
    else:
        _print_cost(spec, cost, price_per_hour)
        _print_target(spec, target)
        _print_paths(paths)
        _print_advice(spec, advice, is_counted=calibrate)
        _print_warnings(spec, paths)


def _gpu_bytes(size: str) -> int:
    """Bytes of a size such as `24GB`, which sellers of GPUs mean as GiB."""
    match = re.fullmatch(r"(\d{1,4}(?:\.\d+)?) ?(?:GB|GiB|G)", size, re.IGNORECASE)
    num_bytes = int(float(match[1]) * 2**30) if match else 0
    if not 0 < num_bytes <= 9999 * 2**30:
        raise JobError(f"--gpu-memory: {size!r}: give a number above 0, up to 9999, with the unit GB, such as 24GB")
    return num_bytes


def _check_classes(path: Path, job: JobSpec) -> list[str] | None:
    """Check the classes of the requests, and look for the images that they start from, where the target is here.

    Returns:
        The classes of the target; None where it is not on this machine.

    Raises:
        JobError: there is no such class, or there are no such images.
    """
    from engine.commands.jobfile import quoting_comments
    from engine.driver.checks import find_images
    from engine.job.plan import resolve_requests
    from engine.models.labels import read_labels

    labels = read_labels(job.models.target)
    if labels is not None:
        with quoting_comments(path):
            find_images(job, resolve_requests(job, labels), labels)
    return labels


def _show_memory(path: Path, job: JobSpec, memory_bytes: int, as_json: bool) -> None:
    from engine.generation.memory_plan import memory_fields, memory_lines
    from engine.models.job_checks import check_addresses
    from engine.models.library_logging import quiet_libraries

    check_addresses(job, with_artefacts=False, with_weights=False)
    _check_classes(path, job)
    quiet_libraries()
    fields = memory_fields(job, memory_bytes)
    if as_json:
        print_json({"gpu_memory_bytes": memory_bytes, "requests": fields})
        return
    for line in memory_lines(fields, memory_bytes):
        print(line)


DataOption = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        help="Labelled images: a folder with one subfolder per class (by name or index), WebDataset tars, a run,"
        " parquet, or a named data set such as digits:validation. Required, but for answers about a run.",
        show_default=False,
    ),
]
OutputOption = Annotated[
    str | None,
    typer.Option(
        metavar="URI",
        help="Folder or address for the artefact, such as conditioning-DIGEST. Default: OUTPUT-conditioning"
        " (OUTPUT-calibration), next to the job's output.uri.",
    ),
]
if TYPE_CHECKING:
    PrepareExecutor = str
else:
    PrepareExecutor = Literal["auto", *EXECUTORS]
ExecutorOption = Annotated[
    PrepareExecutor,
    typer.Option(
        help="Run workers as Ray actors, or this process alone; auto uses Ray for large data sets, and with"
        " --workers or --address."
    ),
]


OnlyOption = Annotated[
    Literal["calibration", "neighbours"] | None,
    typer.Option(
        help="calibration: only the temperature of the target, for models.calibration of any job."
        " neighbours: an oracle for models.oracles, the images themselves by their features from --encoder.",
        show_default=False,
    ),
]
EncoderOption = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="CLIP, SigLIP or DINOv2 model of --only neighbours: zoo:NAME/PART, a folder or a hub id.",
    ),
]


AnswersOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="People's answers, for models.validity: a run that was reviewed; or a table (.csv, .jsonl, .parquet) about"
        " the images of --data, with the columns key and answer, or key and a count for each class.",
    ),
]


def prepare(
    job: JobArgument,
    data: DataOption = None,
    output: OutputOption = None,
    components: Annotated[int, typer.Option(metavar="K", min=1, max=100, help="Gaussian components per class.")] = 1,
    only: OnlyOption = None,
    encoder: EncoderOption = None,
    answers: AnswersOption = None,
    executor: ExecutorOption = "auto",
    address: AddressOption = None,
    workers: WorkersOption = None,
    set_: SetOption = None,
) -> None:
    """Compute class statistics, an error predictor and the calibration of the target, or an oracle, from images.

    Or, with --answers, how many people agree with a label by what the oracles say of it.
    """
    is_divided = address is not None or workers is not None
    if answers is not None:
        is_alone = only is None and encoder is None and components == 1 and executor != "ray" and not is_divided
        _prepare_validity(load_job(job, set_), answers, data, output, is_alone=is_alone)
        return
    if data is None:
        raise JobError("--data: names no images; give some, or people's answers about a run with --answers")
    if is_divided and executor == "local":
        raise JobError("--address and --workers: apply to --executor ray alone; omit them, or --executor local")
    if only and components != 1:
        raise JobError(f"--components: are of class statistics, which --only {only} leaves out; omit one of them")
    if (only == "neighbours") != (encoder is not None):
        raise JobError("--encoder: names the CLIP model of --only neighbours; give both, or none")
    spec = load_job(job, set_, workers=workers)
    from engine.driver.checks import check_hardware

    check_hardware(spec, is_local=address is None)
    from engine.studies.prepare.program import prepare_calibration, prepare_conditioning, prepare_neighbours

    make: Any = prepare_calibration if only else partial(prepare_conditioning, components=components)
    if encoder is not None:
        make = partial(prepare_neighbours, encoder=encoder)
    kind = DEFAULT_EXECUTOR if executor == "auto" else executor
    with stop_on_signals(NOTHING_STORED):
        prepared = make(
            spec,
            data,
            display=make_display(),
            folder=output,
            executor=None if executor == "local" else make_executor(kind, spec, address, measures=False),
            only_large=executor == "auto" and not is_divided,
        )
    print_neighbours(prepared, spec) if only == "neighbours" else _print_prepared(prepared, spec)


def _prepare_validity(job: JobSpec, answers: str, data: str | None, output: str | None, *, is_alone: bool) -> None:
    """Make the artefact of `--answers`.

    Args:
        is_alone: whether no option is given that is of other artefacts.
    """
    from engine.commands.validity_output import print_validity
    from engine.driver.checks import check_hardware
    from engine.studies.prepare.validity import prepare_validity

    if not is_alone:
        raise JobError(
            "--answers: makes one artefact in this process; omit --only, --encoder, --components, --workers,"
            " --address and --executor ray"
        )
    check_hardware(job, is_local=True)
    with stop_on_signals(NOTHING_STORED):
        prepared = prepare_validity(job, answers, data, display=make_display(), folder=output)
    print_validity(prepared, job)


def schema() -> None:
    """Print the JSON Schema of a job file."""
    from engine.job.parsing import job_schema

    print_json(job_schema())


def _validate(path: Path, job: JobSpec, as_json: bool, *, compares: bool) -> None:
    """Check everything that can be checked without loading or downloading a model.

    Args:
        compares: whether to load the targets, and compare their paths.
    """
    from engine.data.run.output_folder import check_output
    from engine.data.stores.opening import open_store
    from engine.driver.checks import check_hardware
    from engine.models.artefacts import missing_artefacts
    from engine.models.job_checks import check_addresses

    check_addresses(job)
    check_hardware(job, is_local=False)
    check_output(open_store(job.output.uri))
    labels = _check_classes(path, job)
    missing, target = missing_artefacts(job), _described_target(job)
    paths = _path_differences(job) if compares else []
    if as_json:
        checked = {"valid": True, "classes_checked": labels is not None, "to_prepare": missing, "target": target}
        fields = checked | _further_targets(job) | _label_maps(job) | {"retrain": _described_training(job)}
        print_json(fields | _warnings(job, paths))
        return
    print(f"{path} is valid")
    _print_target(job, target)
    _print_paths(paths)
    _print_warnings(job, paths)
    for line in missing:
        print(f"to prepare before the run: {line}")
    if labels is None:
        print(f"the classes are not checked: {job.models.target} is not on this machine yet")


def _described_target(job: JobSpec) -> dict[str, Any]:
    """Address and temperature of the target; no temperature where it is not known yet."""
    from engine.models.calibration import describe_temperature, job_calibration
    from engine.models.labels import describe_head

    calibration, address = job_calibration(job, with_digest=False), job.models.target
    is_missing = job.models.calibration is not None and calibration is None
    temperature = {} if is_missing else describe_temperature(address, calibration)
    return {"address": address} | temperature | describe_head(address)


def _further_targets(job: JobSpec) -> dict[str, Any]:
    """Address and temperature of each further target; nothing where there is none."""
    from engine.models.calibration import describe_temperature
    from engine.models.labels import describe_head

    further = job.models.further_targets
    targets = [{"address": one} | describe_temperature(one, None) | describe_head(one) for one in further]
    return {"further_targets": targets} if targets else {}


def _described_training(job: JobSpec) -> dict[str, Any]:
    """Whether `retrain` can fine-tune the target, and a line that says what to do where it cannot."""
    from engine.models.trainability import training_line, untrainable

    address = job.models.target
    return {"can_train": not untrainable(address), "line": training_line(address, job.output.uri)}


def _print_target(job: JobSpec, target: dict[str, Any]) -> None:
    """Print the temperature of the target; where its artefact is missing, that it has to be made."""
    from engine.models.calibration import temperature_text

    text = temperature_text(target)
    if not text and job.models.calibration:
        text = f"that of {job.models.calibration}, which is not there yet (riskforge prepare makes it)"
    if text:
        print(f"temperature of the target: {text}")
    for line in _head_lines(job):
        print(line)
    for number, one in enumerate(_further_targets(job).get("further_targets", ())):
        own = temperature_text(one)
        print(f"target {number + 2}: {one['address']} guides too" + (f"; its temperature: {own}" if own else ""))
    if further := len(job.models.further_targets):
        print(f"each guided step differentiates {further + 1} targets")
    training = _described_training(job)["line"]
    print(training if len(training) <= MAX_LINE_CHARS else training.replace(": riskforge", ":\n  riskforge"))
    for line in _label_map_lines(job):
        print(line)
    if job.oracle_guides:
        print(f"guidance differentiates the oracle {job.models.all_oracles[-1]} too; acceptance does not ask it")


def _head_lines(job: JobSpec) -> list[str]:
    """What is done with the heads of classifiers that have one logit."""
    from engine.models.labels import describe_head
    from engine.models.oracle_kinds import oracle_kind

    models = job.models
    oracles = [one for one in models.all_oracles if oracle_kind(one) == "classifier"]
    heads = {one: describe_head(one) for one in (*models.targets, *models.transfer, *oracles)}
    return [f"{address}: {text}" for address, head in heads.items() for text in head.values()]


def _label_maps(job: JobSpec) -> dict[str, list[str]]:
    lines = _label_map_lines(job)
    return {"label_maps": lines} if lines else {}


def _label_map_lines(job: JobSpec) -> list[str]:
    """How models with other classes than the target are read; nothing where one is not on this machine yet."""
    from engine.models.job_label_maps import label_map_lines
    from engine.models.labels import read_labels

    labels = read_labels(job.models.target)
    return [] if labels is None else label_map_lines(job.models, labels)


def _path_differences(job: JobSpec) -> list[PathDifference]:
    """How much the two paths of each target differ, at the size of the job's images.

    Raises:
        JobError: a model cannot be located, downloaded or loaded.
    """
    from engine.models.addresses import resolve
    from engine.models.classifier import Classifier
    from engine.models.library_logging import quiet_libraries
    from engine.models.path_comparison import compare_paths
    from engine.models.pipelines.lookup import family_of

    quiet_libraries()
    pipeline = resolve(job.models.diffusion)
    height, width = family_of(pipeline, job.models.diffusion).image_size(pipeline)
    return [compare_paths(Classifier.load(address), height, width) for address in job.models.targets]


def _print_paths(paths: Sequence[PathDifference]) -> None:
    for path in paths:
        if not path.is_large:
            print(path.line)


def _warnings(job: JobSpec, paths: Sequence[PathDifference]) -> dict[str, Any]:
    """What a job asks for that is of no use, and how far the paths of its targets differ; nothing where there is none.

    Args:
        paths: of its targets, where they were compared.
    """
    import dataclasses

    from engine.models.artefacts import artefact_warnings

    lines = artefact_warnings(job) + [path.warning for path in paths if path.is_large]
    compared = {"paths": [dataclasses.asdict(path) for path in paths]} if paths else {}
    return compared | ({"warnings": lines} if lines else {})


def _print_warnings(job: JobSpec, paths: Sequence[PathDifference]) -> None:
    for line in _warnings(job, paths).get("warnings", [])[:MAX_LISTED]:
        warn(line)


def _measure(job: JobSpec, planned: Plan) -> Any:
    from engine.generation.calibrate import measure

    complain("measuring a batch of every request")
    return measure(job, planned)


def _advice(job: JobSpec) -> dict[str, Any] | None:
    """The advice to guide through a tiny decoder, with its text in `lines`; None where there is nothing to advise."""
    import dataclasses

    from engine.generation.decoder_advice import advice_lines, decoder_advice

    advice = decoder_advice(job)
    return dataclasses.asdict(advice) | {"lines": advice_lines(advice)} if advice else None


def _print_advice(job: JobSpec, advice: dict[str, Any] | None, *, is_counted: bool) -> None:
    """Print the advice; where nothing was counted, as torch is needed for that, how to get it."""
    from engine.driver.cost import guides_through_large_decoder

    for line in advice["lines"] if advice else ():
        print(line)
    if not is_counted and guides_through_large_decoder(job):
        print(
            "guidance differentiates the pipeline's decoder; --calibrate says what models.guidance_decoder would save"
        )


def _cost_fields(job: JobSpec, cost: Cost, price_per_hour: float | None) -> dict[str, Any]:
    import dataclasses

    hours = cost.device_hours
    return {
        "name": job.name,
        "shards": cost.num_shards,
        "samples": cost.num_samples,
        "bytes": cost.num_bytes,
        "device": cost.device or None,
        "load_seconds": cost.load_seconds if cost.device else None,
        "device_hours": hours,
        "price": None if hours is None or price_per_hour is None else hours * price_per_hour,
        "requests": [
            dataclasses.asdict(request) | {"hours_per_accepted": request.hours_per_accepted}
            for request in cost.requests
        ],
    }


def _print_cost(job: JobSpec, cost: Cost, price_per_hour: float | None) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from engine.driver.progress import byte_size, duration

    table = Table(box=box.SIMPLE_HEAD, show_footer=len(cost.requests) > 1)
    hours = cost.device_hours
    total_seconds = "" if hours is None else duration(sum(request.seconds or 0 for request in cost.requests))
    footers = ("all", f"{cost.num_shards}", f"{cost.num_samples}", byte_size(cost.num_bytes), total_seconds)
    for name, footer in zip(("request", "shards", "samples", "bytes", "one device"), footers, strict=True):
        if name != "one device" or hours is not None:
            table.add_column(name, footer, justify="left" if name == "request" else "right")
    for request in cost.requests:
        row = [str(request.num_shards), str(request.num_samples), byte_size(request.num_bytes)]
        table.add_row(Text(request.name), *row, *([] if request.seconds is None else [duration(request.seconds)]))
    make_console().print(table)
    print(f"output: {job.output.uri}")
    if hours is not None:
        print(
            f"measured on {cost.device}: {hours:.2g} device-hours, {cost.load_seconds:.0f} s of them to load the models"
        )
        for request in cost.requests:
            _print_yield(request)
        if price_per_hour is not None:
            print(f"price at {price_per_hour:g} an hour: {hours * price_per_hour:.2f}")


def _print_yield(request: RequestCost) -> None:
    """Print the cost of an accepted sample if there is a rule; a rough estimate, from one batch."""
    if request.measured is None:
        return
    accepted, attempted = request.measured
    cost = request.hours_per_accepted
    text = (
        "the cost of an accepted sample is unknown" if cost is None else f"{cost:.2g} device-hours per accepted sample"
    )
    print(f"{request.name}: {accepted} of {attempted} accepted in the measured batch: {text}")


def _print_prepared(prepared: Prepared, job: JobSpec) -> None:
    """Print the results by class and over all classes, the path of the artefact, and how a job uses it."""
    from engine.driver.progress import duration

    content = prepared.fitted
    num_images, num_errors = sum(content.counts), sum(content.num_errors)
    _print_classes(prepared)
    with_images = sum(count > 0 for count in content.counts)
    print(f"images         {num_images} in {with_images} of {len(content.labels)} classes, from {prepared.source}")
    if prepared.encoder:
        print(f"statistics     {_statistics_text(prepared.conditioning)}")
        print(f"encoder        {prepared.encoder}")
    print(f"unusable       {len(content.unusable)}")
    print_some([f"{image.name}: {image.reason}" for image in content.unusable])
    if prepared.advice:
        warn(prepared.advice)
    print(f"target errors  {num_errors} ({num_errors / num_images:.1%})")
    if prepared.encoder:
        _print_predictor(prepared.conditioning)
    _print_temperature(content.temperature)
    if prepared.encoder:
        print_some(prepared.conditioning.notes())
    origin = "existed already, equal" if prepared.was_there else duration(prepared.seconds)
    if print_artefact(prepared.address, origin):
        _print_use(prepared, job)


def _print_predictor(conditioning: Conditioning) -> None:
    _print_wrapped("predictor", conditioning.fit.verdict)
    if conditioning.fit.evaluation is not None:
        pooled, threshold = conditioning.fit.evaluation.pooled, conditioning.fit.evaluation.threshold
        precision = "not defined (no alarm)" if pooled.precision is None else f"{pooled.precision:.2f}"
        print(f"               precision {precision}, recall {pooled.recall:.2f} above a confidence of {threshold:g}")
    if conditioning.fit.advice:
        _print_wrapped("", f"what to do: {conditioning.fit.advice}")


def _print_wrapped(heading: str, text: str) -> None:
    """Print a text beside a heading, broken into lines."""
    print(textwrap.fill(text, TERMINAL_COLUMNS, initial_indent=f"{heading:<15}", subsequent_indent=" " * 15))


def _print_temperature(fit: TemperatureFit) -> None:
    fitted = f"fitted {fit.fitted:.4g}, NLL {fit.fitted_nll:.4f}"
    print(f"temperature    {fit.current:.4g}, NLL {fit.current_nll:.4f}; {fitted}")
    print(f"               {fit.verdict}")


def _print_use(prepared: Prepared, job: JobSpec) -> None:
    """Print what to write into a job, where the fitted temperature is better and this job does not name it yet."""
    from engine.models.artefacts import WITH_CALIBRATION, find_artefact

    path, used = prepared.path.absolute(), job.models.calibration
    if not prepared.fitted.temperature.is_better or (used and Path(used).absolute() in (path, path.parent)):
        return
    # The folder's own address where this is all that it holds.
    with contextlib.suppress(JobError):
        find_artefact(str(path.parent), WITH_CALIBRATION)
        path = path.parent
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    print(f"               for a job with this target: models: {{calibration: {shown}}}")


def _statistics_text(conditioning: Conditioning) -> str:
    components = conditioning.options["statistics"]["components"]
    return "one Gaussian per class" if components == 1 else f"a mixture of up to {components} Gaussians per class"


def _print_classes(prepared: Prepared) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from engine.driver.progress import ABSENT

    content, table = prepared.fitted, Table(box=box.SIMPLE_HEAD)
    evaluation = prepared.conditioning.fit.evaluation if prepared.encoder else None
    names = ("class", "images", "errors", "error rate", "AUC of the predictor, held out")
    for name in names if prepared.encoder else names[:-1]:
        table.add_column(name, justify="left" if name == "class" else "right")
    quality = {entry.class_index: entry for entry in evaluation.per_class} if evaluation else {}
    for index, (label, count, errors) in enumerate(
        zip(content.labels, content.counts, content.num_errors, strict=True)
    ):
        rate = f"{errors / count:.1%}" if count else ABSENT
        if index < MAX_LISTED:
            row = [escape(label), str(count), str(errors), rate, _auc_text(quality.get(index))]
            table.add_row(*(row if prepared.encoder else row[:-1]))
    make_console().print(table)
    if len(content.labels) > MAX_LISTED:
        print(f"and {len(content.labels) - MAX_LISTED} more classes in the artefact's document")


def _auc_text(quality: PredictorQuality | None) -> str:
    from engine.driver.progress import ABSENT

    if quality is None:
        return ABSENT
    if quality.auc is None:
        return f"too few ({quality.num_errors} errors, {quality.num_right} right)"
    return f"{quality.auc:.2f} ({quality.auc_low:.2f} to {quality.auc_high:.2f})"
