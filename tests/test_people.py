"""What people's answers say of a run: estimates, raters, rules, and where the figures are shown."""

from __future__ import annotations

import io
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rich.measure import Measurement

from engine.commands.people import terminal_table
from engine.data.reading.corpus import open_run
from engine.data.reading.people.population import Population
from engine.data.reading.people.results import PeopleResults, Recommendation
from engine.data.reading.people.review import people_results
from engine.data.reading.people.rules import Reviewed, recommend
from engine.data.reading.people.tables import people_tables
from engine.data.review.agreements import choices, human_agreement
from engine.data.review.answers import append_answers
from engine.data.run.counts import is_joint
from engine.data.stores.opening import open_store
from engine.errors import JobError
from engine.studies.rescore.program import rescore_run
from engine.studies.review.design import Item
from tests.composed import composed_job
from tests.composed import make_run as make_composed
from tests.corpus_cases import make_run
from tests.review_answers import answer, drawn, make_answer

ORACLES = ("zoo:first", "zoo:second")
# Of samples by key: what the image shows, which oracles and raters see with errors.
VALID_SHARE = 0.7
REQUESTS = [
    {"name": "between", "method": "boundary", "boundary": ["one", "two"], "count": 150},
    {"name": "hard", "method": "risky", "classes": "all", "count": 40},
    {"name": "plain", "method": "prompt", "classes": "all", "count": 10},
]


def _is_valid(key: str) -> bool:
    return random.Random(f"shown {key}").random() < VALID_SHARE


def _truth(item: Item) -> int:
    """A sample shows its class, or in three tenths of them nothing; controls show what they are."""
    shows = item.subset[0] if item.subset else item.label
    return shows if item.kind == "control-real" or _is_valid(item.key) else -1


def _scored(record: dict[str, Any]) -> dict[str, Any]:
    """A record with two oracles that err on one sample in twenty."""
    draw, entries = random.Random(f"oracles {record['key']}"), []
    asked = record["class_index"]
    other = 0 if is_joint(record["key"]) else (asked + 1) % 3
    for model in ORACLES:
        agrees = _is_valid(record["key"]) != (draw.random() < 0.05)
        entries.append({
            "model": model, "predicted_class": asked if agrees else other,
            "p_label": 0.9 + 0.1 * draw.random() if agrees else 0.5 * draw.random(),
        })  # fmt: skip
    least = min(entry["p_label"] for entry in entries)
    later = {"oracles": entries, "oracle_p_label_min": least} if record["schema_version"] >= 5 else {}
    return record | {"oracle_class": entries[0]["predicted_class"]} | later


def _without_oracle(record: dict[str, Any]) -> dict[str, Any]:
    return record | {"oracle_class": -1}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody has looked at."""
    return make_run(tmp_path_factory.mktemp("people") / "run", requests=REQUESTS, change=_scored)


@pytest.fixture
def fresh(run: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(run, tmp_path / "run"))


@pytest.fixture(scope="module")
def reviewed(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy with the answers of two careful raters and one who does not look."""
    folder = Path(shutil.copytree(run, tmp_path_factory.mktemp("reviewed") / "run"))
    answer(drawn(folder, num_samples=120, num_repeats=12), {"ann": 0.03, "bob": 0.05, "eve": 0.9}, _truth)
    return folder


@pytest.fixture(scope="module")
def results(reviewed: Path) -> PeopleResults:
    """What they say."""
    return _results(reviewed)


def _results(run: Path | str, **options: Any) -> PeopleResults:
    found = people_results(open_run(str(run)), **options)
    assert found is not None
    return found


def _said_in(run: Path, raters: dict[str, float]) -> float:
    """The share of valid labels among the accepted samples, as raters with these errors say it."""
    keys = open_run(str(run)).samples.to_table(["key"])["key"].to_pylist()
    valid = float(np.mean([_is_valid(key) for key in keys]))
    # A rater who errs says each of the other answers alike, of which one is the label where the image shows nothing.
    return float(np.mean([valid * (1 - error) + (1 - valid) * error / 3 for error in raters.values()]))


