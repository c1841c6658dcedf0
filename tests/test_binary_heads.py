"""Heads with one logit, and class names from a file: what is scored, what is said of it, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from engine.commands import jobs
from engine.driver.checks import describe_models
from engine.errors import JobError
from engine.models.addresses import resolve
from engine.models.calibration import model_notes
from engine.models.classifier import Classifier
from engine.models.classifier_checks import check_classifier
from engine.models.digests import model_digest, model_digests
from engine.models.job_checks import check_addresses
from engine.models.labels import read_labels
from engine.models.preprocessing import Preprocessing
from engine.models.trainable import load_trainable
from tests.model_cases import NAMES, ZOO, as_tensor, copied, job_of, photographs

PAIR = ["other digit", "three"]
SETTINGS: dict[str, Any] = {"labels": PAIR, "image_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3, "output": "logit"}
IMAGES = photographs((32, 32), (40, 48), (64, 50))


class Net(torch.nn.Module):
    def __init__(self, columns: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head, self.columns = torch.nn.Linear(3, 1), columns

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        logit = 30 * self.head(pixels.mean((2, 3)))
        return logit if self.columns else logit[:, 0]


def one_logit(folder: Path, **changes: Any) -> Path:
    """A copy of the zoo's classifier whose head has the row of one class."""
    labels: dict[str, Any] = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "temperature": None}
    copied(ZOO["target"], folder, **(labels | changes))
    weights = load_file(folder / "model.safetensors")
    weights = {
        name: one[3:4].contiguous() if len(one.shape) and len(one) == 10 else one for name, one in weights.items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def named(folder: Path, names: list[str] = PAIR, file: str = "class_names.txt") -> Path:
    (folder / file).write_text(json.dumps(names) if file.endswith("json") else "\n".join(names) + "\n")
    return folder


def check_scores(classifier: Classifier, z: torch.Tensor) -> None:
    """Probabilities are sigmoid(z) and 1 - sigmoid(z), on both paths; gradients reach the image."""
    scored = classifier.score(IMAGES)
    torch.testing.assert_close(scored, torch.stack([torch.zeros_like(z), z], 1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scored.softmax(1)[:, 1], z.sigmoid(), atol=1e-5, rtol=0)
    image = as_tensor(IMAGES[0]).requires_grad_(True)
    logits = classifier.logits(image)
    torch.testing.assert_close(logits[0, 1], z[0], atol=0.05, rtol=0.05)
    assert torch.autograd.grad(logits[0, 1], image)[0].abs().max() > 0 and classifier.labels == PAIR


@pytest.mark.parametrize("kind", [None, "single_label_classification", "multi_label_classification"])
def test_one_logit_of_transformers(tmp_path: Path, kind: str | None) -> None:
    """As plain transformers gives it, whose sigmoid is the probability of the second class."""
    folder = named(one_logit(tmp_path / "net", problem_type=kind))
    check_classifier(folder, str(folder))
    # As plain transformers, version 5, refuses to load a single label of one class.
    plain = AutoModelForImageClassification.from_pretrained(one_logit(tmp_path / "plain")).eval()
    with torch.no_grad():
        z = plain(pixel_values=Preprocessing.load(folder).of_images(IMAGES)).logits[:, 0]
    check_scores(Classifier.load(str(folder)), z)


def test_one_logit_of_timm(tmp_path: Path) -> None:
    """The names are `label_names`, or those of a file."""
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=1).eval()
    for names in ({"label_names": PAIR}, {}):
        folder = tmp_path / f"net{len(names)}"
        timm.models.save_for_hf(network, folder, safe_serialization=True, model_config=names)
        if not names:
            named(folder)
        classifier = Classifier.load(str(folder))
        with torch.no_grad():
            z = network(classifier.preprocess(IMAGES))[:, 0]
        check_scores(classifier, z)


@pytest.mark.parametrize("columns", [0, 1])
def test_one_logit_of_programs(tmp_path: Path, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of TorchScript, an export and a factory, as [B] or [B, 1]; the settings say that it is one."""
    network, rows = Net(columns).eval(), torch.zeros(2, 3, 32, 32)
    script, export = tmp_path / "script.pt", tmp_path / "export.pt2"
    torch.jit.save(torch.jit.trace(network, rows), script)
    torch.export.save(torch.export.export(network, (rows,), dynamic_shapes=({0: torch.export.Dim("b")},)), export)
    (tmp_path / f"binary_nets{columns}.py").write_text(
        f"import sys\nsys.path.append({str(Path.cwd())!r})\nfrom tests.test_binary_heads import Net, SETTINGS\n"
        f"def net{columns}():\n    return Net({columns}), SETTINGS | {{'labels': 'pair.txt'}}\n"
    )
    named(tmp_path, file="pair.txt")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for address in (str(script), str(export), f"binary_nets{columns}:net{columns}"):
        Path(f"{address}.json").write_text(json.dumps(SETTINGS))
        classifier = Classifier.load(address)
        with torch.no_grad():
            z = network(classifier.preprocess(IMAGES)).reshape(-1)
        check_scores(classifier, z)
        assert read_labels(address) == PAIR
    Path(f"{script}.json").write_text(json.dumps(SETTINGS | {"output": "logits"}))
    with pytest.raises(JobError, match=r'a single logit z of two classes, .* set "output": "logit"'):
        Classifier.load(str(script))
    Path(f"{script}.json").write_text(json.dumps(SETTINGS | {"labels": NAMES}))
    with pytest.raises(JobError, match="'logit' is of two classes, and labels has 10; name both"):
        read_labels(str(script))


def test_what_is_done_with_one_logit_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By `plan`, in the manifest, and in what card and report say of the target."""
    job = job_of(target=str(named(one_logit(tmp_path / "net"))), transfer=[], oracle=None)
    text = "its one logit z is read as the logits [0, z] of 'other digit' and 'three'"
    jobs._print_target(job, jobs._described_target(job))
    assert f"{job.models.target}: {text}" in capsys.readouterr().out
    described = describe_models(job, model_digests(job), PAIR)["target"]
    assert described["head"] == text == jobs._described_target(job)["head"] and text in model_notes(described)
    assert "head" not in describe_models(job_of(), model_digests(job_of()), NAMES)["target"]


def test_a_network_with_one_logit_is_fine_tuned_as_one(tmp_path: Path) -> None:
    """Stored with its names, the result is a target that scores as the trained network does."""
    trained = load_trainable(str(named(one_logit(tmp_path / "net"))), "cpu")
    pixels = trained.preprocessing.of_images(IMAGES)
    loss = torch.nn.functional.cross_entropy(trained.network(pixels), torch.tensor([1, 0, 1]))
    loss.backward()
    trained.store(trained.network, tmp_path / "stored", 2.0)
    stored = Classifier.load(str(tmp_path / "stored"))
    torch.testing.assert_close(stored.score(IMAGES), trained.network(pixels).detach() / 2, atol=1e-5, rtol=1e-5)
    assert stored.labels == PAIR


@pytest.mark.parametrize("file", ["class_names.txt", "class_names.json"])
def test_names_of_a_file_replace_those_of_the_configuration(tmp_path: Path, file: str) -> None:
    """Of a folder whose own are LABEL_0 to LABEL_9; they are part of its digest."""
    numbered = {str(index): f"LABEL_{index}" for index in range(10)}
    folder = copied(ZOO["target"], tmp_path / "net", id2label=numbered, label2id=None)
    with pytest.raises(JobError, match=r"class 0 is called 'LABEL_0', a number.* put a file class_names\.txt into"):
        check_classifier(folder, str(folder))
    before = model_digest(str(folder))
    named(folder, NAMES, file)
    check_classifier(folder, str(folder))
    assert Classifier.load(str(folder)).labels == NAMES == read_labels(str(folder))
    after = model_digest(str(folder))
    named(folder, NAMES[::-1], file)
    assert len({before, after, model_digest(str(folder))}) == 3
    torch.testing.assert_close(Classifier.load(str(folder)).score(IMAGES), Classifier.load(ZOO["target"]).score(IMAGES))


def test_names_of_timm_and_of_settings(tmp_path: Path) -> None:
    """A network of timm without names; a program whose settings name a file, which its digest depends on."""
    folder = tmp_path / "timm"
    timm.models.save_for_hf(timm.create_model("test_resnet", num_classes=10), folder, safe_serialization=True)
    assert read_labels(str(named(folder, NAMES))) == NAMES and len(Classifier.load(str(folder)).score(IMAGES)[0]) == 10
    script, digests = tmp_path / "net.pt", set()
    torch.jit.save(torch.jit.trace(Net().eval(), torch.zeros(2, 3, 32, 32)), script)
    Path(f"{script}.json").write_text(json.dumps(SETTINGS | {"labels": "names/pair.json"}))
    (tmp_path / "names").mkdir()
    for names in (PAIR, PAIR[::-1]):
        named(tmp_path / "names", names, "pair.json")
        assert read_labels(str(script)) == names
        digests.add(model_digest(str(script)))
    assert len(digests) == 2
    shutil.rmtree(tmp_path / "names")
    with pytest.raises(JobError, match=r"labels: there is no file 'names/pair\.json' in '.*'; give its path"):
        read_labels(str(script))


WRONG_NAMES: list[tuple[str, bytes, str]] = [
    ("class_names.txt", b"\n".join(name.encode() for name in NAMES[:9]), r"names 9 classes, and '.*' has 10 logits"),
    ("class_names.txt", b"\n".join(name.encode() for name in [*NAMES, "ten"]), r"names 11 classes, and .* 10 logits"),
    ("class_names.txt", b"a\n\nb", r"class_names\.txt': class 1 has no name"),
    ("class_names.txt", b"LABEL_0\nLABEL_1", "class 0 is called 'LABEL_0'"),
    ("class_names.txt", b"\xff\xfe\x00", "cannot be read as class names: it is not UTF-8 text; save it as UTF-8"),
    ("class_names.txt", "a\nb".encode("utf-16"), "is not UTF-8 text; save it as UTF-8"),
    ("class_names.txt", b"a\nb\x1b[31m", r"the name of class 1, 'b\\x1b\[31m', has the character '\\x1b', which"),
    ("class_names.json", rb'["a", "b\nc"]', r"the name of class 1, 'b\\nc', has the character '\\n'"),
    ("class_names.txt", b"one", "does not hold two class names or more"),
    ("class_names.json", b"{", r"cannot be read as class names: it is not JSON .*; give a list of names"),
    ("class_names.json", b"[" + b"1" * 5000 + b"]", "a number in it is too long.*; give a list of names"),
    ("class_names.json", b'{"' + b"1" * 5000 + b'": "a", "0": "b"}', "has no class 1; number the 2 classes"),
    ("class_names.json", b"3", "does not hold two class names or more"),
    ("class_names.json", b'{"0": "a", "2": "b"}', "has no class 1"),
]


@pytest.mark.parametrize(("file", "content", "message"), WRONG_NAMES)
def test_wrong_names_are_refused_before_a_worker_starts(
    tmp_path: Path, file: str, content: bytes, message: str
) -> None:
    """With the file and what the network has."""
    folder = copied(ZOO["target"], tmp_path / "net")
    (folder / file).write_bytes(content)
    with pytest.raises(JobError, match=message) as caught:
        check_addresses(job_of(target=str(folder)))
    assert str(caught.value).startswith("models.target: ")


def test_one_logit_without_two_names_or_of_regression_is_refused(tmp_path: Path) -> None:
    """A regression has no classes; three names are one too many; two files contradict each other."""
    folder = one_logit(tmp_path / "net", problem_type="regression")
    with pytest.raises(JobError, match=r"id2label in config\.json has one class: a head with a single logit"):
        check_classifier(folder, str(folder))
    named(folder)
    with pytest.raises(JobError, match="problem_type: 'regression' is not a classification"):
        check_classifier(folder, str(folder))
    named(folder, ["a cat", "a dog", "a cow"])
    with pytest.raises(
        JobError, match=r"names 3 classes, and '.*' has one logit, which needs the names of two classes"
    ):
        check_classifier(folder, str(folder))
    (folder / "class_names.json").mkdir()
    with pytest.raises(JobError, match=r"class_names\.json' is not a file; put the class names into a file"):
        check_classifier(folder, str(folder))
    (folder / "class_names.json").rmdir()
    named(folder, file="class_names.json")
    with pytest.raises(JobError, match=r"has class_names\.txt and class_names\.json; keep one of them"):
        check_classifier(folder, str(folder))
    assert resolve(ZOO["target"]).is_dir()
