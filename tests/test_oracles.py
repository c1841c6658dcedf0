"""Oracles of all kinds: equal to plain models, in any batch, differentiable, and never a class from no number."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from transformers import CLIPConfig, CLIPForImageClassification, CLIPModel, CLIPProcessor

from engine.data.run.shards import read_shard
from engine.data.run.verify import verify
from engine.data.stores.opening import open_store
from engine.driver.executors.local import LocalExecutor
from engine.driver.progress import PlainDisplay
from engine.driver.run import run_job
from engine.errors import JobError
from engine.generation.loading import load_scorer
from engine.generation.oracle_scoring import Oracles
from engine.methods.finiteness import LOGITS_FAULT, Faults, usable_logits
from engine.models import addresses
from engine.models.addresses import resolve
from engine.models.artefact_documents import document_bytes, read_document, sealed
from engine.models.classifier import Classifier
from engine.models.configurations import NEIGHBOURS_DOCUMENT as DOCUMENT
from engine.models.digests import model_digests, oracle_digest
from engine.models.independence import check_independent
from engine.models.job_checks import check_addresses
from engine.models.labels import oracle_labels
from engine.models.licences import OF_ZOO, licence_of
from engine.models.neighbour_documents import FEATURES
from engine.models.oracle_kinds import oracle_kind
from engine.models.oracles import Oracle, load_oracle
from engine.models.relabelled import load_oracle_for
from engine.studies.rescore.program import rescore_run
from tests.model_cases import sharded
from tests.oracle_cases import CLIP, ORACLE, TARGET, job_with, made_neighbours, other_clip, with_weights
from tests.prepare_cases import LABELS, Sample, drawn_digits, write_folder

KINDS = ("classifier", "clip", "neighbours")


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return drawn_digits(240)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return other_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="module")
def artefact(encoder: Path, samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = write_folder(tmp_path_factory.mktemp("data"), samples)
    return made_neighbours(data, encoder, tmp_path_factory.mktemp("artefacts")).path


@pytest.fixture(scope="module")
def address_of(encoder: Path, artefact: Path) -> dict[str, str]:
    return {"classifier": ORACLE, "clip": str(encoder), "neighbours": str(artefact)}


@pytest.fixture(scope="module")
def loaded(address_of: dict[str, str]) -> dict[str, Oracle]:
    return {kind: load_oracle(address, "cpu", LABELS) for kind, address in address_of.items()}


# Scores --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_reads_digits_and_has_one_contract(
    kind: str, loaded: dict[str, Oracle], address_of: dict[str, str], samples: list[Sample]
) -> None:
    """Name, classes, probabilities; most clean digits are read, those in noise too."""
    oracle, images = loaded[kind], [image for image, _ in samples]
    assert oracle_kind(address_of[kind]) == kind
    assert (oracle.name, oracle.labels) == (address_of[kind], [*LABELS]) and oracle.temperature > 0
    logits = torch.cat([oracle.score(images[start : start + 32]) for start in range(0, 240, 32)])
    assert logits.shape == (240, 10) and logits.dtype == torch.float32 and usable_logits(logits).all()
    is_right = logits.argmax(1) == torch.tensor([index for _, index in samples])
    assert is_right.float().mean() > 0.6
    pixels = oracle.preprocess(images[:5])
    assert torch.equal(oracle.score_pixels(pixels), oracle.score(images[:5]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_its_batch(kind: str, loaded: dict[str, Oracle], samples: list[Sample]) -> None:
    """Twice the same bits; alone or in a batch the same up to rounding."""
    oracle, images = loaded[kind], [image for image, _ in samples[:7]]
    together = oracle.score(images)
    assert torch.equal(oracle.score(images), together)
    alone = torch.cat([oracle.score([image]) for image in images])
    assert torch.allclose(alone, together, atol=1e-3) and torch.equal(alone.argmax(1), together.argmax(1))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_tensors_are_those_of_images_and_differentiable(
    kind: str, loaded: dict[str, Oracle], samples: list[Sample]
) -> None:
    """A step along the gradient raises the probability of the class that it is of."""
    oracle, chosen = loaded[kind], samples[:16:2]
    images = torch.stack(
        [torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(32, 32, 3) for image, _ in chosen]
    )
    pixels = (images.permute(0, 3, 1, 2).float() / 255).requires_grad_()
    logits = oracle.logits(pixels)
    assert torch.allclose(logits, oracle.score([image for image, _ in chosen]), atol=1e-2)
    rival = logits.topk(2, dim=1).indices[:, 1]
    risk = torch.nn.functional.cross_entropy(logits, rival, reduction="sum")
    (gradient,) = torch.autograd.grad(risk, pixels)
    assert gradient.isfinite().all() and (gradient.flatten(1).norm(dim=1) > 0).all()
    with torch.no_grad():
        moved = oracle.logits(
            (pixels - 0.3 * gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]).clamp(0, 1)
        )
    rows = torch.arange(len(chosen))
    assert (moved.log_softmax(1)[rows, rival] > logits.log_softmax(1)[rows, rival]).all()


@pytest.mark.parametrize("temperature", [None, 2.5])
def test_zero_shot_probabilities_are_those_of_plain_transformers(
    temperature: float | None, samples: list[Sample], tmp_path: Path
) -> None:
    """`logits_per_image` of the class prompts, divided by the field of its config.json."""
    folder = Path(shutil.copytree(resolve(CLIP), tmp_path / "clip"))
    if temperature is not None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"temperature": temperature}))
    images = [image for image, _ in samples[:6]]
    plain, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder, backend="pil")
    length = plain.config.text_config.max_position_embeddings
    inputs = processor(
        text=[f"a photo of a {label}" for label in LABELS], images=images, return_tensors="pt", padding="max_length",
        max_length=length, truncation=True,
    )  # fmt: skip
    with torch.no_grad():
        expected = plain(**inputs).logits_per_image / (temperature or 1)
    oracle = load_oracle(str(folder), "cpu", LABELS)
    assert oracle.temperature == (temperature or 1)
    assert torch.allclose(oracle.score(images), expected, atol=1e-3)


def test_an_image_among_the_neighbours_is_one_of_them(loaded: dict[str, Oracle], samples: list[Sample]) -> None:
    """Its own vote counts: a labelled image is read as its class more often than others of its kind are."""
    oracle = loaded["neighbours"]
    stored, fresh = samples[:64], drawn_digits(400)[300:364]
    p = [
        torch.softmax(oracle.score([image for image, _ in some]), 1)[torch.arange(64), [index for _, index in some]]
        for some in (stored, fresh)
    ]
    assert p[0].mean() > p[1].mean()


def test_weights_in_shards_score_the_same(encoder: Path, samples: list[Sample], tmp_path: Path) -> None:
    """As large models are stored: a file for each shard and an index."""
    folder = Path(shutil.copytree(encoder, tmp_path / "clip"))
    sharded(folder)
    images = [image for image, _ in samples[:4]]
    assert torch.equal(
        load_oracle(str(folder), "cpu", LABELS).score(images), load_oracle(str(encoder), "cpu", LABELS).score(images)
    )


# Values that are not finite ------------------------------------------------------------------------------------------

BROKEN: dict[str, Callable[[str, torch.Tensor], torch.Tensor]] = {
    "nan": lambda name, tensor: tensor * torch.nan if name.endswith("visual_projection.weight") else tensor,
    "no direction": lambda name, tensor: tensor * 0 if name.endswith("visual_projection.weight") else tensor,
    "no scale": lambda name, tensor: tensor * torch.nan if name.endswith("logit_scale") else tensor,
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_clip_fails_the_sample_and_is_named(kind: str, samples: list[Sample], tmp_path: Path) -> None:
    """A cosine with nothing would be 0, and every class equally likely."""
    folder = with_weights(tmp_path / "clip", BROKEN[kind])
    oracle, faults = load_oracle(str(folder), "cpu", LABELS), Faults(2)
    oracles = Oracles([load_oracle(ORACLE, "cpu", LABELS), oracle])
    oracles.fields(oracles.preprocess([image for image, _ in samples[:2]]), [[3], [5]], faults)
    assert all(faults[row] == f"models.oracle '{folder}' gives {LOGITS_FAULT}" for row in range(2))


def test_an_image_without_an_embedding_has_no_neighbours(loaded: dict[str, Oracle], samples: list[Sample]) -> None:
    """And the others of its batch keep theirs."""
    oracle = loaded["neighbours"]
    pixels = oracle.preprocess([image for image, _ in samples[:3]])
    pixels[1] = torch.nan
    assert usable_logits(oracle.score_pixels(pixels)).tolist() == [True, False, True]


def test_a_clip_without_a_usable_prompt_is_refused(tmp_path: Path) -> None:
    folder = with_weights(
        tmp_path / "clip",
        lambda name, tensor: tensor * 0 if name.endswith("text_projection.weight") else tensor,
    )
    with pytest.raises(JobError, match="text embedding that is not finite or has no direction for 'a photo of a zero'"):
        load_oracle_for(str(folder), "cpu", LABELS, {})


# Checked before a worker starts --------------------------------------------------------------------------------------


def test_a_job_may_name_every_kind(address_of: dict[str, str], artefact: Path, tmp_path: Path) -> None:
    """One or several; a folder that holds the artefact is as good as the artefact."""
    for kind in ("clip", "neighbours"):
        check_addresses(job_with(tmp_path, [ORACLE, address_of[kind]]))
    for address in (*address_of.values(), str(artefact.parent)):
        check_addresses(job_with(tmp_path, oracle=address))
    assert oracle_labels(address_of["clip"]) is None
    assert oracle_labels(address_of["neighbours"]) == oracle_labels(str(artefact.parent)) == [*LABELS]
    assert load_oracle(str(artefact.parent), "cpu", LABELS).name == str(artefact.parent)


@pytest.mark.parametrize("role", ["target", "transfer"])
def test_targets_and_transfer_models_remain_classifiers(role: str, address_of: dict[str, str], tmp_path: Path) -> None:
    """Their scores are of logits that are trained as such."""
    for kind in ("clip", "neighbours"):
        value: Any = address_of[kind]
        with pytest.raises(JobError, match=rf"models\.{role}"):
            check_addresses(job_with(tmp_path, **{role: [value] if role == "transfer" else value}))


def test_several_artefacts_in_a_folder_are_refused_by_name(artefact: Path, tmp_path: Path) -> None:
    for name in ("neighbours-a", "neighbours-b"):
        shutil.copytree(artefact, tmp_path / "both" / name)
    with pytest.raises(JobError, match=r"models\.oracles\.1: .* holds 2 artefacts; name one of neighbours-a"):
        check_addresses(job_with(tmp_path, [ORACLE, tmp_path / "both"]))


def resealed(folder: Path, **changes: Any) -> None:
    """Change fields of an artefact's document, whose digest is right again."""
    fields = {name: value for name, value in read_document(folder, DOCUMENT).items() if name != "digest"}
    (folder / DOCUMENT).write_bytes(document_bytes(sealed(fields | changes)))