# Estimates ---------------------------------------------------------------------------------------------------------


def test_estimates_have_what_people_would_find(fresh: Path) -> None:
    """Two raters look at a third of the images: both intervals have the share of all, and machines narrow them."""
    raters = {"ann": 0.03, "bob": 0.05}
    answer(drawn(fresh, num_samples=60), raters, _truth)
    whole, truth = _results(fresh).whole, _said_in(fresh, raters)
    corrected, human = whole.valid.corrected, whole.valid.human
    assert corrected.low < truth < corrected.high and human.low < truth < human.high
    assert corrected.high - corrected.low < human.high - human.low
    assert 0.55 < whole.valid.machine < 0.7, "both oracles are right on 0.9"


def test_groups_and_strata_add_up(results: PeopleResults) -> None:
    """Requests and classes divide the population, the strata are those of the design, and failures are valid labels."""
    for level in ("request", "class"):
        groups = [group for group in results.groups if group.level == level]
        assert sum(group.num_images for group in groups) == results.num_images == results.whole.num_images
        assert sum(group.num_reviewed for group in groups) == results.num_reviewed == 120
    assert sum(stratum.num_images for stratum in results.strata) == results.num_images
    assert sum(stratum.num_reviewed for stratum in results.strata) == results.num_drawn == 120
    for group in results.groups:
        assert group.failures.corrected.value <= group.valid.corrected.value + 1e-9
        assert group.failures.machine <= group.valid.machine


def test_some_answers_are_enough(fresh: Path) -> None:
    """A rater who stopped half way: strata without an answer are named, and count as the others do."""
    review = drawn(fresh, num_samples=100)
    shown = [item for item in review.design.items if item.kind == "sample"]
    left_out = {item.stratum for item in shown[:20]}
    some = [item.key for item in shown if item.stratum not in left_out]
    answer(review, {"ann": 0.03}, _truth, only=some)
    found = _results(fresh)
    assert 0 < found.num_reviewed == len(some) and found.num_drawn == 100
    assert found.whole.valid.corrected is not None
    assert sum(not stratum.num_reviewed for stratum in found.strata) == len(left_out)
    assert f"{len(left_out)} strata have no answer yet, and count as the others do on average" in found.notes


def test_population_of_a_design_is_what_it_was_drawn_from(fresh: Path) -> None:
    """With a condition, one request and rejected samples: the machine's share is over these alone."""
    condition = "risk > 2 and not is_error"
    review = drawn(fresh, num_samples=40, condition=condition, requests=("between",), is_all=True)
    answer(review, {"ann": 0.03}, _truth)
    found = _results(fresh)
    corpus = open_run(str(fresh)).with_images(rejected=True, surplus=True)
    wanted = corpus.filter(condition).filter("scored and request == 'between'")
    assert found.num_images == len(wanted) == sum(stratum.num_images for stratum in found.strata)
    assert found.whole.failures.corrected.value == 0, "the target is right on all of them"
    agree = np.mean(
        [all(e["p_label"] >= 0.9 for e in row) for row in wanted.to_table(["oracles"])["oracles"].to_pylist()]
    )
    # An oracle may predict the other class of the joint prompt, which agrees as well.
    assert found.whole.valid.machine >= agree


def test_a_run_that_went_on_is_estimated_by_people_alone(tmp_path: Path) -> None:
    """The strata are of the samples that were there: the machine's share of all is not theirs."""
    folder = make_run(tmp_path / "run", count=100, change=_scored)
    answer(drawn(folder, num_samples=30), {"ann": 0.03}, _truth)
    assert _results(folder).whole.valid.corrected is not None
    make_run(folder, count=200, change=_scored)
    found = _results(folder)
    assert found.whole.valid.corrected is None and found.whole.valid.human is not None
    assert any("the population has changed" in note for note in found.notes)


