"""When a tiny decoder for guidance is recommended, with which figures, and for which pipelines by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from bench.sizes import ARCHITECTURES
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from typer.testing import CliRunner

from engine.cli import app
from engine.driver.cost import guides_through_large_decoder
from engine.generation.calibrate import Measurement
from engine.generation.decoder_advice import (
    MIN_SAVING,
    PRICE_FILE,
    TAESD,
    TAESDXL,
    advice_lines,
    decoder_advice,
    read_price,
    tiny_decoder,
)
from engine.job.parsing import parse_job
from engine.job.spec import JobSpec
from engine.models.addresses import resolve
from engine.models.arithmetic import on_meta
from tests.tiny_pipelines import edit

UNGUIDED = {"name": "plain", "method": "prompt", "classes": ["one"], "count": 1}
BOUNDARY = {"name": "between", "method": "boundary", "boundary": ["one", "two"], "count": 1}
RISKY = {"name": "risky", "method": "risky", "classes": ["one"], "count": 1}
ADVERSARIAL = {"boundary": {"preset": "adversarial"}, "risky": {"preset": "adversarial"}}
EVERY_STEP = {"boundary": {"every": 1, "skip_last": False}, "risky": {"step": "paper", "skip_last": False}}


def make_job(diffusion: Path | str, *requests: dict[str, Any], **changes: Any) -> JobSpec:
    models = {"diffusion": str(diffusion), "clip": "zoo:digits/clip", "target": "zoo:digits/classifier"}
    raw = {"name": "advice", "models": models | changes.pop("models", {}), "requests": list(requests)}
    return parse_job(raw | {"output": {"uri": "runs/advice"}} | changes)


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of the architecture of Stable Diffusion 1.x, as far as its configurations are concerned."""
    folder = tmp_path_factory.mktemp("models") / "sd1"
    shutil.copytree(resolve("zoo:digits/stable-diffusion"), folder)
    on_meta(lambda: UNet2DConditionModel(**ARCHITECTURES["sd1"].unet)).save_config(folder / "unet")
    on_meta(lambda: AutoencoderKL(**ARCHITECTURES["sd1"].vae)).save_config(folder / "vae")
    edit(folder / "text_encoder" / "config.json", max_position_embeddings=77, hidden_size=768)
    return folder


def test_figures_of_stable_diffusion_are_those_of_the_floor(sd1: Path) -> None:
    """40 steps, detached: 66.8 TFLOP and 5.06 for each guided step, for which TAESD takes 0.28."""
    job = make_job(sd1, UNGUIDED, BOUNDARY, sampling={"num_inference_steps": 40}, guidance=ADVERSARIAL)
    advice = decoder_advice(job)
    assert advice is not None and (advice.request, advice.num_requests, advice.address) == ("between", 1, TAESD)
    guided = sum(job.parameters_of(job.requests[1]).is_guided(index, 40) for index in range(1, 41))
    total = 66.76 + guided * 5.063
    assert advice.share == pytest.approx(guided * 5.063 / total, abs=2e-3)
    assert advice.cost == pytest.approx((66.76 + guided * 0.283) / total, abs=2e-3)
    assert advice.tiny_share == pytest.approx(guided * 0.283 / (66.76 + guided * 0.283), abs=2e-3)


def test_classifier_free_guidance_and_the_way_through_the_network_count(sd1: Path) -> None:
    """Without the one the decoder weighs more, with the other less, but at the last step of combined gradients; the
    request that gains most is named."""

    def share(**guidance: Any) -> float:
        sampling = {"num_inference_steps": 20, "guidance_scale": guidance.pop("scale", 7.5)}
        advice = decoder_advice(make_job(sd1, BOUNDARY, sampling=sampling, guidance={"boundary": guidance}))
        assert advice is not None
        return advice.share

    assert share(every=2, scale=1) > share(every=2)
    weights = [share(preset="perceptible", every=2, gradient=name) for name in ("detached", "combined", "unet")]
    assert weights[0] > weights[1] > weights[2]
    advice = decoder_advice(make_job(sd1, BOUNDARY, RISKY, sampling={"num_inference_steps": 20}, guidance=ADVERSARIAL))
    assert advice is not None and (advice.request, advice.num_requests) == ("risky", 2)
    assert "risky (and 1 more request): 7" in advice_lines(advice)[0]


def test_a_twin_and_the_steps_that_a_start_spares_count(sd1: Path) -> None:
    """The unguided pass has no gradient of a decoder; from a start at half strength half the steps are taken."""

    def share(**request: Any) -> float:
        sampling, guidance = {"num_inference_steps": 4}, {"boundary": {"preset": "adversarial", "every": 3}}
        advice = decoder_advice(make_job(sd1, BOUNDARY | request, sampling=sampling, guidance=guidance))
        assert advice is not None
        return advice.share

    alone = share()
    # Of 4 steps of two evaluations each one is guided: as much again without the gradient, or 2 of the steps.
    assert 1 / share(twin=True) - 1 / alone == pytest.approx(1 / alone - 1, abs=0.05)
    assert 1 / alone - 1 / share(start={"images": "digits:test", "strength": 0.5}) == pytest.approx(
        (1 / alone - 1) / 2, abs=0.25
    )


