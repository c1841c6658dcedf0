"""Loops: what a job may say, which round is next, mixtures from job to page, and how a folder is continued."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from engine.commands.loops import STOPPED
from engine.data.stores.opening import open_store
from engine.errors import JobError, OutputError
from engine.methods.curation.learning import Standardisation
from engine.methods.curation.preferences import Pairs
from engine.methods.curation.reward_models import LinearReward, fit_reward
from engine.studies.loop.measures import measure
from engine.studies.loop.memory import read_memory, write_memory
from engine.studies.loop.page import write_page
from engine.studies.loop.parsing import parse_loop
from engine.studies.loop.results import (
    LoopFolder,
    document_bytes,
    from_a_model,
    read_document,
    read_rounds,
    recorded_rounds,
)
from engine.studies.loop.rounds import play_round
from engine.studies.loop.samples import RoundSamples
from engine.studies.loop.signal import Memory, SignalOptions, learn_signal
from engine.studies.loop.state import MAX_LOSSES, Lane, Schedule, Status, lanes_of
from tests.conftest import REPOSITORY
from tests.loop_cases import digits_job, mixture_job, write_job


def problems_of(job) -> list[str]:
    with pytest.raises(JobError) as error:
        parse_loop(job, lambda path: {})
    return error.value.problems


def changed(job, place: str, value):
    job = copy.deepcopy(job)
    *parents, last = place.split(".")
    inner = job
    for key in parents:
        inner = inner.setdefault(key, {})
    inner[last] = value
    return job


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("rounds", 0, "rounds: 0 is below 1"),
        ("rounds", 10**9, "rounds: 1000000000 is above 1000"),
        ("seeds", -1, "seeds: -1 is below 1"),
        ("curation.canditates", 4, "curation.canditates: unknown key; did you mean 'candidates'?"),
        ("curation.scale", float("inf"), "curation.scale: inf is"),
        ("curation.reward", "class-indx", "did you mean 'class-index'?"),
        ("curation.reward", "oracle_confidence", "is no reward of a run"),
        ("curation.candidates", 25, "curation.candidates: 25 is above the 24 samples"),
        ("training.lora_rank", 0, "training.lora_rank: 0 is below 1"),
        ("training.learning_rate", "1e-4", "training.learning_rate: '1e-4' is text to YAML, not a number"),
        ("training.real", "digits:train", "training.curated_weight: missing"),
        ("arms", {"a": {"attack": "gradient", "share": 1.2}}, "arms.a.share: 1.2 is above 1"),
        ("arms", {"a": {"attack": "gradeint"}}, "did you mean 'gradient'?"),
        ("arms", {"a": {"defence": "group"}}, "arms.a.defence: group compares raters with their group"),
        ("arms", {"A b": {}}, "'A b' may hold only a-z, 0-9 and inner hyphens"),
        ("arms", {1: {}}, "arms.1: 1 is not text; put the name of an arm in quotes"),
        ("arms", {"": {}}, "arms.: '' may hold only"),
        ("arms", {"a" * 60: {}}, "shorten the arm"),
        ("arms", {"a": {"curated_weight": 2.0}}, "arms.a.curated_weight: there are no real images"),
        ("arms", {}, "arms: {} has fewer entries than 1"),
        ("monitor", None, None),
        ("generator", {}, "generator: give either `mixture`"),
        ("generator.job.name", "x", "generator.job: name: the loop gives each round its own"),
        ("generator.job.models.target", None, "generator.job: models.target"),
        ("study", "evaluate", "study: 'evaluate' is not 'loop'"),
    ],
)
def test_what_is_wrong_with_a_job_is_said_by_field_before_anything_starts(place, value, said):
    job = changed(digits_job(), place, value)
    if said is None:
        parse_loop(job, lambda path: {})
    else:
        assert any(said in line for line in problems_of(job)), problems_of(job)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("training", {"lora_rank": 4}, "training.lora_rank: has no meaning for a mixture"),
        ("training", {"real": "digits:train", "curated_weight": 1.0}, "training.real: has no meaning for a mixture"),
        ("curation.reward", "conformity", "'conformity' is not a reward of a mixture"),
        ("curation.among", "class", "curation.among: a mixture is curated over the whole run"),
        ("curation.learned", None, "arms.gradient.attack: there are no records without a learned reward"),
        ("curation.learned.model", "network", "curation.learned.model"),
        ("arms", {"a": {"defence": "influence"}}, None),
        ("generator.job", {}, "generator: give either"),
    ],
)
def test_a_mixture_takes_only_what_has_a_meaning_for_it(place, value, said):
    job = changed(mixture_job(), place, value)
    if said is None:
        parse_loop(job, lambda path: {})
        job["monitor"] = None
        said = "arms.a.defence: acts from an alarm of the monitor on"
    assert any(said in line for line in problems_of(job)), problems_of(job)


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.builds(list), st.builds(dict),
    st.sampled_from(["class-index", "gradient", "os:abort", "\x1b[31m", 10**400, -1, "1e-4", ["a"], {"a": {}}]).map(
        copy.deepcopy
    ),
)  # fmt: skip


def places_in(value, where=()):
    """All places of a job, those of its parts first."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places_in(inner, (*where, key))
        yield (*where, key)


