"""Classes of other names or in another order: offered, refused by name, and read so that every score is what it was."""

from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from engine.commands.jobfile import read_job, read_label_maps
from engine.data.run.verify import verify
from engine.data.stores.opening import open_store
from engine.driver.checks import check_job
from engine.driver.executors.local import LocalExecutor
from engine.driver.run import run_job
from engine.errors import JobError
from engine.generation.oracle_scoring import oracle_scores
from engine.generation.rescorer import rescore
from engine.generation.scorer import transfer_entries
from engine.job.columns import OTHER_CLASS
from engine.job.label_maps import LabelMap, match_labels, nearly_equal
from engine.job.parsing import parse_job
from engine.methods.finiteness import Faults
from engine.models.classifier import Classifier
from engine.models.job_checks import check_addresses
from engine.models.job_label_maps import label_map_lines
from engine.models.relabelled import Relabelled, load_classifier_for
from engine.studies.rescore.program import rescore_run
from tests.composed import composed_job
from tests.model_cases import NAMES, job_of, relabelled
from tests.sleepy import Recorder

TARGET, ORACLE, OTHER = "zoo:digits/classifier", "zoo:digits/oracle", "zoo:digits/classifier-b"
REVERSED = [*range(9, -1, -1)]
# Its classes from nine to zero, in names of its own; six is split off into a name that nothing offers.
OWN_NAMES = ["Nines", "EIGHT", "sevens", "6er", "five, 5", "fours", "Three", "twos", "ones", "zeroes"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The zoo's oracle in other names and another order, and a transfer model in another order alone."""
    home = tmp_path_factory.mktemp("models")
    return {
        "oracle": str(relabelled(ORACLE, home / "oracle", OWN_NAMES, REVERSED)),
        "transfer": str(relabelled(OTHER, home / "transfer", NAMES[::-1], REVERSED)),
    }


def digits_map(**others: Any) -> dict[Any, Any]:
    return dict(zip(OWN_NAMES, NAMES[::-1], strict=True)) | others


def problems_of(job: Any) -> list[str]:
    with pytest.raises(JobError) as caught:
        check_addresses(job)
    return list(caught.value.problems)


# Names --------------------------------------------------------------------------------------------------------------


def test_equal_names_in_another_order_need_no_map() -> None:
    """By name, where every name is there once; a list in its own order is left as it is."""
    assert match_labels(["cat", "dog"], ["cat", "dog"], None, "m", "f") is None
    assert match_labels(["dog", "cat"], ["cat", "dog"], None, "m", "f") == LabelMap((1, 0), 2)
    assert match_labels(["crane", "crane", "cat"], ["crane", "crane", "cat"], None, "m", "f") is None
    with pytest.raises(JobError, match=r"several are called 'crane': map the classes by their indices"):
        match_labels(["cat", "crane", "crane"], ["crane", "crane", "cat"], None, "m", "f")
    by_index = {"0": "cat", "1": "1", "2": "0"}
    found = match_labels(["cat", "crane", "crane"], ["crane", "crane", "cat"], by_index, "m", "f")
    assert found == LabelMap((2, 1, 0), 3)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("Cat", "cat"), ("sports_car", "Sports Car"), ("T-shirt", "tshirt"), ("cats", "cat"), ("berry", "berries"),
        ("buses", "bus"), ("tabby, tabby cat", "tabby"), ("cat", "tabby cat, cat"), ("aeroplane", "airplane"),
        ("Zürich", "Zu\u0308rich"), ("fox", "foxes"),
    ],
)  # fmt: skip
def test_names_that_are_nearly_equal_are_offered(theirs: str, ours: str) -> None:
    """Case, separators, number, synonyms, spelling; among names that are none of it."""
    assert nearly_equal([theirs, "something else"], ["quite another", ours]) == {theirs: ours}


def test_names_of_several_are_not_guessed() -> None:
    """Two classes that a name may mean are left to the user."""
    assert nearly_equal(["crane"], ["crane, bird", "crane, machine"]) == {}
    assert nearly_equal(["three"], ["tree house", "one"]) == {}