def test_a_lost_design_leaves_estimates_by_weights(reviewed: Path, results: PeopleResults, tmp_path: Path) -> None:
    """Each answer says for how many images it stands."""
    folder = Path(shutil.copytree(reviewed, tmp_path / "run"))
    shutil.rmtree(folder / "_review" / "designs")
    found = _results(folder)
    assert found.whole.valid.human.value == pytest.approx(results.whole.valid.human.value)
    assert any("is not stored with the run" in note for note in found.notes)


def test_answers_to_another_run_are_refused(reviewed: Path, tmp_path: Path) -> None:
    """Copied to a run without these keys they say nothing of it."""
    other = make_run(tmp_path / "other", name="other", count=20, change=_scored)
    shutil.copytree(reviewed / "_review", other / "_review")
    with pytest.raises(JobError, match=r"_review: its answers are to none of the run's images"):
        _results(other)


def test_estimates_are_of_one_design(fresh: Path) -> None:
    """That with the most images; the others are in `human_agreement` and named."""
    answer(drawn(fresh, num_samples=20), {"ann": 0.0}, _truth)
    answer(drawn(fresh, num_samples=50, seed=1), {"ann": 0.0}, _truth, minute=1)
    found = _results(fresh)
    assert found.num_reviewed == 50
    assert "20 answers to 1 other designs are in human_agreement, and not in these estimates" in found.notes


# Raters ------------------------------------------------------------------------------------------------------------


def test_a_rater_who_does_not_look_is_named(results: PeopleResults) -> None:
    """By the repetitions; the answers stay in every figure, so that agreement shows them too."""
    by_name = {rater.name: rater for rater in results.raters}
    assert [name for name, rater in by_name.items() if rater.is_inattentive] == ["eve"]
    assert by_name["ann"].repeats.total == 12 and by_name["ann"].repeats.share > 0.8
    assert any(note.startswith("eve fails the attention checks") for note in results.notes)
    assert results.agreement.num_answers == 3 * 120 and results.agreement.alpha < 0.5


def test_controls_are_no_samples(fresh: Path) -> None:
    """Prompt-only samples measure raters, and are in no estimate of what is reviewed."""
    review = drawn(fresh, num_samples=60, num_controls=20, requests=("between",))
    answer(review, {"ann": 0.0}, _truth)
    found = _results(fresh)
    (rater,) = found.raters
    plain = [item for item in review.design.items if item.kind == "control-plain"]
    assert plain and rater.plain.total == len(plain)
    assert rater.plain.num_right == sum(_is_valid(item.key) for item in plain)
    assert found.requests == ("between",)


def test_agreement_of_a_key_is_that_of_its_raters(fresh: Path) -> None:
    """Last answers count, retracted ones do not, a repetition is none, and "cannot tell" does not agree."""
    review = drawn(fresh, num_samples=30, num_controls=0, num_repeats=30)
    samples = [item for item in review.design.items if item.kind == "sample"]
    answer(review, {"ann": 0.0, "bob": 0.0}, lambda item: item.label if item.kind == "sample" else -1)
    later = [(samples[0], "ann", False), (samples[1], "bob", True)]
    for item, rater, is_retracted in later:
        record = make_answer(review.design, item, rater, -1, minute=1)
        append_answers(review.store, rater, [{**record, "retracted": is_retracted}])
    shares = human_agreement(choices(open_store(str(fresh))))
    assert shares == {item.key: 1.0 for item in samples} | {samples[0].key: 0.5}


# Rules -------------------------------------------------------------------------------------------------------------


