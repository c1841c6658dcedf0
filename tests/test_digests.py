"""Digests of models: of what is loaded, and of nothing else."""

import json
import shutil
from pathlib import Path

from engine.models.addresses import resolve
from engine.models.digests import model_digest
from tests.model_cases import ZOO


def test_digest_follows_content_not_place(tmp_path):
    """A copy has the same digest; one changed byte of a weight or a configuration another; a README none."""
    original, copy = resolve("zoo:digits/classifier"), tmp_path / "copy"
    shutil.copytree(original, copy)
    before = model_digest("zoo:digits/classifier")
    (copy / "README.md").write_text("notes")
    assert model_digest(str(copy)) == before
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert model_digest(str(copy)) != before


def test_a_pipeline_is_digested_by_its_parts(tmp_path):
    """A stray checkpoint or another precision next to the parts is not loaded and must not change the digest."""
    folder = tmp_path / "pipeline"
    shutil.copytree(resolve("zoo:digits/stable-diffusion"), folder)
    before = model_digest(str(folder))
    (folder / "all-in-one.safetensors").write_bytes(b"x")
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"x")
    assert model_digest(str(folder)) == before == model_digest("zoo:digits/stable-diffusion")
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    assert model_digest(str(folder)) != before


def test_another_precision_next_to_the_weights_changes_no_digest(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(resolve(ZOO["target"]), tmp_path / "net"))
    before = model_digest(str(folder))
    shutil.copy(folder / "model.safetensors", folder / "model.fp16.safetensors")
    assert model_digest(str(folder)) == before == model_digest(ZOO["target"])


def test_a_configuration_next_to_another_variant_is_digested(tmp_path: Path) -> None:
    """Of a folder whose only weights are `fp16`: every file that is loaded counts, not only the weights."""
    folder = Path(shutil.copytree(resolve(ZOO["target"]), tmp_path / "net"))
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    before = model_digest(str(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"temperature": 3.0}))
    assert model_digest(str(folder)) != before
