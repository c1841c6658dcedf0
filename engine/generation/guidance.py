"""The guidance of a job's requests: guides that are whole methods or bound to a criterion, around batches.

Legend: B samples, C channels, H x W size.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from engine.errors import JobError
from engine.generation.scene_scorers import scene_classifier, scene_encoder
from engine.generation.scorer import Scorer
from engine.job.plan import Plan, RequestPlan
from engine.job.spec import JobSpec
from engine.methods.custom.criterion import NOT_REPRODUCIBLE, Criterion, criterion_problem, same_values
from engine.methods.guidance.guided import ConditionalDenoiser, GuidedDenoiser
from engine.methods.guidance.scene import Decoding, GivenFeatures, GuidanceScene, Scene, SceneScorer
from engine.methods.parameters import Ensemble
from engine.models.custom_methods import factory_arguments, load_method, method_digest
from engine.models.factories import reason_of
from engine.models.oracles import Oracle
from engine.models.randomness import watched


class RequestGuides:
    """The guides of a job's requests.

    Args:
        job: the job.
        plan: its plan, whose identity has the digests of the user's own methods.
        scorer: its targets, its CLIP model and the oracle that guides are differentiated.
        device: of labels and images.
    """

    def __init__(self, job: JobSpec, plan: Plan, scorer: Scorer, device: str) -> None:
        self._job = job
        self._plan = plan
        self._scorer = scorer
        self._device = device
        self._criteria: dict[int, WatchedCriterion] = {}
        self._given: dict[int, GivenFeatures] = {}

    def prepare(
        self,
        request: RequestPlan,
        image_shape: tuple[int, int, int],
        decoding: Decoding,
        given: GivenFeatures | None = None,
    ) -> None:
        """Load a request's criterion and try it on two images; other methods need no preparation.

        Args:
            image_shape: channels, height and width of an image.
            decoding: as `guided`.
            given: the images of the request that its criterion sees; None without them.

        Raises:
            JobError: the criterion cannot be loaded, fails the trial, or is not the one of the plan.
        """
        if request.spec.method_record.has_criterion:
            if given is not None:
                self._given[request.number] = given
            self._criteria[request.number] = self.criterion(request, image_shape, decoding)

    def guided(
        self,
        request: int,
        denoiser: ConditionalDenoiser,
        classes: Sequence[tuple[int, ...]],
        decoding: Decoding,
        row_multiple: int | None = None,
        ensemble: Ensemble | None = None,
    ) -> GuidedDenoiser | None:
        """The denoiser with the guidance of a request around it; None for a method without guidance.

        Args:
            request: number of the request, prepared if its method is a criterion.
            classes: of each sample of the batch, its class or its subset.
            decoding: of predicted latents.
            row_multiple: as in `GuidanceScene`.
            ensemble: as there, in place of the request's.
        """
        spec = self._job.requests[request]
        method = spec.method_record
        if not method.is_guided:
            return None
        guide = method.load_guide()
        scene = self.scene(classes, decoding, ensemble or self._job.guidance_of(spec).ensemble)
        if method.has_criterion:
            guide = functools.partial(guide, self._criteria[request])
            scene = dataclasses.replace(scene, scorers=self._scorers(), given=self._given.get(request))
        scene = dataclasses.replace(scene, row_multiple=row_multiple)
        return guide(denoiser, self._job.parameters_of(spec), scene)

    def scene(
        self, classes: Sequence[tuple[int, ...]], decoding: Decoding, ensemble: Ensemble = "mean"
    ) -> GuidanceScene:
        """What guides and criteria can ask about samples of these classes."""
        oracle = self._scorer.guiding_oracle
        return GuidanceScene(
            logits=self._scorer.target.logits,
            conformity=functools.partial(self._conformity, raw=False),
            raw_conformity=functools.partial(self._conformity, raw=True),
            decoding=decoding,
            labels=torch.tensor([subset[0] for subset in classes], device=self._device),
            classes=tuple(classes),
            further_logits=tuple(target.logits for target in self._scorer.further_targets),
            ensemble=ensemble,
            oracle_logits=None if oracle is None else oracle.logits,
        )

    def _scorers(self) -> dict[str, SceneScorer]:
        """The models that a criterion may ask: those that guide, and none that is to be evidence."""
        classifiers: dict[str, Oracle | None] = {"target": self._scorer.target}
        classifiers |= {f"target.{place}": model for place, model in enumerate(self._scorer.further_targets, 1)}
        classifiers["oracle"] = self._scorer.guiding_oracle
        scorers = {name: scene_classifier(model, self._device) for name, model in classifiers.items() if model}
        return scorers | {"clip": scene_encoder(self._scorer.clip, self._device)}

    def _conformity(self, images: Tensor, labels: Tensor, *, raw: bool) -> Tensor:
        return self._scorer.conformity_to(labels, raw=raw)(images)

    def criterion(
        self, request: RequestPlan, image_shape: tuple[int, int, int], decoding: Decoding
    ) -> WatchedCriterion:
        """The criterion of a request, tried on two images.

        Raises:
            JobError: as `prepare`.
        """
        address, where = request.spec.method, f"{request.where}.method"
        planned = self._plan.identity["requests"][request.number].get("method_digest")
        # A plan that only counts shards knows no digests.
        if planned and method_digest(address) != planned:
            raise JobError(
                f"{where}: the file of '{address}' on this machine is not the one that the run was planned with; give"
                " all machines the same file"
            )
        arguments = factory_arguments(self._job, request.spec)
        criteria = [load_method(address, arguments) for _ in range(2)]
        name, scene = f"{where}: the criterion of '{address}'", self.scene([request.cells[0].classes] * 2, decoding)
        scene = dataclasses.replace(scene, scorers=self._scorers(), given=self._given.get(request.number))
        _try_criteria(criteria, scene, image_shape, name)
        return WatchedCriterion(criteria[0], name)


def _try_criteria(criteria: Sequence[Criterion], scene: Scene, image_shape: tuple[int, int, int], name: str) -> None:
    try:
        problem, drawn = watched(lambda: criterion_problem(criteria, scene, image_shape))
    except Exception as error:
        raise JobError(f"{name} failed: {reason_of(error)}") from error
    if drawn:
        problem = _drawing(drawn)
    if problem:
        raise JobError(f"{name} {problem}")


def _drawing(generators: Sequence[str]) -> str:
    return f"draws random numbers ({', '.join(generators)}); {NOT_REPRODUCIBLE}"


class WatchedCriterion:
    """A criterion that is watched while samples are made, as later calls may differ from those of the trial.

    The first call is made twice and compared; that no global generator is drawn from is checked at every call.

    Args:
        criterion: the criterion to watch.
        name: in messages.
    """

    def __init__(self, criterion: Criterion, name: str) -> None:
        self._criterion, self._name, self._is_first = criterion, name, True

    def __call__(self, images: Tensor, scene: Scene) -> Tensor:
        """Distances [B] of images [B, 3, H, W].

        Raises:
            JobError: they are not decided by the images.
        """
        distances, drawn = watched(lambda: self._criterion(images, scene))
        is_same = not self._is_first or same_values(distances, self._criterion(images, scene))
        self._is_first = False
        if drawn:
            raise JobError(f"{self._name} {_drawing(drawn)}")
        if not is_same:
            raise JobError(
                f"{self._name} gives different distances when it is called again with equal images; {NOT_REPRODUCIBLE}"
            )
        return distances
