"""The artefacts that an ablation makes: one Gaussian a class, weakened predictors, mixtures of some sizes.

Each is a kept step, in `steps/artefacts/NAME/`; the pass over the images is made once, and only if one is missing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engine.data.images import open_images
from engine.errors import JobError
from engine.generation.artefact import Conditioning, load_conditioning, save_conditioning
from engine.methods.conditioning.predictor import Exchange, PredictorFit, PredictorOptions, fit_predictor
from engine.models.artefacts import find_artefact
from engine.models.digests import model_digest
from engine.models.labels import target_labels
from engine.studies.ablate.arms import SINGLE, Design, of_components, weakened
from engine.studies.ablate.spec import AblateSpec
from engine.studies.experiments.program import STEPS, StudyContext
from engine.studies.prepare.encoders import encoder_address
from engine.studies.prepare.fitting import fit_conditioning, one_thread
from engine.studies.prepare.folders import CONDITIONING
from engine.studies.prepare.observation import Observations, load_observer, observe, signature
from engine.studies.prepare.program import described_models

CHANCE = 0.5
# An AUC that is so near to a wanted one is taken for it.
CLOSE = 0.02
# Predictors that are trained to find one of a wanted quality; the share of exchanged outcomes is then known to 1/32.
TRIALS = 5
Fit = Callable[[float, int], PredictorFit]
# An artefact, the digest of the images that it is from, and what else its step knows.
Made = tuple[Conditioning, str, dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictor:
    """The quality of an error predictor on images that it was not trained on.

    Attributes:
        exchanged: share of the images trained on whose outcomes were exchanged among them.
        auc, low, high: with its 95 % interval.
        num_errors: errors of the target among the held-out images.
    """

    exchanged: float
    auc: float
    low: float
    high: float
    num_errors: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Artefacts:
    """What was made.

    Attributes:
        addresses: of the artefacts, by name.
        predictors: from the best one to chance.
        notes: what limits them.
    """

    addresses: dict[str, str]
    predictors: tuple[Predictor, ...]
    notes: tuple[str, ...]


def make_artefacts(spec: AblateSpec, design: Design, context: StudyContext) -> Artefacts:
    """Make the artefacts that the arms of a design need and that are not kept yet.

    Raises:
        JobError: the data cannot be used, or the target makes too few errors on it for a predictor.
    """
    request = design.request
    if request.conditioning is None or request.conditioning.artefact is None:
        return Artefacts(addresses={}, predictors=(), notes=())
    maker = _Maker(spec, design, context, _own(request.conditioning.artefact))
    if any(arm.part == "mixture" for arm in design.arms):
        maker.keep(SINGLE, {}, lambda: (_single(maker.own), maker.own.images_digest, {}))
    predictors = [maker.weaken(step) for step in range(spec.predictor_steps or 0)]
    for number in spec.components:
        maker.fit(number)
    return Artefacts(addresses=maker.addresses, predictors=tuple(predictors), notes=tuple(maker.notes()))


def _own(address: str) -> Conditioning:
    folder = find_artefact(address)
    assert folder is not None, "checked before"
    return load_conditioning(folder)


def _single(own: Conditioning) -> Conditioning:
    """The same artefact with one Gaussian a class in place of the mixtures."""
    options = own.options | {"statistics": {"components": 1}}
    return dataclasses.replace(own, statistics=own.statistics.moments(), options=options)  # type: ignore[union-attr]


class _Maker:
    """Makes artefacts one by one.

    Attributes:
        own: the job's.
        addresses: of those that are there.
    """

    def __init__(self, spec: AblateSpec, design: Design, context: StudyContext, own: Conditioning) -> None:
        self.own = own
        self.addresses: dict[str, str] = {}
        self._fits: dict[tuple[float, int], PredictorFit] = {}
        self._images: set[str] = set()
        self._spec, self._context = spec, context
        # Embeddings are those of the pipeline of this request, whatever others the job has.
        self._job = design.job.model_copy(update={"requests": (design.request,)})

    def keep(self, name: str, inputs: dict[str, Any], make: Callable[[], Made]) -> Any:
        """The value of an artefact's step; the artefact is made first where it is not kept.

        Args:
            inputs: what decides it besides the job's own artefact.
            make: gives the artefact where it is not kept.
        """
        home = self._context.home / STEPS / "artefacts" / name

        def save() -> dict[str, Any]:
            conditioning, images, value = make()
            return {"folder": save_conditioning(conditioning, home)[0].name, "images": images, **value}

        kept = self._context.once(f"artefacts/{name}", {"own": self.own.digest, **inputs}, save)
        self.addresses[name] = str(home / kept["folder"])
        self._images.add(kept["images"])
        return kept

    def weaken(self, step: int) -> Predictor:
        """The predictor of a step: of `data` as it is, or the one nearest to a quality between that and chance."""
        num_steps = self._spec.predictor_steps
        assert num_steps is not None

        def make() -> Made:
            share, fit = weakened_fit(self._fit, step / (num_steps - 1))
            return self._with_predictor(fit, share), self._observations.images_digest, _value(share, fit)

        inputs = {**self._inputs(), "step": step, "num_steps": num_steps}
        kept = self.keep(weakened(step), inputs, make)
        return Predictor(**{name: kept[name] for name in Predictor.__slots__})

    def fit(self, number: int) -> None:
        """The artefact that `riskforge prepare --components NUMBER` makes of the data."""

        def make() -> Made:
            models = described_models(self._job, CONDITIONING, encoder_address(self._job))
            made = fit_conditioning(self._observations, self._labels, models, number)
            return made, made.images_digest, {}

        self.keep(of_components(number), {**self._inputs(), "components": number}, make)

    def notes(self) -> list[str]:
        """What limits the artefacts."""
        if self._images <= {self.own.images_digest}:
            return []
        return [
            "`data` is not the set that the job's own artefact was prepared from: rows of predictors and components"
            " compare with each other, and not with the whole recipe"
        ]

    @functools.cached_property
    def _labels(self) -> tuple[str, ...]:
        return tuple(target_labels(self._job))

    @functools.cached_property
    def _observations(self) -> Observations:
        """The pass over the images of `data`."""
        assert self._spec.data is not None
        self._context.display.phase("embedding the images of data")
        source = open_images(self._spec.data, self._labels, "data")
        observer = load_observer(self._job, source, encoder_address(self._job))
        return observe(observer, self._spec.data, self._context.display)

    def _inputs(self) -> dict[str, Any]:
        """What decides the observations, without making them."""
        assert self._spec.data is not None
        source = open_images(self._spec.data, self._labels, "data")
        digest = model_digest(self._job.models.target)
        return {"data": self._spec.data, "images": list(signature(source)), "target": digest}

    def _fit(self, share: float, order: int) -> PredictorFit:
        """A predictor with a share of the outcomes exchanged, in one of several orders.

        Raises:
            JobError: it cannot be trained.
        """
        if (share, order) not in self._fits:
            seen = self._observations
            exchange = Exchange(share, order)
            with one_thread():
                fit = fit_predictor(seen.embeds, seen.errors, seen.classes, self._labels, exchange=exchange)
            if fit.predictor is None:
                raise JobError(f"data: '{self._spec.data}': the error predictor {fit.verdict}; give more images")
            self._fits[share, order] = fit
        return self._fits[share, order]

    def _with_predictor(self, fit: PredictorFit, share: float) -> Conditioning:
        trained_on = {"images_digest": self._observations.images_digest, "exchanged": share}
        options = self.own.options | {"predictor": dataclasses.asdict(PredictorOptions()) | trained_on}
        return dataclasses.replace(self.own, fit=fit, options=options)


def weakened_fit(fit: Fit, way: float) -> tuple[float, PredictorFit]:
    """The share of exchanged outcomes, and the predictor, whose AUC is nearest to a wanted one.

    The AUC falls with the share but for the chances of training, so that halving the interval finds it; where these are
    large, as with few images, other orders of the exchange are tried, too.

    Args:
        fit: the predictor of a share and of an order, from 0, in which outcomes are exchanged.
        way: to the wanted AUC, from 0 for that without exchanged outcomes to 1 for chance.
    """
    found = 0.0, fit(0.0, 0)
    wanted = _auc(found[1]) + way * (CHANCE - _auc(found[1]))
    low, high = 0.0, 1.0
    for _ in range(TRIALS if way else 0):
        middle = (low + high) / 2
        trial = fit(middle, 0)
        found = min(found, (middle, trial), key=lambda one: abs(_auc(one[1]) - wanted))
        low, high = (middle, high) if _auc(trial) > wanted else (low, middle)
    share = 1.0 if way == 1 else found[0]
    for order in range(1, TRIALS + 1):
        if abs(_auc(found[1]) - wanted) <= CLOSE:
            break
        found = min(found, (share, fit(share, order)), key=lambda one: abs(_auc(one[1]) - wanted))
    return found


def _auc(fit: PredictorFit) -> float:
    assert fit.evaluation is not None and fit.evaluation.pooled.auc is not None, "it was trained"
    return fit.evaluation.pooled.auc


def _value(share: float, fit: PredictorFit) -> dict[str, Any]:
    assert fit.evaluation is not None
    quality = fit.evaluation.pooled
    return {
        "exchanged": share,
        "auc": quality.auc,
        "low": quality.auc_low,
        "high": quality.auc_high,
        "num_errors": quality.num_errors,
    }
