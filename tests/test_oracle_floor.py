"""An oracle as a floor of guidance: what a job may say of it, what it does to samples, and that it is no evidence."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.data.images import decode_rgb
from engine.data.run.shards import read_rows
from engine.data.stores.base import Store
from engine.data.stores.opening import open_store
from engine.driver.executors.local import LocalExecutor
from engine.driver.progress import PlainDisplay
from engine.driver.run import run_job
from engine.errors import JobError
from engine.generation.generator import Generator
from engine.generation.rescorer import rescore
from engine.job.columns import GUIDES, UNKNOWN
from engine.job.parsing import parse_job
from engine.job.plan import build_plan
from engine.job.records import SampleResult
from engine.job.spec import JobSpec
from engine.methods.risky.spec import RiskyGuidanceSpec
from engine.models.classifier import Classifier
from engine.models.digests import model_digests
from engine.models.labels import read_labels
from engine.studies.rescore.program import rescore_run

TARGET, OTHER, ORACLE = "zoo:digits/classifier", "zoo:digits/classifier-b", "zoo:digits/oracle"
RISKY = {"name": "risky", "method": "risky", "classes": ["two", "seven"], "count": 6, "seed_group": "same"}
FLOOR = {"risky": {"oracle_floor": 0.9}}


def raw_job(
    *requests: dict[str, Any], uri: Path | str = "runs/x", guidance: Any = None, **models: Any
) -> dict[str, Any]:
    named = {"diffusion": "zoo:digits/stable-diffusion", "clip": "zoo:digits/clip", "target": TARGET} | models
    return {
        "name": "floor",
        "models": named,
        "requests": [*(requests or [RISKY])],
        "sampling": {"num_inference_steps": 20},
        "guidance": {"risky": {"target_risk": 2.0}} if guidance is None else guidance,
        "output": {"uri": str(uri)},
    }


def problems_of(raw: dict[str, Any]) -> list[str]:
    with pytest.raises(JobError) as caught:
        parse_job(raw)
    return list(caught.value.problems)


# The job file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["perceptible", "adversarial"])
def test_a_job_without_a_floor_is_stored_as_before_there_was_one(preset: str) -> None:
    """No new key in the job, its manifest or its plan; with a floor the key is in all of them, and is read again."""
    for named in ({}, {"oracle_floor": None}, {"oracle_floor": 0.9}):
        job = parse_job(raw_job(guidance={"risky": {"preset": preset} | named}, oracle=ORACLE))
        parameters = job.parameters_of(job.requests[0])
        stored = [
            job.model_dump(mode="json")["guidance"]["risky"],
            job.model_dump(mode="json", exclude_none=True)["guidance"]["risky"],
            parameters.identity(),
        ]
        expected = named.get("oracle_floor")
        assert [values.get("oracle_floor", "absent") for values in stored] == [expected or "absent"] * 3
        assert parse_job(json.loads(json.dumps(job.model_dump(mode="json")))) == job
        # What else is null stays where it was.
        assert "conformity_floor" in stored[0] and "conformity_floor" in stored[2]


@pytest.mark.parametrize("value", [0, 1, -0.5, 1.5, "0.9", True])
def test_a_floor_is_a_probability_between_none_and_certainty(value: Any) -> None:
    """With the field and the value; 0 would bound nothing, and 1 can never be reached."""
    [problem] = problems_of(raw_job(guidance={"risky": {"oracle_floor": value}}, oracle=ORACLE))
    assert problem.startswith("guidance.risky.oracle_floor: ")


def test_which_oracle_guides() -> None:
    """The last of them, where some request keeps to a floor: not by a step rule or by a method that has none."""
    paper = RISKY | {"name": "paper", "guidance": {"risky": {"step": "paper", "oracle_floor": None}}}
    prompt = RISKY | {"name": "prompt", "method": "prompt"}
    for guidance, requests, guides in (
        ({}, [RISKY], False),
        (FLOOR, [RISKY], True),
        (FLOOR, [prompt], False),
        (FLOOR, [paper], False),
        (FLOOR, [prompt, paper, RISKY], True),
        (FLOOR, [RISKY | {"guidance": {"risky": {"oracle_floor": None}}}], False),
        ({}, [prompt, RISKY | {"guidance": FLOOR}], True),
    ):
        job = parse_job(raw_job(*requests, guidance=guidance, oracles=["a", "b", "c"]))
        assert job.oracle_guides == guides
        assert job.independent_oracles == (("a", "b") if guides else ("a", "b", "c"))
    assert not RiskyGuidanceSpec(step="paper", oracle_floor=0.9).sees_oracle


def test_a_floor_needs_an_oracle() -> None:
    """It is refused where it stands; one of a method that no request uses is not."""
    text = "there is no oracle whose probability it could bound; name one in models.oracle, or leave it out"
    assert problems_of(raw_job(guidance=FLOOR)) == [f"guidance.risky.oracle_floor: {text}"]
    plain = RISKY | {"name": "plain", "method": "prompt"}
    assert problems_of(raw_job(plain, RISKY | {"guidance": FLOOR})) == [
        f"requests.1.guidance.risky.oracle_floor: {text}"
    ]
    parse_job(raw_job(plain, guidance=FLOOR))
    parse_job(raw_job(guidance=FLOOR, oracle=ORACLE))


@pytest.mark.parametrize(
    ("guidance", "own", "place"),
    [
        ({"step": "paper", "oracle_floor": 0.9}, {}, "guidance.risky"),
        ({"step": "paper"}, {"oracle_floor": 0.9}, "requests.0.guidance.risky"),
        ({"oracle_floor": 0.9}, {"step": "paper"}, "requests.0.guidance.risky"),
    ],
)
def test_a_floor_without_effect_is_refused(guidance: dict[str, Any], own: dict[str, Any], place: str) -> None:
    """The paper's step keeps to none."""
    problems = problems_of(raw_job(RISKY | {"guidance": {"risky": own}}, guidance={"risky": guidance}, oracle=ORACLE))
    assert problems == [
        f"{place}.oracle_floor: has no effect with step: paper, so that the label is not kept; use step: polyak, or set"
        " oracle_floor: null"
    ]