@given(data=st.data(), is_mixture=st.booleans())
def test_any_value_anywhere_is_taken_or_refused_by_field(data, is_mixture):
    """A job from outside: no exception but the refusal, whose lines begin with the place and hold no control codes."""
    job = mixture_job() if is_mixture else digits_job()
    for _ in range(data.draw(st.integers(1, 3))):
        *parents, last = data.draw(st.sampled_from(list(places_in(job))))
        inner = job
        for key in parents:
            inner = inner[key]
        if data.draw(st.booleans()):
            inner[last] = data.draw(LEAVES)
        elif isinstance(inner, dict):
            inner[data.draw(st.text(max_size=6))] = data.draw(LEAVES)
    try:
        parse_loop(job, lambda path: job)
    except JobError as error:
        assert all(": " in line for line in error.problems)


@given(
    num_rounds=st.integers(1, 4),
    num_lanes=st.integers(1, 4),
    num_slots=st.integers(1, 3),
    fates=st.lists(st.sampled_from(["done", "done", "done", "lost", "stopped"]), max_size=60),
)
def test_rounds_of_a_lane_follow_one_another_whatever_is_lost(num_rounds, num_lanes, num_slots, fates):
    """No lane plays two rounds at once, skips one, or goes on after its alarm; every other lane ends."""
    schedule = Schedule(num_rounds, {lane: {} for lane in lanes_of(["a"], num_lanes)})
    running: dict[Lane, int] = {}
    fates = iter(fates)
    while True:
        for lane, number in schedule.ready()[: num_slots - len(running)]:
            assert lane not in running
            assert sorted(schedule.rounds[lane]) == list(range(number))
            schedule.start(lane)
            running[lane] = number
        if not running:
            break
        lane, number = running.popitem()
        fate = next(fates, "done")
        if fate == "lost" and schedule.losses.get(lane, 0) < MAX_LOSSES:
            assert schedule.lose(lane)
            continue
        is_last, stopped = number == num_rounds, fate == "stopped"
        schedule.finish(lane, {"round": number, "trained": not is_last and not stopped, "stopped": stopped})
    assert not schedule.lanes(Status.OPEN)
    for lane in schedule.lanes(Status.DONE):
        assert sorted(schedule.rounds[lane]) == list(range(num_rounds + 1))
    for lane in schedule.lanes(Status.STOPPED):
        assert schedule.rounds[lane][max(schedule.rounds[lane])]["stopped"]


