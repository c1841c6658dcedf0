"""Output of commands. It contains names and paths from outside, so all of it is escaped."""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from engine.terminal import show as print

if TYPE_CHECKING:
    from rich.console import Console

    from engine.driver.progress import Display

MAX_LISTED = 20
# Of lines that are broken here, such as warnings.
TERMINAL_COLUMNS = 100


def make_display() -> Display:
    """A progress display on stderr: live on a terminal, lines otherwise."""
    from engine.driver.progress import LiveDisplay, PlainDisplay

    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        return LiveDisplay(make_console(stderr=True))
    return PlainDisplay(sys.stderr)


def make_console(*, stderr: bool = False) -> Console:
    """A console; without a terminal, lines are as long as tables require."""
    from engine.driver.progress import TABLE_WIDTH
    from engine.terminal import safe_console

    stream = sys.stderr if stderr else sys.stdout
    return safe_console(stream, width=None if stream.isatty() else TABLE_WIDTH)


def print_artefact(address: str, origin: str) -> bool:
    """Print where an artefact is; whether that is a folder, which a job can name."""
    from engine.data.stores.opening import is_object_address

    print(f"artefact       {address} ({origin})")
    if is_object_address(address):
        print("               a job names a folder: copy it to every machine with workers")
    return not is_object_address(address)


def print_some(lines: Sequence[str], where: str = "conditioning.json") -> None:
    """Print the first lines of a list; `where` names the file that has all of them."""
    for line in lines[:MAX_LISTED]:
        print(f"  {line}")
    if len(lines) > MAX_LISTED:
        print(f"  and {len(lines) - MAX_LISTED} more in {where}")


def print_json(value: Any, indent: int | None = 2) -> None:
    """Print a value as JSON on stdout."""
    from engine.terminal import json_text

    print(json_text(value, indent), flush=True)


def warn(text: str) -> None:
    """Print a warning on stderr, broken into lines."""
    complain(textwrap.fill(f"warning: {text}", TERMINAL_COLUMNS, subsequent_indent="  ", break_long_words=False))


def complain(line: str) -> None:
    """Print a line on stderr."""
    print(line, file=sys.stderr)
