"""Samples that start from real images: which image, its form, the bytes they give, and what is refused.

The digits pipelines of the zoo and real files; every scheduler is in `test_start_steps.py`.
"""

import functools
import io
import itertools
import json
import resource
import shutil
import signal
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
import yaml

from engine.data.images import LabelledImage, image_key, open_images
from engine.data.run.resume import open_output
from engine.data.stores.opening import open_store
from engine.driver.checks import plan_job
from engine.errors import JobError, OutputError
from engine.generation import given_images
from engine.generation.generator import Generator
from engine.generation.given_images import read_for
from engine.generation.starts import Size, StartImages, StartSets, fitted
from engine.job.parsing import apply_overrides, job_schema, parse_job
from engine.job.plan import Cell, SampleSpec
from engine.job.records import TWINS
from engine.methods.sampling.loop import Start, sample
from engine.models.pipelines.base import LATENTS
from engine.studies.loop.parsing import parse_loop
from engine.studies.retrain.results import _dependences
from tests.loop_cases import digits_job
from tests.strike import struck

ZOO = "zoo:digits/"
MODELS = {"diffusion": f"{ZOO}stable-diffusion", "clip": f"{ZOO}clip", "target": f"{ZOO}classifier"}
SAMPLING = {"num_inference_steps": 4, "guidance_scale": 2.0}
CLASSES = {"three": 3, "eight": 8}


class Told:
    """What a display is told."""

    def __init__(self) -> None:
        self.progress, self.notices = [], []

    def advance(self, text):
        """Note progress."""
        self.progress.append(text)

    def notice(self, text):
        """Note a notice."""
        self.notices.append(text)

    def close(self):
        """Nothing is shown."""


def darkness():
    """A method of a user's own: the darker the better."""
    return lambda images, scene: images.flatten(1).mean(1)


@functools.cache
def digits() -> list[PIL.Image.Image]:
    return [item.image for item in itertools.islice(open_images("digits:test", TEN).read(), 40)]


