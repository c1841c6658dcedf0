"""Do the oracles know what people agree with? `p_valid` and rules of acceptance against the answers of CIFAR-10H.

    uv run python tools/validity_study.py --data DATA --cache FOLDER [--neighbours ARTEFACT] [--chart docs/validity.svg]

DATA holds `cifar10/` and `classifiers/`, as RISKFORGE_DATA does: 5,000 test images of CIFAR-10 with the answers of
about 51 people each. All is fitted on rows 0 to 2,499 and reported on the others, as Markdown tables. CIFAR-10H is
CC BY-NC-SA: nothing that is fitted on it is stored.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from targets.cifar_resnets import ENVIRONMENT, LABELS

from engine.methods.intervals import wilson_interval
from engine.methods.scores import kldb_parts
from engine.methods.temperature import fit_temperature
from engine.methods.validity_fitting import Answers, fit_validity
from engine.methods.validity_quality import (
    AGREED,
    auc,
    calibration_bins,
    calibration_error,
    has_agreed,
    kept_quality,
)
from engine.models.library_logging import quiet_libraries
from engine.models.oracles import load_oracle

TARGET = "zoo:cifar10/classifier"
ZOO = ("zoo:cifar10/oracle", "zoo:cifar10/oracle-b", "zoo:cifar10/judge")
OTHERS = ("targets.cifar_resnets:resnet20", "targets.cifar_resnets:resnet32")
# Networks for the mean of four probabilities.
FOUR = (*ZOO[:2], *OTHERS)
NUM_FITTED = 2500
ROWS = 250
NUM_SPLITS = 20
# Of people's answers to an image that lies between two classes: the share of these two, and the least of the second.
MIN_PAIR_SHARE, MIN_SECOND = 0.95, 2
P_VALID = (0.8, 0.9, 0.95, 0.99)
COLOURS = ("#0072B2", "#D55E00", "#009E73")


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class People:
    """The test images with what people said of them.

    Attributes:
        labels: [N] class indices.
        counts: [N, 10] answers by class.
    """

    images: np.ndarray
    labels: np.ndarray
    counts: np.ndarray

    def shares(self, labels: np.ndarray) -> np.ndarray:
        """Share of people who say the given labels, [N]."""
        return self.counts[np.arange(len(labels)), labels] / self.counts.sum(1)


def read_people(data: Path) -> People:
    """Images, labels and answers of the test file."""
    with np.load(data / "cifar10/cifar10_test_5000.npz", allow_pickle=False) as file:
        images, labels = file["images"], file["labels"].astype(np.int64)
    with np.load(data / "cifar10/cifar10_test_5000_human.npz", allow_pickle=False) as file:
        return People(images=images, labels=labels, counts=file["counts"].astype(np.int64))


def read_probabilities(address: str, people: People, cache: Path) -> np.ndarray:
    """Probabilities [N, 10] of a reader, with a temperature that is fitted on the first rows; cached as logits."""
    path = cache / f"{address.replace(':', '-').replace('/', '-')}.npy"
    if not path.is_file():
        reader = load_oracle(address, "cpu", LABELS)
        images = [PIL.Image.fromarray(pixels) for pixels in people.images]
        logits = [reader.score(images[start : start + ROWS]) for start in range(0, len(images), ROWS)]
        cache.mkdir(parents=True, exist_ok=True)
        np.save(path, torch.cat(logits).numpy())
    scores = torch.from_numpy(np.load(path)).double()
    fit = fit_temperature(scores[:NUM_FITTED], torch.from_numpy(people.labels[:NUM_FITTED]), 1.0)
    return np.asarray(torch.softmax(scores / fit.fitted, 1))


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Readers:
    """Probabilities [N, 10] by address, and what the target predicts."""

    probabilities: Mapping[str, np.ndarray]
    target: np.ndarray

    def of_labels(self, addresses: Sequence[str], labels: np.ndarray) -> np.ndarray:
        """Each reader's probability of the labels, [N, K]."""
        rows = np.arange(len(labels))
        return np.stack([self.probabilities[address][rows, labels] for address in addresses], axis=1)

    def predictions(self, address: str) -> np.ndarray:
        """Predicted classes, [N]."""
        return np.asarray(self.probabilities[address].argmax(1))


