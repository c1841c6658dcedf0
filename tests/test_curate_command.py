"""`riskforge curate` on a real run: rewards recovered, tampered preferences noticed and undone, and what is refused."""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from engine.data.run.curated import read_curation
from engine.data.run.selection_table import LEFT_OVER, read_selection
from engine.data.run.verify import verify
from engine.data.stores.opening import open_store
from engine.driver.progress import PlainDisplay
from engine.errors import EXIT_DAMAGED, EXIT_USER, JobError
from engine.methods.curation.learning import Standardisation, standardise
from engine.models.clip import Clip
from engine.studies.curate import curation as program
from engine.studies.curate.audit_state import audit_bytes, new_audit
from engine.studies.curate.candidates import open_candidates
from engine.studies.curate.features import SampleFeatures, embed_samples
from engine.studies.curate.rewards import column_rewards, find_reward, function_rewards, reward_names
from engine.studies.curate.selection import SelectionOptions, draw_selection
from engine.studies.samples import open_study

DISPLAY = PlainDisplay(sys.stderr)
JOB: dict[str, Any] = {
    "name": "judged",
    "seed": 1,
    "models": {
        "diffusion": "zoo:digits/stable-diffusion",
        "clip": "zoo:digits/clip",
        "target": "zoo:digits/classifier",
    },
    "requests": [{"name": "all", "method": "prompt", "classes": "all", "count": 10}],
    "sampling": {"num_inference_steps": 3, "scheduler": "ddim"},
    "runtime": {"device": "cpu"},
}
Reward = Callable[[str], float]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of 100 images of the zoo."""
    from engine import cli

    home = tmp_path_factory.mktemp("curate")
    output = {"uri": str(home / "run"), "samples_per_shard": 50}
    (home / "job.yaml").write_text(yaml.safe_dump(JOB | {"output": output}), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr("sys.argv", ["riskforge", "run", str(home / "job.yaml"), "--executor", "local"])
        cli.main()
    assert not end.value.code
    return home


@pytest.fixture(scope="module")
def features(home: Path) -> SampleFeatures:
    return embed_samples(open_study(str(home / "run")), DISPLAY)


@pytest.fixture(scope="module")
def taste(features: SampleFeatures) -> Reward:
    """A reward that is linear in the CLIP features."""
    scaled = standardise(features.values)(features.values)
    weights = torch.randn(scaled.shape[1], generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    rewards = scaled @ weights
    rewards = 2 * rewards / rewards.std()
    return lambda key: float(rewards[features.rows[key]])


class Raters:
    """Simulated raters, who choose by a reward."""

    def __init__(self, keys: Sequence[str], reward: Reward, seed: int) -> None:
        self._keys, self._reward, self._random = list(keys), reward, random.Random(seed)

    def pairs(self, count: int) -> list[tuple[str, str]]:
        """Different ones, in either order."""
        pairs = list(itertools.combinations(self._keys, 2))
        return [tuple(self._random.sample(pair, 2)) for pair in self._random.sample(pairs, count)]

    def choose(self, pairs: Sequence[tuple[str, str]], share_tampered: float = 0.0) -> list[dict[str, Any]]:
        """Choices by Bradley-Terry; those of the largest differences are the wrong ones for a share."""
        margins = {pair: self._reward(pair[0]) - self._reward(pair[1]) for pair in pairs}
        records = []
        tampered = sorted(pairs, key=lambda pair: -abs(margins[pair]))[: round(share_tampered * len(pairs))]
        for number, pair in enumerate(pairs):
            chance = 1 / (1 + 2.718281828 ** -margins[pair])
            choice = int(self._random.random() >= chance) if pair not in tampered else int(margins[pair] > 0)
            record = {"first": pair[0], "second": pair[1], "choice": choice}
            records.append(record | {"rater": f"r{number % 5}", "time": number, "group": "all"})
        return records


def written(path: Path, records: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


@pytest.fixture
def raters(features: SampleFeatures, taste: Reward) -> Raters:
    return Raters(list(features.rows), taste, 0)


def test_a_known_reward_on_clip_features_is_recovered(home, features, taste, raters, tmp_path, call):
    """Agreement above chance with its interval, a higher true reward among the selected, and a run that is whole."""
    file = written(tmp_path / "prefs.jsonl", raters.choose(raters.pairs(400)))
    code, out, _ = call("curate", str(home / "run"), "--preferences", file, "--output", str(tmp_path / "out"), "--json")
    document = json.loads(out)
    assert code == 0 and document["left_out"] == document["notes"] == []
    curation = read_curation(open_store(str(tmp_path / "out")))
    accuracy = curation.reward.accuracy
    assert document["curation"] == curation.to_document() and accuracy.total == 80
    assert 0.5 < accuracy.low < accuracy.value
    selection = read_selection(open_store(str(tmp_path / "out")))
    truth = torch.tensor([taste(key) for key in selection.keys], dtype=torch.float64)
    assert float(torch.corrcoef(torch.stack([truth, torch.tensor(selection.rewards)]))[0, 1]) > 0.9
    assert float(truth[list(selection.selected)].mean()) > float(truth.mean()) + 1
    assert not verify(open_store(str(tmp_path / "out"))).findings
    assert json.loads((tmp_path / "out/manifest.json").read_text())["curation"]["reward"]["num_records"] == 320


def test_frequencies_over_a_run_are_those_of_bradley_terry(home):
    """Draws with 400 seeds: how often a candidate is selected is the sum of its probabilities; groups are all of K."""
    candidates = open_candidates(open_store(str(home / "run")))
    rewards = [2 * reward for reward in column_rewards("conformity", candidates)]
    drawn = torch.zeros(len(candidates), dtype=torch.float64)
    expected, variance = drawn.clone(), drawn.clone()
    for seed in range(400):
        options = SelectionOptions(num_candidates=3, seed=seed)
        selection = draw_selection(candidates.keys, candidates.class_indices, rewards, options)
        chance = torch.tensor(selection.probabilities, dtype=torch.float64)
        expected, variance = expected + chance, variance + chance * (1 - chance)
        drawn += torch.tensor(selection.selected).double()
        assert sum(selection.selected) == 33 and selection.groups.count(LEFT_OVER) == 1
    scores = (drawn - expected) / variance.sqrt()
    assert float(scores.abs().max()) < 4.5 and 0.8 < float(scores.std()) < 1.2


def test_tampered_preferences_raise_the_alarm_and_are_undone(home, taste, raters, tmp_path, call):
    """Clean choices first, whose monitor is continued: no alarm. Then tampered ones: nothing is selected, until asked.

    The defence restores the true reward of what is selected.
    """
    run, pairs = str(home / "run"), raters.pairs(400)
    trusted = written(tmp_path / "trusted.jsonl", raters.choose(pairs[:100]))
    clean = written(tmp_path / "clean.jsonl", raters.choose(pairs[:50] + pairs[100:]))
    command = ("curate", run, "--trusted", trusted, "--preferences")
    code, out, _ = call(*command, clean, "--output", str(tmp_path / "clean"))
    assert code == 0 and "monitor     no alarm" in out and "50 records of audited pairs are withheld" in out
    tampered = written(tmp_path / "tampered.jsonl", raters.choose(pairs, 0.3))
    after = (*command, tampered, "--after", str(tmp_path / "clean"), "--output", str(tmp_path / "out"))
    code, out, err = call(*after)
    assert (
        code == EXIT_DAMAGED and "ALARM" in out and [path.name for path in (tmp_path / "out").iterdir()] == ["_state"]
    )
    assert "alarm: the monitor has raised its alarm" in err and "nothing was selected" in err
    check_evidence(command, clean, tmp_path, call)
    code, out, err = call(*after, "--on-alarm", "continue", "--defence", "influence")
    assert code == 0 and "alarm: the monitor" in err and "nothing was selected" not in err
    undefended = (*after[:-1], str(tmp_path / "undefended"), "--on-alarm", "continue")
    assert call(*undefended)[0] == 0
    rewards = {name: mean_reward(tmp_path / name, taste) for name in ("clean", "out", "undefended")}
    assert rewards["out"] - rewards["undefended"] > 0.7 * (rewards["clean"] - rewards["undefended"]) > 0.3
    check_suspects(tmp_path)
    # The monitor of the next run continues, and remembers: pairs are not bet on twice, an alarm is not taken back.
    monitor = read_curation(open_store(str(tmp_path / "out"))).monitor
    assert monitor.num_audited == 100 and monitor.after == str(tmp_path / "clean")
    again = (*command, clean, "--after", str(tmp_path / "out"), "--output", str(tmp_path / "next"))
    assert call(*again)[0] == EXIT_DAMAGED
    check_repeated(after, undefended, call)


def check_evidence(command: Sequence[str], clean: str, home: Path, call: Any) -> None:
    """An alarm that stopped a curation outlives it: no other records take it back, there or after it.

    A complete run that continued another monitor, or none, is not given out as one that continues it.
    """
    kept = (home / "out/_state/audit.safetensors").read_bytes()
    code, out, _ = call(*command, clean, "--after", str(home / "clean"), "--output", str(home / "out"))
    assert code == EXIT_DAMAGED and "100 audited records differ" in out and "correlation" in out
    assert (home / "out/_state/audit.safetensors").read_bytes() == kept
    assert call(*command, clean, "--after", str(home / "out"), "--output", str(home / "other"))[0] == EXIT_DAMAGED
    code, _, err = call(*command, clean, "--after", str(home / "out"), "--output", str(home / "clean"))
    assert code == EXIT_USER and "or a file of --preferences, --trusted or --after is another" in err


def check_suspects(home: Path) -> None:
    """The records that were removed, with file and line, and the effect of each."""
    suspects = [json.loads(line) for line in (home / "out/curation/suspects.jsonl").read_text().splitlines()]
    records = (home / "tampered.jsonl").read_text().splitlines()
    curation = read_curation(open_store(str(home / "out")))
    assert len(suspects) == curation.reward.num_removed > 20 and curation.reward.defence == "influence"
    for suspect in suspects:
        record = json.loads(records[suspect["line"] - 1])
        assert record == {name: suspect[name] for name in record} and suspect["why"]
    effects = [suspect["effect"] for suspect in suspects]
    assert effects == sorted(effects) and effects[0] < 0
    assert not verify(open_store(str(home / "out"))).findings


def check_repeated(stopped: Sequence[str], done: Sequence[str], call: Any) -> None:
    """The same command does nothing more, without loading a model; where it would stop today, it says so."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Clip, "load", lambda *_: pytest.fail("a model was loaded"))
        code, out, _ = call(*done)
        assert code == 0 and "complete before" in out
        code, out, err = call(*done[:-1], "stop")
        assert code == EXIT_DAMAGED and "complete before" in out and "alarm: " in err


