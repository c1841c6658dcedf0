"""Classifiers that are programs: files of TorchScript and torch.export, and factories."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn

from engine.commands.jobfile import read_job
from engine.data.stores.opening import open_store
from engine.errors import JobError
from engine.models import factories, program_description
from engine.models.classifier import Classifier
from engine.models.digests import model_digest
from engine.models.job_checks import check_addresses
from engine.models.labels import read_labels
from engine.models.program_loading import open_program
from engine.models.program_settings import parse_settings
from engine.models.program_trial import _probability_problem
from engine.models.trainability import training_line, untrainable
from engine.models.training_trial import trainable_parameters, training_problem
from engine.studies.samples import StudiedRun, check_target
from tests.conftest import REPOSITORY
from tests.program_cases import DIGITS, FACTORY, SETTINGS, images, job_of, riskforge, write


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
    monkeypatch.setattr(program_description, "_KNOWN", {})
    monkeypatch.setattr(factories, "_FOLDERS", [])
    monkeypatch.setattr(sys, "path", [*sys.path])
    factories.add_import_folders([str(home)])
    return home


def addresses(home: Path) -> dict[str, str]:
    return {"script": str(home / "net.pt"), "export": str(home / "net.pt2"), "factory": "digit_nets:net"}


@pytest.mark.parametrize("kind", ["script", "export", "factory"])
def test_every_kind_gives_the_networks_logits(kind: str, importable: Path, network: nn.Module) -> None:
    """Labels, size, mean, std and temperature are applied: against the plain network on the plainly made input."""
    address = addresses(importable)[kind]
    classifier = Classifier.load(address)
    pixels = [np.asarray(image.resize((32, 32), PIL.Image.Resampling.BILINEAR)) / 255.0 for image in images(5)]
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
    assert not any(parameter.requires_grad for parameter in classifier._network.parameters())  # type: ignore[attr-defined]


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
    # Python takes kept bytecode for current where a file's second and size are the same.
    for change in ("seed=66", "seed=5"):
        (home / "digit_nets.py").write_text(FACTORY.replace("seed=5", change))
        asked.append(digest_in_a_new_process("digit_nets:net", home))
    assert asked[0] == asked[2] != asked[1]


def digest_in_a_new_process(address: str, folder: Path) -> str:
    code = f"from engine.models.digests import model_digest; print(model_digest({address!r}))"
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
        name = next(member for member in archive.namelist() if member.endswith("model_weights_config.json"))
        config = json.loads(archive.read(name))
    next(iter(config["config"].values()))["use_pickle"] = True
    replaced(home / "net.pt2", tmp_path / "weights.pt2", "model_weights_config.json", json.dumps(config).encode())
    for name, message in {
        "model.pt": "is a pickle",
        "old.th": "not of TorchScript or torch.export",
        "inputs.pt2": "cannot be loaded as an exported program",
        "script.pt": "cannot be loaded as a TorchScript module",
        "weights.pt2": "holds pickled objects",
    }.items():
        with pytest.raises(JobError, match=message):
            Classifier.load(str(tmp_path / name))
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists(), "the trap works"


def test_missing_or_wrong_settings_are_refused_with_an_example(home: Path, tmp_path: Path) -> None:
    """All wrong fields at once, each with an example."""
    path = tmp_path / "net.pt"
    path.write_bytes((home / "net.pt").read_bytes())
    with pytest.raises(JobError, match=r"put a file 'net\.pt\.json' next to it, such as .*\"labels\""):
        program_description.check_program(str(path))
    wrong = {"labels": ["one"], "image_size": 0, "mean": [0, 0, 0], "output": "probabilities", "colour": 1}
    (tmp_path / "net.pt.json").write_text(json.dumps(wrong))
    with pytest.raises(JobError) as caught:
        program_description.check_program(str(path))
    fields = {problem.split(": ")[1] for problem in caught.value.problems}
    assert fields == {"labels", "image_size", "std", "output", "colour"}


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


def test_a_model_of_the_job_that_is_no_classifier_is_never_called(importable: Path, tmp_path: Path) -> None:
    """A factory is for classifiers; as diffusion model it is an address like any other that is not there."""
    raw = job_of("zoo:digits/classifier", tmp_path)
    raw["models"]["clip"] = "digit_nets:net"
    with pytest.raises(JobError, match=r"models\.clip: 'digit_nets:net' is neither a folder"):
        check_addresses(read_job(write(raw, tmp_path), []))


@pytest.mark.parametrize(("name", "what"), [("net.pt", "a TorchScript file"), ("net.pt2", "a torch.export file")])
def test_fine_tuning_refuses_files_and_says_what_to_do(name: str, what: str, home: Path, tmp_path: Path) -> None:
    """In the plan, and by `retrain` before anything is read; a network without gradients by its reason."""
    path = write(job_of(str(home / name), tmp_path), tmp_path)
    job, command = read_job(path, []), f"riskforge export {tmp_path / 'run'} --format imagefolder --output"
    store = open_store(str(tmp_path / "run"))
    run = StudiedRun(store=store, job=job, plan_digest="", target_digest="", commits=())
    with pytest.raises(JobError, match=f"is {what}, which cannot be fine-tuned.*{command}"):
        check_target(run)
    line = training_line(job.models.target, job.output.uri)
    assert line.startswith(f"retrain: not {what}; ") and command in line and untrainable("zoo:digits/classifier") == ""


def test_only_networks_with_gradients_are_trainable() -> None:
    """Frozen ones are trained as a whole; a state that safetensors cannot hold, or no gradient, is named."""

    class Detached(nn.Linear):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return super().forward(pixels.flatten(1))

    class Stateful(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"steps": 3}

    settings = parse_settings(SETTINGS | {"image_size": 4}, "")
    plain = nn.Sequential(nn.Flatten(), nn.Linear(48, 10)).requires_grad_(False)
    assert training_problem(plain, settings) == "" and len(trainable_parameters(plain)) == 2
    plain[1].bias.requires_grad_(True)
    assert trainable_parameters(plain) == [plain[1].bias]
    assert "no gradient" in training_problem(Detached(48, 10), settings)
    assert "something else than tensors" in training_problem(nn.Sequential(nn.Flatten(), Stateful(48, 10)), settings)
    assert "without parameters" in training_problem(nn.Flatten(), settings)


@pytest.mark.slow
def test_a_run_with_a_factory_next_to_the_job(home: Path, tmp_path: Path, call: Any) -> None:
    """The command from elsewhere; the manifest has the labels; changed weights are refused."""
    folder = tmp_path / "jobs"
    folder.mkdir()
    # A file that the factory opens is next to it too, and so is the folder that `verify` finds it in.
    (folder / "own_nets.py").write_text(FACTORY.replace("seed=5", "seed=int(open('seed.txt').read())"))
    (folder / "seed.txt").write_text("5")
    kept = {"RISKFORGE_CACHE": str(tmp_path / "cache")}
    raw = job_of("own_nets:net", tmp_path)
    raw["models"] |= {"transfer": [str(home / "net.pt2")], "oracle": str(home / "net.pt")}
    path = write(raw, folder)
    riskforge("run", path, "--executor", "local", folder=tmp_path, **kept)
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest["models"]["target"]["labels"] == DIGITS and manifest["counts"]["samples"]["ok"] == 2
    assert call("report", tmp_path / "run")[0] == 0
    # The three kinds score again what they scored.
    assert "no damage" in riskforge("verify", "--deep", tmp_path / "run", folder=home, **kept).stdout
    done = riskforge("verify", "--deep", tmp_path / "run", folder=home, code=2)
    assert "there is no module 'own_nets'" in done.stderr
    (folder / "seed.txt").write_text("6")
    done = riskforge("run", path, "--executor", "local", folder=tmp_path, code=2, **kept)
    assert "models.target:" in done.stderr and "->" in done.stderr
    done = riskforge("verify", "--deep", tmp_path / "run", folder=home, code=2, **kept)
    assert "models.target" in done.stderr and "not the model that scored this run" in done.stderr


# Others' networks -----------------------------------------------------------------------------------------------------

DATA = os.environ.get("RISKFORGE_DATA", "")
needs_data = pytest.mark.skipif(not (DATA and Path(DATA, "classifiers").is_dir()), reason="RISKFORGE_DATA is not set")


@needs_data
def test_cifar_resnets_are_what_was_published(tmp_path: Path) -> None:
    """Both forms give equal logits; accuracy on 5,000 test images within a point: normalisation or padding that is off
    costs more."""
    from tools.targets import cifar_resnets

    photographs, _ = cifar_resnets.test_images()
    for name in cifar_resnets.WEIGHTS:
        script = Classifier.load(str(cifar_resnets.convert(name, tmp_path)))
        factory = Classifier.load(f"tools.targets.cifar_resnets:{name}")
        assert torch.allclose(script.score(photographs[:32]), factory.score(photographs[:32]), atol=1e-4)
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


def test_a_single_logit_of_a_file_is_refused_with_its_remedy(tmp_path: Path) -> None:
    """As a column, and without one."""
    for name, layers in (
        ("column", [torch.nn.Linear(192, 1)]),
        ("flat", [torch.nn.Linear(192, 1), torch.nn.Flatten(0)]),
    ):
        path = tmp_path / f"{name}.pt"
        net = torch.nn.Sequential(torch.nn.Flatten(), *layers).eval()
        torch.jit.trace(net, torch.zeros(2, 3, 8, 8)).save(str(path))
        Path(f"{path}.json").write_text(json.dumps(SETTINGS | {"labels": ["cat", "dog"], "image_size": 8}))
        with pytest.raises(JobError, match=r'two classes, which is the pair of logits \[0, z\]: set "output": "logit"'):
            open_program(str(path), "cpu")


@pytest.mark.parametrize(
    ("output", "kind"),
    [
        ([[0.2, 0.8], [0.5, 0.5]], "probabilities; return logits"),
        ([[0.2, 0.9], [0.9, 0.9]], "probabilities of independent classes"),
        ([[-0.1, 0.9]], None),
        ([[0.1, 1.1]], None),
        ([[float("nan"), 0.5]], None),
    ],
)
def test_probabilities_are_told_from_logits_by_both_bounds(output: list[list[float]], kind: str | None) -> None:
    """A value below zero or above one is no probability; outputs that are not finite say nothing."""
    problem = _probability_problem(torch.tensor(output))
    assert problem is None if kind is None else problem is not None and kind in problem
