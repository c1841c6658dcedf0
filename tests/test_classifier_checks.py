"""Folders of classifiers and CLIP models that would be scored wrongly: refused when the job is checked."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from engine.errors import EXIT_USER, JobError
from engine.job.parsing import parse_job
from engine.job.spec import ModelsSpec
from engine.models.addresses import resolve
from engine.models.class_name_checks import check_names
from engine.models.classifier import Classifier
from engine.models.classifier_checks import check_classifier
from engine.models.clip import Clip
from engine.models.clip_checks import check_clip
from engine.models.digests import model_digest
from engine.models.independence import check_independent
from engine.models.job_checks import check_addresses
from engine.models.labels import read_labels
from engine.models.program_loading import open_program
from engine.models.program_settings import parse_settings
from engine.models.stored_tensors import stored_tensors
from engine.models.weight_comparison import have_same_weights
from tests.test_targets import SETTINGS

ZOO = {role: f"zoo:digits/{part}" for role, part in {
    "diffusion": "stable-diffusion", "clip": "clip", "target": "classifier", "transfer": "classifier-b",
    "oracle": "oracle",
}.items()}  # fmt: skip
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def copied(address: str, folder: Path, name: str = "config.json", **changes: Any) -> Path:
    """A copy of a model of the zoo with other fields in a configuration; None takes one out."""
    shutil.copytree(resolve(address), folder)
    config = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


def job_of(**models: Any) -> Any:
    chosen: dict[str, Any] = ZOO | {"transfer": [ZOO["transfer"]]} | models
    request = {"name": "a", "method": "prompt", "classes": ["three"], "count": 1}
    return parse_job({"name": "job", "models": chosen, "requests": [request], "output": {"uri": "runs/x"}})


def labels(names: list[Any]) -> dict[str, Any]:
    return {"id2label": {str(index): name for index, name in enumerate(names)}, "label2id": None}


def indexed(*indices: int | str) -> dict[str, Any]:
    return {"id2label": {str(index): name for index, name in zip(indices, NAMES, strict=False)}, "label2id": None}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "multi-label": ({"problem_type": "multi_label_classification"}, "problem_type: its head is of independent classes"),
    "regression": ({"problem_type": "regression"}, "problem_type: 'regression' is not a classification"),
    "unknown head": ({"problem_type": "ranking"}, "problem_type: 'ranking' is not a classification"),
    "single logit": (labels(["digit"]), r"id2label in config\.json has one class: a head with a single logit"),
    "single logit by number": ({"num_labels": 1}, "num_labels: a head with a single logit z has no second class"),
    "default names": (labels([f"LABEL_{one}" for one in range(10)]), "class 0 is called 'LABEL_0', a number"),
    "a default name among others": (labels([*NAMES[:9], "LABEL_9"]), "class 9 is called 'LABEL_9'"),
    "numbered classes": (labels([f"class_{one}" for one in range(10)]), "class 0 is called 'class_0'"),
    "codes of WordNet": (labels([f"n0144076{one}" for one in range(10)]), "class 0 is called 'n01440760'"),
    "empty name": (labels(["", *NAMES[1:]]), "class 0 has no name"),
    "blank name": (labels([*NAMES[:9], " \t"]), "class 9 has no name"),
    "name of another type": (labels([*NAMES[:4], 4, *NAMES[5:]]), r"class 4 has no name \(4\)"),
    "no name at all": (labels([None, *NAMES[1:]]), r"class 0 has no name \(None\)"),
    "space at the end": (labels(["zero ", *NAMES[1:]]), "begins or ends with a space"),
    "one name for all": (labels(["digit"] * 10), "all classes are called 'digit'"),
    "gap": (indexed(0, 1, 2, 3, 4, 5, 6, 7, 8, 10), "has no class 9; number the 10 classes from 0"),
    "from one": (indexed(*range(1, 11)), "has no class 0"),
    "keys that are names": (indexed("a", "b"), "has no class 0"),
    "no names": ({"id2label": None}, "has no `id2label`"),
    "names in a list": ({"id2label": NAMES}, "has no `id2label`"),
    "other number": ({"num_labels": 12}, "num_labels: 12, but id2label has 10 classes"),
    "head of another size": (labels([*NAMES, "ten", "eleven"]), "no tensor of its weights has 12 rows"),
    "contradiction": ({"label2id": {"zero": 1, "one": 0}}, "label2id: 'zero' is class 1, .* class 0 in id2label"),
    "one channel": ({"num_channels": 1}, "num_channels: 1; images here have three channels"),
    "four channels": ({"vision_config": {"num_channels": 4}}, r"vision_config\.num_channels: 4"),
    "detector": ({"architectures": ["DetrForObjectDetection"]}, "is a DetrForObjectDetection; a network for image"),
    "segmentation": ({"architectures": ["SegformerForSemanticSegmentation"]}, "is a SegformerForSemanticSegmentation"),
    "text classifier": ({"architectures": ["BertForSequenceClassification"]}, "is a BertForSequenceClassification"),
    "backbone": ({"architectures": ["ResNetModel"]}, "is a ResNetModel; a network for image classification"),
    "video": ({"architectures": ["VideoMAEForVideoClassification"]}, "is a VideoMAEForVideoClassification"),
    "code of its own": ({"auto_map": {"AutoModelForImageClassification": "own.Net"}}, "auto_map: names code"),
    "quantised": ({"quantization_config": {"load_in_8bit": True}}, "quantization_config: quantised weights"),
    **{
        f"temperature {value!r}": ({"temperature": value}, "temperature .* is not a number from 1e-06")
        for value in (0, -1.0, 1e-40, 1e9, True, "1", float("nan"), float("inf"))
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_a_classifier_that_would_be_scored_wrongly_is_refused(kind: str, tmp_path: Path) -> None:
    """By its config.json alone, in every role, before a worker starts; and by whoever loads it."""
    changes, message = WRONG[kind]
    folder = copied(ZOO["target"], tmp_path / "net", **changes)
    for role in ("target", "transfer", "oracle"):
        models = {role: [str(folder)] if role == "transfer" else str(folder)}
        with pytest.raises(JobError, match=rf"models\.{role}(\.0)?: '{folder}'.*{message}"):
            check_addresses(job_of(**models))
    with pytest.raises(JobError, match=message):
        Classifier.load(str(folder))


@pytest.mark.parametrize("changes", [
    {"label2id": {"LABEL_0": 0, "LABEL_1": 1}}, {"label2id": {name: str(index) for index, name in enumerate(NAMES)}},
    {"problem_type": "single_label_classification"}, {"num_labels": 10}, {"architectures": None}, {"temperature": 2},
    labels([*NAMES[:8], "crane", "crane"]), labels([*NAMES[:8], "crane", "crane"]) | {"label2id": {"crane": 8}},
], ids=str)  # fmt: skip
def test_what_says_nothing_else_is_taken(changes: dict[str, Any], tmp_path: Path) -> None:
    """transformers' default beside names, numbers as text, ImageNet's two cranes."""
    folder = copied(ZOO["target"], tmp_path / "net", **changes)
    check_classifier(folder, "x")
    assert Classifier.load(str(folder)).labels == read_labels(str(folder))


STRANGE = (None, "x", -1, 0, 1.5, 10**400, [], [None], {}, {"x": 1}, True)
# What a file may have beside the keys of the zoo's.
MORE_KEYS = {
    "config.json": ("image_size", "num_channels", "num_labels", "vision_config", "auto_map", "temperature"),
    "preprocessor_config.json": ("size", "crop_size", "do_center_crop", "crop_pct", "rescale_factor", "image_std"),
    "tokenizer_config.json": (),
}


@pytest.mark.parametrize(("role", "file"), [
    ("target", "config.json"), ("target", "preprocessor_config.json"), ("clip", "config.json"),
    ("clip", "preprocessor_config.json"), ("clip", "tokenizer_config.json"),
])  # fmt: skip
def test_values_of_a_wrong_kind_are_refused_or_read(role: str, file: str, tmp_path: Path) -> None:
    """Every key with values that nobody writes: never a traceback."""
    folder = Path(shutil.copytree(resolve(ZOO[role]), tmp_path / "net"))
    config, check = json.loads((folder / file).read_text()), check_clip if role == "clip" else check_classifier
    places = [(key,) for key in (*config, *MORE_KEYS[file])]
    places += [(key, inner) for key, value in config.items() if isinstance(value, dict) for inner in value]
    for place in places:
        for value in STRANGE:
            changed = config | {place[0]: config[place[0]] | {place[1]: value} if place[1:] else value}
            (folder / file).write_text(json.dumps(changed))
            with contextlib.suppress(JobError):
                check(folder, "x")


@pytest.mark.parametrize("changes", [
    {"hidden_sizes": "x"}, {"depths": 3}, {"hidden_act": 3}, {"num_channels": 3, "embedding_size": "16"},
    {"layer_type": None}, {"hidden_act": "none"},
], ids=str)  # fmt: skip
def test_what_a_library_cannot_read_is_told_in_a_line(changes: dict[str, Any], tmp_path: Path) -> None:
    """Values that transformers alone knows to be wrong: of this model and field, at the latest when it is loaded."""
    folder = copied(ZOO["target"], tmp_path / "net", **{"layer_type": "basic"} | changes)
    with pytest.raises(JobError, match=r"net' cannot be loaded as a classifier \(") as caught:
        Classifier.load(str(folder))
    assert "\n" not in str(caught.value)


@given(
    st.lists(
        st.sampled_from(["cat", "two words", "", " ", "LABEL_3", "label 7", "n01440764", "3", 5, None]), min_size=2
    )
)
def test_names_are_refused_or_can_stand_in_a_prompt(names: list[Any]) -> None:
    """No mixture of good names hides a bad one."""
    good = {"cat", "two words", "3"}
    try:
        assert check_names(names, "here") == names and set(names) <= good and len(set(names)) > 1
    except JobError as error:
        assert str(error).startswith("here: ") and (not set(names) <= good or len(set(names)) == 1)


@pytest.mark.parametrize("names", [["a", ""], ["LABEL_0", "LABEL_1"], ["a", " b"], ["a", "a"]])
def test_settings_of_files_and_factories_name_their_classes_too(names: list[str]) -> None:
    """The same rule for labels that a side file gives."""
    with pytest.raises(JobError, match="labels: "):
        parse_settings(SETTINGS | {"labels": names}, "here")


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
        with pytest.raises(JobError, match=r"a single logit z of two classes is the pair of logits \[0, z\]"):
            open_program(str(path), "cpu")


# Files of weights ----------------------------------------------------------------------------------------------------


def as_bin(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def sharded(folder: Path, variant: str = "", dtype: torch.dtype | None = None) -> None:
    """Weights in two files with an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, index = sorted(weights), {}
    for number, part in enumerate((names[::2], names[1::2])):
        name = f"model{variant}-0000{number + 1}-of-00002.safetensors"
        chosen = {one: weights[one] if dtype is None else weights[one].to(dtype) for one in part}
        save_file(chosen, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(part, name)
    document = {"metadata": {}, "weight_map": index}
    (folder / f"model.safetensors.index{variant}.json").write_text(json.dumps(document))


def resaved(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], name: str = "model") -> Any:
    def rewrite(folder: Path) -> None:
        weights = change(load_file(folder / "model.safetensors"))
        (folder / "model.safetensors").unlink()
        save_file(weights, folder / f"{name}.safetensors", metadata={"format": "pt", "saved": "again"})

    return rewrite


