"""Do the tests notice realistic mistakes? Applies each of a list of mutations to a copy and runs the tests near it.

    python tools/mutate.py [AREA ...] [--processes 2] [--write]

`tools/mutations/AREA.toml` lists the mutations of an area: file, the text that is replaced (once in the file), the
replacement, and the tests that are to fail (files, or `FILE::TEST`). A mutation that passes them has survived;
`survives` gives the reason where nothing else can be expected, such as an equal result. In the end the tests that
caught something run without a mutation: one that fails then, too, proves nothing. `--write` records the outcome in
`docs/mutations.md`. The repository itself is not touched; every process works in a copy of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Literal, TypeVar

from forked_tests import NONE_SELECTED, PASSED, TestsEnd, TestServer

REPOSITORY = Path(__file__).resolve().parents[1]
MUTATIONS = REPOSITORY / "tools/mutations"
PAGE = REPOSITORY / "docs/mutations.md"
# Of the tests of a file without a mutation.
BASELINE_SECONDS = 900.0
INTRODUCTION = (
    "# Do the tests notice mistakes?",
    "",
    "Realistic mistakes (a flipped sign, an off-by-one, a swapped argument, a check left out) are made one by one in a",
    "copy of the code, and the tests near each are run. What passes all of them has survived. Written by",
    "`uv run python tools/mutate.py --write`; the mutations are in `tools/mutations/`.",
)

Outcome = Literal["caught", "survived"]
Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutation:
    """One replacement.

    Attributes:
        area: name of its list.
        file: relative to the repository.
        old: replaced text, once in the file.
        new: replacement.
        tests: files or tests (`FILE::TEST`) one of which is to fail.
        survives: why no test can tell; empty where one is expected to.
    """

    area: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    survives: str = ""

    def apply(self, root: Path) -> None:
        """Change the file in a copy of the repository.

        Raises:
            ValueError: the replaced text is not in the file exactly once.
        """
        path = root / self.file
        text = path.read_text(encoding="utf-8")
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.area}: {self.file} has {self.old!r} {count} times, not once")
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")


def read_mutations(areas: Sequence[str] = ()) -> list[Mutation]:
    """The mutations of some areas, or of all.

    Raises:
        FileNotFoundError: there is no such area.
    """
    paths = [MUTATIONS / f"{area}.toml" for area in areas] or sorted(MUTATIONS.glob("*.toml"))
    return [
        Mutation(area=path.stem, **entry | {"tests": tuple(entry["tests"])})
        for path in paths
        for entry in tomllib.loads(path.read_text(encoding="utf-8"))["mutation"]
    ]


def copy_repository(target: Path) -> None:
    """Copy the files that git knows, and those that it does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY, check=True, capture_output=True, text=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (source := REPOSITORY / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)


def run_tests(server: TestServer, tests: Sequence[str]) -> TestsEnd:
    """Run some tests, the quick ones first, up to the first failure.

    Raises:
        ValueError: there are no such tests.
    """
    ends = []
    for marker in ("not slow", "slow"):
        ends.append(end := server.run(["-x", "-m", marker, *tests]))
        if end.code not in (PASSED, NONE_SELECTED):
            # Tests that were stopped name none that failed: any of them may hang by itself.
            return end._replace(failed=end.failed or list(tests))
    if all(end.code == NONE_SELECTED for end in ends):
        raise ValueError(f"no test is selected by {' '.join(tests)}")
    return TestsEnd(PASSED, [])


def outcome_of(mutation: Mutation, root: Path, server: TestServer) -> TestsEnd:
    """Apply a mutation to a copy, run its tests, and take it back.

    Args:
        root: the copy.
        server: works in the copy.
    """
    before = (root / mutation.file).read_bytes()
    mutation.apply(root)
    try:
        return run_tests(server, mutation.tests)
    finally:
        (root / mutation.file).write_bytes(before)


class Copies:
    """Copies of the repository with a server each, in which tasks run at the same time.

    Args:
        num: of copies.
        folder: where they are made.
    """

    def __init__(self, num: int, folder: Path) -> None:
        self._num = num
        self._free: SimpleQueue[tuple[Path, TestServer]] = SimpleQueue()
        for number in range(num):
            copy_repository(folder / str(number))
            self._free.put((folder / str(number), TestServer(folder / str(number))))

    def map(self, task: Callable[[Task, Path, TestServer], Result], values: Sequence[Task]) -> Iterator[Result]:
        """Results of a task for every value, in order."""

        def attempt(value: Task) -> Result:
            copy = self._free.get()
            try:
                return task(value, *copy)
            finally:
                self._free.put(copy)

        with ThreadPoolExecutor(self._num) as pool:
            yield from pool.map(attempt, values)

    def close(self) -> None:
        """End the servers."""
        for _ in range(self._num):
            self._free.get()[1].close()


