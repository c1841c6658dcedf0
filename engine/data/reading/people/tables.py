"""The results of a review in words and tables, the same ones for terminal, card and report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from engine.data.reading.people.results import (
    CLASS,
    REQUEST,
    WHOLE,
    Count,
    GroupShares,
    PeopleResults,
    RaterResult,
    Recommendation,
    RuleResult,
    ScoreResult,
    Shares,
)
from engine.methods.intervals import Estimate

ABSENT = "n/a"
MAX_CLASSES = 50
MAX_RATERS = 50

_SHARES_NOTE = (
    "A label is valid where people say it; a valid failure is a valid label on which the target errs. Machine:"
    " {machine}. Corrected: that share, corrected by what people say of the images that they looked at"
    " (prediction-powered estimate). By people alone: without the machine. 95 % intervals; raters' own errors are not"
    " corrected for."
)
_ALONE_NOTE = (
    "A label is valid where people say it; a valid failure is a valid label on which the target errs. 95 % intervals;"
    " raters' own errors are not corrected for."
)
_RULES_NOTE = (
    "Kept: the share of the images that a rule takes. Precision: of these, the share whose label people say. Recall: of"
    " the valid labels, the share that it takes. Wrong ones passed: of the wrong labels on which the target errs, the"
    " share that it takes."
)
_SCORES_NOTE = (
    "How well a score orders images by whether people say the label: the area under the ROC curve, 1 where perfectly,"
    " 0.5 where not at all."
)
_RATERS_NOTE = (
    "Real images and prompt-only samples are mixed in as controls: answers that are their label. Repetitions: answers"
    ' that are as the first one was. None: "none of these", or cannot tell.'
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PeopleTable:
    """A table of texts; a cell has a value and a second text, such as its interval.

    Attributes:
        headings: of the first column and of the cells, each with a second line.
        lines: name, whether it is a total, cells.
    """

    title: str
    note: str
    headings: tuple[tuple[str, str], ...]
    lines: tuple[tuple[str, bool, tuple[tuple[str, str], ...]], ...]
    num_left_out: int = 0


def people_facts(results: PeopleResults) -> list[tuple[str, str]]:
    """Names and values of what a reader has to know first. Values hold texts of users: escape them."""
    raters = len(results.raters)
    looked_at = f"{results.num_reviewed:,} of {results.num_images:,} images ({results.population})"
    if results.num_drawn > results.num_reviewed:
        looked_at += f"; {results.num_drawn:,} were drawn"
    facts = [
        ("Looked at", f"{looked_at}, by {raters} rater{'' if raters == 1 else 's'}"),
        ("Valid labels", _headline(results.whole.valid.corrected, results.whole.valid.human)),
        ("Valid failures", _headline(results.whole.failures.corrected, results.whole.failures.human)),
        ("Agreement", _agreement_text(results)),
    ]
    if results.recommendation is not None:
        facts.append(("Threshold", recommendation_text(results.recommendation)))
    return facts


def people_tables(results: PeopleResults) -> list[PeopleTable]:
    """All tables that have a line."""
    tables = [*_shares_tables(results), _rules_table(results), _scores_table(results), _raters_table(results)]
    return [table for table in tables if table.lines]


def _headline(corrected: Estimate | None, human: Estimate | None) -> str:
    estimate = corrected or human
    if estimate is None:
        return "nobody looked at an image"
    return f"{with_interval(estimate)}, {'corrected by people' if corrected else 'by people alone'}"


def _agreement_text(results: PeopleResults) -> str:
    agreement = results.agreement
    if agreement.alpha is None:
        if agreement.num_items:
            return "not defined: all answers are one and the same"
        return "not known: no image has the answers of two raters"
    return (
        f"Krippendorff's alpha {agreement.alpha:.2f} ({agreement.low:.2f} to {agreement.high:.2f}) over"
        f" {agreement.num_items:,} images with two answers or more"
    )


def recommendation_text(recommendation: Recommendation) -> str:
    """The recommended threshold in a sentence."""
    goal, rule = recommendation.goal, recommendation.rule
    if recommendation.threshold is None:
        text = f"no threshold of {recommendation.score} reaches a precision of {goal:g} with its lower bound"
        if rule is None or rule.precision is None:
            return text
        return f"{text}; {rule.name} comes nearest: {with_interval(rule.precision)}, kept {rule.kept:.0%}"
    assert rule is not None and rule.precision is not None, "a threshold has a rule"
    return (
        f"{rule.name}: precision {with_interval(rule.precision)}, its lower bound at least {goal:g}; kept"
        f" {rule.kept:.0%} of the images. Chosen on these answers: confirm it on fresh ones"
    )


# Tables ------------------------------------------------------------------------------------------------------------


def _shares_tables(results: PeopleResults) -> list[PeopleTable]:
    """Valid labels and valid failures, or one table where they are the same in all groups."""
    if all(group.valid == group.failures for group in results.groups):
        return [_shares_table(results, "Valid labels, which are all valid failures", lambda group: group.valid)]
    return [
        _shares_table(results, "Valid labels", lambda group: group.valid),
        replace(
            _shares_table(results, "Valid failures", lambda group: group.failures),
            note="As above, of labels that are valid and on which the target errs.",
        ),
    ]


def _shares_table(results: PeopleResults, title: str, shares: Callable[[GroupShares], Shares]) -> PeopleTable:
    has_machine = any(group.valid.machine is not None for group in results.groups)
    classes = [group for group in results.groups if group.level == CLASS]
    shown = [group for group in results.groups if group.level != CLASS] + classes[:MAX_CLASSES]
    figures: list[tuple[tuple[str, str], Callable[[GroupShares], tuple[str, str]]]] = [
        (("Images", "looked at"), lambda group: (f"{group.num_images:,}", f"{group.num_reviewed:,}")),
    ]
    if has_machine:
        figures += [
            (("Machine", ""), lambda group: (_percent(shares(group).machine), "")),
            (("Corrected", "by people"), lambda group: _cell(shares(group).corrected)),
        ]
    figures += [(("People", "alone"), lambda group: _cell(shares(group).human))]
    return PeopleTable(
        title=title,
        note=_SHARES_NOTE.format(machine=machine_text(results)) if has_machine else _ALONE_NOTE,
        headings=(("Group", ""), *(heading for heading, _ in figures)),
        lines=tuple(
            (group_name(group), group.level == WHOLE, tuple(figure(group) for _, figure in figures)) for group in shown
        ),
        num_left_out=len(classes[MAX_CLASSES:]),
    )


def machine_text(results: PeopleResults) -> str:
    """What the machine's share is."""
    return "the mean of p_valid" if results.machine == "p_valid" else f"the share where {results.machine}"