TEN = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three images of one class and two of another, of all kinds, and one that is none."""
    home = tmp_path_factory.mktemp("starts") / "images"
    (home / "three").mkdir(parents=True)
    (home / "eight").mkdir()
    image = digits()[0]
    image.save(home / "three" / "a.png")
    image.convert("L").resize((28, 28)).save(home / "three" / "b.png")
    image.convert("RGBA").resize((90, 60)).save(home / "three" / "c.png")
    upside = PIL.Image.Exif()
    upside[0x0112] = 6
    digits()[1].resize((40, 30)).save(home / "eight" / "a.jpg", exif=upside)
    digits()[2].resize((2000, 1400)).save(home / "eight" / "b.jpg")
    (home / "eight" / "c.png").write_bytes(b"no image")
    return home


def raw_job(*requests, **changes):
    models = MODELS | changes.pop("models", {})
    raw = {"name": "job", "models": models, "sampling": SAMPLING, "output": {"uri": "runs/none"}}
    return raw | {"requests": list(requests)} | changes


def request(name, folder, strength, **more):
    start = {} if strength is None else {"start": {"images": str(folder), "strength": strength}}
    plain = {"name": name, "method": "prompt", "classes": [*CLASSES], "count": 4, "seed_group": "all"}
    return {key: value for key, value in (plain | start | more).items() if value is not None}


class Made:
    """A generator and the requests of its job by name; the samples of a whole request are made once."""

    def __init__(self, raw) -> None:
        job = parse_job(raw)
        plan = plan_job(job, Told())
        self.generator, self.requests = Generator(job, plan), {one.spec.name: one for one in plan.requests}
        self.results = functools.cache(lambda name: self.some(name, range(self.requests[name].total)))

    def some(self, name, places):
        """Results of a batch of some samples of a request."""
        request = self.requests[name]
        return self.generator.next_batch(request.number, [request.sample(place) for place in places])


@pytest.fixture(scope="module")
def made(folder):
    """A generator whose requests differ in method and strength, and the requests by name."""
    ways = {"risky": {"method": "risky"}, "own": {"method": "tests.test_starts:darkness"}}
    joint = {"method": "boundary", "classes": None, "boundary": [*CLASSES], "count": 8}
    return Made(
        raw_job(
            request("list", folder, [0, 0.5, 1]),
            request("plain", folder, None),
            *(request(name, folder, 0.5, **more) for name, more in (ways | {"joint": joint}).items()),
            guidance={"custom": {"every": 1}, "risky": {"every": 1}, "boundary": {"every": 1}},
        )
    )


def pixels_of(results) -> np.ndarray:
    return np.stack([np.asarray(PIL.Image.open(io.BytesIO(one.image)).convert("RGB")) for one in results])


def by_hand(folder, labels=("three", "eight")) -> list[PIL.Image.Image]:
    """The image of every sample of a request, as somebody else would find, turn and crop it."""
    found = {name: [PIL.Image.open(path) for path in sorted((folder / name).glob("*.[pj][np]g"))[:3]]
             for name in ("three",)}  # fmt: skip
    found["eight"] = [PIL.Image.open(folder / "eight" / "a.jpg").transpose(PIL.Image.Transpose.ROTATE_270),
                      PIL.Image.open(folder / "eight" / "b.jpg")]  # fmt: skip
    images = [found[name][place % len(found[name])] for place in range(4) for name in labels]
    cropped = []
    for image in images:
        rgb = image.convert("RGB")
        side = min(rgb.size)
        left, top = (rgb.width - side) / 2, (rgb.height - side) / 2
        box = (left, top, left + side, top + side)
        whole = rgb if rgb.size == (32, 32) else rgb.resize((32, 32), PIL.Image.Resampling.LANCZOS, box=box)
        cropped.append(whole)
    return cropped


def test_at_strength_zero_a_sample_is_the_reconstruction(made, folder):
    """Decoded and encoded by hand, byte for byte: which image, how it is turned, resized and cropped, and no step."""
    model, results = made.generator._model(0), made.results("list-s000")
    images = by_hand(folder)
    padded = torch.from_numpy(np.stack([np.asarray(one) for one in images + images[-1:] * 8])).permute(0, 3, 1, 2)
    with torch.no_grad():
        decoded = model.decode(model.encode_images(padded / 255))[:8]
    expected = (decoded.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(pixels_of(results), expected)
    assert [one.record["start_key"] for one in results[::2]] == [f"three/{name}.png" for name in "abca"]
    assert [one.record["start_key"] for one in results[1::2]] == [f"eight/{name}.jpg" for name in "abab"]
    assert {one.record["strength"] for one in results} == {0.0}
    assert results[0].record["start_sha256"] == image_key(digits()[0]).hex()


def test_at_strength_one_the_image_is_left_out(made):
    """Bytes and records are those of a request without a start; no start is recorded, and none stored."""
    usual, at_one = made.results("plain"), made.results("list-s100")
    own = {"key": "", "request": ""}
    assert [one.image for one in at_one] == [one.image for one in usual]
    assert [one.record | own for one in at_one] == [one.record | own for one in usual]
    fields = [at_one[0].record[name] for name in ("start_key", "start_sha256", "strength", "start_distance")]
    assert fields == ["", "", 1.0, -1.0] and not at_one[0].companions


@pytest.mark.parametrize("name", ["list-s000", "list-s050", "risky", "own", "joint"])
def test_a_sample_does_not_depend_on_its_batch(made, name):
    """Alone, and in another place: the same bytes and record, with every method and a user's own."""
    together, moved = made.results(name), made.some(name, [5, 2])
    for one, other in zip(moved, (together[5], together[2]), strict=True):
        assert one.image == other.image and one.record == other.record
    # At strength 0 the fourth sample of a class, which starts from its first image again, is the first.
    assert len({one.image for one in together}) == (5 if name == "list-s000" else 8)


def test_guidance_moves_what_starts_from_the_same_image_and_noise(made):
    """Each method gives other pixels than the request without guidance, from the same start."""
    plain, ways = made.results("list-s050"), {name: made.results(name) for name in ("risky", "own")}
    for results in ways.values():
        assert all(one.image != other.image for one, other in zip(results, plain, strict=True))
        assert [one.record["start_sha256"] for one in results] == [one.record["start_sha256"] for one in plain]
        # Of the two steps of four that are taken.
        assert {one.record["guided_steps"] for one in results} <= {1, 2}
    assert pixels_of(ways["own"]).mean() < pixels_of(plain).mean()


