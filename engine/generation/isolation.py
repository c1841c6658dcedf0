"""What becomes of a batch that raised: its samples in ever smaller parts, and whose fault it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from engine.errors import EverySampleFailedError, JobError, first_line
from engine.generation.faults import is_fault_of_machine, is_of_size, may_pass, release
from engine.job.plan import SampleSpec
from engine.job.records import SampleResult, failed_record
from engine.job.spec import MAX_SEED
from engine.models.factories import reason_of
from engine.terminal import redacted

# In torch's message for an operator that `deterministic` forbids.
_NOT_DETERMINISTIC = "does not have a deterministic implementation"

Made = TypeVar("Made")
Make = Callable[[Sequence[SampleSpec]], list[SampleResult]]


@dataclass(frozen=True, slots=True)
class Failure:
    """A batch that failed.

    Attributes:
        size: its rows.
        error: what it raised, without the tensors of its frames.
    """

    size: int
    error: Exception


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What the parts of a failed batch gave.

    Attributes:
        results: of its samples, in their order.
        raised: places of the samples that raised by themselves.
        at_fault: a batch of which no sample raised, or that had too little memory: the largest; None without any.
        through: samples of the largest part that went through, below every size that is at fault; at least 1.
    """

    results: list[SampleResult]
    raised: frozenset[int]
    at_fault: Failure | None
    through: int


class Isolation:
    """Finds out whether a sample, the size of a batch, the job or the machine is at fault when a batch raises.

    Args:
        names: of the requests by number, for messages.
        places: where they are in the job file; as they are numbered where not given.
    """

    def __init__(self, names: Sequence[str], places: Sequence[str] = ()) -> None:
        self._names, self._places = names, places
        # Requests of which some batch went through, whatever became of its samples.
        self._proven: set[int] = set()

    def attempt(self, make: Callable[[], Made]) -> Made | Exception:
        """What a step of a batch gives, or what it raised where samples or their number may be the cause.

        Raises:
            JobError: what the job asks for is impossible.
            Exception: of the machine.
        """
        try:
            return make()
        except SystemExit as exit_error:
            # Of code that the job names: it would end the worker, not the run, again and again.
            error: Exception = RuntimeError(f"SystemExit: {exit_error.code}").with_traceback(exit_error.__traceback__)
        except Exception as caught:
            error = caught
        release(error)
        if _NOT_DETERMINISTIC in str(error):
            operator = str(error).split(_NOT_DETERMINISTIC)[0].strip()
            raise JobError(
                f"runtime.deterministic: {operator} of these models has no deterministic form on a GPU; switch"
                " deterministic off, or use models without it"
            ) from error
        if is_fault_of_machine(error):
            raise error
        return error

    def went_through(self, request: int) -> None:
        """Note that a batch of a request was made."""
        self._proven.add(request)

    def has_worked(self, request: int) -> bool:
        """Whether a batch of a request was made."""
        return request in self._proven

    def in_parts(self, request: int, specs: Sequence[SampleSpec], failure: Failure, make: Make) -> Parts:
        """Make a batch that failed in parts, halved as long as they fail; a sample that fails alone is `failed`.

        Args:
            failure: of the whole batch. Its rows may be more than its samples: then these are a part by themselves.
            make: makes the results of samples of the request.

        Raises:
            EverySampleFailedError: no batch of the request went through before, and every sample of it raised.
            JobError: what the job asks for is impossible.
            Exception: of the machine, also if a single sample raises it; or what a later batch raised with every
                sample.
        """
        is_first = not self.has_worked(request)
        search = _Search(lambda part: self._made(request, part, make))
        outcomes = search.outcomes(specs, failure)
        failures = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        if len(specs) == 1 and failures and is_first:
            # One sample shows nothing of the others: another noise is tried.
            tried = self._made(request, [_with_other_noise(specs[0])], make)
            failures += [tried] if isinstance(tried, Exception) else []
        if len(failures) > 1 and len(failures) >= len(specs):
            if is_first and not any(map(may_pass, failures)):
                raise self.every_sample_failed(request, failure.error) from failure.error
            raise failure.error
        return search.parts(specs, outcomes)

    def where(self, request: int) -> str:
        """Where a request is in the job file."""
        return self._places[request] if self._places else f"requests.{request}"

    def every_sample_failed(self, request: int, error: Exception) -> EverySampleFailedError:
        """The error of a request whose samples all fail in the same way."""
        return EverySampleFailedError(
            f"{self.where(request)}: every sample of the first batch of '{self._names[request]}' failed:"
            f" {reason_of(error)}; other attempts would fail the same way: fix what the job names here, and the same"
            " command goes on"
        )

    def _made(self, request: int, specs: Sequence[SampleSpec], make: Make) -> list[SampleResult] | Exception:
        outcome = self.attempt(lambda: make(specs))
        if not isinstance(outcome, Exception):
            self.went_through(request)
        return outcome


class _Search:
    """Halves a batch down to the samples that fail.

    Args:
        make: results of a part, or what it raised.
    """

    def __init__(self, make: Callable[[Sequence[SampleSpec]], list[SampleResult] | Exception]) -> None:
        self._make = make
        self._through: list[int] = []
        self._at_fault: list[Failure] = []

    def outcomes(self, specs: Sequence[SampleSpec], failure: Failure) -> list[SampleResult | Exception]:
        """A result, or an exception, for each sample of a batch that failed."""
        if failure.size == 1:
            if is_of_size(failure.error):
                raise failure.error
            return [failure.error]
        middle = -(-len(specs) // 2)
        parts = [specs] if failure.size > len(specs) else [specs[:middle], specs[middle:]]
        outcomes = [outcome for part in parts for outcome in self._part(part)]
        failed = any(isinstance(outcome, Exception) for outcome in outcomes)
        if is_of_size(failure.error) or not (failed or may_pass(failure.error)):
            self._at_fault.append(failure)
        return outcomes

    def _part(self, specs: Sequence[SampleSpec]) -> Sequence[SampleResult | Exception]:
        made = self._make(specs)
        if isinstance(made, Exception) and len(specs) == 1 and is_of_size(made):
            # Nothing is smaller: what others hold of the memory may be free by now.
            made = self._make(specs)
        if isinstance(made, Exception):
            return self.outcomes(specs, Failure(len(specs), made))
        self._through.append(len(specs))
        return made

    def parts(self, specs: Sequence[SampleSpec], outcomes: Sequence[SampleResult | Exception]) -> Parts:
        """What was found out."""
        smallest = min((failure.size for failure in self._at_fault), default=0)
        return Parts(
            results=[
                failed_result(spec, described(outcome)) if isinstance(outcome, Exception) else outcome
                for spec, outcome in zip(specs, outcomes, strict=True)
            ],
            raised=frozenset(place for place, outcome in enumerate(outcomes) if isinstance(outcome, Exception)),
            at_fault=max(self._at_fault, key=lambda failure: failure.size, default=None),
            through=max((size for size in self._through if size < smallest), default=1),
        )


def failed_result(spec: SampleSpec, message: str) -> SampleResult:
    """The result of a sample that could not be made."""
    return SampleResult(record=failed_record(spec, redacted(message)[:500]), run={"batch_size": 1})


def described(error: Exception) -> str:
    """The class of an exception and the first line of its text."""
    return f"{type(error).__name__}: {first_line(error, '')}"


def _with_other_noise(spec: SampleSpec) -> SampleSpec:
    return dataclasses.replace(spec, seed=(spec.seed + 1) % MAX_SEED)
