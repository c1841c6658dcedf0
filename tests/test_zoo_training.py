"""The trainer of the zoo `cifar10`, from noise for images: two steps a stage, and trainings that are interrupted.

Sees a stage that no longer runs, exports what its library cannot load, is trained twice, or goes on from another state
than it was left in; not how good models are.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableUnCLIPImg2ImgPipeline
from transformers import AutoModelForImageClassification, CLIPModel

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tools" / "zoo"), str(ROOT)]
import evaluate_cifar10  # noqa: E402
import train_cifar10  # noqa: E402
from cifar10_captions import CaptionedPhotographs, Copies, caption_words, framed, with_copies  # noqa: E402
from cifar10_contexts import (  # noqa: E402
    ATTRIBUTES,
    FAR,
    LEFT,
    NEAR,
    Measures,
    Thresholds,
    edge_sharpness,
    is_plain,
    measure,
)
from cifar10_data import Photographs, blur, check_data, distort, load_test  # noqa: E402
from cifar10_unets import UnetSettings, draw_captions, for_training, training_loss  # noqa: E402
from diffusers import DDPMScheduler  # noqa: E402
from drawing import Sampling  # noqa: E402
from publishing import publish_parts, store_once, stored_bytes, unfinished, write_checksums  # noqa: E402
from replicas import Replicas  # noqa: E402
from training import Recipe, fit  # noqa: E402

from tests import commands  # noqa: E402
from tools.targets.cifar_resnets import WEIGHTS, CifarResNet  # noqa: E402


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder in the form of the real data."""
    rng = np.random.default_rng(0)
    classes = np.array(["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"])
    (tmp_path / "cifar10").mkdir()
    for name in [*(f"cifar10_train_{i}of8" for i in range(8)), "cifar10_test_5000"]:
        images = rng.integers(256, size=(60, 32, 32, 3), dtype=np.uint8)
        np.savez(tmp_path / "cifar10" / f"{name}.npz", images=images, labels=np.arange(60) % 10, classes=classes)
    (tmp_path / "classifiers").mkdir()
    torch.manual_seed(0)
    for name, depth in (("resnet20", 3), ("resnet32", 5)):
        weights = {f"module.{key}": value for key, value in CifarResNet(depth).state_dict().items()}
        torch.save({"state_dict": weights}, tmp_path / "classifiers" / WEIGHTS[name])
    return tmp_path


