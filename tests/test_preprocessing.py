"""Preprocessing: the differentiable path equals the exact one, or is refused."""

import json

import numpy as np
import PIL.Image
import pytest
import torch

from engine.errors import JobError
from engine.models.preprocessing import Preprocessing
from engine.models.preprocessing_steps import Steps
from engine.models.processor_classes import DEFAULTS

PROCESSORS = {
    "vit": {"image_processor_type": "ViTImageProcessor", "size": {"height": 96, "width": 96}, "resample": 2},
    "clip": {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 112},
        "crop_size": {"height": 96, "width": 96},
        "resample": 3,
        "do_center_crop": True,
    },
    "convnext": {
        "image_processor_type": "ConvNextImageProcessor",
        "size": {"shortest_edge": 112},
        "crop_pct": 0.875,
        "resample": 3,
    },
}


def processor_folder(folder, settings):
    common = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
    means = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    folder.mkdir(exist_ok=True)
    (folder / "preprocessor_config.json").write_text(json.dumps(common | means | settings))
    return folder


@pytest.mark.parametrize("kind", PROCESSORS)
@pytest.mark.parametrize("size", [(512, 512), (300, 451), (64, 80)])
def test_tensor_path_equals_pil_path(kind, size, tmp_path):
    """A resize without antialiasing, a shifted crop or a swapped mean would show as a difference of many levels."""
    preprocessing = Preprocessing.load(processor_folder(tmp_path / kind, PROCESSORS[kind]))
    noise = np.random.default_rng(0).integers(0, 256, (size[0] // 8, size[1] // 8, 3), dtype=np.uint8)
    image = PIL.Image.fromarray(noise).resize(size[::-1], PIL.Image.Resampling.BICUBIC)
    tensor = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 255
    exact, ours = preprocessing.of_images([image]), preprocessing.of_tensor(tensor)
    assert exact.shape == ours.shape
    difference = (exact - ours).abs() * 0.225 * 255
    assert difference.mean() < 0.6 and difference.max() < 3


def test_tensor_path_is_differentiable(tmp_path):
    """Guidance needs the gradient of every pixel through resize, crop and normalisation."""
    preprocessing = Preprocessing.load(processor_folder(tmp_path / "clip", PROCESSORS["clip"]))
    image = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)).requires_grad_()
    preprocessing.of_tensor(image).square().sum().backward()
    inner = image.grad[..., 12:-12, 12:-12]
    assert (inner.abs() > 0).float().mean() > 0.99


def test_preprocessing_without_an_equivalent_is_refused(tmp_path):
    """Nearest-neighbour resizing has no differentiable equivalent; silence would guide on other images."""
    with pytest.raises(JobError, match="bilinear and bicubic"):
        Preprocessing.load(processor_folder(tmp_path / "x", PROCESSORS["vit"] | {"resample": 0}))


def test_no_resize_is_exact(classifier):
    """At the classifier's own size both paths agree to float32 rounding."""
    pixels = np.random.default_rng(1).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    scored = classifier.score([PIL.Image.fromarray(image) for image in pixels])
    assert torch.allclose(classifier.logits(tensor), scored, atol=1e-4)


@pytest.mark.parametrize("size", [(96, 96), (80, 131), (301, 200)])
@pytest.mark.parametrize(
    "steps",
    [
        Steps(resize={"height": 64, "width": 48}, crop=None, resample=PIL.Image.Resampling.BICUBIC, mean=[0.5] * 3,
              std=[0.25] * 3, rounds=True),
        Steps(resize={"shortest_edge": 73}, crop=(64, 64), resample=PIL.Image.Resampling.BILINEAR, mean=[0.5] * 3,
              std=[0.25] * 3, rounds=True),
    ],
    ids=["squash", "resize and crop"],
)  # fmt: skip
def test_the_tensor_path_equals_the_pil_path(steps: Steps, size: tuple[int, int]) -> None:
    """A resize without antialiasing or a crop that is off by one costs accuracy without a word."""
    noise = np.random.default_rng(0).integers(0, 256, (size[0] // 8, size[1] // 8, 3), dtype=np.uint8)
    image = PIL.Image.fromarray(noise).resize(size[::-1], PIL.Image.Resampling.BICUBIC)
    preprocessing = Preprocessing.plain("here", steps)
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    difference = (preprocessing.of_images([image]) - preprocessing.of_tensor(tensor)).abs() * 0.25 * 255
    assert difference.mean() < 0.6 and difference.max() < 3


@pytest.mark.parametrize("kind", DEFAULTS)
def test_every_supported_class_has_a_tensor_path(kind, tmp_path):
    """With the class's own options, in their sizes: none is refused, and colours stay where they are."""
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": kind}))
    preprocessing = Preprocessing.load(tmp_path)
    pixels = np.zeros((300, 301, 3), np.uint8)
    pixels[:, :150, 0], pixels[100:, :, 1], pixels[50:250, 50:, 2] = 200, 120, 60
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    exact = preprocessing.of_images([PIL.Image.fromarray(pixels)])
    assert (preprocessing.of_tensor(tensor) - exact).abs().mean() < 0.02 * (exact.max() - exact.min())


@pytest.mark.parametrize(("levels", "is_square", "is_refused"), [(1, True, False), (4, True, True), (4, False, True)])
def test_a_model_whose_paths_disagree_is_refused(levels, is_square, is_refused):
    """By more than rounding, at any of the shapes: here images are brighter by some of 255 levels."""
    steps = Steps(resize=None, crop=None, resample=PIL.Image.Resampling.BILINEAR, mean=(0, 0, 0), std=(0.5, 0.5, 0.5))

    def exact(images):
        pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]).float()
        differs = is_square == (pixels.shape[-1] == pixels.shape[-2])
        return (pixels + levels * differs) / 255 / 0.5

    if is_refused:
        with pytest.raises(JobError, match=r"'net': .* no differentiable equivalent"):
            Preprocessing("net", steps, exact)
    else:
        Preprocessing("net", steps, exact)