def test_rules_are_those_of_the_oracles(results: PeopleResults) -> None:
    """Each oracle, all of them, thresholds; stricter rules keep less, and precision and recall are by people."""
    rules = {rule.name: rule for rule in results.rules}
    assert set(rules) == {
        *(f"{model} agrees" for model in ORACLES), "all oracles agree", "label_is_valid",
        *(f"oracle_p_label_min >= {bound}" for bound in ("0.9", "0.99", "0.999")),
    }  # fmt: skip
    kept = [rules[f"oracle_p_label_min >= {bound}"].kept for bound in ("0.9", "0.99", "0.999")]
    assert kept == sorted(kept, reverse=True) and rules["label_is_valid"].kept == kept[1]
    assert results.machine == "all oracles agree"


def test_rules_by_careful_raters(fresh: Path) -> None:
    """All images looked at without error: precision, recall and wrong ones passed are counts, written out."""
    answer(drawn(fresh, num_samples=2000, requests=("between",)), {"ann": 0.0}, _truth)
    found = _results(fresh)
    rows = open_run(str(fresh)).filter("request == 'between'").samples.to_table(["key", "oracle_agrees", "target_errs"])
    agrees, errs = (np.array(rows[name].to_pylist()) for name in ("oracle_agrees", "target_errs"))
    valid = np.array([_is_valid(key) for key in rows["key"].to_pylist()])
    rule = next(rule for rule in found.rules if rule.name == "zoo:first agrees")
    assert rule.kept == pytest.approx(agrees.mean())
    assert rule.precision.value == pytest.approx(valid[agrees].mean())
    assert rule.recall.value == pytest.approx(agrees[valid].mean())
    assert next(one for one in found.rules if one.name == "all oracles agree").precision.value > rule.precision.value
    assert rule.wrong_passed.value == pytest.approx(agrees[~valid & errs].mean())
    assert found.whole.failures.corrected.value == pytest.approx((valid & errs).mean())


def test_recommended_threshold_reaches_its_goal(fresh: Path) -> None:
    """The least one from which on all do; a goal that none reaches names the nearest."""
    answer(drawn(fresh, num_samples=2000), {"ann": 0.0}, _truth)
    easy = _results(fresh, goal=0.8).recommendation
    assert (easy.score, easy.threshold) == ("oracle_p_label_min", 0.5), "where an oracle disagrees it has less"
    assert easy.rule.precision.low >= 0.8 and easy.rule.kept > 0.5
    hard = _results(fresh, goal=0.999).recommendation
    assert hard.threshold is None and hard.rule.precision.low < 0.999


def _recommended(holes: tuple[float, float], goal: float) -> Recommendation:
    """The threshold where people agree with the score from 0.72 on, but not between the holes, of 4000 images."""
    scores = np.linspace(0, 1, 4000)
    human = (scores > 0.72) & ~((scores > holes[0]) & (scores < holes[1]))
    population = Population(
        place={}, request=np.full(4000, "a"), prefix=np.full(4000, "a/000"), class_name=np.full(4000, "zero"),
        target_errs=np.zeros(4000, bool), rules={}, scores={"p_valid": scores}, machine=scores, machine_name="p_valid",
    )  # fmt: skip
    reviewed = Reviewed(rows=np.arange(4000), human=human.astype(float), weights=np.ones(4000))
    return recommend(population, reviewed, goal)


def test_recommended_threshold_is_one_from_which_on_all_reach_the_goal() -> None:
    """0.28 / 0.3 at 0.7 and 0.28 / 0.4 at 0.6; what is wrong among the surest images is no exception to be skipped."""
    assert _recommended((2, 2), 0.9).threshold == 0.7
    assert _recommended((2, 2), 0.95).threshold == 0.8
    assert _recommended((0.95, 1.1), 0.9).threshold is None
    # 0.23 / 0.3 at 0.7 is more than 0.15 / 0.2 at 0.8, where the surest images are wrong.
    assert _recommended((0.95, 1.1), 0.9).rule.name == "p_valid >= 0.7"
    assert _recommended((0.99, 1.1), 0.9).threshold is None


