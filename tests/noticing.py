"""A worker with the real models whose generator has something to say: at loading, and at its first batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.generation.generator import Generator
from engine.generation.worker import Worker
from engine.job.parsing import parse_job
from engine.job.plan import Plan
from engine.job.spec import JobSpec

HALVED = "request plain: batches of 4 made 2 at a time, as the GPU refused one"
# What a library could say of a model whose owner wants harm: a terminal's escape, HTML, a password, and no end.
HOSTILE = "\x1b[31m<script>alert(1)</script>\r\nof https://user:hf_secret@host/model\u202e \ud800" + "A" * 1_000_000


class Noticing(Generator):
    """The generator, which notices something."""

    def __init__(self, job: JobSpec, plan: Plan) -> None:
        super().__init__(job, plan)
        self.notices.add(HOSTILE)

    def batches(self, *arguments: Any) -> Any:
        """As the generator does."""
        self.notices.add(HALVED)
        return super().batches(*arguments)


def make_worker(job: JobSpec, plan: Plan, **_: Any) -> Worker:
    """For `run_job`."""
    return Worker(job, plan, name="noticing", load=Noticing)


def make_job(output: Path) -> JobSpec:
    """Two samples of the digits zoo in two shards, a step each."""
    return parse_job(
        {
            "name": "noticing",
            "models": {
                "diffusion": "zoo:digits/stable-diffusion",
                "clip": "zoo:digits/clip",
                "target": "zoo:digits/classifier",
            },
            "requests": [{"name": "plain", "method": "prompt", "classes": ["three"], "count": 2}],
            "sampling": {"num_inference_steps": 1, "guidance_scale": 2.0},
            "output": {"uri": str(output), "samples_per_shard": 1},
            "runtime": {"device": "cpu", "batch_size": 1},
        }
    )
