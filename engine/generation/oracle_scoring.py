"""What oracles say of the label of a sample: predicted class and probability under each, and what follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.generation.plain_values import plain
from engine.job.columns import GUIDES, NO_CLASS, UNKNOWN
from engine.methods.finiteness import Faults
from engine.methods.validity import ValidityModel
from engine.models.oracles import Oracle
from engine.models.relabelled import predicted_classes


class OracleScores(NamedTuple):
    """The oracles' outputs for images; without meaning in rows with a fault.

    Attributes:
        predicted: class [B, K] of each of K oracles; `OTHER_CLASS` for one that the target does not have.
        p_label: probability [B, K] of the classes that count as the label, together.
    """

    predicted: Tensor
    p_label: Tensor


class Oracles:
    """The oracles of a job.

    Args:
        models: in the order of the job, with the classes of the target.
        is_guiding: whether the last one is a floor of guidance: it is recorded and marked, and decides nothing.
        validity: by the probabilities under those that guided nothing; None without an estimate.
    """

    def __init__(
        self, models: Sequence[Oracle], *, is_guiding: bool = False, validity: ValidityModel | None = None
    ) -> None:
        self.models = list(models)
        self.guiding = self.models[-1] if is_guiding and self.models else None
        self._num_independent = len(self.models) - (self.guiding is not None)
        self._validity = validity

    def preprocess(self, images: Sequence[Any]) -> list[Tensor]:
        """What each model takes for 8-bit images; work for the CPU alone, on any thread."""
        return [model.preprocess(images) for model in self.models]

    def fields(self, pixels: Sequence[Tensor], asked: Sequence[Sequence[int]], faults: Faults) -> list[dict[str, Any]]:
        """The fields of the records that depend on the oracles alone, image by image.

        Args:
            pixels: from `preprocess`.
            asked: of each of B images the classes that count as its label: its class, or the subset of a joint prompt.
            faults: where a model that gives values that are not finite is named.
        """
        logits = [model.score_pixels(inputs) for model, inputs in zip(self.models, pixels, strict=True)]
        for model, own in zip(self.models, logits, strict=True):
            faults.check_logits(own, "models.oracle", model.name)
        if not self.models:
            return [_without_oracle() for _ in asked]
        scored = oracle_scores(logits, asked, len(self.models[0].labels))
        names = [model.name + GUIDES if model is self.guiding else model.name for model in self.models]
        return [
            self._verdict(scored.predicted[row], scored.p_label[row])
            | {
                "oracles": [
                    {"model": name, "predicted_class": int(predicted), "p_label": plain(p)}
                    for name, predicted, p in zip(names, scored.predicted[row], scored.p_label[row], strict=True)
                ]
            }
            for row in range(len(asked))
        ]

    def _verdict(self, predicted: Tensor, p_label: Tensor) -> dict[str, Any]:
        """What the oracles that guided nothing say together, by their classes and probabilities [K]."""
        independent = slice(self._num_independent)
        if not self._num_independent:
            return {name: value for name, value in _without_oracle().items() if name != "oracles"}
        estimate = UNKNOWN
        if self._validity is not None:
            # Of the stored values, from which anybody can compute it again.
            estimate = plain(torch.tensor(self._validity.p_valid([plain(p) for p in p_label[independent]])))
        return {
            "oracle_class": int(predicted[0]),
            "oracle_p_label_min": plain(p_label[independent].min()),
            "p_valid": estimate,
        }


def oracle_scores(logits: Sequence[Tensor], asked: Sequence[Sequence[int]], num_classes: int) -> OracleScores:
    """Classes and probabilities by the logits [B, n + k] of K oracles.

    Args:
        logits: the last k columns of an oracle are of classes that the target does not have.
        asked: as in `Oracles.fields`.
        num_classes: n, of the target.
    """
    is_asked = torch.zeros(len(asked), num_classes, dtype=torch.bool)
    for row, classes in enumerate(asked):
        is_asked[row, list(classes)] = True
    # Of joint prompts the sum over their classes, in double precision so that it does not exceed 1 by rounding.
    shares = [torch.softmax(own.double(), 1)[:, :num_classes] for own in logits]
    p_label = [torch.where(is_asked, own, torch.zeros(())).sum(1).clamp(max=1) for own in shares]
    predicted = [predicted_classes(own, num_classes) for own in logits]
    return OracleScores(torch.stack(predicted, 1), torch.stack(p_label, 1).float())


def _without_oracle() -> dict[str, Any]:
    return {"oracle_class": NO_CLASS, "oracles": [], "oracle_p_label_min": UNKNOWN, "p_valid": UNKNOWN}