def halved(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: one.half() if one.is_floating_point() else one for name, one in weights.items()}


def without(*parts: str) -> Any:
    """Leaves out the tensors that have one of some parts in their names."""
    return resaved(
        lambda weights: {name: one for name, one in weights.items() if not any(map(name.__contains__, parts))}
    )


def cast(dtype: torch.dtype) -> Any:
    return resaved(
        lambda weights: {name: one.to(dtype) if one.is_floating_point() else one for name, one in weights.items()}
    )


MISSING: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pickled": (as_bin, r"pickled \(\.bin\).*from_pretrained.*save_pretrained"),
    "none": (lambda folder: (folder / "model.safetensors").unlink(), "has no safetensors"),
    "torn": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"\x08" + bytes(7) + b"{}      "),
        "no tensor of its weights|has no text_projection",
    ),
    "cut": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9]),
        "shorter than its header requires",
    ),
    "shard gone": (
        lambda folder: (sharded(folder), (folder / "model-00002-of-00002.safetensors").unlink()),
        "names model-00002-of-00002",
    ),
    "no head": (without("classifier", "text_pro"), "has no head|has no text_projection"),
    "adapter": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "is an adapter"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MISSING)
@pytest.mark.parametrize("role", ["target", "clip"])
def test_weights_that_cannot_be_loaded_are_told_before_a_worker_starts(kind: str, role: str, tmp_path: Path) -> None:
    """With the command that converts them, where there is one."""
    folder = Path(shutil.copytree(resolve(ZOO[role]), tmp_path / "net"))
    change, message = MISSING[kind]
    change(folder)
    if (kind, role) == ("adapter", "clip"):
        return
    with pytest.raises(JobError, match=rf"models\.{role}: '{folder}'.*({message})"):
        check_addresses(job_of(**{role: str(folder)}))


