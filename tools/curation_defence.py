"""What a defence of `riskforge curate` restores and what it costs, on the images of a run.

    uv run riskforge run jobs/quickstart.yaml --set requests.2.count=30 --set sampling.num_inference_steps=10 \
        --output runs/judged
    uv run python tools/curation_defence.py runs/judged

Simulated raters prefer low classes (reward: minus half the class index). Of their choices those with the largest
differences of reward are exchanged, for a share of all. Printed for each share and model: correlation with the true
reward over all samples of the reward learned from honest choices, from tampered ones, and after the defence; the
shares of the tampered and of the honest records that it removed. Means over seeds.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.driver.progress import PlainDisplay
from engine.methods.curation.defences import RemovalOptions
from engine.methods.curation.learning import (
    LearnedReward,
    LearnOptions,
    ModelKind,
    find_suspects,
    learn_reward,
    standardise,
)
from engine.methods.curation.preferences import Pairs
from engine.methods.curation.selection import draw_preferences
from engine.studies.curate.features import embed_samples
from engine.studies.samples import open_study, read_attempts

SHARES = (0.0, 0.1, 0.2, 0.4)
MODELS: tuple[ModelKind, ...] = ("linear", "network")
SLOPE = 0.5


@dataclass(frozen=True, slots=True)
class Judged:
    """Samples with features [N, d] and true rewards [N]."""

    features: Tensor
    truth: Tensor

    def choices(self, count: int, generator: torch.Generator) -> tuple[Pairs, Tensor]:
        """Honest choices between samples, and the true differences of reward [count]."""
        first, second = torch.randint(len(self.truth), (2, count), generator=generator)
        labels = draw_preferences(self.truth[first], self.truth[second], generator)
        return Pairs(self.features[first], self.features[second], labels), self.truth[first] - self.truth[second]

    def correlation(self, reward: LearnedReward) -> float:
        """Of a learned reward with the true one."""
        return float(torch.corrcoef(torch.stack([reward(self.features), self.truth]))[0, 1])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--records", type=int, default=400)
    parser.add_argument("--trusted", type=int, default=80)
    parser.add_argument("--seeds", type=int, default=10)
    options = parser.parse_args()
    judged = _read(options.run)
    print(f"{len(judged.truth)} samples, {judged.features.shape[1]} features, {options.seeds} seeds")
    print("model    tampered  honest  tampered  defended  removed of tampered  of honest")
    for model in MODELS:
        for share in SHARES:
            rows = [_measure(judged, model, share, seed, options) for seed in range(options.seeds)]
            honest, tampered, defended, caught, lost = torch.tensor(rows, dtype=torch.float64).mean(0).tolist()
            print(
                f"{model:8} {share:8.1f}  {honest:6.2f}  {tampered:8.2f}  {defended:8.2f}  {caught:19.2f}  {lost:9.2f}"
            )


def _read(uri: str) -> Judged:
    run = open_study(uri)
    features = embed_samples(run, PlainDisplay(sys.stderr))
    names = [request.name for request in run.job.requests]
    classes = {row["key"]: row["class_index"] for row in read_attempts(run, names, ["key", "class_index"])}
    truth = torch.tensor([-SLOPE * classes[key] for key in features.rows], dtype=torch.float64)
    return Judged(features.values, truth)


def _measure(judged: Judged, model: ModelKind, share: float, seed: int, options: argparse.Namespace) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    honest, margins = judged.choices(options.records, generator)
    trusted, _ = judged.choices(options.trusted, generator)
    flips = torch.zeros(options.records, dtype=torch.bool)
    flips[margins.abs().argsort(descending=True)[: round(share * options.records)]] = True
    tampered, numbers = honest.flipped(flips), torch.arange(options.records)
    learning, scale = LearnOptions(model=model), standardise(judged.features)
    clean = learn_reward(honest, numbers, learning, standardisation=scale)
    attacked = learn_reward(tampered, numbers, learning, standardisation=scale)
    suspects = find_suspects(attacked, tampered, trusted, learning, RemovalOptions())
    defended = learn_reward(tampered, numbers, learning, standardisation=scale, weights=suspects.weights)
    trains = torch.zeros(options.records, dtype=torch.bool).index_fill(0, attacked.split.training, True)
    removed = suspects.weights == 0
    rates = [float(removed[kind & trains].double().mean()) if kind.any() else 0.0 for kind in (flips, ~flips)]
    return [*(judged.correlation(reward) for reward in (clean, attacked, defended)), *rates]


if __name__ == "__main__":
    main()
