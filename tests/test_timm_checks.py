"""Folders as timm itself saves them: logits equal to timm's own, or refused by name."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import save_file

from engine.commands.jobfile import read_job
from engine.driver.checks import plan_job
from engine.errors import JobError
from engine.models.classifier import Classifier
from engine.models.classifier_checks import check_classifier
from engine.models.job_checks import check_addresses
from engine.models.labels import read_labels
from tests.model_cases import as_tensor, photographs
from tests.program_cases import DIGITS, images, job_of, write

timm = pytest.importorskip("timm")
NAMES = ["cat", "dog", "ship"]


def saved(folder: Path, network: str, made: dict[str, Any] | None = None, **more: Any) -> Any:
    """A network that timm made and saved, with the arguments of either."""
    torch.manual_seed(0)
    model = timm.create_model(network, pretrained=False, **{"num_classes": 3} | (made or {})).eval()
    options = {"model_config": {"label_names": NAMES}, "safe_serialization": True} | more
    timm.models.save_for_hf(model, str(folder), **options)
    return model


# Network, what it is made with, what it is saved with.
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "convolutions": ("test_resnet", {}, {}),
    "other pooling": ("test_resnet", {"global_pool": "max"}, {}),
    "transformer": ("test_vit", {}, {}),
    "pooling of tokens": ("test_vit", {"global_pool": "avg"}, {}),
    "size of images": ("test_vit2", {"img_size": 64}, {"data_config": {"input_size": (3, 64, 64)}}),
    "images of no square": ("test_resnet", {}, {"data_config": {"input_size": (3, 64, 96), "crop_mode": "squash"}}),
    "arguments": ("test_convnext", {"act_layer": "relu"}, {}),
    "dropped at chance in training": ("test_byobnet", {"drop_rate": 0.4, "drop_path_rate": 0.2}, {}),
    "explicit arguments": ("test_resnet", {}, {"model_args": {"num_classes": 3}}),
    "other preprocessing": (
        "test_resnet", {}, {"data_config": {"mean": (0.1, 0.2, 0.3), "std": (0.3, 0.2, 0.1), "crop_pct": 0.8,
                                            "interpolation": "bilinear", "input_size": (3, 48, 48)}},
    ),
    "next to a pickle": ("test_resnet", {}, {"safe_serialization": "both"}),
    "names by number": ("test_resnet", {}, {"model_config": {"label_names": dict(enumerate(NAMES))}}),
    "with descriptions": (
        "test_resnet",
        {},
        {"model_config": {"label_names": NAMES, "label_descriptions": dict.fromkeys(NAMES, "described")}},
    ),
    "the old field": ("test_resnet", {}, {"model_config": {"labels": NAMES}}),
    "a temperature": ("test_resnet", {}, {"model_config": {"label_names": NAMES, "temperature": 2.0}}),
}  # fmt: skip


@pytest.mark.parametrize("kind", VARIANTS)
def test_what_timm_saves_gives_timms_logits(kind: str, tmp_path: Path) -> None:
    """Against timm's own reading of the folder, its own transform and the network that was saved."""
    network, made, more = VARIANTS[kind]
    model, folder = saved(tmp_path / "net", network, made, **more), tmp_path / "net"
    check_classifier(folder, "x")
    classifier, config = Classifier.load(str(folder)), json.loads((folder / "config.json").read_text())
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=config["pretrained_cfg"]))
    images = photographs((70, 90), (64, 64))
    with torch.no_grad():
        pixels = torch.stack([transform(image) for image in images])
        expected = model(pixels) / classifier.temperature
        assert torch.allclose(again(pixels) / classifier.temperature, expected, atol=1e-6)
        ours = classifier.logits(as_tensor(images[1]))
    assert torch.allclose(classifier.score(images), expected, atol=1e-6)
    assert torch.allclose(ours[0], expected[1], atol=0.05 * float(expected.std()) + 1e-3)
    assert classifier.labels == NAMES == read_labels(str(folder))
    assert classifier.temperature == config.get("temperature", 1.0)