@pytest.mark.parametrize("version", [1, 4])
def test_old_runs_have_one_oracle(tmp_path: Path, version: int) -> None:
    """By `oracle_class`: no probabilities, thus no threshold."""
    folder = make_run(tmp_path / "run", version=version, count=100, change=_scored)
    answer(drawn(folder, num_samples=40), {"ann": 0.03}, _truth)
    found = _results(folder)
    assert [rule.name for rule in found.rules] == ["oracle agrees"] and found.machine == "oracle agrees"
    assert found.recommendation is None and found.whole.valid.corrected is not None
    assert [score.name for score in found.scores] == ["conformity_margin"]


def test_a_run_without_oracle_has_people_alone(tmp_path: Path) -> None:
    """There is nothing to correct, and no rule."""
    folder = make_run(tmp_path / "run", version=4, count=100, change=_without_oracle)
    answer(drawn(folder, num_samples=40), {"ann": 0.03}, _truth)
    found = _results(folder)
    assert found.machine == "" and not found.rules and found.recommendation is None
    assert found.whole.valid.human is not None and found.whole.valid.corrected is None


# Where it is shown -------------------------------------------------------------------------------------------------


def test_tables_fit_a_terminal(results: PeopleResults) -> None:
    """Valid failures are a table of their own where they are no valid labels' equals; no group takes two lines."""
    titles = ["Valid labels", "Valid failures"]
    same = replace(results, groups=tuple(replace(group, failures=group.valid) for group in results.groups))
    for found, wanted in ((results, titles), (same, ["Valid labels, which are all valid failures"])):
        tables = [table for table in people_tables(found) if table.title.startswith("Valid")]
        assert [table.title for table in tables] == wanted
        for table in tables:
            console = Console(width=100, file=io.StringIO())
            assert Measurement.get(console, console.options.update(width=300), terminal_table(table)).maximum <= 100
            assert len(table.lines) == len(found.groups)


def test_command_prints_results(reviewed: Path, run: Path, call: Any) -> None:
    """As lines and tables, and all of it as JSON; nothing where nobody answered."""
    code, out, err = call("review", reviewed, "--results")
    assert (code, err) == (0, "")
    assert "looked at: 120 of" in out and "eve, fails the attention checks" in out and "Krippendorff's alpha" in out
    code, out, _ = call("review", reviewed, "--results", "--json", "--goal", "0.8")
    document = json.loads(out)
    assert document["recommendation"]["goal"] == 0.8 and document["groups"][0]["valid"]["corrected"]["low"] > 0
    assert [rater["is_inattentive"] for rater in document["raters"]] == [False, False, True]
    code, out, _ = call("review", run, "--results")
    assert code == 0 and out.startswith("nobody has said yet")


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--goal", "0.9"], "--goal: 0.9"), (["--results", "--goal", "1"], "--goal: 1"),
     (["--results", "--html", "x.html"], "each is a command of its own")],
)  # fmt: skip
def test_options_that_exclude_each_other(run: Path, call: Any, options: list[str], message: str) -> None:
    """A goal without results means nothing."""
    code, _, err = call("review", run, *options)
    assert code == 2 and message in err and "Traceback" not in err


def test_report_and_card_show_people(reviewed: Path, tmp_path: Path, call: Any) -> None:
    """After `riskforge report`; in the card the section alone is replaced, and what a user wrote stays."""
    folder = Path(shutil.copytree(reviewed, tmp_path / "run"))
    card = folder / "README.md"
    before = card.read_text()
    card.write_text(before.replace("license_name: unknown", "license_name: mine"))
    assert call("report", folder)[0] == 0
    page, written = (folder / "report.html").read_text(), card.read_text()
    assert '<section id="people">' in page and "eve, fails the attention checks" in page
    assert written.count("## What people say") == 1 and "license_name: mine" in written
    assert written.index("## Scores") < written.index("## What people say") < written.index("## Loading")
    assert call("report", folder)[0] == 0
    assert card.read_text() == written
    shutil.rmtree(folder / "_review")
    assert call("report", folder)[0] == 0
    assert card.read_text() == before.replace("license_name: unknown", "license_name: mine")
    assert '<section id="people">' not in (folder / "report.html").read_text()


