"""A curated run: candidates of a finished run in groups of K, and one of each selected by Bradley-Terry.

What decides the selection is in the plan's identity, so that the same command continues a run that was interrupted,
does nothing where it is complete, and is refused with the difference where its options are others.
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from engine.data.run.commit_record import file_pair
from engine.data.run.commits import list_commits
from engine.data.run.curated import (
    MAX_ANCESTORS,
    REMAKE_CURATED,
    ClassCount,
    Curation,
    MonitorRecord,
    RewardRecord,
    damaged_files,
    describes,
    file_checksum,
    find_curation,
    read_curation,
)
from engine.data.run.file_names import CURATION, CURATION_DOCUMENT, SELECTION, SUCCESS
from engine.data.run.manifest_reading import read_manifest
from engine.data.run.output_folder import check_output
from engine.data.run.presence import check_committed, is_closed, lost_files
from engine.data.run.selection_table import Selection, read_selection, selection_bytes
from engine.data.run.shards import read_rows, shard_name
from engine.data.stores.base import Store
from engine.data.stores.lease import hold
from engine.data.stores.opening import open_store
from engine.driver.closing import close_run
from engine.driver.progress import Display
from engine.errors import CorruptShardError, JobError, OutputError
from engine.job.plan import Plan
from engine.studies.curate.candidates import Candidates, Parent, candidates_of, open_parent
from engine.studies.curate.selection import (
    SelectionOptions,
    check_enough,
    check_options,
    check_rewards,
    draw_selection,
    values_digest,
)
from engine.studies.curate.writing import (
    check_output_is,
    curated_job,
    curated_plan,
    lineage_address,
    open_curated,
    write_shards,
)

# Kinds of rewards whose name is what decides them.
NAMED_KINDS = ("column", "function")
Rewards = Callable[[Candidates], Sequence[float]]
__all__ = ["Candidates", "CuratedRun", "SelectionOptions", "SignalRecord", "curate_run", "find_curated"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalRecord:
    """Where the rewards of a curation come from.

    Attributes:
        reward: its description; `kind` and `digest` are part of the plan's identity, and so is the name of a column or
            a function.
        monitor: what the monitor says of it; None where nothing was audited.
        files: by name within the folder `curation`: `reward.safetensors`, `audit.safetensors`, `suspects.jsonl`.
    """

    reward: RewardRecord
    monitor: MonitorRecord | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class CuratedRun:
    """A complete curated run.

    Attributes:
        manifest: the content of its manifest.json.
        num_candidates: samples that were selected from.
        num_selected: samples that were selected.
        num_left_over: candidates that filled no group.
        was_complete: whether it was there already, and nothing was done.
    """

    store: Store
    manifest: dict[str, Any]
    num_candidates: int
    num_selected: int
    num_left_over: int
    was_complete: bool


def curate_run(
    store: Store,
    rewards: Rewards,
    options: SelectionOptions,
    output: str,
    signal: SignalRecord | None,
    display: Display,
) -> CuratedRun:
    """Select from a finished run, into an output that is a run itself.

    Args:
        store: the run to select from.
        rewards: gives the reward of each candidate, in order; called once, and not at all where an earlier call has
            stored what was drawn.
        output: address of the curated run.
        signal: where the rewards come from; None where only their values are known.
        display: stays open.

    Raises:
        JobError: an option, a reward or the number of candidates is not as it must be.
        OutputError: the run is not finished, or the output holds something else.
        CorruptShardError: the run, or what an earlier call has stored, is damaged.
        OwnedError: another process is at work in the output.

    Side effects: writes the output; the run is only read.
    """
    started = time.monotonic()
    work = _begin(store, options, output, display)
    if signal is None:
        signal, rewards = _known_by_values(work, rewards)
    plan = curated_plan(work.parent, _identity(work.parent, options, signal.reward))
    if finished := _complete(work.output, plan):
        return finished
    check_enough(work.candidates.class_indices, options)
    with hold(work.output, notice=display.notice) as lease:
        job = curated_job(work.parent, work.output)
        # Another process may have been at work since.
        check_output_is(work.output, plan)
        check_committed(work.output, REMAKE_CURATED)
        selection = _drawn(work, plan, rewards, options, display)
        lease.check()
        open_curated(work.output, plan, job)
        _settle(work, selection, options, signal)
        display.phase("copying what was selected")
        write_shards(work.parent, work.output, plan, selection.selected_keys, lease, display)
        display.phase("writing manifest and report")
        lease.check()
        close_run(
            work.output,
            job,
            plan,
            models=work.parent.models,
            run_seconds=time.monotonic() - started,
            hardware=work.parent.hardware,
        )
    return _result(work.output, was_complete=False)


def find_curated(store: Store, options: SelectionOptions, output: str, reward: RewardRecord) -> CuratedRun | None:
    """The complete curated run of an output with these options; None where there is something to do.

    Needs no reward to be computed: for callers that would train one first.

    Raises:
        JobError, OutputError, CorruptShardError: as `curate_run`; what can be refused early is.
    """
    check_options(options)
    parent, target = open_parent(store), open_store(output)
    _check_place(parent, target)
    return _complete(target, curated_plan(parent, _identity(parent, options, reward)))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """What a curation begins with."""

    parent: Parent
    candidates: Candidates
    output: Store


def _begin(store: Store, options: SelectionOptions, output: str, display: Display) -> _Work:
    check_options(options)
    display.phase("checking run and output")
    parent, target = open_parent(store), open_store(output)
    _check_place(parent, target)
    return _Work(parent=parent, candidates=candidates_of(parent), output=target)


def _check_place(parent: Parent, output: Store) -> None:
    """Refuse an output that is the run, lies in it, or cannot be written to."""
    if output.place == parent.store.place or output.place.is_relative_to(parent.store.place):
        raise OutputError(f"--output {output.uri}: is the run itself, or lies in it; give another folder")
    check_output(output)


def _identity(parent: Parent, options: SelectionOptions, reward: RewardRecord) -> dict[str, Any]:
    """What decides the selection, for the identity of the plan."""
    # A file of preferences that was moved gives the same reward.
    name = {"name": reward.name} if reward.kind in NAMED_KINDS else {}
    return {
        "parent": parent.plan.digest,
        "shards": parent.shards_digest,
        "reward": {"kind": reward.kind, "digest": reward.digest} | name,
        "candidates": options.num_candidates,
        "among": options.among,
        "seed": options.seed,
        "scale": options.scale,
    }


def _known_by_values(work: _Work, rewards: Rewards) -> tuple[SignalRecord, Rewards]:
    """A description of rewards by their values, and what gives them again."""
    values = _values(rewards, work.candidates)
    digest = values_digest(work.candidates.keys, values)
    return SignalRecord(reward=RewardRecord(name="values", kind="values", digest=digest)), lambda candidates: values


def _values(rewards: Rewards, candidates: Candidates) -> list[float]:
    """The rewards of the candidates as plain numbers, checked."""
    given = list(rewards(candidates))
    try:
        values = [float(value) for value in given]
    except (TypeError, ValueError, OverflowError) as error:
        raise JobError(f"--reward: gives something else than numbers ({error}); correct the reward") from None
    check_rewards(candidates.keys, values)
    return values


def _complete(output: Store, plan: Plan) -> CuratedRun | None:
    """The curated run of an output where it is complete and whole by its listings.

    Raises:
        OutputError: the output holds something else.
    """
    if not check_output_is(output, plan) or not output.exists(SUCCESS):
        return None
    if len(list_commits(output)) != plan.num_shards or not is_closed(output, plan) or lost_files(output):
        return None
    return _result(output, was_complete=True)


def _result(output: Store, *, was_complete: bool) -> CuratedRun:
    curation = read_curation(output)
    return CuratedRun(
        store=output,
        manifest=read_manifest(output),
        num_candidates=curation.num_candidates,
        num_selected=curation.num_selected,
        num_left_over=curation.num_left_over,
        was_complete=was_complete,
    )


def _drawn(work: _Work, plan: Plan, rewards: Rewards, options: SelectionOptions, display: Display) -> Selection:
    """What an earlier call has drawn, or else a new draw; writes nothing, so that a reward that fails leaves no plan.

    Until `curation.json` is there nothing is decided. Where it was lost later, the selection that shards were written
    by is kept.
    """
    output = work.output
    curation, selection = find_curation(output), read_selection(output)
    if curation is not None and not describes(curation, plan):
        raise CorruptShardError(
            f"{output.address(CURATION_DOCUMENT)}: is of another curation than the plan of this output; remove it, and"
            f" {REMAKE_CURATED} writes it again"
        )
    if selection is not None and (curation is not None or list_commits(output)):
        return selection
    display.phase("computing rewards")
    values = _values(rewards, work.candidates)
    return draw_selection(work.candidates.keys, work.candidates.class_indices, values, options)


def _settle(work: _Work, selection: Selection, options: SelectionOptions, signal: SignalRecord) -> None:
    """Store what was drawn, or restore what is missing of it: all files of the folder `curation`.

    `curation.json` is the last of them, and no shard is written before it.
    """
    output = work.output
    files = {**signal.files, _name(SELECTION): selection_bytes(selection)}
    if (curation := find_curation(output)) is not None:
        _restore(output, curation, damaged_files(output, curation), files)
        return
    _check_agrees(work, selection)
    for name, data in files.items():
        output.replace(f"{CURATION}/{name}", data)
    document = _describe(work, selection, options, signal, files).to_document()
    output.replace(CURATION_DOCUMENT, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())


def _restore(output: Store, curation: Curation, names: Sequence[str], files: Mapping[str, bytes]) -> None:
    """Write files again that are missing or damaged, where they can be made as they were.

    Raises:
        CorruptShardError: one cannot.
    """
    for name in names:
        if name not in files or file_checksum(files[name]) != curation.files[name]:
            raise CorruptShardError(
                f"{output.address(f'{CURATION}/{name}')}: is missing or damaged, and the same options give another one"
                " now; restore the file, or choose another --output"
            )
        output.replace(f"{CURATION}/{name}", files[name])


def _check_agrees(work: _Work, selection: Selection) -> None:
    """Refuse a selection that is not the one of the shards that are there: its own file was lost, and rewards changed.

    Raises:
        CorruptShardError: it is not.
    """
    output, job = work.output, work.parent.job
    if selection.keys != work.candidates.keys:
        raise CorruptShardError(
            f"{output.address(SELECTION)}: has other candidates than {work.parent.store.uri}; remove it, and"
            " `riskforge curate` with the same options writes it again"
        )
    selected = selection.selected_keys
    for number in list_commits(output):
        _, name = file_pair(shard_name(job.name, number))
        for row in read_rows(output.fetch(name), ["key", "accepted"]):
            if row["accepted"] != (row["key"] in selected):
                raise CorruptShardError(
                    f"{output.address(name)}: was selected by other rewards than these options give now; restore"
                    f" {SELECTION}, or choose another --output"
                )


def _describe(
    work: _Work, selection: Selection, options: SelectionOptions, signal: SignalRecord, files: Mapping[str, bytes]
) -> Curation:
    """The content of `curation.json`."""
    parent, *ancestors = work.parent.lineage(lineage_address(work.parent.store, work.output))
    kept = [reward for reward, is_selected in zip(selection.rewards, selection.selected, strict=True) if is_selected]
    return Curation(
        parent=parent,
        ancestors=tuple(replace(ancestor, uri="") for ancestor in ancestors[:MAX_ANCESTORS]),
        reward=signal.reward,
        monitor=signal.monitor,
        group_size=options.num_candidates,
        among=options.among,
        seed=options.seed,
        scale=float(options.scale),
        num_candidates=len(selection.keys),
        num_groups=selection.num_groups,
        num_left_over=selection.num_left_over,
        mean_reward=_mean(selection.rewards),
        mean_reward_selected=_mean(kept),
        classes=_class_counts(work.candidates, selection),
        files={name: file_checksum(data) for name, data in files.items()},
    )


def _class_counts(candidates: Candidates, selection: Selection) -> tuple[ClassCount, ...]:
    names = dict(zip(candidates.class_indices, candidates.column("class_name"), strict=True))
    before = Counter(candidates.class_indices)
    pairs = zip(candidates.class_indices, selection.selected, strict=True)
    after = Counter(index for index, is_selected in pairs if is_selected)
    return tuple(
        ClassCount(class_index=index, name=names[index], candidates=before[index], selected=after[index])
        for index in sorted(before)
    )


def _mean(values: Sequence[float]) -> float:
    """The mean; each value is divided first, so that large ones do not overflow."""
    return math.fsum(value / len(values) for value in values)


def _name(place: str) -> str:
    """The name of a file within the folder `curation`."""
    return place.removeprefix(f"{CURATION}/")