def mean_reward(run: Path, taste: Reward) -> float:
    """Expected true reward of what is selected, over the draws."""
    selection = read_selection(open_store(str(run)))
    rewards = [taste(key) * chance for key, chance in zip(selection.keys, selection.probabilities, strict=True)]
    return sum(rewards) / sum(selection.selected)


def test_groups_have_judges_of_their_own(home, raters, tmp_path, call):
    """A group without a trusted record, and records without a group, are refused before a model is loaded."""
    records, run = raters.choose(raters.pairs(60)), str(home / "run")
    trusted = written(tmp_path / "trusted.jsonl", records[:20])
    command = ("curate", run, "--trusted", trusted, "--defence", "group", "--output", str(tmp_path / "out"))
    other = written(tmp_path / "other.jsonl", [*records[:-1], records[-1] | {"group": "few"}])
    code, _, err = call(*command, "--preferences", other)
    assert code == EXIT_USER and "has no choice of group 'few', which --preferences has in line 60" in err
    none = [{name: value for name, value in record.items() if name != "group"} for record in records]
    code, _, err = call(*command, "--preferences", written(tmp_path / "none.jsonl", none))
    assert code == EXIT_USER and "line 21: group is missing" in err
    code, out, _ = call(*command, "--preferences", written(tmp_path / "prefs.jsonl", records), "--model", "network")
    assert code == 0 and "defence     group: " in out and "(network, on CLIP features)" in out


