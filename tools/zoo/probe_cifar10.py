"""Compare settings of the zoo's UNet at equal compute, before a long training.

    uv run python tools/zoo/probe_cifar10.py --data DATA --output PROBES.jsonl base velocity

Every probe trains for the same seconds of one core, however many steps these are, and draws the same prompts from the
same seeds; the referee (a ResNet-32 of others) reads them. One line of JSON a probe, and a contact sheet beside it.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cifar10_autoencoder import build_autoencoder, fit_components
from cifar10_captions import CaptionedPhotographs
from cifar10_data import CLASS_NAMES, Photographs, check_data, load_test, load_train
from cifar10_probes import balanced_labels, prompts_of
from cifar10_unets import EMPTY_SHARE, JOINT_SHARE, Prompts, UnetSettings, encode, for_training, training_loss
from diffusers import DDPMScheduler, LMSDiscreteScheduler, UNet2DConditionModel
from drawing import Sampling, load_pipeline, percent, sample, save_sheet
from residual_networks import ResidualNetwork
from torch import Tensor
from training import Recipe, fit

from engine.models.addresses import ZOO
from engine.studies.evaluate.distances import kernel_distance

NAMES = ("airplane", "cat", "dog", "ship")
SCALES = (3.0, 5.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What one probe changes; `whitening` is of the latents."""

    settings: UnetSettings = field(default_factory=UnetSettings)
    learning_rate: float = 1e-3
    ema_decay: float = 0.999
    whitening: float = 1.0


PROBES = {
    "base": Probe(),
    "velocity": Probe(settings=UnetSettings(prediction="v_prediction")),
    "wide": Probe(settings=UnetSettings(widths=(80, 128))),
    "deep": Probe(settings=UnetSettings(layers=2)),
    "fast": Probe(learning_rate=2e-3, ema_decay=0.9995),
    "batch": Probe(settings=UnetSettings(batch_size=128), learning_rate=1.4e-3),
    "low-noise": Probe(settings=UnetSettings(prediction="v_prediction", low_noise_share=0.4)),
    "high-noise": Probe(settings=UnetSettings(prediction="v_prediction", weighs_noise=True)),
    "over-white": Probe(whitening=1.5),
    "uneven": Probe(whitening=0.75),
    "more-uneven": Probe(whitening=0.5),
    "most-uneven": Probe(whitening=0.25),
}


def train(name: str, probe: Probe, data: Photographs, folder: Path, seconds: float, seed: int) -> dict[str, Any]:
    """Train for `seconds` of this process; the UNet, factors for its latents, and what the training was."""
    settings = probe.settings
    chosen = data.of_classes(NAMES)
    images = np.concatenate([chosen.images, chosen.images[:, :, ::-1]])
    captioned = CaptionedPhotographs(Photographs(images, np.concatenate([chosen.labels] * 2)), [()] * len(images))
    latents = encode(build_autoencoder(fit_components(data, probe.whitening)), images)
    published = load_pipeline(ZOO / "cifar10")
    prompts = Prompts(published.text_encoder, published.tokenizer)
    noise_levels = DDPMScheduler(**settings.noise_config).alphas_cumprod
    torch.manual_seed(seed)
    unet = for_training(settings.build())

    def loss(rng: np.random.Generator) -> Tensor:
        rows = rng.integers(len(latents), size=settings.batch_size)
        texts = captioned.captions(rows, rng, joint=NAMES, joint_share=JOINT_SHARE, empty_share=EMPTY_SHARE)
        timesteps = settings.draw_timesteps(rng, settings.batch_size)
        return training_loss(unet, settings, latents[rows], prompts(texts), timesteps, noise_levels)

    rng, start = np.random.default_rng(0), 0.0
    for step in range(12):
        start = time.process_time() if step == 2 else start
        loss(rng).backward()
    pace = (time.process_time() - start) / 10
    unet.zero_grad()
    recipe = Recipe(
        num_steps=round(seconds / pace),
        learning_rate=probe.learning_rate,
        warmup_steps=200,
        weight_decay=0.01,
        ema_decay=probe.ema_decay,
        checkpoint_every=1000,
    )
    began = time.process_time()
    fit(f"probe-{name}", unet, loss, recipe, seed=seed, folder=folder)
    return {
        "unet": unet,
        # Of these latents to those that the published decoder takes.
        "factors": factors_between(encode(published.vae, images[:500]), latents[:500]),
        "parameters": sum(p.numel() for p in unet.parameters()),
        "images": recipe.num_steps * settings.batch_size,
        "cpu_seconds": round(time.process_time() - began),
    }


def factors_between(wanted: Tensor, found: Tensor) -> Tensor:
    """Factors [12, 1, 1] that take latents [N, 12, 8, 8] to those of the same components at another whitening."""
    return ((wanted * found).sum((0, 2, 3)) / (found * found).sum((0, 2, 3))).view(-1, 1, 1)


def measure(
    unet: UNet2DConditionModel, factors: Tensor, settings: UnetSettings, data_folder: Path, count: int, sheet: Path
) -> dict[str, Any]:
    """What the referee reads of `count` samples at each guidance scale, and their distance to test images."""
    referee, test = ResidualNetwork("resnet32", data_folder, "cpu"), load_test(data_folder, "tuning")
    real = referee.read(test.of_classes(NAMES).images)[0].double().numpy()
    pipeline = load_pipeline(ZOO / "cifar10")
    pipeline.unet = unet
    pipeline.scheduler = LMSDiscreteScheduler(**settings.noise_config, steps_offset=1)
    decode = pipeline.vae.decode
    pipeline.vae.decode = lambda latents, **options: decode(latents * factors, **options)
    labels = balanced_labels(NAMES, count)
    figures: dict[str, Any] = {}
    for scale in SCALES:
        drawn = sample(pipeline, prompts_of(labels), Sampling(guidance_scale=scale), seed=1000)
        features, read = referee.read(drawn)
        figures[f"{scale:g}"] = {
            "agrees": percent(read == labels),
            "by_class": {name: percent((read == labels)[labels == CLASS_NAMES.index(name)]) for name in NAMES},
            "kid_x1000": round(1000 * kernel_distance(features.double().numpy(), real).value, 1),
        }
        tiles = np.concatenate([drawn[labels == CLASS_NAMES.index(name)][:40] for name in NAMES])
        if len(tiles) == 160:
            save_sheet(tiles.reshape(8, 20, 32, 32, 3), sheet.with_name(f"{sheet.stem}-{scale:g}.png"))
    return figures


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("probes", nargs="+", choices=tuple(PROBES), metavar="PROBE", help=", ".join(PROBES))
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10/ and classifiers/")
    parser.add_argument("--output", type=Path, required=True, help="file of results, added to; its folder is worked in")
    parser.add_argument("--seconds", type=float, default=600.0, help="of one core, a probe")
    parser.add_argument("--count", type=int, default=400, help="samples at each guidance scale")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = arguments.output.parent
    folder.mkdir(parents=True, exist_ok=True)
    check_data(arguments.data)
    data = load_train(arguments.data)
    for name in arguments.probes:
        probe = PROBES[name]
        trained = train(name, probe, data, folder, arguments.seconds, arguments.seed)
        unet, factors = trained.pop("unet"), trained.pop("factors")
        found = measure(unet, factors, probe.settings, arguments.data, arguments.count, folder / f"{name}.png")
        line = json.dumps({"probe": name, **trained, "scale": found})
        print(line, flush=True)
        with arguments.output.open("a") as results:
            results.write(line + "\n")


if __name__ == "__main__":
    main()
