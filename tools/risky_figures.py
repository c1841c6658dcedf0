"""Does risk guidance work? Errors, agreement of the oracle, dial and conformity of a run's requests, from its metadata.

    uv run python tools/risky_figures.py RUN [--by-class REQUEST]

Prints a Markdown table with 95 % Wilson intervals, over all scored samples. A valid failure is a sample on which the
target errs while the oracle, which guided nothing, predicts the conditioned class.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from engine.job.records import STATUS_FAILED
from engine.job.spec import JobSpec
from engine.methods.intervals import wilson_interval

COLUMNS = (
    "request", "status", "class_name", "class_index", "is_error", "oracle_class", "risk", "conformity", "screened",
    "transfer",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rows:
    """The scored samples of a request, column by column, each [N]."""

    error: NDArray[np.bool_]
    agrees: NDArray[np.bool_]
    risk: NDArray[np.float64]
    conformity: NDArray[np.float64]
    screened: NDArray[np.bool_]
    transfer: NDArray[np.bool_]
    names: NDArray[np.str_]

    @property
    def valid(self) -> NDArray[np.bool_]:
        """Valid failures."""
        return self.error & self.agrees

    def take(self, rows: NDArray[np.bool_]) -> Rows:
        """Some of the rows."""
        return Rows(*(getattr(self, name)[rows] for name in self.__slots__))


def read_requests(run: Path) -> dict[str, Rows]:
    """The scored samples of every request, in the order of the job."""
    samples: dict[str, list[dict[str, Any]]] = {}
    for row in pq.read_table(run / "metadata.parquet", columns=list(COLUMNS)).to_pylist():
        if row["status"] != STATUS_FAILED:
            samples.setdefault(row["request"], []).append(row)
    return {request: _rows(some) for request, some in samples.items()}


def _rows(samples: list[dict[str, Any]]) -> Rows:
    labels = np.array([one["class_index"] for one in samples])
    others = [one["transfer"][0]["predicted_class"] if one["transfer"] else one["class_index"] for one in samples]
    return Rows(
        error=np.array([one["is_error"] for one in samples]),
        agrees=np.array([one["oracle_class"] for one in samples]) == labels,
        risk=np.array([one["risk"] for one in samples]),
        conformity=np.array([one["conformity"] for one in samples]),
        screened=np.array([one["screened"] for one in samples]),
        transfer=np.array(others) != labels,
        names=np.array([one["class_name"] for one in samples]),
    )


def read_job(run: Path) -> JobSpec:
    """The job of a run, from its manifest."""
    return JobSpec.model_validate(json.loads((run / "manifest.json").read_text())["job"])


def share(flags: NDArray[np.bool_]) -> str:
    """A share with its interval."""
    found = wilson_interval(int(flags.sum()), len(flags))
    return f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"


def spread(values: NDArray[np.float64]) -> str:
    """Median with quartiles."""
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def print_table(requests: dict[str, Rows]) -> None:
    """A line a request."""
    heads = ("request", "n", "target errs", "oracle agrees", "valid failures", "risk", "conformity", "transfer errs")
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for request, rows in requests.items():
        shares = [share(flags) for flags in (rows.error, rows.agrees, rows.valid)]
        cells = [str(len(rows.risk)), *shares, spread(rows.risk), spread(rows.conformity), share(rows.transfer)]
        print(f"| {request} | {' | '.join(cells)} |")


def print_classes(request: str, rows: Rows) -> None:
    """The same of one request, a line a class."""
    print(f"\n{request}, by class\n\n| class | n | oracle agrees | valid failures | risk |\n|---|---|---|---|---|")
    for name in dict.fromkeys(rows.names.tolist()):
        own = rows.take(rows.names == name)
        print(f"| {name} | {len(own.risk)} | {share(own.agrees)} | {share(own.valid)} | {spread(own.risk)} |")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--by-class", metavar="REQUEST")
    arguments = parser.parse_args()
    requests = read_requests(arguments.run)
    print_table(requests)
    if arguments.by_class:
        print_classes(arguments.by_class, requests[arguments.by_class])


if __name__ == "__main__":
    main()
