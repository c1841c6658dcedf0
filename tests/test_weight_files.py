"""Which files hold a model's weights: another variant where it is the only one, shards, no pickles."""

import itertools
import shlex
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from engine.errors import JobError
from engine.models.addresses import resolve
from engine.models.decoder import GuidanceDecoder
from engine.models.diffusion import load_pipeline
from engine.models.digests import model_digest
from engine.models.job_checks import check_addresses
from engine.models.weight_files import VARIANTS, weights_variant
from tests.model_cases import PARTS, save_as
from tests.test_safety import make_checker
from tests.tiny_pipelines import by_diffusers, by_engine, edit, job_of, load_reference, save_pipeline

TINY = "zoo:digits/tiny-autoencoder"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("weights") / "plain")


@pytest.fixture(scope="module")
def images(plain, hardware):
    """Of the plain weights."""
    return by_engine(load_pipeline(str(plain), hardware), 2, scheduler="ddim")


def rename_weights(folder: Path, variant: str) -> None:
    """The weights of a pipeline under the names of a variant, byte by byte the same."""
    for path in [*folder.rglob("*.safetensors")]:
        path.rename(path.with_name(path.name.replace(".safetensors", f".{variant}.safetensors")))


@pytest.mark.parametrize("variant", [*VARIANTS, "ema"])
@pytest.mark.parametrize("parts", [PARTS, ("unet",), ("vae", "text_encoder")])
def test_a_variant_is_loaded_where_it_is_the_only_one(variant, parts, plain, images, tmp_path, hardware):
    """Whichever parts have it, as diffusers has it with `variant`; the digest is of what is loaded."""
    folder = Path(shutil.copytree(plain, tmp_path / "copy"))
    for part in parts:
        rename_weights(folder / part, variant)
        assert weights_variant(folder / part) == variant
    check_addresses(job_of(folder))
    assert torch.equal(by_engine(load_pipeline(str(folder), hardware), 2, scheduler="ddim"), images)
    before = model_digest(str(folder))
    path = next((folder / parts[0]).glob("*.safetensors"))
    path.write_bytes(path.read_bytes() + b" ")
    assert model_digest(str(folder)) != before


def test_half_precision_as_diffusers_saves_and_loads_it(plain, tmp_path, hardware):
    """`*.fp16.safetensors` of half weights, read into single precision."""
    reference = load_reference(plain, torch_dtype=torch.float16)
    reference.save_pretrained(tmp_path / "half", variant="fp16")
    folder = tmp_path / "half"
    assert not [path for path in folder.rglob("*.safetensors") if ".fp16." not in path.name]
    check_addresses(job_of(folder))
    expected = by_diffusers(load_reference(folder, variant="fp16", torch_dtype=torch.float32), 2)
    made = by_engine(load_pipeline(str(folder), hardware), 2, scheduler="ddim")
    assert (made - expected).abs().max() < 1e-4


@pytest.mark.parametrize("variant", [None, "fp16", "non_ema"])
def test_weights_in_parts_are_loaded_and_a_missing_part_is_named(variant, plain, images, tmp_path, hardware):
    """An index and its parts, plain or of a variant, as `save_pretrained` cuts them."""
    folder = save_as(plain, tmp_path / "parts", variant=variant, max_shard_size="20KB")
    indices = list(folder.rglob("*.safetensors.index*.json"))
    assert indices and not (folder / "unet" / "diffusion_pytorch_model.safetensors").exists()
    check_addresses(job_of(folder))
    assert torch.equal(by_engine(load_pipeline(str(folder), hardware), 2, scheduler="ddim"), images)
    part = min((folder / "unet").glob("*-of-*.safetensors"))
    before = model_digest(str(folder))
    part.rename(tmp_path / "gone")
    assert model_digest(str(folder)) != before
    with pytest.raises(JobError, match=rf"models\.diffusion: .* names {part.name}, which does not exist"):
        check_addresses(job_of(folder))


