"""The section of the data set's card on what people say; the rest of the card, which users edit, stays as it is."""

from __future__ import annotations

import re

from engine.data.reading.people.results import PeopleResults
from engine.data.reading.people.tables import markdown
from engine.data.run.card import code
from engine.data.run.file_names import CARD
from engine.data.stores.base import Store

HEADING = "## What people say"
# The section ends where the next one begins.
_SECTION = re.compile(rf"^{HEADING}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
# The section that it stands before.
_NEXT = re.compile(r"^## Loading\n", re.MULTILINE)


def people_section(results: PeopleResults) -> str:
    """The section as Markdown."""
    return "\n".join([HEADING, "", *markdown(results, code)])


def with_people(card: str, results: PeopleResults | None) -> str:
    """A card with the section: replaced where it is there, removed where there are no results."""
    section = "" if results is None else f"{people_section(results)}\n\n"
    bare = _SECTION.sub("", card)
    if not section:
        return bare
    place = _NEXT.search(bare)
    start = place.start() if place else len(bare)
    return f"{bare[:start]}{section}{bare[start:]}"


def update_card(store: Store, results: PeopleResults | None) -> None:
    """Write the section into the card of a run; nothing is written where it is as it should be, or there is no card.

    Raises:
        OutputError: the store refuses.
    """
    if not store.exists(CARD):
        return
    card = store.read(CARD)
    updated = with_people(card.decode("utf-8", errors="surrogateescape"), results)
    data = updated.encode("utf-8", errors="surrogateescape")
    if data != card:
        store.replace(CARD, data)
