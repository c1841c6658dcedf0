"""CIFAR-10 ResNets as targets: factories for jobs, a command that converts them, and two that measure them.

    export RISKFORGE_DATA=FOLDER        # holds classifiers/ and cifar10/
    python -m tools.targets.cifar_resnets check
    python -m tools.targets.cifar_resnets calibrate
    python -m tools.targets.cifar_resnets convert --output targets

In a job that is run from the root of the repository: `target: tools.targets.cifar_resnets:resnet20`; after `convert`,
from anywhere: `target: targets/resnet20.pt`. The weights are those of akamaster/pytorch_resnet_cifar10 (BSD-2-Clause),
trained by others; published accuracies on the 10,000 test images are 91.73 % and 92.63 %.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn
from torch.nn import functional

ENVIRONMENT = "RISKFORGE_DATA"
WEIGHTS = {"resnet20": "resnet20-12fca82f.th", "resnet32": "resnet32-d509ac18.th"}
BLOCKS = {"resnet20": 3, "resnet32": 5}
PUBLISHED_PERCENT = {"resnet20": 91.73, "resnet32": 92.63}
LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SETTINGS: dict[str, Any] = {
    "labels": list(LABELS),
    "image_size": 32,
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}
ROWS = 250
# Test images that temperatures are fitted on; those after them judge the fit.
NUM_FITTED = 2500


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut without parameters (option A of He et al. 2016, section 3.3).

    Where the stage changes, the shortcut takes every second pixel and pads the channels with zeros on both sides.
    """

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.stride = 1 if num_in == num_out else 2
        self.padding = (num_out - num_in) // 2
        self.conv1 = nn.Conv2d(num_in, num_out, 3, stride=self.stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(num_out)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(num_out)

    def forward(self, x: Tensor) -> Tensor:
        """[B, num_in, h, w] to [B, num_out, h / stride, w / stride]."""
        shortcut = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        inner = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(inner)) + shortcut)


class CifarResNet(nn.Module):
    """The ResNet for 32 x 32 images of He et al. 2016, section 4.2: 6n + 2 layers, stages of 16, 32, 64 channels."""

    def __init__(self, num_blocks: int, num_classes: int = len(LABELS)) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, num_blocks)
        self.layer2 = _stage(16, 32, num_blocks)
        self.layer3 = _stage(32, 64, num_blocks)
        self.linear = nn.Linear(64, num_classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits [B, n] of normalised images [B, 3, 32, 32]."""
        x = functional.relu(self.bn1(self.conv1(pixels)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


def _stage(num_in: int, num_out: int, num_blocks: int) -> nn.Sequential:
    return nn.Sequential(*(Block(num_in if index == 0 else num_out, num_out) for index in range(num_blocks)))


def resnet20() -> tuple[nn.Module, dict[str, Any]]:
    """The ResNet-20 as a target of a job."""
    return load("resnet20"), SETTINGS


def resnet32() -> tuple[nn.Module, dict[str, Any]]:
    """The ResNet-32 as a target of a job."""
    return load("resnet32"), SETTINGS


def load(name: str, data_folder: Path | None = None) -> CifarResNet:
    """A trained network in evaluation mode, from `data_folder`, else from the folder that RISKFORGE_DATA names.

    Raises:
        FileNotFoundError: RISKFORGE_DATA is not set, or the weights are not there.
    """
    path = (data_folder or _data()) / "classifiers" / WEIGHTS[name]
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    network = CifarResNet(BLOCKS[name])
    network.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    return network.eval()


def convert(name: str, folder: Path) -> Path:
    """Write a network as TorchScript with its side file; returns the path of the TorchScript."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.pt"
    torch.jit.script(load(name)).save(str(path))
    path.with_name(f"{path.name}.json").write_text(f"{json.dumps(SETTINGS | {'output': 'logits'}, indent=1)}\n")
    return path


def test_images() -> tuple[list[PIL.Image.Image], Tensor]:
    """The 5,000 test images at hand, and their classes."""
    with np.load(_data() / "cifar10" / "cifar10_test_5000.npz", allow_pickle=False) as file:
        return [PIL.Image.fromarray(one) for one in file["images"]], torch.from_numpy(file["labels"]).long()


def scored(address: str) -> tuple[Tensor, Tensor]:
    """Logits [N, n] of a target on the test images, as the engine sees it, and their classes [N]."""
    from engine.models.classifier import Classifier

    classifier = Classifier.load(address)
    images, labels = test_images()
    batches = [images[start : start + ROWS] for start in range(0, len(images), ROWS)]
    return torch.cat([classifier.score(batch) for batch in batches]), labels


def accuracy_percent(address: str) -> float:
    """Accuracy of a target on the test images."""
    logits, labels = scored(address)
    return 100 * (logits.argmax(1) == labels).double().mean().item()


def calibration_row(name: str) -> str:
    """A network's fitted temperature, and what it does to other images: mean NLL, and the median risk of errors."""
    from engine.methods.temperature import fit_temperature

    logits, labels = scored(f"tools.targets.cifar_resnets:{name}")
    fit = fit_temperature(logits[:NUM_FITTED].double(), labels[:NUM_FITTED], 1.0)
    others, classes = logits[NUM_FITTED:], labels[NUM_FITTED:]
    errs = others.argmax(1) != classes
    risks = [functional.cross_entropy(others / divisor, classes, reduction="none") for divisor in (1.0, fit.fitted)]
    figures = [fit.fitted, *(float(risk.mean()) for risk in risks), *(float(risk[errs].median()) for risk in risks)]
    return f"| {name} | {' | '.join(f'{figure:.3f}' for figure in figures)} |"


def _data() -> Path:
    folder = os.environ.get(ENVIRONMENT)
    if not folder:
        raise FileNotFoundError(f"set {ENVIRONMENT} to the folder that holds classifiers/ and cifar10/")
    return Path(folder)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="measure accuracy on the test images at hand")
    commands.add_parser("calibrate", help="fit temperatures on half of them, and measure on the other half")
    converting = commands.add_parser("convert", help="write TorchScript files with their side files")
    converting.add_argument("--output", type=Path, default=Path("targets"))
    arguments = parser.parse_args()
    if arguments.command == "calibrate":
        print("| network | T | NLL at 1 | NLL at T | median risk of errors at 1 | at T |\n|---|---|---|---|---|---|")
        print("\n".join(map(calibration_row, WEIGHTS)))
        return
    for name in WEIGHTS:
        if arguments.command == "convert":
            print(convert(name, arguments.output))
            continue
        found = accuracy_percent(f"tools.targets.cifar_resnets:{name}")
        print(f"{name}: {found:.2f} % of 5,000 test images; published: {PUBLISHED_PERCENT[name]} % of 10,000")


if __name__ == "__main__":
    main()
