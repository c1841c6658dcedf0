"""The benchmark at sizes of seconds: does it measure what it says, and notice what it should?"""

import dataclasses
import json

import bench_sampling
import pytest
import torch
from bench.arms import DIVIDED, KLDB, PROMPT, RISKY, arms_of
from bench.checks import Agreement, check_published, grey_levels
from bench.measure import Measured, kind_of
from bench.naive import RISKY_COLUMNS
from bench.programs import Bench
from bench.sizes import ARCHITECTURES, digits_setting, random_setting
from bench.tables import SPEED_GOALS, Results, write_into
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel

from engine.models.arithmetic import Arithmetic, count_decoder, count_pipeline, on_meta
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
    time, text = torch.zeros(1, device="meta"), torch.empty(1, 77, 768, device="meta")
    counted = count_pipeline(lambda z: unet(z, time, text).sample, vae, torch.empty(1, 4, 64, 64, device="meta"))
    assert counted.unet / TERA == pytest.approx(0.80, abs=0.01)
    assert counted.decode / TERA == pytest.approx(2.5, abs=0.05)
    assert (counted.guide_decode + counted.guide_decode_backward) / TERA == pytest.approx(5.1, abs=0.05)
    prompt = counted.prompt(40)
    assert prompt / TERA == pytest.approx(66.8, abs=0.1)
    assert counted.guided(40, 8) / prompt == pytest.approx(1.61, abs=0.01)
    through = counted.guided(40, 8, num_through_unet=8)
    assert through / prompt == pytest.approx(1.72, abs=0.01)
    assert (through + 8 * counted.unet) / prompt == pytest.approx(1.81, abs=0.01)
    assert counted.guided(20, 20) / counted.prompt(20) == pytest.approx(3.9, abs=0.05)
    assert count_decoder(on_meta(AutoencoderTiny), 4, 64)[0] < counted.guide_decode / 10
    # The parameters of the published models.
    assert [sum(one.numel() for one in model.parameters()) for model in (unet, vae)] == [859_520_964, 83_653_863]


@pytest.mark.slow
def test_the_benchmark_runs_and_writes_what_it_found(models, tmp_path, capsys):
    """The whole program: comparisons hold, every arm has a figure or a reason, floors and references are there."""
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- measured: tiny -->\nold\n<!-- end of tiny -->\nafter\n")
    few = ["--num-samples", "2", "--repeats", "1", "--processes", "1", "--into", str(page)]
    arms = ["plain-diffusers", "published-kldb", "kldb-norm-unet", "kldb-polyak"]
    arms += ["published-risky", "risky-paper", "kldb-polyak@fp16", "risky-paper@tiny", "kldb-polyak@workers"]
    command = ["--size", "tiny", "--device", "cpu", "--models", str(models), "--output", str(tmp_path), *few]
    assert bench_sampling.main([*command, "--only", *arms, "--profile", "prompt"]) == 0
    found = json.loads((tmp_path / "tiny.json").read_text())
    tables = (tmp_path / "tiny.md").read_text()
    assert tables == capsys.readouterr().out
    assert page.read_text() == f"before\n<!-- measured: tiny -->\n\n{tables}\n<!-- end of tiny -->\nafter\n"
    assert found["versions"]["torch"] and found["hardware"] and found["threads"] == 1 and found["date"]
    assert [check["what"] for check in found["checks"]] == [
        *("published-kldb and kldb-norm-unet", "plain-diffusers and prompt", "published-risky and risky-paper")
    ]
    by_name = {one["name"]: one for one in found["arms"]}
    assert {"prompt", "prompt-unclip", "prompt@fp16", "prompt-unclip@tiny", "prompt@workers", *arms} == set(by_name)
    assert all(bool(one["seconds"]) != bool(one["reason"]) for one in by_name.values())
    assert by_name["kldb-polyak@fp16"]["reason"].startswith("a runtime for a GPU")
    assert by_name["prompt"]["ratio_to_prompt"] == 1 == by_name["prompt"]["floor"]
    assert by_name["kldb-norm-unet"]["floor"] > by_name["kldb-polyak"]["floor"] > 1
    assert by_name["risky-paper"]["floor"] > by_name["risky-paper@tiny"]["floor"] > 1
    assert sum(by_name["prompt"]["profile"]["shares"].values()) == pytest.approx(1)
    # Medians and seconds are over the same samples, and what both make has the same median.
    alone = [one for one in by_name.values() if one["seconds"] and not one["is_divided"]]
    assert {one["num_samples"] for one in alone} == {2} and all(one["score"] >= 0 for one in alone)
    assert by_name["published-kldb"]["score"] == pytest.approx(by_name["kldb-norm-unet"]["score"], abs=0.01)
    assert all(one["cpu_seconds_per_image"] > 0 for one in alone)