FEW = [{"first": "a", "second": "b", "choice": 0}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--preferences: nothing says what to select by"),
        (("--preferences", "P", "--reward", "risk"), "--preferences, --reward: a run is curated by one of them"),
        (("--reward", "risks"), "there is no reward 'risks'; did you mean 'risk'?; give one of class-index, "),
        (("--reward", "no.such:fn"), "--reward: 'no.such:fn': there is no module 'no'"),
        (("--reward", "json:dumpz"), "did you mean 'dump'?"),
        (("--reward", "risk", "--model", "network"), "--model: applies to --preferences alone"),
        (("--reward", "risk", "--trusted", "P"), "--trusted: applies to --preferences alone"),
        (("--preferences", "P", "--after", "x"), "--after: continues a monitor, which needs trusted choices"),
        (("--preferences", "P", "--defence", "group"), "--defence: group compares records with trusted choices"),
        (("--preferences", "P"), "no record is left"),
        (("--preferences", "P.txt"), "'P.txt' does not exist"),
        (("--preferences", "P", "--candidates", "0"), "--candidates: 0 is not a number of candidates"),
        (("--preferences", "P", "--candidates", "500"), "--candidates: 500 are one group, and the run has 100"),
        (("--reward", "risk", "--scale", "nan"), "--scale: nan is not a finite number"),
        (("--preferences", "GOOD", "--trusted", "GOOD"), "so that no record is left to learn from"),
        (("--preferences", "GOOD", "--trusted", "ONE", "--after", "RUN"), "it was not curated with --trusted"),
    ],
)
def test_what_files_can_tell_is_refused_before_a_model_is_loaded(
    home, features, tmp_path, monkeypatch, call, options, message
):
    monkeypatch.setattr(Clip, "load", lambda *_: pytest.fail("a model was loaded"))
    first, second, third = list(features.rows)[:3]
    good = [{"first": first, "second": second, "choice": 0}, {"first": first, "second": third, "choice": 1}]
    files = {
        "P": written(tmp_path / "P.jsonl", FEW), "GOOD": written(tmp_path / "good.jsonl", good),
        "ONE": written(tmp_path / "one.jsonl", good[:1]), "RUN": str(home / "run"),
    }  # fmt: skip
    arguments = [files.get(option, option) for option in options]
    code, out, err = call("curate", str(home / "run"), *arguments, "--output", str(tmp_path / "out"))
    assert code == EXIT_USER and message in err and not out and not (tmp_path / "out").exists()
    assert "Traceback" not in err


