"""Which of a batch's samples an exception comes from: one of them, all of them (the job), or the machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from engine.errors import EverySampleFailedError, JobError, RiskforgeError, first_line
from engine.job.plan import SampleSpec
from engine.job.records import SampleResult, failed_record
from engine.job.spec import MAX_SEED
from engine.models.factories import reason_of
from engine.terminal import redacted

# In torch's message for an operator that `deterministic` forbids.
_NOT_DETERMINISTIC = "does not have a deterministic implementation"
# Older device and allocator errors are plain RuntimeErrors.
_MACHINE_SIGNS = (
    "CUDA error", "HIP error", "cuDNN error", "CUBLAS_STATUS", "can't allocate memory", "not enough memory",
    "out of memory",
)  # fmt: skip
# Errors of the operating system that persist; others are transient.
_LASTING = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
# In the class names of the network errors of libraries.
_NETWORK_SIGNS = ("Timeout", "Connect", "Network", "Transport", "Protocol")

Make = Callable[[Sequence[SampleSpec]], list[SampleResult]]


class Isolation:
    """Makes batches so that an exception of one sample makes that sample `failed`, not its neighbours.

    Args:
        names: of the requests by number, for messages.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        # Requests of which some batch went through, whatever became of its samples.
        self._proven: set[int] = set()

    def results(self, request: int, specs: Sequence[SampleSpec], make: Make) -> list[SampleResult]:
        """Results of a batch; after an exception one by one, to find the sample that it came from.

        Args:
            make: makes the results of samples of the request.

        Raises:
            EverySampleFailedError: this is the first batch of the request, and every sample of it raised.
            JobError: what the job asks for is impossible.
            Exception: of the machine, or what a later batch raised with every sample.
        """
        outcome = self._outcome(request, specs, make)
        if not isinstance(outcome, Exception):
            return outcome
        is_first = request not in self._proven
        outcomes: list[list[SampleResult] | Exception] = [outcome]
        if len(specs) > 1:
            outcomes = [_without_frames(self._outcome(request, [spec], make)) for spec in specs]
        elif is_first:
            # One sample shows nothing of the others: another noise is tried.
            outcomes.append(self._outcome(request, [_with_other_noise(specs[0])], make))
        failures = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        if len(failures) == len(outcomes) > 1:
            if is_first and not any(map(may_pass, failures)):
                raise self.every_sample_failed(request, outcome) from outcome
            raise outcome
        return [
            failed_result(spec, _first_line(outcome)) if isinstance(outcome, Exception) else outcome[0]
            for spec, outcome in zip(specs, outcomes[: len(specs)], strict=True)
        ]

    def _outcome(self, request: int, specs: Sequence[SampleSpec], make: Make) -> list[SampleResult] | Exception:
        """Results of a batch, or what it raised where that may come from a sample."""
        try:
            results = make(specs)
        except SystemExit as error:
            # Of code that the job names: it would end the worker, not the run, again and again.
            return RuntimeError(f"SystemExit: {error.code}").with_traceback(error.__traceback__)
        except Exception as error:
            if _NOT_DETERMINISTIC in str(error):
                operator = str(error).split(_NOT_DETERMINISTIC)[0].strip()
                raise JobError(
                    f"runtime.deterministic: {operator} of these models has no deterministic form on a GPU; switch"
                    " deterministic off, or use models without it"
                ) from error
            if is_fault_of_machine(error):
                raise
            return error
        self._proven.add(request)
        return results

    def every_sample_failed(self, request: int, error: Exception) -> EverySampleFailedError:
        """The error of a request whose samples all fail in the same way."""
        return EverySampleFailedError(
            f"requests.{request}: every sample of the first batch of '{self._names[request]}' failed:"
            f" {reason_of(error)}; other attempts would fail the same way: fix what the job names here, and the same"
            " command goes on"
        )


def failed_result(spec: SampleSpec, message: str) -> SampleResult:
    """The result of a sample that could not be made."""
    return SampleResult(record=failed_record(spec, redacted(message)[:500]), run={"batch_size": 1})


def is_fault_of_machine(error: Exception) -> bool:
    """Whether an exception comes from the job, the memory or the device, and not from a sample."""
    kinds = (torch.OutOfMemoryError, torch.AcceleratorError, MemoryError, RiskforgeError)
    return isinstance(error, kinds) or any(sign in str(error) for sign in _MACHINE_SIGNS)


def may_pass(error: BaseException) -> bool:
    """Whether an exception, or what caused it, is of a transient kind: files and networks."""
    if isinstance(error, OSError) and not isinstance(error, _LASTING):
        return True
    if any(sign in kind.__name__ for kind in type(error).__mro__ for sign in _NETWORK_SIGNS):
        return True
    cause = error.__cause__ or error.__context__
    return cause is not None and may_pass(cause)


def _without_frames(outcome: list[SampleResult] | Exception) -> list[SampleResult] | Exception:
    """An exception of one of many samples, without its frames, which hold tensors."""
    error: BaseException | None = outcome if isinstance(outcome, Exception) else None
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
    return outcome


def _with_other_noise(spec: SampleSpec) -> SampleSpec:
    return dataclasses.replace(spec, seed=(spec.seed + 1) % MAX_SEED)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error, '')}"
