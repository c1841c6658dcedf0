"""The style sheet and the templates of all pages."""

from __future__ import annotations

import functools
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

_HERE = Path(__file__).parent


def page_style() -> Markup:
    """The style sheet of all pages."""
    return Markup((_HERE / "report.css").read_text(encoding="utf-8"))


@functools.cache
def page_templates(folder: Path = _HERE) -> Environment:
    """The templates of the pages in a folder; each is compiled once in a process."""
    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
