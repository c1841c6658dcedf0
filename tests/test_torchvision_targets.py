"""A state dict of torchvision as a target, by the factory of the page: equal to torchvision's own scores."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
import torchvision.models
from safetensors.torch import save_file

from engine.models import factories
from engine.models.classifier import Classifier
from engine.models.job_checks import check_addresses
from tests.conftest import REPOSITORY
from tests.model_cases import NAMES, as_tensor, job_of, photographs

# A smaller network of torchvision than the page's, whose transform is that of the page.
ARCHITECTURE = "mobilenet_v3_small"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_factory_of_the_page(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With random weights in both kinds of files, found next to the factory; its tensor path has a gradient."""
    section = (REPOSITORY / "docs/targets.md").read_text().split("\n## Factories\n")[1]
    [code, *_] = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    module = f"vision_{suffix[1:]}"
    code = code.replace("resnet50", ARCHITECTURE).replace(".pth", suffix)
    (tmp_path / f"{module}.py").write_text(code)
    (tmp_path / "classes.txt").write_text("\n".join(NAMES) + "\n")
    torch.manual_seed(0)
    network = torchvision.models.get_model(ARCHITECTURE, num_classes=10).eval()
    weights = {name: one.contiguous() for name, one in network.state_dict().items()}
    (save_file if suffix == ".safetensors" else torch.save)(weights, tmp_path / f"{ARCHITECTURE}{suffix}")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(factories, "_FOLDERS", [])
    importlib.invalidate_caches()
    factories.add_import_folders([str(tmp_path)])
    address = f"{module}:{ARCHITECTURE}"
    check_addresses(job_of(target=address))
    classifier, images = Classifier.load(address), photographs((240, 260), (300, 232), (64, 64))
    assert classifier.labels == NAMES
    transform = torchvision.models.ResNet50_Weights.IMAGENET1K_V2.transforms()
    with torch.no_grad():
        plain = network(torch.stack([transform(image) for image in images]))
    torch.testing.assert_close(classifier.score(images), plain, atol=1e-5, rtol=1e-5)
    image = as_tensor(images[0]).requires_grad_(True)
    assert torch.autograd.grad(classifier.logits(image)[0, 0], image)[0].abs().max() > 0