def test_the_classes_of_a_joint_prompt_take_turns(made):
    """Sample i starts from class i % k, and from its image i // k."""
    starts = [one.record["start_key"] for one in made.results("joint")]
    assert starts == ["three/a.png", "eight/a.jpg", "three/b.png", "eight/b.jpg", "three/c.png", "eight/a.jpg",
                      "three/a.png", "eight/b.jpg"]  # fmt: skip


def test_unclip_starts_with_the_noise_of_its_latents(folder, monkeypatch):
    """Whose generator draws the noise of the embedding first; strength 1 and the usual sample are the same.

    Driver and worker read the images once each, though all requests are conditioned on them and one starts from them.
    """
    opened_images = []
    monkeypatch.setattr(given_images, "open_images", lambda *of: opened_images.append(of) or open_images(*of))
    conditioning = {"images": str(folder), "noise_level": 100}
    requests = [request(name, folder, share, conditioning=conditioning, classes=["three"])
                for name, share in (("half", 0.5), ("one", 1), ("usual", None))]  # fmt: skip
    requests += [requests[0] | {"name": "guided", "method": "risky", "twin": True}]
    made = Made(raw_job(*requests, models={"diffusion": f"{ZOO}stable-unclip"}, guidance={"risky": {"every": 1}}))
    assert [one.image for one in made.results("one")] == [one.image for one in made.results("usual")]
    # A twin has the draws and the start of its sample, and a multistep sampler without its history.
    for one, other in zip(made.results("guided"), made.results("half"), strict=True):
        assert one.companions[TWINS].image() == other.image != one.image
        assert one.record["twin_risk"] == other.record["risk"] and one.record["start_key"] == other.record["start_key"]
    assert len(opened_images) == 2
    generator, plans = made.generator, made.requests
    specs = [plans["half"].sample(place) for place in range(4)]
    padded = specs + specs[-1:] * 12
    draws = generator._draws(0, padded)
    denoiser, sampler, _ = generator._denoiser(0, padded, draws)
    model = generator._model(0)
    images = by_hand(folder, ["three"])
    pixels = torch.from_numpy(np.stack([np.asarray(one) for one in images + images[-1:] * 12]))
    with torch.no_grad():
        latents = model.encode_images(pixels.permute(0, 3, 1, 2) / 255)
        noise = model.draw_noise([spec.seed for spec in padded])[LATENTS]
        decoded = model.decode(sample(denoiser, sampler, noise, Start(latents=latents, strength=0.5)))
    expected = (decoded[:4].clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(pixels_of(made.results("half")), expected)


def spec_of(index: int, *classes: int) -> SampleSpec:
    cell = Cell(classes=classes, names=tuple(map(str, classes)))
    return SampleSpec(key="k", request="r", method="prompt", cell=cell, prompt="", context="", seed=0, index=index)


def test_only_images_that_can_be_asked_for_are_kept_and_all_count():
    """So that which image a sample takes does not change when a count grows; nothing lies open on the disk."""
    draw = np.random.default_rng(0)
    items = [
        LabelledImage(f"{place}", PIL.Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)), place % 3)
        for place in range(60)
    ]
    few, whole = StartImages({0: 4, 2: 2}, Size(32, 32)), StartImages(dict.fromkeys(range(3), 60), Size(32, 32))
    for item in items:
        for images in (few, whole):
            images.take(item, image_key(item.image))
    assert (few._num_kept, whole._num_kept) == (6, 60)
    for index in (0, 3):
        one, other = few.of(spec_of(index, 0)), whole.of(spec_of(index, 0))
        assert one.key == other.key == items[3 * index].name
        assert np.array_equal(one.pixels, np.asarray(items[3 * index].image))
        assert whole.of(spec_of(index + 20, 0)).key == one.key and whole.of(spec_of(index, 0, 2)).class_index in (0, 2)
    assert isinstance(few.of(spec_of(1, 2)).pixels, np.memmap)


