"""Train the embedded zoo `cifar10` from CIFAR-10, on a GPU where there is one.

    uv run python tools/zoo/train_cifar10.py --data DATA --output engine/zoo/cifar10

`DATA` holds `cifar10/`, and for publishing into the package, which prepares artefacts for two ResNets of others,
`classifiers/`. Stages run one after the other; one that is done is skipped, one that was stopped by a signal or a crash
goes on from its last checkpoint. `--only` names stages to run, so that two processes can share them.
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
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from cifar10_autoencoder import build_autoencoder, fit_components, train_decoder
from cifar10_captions import CaptionedPhotographs, caption, caption_words, seen_by_target
from cifar10_data import Photographs, check_data, load_test, load_train
from cifar10_folder import ENVIRONMENT, by_path, positive, save_images
from cifar10_readers import TEACHER, Teacher, train_classifier, train_clip
from cifar10_sizes import CPU, GPU, Size
from cifar10_unets import train_diffusion, train_text_encoder, train_unclip
from diffusers.utils.logging import disable_progress_bar as disable_diffusers_bars
from diffusion import export_pipeline
from publishing import marker, publish_parts, store_once, unfinished, unwritable, write_checksums
from residual_networks import WEIGHTS
from transformers.utils.logging import disable_progress_bar as disable_transformers_bars

from engine.driver.progress import PlainDisplay
from engine.job.parsing import parse_job
from engine.job.spec import JobSpec
from engine.models.addresses import ZOO
from engine.studies.prepare.program import prepare_conditioning

DEFAULT_BUILD_FOLDER = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "riskforge" / "zoo-cifar10"
PARTS = ("classifier", "classifier-b", "oracle", "oracle-b", "clip", "judge", "stable-diffusion", "stable-unclip")
TARGETS = {
    "conditioning": "zoo:cifar10/classifier",
    "conditioning-resnet20": "tools.targets.cifar_resnets:resnet20",
    "conditioning-resnet32": "tools.targets.cifar_resnets:resnet32",
}
NUM_COMPONENTS = 3
THRESHOLDS = "contexts.json"
STAGES = (TEACHER, "oracle", "oracle-b", "classifier", "stable-diffusion/vae", "stable-diffusion", "clip", "judge",
          "stable-unclip")  # fmt: skip
# What a stage reads of others.
NEEDS = {
    "classifier": (TEACHER,),
    "stable-diffusion/vae": (TEACHER,),
    "stable-diffusion": (TEACHER, "stable-diffusion/vae"),
    "clip": (TEACHER,),
    "judge": (TEACHER,),
    "stable-unclip": (TEACHER, "stable-diffusion", "clip"),
}
Stage = Callable[[], None]


def stages(data_folder: Path, size: Size, *, seed: int, build_folder: Path) -> dict[str, Stage]:
    """Every stage by the name of the folder it exports below `build_folder/export`, in training order."""
    work = Work(data_folder, size, seed, build_folder)
    classifiers = {name: partial(work.train_classifier, name) for name in size.classifiers}
    teacher = {TEACHER: classifiers.pop(TEACHER)}
    return {
        **teacher,
        **classifiers,
        "stable-diffusion/vae": work.train_decoder,
        "stable-diffusion": work.train_diffusion,
        **{name: partial(work.train_clip, name) for name in size.clips},
        "stable-unclip": work.train_unclip,
    }


@dataclass(frozen=True)
class Work:
    """The data of a training, loaded when a stage first asks for it, and the stages."""

    data_folder: Path
    size: Size
    seed: int
    build_folder: Path

    @property
    def export(self) -> Path:
        """Where finished parts are."""
        return self.build_folder / "export"

    @property
    def _shared(self) -> dict[str, Any]:
        return {"seed": self.seed, "build_folder": self.build_folder / "checkpoints"}

    @cached_property
    def data(self) -> Photographs:
        """All training images."""
        return load_train(self.data_folder)

    @cached_property
    def captioned(self) -> CaptionedPhotographs:
        """Training images with their captions, as the teacher sees them."""
        teacher = Teacher(self.export / TEACHER)
        found, thresholds = caption(self.data, teacher.activation)
        arriving = self.build_folder / f".{THRESHOLDS}-{os.getpid()}"
        arriving.write_text(json.dumps(dataclasses.asdict(thresholds), indent=2) + "\n")
        arriving.replace(self.build_folder / THRESHOLDS)
        return found

    def train_classifier(self, name: str) -> None:
        """Oracles, target and teacher."""
        plan, tuning = self.size.classifiers[name], load_test(self.data_folder, "tuning")
        data = seen_by_target(self.captioned) if name == "classifier" else self.data
        options = {**self._shared, "output": self.export / name, "device": self.size.device}
        train_classifier(name, plan, data, tuning, **options)

    def train_decoder(self) -> None:
        """The autoencoder."""
        teacher = Teacher(self.export / TEACHER, self.size.device)
        options = {**self._shared, "output": self.export / "stable-diffusion" / "vae", "device": self.size.device}
        train_decoder(self.data, teacher, self.size.names, self.size.decoder, **options)

    def train_diffusion(self) -> None:
        """Text encoder and UNet; the autoencoder's encoder needs no training."""
        names, output = self.size.names, self.export / "stable-diffusion"
        text_encoder = train_text_encoder(names, self.size.text_encoder, **self._shared)
        autoencoder, data = build_autoencoder(fit_components(self.data)), self.captioned.of_classes(names)
        options = {**self._shared, "device": self.size.device}
        unet = train_diffusion(data, names, self.size.diffusion, text_encoder, autoencoder, **options)
        noise_config = self.size.diffusion.settings.noise_config
        export_pipeline(
            unet, text_encoder.cpu(), output / "vae", output, words=caption_words(), noise_config=noise_config
        )

    def train_clip(self, name: str) -> None:
        """CLIP learns from the teacher, the judge does not."""
        teacher = Teacher(self.export / TEACHER, self.size.device) if name == "clip" else None
        options = {**self._shared, "output": self.export / name, "device": self.size.device}
        train_clip(name, self.size.clips[name], self.captioned, teacher, **options)

    def train_unclip(self) -> None:
        """The UNet goes on, with image embeddings."""
        data = self.captioned.of_classes(self.size.names)
        options = {**self._shared, "output": self.export / "stable-unclip", "device": self.size.device}
        pipeline, clip = self.export / "stable-diffusion", self.export / "clip"
        train_unclip(data, self.size.unclip, pipeline, clip, **options)


