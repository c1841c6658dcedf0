"""The price of half precision in guidance's decoder: the guided requests of a job, run once in each precision.

    uv run python tools/decoder_precision_price.py JOB RUNS [--samples 128] [--classifiers ADDRESS ...]
    uv run python tools/decoder_precision_price.py JOB RUNS --trial

A job may ask for half precision on a GPU alone, where it saves something; here the decision is made for it, so that a
CPU can show what it does to outcomes. Runs have the same samples, so differences are of pairs. Prints a Markdown table
with 95 % bootstrap intervals; runs that are complete are not made again. --trial makes no run: it prints what the trial
finds with 16 samples of each request.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from decoder_price import NUM_RESAMPLES, Values, kldb_of
from risky_figures import read_requests

from engine.commands.jobfile import read_job
from engine.driver.checks import check_job
from engine.driver.executors.local import LocalExecutor
from engine.driver.progress import PlainDisplay
from engine.driver.run import run_job
from engine.generation import decoder_precision, generator
from engine.job.plan import resolve_requests
from engine.job.spec import JobSpec
from engine.methods.risky.spec import RiskyGuidanceSpec
from engine.models.decoding import EXACT, Decoder
from engine.models.labels import read_labels
from engine.models.library_logging import quiet_libraries

NUM_TRIAL_SAMPLES = 16
Statistic = Callable[..., Values]
# What is reported of a request: its name, the values of both runs in the order of their samples, and their summary.
Row = tuple[str, Values, Values, Statistic]


def guided_job(options: argparse.Namespace, num_samples: int, output: Path) -> JobSpec:
    """Guided requests of a job file, with at least so many samples each; all, or those that are named."""
    decoder = [("models.guidance_decoder", options.decoder)] if options.decoder else []
    path, wanted = options.job, options.requests
    job = read_job(path, [("output.uri", str(output)), *decoder])
    requests = [
        plan.spec.model_copy(update={"count": -(-num_samples // len(plan.cells) // len(plan.spec.contexts))})
        for plan in resolve_requests(job, read_labels(job.models.target) or [])
        if plan.spec.method_record.is_guided and plan.spec.name in (wanted or [plan.spec.name])
    ]
    if not requests:
        raise SystemExit(f"{path}: no guided request{' of these names' if wanted else ''}; choose with --requests")
    return job.model_copy(update={"requests": tuple(requests)})


def run(job: JobSpec, precision: str) -> None:
    """Run a job in this process, with the decoder of guidance in a precision, the name of a torch type.

    Raises:
        SystemExit: it was stopped; its workers would go on in the precision of the next run.
    """
    Decoder.trial_precision = lambda self: precision  # type: ignore[method-assign]
    decoder_precision.keeps_direction = lambda cosines: True
    display = PlainDisplay(sys.stderr)
    summary = run_job(job, executor=LocalExecutor(1), resume="auto", confirmed=False, display=display)
    if summary.num_committed < summary.num_shards:
        raise SystemExit(f"{summary.uri} is incomplete; the same command continues it")


def print_trials(job: JobSpec, precision: str) -> None:
    """What the trial of each request says of a precision."""
    Decoder.trial_precision = lambda self: precision  # type: ignore[method-assign]
    generator.TRIAL_SAMPLES = NUM_TRIAL_SAMPLES
    for request in job.requests:
        alone = job.model_copy(update={"requests": (request,)})
        plan = check_job(alone, PlainDisplay(sys.stderr), lambda: None).plan
        print(f"- {request.name}:", *generator.Generator(alone, plan).notices.take(), flush=True)


def rows(job: JobSpec, runs: tuple[Path, Path], classifiers: list[str]) -> Iterator[tuple[str, Row]]:
    """Every row of the table, with the name of its request.

    Args:
        runs: with the exact decoder and in half precision.
        classifiers: addresses.
    """
    risky = [read_requests(run) for run in runs]
    for request in job.requests:
        if request.boundary is not None:
            for address in classifiers:
                exact, half = (kldb_of(run, request.name, address) for run in runs)
                yield request.name, (f"KLDB on {address.removeprefix('zoo:')}", exact, half, np.median)
            continue
        one, other = (run[request.name] for run in risky)
        spec = job.parameters_of(request)
        if isinstance(spec, RiskyGuidanceSpec) and spec.step == "polyak":
            name, target = f"distance to a risk of {spec.target_risk:g}", spec.target_risk
            yield request.name, (name, abs(one.risk - target), abs(other.risk - target), np.median)
        yield request.name, ("risk", one.risk, other.risk, np.median)
        yield request.name, ("target errs", one.error.astype(float), other.error.astype(float), np.mean)
        yield request.name, ("valid failures", one.valid.astype(float), other.valid.astype(float), np.mean)


def interval(values: Values, statistic: Statistic) -> str:
    """A statistic with its 95 % percentile bootstrap interval."""
    picks = np.random.default_rng(0).integers(0, len(values), (NUM_RESAMPLES, len(values)))
    low, high = np.quantile(statistic(values[picks], axis=1), (0.025, 0.975))
    return f"{float(statistic(values)):.3f} ({low:.3f} to {high:.3f})"


def print_prices(exact: Path, half: Path, job: JobSpec, classifiers: list[str]) -> None:
    """The table of two runs."""
    print(f"| request | samples | of it | {exact.name} | {half.name} | difference of a pair |\n|{'---|' * 6}")
    for request, (name, before, after, statistic) in rows(job, (exact, half), classifiers):
        if len(before) != len(after):
            raise SystemExit(f"{exact} and {half} have {len(before)} and {len(after)} samples of '{request}'")
        cells = [interval(values, statistic) for values in (before, after, after - before)]
        print(f"| {request} | {len(before)} | {name} | {' | '.join(cells)} |")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path)
    parser.add_argument("runs", type=Path, help="folder of the runs, one named after each precision")
    parser.add_argument("--samples", type=int, default=128, help="of each request, at least")
    parser.add_argument("--requests", nargs="+", default=[], metavar="NAME", help="some of them; default: all")
    parser.add_argument("--decoder", help="guidance looks through; default: the job's")
    parser.add_argument("--precision", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument(
        "--classifiers",
        nargs="+",
        default=["zoo:digits/classifier", "zoo:digits/classifier-b"],
        help="KLDB is measured on; the first one guides",
    )
    parser.add_argument("--trial", action="store_true", help=f"with {NUM_TRIAL_SAMPLES} samples of each request")
    arguments = parser.parse_args()
    quiet_libraries()
    if arguments.trial:
        job = guided_job(arguments, NUM_TRIAL_SAMPLES, arguments.runs)
        print_trials(job, arguments.precision)
        return
    exact, half = (arguments.runs / precision for precision in (EXACT, arguments.precision))
    for output in (exact, half):
        run(job := guided_job(arguments, arguments.samples, output), output.name)
    print_prices(exact, half, job, arguments.classifiers)


if __name__ == "__main__":
    main()
