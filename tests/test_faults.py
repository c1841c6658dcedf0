"""Whose fault an exception is, by what torch 2.10 and its libraries say."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable

import pytest
import torch

from engine.errors import JobError
from engine.generation.faults import is_fault_of_machine, is_of_size, is_out_of_memory, may_pass, release
from tests.cuda_failures import BROKEN, OF_SIZE, OTHER, OUT_OF_MEMORY

HOST = [
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: out of memory"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
]


def caused_by(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def raised_while_handling(error: Exception, other: Exception) -> Exception:
    error.__context__ = other
    return error


@pytest.mark.parametrize("make", OUT_OF_MEMORY.values(), ids=OUT_OF_MEMORY)
def test_memory_that_ran_out_in_every_disguise(make: Callable[[], Exception]) -> None:
    """A smaller batch is the remedy, whoever raises it, also behind an exception of the job's own code."""
    for error in (make(), caused_by(ValueError("x"), make()), raised_while_handling(KeyError("x"), make())):
        assert is_out_of_memory(error) and is_of_size(error) and not is_fault_of_machine(error)


@pytest.mark.parametrize("make", OF_SIZE.values(), ids=OF_SIZE)
def test_what_may_be_memory_or_the_machine(make: Callable[[], Exception]) -> None:
    """A smaller batch is tried, and nobody claims that memory ran out."""
    assert is_of_size(make()) and not is_out_of_memory(make()) and not is_fault_of_machine(make())
    assert is_of_size(caused_by(ValueError("x"), make()))


@pytest.mark.parametrize("make", BROKEN.values(), ids=BROKEN)
def test_a_broken_device(make: Callable[[], Exception]) -> None:
    assert is_fault_of_machine(make()) and not is_of_size(make()) and not is_out_of_memory(make())


@pytest.mark.parametrize("make", OTHER.values(), ids=OTHER)
def test_limits_of_kernels_look_like_any_exception(make: Callable[[], Exception]) -> None:
    """Only parts of the batch show what is at fault."""
    assert not is_fault_of_machine(make()) and not is_of_size(make()) and not may_pass(make())


@pytest.mark.parametrize("error", HOST, ids=repr)
def test_memory_of_the_host_is_of_the_machine(error: Exception) -> None:
    """Smaller batches on a GPU do not spare it."""
    assert is_fault_of_machine(error) and not is_of_size(error) and not is_out_of_memory(error)


def test_an_error_of_the_job_is_no_lack_of_memory() -> None:
    """Whatever it says, and whatever it was raised from."""
    error = caused_by(JobError("runtime: out of memory"), OUT_OF_MEMORY["allocator"]())
    assert is_fault_of_machine(error) and not is_of_size(error) and not is_out_of_memory(error)


def test_a_chain_that_bites_its_tail_ends() -> None:
    first, second = ValueError("a"), ValueError("b")
    first.__context__, second.__context__ = second, first
    assert not is_out_of_memory(first) and not may_pass(first)


def fail(held: list[weakref.ref[torch.Tensor]]) -> None:
    batch = torch.zeros(3)
    held.append(weakref.ref(batch))
    raise KeyError(len(batch))


def fail_from_another(held: list[weakref.ref[torch.Tensor]]) -> None:
    latents = torch.zeros(2)
    held.append(weakref.ref(latents))
    try:
        fail(held)
    except KeyError:
        raise ValueError(len(latents)) from None


@pytest.mark.parametrize("function", [fail, fail_from_another])
def test_tensors_are_let_go_and_lines_are_kept(function: Callable[[list], None]) -> None:
    """Also those of exceptions that are behind the one that came out, shown or not."""
    held: list[weakref.ref[torch.Tensor]] = []
    try:
        function(held)
    except Exception as caught:
        error = caught
    assert all(reference() is not None for reference in held)
    release(error)
    assert not any(reference() is not None for reference in held)
    lines = []
    trace = error.__traceback__
    while trace is not None:
        lines.append((trace.tb_frame.f_code.co_name, trace.tb_lineno))
        trace = trace.tb_next
    assert lines[-1][0] == function.__name__ and all(line > 0 for _, line in lines)
    assert sys.exc_info() == (None, None, None)
