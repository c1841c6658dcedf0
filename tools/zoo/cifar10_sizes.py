"""How much to train the zoo `cifar10`: hours of two CPU cores, or a data-centre GPU (that size has not been run)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from caption_reader import RECIPE as READER
from cifar10_data import CLASS_NAMES
from cifar10_readers import ClipPlan, ReaderPlan, build_large_resnet, build_other_resnet, build_regnet, build_resnet
from cifar10_unets import UnetPlan, UnetSettings
from training import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Everything that is trained, by the name of the folder that it is exported to where it has one.

    Attributes:
        device: of torch.
        names: the classes that the diffusion models learn.
        decoder: first by pixels, then by features.
    """

    device: str
    names: tuple[str, ...]
    decoder: tuple[Recipe, Recipe]
    classifiers: Mapping[str, ReaderPlan]
    clips: Mapping[str, ClipPlan]
    diffusion: UnetPlan
    unclip: UnetPlan
    text_encoder: Recipe

    def shortened(self, max_steps: int) -> Size:
        """At most `max_steps` steps a stage; 0 leaves everything alone."""
        if max_steps <= 0:
            return self
        return self.with_recipes(lambda recipe: replace(recipe, num_steps=min(recipe.num_steps, max_steps)))

    def with_recipes(self, change: Callable[[Recipe], Recipe]) -> Size:
        """Every recipe changed."""
        return replace(
            self,
            decoder=(change(self.decoder[0]), change(self.decoder[1])),
            classifiers={name: replace(plan, recipe=change(plan.recipe)) for name, plan in self.classifiers.items()},
            clips={name: replace(plan, recipe=change(plan.recipe)) for name, plan in self.clips.items()},
            diffusion=replace(self.diffusion, recipe=change(self.diffusion.recipe)),
            unclip=replace(self.unclip, recipe=change(self.unclip.recipe)),
            text_encoder=change(self.text_encoder),
        )


def _decoder(steps: int, refined: int) -> tuple[Recipe, Recipe]:
    return (
        Recipe(num_steps=steps, learning_rate=4e-3, weight_decay=0.0, ema_decay=0.998),
        Recipe(num_steps=refined, learning_rate=2e-3, weight_decay=0.0, ema_decay=0.998),
    )


def _reader(steps: int) -> Recipe:
    return Recipe(num_steps=steps, learning_rate=3e-3, warmup_steps=300, weight_decay=0.05, ema_decay=0.998)


def _classifiers(steps: int) -> dict[str, ReaderPlan]:
    return {
        "classifier-b": ReaderPlan(build=build_large_resnet, side=64, recipe=_reader(steps // 2)),
        "oracle": ReaderPlan(build=build_regnet, recipe=_reader(steps)),
        "oracle-b": ReaderPlan(build=build_other_resnet, side=64, recipe=_reader(steps)),
        "classifier": ReaderPlan(build=build_resnet, distorts=False, recipe=_reader(steps // 3)),
    }


def _clips(steps: int) -> dict[str, ClipPlan]:
    def recipe(num_steps: int) -> Recipe:
        return Recipe(num_steps=num_steps, learning_rate=1.5e-3, warmup_steps=400, weight_decay=0.05, ema_decay=0.998)

    return {
        "clip": ClipPlan(layers=4, width=128, heads=4, recipe=recipe(steps)),
        "judge": ClipPlan(layers=5, width=112, heads=7, recipe=recipe(steps * 3 // 4)),
    }


def _unet(steps: int, *, learning_rate: float, ema_decay: float, num_replicas: int = 1) -> Recipe:
    return Recipe(
        num_steps=steps,
        learning_rate=learning_rate,
        warmup_steps=500,
        weight_decay=0.01,
        ema_decay=ema_decay,
        checkpoint_every=500,
        num_replicas=num_replicas,
    )


# Cats and dogs are harder than airplanes and ships.
_HARD = {"cat": 1.6, "dog": 1.6}
_TEXT_ENCODER = replace(READER, num_steps=800, warmup_steps=50)

CPU = Size(
    device="cpu",
    names=("airplane", "cat", "dog", "ship"),
    decoder=_decoder(4000, 3000),
    classifiers=_classifiers(12_000),
    clips=_clips(8_000),
    text_encoder=_TEXT_ENCODER,
    diffusion=UnetPlan(
        settings=UnetSettings(widths=(64, 112)),
        recipe=_unet(19_600, learning_rate=2e-3, ema_decay=0.9995, num_replicas=2),
        weights=_HARD,
    ),
    unclip=UnetPlan(
        settings=UnetSettings(widths=(64, 112), prediction="v_prediction"),
        recipe=_unet(7_900, learning_rate=1e-3, ema_decay=0.999, num_replicas=2),
        weights=_HARD,
    ),
)
GPU = Size(
    device="cuda",
    names=CLASS_NAMES,
    decoder=_decoder(8_000, 6_000),
    classifiers=_classifiers(40_000),
    clips=_clips(40_000),
    text_encoder=_TEXT_ENCODER,
    diffusion=UnetPlan(
        settings=UnetSettings(widths=(64, 112), batch_size=256),
        recipe=_unet(60_000, learning_rate=2e-3, ema_decay=0.9998),
    ),
    unclip=UnetPlan(
        settings=UnetSettings(widths=(64, 112), prediction="v_prediction", batch_size=256),
        recipe=_unet(24_000, learning_rate=1e-3, ema_decay=0.9995),
    ),
)
