"""Data-parallel gradients on a few cores: forked replicas that share parameters and meet once a step.

Two processes of one thread each lose far less to a busy machine than one process of two threads, which waits at the
end of every operation. Their number is part of the recipe, not of the machine, so results do not depend on the latter.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from types import TracebackType

import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn

ReplicaLoss = Callable[[int, int], Tensor]
"""Loss of (step, replica), drawing its own share of the batch."""


class Replicas:
    """`count` processes that each add the gradient of their loss; replica 0 is the caller.

    Side effects: moves the parameters to shared memory and sets torch to one thread while open.
    """

    def __init__(self, module: nn.Module, loss: ReplicaLoss, *, count: int, steps: range) -> None:
        self.loss, self.count, self.steps = loss, count, steps
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        context = multiprocessing.get_context("fork")
        self.gradients = torch.zeros(count, sum(p.numel() for p in self.parameters))
        pipes = [context.Pipe() for _ in range(1, count)]
        self.pipes: list[Connection] = [own for own, _ in pipes]
        self.workers = [
            context.Process(target=self._follow, args=(replica, other), daemon=True)
            for replica, (_, other) in enumerate(pipes, start=1)
        ]
        self.module = module

    def __enter__(self) -> Replicas:
        self.num_threads = torch.get_num_threads()
        if self.count > 1:
            self.module.share_memory()
            self.gradients.share_memory_()
            torch.set_num_threads(1)
        for worker in self.workers:
            worker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self.workers:
            if kind is not None:
                worker.kill()
            worker.join()
        torch.set_num_threads(self.num_threads)

    def backward(self, step: int) -> float:
        """Fill `.grad` of every parameter with the mean gradient of all replicas; the loss of replica 0.

        Raises:
            RuntimeError: a replica has died.
        """
        try:
            for pipe in self.pipes:
                pipe.send(step)
            value = self.loss(step, 0)
            value.backward()
            for pipe, worker in zip(self.pipes, self.workers, strict=True):
                if pipe not in wait([pipe, worker.sentinel]):
                    raise EOFError
                pipe.recv()
        # A pipe whose other end is gone fails in sending or receiving, whichever comes first.
        except (EOFError, ConnectionError) as error:
            raise RuntimeError(f"a replica of step {step} has died; the same command goes on") from error
        if self.count > 1:
            self._add_gradients()
        return value.item()

    def _add_gradients(self) -> None:
        total = self.gradients[1:].sum(dim=0)
        sizes = [p.numel() for p in self.parameters]
        for parameter, part in zip(self.parameters, total.split(sizes), strict=True):
            assert parameter.grad is not None
            parameter.grad.add_(part.view_as(parameter)).div_(self.count)

    def _follow(self, replica: int, pipe: Connection) -> None:
        """Life of a worker: wait for new parameters, leave the gradient, wait again."""
        torch.set_num_threads(1)
        # Ctrl-C and `timeout` reach every process of the group; the caller ends this one after the step.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        # Inherited ends would keep the pipes open when the caller is killed, and this process with them.
        for inherited in self.pipes:
            inherited.close()
        for step in self.steps:
            for parameter in self.parameters:
                parameter.grad = None
            try:
                pipe.recv()
            except EOFError:
                return
            self.loss(step, replica).backward()
            torch.cat([_flat_gradient(p) for p in self.parameters], out=self.gradients[replica])
            pipe.send(step)


def _flat_gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter).flatten() if parameter.grad is None else parameter.grad.flatten()
