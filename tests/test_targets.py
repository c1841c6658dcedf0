"""Targets that are no transformers folder: files of TorchScript and torch.export, factories, folders of timm."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from torch import nn

from engine.commands.jobfile import read_job
from engine.driver.checks import plan_job
from engine.errors import JobError
from engine.models import targets
from engine.models.addresses import check_addresses, model_digest, read_labels
from engine.models.classifier import Classifier
from engine.models.preprocess import Preprocessing, Steps
from engine.studies.samples import StudiedRun, check_target
from tests.conftest import REPOSITORY

DIGITS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
]  # fmt: skip
SETTINGS: dict[str, Any] = {
    "labels": DIGITS,
    "image_size": 32,
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.25, 0.3],
    "temperature": 2.0,
}
FACTORY = """
import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(8)
        self.head = torch.nn.Linear(8, 10)

    def forward(self, pixels):
        return self.head(torch.relu(self.norm(self.convolution(pixels))).mean((2, 3)))


SETTINGS = dict(
    labels="zero one two three four five six seven eight nine".split(), image_size=32, mean=[0.5, 0.4, 0.3],
    std=[0.2, 0.25, 0.3], temperature=2.0,
)


def net(seed=5):
    torch.manual_seed(seed)
    return Net(), SETTINGS
"""


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """The network of the factory, in evaluation mode."""
    space: dict[str, Any] = {}
    exec(FACTORY, space)
    # Classes of `exec` have no source, which TorchScript needs; they are traced.
    return space["net"]()[0].eval()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def home(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same network as TorchScript, as an export, and as a factory."""
    folder = tmp_path_factory.mktemp("targets")
    example = torch.zeros(2, 3, 32, 32)
    torch.jit.trace(network, example).save(str(folder / "net.pt"))
    shapes = ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(network, (example,), dynamic_shapes=shapes), folder / "net.pt2")
    for name in ("net.pt", "net.pt2"):
        (folder / f"{name}.json").write_text(json.dumps(SETTINGS))
    (folder / "digit_nets.py").write_text(FACTORY)
    return folder


