"""The error predictor g_phi: will the target err on an image with this embedding? (RiskyDiff, Yu et al., AAAI 2026.)

One class-agnostic network d -> 2d -> d -> 2 with ReLU, trained by cross-entropy with weights [1, n_ok / n_err].
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, pad, relu

from engine.methods.conditioning.input_checks import check_embeddings, check_kind
from engine.methods.conditioning.predictor_advice import predictor_advice
from engine.methods.conditioning.predictor_evaluation import PredictorEvaluation, evaluate
from engine.methods.conditioning.seeds import derived_seed

# Rows of every inference call: kernels choose their order of summation by the shape, and a prediction must not depend
# on the number of rows in its batch.
_ROWS = 16
_NUM_LAYERS = 3
# Errors, and images without error, needed to train on one of them and hold out another.
_MIN_EACH = 2

Layers = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictorOptions:
    """How the predictor is trained and evaluated; the paper's values, but for `standardise`.

    Attributes:
        epochs: passes over the training images.
        batch_size: images a step.
        learning_rate: of Adam.
        standardise: subtract the training images' mean and divide by their deviation, entry by entry, inside the
            model. Embeddings of any scale then train alike.
        holdout: share of the images that is not trained on, above 0 and below 1.
        min_per_class: held-out errors, and images without error, that a class needs for a figure of its own.
        threshold: confidence above which precision and recall count an alarm.
        seed: of the split, the first weights and the order of batches.
    """

    epochs: int = 20
    batch_size: int = 64
    learning_rate: float = 1e-3
    standardise: bool = True
    holdout: float = 0.25
    min_per_class: int = 10
    threshold: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.holdout < 1:
            raise ValueError(f"holdout: {self.holdout} is not a share above 0 and below 1")


@dataclass(frozen=True, slots=True)
class Exchange:
    """Outcomes that are exchanged.

    Attributes:
        share: of the images, in [0, 1].
        order: one of many in which they can be.
    """

    share: float
    order: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictorFit:
    """The outcome of training.

    Attributes:
        predictor: None where it cannot be trained.
        evaluation: on the held-out images; None where it cannot be trained.
        verdict: for a reader.
        advice: what to do where nothing shows that the predictor is of use; empty otherwise, and of artefacts that
            were prepared before there was one.
    """

    predictor: ErrorPredictor | None
    evaluation: PredictorEvaluation | None
    verdict: str
    advice: str = ""


class ErrorPredictor:
    """A trained predictor, on the CPU.

    Args:
        layers: weight [out, in] and bias [out] of each linear layer, float32.
        mean: [d], subtracted from embeddings.
        std: [d], by which they are then divided.
    """

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]], mean: Tensor, std: Tensor) -> None:
        self._layers = [(weight.detach(), bias.detach()) for weight, bias in layers]
        self._mean = mean
        self._std = std
        # In float64 the order of summation changes nothing that survives rounding to float32.
        self._exact = [(weight.double(), bias.double()) for weight, bias in self._layers]

    @property
    def dim(self) -> int:
        """Entries d of an embedding."""
        return self._mean.shape[0]

    def confidence(self, embeds: Tensor) -> Tensor:
        """Probability [B], float32, that the target errs, for embeddings [B, d].

        Raises:
            ValueError: embeddings of another size.
        """
        return torch.sigmoid(self.log_odds(embeds)).float()

    @torch.no_grad()
    def log_odds(self, embeds: Tensor) -> Tensor:
        """Log-odds [B], float64, that the target errs, for embeddings [B, d].

        Raises:
            ValueError: embeddings of another size.
        """
        if embeds.ndim != 2 or embeds.shape[1] != self.dim:
            raise ValueError(f"embeds {list(embeds.shape)}: this predictor takes [B, {self.dim}]")
        inputs = (embeds.double() - self._mean.double()) / self._std.double()
        blocks = [
            _forward(self._exact, pad(block, (0, 0, 0, _ROWS - len(block))))[: len(block)]
            for block in inputs.split(_ROWS)
        ]
        logits = torch.cat(blocks)
        return logits[:, 1] - logits[:, 0]

    def state(self) -> dict[str, Any]:
        """Tensors and plain values, for `from_state`."""
        layers = {f"weight_{number}": weight for number, (weight, _) in enumerate(self._layers)}
        layers |= {f"bias_{number}": bias for number, (_, bias) in enumerate(self._layers)}
        return {"kind": "error_predictor", "mean": self._mean, "std": self._std, **layers}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> ErrorPredictor:
        """A predictor from its `state`.

        Raises:
            ValueError: it is a state of another kind.
        """
        check_kind(state, "error_predictor")
        layers = [(state[f"weight_{number}"], state[f"bias_{number}"]) for number in range(_NUM_LAYERS)]
        return cls(layers, state["mean"], state["std"])


def fit_predictor(
    embeds: Tensor,
    errors: Tensor,
    classes: Tensor,
    labels: Sequence[str],
    options: PredictorOptions | None = None,
    *,
    exchange: Exchange | None = None,
) -> PredictorFit:
    """Train on one part of a validation set and evaluate on the other.

    Args:
        embeds: [N, d], raw.
        errors: [N] booleans, whether the target errs.
        classes: [N] class indices.
        labels: n class names in index order.
        options: `PredictorOptions()` where not given.
        exchange: of outcomes among the images trained on, which weakens the predictor on purpose.

    Returns:
        The predictor with its evaluation, or the reason why there is none: a target without errors is no fault.

    Raises:
        ValueError: shapes or indices are wrong, or an embedding is not finite; the last message
            names the class.
    """
    options = options or PredictorOptions()
    check_embeddings(embeds, classes, labels)
    _check_errors(embeds, errors)
    if reason := _untrainable(errors):
        advice = predictor_advice(int(errors.sum()), None)
        return PredictorFit(predictor=None, evaluation=None, verdict=f"cannot be trained: {reason}", advice=advice)
    held_out = _hold_out(errors, classes, options)
    trained_on = exchange_outcomes(errors[~held_out], exchange or Exchange(0.0), options.seed)
    predictor = train_predictor(embeds[~held_out], trained_on, options)
    evaluation = evaluate(
        predictor.log_odds(embeds[held_out]),
        errors[held_out],
        classes[held_out],
        labels,
        threshold=options.threshold,
        min_per_class=options.min_per_class,
    )
    advice = predictor_advice(int(errors.sum()), evaluation.pooled.auc_low)
    return PredictorFit(predictor=predictor, evaluation=evaluation, verdict=evaluation.pooled.verdict, advice=advice)


def train_predictor(embeds: Tensor, errors: Tensor, options: PredictorOptions) -> ErrorPredictor:
    """Train on all of embeddings [N, d] and error flags [N], both outcomes among them.

    Raises:
        ValueError: shapes are wrong, or one of the outcomes is missing.
    """
    _check_errors(embeds, errors)
    weights = outcome_weights(errors)
    generator = torch.Generator("cpu").manual_seed(options.seed)
    mean, std = _standardisation(embeds, options.standardise)
    inputs, targets = (embeds.float() - mean) / std, errors.long()
    layers = _initial_layers(embeds.shape[1], generator)
    optimiser = torch.optim.Adam([tensor for layer in layers for tensor in layer], lr=options.learning_rate)
    with torch.enable_grad():
        for _ in range(options.epochs):
            for rows in torch.randperm(len(inputs), generator=generator).split(options.batch_size):
                optimiser.zero_grad()
                cross_entropy(_forward(layers, inputs[rows]), targets[rows], weight=weights).backward()
                optimiser.step()
    return ErrorPredictor(layers, mean, std)


def exchange_outcomes(errors: Tensor, exchange: Exchange, seed: int) -> Tensor:
    """Error flags [N] with those of a share of the images exchanged among them: what a poor validation set would say.

    As many errors remain. The images of a smaller share are among those of a larger one, and with a share of 1 no flag
    has to do with its image.
    """
    generator = torch.Generator("cpu").manual_seed(derived_seed(seed, f"exchange{exchange.order or ''}"))
    ranks, order = (torch.randperm(len(errors), generator=generator) for _ in range(2))
    chosen = ranks < round(exchange.share * len(errors))
    exchanged = errors.clone()
    exchanged[chosen] = errors[order[chosen[order]]]
    return exchanged


def outcome_weights(errors: Tensor) -> Tensor:
    """Weights [1, n_ok / n_err] of the outcomes "right" and "error", so that both have equal weight in total.

    Args:
        errors: [N] booleans.

    Raises:
        ValueError: one of the outcomes is missing.
    """
    num_errors = int(errors.sum())
    num_right = len(errors) - num_errors
    if not num_errors or not num_right:
        raise ValueError(f"errors: {num_errors} of {len(errors)} images; both outcomes are needed")
    return torch.tensor([1.0, num_right / num_errors])


def _hold_out(errors: Tensor, classes: Tensor, options: PredictorOptions) -> Tensor:
    """Which images are held out, [N] booleans: seeded, the same share of errors and of others, spread over classes."""
    generator = torch.Generator("cpu").manual_seed(derived_seed(options.seed, "split"))
    held_out = torch.zeros(len(errors), dtype=torch.bool)
    for outcome in (errors, ~errors):
        rows = outcome.nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=generator)]
        rows = rows[classes[rows].argsort(stable=True)]
        number = min(max(round(options.holdout * len(rows)), 1), len(rows) - 1)
        held_out[rows[(torch.arange(number) * 2 + 1) * len(rows) // (2 * number)]] = True
    return held_out


def _check_errors(embeds: Tensor, errors: Tensor) -> None:
    if errors.dtype != torch.bool or errors.shape != embeds.shape[:1]:
        raise ValueError(f"errors: {errors.dtype} {list(errors.shape)}; one boolean an image is expected")


def _untrainable(errors: Tensor) -> str:
    """Why a predictor cannot be trained, or an empty text."""
    total, num_errors = len(errors), int(errors.sum())
    if num_errors == 0:
        return f"the target makes no error on {total} images"
    if num_errors == total:
        return f"the target errs on all of {total} images"
    if min(num_errors, total - num_errors) < _MIN_EACH:
        text = "makes 1 error" if num_errors == 1 else "is right once"
        return f"the target {text} on {total} images; {_MIN_EACH} are needed, one of them to be held out"
    return ""


def _standardisation(embeds: Tensor, standardise: bool) -> tuple[Tensor, Tensor]:
    """Mean and deviation of every entry, [d] each; an entry that never varies is left at its scale."""
    if not standardise:
        return torch.zeros(embeds.shape[1]), torch.ones(embeds.shape[1])
    std, mean = torch.std_mean(embeds.double(), dim=0, correction=0)
    varies = std > 1e-6 * mean.abs().clamp_min(1e-30)
    return mean.float(), torch.where(varies, std, torch.ones_like(std)).float()


def _initial_layers(dim: int, generator: torch.Generator) -> Layers:
    """Weights and biases uniform within 1 / sqrt(inputs), as torch's Linear has them, from a generator."""
    widths = [dim, 2 * dim, dim, 2]
    layers = []
    for inputs, outputs in itertools.pairwise(widths):
        bound = inputs**-0.5
        weight = torch.empty(outputs, inputs).uniform_(-bound, bound, generator=generator)
        bias = torch.empty(outputs).uniform_(-bound, bound, generator=generator)
        layers.append((weight.requires_grad_(), bias.requires_grad_()))
    return layers


def _forward(layers: Layers, inputs: Tensor) -> Tensor:
    """Logits [B, 2] of standardised embeddings [B, d]."""
    for weight, bias in layers[:-1]:
        inputs = relu(linear(inputs, weight, bias))
    return linear(inputs, *layers[-1])