class Estimator:
    """`p_valid` of some readers, fitted on the first rows.

    Args:
        is_swapped: whether images on which the target errs are there twice, with what it predicts as their label too.
    """

    def __init__(self, readers: Readers, addresses: Sequence[str], people: People, *, is_swapped: bool = False) -> None:
        self._readers, self._addresses = readers, addresses
        rows, predicted = np.arange(NUM_FITTED), readers.target.argmax(1)
        errs = predicted[rows] != people.labels[rows]
        labelled = [(rows, people.labels), *([(rows[errs], predicted)] if is_swapped else [])]
        answers = Answers(
            p_labels=np.concatenate([readers.of_labels(addresses, labels)[some] for some, labels in labelled]),
            num_agreeing=np.concatenate([people.counts[some, labels[some]] for some, labels in labelled]),
            num_asked=np.concatenate([people.counts.sum(1)[some] for some, _ in labelled]),
            target_errs=np.concatenate([errs, *[np.ones(errs.sum(), dtype=bool)] * is_swapped]),
        )
        self.fit = fit_validity(answers)
        assert self.fit.model is not None, self.fit.verdict
        self._model = self.fit.model

    def __call__(self, labels: np.ndarray) -> np.ndarray:
        """Estimates for labels, [N]."""
        rows = self._readers.of_labels(self._addresses, labels)
        return np.array([self._model.p_valid(row) for row in rows.tolist()])


Rule = tuple[str, Any]


def rules(readers: Readers, estimators: Mapping[str, Estimator]) -> list[Rule]:
    """Rules of acceptance by name: functions from labels [N] to whether each image is kept [N]."""

    def votes(addresses: Sequence[str], needed: int) -> Any:
        return lambda labels: sum((readers.predictions(one) == labels).astype(int) for one in addresses) >= needed

    def least(addresses: Sequence[str], p: float) -> Any:
        return lambda labels: readers.of_labels(addresses, labels).min(1) >= p

    def mean(addresses: Sequence[str], p: float) -> Any:
        return lambda labels: readers.of_labels(addresses, labels).mean(1) >= p

    def estimate(estimator: Estimator, p: float) -> Any:
        return lambda labels: estimator(labels) >= p

    listed: list[Rule] = [
        ("nothing is left out", lambda labels: np.ones(len(labels), dtype=bool)),
        ("the first oracle predicts it", votes(ZOO[:1], 1)),
        (f"all {len(ZOO)} of the zoo predict it", votes(ZOO, len(ZOO))),
        ("the four networks predict it", votes(FOUR, 4)),
    ]
    listed += [(f"mean p of the four >= {p:g}", mean(FOUR, p)) for p in (0.9, 0.95)]
    listed += [(f"each p of the zoo >= {p:g}", least(ZOO, p)) for p in (0.9, 0.99)]
    listed += [(f"each p of the four >= {p:g}", least(FOUR, p)) for p in (0.9, 0.99)]
    for name, estimator in estimators.items():
        listed += [(f"p_valid of {name} >= {p:g}", estimate(estimator, p)) for p in P_VALID]
    return listed