def test_a_lane_goes_on_from_a_round_whose_model_is_there(tmp_path):
    """Models of older rounds are removed: a round that has to be made again may need rounds before it again."""
    folder, lane = LoopFolder(tmp_path), Lane("a", 0)
    rounds = {number: {"round": number, "trained": number < 2, "stopped": False} for number in range(3)}
    assert from_a_model(folder, lane, rounds, 2) == rounds
    assert from_a_model(folder, lane, rounds, 3) == {}
    (folder.round(lane, 0) / "model").mkdir(parents=True)
    assert from_a_model(folder, lane, rounds, 3) == {0: rounds[0]}
    (folder.round(lane, 1) / "model").mkdir(parents=True)
    assert from_a_model(folder, lane, rounds, 3) == rounds
    stopped = {0: rounds[0], 1: {"round": 1, "trained": False, "stopped": True}}
    (folder.round(lane, 0) / "model").rmdir()
    assert from_a_model(folder, lane, stopped, 3) == stopped


def test_more_rounds_begin_with_the_one_that_was_only_measured():
    rounds = {0: {"round": 0, "trained": True, "stopped": False}, 1: {"round": 1, "trained": False, "stopped": False}}
    lane = Lane("a", 0)
    assert Schedule(1, {lane: rounds}).ready() == []
    assert Schedule(2, {lane: rounds}).ready() == [(lane, 1)]


class Recording:
    """A generator of a few given samples that notes what it is retrained on."""

    num_classes = 2

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(0)
        self.points = torch.randn(60, 3, generator=random, dtype=torch.float64)
        self.retrained: list[torch.Tensor] = []

    def samples(self) -> RoundSamples:
        return RoundSamples(self.points, 16 * self.points[:, 0], (self.points[:, 0] > 0).long())

    def real(self) -> None:
        return None

    def retrain(self, rewards, signal):
        self.retrained.append(rewards)
        return {"selected": 15}


def play(generator, arm: str, on_alarm: str = "stop"):
    job = parse_loop(mixture_job(on_alarm=on_alarm), lambda path: {}).spec
    unit = Memory(Standardisation(torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)))
    return play_round(generator, job, arm, 0, lambda samples: unit, seed=1)


def test_a_stopped_lane_is_not_retrained():
    """Any generator: what an alarm stops is not curated; what goes on is, by the learned reward."""
    stopped, going, clean = Recording(), Recording(), Recording()
    [measures] = play(stopped, "gradient").measures
    assert measures["stopped"] and not measures["trained"] and not stopped.retrained
    [measures] = play(going, "gradient", "continue").measures
    assert measures["monitor"]["alarm"] and measures["trained"] and measures["selected"] == 15
    [measures] = play(clean, "clean").measures
    assert not measures["stopped"] and not measures["monitor"]["alarm"]
    own = clean.points[:, 0]
    assert torch.corrcoef(torch.stack([clean.retrained[0], own]))[0, 1] > 0.9
    assert torch.corrcoef(torch.stack([going.retrained[0], own]))[0, 1] < 0.8


def test_audited_records_do_not_train():
    """The learned reward is the minimum of the loss over exactly the records that train."""
    job = parse_loop(mixture_job(), lambda path: {}).spec
    generator, options = Recording(), SignalOptions.of(job, "clean")
    unit = Memory(Standardisation(torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)))
    signal = learn_signal(generator.points, 3 * generator.points[:, 0], unit, options, seed=1)
    pairs = signal.records.pairs
    assert signal.records.sizes == (160, 40, 60) and len(pairs) == 260
    own = Pairs(pairs.first[:160], pairs.second[:160], pairs.labels[:160])
    again = fit_reward(LinearReward(3), own, options.fit).parameters
    torch.testing.assert_close(signal.parameters, again)
    assert len(signal.records.trusted) == 60 == len(signal.memory.audit.trusted)
    assert (signal.records.first != signal.records.second).all()


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """A folder with a finished loop of mixtures, its job file, and how the command ended."""
    import sys

    from engine import cli

    folder = tmp_path_factory.mktemp("loop")
    path = write_job(folder / "job.yaml", mixture_job(output={"uri": str(folder / "loop")}))
    before = sys.argv
    sys.argv = ["riskforge", "study", "loop", str(path), "--executor", "local"]
    try:
        with pytest.raises(SystemExit) as end:
            cli.main()
    finally:
        sys.argv = before
    return folder, path, end.value.code