def test_texts_of_users_are_escaped(fresh: Path, call: Any) -> None:
    """The condition of the design is in page and card."""
    condition = 'class_name != "<b>|`x`"'
    answer(drawn(fresh, num_samples=20, condition=condition), {"ann": 0.0}, _truth)
    assert call("report", fresh)[0] == 0
    assert "<b>|" not in (fresh / "report.html").read_text()
    line = next(line for line in (fresh / "README.md").read_text().splitlines() if line.startswith("| Looked at"))
    assert line.count("|") - line.count("\\|") == 3


def test_damaged_answers_leave_a_report(reviewed: Path, tmp_path: Path, call: Any) -> None:
    """With a line about the file; the card keeps what it had where nothing can be read."""
    folder = Path(shutil.copytree(reviewed, tmp_path / "run"))
    for part in folder.glob("_review/ann/*.parquet"):
        part.write_bytes(b"PAR1 nothing PAR1")
    assert call("report", folder)[0] == 0
    page = (folder / "report.html").read_text()
    assert "its answers are left out" in page and "eve" in page


def test_comparison_shows_people(run: Path, reviewed: Path, fresh: Path, call: Any, tmp_path: Path) -> None:
    """Beside the machine's shares, of either run or both."""
    answer(drawn(fresh, num_samples=60), {"ann": 0.0}, lambda item: -1)
    _, out, _ = call("compare", reviewed, fresh, "--json")
    (shares,) = [one for one in json.loads(out)["people"] if (one["request"], one["metric"]) == ("between", "valid")]
    assert shares["old"]["corrected"]["value"] > 0.3 and shares["new"]["corrected"]["value"] < 0.1
    assert shares["change"]["high"] < 0
    page = tmp_path / "page.md"
    code, out, _ = call("compare", run, reviewed, "--markdown", page)
    assert code == 0 and "people: between: valid labels: old not looked at; new" in out
    assert "## What people say" in page.read_text()


# By key, when read -------------------------------------------------------------------------------------------------


def test_filters_and_tables_know_what_people_say(reviewed: Path, call: Any) -> None:
    """Joined by key, unknown where nobody answered: neither a condition nor its negation selects such a row."""
    shares = human_agreement(choices(open_store(str(reviewed))))
    corpus = open_run(str(reviewed))
    rows = corpus.to_table(["key", "human_agreement"])
    found = dict(zip(rows["key"].to_pylist(), rows["human_agreement"].to_pylist(), strict=True))
    assert {key: share for key, share in found.items() if share is not None} == shares
    assert len(corpus.filter("human_agreement >= 0.6")) == sum(share >= 0.6 for share in shares.values()) > 0
    assert len(corpus.filter("not human_agreement >= 0.6")) == sum(share < 0.6 for share in shares.values()) > 0
    either = corpus.filter("human_agreement >= 0.6 or risk > 1 or not risk > 1")
    assert len(either) == len(corpus.filter("scored")), "an unknown part decides nothing"
    doubled = corpus.filter("human_agreement >= 0").numbers("2 * human_agreement", "weights")(0)
    assert sorted(doubled) == pytest.approx(sorted(2 * share for share in shares.values()))
    code, out, _ = call("inspect", reviewed, "--filter", "human_agreement >= 0.6", "--json")
    assert code == 0 and json.loads(out)


def test_a_run_without_answers_has_none(run: Path) -> None:
    """The name is there all the same."""
    corpus = open_run(str(run))
    assert set(corpus.to_table(["human_agreement"])["human_agreement"].to_pylist()) == {None}
    assert len(corpus.filter("human_agreement >= 0")) == len(corpus.filter("not human_agreement >= 0")) == 0


