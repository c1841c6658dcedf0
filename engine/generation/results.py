"""From the images of a batch to the results of its samples: preprocessing for the models that score, then scoring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
from torch import Tensor

from engine.data.images import encoding as imaging
from engine.generation.isolation import failed_result
from engine.generation.notices import Notices
from engine.generation.pairs import distances, no_twin, start_record, twin_fields, twin_spec
from engine.generation.scorer import Scorer, ScorerInputs
from engine.generation.starts import StartImage
from engine.job.acceptance import is_accepted
from engine.job.plan import Plan, SampleSpec
from engine.job.records import (
    STARTS,
    STATUS_OK,
    STATUS_REJECTED,
    TWINS,
    Companion,
    SampleResult,
    check_record,
)
from engine.job.spec import JobSpec
from engine.methods.conditioning.screening import ScreenedDraw
from engine.methods.guidance.rules import GradientHealth
from engine.models.pipelines.safety import SafetyChecker

NOT_FINITE = "the sampler produced values that are not finite"


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledImages:
    """The images of a batch, with all that it was filled up with.

    Attributes:
        specs: B of them.
        num_samples: how many of them are samples; the others repeat the last one.
        pixels: [B, H, W, 3], 8 bits, on the CPU.
        is_finite: of each image, whether all values were, [B].
        health: of the gradients that guided them.
        draws: the image embeddings that conditioned them, [B]; empty without.
        starts: the real images that they started from, [B]; empty without.
        twins: pixels [B, H, W, 3] of their unguided twins, 8 bits, on the CPU; None without.
        is_twin_finite: of each twin, whether all values were, [B]; empty without.
    """

    specs: Sequence[SampleSpec]
    num_samples: int
    pixels: np.ndarray
    is_finite: list[bool]
    health: GradientHealth
    draws: Sequence[ScreenedDraw]
    starts: Sequence[StartImage] = ()
    twins: np.ndarray | None = None
    is_twin_finite: Sequence[bool] = ()


@dataclass(frozen=True, slots=True)
class _Inputs:
    """Encoders of the files, the images as stored, and what the models take: those of the scorer, the safety checker.

    Attributes:
        checker: None without a safety checker.
    """

    files: list[Callable[[], bytes]]
    shown: Sequence[PIL.Image.Image]
    scorer: ScorerInputs
    checker: Tensor | None


@dataclass(frozen=True, slots=True)
class _StartInputs:
    """The same of the images that samples started from, of which only embeddings are needed."""

    files: list[Callable[[], bytes]]
    clip: Tensor


@dataclass(frozen=True, slots=True)
class _Scored:
    """Images of a batch, scored.

    Attributes:
        embeds: by CLIP, [B, d].
        faults: why each image must not be stored, [B]; empty for the others.
        to_start: distance of each image to its start, [B]; empty without.
    """

    embeds: Tensor
    records: list[dict[str, Any]]
    faults: list[str]
    to_start: list[float]


class ImageBatch:
    """A batch after sampling.

    Args:
        job, plan: they decide about formats, and which samples are accepted.
        scorer: scores images as they are stored.
        checker: of the pipeline that made them.
        notices: where it is reported that a twin is left out, and why.
    """

    def __init__(
        self,
        images: SampledImages,
        job: JobSpec,
        plan: Plan,
        request: int,
        scorer: Scorer,
        checker: SafetyChecker | None,
        notices: Notices,
    ) -> None:
        self._images = images
        self._job = job
        self._plan = plan
        self._request = request
        self._scorer = scorer
        self._checker = checker
        self._notices = notices
        self._inputs: _Inputs | None = None
        self._twin_inputs: _Inputs | None = None
        self._start_inputs: _StartInputs | None = None

    def preprocess(self) -> None:
        """Prepare what the models take: all work on the CPU. May run on any thread."""
        images = self._images
        self._inputs = self._preprocessed(images.pixels)
        self._twin_inputs = None if images.twins is None else self._preprocessed(images.twins)
        if images.starts:
            # Photographs are not marked as synthetic; what a model made stays so.
            pixels = np.stack([start.pixels for start in images.starts])
            marks = [self._job.output.provenance and start.is_synthetic for start in images.starts]
            files, shown = imaging.stored(pixels, self._job.output.image_format, provenance=marks)
            self._start_inputs = _StartInputs(files, self._scorer.preprocess_clip(shown))

    def _preprocessed(self, pixels: np.ndarray) -> _Inputs:
        output = self._job.output
        files, shown = imaging.stored(pixels, output.image_format, provenance=output.provenance)
        checked = self._checker.preprocess([PIL.Image.fromarray(image) for image in pixels]) if self._checker else None
        return _Inputs(files, shown, self._scorer.preprocess(shown), checked)

    def score(self) -> list[SampleResult]:
        """Results of the samples, after `preprocess`, on the thread that samples."""
        images, inputs, twin_inputs = self._images, self._inputs, self._twin_inputs
        assert inputs is not None, "a batch is preprocessed before it is scored"
        starts = self._scorer.embed(self._start_inputs.clip) if self._start_inputs else None
        scored, twins = self._scored(images.specs, inputs, images.is_finite, starts), None
        if twin_inputs is not None:
            twins = self._scored([*map(twin_spec, images.specs)], twin_inputs, images.is_twin_finite, starts)
        return [
            failed_result(images.specs[row], scored.faults[row])
            if scored.faults[row]
            else self._result(row, scored, twins)
            for row in range(images.num_samples)
        ]

    def _scored(
        self, specs: Sequence[SampleSpec], inputs: _Inputs, is_finite: Sequence[bool], starts: Tensor | None
    ) -> _Scored:
        """Images of the batch, scored.

        Args:
            starts: embeddings of the images that they started from.
        """
        faults = self._faults(inputs, is_finite)
        embeds = self._scorer.embed(inputs.scorer.clip)
        records = self._scorer.score(specs, inputs.scorer, embeds)
        texts = [text or record["error_message"] for text, record in zip(faults, records, strict=True)]
        return _Scored(embeds, records, texts, [] if starts is None else distances(embeds, starts))

    def _faults(self, inputs: _Inputs, is_finite: Sequence[bool]) -> list[str]:
        """Why each of the images must not be stored, [B]; empty for the others."""
        unsafe = [""] * len(self._images.specs)
        if self._checker and inputs.checker is not None:
            unsafe = self._checker.faults_of(inputs.checker)
        return [text if finite else NOT_FINITE for finite, text in zip(is_finite, unsafe, strict=True)]

    def _result(self, row: int, scored: _Scored, twins: _Scored | None) -> SampleResult:
        """A scored sample, accepted or rejected by the request's rule."""
        images, inputs = self._images, self._inputs
        assert inputs is not None
        spec, draw = images.specs[row], images.draws[row] if images.draws else None
        companions = self._companions(row, twins)
        twin = no_twin()
        if twins is not None and self._twin_inputs is not None and TWINS in companions:
            [distance] = distances(scored.embeds[row : row + 1], twins.embeds[row : row + 1])
            shown = inputs.shown[row], self._twin_inputs.shown[row]
            twin = twin_fields(shown[0], distance, shown[1], companions[TWINS].record)
        record = scored.records[row] | self._own_fields(row, scored) | _counts(images.health, row) | twin
        if fault := _fault_of(record):
            return failed_result(spec, fault)
        rule, version = self._job.requests[self._request].accept, self._plan.schema_version
        accepted = is_accepted(rule, record, spec.cell.classes, version)
        stored = accepted or self._job.output.store_rejected
        return SampleResult(
            record=record | {"accepted": accepted, "status": STATUS_OK if accepted else STATUS_REJECTED},
            image=inputs.files[row] if stored else b"",
            run={"batch_size": len(images.specs)},
            num_draws=draw.num_draws if draw else 0,
            companions=companions if stored else None,
        )

    def _own_fields(self, row: int, scored: _Scored) -> dict[str, Any]:
        """What the record of a sample, or of a twin, has of its draw and its start."""
        images, fields = self._images, {"screened": bool(self._images.draws) and self._images.draws[row].screened}
        if not images.starts:
            return fields
        start, spec = images.starts[row], self._job.requests[self._request].used_start
        assert spec is not None
        return fields | {
            "start_key": start.key,
            "start_sha256": start.sha256,
            "strength": float(spec.strength),
            "start_distance": scored.to_start[row],
        }

    def _companions(self, row: int, twins: _Scored | None) -> dict[str, Companion]:
        """The second images of a sample, without a twin that has a fault."""
        images, companions = self._images, {}
        if self._start_inputs is not None:
            record = start_record(images.specs[row], images.starts[row], self._scorer.target.labels)
            companions[STARTS] = Companion(record, self._start_inputs.files[row])
        if twins is not None and self._twin_inputs is not None:
            record = twins.records[row] | self._own_fields(row, twins)
            if fault := twins.faults[row] or _fault_of(record):
                self._notices.add(f"{self._plan.requests[self._request].where}: a twin was left out: {fault}")
            else:
                companions[TWINS] = Companion(record, self._twin_inputs.files[row])
        return companions


def _fault_of(record: dict[str, Any]) -> str:
    """Why a record cannot be stored; empty where it can."""
    try:
        check_record(record)
    except ValueError as error:
        return str(error)
    return ""


def _counts(health: GradientHealth, row: int) -> dict[str, Any]:
    return {
        "guided_steps": int(health.guided_steps[row]),
        "zero_gradients": int(health.zero[row]),
        "nonfinite_gradients": int(health.nonfinite[row]),
    }
