"""A run whose samples are composed digits: the engine's own worker and shards, scores of the real target and oracle.

Sampling takes a second an image; composing takes a millisecond, and its images truly show what was asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from engine.data.images import digits
from engine.data.images import encoding as imaging
from engine.driver.executors.local import LocalExecutor
from engine.driver.progress import PlainDisplay
from engine.driver.run import run_job
from engine.generation.notices import Notices
from engine.generation.oracle_scoring import Oracles
from engine.generation.worker import Worker
from engine.job.acceptance import is_accepted
from engine.job.parsing import parse_job
from engine.job.plan import Plan, SampleSpec, planned_validity
from engine.job.records import STATUS_OK, STATUS_REJECTED, SampleResult, new_record
from engine.job.spec import JobSpec
from engine.methods.finiteness import Faults
from engine.models.classifier import Classifier
from engine.models.library_logging import quiet_libraries
from engine.models.oracles import load_oracle
from tests.sleepy import InTurn

TARGET = "zoo:digits/classifier"
# Holes of the target, and what it knows well.
HOLES = ("small, bottom left", "small, bottom right")
KNOWN = ("", "red ink", "small")


def compose_specs(specs: Sequence[SampleSpec], split: str = "train") -> list[PIL.Image.Image]:
    """One image a sample, of its class and context, decided by its seed."""
    single, sources = digits.single_contexts(), digits.load_sources(split)
    rows = {digits.context_text(single, row): row for row in range(len(single))}
    images = []
    for spec in specs:
        rng = np.random.default_rng(spec.seed)
        of_class = np.flatnonzero(sources.labels == spec.cell.classes[0])
        context = single.take(np.array([rows[spec.context]]))
        images.append(digits.compose(sources, rng.choice(of_class, size=1), context, rng=rng).images[0])
    return [PIL.Image.fromarray(pixels) for pixels in images]


class ComposedGenerator(InTurn):
    """In the place of `engine.generation.generator.Generator`."""

    def __init__(self, job: JobSpec, plan: Plan) -> None:
        self._job = job
        self._target = Classifier.load(job.models.target)
        oracles = [load_oracle(address, "cpu", self._target.labels) for address in job.models.all_oracles]
        self._oracles = Oracles(oracles, validity=planned_validity(plan.identity))
        self.notices = Notices()

    def batch_limit(self, request: int) -> int:
        """Memory never runs out."""
        return 0

    def next_batch(self, request: int, specs: Sequence[SampleSpec]) -> list[SampleResult]:
        """All of them at once."""
        images = compose_specs(specs)
        target = self._target.score(images)
        asked = [spec.cell.classes for spec in specs]
        oracles = self._oracles.fields(self._oracles.preprocess(images), asked, Faults(len(specs)))
        return [
            self._result(request, spec, image, logits, seen)
            for spec, image, logits, seen in zip(specs, images, target, oracles, strict=True)
        ]

    def _result(
        self, request: int, spec: SampleSpec, image: PIL.Image.Image, logits: torch.Tensor, seen: dict[str, Any]
    ) -> SampleResult:
        label, predicted = spec.cell.classes[0], int(logits.argmax())
        record: dict[str, Any] = new_record(spec) | {
            "is_error": predicted != label,
            "predicted_class": predicted,
            "risk": -float(logits.log_softmax(0)[label]),
            "soft_label": [float(one == label) for one in range(len(logits))],
            **seen,
        }
        accepted = is_accepted(self._job.requests[request].accept, record, spec.cell.classes)
        stored = accepted or self._job.output.store_rejected
        return SampleResult(
            record=record | {"accepted": accepted, "status": STATUS_OK if accepted else STATUS_REJECTED},
            image=self._encode(image) if stored else b"",
            run={"batch_size": 1},
        )

    def _encode(self, image: PIL.Image.Image) -> bytes:
        return imaging.encode(np.asarray(image), "png", provenance=self._job.output.provenance)


class ComposedWorker(Worker):
    """The engine's worker with that generator."""

    def __init__(self, job: JobSpec, plan: Plan) -> None:
        super().__init__(job, plan, name="composed", load=lambda job, plan: ComposedGenerator(job, plan))


def composed_job(folder: Path, *, count: int, store_rejected: bool = True, **changes: Any) -> JobSpec:
    """A plain request over what the target knows, and one over its holes too that keeps its errors."""
    raw: dict[str, Any] = {
        "name": "composed",
        "models": {
            "diffusion": "zoo:digits/stable-diffusion",
            "clip": "zoo:digits/clip",
            "target": TARGET,
            "oracle": "zoo:digits/oracle",
        },
        "requests": [
            {"name": "baseline", "method": "prompt", "classes": "all", "count": count, "contexts": ["", "red ink"]},
            {
                "name": "errors",
                "method": "prompt",
                "classes": "all",
                "count": count,
                "contexts": [*KNOWN, *HOLES],
                "accept": {"is_error": True, "oracle": "agrees"},
                "max_attempts": "1x",
            },
        ],
        "output": {"uri": str(folder), "samples_per_shard": 256, "store_rejected": store_rejected},
        "runtime": {"device": "cpu"},
    }
    return parse_job(raw | changes)


def make_run(job: JobSpec) -> Path:
    """Make a run of a job."""
    quiet_libraries()
    run_job(
        job,
        executor=LocalExecutor(1),
        resume="auto",
        confirmed=False,
        display=PlainDisplay(sys.stderr),
        make_worker=ComposedWorker,
    )
    return Path(job.output.uri)