def test_export_takes_what_people_agree_with(reviewed: Path, tmp_path: Path, call: Any) -> None:
    """Its images are those that all raters name."""
    code, _, err = call("export", reviewed, "--output", tmp_path / "out", "--filter", "human_agreement == 1")
    assert code == 0, err
    shares = human_agreement(choices(open_store(str(reviewed))))
    table = open_run(str(tmp_path / "out")).to_table(["key"])
    assert set(table["key"].to_pylist()) == {key for key, share in shares.items() if share == 1}


def test_keys_of_two_runs_are_not_mixed(reviewed: Path, run: Path, tmp_path: Path) -> None:
    """Two copies with other answers; without the name they are read together as before."""
    corpus = open_run(str(reviewed), str(run))
    assert len(corpus.filter("risk >= 0")) == 2 * len(open_run(str(run)).filter("risk >= 0"))
    with pytest.raises(JobError, match="same keys and different answers"):
        corpus.filter("human_agreement >= 0.5")
    other = make_run(tmp_path / "other", name="other", count=20)
    shares = human_agreement(choices(open_store(str(reviewed))))
    assert len(open_run(str(reviewed), str(other)).filter("human_agreement >= 0")) == len(shares)


# Real models --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits that show what was asked for, scored by the zoo's target and two oracles, and reviewed."""
    output = tmp_path_factory.mktemp("composed") / "run"
    models = composed_job(output, count=2).model_dump(mode="json")["models"] | {"oracle": None}
    models["oracles"] = ["zoo:digits/oracle", "zoo:digits/classifier-b"]
    folder = make_composed(composed_job(output, count=2, models=models))
    answer(drawn(folder, num_samples=60, num_repeats=10), {"ann": 0.02, "bob": 0.02})
    return folder


@pytest.mark.slow
def test_results_of_real_models(composed: Path, call: Any) -> None:
    """People say nearly every label, so that all rules are precise, and what they lack is recall."""
    found = _results(composed)
    whole = found.whole
    assert whole.valid.corrected.low > 0.85 and whole.valid.machine < whole.valid.corrected.value
    assert whole.failures.human.value == pytest.approx(whole.failures.corrected.value, abs=0.1)
    assert all(rule.precision is None or rule.precision.value > 0.9 for rule in found.rules)
    recalls = {rule.name: rule.recall.value for rule in found.rules}
    assert recalls["label_is_valid"] <= recalls["all oracles agree"] <= recalls["zoo:digits/oracle agrees"]
    assert not any(rater.is_inattentive for rater in found.raters)
    assert call("report", composed)[0] == 0 and "## What people say" in (composed / "README.md").read_text()


@pytest.mark.slow
def test_answers_hold_for_another_target(composed: Path, tmp_path: Path, call: Any) -> None:
    """What a rescoring accepts does not matter: images are those that people looked at, and errors are its own."""
    folder = Path(shutil.copytree(composed, tmp_path / "run"))
    before = _results(folder)
    done = rescore_run(str(folder), "zoo:digits/classifier-b", oracles=("zoo:digits/oracle",))
    after = _results(done.folder)
    assert (after.num_images, after.num_reviewed) == (before.num_images, before.num_reviewed)
    assert after.whole.valid.human == before.whole.valid.human
    assert after.whole.valid.corrected is not None
    assert after.whole.failures.human.value != before.whole.failures.human.value
    code, out, _ = call("compare", folder, done.folder, "--json")
    assert code == 0
    changes = {(one["request"], one["metric"]): one["change"] for one in json.loads(out)["people"]}
    assert changes["baseline", "valid"]["value"] == pytest.approx(0, abs=0.1)
    assert changes["errors", "failures"]["high"] < 0, "the run accepted the errors of its own target alone"