def test_every_named_reward_is_one_of_the_records(home, monkeypatch):
    candidates = open_candidates(open_store(str(home / "run")))
    assert column_rewards("class-index", candidates) == [-index for index in candidates.class_indices]
    rows = {row["key"]: row for row in pq.read_table(home / "run/metadata.parquet").to_pylist()}
    for name in reward_names()[1:]:
        assert column_rewards(name, candidates) == [float(rows[key][name]) for key in candidates.keys]
    assert {"risk", "conformity", "kldb", "entropy"} <= set(reward_names())
    assert not {"key", "predicted_class", "seed", "transfer"} & set(reward_names())
    values = [float("nan"), *candidates.column("risk")[1:]]
    monkeypatch.setattr(type(candidates), "column", lambda self, name: values)
    with pytest.raises(JobError, match=f"sample '{candidates.keys[0]}' has the risk nan"):
        column_rewards("risk", candidates)


MODULE = """
import numpy, torch
def brightness(images, records):
    assert len(images) == len(records) and all(r["class_name"] for r in records)
    return torch.tensor([float(numpy.asarray(image).mean()) for image in images])
"""


def test_a_function_of_the_user_is_a_reward(home, tmp_path, monkeypatch, call):
    """Called with images and records in batches; a change of its file is another reward."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "curate_user_rewards.py").write_text(MODULE, encoding="utf-8")
    command = ("curate", str(home / "run"), "--reward", "curate_user_rewards:brightness", "--scale", "0.1")
    code, out, err = call(*command, "--output", str(tmp_path / "out"))
    assert code == 0, err
    assert "reward      curate_user_rewards:brightness (function)" in out and "selected    25 of 100" in out
    curation = read_curation(open_store(str(tmp_path / "out")))
    assert curation.mean_reward_selected > curation.mean_reward > 0
    assert find_reward("curate_user_rewards:brightness", DISPLAY).record.digest == curation.reward.digest


def test_a_function_that_failed_can_be_corrected(home, tmp_path, monkeypatch, call):
    """It leaves no plan in the output; what it prints is not in the JSON."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    command = ("curate", str(home / "run"), "--output", str(tmp_path / "out"), "--json", "--reward")
    text = "def rewards(images, records):\n    print('called')\n    return [VALUE] * len(images)\n"
    for name, value in (("curate_wrong", "None"), ("curate_right", "1.0")):
        (tmp_path / f"{name}.py").write_text(text.replace("VALUE", value), encoding="utf-8")
    assert call(*command, "curate_wrong:rewards")[0] == EXIT_USER
    code, out, err = call(*command, "curate_right:rewards")
    assert code == 0 and "called" in err and json.loads(out)["curation"]["num_groups"] == 25