def with_features(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change the features, whose checksum is right again."""
    features = safetensors.torch.load_file(folder / FEATURES)["features"].clone()
    data = safetensors.torch.save({"features": change(features).contiguous()})
    (folder / FEATURES).write_bytes(data)
    resealed(folder, features_sha256=hashlib.sha256(data).hexdigest())


def cut(folder: Path) -> None:
    (folder / FEATURES).write_bytes((folder / FEATURES).read_bytes()[:-100])


def edited(folder: Path) -> None:
    text = (folder / DOCUMENT).read_text()
    (folder / DOCUMENT).write_text(text.replace('"dim": 64', '"dim": 65'))


def not_a_number(features: torch.Tensor) -> torch.Tensor:
    features[3] = torch.nan
    return features


DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated features": (cut, "features.safetensors is not what it was (checksum)"),
    "no features": (lambda folder: (folder / FEATURES).unlink(), "is not a neighbours artefact"),
    "an edited document": (edited, "neighbours.json is not what it was (digest)"),
    "no document": (lambda folder: (folder / DOCUMENT).write_text("{}"), "is not of a neighbours artefact"),
    "another version": (lambda folder: resealed(folder, schema_version=7), "has schema version 7"),
    "no neighbours": (lambda folder: resealed(folder, k=0), "is not laid out as this version does"),
    "no temperature": (lambda folder: resealed(folder, temperature=0), "is not laid out as this version does"),
    "a negative temperature": (
        lambda folder: resealed(folder, similarity_temperature=-1), "is not laid out as this version does",
    ),
    "an empty class": (lambda folder: resealed(folder, counts=[240] + [0] * 9), "is not laid out as this version does"),
    "no encoder": (lambda folder: resealed(folder, models={}), "is not laid out as this version does"),
    "an encoder that is not here": (
        lambda folder: resealed(folder, models={"encoder": {"address": "zoo:digits/none", "digest": "0"}}),
        "its encoder: 'zoo:digits/none' is not in the zoo",
    ),
    "an encoder of another kind": (
        lambda folder: resealed(folder, models={"encoder": {"address": ORACLE, "digest": "0"}}),
        "its encoder: 'zoo:digits/oracle' is a model of type 'regnet'; a CLIP model is needed",
    ),
    "a changed encoder": (
        lambda folder: resealed(folder, models={"encoder": {"address": "zoo:cifar10/judge", "digest": "0" * 32}}),
        "was made with another encoder: 'zoo:cifar10/judge' had the digest 0",
    ),
    "other classes": (
        lambda folder: resealed(folder, classes=[*LABELS[:9], "ninth"]), "other classes than the target",
    ),
    "an image without a feature": (lambda folder: with_features(folder, not_a_number), ""),
    "another number of images": (lambda folder: with_features(folder, lambda features: features[1:]), ""),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_artefact_is_refused(kind: str, artefact: Path, tmp_path: Path) -> None:
    """By files where files tell, before a worker starts; where only the tensors do, when they are loaded."""
    folder = Path(shutil.copytree(artefact, tmp_path / "neighbours-a"))
    damage, message = DAMAGED[kind]
    damage(folder)
    job = job_with(tmp_path, [ORACLE, folder])
    if message:
        with pytest.raises(JobError) as refused:
            check_addresses(job)
        assert str(refused.value).startswith("models.oracles.1: ") and message in str(refused.value)
    else:
        check_addresses(job)
    with pytest.raises(JobError):
        load_oracle_for(str(folder), "cpu", LABELS, {})


def test_an_artefact_is_handed_on_with_its_encoder(
    artefact: Path, encoder: Path, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative encoder is found from the working folder, or in the folder of the artefact, and is the same oracle."""
    expected = load_oracle(str(artefact), "cpu", LABELS).score([samples[0][0]])
    folder = Path(shutil.copytree(artefact, tmp_path / "neighbours-a"))
    digest = read_document(folder, DOCUMENT)["models"]["encoder"]["digest"]
    resealed(folder, models={"encoder": {"address": "models/clip", "digest": digest}})
    for home in (tmp_path / "here", folder):
        copy = Path(shutil.copytree(encoder, home / "models/clip"))
        monkeypatch.chdir(home if home != folder else tmp_path)
        check_addresses(job_with(tmp_path, [folder]))
        assert torch.equal(load_oracle(str(folder), "cpu", LABELS).score([samples[0][0]]), expected)
        shutil.rmtree(copy)
    with pytest.raises(JobError, match="its encoder"):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "models/clip").mkdir(parents=True)
        check_addresses(job_with(tmp_path, [folder]))


