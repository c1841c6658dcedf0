"""The page of a review as raters have it: keys, touches and a lost server in a headless Chromium."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from engine.data.review.answers import last_answers, read_answers
from engine.data.stores.base import Store
from engine.studies.review.design import order_of
from engine.studies.review.images import ReviewImages
from engine.studies.review.options import DrawOptions
from engine.studies.review.page import file_page
from engine.studies.review.program import open_review
from engine.studies.review.returned import import_files
from tests.browser import CHROMIUM, Browser
from tests.pair_cases import DIGITS
from tests.review_cases import make_reviewed_run, open_small

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
SHOWS = "document.querySelector('#stage').ariaBusy === 'false' && !document.querySelector('#work').hidden"
COUNT = "document.querySelector('#count').textContent"
NOTICE = "document.querySelector('#notice').hidden ? '' : document.querySelector('#notice').textContent"
ENDED = "!document.querySelector('#end').hidden"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_reviewed_run(tmp_path_factory.mktemp("reviewed") / "run", size=16)


class Served:
    """The command in a process that can be killed."""

    def __init__(self, run: Store, state: Path) -> None:
        command = [sys.executable, "-m", "engine.cli", "review", run.uri, "--samples", "12", "--controls", "0"]
        self.process = subprocess.Popen(
            [*command, "--repeats", "1"], env=os.environ | {"XDG_STATE_HOME": str(state)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert self.process.stdout is not None
        lines = [self.process.stdout.readline() for _ in range(2)]
        self.url = lines[1].removeprefix("page: ").strip()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def begin(page: Browser, url: str, name: str) -> None:
    page.open(url)
    page.type(f"{name}\n")
    page.wait_for(SHOWS)


def answer(page: Browser, keys: str, wanted: str) -> None:
    """Type, and wait for the count that follows and the next image."""
    page.wait_for(SHOWS)
    page.type(keys)
    page.wait_for(f"{COUNT}.startsWith({wanted!r})")


def choices_of(run: Store, rater: str, design: str) -> dict[str, int]:
    rows = last_answers(read_answers(run)).to_pylist()
    return {row["item"]: row["answer_class"] for row in rows if (row["rater"], row["design"]) == (rater, design)}


def test_two_raters_and_a_killed_server(browser: Browser, run: Store, tmp_path: Path) -> None:
    """One key an image, undo, a killed server whose answers come later, a reload, and a second rater meanwhile."""
    served = Served(run, tmp_path / "state")
    design = open_review(run.uri, DrawOptions(num_samples=12, num_controls=0, num_repeats=1)).design
    order = [item.id for item, _ in order_of(design, "ann")]
    browser.complaints.clear()
    browser.look(1280)
    begin(browser, served.url, "ann")
    # An image of 16 pixels in whole steps, nearest neighbour; its original size on request.
    width = "document.querySelector('#stage img').width"
    rendering = "getComputedStyle(document.querySelector('#stage img')).imageRendering"
    assert browser.evaluate(width) == 448 and browser.evaluate(rendering) == "pixelated"
    browser.type("+")
    assert browser.evaluate(width) == 16
    browser.type("+")
    for number, key in enumerate("38-", 1):
        answer(browser, key, f"{number} of 13")
    assert choices_of(run, "ann", design.digest) == dict(zip(order, (3, 8, -1), strict=False))
    answer(browser, "\b", "2 of 13")
    # The answer that was taken back is marked, and the same image comes again.
    assert browser.evaluate("document.querySelector('.was').textContent").startswith("-None of these")
    assert choices_of(run, "ann", design.digest) == dict(zip(order, (3, 8), strict=False))
    answer(browser, "5", "3 of 13")
    with Browser(tmp_path / "second") as second:
        second.look(1280)
        begin(second, served.url, "bob")
        for number, key in enumerate("11", 1):
            answer(second, key, f"{number} of 13")
            answer(browser, "7", f"{number + 3} of 13")
        served.kill()
        for number in (6, 7):
            answer(browser, "9", f"{number} of 13")
        assert "2 answers are kept in this browser" in browser.evaluate(NOTICE)
        assert len(choices_of(run, "ann", design.digest)) == 5
        # The tab is closed with its answers, and opened when the server is back: its address is the same.
        browser.send("Page.navigate", url="about:blank")
        again = Served(run, tmp_path / "state")
        assert again.url == served.url
        browser.open(again.url)
        browser.wait_for(SHOWS)
        browser.wait_for(f"{COUNT} === '7 of 13'")
        wanted = dict(zip(order, (3, 8, 5, 7, 7, 9, 9), strict=False))
        assert choices_of(run, "ann", design.digest) == wanted
        # Bob's page was open all the time.
        answer(second, "2", "3 of 13")
        deadline = time.monotonic() + 200
        while len(choices_of(run, "bob", design.digest)) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert second.evaluate(NOTICE) == ""
    for number in range(8, 14):
        answer_last = number == 13
        browser.wait_for(SHOWS)
        answer(browser, "4", f"{number} of 13")
        assert browser.evaluate(ENDED) is answer_last
    # Undo from the last page, too.
    browser.type("\b")
    browser.wait_for(SHOWS)
    assert browser.evaluate(COUNT) == "12 of 13"
    again.kill()


def open_file(browser: Browser, path: Path, page: bytes, name: str) -> None:
    path.write_bytes(page)
    begin(browser, path.as_uri(), name)


HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(2)>', "\u202egnp.exe", "x" * 200, "'", "{{7*7}}"]


def test_a_file_on_a_telephone(browser: Browser, run: Store, tmp_path: Path) -> None:
    """By touch in a small window, with planted class names; what is downloaded is imported; a reload goes on."""
    review = open_small(run.uri, num_samples=4, num_controls=1, num_repeats=1)
    images = ReviewImages(review.corpus, review.design)
    planted = review.design.model_copy(update={"labels": (*HOSTILE, *DIGITS[6:])})
    browser.complaints.clear()
    browser.look(360, 640)
    open_file(browser, tmp_path / "planted.html", file_page(planted, "", images.png), "ann")
    texts = browser.evaluate("[...document.querySelectorAll('#choices bdi')].map((one) => one.textContent)")
    assert texts == [*HOSTILE, *DIGITS[6:]]
    assert browser.evaluate("document.querySelectorAll('script').length") == 3
    assert browser.evaluate("document.querySelectorAll('#choices img').length") == 0
    assert browser.evaluate("document.documentElement.scrollWidth") == 360
    open_file(browser, tmp_path / "page.html", file_page(review.design, "", images.png), "ann")
    images.close()
    boxes = browser.evaluate(
        "[...document.querySelectorAll('#answers button, #stage img')].map((one) => {"
        " const b = one.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; })"
    )
    assert len(boxes) == 12 and all(box[0] >= 0 and box[2] <= 360 and box[3] <= 640 for box in boxes)
    assert all(box[3] - box[1] >= 44 for box in boxes)
    for number in (1, 2, 3):
        browser.wait_for(SHOWS)
        browser.tap("#choices button:nth-child(4)" if number < 3 else "#others button")
        browser.wait_for(f"{COUNT}.startsWith('{number} of')")
    browser.tap("#undo")
    browser.wait_for(f"{COUNT}.startsWith('2 of')")
    browser.open((tmp_path / "page.html").as_uri())
    browser.wait_for(SHOWS)
    assert browser.evaluate(COUNT) == f"2 of {len(review.design.items)}"
    downloads = tmp_path / "downloads"
    browser.send("Page.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))
    browser.click("#save")
    deadline = time.monotonic() + 60
    while not (files := list(downloads.glob("*.json"))):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (imported,) = import_files(run, files)
    assert (imported.rater, imported.num_answers, imported.num_new, imported.num_answered) == ("ann", 4, 4, 2)
    assert set(choices_of(run, "ann", review.design.digest).values()) == {3} and browser.complaints == []


def test_many_classes_and_pairs(browser: Browser, run: Store, tmp_path: Path) -> None:
    """A thousand classes: the beginning of a name and Enter; 40: two keys; pairs: an arrow."""
    review = open_small(run.uri, num_samples=4, num_controls=0, num_repeats=0)
    images = ReviewImages(review.corpus, review.design)

    def stored() -> list[int]:
        log = "Object.keys(localStorage).filter((one) => one.includes(':answers:')).map((one) => localStorage[one])"
        return [one["choice"] for one in json.loads(browser.evaluate(f"({log})[0]"))["answers"]]

    def fresh(design: Any) -> None:
        open_file(browser, tmp_path / "page.html", file_page(design, "ann", images.png), "")

    browser.look(1280)
    browser.complaints.clear()
    names = [f"kind {number:03d}" for number in range(997)]
    fresh(review.design.model_copy(update={"labels": (*names, "zebra", "tabby cat", "cat")}))
    browser.evaluate("localStorage.clear()")
    answer(browser, "zeb\n", "1 of 4")
    answer(browser, "cat\n", "2 of 4")
    answer(browser, "-", "3 of 4")
    answer(browser, "\b", "2 of 4")
    answer(browser, "tab\n", "3 of 4")
    assert stored() == [997, 999, -1, -1, 998]
    fresh(review.design.model_copy(update={"labels": (*(f"n{number}" for number in range(40)), "apple", "aquarium")}))
    browser.evaluate("localStorage.clear()")
    answer(browser, "ap", "1 of 4")
    answer(browser, "aq", "2 of 4")
    answer(browser, "/n17\n", "3 of 4")
    assert stored() == [40, 41, 17]
    images.close()
    pairs = open_small(run.uri, is_pairs=True, num_samples=6, num_repeats=0)
    images = ReviewImages(pairs.corpus, pairs.design)
    fresh(pairs.design)
    browser.evaluate("localStorage.clear()")
    wanted = []
    for number, (item, is_swapped) in enumerate(order_of(pairs.design, "ann")[:3], 1):
        assert (
            browser.evaluate("document.querySelector('#question').textContent")
            == f"Which is the better “{item.question}”?"
        )
        browser.press(("ArrowLeft", "ArrowRight", "ArrowLeft")[number - 1])
        browser.wait_for(f"{COUNT}.startsWith('{number} of')")
        browser.wait_for(SHOWS)
        wanted.append((number == 2) != is_swapped)
    answer(browser, "-", "4 of 6")
    assert stored() == [*map(int, wanted), -1]
    browser.wait_for(SHOWS)
    browser.click("#stage .side", 1)
    browser.wait_for(f"{COUNT}.startsWith('5 of')")
    images.close()
    assert browser.complaints == []
