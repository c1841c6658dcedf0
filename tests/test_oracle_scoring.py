"""What is recorded of several oracles, by the definitions, and what a job may name."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from engine.data.images import digits
from engine.data.run.outcomes import label_is_valid_expression, label_validity
from engine.data.run.schema import arrow_schema
from engine.data.run.summary import summarise_table
from engine.driver.progress import medians_table
from engine.errors import JobError
from engine.generation.loading import load_scorer
from engine.generation.oracle_scoring import Oracles, oracle_scores
from engine.job.acceptance import is_accepted
from engine.job.columns import GUIDES
from engine.job.parsing import parse_job
from engine.job.plan import build_plan
from engine.job.records import check_record, new_record
from engine.methods.finiteness import Faults
from engine.models.classifier import Classifier
from engine.models.digests import model_digests
from engine.report.headline import summary_figures
from engine.report.text import percent
from engine.studies.rescore.inputs import Models, _validity
from engine.terminal import safe_console
from tests.composed import composed_job
from tests.image_cases import DIGITS

UNKNOWN_DIGESTS: dict[str, Any] = {
    "diffusion": {"zoo:digits/stable-diffusion": ""}, "clip": "", "target": "", "transfer": [], "oracle": "",
}  # fmt: skip
ORACLE, OTHER = "zoo:digits/oracle", "zoo:digits/classifier-b"


def digit_images(classes: list[int]) -> list[PIL.Image.Image]:
    """A plain composite of each class, from scans that no model was trained on."""
    sources, contexts = digits.load_sources("test"), digits.single_contexts()
    rows = [int(np.flatnonzero(sources.labels == label)[0]) for label in classes]
    plain = contexts.take(np.zeros(len(rows), dtype=np.int64))
    made = digits.compose(sources, np.array(rows), plain, rng=np.random.default_rng(0))
    return [PIL.Image.fromarray(image) for image in made.images]


def raw_job(tmp_path: Path, **models: Any) -> dict[str, Any]:
    """The suite's small job, with other models; None leaves one out."""
    raw = composed_job(tmp_path, count=1).model_dump(mode="json")
    chosen = raw["models"] | {"oracle": None, "transfer": []} | models
    return raw | {"models": {name: value for name, value in chosen.items() if value is not None}}


def test_probabilities_are_softmax_sums_over_what_counts_as_the_label() -> None:
    """Of a joint prompt all of its classes together; rows do not see each other, and no sum exceeds 1."""
    logits = [torch.randn(64, 5, generator=torch.Generator().manual_seed(seed)) * 8 for seed in range(3)]
    asked = [(row % 5,) if row % 2 else (0, 3, 4) for row in range(64)]
    made = oracle_scores(logits, asked, logits[0].shape[1])
    for oracle, own in enumerate(logits):
        p = torch.softmax(own.double(), 1)
        for row, classes in enumerate(asked):
            assert float(made.p_label[row, oracle]) == pytest.approx(float(p[row, list(classes)].sum()), rel=1e-6)
    assert made.predicted.tolist() == torch.stack([own.argmax(1) for own in logits], 1).tolist()
    assert float(made.p_label.max()) <= 1
    for row in range(64):
        alone = oracle_scores([own[row : row + 1] for own in logits], asked[row : row + 1], logits[0].shape[1])
        assert torch.equal(alone.p_label[0], made.p_label[row])


@pytest.fixture(scope="module")
def oracles() -> list[Classifier]:
    return [Classifier.load(address) for address in (ORACLE, OTHER)]


def fields(models: list[Classifier], *, is_guiding: bool = False) -> list[dict[str, Any]]:
    """What is recorded of an image of a three, asked for as a three, an eight and either."""
    made = Oracles(models, is_guiding=is_guiding)
    [image] = digit_images([3])
    return made.fields(made.preprocess([image] * 3), [(3,), (8,), (3, 8)], Faults(3))


def test_records_name_every_oracle_and_the_least_certain_one(oracles: list[Classifier]) -> None:
    three, eight, either = fields(oracles)
    for record in (three, eight, either):
        assert [entry["model"] for entry in record["oracles"]] == [ORACLE, OTHER]
        assert record["oracle_class"] == 3 and record["p_valid"] == -1
        assert record["oracle_p_label_min"] == min(entry["p_label"] for entry in record["oracles"])
    assert three["oracle_p_label_min"] > 0.5 > eight["oracle_p_label_min"]
    assert either["oracle_p_label_min"] >= three["oracle_p_label_min"]


