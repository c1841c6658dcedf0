"""The jobs that start from real images, each twice: what they take, and whether both runs have equal bytes.

That of the photographs runs where `tools/zoo/cifar10_folder.py` has written them.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from gpu_steps.common import Figures, exit_code, parser, riskforge, summary_of

JOBS = Path(__file__).parents[2] / "jobs"
NAMES = ("counterfactuals-digits", "counterfactuals-cifar10")
SETTINGS: dict[str, dict[str, Any]] = {
    "sd1": {"runtime.batch_size": 20},
    "tiny": {"sampling.num_inference_steps": 10}
    | {
        f"requests.{number}.{key}": value
        for number in range(2)
        for key, value in {"classes": "[0]", "count": 1, "start.strength": [0.3]}.items()
    },
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    given = parser(__doc__).parse_args(arguments)
    figures, failures = Figures(given.output), list[str]()
    folder = given.output.parent / "runs" / "counterfactuals"
    shutil.rmtree(folder, ignore_errors=True)
    changes = SETTINGS[given.size] | {"runtime.device": given.device, "runtime.workers": 1}
    sets = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    for name in NAMES:
        job = JOBS / f"{name}.yaml"
        images = yaml.safe_load(job.read_text())["requests"][0]["start"]["images"]
        if not images.startswith("digits:") and not Path(images).is_dir():
            figures.note(name, f"left out: there is no {images}")
            continue
        digests = []
        for run in (folder / name / "first", folder / name / "second"):
            ran = riskforge("run", job, "--executor", "local", "--output", run, *sets)
            if ran["exit_code"]:
                failures.append(f"{name} did not end well: {ran['output'][-1:]}")
                break
            figures.note(f"{name}, {run.name}", {"seconds": ran["seconds"]} | summary_of(run))
            digests.append(
                {str(tar.relative_to(run)): hashlib.sha256(tar.read_bytes()).hexdigest() for tar in run.glob("*/*.tar")}
            )
        failures += [f"{name}: two runs have other bytes"] * (len(digests) == 2 and digests[0] != digests[1])
    return exit_code(failures)


if __name__ == "__main__":
    sys.exit(main())
