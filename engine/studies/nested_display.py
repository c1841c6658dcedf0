"""The progress of a part of a study, within the display of the whole."""

from __future__ import annotations

from engine.driver.progress import Display, Tally


class NestedDisplay:
    """Shows notices and the progress of one part, and outlives the programs of that part, which close it.

    Args:
        outer: of the study; None in another process, where nothing is shown.
        title: of the part.
    """

    def __init__(self, outer: Display | None, title: str) -> None:
        self._outer = outer
        self._title = title

    def phase(self, text: str) -> None:
        """Show it as progress of the part."""
        if text:
            self.advance(text)

    def notice(self, text: str) -> None:
        """Pass it on."""
        if self._outer is not None:
            self._outer.notice(f"{self._title}: {text}")

    def advance(self, text: str) -> None:
        """Pass it on."""
        if self._outer is not None:
            self._outer.advance(f"{self._title}: {text}")

    def show(self, tally: Tally) -> None:
        """Show how many samples are done."""
        self.advance(f"{tally.total.num_done}/{tally.total.total} samples")

    def close(self) -> None:
        """The study closes its display."""