def failures_without_mutation(copies: Copies, ends: Iterable[TestsEnd]) -> list[str]:
    """The tests that caught a mutation and fail without any, too; they prove nothing."""
    by_file: dict[str, set[str]] = {}
    for test in {test.partition("[")[0] for end in ends for test in end.failed}:
        by_file.setdefault(test.partition("::")[0], set()).add(test)

    def check(tests: set[str], root: Path, server: TestServer) -> list[str]:
        return server.run(["-m", "", *sorted(tests)], BASELINE_SECONDS).failed

    return [test for failed in copies.map(check, list(by_file.values())) for test in failed]


def outcome(end: TestsEnd) -> Outcome:
    """Tests that fail, cannot be imported or hang have caught a mutation."""
    return "survived" if end.code == PASSED else "caught"


def page(results: Sequence[tuple[Mutation, Outcome]], seconds: float, note: str = "") -> str:
    """The record as Markdown: counts by area, and every survivor.

    Args:
        note: on the machine.
    """
    areas = sorted({mutation.area for mutation, _ in results})
    rows = [table_row(area, [outcome for mutation, outcome in results if mutation.area == area]) for area in areas]
    survivors = [
        f"- `{mutation.file}`: `{one_line(mutation.old)}` as `{one_line(mutation.new)}`. {mutation.survives}"
        for mutation, outcome in results
        if outcome == "survived"
    ]
    lines = [
        *INTRODUCTION,
        "",
        f"{datetime.date.today()}, {os.cpu_count()} CPU cores ({platform.machine()}), {seconds / 60:.0f} minutes"
        f"{note and f' ({note})'}.",
        "",
        "| area | mutations | caught | survived |",
        "|---|---|---|---|",
        *rows,
        table_row("**all**", [outcome for _, outcome in results]),
        "",
        "## Survivors",
        "",
        *(survivors or ["None."]),
    ]
    return "\n".join(lines) + "\n"


def table_row(name: str, outcomes: Sequence[Outcome]) -> str:
    """Counts of outcomes as a row of the table."""
    caught = outcomes.count("caught")
    return f"| {name} | {len(outcomes)} | {caught} ({caught / len(outcomes):.1%}) | {len(outcomes) - caught} |"


def one_line(text: str) -> str:
    """A text without line breaks."""
    return " ".join(text.split())


def measure(mutations: Sequence[Mutation], num_processes: int) -> tuple[list[Outcome], list[str]]:
    """Try mutations, with a line on stdout for each.

    Returns:
        Their outcomes, and the tests that caught something and fail without a mutation, too.
    """
    ends: list[TestsEnd] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.closing(Copies(num_processes, Path(folder))) as copies,
    ):
        for mutation, end in zip(mutations, copies.map(outcome_of, mutations), strict=True):
            ends.append(end)
            place = f"{mutation.file}: {one_line(mutation.old)[:60]} -> {one_line(mutation.new)[:60]}"
            print(f"{len(ends)}/{len(mutations)} {outcome(end):8} {place} {' '.join(end.failed[:1])}", flush=True)
        return [outcome(end) for end in ends], failures_without_mutation(copies, ends)


def read_arguments() -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("areas", nargs="*", metavar="AREA")
    parser.add_argument("--processes", type=int, default=2, help="mutations tried at the same time (default: 2)")
    parser.add_argument("--write", action="store_true", help=f"record the outcome in {PAGE.relative_to(REPOSITORY)}")
    parser.add_argument("--note", default="", help="remark on the machine, for the record")
    arguments = parser.parse_args()
    if arguments.areas and arguments.write:
        parser.error("--write: records all areas; leave the areas out")
    return arguments


def main() -> int:
    """Exit code 1 where a mutation survived without a stated reason, or was caught in spite of one or by accident."""
    arguments, started = read_arguments(), time.monotonic()
    mutations = read_mutations(arguments.areas)
    outcomes, failing = measure(mutations, arguments.processes)
    print(table_row("all", outcomes))
    if failing:
        print("these fail without a mutation, too:", *failing, sep="\n  ")
        return 1
    if arguments.write:
        results = list(zip(mutations, outcomes, strict=True))
        PAGE.write_text(page(results, time.monotonic() - started, arguments.note), encoding="utf-8")
    unexpected = [
        mutation
        for mutation, result in zip(mutations, outcomes, strict=True)
        if (result == "survived") != bool(mutation.survives)
    ]
    return int(bool(unexpected))


if __name__ == "__main__":
    sys.exit(main())
