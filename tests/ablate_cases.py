"""Ablations as small as they get: digits, two denoising steps, two samples a row. Run as a program, it is one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

from engine.commands.experiments import StudyCall, call_study


def raw_job(**changes: Any) -> dict[str, Any]:
    """A job with one risky request, which has every part that can be taken away."""
    return {
        "name": "small",
        "models": {
            "diffusion": "zoo:digits/stable-unclip",
            "clip": "zoo:digits/clip",
            "target": "zoo:digits/classifier",
            "transfer": ["zoo:digits/classifier-b"],
            "oracle": "zoo:digits/oracle",
        },
        "requests": [raw_request()],
        "sampling": {"scheduler": "ddim", "num_inference_steps": 2},
        "guidance": {"risky": {"preset": "perceptible", "target_risk": 2.0, "conformity_floor": 0.3}},
        "output": {"uri": "runs/small", "samples_per_shard": 2},
    } | changes


def raw_request(**changes: Any) -> dict[str, Any]:
    """The request of `raw_job`."""
    conditioning = {"artefact": "zoo:digits/conditioning", "threshold": 0.9}
    return {
        "name": "risky", "method": "risky", "classes": ["three"], "count": 1, "conditioning": conditioning,
    } | changes  # fmt: skip


def write_study(path: Path, **changes: Any) -> Path:
    """A study file with its job inline."""
    raw = {"study": "ablate", "job": raw_job(), "count": 2, "text_diffusion": "zoo:digits/stable-diffusion"}
    path.write_text(yaml.safe_dump(raw | changes))
    return path


def call_ablate(file: Path, output: Path, **changes: Any) -> None:
    """The command, in this process."""
    arguments: dict[str, Any] = {
        "fields": {}, "executor": "local", "address": None, "validate": False, "sets": None, "as_json": False,
    }  # fmt: skip
    call_study(StudyCall(kind="ablate", file=file, output=str(output), **(arguments | changes)))


if __name__ == "__main__":
    call_ablate(Path(sys.argv[1]), Path(sys.argv[2]))
