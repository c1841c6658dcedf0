"""What broke tonight: two nights of composed digits under two targets of the zoo, their page, and the pinned night."""

from __future__ import annotations

import base64
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from engine.data.run.comparison import MAX_KEPT, Comparison, keep_pinned, read_pinned, sentence
from engine.data.run.shards import read_shard
from engine.data.stores.opening import open_store
from engine.errors import EXIT_DAMAGED, EXIT_OK, EXIT_USER, CorruptShardError
from engine.report.nights import PAGE_BEGINNING
from engine.report.render import comparison_page
from engine.studies.compare.limits import Limits, crossed_limits
from engine.studies.compare.nights import night_names
from engine.studies.compare.program import compare_runs
from engine.studies.compare.scored_run import night_of, read_scored_run
from tests.browser import CHROMIUM, Browser
from tests.composed import composed_job, make_run

MODELS = {
    "diffusion": "zoo:digits/stable-diffusion",
    "clip": "zoo:digits/clip",
    "oracles": ["zoo:digits/oracle", "zoo:digits/oracle-c"],
}
# The second one has holes.
TARGETS = {"2026-11-20": "zoo:digits/classifier-b", "2026-11-21": "zoo:digits/classifier"}
HOSTILE = "</h4><script>document.title = 'owned'</script> <img src=x onerror=alert(1)> " + "long" * 60
IMAGE = re.compile(r'src="data:image/png;base64,([^"]+)"')


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two nights: a panel, and fresh samples, four of a class and context."""
    home = tmp_path_factory.mktemp("nights")
    for night, target in TARGETS.items():
        output = home / f"nightly-{night}"
        requests = [
            {"name": "panel", "method": "prompt", "classes": "all", "count": 4, "contexts": ["small, bottom left", ""]},
            {"name": "fresh", "method": "prompt", "classes": ["five", "eight"], "count": 4, "fresh": night,
             "contexts": ["small, bottom right"]},
        ]  # fmt: skip
        make_run(composed_job(output, count=1, models=MODELS | {"target": target}, requests=requests))
    return home


@pytest.fixture
def copies(nights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Copies of both, by their relative addresses."""
    monkeypatch.chdir(shutil.copytree(nights, tmp_path / "runs"))
    return "nightly-2026-11-20", "nightly-2026-11-21"


def rows_of(run: str) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in pq.read_table(Path(run) / "metadata.parquet").to_pylist()}


def stored(run: str) -> dict[str, bytes]:
    return {key: data for tar in Path(run).glob("shards/*.tar") for key, data, _, _ in read_shard(tar)}


def shown(page: Path) -> list[bytes]:
    return [base64.b64decode(found) for found in IMAGE.findall(page.read_text())]


def test_one_command_shows_what_broke(call: Any, copies: tuple[str, str]) -> None:
    """The page has the stored images of both nights, by risk; JSON and the terminal say class, context, prediction."""
    code, out, _ = call("compare", *copies, "--html", "tonight.html", "--json")
    found, (old, new) = json.loads(out), map(rows_of, copies)
    broken = found["new_failures"]
    assert code == EXIT_OK and len(broken) == found["num_new_failures"] > 3
    assert [one["new_risk"] for one in broken] == sorted((one["new_risk"] for one in broken), reverse=True)
    for one in (*broken, *found["mended"]):
        was, now = old[one["old_key"]], new[one["key"]]
        assert (one["old_predicted_class"], one["predicted_class"]) == (was["predicted_class"], now["predicted_class"])
        assert (one["class_name"], one["context"]) == (now["class_name"], now["context"])
        assert one["predicted_class_name"] and one["old_predicted_class_name"]
    alone = found["unpaired_failures"]
    wrong = {key for key, row in new.items() if row["request"] == "fresh" and row["is_error"]}
    assert {one["key"] for one in alone} == wrong and found["new"]["night"] == "2026-11-21"
    files = [stored(run) for run in copies]
    pairs = [(files[0][one["old_key"]], files[1][one["key"]]) for one in (*broken, *found["mended"])]
    page = Path("tonight.html")
    assert shown(page) == [data for pair in pairs for data in pair] + [files[1][one["key"]] for one in alone]
    first = broken[0]
    words = sentence(first["class_name"], first["predicted_class_name"])
    assert f"<h4>{words}</h4>" in page.read_text() and ", now predicted " in words
    _, out, _ = call("compare", *copies)
    assert f"{first['key']}  {words}" in out and "2026-11-20 -> 2026-11-21" in out
    assert max(map(len, out.splitlines())) <= 100 and "classes" not in out.split("\n")[0]


