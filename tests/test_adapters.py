"""LoRA weights, textual inversions and another VAE: images as diffusers makes them, plans, and what is refused."""

from __future__ import annotations

import json
import shutil

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import JobError
from engine.job.spec import AdapterSpec, ModelsSpec
from engine.models.adapters import adapter_digest
from engine.models.copies import check_copies, model_copies
from engine.models.diffusion import load_pipeline
from engine.models.digests import model_digest, model_digests
from engine.models.job_checks import check_addresses
from tests.adapter_cases import as_kohya, save_embedding, save_lora
from tests.tiny_pipelines import (
    VAE,
    by_diffusers,
    by_engine,
    edit,
    job_of,
    load_reference,
    save_pipeline,
    save_xl_pipeline,
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A pipeline and adapters of each kind."""
    home = tmp_path_factory.mktemp("adapters")
    folder = save_pipeline(home / "pipeline", unet={"cross_attention_dim": 16})
    save_lora(folder, home / "unet.safetensors")
    save_lora(folder, home / "both.safetensors", seed=1, rank=3, parts=("unet", "text_encoder"))
    as_kohya(home / "both.safetensors", home / "kohya.safetensors")
    save_embedding(home / "cat.safetensors", "<cat>", vectors=2)
    save_embedding(home / "dog.safetensors", "<dog>", seed=1)
    return home


def models_of(home, *adapters, pipeline="pipeline", **more):
    return ModelsSpec(diffusion=str(home / pipeline), clip="c", target="t", adapters=adapters, **more)


def adapter(home, name, **more):
    return AdapterSpec(address=str(home / f"{name}.safetensors"), **more)


def by_engine_with(home, hardware, *adapters, prompts=None, pipeline="pipeline", **more):
    models = models_of(home, *adapters, pipeline=pipeline, **more)
    model = load_pipeline(str(home / pipeline), hardware, models=models)
    return by_engine(model, 3, scheduler="model", **({"prompts": prompts} if prompts else {}))


@pytest.mark.parametrize(
    ("names", "weights"), [(["unet"], [0.7]), (["both"], [-1.0]), (["kohya"], [0.5]), (["unet", "both"], [0.3, 0.9])]
)
def test_images_with_loras_are_those_of_diffusers(home, hardware, names, weights):
    reference = load_reference(home / "pipeline")
    for name in names:
        reference.load_lora_weights(home, weight_name=f"{name}.safetensors", adapter_name=name)
    reference.set_adapters(names, weights)
    expected = by_diffusers(reference, 3)
    pairs = [adapter(home, name, weight=weight) for name, weight in zip(names, weights, strict=True)]
    images = by_engine_with(home, hardware, *pairs)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
    # They do change the images.
    assert (images - by_engine_with(home, hardware)).abs().max() > 1e-3


def test_images_of_xl_with_loras_are_those_of_diffusers(home, hardware):
    """LoRA weights of the UNet and both text encoders, in diffusers' and in kohya's names; it takes no new words."""
    folder = save_xl_pipeline(home / "xl")
    save_lora(folder, home / "xl-lora.safetensors", parts=("unet", "text_encoder", "text_encoder_2"))
    as_kohya(home / "xl-lora.safetensors", home / "xl-kohya.safetensors", text_prefixes=("lora_te1_", "lora_te2_"))
    plain = by_engine_with(home, hardware, pipeline="xl")
    for name in ("xl-lora", "xl-kohya"):
        reference = load_reference(folder)
        reference.load_lora_weights(home, weight_name=f"{name}.safetensors", adapter_name="one")
        reference.set_adapters(["one"], [0.6])
        images = by_engine_with(home, hardware, adapter(home, name, weight=0.6), pipeline="xl")
        torch.testing.assert_close(images, by_diffusers(reference, 3), rtol=0, atol=1e-5)
        assert (images - plain).abs().max() > 1e-3
    with pytest.raises(JobError, match=r"models\.adapters\.0"):
        check_addresses(job_of(folder, adapters=[{"address": str(home / "cat.safetensors")}]))


def test_images_of_new_words_are_those_of_diffusers(home, hardware):
    """One word of two vectors, and one that the job names otherwise than its file."""
    prompts = ["a <cat> and <hound>", "a photo of a two"]
    reference = load_reference(home / "pipeline")
    reference.load_textual_inversion(home / "cat.safetensors")
    reference.load_textual_inversion(home / "dog.safetensors", token="<hound>")
    expected = by_diffusers(reference, 3, prompts=prompts)
    words = adapter(home, "cat"), adapter(home, "dog", token="<hound>")
    torch.testing.assert_close(by_engine_with(home, hardware, *words, prompts=prompts), expected, rtol=0, atol=1e-5)


def test_embeddings_and_loras_go_together(home, hardware):
    reference = load_reference(home / "pipeline")
    reference.load_textual_inversion(home / "cat.safetensors")
    reference.load_lora_weights(home, weight_name="both.safetensors", adapter_name="both")
    reference.set_adapters(["both"], [0.4])
    expected = by_diffusers(reference, 3, prompts=["a <cat>"])
    images = by_engine_with(
        home, hardware, adapter(home, "both", weight=0.4), adapter(home, "cat"), prompts=["a <cat>"]
    )
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)


def test_images_of_another_vae_are_those_of_diffusers(home, hardware):
    torch.manual_seed(7)
    vae = diffusers.AutoencoderKL(**VAE)
    vae.save_pretrained(home / "vae")
    reference = load_reference(home / "pipeline", vae=vae)
    images = by_engine_with(home, hardware, vae=str(home / "vae"))
    torch.testing.assert_close(images, by_diffusers(reference, 3), rtol=0, atol=1e-5)
    model = load_pipeline(str(home / "pipeline"), hardware, models=models_of(home, vae=str(home / "vae")))
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        latents = vae.encode(pixels * 2 - 1).latent_dist.mode() * vae.config.scaling_factor
        torch.testing.assert_close(model.encode_images(pixels), latents)
    job = job_of(home / "pipeline", vae=str(home / "vae"))
    check_addresses(job)
    assert model_digests(job)["vae"] == model_digest(str(home / "vae"))


def test_a_vae_with_values_that_are_not_finite_is_refused(home, hardware, tmp_path):
    """By a worker that loads it, with the name of the weight."""
    vae = diffusers.AutoencoderKL(**VAE)
    vae.post_quant_conv.bias.data[0] = float("nan")
    vae.save_pretrained(tmp_path / "vae")
    models = models_of(home, vae=str(tmp_path / "vae"))
    with pytest.raises(JobError, match=r"models\.vae: .* has values in post_quant_conv\.bias that are not finite"):
        load_pipeline(str(home / "pipeline"), hardware, models=models)


def test_a_vae_for_other_latents_is_refused(home, tmp_path):
    diffusers.AutoencoderKL(**VAE).save_pretrained(tmp_path / "vae")
    cases = {"scaling_factor": (0.13, "0.13"), "latent_channels": (16, "16"), "shift_factor": (0.1, "0.1")}
    cases |= {"block_out_channels": ([8, 8], "2 times"), "_class_name": ("AutoencoderTiny", "guidance_decoder")}
    config = (tmp_path / "vae" / "config.json").read_text()
    for option, (value, words) in cases.items():
        (tmp_path / "vae" / "config.json").write_text(config)
        edit(tmp_path / "vae" / "config.json", **{option: value})
        with pytest.raises(JobError, match=f"models.vae: .*{words}"):
            check_addresses(job_of(home / "pipeline", vae=str(tmp_path / "vae")))


def test_contents_and_weights_are_part_of_the_plan_and_addresses_are_not(home, tmp_path):
    shutil.copy(home / "unet.safetensors", tmp_path / "copy.safetensors")
    raw = [{"address": str(home / "unet.safetensors"), "weight": 0.5}]
    first, copied, other, plain = (
        model_digests(job_of(home / "pipeline", adapters=adapters))
        for adapters in (raw, [{"address": str(tmp_path), "weight": 0.5}], [raw[0] | {"weight": 0.6}], [])
    )
    assert first == copied != other and "adapters" not in plain and "vae" not in plain
    assert first["adapters"] == [{"digest": adapter_digest(raw[0]["address"]), "weight": 0.5}]
    assert not {"adapters", "vae"} & set(job_of(home / "pipeline").models.model_dump())


def test_a_worker_with_another_file_refuses(home, tmp_path):
    path = tmp_path / "a.safetensors"
    shutil.copy(home / "unet.safetensors", path)
    copies = model_copies({"adapters": [{"address": str(path), "digest": adapter_digest(str(path))}]})
    check_copies(copies, "here")
    shutil.copy(home / "both.safetensors", path)
    with pytest.raises(JobError, match=r"a\.safetensors' on machine here has the digest"):
        check_copies(copies, "here")


def changed(source, target, change):
    """A copy of a file with other tensors."""
    tensors = load_file(source)
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, target)
    return {"address": str(target)}


def first_pair(tensors):
    return sorted(name for name in tensors if "unet" in name)[:2]


def set_first(tensors, value, place=0):
    tensors[first_pair(tensors)[place]] = value


def rename_first(tensors, old, new):
    for name in first_pair(tensors):
        tensors[name.replace(old, new, 1)] = tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: rename_first(t, "unet.", "controlnet."), "is of no part of a StableDiffusionPipeline"),
        (lambda t: rename_first(t, "attentions.0", "attentions.7"), "unet has no layer"),
        (lambda t: set_first(t, torch.zeros(5, 16)), r"matrices of rank 5 and 2"),
        (lambda t: set_first(t, torch.zeros(2, 99)), r"changes a matrix of 16 x 99, that of unet is 16 x 16"),
        (lambda t: t.pop(first_pair(t)[0]), "only one of its two matrices"),
        (lambda t: t.update({"unet.x.lora_magnitude": torch.zeros(1)}), "no weight of a LoRA"),
        (lambda t: t.update({"unet.x.dora_scale": torch.zeros(1)}), "of DoRA"),
    ],
)
def test_loras_that_do_not_fit_are_refused(home, tmp_path, change, words):
    """By the header of the file alone, and with the number of the adapter."""
    wrong = changed(home / "unet.safetensors", tmp_path / "wrong.safetensors", change)
    with pytest.raises(JobError, match=rf"models\.adapters\.1: .*{words}"):
        check_addresses(job_of(home / "pipeline", adapters=[{"address": str(home / "unet.safetensors")}, wrong]))


def test_what_is_no_adapter_is_refused(home, tmp_path):
    (tmp_path / "torn.safetensors").write_bytes(b"\x00" * 20)
    (tmp_path / "weights.bin").write_bytes(b"pickle")
    save_file({"a": torch.zeros(1, 1, 1), "b": torch.zeros(1)}, tmp_path / "other.safetensors")
    save_embedding(tmp_path / "wide.safetensors", "<wide>", width=24)
    save_embedding(tmp_path / "known.safetensors", "three</w>")
    save_embedding(tmp_path / "word.safetensors", "Three")
    save_embedding(tmp_path / "emb.safetensors", "emb_params")
    save_file({"<e>": torch.zeros(0, 16)}, tmp_path / "none.0.safetensors")
    save_file({"<e>": torch.zeros(16, dtype=torch.int64)}, tmp_path / "whole.safetensors")
    save_file({"clip_l": torch.zeros(1, 16), "clip_g": torch.zeros(1, 24)}, tmp_path / "pair.safetensors")
    cases = [
        ({"address": str(tmp_path / "torn.safetensors")}, r"0: .*torn\.safetensors is damaged"),
        ({"address": str(tmp_path / "weights.bin")}, r"0: .*not a \.safetensors file.*convert it once"),
        ({"address": str(tmp_path / "none.safetensors")}, r"0: .*neither a file nor a folder"),
        ({"address": str(tmp_path)}, r"0: .*several files"),
        ({"address": str(tmp_path / "other.safetensors")}, r"0: .*neither a LoRA nor an embedding"),
        ({"address": str(tmp_path / "wide.safetensors")}, r"0: .*have 24 entries, those of the text encoder"),
        ({"address": str(tmp_path / "known.safetensors")}, r"0\.token: .*a word of the tokenizer"),
        ({"address": str(tmp_path / "word.safetensors")}, r"0\.token: 'Three' is a word of the tokenizer"),
        ({"address": str(tmp_path / "none.0.safetensors")}, r"0: .*has <e> without entries"),
        ({"address": str(tmp_path / "whole.safetensors")}, r"0: .*has <e> of type I64; quantised"),
        ({"address": str(tmp_path / "pair.safetensors")}, r"0: .*an embedding of two text encoders"),
        ({"address": str(tmp_path / "emb.safetensors")}, r"0\.token: the file names no word"),
        ({"address": str(home / "cat.safetensors"), "weight": 0.5}, r"0\.weight: 0\.5"),
        ({"address": str(home / "unet.safetensors"), "token": "x"}, r"0\.token: .*not an embedding"),
    ]
    for case, words in cases:
        with pytest.raises(JobError, match=rf"models\.adapters\.{words}"):
            check_addresses(job_of(home / "pipeline", adapters=[case]))
    twice = [{"address": str(home / "cat.safetensors")}, {"address": str(home / "dog.safetensors"), "token": "<cat>_1"}]
    with pytest.raises(JobError, match=r"adapters\.1\.token: the word '<cat>_1' is that of adapters\.0 too"):
        check_addresses(job_of(home / "pipeline", adapters=twice))
    for weight in (float("nan"), float("inf"), 1e9, "1"):
        with pytest.raises(JobError, match=r"models\.adapters\.0\.weight"):
            job_of(home / "pipeline", adapters=[{"address": "a", "weight": weight}])


def test_a_token_of_several_words_is_refused(home):
    with pytest.raises(JobError, match=r"models\.adapters\.0\.token: 'a cat' has spaces; give one word"):
        job_of(home / "pipeline", adapters=[{"address": str(home / "cat.safetensors"), "token": "a cat"}])


def test_values_that_are_not_finite_are_refused_where_they_are_loaded(home, hardware, tmp_path):
    wrong = changed(
        home / "unet.safetensors", tmp_path / "nan.safetensors", lambda t: set_first(t, torch.full((2, 16), torch.nan))
    )
    with pytest.raises(JobError, match=r"models\.adapters\.0: .*not finite"):
        by_engine_with(home, hardware, AdapterSpec(**wrong))


def test_adapters_are_checked_without_torch(home):
    """From the headers: what a driver does before a worker starts."""
    import subprocess
    import sys

    code = (
        "import sys, json; from pathlib import Path; from engine.job.spec import AdapterSpec;"
        "from engine.models.adapters import adapter_problems; f = Path(sys.argv[1]);"
        "print(json.dumps([adapter_problems([AdapterSpec(address=sys.argv[2])], f, str(f)), 'torch' in sys.modules]))"
    )
    arguments = [str(home / "pipeline"), str(home / "both.safetensors")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [[], False]