def test_what_is_next_to_plain_weights_is_neither_loaded_nor_digested(plain, tmp_path):
    """Other precisions in the same folder, whole or in parts with an index."""
    folder = Path(shutil.copytree(plain, tmp_path / "copy"))
    before = model_digest(str(folder))
    for variant in VARIANTS:
        (folder / "unet" / f"diffusion_pytorch_model.{variant}.safetensors").write_bytes(b"x")
        (folder / "text_encoder" / f"model.{variant}.safetensors").write_bytes(b"x")
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.fp16.json").write_text("{}")
    assert all(weights_variant(folder / part) is None for part in PARTS)
    assert model_digest(str(folder)) == before == model_digest(str(plain))


def test_of_several_variants_one_is_loaded_whatever_the_order(tmp_path):
    """Half precision of the final weights before weights that training did not average."""
    for names in itertools.permutations(("fp16", "bf16", "non_ema", "a")):
        folder = tmp_path / "-".join(names)
        folder.mkdir()
        for name in names:
            (folder / f"model.{name}.safetensors").touch()
        assert weights_variant(folder) == "fp16"


@pytest.mark.parametrize("parts", [("unet",), PARTS])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_pickles_are_refused_with_the_line_that_converts_them(
    parts, variant, plain, images, tmp_path, hardware, monkeypatch
):
    """The command is run unchanged, and its result gives the same images."""
    monkeypatch.chdir(tmp_path)
    pickled = save_as(plain, tmp_path / "pickled", safe_serialization=False, variant=variant)
    folder = Path(shutil.copytree(plain, tmp_path / "it's mine"))
    # transformers writes no pickles any more: it reads them.
    state = load_reference(plain).text_encoder.state_dict()
    torch.save(state, pickled / "text_encoder" / f"pytorch_model.{variant}.bin".replace(".None", ""))
    for part in parts:
        for path in (folder / part).glob("*.safetensors"):
            path.unlink()
        for path in (pickled / part).glob("*.bin"):
            shutil.copy(path, folder / part)
    if variant:
        rename_weights(folder, variant)
    with pytest.raises(JobError) as caught:
        check_addresses(job_of(folder))
    assert len(caught.value.problems) == len(parts)
    for part, line in zip(
        sorted(parts), sorted(caught.value.problems, key=lambda one: one.split(" are ")[0]), strict=True
    ):
        assert line.startswith("models.diffusion: ") and f"the weights in {part} are pickled (.bin)" in line
    program, option, code = shlex.split(line[line.index("python -c") :])
    assert (program, option) == ("python", "-c")
    exec(code, {})
    made = tmp_path / "it's mine-safetensors"
    check_addresses(job_of(made))
    assert torch.equal(by_engine(load_pipeline(str(made), hardware), 2, scheduler="ddim"), images)


@pytest.mark.parametrize("names", [(), ("model.ckpt",), ("flax_model.msgpack",), ("model.onnx",), ("tf_model.h5",)])
def test_a_part_without_weights_is_named(names, plain, tmp_path):
    """Other formats than safetensors are none."""
    folder = Path(shutil.copytree(plain, tmp_path / "copy"))
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    for name in names:
        (folder / "vae" / name).touch()
    with pytest.raises(JobError, match="has no safetensors in vae"):
        check_addresses(job_of(folder))


def test_a_checker_without_weights_may_be_left_out(plain, tmp_path, hardware):
    """`models.safety_checker: off` needs neither its weights nor its preprocessing."""
    folder = Path(shutil.copytree(plain, tmp_path / "copy"))
    make_checker().save_pretrained(folder / "safety_checker")
    (folder / "safety_checker" / "model.safetensors").rename(folder / "safety_checker" / "pytorch_model.bin")
    (folder / "feature_extractor").mkdir()
    (folder / "feature_extractor" / "preprocessor_config.json").write_text("{}")
    edit(
        folder / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
    )
    with pytest.raises(JobError, match="the weights in safety_checker are pickled"):
        check_addresses(job_of(folder))
    check_addresses(job_of(folder, safety_checker="off"))
    assert load_pipeline(str(folder), hardware, checks_safety=False).safety_checker is None
    shutil.rmtree(folder / "safety_checker")
    check_addresses(job_of(folder, safety_checker="off"))


