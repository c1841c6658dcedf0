"""Whether `riskforge retrain` can fine-tune a target, and what to do where it cannot. Imports no torch."""

from __future__ import annotations

import shlex

from engine.models.program_description import program_untrainable
from engine.models.programs import is_program


def untrainable(address: str) -> str:
    """Why `retrain` cannot fine-tune a classifier; empty where it can: a folder, or a factory with gradients.

    Raises:
        JobError: as `engine.models.program_description.check_program`.
    """
    return program_untrainable(address) if is_program(address) else ""


def export_command(run: str) -> str:
    """The command that gives a training loop of the user's own the accepted samples of a run, by class.

    Args:
        run: the address of the run.
    """
    output = f"{run.rstrip('/').rpartition('/')[2] if '://' in run else run.rstrip('/')}-samples"
    return f"riskforge export {shlex.quote(run)} --format imagefolder --output {shlex.quote(output)}"


def training_line(address: str, run: str) -> str:
    """In a line, whether `retrain` can fine-tune the target of a job, and if not, what to do."""
    problem = untrainable(address)
    if not problem:
        return "retrain: can fine-tune the target"
    return f"retrain: not {problem}; for a training loop of your own: {export_command(run)}"