def rule_table(listed: Sequence[Rule], readers: Readers, people: People) -> list[str]:
    """What each rule does to the reported images."""
    reported = np.arange(len(people.labels)) >= NUM_FITTED
    predicted = readers.target.argmax(1)
    errs = reported & (predicted != people.labels)
    shares, swapped = people.shares(people.labels), people.shares(predicted)
    wrong, rejected, false = errs & ~has_agreed(shares), errs & (shares < 0.5), errs & (swapped < 0.5)
    lines = [
        f"Of {reported.sum():,} images the target errs on {errs.sum()}; people do not agree with the label of"
        f" {wrong.sum()} of these, fewer than half of them say that of {rejected.sum()}, and of {false.sum()} fewer"
        " than half say what the target predicts.",
        "",
        "| rule | kept | precision | kept of errors | precision there | wrong labels that pass | fewer than half |"
        " the target's class passes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, rule in listed:
        kept, of_target = rule(people.labels), rule(predicted)
        everything, there = kept_quality(kept[reported], shares[reported]), kept_quality(kept[errs], shares[errs])
        figures = (everything.share_kept, everything.precision, there.share_kept, there.precision)
        passing = (passed(kept, wrong), passed(kept, rejected), passed(of_target, false))
        lines.append(f"| {name} | {' | '.join([*map(percent, figures), *passing])} |")
    return lines


def passed(kept: np.ndarray, rows: np.ndarray) -> str:
    """The share of some rows that is kept, with its interval."""
    share = wilson_interval(int((kept & rows).sum()), int(rows.sum()))
    return f"{share.value:.1%} ({share.low:.0%} to {share.high:.0%})"


def percent(value: float | None) -> str:
    """A share for a table."""
    return "-" if value is None else f"{value:.1%}"


def order_table(scores: Mapping[str, np.ndarray], people: People, errs: np.ndarray) -> list[str]:
    """How scores of the label order and predict what people say, on the reported images."""
    reported = np.arange(len(people.labels)) >= NUM_FITTED
    shares = people.shares(people.labels)
    lines = [
        "| score | AUC | AUC of errors | Spearman | calibration error | of errors | to agreement | Brier |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, score in scores.items():
        agreed = has_agreed(shares)
        figures = [
            auc(score[reported], agreed[reported]),
            auc(score[reported & errs], agreed[reported & errs]),
            within_classes(score[reported], shares[reported], people.labels[reported]),
            calibration_error(score[reported], shares[reported]),
            calibration_error(score[reported & errs], shares[reported & errs]),
            calibration_error(score[reported], agreed[reported].astype(float)),
            float(np.mean((score - agreed)[reported] ** 2)),
        ]
        lines.append(f"| {name} | {' | '.join(f'{figure:.3f}' for figure in figures)} |")
    return lines


def within_classes(scores: np.ndarray, shares: np.ndarray, labels: np.ndarray) -> float:
    """Spearman's correlation, the mean of those within the ten classes."""
    from scipy.stats import spearmanr

    rows = [labels == index for index in range(len(LABELS))]
    return float(np.mean([spearmanr(scores[one], shares[one]).statistic for one in rows]))


def ceiling(people: People) -> tuple[float, float]:
    """Spearman within classes of the halves of people's answers, and what a perfect predictor could reach of it.

    The second is the square root of the reliability of all answers (Spearman-Brown), the mean of random splits.
    """
    rng, reported = np.random.default_rng(0), slice(NUM_FITTED, None)
    labels, counts = people.labels[reported], people.counts[reported]
    correlations = []
    for _ in range(NUM_SPLITS):
        half = np.stack([rng.multivariate_hypergeometric(row, row.sum() // 2) for row in counts])
        rows = np.arange(len(labels))
        first, second = (part[rows, labels] / part.sum(1) for part in (half, counts - half))
        correlations.append(within_classes(first, second, labels))
    halves = float(np.mean(correlations))
    return halves, float(np.sqrt(2 * halves / (1 + halves)))


def divided(people: People) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The reported images whose answers are nearly all of two classes.

    Returns:
        Whether each image is one of them [N]; their two classes [M, 2]; the share of the second of the two [M].
    """
    pairs = np.argsort(-people.counts, axis=1, kind="stable")[:, :2]
    first, second = np.take_along_axis(people.counts, pairs, axis=1).T
    between = (first + second >= MIN_PAIR_SHARE * people.counts.sum(1)) & (second >= MIN_SECOND)
    between &= np.arange(len(people.labels)) >= NUM_FITTED
    return between, pairs[between], (second / (first + second))[between]


def kldb_of_pairs(probabilities: np.ndarray, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Balance and mass of the KLDB between two classes of each image, [M] each."""
    log_p = torch.from_numpy(log_of(probabilities))
    parts = [kldb_parts(row[None], sorted(pair)) for row, pair in zip(log_p, pairs.tolist(), strict=True)]
    balance, mass = np.array([[float(balance), float(mass)] for balance, mass in parts]).T
    return balance, mass


def log_of(probabilities: np.ndarray) -> np.ndarray:
    """Logarithms, finite."""
    return np.log(np.maximum(probabilities, 1e-300))


def boundary_table(readers: Mapping[str, np.ndarray], people: People) -> list[str]:
    """KLDB of networks against the split of people between two classes, on the reported images."""
    from scipy.stats import spearmanr

    between, pairs, minority = divided(people)
    lines = [
        f"{between.sum()} images; the share of the second class is {np.median(minority):.2f} at the median, and at"
        f" least 0.25 for {(minority >= 0.25).sum()} of them.",
        "",
        "| network | Spearman of the split with KLDB | with its balance | with entropy | of the split and balance,"
        " split at least 0.1 | its two first classes are people's |",
        "|---|---|---|---|---|---|",
    ]
    for name, probabilities in readers.items():
        balance, mass = kldb_of_pairs(probabilities[between], pairs)
        whole = balance + mass
        entropy = -(probabilities[between] * log_of(probabilities[between])).sum(1)
        wide = minority >= 0.1
        top = np.argsort(-probabilities[between], axis=1)[:, :2]
        same = float((np.sort(top, axis=1) == np.sort(pairs, axis=1)).all(1).mean())
        figures = [
            interval_of_correlation(spearmanr(minority, whole).statistic, len(minority)),
            interval_of_correlation(spearmanr(minority, balance).statistic, len(minority)),
            interval_of_correlation(spearmanr(minority, entropy).statistic, len(minority)),
            interval_of_correlation(spearmanr(minority[wide], balance[wide]).statistic, int(wide.sum())),
            f"{same:.1%}",
        ]
        lines.append(f"| {name} | {' | '.join(figures)} |")
    return lines


def interval_of_correlation(value: float, count: int) -> str:
    """A correlation with its interval by Fisher's transformation, with the variance of ranks (Bonett and Wright)."""
    half = 1.96 * np.sqrt((1 + value**2 / 2) / (count - 3))
    low, high = np.tanh(np.arctanh(value) + np.array([-half, half]))
    return f"{value:.2f} ({low:.2f} to {high:.2f})"


def draw(scores: Mapping[str, np.ndarray], people: People, of_target: np.ndarray, target: Path) -> None:
    """Calibration curves on all reported images and those on which the target errs; its KLDB by people's split."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": "riskforge", "font.size": 9}
    from matplotlib import pyplot

    reported = np.arange(len(people.labels)) >= NUM_FITTED
    shares, errs = people.shares(people.labels), of_target.argmax(1) != people.labels
    figure, (*axes, last) = pyplot.subplots(1, 3, figsize=(11, 3.6))
    for axis, rows, title in zip(axes, (reported, reported & errs), ("all images", "the target errs"), strict=True):
        for (name, score), colour in zip(scores.items(), COLOURS, strict=False):
            bins = calibration_bins(score[rows], shares[rows])
            axis.plot([one[0] for one in bins], [one[1] for one in bins], "o-", color=colour, label=name, markersize=4)
        axis.plot([0, 1], [0, 1], color="#999999", linewidth=0.8)
        axis.set(title=f"{title} ({rows.sum():,})", xlabel="score, mean of a tenth of the images", xlim=(0, 1))
        axis.set(ylabel="share of people who say the label", ylim=(0.6, 1.01))
    between, pairs, minority = divided(people)
    last.plot(minority, kldb_of_pairs(of_target[between], pairs)[0], ".", color="#000000", alpha=0.3, markersize=4)
    last.set(title=f"people are divided ({between.sum()})", xlabel="share of the second class", yscale="log")
    last.set(ylabel="the target's KLDB between the two, balance", xlim=(0, 0.5))
    for axis in (*axes, last):
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None})


def report(people: People, readers: Readers, neighbours: str | None, chart: Path | None) -> None:
    """Print all tables."""
    errs = readers.target.argmax(1) != people.labels
    every = (*ZOO, *OTHERS)
    estimators = {"the zoo": Estimator(readers, ZOO, people), "all": Estimator(readers, every, people)}
    estimators["the zoo, wrong labels too"] = Estimator(readers, ZOO, people, is_swapped=True)
    if neighbours:
        estimators["the zoo and neighbours"] = Estimator(readers, (*ZOO, neighbours), people)
    for name, estimator in estimators.items():
        print(f"p_valid of {name}: {estimator.fit.verdict}")
    by_reader = {address: readers.of_labels((address,), people.labels)[:, 0] for address in readers.probabilities}
    p_valid = {f"p_valid of {name}": estimator(people.labels) for name, estimator in estimators.items()}
    means = {
        "mean p of the zoo": readers.of_labels(ZOO, people.labels).mean(1),
        "mean p of the four": readers.of_labels(FOUR, people.labels).mean(1),
        "least p of the four": readers.of_labels(FOUR, people.labels).min(1),
        "votes of the four": np.mean([readers.predictions(one) == people.labels for one in FOUR], axis=0),
    }
    print(f"\nat least {AGREED:.0%} of people say the label of {has_agreed(people.shares(people.labels)).mean():.1%}\n")
    print("\n".join(order_table(by_reader | means | p_valid, people, errs)))
    print("\nSpearman of people's halves {:.3f}, ceiling {:.3f}\n".format(*ceiling(people)))
    print("\n".join(rule_table(rules(readers, estimators), readers, people)))
    networks = {"the target": readers.target} | {one: readers.probabilities[one] for one in FOUR}
    networks["mean of the four"] = np.mean([readers.probabilities[one] for one in FOUR], axis=0)
    print("\n" + "\n".join(boundary_table(networks, people)))
    if chart is not None:
        shown = ("p_valid of the zoo", "p_valid of all", "mean p of the four")
        draw({name: (p_valid | means)[name] for name in shown}, people, readers.target, chart)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get(ENVIRONMENT), help=f"default: {ENVIRONMENT}")
    parser.add_argument("--cache", type=Path, required=True, help="folder for logits")
    parser.add_argument("--neighbours", help="artefact of `riskforge prepare --only neighbours`, one more reader")
    parser.add_argument("--chart", type=Path, help="SVG file of the calibration curves")
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error(f"--data: give the folder, or set {ENVIRONMENT}")
    os.environ[ENVIRONMENT] = str(arguments.data)
    torch.set_num_threads(1)
    quiet_libraries()
    people = read_people(arguments.data)
    addresses = [*ZOO, *OTHERS, *([arguments.neighbours] if arguments.neighbours else [])]
    probabilities = {address: read_probabilities(address, people, arguments.cache) for address in addresses}
    target = read_probabilities(TARGET, people, arguments.cache)
    report(people, Readers(probabilities=probabilities, target=target), arguments.neighbours, arguments.chart)


if __name__ == "__main__":
    main()
