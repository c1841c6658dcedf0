"""Factories by their address: what is one, and what is reported when it cannot be imported or fails."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.commands.jobfile import read_job
from engine.errors import JobError
from engine.models import factories, program_description
from engine.models.job_checks import check_addresses
from tests.program_cases import FACTORY, job_of, write


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder from which factories can be imported; forgotten afterwards, as is the module `broken`."""
    monkeypatch.setattr(program_description, "_KNOWN", {})
    monkeypatch.setattr(factories, "_FOLDERS", [])
    monkeypatch.setattr(sys, "path", [*sys.path])
    importlib.invalidate_caches()
    factories.add_import_folders([str(tmp_path)])
    yield tmp_path
    sys.modules.pop("broken", None)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (None, "there is no module 'broken'"),
        ("import nothing_of_that_name", "module 'broken' cannot be imported: ModuleNotFoundError"),
        ("1 / 0", r"cannot be imported: ZeroDivisionError: .*broken\.py, line 1"),
        ("def nett(): pass", "has no 'net'; did you mean 'nett'"),
        ("net = 3", "cannot be called"),
        ("def net():\n    raise OSError('no weights')", r"failed: OSError: no weights \(.*broken\.py, line 2"),
        (
            "from engine.terminal import redacted\ndef net():\n    return redacted(None)",
            r"failed: TypeError: .* \(.*broken\.py, line 3",
        ),
        ("def net(): return 3", "gave a int; return a pair"),
        ("from torch import nn\ndef net(): return nn.Linear(1, 1), {'labels': ['a', 'b']}", "image_size: field req"),
        (FACTORY.replace("torch.manual_seed(seed)", "torch.seed()"), "gives other weights"),
        (FACTORY.replace("image_size=32", "image_size=[32, 16]").replace(".mean((2, 3))", "[:, :, 0, 31]"), "fails on"),
    ],
)  # fmt: skip
def test_a_factory_that_fails_is_explained_in_a_line(code: str | None, message: str, folder: Path) -> None:
    """Field, value and remedy, with the innermost place in the user's code instead of a traceback."""
    if code is not None:
        (folder / "broken.py").write_text(code)
    with pytest.raises(JobError) as caught:
        check_addresses(read_job(write(job_of("broken:net", folder), folder), []))
    lines = caught.value.problems
    assert len(lines) >= 1 and all(line.startswith("models.target: 'broken:net'") for line in lines)
    assert any(re.search(message, line) for line in lines), lines


@pytest.mark.parametrize("address", ["mine:net", "a.b_1.c:make", "zoo:digits", "C:/x", "a:b:c", ":x", "a.:x", "1a:x"])
def test_what_is_a_factory(address: str) -> None:
    """A module's path and a name; neither a zoo part nor a path."""
    assert factories.is_factory(address) == (address in ("mine:net", "a.b_1.c:make"))
