"""Loop jobs for tests: mixtures that take a moment, and digits as small as they get."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def mixture_job(**changes: Any) -> dict[str, Any]:
    """A loop over mixtures with a learned reward and a monitor."""
    job: dict[str, Any] = {
        "study": "loop",
        "name": "mixtures",
        "rounds": 2,
        "seeds": 2,
        "generator": {"mixture": {"samples": 60}},
        "curation": {"reward": "squared-distance", "scale": 0.25, "learned": {"records": 200}},
        "monitor": {"audited": 60},
        "arms": {
            "clean": {},
            "gradient": {"attack": "gradient"},
            "defended": {"attack": "gradient", "defence": "influence"},
        },
        "output": {"uri": "loop"},
    }
    return job | copy.deepcopy(changes)


def digits_job(**changes: Any) -> dict[str, Any]:
    """A loop over the digits pipeline: two retrainings on a handful of samples."""
    job: dict[str, Any] = {
        "study": "loop",
        "name": "digits",
        "rounds": 2,
        "generator": {
            "job": {
                "models": {
                    "diffusion": "zoo:digits/stable-diffusion",
                    "clip": "zoo:digits/clip",
                    "target": "zoo:digits/classifier",
                    "oracle": "zoo:digits/oracle",
                },
                "requests": [
                    {
                        "name": "all",
                        "method": "prompt",
                        "boundary": list(DIGITS),
                        "prompt": "a photo of a digit",
                        "count": 24,
                    }
                ],
                "sampling": {"scheduler": "dpmsolver++", "num_inference_steps": 3, "guidance_scale": 1.0},
                "output": {"samples_per_shard": 12},
            }
        },
        "curation": {"candidates": 4, "learned": {"records": 40}},
        "training": {"steps": 3, "batch_size": 6, "lora_rank": 2},
        "monitor": {"audited": 10},
        "on_alarm": "continue",
        "arms": {"clean": {}},
        "output": {"uri": "loop"},
    }
    return job | copy.deepcopy(changes)


def write_job(path: Path, job: dict[str, Any]) -> Path:
    """The job as a file."""
    path.write_text(yaml.safe_dump(job, sort_keys=False))
    return path
