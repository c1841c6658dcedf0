"""The *neighbours* artefact: features of labelled images and the vote among them, in a folder named by its content.

`features.safetensors` holds the features in float16, ordered by class, `neighbours.json` everything else with a digest
over both.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from engine.data.images import Unusable
from engine.data.stores.artefact_folders import publish_artefact
from engine.data.stores.base import Store
from engine.errors import JobError
from engine.job.columns import MIN_ORACLE_P_LABEL
from engine.methods.neighbours import VoteFit, fit_vote, unit_features
from engine.models.artefact_documents import document_bytes, kind_of, sealed
from engine.models.configurations import NEIGHBOURS_DOCUMENT as DOCUMENT
from engine.models.neighbour_documents import FEATURES, MAX_VALUES, check_features, read_neighbours, too_many
from engine.studies.prepare.fitting import one_thread
from engine.studies.prepare.observation import Observations

# To classify an image of a class by the others, there must be another of its class.
MIN_CLASS_IMAGES = 2
_MAX_NAMED = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class VoteEvaluation:
    """How the vote does on its own images, each classified by the others.

    Attributes:
        num_images: images that were classified, evenly spread over all.
        accuracy: share whose class has the highest probability.
        class_accuracy: the same by class index.
        nll: mean negative log-likelihood of the class, in nats.
        confident_share: share with a probability of at least `MIN_ORACLE_P_LABEL` for some class.
        confident_accuracy: share of these whose class it is; None where there are none.
    """

    num_images: int
    accuracy: float
    class_accuracy: tuple[float, ...]
    nll: float
    confident_share: float
    confident_accuracy: float | None


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Neighbours:
    """Labelled images by their features, with the vote among them.

    Attributes:
        labels: class names in index order.
        counts: images by class index.
        features: [N, d] in float16, of length 1, ordered by class.
        fit: k, temperatures, and what they give for the images themselves.
        evaluation: of that fit.
        models: `{"encoder": {"address", "digest"}}`.
        images_digest: digest of the images and their classes, independent of their order, names and files.
        num_duplicates: images that were left out because their class has the same image already.
        unusable: items of the data that could not be used.
    """

    labels: tuple[str, ...]
    counts: tuple[int, ...]
    features: Tensor
    fit: VoteFit
    evaluation: VoteEvaluation
    models: dict[str, dict[str, str]]
    images_digest: str
    num_duplicates: int
    unusable: tuple[Unusable, ...]


def check_size(num_images: int, dim: int) -> None:
    """Refuse more features than are searched.

    Raises:
        JobError: there are more.
    """
    if num_images * dim > MAX_VALUES:
        raise JobError(f"--data: {too_many(num_images, dim)}")


def fit_neighbours(
    observations: Observations, labels: tuple[str, ...], models: dict[str, dict[str, str]]
) -> Neighbours:
    """Choose the vote among images by their embeddings, on one thread.

    Args:
        models: address and digest of the encoder, as `Neighbours.models`.

    Raises:
        JobError: there are too many images, or too few of a class.
    """
    check_size(*observations.embeds.shape)
    # As they are stored: what is fitted is what will score.
    features = unit_features(observations.embeds).half()
    is_first = _is_first(features, observations.classes)
    features, classes = features[is_first], observations.classes[is_first]
    counts = torch.bincount(classes, minlength=len(labels)).tolist()
    _check_counts(counts, labels)
    with one_thread():
        fit = fit_vote(unit_features(features), classes, len(labels))
    return Neighbours(
        labels=labels,
        counts=tuple(counts),
        features=features,
        fit=fit,
        evaluation=_evaluation(fit, classes[fit.rows], len(labels)),
        models=models,
        images_digest=observations.images_digest,
        num_duplicates=len(is_first) - len(features),
        unusable=observations.unusable,
    )


def _is_first(features: Tensor, classes: Tensor) -> Tensor:
    """Whether each of images that are ordered by class and content is not the one before it once more, [N] booleans.

    A copy would be the nearest neighbour of its own image, and right.
    """
    is_copy = (features[1:] == features[:-1]).all(1) & (classes[1:] == classes[:-1])
    return torch.cat([torch.ones(1, dtype=torch.bool), ~is_copy])


def _check_counts(counts: Sequence[int], labels: Sequence[str]) -> None:
    lacking = [label for label, count in zip(labels, counts, strict=True) if count < MIN_CLASS_IMAGES]
    if lacking:
        more = f" and {len(lacking) - _MAX_NAMED} more" if len(lacking) > _MAX_NAMED else ""
        raise JobError(
            f"--data: fewer than {MIN_CLASS_IMAGES} different images of {', '.join(map(repr, lacking[:_MAX_NAMED]))}"
            f"{more}; neighbours vote for classes that they have images of: give some of every class"
        )


def _evaluation(fit: VoteFit, classes: Tensor, num_classes: int) -> VoteEvaluation:
    log_p = torch.log_softmax(fit.logits.double() / fit.calibration, 1)
    p, predicted = log_p.exp().max(1)
    is_right, is_confident = (predicted == classes).double(), p >= MIN_ORACLE_P_LABEL
    totals = torch.bincount(classes, minlength=num_classes).clamp(min=1)
    return VoteEvaluation(
        num_images=len(classes),
        accuracy=float(is_right.mean()),
        class_accuracy=tuple((torch.bincount(classes, is_right, num_classes) / totals).tolist()),
        nll=float(-log_p.gather(1, classes[:, None]).mean()),
        confident_share=float(is_confident.double().mean()),
        confident_accuracy=float(is_right[is_confident].mean()) if is_confident.any() else None,
    )


def save_neighbours(neighbours: Neighbours, folder: Path | Store) -> tuple[Path, bool]:
    """Store an artefact as `folder/neighbours-DIGEST12`.

    Returns:
        Its folder, and whether an equal artefact was there already.

    Raises:
        OutputError: it cannot be written, or a folder of that name is damaged.
    """
    features = safetensors.torch.save({"features": neighbours.features.contiguous()})
    fit = neighbours.fit
    fields = sealed(
        {
            "classes": list(neighbours.labels),
            "counts": list(neighbours.counts),
            "dim": neighbours.features.shape[1],
            "k": fit.vote.k,
            "similarity_temperature": fit.vote.tau,
            "temperature": fit.calibration,
            "evaluation": dataclasses.asdict(neighbours.evaluation),
            "images_digest": neighbours.images_digest,
            "models": neighbours.models,
            "duplicates": neighbours.num_duplicates,
            "unusable": [dataclasses.asdict(item) for item in neighbours.unusable],
            "features_sha256": hashlib.sha256(features).hexdigest(),
        }
    )
    files: dict[str, Any] = {FEATURES: features, DOCUMENT: document_bytes(fields)}
    return publish_artefact(folder, kind_of(DOCUMENT), fields["digest"], files, _digest_in)


def _digest_in(folder: Path) -> str:
    document = read_neighbours(folder)
    check_features(document)
    return document.digest
