"""Which batch sizes `auto` finds at the size of Stable Diffusion 1.x, with one worker on the GPU and with two.

Few denoising steps: memory and batch sizes do not depend on their number.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.sizes import Setting, random_setting

from gpu_steps.common import Figures, exit_code, parser, riskforge, summary_of, write_job

# Samples of a shard: the first batches of `auto`, two of 8 and two of 16, and the largest that it goes on with.
SHARDS = {"sd1": 112, "tiny": 4}
NUM_STEPS = 4
GUIDED_EVERY = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    options = parser(__doc__)
    options.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    options.add_argument("--executor", choices=("ray", "local"), default="ray")
    given = options.parse_args(arguments)
    figures, failures = Figures(given.output), list[str]()
    setting = random_setting(given.size, given.models, given.device)
    for workers in given.workers:
        folder = given.output.parent / "runs" / f"sharing-{workers}"
        shutil.rmtree(folder, ignore_errors=True)
        job = auto_job(setting, folder / "out", SHARDS[given.size], {"device": given.device, "workers": workers})
        ran = riskforge("run", write_job(folder, job), "--executor", given.executor)
        figures.note(f"run with {workers}", ran)
        failures += [f"with {workers} workers the run did not end well"] * bool(ran["exit_code"])
        if not ran["exit_code"]:
            figures.note(f"summary with {workers}", summary_of(folder / "out"))
    return exit_code(failures)


def auto_job(setting: Setting, output: Path, shard: int, runtime: dict[str, Any]) -> dict[str, Any]:
    """What takes least memory and what takes most; of each a shard for every worker."""
    count = shard * runtime["workers"]
    between = {"boundary": list(setting.boundary), "count": count}
    unet = {"preset": "adversarial", "every": GUIDED_EVERY, "gradient": "unet"}
    risky = {"preset": "perceptible", "conformity_floor": 0.3, "every": GUIDED_EVERY}
    return {
        "name": "auto",
        "models": {"diffusion": setting.diffusion, "clip": setting.clip, "target": setting.target},
        "requests": [
            {"name": "prompt", "method": "prompt", **between},
            {"name": "unet", "method": "boundary", "guidance": {"boundary": unet}, **between},
            {
                "name": "risky",
                "method": "risky",
                "classes": list(setting.classes),
                "count": count // len(setting.classes),
                "guidance": {"risky": risky},
            },
        ],
        "sampling": setting.boundary_sampling | {"num_inference_steps": NUM_STEPS},
        "output": {"uri": str(output), "samples_per_shard": shard, "image_format": "jpg"},
        "runtime": {"batch_size": "auto"} | runtime,
    }


if __name__ == "__main__":
    sys.exit(main())
