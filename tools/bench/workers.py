"""The engine as it runs on a CPU: several processes of one thread each, like its workers."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from bench.arms import Arm
from bench.measure import make
from bench.programs import Bench
from bench.sizes import Setting
from engine.models.library_logging import quiet_libraries


class Workers:
    """Processes that make the samples of a group of arms, each its part, with models loaded. A context manager.

    Args:
        setting: the models and the samples.
        arms: of one group.
        num_processes: how many.
        num_each: samples of each.

    Raises:
        EOFError: a process has died; its traceback is on the terminal.
    """

    def __init__(self, setting: Setting, arms: Sequence[Arm], *, num_processes: int, num_each: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._lines: list[Connection] = []
        self._processes: list[Any] = []
        for number in range(num_processes):
            ours, theirs = context.Pipe()
            place = number * num_each, num_processes * num_each
            process = context.Process(target=_serve, args=(theirs, setting, list(arms), num_each, *place), daemon=True)
            process.start()
            # Only the process holds its end now: when it dies, the pipe is closed.
            theirs.close()
            self._lines.append(ours)
            self._processes.append(process)
        for line in self._lines:
            line.recv()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *failure: object) -> None:
        for line in self._lines:
            line.close()
        for process in self._processes:
            process.join()

    def make(self, arm: Arm, batch_size: int) -> float:
        """Let every process make its samples of an arm; the processors' seconds of all, when all have.

        Raises:
            EOFError: a process has died; its traceback is on the terminal.
        """
        for line in self._lines:
            line.send((arm.name, batch_size))
        return sum(line.recv() for line in self._lines)


def _serve(line: Connection, setting: Setting, arms: list[Arm], num_each: int, start: int, total: int) -> None:
    """A process: load the models, report so, make what is asked for until the pipe is closed."""
    torch.set_num_threads(1)
    quiet_libraries()
    bench = Bench(setting, arms, device="cpu", num_samples=total)
    batch = bench.batch(total).part(start, start + num_each)
    by_name = {arm.name: arm for arm in arms}
    for arm in arms:
        bench.load(arm)
    line.send(True)
    while True:
        try:
            name, batch_size = line.recv()
        except EOFError:
            return
        started = time.process_time()
        make(bench, by_name[name], batch, batch_size)
        line.send(time.process_time() - started)
