"""`prepare --only neighbours`: what is stored of labelled images, equal whatever form they have, refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.commands.jobfile import read_job
from engine.data.images import open_images
from engine.driver.executors.local import LocalExecutor
from engine.errors import EXIT_OK, EXIT_USER, JobError, OutputError
from engine.models import neighbour_documents
from engine.models.artefact_documents import read_document
from engine.models.clip import Clip
from engine.models.configurations import NEIGHBOURS_DOCUMENT as DOCUMENT
from engine.models.digests import model_digest
from engine.models.neighbour_documents import FEATURES
from engine.studies.prepare import neighbours
from engine.studies.prepare.observation import load_observer, merge_observations
from tests.oracle_cases import CLIP, ORACLE, made_neighbours, other_clip
from tests.prepare_cases import (
    LABELS,
    QUICKSTART,
    Sample,
    drawn_digits,
    plain_image,
    png,
    write_folder,
    write_parquet,
    write_run,
    write_tables,
)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return drawn_digits(160)


@pytest.fixture(scope="module")
def data(samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data"), samples)


@pytest.fixture(scope="module")
def artefact(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_neighbours(data, CLIP, tmp_path_factory.mktemp("artefacts")).path


def test_the_artefact_holds_what_plain_clip_says(artefact: Path, samples: list[Sample]) -> None:
    """Directions of the images' embeddings, ordered by class; and what decides the vote."""
    document = read_document(artefact, DOCUMENT)
    counts = [sum(index == label for _, index in samples) for label in range(10)]
    assert document["classes"] == [*LABELS] and document["counts"] == counts and document["dim"] == 64
    assert document["models"] == {"encoder": {"address": CLIP, "digest": model_digest(CLIP)}}
    assert artefact.name == f"neighbours-{document['digest'][:12]}" and document["duplicates"] == 0
    features = load_file(artefact / FEATURES)["features"]
    assert features.dtype == torch.float16 and features.shape == (160, 64)
    clip, rows = Clip.load(CLIP), features.float().split(counts)
    for label in (3, 8):
        embeds = clip.image_embeds([image for image, index in samples if index == label])
        expected = torch.nn.functional.normalize(embeds, dim=1)
        # In the order of contents: compared as sets.
        assert torch.allclose((rows[label] @ expected.T).amax(0), torch.ones(counts[label]), atol=2e-3)
        assert torch.allclose((rows[label] @ expected.T).amax(1), torch.ones(counts[label]), atol=2e-3)


def test_the_evaluation_is_that_of_every_image_by_the_others(artefact: Path) -> None:
    """Computed again from what is stored, an image at a time, without it."""
    document = read_document(artefact, DOCUMENT)
    features = torch.nn.functional.normalize(load_file(artefact / FEATURES)["features"].float(), dim=1)
    classes = torch.arange(10).repeat_interleave(torch.tensor(document["counts"]))
    k, tau = document["k"], document["similarity_temperature"]
    log_p = []
    for row in range(len(features)):
        others = torch.arange(len(features)) != row
        similarities = features[others] @ features[row]
        votes = torch.full((10,), 0.1 / 10, dtype=torch.float64)
        for place in similarities.argsort(descending=True)[:k]:
            votes[classes[others][place]] += torch.exp((similarities[place].double() - 1) / tau)
        log_p.append(torch.log_softmax(votes.log() / document["temperature"], 0))
    found, evaluation = torch.stack(log_p), document["evaluation"]
    is_right = found.argmax(1) == classes
    assert evaluation["num_images"] == 160
    assert evaluation["accuracy"] == pytest.approx(float(is_right.double().mean()), abs=1e-6)
    assert evaluation["nll"] == pytest.approx(float(-found[torch.arange(160), classes].mean()), abs=1e-3)
    by_class = [float(is_right[classes == label].double().mean()) for label in range(10)]
    assert evaluation["class_accuracy"] == pytest.approx(by_class)
    is_confident = found.exp().amax(1) >= 0.99
    assert evaluation["confident_share"] == pytest.approx(float(is_confident.double().mean()), abs=0.01)


def test_form_and_order_of_the_images_do_not_matter(artefact: Path, samples: list[Sample], tmp_path: Path) -> None:
    """To the byte: parquet with other indices, in another order; a second time it is the artefact that is there."""
    table = write_tables(tmp_path / "table", samples)
    made = made_neighbours(table, CLIP, tmp_path / "made")
    assert not made.was_there and made.path.name == artefact.name
    for name in (DOCUMENT, FEATURES):
        assert (made.path / name).read_bytes() == (artefact / name).read_bytes()
    assert made_neighbours(table, CLIP, tmp_path / "made").was_there


def test_parts_of_the_pass_give_the_same_features(data: Path) -> None:
    """As workers make them, without the target."""
    job = read_job(QUICKSTART, [("runtime.device", "cpu")])
    observer = load_observer(job, open_images(str(data), LABELS), CLIP, with_target=False)
    whole = merge_observations([observer.observe(0, 1, lambda done: None)], observer.source, "")
    parts = [observer.observe(part, 3, lambda done: None) for part in range(3)]
    divided = merge_observations(parts, observer.source, "")
    assert torch.equal(whole.embeds, divided.embeds) and torch.equal(whole.classes, divided.classes)
    assert whole.logits.shape == (160, 0)


def test_an_executor_makes_the_same_artefact(data: Path, artefact: Path, tmp_path: Path) -> None:
    made = made_neighbours(data, CLIP, tmp_path, executor=LocalExecutor(1))
    assert made.path.name == artefact.name