def test_many_failures_are_limited_and_the_rest_is_named(call: Any, copies: tuple[str, str]) -> None:
    """As many cards as asked for; how many more there are, and two commands that give them."""
    call("compare", *copies, "--html", "all.html", "--json")
    code, out, _ = call("compare", *copies, "--html", "one.html", "--examples", 1, "--json")
    found, page = json.loads(out), Path("one.html").read_text()
    left = found["num_new_failures"] - 1
    assert code == EXIT_OK and f"{left} more are not shown here" in page
    assert f"--examples {left + 1}" in page and "riskforge inspect " in page and "--filter" in page
    assert page.count("<article") == sum(1 for name in ("new_failures", "mended", "unpaired_failures") if found[name])
    assert Path("all.html").read_text().count("<article") > 3


def test_a_page_replaces_its_own_kind_only(call: Any, copies: tuple[str, str]) -> None:
    """A wrong name must not cost a run its report."""
    code, _, err = call("compare", *copies, "--html", f"{copies[0]}/report.html")
    assert code == EXIT_USER and "--html: " in err and "was not written by this option" in err
    for _ in range(2):
        assert call("compare", *copies, "--html", "deep/page.html")[0] == EXIT_OK
    assert Path("deep/page.html").read_text().startswith(PAGE_BEGINNING)


def test_a_limit_is_marked_where_it_was_crossed(call: Any, copies: tuple[str, str]) -> None:
    """In the requests' rows, in the error rate's cells, and nowhere else; in Markdown, too."""
    options = ("--max-error-increase", 0, "--html", "p.html", "--markdown", "p.md", "--json")
    code, out, err = call("compare", *copies, *options)
    found = json.loads(out)
    marked = [
        (row["request"], row["level"], name)
        for row in found["rows"]
        for name, metric in row["metrics"].items()
        if metric["crossed"]
    ]
    assert code == EXIT_DAMAGED and marked == [(name, "request", "error_rate") for name in ("panel", "fresh")]
    assert "limit exceeded: panel: error rate grew" in err
    page = Path("p.html").read_text()
    assert page.count('<td class="crossed">') == 2 == page.count("limit exceeded: error rate")
    text = Path("p.md").read_text()
    assert text.count("**") == 4 and "# `2026-11-21` against `2026-11-20`" in text
    assert "now predicted" in text.split("## New failures")[1]


def test_the_limit_of_valid_failures_is_the_strict_one(nights: Path) -> None:
    """Where several oracles know it; with one oracle in either run it is what that one says, and the words tell."""
    old, new = (read_scored_run(str(nights / f"nightly-{night}")) for night in TARGETS)
    limits = Limits(increases={"valid_failures": 0.0})
    flags = {"valid": new.is_error.astype(float), "strictly_valid": old.valid * 0}
    assert not crossed_limits(compare_runs(old, replace(new, **flags)), limits)
    flags = {"strictly_valid": new.is_error.astype(float), "valid": old.valid * 0}
    assert all(run.strictly_valid is not None for run in (old, new))
    crossing, *_ = crossed_limits(compare_runs(old, replace(new, **flags)), limits)
    assert crossing.metric == "strictly_valid_failures" and "valid failures (strictly) grew" in crossing.text
    assert not crossed_limits(compare_runs(old, replace(new, **flags | {"strictly_valid": None})), limits)