def test_tables_have_a_place_in_the_page(tmp_path):
    """The page of this repository has one for the digits; a page without is left alone."""
    text = (REPOSITORY / "docs" / "benchmarks.md").read_text()
    assert text.count("<!-- measured: digits -->\n") == 1 == text.count("<!-- end of digits -->")
    page = tmp_path / "page.md"
    page.write_text("nothing\n<!-- end of digits -->\n")
    with pytest.raises(ValueError, match="no place"):
        write_into(page, "digits", "tables")
    assert page.read_text() == "nothing\n<!-- end of digits -->\n"


def test_published_loops_are_compared_with_as_many_processes():
    """Two processes of the engine against one of the published loop would double every factor."""
    arms = {arm.name: arm for arm in arms_of(digits_setting())}
    seconds = {"published-kldb": 8.0, "kldb-norm-unet": 2.0, f"kldb-norm-unet@{DIVIDED}": 1.0}
    measured = [
        Measured(arm=arms[name], num_samples=1, seconds=[2 * took], cpu_seconds=[took])
        for name, took in seconds.items()
    ]
    about = {"size": "digits", "device": "cpu", "num_steps": {"boundary": 40, "risky": 20}}
    results = Results(about=about, measured=measured, checks=[], arithmetic={}, rates={})
    against = {goal.what: goal.value for goal in results.goals()}
    assert against == {"kldb-norm-unet against published-kldb, times": 4.0}
    for arm in arms.values():
        assert not (arm.program == "published" and arm.is_divided), arm.name
        if arm.twin:
            assert arms[arm.twin].group == arm.group and arms[arm.twin].guidance == arm.guidance, arm.name


def test_published_loops_call_the_models_as_the_authors_do(models):
    """Rows of every UNet and decoder call: neither more work than the public code does, nor less."""
    setting = random_setting("tiny", models, "cpu")
    steps = {"boundary": ARCHITECTURES["tiny"].boundary_steps, "risky": ARCHITECTURES["tiny"].risky_steps}
    expected = {
        # Both halves at once; at every fifth step the conditional half again, with a gradient.
        "published-kldb": ([(2, False)] * 5 + [(1, True)] + [(2, False)] * (steps["boundary"] - 5), [1, 1]),
        # Two samples a call, their gradients one by one.
        "published-risky": ([(2 * RISKY_COLUMNS, False)] * steps["risky"], [1] * RISKY_COLUMNS * steps["risky"] + [2]),
    }
    for arm in arms_of(setting):
        if arm.name not in expected:
            continue
        bench = Bench(setting, [arm], device="cpu", num_samples=2)
        unet, decoder, size = [], [], bench.batch_size(arm, 16)
        bench.naive.pipeline.unet.register_forward_pre_hook(
            lambda _, given, seen=unet: seen.append((len(given[0]), torch.is_grad_enabled()))
        )
        bench.naive.vae.decoder.register_forward_pre_hook(lambda _, given, seen=decoder: seen.append(len(given[0])))
        assert bench.images(arm, bench.batch(size)).shape[0] == size
        assert (unet, decoder) == expected[arm.name], arm.name