def test_nothing_is_advised_where_nothing_is_to_be_gained(sd1: Path) -> None:
    """No guidance, a tiny decoder already, none of the models here, and a decoder that is small anyway."""
    assert decoder_advice(make_job(sd1, UNGUIDED)) is None
    digits = "zoo:digits/stable-diffusion"
    assert decoder_advice(make_job(sd1, RISKY, models={"guidance_decoder": "owner/tiny"})) is None
    assert decoder_advice(make_job("owner/not-here", RISKY)) is None
    assert decoder_advice(make_job(digits, BOUNDARY, sampling={"num_inference_steps": 40})) is None


def test_the_zoo_has_its_own(sd1: Path) -> None:
    """At every step guidance costs enough there, too; a copy of the pipeline elsewhere is not known to be one."""
    changes = {"sampling": {"num_inference_steps": 20}, "guidance": EVERY_STEP}
    advice = decoder_advice(make_job("zoo:digits/stable-diffusion", RISKY, **changes))
    assert advice is not None and advice.address == "zoo:digits/tiny-autoencoder"
    assert 0.5 < advice.cost <= 1 - MIN_SAVING < 1
    elsewhere = decoder_advice(make_job(resolve("zoo:digits/stable-diffusion"), RISKY, **changes))
    if elsewhere is not None:
        assert (
            elsewhere.address == "" and "ADDRESS, an AutoencoderTiny made for the latents" in advice_lines(elsewhere)[0]
        )


@pytest.mark.parametrize(
    ("changes", "name"),
    [({}, TAESD), ({"scaling_factor": 0.13025}, TAESDXL), ({"scaling_factor": 0.5}, ""), ({"layers_per_block": 1}, "")],
)
def test_taesd_is_named_for_the_autoencoder_that_it_was_made_for(
    sd1: Path, tmp_path: Path, changes: dict[str, Any], name: str
) -> None:
    """By the configuration, also of a hub id, of which older ones lack the scale; equal latents are not enough."""
    folder = tmp_path / "snapshot"
    shutil.copytree(sd1, folder)
    config = json.loads((folder / "vae/config.json").read_text())
    config.pop("scaling_factor")
    (folder / "vae/config.json").write_text(json.dumps(config | changes))
    address, decoder = tiny_decoder("owner/stable-diffusion", folder)
    assert address == name
    default = AutoencoderTiny().config
    assert decoder == {
        name: list(default[name]) if isinstance(value, list) else value for name, value in decoder.items()
    }


def test_the_price_is_measured_on_enough_samples() -> None:
    """Medians lie in their intervals, of both classifiers and the same number of samples."""
    price = read_price()
    assert PRICE_FILE.is_file() and set(price) == {"target", "other"}
    for row in price.values():
        assert row["samples"] >= 128
        for name in ("full", "tiny", "difference"):
            median, low, high = row[name]
            assert low < median < high
    assert price["target"]["full"][0] < price["other"]["full"][0]


def test_plan_says_it_once_it_has_counted(sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--calibrate` prints it, in JSON too; without it a large decoder is mentioned, and torch stays out."""
    measurement = Measurement(
        seconds_per_sample=(1.0,), bytes_per_sample=(1.0,), num_accepted=(1,), num_attempted=(1,), load_seconds=1.0,
        device="fake",
    )  # fmt: skip
    monkeypatch.setattr("engine.generation.calibrate.measure", lambda job, plan: measurement)

    def call(diffusion: Path | str, *options: str) -> str:
        path = tmp_path / "job.yaml"
        path.write_text(json.dumps(make_job(diffusion, BOUNDARY).model_dump(mode="json", exclude_unset=True)))
        result = CliRunner().invoke(app, ["plan", str(path), *options])
        assert result.exit_code == 0, result.output
        return result.stdout

    advice = decoder_advice(make_job(sd1, BOUNDARY))
    assert advice is not None
    hint = "--calibrate says what models.guidance_decoder would save"
    said = call(sd1, "--calibrate")
    assert all(line in said for line in advice_lines(advice)) and hint not in said
    assert hint in call(sd1) and hint not in call("zoo:digits/stable-diffusion")
    found = json.loads(call(sd1, "--calibrate", "--json"))["guidance_decoder"]
    assert found["address"] == TAESD and found["lines"] == advice_lines(advice)
    assert "guidance_decoder" not in json.loads(call(sd1, "--json"))
    assert "guidance_decoder" not in call("zoo:digits/stable-diffusion", "--calibrate")
    tiny = {"guidance_decoder": "zoo:digits/tiny-autoencoder"}
    assert guides_through_large_decoder(make_job(sd1, BOUNDARY))
    assert not guides_through_large_decoder(make_job(sd1, BOUNDARY, models=tiny))
    assert not guides_through_large_decoder(make_job(sd1, UNGUIDED))