class Odd:
    """A value that nothing can be made of."""

    shape = (3, 1)


class Liar(list):
    """A list that states another length than it has."""

    def __len__(self) -> int:
        return 64


class SilentError(Exception):
    """An error whose text is one."""

    def __str__(self) -> str:
        raise RuntimeError


def fails(images, records):
    raise KeyError("colour")


def fails_silently(images, records):
    raise SilentError


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda images, records: [1.0], r"returned 1 values; return a finite number for each of the 64 images"),
        (lambda images, records: None, "returned a NoneType; return"),
        (lambda images, records: 3.5, "returned a float; return"),
        (lambda images, records: "x" * len(images), "returned a str; return"),
        (lambda images, records: torch.zeros(len(images), 2), "returned a list for sample"),
        (lambda images, records: torch.tensor(1.0), "returned a Tensor; return"),
        (lambda images, records: [Odd()] * len(images), r"returned a Odd of shape \[3, 1\] for sample"),
        (lambda images, records: ["1"] * len(images), "returned '1' for sample"),
        (lambda images, records: [float("nan")] * len(images), "returned nan for sample 'judged-000-000-"),
        (lambda images, records: [1e999] * len(images), "returned inf for sample"),
        (lambda images, records: sys.exit(3), "failed on 64 samples from .*: SystemExit"),
        (lambda images, records: images.clear() or records.clear() or [], "returned 0 values"),
        (lambda images: [], "failed on 64 samples .*: TypeError"),
        (lambda images, records: Liar([1.0]), "returned 1 values"),
        (fails_silently, "failed on 64 samples .*: SilentError .*test_curate_command.py, line"),
        (fails, "failed on 64 samples .*: KeyError: 'colour' .*test_curate_command.py, line"),
    ],
)
def test_a_function_that_gives_no_rewards_is_refused_by_name(home, function, message):
    candidates = open_candidates(open_store(str(home / "run")))
    with pytest.raises(JobError, match=f"(?s)--reward: 'my.module:fn' {message}"):
        function_rewards("my.module:fn", function, candidates, DISPLAY)


def test_a_monitor_of_another_feature_size_is_refused(home, features, raters, tmp_path, call):
    """The digest is that of the CLIP model, and yet its features are fewer: somebody has made the file."""
    state = new_audit(Standardisation(torch.zeros(3).double(), torch.ones(3).double()), features.clip_digest)
    (tmp_path / "before/curation").mkdir(parents=True)
    (tmp_path / "before/curation/audit.safetensors").write_bytes(audit_bytes(state))
    records = raters.choose(raters.pairs(10))
    prefs, trusted = written(tmp_path / "p.jsonl", records), written(tmp_path / "t.jsonl", records[:3])
    code, _, err = call(
        "curate", str(home / "run"), "--preferences", prefs, "--trusted", trusted, "--after", str(tmp_path / "before")
    )
    assert code == EXIT_USER and "has 3 features of an image, models.clip of RUN gives 64" in err
    assert not (home / "run-curated").exists()


def test_the_default_output_is_next_to_the_run(home):
    assert program.default_output("/data/nightly/") == "/data/nightly-curated"
    assert program.default_output("s3://bucket/run") == "s3://bucket/run-curated"
