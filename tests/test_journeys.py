"""Three people's ways through the commands, as pages: every command is run, and prints what its page says."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.journeys import Command, File, steps

JOURNEYS = sorted((REPOSITORY / "docs").glob("journey-*.md"))


@pytest.mark.slow
@pytest.mark.parametrize("page", JOURNEYS, ids=lambda page: page.stem)
def test_a_journey_goes_as_its_page_says(page: Path, tmp_path, monkeypatch, call):
    """In an empty folder, from the first line to the last; `riskforge` in this process, other commands in a shell."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.syspath_prepend(str(tmp_path))
    for step in steps(page):
        if isinstance(step, File):
            target = tmp_path / step.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(step.text)
            continue
        difference = step.difference(*ran(step, call))
        assert not difference, f"{page.name}:{step.line}: $ {step.text}\n{difference}"


def ran(command: Command, call) -> tuple[int, str]:
    """Exit code of a command and what it prints."""
    words = shlex.split(command.text.replace("\\\n", ""))
    if words[0] == "riskforge":
        code, out, error = call(*words[1:])
        return int(code), out + error
    done = subprocess.run(
        ["bash", "-c", command.text], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return done.returncode, done.stdout


def test_a_page_is_read_as_it_is_written(tmp_path):
    """Files, continued commands, exit codes; a difference is told."""
    page = tmp_path / "page.md"
    page.write_text(
        "```yaml jobs/a.yaml\nname: a\n```\n\n```console\n$ echo one \\\n> two\none ...\n$ false\n[1]\n```\n"
        "```console\n$ echo x\n```\n"
    )
    first, echo, failing, silent = steps(page)
    assert first == File("jobs/a.yaml", "name: a\n")
    assert echo == Command(6, "echo one \\\ntwo", "one ...\n", 0)
    assert failing == Command(9, "false", "", 1)
    assert isinstance(silent, Command) and silent.expected == "" and silent.line == 13
    assert not echo.difference(0, "one   two\n") and "Got" in echo.difference(0, "two\n")
    assert "ends with 3" in echo.difference(3, "one two\n") and silent.difference(0, "x\n")
