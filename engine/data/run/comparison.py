"""How a run differs from an older one, as `compare --json` prints it and as pages show it.

A run that was compared with a pinned baseline (`compare RUN --baseline FILE`, `run JOB --baseline FILE`) keeps the
comparison in its folder, in `comparison.json`: that is how a run knows its pin. `read_pinned` gives it; nothing is
computed, and the baseline itself is not needed.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from engine.data.run.file_names import COMPARISON
from engine.data.run.kept_documents import read_kept
from engine.data.stores.base import Store

# Samples of each kind that a run keeps of a comparison: as many as a page could show.
MAX_KEPT = 1000


class _Part(BaseModel):
    # A later version may know more of a comparison.
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class ComparedTarget(_Part):
    """The classifier that scored a run."""

    address: str
    digest: str


class ComparedRun(_Part):
    """One of the two runs.

    Attributes:
        night: heading of its figures: its date, with its name where both have one date.
        num_samples: scored ones.
        is_baseline: whether it was read from a pinned file, which holds no images.
    """

    address: str
    name: str
    night: str
    target: ComparedTarget
    num_samples: int
    is_baseline: bool = False


class ComparedMetric(_Part):
    """A share or a median in both runs, with the interval of new less old.

    Attributes:
        crossed: whether a limit was crossed here.
    """

    old: float
    new: float
    change: float
    low: float
    high: float
    significant: bool
    crossed: bool = False


class ComparedRow(_Part):
    """A request (`level` is `request`, `group` empty), or a class or context of it.

    Attributes:
        num_pairs: pairs compared; 0 where two groups are.
        num_new_failures, num_mended: of pairs; None of groups.
        metrics: by name.
    """

    request: str
    level: str
    group: str
    num_old: int
    num_new: int
    num_pairs: int
    num_new_failures: int | None = None
    num_mended: int | None = None
    metrics: dict[str, ComparedMetric]


class ChangedSample(_Part):
    """A sample whose failure is new, or fixed.

    Attributes:
        key: in the newer run.
        predicted_class: -1 where a baseline does not know it; its name is then empty.
    """

    key: str
    old_key: str
    request: str
    class_name: str
    context: str
    predicted_class: int
    predicted_class_name: str
    old_predicted_class: int
    old_predicted_class_name: str
    old_risk: float
    new_risk: float


class UnpairedFailure(_Part):
    """A failure of the newer run among samples that have no pair in the older one."""

    key: str
    request: str
    class_name: str
    context: str
    predicted_class: int
    predicted_class_name: str
    new_risk: float


class Comparison(_Part):
    """How two runs differ.

    Attributes:
        baseline: the file that the older run was read from; empty where that was a run.
        metric_names: of all metrics, in words.
        new_failures, mended, unpaired_failures: largest risk first; what a run keeps has at most `MAX_KEPT` of each.
        num_new_failures, num_mended, num_unpaired_failures: all of them.
        crossed: limits that were crossed, in words.
        notes: what was not compared, and why.
    """

    old: ComparedRun
    new: ComparedRun
    baseline: str = ""
    confidence: float
    correction: str
    metric_names: dict[str, str]
    rows: tuple[ComparedRow, ...]
    new_failures: tuple[ChangedSample, ...]
    mended: tuple[ChangedSample, ...]
    unpaired_failures: tuple[UnpairedFailure, ...]
    num_new_failures: int
    num_mended: int
    num_unpaired_failures: int
    crossed: tuple[str, ...]
    notes: tuple[str, ...]


def sentence(class_name: str, predicted: str, how: str = "now") -> str:
    """What became of a sample, such as "three, now predicted eight".

    Args:
        predicted: name of the class; empty where it is not known.
        how: `now` of a new failure, `no longer` of a fixed one; empty of a failure without a pair.
    """
    words = f"{how} predicted {predicted}" if predicted else f"{how} wrong"
    return f"{class_name}, {words.strip()}"


def read_pinned(store: Store) -> Comparison | None:
    """How a run, or a rescoring, differs from its pinned baseline; None where it was never compared with one.

    `comparison.baseline` is the pin's file; `old` and `new` are the two runs, `old.night` the pinned night;
    `new_failures` and `mended` name the samples, `crossed` the limits in words. It is as of the comparison: where the
    run has grown since, `new.num_samples` is fewer than its scored samples.

    Raises:
        CorruptShardError: its file cannot be read.
        OutputError: the store refuses.
    """
    remedy = f"riskforge compare {store.uri} --baseline FILE"
    return read_kept(store, COMPARISON, Comparison, "a comparison", remedy)


def keep_pinned(store: Store, document: dict[str, Any]) -> None:
    """Keep the comparison of a run with its baseline in the run's folder, in place of an earlier one.

    Args:
        document: as `compare --json` prints it.

    Raises:
        OutputError: the store refuses.
    """
    import json

    lists = ("new_failures", "mended", "unpaired_failures")
    kept = document | {name: document[name][:MAX_KEPT] for name in lists}
    store.replace(COMPARISON, (json.dumps(kept, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