def test_floors_follow_the_guided_steps():
    """By hand: steps that are skipped, gradients through the UNet and behind the tiny decoder, two criteria, CLIP."""
    counted = Arithmetic(unet=1, unet_backward=2, decode=3, guide_decode=3, guide_decode_backward=4, target=5, clip=6)
    tiny = dataclasses.replace(counted, guide_decode=1, guide_decode_backward=1)
    results = Results(
        about={"num_steps": {"boundary": 40, "risk": 40, "risky": 20}},
        measured=[],
        checks=[],
        arithmetic={
            **dict.fromkeys(("boundary", "risk", "risky"), counted),
            **{f"{family}/tiny": tiny for family in ("boundary", "risk", "risky")},
        },
        rates={},
    )
    setting = dataclasses.replace(digits_setting(), tiny="zoo:digits/tiny-autoencoder")
    floors = {arm.name: results.floor(Measured(arm=arm)) for arm in arms_of(setting)}
    assert floors["prompt"] == floors["prompt@tiny"] == floors["plain-diffusers"] == 1
    assert floors["kldb-polyak"] == pytest.approx(1 + 7 * (3 + 4 + 5) / 83)
    assert floors["kldb-norm"] == pytest.approx(1 + 7 * 12 / 83)
    assert floors["kldb-norm-unet"] == floors["published-kldb"] == pytest.approx(1 + 8 * (12 + 2) / 83)
    assert floors["kldb-polyak-every-step"] == pytest.approx(1 + 39 * 12 / 83)
    assert floors["kldb-polyak@tiny"] == pytest.approx(1 + 7 * (1 + 1 + 5) / 83)
    assert floors["risky-paper"] == pytest.approx(1 + 20 * (12 + 6) / 43)
    assert floors["risky-polyak"] == pytest.approx(1 + 19 * 12 / 43)
    assert floors["risk-polyak"] == pytest.approx(1 + 39 * 12 / 83)
    assert floors["kldb-polyak-unet-every-2nd"] == pytest.approx(1 + 19 * (12 + 2) / 83)
    # At 1, 4, ..., 37 through the UNet, and at 40, after which nothing is denoised.
    assert floors["kldb-perceptible"] == floors["risk-perceptible"] == pytest.approx(1 + (14 * 12 + 13 * 2) / 83)
    # At 2, 5, ..., 17, and at 20.
    assert floors["risky-perceptible"] == pytest.approx(1 + (7 * 12 + 6 * 2) / 43)
    assert floors["kldb-perceptible@tiny"] == pytest.approx(1 + (14 * 7 + 13 * 2) / 83)
    assert floors["risky-polyak-floor"] == pytest.approx(1 + 19 * (12 + 4 + 6) / 43)