def train(data: Path, *options: str) -> str:
    """Run the script; what it printed."""
    command = ["tools/zoo/train_cifar10.py", "--data", data, "--build-folder", data / "build"]
    short = ["--size", "cpu", "--max-steps", "2", "--threads", "1", *options]
    done = commands.python(*command, *short, folder=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_all_stages_run_once_and_export_what_libraries_load(data: Path) -> None:
    """Two calls share the stages; the second trains what the first left and publishes everything."""
    assert "oracle: done" in train(data, "--only", "oracle")
    output = data / "zoo"
    printed = train(data, "--output", str(output))
    assert "stable-unclip: done" in printed and "oracle: done" not in printed
    assert json.loads((output / "classes.json").read_text()) == ["airplane", "cat", "dog", "ship"]
    pipeline = StableDiffusionPipeline.from_pretrained(output / "stable-diffusion")
    assert pipeline("a photo of a cat", num_inference_steps=2, output_type="np").images.shape == (1, 32, 32, 3)
    assert StableUnCLIPImg2ImgPipeline.from_pretrained(output / "stable-unclip").unet.config.in_channels == 12
    for name in ("oracle", "oracle-b", "classifier", "classifier-b"):
        assert AutoModelForImageClassification.from_pretrained(output / name).config.num_labels == 10
        assert json.loads((output / name / "config.json").read_text())["temperature"] > 0
    assert CLIPModel.from_pretrained(output / "judge").config.projection_dim == 64
    shared = output / "stable-unclip" / "vae" / "diffusion_pytorch_model.safetensors"
    assert shared.is_symlink() and shared.read_bytes()
    assert set(json.loads((output / "contexts.json").read_text())) == {"dark_below", "bright_above", "blurry_below"}
    assert_measured(output, data)


def assert_measured(zoo: Path, data: Path) -> None:
    """Every figure of a zoo that knows nothing is a number, and every sheet is written."""
    docs = data / "docs"
    docs.mkdir()
    few: dict[str, Any] = dict.fromkeys(("NUM_JOINT", "NUM_STARTS", "NUM_OBEYING"), 4)
    few |= {"NUM_VARIATIONS": 40, "SAMPLING": Sampling(num_inference_steps=4)}
    few["load_test"] = lambda folder, part: load_test(folder, "tuning")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in few.items():
            patch.setattr(evaluate_cifar10, name, value)
        evaluation = evaluate_cifar10.Evaluation(zoo, data, count=40)
        figures = evaluation.figures(docs)
        evaluation.save_sheets(docs)
    json.loads(json.dumps(figures), parse_constant=pytest.fail)
    assert set(figures["contexts obeyed"]) == {phrase for values in ATTRIBUTES.values() for phrase in values} - {""}
    assert {path.name for path in docs.iterdir()} == {
        f"cifar10{kind}.png" for kind in ("", "-variations", "-starts", "-nearest")
    }


PAUSE = 0.0
RECIPE = Recipe(num_steps=6, learning_rate=1e-3, warmup_steps=2, ema_decay=0.9, checkpoint_every=2)
SETTINGS = UnetSettings(prediction="v_prediction", widths=(16, 16), batch_size=4)


def trained(folder: Path, *, num_replicas: int = 1, stop_at: int = -1, killed: bool = False) -> dict[str, torch.Tensor]:
    """Weights of a small UNet after `fit`, which is interrupted in one step and called again."""
    torch.manual_seed(0)
    unet = for_training(SETTINGS.build())
    latents, states = torch.randn(32, 12, 8, 8), torch.randn(4, 8, 96)
    noise_levels = DDPMScheduler(**SETTINGS.noise_config).alphas_cumprod
    calls = 0

    def loss(rng: np.random.Generator) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == stop_at + 1 and multiprocessing.parent_process() is None:
            if killed:
                raise KeyError("as if the power had failed")
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(PAUSE)
        rows = rng.integers(len(latents), size=SETTINGS.batch_size)
        timesteps = SETTINGS.draw_timesteps(rng, len(rows))
        return training_loss(unet, SETTINGS, latents[rows], states, timesteps, noise_levels)

    recipe = dataclasses.replace(RECIPE, num_replicas=num_replicas)
    handler = signal.getsignal(signal.SIGTERM)
    if stop_at >= 0:
        with pytest.raises(KeyError if killed else SystemExit) as left:
            fit("unet", unet, loss, recipe, seed=3, folder=folder)
        assert killed or left.value.code == 128 + signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == handler
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in unet.parameters():
                parameter.fill_(torch.nan)
    fit("unet", unet, loss, recipe, seed=3, folder=folder)
    return unet.state_dict()


@pytest.mark.parametrize("num_replicas", [1, 2])
@pytest.mark.parametrize("killed", [False, True])
def test_a_resumed_training_equals_an_uninterrupted_one(num_replicas: int, killed: bool, tmp_path: Path) -> None:
    """Weights, averages, moments, rates and random streams: after a signal nothing is lost, after a kill few steps."""
    whole = trained(tmp_path / "whole", num_replicas=num_replicas)
    for step in (0, 3):
        if killed and step == 0:
            continue  # There is no checkpoint yet: the training starts again, from the weights that are gone.
        parts = trained(tmp_path / f"{step}", num_replicas=num_replicas, stop_at=step, killed=killed)
        assert all(torch.equal(value, parts[name]) for name, value in whole.items()), step


PIECE = """
import sys, time
sys.path[:0] = [{root!r}, {zoo!r}]
from tests.test_zoo_training import trained
import tests.test_zoo_training as module
module.PAUSE = 0.2
trained(module.Path({folder!r}), num_replicas=2)
"""


def test_a_signal_to_the_whole_group_loses_nothing(tmp_path: Path) -> None:
    """As `timeout` sends it, to the replicas too, and as `uv run` passes it on: twice."""
    code = PIECE.format(root=str(ROOT), zoo=str(ROOT / "tools" / "zoo"), folder=str(tmp_path))
    command = [sys.executable, "-c", code]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    piece = subprocess.Popen(command, start_new_session=True, cwd=ROOT, **pipes)
    until = time.monotonic() + 120
    while not (tmp_path / "unet.pt").exists() and time.monotonic() < until:
        time.sleep(0.02)
    for _ in range(2):
        os.killpg(piece.pid, signal.SIGTERM)
    printed, errors = piece.communicate(timeout=60)
    assert piece.returncode == 128 + signal.SIGTERM, errors[-2000:]
    assert "the same command goes on from there" in printed
    whole, parts = trained(tmp_path / "whole", num_replicas=2), trained(tmp_path, num_replicas=2)
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_a_replica_that_dies_ends_the_step() -> None:
    """A process that was killed for its memory is not waited for."""
    module = torch.nn.Linear(2, 1)

    def loss(step: int, replica: int) -> torch.Tensor:
        if replica:
            os.kill(os.getpid(), signal.SIGKILL)
        return module(torch.ones(1, 2)).sum()

    with pytest.raises(RuntimeError, match="has died"), Replicas(module, loss, count=2, steps=range(2)) as replicas:
        replicas.backward(0)


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    """Rate, seed or sizes: the file is named, with both, and stays as it is."""
    module = torch.nn.Linear(2, 1)

    def attempt(module: torch.nn.Module, recipe: Recipe, seed: int) -> None:
        fit("one", module, lambda rng: module(torch.ones(1, 2)).sum(), recipe, seed=seed, folder=tmp_path)

    attempt(module, RECIPE, 0)
    before = (tmp_path / "one.pt").read_bytes()
    faster = dataclasses.replace(RECIPE, learning_rate=0.5)
    for other, recipe, seed in ((module, faster, 0), (module, RECIPE, 1), (torch.nn.Linear(2, 3), RECIPE, 0)):
        with pytest.raises(SystemExit, match=r"one\.pt was made with .*choose another --build-folder"):
            attempt(other, recipe, seed)
    assert (tmp_path / "one.pt").read_bytes() == before


def test_parts_that_share_files_are_published_together(tmp_path: Path) -> None:
    """Every part whole; equal weights once, as links that are relative; a part is replaced, not added to."""
    build, output = tmp_path / "build", tmp_path / "zoo"
    for part in ("first", "second"):
        (build / "export" / part).mkdir(parents=True)
        (build / "export" / part / "model.safetensors").write_bytes(b"the same")
        (build / "export" / part / "config.json").write_text("{}")
    (output / "second").mkdir(parents=True)
    (output / "second" / "stale.json").write_text("{}")
    assert unfinished(build, ["first"]) == ["first"]
    publish_parts(build, output, ["first", "second"])
    store_once(output)
    store_once(output)
    weights = output / "second" / "model.safetensors"
    assert weights.is_symlink() and weights.read_bytes() == b"the same" and not weights.readlink().is_absolute()
    assert not (output / "second" / "config.json").is_symlink() and not (output / "second" / "stale.json").exists()
    assert stored_bytes(output) == 8 + 2 + 2
    write_checksums(output)
    assert len((output / "SHA256SUMS").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--only", "oracles"], "choose from 'classifier-b', 'oracle'"),
        (["--threads", "0"], "give a number from 1"),
        (["--max-steps", "2", "--only", "clip"], "the stage needs classifier-b, which is not done in"),
        (["--size", "gpu", "--only", "oracle"], "torch finds no CUDA device"),
        (["--output", "/proc/zoo", "--only", "oracle"], "--output: /proc/zoo"),
        (["--data", "/nowhere"], "--data: /nowhere/cifar10/cifar10_train_0of8.npz: No such file"),
    ],
)
def test_what_cannot_be_trained_is_said_first(
    options: list[str], said: str, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By name, with a remedy, and before any hour is spent."""
    if "gpu" in options and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    places = ["--data", str(data), "--build-folder", str(data / "build"), "--size", "cpu"]
    monkeypatch.setattr(sys, "argv", ["train_cifar10.py", *places, *options])
    with pytest.raises(SystemExit) as left:
        train_cifar10.main()
    assert left.value.code not in (0, None) and said in f"{left.value.code} {capsys.readouterr().err}"


def test_a_zoo_that_lacks_parts_is_not_measured(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is missing is named, before a model is loaded."""
    (data / "zoo" / "oracle").mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", ["evaluate_cifar10.py", "--data", str(data), "--zoo", str(data / "zoo")])
    with pytest.raises(SystemExit):
        evaluate_cifar10.main()
    said = capsys.readouterr().err
    assert "has no classifier, classifier-b, oracle-b, clip" in said and "contexts.json" in said


def test_data_that_is_none_is_named(data: Path) -> None:
    """A damaged archive, one without labels, and images of another size."""
    path = data / "cifar10" / "cifar10_train_3of8.npz"
    check_data(data)
    for content in (
        {"images": np.zeros((2, 32, 32, 3), np.uint8)},
        {"images": np.zeros((2, 28, 28)), "labels": [0, 1]},
    ):
        np.savez(path, **content)
        with pytest.raises(SystemExit, match="cifar10_train_3of8"):
            check_data(data)
    path.write_bytes(b"PK no archive")
    with pytest.raises(SystemExit, match="cifar10_train_3of8"):
        check_data(data)


def test_the_text_encoder_learns_from_captions_of_every_length() -> None:
    """From none to all of the phrases, each with the value that it says, and silence as silence."""
    texts, values = draw_captions(np.random.default_rng(0), ("cat", "dog"))
    lengths = {len(text.split(", ")) - 1 for text in texts}
    assert lengths >= {0, 1, 2, 3}
    for row, text in enumerate(texts):
        said = {ATTRIBUTES[name][int(indices[row])] for name, indices in values.items()} - {""}
        assert said == set(text.split(", ")[1:])


def test_even_and_shifted_timesteps() -> None:
    """Every timestep can be drawn, and the share of low noise is the one asked for."""
    rng = np.random.default_rng(0)
    for share in (0.25, 0.4):
        drawn = UnetSettings(low_noise_share=share).draw_timesteps(rng, 20_000)
        assert drawn.min() == 0 and drawn.max() == 999
        assert float((drawn < 250).float().mean()) == pytest.approx(share, abs=0.01)


def painted(ground: tuple[int, int, int], *, left: bool, small: bool) -> np.ndarray:
    """A white square on a ground."""
    image = np.full((32, 32, 3), ground, np.uint8)
    side = 6 if small else 18
    column = 5 if left else 27 - side
    image[7 : 7 + side, column : column + side] = 255
    return image


def whiteness(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Class activation maps of a network that looks for white."""
    return (images.min(-1) == 255).reshape(-1, 8, 4, 8, 4).mean((2, 4)) + 1e-6


def test_contexts_are_what_the_image_shows() -> None:
    """Grounds by name, dark and bright, and blurred: each told from its opposite."""
    colours = {"black": (10, 12, 9), "grey": (128, 130, 126), "white": (240, 241, 238), "brown": (120, 80, 50),
               "green": (60, 140, 50), "blue": (70, 110, 200)}  # fmt: skip
    images = np.stack([painted(colour, left=True, small=True) for colour in colours.values()])
    measured = measure(images)
    assert [ATTRIBUTES["ground"][index] for index in measured.ground] == [f"{name} background" for name in colours]
    plain = is_plain(images).tolist()
    assert plain == [True] * 6 and not is_plain(np.indices((32, 32)).sum(0)[None, :, :, None].repeat(3, -1) * 4)[0]
    assert measured.brightness.argsort().tolist()[::5] == [0, 2]
    assert (edge_sharpness(blur(images[1:2]).mean(-1) / 255) < edge_sharpness(images[1:2].mean(-1) / 255) / 2).all()


def test_copies_are_framed_as_they_say() -> None:
    """The square is larger close up, smaller from afar, and on the side that was asked for."""
    images = np.stack([painted((90, 90, 90), left=False, small=False)] * 40)
    data = Photographs(images, np.zeros(40, np.int64))
    blurred, near, left, right, far = (part for part in framed(data, whiteness, 1.0, seed=0))
    share = {name: float((part.photographs.images > 200).mean()) for name, part in
             {"as it is": Copies.of(images, data.labels), "near": near, "far": far}.items()}  # fmt: skip
    assert share["far"] < share["as it is"] / 2 and share["near"] > 1.3 * share["as it is"]
    assert set(near.distance) == {NEAR} and set(far.distance) == {FAR} and set(blurred.distance) == {0}
    small = Photographs(np.stack([painted((90, 90, 90), left=True, small=True)] * 40), data.labels)
    _, _, left, right, _ = framed(small, whiteness, 1.0, seed=0)
    assert len(right.side) == 0  # What stands on the left cannot be cut so that it is on the right.
    columns = (left.photographs.images.min(-1) > 200).sum(1).argmax(1)
    assert set(left.side) == {LEFT} and (columns < 12).all()


def test_captions_say_what_was_measured_and_never_hide_a_blur(tmp_path: Path) -> None:
    """Over many draws every phrase of an image appears, no other one does, and blurred images always say so."""
    rng = np.random.default_rng(0)
    data = Photographs(rng.integers(256, size=(20, 32, 32, 3), dtype=np.uint8), np.arange(20) % 10)
    phrases = [["dark", "blurry"], ["on the left"], ["dark"], []] * 5
    captioned = CaptionedPhotographs(data, phrases)
    texts = captioned.captions(np.arange(20).repeat(40), rng, joint=("cat", "dog"), joint_share=0.2, empty_share=0.1)
    said = [set(text.split(", ")[1:]) for text in texts]
    for row, own in enumerate(phrases):
        mine = said[40 * row : 40 * row + 40]
        assert set.union(*mine) <= set(own)
        contexts = [some for some, text in zip(mine, texts[40 * row : 40 * row + 40], strict=True) if text]
        assert not {"blurry", "on the left"} & set(own) or all({"blurry", "on the left"} & some for some in contexts)
    assert any(" and " in text for text in texts) and "" in texts
    words = set(caption_words())
    assert {word for text in texts for word in text.replace(",", "").split()} <= words
    rows = np.array([0, 10, 1])
    truths = captioned.are_true(rows, ["airplane, dark", "airplane", "automobile, on the right"])
    assert truths.tolist() == [[True, True, False], [True, True, False], [False, False, False]]


def test_hard_classes_are_drawn_more_often() -> None:
    """By their weights, whatever their numbers of images; a class without images never, every image at some time."""
    labels = np.array([3] * 10 + [5] * 30 + [0] * 60)
    captioned = CaptionedPhotographs(Photographs(np.zeros((100, 32, 32, 3), np.uint8), labels), [()] * 100)
    rows = captioned.draw(np.random.default_rng(0), 8000, {"cat": 2.0, "ship": 5.0})
    assert np.bincount(labels[rows], minlength=10)[[0, 3, 5, 8]] / 8000 == pytest.approx([0.25, 0.5, 0.25, 0], abs=0.02)
    assert set(rows.tolist()) == set(range(100))


def test_copies_and_distortions_keep_their_place() -> None:
    """Mirror images follow the images, copies come last, and a distorted batch has the shape and range it had."""
    rng = np.random.default_rng(1)
    data = Photographs(rng.integers(256, size=(50, 32, 32, 3), dtype=np.uint8), np.arange(50) % 10)
    copies = with_copies(data, whiteness)
    assert np.array_equal(copies.photographs.images[50:100], data.images[:, :, ::-1])
    assert 100 < len(copies.photographs.labels) == len(copies.distance) == len(copies.side)
    assert not copies.distance[:100].any() and not copies.side[:100].any()
    batch = torch.rand(64, 3, 32, 32) * 2 - 1
    changed = distort(batch, rng, share=0.5)
    same = (changed == batch).flatten(1).all(1)
    assert changed.shape == batch.shape and 0.3 < same.float().mean() < 0.7
    assert changed.min() >= -1.0001 and changed.max() <= 1.0001 and torch.isfinite(changed).all()


def test_thresholds_leave_the_middle_unsaid() -> None:
    """A fifth on each side is said; blur is only ever said of the least sharp, and of nothing that was enlarged."""
    rng = np.random.default_rng(2)
    measures = Measures(rng.normal(size=1000), rng.normal(size=1000), np.zeros(1000, np.int64))
    thresholds = Thresholds.of(measures)
    contexts = thresholds.contexts(measures)
    assert np.bincount(contexts.brightness) == pytest.approx([600, 200, 200], abs=2)
    assert np.bincount(contexts.sharpness) == pytest.approx([990, 10], abs=1)
    assert not thresholds.contexts(measures, np.full(1000, NEAR)).sharpness.any()