@pytest.mark.parametrize(("size", "wanted"), [((64, 48), 48), ((4, 200), 4), ((7, 5), 5), ((32, 32), 32)])
def test_images_are_cropped_to_the_middle(size, wanted):
    """Of a ramp along the longer side, what is left is the middle of it; the right size is untouched."""
    width, height = size
    ramp = np.linspace(0, 255, max(size)).astype(np.uint8)
    grey = np.broadcast_to(ramp if width > height else ramp[:, None], (height, width))
    image = PIL.Image.fromarray(np.stack([grey] * 3, -1))
    made = np.asarray(fitted(image, Size(32, 32)))
    assert made.shape == (32, 32, 3)
    if size == (32, 32):
        assert np.array_equal(made, np.asarray(image))
    else:
        shown = 255 * wanted / max(size)
        assert abs(float(made.mean()) - 127.5) < 8 and abs(float(np.ptp(made[..., 0])) - shown) < 0.2 * shown + 8


def test_a_full_disk_is_named(made, folder, monkeypatch):
    """Fifty thousand photographs take tens of gigabytes: the message says where, and how to choose another place."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    generator, requests = made.generator, made.requests
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(JobError, match=r"requests\.0\.start\.images: .*cannot be kept in .* set TMPDIR"):
            generator._start_sets.of(requests["list-s050"], Size(320, 320), lambda reader: read_for([reader], TEN))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def test_images_are_read_once_and_what_cannot_be_used_is_told(folder):
    """However many strengths and requests name them, and if they condition samples as well."""
    told = Told()
    conditioning = {"images": str(folder)}
    both = request("both", folder, [0.25, 0.5], conditioning=conditioning)
    job = parse_job(raw_job(both, request("more", folder, 0.5, conditioning=conditioning),
                            models={"diffusion": f"{ZOO}stable-unclip"}))  # fmt: skip
    plan = plan_job(job, told)
    assert [text.rpartition(": ")[2] for text in told.progress] == [f"{count} images" for count in range(1, 6)]
    assert told.notices == [f"requests.0.conditioning.images: 1 of '{folder}' cannot be used: eight/c.png: is not an"
                            " image in PNG, JPEG, WebP, BMP, GIF, TIFF or PPM"]  # fmt: skip
    starts = {entry["start"]["images"] for entry in plan.identity["requests"]}
    assert len(starts) == 1 and starts != {entry["conditioning"]["images"] for entry in plan.identity["requests"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": "nowhere"}, "requests.1.start.images: there is no 'nowhere'"),
        ({"classes": ["three", "one"]}, "requests.1.start.images: '{folder}' has no usable image of class 'one'; add"),
        ({"boundary": ["eight", "one"]}, "requests.1.start.images: '{folder}' has no usable image of class 'one'; add"),
        ({"classes": ["thre"]}, "requests.1.classes.0: 'thre' is not a class of the target; did you mean 'three'?"),
        ({"diffusion": f"{ZOO}stable-unclip"}, "requests.1.conditioning: missing; 'zoo:digits/stable-unclip' is a"),
        ({"diffusion": "nowhere"}, "requests.1.diffusion: 'nowhere' "),
        ({"method": "tests.test_starts:none"}, "requests.1.method: 'tests.test_starts:none': module "),
    ],
)
def test_what_files_tell_is_refused_at_its_place_in_the_job_file(change, message, folder):
    """After a list of strengths, whose requests the file does not have; each problem once."""
    joint = {"method": "boundary", "classes": None} if "boundary" in change else {}
    images = change.pop("images", folder)
    pair = request("a", folder, [0.25, 0.5, 1]), request("b", images, [0.5, 0.75], **change | joint)
    job = parse_job(raw_job(*pair, guidance={"custom": {"every": 1}, "boundary": {"every": 1}}))
    with pytest.raises(JobError) as caught:
        plan_job(job, Told())
    [line] = caught.value.problems
    assert line.startswith(message.format(folder=folder))


def test_a_worker_that_sees_other_images_stops(folder, tmp_path):
    """A picture under another name is another start: the name is recorded."""
    other = tmp_path / "images"
    for name in CLASSES:
        (other / name).mkdir(parents=True)
        digits()[CLASSES[name]].save(other / name / "a.png")
    job = parse_job(raw_job(request("a", other, 0.5)))
    plan = plan_job(job, Told())
    (other / "three" / "a.png").rename(other / "three" / "b.png")
    with pytest.raises(JobError, match=r"requests\.0\.start\.images: .* differs on this machine from the driver's"):
        Generator(job, plan)


def test_a_folder_that_is_not_there_is_seen_without_reading_images(folder, tmp_path, call):
    """`plan --validate` names it, and `plan` without measuring reads none."""
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(raw_job(request("a", folder, [0.25, 0.5]), request("b", "nowhere", [0.25, 0.5]))))
    code, _, error = call("plan", path, "--validate")
    assert (
        code == 2
        and error.startswith("error: requests.1.start.images: there is no 'nowhere'")
        and error.count("\n") == 1
    )
    assert call("plan", path, "--validate", "--set", f"requests.1.start.images={folder}")[0] == 0
    assert "b-s050" in call("plan", path)[1]


def members(output: Path, kind: str) -> dict[str, bytes]:
    """Members of the tars of a run by name."""
    found = {}
    for path in sorted((output / kind).glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar.getmembers()}
    return found


def test_a_killed_run_goes_on_to_the_same_bytes(made, folder, tmp_path, call, monkeypatch):
    """SIGKILL in the middle of a shard, and a grown count: the bytes of one batch, and no file is left in TMPDIR."""
    scratch, path, images = tmp_path / "scratch", tmp_path / "job.yaml", tmp_path / "images"
    scratch.mkdir()
    shutil.copytree(folder, images)
    pair = [request("plain", images, 0.5, count=2), request("risky", images, 0.5, method="risky", count=2)]
    options = {"guidance": {"risky": {"every": 1}}, "runtime": {"device": "cpu", "workers": 1}}
    path.write_text(yaml.safe_dump(raw_job(*pair, **options)))
    run = ["run", path, "--executor", "local", "--output", tmp_path / "run", "--set", "output.samples_per_shard=3"]
    with monkeypatch.context() as patch:
        patch.setenv("TMPDIR", str(scratch))
        with struck(signal.SIGKILL, "os.link", "*-000002.tar", 1, *run) as killed:
            assert killed.wait() == -signal.SIGKILL, killed.communicate()
    assert not list(scratch.glob("riskforge-starts-*"))
    grown = [*run, "--set", "requests.0.count=3"]
    assert call(*grown)[0] == 0
    found = {kind: members(tmp_path / "run", kind) for kind in ("shards", "starts")}
    for number, (name, count) in enumerate({"list-s050": 3, "risky": 2}.items()):
        for one in made.results(name)[: 2 * count]:
            key = f"job-{number:03d}" + one.record["key"].removeprefix("job")[4:] + ".png"
            assert found["shards"].pop(key) == one.image
            assert found["starts"].pop(key) == one.companions["starts"].image()
    assert not [name for kind in found.values() for name in kind if name.endswith(".png")]
    code, _, error = call(*grown, "--set", "requests.1.start.strength=0.75")
    assert code == 2 and "requests.1.start.strength: 0.5 -> 0.75" in error
    digits()[20].save(images / "three" / "a.png")
    code, _, error = call(*grown)
    assert code == 2 and "holds a run with another plan" in error and "requests.0.start.images: " in error


# Problems of lists are in the file's terms.


def problems_of(raw) -> list[str]:
    with pytest.raises(JobError) as caught:
        parse_job(raw)
    return caught.value.problems


def test_a_list_makes_one_request_of_each_value():
    """In its order and in place, in one seed group; stored with the run it is a job of single numbers."""
    many = {"sampling": {"num_inference_steps": 20}}
    raw = raw_job(request("a", "x", [0.3, 0.125, 1, 0, 5e-2], seed_group=None, count=7), request("b", "x", 0.3)) | many
    kept = json.dumps(raw)
    job = parse_job(raw)
    assert [one.name for one in job.requests] == ["a-s030", "a-s0125", "a-s100", "a-s000", "a-s005", "b"]
    assert [one.seed_group for one in job.requests] == ["a"] * 5 + ["all"] and job.requests[4].count == 7
    assert [one.start.strength for one in job.requests] == [0.3, 0.125, 1, 0, 0.05, 0.3] and json.dumps(raw) == kept
    stored = job.model_dump(mode="json")
    assert parse_job(stored).model_dump(mode="json") == stored
    [single, several] = job_schema()["$defs"]["StartSpec"]["properties"]["strength"]["anyOf"]
    assert single["type"] == "number" and several["items"] == single and several["maxItems"] == 100
    [*_, group] = parse_job(raw_job(request("a", "x", [0.3]))).requests
    assert (group.name, group.seed_group) == ("a-s030", "all")
    one = parse_job(apply_overrides(raw, [("requests.0.start.strength", 0.5)]))
    assert [one.name for one in one.requests] == ["a", "b"] and [job.where(number) for number in (4, 5)] == [
        "requests.0",
        "requests.1",
    ]


NAN = float("nan")


@pytest.mark.parametrize(
    ("requests", "lines"),
    [
        ([{"strength": []}], ["0.start.strength: [] is empty; give a number from 0 to 1, or a list of some"]),
        ([{"strength": [0.3, 0.5, 0.30]}], ["0.start.strength.2: 0.3 is there twice; name each strength once"]),
        ([{"strength": [NAN, 0.3]}], ["0.start.strength.0: nan is not a finite number; give one from 0 to 1"]),
        ([{"strength": [0.3, -0.1, 1.5]}], ["0.start.strength.1: -0.1 is below 0; give a number from 0 to 1",
                                            "0.start.strength.2: 1.5 is above 1; give a number from 0 to 1"]),
        ([{"strength": [True]}], ["0.start.strength.0: True is not a number; give one from 0 to 1"]),
        ([{"strength": ["0.3", 10**400]}], ["0.start.strength.0: '0.3' is text to YAML, not a number; *",
                                            "0.start.strength.1: 1000*... is above 1; give a number from 0 to 1"]),
        ([{"start": "digits:test"}], ["0.start: 'digits:test' is not a mapping with `images` and `strength`"]),
        ([{"strength": NAN}], ["0.start.strength: nan is not a finite number"]),
        ([{"strength": True}], ["0.start.strength: True is not a number"]),
        ([{"strength": [place / 1000 for place in range(101)]}],
         ["0.start.strength: has 101 entries; give 100 or fewer"]),
        ([{}, {"strength": [0.3]}, {"name": "b-s030"}],
         ["2.name: 'b-s030' is also the name of request 1; rename one"]),
        ([{"name": "b-s030"}, {"strength": [0.5, 0.3]}],
         ["1.name: 'b-s030', made of a strength, is also the name of request 0; rename one"]),
        ([{"name": "a" * 60, "strength": [0.3]}],
         ["0.name: 'a*' with -s030 for a strength has more characters than 64; give 59 or fewer"]),
        ([{"name": "B!", "strength": [0.3, 0.5]}], ["0.name: 'B!' may hold only a-z, 0-9 and inner hyphens"]),
        ([{"strength": [0.3, 0.5], "method": "rsky", "classes": []}], ["0.method: 'rsky' is not one of *"]),
        ([{"strength": [1e-30]}], ["0.start.strength.0: 1e-30 has too many decimals for the name of a request; *"]),
        ([{"strength": [0.5, 0.2]}],
         ["0.start.strength.1: 0.2 of 4 steps is none; give 0.25 or more, or 0 for no step"]),
        ([{"strength": 0.2}], ["0.start.strength: 0.2 of 4 steps is none; give 0.25 or more, or 0 for no step"]),
        ([{"strength": [place / 100 for place in range(25, 100)], "twin": True, "classes": ["a", "a"]}],
         ["0.classes: ['a', 'a'] names a class twice; name each once",
          "0.twin: method 'prompt' guides nothing, so that a sample is its own twin; leave it out"]),
        ([{"strength": [0.3, 0.5], "twin": True}], ["0.twin: method 'prompt' guides nothing, so that a sample is *"]),
        ([{"strength": [0.5, 1], "accept": {"start_distance": "< 0.4", "twin_risk": "> 1"}}],
         ["0.accept.twin_risk: no sample would be accepted, as there is no twin; *",
          "0.accept.start_distance: no sample would be accepted, as there is no start at strength 1; *"]),
        ([{"strength": [0, 0.25], "method": "risky", "guidance": {"risky": {"preset": "adversarial"}}}],
         ["0.guidance.risky: leaves all steps that strength 0.25 takes, the last 1 of 4, unguided; set *"]),
        ([{"strength": 0.25, "method": "boundary", "classes": None, "boundary": ["a", "b"],
           "guidance": {"boundary": {"skip_last": True}}}],
         ["0.guidance.boundary: leaves all steps that strength 0.25 takes, the last 1 of 4, unguided; lower *"]),
        ([{"name": "b" * 65, "strength": [0.3, 0.5]}], ["0.name: 'bbb*has more characters than 64; give 64 or fewer"]),
        ([{"strength": ["1e-9"]}], ["0.start.strength.0: '1e-9' is text to YAML, not a number; *"]),
        ([{"accept": {"start_key": "x"}}], ["0.accept.start_key: a mapping has no such condition; *"]),
        ([{"name": f"r{place}", "strength": [one / 100 for one in range(100)]} for place in range(11)],
         ["*: has 1100 entries with one for each strength of a list; give 1000 or fewer"]),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_list_is_told_in_the_files_terms(requests, lines):
    """At the place that the file has, and once for all the requests that are made of it."""
    raw = raw_job(*(request("b", "x", None) | _started(one) for one in requests))
    found = problems_of(raw)
    for line, wanted in zip(found, lines, strict=True):
        head, _, tail = wanted.partition("*")
        assert line.removeprefix("requests.").removeprefix("requests").startswith(head) and line.endswith(
            tail.partition("*")[2] or tail
        )


def _started(one: dict) -> dict:
    strength = one.pop("strength", None)
    return one | ({} if strength is None else {"start": {"images": "x", "strength": strength}})


def test_a_loop_refuses_real_images_and_twins(folder):
    """Its rounds learn from samples alone; the place is that of the job file, once for a list of strengths."""
    pair = request("a", folder, None), request("b", folder, [0.5, 1], method="risky", twin=True)
    raw = digits_job()
    raw["generator"]["job"] |= {"requests": [*pair], "sampling": SAMPLING, "guidance": {"risky": {"every": 1}}}
    with pytest.raises(JobError) as caught:
        parse_loop(raw, Path.read_text)
    places = [line.partition(":")[0] for line in caught.value.problems]
    assert places == ["generator.job.requests.1.start", "generator.job.requests.1.twin"]


def test_a_study_says_where_test_images_were_started_from(folder):
    """Images that samples start from are no independent test of what is trained on these; at strength 1 they are."""
    job = parse_job(raw_job(request("a", folder, [0.5, 1])))
    options = SimpleNamespace(test=str(folder))
    study = SimpleNamespace(options=options, plain=["a-s050"], risky=["a-s100"], run=SimpleNamespace(job=job))
    assert _dependences(study, 0) == ["Not independent: the samples of a-s050 start from the images of --test."]


def test_as_many_images_are_kept_as_a_plan_can_ask_for(folder):
    """Of a quota for every attempt, of a joint prompt a share of each class; strength 1 asks for none."""
    quota = request("quota", folder, 0.5, classes=["three"], count=2, accept={"is_error": True}, max_attempts=9)
    joint = request("joint", folder, 0.5, method="boundary", classes=None, boundary=[*CLASSES], count=5)
    whole = request("whole", folder, 1, count=500)
    job = parse_job(raw_job(quota, joint, whole, guidance={"boundary": {"every": 1}}))
    assert StartSets(plan_job(job, Told()))._needed(str(folder)) == {3: 9, 8: 3}


@pytest.mark.parametrize(
    ("strengths", "wanted", "lines"),
    [
        ([0.25, 0.5], 0.75, ["requests.1.start.strength: 0.5 -> 0.75"]),
        ([0.25, 0.5, 0.75], 0.5, ['requests.0: absent -> "a-s075"']),
        ([0.25], 0.5, ['requests: "a-s050" -> absent']),
        ([0.25, 0.75], 0.5, ['requests.0.name: "a-s050" -> "a-s075"', "requests.0.start.strength: 0.5 -> 0.75"]),
        ([0.5, 0.25], 0.5, ["requests: in another order"]),
    ],
)
def test_another_list_of_strengths_is_told_in_the_files_terms(strengths, wanted, lines, folder, tmp_path):
    """A run with another list is another plan; the second request of the file is not the third."""
    store, output = open_store(str(tmp_path / "run")), []
    for own, other in ([-0.0, 0.25, 0.5], 0.5), ([0, *strengths], wanted):
        job = parse_job(raw_job(request("a", folder, own), request("b", folder, other)))
        output.append((store, plan_job(job), job))
    open_output(*output[0], "auto", confirmed=False)
    with pytest.raises(OutputError, match="holds a run with another plan") as caught:
        open_output(*output[1], "auto", confirmed=False)
    assert [line.strip() for line in str(caught.value).splitlines()[1:-1]] == lines
