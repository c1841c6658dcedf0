"""The benchmark and the GPU session at sizes of seconds: do they measure what they say, and notice what they should?"""

import dataclasses
import json
import sys
import time

import bench_sampling
import pytest
import torch
from bench.arms import arms_of
from bench.checks import TOLERANCE, relative_difference
from bench.flops import Arithmetic, count_decoder, count_pipeline, on_meta
from bench.measure import Measured, kind_of
from bench.programs import Bench
from bench.sizes import ARCHITECTURES, digits_setting, random_setting
from bench.tables import Results
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from gpu_session import Step, parse, run_steps, session_steps

from tests.conftest import REPOSITORY

TERA = 1e12


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folder of the tiny models, drawn once."""
    folder = tmp_path_factory.mktemp("models")
    random_setting("tiny", folder, "cpu")
    return folder


def test_the_arithmetic_of_stable_diffusion_is_the_published_one():
    """Counted without weights: UNet 0.80 TFLOP, decoder 2.5, its gradient 5.1, and the least that guidance costs."""
    unet = on_meta(lambda: UNet2DConditionModel(**ARCHITECTURES["sd1"].unet))
    vae = on_meta(lambda: AutoencoderKL(**ARCHITECTURES["sd1"].vae))
    counted = count_pipeline(unet, vae, tokens=77, width=768)
    assert counted.unet / TERA == pytest.approx(0.80, abs=0.01)
    assert counted.decode / TERA == pytest.approx(2.5, abs=0.05)
    assert (counted.guide_decode + counted.guide_decode_backward) / TERA == pytest.approx(5.1, abs=0.05)
    prompt = counted.prompt(40)
    assert prompt / TERA == pytest.approx(66.8, abs=0.1)
    assert counted.guided(40, 8) / prompt == pytest.approx(1.61, abs=0.01)
    through = counted.guided(40, 8, through_unet=True)
    assert through / prompt == pytest.approx(1.72, abs=0.01)
    assert (through + 8 * counted.unet) / prompt == pytest.approx(1.81, abs=0.01)
    assert counted.guided(20, 20) / counted.prompt(20) == pytest.approx(3.9, abs=0.05)
    assert count_decoder(on_meta(AutoencoderTiny), 4, 64)[0] < counted.guide_decode / 10
    # The parameters of the published models.
    assert [sum(one.numel() for one in model.parameters()) for model in (unet, vae)] == [859_520_964, 83_653_863]


def test_the_benchmark_runs_and_writes_what_it_found(models, tmp_path, capsys):
    """The whole program: comparisons hold, every arm has a figure or a reason, floors and references are there."""
    few = ["--num-samples", "2", "--naive-samples", "1", "--check-samples", "1", "--repeats", "1", "--threads", "1"]
    arms = ["plain-diffusers", "naive-kldb-paper-unet", "kldb-paper-unet", "kldb-polyak"]
    arms += ["naive-risky", "risky-paper", "kldb-polyak@fp16", "risky-paper@tiny", "kldb-polyak@workers"]
    command = ["--size", "tiny", "--device", "cpu", "--models", str(models), "--output", str(tmp_path), *few]
    assert bench_sampling.main([*command, "--only", *arms, "--profile", "prompt"]) == 0
    found = json.loads((tmp_path / "tiny.json").read_text())
    assert (tmp_path / "tiny.md").read_text() == capsys.readouterr().out
    assert found["versions"]["torch"] and found["hardware"] and found["threads"] == 1 and found["date"]
    checks = {one["what"]: one["difference"] for one in found["checks"]}
    assert len(checks) == 5 and max(checks.values()) < TOLERANCE
    by_name = {one["name"]: one for one in found["arms"]}
    assert {"prompt", "prompt-unclip", "prompt@fp16", "prompt-unclip@tiny", "prompt@workers", *arms} == set(by_name)
    assert all(bool(one["seconds"]) != bool(one["reason"]) for one in by_name.values())
    assert by_name["kldb-polyak@fp16"]["reason"].startswith("a runtime for a GPU")
    assert by_name["prompt"]["ratio_to_prompt"] == 1 == by_name["prompt"]["floor"]
    assert by_name["kldb-paper-unet"]["floor"] > by_name["kldb-polyak"]["floor"] > 1
    assert by_name["risky-paper"]["floor"] > by_name["risky-paper@tiny"]["floor"] > 1
    assert by_name["kldb-polyak"]["kldb"] >= 0 and by_name["risky-paper"]["risk"] >= 0
    assert sum(by_name["prompt"]["profile"]["shares"].values()) == pytest.approx(1)


def test_floors_follow_the_guided_steps():
    """By hand: steps that are skipped, gradients through the UNet and behind the tiny decoder, two criteria, CLIP."""
    counted = Arithmetic(unet=1, unet_backward=2, decode=3, guide_decode=3, guide_decode_backward=4, target=5, clip=6)
    tiny = dataclasses.replace(counted, guide_decode=1, guide_decode_backward=1)
    results = Results(
        about={"num_steps": {"boundary": 40, "risky": 20}},
        measured=[],
        checks=[],
        arithmetic={"boundary": counted, "risky": counted, "boundary/tiny": tiny, "risky/tiny": tiny},
        rates={},
    )
    setting = dataclasses.replace(digits_setting(), tiny="zoo:digits/tiny-autoencoder")
    floors = {arm.name: results.floor(Measured(arm=arm)) for arm in arms_of(setting)}
    assert floors["prompt"] == floors["prompt@tiny"] == floors["plain-diffusers"] == 1
    assert floors["kldb-polyak"] == pytest.approx(1 + 7 * (3 + 4 + 5) / 83)
    assert floors["kldb-norm"] == floors["naive-kldb-norm"] == pytest.approx(1 + 8 * 12 / 83)
    assert floors["kldb-paper-unet"] == pytest.approx(1 + 8 * (12 + 2) / 83)
    assert floors["kldb-polyak-every-step"] == pytest.approx(1 + 39 * 12 / 83)
    assert floors["kldb-polyak@tiny"] == pytest.approx(1 + 7 * (1 + 1 + 5) / 83)
    assert floors["risky-paper"] == pytest.approx(1 + 20 * (12 + 6) / 43)
    assert floors["risky-polyak"] == pytest.approx(1 + 19 * 12 / 43)
    assert floors["risky-polyak-floor"] == pytest.approx(1 + 19 * (12 + 4 + 6) / 43)


def test_the_comparison_notices_another_step(models):
    """A step one fifth longer, or another sample's noise, is not rounding: what holds by itself proves nothing."""
    setting = random_setting("tiny", models, "cpu")
    for family, naive, twin in (("boundary", "naive-kldb-norm", "kldb-norm"), ("risky", "naive-risky", "risky-paper")):
        arms = {arm.name: arm for arm in arms_of(setting) if arm.name in (naive, twin)}
        bench = Bench(setting, list(arms.values()), device="cpu", num_samples=2)
        batch = bench.batch(2)
        first, second = batch.part(0, 1), batch.part(1, 2)
        ours = bench.latents(arms[twin], first)
        size = arms[naive].guidance.get("alpha") or arms[naive].guidance["scale"]
        assert relative_difference(ours, bench.naive_latents(arms[naive], first)) < TOLERANCE / 10, family
        assert relative_difference(ours, bench.naive_latents(arms[naive], first, 1.2 * size)) > TOLERANCE, family
        assert relative_difference(ours, bench.naive_latents(arms[naive], second)) > TOLERANCE, family
    assert relative_difference(ours, ours * torch.nan) == float("inf")


