"""The command that curates a run: it selects among its samples by a reward."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from engine.commands.arguments import JsonOption, RunArgument
from engine.commands.output import complain, make_console, make_display, print_json
from engine.commands.stopping import stop_on_signals
from engine.errors import EXIT_DAMAGED
from engine.terminal import show as print

if TYPE_CHECKING:
    from engine.data.run.curated import Curation, RewardRecord
    from engine.studies.curate.curation import Curated
    from engine.studies.curate.options import CurateOptions

PreferencesOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Preference records (.jsonl, .csv, .parquet) of first, second, choice, rater, time: a reward is learned"
        " from them.",
    ),
]
RewardOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="A reward in place of preferences: class-index (minus it), a column such as conformity, or"
        " package.module:function of lists of images and records.",
    ),
]
ModelOption = Annotated[
    Literal["linear", "network"] | None,
    typer.Option(help="Model of the learned reward, on CLIP features. Default: linear.", show_default=False),
]
TrustedOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="Choices of trusted raters; pairs that are in both files are audited, and train nothing."
    ),
]
AfterOption = Annotated[str | None, typer.Option(metavar="RUN", help="Earlier curated run whose monitor is continued.")]
OnAlarmOption = Annotated[
    Literal["stop", "continue"],
    typer.Option(help="On an alarm of the monitor: stop selects nothing and exits with code 1."),
]
DefenceOption = Annotated[
    Literal["none", "influence", "group"],
    typer.Option(
        help="Remove records that pull the reward away from trusted choices, of all raters or group by group."
    ),
]
OutputOption = Annotated[
    str | None, typer.Option(metavar="URI", help="Folder of the curated run. Default: RUN-curated, next to the run.")
]


def curate(
    run: RunArgument,
    preferences: PreferencesOption = None,
    reward: RewardOption = None,
    model: ModelOption = None,
    trusted: TrustedOption = None,
    after: AfterOption = None,
    on_alarm: OnAlarmOption = "stop",
    defence: DefenceOption = "none",
    candidates: Annotated[int, typer.Option(metavar="K", help="Candidates of which one is selected.")] = 4,
    among: Annotated[
        Literal["run", "class"],
        typer.Option(help="Where the candidates of a group come from; class keeps the balance of classes."),
    ] = "run",
    scale: Annotated[
        float, typer.Option(metavar="X", help="Factor of the rewards: more selects more sharply, 0 at random.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of groups, draws and held-out pairs.")] = 0,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Select among a run's samples by a reward, given or learned from preferences; the result is a run."""
    from engine.commands.jobfile import import_factories
    from engine.studies.curate.curation import curate as curate_by
    from engine.studies.curate.options import CurateOptions
    from engine.studies.curate.selection import SelectionOptions

    options = CurateOptions(
        preferences=preferences, reward=reward, model=model, trusted=trusted, after=after, on_alarm=on_alarm,
        defence=defence,
        selection=SelectionOptions(num_candidates=candidates, among=among, seed=seed, scale=scale),
    )  # fmt: skip
    # What the user's own code prints must not mix with --json.
    with contextlib.redirect_stdout(sys.stderr), stop_on_signals("stopped; the same command continues"):
        import_factories([reward], Path.cwd())
        with contextlib.closing(make_display()) as display:
            curated = curate_by(run, options, output, display)
    if as_json:
        print_json(_document(curated))
    else:
        _print_curated(curated)
    raise typer.Exit(_alarmed(curated, options))


def _alarmed(curated: Curated, options: CurateOptions) -> int:
    """Report an alarm; the exit code."""
    from engine.studies.curate.audit import alarm_sentence

    if curated.monitor is None or not curated.monitor.alarm:
        return 0
    complain(f"alarm: {alarm_sentence(curated.monitor, defence=options.defence, is_selected=curated.run is not None)}")
    return EXIT_DAMAGED if options.on_alarm == "stop" else 0


def _document(curated: Curated) -> dict[str, object]:
    """What `--json` prints."""
    from dataclasses import asdict

    return {
        "run": curated.run.store.uri if curated.run else None,
        "curation": curated.curation.to_document() if curated.curation else None,
        "reward": asdict(curated.reward),
        "monitor": asdict(curated.monitor) if curated.monitor else None,
        "left_out": list(curated.left_out),
        "notes": list(curated.notes),
    }


def _print_curated(curated: Curated) -> None:
    """Print the reward, the monitor, what was selected, and the balance of classes before and after."""
    from engine.data.run.curation_text import accuracy_text, agreement_facts, monitor_text

    for line in curated.left_out:
        print(f"left out    {line}")
    print(f"reward      {_reward_line(curated.reward)}")
    if (accuracy := curated.reward.accuracy) is not None:
        print(f"accuracy    {accuracy_text(accuracy)}")
    if curated.reward.defence:
        total = curated.reward.num_records + curated.reward.num_removed
        print(
            f"defence     {curated.reward.defence}: {curated.reward.num_removed} of {total} records removed, listed in"
            " curation/suspects.jsonl"
        )
    if (monitor := curated.monitor) is not None:
        print(f"monitor     {monitor_text(monitor)}")
        for name, text in agreement_facts(monitor):
            print(f"{name.lower():<12}{text}")
    for note in curated.notes:
        print(f"note        {note}")
    if curated.run is not None and curated.curation is not None:
        _print_selection(curated.curation)
        print(f"run         {curated.run.store.uri}{', complete before' if curated.run.was_complete else ''}")


def _reward_line(reward: RewardRecord) -> str:
    if reward.name == "class-index":
        return "minus the class index"
    if reward.kind != "preferences":
        return f"{reward.name} ({reward.kind})"
    return f"learned from {reward.num_records} records of {reward.name} ({reward.model}, on CLIP features)"


def _print_selection(curation: Curation) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from engine.data.run.curation_text import number_text

    left_over = f", {curation.num_left_over} left over" if curation.num_left_over else ""
    before, after = number_text(curation.mean_reward), number_text(curation.mean_reward_selected)
    print(
        f"selected    {curation.num_selected} of {curation.num_candidates} candidates, one of each"
        f" {curation.group_size}{left_over}; mean reward {before} -> {after}"
    )
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("class", "candidates", "share", "selected", "share after"):
        table.add_column(name, justify="left" if name == "class" else "right")
    for count in curation.classes:
        shares = count.candidates / curation.num_candidates, count.selected / max(1, curation.num_selected)
        table.add_row(
            Text(count.name), str(count.candidates), f"{shares[0]:.1%}", str(count.selected), f"{shares[1]:.1%}"
        )
    make_console().print(table)
