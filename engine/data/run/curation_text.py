"""A curation in words, the same ones for status, inspection, comparison, card and report."""

from __future__ import annotations

from engine.data.run.curated import Curation, MonitorRecord, ParentRun, Proportion, RewardRecord

_KINDS = {
    "column": "a column of the records",
    "function": "code of the user",
    "preferences": "learned from preference records",
    "values": "given as values",
}


def curation_facts(curation: Curation) -> list[tuple[str, str]]:
    """Names and values of what a reader has to know. Values hold texts of users: escape them."""
    facts = [
        ("Parent", _parent_text(curation.parent)),
        ("Reward", _reward_text(curation.reward)),
        ("Selected", _selected_text(curation)),
        ("Mean reward", _means_text(curation)),
    ]
    if curation.reward.accuracy is not None:
        facts.append(("Accuracy", accuracy_text(curation.reward.accuracy)))
    if curation.monitor is not None:
        facts.append(("Monitor", monitor_text(curation.monitor)))
        facts += agreement_facts(curation.monitor)
    if curation.ancestors:
        facts.append(("Ancestors", f"{len(curation.ancestors)}; the parent was curated itself"))
    return facts


def monitor_text(monitor: MonitorRecord) -> str:
    """What the monitor says of the learned reward."""
    state = "ALARM" if monitor.alarm else "no alarm"
    text = (
        f"{state}: e-value {number_text(monitor.e_value)}, {number_text(monitor.highest)} at its highest; the alarm is"
        f" raised at {number_text(1 / monitor.level)} (level {monitor.level:g}). {monitor.num_differing} of"
        f" {monitor.num_audited} audited records differ from the trusted choice"
    )
    return f"{text}; continued from {monitor.after}" if monitor.after else text


def agreement_facts(monitor: MonitorRecord) -> list[tuple[str, str]]:
    """Covariance and correlation of the learned reward with a trusted one, where they were measured."""
    facts = []
    if monitor.covariance is not None:
        facts.append(("Covariance", f"{number_text(monitor.covariance)} with a reward fitted to trusted choices"))
    if (correlation := monitor.correlation) is not None:
        interval = (
            f"{number_text(correlation.value)} ({number_text(correlation.low)} to {number_text(correlation.high)})"
        )
        facts.append(("Correlation", f"{interval} with it"))
    return facts


def accuracy_text(accuracy: Proportion) -> str:
    """The accuracy of a learned reward on records that did not train it."""
    return (
        f"{accuracy.value:.1%} ({accuracy.low:.1%} to {accuracy.high:.1%}) on {accuracy.total} records that did not"
        " train the reward"
    )


def _parent_text(parent: ParentRun) -> str:
    where = f"{parent.uri}, " if parent.uri else ""
    return f"{where}job {parent.name}, plan {parent.plan_digest}"


def _reward_text(reward: RewardRecord) -> str:
    text = f"{reward.name}, {_KINDS.get(reward.kind, reward.kind)}"
    if reward.num_records:
        text += f": {reward.num_records} records, {reward.model} model"
    if reward.defence:
        text += f"; defence {reward.defence} removed {reward.num_removed} records"
    return text


def _selected_text(curation: Curation) -> str:
    groups = "groups within a class" if curation.among == "class" else "groups over the whole run"
    text = (
        f"{curation.num_selected} of {curation.num_candidates} candidates: one of {curation.group_size} by"
        f" Bradley-Terry, {groups}, seed {curation.seed}"
    )
    text += f", rewards times {curation.scale:g}" if curation.scale != 1 else ""
    return f"{text}; {curation.num_left_over} filled no group" if curation.num_left_over else text


def _means_text(curation: Curation) -> str:
    before, after = number_text(curation.mean_reward), number_text(curation.mean_reward_selected)
    return f"{before} of the candidates, {after} of the selected ones"


def number_text(value: float) -> str:
    """A number for human readers: the mean of a learned reward over all samples is zero up to rounding."""
    return f"{value:.4g}" if abs(value) >= 1e-9 else "0"