WRONG: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "one channel": ("test_resnet", {"in_chans": 1}, {}, r"model_args\.in_chans: 1; images here have three channels"),
    "single logit": ("test_resnet", {"num_classes": 1}, {"model_config": {}}, "a head with a single logit|no classes"),
    "no head": ("test_resnet", {"num_classes": 0}, {}, "num_classes: 0, so it has no head"),
    "no pooling": ("test_resnet", {"global_pool": ""}, {}, r"gives \[1, \d.*\] for an image|cannot be loaded"),
    "no names": ("test_resnet", {}, {"model_config": {}}, "names no classes; add `label_names`"),
    "too few names": ("test_resnet", {}, {"model_config": {"label_names": NAMES[:2]}}, "num_classes: 3, but label"),
    "names with a gap": ("test_resnet", {}, {"model_config": {"label_names": {0: "a", 2: "b"}}}, "has no class 1"),
    "numbers as names": ("test_resnet", {}, {"model_config": {"label_names": ["LABEL_0", "b", "c"]}}, "'LABEL_0'"),
    "pickle alone": ("test_resnet", {}, {"safe_serialization": False}, r"pickled \(\.bin\).*save_for_hf"),
    "border": ("test_resnet", {}, {"data_config": {"crop_mode": "border"}}, "crop_mode 'border'"),
    "crop of no square": ("test_resnet", {}, {"data_config": {"input_size": (3, 64, 96)}}, "'center' at 64 x 96"),
    "lanczos": ("test_resnet", {}, {"data_config": {"interpolation": "lanczos"}}, "interpolation 'lanczos'"),
    "nearest": ("test_resnet", {}, {"data_config": {"interpolation": "nearest"}}, "interpolation 'nearest'"),
    "random": ("test_resnet", {}, {"data_config": {"interpolation": "random"}}, "interpolation 'random'"),
}  # fmt: skip
# Values of config.json that no network of timm's has.
CHANGED: dict[str, tuple[dict[str, Any], str]] = {
    "another checkpoint": (
        {"model_args": {"checkpoint_path": "/tmp/x.pt"}},
        r"model_args\.checkpoint_path: must not be set",
    ),
    "features": ({"model_args": {"features_only": True}}, r"model_args\.features_only: must not be set"),
    "a model of the hub": ({"architecture": "hf-hub:timm/resnet18.a1_in1k"}, "architecture: 'hf-hub:.*' is not a name"),
    "other classes": ({"model_args": {"num_classes": 4}}, "num_classes: 3, but 4 in model_args"),
    "odd mean": (
        {"pretrained_cfg": {"input_size": [3, 64, 64], "mean": [0.5]}},
        r"mean: \[0\.5\] is not three numbers",
    ),
    "no crop": ({"pretrained_cfg": {"crop_pct": 0}}, r"crop_pct: 0 is not a fraction of the edge above 0"),
    "no contrast": ({"pretrained_cfg": {"std": [0.5, 0.5, 0.0]}}, r"std: \[0\.5, 0\.5, 0\.0\] is not three numbers"),
    "odd shape": ({"pretrained_cfg": {"input_size": [64, 64]}}, r"input_size: \[64, 64\] is not \[3, height, width\]"),
    "grey shape": ({"pretrained_cfg": {"input_size": [1, 64, 64]}}, r"input_size: \[1, 64, 64\] has 1 channels"),
    "no object": ({"pretrained_cfg": []}, "pretrained_cfg and model_args in config.json are not objects"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_timm_can_save_and_is_not_scored_is_refused(kind: str, tmp_path: Path) -> None:
    """By the files, except where only the network shows it."""
    network, made, more, message = WRONG[kind]
    folder = tmp_path / "net"
    saved(folder, network, made, **more)
    with pytest.raises(JobError, match=message):
        if kind != "no pooling":
            check_classifier(folder, "x")
        Classifier.load(str(folder))


@pytest.mark.parametrize("kind", CHANGED)
def test_a_configuration_with_other_files_or_shapes_is_refused(kind: str, tmp_path: Path) -> None:
    changes, message = CHANGED[kind]
    saved(tmp_path, "test_resnet")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(JobError, match=message):
        check_classifier(tmp_path, "x")


def test_images_of_any_shape_are_cut_as_timm_cuts_them(tmp_path: Path) -> None:
    """A margin of an odd number of pixels is rounded as torchvision rounds it."""
    saved(tmp_path, "test_resnet", data_config={"input_size": (3, 48, 48), "crop_pct": 0.7})
    config = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    classifier, transform = (
        Classifier.load(str(tmp_path)),
        timm.data.create_transform(**timm.data.resolve_data_config(config)),
    )
    for size in ((33, 47), (101, 64), (48, 48)):
        [image] = photographs(size)
        exact = classifier._preprocessing.of_images([image])
        assert torch.equal(exact[0], transform(image)) and isinstance(image, PIL.Image.Image)
        assert np.abs((classifier._preprocessing.of_tensor(as_tensor(image)) - exact).numpy()).mean() < 0.02


def test_values_of_a_wrong_kind_are_refused_or_read(tmp_path: Path) -> None:
    """Every key with values that nobody writes, with names of classes and without: never a traceback."""
    saved(tmp_path / "net", "test_resnet")
    path = tmp_path / "net" / "config.json"
    named = json.loads(path.read_text())
    for config in (named, {key: value for key, value in named.items() if key != "label_names"}):
        places = [(key,) for key in config] + [("pretrained_cfg", inner) for inner in config["pretrained_cfg"]]
        for place in places:
            for value in (None, "x", -1, 1.5, 10**400, [], [None], {}, True):
                inner = config["pretrained_cfg"] | {place[-1]: value} if place[1:] else value
                path.write_text(json.dumps(config | {place[0]: inner}))
                with contextlib.suppress(JobError):
                    check_classifier(tmp_path / "net", "x")


def test_a_single_logit_without_names_is_refused_with_its_remedy(tmp_path: Path) -> None:
    saved(tmp_path / "net", "test_resnet", {"num_classes": 1}, model_config={})
    with pytest.raises(JobError, match=r"num_classes: .*read as the two logits \[0, z\] once both classes have a name"):
        check_classifier(tmp_path / "net", "x")


def test_a_folder_of_timm_without_timm_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is loaded."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "timm" else find_spec(name, *rest)
    )
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18", "pretrained_cfg": {}}))
    with pytest.raises(JobError, match=r"install riskforge\[timm\]"):
        check_addresses(read_job(write(job_of(str(tmp_path), tmp_path), tmp_path), []))


@pytest.mark.parametrize("mode", ["center", "squash"])
def test_a_folder_of_timm_gives_timms_logits(mode: str, tmp_path: Path) -> None:
    """timm's own transform and network on the same images, and the tensor path compared with them."""
    import timm

    torch.manual_seed(0)
    network = timm.create_model("resnet10t", num_classes=10).eval()
    config = {"input_size": [3, 64, 64], "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": mode,
              "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3], "num_classes": 10}  # fmt: skip
    save_file(network.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    saved_config = {"architecture": "resnet10t", "num_classes": 10, "label_names": DIGITS, "pretrained_cfg": config}
    (tmp_path / "config.json").write_text(json.dumps(saved_config | {"temperature": 2.0}))
    transform = timm.data.create_transform(**timm.data.resolve_data_config(config))
    classifier = Classifier.load(str(tmp_path))
    inputs = images(3, 101)
    with torch.no_grad():
        expected = network(torch.stack([transform(image) for image in inputs])) / 2.0
    assert classifier.labels == DIGITS == read_labels(str(tmp_path))
    assert torch.allclose(classifier.score(inputs), expected, atol=1e-4)
    tensors = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255 for image in inputs])
    assert torch.allclose(classifier.logits(tensors), expected, atol=0.02 * float(expected.abs().max()))
    assert plan_job(read_job(write(job_of(str(tmp_path), tmp_path), tmp_path), [])).num_samples == 2
