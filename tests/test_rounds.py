"""`riskforge study rounds`: failures found again in each retrained network, what is fixed, forgotten, left; resuming.

Runs are of composed digits (`tests/composed.py`), scored by the real target: what retraining should do is known.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
import yaml

from engine import cli
from engine.data.images import digits
from engine.driver.executors.local import LocalExecutor
from engine.driver.progress import PlainDisplay
from engine.driver.run import run_job
from engine.errors import EXIT_USER, JobError
from engine.job.parsing import parse_job
from engine.models.classifier import Classifier
from engine.models.digests import model_digest
from engine.studies.experiments import program as experiments
from engine.studies.experiments.parsing import Study, parse_study
from engine.studies.experiments.program import StudyResult, run_study
from engine.studies.experiments.registry import STUDIES
from engine.studies.rounds.convergence import FailureCount, decay_rate, half_life
from engine.studies.rounds.design import make_design
from engine.studies.rounds.failures import FoundSample, count_failures, weak_contexts
from engine.studies.rounds.forgetting import measure_forgetting
from engine.studies.rounds.material import is_known, spread
from engine.studies.rounds.spec import RoundsSpec
from engine.studies.samples import open_study
from tests.composed import HOLES, KNOWN, TARGET, ComposedWorker, composed_job
from tests.conftest import REPOSITORY

ARMS = ["none", "accepted:9"]


def write_folders(path: Path, split: str, contexts: list[str], num_scans: int) -> Path:
    """Composed digits in class folders, each scan once in every context."""
    single, sources = digits.single_contexts(), digits.load_sources(split)
    texts = [digits.context_text(single, row) for row in range(len(single))]
    chosen = np.tile([texts.index(context) for context in contexts], num_scans)
    rows = np.repeat(np.arange(num_scans), len(contexts))
    drawn = digits.compose(sources, rows, single.take(chosen), rng=np.random.default_rng(5))
    for number, (pixels, label) in enumerate(zip(drawn.images, drawn.labels, strict=True)):
        folder = path / digits.CLASS_NAMES[label] / texts[chosen[number]]
        folder.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(pixels).save(folder / f"{number}.png")
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("rounds")


@pytest.fixture(scope="module")
def images(home) -> dict[str, str]:
    real = write_folders(home / "real", "train", list(KNOWN), 20)
    return {"real": str(real), "test": str(write_folders(home / "test", "test", [*KNOWN, *HOLES], 12))}


def study_of(home: Path, images: dict[str, str], **changes: object) -> Study[RoundsSpec]:
    job = composed_job(home / "unused", count=1).model_dump(mode="json")
    raw = {"study": "rounds", "name": "small", "job": job, **images, "rounds": 2, "seeds": 2, "arms": ARMS, "steps": 6}
    raw |= {"batch_size": 20, "mix": 0.5, "learning_rate": 1e-3, "corruptions": {"names": ["jpeg"], "images": 9}}
    raw |= {"count": 1, "last_run": False, "output": {"uri": str(home / "study")}}
    return parse_study("rounds", RoundsSpec, raw | changes, lambda path: {}, options=[], sets=[])


def run_composed(study: Study[RoundsSpec]) -> StudyResult:
    """A study whose runs are of composed digits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments, "run_job", functools.partial(run_job, make_worker=ComposedWorker))
        return run_study(
            STUDIES["rounds"],
            study,
            command="riskforge study rounds",
            make_executor=lambda job: LocalExecutor(1),
            display=PlainDisplay(sys.stderr),
        )


@pytest.fixture(scope="module")
def made(home, images) -> StudyResult:
    return run_composed(study_of(home, images))


def step(result: StudyResult, name: str) -> dict:
    return json.loads((result.home / "steps" / f"{name}.json").read_text())["value"]


# The study -----------------------------------------------------------------------------------------------------------


def test_each_arm_finds_its_failures_in_its_own_network_of_the_round_before(made):
    """The one property that rounds exist for; a run with the first target again would look just as well."""
    target = model_digest(TARGET)
    assert open_study(str(made.home / "runs" / "round-1")).target_digest == target
    second = open_study(str(made.home / "runs/accepted-9-round-2"))
    assert second.target_digest == step(made, "trainings/accepted-9/seed-1/round-1")["model"] != target
    assert len({open_study(str(folder)).job.seed for folder in (made.home / "runs").iterdir()}) == 2


def test_networks_of_seeds_go_on_from_their_own_and_only_the_last_stay(made):
    digests = {
        (arm, seed, number): step(made, f"trainings/{arm}/seed-{seed}/round-{number}")["model"]
        for arm in ("none", "accepted-9")
        for seed in (1, 2)
        for number in (1, 2)
    }
    assert len(set(digests.values())) == len(digests)
    folders = sorted(str(path.relative_to(made.home)) for path in made.home.glob("models/accepted-9/*/*"))
    assert folders == ["models/accepted-9/seed-1/round-2", "models/accepted-9/seed-2/round-2"]
    assert model_digest(str(made.home / folders[0])) == digests["accepted-9", 1, 2]
    assert Classifier.load(str(made.home / folders[0])).labels


