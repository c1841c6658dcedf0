"""Scores of stored images: target, transfer models, oracle, CLIP and judge get the pixels that a reader gets."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from engine.errors import JobError
from engine.generation.oracle_scoring import Oracles
from engine.generation.plain_values import plain
from engine.job.columns import GUIDES
from engine.job.plan import Cell, SampleSpec, class_prompt
from engine.job.records import STATUS_OK, failed_record, new_record
from engine.methods import scores
from engine.methods.finiteness import Faults
from engine.models.classifier import Classifier
from engine.models.clip import Clip
from engine.models.oracles import Oracle
from engine.models.relabelled import predicted_classes


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerInputs:
    """What the models of a scorer take for B images: a tensor [B, 3, h, w] on the CPU for each model."""

    clip: Tensor
    target: Tensor
    transfer: Sequence[Tensor]
    oracles: Sequence[Tensor]
    judge: Tensor | None


class Scorer:
    """The models that score and never sample.

    Args:
        target: the classifier under test.
        clip: measures conformity to every class prompt.
        transfer: further classifiers, recorded.
        oracles: independent models that predict the class, recorded.
        judge: a second CLIP model, independent of the first: conformity as measured by the model that guided a sample
            is circular. Recorded, never guided on.
        further_targets: classifiers that guidance sees beside the target; recorded before the transfer classifiers, as
            these are, and marked.

    Raises:
        JobError: a CLIP model gives no usable embedding of a class prompt.
    """

    def __init__(
        self,
        target: Classifier,
        clip: Clip,
        transfer: Sequence[Oracle] = (),
        oracles: Oracles | None = None,
        judge: Clip | None = None,
        further_targets: Sequence[Oracle] = (),
    ) -> None:
        self.target = target
        self.further_targets = list(further_targets)
        self._clip = clip
        self._transfer = [*further_targets, *transfer]
        self._oracles = oracles or Oracles(())
        self._judge = judge
        prompts = [class_prompt(label) for label in target.labels]
        self._class_embeds = _text_embeds("models.clip", clip, prompts)
        self._placed_embeds: dict[torch.device, Tensor] = {}
        self._judge_embeds = _text_embeds("models.judge", judge, prompts) if judge else None

    @property
    def guiding_oracle(self) -> Oracle | None:
        """The oracle that is a floor of guidance; None without one."""
        return self._oracles.guiding

    @property
    def clip(self) -> Clip:
        """The CLIP model that measures conformity."""
        return self._clip

    def preprocess(self, images: Sequence[PIL.Image.Image]) -> ScorerInputs:
        """What the models take for 8-bit images; work for the CPU alone, on any thread."""
        return ScorerInputs(
            clip=self._clip.preprocess(images),
            target=self.target.preprocess(images),
            transfer=[model.preprocess(images) for model in self._transfer],
            oracles=self._oracles.preprocess(images),
            judge=self._judge.preprocess(images) if self._judge else None,
        )

    def records(self, specs: Sequence[SampleSpec], images: Sequence[PIL.Image.Image]) -> list[dict[str, Any]]:
        """As `score`, of 8-bit images."""
        return self.score(specs, self.preprocess(images))

    def preprocess_clip(self, images: Sequence[PIL.Image.Image]) -> Tensor:
        """What the CLIP model alone takes for 8-bit images; on any thread."""
        return self._clip.preprocess(images)

    def embed(self, pixels: Tensor) -> Tensor:
        """CLIP embeddings [B, d] of images, of what `preprocess` or `preprocess_clip` gave for that model."""
        return self._clip.embeds_of_pixels(pixels)

    def score(
        self, specs: Sequence[SampleSpec], inputs: ScorerInputs, embeds: Tensor | None = None
    ) -> list[dict[str, Any]]:
        """Complete records of samples, but for gradient counts and what is measured of two images.

        Args:
            embeds: as `embed` gives them, where they are needed elsewhere too.

        Where a model gives values that are not finite, the record is that of a failed sample and names the model.
        """
        faults = Faults(len(specs))
        embeds = self.embed(inputs.clip) if embeds is None else embeds
        similarities = _similarities(self._clip, self._class_embeds, embeds, faults, "models.clip")
        cells = [spec.cell for spec in specs]
        labels = conditioned_classes(cells, similarities)
        of_target = target_fields(self.target, cells, self.target.score_pixels(inputs.target), labels, faults)
        of_oracles = self._oracles.fields(inputs.oracles, asked_of(cells, labels), faults)
        columns = _conformity_columns(similarities, labels)
        logits = [model.score_pixels(pixels) for model, pixels in zip(self._transfer, inputs.transfer, strict=True)]
        transfer = transfer_entries(self._transfer, logits, labels, faults, self.further_targets)
        judge = self._judge_entries(inputs, labels, faults)
        return [
            failed_record(spec, faults[row])
            if faults[row]
            else self._record(spec, row, int(labels[row]), columns)
            | of_target[row]
            | of_oracles[row]
            | {"transfer": transfer[row], "judge": judge[row]}
            for row, spec in enumerate(specs)
        ]

    def conformity_to(self, labels: Tensor, *, raw: bool) -> Callable[[Tensor], Tensor]:
        """Conformity of images [B, 3, H, W] in [0, 1] to the prompts of their classes, [B], differentiable.

        Args:
            labels: [B] class indices y.
            raw: the inner product of the embeddings instead of their cosine.
        """
        texts = self._class_embeds_on(labels.device)[labels]

        def measure(images: Tensor) -> Tensor:
            embeds = self._clip.embeds_of_tensor(images)
            return (embeds * texts).sum(-1) if raw else scores.conformity(embeds, texts)

        return measure

    def _class_embeds_on(self, device: torch.device) -> Tensor:
        """Embeddings of all class prompts [n, d] on a device, copied there once."""
        if device not in self._placed_embeds:
            self._placed_embeds[device] = self._class_embeds.to(device)
        return self._placed_embeds[device]

    def _record(self, spec: SampleSpec, row: int, label: int, columns: dict[str, Tensor]) -> dict[str, Any]:
        record = new_record(spec) | {name: plain(values[row]) for name, values in columns.items()}
        return record | {
            "class_name": self.target.labels[label],
            "class_index": label,
            "status": STATUS_OK,
            "accepted": True,
            "soft_label": soft_label(spec.cell, len(self.target.labels)),
        }

    def _judge_entries(self, inputs: ScorerInputs, labels: Tensor, faults: Faults) -> list[list[dict[str, Any]]]:
        """The column `judge` of the images; empty entries without one."""
        if self._judge is None or self._judge_embeds is None or inputs.judge is None:
            return [[] for _ in labels]
        embeds = self._judge.embeds_of_pixels(inputs.judge)
        similarities = _similarities(self._judge, self._judge_embeds, embeds, faults, "models.judge")
        columns, name = _conformity_columns(similarities, labels), self._judge.name
        return [
            [{"model": name} | {score: plain(values[row]) for score, values in columns.items()}]
            for row in range(len(labels))
        ]


def _text_embeds(field: str, clip: Clip, prompts: Sequence[str]) -> Tensor:
    """Embeddings of class prompts [n, d], with the field of the model in what is raised."""
    try:
        return clip.text_embeds(prompts)
    except JobError as error:
        raise JobError([f"{field}: {problem}" for problem in error.problems]) from None


def asked_of(cells: Sequence[Cell], labels: Tensor) -> list[Sequence[int]]:
    """The classes that count as the label of each sample: its class y of [B], of a joint prompt all of its subset."""
    return [cell.classes if cell.is_joint else (int(label),) for cell, label in zip(cells, labels, strict=True)]


def transfer_entries(
    models: Sequence[Oracle],
    logits_of_models: Sequence[Tensor],
    labels: Tensor,
    faults: Faults,
    guiding: Collection[Oracle] = (),
) -> list[list[dict[str, Any]]]:
    """The column `transfer` of images by the logits [B, n + k] of each model; without meaning in rows with a fault.

    Args:
        labels: the class y of every image, [B].
        guiding: those of the models that guidance saw; their names are marked.
    """
    entries: list[list[dict[str, Any]]] = [[] for _ in labels]
    for model, logits in zip(models, logits_of_models, strict=True):
        name, role = (model.name + GUIDES, "target") if model in guiding else (model.name, "transfer")
        faults.check_logits(logits, f"models.{role}", model.name)
        risk, predicted = scores.risk(logits, labels), predicted_classes(logits, len(model.labels))
        for row, entry in enumerate(entries):
            entry.append({"model": name, "predicted_class": int(predicted[row]), "risk": plain(risk[row])})
    return entries


def target_fields(
    target: Oracle, cells: Sequence[Cell], logits: Tensor, labels: Tensor, faults: Faults
) -> list[dict[str, Any]]:
    """The fields of the records that depend on the target alone, image by image; without meaning where it has a fault.

    Args:
        target: of a rescoring it may be one whose classes are read as the run's.
        logits: of the target, [B, n], or [B, n + k] with the columns of k other classes.
        labels: the class y of every image, [B].
    """
    faults.check_logits(logits, "models.target", target.name)
    num_classes = len(target.labels)
    columns = _target_columns(logits, labels, num_classes)
    return [
        {name: plain(values[row]) for name, values in columns.items()}
        | _kldb_fields(cell, logits[row : row + 1], int(labels[row]), num_classes)
        | {"temperature": target.temperature}
        for row, cell in enumerate(cells)
    ]


def _kldb_fields(cell: Cell, logits: Tensor, label: int, num_classes: int) -> dict[str, Any]:
    subset = kldb_classes(cell, logits[:, :num_classes], label)
    balance, mass = scores.kldb_parts(logits, subset)
    return {
        "kldb": plain(scores.kldb(logits, subset)[0]),
        "kldb_classes": subset,
        "kldb_balance": plain(balance[0]),
        "kldb_mass": plain(mass[0]),
    }


def conditioned_classes(cells: Sequence[Cell], similarities: Tensor) -> Tensor:
    """The class y of every sample, [B]; for a joint prompt the class of its subset with the highest conformity."""
    chosen = [
        cell.classes[int(row[list(cell.classes)].argmax())] for cell, row in zip(cells, similarities, strict=True)
    ]
    return torch.tensor(chosen)


def kldb_classes(cell: Cell, logits: Tensor, label: int) -> list[int]:
    """The subset C of a sample: the request's, or the class and its strongest rival (logits [1, n])."""
    if cell.is_joint:
        return sorted(cell.classes)
    return sorted([label, int(scores.strongest_rival(logits, torch.tensor([label]))[0])])