def test_what_is_offered_is_accepted_once_it_is_filled_in(models: dict[str, str]) -> None:
    """The message has both lists and a map that can be pasted; what it names as missing completes it."""
    [problem] = problems_of(job_of(oracle=models["oracle"], transfer=[]))
    assert problem.startswith(f"models.oracle: '{models['oracle']}' has other classes than the target: it has 'Nines',")
    assert "the target has 'zero', 'one'" in problem and problem.endswith(", and in it what means 'six'")
    offered = yaml.safe_load(re.search(r"\{.*\}", problem)[0])["models"]["label_map"]
    lacking = problems_of(job_of(oracle=models["oracle"], label_map=offered))
    [line] = lacking
    assert line.startswith(f"models.label_map.{models['oracle']}: no class of '{models['oracle']}' is mapped to 'six'")
    offered[models["oracle"]]["6er"] = "six"
    check_addresses(job_of(oracle=models["oracle"], label_map=offered, transfer=[models["transfer"]]))


# Hostile maps -------------------------------------------------------------------------------------------------------

BAD_MAPS = {
    "[a]": "is not a mapping of addresses to label maps",
    "{1: {a: b}}": "has the key 1, where the address of a model is expected",
    "{zoo:digits/oracle: [a]}": "is not a mapping of class names to class names",
    "{zoo:digits/oracle: {a: [b]}}": "has ['b'], which is neither a class name nor an index",
    "{zoo:digits/oracle: {.nan: zero}}": "has nan, which is neither a class name nor an index",
    "{zoo:digits/oracle: {1.5: zero}}": "has 1.5, which is neither a class name nor an index",
    "{zoo:digits/oracle: {-1: zero}}": "has -1, which is neither a class name nor an index",
    "{zoo:digits/oracle: {'': zero}}": "has '', which is neither a class name nor an index",
    "{zoo:digits/oracle: {no: zero}}": "has False, as YAML reads yes, no, on and off; put such a class name in quotes",
    "{zoo:digits/oracle: {zero: on}}": "has True, as YAML reads yes, no, on and off; put such a class name in quotes",
    "{zoo:digits/orcle: {a: b}}": "no oracle, transfer model or further target has this address; did you mean",
    "{zoo:digits/classifier: {a: b}}": "no oracle, transfer model or further target has this address",
}


@pytest.mark.parametrize("text", BAD_MAPS)
def test_what_is_no_map_is_refused_by_name(text: str, tmp_path: Path) -> None:
    """From YAML as a user writes it, before any file of a model is read."""
    raw = composed_job(tmp_path, count=1).model_dump(mode="json")
    path = tmp_path / "job.yaml"
    raw["models"] |= {"oracle": ORACLE, "transfer": []}
    path.write_text(yaml.safe_dump(raw).replace("  oracle:", f"  label_map: {text}\n  oracle:"))
    with pytest.raises(JobError) as caught:
        read_job(path, [])
    assert any(line.startswith("models.label_map") and BAD_MAPS[text] in line for line in caught.value.problems)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"zeroo": "zero"}, "'zeroo' is not a class of the model; did you mean 'zero'?"),
        ({"zero": "zer0"}, "'zer0' is not a class of the target; did you mean 'zero'?"),
        ({"10": "zero"}, "'10' is not a class of the model"),
        ({"zero": "99"}, "'99' is not a class of the target"),
        ({"zero": "one", "0": "zero"}, "'0' is class 0, 'zero', named before; name each once"),
        ({"zero": "one"}, "no class of 'zoo:digits/oracle' is mapped to 'zero', which it could never predict"),
        ({"nine": None}, "no class of 'zoo:digits/oracle' is mapped to 'nine', which it could never predict"),
    ],
)
def test_maps_that_do_not_fit_are_refused_by_name(entries: dict[str, Any], message: str) -> None:
    """Unknown on either side, twice, or leaving a class of the target without any."""
    lines = problems_of(job_of(oracle=ORACLE, label_map={ORACLE: entries}))
    assert len(lines) == 1 and lines[0].startswith(f"models.label_map.{ORACLE}: ") and message in lines[0]


def test_a_clip_model_takes_no_map() -> None:
    """It is asked for the target's own classes."""
    lines = problems_of(job_of(oracle="zoo:cifar10/judge", label_map={"zoo:cifar10/judge": {"a": "b"}}))
    assert lines == [
        "models.label_map.zoo:cifar10/judge: a CLIP model is asked for the target's own classes; leave it out"
    ]


def test_numbers_that_are_names_are_names() -> None:
    """As everywhere: an index only where no class is called by a number."""
    digits, words = [str(n) for n in range(9, -1, -1)], [f"class {n} of ten" for n in range(10)]
    entries = {str(n): f"class {n} of ten" for n in range(10)}
    assert match_labels(digits, words, entries, "m", "f") == LabelMap(tuple(range(9, -1, -1)), 10)
    letters = list("abcdefghij")
    assert match_labels(letters, words, entries, "m", "f") == LabelMap(tuple(range(10)), 10)


