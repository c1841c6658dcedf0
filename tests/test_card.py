"""The card of a run says what happened, whatever did: its sentences follow from counts, not from what was asked."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.images.encoding import encode
from engine.data.reading.export import export
from engine.data.reading.export_options import ExportOptions
from engine.data.run.card import dataset_card
from engine.data.run.summary import GroupSummary, Spread
from engine.errors import JobError
from engine.job.columns import Role, columns_with
from engine.job.parsing import parse_job
from engine.job.spec import JobSpec
from tests.corpus_cases import make_run

RULE, ARTEFACT = {"is_error": True}, {"artefact": "a"}
SPREAD = Spread(q25=0.5, median=1.0, q75=2.0)


def make_job(*, oracle: bool, judge: bool, store_rejected: bool, provenance: bool) -> JobSpec:
    """A plain request with a quota, a screened one that is guided, one of a joint prompt."""
    models = {"diffusion": "zoo:d", "clip": "zoo:c", "target": "zoo:t"}
    models |= {"oracle": "zoo:o"} if oracle else {}
    models |= {"judge": "zoo:j"} if judge else {}
    return parse_job(
        {
            "name": "demo",
            "models": models,
            "requests": [
                {"name": "kept", "method": "prompt", "classes": ["one", "two"], "count": 5, "accept": RULE},
                {"name": "screened", "method": "risky", "classes": ["one"], "count": 5, "conditioning": ARTEFACT},
                {"name": "joint", "method": "boundary", "boundary": ["one", "two"], "count": 5},
            ],
            "output": {"uri": "x", "store_rejected": store_rejected, "provenance": provenance},
        }
    )  # fmt: skip


@st.composite
def runs(draw: st.DrawFn) -> tuple[JobSpec, dict[str, Any], list[GroupSummary]]:
    """A job and what a run of it might have come to."""
    flags = {name: draw(st.booleans()) for name in ("oracle", "judge", "store_rejected", "provenance")}
    job = make_job(**flags)
    few = st.integers(0, 9)
    requests, groups = {}, []
    for request in job.requests:
        ok, failed = draw(few), draw(few)
        rejected = draw(few) if request.accept else 0
        requests[request.name] = {
            "attempted": ok + failed + rejected, "ok": ok, "rejected": rejected, "failed": failed, "accepted": ok
        }  # fmt: skip
        known = ok + rejected > 0
        groups.append(
            GroupSummary(
                request=request.name, method=request.method, context="", **requests[request.name],
                error_rate=0.25 if known else None,
                scores={column.name: SPREAD for column in columns_with(Role.SUMMARISED)},
                oracle_agreement=0.5 if known and flags["oracle"] else None,
                valid_failure_rate=0.125 if known and flags["oracle"] else None,
                transfer=(), entry_means={"judge_conformity": 0.75 if known and flags["judge"] else None},
            )
        )  # fmt: skip
    samples = {name: sum(one[name] for one in requests.values()) for name in requests["kept"]}
    quotas = []
    for name in ("one", "two"):
        accepted = draw(few)
        quotas.append(
            {"class": name, "code": "001", "wanted": 5, "accepted": accepted, "surplus": max(0, accepted - 5),
             "attempted": 9, "missing": max(0, 5 - accepted)}
        )  # fmt: skip
    num_samples = draw(few)
    num_screened = draw(st.integers(0, num_samples))
    num_draws = num_screened + draw(few) if num_samples else 0
    screening = [
        {"class_index": 1, "samples": num_samples, "screened": num_screened, "draws": num_draws, "acceptance_rate": 0.0}
    ]
    guided = draw(few)
    about = {"scored": guided + 1, "guided": guided, "without_effect": draw(st.integers(0, guided))}
    committed = draw(st.integers(0, 3))
    manifest = {
        "schema_version": draw(st.sampled_from([1, 2, 3])),
        "complete": committed == 3 and draw(st.booleans()),
        "plan_digest": "abc",
        "models": {
            "target": {"address": "zoo:t", "digest": "t", "license": draw(st.sampled_from(["unknown", "apache-2.0"]))},
            "clip": {"address": "zoo:c", "digest": "c", "license": "unknown"},
        },
        "counts": {
            "shards": {"planned": 3, "committed": committed},
            "samples": {"planned": 45, **samples},
            "requests": requests,
            "quotas": {"kept": quotas},
            "screening": {"screened": screening} if num_samples else {},
            "guidance": {"screened": about} if guided else {},
        },
    }  # fmt: skip
    return job, manifest, groups


@settings(max_examples=60, deadline=None)
@given(runs())
def test_every_claim_follows_from_the_counts(run: tuple[JobSpec, dict[str, Any], list[GroupSummary]]) -> None:
    """Screening that nothing passed, quotas that are short, models that nobody named, licences that nobody states."""
    job, manifest, groups = run
    before = copy.deepcopy(manifest)
    card = dataset_card(job, manifest, groups, ["shards/*.tar"])
    counts = manifest["counts"]
    assert manifest == before
    check_screening(card, counts["screening"].get("screened", []))
    missing = {one["class"]: one["missing"] for one in counts["quotas"]["kept"] if one["missing"]}
    assert {name: int(count) for count, name in re.findall(r"(\d+) of `(one|two)`", card)} == (
        missing if counts["requests"]["kept"]["attempted"] else {}
    )
    assert ("**Short:**" in card) == (manifest["complete"] and bool(missing))
    assert ("**Not complete:**" in card) == (not manifest["complete"])
    is_of_shards = not manifest["complete"] and counts["shards"]["committed"] < 3
    assert ("shards were there when this was written" in card) == is_of_shards
    surplus = sum(one["surplus"] for one in counts["quotas"]["kept"])
    assert (f"**The tars hold {surplus} accepted images beyond" in card) == bool(surplus)
    rejected = counts["samples"]["rejected"]
    assert (f"**The {rejected} rejected images are stored too.**" in card) == bool(
        job.output.store_rejected and rejected
    )
    for name, made in counts["requests"].items():
        statuses = ", ".join(f"{made[status]} {status}" for status in ("ok", "rejected", "failed"))
        text = f"{made['attempted']} attempts: {statuses}"
        section = card[card.index(f"- **{name}**") :].split("\n- **")[0]
        assert ("made: nothing so far" in section) if not made["attempted"] else (text in section)
    guided = counts["guidance"].get("screened")
    assert (f"guided: {guided['guided']} of {guided['scored']} scored images" in card) if guided else True
    assert ("no gradient was finite and other than zero" in card) == bool(guided and guided["without_effect"])
    check_models(card, job, groups)
    states_one = manifest["models"]["target"]["license"] != "unknown"
    assert ("only what their own files say is listed" in card) == states_one
    assert ("The files of the models state none." in card) == (not states_one)
    assert ("Every file says so itself" in card) == job.output.provenance
    check_header(card, job, manifest)


def check_screening(card: str, rows: list[dict[str, int]]) -> None:
    """That it was asked for, and what came of it."""
    samples, screened, draws = (sum(one[name] for one in rows) for name in ("samples", "screened", "draws"))
    assert "drawn until the target's error predictor expected" not in card
    assert ("nothing was drawn so far" in card) == (not samples)
    if samples:
        assert f"{screened} of {samples} samples have an embedding that passed, in {draws} draws" in card
    others = re.findall(r"; (all|the other \d+) were made from the likeliest of their draws and are not screened", card)
    assert others == ([] if screened == samples else ["all" if not screened else f"the other {samples - screened}"])


def check_models(card: str, job: JobSpec, groups: list[GroupSummary]) -> None:
    """Figures and words of an oracle or a judge only where there was one."""
    has_oracle = any(one.oracle_agreement is not None for one in groups)
    head = next(line for line in card.splitlines() if line.startswith("| request |"))
    assert ("oracle agrees | valid failures" in head) == has_oracle == ("a valid failure is" in card)
    has_judge = any(group.entry_means["judge_conformity"] is not None for group in groups)
    assert ("judge's conformity" in head) == has_judge == ("The judge is a second CLIP model" in card)
    assert ("transfer" in head) is False
    assert ("by what the oracle predicts" in card) == bool(job.models.oracle)
    assert ("the judge is a second opinion" in card) == bool(job.models.judge)
    widths = {line.count(" | ") for line in card.splitlines() if line.startswith(("| request |", *_lines(groups)))}
    assert len(widths) == 1


def _lines(groups: list[GroupSummary]) -> list[str]:
    return [f"| {one.request} |" for one in groups]


def check_header(card: str, job: JobSpec, manifest: dict[str, Any]) -> None:
    """The types are those of the tars."""
    header = yaml.safe_load(card.split("---\n")[1])
    features = {one["name"]: one for one in header["dataset_info"]["features"]}
    assert list(features) == [job.output.image_format, "json", "cls", "__key__", "__url__"]
    names = [one["name"] for one in features["json"]["struct"]]
    assert ("scored" in names) == (manifest["schema_version"] >= 3)
    assert ("judge" in names) == (manifest["schema_version"] >= 2)


def test_the_counts_of_a_run_are_those_of_its_rows(tmp_path: Path) -> None:
    """Guided samples, and those that no gradient moved, as the rows have them; requests without guidance have none."""

    def change(record: dict[str, Any]) -> dict[str, Any]:
        if record["request"] != "between":
            return record
        idle = record["index"] in (1, 2)
        return record | {
            "guided_steps": 0 if record["index"] == 0 else 4,
            "zero_gradients": 4 if record["index"] == 1 else 1 if record["index"] == 2 else 0,
            "nonfinite_gradients": 3 if idle and record["index"] == 2 else 0,
        }

    run = make_run(tmp_path / "run", count=7, change=change)
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["counts"]["guidance"] == {"between": {"scored": 6, "guided": 5, "without_effect": 2}}
    assert "guided: 5 of 6 scored images; of these 2 as without it" in (run / "README.md").read_text()


def make_real_images(folder: Path, count: int) -> str:
    """Noise by class, in the place of photographs."""
    for number in range(count):
        place = folder / ("one", "two")[number % 2] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        place.write_bytes(encode(noise, "png"))
    return str(folder)


@pytest.mark.parametrize("kind", ["webdataset", "imagefolder", "parquet"])
@pytest.mark.parametrize("with_real", [False, True])
@pytest.mark.parametrize("with_rejected", [False, True])
def test_the_card_of_an_export(tmp_path: Path, kind: str, with_real: bool, with_rejected: bool) -> None:
    """Real images and rejected ones are spoken of where there are some; its lines run and give every image."""
    run = make_run(tmp_path / "run", count=6)
    real = make_real_images(tmp_path / "real", 6)
    options = ExportOptions(
        output=str(tmp_path / "out"), format=kind, with_rejected=with_rejected,
        real=real if with_real else None, real_ratio=0.3,
    )  # fmt: skip
    done = export((str(run),), options)
    card, counts = (done.path / "README.md").read_text(), done.manifest["counts"]
    assert (f"and {counts['real']} real ones (`method` is `real`, `scored` is false)" in card) == with_real
    assert ("those of real images are of their data set" in card) == with_real
    assert (f"**{counts['samples']['rejected']} images were rejected by the rule" in card) == with_rejected
    assert ("folders.json" in card) == (kind == "imagefolder") and "`classes.json`" in card
    assert ("dataset_info" in yaml.safe_load(card.split("---\n")[1])) == (kind == "webdataset")
    assert "**Error rates here are not rates on real images.**" in card and "**Licence:** not stated." in card
    assert json.loads((done.path / "classes.json").read_text()) == {"0": "zero", "1": "one", "2": "two"}
    rows = [line.strip("| ").split(" | ") for line in card.splitlines() if re.match(r"\| \d", line)]
    assert [row[:2] for row in rows] == [["0", "`zero`"], ["1", "`one`"], ["2", "`two`"]]
    assert sum(int(row[2]) for row in rows) == counts["generated"]
    assert [int(row[3]) for row in rows] == [counts["classes"][name]["real"] for name in ("zero", "one", "two")]
    assert sum(int(row[3]) for row in rows) == counts["real"]


def test_real_images_of_an_earlier_export_are_no_synthetic_ones(tmp_path: Path) -> None:
    """A merge of a mixed data set counts them as real, in words and numbers, and tops their share up, not twice."""
    run = make_run(tmp_path / "run", count=20)
    real = make_real_images(tmp_path / "real", 40)
    mixed = export((str(run),), ExportOptions(output=str(tmp_path / "mixed"), real=real, real_ratio=0.2))
    counts = mixed.manifest["counts"]
    again = export((str(mixed.path),), ExportOptions(output=str(tmp_path / "again"), name="again"))
    assert again.manifest["counts"] == counts and counts["real"] == round(counts["generated"] / 4) > 0
    assert f"{counts['generated']} synthetic ones" in (again.path / "README.md").read_text()
    more = ExportOptions(output=str(tmp_path / "more"), name="more", real=real, real_ratio=0.5)
    counts = export((str(mixed.path),), more).manifest["counts"]
    assert counts["real"] == counts["generated"]
    with pytest.raises(JobError, match=r"--real-ratio: .* are real images of an earlier export"):
        export((str(mixed.path),), ExportOptions(output=str(tmp_path / "never"), name="x", real=real, real_ratio=0.1))


REQUESTS = [
    {"name": "hard", "method": "risky", "classes": ["one"], "count": 3, "accept": "is_error and risk > 1",
     "contexts": ["", "red | <b>ink</b>"], "prompt": "a {class} of {context} `x`",
     "guidance": {"risky": {"target_risk": 2.5}}},
    {"name": "plain", "method": "prompt", "boundary": ["one", "two"], "count": 2, "fresh": "2026-11-21"},
]  # fmt: skip


def test_a_merged_card_says_what_the_runs_were_asked_for(tmp_path: Path) -> None:
    """Rules, prompts, contexts, guidance and licences of every run, also through a merge; equal jobs once."""
    runs = [make_run(tmp_path / name, name="night", seed=seed, requests=REQUESTS) for seed, name in enumerate("ab")]
    other = make_run(tmp_path / "c", name="other", finish=False, count=4)
    options = ExportOptions(output=str(tmp_path / "one"), license="cc-by-4.0", authors=("Ada: <b>", "- B `x`"))
    export(tuple(map(str, runs)), options)
    again = ExportOptions(output=str(tmp_path / "two"), license="MIT or apache-2.0")
    done = export((str(tmp_path / "one"), str(other)), again)
    one, two = ((tmp_path / name / "README.md").read_text() for name in ("one", "two"))
    for card in (one, two):
        assert card.count("- **hard**: method `risky`, guided to risk") == 1
        assert f"Runs: `{runs[0]}`, `{runs[1]}`." in card
        assert "accepted when: `is_error and risk > 1`" in card and "accepted: every one, without a rule" in card
        assert "prompt: `` a {class} of {context} `x` ``" in card and "prompt: `{class} and {class}`" in card
        assert "contexts, after the prompt: none, `red | <b>ink</b>`" in card and "target_risk `2.5`" in card
        assert "| `target` | address `zoo:t`, digest `t0`, license `apache-2.0` |" in card
        assert "2026-11-21" not in card, "it is of one night alone"
    assert "### `other`" in two and "- **between**" in two and "### `other`" not in one
    made = sum(json.loads((run / "manifest.json").read_text())["counts"]["requests"]["hard"]["ok"] for run in runs)
    assert f" attempts: {made} ok" in one
    header = yaml.safe_load(one.split("---\n")[1])
    assert header["license"] == "cc-by-4.0" and header["authors"] == ["Ada: <b>", "- B `x`"]
    assert "**Licence:** `CC-BY-4.0`" in one and "**Authors:** `Ada: <b>`, `` - B `x` ``." in one
    header = yaml.safe_load(two.split("---\n")[1])
    assert (header["license"], header["license_name"]) == ("other", "mit-or-apache-2.0")
    assert [origin["name"] for origin in done.manifest["origins"]] == ["night", "night", "other"]


@pytest.mark.parametrize(
    "origins",
    [
        7, [7, None, "x"], [{}], [{"job": [], "models": 7, "counts": "x"}],
        [{"job": {"name": "x"}, "models": {"target": {"license": 7, "trained_on": 3}, "clip": [7]}, "name": 3}],
        [{"counts": {"requests": {"all": 7}, "quotas": {"all": [{}]}, "guidance": [], "screening": {"all": 3}}}],
        [{"models": {"target": {"address": "../\0|`x`"}}, "uri": "`|\n# x"}] * 2,
    ],
)  # fmt: skip
def test_origins_that_somebody_else_wrote_are_no_traceback(tmp_path: Path, origins: Any) -> None:
    """A merge of a merge whose manifest was bent: what cannot be read is left out of the card."""
    run = make_run(tmp_path / "run", count=4)
    export((str(run),), ExportOptions(output=str(tmp_path / "one")))
    path = tmp_path / "one" / "manifest.json"
    manifest = json.loads(path.read_text())
    job = manifest["origins"][0]["job"]
    if isinstance(origins, list):
        origins = [{"job": job} | origin if isinstance(origin, dict) else origin for origin in origins]
    path.write_text(json.dumps(manifest | {"origins": origins}))
    done = export((str(tmp_path / "one"),), ExportOptions(output=str(tmp_path / "two")))
    card = (done.path / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["pretty_name"] == "corpus"
    assert "\n# x" not in card and "## How it was made" in card