def test_classes_with_too_few_samples_are_named(call: Any, copies: tuple[str, str]) -> None:
    """With their numbers and what a comparison takes."""
    found = json.loads(call("compare", *copies, "--json")[1])
    few = [one for one in found["too_few"] if one["level"] == "class"]
    assert {one["group"] for one in few} == {"five", "eight"} and {one["request"] for one in few} == {"fresh"}
    assert all((one["num_old"], one["num_new"], one["num_needed"]) == (4, 4, 5) for one in few)
    [note] = found["notes"]
    assert "request 'fresh': 2 classes not compared" in note and "five (4 and 4)" in note and "the 5 samples" in note


def test_a_pinned_night_is_in_the_report(call: Any, copies: tuple[str, str]) -> None:
    """It stays when the report is written again; without the pinned run only tonight's images are there."""
    assert call("compare", copies[0], "--pin", "baseline.json")[0] == EXIT_OK
    code, out, _ = call("compare", copies[1], "--baseline", "baseline.json", "--html", "both.html", "--json")
    assert code == EXIT_OK
    found, store = json.loads(out), open_store(copies[1])
    pinned = read_pinned(store)
    assert pinned is not None and pinned.baseline == "baseline.json" and pinned.old.night == "2026-11-20"
    assert [one.key for one in pinned.new_failures] == [one["key"] for one in found["new_failures"]]
    both, (mine, theirs) = shown(Path("both.html")), (stored(copies[1]), stored(copies[0]))
    report = Path(copies[1], "report.html").read_text()
    assert 'id="tonight"' in report and "Against the baseline" in report
    assert f"New failures: {found['num_new_failures']}" in report
    shutil.move(copies[0], "away")
    call("compare", copies[1], "--baseline", "baseline.json", "--html", "alone.html")
    alone = shown(Path("alone.html"))
    assert set(alone) <= set(mine.values()) and set(both) <= {*mine.values(), *theirs.values()}
    assert len(both) == 2 * len(alone) - found["num_unpaired_failures"]
    assert "a baseline holds no images" in Path("alone.html").read_text()
    assert call("report", copies[1])[0] == EXIT_OK
    assert "a baseline holds no images" in Path(copies[1], "report.html").read_text()
    assert call("verify", copies[1])[0] == EXIT_OK


def test_a_bent_comparison_is_named_and_the_report_is_written(call: Any, copies: tuple[str, str]) -> None:
    """A file of others: neither the report nor the end of a run depends on it."""
    for text in ("{", "[]", '{"old": 3}', '{"confidence": NaN}'):
        Path(copies[1], "comparison.json").write_text(text)
        with pytest.raises(CorruptShardError, match=r"comparison\.json: cannot be read as a comparison"):
            read_pinned(open_store(copies[1]))
        assert call("report", copies[1])[0] == EXIT_OK
        assert "cannot be read as a comparison" in Path(copies[1], "report.html").read_text()


def test_a_run_keeps_a_bounded_comparison(call: Any, copies: tuple[str, str]) -> None:
    document = json.loads(call("compare", *copies, "--json")[1])
    store = open_store(copies[1])
    keep_pinned(store, document | {"new_failures": document["new_failures"][:1] * (MAX_KEPT + 5)})
    pinned = read_pinned(store)
    assert pinned is not None and len(pinned.new_failures) == MAX_KEPT


def test_a_rescored_folder_shows_the_images_of_its_run(call: Any, copies: tuple[str, str]) -> None:
    """On either side; the nights have one date, so that their names tell them apart; without images that is said."""
    assert call("rescore", copies[0], "--target", TARGETS["2026-11-21"])[0] == EXIT_OK
    [folder] = Path(copies[0], "rescored").iterdir()
    for pair in ((copies[0], folder), (folder, copies[0])):
        found = json.loads(call("compare", *pair, "--html", "p.html", "--json")[1])
        changed = [*found["new_failures"], *found["mended"]]
        files = stored(copies[0])
        assert changed and not found["unpaired_failures"]
        assert shown(Path("p.html")) == [files[one["key"]] for one in changed for _ in range(2)]
        assert found["old"]["night"] != found["new"]["night"]
    for tar in Path(copies[0]).glob("shards/*.tar"):
        tar.unlink()
    assert call("compare", copies[0], folder, "--html", "p.html")[0] == EXIT_OK
    assert shown(Path("p.html")) == [] and "image not stored" in Path("p.html").read_text()


