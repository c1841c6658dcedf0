"""Compiled forward passes: what torch would do unseen, or raise in words of its own, is an error of the job."""

import functools

import pytest
import torch

from engine.errors import JobError
from engine.models import compilation
from engine.models.compilation import compiled


@pytest.fixture
def counted(monkeypatch):
    """torch.compile without a compiler of kernels; gives the number of programs so far."""
    programs = []

    def backend(graph, inputs):
        programs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    yield programs
    torch._dynamo.reset()


def test_a_missing_compiler_is_reported(monkeypatch):
    """What torch raises where its backend lacks a tool: the job's fault, in a line, and not a sample's."""

    def without_tools(graph, inputs):
        raise ModuleNotFoundError("No module named 'setuptools'")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=without_tools))
    with pytest.raises(
        JobError, match=r"runtime\.compile: 'on' is not available .*No module named 'setuptools'.*use off"
    ):
        compiled(torch.nn.Linear(2, 2))(torch.ones(1, 2))


def test_more_shapes_than_torchs_own_limit_are_compiled(counted):
    """Past 8 programs torch runs the module uncompiled; here every shape has one, and finds it when it returns."""
    limit = torch._dynamo.config.recompile_limit
    module = torch.nn.Linear(2, 3)
    fast = compiled(module)
    sizes = [*range(1, limit + 4), 1]
    with torch.no_grad():
        for size in sizes:
            inputs = torch.full((size, 2), float(size))
            assert torch.equal(fast(inputs), module(inputs))
    assert len(counted) == len(sizes) - 1 > limit
    assert torch._dynamo.config.recompile_limit == limit and not torch._dynamo.config.fail_on_recompile_limit_hit


def test_too_many_shapes_are_an_error_and_not_a_slow_run(counted, monkeypatch):
    """The limit's remedy is named; shapes that are compiled already are computed still."""
    monkeypatch.setattr(compilation, "MAX_PROGRAMS", 3)
    fast = compiled(torch.nn.Linear(2, 3))
    with torch.no_grad():
        for size in (1, 2, 3):
            fast(torch.ones(size, 2))
        with pytest.raises(JobError, match=r"runtime\.compile: .* more than 3 shapes .* batch_size, or use off"):
            fast(torch.ones(4, 2))
        assert fast(torch.ones(2, 2)).shape == (2, 3)
    assert len(counted) == 3