def test_tables_have_a_row_for_each_arm_and_round_and_contexts_of_each_kind(made):
    table = pq.read_table(made.home / "table.parquet").to_pylist()
    assert [(row["arm"], row["round"]) for row in table] == [
        ("before", 0), *((arm, number) for arm in ARMS for number in (1, 2)),
    ]  # fmt: skip
    counts = {(row["arm"], row["round"]): row["samples"] for row in table}
    assert counts["none", 2] == 0 and counts["accepted:9", 1] == 9 < counts["accepted:9", 2] <= 18
    assert all(row["weak_low"] <= row["weak"] <= row["weak_high"] for row in table)
    kinds = {row["context"]: row["kind"] for row in pq.read_table(made.home / "contexts.parquet").to_pylist()}
    assert kinds == {"no context": "seen", "red ink": "seen", "small": "seen", "jpeg 3": "corrupted"} | dict.fromkeys(
        HOLES, "weak"
    )


def test_true_failures_of_weak_contexts_repair_them(made):
    rows = {(row["arm"], row["round"]): row for row in pq.read_table(made.home / "table.parquet").to_pylist()}
    assert rows["accepted:9", 2]["weak"] > rows["none", 2]["weak"] + 15
    # The run after the last training is left out here.
    assert rows["accepted:9", 1]["failures"] > 0 and rows["accepted:9", 2]["failures"] is None
    assert any(finding.startswith("Weak contexts: small, bottom") for finding in made.document.findings)
    assert any("goals" in finding and "accepted" in finding for finding in made.document.findings)


@pytest.mark.slow
def test_kept_steps_give_equal_tables_and_a_lost_one_is_made_again(made, home, images):
    """As after an interruption: figures, a training and its network are gone."""
    copy = Path(shutil.copytree(made.home, home / "copy"))
    (copy / "table.csv").unlink()
    (copy / "steps/trainings/none/seed-2/round-2.json").unlink()
    shutil.rmtree(copy / "models/none/seed-2")
    with pytest.raises(JobError, match=r"models/none/seed-2/round-1.*steps"):
        run_composed(study_of(home, images, output={"uri": str(copy)}))
    (copy / "steps/trainings/none/seed-2/round-1.json").unlink()
    again = run_composed(study_of(home, images, output={"uri": str(copy)}))
    assert (copy / "table.csv").read_bytes() == (made.home / "table.csv").read_bytes()
    assert not again.was_complete and run_composed(study_of(home, images)).was_complete


@pytest.mark.slow
def test_more_rounds_and_a_larger_count_continue_a_study(made, home, images):
    """Later rounds keep what there is; more samples change every training, and the runs that they were targets of."""
    copy = Path(shutil.copytree(made.home, home / "grown"))
    kept = (copy / "steps/trainings/accepted-9/seed-1/round-2.json").read_bytes()
    grown = run_composed(study_of(home, images, output={"uri": str(copy)}, rounds=3))
    third = open_study(str(copy / "runs/accepted-9-round-3"))
    assert third.target_digest == step(grown, "trainings/accepted-9/seed-1/round-2")["model"]
    assert (copy / "steps/trainings/accepted-9/seed-1/round-2.json").read_bytes() == kept
    table = {(row["arm"], row["round"]): row for row in pq.read_table(copy / "table.parquet").to_pylist()}
    assert len(table) == 1 + 3 * len(ARMS)
    assert table["accepted:9", 2]["failures"] < table["before", 0]["failures"]
    larger = run_composed(study_of(home, images, output={"uri": str(copy)}, rounds=3, count=2))
    assert open_study(str(copy / "runs/round-1")).target_digest == model_digest(TARGET)
    trained = step(larger, "trainings/accepted-9/seed-1/round-1")["model"]
    assert open_study(str(copy / "runs/accepted-9-round-2")).target_digest == trained
    attempts = [
        max(
            row["attempts"]
            for row in pq.read_table(result.home / "failures.parquet").to_pylist()
            if row["request"] == "all"
        )
        for result in (made, larger)
    ]
    assert attempts[1] == 2 * attempts[0] and grown.home == larger.home


