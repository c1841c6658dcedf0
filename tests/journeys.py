"""Pages that can be run: a journey's files and commands, and what the commands print.

A fenced block with a file name after its language (```yaml job.yaml) is that file. In a `console` block a line that
begins with `$ ` is a command, `> ` continues it, and what follows is what it prints, on both streams; `...` stands
for anything, and spaces count as one. A last line such as `[3]` is the exit code, where that is not 0.
"""

from __future__ import annotations

import doctest
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"^```(\w+)(?: +(\S+))?\n(.*?)^```", re.DOTALL | re.MULTILINE)
_EXIT_CODE = re.compile(r"^\[(\d+)\]\n\Z", re.MULTILINE)
_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True, slots=True)
class File:
    """A file of the page, relative to the folder that the page is run in."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Command:
    """A command with what it prints, and the page's line that it stands in."""

    line: int
    text: str
    expected: str
    exit_code: int

    def difference(self, exit_code: int, printed: str) -> str:
        """What differs between what the page says and what came; empty where nothing does."""
        if exit_code != self.exit_code:
            return f"ends with {exit_code}, not {self.exit_code}:\n{printed}"
        example = doctest.Example(self.text, self.expected)
        checker = doctest.OutputChecker()
        if checker.check_output(self.expected, printed, _FLAGS):
            return ""
        return checker.output_difference(example, printed, _FLAGS)


def steps(page: Path) -> Iterator[File | Command]:
    """The files and commands of a page, in its order."""
    text = page.read_text(encoding="utf-8")
    for fence in _FENCE.finditer(text):
        language, name, content = fence.groups()
        if name:
            yield File(name, content)
        elif language == "console":
            yield from _commands(content, text.count("\n", 0, fence.start()) + 2)


def _commands(content: str, first_line: int) -> Iterator[Command]:
    starts = [*(found.start() for found in re.finditer(r"^\$ ", content, re.MULTILINE)), len(content)]
    for start, end in itertools.pairwise(starts):
        lines = content[start:end].splitlines(keepends=True)
        num_lines = 1 + next((n for n, line in enumerate(lines[1:]) if not line.startswith("> ")), len(lines) - 1)
        text = "".join(line[2:] for line in lines[:num_lines]).strip()
        expected = "".join(lines[num_lines:])
        exit_code = _EXIT_CODE.search(expected)
        if exit_code:
            expected = expected[: exit_code.start()]
        yield Command(first_line + content.count("\n", 0, start), text, expected, int(exit_code[1]) if exit_code else 0)
