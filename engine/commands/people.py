"""What people say of a run, on a terminal."""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text

from engine.commands.output import make_console
from engine.data.reading.people.results import PeopleResults
from engine.data.reading.people.tables import PeopleTable, people_facts, people_tables
from engine.terminal import show as print


def print_people(results: PeopleResults) -> None:
    """Print facts, tables and notes."""
    for name, text in people_facts(results):
        print(f"{name.lower()}: {text}")
    for table in people_tables(results):
        make_console().print(terminal_table(table))
        if table.num_left_out:
            print(f"  and {table.num_left_out} more in --json")
    for note in results.notes:
        print(f"note: {note}")
    print("in report and card after `riskforge report RUN`")


def terminal_table(table: PeopleTable) -> Table:
    """A table as it is printed."""
    shown = Table(title=Text(table.title), title_justify="left", box=box.SIMPLE_HEAD)
    for place, (name, note) in enumerate(table.headings):
        shown.add_column(Text(f"{name}\n{note}".rstrip()), justify="right" if place else "left", no_wrap=bool(place))
    for name, _, cells in table.lines:
        shown.add_row(Text(name), *(Text(f"{value} ({note})" if note else value) for value, note in cells))
    return shown