def test_an_oracle_that_guided_decides_nothing(oracles: list[Classifier]) -> None:
    """It is the last one; where it is the only one, nothing is known of the label."""
    alone, both = fields(oracles[:1])[0], fields(oracles, is_guiding=True)[0]
    assert [entry["model"] for entry in both["oracles"]] == [ORACLE, OTHER + GUIDES]
    assert {name: both[name] for name in ("oracle_class", "oracle_p_label_min")} == {
        name: alone[name] for name in ("oracle_class", "oracle_p_label_min")
    }
    only = fields(oracles[:1], is_guiding=True)[0]
    assert (only["oracle_class"], only["oracle_p_label_min"], only["p_valid"]) == (-1, -1, -1)
    assert only["oracles"][0]["model"] == ORACLE + GUIDES
    assert fields([]) == [{"oracle_class": -1, "oracles": [], "oracle_p_label_min": -1, "p_valid": -1}] * 3


def test_a_value_that_is_not_finite_names_its_oracle(oracles: list[Classifier]) -> None:
    class Broken(Classifier):
        def score_pixels(self, pixels: Tensor) -> Tensor:
            is_second = torch.arange(len(pixels))[:, None] == 1
            return torch.where(is_second, torch.nan, super().score_pixels(pixels))

    broken = Broken.load(OTHER)
    made, faults = Oracles([oracles[0], broken]), Faults(2)
    images = digit_images([3, 3])
    good, _ = made.fields(made.preprocess(images), [(3,), (3,)], faults)
    assert not faults[0] and good["oracle_class"] == 3
    assert faults[1].startswith(f"models.oracle '{OTHER}' gives")


def test_a_list_of_one_oracle_is_that_oracle(tmp_path: Path) -> None:
    """Job, stored job and plan are those of `oracle`, which are as they were."""
    one, listed = (parse_job(raw_job(tmp_path, **models)) for models in ({"oracle": ORACLE}, {"oracles": [ORACLE]}))
    assert one == listed and one.models.all_oracles == (ORACLE,)
    assert not {"oracles", "validity"} & one.models.model_dump().keys()
    assert parse_job(one.model_dump(mode="json")) == one
    two = parse_job(raw_job(tmp_path, oracles=[ORACLE, OTHER]))
    assert two.models.oracle is None and two.models.all_oracles == (ORACLE, OTHER)
    assert parse_job(two.model_dump(mode="json")) == two
    digests = [model_digests(job) for job in (one, two)]
    assert "oracles" not in digests[0] and digests[0]["oracle"] == digests[1]["oracle"] == digests[1]["oracles"][0]
    plans = [build_plan(job, list(DIGITS), own) for job, own in zip((one, two), digests, strict=True)]
    assert plans[0].digest != plans[1].digest


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ({"oracle": ORACLE, "oracles": [OTHER]}, "models.oracles: is a list, and oracle is there too"),
        ({"oracles": [ORACLE, OTHER, ORACLE]}, "models.oracles.2: 'zoo:digits/oracle' is there twice"),
        ({"oracles": [ORACLE, ""]}, "models.oracles.1"),
        ({"oracles": [ORACLE] * 17}, "models.oracles: has 17 entries; give 16 or fewer"),
        ({"oracles": ORACLE}, "models.oracles"),
        ({"oracles": [ORACLE, [OTHER]]}, "models.oracles.1"),
        ({"oracles": [ORACLE, None]}, "models.oracles.1"),
    ],
)
def test_lists_that_are_wrong_are_refused(tmp_path: Path, models: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError) as caught:
        parse_job(raw_job(tmp_path, **models))
    assert any(problem.startswith(message) for problem in caught.value.problems), caught.value.problems


def test_a_scorer_of_a_job_has_all_of_its_oracles(tmp_path: Path) -> None:
    """In the order of the job; a record of it is complete."""
    job = parse_job(raw_job(tmp_path, oracles=[OTHER, ORACLE]))
    spec = build_plan(job, list(DIGITS), model_digests(job)).requests[0].sample(0)
    [record] = load_scorer(job).records([spec], digit_images([spec.cell.classes[0]]))
    assert [entry["model"] for entry in record["oracles"]] == [OTHER, ORACLE]
    assert record["oracle_class"] == record["oracles"][0]["predicted_class"]
    check_record(record)