def lanes_in(folder: Path) -> dict[tuple[str, int], list[dict]]:
    document = json.loads((folder / "loop.json").read_text())
    return {(lane["arm"], lane["seed"]): lane["rounds"] for lane in document["lanes"]}


def without_seconds(lanes):
    return {lane: [{**measures, "seconds": None} for measures in rounds] for lane, rounds in lanes.items()}


def test_an_alarm_ends_a_loop_with_exit_code_1(played):
    folder, _, code = played
    lanes = lanes_in(folder / "loop")
    assert code == 1
    for seed in (0, 1):
        assert lanes["gradient", seed][-1]["stopped"] and lanes["gradient", seed][-1]["monitor"]["alarm"]
        assert lanes["gradient", seed][-1]["selected"] is None
        clean = lanes["clean", seed]
        assert len(clean) == 3 and not any(measures["stopped"] for measures in clean)
        assert clean[2]["reward"]["value"] > clean[0]["reward"]["value"] + 2
        assert clean[0]["correlation"] > 0 > lanes["gradient", seed][0]["correlation"]
        assert clean[0]["gain_low"] <= clean[0]["gain"] <= clean[0]["gain_high"]
        # A defence answers the alarm.
        defended = lanes["defended", seed]
        assert len(defended) == 3 and defended[1]["monitor"]["alarm"] and not defended[1]["stopped"]
        # All arms begin with equal samples.
        assert clean[0]["shares"] == lanes["gradient", seed][0]["shares"]
    page = (folder / "loop" / "report.html").read_text()
    assert "The monitor stopped 2 loops: gradient, seed 0; gradient, seed 1" in page
    assert "less that of clean" in page and "2 of 2, first in round 0; 2 stopped" in page
    assert "http" not in page.replace("http-equiv", "")


def test_the_same_command_does_nothing_again_and_says_the_alarm_again(played, call):
    folder, path, _ = played
    before = (folder / "loop" / "report.html").stat().st_mtime_ns
    code, stdout, stderr = call("study", "loop", path, "--executor", "local")
    assert code == 1 and "complete already" in stdout and "alarm: the learned reward no longer follows" in stderr
    assert (folder / "loop" / "report.html").stat().st_mtime_ns == before


def test_seeds_and_arms_extend_a_loop_and_continue_takes_up_what_an_alarm_stopped(played, call, tmp_path):
    """Figures of a seed depend on neither the number of seeds nor on what ran before."""
    folder, _, _ = played
    own = tmp_path / "loop"
    arms = {**mixture_job()["arms"], "real": {"curated_weight": 0.5}, "cut": {"steps": 1}}
    write_job(tmp_path / "job.yaml", mixture_job(output={"uri": str(own)}))
    assert call("study", "loop", tmp_path / "job.yaml", "--executor", "local")[0] == 1
    write_job(tmp_path / "job.yaml", mixture_job(output={"uri": str(own)}, seeds=3, arms=arms))
    code, stdout, _ = call(
        "study", "loop", tmp_path / "job.yaml", "--executor", "local", "--on-alarm", "continue", "--json"
    )
    assert code == 0, stdout
    lanes, earlier = lanes_in(own), lanes_in(folder / "loop")
    assert {len(rounds) for rounds in lanes.values()} == {3} and len(lanes) == 15
    for lane, rounds in without_seconds(earlier).items():
        now = without_seconds(lanes)[lane]
        assert all(a | {"stopped": 0, "trained": 0, "selected": 0} == b | {"stopped": 0, "trained": 0, "selected": 0}
                   for a, b in zip(rounds, now, strict=False))  # fmt: skip
    figures = json.loads(stdout)["arms"]
    assert figures["defended"]["reward"][-1]["value"] > figures["gradient"]["reward"][-1]["value"] + 1
    assert lanes["defended", 0][0]["removed"]["tampered"] > 0
    # Real data hold the loop back; an optimisation cut short ends elsewhere.
    assert figures["cut"]["reward"][0] == figures["clean"]["reward"][0]
    assert figures["cut"]["reward"][1] != figures["clean"]["reward"][1]
    assert figures["real"]["reward"][-1]["value"] < figures["clean"]["reward"][-1]["value"] - 0.5
    assert lanes["real", 0][0]["shares"] == lanes["clean", 0][0]["shares"]
    assert lanes["real", 0][0]["selected"] == 20 and lanes["clean", 0][0]["selected"] == 60


