"""Compare images of every family of pipelines with those of diffusers' own, and write the table of `docs/models.md`.

uv run python tools/model_differences.py           # prints it
uv run python tools/model_differences.py --write
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path

from engine.job.spec import RuntimeSpec
from engine.models.hardware import choose_hardware
from tests.flow_cases import SCALES, SCHEDULERS, BothFlows, save_sd3
from tests.model_differences import CASES, Both

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
BEGIN, END = "<!-- differences -->\n", "<!-- end of differences -->\n"


def rows_of(name: str, folder: Path) -> list[str]:
    """Rows of a family: for each scheduler the largest difference at each guidance scale."""
    both = Both(CASES[name], folder / "model", choose_hardware(RuntimeSpec(device="cpu")))
    rows = []
    for scheduler in both.case.schedulers:
        shown = [f"{both.difference(scheduler, scale):.1e} ({scale:g})" for scale in both.case.scales]
        asked, _, own = scheduler.partition(":")
        title = f"`model`, {own.removesuffix('Scheduler')}" if own else f"`{asked}`"
        rows.append(f"| {name} | {title} | {', '.join(shown)} |")
    return rows


def flow_rows(folder: Path, *, with_t5: bool) -> list[str]:
    """Rows of Stable Diffusion 3."""
    both = BothFlows(save_sd3(folder / "model", with_t5=with_t5), choose_hardware(RuntimeSpec(device="cpu")))
    name, rows = "Stable Diffusion 3" if with_t5 else "Stable Diffusion 3, no T5", []
    for title in SCHEDULERS:
        shown = [f"{both.differences(title, scale)[1]:.1e} ({scale:g})" for scale in SCALES]
        rows.append(f"| {name} | {title} | {', '.join(shown)} |")
    return rows


def main() -> None:
    """Print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    is_written = parser.parse_args().write
    warnings.simplefilter("ignore")
    lines = ["| model | scheduler | largest difference (guidance scale) |", "|---|---|---|"]
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            lines += rows_of(name, Path(folder))
    for with_t5 in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            lines += flow_rows(Path(folder), with_t5=with_t5)
    table = "".join(f"{line}\n" for line in lines)
    if not is_written:
        print(table, end="")
        return
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