LOADED: dict[str, Callable[[Path], Any]] = {
    "fp16 alone": resaved(halved, "model.fp16"),
    "fp16 in shards": lambda folder: sharded(folder, ".fp16"),
    "in shards": sharded,
    "saved again": resaved(lambda weights: dict(reversed(weights.items()))),
}  # fmt: skip


@pytest.mark.parametrize("kind", LOADED)
def test_weights_of_every_form_are_loaded(kind: str, tmp_path: Path) -> None:
    """Whole or in parts, plain or in half precision."""
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    net, clip = (Path(shutil.copytree(resolve(ZOO[role]), tmp_path / role)) for role in ("target", "clip"))
    for folder in (net, clip):
        LOADED[kind](folder)
    check_classifier(net, "x")
    check_clip(clip, "x")
    ours, plain = Classifier.load(str(net)).logits(images), Classifier.load(ZOO["target"]).logits(images)
    assert torch.allclose(ours, plain, atol=0.01 if "fp16" in kind else 0)
    texts, plain = Clip.load(str(clip)).text_embeds(["a"]), Clip.load(ZOO["clip"]).text_embeds(["a"])
    assert torch.allclose(texts, plain, atol=0.01 if "fp16" in kind else 0)


def test_another_precision_beside_the_weights_changes_no_digest(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(resolve(ZOO["target"]), tmp_path / "net"))
    before = model_digest(str(folder))
    shutil.copy(folder / "model.safetensors", folder / "model.fp16.safetensors")
    assert model_digest(str(folder)) == before == model_digest(ZOO["target"])


