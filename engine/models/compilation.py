"""Compiled forward passes, a program for each shape of the inputs."""

from __future__ import annotations

from typing import Any

from engine.errors import JobError, first_line

# Programs of a module at most: torch's own limit of 8 is met by two requests with a few sizes of batches each, and past
# it torch runs the module uncompiled, unseen.
MAX_PROGRAMS = 64


def compiled(module: Any) -> Any:
    """A module's forward pass, compiled for each shape of its inputs.

    The result raises a JobError where no compiler is installed, and for more than `MAX_PROGRAMS` shapes.
    """
    import torch
    from torch._dynamo.exc import BackendCompilerFailed, FailOnRecompileLimitHit

    fast = torch.compile(module, dynamic=False)
    limits = {"recompile_limit": MAX_PROGRAMS, "fail_on_recompile_limit_hit": True}

    def call(*inputs: Any, **more: Any) -> Any:
        try:
            with torch._dynamo.config.patch(limits):
                return fast(*inputs, **more)
        except BackendCompilerFailed as error:
            reason = first_line(error.inner_exception, "no reason given")
            raise JobError(f"runtime.compile: 'on' is not available on this machine ({reason}); use off") from error
        except FailOnRecompileLimitHit as error:
            raise JobError(
                f"runtime.compile: 'on' would compile a UNet for more than {MAX_PROGRAMS} shapes of its inputs; give a"
                " number as batch_size, or use off"
            ) from error

    return call