@pytest.mark.slow
def test_a_killed_study_goes_on_in_its_round_and_ends_in_the_same_table(made, home, images):
    """A process of its own, killed in round 2; what it has finished is not made again."""
    output = {"uri": str(home / "killed")}
    program = (
        "from pathlib import Path; from tests.test_rounds import run_composed, study_of;"
        f"run_composed(study_of(Path({str(home)!r}), {images!r}, output={output!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    wanted = home / "killed/steps/trainings/none/seed-1/round-2.json"
    deadline = time.monotonic() + 600
    while not wanted.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (home / "killed/table.csv").exists()
    finished = wanted.stat().st_mtime_ns
    run_composed(study_of(home, images, output=output))
    assert wanted.stat().st_mtime_ns == finished
    for name in ("table.csv", "contexts.csv", "forgetting.csv", "failures.csv"):
        assert (home / "killed" / name).read_bytes() == (made.home / name).read_bytes()


# What is refused, and what would be made -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ["acepted"]}, r"arms: there is no arm 'acepted'; did you mean 'accepted'"),
        ({"arms": ["random", "unfiltered"]}, r"arms: 'unfiltered' is there twice"),
        ({"arms": ["none:5"]}, r"none has none"),
        ({"risky": ["eror"]}, r"risky: the job has no request 'eror'; did you mean 'errors'"),
        ({"risky": ["baseline"]}, r"risky: request 'baseline' has no `accept` rule"),
        ({"protect": "distil"}, r"protect: 'distil' is none of none, distill"),
        ({"protect_weight": 2.0}, r"protect_weight: 2 has no meaning without protect"),
        ({"mix": 0.01}, r"mix: 0.01 of a batch of 20 leaves 0"),
        ({"corruptions": {"names": ["jpg"]}}, r"corruptions.names: there is no corruption 'jpg'; did you mean 'jpeg'"),
        ({"test": "/nowhere"}, r"test: there is no '/nowhere'"),
    ],
)  # fmt: skip
def test_wrong_fields_are_refused_by_name_before_a_worker_starts(home, images, changes, message):
    study = study_of(home, images, **changes)
    with pytest.raises(JobError, match=message):
        experiments.check_study(STUDIES["rounds"], study)


def test_a_job_without_a_rule_or_with_a_target_that_cannot_be_trained_is_refused(home, images):
    job = composed_job(home / "unused", count=1).model_dump(mode="json")
    without = job | {"requests": [one | {"accept": {}, "max_attempts": None} for one in job["requests"]]}
    with pytest.raises(JobError, match="no request of the job has an `accept` rule"):
        experiments.check_study(STUDIES["rounds"], study_of(home, images, job=without))
    # Real images alone need no samples, and no run.
    spec = study_of(home, images, arms=["none", "augment"], job=without).spec
    assert make_design(spec, parse_job(without)).num_runs == 0


def test_contexts_that_no_test_image_has_are_refused(home, images):
    study = study_of(home, images, weak=["tiny"], output={"uri": str(home / "refused")})
    with pytest.raises(JobError, match="weak: no image of test has the context 'tiny'"):
        run_composed(study)
    assert not (home / "refused" / "runs").exists()


