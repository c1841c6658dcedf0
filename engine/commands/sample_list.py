"""The list of samples that `riskforge inspect --filter` prints: a line each, at most about 100 columns wide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from engine.commands.output import MAX_LISTED
from engine.terminal import ELLIPSIS, printable
from engine.terminal import show as print

if TYPE_CHECKING:
    from engine.data.reading.corpus import Corpus
    from engine.data.reading.listing import ListedSample

MAX_WIDTH = 100
_GAP = "  "
# Of the widest cell of a column; keys and risks are never cut, as they are copied.
_MAX_CHARS = {"class": 18, "context": 26, "predicted": 18, "status": 8, "run": 20}
_MIN_CONTEXT_CHARS = 8


def print_samples(corpus: Corpus, samples: Sequence[ListedSample], limit: int | None) -> None:
    """Print the first samples of a list, and how many there are.

    Args:
        samples: from the highest risk to the lowest.
        limit: how many were asked for; `MAX_LISTED` where not given.
    """
    shown = samples[: limit or MAX_LISTED]
    if not shown:
        print("no sample passes the filter")
        return
    columns = _columns(corpus, shown)
    widths = {name: max(len(name), *map(len, cells)) for name, cells in columns.items()}
    spare = MAX_WIDTH - sum(widths.values()) - len(_GAP) * (len(widths) - 1)
    if spare < 0 and "context" in widths:
        widths["context"] = max(widths["context"] + spare, _MIN_CONTEXT_CHARS)
    for cells in [tuple(columns), *zip(*columns.values(), strict=True)]:
        pairs = zip(columns, cells, strict=True)
        texts = (_fitted(cell, widths[name], is_number=name == "risk") for name, cell in pairs)
        print(_GAP.join(texts).rstrip())
    more = "; --limit N lists more, --json all" if len(shown) < len(corpus) else ""
    print(f"{len(shown)} of {len(corpus)} samples, from the highest risk on{more}")


def _columns(corpus: Corpus, samples: Sequence[ListedSample]) -> dict[str, list[str]]:
    """Headings and cells; what all samples have alike has no column."""
    columns = {
        "key": [printable(sample.key) for sample in samples],
        "class": [sample.class_name for sample in samples],
        "context": [sample.context or "-" for sample in samples],
        "predicted": [sample.predicted or "-" for sample in samples],
        "risk": ["-" if sample.risk is None else f"{sample.risk:.3g}" for sample in samples],
    }
    if not any(sample.context for sample in samples):
        del columns["context"]
    if any(sample.status != "ok" for sample in samples):
        columns["status"] = [sample.status for sample in samples]
    if len(corpus.runs) > 1:
        columns["run"] = [corpus.runs[sample.run].store.name for sample in samples]
    return {name: [_cut(printable(cell), _MAX_CHARS.get(name)) for cell in cells] for name, cells in columns.items()}


def _cut(text: str, most: int | None) -> str:
    return text if most is None or len(text) <= most else text[: most - 1] + ELLIPSIS


def _fitted(text: str, width: int, *, is_number: bool) -> str:
    return text.rjust(width) if is_number else _cut(text, width).ljust(width)