TEXT = "target_errs and (oracle_agrees or conformity >= 0.9)"
ASKED: list[tuple[Any, str]] = [
    ({"oracle": "agrees"}, ".oracle: asks"),
    ({"is_error": True, "oracle_p_label_min": ">= 0.99"}, ".oracle_p_label_min: asks"),
    (TEXT, ": 'oracle_agrees' asks"),
    *((name, f": '{name}' asks") for name in ("valid_failure", "label_is_valid")),
    *((f"{name} >= 0", f": '{name}' asks") for name in ("oracle_class", "oracle_p_label_min")),
]


@pytest.mark.parametrize(("accept", "asks"), ASKED)
def test_the_only_oracle_does_not_both_guide_and_decide(accept: Any, asks: str) -> None:
    """Also where another request is the one that it guides; with a second one, or without a floor, it may."""
    guided = RISKY | {"name": "guided", "guidance": FLOOR}
    asked = RISKY | {"name": "asked", "method": "prompt", "accept": accept}
    [problem] = problems_of(raw_job(guided, asked, oracle=ORACLE))
    assert problem == (
        f"requests.1.accept{asks} the only oracle, which requests.0.guidance.risky.oracle_floor lets guide, so that it"
        " is not independent; name a second oracle in models.oracles, the one that guides last"
    )
    assert problems_of(raw_job(guided, asked, oracles=[ORACLE])) == [problem]
    parse_job(raw_job(guided, asked, oracles=[OTHER, ORACLE]))
    parse_job(raw_job(guided, asked | {"accept": {"is_error": True, "conformity": ">= 0.2"}}, oracle=ORACLE))
    parse_job(raw_job(RISKY, asked, oracle=ORACLE))


def test_an_estimate_of_validity_needs_an_oracle_that_guides_nothing() -> None:
    """It would be of probabilities that guidance has seen to."""
    [problem] = problems_of(raw_job(guidance=FLOOR, oracle=ORACLE, validity="runs/validity"))
    assert problem.startswith("models.validity: asks the only oracle, which guidance.risky.oracle_floor lets guide")


def test_plan_names_the_oracle_that_guides(call: Any, tmp_path: Path) -> None:
    """And says that it decides nothing."""
    path = tmp_path / "job.json"
    for guidance in (FLOOR, {}):
        path.write_text(json.dumps(raw_job(uri=tmp_path / "run", guidance=guidance, oracles=[OTHER, ORACLE])))
        code, out, _ = call("plan", path, "--validate")
        assert code == 0
        assert (f"guidance differentiates the oracle {ORACLE} too; acceptance does not ask it" in out) == bool(guidance)