def run_stages(named: dict[str, Stage], only: list[str], build_folder: Path) -> None:
    """Run what is wanted and not done; a stage is done when its marker is there."""
    for name, stage in named.items():
        done = marker(build_folder, name)
        if done.exists() or (only and name not in only):
            continue
        if missing := unfinished(build_folder, NEEDS.get(name, ())):
            needed = f"{', '.join(missing)}, which is not done in {build_folder}"
            raise SystemExit(f"error: --only {name}: the stage needs {needed}")
        start = time.monotonic()
        stage()
        done.parent.mkdir(parents=True, exist_ok=True)
        done.touch()
        print(f"{name}: done in {time.monotonic() - start:.0f} s", flush=True)


def publish(build_folder: Path, output: Path, names: tuple[str, ...]) -> None:
    """Copy all parts to `output`, with the trained classes and what contexts mean.

    Ends the program where a part is not done: it may share files with others.
    """
    if missing := unfinished(build_folder, PARTS):
        raise SystemExit(f"error: --output: nothing was copied, since {', '.join(missing)} is not done")
    publish_parts(build_folder, output, PARTS)
    shutil.copy(build_folder / THRESHOLDS, output / THRESHOLDS)
    (output / "classes.json").write_text(json.dumps(names) + "\n")


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


def parse() -> argparse.Namespace:
    """The command line; ends the program where something that is needed later is not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10/ and classifiers/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="where the parts are copied when all are done; default: nowhere")
    parser.add_argument("--build-folder", type=Path, default=DEFAULT_BUILD_FOLDER, help="checkpoints and exports")
    parser.add_argument("--size", choices=("auto", "cpu", "gpu"), default="auto", help="auto: gpu where there is one")
    only = "a stage to run; several times for several: " + ", ".join(STAGES)
    parser.add_argument("--only", action="append", default=[], choices=STAGES, metavar="STAGE", help=only)
    shortened = "end every stage early, to try the script out in a --build-folder of its own"
    parser.add_argument("--max-steps", type=positive, metavar="N", help=shortened)
    parser.add_argument("--threads", type=positive, default=2)
    arguments = parser.parse_args()
    if arguments.size == "gpu" and not torch.cuda.is_available():
        parser.error("--size gpu: torch finds no CUDA device; use cpu or auto")
    if arguments.max_steps and arguments.build_folder == DEFAULT_BUILD_FOLDER:
        parser.error("--max-steps: give a --build-folder of its own, or real stages would count as done")
    check_data(arguments.data)
    if arguments.output and arguments.output.resolve() == ZOO / "cifar10":
        for name in WEIGHTS.values():
            if not (arguments.data / "classifiers" / name).is_file():
                parser.error(f"--data: {arguments.data / 'classifiers' / name} is not there; publishing needs it")
    for option, folder in (("--build-folder", arguments.build_folder), ("--output", arguments.output)):
        if folder and (problem := unwritable(folder)):
            parser.error(f"{option}: {problem}")
    return arguments


def main() -> None:
    """Command line."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    disable_diffusers_bars()
    disable_transformers_bars()
    on_gpu = arguments.size == "gpu" or (arguments.size == "auto" and torch.cuda.is_available())
    size, build_folder = (GPU if on_gpu else CPU).shortened(arguments.max_steps or 0), arguments.build_folder
    named = stages(arguments.data, size, seed=arguments.seed, build_folder=build_folder)
    try:
        run_stages(named, arguments.only, build_folder)
    except KeyboardInterrupt:
        sys.exit(130)
    if arguments.output:
        publish(build_folder, arguments.output, size.names)
        if arguments.output.resolve() == ZOO / "cifar10":
            publish_conditioning(arguments.output, arguments.data.resolve())
        store_once(arguments.output)
        write_checksums(arguments.output)


if __name__ == "__main__":
    main()
