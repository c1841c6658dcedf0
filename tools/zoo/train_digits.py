"""Train the embedded zoo `digits` from scikit-learn's handwritten digits.

    uv run python tools/zoo/train_digits.py --seed 0 --output engine/zoo/digits

Stages run one after the other. A stage whose export is in the build folder is skipped; one that was stopped resumes
from its last checkpoint. The parts are copied to `--output` at the end.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from autoencoder import train_autoencoder
from classifiers import PLANS, train_classifier
from clip_model import train_clip
from diffusers.utils.logging import disable_progress_bar as disable_diffusers_bars
from diffusion import train_diffusion
from publishing import marker, publish_parts, store_once, write_checksums
from tiny_autoencoder import train_tiny_autoencoder
from transformers.utils.logging import disable_progress_bar as disable_transformers_bars
from unclip import train_unclip

from engine.driver.progress import PlainDisplay
from engine.job.parsing import parse_job
from engine.models.addresses import ZOO
from engine.studies.prepare.program import prepare_conditioning

DEFAULT_BUILD_FOLDER = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "riskforge" / "zoo-digits"
CONDITIONED = {"diffusion": "stable-unclip", "clip": "clip", "target": "classifier"}
NUM_COMPONENTS = 6
PARTS = (*PLANS, "clip", "stable-diffusion", "stable-unclip", "tiny-autoencoder")
Stage = Callable[[], None]


def stages(*, seed: int, build_folder: Path) -> dict[str, Stage]:
    """Every stage by the name of the folder it exports below `build_folder/export`, in training order."""
    export = build_folder / "export"
    shared: dict[str, Any] = {"seed": seed, "build_folder": build_folder / "checkpoints"}
    pipeline = export / "stable-diffusion"
    named: dict[str, Stage] = {name: partial(train_classifier, name, **shared, output=export / name) for name in PLANS}
    named["clip"] = partial(train_clip, **shared, output=export / "clip")
    named["stable-diffusion/vae"] = partial(train_autoencoder, **shared, output=pipeline / "vae")
    named["stable-diffusion"] = partial(train_diffusion, pipeline / "vae", **shared, output=pipeline)
    unclip = partial(train_unclip, export / "clip", pipeline / "vae", **shared, output=export / "stable-unclip")
    named["stable-unclip"] = unclip
    named["tiny-autoencoder"] = partial(
        train_tiny_autoencoder, pipeline / "vae", **shared, output=export / "tiny-autoencoder"
    )
    return named


def run_stages(*, seed: int, build_folder: Path, only: list[str]) -> None:
    """Run what is wanted (all, where nothing is named) and not done; a stage is done when its marker is there."""
    for name, stage in stages(seed=seed, build_folder=build_folder).items():
        if only and name not in only:
            continue
        done = marker(build_folder, name)
        if done.exists():
            print(f"{name}: already trained")
            continue
        start = time.monotonic()
        stage()
        done.parent.mkdir(parents=True, exist_ok=True)
        done.touch()
        print(f"{name}: done in {time.monotonic() - start:.0f} s", flush=True)


def publish_conditioning(output: Path) -> None:
    """Class statistics and error predictor of `classifier`, from the models as they are published.

    Side effects: writes `output/conditioning`; `zoo:digits` must be `output`.
    """
    job = parse_job(
        {
            "name": "digits",
            "models": {role: f"zoo:digits/{part}" for role, part in CONDITIONED.items()},
            "requests": [{"name": "all", "method": "prompt", "classes": "all", "count": 1, "conditioning": "none"}],
            "output": {"uri": "unused"},
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        display = PlainDisplay(sys.stderr)
        data = "digits:validation"
        made = prepare_conditioning(job, data, display=display, folder=folder, components=NUM_COMPONENTS)
        shutil.rmtree(output / "conditioning", ignore_errors=True)
        shutil.copytree(made.path, output / "conditioning")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("engine/zoo/digits"))
    parser.add_argument("--build-folder", type=Path, default=DEFAULT_BUILD_FOLDER, help="checkpoints and exports")
    only = "a classifier to train and publish, and nothing else; several times for several: " + ", ".join(PLANS)
    parser.add_argument("--only", action="append", default=[], choices=PLANS, metavar="NAME", help=only)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    disable_diffusers_bars()
    disable_transformers_bars()
    run_stages(seed=arguments.seed, build_folder=arguments.build_folder, only=arguments.only)
    wanted = arguments.only or PARTS
    done = [name for name in PARTS if name in wanted and marker(arguments.build_folder, name).exists()]
    publish_parts(arguments.build_folder, arguments.output, done)
    if arguments.output.resolve() == ZOO / "digits" and not arguments.only:
        publish_conditioning(arguments.output)
    if not arguments.only:  # classifiers share no file with other parts, which stay as they are
        store_once(arguments.output)
    write_checksums(arguments.output)


if __name__ == "__main__":
    main()
