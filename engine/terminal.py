"""Text for terminals and logs: names, prompts and paths come from outside and must not steer them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console


def printable(text: str, *, keep: str = "") -> str:
    """A text with control, direction and invisible characters, and broken Unicode, as escapes such as `\\x1b`.

    Args:
        keep: such characters that stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one in keep else _escaped(one) for one in text)


def _escaped(one: str) -> str:
    return one.encode("unicode_escape").decode("ascii")


def show(text: object = "", *, file: TextIO | None = None, flush: bool = False) -> None:
    """Print lines of text, each of them safe for a terminal."""
    print(printable(str(text), keep="\n"), file=file or sys.stdout, flush=flush)


def json_text(value: Any, indent: int | None = 2) -> str:
    """A value as JSON that is safe for a terminal: what cannot be printed stands as escapes, which JSON has."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return "".join(one if one.isprintable() or one == "\n" else json.dumps(one)[1:-1] for one in text)


def safe_console(stream: TextIO, width: int | None = None) -> Console:
    """A console of rich whose texts are safe for a terminal, wherever they come from."""
    from rich.console import Console
    from rich.segment import Segment

    class SafeConsole(Console):
        def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
            for segment in super().render(renderable, options):
                text, style, control = segment
                yield segment if control else Segment(printable(text, keep="\n"), style)

    return SafeConsole(file=stream, width=width, highlight=False)