def test_large_maps_take_no_time_and_few_lines() -> None:
    """Thousands of unknown names of any length; the message stays readable."""
    labels = [f"breed number {n}" for n in range(3000)]
    started = time.monotonic()
    entries = dict.fromkeys(labels, "a")
    assert match_labels(["b", *labels], ["a", "b"], entries, "m", "f").others == []
    with pytest.raises(JobError) as caught:
        match_labels(["b"], ["a", "b"], {"x" * 500 + label: "a" for label in labels}, "m", "f")
    assert len(caught.value.problems) <= 21 and max(map(len, caught.value.problems)) < 500
    with pytest.raises(JobError) as caught:
        match_labels(labels, [f"BREED NUMBER {n}s" for n in range(3000)], None, "m", "f")
    assert len(str(caught.value)) <= 2100
    assert time.monotonic() - started < 20
    with pytest.raises(JobError, match="has a name of 5000 characters; give 1000 or fewer"):
        parse_job({"models": {"label_map": {ORACLE: {"a" * 5000: "b"}}}})
    with pytest.raises(JobError, match="has '3' twice, as a name and as an index"):
        parse_job({"models": {"label_map": {ORACLE: {3: "three", "3": "four"}}}})
    with pytest.raises(JobError, match="has 10001 keys; a mapping has 10000 at most"):
        parse_job({"models": {"label_map": {ORACLE: {str(n): "a" for n in range(10_001)}}}})


# Scores -------------------------------------------------------------------------------------------------------------


class Given:
    """A model whose logits are given."""

    def __init__(self, labels: list[str], logits: torch.Tensor) -> None:
        self.name, self.labels, self.temperature, self._logits = "given", labels, 1.0, logits

    def score_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """The logits, whatever is scored."""
        return self._logits


def test_classes_of_one_are_added_up_and_others_keep_their_probability() -> None:
    """Two breeds are one cat; a fox is neither cat nor dog, and takes nothing from either's probability."""
    theirs, logits = ["tabby", "fox", "dog", "siamese"], torch.tensor([[1.0, 1.5, 0.5, 1.0], [0.0, 3.0, 0.0, 0.0]])
    found = match_labels(theirs, ["cat", "dog"], {"tabby": "cat", "siamese": "cat", "fox": None}, "m", "f")
    assert found == LabelMap((0, -1, 1, 0), 2) and found.others == [1]
    model = Relabelled(Given(theirs, logits), found, ["cat", "dog"])
    read, p = model.score_pixels(torch.zeros(2)), logits.double().softmax(1)
    made = oracle_scores([read], [(0,), (0,)], 2)
    assert made.p_label[:, 0].tolist() == pytest.approx((p[:, 0] + p[:, 3]).tolist(), rel=1e-6)
    assert made.predicted[:, 0].tolist() == [0, OTHER_CLASS], "0.47 of cat is more than 0.39 of fox"
    [entry], [fox] = transfer_entries([model], [read], torch.tensor([0, 1]), Faults(2))
    assert (entry["predicted_class"], fox["predicted_class"]) == (0, OTHER_CLASS)
    assert entry["risk"] == pytest.approx(-math.log(p[0, 0] + p[0, 3]), rel=1e-5)
    both = oracle_scores([read], [(0, 1), (0, 1)], 2).p_label[:, 0]
    assert both.tolist() == pytest.approx((1 - p[:, 1]).tolist(), rel=1e-6), "no more than what is not fox"


def test_a_model_in_another_order_has_the_same_scores_and_gradients(models: dict[str, str]) -> None:
    """But for the rounding of a product with other rows."""
    plain, mapped = Classifier.load(OTHER), load_classifier_for(models["transfer"], "cpu", NAMES, {})
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    gradients = []
    for model in (plain, mapped):
        given = images.clone().requires_grad_()
        model.logits(given)[:, 3].sum().backward()
        gradients.append(given.grad)
    assert torch.allclose(plain.logits(images), mapped.logits(images), atol=1e-5) and mapped.labels == NAMES
    assert torch.allclose(*gradients, atol=1e-6)