def test_label_validity_is_one_rule_everywhere(tmp_path: Path) -> None:
    """In rules of acceptance, in filters and in tables, at the limits and where nothing is known."""
    values = [-1.0, 0.0, 0.8999, 0.9, 0.9899, 0.99, 1.0]
    rows = [{"p_valid": p, "oracle_p_label_min": least} for p in values for least in values]
    spec = build_plan(composed_job(tmp_path, count=1), list(DIGITS), UNKNOWN_DIGESTS).requests[0].sample(0)
    records = [new_record(spec) | row for row in rows]
    wanted = [None if p == least == -1 else p >= 0.9 if p != -1 else least >= 0.99 for p in values for least in values]
    assert [is_accepted("label_is_valid", record, (0,)) for record in records] == [one is True for one in wanted]
    assert [is_accepted("not label_is_valid", record, (0,)) for record in records] == [one is False for one in wanted]
    table = pa.Table.from_pylist(rows)
    assert label_validity(table).tolist() == [-1 if one is None else one for one in wanted]
    assert len(table.filter(label_is_valid_expression())) == sum(one is True for one in wanted)


@pytest.mark.parametrize("oracles", [["a", "b"], ["a", "b", "guide"]])
def test_an_estimate_survives_a_rescoring_by_the_same_oracles(tmp_path: Path, oracles: list[str]) -> None:
    """Also where the last of them guided, which is no part of the estimate; not by other oracles."""
    job = composed_job(tmp_path, count=1)
    digests = UNKNOWN_DIGESTS | {
        "oracle": "a", "oracles": oracles, "validity": {"digest": "d", "intercept": 0.0, "weights": [1.0, 1.0]},
    }  # fmt: skip
    plan = build_plan(job, list(DIGITS), digests)

    def models(names: list[str]) -> Models:
        return Models(
            target="t", calibration=None, described={}, transfer=(), oracles=tuple(names),
            digests={"target": "t", "oracle": names[0], "oracles": names},
        )  # fmt: skip

    assert _validity(models(oracles), plan) is not None
    assert _validity(models(["b", "a", *oracles[2:]]), plan) is None


def test_strictly_valid_failures_are_counted_in_every_table(tmp_path: Path) -> None:
    """Of errors with an agreeing oracle those whose label is valid; unknown where no oracle gave a probability."""
    spec = build_plan(composed_job(tmp_path, count=1), list(DIGITS), UNKNOWN_DIGESTS).requests[0].sample(0)
    ok = {"status": "ok", "accepted": True, "kldb_classes": [0, 1], "is_error": True, "predicted_class": 1}
    run = {"batch_size": 1, "duration_seconds": 0.0, "attempt": 0, "worker": "", "sha256": "", "surplus": False}
    rows = [new_record(spec) | ok | run | {"oracle_class": 0, "oracle_p_label_min": p} for p in (0.5, 0.98, 0.99, 1.0)]
    rows[-1] |= {"is_error": False, "predicted_class": 0}
    table = pa.Table.from_pylist(rows, schema=arrow_schema(surplus=True))
    [group] = summarise_table(table)
    assert (group.valid_failure_rate, group.valid_label_rate, group.strict_failure_rate) == (0.75, 0.5, 0.25)
    shown = {figure.heading.name: figure.cell(group) for figure in summary_figures([group])}
    assert shown["Valid failures"] == (percent(0.75), f"strictly {percent(0.25)}")
    stream = io.StringIO()
    safe_console(stream, width=140).print(medians_table([group]))
    assert "75% (25%)" in stream.getvalue()
    unknown = [row | {"oracle_p_label_min": -1.0} for row in rows]
    [group] = summarise_table(pa.Table.from_pylist(unknown, schema=arrow_schema(surplus=True)))
    assert group.valid_failure_rate == 0.75 and group.strict_failure_rate is group.valid_label_rate is None
    assert {figure.heading.name: figure.cell(group) for figure in summary_figures([group])}["Valid failures"][1] == ""
