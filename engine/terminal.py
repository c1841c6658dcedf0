"""Text for terminals and logs: names, prompts and paths come from outside and must not steer them."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.segment import Segment
    from rich.table import Table

ELLIPSIS = "…"
# User name and password before the `@` of an address. Slashes in passwords are matched too, although they should be
# escaped, and so is a scheme that has lost a slash, as in paths.
_CREDENTIALS = re.compile(r"(:/+)(?:[^\s\"/:@]*:[^\s\"]*|[^\s\"/]*)@")
_WORD = re.compile(r"[^\s\"]+")


def redacted(text: str) -> str:
    """A text without the user names and passwords of the addresses in it: `https://***@host/model`."""
    return _WORD.sub(_redacted_word, text) if "@" in text and ":/" in text else text


def _redacted_word(match: re.Match[str]) -> str:
    # Only up to the last `@`: a `:/` without one after it would be scanned to the end of the word, in quadratic time.
    before, at, after = match[0].rpartition("@")
    return _CREDENTIALS.sub(r"\1***@", before + at) + after


def open_closed_streams() -> None:
    """Connect standard input, output and error to the null device where they are closed, as in some cron jobs.

    The next file that is opened would otherwise get their descriptor, and what libraries print.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # It gets the lowest free descriptor, which is that of the stream, as those before it are open.
            stream = Path(os.devnull).open(mode, encoding="utf-8")  # noqa: SIM115
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)


def printable(text: str, *, keep: str = "") -> str:
    """A text with control, direction and invisible characters, and broken Unicode, as escapes such as `\\x1b`.

    Args:
        keep: characters that are not escaped.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in keep else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def show(text: object = "", *, file: TextIO | None = None, flush: bool = False) -> None:
    """Print lines of text, each of them safe for a terminal and without passwords."""
    print(printable(redacted(str(text)), keep="\n"), file=file or sys.stdout, flush=flush)


def json_text(value: Any, indent: int | None = 2) -> str:
    """A value as JSON that is safe for a terminal: what cannot be printed becomes escapes of JSON."""
    text = redacted(json.dumps(value, indent=indent, ensure_ascii=False))
    return "".join(char if char.isprintable() or char == "\n" else json.dumps(char)[1:-1] for char in text)


def safe_console(stream: TextIO, width: int | None = None) -> Console:
    """A console of rich whose texts are safe for a terminal.

    A table in which words or numbers would be cut is printed row by row, one line for each column.
    """
    from rich.console import Console
    from rich.segment import Segment
    from rich.table import Table

    class SafeConsole(Console):
        def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
            segments = list(super().render(renderable, options))
            if isinstance(renderable, Table) and renderable.show_header and _is_cut(self, renderable, segments):
                segments = list(super().render(_listing(self, renderable), options))
            for segment in segments:
                text, style, control = segment
                yield segment if control else Segment(printable(text, keep="\n"), style)

    return SafeConsole(file=stream, width=width, highlight=False)


def _is_cut(console: Console, table: Table, segments: list[Segment]) -> bool:
    """Whether a rendered table has more ellipses than its cells: rich writes an ellipsis where it cuts a word."""
    cells = (cell for column in table.columns for cell in (column.header, *column.cells))
    written = sum(_line(console, cell).count(ELLIPSIS) for cell in cells)
    return sum(segment.text.count(ELLIPSIS) for segment in segments) > written


def _line(console: Console, cell: Any) -> str:
    from rich.text import Text

    return " ".join(str(cell if isinstance(cell, Text) else console.render_str(cell)).split())


def _listing(console: Console, table: Table) -> Table:
    """The rows of a table one after another, the names of their columns on the left; empty cells are left out."""
    from rich.table import Column, Table
    from rich.text import Text

    names = [_line(console, column.header) for column in table.columns]
    listing = Table.grid(Column(overflow="fold"), Column(overflow="fold"), padding=(0, 2))
    listing.title, listing.title_justify = table.title, "left"
    for cells in zip(*(column.cells for column in table.columns), strict=True):
        for name, cell in zip(names, cells, strict=True):
            if text := _line(console, cell):
                listing.add_row(Text(name), Text(text))
        listing.add_row()
    return listing