def test_a_decoder_of_another_precision_is_loaded(tmp_path, hardware):
    """As the parts of a pipeline; a pickled one is refused with its line."""
    folder = Path(shutil.copytree(resolve(TINY), tmp_path / "tiny"))
    rename_weights(folder, "fp16")
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    images, expected = (GuidanceDecoder.load(str(address), hardware).decode(latents) for address in (folder, TINY))
    assert torch.equal(images, expected)
    job = job_of(resolve("zoo:digits/stable-diffusion"), method="boundary", guidance_decoder=str(folder))
    check_addresses(job)
    next(folder.glob("*.safetensors")).rename(folder / "diffusion_pytorch_model.bin")
    with pytest.raises(JobError, match=r"models\.guidance_decoder: .* pickled .*diffusers\.AutoencoderTiny\.from_pre"):
        check_addresses(job)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"latent_channels": 16}, "of 16 channels"),
        ({"num_decoder_blocks": [1, 1, 1, 1]}, "images 8 times"),
        ({"upsampling_scaling_factor": 4}, "images 16 times"),
        ({"upsampling_scaling_factor": "x"}, "wrong type"),
        ({"out_channels": 1}, "images of 1 channels"),
        ({"scaling_factor": 0.18215}, "latents of another scale"),
        ({"shift_factor": 0.1}, "latents of another scale"),
        ({"_class_name": "AutoencoderKL"}, "an AutoencoderTiny is needed"),
        ({"scaling_factor": 0.48315}, ""),
        ({}, ""),
    ],
    ids=str,
)
def test_a_decoder_that_does_not_fit_is_refused(changes, words, tmp_path):
    """Channels, size and scale, against those of the pipeline; its own scale may be that of the pipeline's VAE."""
    folder = Path(shutil.copytree(resolve(TINY), tmp_path / "tiny"))
    edit(folder / "config.json", **changes)
    job = job_of(resolve("zoo:digits/stable-diffusion"), method="boundary", guidance_decoder=str(folder))
    if not words:
        check_addresses(job)
        return
    with pytest.raises(JobError, match=f"models.guidance_decoder: .*{words}"):
        check_addresses(job)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("rename", [None, "{}.base_layer", "module.{}"])
def test_weights_that_are_missing_are_not_made_up(part, rename, plain, tmp_path, hardware):
    """The libraries fill gaps with random numbers: weights under other names, as adapters leave them, or none."""
    folder = Path(shutil.copytree(plain, tmp_path / "copy"))
    (path,) = (folder / part).glob("*.safetensors")
    weights = safetensors.torch.load_file(path)
    name = next(key for key in weights if "norm" in key)
    tensor = weights.pop(name)
    safetensors.torch.save_file(weights | ({rename.format(name): tensor} if rename else {}), path)
    with pytest.raises(JobError, match=r"cannot be loaded as a diffusion pipeline .its files lack 1 of the weights"):
        load_pipeline(str(folder), hardware)


def test_the_old_names_of_attention_weights_are_read(plain, images, tmp_path, hardware):
    """A VAE from before diffusers 0.18, as that of Stable Diffusion 1, lacks nothing."""
    folder = Path(shutil.copytree(plain, tmp_path / "copy"))
    (path,) = (folder / "vae").glob("*.safetensors")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = safetensors.torch.load_file(path)
    renamed = {}
    for name, tensor in weights.items():
        place = next((new for new in old if f".{new}." in name and ".attentions." in name), None)
        renamed[name.replace(place, old[place]) if place else name] = tensor
    assert renamed.keys() != weights.keys()
    safetensors.torch.save_file(renamed, path)
    assert torch.equal(by_engine(load_pipeline(str(folder), hardware), 2, scheduler="ddim"), images)
