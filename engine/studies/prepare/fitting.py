"""What is fitted on the pass over the images: class statistics, error predictor and temperature."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch

from engine.generation.artefact import Conditioning
from engine.methods.conditioning.gaussians import ClassMoments
from engine.methods.conditioning.mixtures import ClassMixtures, MixtureOptions, fit_mixtures
from engine.methods.conditioning.predictor import PredictorOptions, fit_predictor
from engine.methods.temperature import TemperatureFit, fit_temperature
from engine.studies.prepare.calibration import CalibrationFit
from engine.studies.prepare.observation import Observations


def fit_conditioning(
    observations: Observations, labels: tuple[str, ...], models: dict[str, dict[str, str]], components: int
) -> Conditioning:
    """Fit everything that an artefact holds, with default options, on one thread.

    Args:
        observations: the models' outputs for N images.
        labels: class names in index order.
        models: addresses and digests, as `Conditioning.models`.
        components: Gaussians of a class.
    """
    options = PredictorOptions()
    with one_thread():
        statistics, fit_options = _fit_statistics(observations, labels, components)
        fit = fit_predictor(observations.embeds, observations.errors, observations.classes, labels, options)
    return Conditioning(
        statistics=statistics,
        num_errors=observations.num_errors(len(labels)),
        fit=fit,
        temperature=_temperature(observations),
        models=models,
        options={"statistics": fit_options, "predictor": dataclasses.asdict(options)},
        images_digest=observations.images_digest,
        unusable=observations.unusable,
    )


def fit_calibration(
    observations: Observations, labels: tuple[str, ...], models: dict[str, dict[str, str]]
) -> CalibrationFit:
    """Fit the temperature alone, on one thread.

    Args:
        models: address and digest of the target, as `Conditioning.models`.
    """
    with one_thread():
        temperature = _temperature(observations)
    return CalibrationFit(
        labels=labels,
        counts=tuple(torch.bincount(observations.classes, minlength=len(labels)).tolist()),
        num_errors=observations.num_errors(len(labels)),
        temperature=temperature,
        models=models,
        images_digest=observations.images_digest,
        unusable=observations.unusable,
    )


def _temperature(observations: Observations) -> TemperatureFit:
    temperature = observations.temperature
    return fit_temperature(observations.logits.double() * temperature, observations.classes, temperature)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Sums of one order whatever the machine: an artefact's name must not depend on its number of cores."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _fit_statistics(
    observations: Observations, labels: tuple[str, ...], components: int
) -> tuple[ClassMoments | ClassMixtures, dict[str, object]]:
    """Class statistics, and the options that they are made with."""
    if components == 1:
        moments = ClassMoments.empty(labels, observations.embeds.shape[1])
        moments.add(observations.embeds, observations.classes)
        return moments, {"components": 1}
    options = MixtureOptions(components=components)
    return fit_mixtures(observations.embeds, observations.classes, labels, options), dataclasses.asdict(options)
