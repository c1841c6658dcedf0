"""From a run and people's answers to results: estimates by request and class, raters, oracles and rules.

Estimates are of one design, the one with the most images that were looked at: its strata say what an answer stands for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engine.data.reading.corpus import Corpus, open_run
from engine.data.reading.people.population import DrawnDesign, Population, read_drawn, read_population
from engine.data.reading.people.raters import agreement_of, rater_results
from engine.data.reading.people.results import (
    CLASS,
    REQUEST,
    WHOLE,
    GroupShares,
    PeopleResults,
    Shares,
    StratumResult,
)
from engine.data.reading.people.rules import GOAL, Reviewed, recommend, rule_results, score_results
from engine.data.review.agreements import answered_store, choices, human_agreement
from engine.data.review.answers import SAMPLE, has_answers
from engine.data.stores.base import Store
from engine.errors import JobError, RiskforgeError, StoreLostError, first_line
from engine.methods.corrected_shares import Stratum, corrected_share, human_share

if TYPE_CHECKING:
    import pyarrow as pa

MAX_PROBLEMS = 10


@dataclass(frozen=True, slots=True)
class People:
    """What people say of a run, for pages and tables that do without it where it cannot be read.

    Attributes:
        results: None where nobody chose the class of a sample, or answers or rows cannot be read.
        problems: lines about files that are left out, or why there are no results.
    """

    results: PeopleResults | None = None
    problems: tuple[str, ...] = ()


NO_PEOPLE = People()


def read_people(store: Store, *, is_rescoring: bool) -> People:
    """People's answers to a run, or to that whose images a rescoring is of.

    Raises:
        StoreLostError: the store is lost.
    """
    if not is_rescoring and not has_answers(store):
        return NO_PEOPLE
    problems: list[str] = []
    try:
        results = people_results(open_run(store.uri), notice=problems.append)
    except StoreLostError:
        raise
    except RiskforgeError as error:
        return People(problems=(first_line(error),))
    return People(results, tuple(problems[:MAX_PROBLEMS]))


def people_results(
    corpus: Corpus, *, goal: float = GOAL, notice: Callable[[str], None] = lambda text: None
) -> PeopleResults | None:
    """What people's answers say of a run; None where nobody chose the class of one of its samples.

    Args:
        corpus: one run, without a filter.
        goal: precision that the recommended threshold reaches.
        notice: receives a line for each file of answers that is left out.

    Raises:
        RiskforgeError: rows or answers cannot be read.
    """
    store = answered_store(corpus.runs[0].stores)
    if store is None:
        return None
    answers = choices(store, notice)
    samples = _of_kind(answers, SAMPLE)
    if not len(samples):
        return None
    digest = _main_design(samples)
    chosen = _of_design(answers, digest)
    drawn = read_drawn(store, digest)
    origin = corpus if store is corpus.runs[0].store else open_run(store.uri)
    population = read_population(corpus, drawn, origin)
    notes = list(_notes(samples, digest, drawn))
    review = _review(_of_kind(chosen, SAMPLE), population, drawn, notes)
    raters = rater_results(chosen)
    notes += [
        f"{rater.name} fails the attention checks; the answers count all the same, until _review/{rater.name} is moved"
        " away"
        for rater in raters
        if rater.is_inattentive
    ]
    return PeopleResults(
        design=digest,
        population=drawn.population if drawn else "accepted samples",
        requests=tuple(dict.fromkeys(population.request.tolist())),
        num_images=len(population),
        num_drawn=sum(number for _, number in drawn.strata.values()) if drawn else 0,
        num_reviewed=len(review.reviewed.human),
        machine=population.machine_name,
        raters=raters,
        agreement=agreement_of(_of_kind(chosen, SAMPLE)),
        groups=tuple(_groups(population, review)),
        strata=tuple(_strata(review, drawn)),
        rules=tuple(rule_results(population, review.reviewed)),
        scores=tuple(score_results(population, review.reviewed)),
        recommendation=recommend(population, review.reviewed, goal),
        notes=tuple(notes),
    )


def _of_kind(answers: pa.Table, kind: str) -> pa.Table:
    import pyarrow.compute as pc

    return answers.filter(pc.equal(answers["kind"], kind)).combine_chunks()


def _of_design(answers: pa.Table, digest: str) -> pa.Table:
    import pyarrow.compute as pc

    return answers.filter(pc.equal(answers["design"], digest)).combine_chunks()


def _main_design(samples: pa.Table) -> str:
    """The design of which most images were looked at; of equal ones the first by digest."""
    pairs = set(zip(samples["design"].to_pylist(), samples["key"].to_pylist(), strict=True))
    counts = Counter(design for design, _ in pairs)
    return min(counts, key=lambda design: (-counts[design], design))


def _notes(samples: pa.Table, digest: str, drawn: DrawnDesign | None) -> list[str]:
    notes = []
    others = sorted(set(samples["design"].to_pylist()) - {digest})
    if others:
        num_others = sum(design != digest for design in samples["design"].to_pylist())
        notes.append(
            f"{num_others} answers to {len(others)} other designs are in human_agreement, and not in these estimates"
        )
    if drawn is None:
        notes.append(
            f"the design {digest} is not stored with the run, so the sizes of its strata are estimated from the answers"
        )
    return notes


# Strata ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cell:
    """A stratum of the estimates: one of the design, or the part of one that is of one request and class.

    Attributes:
        prefix: request and code of the class.
        size: images in the population.
        places: in `Reviewed`, of the images that people looked at.
    """

    prefix: str
    size: float
    places: NDArray[np.intp]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Review:
    """The images that people looked at, in their strata.

    Attributes:
        strata: of the design, by reviewed image.
        is_current: whether the strata have as many images as the run has now, so that its machines' verdicts are of
            the population that was drawn from.
    """

    reviewed: Reviewed
    strata: NDArray[np.object_]
    cells: tuple[_Cell, ...]
    is_current: bool


def _review(samples: pa.Table, population: Population, drawn: DrawnDesign | None, notes: list[str]) -> _Review:
    """The reviewed images of the population and their strata; what is amiss is added to the notes."""
    agreements = human_agreement(samples)
    strata = dict(zip(samples["key"].to_pylist(), samples["stratum"].to_pylist(), strict=True))
    weights = dict(zip(samples["key"].to_pylist(), samples["weight"].to_pylist(), strict=True))
    keys = [key for key in agreements if key in population.place]
    if not keys:
        raise JobError("_review: its answers are to none of the run's images; move those to another run there")
    if unknown := len(agreements) - len(keys):
        notes.append(f"{unknown} images with answers are not in the population any more, and are left out")
    rows = np.array([population.place[key] for key in keys], dtype=np.intp)
    names = np.array([strata[key] for key in keys], dtype=object)
    cells = _cells(names, rows, [weights[key] for key in keys], population, drawn)
    is_current = _is_current(cells, population)
    if not is_current:
        notes.append(
            "the population has changed since the design was drawn, so estimates are by people alone: draw another one"
        )
    if empty := sum(not len(cell.places) for cell in cells):
        notes.append(f"{empty} strata have no answer yet, and count as the others do on average")
    weight = np.ones(len(rows))
    for cell in cells:
        weight[cell.places] = cell.size / max(len(cell.places), 1)
    human = np.array([agreements[key] for key in keys], dtype=float)
    return _Review(
        reviewed=Reviewed(rows=rows, human=human, weights=weight), strata=names, cells=cells, is_current=is_current
    )


def _cells(
    names: NDArray[np.object_],
    rows: NDArray[np.intp],
    weights: list[float],
    population: Population,
    drawn: DrawnDesign | None,
) -> tuple[_Cell, ...]:
    """The strata of the design where they lie within one request and class; coarser ones are divided by these.

    Args:
        names: strata of the reviewed images, whose rows in the population are `rows`.
        weights: of these images as they were drawn.
    """
    prefixes = population.prefix[rows]
    known, counts = np.unique(population.prefix.astype(str), return_counts=True)
    in_class = dict(zip(known.tolist(), counts.tolist(), strict=True))
    sizes: dict[tuple[str, str], float] = {}
    if drawn is None:
        for name, prefix, weight in zip(names, prefixes, weights, strict=True):
            key = (prefix, name if _is_within(name, prefix) else prefix)
            sizes[key] = sizes.get(key, 0.0) + weight
    else:
        for name, (num_images, _) in drawn.strata.items():
            prefix = "/".join(name.split("/")[:2])
            if prefix in in_class:
                sizes[prefix, name] = num_images
        divided = set(in_class) - {prefix for prefix, _ in sizes}
        sizes |= {(prefix, prefix): in_class[prefix] for prefix in divided}
    cells = []
    for (prefix, name), size in sorted(sizes.items()):
        is_here = (prefixes == prefix) & ((names == name) | (name == prefix))
        cells.append(_Cell(prefix=prefix, size=size, places=np.flatnonzero(is_here)))
    return tuple(cells)


def _is_within(name: str, prefix: str) -> bool:
    """Whether a stratum is of one request and class."""
    return name == prefix or name.startswith(f"{prefix}/")


def _is_current(cells: tuple[_Cell, ...], population: Population) -> bool:
    """Whether the strata of each request and class have as many images as the population has; estimated sizes count."""
    sizes: dict[str, float] = {}
    for cell in cells:
        sizes[cell.prefix] = sizes.get(cell.prefix, 0.0) + cell.size
    counts = Counter(population.prefix.tolist())
    return sizes.keys() == counts.keys() and all(round(sizes[prefix]) == counts[prefix] for prefix in counts)


def _strata(review: _Review, drawn: DrawnDesign | None) -> list[StratumResult]:
    known = drawn.strata if drawn else {}
    results = []
    for name in sorted({*known, *review.strata.tolist()}):
        human = review.reviewed.human[review.strata == name]
        size, number = known.get(name, (0, 0))
        results.append(
            StratumResult(
                name=name,
                num_images=size,
                num_drawn=number,
                num_reviewed=len(human),
                human=float(human.mean()) if len(human) else None,
            )
        )
    return results


# Shares ------------------------------------------------------------------------------------------------------------


def _groups(population: Population, review: _Review) -> list[GroupShares]:
    """All, then each request, then each class, where there are several."""
    groups = [_group(WHOLE, "", np.ones(len(population), dtype=bool), population, review)]
    # Codes of classes are in the order of labels, that of a joint prompt is the last.
    codes = {
        name: prefix.rpartition("/")[2] for name, prefix in zip(population.class_name, population.prefix, strict=True)
    }
    for level, names in ((REQUEST, population.request), (CLASS, population.class_name)):
        distinct = list(dict.fromkeys(names.tolist()))
        if level == CLASS:
            distinct.sort(key=lambda name: codes[name])
        groups += [_group(level, name, names == name, population, review) for name in distinct if len(distinct) > 1]
    return groups


def _group(level: str, name: str, rows: NDArray[np.bool_], population: Population, review: _Review) -> GroupShares:
    prefixes = set(population.prefix[rows].tolist())
    cells = [cell for cell in review.cells if cell.prefix in prefixes]
    return GroupShares(
        level=level,
        name=name,
        num_images=int(rows.sum()),
        num_reviewed=sum(len(cell.places) for cell in cells),
        valid=_shares(np.ones(len(population)), rows, cells, population, review),
        failures=_shares(population.target_errs.astype(float), rows, cells, population, review),
    )


def _shares(
    counted: NDArray[np.float64],
    rows: NDArray[np.bool_],
    cells: list[_Cell],
    population: Population,
    review: _Review,
) -> Shares:
    """The share of valid labels among the rows, of those that count.

    Args:
        counted: 1 where a valid label counts, 0 where not, [N].
        rows: of the group, [N].
        cells: of the group.
    """
    reviewed = review.reviewed
    verdicts = np.zeros(len(population)) if population.machine is None else population.machine * counted
    strata = [
        Stratum(
            size=cell.size,
            human=reviewed.human[cell.places] * counted[reviewed.rows[cell.places]],
            machine=verdicts[reviewed.rows[cell.places]],
        )
        for cell in cells
    ]
    has_machine = population.machine is not None
    mean = float(verdicts[rows].mean())
    return Shares(
        machine=mean if has_machine else None,
        human=human_share(strata),
        corrected=corrected_share(mean, strata) if has_machine and review.is_current else None,
    )
