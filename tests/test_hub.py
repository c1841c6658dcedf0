"""Models of the hub: which files are downloaded."""

import fnmatch
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch

from engine.errors import JobError
from engine.models.addresses import resolve
from engine.models.classifier import Classifier
from engine.models.diffusion import load_pipeline
from engine.models.digests import model_digest
from engine.models.weight_files import weights_variant
from tests.model_cases import PARTS, save_as
from tests.tiny_pipelines import by_engine, edit, save_pipeline


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("hub") / "plain")


class Hub:
    """A model hub in a folder: what `snapshot_download` of patterns leaves of it on this machine."""

    def __init__(self, repository: Path, cache: Path) -> None:
        self.repository, self.cache = repository, cache

    def snapshot_download(self, address: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        """By the rules of the hub's own library."""
        names = [path.relative_to(self.repository).as_posix() for path in self.repository.rglob("*") if path.is_file()]
        for name in huggingface_hub.utils.filter_repo_objects(
            names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            target = self.cache / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.repository / name, target)
        return str(self.cache)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    def make(repository: Path) -> Hub:
        made = Hub(repository, tmp_path / "cache")
        monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
        return made

    return make


def fetched(hub: Hub) -> set[str]:
    return {path.relative_to(hub.cache).as_posix() for path in hub.cache.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("parts", "size"), [((), "1GB"), (("unet",), "1GB"), (PARTS, "1GB"), (PARTS, "20KB")])
def test_of_the_hub_a_variant_is_fetched_where_there_is_nothing_else(parts, size, plain, hub, tmp_path, hardware):
    """Of a part with plain weights these alone; what is fetched loads, and its digest is that of the whole folder."""
    both = save_as(plain, tmp_path / "repository", variant="fp16", max_shard_size=size)
    for part in set(PARTS) - set(parts):
        for path in (plain / part).glob("*.safetensors"):
            shutil.copy(path, both / part)
    made = hub(both)
    folder = resolve("somebody/pipeline")
    weights = {name for name in fetched(made) if name.endswith(".safetensors")}
    assert {name.partition("/")[0] for name in weights if ".fp16" in name} == set(parts)
    assert {name.partition("/")[0] for name in weights if ".fp16" not in name} == set(PARTS) - set(parts)
    images = by_engine(load_pipeline(str(plain), hardware), 2, scheduler="ddim")
    assert torch.equal(by_engine(load_pipeline(str(folder), hardware), 2, scheduler="ddim"), images)


def test_of_the_hub_a_pipeline_that_does_not_run_is_refused_before_its_weights(plain, hub, tmp_path):
    """SDXL has seven gigabytes of them."""
    repository = Path(shutil.copytree(plain, tmp_path / "repository"))
    edit(repository / "unet" / "config.json", addition_embed_type="text_time")
    made = hub(repository)
    with pytest.raises(JobError, match='addition_embed_type: "text_time"'):
        resolve("somebody/pipeline")
    assert not [name for name in fetched(made) if name.endswith(".safetensors")]


def test_of_the_hub_pickles_are_refused(plain, hub, tmp_path):
    """They are not even fetched."""
    repository = save_as(plain, tmp_path / "repository", safe_serialization=False)
    made = hub(repository)
    for path in repository.rglob("unet/*.safetensors"):
        path.unlink()
    with pytest.raises(JobError, match=r"has no safetensors in unet.*from_pretrained\(\"somebody/pipeline\"\)"):
        resolve("somebody/pipeline")
    assert not [name for name in fetched(made) if fnmatch.fnmatch(name, "*.bin")]


def test_of_the_hub_a_classifier_in_half_precision_is_fetched(hub, tmp_path):
    """Not only pipelines have variants."""
    repository = Path(shutil.copytree(resolve("zoo:digits/classifier"), tmp_path / "repository"))
    plain_digest = model_digest(str(repository))
    (repository / "model.fp16.safetensors").write_bytes(b"x")
    made = hub(repository)
    assert model_digest("somebody/classifier") == plain_digest and "model.fp16.safetensors" not in fetched(made)
    Classifier.load("somebody/classifier")
    (repository / "model.safetensors").unlink()
    shutil.rmtree(made.cache)
    assert weights_variant(resolve("somebody/classifier")) == "fp16"
    assert model_digest("somebody/classifier") == model_digest(str(repository))