# What is not the published guidance any more, in the engine or in the loop.
OTHERWISE = {
    "published-kldb": (
        *({"alpha": 0.051}, {"gradient": "detached"}, {"skip_last": True}, {"every": 4}, {"step": "paper"}),
        {"alpha": -KLDB["alpha"]},
    ),
    "published-risky": (
        *({"scale": 10.2}, {"skip_last": True}, {"gradient_range": 0.5}, {"conformity_weight": 0.0}),
        *({"conformity": "cosine"}, {"scale": -RISKY["scale"]}),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERWISE)
def test_the_comparison_notices_another_algorithm(name):
    """Another size, sign, schedule or gradient is not rounding; the same algorithm holds, in batches of other sizes."""
    digits = digits_setting()
    setting = dataclasses.replace(
        digits,
        boundary_sampling=digits.boundary_sampling | {"num_inference_steps": 10},
        risky_sampling=digits.risky_sampling | {"num_inference_steps": 5},
    )
    published = next(arm for arm in arms_of(setting) if arm.name == name)
    twin = next(arm for arm in arms_of(setting) if arm.name == published.twin)
    allowed, backwards = OTHERWISE[name][:-1], OTHERWISE[name][-1]
    others = [dataclasses.replace(twin, name=str(one), guidance=twin.guidance | one) for one in allowed]
    bench = Bench(setting, [twin, *others], device="cpu", num_samples=3)
    batch, made = bench.batch(3), bench.published
    # What it makes of a sample is compared with every other algorithm.
    remembered: dict[tuple[str, tuple[int, ...]], tuple[torch.Tensor, list[torch.Tensor]]] = {}

    def published_once(arm, part, trace):
        key = str(arm.guidance), tuple(part.seeds)
        if key not in remembered:
            kept: list[torch.Tensor] = []
            remembered[key] = made(arm, part, kept), kept
        trace += remembered[key][1]
        return remembered[key][0]

    bench.published = published_once
    with torch.no_grad():
        assert check_published(bench, published, twin, batch).holds
        for other in others:
            check = check_published(bench, published, other, batch)
            assert not check.holds, str(check)
        wrong_sign = dataclasses.replace(published, guidance=published.guidance | backwards)
        assert not check_published(bench, wrong_sign, twin, batch).holds


def test_a_few_samples_may_go_astray_by_rounding():
    """One in eight that ends 0.27 away is no other algorithm; half of them are, and so is what is not a number."""
    for num_astray, holds in ((0, True), (1, True), (3, True), (4, False), (8, False)):
        distances = (0.27,) * num_astray + (2e-6,) * (8 - num_astray)
        agreement = Agreement(what="latents", distances=distances, tolerance=2e-5, unit="")
        assert agreement.holds is holds and agreement.num_within == 8 - num_astray
    images = 0.9 * torch.rand(8, 3, 4, 4)
    assert grey_levels(images, images) == (0.0,) * 8
    assert grey_levels(images, images + 2 / 255) == (2.0,) * 8
    assert grey_levels(images, images * torch.nan) == (float("inf"),) * 8


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


def test_goals_in_images_a_second_are_medians(models):
    """Of the arms that they name, which exist, on a GPU at Stable Diffusion's size; one lucky batch meets none."""
    arms = {arm.name: arm for arm in arms_of(random_setting("tiny", models, "cpu"))}
    measured = [
        Measured(arm=arms[name], num_samples=10, seconds=[10 / (3 * goal), 10 / goal, 11 / goal], cpu_seconds=[1.0] * 3)
        for name, goal in SPEED_GOALS
    ]
    about = {"size": "sd1", "device": "cuda", "num_steps": dict.fromkeys(PROMPT, 40)}
    results = Results(about=about, measured=measured, checks=[], arithmetic={}, rates={})
    assert [(goal.value, goal.is_met) for goal in results.speeds()] == [
        (pytest.approx(goal), True) for _, goal in SPEED_GOALS
    ]
    measured[0].seconds = [10 / 9.4, 10 / 4.6, 10 / 4.6]
    assert not results.speeds()[0].is_met
    results.measured = measured[:1]
    assert [goal.what for goal in results.speeds()] == ["prompt, images/s"]


def test_an_arm_that_fails_later_ends_nothing_else(models, tmp_path, monkeypatch):
    """As where a later round of an arm runs out of memory: it is noted, the others are measured, files written."""
    repeated, rounds = bench_sampling.repeat, []

    def failing(bench, one, batch):
        rounds.append(one.arm.name)
        if rounds.count("kldb-polyak") == 2 and one.arm.name == "kldb-polyak":
            raise torch.OutOfMemoryError("no memory is left")
        repeated(bench, one, batch)

    monkeypatch.setattr(bench_sampling, "repeat", failing)
    few = ["--num-samples", "1", "--repeats", "3", "--only", "kldb-polyak", "--name", "few"]
    command = ["--size", "tiny", "--device", "cpu", "--models", str(models), "--output", str(tmp_path), *few]
    assert bench_sampling.main(command) == 0
    by_name = {one["name"]: one for one in json.loads((tmp_path / "few.json").read_text())["arms"]}
    assert len(by_name["prompt"]["seconds"]) == 3 and len(by_name["kldb-polyak"]["seconds"]) == 1
    assert "does not fit" in by_name["kldb-polyak"]["reason"]