def test_copies_of_an_image_count_once(samples: list[Sample], artefact: Path, tmp_path: Path) -> None:
    """They would confirm each other; in two classes they are two images."""
    image, index = samples[0]
    folder = write_folder(tmp_path / "data", samples)
    for number in range(3):
        (folder / LABELS[index] / f"copy-{number}.png").write_bytes(png(image))
    made = made_neighbours(folder, CLIP, tmp_path / "made")
    assert made.neighbours.num_duplicates == 3
    assert (made.path / FEATURES).read_bytes() == (artefact / FEATURES).read_bytes()
    (folder / LABELS[(index + 1) % 10] / "other.png").write_bytes(png(image))
    assert sum(made_neighbours(folder, CLIP, tmp_path / "made").neighbours.counts) == 161


def test_unusable_images_are_left_out_and_named(samples: list[Sample], artefact: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", samples)
    (folder / "three" / "bad.png").write_bytes(b"bad")
    made = made_neighbours(folder, CLIP, tmp_path / "made")
    assert [item.name for item in made.neighbours.unusable] == ["three/bad.png"]
    assert (made.path / FEATURES).read_bytes() == (artefact / FEATURES).read_bytes()


def test_a_class_with_a_single_image_is_refused(samples: list[Sample], tmp_path: Path) -> None:
    """It could never be predicted by others, and a class without any never at all."""
    few = [sample for sample in samples if sample[1] not in (3, 8)]
    few.append(next(sample for sample in samples if sample[1] == 3))
    with pytest.raises(JobError, match="--data: fewer than 2 different images of 'three', 'eight'; neighbours vote"):
        made_neighbours(write_folder(tmp_path / "data", few), CLIP, tmp_path / "made")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("kind", ["a folder", "tars"])
def test_more_images_than_memory_holds_are_refused(
    kind: str, data: Path, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the pass where their number is known, after it where it is not; with the number that would do."""
    monkeypatch.setattr(neighbours, "MAX_VALUES", 64 * 100)
    monkeypatch.setattr(neighbour_documents, "MAX_VALUES", 64 * 100)
    passes = list[int]()
    score = Clip.image_embeds
    monkeypatch.setattr(Clip, "image_embeds", lambda self, images: passes.append(len(images)) or score(self, images))
    images = data if kind == "a folder" else write_run(tmp_path / "run", samples)
    with pytest.raises(JobError, match=r"--data: 160 images with 64 features each .* the most is 100 images: give"):
        made_neighbours(images, CLIP, tmp_path / "made")
    assert bool(passes) == (kind == "tars") and not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (ORACLE, "--encoder: 'zoo:digits/oracle' is a model of type 'regnet'; a CLIP model is needed"),
        ("zoo:digits/stable-unclip", "--encoder: 'zoo:digits/stable-unclip' has no config.json"),
        ("zoo:digits/nothing", "--encoder: 'zoo:digits/nothing' is not in the zoo"),
    ],
)
def test_what_is_no_clip_model_embeds_nothing(encoder: str, message: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(JobError) as refused:
        made_neighbours(data, encoder, tmp_path)
    assert str(refused.value).startswith(message)


def test_a_damaged_artefact_in_the_place_is_not_taken_for_this_one(data: Path, tmp_path: Path) -> None:
    """Its features may be cut while its document is whole."""
    made = made_neighbours(data, CLIP, tmp_path)
    (made.path / FEATURES).write_bytes(b"cut")
    with pytest.raises(OutputError, match="is there and damaged; remove it and run again"):
        made_neighbours(data, CLIP, tmp_path)


def test_the_command_says_how_good_it_is_and_what_to_write(call: Any, data: Path, tmp_path: Path) -> None:
    """The line works as it is given; an encoder that guides this job's samples is said to be none for it."""
    encoder, home = other_clip(tmp_path / "clip"), tmp_path / "made"
    job = ("prepare", QUICKSTART, "--data", data, "--output", home, "--set", "runtime.device=cpu")
    code, out, _ = call(*job, "--only", "neighbours", "--encoder", encoder)
    assert code == EXIT_OK and "160 images by the others, NLL" in out and "vote           of " in out
    [path] = home.iterdir()
    assert f"for a job with these classes: models: {{oracles: [zoo:digits/oracle, {path}]}}" in out
    changes = ("--set", "models.oracle=null", "--set", f"models.oracles=[zoo:digits/oracle, {path}]")
    assert call("plan", QUICKSTART, "--validate", *changes)[0] == EXIT_OK
    assert "existed already, equal" in call(*job, "--only", "neighbours", "--encoder", encoder)[1]
    code, out, _ = call(*job, "--only", "neighbours", "--encoder", CLIP)
    assert code == EXIT_OK and "not for this job: models.oracles.1: the encoder of" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--only", "neighbours"), "--encoder: names the CLIP model of --only neighbours; give both, or none"),
        (("--encoder", CLIP), "--encoder: names the CLIP model of --only neighbours; give both, or none"),
        (("--only", "neighbours", "--encoder", CLIP, "--components", "2"), "--components: are of class statistics"),
    ],
)
def test_options_that_do_not_fit_are_refused(call: Any, options: tuple[str, ...], message: str, data: Path) -> None:
    code, _, err = call("prepare", QUICKSTART, "--data", data, *options)
    assert code == EXIT_USER and err.startswith(f"error: {message}")


def test_images_that_no_class_is_known_of_are_refused(tmp_path: Path) -> None:
    """As for every artefact."""
    table = write_parquet(tmp_path / "a.parquet", [({"bytes": png(plain_image()), "path": None}, 99)])
    with pytest.raises(JobError, match="--data: "):
        made_neighbours(table, CLIP, tmp_path / "made")