def test_another_job_on_the_folder_is_refused_with_the_difference(played, call, tmp_path):
    folder, _, _ = played
    before, arms = (folder / "loop" / "loop.json").read_bytes(), mixture_job()["arms"]
    uri = str(folder / "loop")
    for change, said in (
        (
            {"curation": {"reward": "squared-distance", "scale": 0.5, "learned": {"records": 200}}},
            "curation.scale: 0.25 -> 0.5",
        ),
        ({"rounds": 1}, "rounds: 2 -> 1; more extend a loop"),
        ({"arms": {"clean": {}, "defended": arms["defended"]}}, "arms.gradient: is there, and not in this job"),
        ({"arms": arms | {"clean": {"attack": "random"}}}, 'attack: "none" -> "random"'),
    ):
        path = write_job(tmp_path / "job.yaml", mixture_job(output={"uri": uri}, **change))
        code, _, stderr = call("study", "loop", path, "--executor", "local")
        assert code == 2 and said in stderr, stderr
    assert (folder / "loop" / "loop.json").read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"study": "loop"}', b"\xff" * 40, b'{"a":' * 9000],
    ids=["empty", "torn", "list", "bare", "binary", "deep"],
)
def test_a_torn_or_foreign_document_is_refused_by_name(content, call, tmp_path):
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop" / "loop.json").write_bytes(content)
    path = write_job(tmp_path / "job.yaml", mixture_job(output={"uri": str(tmp_path / "loop")}))
    code, _, stderr = call("study", "loop", path, "--executor", "local")
    assert code == 2 and "loop.json: is not that of a loop, or damaged" in stderr
    assert (tmp_path / "loop" / "loop.json").read_bytes() == content


def test_a_job_may_change_until_a_round_is_finished(played, call, tmp_path):
    """Who mistyped a field and stopped at once, or whose first training failed, goes on in the same folder."""
    folder, _, _ = played
    (tmp_path / "loop").mkdir()
    document = json.loads((folder / "loop" / "loop.json").read_text())
    for lane in document["lanes"]:
        lane["rounds"] = []
    (tmp_path / "loop" / "loop.json").write_text(json.dumps(document))
    job = mixture_job(seed=5, rounds=1, seeds=1, arms={"clean": {}}, output={"uri": str(tmp_path / "loop")})
    path = write_job(tmp_path / "job.yaml", job)
    assert call("study", "loop", path, "--executor", "local")[0] == 0
    write_job(path, job | {"seed": 6})
    code, _, stderr = call("study", "loop", path, "--executor", "local")
    assert code == 2 and "seed: 5 -> 6" in stderr


def test_a_folder_with_other_files_is_left_alone(call, tmp_path):
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop" / "notes.txt").write_text("mine")
    path = write_job(tmp_path / "job.yaml", mixture_job(output={"uri": str(tmp_path / "loop")}))
    code, _, stderr = call("study", "loop", path, "--executor", "local")
    assert code == 2 and "holds files ('notes.txt') and no loop.json of a loop" in stderr
    assert [file.name for file in (tmp_path / "loop").iterdir()] == ["notes.txt"]


def test_validate_checks_files_and_starts_nothing(call, tmp_path):
    job = digits_job(
        output={"uri": str(tmp_path / "loop")}, training={"lora_rank": 500}, measure={"real": "digits:trian"}
    )
    code, _, stderr = call("study", "loop", write_job(tmp_path / "job.yaml", job), "--validate")
    assert code == 2 and "training.lora_rank" in stderr and "measure.real: there is no 'digits:trian'" in stderr
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero" / "torn.png").write_bytes(b"x")
    job = digits_job(output={"uri": str(tmp_path / "loop")}, measure={"real": str(tmp_path)})
    code, _, stderr = call("study", "loop", write_job(tmp_path / "job.yaml", job), "--validate")
    assert code == 2 and f"measure.real: '{tmp_path}' has no usable image" in stderr
    assert not (tmp_path / "loop").exists()
    job = digits_job(output={"uri": str(tmp_path / "loop")})
    code, stdout, _ = call("study", "loop", write_job(tmp_path / "job.yaml", job), "--validate", "--json")
    assert code == 0 and json.loads(stdout) == {"valid": True, "classes_checked": True, "loops": 1}
    assert not (tmp_path / "loop").exists()
    assert "run the same command again" in STOPPED