def test_a_run_that_was_written_again_lends_no_wrong_images(call: Any, copies: tuple[str, str]) -> None:
    """A folder of that name holds another night now: its samples have the keys, and not the scores."""
    call("compare", copies[0], "--pin", "baseline.json")
    shutil.rmtree(copies[0])
    shutil.copytree(copies[1], copies[0])
    call("compare", copies[1], "--baseline", "baseline.json", "--html", "p.html")
    found = json.loads(call("compare", copies[1], "--baseline", "baseline.json", "--json")[1])
    assert len(shown(Path("p.html"))) == sum(len(found[f"{kind}"]) for kind in ("new_failures", "mended")) + len(
        found["unpaired_failures"]
    )


@pytest.mark.parametrize(
    ("uri", "manifest", "night"),
    [
        ("runs/a-2026-11-20", {"job": {"requests": [{"fresh": "2026-11-22"}]}}, "2026-11-22"),
        ("runs/2026-11-19/a-2026-11-20", {"timing": {"finished": 1.8e9}}, "2026-11-20"),
        ("s3://bucket/a-2026-99-20", {"timing": {"finished": 1.8e9, "run_seconds": 0}}, "2027-01-15"),
        ("runs/120260-11-20", {"job": {"requests": [{}]}, "timing": {"finished": "soon"}}, ""),
    ],
)
def test_the_date_of_a_night(uri: str, manifest: dict[str, Any], night: str) -> None:
    assert night_of(manifest, uri) == night


def test_nights_of_one_date_have_their_names(nights: Path) -> None:
    old, new = (read_scored_run(str(nights / f"nightly-{night}")) for night in TARGETS)
    assert night_names(old, new) == ("2026-11-20", "2026-11-21")
    new = replace(new, night=old.night)
    assert night_names(old, new) == ("nightly-2026-11-20", "2026-11-20 nightly-2026-11-21")
    assert night_names(old, replace(new, name="other")) == ("2026-11-20 composed", "2026-11-20 other")
    assert len(set(night_names(old, old))) == 2


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_of_hostile_names(call: Any, copies: tuple[str, str], browser: Browser, width: int) -> None:
    """Names from outside are text; nothing is wider than the window, images are seen, no script runs."""
    document = json.loads(call("compare", *copies, "--fail-on", "any-significant", "--json")[1])
    for kind in ("new_failures", "mended", "unpaired_failures"):
        names = dict.fromkeys(("class_name", "context", "predicted_class_name", "request"), HOSTILE)
        document[kind] = [one | names for one in document[kind]]
    document["new"] |= {"night": HOSTILE, "address": HOSTILE}
    document["notes"] += [HOSTILE]
    document["rows"] = [row | {"group": HOSTILE} for row in document["rows"]]
    document["crossed"] = [HOSTILE]
    page = Path("page.html")
    document["new"]["address"] = copies[1]
    page.write_bytes(comparison_page(Comparison.model_validate(document), 50))
    browser.complaints.clear()
    browser.look(width)
    browser.open(page.absolute().as_uri())
    assert browser.evaluate("document.querySelectorAll('script').length") == 0
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("[...document.images].every((one) => one.naturalWidth > 0)")
    assert browser.evaluate("document.images.length") >= 2 * len(document["new_failures"])
    assert browser.evaluate("document.querySelector('h4').textContent").startswith("</h4><script>")
    assert browser.evaluate("document.title") != "owned" and browser.complaints == []
