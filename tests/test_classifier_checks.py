"""Folders of classifiers that would be scored with incorrectly are refused when the job is checked."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from engine.errors import EXIT_USER, JobError
from engine.models.addresses import resolve
from engine.models.classifier import Classifier
from engine.models.classifier_checks import check_classifier
from engine.models.clip_checks import check_clip
from engine.models.job_checks import check_addresses
from engine.models.labels import read_labels
from tests.model_cases import NAMES, ZOO, copied, job_of


def labels(names: list[Any]) -> dict[str, Any]:
    return {"id2label": {str(index): name for index, name in enumerate(names)}, "label2id": None}


def indexed(*indices: int | str) -> dict[str, Any]:
    return {"id2label": {str(index): name for index, name in zip(indices, NAMES, strict=False)}, "label2id": None}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "multi-label": ({"problem_type": "multi_label_classification"}, "problem_type: its head is of independent classes"),
    "regression": ({"problem_type": "regression"}, "problem_type: 'regression' is not a classification"),
    "unknown head": ({"problem_type": "ranking"}, "problem_type: 'ranking' is not a classification"),
    "single logit": (labels(["digit"]), r"id2label in config\.json has one class: a head with a single logit"),
    "single logit by number": ({"num_labels": 1}, "num_labels: 1, but id2label has 10 classes"),
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
    "as many classes as channels": (labels(NAMES[:3]), "no tensor of its weights has 3 rows"),
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
    """By its config.json alone, in every role, before a worker starts; and when it is loaded."""
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
    labels([*NAMES[:8], "crane", "crane"]) | {"label2id": {"crane": 9}},
], ids=str)  # fmt: skip
def test_what_says_nothing_else_is_taken(changes: dict[str, Any], tmp_path: Path) -> None:
    """transformers' default next to names, numbers as text, ImageNet's two cranes."""
    folder = copied(ZOO["target"], tmp_path / "net", **changes)
    check_classifier(folder, "x")
    assert Classifier.load(str(folder)).labels == read_labels(str(folder))


STRANGE = (None, "x", -1, 0, 1.5, 10**400, [], [None], {}, {"x": 1}, True)
# Keys that a file may have in addition to those of the zoo's.
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
def test_what_a_library_cannot_read_is_reported_in_one_line(changes: dict[str, Any], tmp_path: Path) -> None:
    """Values that transformers alone knows to be wrong: of this model and field, at the latest when it is loaded."""
    folder = copied(ZOO["target"], tmp_path / "net", **{"layer_type": "basic"} | changes)
    with pytest.raises(JobError, match=r"net' cannot be loaded as a classifier \(") as caught:
        Classifier.load(str(folder))
    assert "\n" not in str(caught.value)


# Files of weights ----------------------------------------------------------------------------------------------------


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