def group_name(group: GroupShares) -> str:
    """A group in words."""
    if group.level == WHOLE:
        return "all images"
    return group.name if group.level == REQUEST else f"class {group.name}"


def _rules_table(results: PeopleResults) -> PeopleTable:
    return PeopleTable(
        title="Oracles and rules against people",
        note=_RULES_NOTE,
        headings=(("Rule", ""), ("Kept", ""), ("Precision", ""), ("Recall", ""), ("Wrong ones passed", "")),
        lines=tuple((rule.name, False, _rule_cells(rule)) for rule in results.rules),
    )


def _rule_cells(rule: RuleResult) -> tuple[tuple[str, str], ...]:
    estimates = (rule.precision, rule.recall, rule.wrong_passed)
    return ((_percent(rule.kept), ""), *(_cell(estimate) for estimate in estimates))


def _scores_table(results: PeopleResults) -> PeopleTable:
    def cell(score: ScoreResult) -> tuple[str, str]:
        return f"{score.auc.value:.2f}", f"{score.auc.low:.2f} to {score.auc.high:.2f}"

    return PeopleTable(
        title="Scores against people",
        note=_SCORES_NOTE,
        headings=(("Score", ""), ("AUC", "")),
        lines=tuple((score.name, False, (cell(score),)) for score in results.scores),
    )


def _raters_table(results: PeopleResults) -> PeopleTable:
    return PeopleTable(
        title="Raters",
        note=_RATERS_NOTE,
        headings=(
            ("Rater", ""), ("Answers", ""), ("None", ""), ("Real images", "right"),
            ("Prompt-only", "as asked"), ("Repetitions", "the same"), ("Seconds", "median"),
        ),
        lines=tuple((_rater_name(rater), False, _rater_cells(rater)) for rater in results.raters[:MAX_RATERS]),
        num_left_out=len(results.raters[MAX_RATERS:]),
    )  # fmt: skip


def _rater_name(rater: RaterResult) -> str:
    return f"{rater.name}, fails the attention checks" if rater.is_inattentive else rater.name


def _rater_cells(rater: RaterResult) -> tuple[tuple[str, str], ...]:
    counts = (rater.real, rater.plain, rater.repeats)
    return (
        (f"{rater.num_answers:,}", ""),
        (f"{rater.num_none:,}", ""),
        *(_count(count) for count in counts),
        (f"{rater.seconds:.1f}", ""),
    )


def _count(count: Count) -> tuple[str, str]:
    return (_percent(count.share), f"{count.num_right} of {count.total}") if count.total else (ABSENT, "")


def _percent(share: float | None) -> str:
    return ABSENT if share is None else f"{share:.1%}"


def _cell(estimate: Estimate | None) -> tuple[str, str]:
    return (ABSENT, "") if estimate is None else (_percent(estimate.value), _range(estimate))


def _range(estimate: Estimate) -> str:
    return f"{estimate.low * 100:.0f} to {estimate.high * 100:.0f}%"


def with_interval(estimate: Estimate) -> str:
    """A share with its interval in a sentence."""
    return f"{estimate.value:.1%} ({_range(estimate)})"


# Texts -------------------------------------------------------------------------------------------------------------


def markdown(results: PeopleResults, escape: Callable[[str], str]) -> list[str]:
    """Facts, tables and notes as lines of Markdown.

    Args:
        escape: makes a text of a user one without a meaning in Markdown.
    """
    lines = ["| fact | value |", "|---|---|"]
    lines += [f"| {name} | {escape(text)} |" for name, text in people_facts(results)]
    for table in people_tables(results):
        heads = [_in_brackets((_within_sentence(name), note)) for name, note in table.headings]
        lines += ["", f"### {table.title}", "", table.note, "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        lines += [f"| {' | '.join([escape(name), *map(_in_brackets, cells)])} |" for name, _, cells in table.lines]
        if table.num_left_out:
            lines += ["", f"{table.num_left_out} more are in `riskforge review RUN --results --json`."]
    if results.notes:
        lines += ["", *(f"- {escape(note)}" for note in results.notes)]
    return lines


def _within_sentence(name: str) -> str:
    return name if name[:2].isupper() else name[:1].lower() + name[1:]


def _in_brackets(cell: Sequence[str]) -> str:
    value, note = cell
    return f"{value} ({note})" if note else value
