"""Train the embedded zoo `cifar10` from CIFAR-10, on a GPU where there is one.

    uv run python tools/zoo/train_cifar10.py --data DATA --output engine/zoo/cifar10

`DATA` holds `cifar10/cifar10_train_*.npz` and `classifiers/resnet20-*.th`. Stages run one after the other; a stage
that is done is skipped, one that was stopped resumes from its last checkpoint. `--only` names stages to run, so that
two processes can share them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
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
from cifar10_data import load_test, load_train
from cifar10_folder import by_path, save_images
from cifar10_models import (
    CPU,
    GPU,
    Size,
    train_classifier,
    train_clip,
    train_decoder,
    train_diffusion,
    train_unclip,
)
from diffusers.utils.logging import disable_progress_bar as disable_diffusers_bars
from residual_networks import ResidualNetwork
from targets.cifar_resnets import ENVIRONMENT
from train_digits import write_checksums
from training import Recipe
from transformers.utils.logging import disable_progress_bar as disable_transformers_bars

from engine.driver.progress import PlainDisplay
from engine.job.parsing import parse_job
from engine.job.spec import JobSpec
from engine.models.addresses import ZOO
from engine.studies.prepare.program import prepare_conditioning

DEFAULT_BUILD_FOLDER = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "riskforge" / "zoo-cifar10"
PARTS = ("classifier", "oracle", "clip", "judge", "stable-diffusion", "stable-unclip")
TARGETS = {
    "conditioning": "zoo:cifar10/classifier",
    "conditioning-resnet20": "tools.targets.cifar_resnets:resnet20",
    "conditioning-resnet32": "tools.targets.cifar_resnets:resnet32",
}
NUM_COMPONENTS = 3
Stage = Callable[[], None]


def stages(data_folder: Path, size: Size, *, seed: int, build_folder: Path) -> dict[str, Stage]:
    """Every stage by the name of the folder it exports below `build_folder/export`, in training order."""
    data, tuning, export = load_train(data_folder), load_test(data_folder, "tuning"), build_folder / "export"
    shared: dict[str, Any] = {"seed": seed, "build_folder": build_folder / "checkpoints"}
    pipeline, clip = export / "stable-diffusion", export / "clip"
    teacher = ResidualNetwork("resnet20", data_folder, size.device)

    def classifier(name: str) -> Stage:
        return partial(train_classifier, name, data, tuning, size, **shared, output=export / name)

    return {
        "stable-diffusion/vae": partial(train_decoder, data, teacher, size, **shared, output=pipeline / "vae"),
        "oracle": classifier("oracle"),
        "clip": partial(train_clip, data, teacher, size, **shared, output=clip),
        "stable-diffusion": partial(train_diffusion, data, size, **shared, output=pipeline),
        "stable-unclip": partial(train_unclip, data, pipeline, clip, size, **shared, output=export / "stable-unclip"),
        "judge": partial(train_clip, data, None, size, **shared, output=export / "judge"),
        "classifier": classifier("classifier"),
    }


def shortened(size: Size, max_steps: int) -> Size:
    """The size with at most `max_steps` steps a stage; 0 leaves it alone."""
    changes: dict[str, Any] = {}
    for name in Size.__slots__ if max_steps > 0 else ():
        if isinstance(recipe := getattr(size, name), Recipe):
            changes[name] = dataclasses.replace(recipe, num_steps=min(recipe.num_steps, max_steps))
    return dataclasses.replace(size, **changes)


def run_stages(named: dict[str, Stage], only: list[str], build_folder: Path) -> None:
    """Run what is wanted and not done; a stage is done when its marker is there."""
    for name, stage in named.items():
        marker = build_folder / "done" / name.replace("/", "-")
        if marker.exists() or (only and name not in only):
            continue
        start = time.monotonic()
        stage()
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
        print(f"{name}: done in {time.monotonic() - start:.0f} s", flush=True)


def publish(build_folder: Path, output: Path, names: tuple[str, ...]) -> None:
    """Copy the exported parts that are complete to `output`, replacing what is there; list the trained classes."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "classes.json").write_text(json.dumps(names) + "\n")
    for name in PARTS:
        if (build_folder / "done" / name).exists():
            shutil.rmtree(output / name, ignore_errors=True)
            shutil.copytree(build_folder / "export" / name, output / name)


def publish_conditioning(output: Path, data_folder: Path) -> None:
    """Class statistics and error predictors of the zoo's classifier and of the two ResNets, on the tuning images.

    Side effects: writes `output/conditioning*`, which must be `zoo:cifar10`; sets RISKFORGE_DATA for the ResNets.
    """
    os.environ[ENVIRONMENT] = str(data_folder)
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        save_images(by_path(load_test(data_folder, "tuning")), images)
        for name, target in TARGETS.items():
            shown = PlainDisplay(sys.stderr)
            job = conditioned_job(target)
            made = prepare_conditioning(
                job, str(images), display=shown, folder=str(Path(folder) / name), components=NUM_COMPONENTS
            )
            shutil.rmtree(output / name, ignore_errors=True)
            shutil.copytree(made.path, output / name)


def conditioned_job(target: str) -> JobSpec:
    """A job that asks for the embeddings of the zoo's Stable unCLIP pipeline, against a target."""
    models = {"diffusion": "zoo:cifar10/stable-unclip", "clip": "zoo:cifar10/clip", "target": target}
    request = {"name": "all", "method": "prompt", "classes": "all", "count": 1, "conditioning": "none"}
    return parse_job({"name": "cifar10", "models": models, "requests": [request], "output": {"uri": "unused"}})


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10/ and classifiers/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="where finished parts are copied; default: nowhere")
    parser.add_argument("--build-folder", type=Path, default=DEFAULT_BUILD_FOLDER, help="checkpoints and exports")
    parser.add_argument("--size", choices=("auto", "cpu", "gpu"), default="auto", help="auto: gpu where there is one")
    parser.add_argument("--only", action="append", default=[], help="a stage to run; several times for several")
    parser.add_argument("--max-steps", type=int, default=0, help="end every stage early, to try the script out")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    disable_diffusers_bars()
    disable_transformers_bars()
    on_gpu = arguments.size == "gpu" or (arguments.size == "auto" and torch.cuda.is_available())
    size, build_folder = shortened(GPU if on_gpu else CPU, arguments.max_steps), arguments.build_folder
    named = stages(arguments.data, size, seed=arguments.seed, build_folder=build_folder)
    run_stages(named, arguments.only, build_folder)
    if arguments.output:
        publish(build_folder, arguments.output, size.names)
        if arguments.output.resolve() == ZOO / "cifar10":
            publish_conditioning(arguments.output, arguments.data.resolve())
        write_checksums(arguments.output)


if __name__ == "__main__":
    main()
