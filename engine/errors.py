"""Errors that a user can cause, with the text to print and the exit code of the command line."""

from engine.terminal import redacted

EXIT_OK = 0
EXIT_DAMAGED = 1
EXIT_USER = 2
EXIT_INCOMPLETE = 3
EXIT_OWNED = 4
EXIT_DRAINED = 75

# Of a problem: values from outside may be of any length.
MAX_PROBLEM_CHARS = 2000
# Of a library's reason within a message.
MAX_REASON_CHARS = 300


class RiskforgeError(Exception):
    """An expected failure: printed without a traceback; the command ends with `exit_code`. Passwords are redacted."""

    exit_code = EXIT_USER

    def __init__(self, *arguments: object) -> None:
        super().__init__(*(redacted(argument) if isinstance(argument, str) else argument for argument in arguments))


class RunWarning(UserWarning):
    """Something that a caller is told, and the command line prints as a line; redacted there."""


def fault(message: str, exit_code: int) -> RiskforgeError:
    """An error that a worker reported from its process, with its text and exit code."""
    error = RiskforgeError(message)
    error.exit_code = exit_code
    return error


class JobError(RiskforgeError):
    """The job or the command line is wrong.

    Attributes:
        problems: one line each, in the form `field: what is wrong with the value; the remedy`.
    """

    def __init__(self, problems: list[str] | str) -> None:
        lines = [problems] if isinstance(problems, str) else problems
        # Once, where several requests of a job have the same: they may be of one entry of its file.
        self.problems = list(dict.fromkeys(_shortened(redacted(line)) for line in lines))
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type, tuple[list[str]]]:
        return type(self), (self.problems,)


def first_line(error: object, default: str | None = None) -> str:
    """The first line of an error's text, for messages of one line; not redacted.

    Args:
        error: an exception, or its text.
        default: returned where the text is empty; None stands for the name of the exception's class.
    """
    try:
        text = str(error)
    except Exception:
        # The text of an error of the user's own code can be an error itself.
        text = ""
    if lines := text.strip().splitlines():
        return lines[0]
    return type(error).__name__ if default is None else default


class EverySampleFailedError(JobError):
    """Every sample of a request's first batch raised an exception: the job is wrong, unless others fare better."""


def _shortened(text: str) -> str:
    """A text without its middle where it is long: the field is at its beginning, the remedy at its end."""
    if len(text) <= MAX_PROBLEM_CHARS:
        return text
    return f"{text[: MAX_PROBLEM_CHARS // 2]} ... {text[-MAX_PROBLEM_CHARS // 2 :]}"


class OutputError(RiskforgeError):
    """The output cannot be used as asked: not empty, of another plan, not writable."""


class StoreLostError(OutputError):
    """The output's store does not answer after all retries; what is committed is kept, so the run can be resumed."""

    exit_code = EXIT_DRAINED


class ClusterLostError(RiskforgeError):
    """The cluster that the workers run on is gone; what is committed is kept, so the run can be resumed."""

    exit_code = EXIT_DRAINED


class OwnedError(RiskforgeError):
    """Another driver owns the output."""

    exit_code = EXIT_OWNED


class CorruptShardError(RiskforgeError):
    """A published file differs from its checksum or its commit record."""