def _similarities(clip: Clip, class_embeds: Tensor, embeds: Tensor, faults: Faults, role: str) -> Tensor:
    """Conformity of every image, by its embedding [B, d], to every class, [B, n]; meaningless in rows with a fault."""
    faults.check_embeds(embeds, role, clip.name)
    return torch.stack([scores.conformity(embeds, prompt) for prompt in class_embeds], dim=1)


def _conformity_columns(similarities: Tensor, labels: Tensor) -> dict[str, Tensor]:
    return {
        "conformity": similarities.gather(1, labels[:, None])[:, 0],
        "conformity_margin": scores.conformity_margin(similarities, labels),
    }


def soft_label(cell: Cell, num_classes: int) -> list[float]:
    """Uniform over the classes of the prompt, n floats; one-hot for a single class."""
    share = 1.0 / len(cell.classes)
    return [share if index in cell.classes else 0.0 for index in range(num_classes)]


def _target_columns(logits: Tensor, labels: Tensor, num_classes: int) -> dict[str, Tensor]:
    predicted = predicted_classes(logits, num_classes)
    risk = scores.risk(logits, labels)
    return {
        "risk": risk,
        "is_error": predicted != labels,
        "predicted_class": predicted,
        "p_label": torch.exp(-risk),
        "entropy": scores.entropy(logits),
    }