def test_a_network_without_all_of_its_weights_is_not_filled_by_chance(tmp_path: Path) -> None:
    """A layer that is missing, but for the head: only loading tells."""
    folder = Path(shutil.copytree(resolve(ZOO["target"]), tmp_path / "net"))
    without("encoder.stages.1")(folder)
    with pytest.raises(JobError, match=r"lack \d+ of the weights of a ResNetForImageClass.* drawn at random"):
        Classifier.load(str(folder))


CLIP_WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "classifier of CLIP": ("config.json", {"architectures": ["CLIPForImageClassification"]}, "a CLIP model is needed"),
    "image tower alone": (
        "config.json",
        {"architectures": ["CLIPVisionModelWithProjection"]},
        "a CLIP model is needed",
    ),
    "SigLIP": ("config.json", {"model_type": "siglip", "architectures": ["SiglipModel"]}, "a CLIP model is needed"),
    "channels": ("config.json", {"vision_config": {"num_channels": 1}}, r"vision_config\.num_channels: 1"),
    "tokens": ("tokenizer_config.json", {"tokenizer_class": "BertTokenizer"}, "tokenizer_class: 'BertTokenizer'"),
    "lanczos": ("preprocessor_config.json", {"resample": 1}, "resample: 1 .lanczos."),
    "size": (
        "preprocessor_config.json",
        {"size": {"height": 48, "width": 48}},
        "48 x 48 pixels, and the network takes 32",
    ),
}