def test_validate_says_how_many_runs_and_trainings_there_will_be(home, images, capsys, monkeypatch):
    job = home / "job.yaml"
    job.write_text(yaml.safe_dump(composed_job(home / "unused", count=2).model_dump(mode="json")))
    options = [
        "--real",
        images["real"],
        "--test",
        images["test"],
        "--rounds",
        "3",
        "--arm",
        "none",
        "--arm",
        "random:4",
    ]
    monkeypatch.setattr(sys, "argv", ["riskforge", "study", "rounds", str(job), *options, "--validate"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    said = capsys.readouterr().out
    assert "3 rounds of the arms none, unfiltered:4 with 5 seeds: 4 runs and 30 trainings, 400 samples at most" in said
    monkeypatch.setattr(sys, "argv", ["riskforge", "study", "rounds", str(job), *options[2:], "--validate"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == EXIT_USER and "real: missing" in capsys.readouterr().err


def test_jobs_of_rounds_keep_the_first_seed_and_drop_a_calibration_of_the_first_target(home, images):
    study = study_of(home, images, arms=["none", "plain", "accepted"], count=3)
    design = make_design(study.spec, study.job)
    plain, accepted = design.sampled
    first, second = design.job_of(1, None, TARGET), design.job_of(2, accepted, "folder")
    assert [request.name for request in first.requests] == ["baseline", "errors"]
    assert [request.name for request in design.job_of(2, plain, "folder").requests] == ["baseline"]
    assert [request.name for request in second.requests] == ["errors"]
    assert first.seed == study.job.seed != second.seed and second.models.target == "folder"
    assert {request.count for request in first.requests} == {3} and first.output.store_rejected


# Measures on data of which the truth is known ------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "start"), [(0.7, 0.1), (0.7, 0.5), (1.5, 0.3), (0.0, 0.1)])
def test_the_interval_of_the_decay_covers_the_true_rate(rate, start):
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        counts = [FailureCount(int(rng.binomial(150, start * math.exp(-rate * number))), 150) for number in range(4)]
        found = decay_rate(counts)
        assert found is not None and found.low <= found.value <= found.high
        covered += found.low <= rate <= found.high
    # Binomial counts vary less than Poisson ones, so that intervals are a little wide for large shares.
    assert 0.92 <= covered / 200 <= 1


def test_decay_by_hand_and_at_its_limits():
    exact = decay_rate([FailureCount(80, 1000), FailureCount(40, 1000), FailureCount(20, 1000)])
    assert exact is not None and exact.value == pytest.approx(math.log(2), abs=1e-6)
    assert half_life(exact).startswith("failures halve every 1.0 rounds")
    gone = decay_rate([FailureCount(20, 100), FailureCount(0, 100)])
    assert gone is not None and gone.value == math.inf and gone.low > 1
    assert decay_rate([FailureCount(0, 100), FailureCount(0, 100)]) is None
    assert decay_rate([FailureCount(5, 100)]) is None
    more = decay_rate([FailureCount(5, 100), FailureCount(30, 100)])
    assert more is not None and half_life(more) == "failures become more"


def test_forgetting_is_the_best_earlier_accuracy_less_the_last():
    """Two contexts, three rounds; by hand: 1.0 - 0.5 in the first, 0.75 - 1.0 in the second."""
    rows = {"a": np.arange(4), "b": np.arange(4, 8)}
    accuracies = [[2, 2], [4, 3], [2, 4]]
    right = np.array([[np.r_[np.arange(4) < a, np.arange(4) < b] for a, b in accuracies]] * 2)
    found = measure_forgetting(right, rows, [str(number) for number in range(8)])
    assert found.contexts["a"].value == 0.5 and found.contexts["b"].value == -0.25
    assert found.mean.value == 0.125 and (found.worst.value, found.worst_context) == (0.5, "a")
    assert found.worst.low <= 0.5 <= found.worst.high


def test_the_interval_of_forgetting_covers_the_true_one_over_seeds_and_images():
    """Images and seeds vary; the best round is far from the others, so that the truth is clear."""
    rng, covered, trials = np.random.default_rng(2), 0, 60
    for _ in range(trials):
        image, seed = rng.normal(0, 0.5, (1, 1, 150)), rng.normal(0, 0.1, (8, 1, 1))
        level = np.array([0.0, 2.0, 0.8])[None, :, None]
        right = rng.random((8, 3, 150)) < 1 / (1 + np.exp(-(level + image + seed)))
        found = measure_forgetting(right, {"a": np.arange(150)}, list(map(str, range(150))), resamples=200)
        # The expected accuracies, by a large sample of the same distribution.
        covered += found.mean.low <= _expected(2.0) - _expected(0.8) <= found.mean.high
    assert covered / trials >= 0.88


@functools.cache
def _expected(level: float) -> float:
    spread_of = np.random.default_rng(3).normal(0, math.hypot(0.5, 0.1), 400_000)
    return float((1 / (1 + np.exp(-(level + spread_of)))).mean())


def test_weak_contexts_are_those_with_more_valid_failures_than_the_others():
    def samples(context: str, failures: int) -> list[FoundSample]:
        return [FoundSample("r", context, number < failures, number < failures) for number in range(40)]

    found = [*samples("", 1), *samples("dark", 16), *samples("blurred", 20), *samples("bright", 1)]
    assert weak_contexts(found) == ["blurred", "dark"]
    assert weak_contexts(samples("", 20)) == [] == weak_contexts([])
    counts = count_failures(found)
    assert (counts[0].request, counts[0].attempts, counts[0].valid_failures) == ("all", 160, 38)
    # Of no effect, hardly ever one is found.
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(100):
        flags = rng.random(320) < 0.1
        same = [FoundSample("r", str(number % 8), bool(flag), False) for number, flag in enumerate(flags)]
        wrong += bool(weak_contexts(same))
    assert wrong <= 8


@pytest.mark.parametrize(
    ("context", "is_seen"),
    [("", True), ("Red_ink", True), ("red ink, small", True), ("small, bottom left", False),
     ("black ink on a white background", False), ("red ink on a gray background", True)],
)  # fmt: skip
def test_a_context_is_known_where_each_of_its_attributes_is(context, is_seen):
    assert is_known(context, {"red ink", "small", "gray background", "black ink"}) is is_seen


def test_images_are_chosen_evenly():
    assert spread(range(10), 5) == [0, 2, 4, 6, 8] and spread(range(3), None) == [0, 1, 2] == spread(range(3), 9)


@pytest.mark.slow
def test_the_digits_job_of_the_repository_is_valid():
    raw = yaml.safe_load((REPOSITORY / "jobs/rounds-digits.yaml").read_text())
    study = parse_study("rounds", RoundsSpec, raw, lambda path: {}, options=[], sets=[])
    assert "5 runs and 18 trainings, 900 samples" in experiments.check_study(STUDIES["rounds"], study)