def raw_job(output: Path, **models: Any) -> dict[str, Any]:
    return {
        "name": "mapped",
        "models": {"diffusion": "zoo:digits/stable-diffusion", "clip": "zoo:digits/clip", "target": TARGET} | models,
        "requests": [{"name": "a", "method": "prompt", "classes": ["three", "six"], "count": 1}],
        "sampling": {"num_inference_steps": 2, "scheduler": "ddim"},
        "output": {"uri": str(output)},
    }


@pytest.fixture(scope="module")
def run(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an oracle in names of its own and a transfer model in another order."""
    output = tmp_path_factory.mktemp("runs") / "mapped"
    maps = {models["oracle"]: digits_map()}
    job = parse_job(raw_job(output, oracle=models["oracle"], transfer=[models["transfer"]], label_map=maps))
    made = run_job(job, executor=LocalExecutor(1), resume="auto", confirmed=False, display=Recorder())
    assert made.exit_code == 0
    return output


def rows_of(folder: Path | str) -> list[dict[str, Any]]:
    return pq.read_table(Path(folder) / "metadata.parquet").to_pylist()


def test_a_run_scores_as_with_the_models_themselves(run: Path, tmp_path: Path) -> None:
    """What the zoo's own models say of the same images; a deep verification agrees, after a start from files alone."""
    plain = rescore_run(str(run), TARGET, transfer=[OTHER], oracles=[ORACLE], output=str(tmp_path / "plain"))
    for mapped, row in zip(rows_of(run), rows_of(plain.folder), strict=True):
        assert mapped["oracle_class"] == row["oracle_class"]
        assert mapped["oracle_p_label_min"] == pytest.approx(row["oracle_p_label_min"], abs=1e-6)
        [own], [other] = mapped["transfer"], row["transfer"]
        assert own["predicted_class"] == other["predicted_class"]
        assert own["risk"] == pytest.approx(other["risk"], abs=1e-5)
    assert not verify(open_store(str(run))).damage and rescore(open_store(str(run))) == []
    assert len(json.loads((run / "manifest.json").read_text())["job"]["models"]["label_map"]) == 1


def test_a_rescoring_knows_the_map_of_the_run_and_takes_others(
    run: Path, models: dict[str, str], tmp_path: Path
) -> None:
    """Oracles keep theirs; a candidate with other names comes with its own, from a file."""
    path = tmp_path / "maps.yaml"
    path.write_text(yaml.safe_dump({models["oracle"]: digits_map()}))
    maps = read_label_maps(path, "--label-map")
    mapped = rescore_run(str(run), models["oracle"], output=str(tmp_path / "mapped"), label_map=maps)
    plain = rescore_run(str(run), ORACLE, oracles=[models["oracle"]], output=str(tmp_path / "plain"))
    for own, row in zip(rows_of(mapped.folder), rows_of(plain.folder), strict=True):
        assert own["predicted_class"] == row["predicted_class"] == row["oracle_class"]
        assert own["risk"] == pytest.approx(row["risk"], abs=1e-5) and own["kldb_classes"] == row["kldb_classes"]
    path.write_text("[a]")
    with pytest.raises(JobError, match=r"--label-map: .*is not a mapping of addresses"):
        read_label_maps(path, "--label-map")


def test_a_map_is_part_of_the_plan_and_none_leaves_the_plan_as_it_was(models: dict[str, str], tmp_path: Path) -> None:
    """Digests of jobs without one stay; another map is another plan; the order alone is named by `plan`."""

    def identity(**chosen: Any) -> dict[str, Any]:
        return check_job(parse_job(raw_job(tmp_path / "run", **chosen)), Recorder(), lambda: None).plan.identity

    assert "label_maps" not in identity(oracle=ORACLE)["models"]
    job = parse_job(raw_job(tmp_path / "run", oracle=ORACLE))
    assert "label_map" not in job.model_dump(mode="json")["models"]
    first = identity(oracle=models["oracle"], label_map={models["oracle"]: digits_map()})
    swapped = digits_map(twos="one", ones="two")
    second = identity(oracle=models["oracle"], label_map={models["oracle"]: swapped})
    assert first["models"]["label_maps"] == {"models.oracle": REVERSED} != second["models"]["label_maps"]
    assert label_map_lines(parse_job(raw_job(tmp_path, transfer=[models["transfer"]])).models, NAMES) == [
        f"{models['transfer']}: its 10 classes are matched with the target's by name"
    ]
    stored = parse_job(parse_job(raw_job(tmp_path, oracle=ORACLE, label_map={ORACLE: {3: 3}})).model_dump(mode="json"))
    assert stored.models.label_map == {ORACLE: {"3": "3"}}
