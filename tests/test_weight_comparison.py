"""Models with the same weights are recognised in every form, and others are distinguished."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine.errors import JobError
from engine.job.spec import ModelsSpec
from engine.models.addresses import resolve
from engine.models.clip import Clip
from engine.models.independence import check_independent
from engine.models.stored_tensors import stored_tensors
from engine.models.weight_comparison import have_same_weights
from tests.model_cases import LOADED, ZOO, cast, resaved, sharded

SAME: dict[str, Callable[[Path], Any]] = {
    "copy": lambda folder: None,
    "another file next to it": lambda folder: save_file({"a": torch.ones(3)}, folder / "other.safetensors"),
    "adapter next to it": lambda folder: save_file({"a": torch.ones(3)}, folder / "adapter_model.safetensors"),
    "in shards": sharded,
    "in another precision": cast(torch.float32),
    "in bfloat16": cast(torch.bfloat16),
    "another precision next to it": lambda folder: shutil.copy(
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
def test_equal_weights_are_recognised_in_every_form(kind: str, tmp_path: Path) -> None:
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


def saved(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    return folder


def test_half_precisions_of_one_network_are_the_same(tmp_path: Path) -> None:
    """Neither is a rounding of the other."""
    weights = {"a.weight": torch.randn(40, 50), "a.bias": torch.randn(40)}
    folders = [
        saved(tmp_path / str(dtype), {name: tensor.to(dtype) for name, tensor in weights.items()})
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    ]
    assert all(have_same_weights(folder, other) for folder in folders for other in folders)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ties_are_rounded_to_even(dtype: torch.dtype, tmp_path: Path) -> None:
    """As torch rounds: half of the last place, above an even and above an odd number, of both signs."""
    step = torch.finfo(dtype).eps
    ties = torch.tensor([1 + step / 2, 1 + 1.5 * step, -1 - step / 2, -1 - 1.5 * step])
    first, second = saved(tmp_path / "a", {"a": ties}), saved(tmp_path / "b", {"a": ties.to(dtype)})
    assert have_same_weights(first, second)
    assert not have_same_weights(first, saved(tmp_path / "c", {"a": (ties + step).to(dtype)}))


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


def test_the_oracle_that_guides_measures_nothing(tmp_path: Path) -> None:
    """Neither as a transfer model nor, a CLIP model, as the judge; one that only decides may be both."""
    oracle, copied = ZOO["oracle"], str(shutil.copytree(resolve(ZOO["oracle"]), tmp_path / "copy"))
    clip = Path(shutil.copytree(resolve(ZOO["clip"]), tmp_path / "clip"))
    resaved(OTHER["another head"])(clip)
    for models, measured, guiding in (
        ({"oracle": oracle, "transfer": [copied]}, "models.transfer.0", "models.oracle"),
        ({"oracles": [str(clip), oracle], "transfer": [oracle]}, "models.transfer.0", "models.oracles.1"),
        ({"oracles": [oracle, str(clip)], "transfer": [], "judge": str(clip)}, "models.judge", "models.oracles.1"),
    ):
        spec = ModelsSpec.model_validate({**ZOO, "oracle": None, **models})
        check_independent(spec)
        with pytest.raises(JobError) as refused:
            check_independent(spec, oracle_guides=True)
        [problem] = refused.value.problems
        assert problem.startswith(f"{measured}: ") and f"has the weights of {guiding}, " in problem
    first = ModelsSpec.model_validate({**ZOO, "oracle": None, "oracles": [oracle, str(clip)], "transfer": [oracle]})
    check_independent(first, oracle_guides=True)


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


def test_an_archive_has_the_weights_of_a_folder_whatever_its_counters(tmp_path: Path) -> None:
    """The batches that a normalisation has counted are not weights; its statistics are."""
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval()
    layers[1].running_mean.normal_()
    folder = saved(tmp_path / "net", layers.state_dict())
    plain, counted, trained = (tmp_path / f"{name}.pt" for name in ("plain", "counted", "trained"))
    torch.jit.trace(layers, torch.zeros(2, 3, 8, 8)).save(str(plain))
    layers[1].num_batches_tracked += 1
    torch.jit.trace(layers, torch.zeros(2, 3, 8, 8)).save(str(counted))
    layers[1].running_mean += 1
    torch.jit.trace(layers, torch.zeros(2, 3, 8, 8)).save(str(trained))
    assert have_same_weights(folder, counted) and have_same_weights(counted, folder)
    assert have_same_weights(plain, counted)
    assert not have_same_weights(folder, trained) and not have_same_weights(counted, trained)
