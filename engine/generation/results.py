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
from engine.generation.scorer import Scorer, ScorerInputs
from engine.generation.starts import StartImage
from engine.job.acceptance import is_accepted
from engine.job.plan import Plan, SampleSpec
from engine.job.records import STATUS_FAILED, STATUS_OK, STATUS_REJECTED, SampleResult, check_record
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
    """Encoders of the files, and what the models take: those of the scorer, and the safety checker if there is one."""

    files: list[Callable[[], bytes]]
    scorer: ScorerInputs
    checker: Tensor | None


class ImageBatch:
    """A batch after sampling.

    Args:
        job, plan: they decide about formats, and which samples are accepted.
        scorer: scores images as they are stored.
        checker: of the pipeline that made them.
    """

    def __init__(
        self,
        images: SampledImages,
        job: JobSpec,
        plan: Plan,
        request: int,
        scorer: Scorer,
        checker: SafetyChecker | None,
    ) -> None:
        self._images = images
        self._job = job
        self._plan = plan
        self._request = request
        self._scorer = scorer
        self._checker = checker
        self._inputs: _Inputs | None = None

    def preprocess(self) -> None:
        """Prepare what the models take: all work on the CPU. May run on any thread."""
        pixels, output = self._images.pixels, self._job.output
        files, shown = imaging.stored(pixels, output.image_format, provenance=output.provenance)
        checked = self._checker.preprocess([PIL.Image.fromarray(image) for image in pixels]) if self._checker else None
        self._inputs = _Inputs(files, self._scorer.preprocess(shown), checked)

    def score(self) -> list[SampleResult]:
        """Results of the samples, after `preprocess`, on the thread that samples."""
        images, inputs = self._images, self._inputs
        assert inputs is not None, "a batch is preprocessed before it is scored"
        faults = self._faults(inputs)
        records = self._scorer.score(images.specs, inputs.scorer)
        return [
            failed_result(images.specs[row], faults[row] or records[row]["error_message"])
            if faults[row] or records[row]["status"] == STATUS_FAILED
            else self._result(row, records[row] | _counts(images.health, row), inputs.files[row])
            for row in range(images.num_samples)
        ]

    def _faults(self, inputs: _Inputs) -> list[str]:
        """Why each of the images must not be stored, [B]; empty for the others."""
        unsafe = [""] * len(self._images.specs)
        if self._checker and inputs.checker is not None:
            unsafe = self._checker.faults_of(inputs.checker)
        return [
            text if is_finite else NOT_FINITE for is_finite, text in zip(self._images.is_finite, unsafe, strict=True)
        ]

    def _result(self, row: int, record: dict[str, Any], image: Callable[[], bytes]) -> SampleResult:
        """A scored sample, accepted or rejected by the request's rule."""
        spec = self._images.specs[row]
        draw = self._images.draws[row] if self._images.draws else None
        record["screened"] = draw is not None and draw.screened
        try:
            check_record(record)
        except ValueError as error:
            return failed_result(spec, str(error))
        rule, version = self._job.requests[self._request].accept, self._plan.schema_version
        accepted = is_accepted(rule, record, spec.cell.classes, version)
        stored = accepted or self._job.output.store_rejected
        return SampleResult(
            record=record | {"accepted": accepted, "status": STATUS_OK if accepted else STATUS_REJECTED},
            image=image if stored else b"",
            run={"batch_size": len(self._images.specs)},
            num_draws=draw.num_draws if draw else 0,
        )


def _counts(health: GradientHealth, row: int) -> dict[str, Any]:
    return {
        "guided_steps": int(health.guided_steps[row]),
        "zero_gradients": int(health.zero[row]),
        "nonfinite_gradients": int(health.nonfinite[row]),
    }