def test_operators_are_sorted_by_what_they_are_for():
    """Names of a CPU and of a GPU alike."""
    names = {
        "aten::mkldnn_convolution": "conv",
        "sm90_xmma_fprop_implicit_gemm_f16f16": "conv",
        "aten::addmm": "matmul",
        "nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNN": "matmul",
        "void at::native::elementwise_kernel<128, 4>": "elementwise",
        "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
        "pytorch_flash::flash_fwd_kernel": "attention",
        "aten::native_group_norm": "norm",
        "aten::copy_": "copies",
        "Memcpy DtoD": "copies",
    }
    assert {name: kind_of(name) for name in names} == names


def python(code):
    return (sys.executable, "-c", code)


def test_a_session_goes_on_after_failures_and_is_resumed(tmp_path):
    """A failing step, one that hangs with a child of its own, one that works: only what is not done runs again."""
    child = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(3600)'])"
    steps = [
        Step(name="broken", command=python("print('seen'); raise SystemExit(3)"), limit_seconds=300),
        Step(name="slow", command=python(f"{child}; time.sleep(3600)"), limit_seconds=1),
        Step(name="fine", command=python("import engine, os; print(engine.__file__)"), limit_seconds=300),
    ]
    started = time.monotonic()
    states = [one.state for one in run_steps(steps, tmp_path)]
    assert states == ["failed (exit code 3)", "ran out of time", "done"] and time.monotonic() - started < 1800
    assert "seen" in (tmp_path / "broken.log").read_text()
    assert str(REPOSITORY) in (tmp_path / "fine.log").read_text()
    steps[0] = Step(name="broken", command=python("pass"), limit_seconds=300)
    again = run_steps([steps[0], steps[2]], tmp_path)
    assert [one.state for one in again] == ["done", "done before"] and all(one.is_good for one in again)
    assert [one["name"] for one in json.loads((tmp_path / "summary.json").read_text())] == ["broken", "fine"]


def test_a_session_asks_the_tools_for_what_they_have(tmp_path):
    """Options that a tool does not know would cost a GPU its time: the real tools parse their command lines."""
    steps = session_steps(sys.executable, parse(["--output", str(tmp_path), "--limit", "sd1=100"]))
    assert [step.name for step in steps] == ["gpu", "tests", "digits", "sd1", "sd21-unclip"]
    assert steps[3].limit_seconds == 100 and "70" in steps[3].command
    for step in steps[2:]:
        assert bench_sampling.parse(step.command[2:]).size == step.name
    assert "tests/gpu" in steps[1].command and list((REPOSITORY / "tests" / "gpu").glob("test_*.py"))