@pytest.mark.parametrize("path", sorted((REPOSITORY / "jobs").glob("loop-*.yaml")), ids=lambda path: path.stem)
def test_every_loop_job_of_the_repository_is_valid_and_is_no_job_of_a_run(call, path):
    assert call("study", "loop", path, "--validate")[0] == 0
    code, _, stderr = call("plan", path, "--validate")
    assert code == 2 and "it is for `riskforge study loop`" in stderr


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"round": 0}', b"\xff" * 9], ids=["empty", "torn", "list", "bare", "binary"]
)
def test_a_damaged_round_is_refused_by_name_with_the_remedy(content, tmp_path):
    folder, lane = LoopFolder(tmp_path), Lane("clean", 0)
    path = folder.round(lane, 0) / "round.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(OutputError, match=r"round\.json: is not that of a finished round .* remove it"):
        read_rounds(folder, lane, 3)
    path.unlink()
    assert read_rounds(folder, lane, 3) == {}


def test_a_page_is_made_of_any_numbers_that_a_document_may_hold(played, tmp_path):
    """Large rewards and shares of other lengths; what is larger still is neither measured nor read."""
    folder, path, _ = played
    job = parse_loop(yaml.safe_load(path.read_text()), lambda path: {})
    rounds = {lane: list(known) for lane, known in lanes_in(folder / "loop").items()}
    record = rounds["clean", 0][1]
    record["reward"] |= {"value": 1e100}
    record["shares"] = record["shares"][:3]
    schedule = Schedule(2, {Lane(*lane): dict(enumerate(known)) for lane, known in rounds.items()})
    store = open_store(str(tmp_path))
    write_page(store, job, schedule, ["<b>", *"cdefghi"])
    page = (tmp_path / "report.html").read_text()
    assert "&lt;b&gt;" in page and "<b>" + "</th>" not in page
    store.replace("loop.json", document_bytes(job, schedule, []))
    assert recorded_rounds(read_document(store))[Lane("clean", 0)][1]["reward"]["value"] == 1e100
    record["reward"]["value"] = 1e200
    store.replace("loop.json", document_bytes(job, schedule, []))
    with pytest.raises(OutputError, match="damaged"):
        read_document(store)
    points = Recording().points
    [measures] = measure(RoundSamples(points, points[:, 0], torch.zeros(60).long()), 300 * points[:, 0], None, 1, None)
    assert measures["variance"] is None


def test_the_evidence_of_a_lane_is_stored_and_a_damaged_file_is_refused(tmp_path):
    """What a round goes on from is exactly what the round before left; equal evidence gives equal bytes."""
    job = parse_loop(mixture_job(), lambda path: {}).spec
    unit = Memory(Standardisation(torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)))
    points, options = Recording().points, SignalOptions.of(job, "clean")
    memory = learn_signal(points, points[:, 0], unit, options, seed=1).memory
    path = tmp_path / "signal.safetensors"
    write_memory(path, memory)
    data, again = path.read_bytes(), read_memory(path)
    own = learn_signal(points, points[:, 0], memory, options, seed=2)
    assert torch.equal(
        own.memory.audit.log_wealth, learn_signal(points, points[:, 0], again, options, seed=2).memory.audit.log_wealth
    )
    write_memory(path, again)
    assert path.read_bytes() == data
    for damaged in (b"", data[:-9], data[:40] + b"x" + data[41:], data.replace(b"highest", b"hIghest")):
        path.write_bytes(damaged)
        with pytest.raises(OutputError, match="is missing or damaged"):
            read_memory(path)