@pytest.mark.parametrize("kind", CLIP_WRONG)
def test_a_clip_model_that_would_measure_wrongly_is_refused(kind: str, tmp_path: Path) -> None:
    """As guide and as judge."""
    name, changes, message = CLIP_WRONG[kind]
    folder = copied(ZOO["clip"], tmp_path / "clip", name, **changes)
    for role in ("clip", "judge"):
        with pytest.raises(JobError, match=rf"models\.{role}: '{folder}'.*{message}"):
            check_addresses(job_of(**{"clip": "zoo:cifar10/clip"} | {role: str(folder)}))


def test_the_command_refuses_before_a_worker_starts(tmp_path: Path, call: Any) -> None:
    """`plan --validate` and `run` alike: one line, code 2, nothing written."""
    folder = copied(ZOO["target"], tmp_path / "net", "preprocessor_config.json", resample=1)
    job = job_of(target=str(folder)).model_dump(mode="json", exclude_none=True)
    (tmp_path / "job.yaml").write_text(json.dumps(job | {"output": {"uri": str(tmp_path / "run")}}))
    for command in (("plan", "--validate"), ("run", "--executor", "local")):
        code, _, err = call(command[0], str(tmp_path / "job.yaml"), *command[1:])
        assert code == EXIT_USER and "resample: 1 (lanczos)" in err and "Traceback" not in err
    assert not (tmp_path / "run").exists()


# Models that are others ----------------------------------------------------------------------------------------------

SAME: dict[str, Callable[[Path], Any]] = {
    "copy": lambda folder: None,
    "another file beside": lambda folder: save_file({"a": torch.ones(3)}, folder / "other.safetensors"),
    "adapter beside": lambda folder: save_file({"a": torch.ones(3)}, folder / "adapter_model.safetensors"),
    "in shards": sharded,
    "in another precision": cast(torch.float32),
    "in bfloat16": cast(torch.bfloat16),
    "another precision beside": lambda folder: shutil.copy(
        folder / "model.safetensors", folder / "model.fp16.safetensors"
    ),
    "fp16 alone": LOADED["fp16 alone"],
    "other order and metadata": LOADED["saved again"],
    "other preprocessing": lambda folder: (folder / "preprocessor_config.json").write_text(
        (resolve(ZOO["clip"]) / "preprocessor_config.json").read_text().replace("0.5", "0.4")
    ),
    "tensors that are not loaded": resaved(lambda weights: weights | {"spare.weight": torch.rand(3, 3)}),
    "another scale of the logits": resaved(
        lambda weights: weights | ({"logit_scale": torch.tensor(1.0)} if "logit_scale" in weights else {})
    ),
    "other names": resaved(lambda weights: {f"net.{name}": one for name, one in weights.items()}),
}