def test_an_artefact_may_be_a_part_of_the_zoo(artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an encoder of the zoo it is an oracle wherever the package is."""
    zoo = tmp_path / "zoo"
    shutil.copytree(addresses.ZOO / "digits", zoo / "digits", symlinks=True)
    shutil.copytree(artefact, zoo / "digits/neighbours")
    monkeypatch.setattr(addresses, "ZOO", zoo)
    address = "zoo:digits/neighbours"
    check_addresses(job_with(tmp_path, [address]))
    assert oracle_kind(address) == "neighbours" and licence_of(address) == OF_ZOO
    assert load_oracle(address, "cpu", LABELS).name == address
    with pytest.raises(JobError, match=r"has no config\.json"):
        check_addresses(job_with(tmp_path, transfer=[address]))


# Independence and digests --------------------------------------------------------------------------------------------


def test_oracles_that_are_what_they_judge_or_each_other_are_refused(
    address_of: dict[str, str], artefact: Path, encoder: Path, tmp_path: Path
) -> None:
    """Under other names and in other forms; the encoder of an artefact is what it sees with."""
    copy = str(shutil.copytree(resolve(CLIP), tmp_path / "copy"))
    sharded(Path(copy))
    guided = Path(shutil.copytree(artefact, tmp_path / "neighbours-guided"))
    digest = oracle_digest(CLIP)
    resealed(guided, models={"encoder": {"address": CLIP, "digest": digest}})
    for oracles, message in {
        (TARGET,): "models.oracle: 'zoo:digits/classifier' has the weights of models.target; an oracle decides",
        (CLIP,): "models.oracle: 'zoo:digits/clip' has the image tower of models.clip",
        (copy,): "has the image tower of models.clip",
        (ORACLE, str(guided)): f"models.oracles.1: the encoder of '{guided}', 'zoo:digits/clip', has the image tower",
        (
            str(encoder),
            str(artefact),
        ): f"models.oracles.1: the encoder of '{artefact}', '{encoder}', has the image tower of models.oracles.0",
        (str(artefact), str(encoder)): f"models.oracles.1: '{encoder}' has the image tower of models.oracles.0",
        (ORACLE, str(resolve(ORACLE))): "has the weights of models.oracles.0, so that its agreement confirms nothing",
    }.items():
        with pytest.raises(JobError) as refused:
            check_addresses(job_with(tmp_path, oracles))
        assert len(refused.value.problems) == 1 and message in str(refused.value)
    check_independent(job_with(tmp_path, [ORACLE, artefact]).models)


def test_the_judge_may_be_an_oracle(encoder: Path, tmp_path: Path) -> None:
    """It guides nothing either; its conformity and its probability are one measurement, in two columns."""
    check_addresses(job_with(tmp_path, [ORACLE, encoder], judge=str(encoder)))


def test_a_target_on_the_image_tower_of_an_oracle_is_refused(encoder: Path, tmp_path: Path) -> None:
    """A head on CLIP's frozen tower, as linear probes are, errs where CLIP does."""
    config = CLIPConfig.from_pretrained(encoder)
    config.id2label = dict(enumerate(LABELS))
    config.label2id = {label: index for index, label in enumerate(LABELS)}
    probe = CLIPForImageClassification(config)
    probe.vision_model.load_state_dict(CLIPModel.from_pretrained(encoder).vision_model.state_dict())
    probe.save_pretrained(tmp_path / "probe")
    shutil.copy(encoder / "preprocessor_config.json", tmp_path / "probe")
    with pytest.raises(JobError, match=r"models\.oracle: .* has the image tower of models\.target"):
        check_addresses(job_with(tmp_path, [encoder], target=str(tmp_path / "probe")))
    assert oracle_kind(str(tmp_path / "probe")) == "classifier"


def test_the_digest_is_of_the_document_and_of_the_encoder(artefact: Path, encoder: Path, tmp_path: Path) -> None:
    """Wherever they are; another k or another encoder is another oracle, and another plan."""
    copy = Path(shutil.copytree(artefact, tmp_path / "neighbours-a"))
    assert oracle_digest(str(copy)) == oracle_digest(str(artefact)) == oracle_digest(str(artefact.parent))
    digests = model_digests(job_with(tmp_path, [ORACLE, copy]))
    assert digests["oracles"] == [oracle_digest(ORACLE), oracle_digest(str(copy))]
    assert digests["oracle"] == oracle_digest(ORACLE)
    before = oracle_digest(str(copy))
    resealed(copy, k=3)
    assert oracle_digest(str(copy)) != before
    moved = Path(shutil.copytree(encoder, tmp_path / "clip"))
    (moved / "config.json").write_text((moved / "config.json").read_text() + "\n")
    resealed(copy, models={"encoder": {"address": str(moved), "digest": oracle_digest(str(encoder))}})
    with pytest.raises(JobError, match="was made with another encoder"):
        oracle_digest(str(copy))


# Runs ----------------------------------------------------------------------------------------------------------------


def test_a_run_records_oracles_of_all_kinds(
    address_of: dict[str, str], loaded: dict[str, Oracle], tmp_path: Path
) -> None:
    """What each says of the stored file, in the order of the job; verified from the files, and scored again."""
    oracles = [ORACLE, address_of["neighbours"]]
    job = job_with(tmp_path, oracles)
    run_job(job, executor=LocalExecutor(1), resume="auto", confirmed=False, display=PlainDisplay(io.StringIO()))
    store = open_store(job.output.uri)
    rows = pq.read_table(store.path("metadata.parquet")).to_pylist()
    assert rows and all([entry["model"] for entry in row["oracles"]] == oracles for row in rows)
    images = {
        key: PIL.Image.open(io.BytesIO(image)).convert("RGB")
        for path in sorted(store.path("shards").glob("*.tar"))
        for key, image, _, _ in read_shard(path)
    }
    for row in rows:
        asked = row["kldb_classes"] if row["request"] == "b" else [row["class_index"]]
        for kind, entry in zip(("classifier", "neighbours"), row["oracles"], strict=True):
            p = torch.softmax(loaded[kind].score([images[row["key"]]]).double(), 1)[0]
            assert entry["p_label"] == pytest.approx(float(p[asked].sum()), abs=1e-3)
            assert entry["predicted_class"] == int(p.argmax())
        assert row["oracle_p_label_min"] == min(entry["p_label"] for entry in row["oracles"])
    assert verify(store).findings == ()
    done = rescore_run(job.output.uri, "zoo:digits/classifier-b", oracles=[address_of["clip"]])
    again = pq.read_table(open_store(done.folder).path("metadata.parquet")).to_pylist()
    assert all([entry["model"] for entry in row["oracles"]] == [address_of["clip"]] for row in again)


def test_a_scorer_has_them_all(address_of: dict[str, str], samples: list[Sample], tmp_path: Path) -> None:
    """Classifiers as they are."""
    scorer = load_scorer(job_with(tmp_path, [ORACLE, address_of["clip"]]))
    assert [type(model) is Classifier for model in scorer._oracles.models] == [True, False]
    assert [len(one) for one in scorer.preprocess([samples[0][0]]).oracles] == [1, 1]