# A run ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As workers on a CPU have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, JobSpec]:
    """Samples above a floor and without one, from the same noise; the oracle guides, and the other one does not."""
    floor = RISKY | {"name": "floor", "guidance": FLOOR}
    job = parse_job(raw_job(RISKY, floor, uri=tmp_path_factory.mktemp("run") / "run", oracles=[OTHER, ORACLE]))
    run_job(job, executor=LocalExecutor(1), resume="auto", confirmed=False, display=PlainDisplay(io.StringIO()))
    return open_store(job.output.uri), job


def rows_of(store: Store) -> list[dict[str, Any]]:
    return [row for path in sorted(store.path("shards").glob("*.parquet")) for row in read_rows(path)]


def test_a_floor_lifts_what_its_oracle_says_of_the_label(finished: tuple[Store, JobSpec]) -> None:
    """Of the stored images, at a risk as near to the target as without."""
    rows = rows_of(finished[0])
    without, above = ([row for row in rows if row["request"] == name] for name in ("risky", "floor"))
    (p, _), (p_above, risk_above) = (
        np.array([[row["oracles"][1]["p_label"], row["risk"]] for row in part]).T for part in (without, above)
    )
    assert len(p) == len(p_above) == 12
    assert (p_above > 0.85).mean() >= (p > 0.85).mean() + 0.25, (p, p_above)
    assert np.median(abs(risk_above - 2.0)) < 0.3


def test_what_guided_is_marked_and_decides_nothing(finished: tuple[Store, JobSpec], tmp_path: Path) -> None:
    """In every row, of requests without a floor too; in manifest and card; also when the run is scored again."""
    store, _ = finished
    rows = rows_of(store)
    assert len(rows) == 24
    for row in rows:
        first, last = row["oracles"]
        assert (first["model"], last["model"]) == (OTHER, ORACLE + GUIDES)
        assert row["oracle_class"] == first["predicted_class"]
        assert row["oracle_p_label_min"] == first["p_label"]
    assert any(row["oracles"][1]["p_label"] < row["oracles"][0]["p_label"] for row in rows)
    oracles = json.loads(store.read("manifest.json"))["models"]["oracles"]
    assert [one.get("guides") for one in oracles] == [None, True]
    text = "In `oracles`, a model with `(guides)` after its name was a floor of guidance"
    assert text in store.read("README.md").decode()
    assert rescore(store, 4) == []
    # The one that guided stays so, last, wherever it is asked for.
    done = rescore_run(store.uri, TARGET, oracles=(ORACLE, OTHER), output=str(tmp_path / "again"))
    again = [row for path in sorted(Path(done.folder, "shards").iterdir()) for row in read_rows(path)]
    assert [[one["model"] for one in row["oracles"]] for row in again] == [[OTHER, ORACLE + GUIDES]] * 24
    done = rescore_run(store.uri, TARGET, oracles=(ORACLE,), output=str(tmp_path / "alone"))
    alone = [row for path in sorted(Path(done.folder, "shards").iterdir()) for row in read_rows(path)]
    assert {(row["oracle_class"], row["oracle_p_label_min"]) for row in alone} == {(-1, UNKNOWN)}


def test_the_bytes_of_a_sample_do_not_depend_on_the_batch() -> None:
    """Of three samples by themselves, and among the samples of a whole batch; the floor is one that some are below."""
    request = RISKY | {"classes": ["two"], "count": 16, "guidance": FLOOR}
    job = parse_job(raw_job(request, oracle=ORACLE))
    plan = build_plan(job, read_labels(TARGET), model_digests(job))
    specs = list(plan.samples(plan.shard(0)))

    def made(part: list[Any]) -> list[SampleResult]:
        return [result for batch in Generator(job, plan).batches(0, part) for result in batch.results]

    whole, few = made(specs), made(specs[4:7])
    assert [one.image for one in whole[4:7]] == [one.image for one in few]
    assert [one.record for one in whole[4:7]] == [one.record for one in few]
    p = Classifier.load(ORACLE).score([decode_rgb(one.image) for one in whole]).softmax(1)[:, 2]
    stored = torch.tensor([one.record["oracles"][0]["p_label"] for one in whole])
    assert torch.allclose(p, stored, atol=1e-5)
    assert {one.record["oracle_class"] for one in whole} == {-1}
