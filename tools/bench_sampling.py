"""How fast is sampling? diffusers' pipeline, the engine, and guidance as published, side by side on the same samples.

    uv run python tools/bench_sampling.py --size digits --output runs/bench

Sizes: the digits zoo; Stable Diffusion 1.x at 512 px (`sd1`) and Stable Diffusion 2.1 unCLIP at 768 px (`sd21-unclip`),
both real architectures with random weights; `tiny`, which takes seconds. Before anything is timed, the published loops
and the engine are compared sample by sample. All arms make the same samples, in turns, in this one process, which has
one thread on a CPU; those of several processes are a table of their own. Writes SIZE.json and SIZE.md, and with
`--into PAGE` the tables between that page's marks; exits with 1 if a comparison or an arm fails. docs/benchmarks.md
explains the columns.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import itertools
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from bench.arms import PROMPT, Arm, arms_of
from bench.checks import check_arms
from bench.flops import behind_tiny, count_arithmetic
from bench.measure import Measured, matmul_rate, profile, repeat, unet_rate, warm_up
from bench.programs import Batch, Bench
from bench.sizes import SIZES, Setting, digits_setting, random_setting
from bench.tables import Results, write_into
from bench.workers import Workers

from engine.data.run.manifest import software_versions
from engine.errors import JobError, first_line
from engine.job.spec import RuntimeSpec
from engine.models.addresses import resolve
from engine.models.hardware import CPU_ROWS, choose_hardware
from engine.models.library_logging import quiet_libraries

# More of them diffusers cannot decode at 512 px: its upsampling counts elements in 32 bits.
GPU_BATCH = 16


class Benchmark:
    """One run of the benchmark.

    Args:
        options: of the command line.
        setting: the models and the samples.
        device: `cpu` or `cuda`.
    """

    def __init__(self, options: argparse.Namespace, setting: Setting, device: str) -> None:
        self._options, self._setting, self._device = options, setting, device
        self._deadline = time.monotonic() + options.max_seconds
        arms = arms_of(setting)
        wanted = [arm for arm in arms if any(fnmatch.fnmatch(arm.name, one) for one in options.only)]
        self._arms = [arm for arm in arms if arm in wanted or arm.name in {one.reference for one in wanted}]
        about = describe(options.size, device) | {
            "num_steps": {family: setting.sampling_of(family).get("num_inference_steps", 0) for family in PROMPT},
            "repeats": options.repeats,
            "processes": options.processes,
        }
        self.results = Results(about=about, measured=[], checks=[], arithmetic={}, rates={})

    def run(self) -> None:
        """Everything; the files are written again after every group."""
        if self._device == "cuda":
            self.results.rates["bf16 matmul"] = matmul_rate(self._device, torch.bfloat16)
        self._count()
        for key, some in itertools.groupby(self._arms, key=lambda arm: arm.group):
            arms = list(some)
            report(f"{', '.join(key)}: {', '.join(arm.name for arm in arms)}")
            measured = [Measured(arm=arm) for arm in arms]
            self.results.measured += measured
            reason = self._reason(arms[0])
            try:
                if not reason:
                    (self._divided if arms[0].is_divided else self._group)(arms, measured)
            except JobError as error:
                reason = "; ".join(error.problems)
            except EOFError:
                reason = "a process that made samples has died"
                for one in measured:
                    one.is_broken, one.seconds, one.cpu_seconds = True, [], []
            for one in measured:
                one.reason = one.reason or ("" if one.seconds else reason)
            self.write()
            self._free()

    def write(self) -> None:
        """Write what is there."""
        folder = self._options.output
        folder.mkdir(parents=True, exist_ok=True)
        name = self._options.name or self._options.size
        (folder / f"{name}.json").write_text(json.dumps(self.results.as_json(), indent=1) + "\n")
        (folder / f"{name}.md").write_text(self.results.as_markdown())
        if self._options.into:
            write_into(self._options.into, self._options.size, self.results.as_markdown())

    def _count(self) -> None:
        setting = self._setting
        target, clip = resolve(setting.target), resolve(setting.clip)
        count = cache(partial(count_arithmetic, target=target, clip=clip))
        for family in {arm.family: None for arm in self._arms}:
            folder = resolve(setting.pipeline_of(family))
            self.results.arithmetic[family] = counted = count(folder)
            if setting.tiny:
                behind = behind_tiny(counted, folder, resolve(setting.tiny))
                self.results.arithmetic[f"{family}/tiny"] = behind

    def _reason(self, arm: Arm) -> str:
        """Why a group is not tried at all."""
        if arm.tiny and not self._setting.tiny:
            return "this size has no tiny autoencoder"
        if arm.is_divided and self._device != "cpu":
            return "for the cores of a CPU"
        if arm.runtime and self._device == "cpu":
            return "a runtime for a GPU; none is visible here"
        if time.monotonic() > self._deadline:
            return f"--max-seconds {self._options.max_seconds:g} had passed"
        return ""

    def _group(self, arms: Sequence[Arm], measured: Sequence[Measured]) -> None:
        bench = Bench(self._setting, arms, device=self._device, num_samples=self._options.num_samples)
        if arms[0].runtime and bench.hardware == choose_hardware(RuntimeSpec(device=self._device)):
            raise JobError("what `auto` means on this machine")
        batch = bench.batch(self._options.num_samples)
        if not arms[0].runtime and not arms[0].tiny:
            self._check(bench, batch)
            self._free()
        for one in measured:
            self._first(bench, one, batch)
        for _ in range(1, self._options.repeats):
            for one in measured:
                if not one.reason and time.monotonic() < self._deadline:
                    self._guarded(one, partial(repeat, bench, one, batch))
        self._report(measured)
        if "generator" in vars(bench):
            self.results.notices += bench.generator.notices.take()
        if time.monotonic() > self._deadline:
            return
        if self._device == "cuda" and not arms[0].tiny:
            operations = self.results.arithmetic[bench.family].unet
            part = batch.part(0, self._rows)
            self.results.rates[" ".join(arms[0].group)] = unet_rate(bench, part, operations)

    def _divided(self, arms: Sequence[Arm], measured: Sequence[Measured]) -> None:
        """The arms as workers make them, each process as many samples as the other arms make."""
        num_processes, num_each = self._options.processes, self._options.num_samples
        with Workers(self._setting, arms, num_processes=num_processes, num_each=num_each) as workers:
            for _ in range(self._options.repeats):
                for one in measured:
                    one.batch_size, one.num_samples = self._rows, num_each * num_processes
                    started = time.perf_counter()
                    cpu_seconds = workers.make(one.arm, one.batch_size)
                    one.note(time.perf_counter() - started, cpu_seconds)
        self._report(measured)

    def _report(self, measured: Sequence[Measured]) -> None:
        for one in measured:
            if one.seconds:
                took = f"{one.seconds_per_image:.3g} s an image, {one.cpu_seconds_per_image:.3g} of the processor"
                report(f"  {one.arm.name}: {took}")

    def _first(self, bench: Bench, one: Measured, batch: Batch) -> None:
        """Load what an arm needs and time it once; take a profile where one is wanted."""
        one.batch_size, one.num_samples = bench.batch_size(one.arm, self._rows), len(batch)

        def first() -> None:
            warm_up(bench, one, batch)
            repeat(bench, one, batch)
            if any(fnmatch.fnmatch(one.arm.name, wanted) for wanted in self._options.profile):
                one.profile = profile(bench, one.arm, batch.part(0, one.batch_size))

        self._guarded(one, first)

    def _guarded(self, one: Measured, work: Callable[[], None]) -> None:
        """Work for an arm, whose failure is noted and ends nothing else."""
        try:
            work()
        except torch.OutOfMemoryError:
            one.reason = f"a batch of {one.batch_size} does not fit the GPU's memory"
        except (RuntimeError, NotImplementedError, ImportError) as error:
            # The others are still worth measuring; the exit code reports it.
            one.reason, one.is_broken = f"{type(error).__name__}: {first_line(error)}", True
        self._free()

    def _check(self, bench: Bench, batch: Batch) -> None:
        """Compare programs in float32, whatever the precision that is timed."""
        if bench.hardware.dtype != "float32":
            runtime = {"precision": "fp32"}
            bench = Bench(self._setting, bench.arms, device=self._device, num_samples=len(batch), runtime=runtime)
        for check in check_arms(bench, batch.part(0, self._options.check_samples or len(batch))):
            report(f"  {check}")
            self.results.checks.append(check)

    @property
    def _rows(self) -> int:
        """Samples of a batch of the engine and of diffusers."""
        return self._options.batch_size or (GPU_BATCH if self._device == "cuda" else CPU_ROWS)

    def _free(self) -> None:
        gc.collect()
        if self._device == "cuda":
            torch.cuda.empty_cache()


def describe(size: str, device: str) -> dict[str, object]:
    """Where and by what the figures were made."""
    return {
        "size": size,
        "device": device,
        "hardware": torch.cuda.get_device_name() if device == "cuda" else processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "tf32": {"matmul": torch.backends.cuda.matmul.allow_tf32, "convolutions": torch.backends.cudnn.allow_tf32},
        "machine": platform.machine(),
        "versions": {"python": platform.python_version()} | software_versions(),
        "date": time.strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "tools/bench_sampling.py", *sys.argv[1:]]),
    }


def processor_name() -> str:
    """The CPU in words."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def report(line: str) -> None:
    """Progress."""
    print(line, file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder of the results")
    parser.add_argument("--name", help="of the files of results; default: the size")
    parser.add_argument("--models", type=Path, help="folder for random weights, kept; default: a temporary one")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    parser.add_argument("--num-samples", type=int, default=16, help="images of every arm, and of each process")
    parser.add_argument("--check-samples", type=int, help="images that are compared; default: all")
    parser.add_argument("--batch-size", type=int, help=f"default: {CPU_ROWS} on a CPU, {GPU_BATCH} on a GPU")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of a process, on a CPU; the engine's workers have one")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="of the arms that are divided")
    parser.add_argument("--into", type=Path, metavar="PAGE", help="page that takes the tables, between its marks")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="arms; their references come along")
    parser.add_argument("--profile", nargs="+", default=[], metavar="PATTERN", help="arms whose time is taken apart")
    parser.add_argument("--max-seconds", type=float, default=float("inf"), help="after this, no further round")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    options = parse(arguments)
    quiet_libraries()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu":
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="riskforge-bench-") as folder:
        if options.size == "digits":
            setting = digits_setting()
        else:
            report(f"building models of size {options.size}")
            setting = random_setting(options.size, options.models or Path(folder), device)
        benchmark = Benchmark(options, setting, device)
        benchmark.run()
    print(benchmark.results.as_markdown(), end="")
    sound = all(check.holds for check in benchmark.results.checks)
    return 0 if sound and not any(one.is_broken for one in benchmark.results.measured) else 1


if __name__ == "__main__":
    sys.exit(main())
