"""Do the tests notice realistic mistakes? Applies each of a list of mutations to a copy and runs the tests near it.

    python tools/mutate.py [AREA ...] [--processes 2] [--write]

`tools/mutations/AREA.toml` lists the mutations of an area: file, the text that is replaced (once in the file), the
replacement, and the test files that are to fail. A mutation that passes them has survived; `survives` gives the reason
where nothing else can be expected, such as an equal result. `--write` records the outcome in
`docs/mutations.md`. The repository itself is not touched; every process works in a copy of its own.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Literal

REPOSITORY = Path(__file__).resolve().parents[1]
MUTATIONS = REPOSITORY / "tools/mutations"
PAGE = REPOSITORY / "docs/mutations.md"
# Of the tests of one mutation; a mutation that makes them hang is caught, too.
TIMEOUT_SECONDS = 600
# Exit codes of pytest: all passed, some failed, interrupted (as by an import that fails).
PASSED, CAUGHT = 0, (1, 2)
INTRODUCTION = (
    "# Do the tests notice mistakes?",
    "",
    "Realistic mistakes (a flipped sign, an off-by-one, a swapped argument, a check left out) are made one by one in a",
    "copy of the code, and the tests near each are run. What passes all of them has survived. Written by",
    "`uv run python tools/mutate.py --write`; the mutations are in `tools/mutations/`.",
)

Outcome = Literal["caught", "survived"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutation:
    """One replacement.

    Attributes:
        area: name of its list.
        file: relative to the repository.
        old: replaced text, once in the file.
        new: replacement.
        tests: files that are to fail.
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


def run_tests(root: Path, tests: Sequence[str]) -> int:
    """Exit code of pytest over some test files of a copy; of a run beyond the time limit that of a failure."""
    # Compiled files are compared by whole seconds: a mutation could run as the code before it.
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-m", "", "-p", "no:cacheprovider", *tests]
    try:
        return subprocess.run(
            command, cwd=root, env=environment, capture_output=True, check=False, timeout=TIMEOUT_SECONDS
        ).returncode
    except subprocess.TimeoutExpired:
        return CAUGHT[0]


def outcome_of(mutation: Mutation, root: Path) -> Outcome:
    """Apply a mutation to a copy, run its tests, and take it back.

    Raises:
        RuntimeError: pytest could not run the tests.
    """
    before = (root / mutation.file).read_bytes()
    mutation.apply(root)
    try:
        code = run_tests(root, mutation.tests)
    finally:
        (root / mutation.file).write_bytes(before)
    if code not in (PASSED, *CAUGHT):
        raise RuntimeError(f"{mutation.area}: pytest ended with {code} for {' '.join(mutation.tests)}")
    return "survived" if code == PASSED else "caught"


def measure(mutations: Sequence[Mutation], num_processes: int, folder: Path) -> Iterator[tuple[Mutation, Outcome]]:
    """Outcomes in the order of the list.

    Args:
        num_processes: mutations tried at the same time, each in a copy of the repository.
        folder: where the copies are made.
    """
    copies: SimpleQueue[Path] = SimpleQueue()
    for number in range(num_processes):
        copy_repository(folder / str(number))
        copies.put(folder / str(number))

    def attempt(mutation: Mutation) -> Outcome:
        root = copies.get()
        try:
            return outcome_of(mutation, root)
        finally:
            copies.put(root)

    with ThreadPoolExecutor(num_processes) as pool:
        yield from zip(mutations, pool.map(attempt, mutations), strict=True)


def page(results: Sequence[tuple[Mutation, Outcome]], seconds: float) -> str:
    """The record as Markdown: counts by area, and every survivor."""
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
        f"{datetime.date.today()}, {os.cpu_count()} CPU cores ({platform.machine()}), {seconds / 60:.0f} minutes.",
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
    return f"| {name} | {len(outcomes)} | {caught} ({caught / len(outcomes):.0%}) | {len(outcomes) - caught} |"


def one_line(text: str) -> str:
    """A text without line breaks."""
    return " ".join(text.split())


def main() -> int:
    """Exit code 1 where a mutation survived without a stated reason, or was caught in spite of one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("areas", nargs="*", metavar="AREA")
    parser.add_argument("--processes", type=int, default=2, help="mutations tried at the same time (default: 2)")
    parser.add_argument("--write", action="store_true", help=f"record the outcome in {PAGE.relative_to(REPOSITORY)}")
    arguments = parser.parse_args()
    mutations = read_mutations(arguments.areas)
    started, results = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        for mutation, outcome in measure(mutations, arguments.processes, Path(folder)):
            results.append((mutation, outcome))
            place = f"{mutation.file}: {one_line(mutation.old)[:60]} -> {one_line(mutation.new)[:60]}"
            print(f"{len(results)}/{len(mutations)} {outcome:8} {place}", flush=True)
    print(table_row("all", [outcome for _, outcome in results]))
    if arguments.write:
        PAGE.write_text(page(results, time.monotonic() - started), encoding="utf-8")
    return int(any((outcome == "survived") != bool(mutation.survives) for mutation, outcome in results))


if __name__ == "__main__":
    sys.exit(main())