@pytest.fixture
def importable(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, from which factories can be imported; forgotten afterwards."""
    monkeypatch.setattr(targets, "_KNOWN", {})
    monkeypatch.setattr(targets, "_FOLDERS", [])
    monkeypatch.setattr(sys, "path", [*sys.path])
    targets.add_import_folders([str(home)])
    return home


def images(count: int, size: int = 48) -> list[PIL.Image.Image]:
    """Smooth colour images, as photographs are."""
    noise = np.random.default_rng(3).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return [PIL.Image.fromarray(one).resize((size, size), PIL.Image.Resampling.BICUBIC) for one in noise]


def addresses(home: Path) -> dict[str, str]:
    return {"script": str(home / "net.pt"), "export": str(home / "net.pt2"), "factory": "digit_nets:net"}


@pytest.mark.parametrize("kind", ["script", "export", "factory"])
def test_every_kind_gives_the_networks_logits(kind: str, importable: Path, network: nn.Module) -> None:
    """Labels, size, mean, std and temperature are applied: against the plain network on the plainly made input."""
    address = addresses(importable)[kind]
    classifier = Classifier.load(address)
    pixels = [np.asarray(one.resize((32, 32), PIL.Image.Resampling.BILINEAR)) / 255.0 for one in images(5)]
    batch = (torch.tensor(np.stack(pixels)).float() - torch.tensor(SETTINGS["mean"])) / torch.tensor(SETTINGS["std"])
    with torch.no_grad():
        expected = network(batch.permute(0, 3, 1, 2)) / 2.0
    assert torch.allclose(classifier.score(images(5)), expected, atol=1e-5)
    assert classifier.labels == DIGITS == read_labels(address) and classifier.name == address


@pytest.mark.parametrize("kind", ["script", "export", "factory"])
def test_every_kind_is_differentiable_and_frozen(kind: str, importable: Path) -> None:
    """Guidance needs the gradient of every pixel, and no gradient of a parameter."""
    classifier = Classifier.load(addresses(importable)[kind])
    batch = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0)).requires_grad_()
    classifier.logits(batch)[:, 3].sum().backward()
    assert batch.grad is not None and (batch.grad != 0).float().mean() > 0.9
    assert not any(one.requires_grad for one in classifier._network.parameters())  # type: ignore[attr-defined]


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


def test_digests_follow_weights_and_settings(home: Path, tmp_path: Path, importable: Path) -> None:
    """A retrained network, or another temperature, is another target: resume must notice both."""
    weights, side = tmp_path / "net.pt", tmp_path / "net.pt.json"
    for path in (weights, side):
        path.write_bytes((home / path.name).read_bytes())
    before = model_digest(str(weights))
    assert before == model_digest(str(home / "net.pt"))
    side.write_text(json.dumps(SETTINGS | {"temperature": 3.0}))
    assert model_digest(str(weights)) != before
    asked = [model_digest("digit_nets:net")]
    for change in ("seed=6", "seed=5"):
        (home / "digit_nets.py").write_text(FACTORY.replace("seed=5", change))
        asked.append(digest_in_a_new_process("digit_nets:net", home))
    assert asked[0] == asked[2] != asked[1]


def digest_in_a_new_process(address: str, folder: Path) -> str:
    code = f"from engine.models.addresses import model_digest; print(model_digest({address!r}))"
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{folder}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def replaced(source: Path, target: Path, ending: str, data: bytes) -> None:
    """A copy of an archive with other bytes in one member."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        names = [name for name in old.namelist() if name.endswith(ending)]
        assert len(names) == 1
        for name in old.namelist():
            new.writestr(name, data if name in names else old.read(name))
    (target.with_name(f"{target.name}.json")).write_text(json.dumps(SETTINGS))


def test_nothing_is_unpickled(home: Path, tmp_path: Path) -> None:
    """Neither a pickled module, nor what torch.export would unpickle of itself, nor the pickle inside TorchScript."""
    mark = tmp_path / "mark"
    buffer = io.BytesIO()
    torch.save(Bomb(mark), buffer)
    (tmp_path / "model.pt").write_bytes(buffer.getvalue())
    (tmp_path / "old.th").write_bytes(pickle.dumps(Bomb(mark)))
    replaced(home / "net.pt2", tmp_path / "inputs.pt2", "sample_inputs/model.pt", buffer.getvalue())
    replaced(home / "net.pt", tmp_path / "script.pt", "/data.pkl", pickle.dumps(Bomb(mark)))
    with zipfile.ZipFile(home / "net.pt2") as archive:
        name = next(one for one in archive.namelist() if one.endswith("model_weights_config.json"))
        config = json.loads(archive.read(name))
    next(iter(config["config"].values()))["use_pickle"] = True
    replaced(home / "net.pt2", tmp_path / "weights.pt2", "model_weights_config.json", json.dumps(config).encode())
    for name, message in {
        "model.pt": "is a pickle",
        "old.th": "not one of TorchScript or torch.export",
        "inputs.pt2": "cannot be loaded as an exported program",
        "script.pt": "cannot be loaded as a TorchScript module",
        "weights.pt2": "holds pickled objects",
    }.items():
        with pytest.raises(JobError, match=message):
            Classifier.load(str(tmp_path / name))
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists(), "the trap works"


def test_a_file_without_settings_is_told_what_they_hold(home: Path, tmp_path: Path) -> None:
    """All wrong fields at once, each with an example."""
    path = tmp_path / "net.pt"
    path.write_bytes((home / "net.pt").read_bytes())
    with pytest.raises(JobError, match=r"put a file 'net\.pt\.json' beside it, such as .*\"labels\""):
        targets.check_foreign(str(path))
    wrong = {"labels": ["one"], "image_size": 0, "mean": [0, 0, 0], "output": "probabilities", "colour": 1}
    (tmp_path / "net.pt.json").write_text(json.dumps(wrong))
    with pytest.raises(JobError) as caught:
        targets.check_foreign(str(path))
    fields = {problem.split(": ")[1] for problem in caught.value.problems}
    assert fields == {"labels", "image_size", "std", "output", "colour"}


@pytest.mark.parametrize("shape", [(3, 9), (3, 11), (2, 10), (4, 10), (3,), (3, 10, 1), (30,)])
def test_logits_of_another_shape_are_refused_whenever_they_come(shape: tuple[int, ...]) -> None:
    """What is tried at loading are black images; a network may answer others otherwise."""
    steps = Steps(resize=None, crop=None, resample=PIL.Image.Resampling.BILINEAR, mean=[0.0] * 3, std=[1.0] * 3)
    of_shape = Classifier(
        lambda pixels: torch.zeros(shape),
        Preprocessing.plain("net", steps),
        name="net",
        labels=DIGITS,
        temperature=1.0,
        device="cpu",
    )
    with pytest.raises(JobError, match=r"'net' gives \[[0-9, ]+\] for 3 images where \[3, 10\] is expected"):
        of_shape.score(images(3))


def test_a_network_that_does_not_fit_its_settings_is_refused(network: nn.Module, tmp_path: Path) -> None:
    """Seen on black images before anything is sampled: columns, a fixed batch, probabilities."""

    def saved(module: nn.Module, name: str, **settings: Any) -> str:
        torch.jit.trace(module, torch.zeros(2, 3, 32, 32)).save(str(tmp_path / name))
        (tmp_path / f"{name}.json").write_text(json.dumps(SETTINGS | settings))
        return str(tmp_path / name)

    with pytest.raises(JobError, match=r"gives \[1, 10\] for 1 images where \[1, 2\] is expected"):
        Classifier.load(saved(network, "columns.pt", labels=["a", "b"]))
    with pytest.raises(JobError, match="gives probabilities"):
        Classifier.load(saved(nn.Sequential(network, nn.Softmax(1)), "softmax.pt"))
    path = tmp_path / "fixed.pt2"
    torch.export.save(torch.export.export(network, (torch.zeros(16, 3, 32, 32),)), path)
    (tmp_path / "fixed.pt2.json").write_text(json.dumps(SETTINGS))
    with pytest.raises(JobError, match="the size of a batch free"):
        Classifier.load(str(path))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (None, "there is no module 'broken'"),
        ("import nothing_of_that_name", "module 'broken' cannot be imported: ModuleNotFoundError"),
        ("1 / 0", r"cannot be imported: ZeroDivisionError: .*broken\.py, line 1"),
        ("def nett(): pass", "has no 'net'; did you mean 'nett'"),
        ("net = 3", "cannot be called"),
        ("def net():\n    raise OSError('no weights')", r"failed: OSError: no weights \(.*broken\.py, line 2"),
        ("def net(): return 3", "gave a int; return a pair"),
        ("from torch import nn\ndef net(): return nn.Linear(1, 1), {'labels': ['a', 'b']}", "image_size: field req"),
        (FACTORY.replace("torch.manual_seed(seed)", "torch.seed()"), "gives other weights"),
        (FACTORY.replace("image_size=32", "image_size=[32, 16]").replace(".mean((2, 3))", "[:, :, 0, 31]"), "fails on"),
    ],
)  # fmt: skip
def test_a_factory_that_fails_is_explained_in_a_line(
    code: str | None, message: str, importable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Field, value and remedy, with the place in the user's code in place of a traceback."""
    monkeypatch.setattr(sys, "modules", {name: one for name, one in sys.modules.items() if name != "broken"})
    importlib.invalidate_caches()
    targets.add_import_folders([str(tmp_path)])
    if code is not None:
        (tmp_path / "broken.py").write_text(code)
    raw = job_of("broken:net", tmp_path)
    with pytest.raises(JobError) as caught:
        check_addresses(read_job(write(raw, tmp_path), []))
    lines = caught.value.problems
    assert len(lines) >= 1 and all(line.startswith("models.target: 'broken:net'") for line in lines)
    assert any(re.search(message, line) for line in lines), lines


def job_of(target: str, home: Path) -> dict[str, Any]:
    """A small job against a target."""
    return {
        "name": "aimed",
        "models": {"diffusion": "zoo:digits/stable-diffusion", "clip": "zoo:digits/clip", "target": target},
        "requests": [{"name": "a", "method": "risky", "classes": ["three"], "count": 2}],
        "sampling": {"num_inference_steps": 2, "guidance_scale": 2.0},
        "output": {"uri": str(home / "run")},
        "runtime": {"device": "cpu"},
    }


def write(raw: dict[str, Any], folder: Path) -> Path:
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.mark.parametrize("address", ["mine:net", "a.b_1.c:make", "zoo:digits", "C:/x", "a:b:c", ":x", "a.:x", "1a:x"])
def test_what_is_a_factory(address: str) -> None:
    """A module's path and a name; neither a zoo part nor a path."""
    assert targets.is_factory(address) == (address in ("mine:net", "a.b_1.c:make"))


def test_a_model_of_the_job_that_is_no_classifier_is_never_called(importable: Path, tmp_path: Path) -> None:
    """A factory is for classifiers; as diffusion model it is an address like any other that is not there."""
    raw = job_of("zoo:digits/classifier", tmp_path)
    raw["models"]["clip"] = "digit_nets:net"
    with pytest.raises(JobError, match=r"models\.clip: 'digit_nets:net' is neither a folder"):
        check_addresses(read_job(write(raw, tmp_path), []))


def test_fine_tuning_refuses_what_it_cannot_store(importable: Path, tmp_path: Path) -> None:
    """Before a factory that a run's manifest names is called."""
    raw = job_of("os:abort", tmp_path)
    job = read_job(write(raw, tmp_path), [])
    run = StudiedRun(store=None, job=job, plan_digest="", target_digest="", commits=())  # type: ignore[arg-type]
    with pytest.raises(JobError, match="is a file or a factory"):
        check_target(run)


def test_a_run_against_a_factory_beside_the_job(home: Path, tmp_path: Path) -> None:
    """The command from elsewhere; the manifest has the labels; changed weights are refused."""
    folder = tmp_path / "jobs"
    folder.mkdir()
    (folder / "own_nets.py").write_text(FACTORY)
    raw = job_of("own_nets:net", tmp_path)
    raw["models"] |= {"transfer": [str(home / "net.pt2")], "oracle": str(home / "net.pt")}
    path = write(raw, folder)
    riskforge("run", path, "--executor", "local", folder=tmp_path)
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest["models"]["target"]["labels"] == DIGITS and manifest["counts"]["samples"]["ok"] == 2
    riskforge("report", tmp_path / "run", folder=tmp_path)
    # The three kinds score again what they scored; the factory is in the working folder here.
    assert "no damage" in riskforge("verify", "--deep", tmp_path / "run", folder=folder).stdout
    (folder / "own_nets.py").write_text(FACTORY.replace("seed=5", "seed=6"))
    done = riskforge("run", path, "--executor", "local", folder=tmp_path, code=2)
    assert "models.target:" in done.stderr and "->" in done.stderr
    done = riskforge("verify", "--deep", tmp_path / "run", folder=folder, code=2)
    assert "models.target" in done.stderr and "not the model that scored this run" in done.stderr


def riskforge(*arguments: Any, folder: Path, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command as a user gives it in a folder."""
    command = [str(Path(sys.executable).with_name("riskforge")), *map(str, arguments)]
    places = {"PYTHONPATH": os.environ["PYTHONPATH"]} if "PYTHONPATH" in os.environ else {}
    done = subprocess.run(
        command, cwd=folder, env=os.environ | places | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == code and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done


# Others' networks -----------------------------------------------------------------------------------------------------

DATA = os.environ.get("RISKFORGE_DATA", "")
needs_data = pytest.mark.skipif(not (DATA and Path(DATA, "classifiers").is_dir()), reason="RISKFORGE_DATA is not set")


@needs_data
def test_cifar_resnets_are_what_was_published(tmp_path: Path) -> None:
    """Both forms give equal logits; accuracy on 5,000 test images within a point: normalisation or padding that is off
    costs more."""
    from tools.targets import cifar_resnets

    found, _ = cifar_resnets.test_images()
    for name in cifar_resnets.WEIGHTS:
        script = Classifier.load(str(cifar_resnets.convert(name, tmp_path)))
        factory = Classifier.load(f"tools.targets.cifar_resnets:{name}")
        assert torch.allclose(script.score(found[:32]), factory.score(found[:32]), atol=1e-4)
    assert cifar_resnets.accuracy_percent("tools.targets.cifar_resnets:resnet20") == pytest.approx(91.73, abs=1.0)


@needs_data
def test_the_command_takes_a_cifar_resnet_from_the_root_of_the_repository(tmp_path: Path) -> None:
    """`tools.targets.cifar_resnets:resnet20` from there, without PYTHONPATH; and a tiny run with it."""
    raw = job_of("tools.targets.cifar_resnets:resnet20", tmp_path)
    raw["requests"][0]["classes"] = ["cat"]
    job = write(raw, tmp_path)
    assert "is valid" in riskforge("plan", job, "--validate", folder=REPOSITORY).stdout
    riskforge("run", job, "--executor", "local", folder=REPOSITORY)
    assert json.loads((tmp_path / "run/manifest.json").read_text())["models"]["target"]["labels"][3] == "cat"


def test_a_folder_of_timm_without_timm_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is loaded."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "timm" else found(name, *more))
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18", "pretrained_cfg": {}}))
    with pytest.raises(JobError, match=r"install riskforge\[timm\]"):
        check_addresses(read_job(write(job_of(str(tmp_path), tmp_path), tmp_path), []))


@pytest.mark.parametrize("mode", ["center", "squash"])
def test_a_folder_of_timm_gives_timms_logits(mode: str, tmp_path: Path) -> None:
    """timm's own transform and network on the same images, and the tensor path beside them."""
    import timm
    from safetensors.torch import save_file

    torch.manual_seed(0)
    network = timm.create_model("resnet10t", num_classes=10).eval()
    config = {"input_size": [3, 64, 64], "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": mode,
              "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3], "num_classes": 10}  # fmt: skip
    save_file(network.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    about = {"architecture": "resnet10t", "num_classes": 10, "label_names": DIGITS, "pretrained_cfg": config}
    (tmp_path / "config.json").write_text(json.dumps(about | {"temperature": 2.0}))
    transform = timm.data.create_transform(**timm.data.resolve_data_config(config))
    classifier = Classifier.load(str(tmp_path))
    found = images(3, 101)
    with torch.no_grad():
        expected = network(torch.stack([transform(one) for one in found])) / 2.0
    assert classifier.labels == DIGITS == read_labels(str(tmp_path))
    assert torch.allclose(classifier.score(found), expected, atol=1e-4)
    tensors = torch.stack([torch.from_numpy(np.array(one)).permute(2, 0, 1).float() / 255 for one in found])
    assert torch.allclose(classifier.logits(tensors), expected, atol=0.02 * float(expected.abs().max()))
    assert plan_job(read_job(write(job_of(str(tmp_path), tmp_path), tmp_path), [])).num_samples == 2