@pytest.mark.parametrize("kind", SAME)
def test_the_weights_of_the_judged_are_found_in_every_form(kind: str, tmp_path: Path) -> None:
    """Judge and guide, oracle and target, transfer and target."""
    net, clip = (Path(shutil.copytree(resolve(ZOO[role]), tmp_path / role)) for role in ("target", "clip"))
    for folder in (net, clip):
        SAME[kind](folder)
    models: dict[str, Any] = {"oracle": str(net), "transfer": [str(net)]}
    expected = [r"models\.oracle: .* has the weights of models\.target", r"models\.transfer\.0: .* has the weights"]
    if kind != "other names":
        models["judge"] = str(clip)
        expected.insert(0, r"models\.judge: .* has the weights of models\.clip")
    with pytest.raises(JobError) as refused:
        check_independent(ModelsSpec.model_validate(ZOO | models))
    assert len(refused.value.problems) == len(expected)
    for problem, pattern in zip(refused.value.problems, expected, strict=True):
        assert re.match(pattern, problem)


def test_half_precisions_of_one_network_are_the_same(tmp_path: Path) -> None:
    """Neither is a rounding of the other."""
    weights = {"a.weight": torch.randn(40, 50), "a.bias": torch.randn(40)}
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        (tmp_path / str(dtype)).mkdir()
        save_file({name: one.to(dtype) for name, one in weights.items()}, tmp_path / str(dtype) / "model.safetensors")
    folders = sorted(tmp_path.iterdir())
    assert all(have_same_weights(one, other) for one in folders for other in folders)


OTHER: dict[str, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]] = {
    "a little training": lambda weights: {name: one.float() * (1 + 1e-2) for name, one in weights.items()},
    "another head": lambda weights: (
        weights | {name: one + 1 for name, one in weights.items() if "projection" in name or "classifier" in name}
    ),
}


@pytest.mark.parametrize("kind", OTHER)
def test_other_weights_are_others(kind: str, tmp_path: Path) -> None:
    """A network that was trained on, or of which a part is another's; and all that jobs of the zoo pair."""
    net, clip = (Path(shutil.copytree(resolve(ZOO[role]), tmp_path / role)) for role in ("target", "clip"))
    for folder in (net, clip):
        resaved(OTHER[kind])(folder)
    check_independent(
        ModelsSpec.model_validate(ZOO | {"oracle": str(net), "judge": str(clip), "transfer": [ZOO["oracle"]]})
    )
    assert len(stored_tensors(net)) == len(stored_tensors(resolve(ZOO["target"])))


@pytest.mark.parametrize("change", [
    lambda name, one: (name, one + 1 if name.startswith("text_") else one),
    lambda name, one: (f"clip.{name}", one),
], ids=["other texts", "longer names"])  # fmt: skip
def test_a_judge_that_shares_the_image_tower_is_no_other_model(change: Any, tmp_path: Path) -> None:
    """Whatever else is another's: what guided the images measures them."""
    clip = Path(shutil.copytree(resolve(ZOO["clip"]), tmp_path / "clip"))
    resaved(lambda weights: dict(change(name, one) for name, one in weights.items()))(clip)
    Clip.load(str(clip))
    with pytest.raises(JobError, match=r"models\.judge: .* has the weights of models\.clip"):
        check_independent(ModelsSpec.model_validate(ZOO | {"transfer": [], "judge": str(clip)}))


def test_an_archive_with_the_targets_weights_is_no_oracle(tmp_path: Path) -> None:
    """TorchScript of the same network."""
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(288, 10)).eval()
    paths = [tmp_path / name for name in ("a.pt", "b.pt")]
    for path in paths:
        torch.jit.trace(layers, torch.zeros(2, 3, 8, 8)).save(str(path))
    with pytest.raises(JobError, match=r"models\.oracle: .*b\.pt' has the weights of models\.target"):
        check_independent(
            ModelsSpec.model_validate(ZOO | {"transfer": [], "target": str(paths[0]), "oracle": str(paths[1])})
        )
