"""What an ablation found, in sentences with figures, negative ones too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from engine.studies.ablate.arms import Arm
from engine.studies.ablate.measures import ERRORS, PSNR, TRANSFER, VALID, Measure
from engine.studies.ablate.parts import WHOLE
from engine.studies.ablate.results import Results

# Measures within a sentence.
_WORDS = {
    "valid": "valid failures",
    "errors": "errors of the target",
    "transfer": "transfer errors",
    "psnr": "decibels to the unguided twin",
}


def findings(results: Results) -> Iterable[str]:
    """Sentences with figures: part by part, then what matters and what these samples do not show."""
    parts = [arm for arm in results.design.of("parts") if arm.part]
    for arm in parts:
        if sentence := _part_sentence(results, arm):
            yield sentence
    if results.has_changed_parts:
        yield _summary(results, parts)
    yield from _predictor_sentences(results)
    yield from _component_sentences(results)


def _part_sentence(results: Results, arm: Arm) -> str:
    main, changes = results.main, results.changes[arm.name]
    if main.name not in changes:
        return ""
    text = f"{arm.title[0].upper()}{arm.title[1:]}: {_change(results, arm, main)}"
    others = [
        _change(results, arm, measure)
        for measure in (ERRORS, TRANSFER, PSNR)
        if measure is not main and measure.name in changes and results.is_shown(arm.name, measure)
    ]
    return "; ".join([text, *others])


def _change(results: Results, arm: Arm, measure: Measure) -> str:
    """A difference in words: "valid failures fall from 0.79 to 0.52, by 0.27 (0.15 to 0.39; p < 0.001)"."""
    found = results.changes[arm.name][measure.name]
    p_value = results.p_values[arm.name][measure.name]
    low, value, high = found.change.low, found.change.value, found.change.high
    if not found.can_reject:
        return f"{_WORDS[measure.name]} are the same in each pair, {found.new:.2f}"
    figures = f"{value:+.2f} ({low:+.2f} to {high:+.2f}; {p_text(p_value)})"
    if not results.is_shown(arm.name, measure):
        return f"no difference of {_WORDS[measure.name]} is shown, {found.old:.2f} and {found.new:.2f}: {figures}"
    verb = "rise" if value > 0 else "fall"
    return f"{_WORDS[measure.name]} {verb} from {found.old:.2f} to {found.new:.2f}: {figures}"


def p_text(p_value: float) -> str:
    """A p value in words."""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"


def _summary(results: Results, parts: list[Arm]) -> str:
    main, word = results.main, _WORDS[results.main.name]
    shown = [arm for arm in parts if results.is_shown(arm.name, main)]
    gain = [_word(arm) for arm in shown if results.changes[arm.name][main.name].change.value < 0]
    cost = [_word(arm) for arm in shown if results.changes[arm.name][main.name].change.value > 0]
    rest = [_word(arm) for arm in parts if arm not in shown]
    number = len(results.samples[WHOLE])
    texts = [
        f"{_listed(gain)} add{'s' * (len(gain) == 1)} {word}" if gain else "",
        f"{_listed(cost)} cost{'s' * (len(cost) == 1)} {word}" if cost else "",
        f"of {_listed(rest)} {number} samples a row show no effect on {word}" if rest else "",
    ]
    text = "; ".join(filter(None, texts))
    return f"{text[0].upper()}{text[1:]} (5 % after Holm over the parts)"


def _word(arm: Arm) -> str:
    return arm.title.removeprefix("without ")


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def _predictor_sentences(results: Results) -> Iterable[str]:
    """The strongest predictor against the weakest one, and what screening costs."""
    if not results.predictors:
        return
    arms, first, last = results.design.of("predictor"), results.predictors[0], results.predictors[-1]
    for is_guided, text in ((False, "Screening alone"), (True, "With guidance")):
        own = [arm for arm in arms if arm.is_guided == is_guided]
        if not results.changes[own[-1].name]:
            continue
        begin = f"{text}, by predictors with an AUC of {first.auc:.2f} and {last.auc:.2f}: "
        yield begin + _changes(results, own[-1])
    draws = [results.samples[arm.name].draws or 0.0 for arm in arms if arm.is_guided]
    passed = [results.samples[arm.name].screened or 0.0 for arm in arms if arm.is_guided]
    by_auc = ", ".join(
        f"{number:.1f} at {predictor.auc:.2f}" for number, predictor in zip(draws, results.predictors, strict=True)
    )
    shares = " to ".join(dict.fromkeys(f"{100 * share:.0f}" for share in (min(passed), max(passed))))
    yield f"Draws a sample by AUC: {by_auc}; {shares} % of the samples passed"


def _changes(results: Results, arm: Arm) -> str:
    """All differences of shares of an arm, shown or not."""
    known = [measure for measure in (ERRORS, VALID, TRANSFER) if measure.name in results.changes[arm.name]]
    return "; ".join(_change(results, arm, measure) for measure in known)


def _component_sentences(results: Results) -> Iterable[str]:
    """Each number of Gaussians against the first one."""
    arms = results.design.of("components")
    for arm in arms:
        if results.changes.get(arm.name):
            first = next(one for one in arms if one.is_guided == arm.is_guided)
            how = "with guidance" if arm.is_guided else "screening alone"
            yield f"{arm.step} Gaussians a class in place of {first.step}, {how}: {_changes(results, arm)}"
