"""`riskforge curate` as a whole: from options to a curated run, or to an alarm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.data.run.curated import Curation, MonitorRecord, RewardRecord, parse_curation
from engine.data.run.file_names import AUDIT, CURATION, STOPPED_AUDIT
from engine.data.stores.base import Store
from engine.data.stores.lease import hold
from engine.data.stores.opening import open_store
from engine.driver.progress import Display
from engine.studies.curate.candidates import Candidates, open_candidates
from engine.studies.curate.options import CurateOptions
from engine.studies.curate.program import CuratedRun, SignalRecord, curate_run, find_curated
from engine.studies.curate.rewards import find_reward
from engine.studies.curate.selection import check_enough
from engine.studies.curate.signal import learn_signal, read_signal
from engine.studies.samples import open_study


@dataclass(frozen=True, slots=True, kw_only=True)
class Curated:
    """The outcome of a curation.

    Attributes:
        run: the curated run; None where an alarm stopped the curation.
        curation: its description; None likewise.
        reward: what was selected by.
        monitor: what the monitor says; None where nothing is audited.
        left_out: records that were not used, and why.
        notes: what a user should know of a learned reward.
    """

    run: CuratedRun | None
    curation: Curation | None
    reward: RewardRecord
    monitor: MonitorRecord | None
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def curate(uri: str, options: CurateOptions, output: str | None, display: Display) -> Curated:
    """Curate a run.

    Args:
        uri: the run.
        options: what to select by.
        output: address of the curated run; `RUN-curated` next to the run where not given.

    Raises:
        RiskforgeError: an option, a file, the run or the output is not as it must be; what files can tell is found
            before a model is loaded.
    """
    options.check()
    store = open_store(uri)
    output = output if output is not None else default_output(store.uri)
    if options.reward is None:
        return _by_preferences(store, uri, options, output, display)
    source = find_reward(options.reward, display)
    return _select(store, source.rewards, options, output, SignalRecord(reward=source.record), display)


def default_output(uri: str) -> str:
    """The address of the curated run of a run, next to it."""
    return f"{uri.rstrip('/')}-curated"


def _by_preferences(store: Store, uri: str, options: CurateOptions, output: str, display: Display) -> Curated:
    display.phase("reading run and preferences")
    candidates = open_candidates(store)
    check_enough(candidates.class_indices, options.selection)
    inputs = read_signal(open_study(uri), options, open_store(output))
    if finished := find_curated(store, options.selection, output, inputs.record):
        return _outcome(finished, left_out=inputs.left_out)
    learned = learn_signal(inputs, options, display)
    withheld = [f"{learned.num_withheld} records of audited pairs are withheld from training"]
    left_out = (*inputs.left_out, *(withheld if learned.num_withheld else ()))
    signal = learned.signal
    if signal.monitor is not None and signal.monitor.alarm and options.on_alarm == "stop":
        _keep_evidence(open_store(output), signal, display)
        return Curated(
            run=None, curation=None, reward=signal.reward, monitor=signal.monitor, left_out=left_out,
            notes=learned.notes,
        )  # fmt: skip
    return _select(store, learned.rewards, options, output, signal, display, left_out, learned.notes)


def _keep_evidence(output: Store, signal: SignalRecord, display: Display) -> None:
    """Store the state of a monitor whose alarm stops the curation: the series goes on from it, whatever is tried."""
    with hold(output, notice=display.notice):
        output.replace(STOPPED_AUDIT, signal.files[AUDIT.removeprefix(f"{CURATION}/")])


def _select(
    store: Store,
    rewards: Callable[[Candidates], Sequence[float]],
    options: CurateOptions,
    output: str,
    signal: SignalRecord,
    display: Display,
    left_out: tuple[str, ...] = (),
    notes: tuple[str, ...] = (),
) -> Curated:
    curated = curate_run(store, rewards, options.selection, output, signal, display)
    return _outcome(curated, left_out, notes)


def _outcome(curated: CuratedRun, left_out: tuple[str, ...] = (), notes: tuple[str, ...] = ()) -> Curated:
    curation = parse_curation(curated.manifest["curation"])
    return Curated(
        run=curated, curation=curation, reward=curation.reward, monitor=curation.monitor, left_out=left_out, notes=notes
    )
