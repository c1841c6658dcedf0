"""The report as a user has it: clicks and keys in a headless Chromium, at a desk and on a telephone."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from engine.data.stores.base import Store
from tests.browser import CHROMIUM, Browser
from tests.pair_cases import GROUP, make_drawn_run, noise
from tests.test_report import BETWEEN, DIGITS, EVERYTHING, HOSTILE, PLAIN, failing, make_run, page_of, read_metadata

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
BIDI = "\u202egnp.exe\u2066 \u200b"
TILES = "[...document.querySelectorAll('#tiles .tile:not([hidden])')].map((one) => one.dataset.key)"
TITLE = "document.querySelector('#sample-key').textContent"
IS_OPEN = "document.querySelector('#sample').open"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = make_run(
        tmp_path_factory.mktemp("report") / "run", [BETWEEN, PLAIN, EVERYTHING], change=failing(0.1), size=32
    )
    page_of(store, labels=DIGITS)
    return store


@pytest.fixture
def page(browser: Browser, run: Store) -> Browser:
    """A fresh page in a wide window."""
    browser.complaints.clear()
    browser.look(1280)
    browser.open(run.path("report.html").as_uri())
    return browser


def rows_of(run: Store) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in read_metadata(run)}


@pytest.mark.parametrize("score", ["risk", "conformity", "kldb", "entropy", "p_label", "conformity_margin"])
def test_sorting_by_a_score(page: Browser, run: Store, score: str) -> None:
    """Highest first, then lowest first; samples without a score come last in both."""
    rows = rows_of(run)
    page.choose("#by-sort", score)
    falling = page.evaluate(TILES)
    page.click("#order")
    rising = page.evaluate(TILES)
    for keys, sign in ((falling, -1), (rising, 1)):
        scored = [key for key in keys if rows[key]["status"] == "ok"]
        assert keys[: len(scored)] == scored and len(scored) > 50
        values = [sign * rows[key][score] for key in scored]
        assert values == sorted(values)
    assert page.complaints == []


@pytest.mark.parametrize("score", ["risk", "conformity", "kldb", "entropy", "p_label"])
def test_ranges_of_a_score(page: Browser, run: Store, score: str) -> None:
    """Between two numbers, above one, and with a request; whoever opens the address sees the same."""
    rows = rows_of(run)
    every = page.evaluate(TILES)
    values = sorted(rows[key][score] for key in every if rows[key]["status"] == "ok")
    low, high = values[len(values) // 4], values[3 * len(values) // 4]
    page.click(".ranges summary")
    page.choose(f"#min-{score}", repr(low))
    above = set(page.evaluate(TILES))
    assert above == {key for key in every if rows[key]["status"] == "ok" and rows[key][score] >= low}
    page.choose(f"#max-{score}", repr(high))
    page.choose("#by-request", "everything")
    both = page.evaluate(TILES)
    assert set(both) == {key for key in above if rows[key][score] <= high and rows[key]["request"] == "everything"}
    assert page.evaluate("document.querySelector('#count').textContent").startswith(f"{len(both)} of")
    page.open(page.evaluate("location.href"))
    assert page.evaluate(TILES) == both
    page.click("#reset")
    assert page.evaluate(TILES) == every and page.complaints == []


def test_a_sample_opens_and_the_keys_step_through(page: Browser, run: Store) -> None:
    """By a click, with all its metadata; arrows step through what is shown; Escape closes and gives the focus back."""
    rows = rows_of(run)
    page.choose("#by-sort", "risk")
    keys = page.evaluate(TILES)
    page.click("#tiles .tile:not([hidden])", 1)
    assert page.evaluate(IS_OPEN) and page.evaluate(TITLE) == keys[1]
    fields = page.evaluate(
        "[...document.querySelectorAll('#sample-fields tr')].map((one) => one.children[0].textContent)"
    )
    assert fields == list(rows[keys[1]])
    assert rows[keys[1]]["sha256"] in page.evaluate("document.querySelector('#sample-fields').textContent")
    for key, place in (("ArrowRight", 2), ("ArrowRight", 3), ("ArrowLeft", 2)):
        page.press(key)
        assert page.evaluate(TITLE) == keys[place]
    page.click("#sample #previous")
    assert page.evaluate(TITLE) == keys[1]
    for _ in range(3):
        page.press("ArrowLeft")
    assert page.evaluate(TITLE) == keys[0] and page.evaluate("document.querySelector('#previous').disabled")
    page.press("Escape")
    # The focus comes back with the dialog's event `close`, which a browser sends a little later.
    page.wait_for(f"!({IS_OPEN}) && document.activeElement.dataset.key === {keys[0]!r}")
    page.press("Enter")
    assert page.complaints == []


def test_the_keyboard_opens_a_sample(page: Browser) -> None:
    """Tiles take the focus and open on Enter, as buttons do."""
    page.evaluate("document.querySelector('#tiles .tile').focus()")
    page.send("Input.dispatchKeyEvent", type="keyDown", key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r")
    page.send("Input.dispatchKeyEvent", type="keyUp", key="Enter", code="Enter", windowsVirtualKeyCode=13)
    assert page.evaluate(IS_OPEN) and page.complaints == []


def test_a_point_opens_its_sample(page: Browser, run: Store) -> None:
    """Every scored sample of the gallery has a point, which opens it even where a filter hides its tile."""
    rows = rows_of(run)
    points = page.evaluate("[...document.querySelectorAll('.plot .dot')].map((one) => one.dataset.key)")
    scored = {key for key in page.evaluate(TILES) if rows[key]["status"] == "ok"}
    assert set(points) == scored and len(points) == len(scored)
    page.choose("#by-request", "everything")
    hidden = next(place for place, key in enumerate(points) if rows[key]["request"] == "between")
    page.evaluate(f"document.querySelectorAll('.plot .dot')[{hidden}].dispatchEvent(new MouseEvent('click'))")
    assert page.evaluate(IS_OPEN) and page.evaluate(TITLE) == points[hidden]
    assert page.evaluate("document.querySelectorAll('.plot .chosen').length") == 1
    assert page.complaints == []


def test_requests_differ_in_colour_and_shape(page: Browser) -> None:
    """Whoever sees no colours tells them by their shapes; a legend switches a request off in all charts."""
    shape = "(one) => one.getAttribute('d').replace(/^M[-0-9. ]+/, '')"
    series = page.evaluate(
        "[...document.querySelectorAll('.plot .dots')].map((group) => {"
        f"const shapes = new Set([...group.querySelectorAll('.dot')].map({shape}));"
        "return [getComputedStyle(group.querySelector('.dot')).stroke, ...shapes]; })"
    )
    assert [len(one) for one in series] == [2, 2, 2]
    assert len({one[0] for one in series}) == len({one[1] for one in series}) == 3
    page.click("#scatter .legend button", 1)
    off = "[...document.querySelectorAll('.plot .dots, .charts .series')].filter((one) => one.hasAttribute('hidden'))"
    assert set(page.evaluate(f"{off}.map((one) => one.dataset.series)")) == {"1"}
    pressed = "[...document.querySelectorAll('.legend button[data-series=\"1\"]')].map((one) => one.ariaPressed)"
    assert page.evaluate(pressed) == ["false", "false"]


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("dark", [False, True])
def test_nothing_sticks_out_and_texts_can_be_read(page: Browser, width: int, dark: bool) -> None:
    """The page does not scroll sideways at either width, and its texts keep the contrast that WCAG asks for."""
    page.look(width, dark=dark)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    pairs = page.evaluate(
        "(() => { const style = getComputedStyle(document.documentElement);"
        "const make = (name) => { const one = document.createElement('i'); one.style.color = `var(${name})`;"
        "document.body.append(one); const found = getComputedStyle(one).color; one.remove(); return found; };"
        "return ['--ink', '--soft', '--accent', '--bad', '--good'].map((name) => [make(name), make('--card')]); })()"
    )
    for text, ground in pairs:
        assert contrast(text, ground) >= 4.5, (text, ground)
    page.click("#tiles .tile:not([hidden])")
    box = page.evaluate(
        "(() => { const b = document.querySelector('#sample').getBoundingClientRect(); return [b.x, b.right]; })()"
    )
    assert box[0] >= 0 and box[1] <= width


def told_by_oracles(record: dict[str, Any]) -> dict[str, Any]:
    """Two oracles that guided nothing, which differ on every third sample, and one that guided and errs."""
    first, place = record["oracle_class"], record["index"]
    said = {"zoo:o/first": first, "zoo:o/second": 8 if place % 3 == 0 else first, "zoo:o/third (guides)": 0}
    entries = [{"model": name, "predicted_class": index, "p_label": 0.5} for name, index in said.items()]
    return record | {"oracles": entries, "oracle_p_label_min": 0.995 if place % 2 else 0.5}


def test_answers_and_contexts_are_on_the_tiles_and_filter_them(browser: Browser, tmp_path: Path) -> None:
    """Of all oracles, in the order of labels, which is not that of the alphabet nor that of the job."""
    classes = {"classes": ["eight", "three", "four"], "count": 6, "contexts": ["", "red ink"]}
    requests = [{"name": "guided", "method": "risky"} | classes, {"name": "plain", "method": "prompt"} | classes]
    store = make_run(tmp_path / "run", requests, change=told_by_oracles, size=32)
    page_of(store, labels=DIGITS)
    rows = rows_of(store)
    browser.complaints.clear()
    browser.look(1280)
    browser.open(store.path("report.html").as_uri())
    offers = "(name) => [...document.querySelector('#by-' + name).options].slice(1).map((one) => one.textContent)"
    assert browser.evaluate(f"({offers})('class')") == ["three", "four", "eight"]
    for name in ("target", "oracle"):
        shown = browser.evaluate(f"({offers})('{name}')")
        known = [text for text in shown if text != "oracles disagree"]
        assert known == [text for text in DIGITS if text in known] and len(known) > 2

    def differ(row: dict[str, Any]) -> bool:
        return len({entry["predicted_class"] for entry in row["oracles"][:2]}) > 1

    wanted = {
        ("context", "red ink"): lambda row: row["context"] == "red ink",
        ("context", "no context"): lambda row: not row["context"],
        ("target", "three"): lambda row: row["predicted_class"] == 3,
        ("oracle", "oracles disagree"): differ,
        ("oracle", "three"): lambda row: not differ(row) and row["oracle_class"] == 3,
        ("outcome", "doubted"): lambda row: differ(row) or row["oracle_class"] != row["class_index"],
    }  # fmt: skip
    for (name, value), holds in wanted.items():
        browser.choose(f"#by-{name}", value)
        expected = {key for key, row in rows.items() if holds(row)}
        assert set(browser.evaluate(TILES)) == expected and 0 < len(expected) < len(rows), (name, value)
        browser.click("#reset")
    key = next(key for key, row in rows.items() if differ(row) and row["context"] and row["oracle_class"] == 3)
    text = browser.evaluate(f"document.querySelector('.tile[data-key={json.dumps(key)}]').innerText")
    for line in (
        "red ink",
        "oracles: 1 three, 1 eight",
        f"target: {DIGITS[rows[key]['predicted_class']]}",
        "strictly valid",
    ):
        assert line in text, line
    assert "all 2" not in text and "zero" not in text, "what guided is no independent answer"
    assert browser.complaints == []
    browser.look(400)
    ends = browser.evaluate(
        "[...document.querySelectorAll('.scroll th')].filter((one) => one.textContent.startsWith('Errors'))"
        ".map((one) => one.getBoundingClientRect().right)"
    )
    assert len(ends) == 2 and max(ends) <= 400, "the errors are seen without scrolling"


def contrast(first: str, second: str) -> float:
    """Contrast of two colours `rgb(r, g, b)` after WCAG 2."""
    lights = sorted(_luminance(one) for one in (first, second))
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(one) / 255 for one in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [one / 12.92 if one <= 0.03928 else ((one + 0.055) / 1.055) ** 2.4 for one in parts]
    return sum(weight * one for weight, one in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_planted_texts_stay_texts(browser: Browser, tmp_path: Path) -> None:
    """Class names, prompts, contexts and messages with markup, quotes, addresses of scripts and turning characters:
    nothing runs, nothing is added to the page, and each is shown as it is."""
    planted = [*HOSTILE[:3], "javascript:alert(3)", "' onmouseover='alert(4)", BIDI]
    request = {"name": "all", "method": "prompt", "classes": ["three", "eight"], "count": 1, "contexts": planted}
    labels = [*DIGITS[:8], planted[0], planted[1]]

    def change(record: dict[str, Any]) -> dict[str, Any]:
        return failing(0.3, "boom " + " ".join(planted))(record | {"prompt": planted[record["index"] % len(planted)]})

    store = make_run(tmp_path / "run", [request | {"classes": [3, 8]}], labels, change)
    page_of(store, labels=labels, title=planted[0])
    browser.complaints.clear()
    browser.look(1280)
    browser.open(store.path("report.html").as_uri())
    for key in browser.evaluate(TILES):
        browser.evaluate(f"document.querySelector('.tile[data-key={json.dumps(key)}]').click()")
        text = browser.evaluate("document.querySelector('#sample-fields').textContent")
        assert any(one in text for one in planted)
        browser.press("Escape")
    assert browser.evaluate("document.querySelectorAll('script').length") == 2
    attributes = "[...document.querySelectorAll('*')].flatMap((one) => [...one.attributes])"
    assert not browser.evaluate(f"{attributes}.some((one) => one.name.startsWith('on'))")
    assert not browser.evaluate(
        f"{attributes}.some((one) => /^\\s*javascript:/i.test(one.value) && !['title', 'value'].includes(one.name))"
    )
    assert browser.complaints == []


# Pairs ---------------------------------------------------------------------------------------------------------------

DUOS = "[...document.querySelectorAll('#duos .duo:not([hidden])')].map((one) => one.dataset.key)"
REQUESTS: list[dict[str, Any]] = [
    {"name": "triple", "method": "risky", "twin": True} | GROUP,
    {"name": "pair", "method": "risky", "twin": True, "classes": [3], "count": 4},
    {"name": "s" * 64, "method": "prompt"} | GROUP,
]


@pytest.fixture(scope="module")
def paired(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Samples with a start and a twin, with a twin alone, and with a start alone."""
    store = make_drawn_run(tmp_path_factory.mktemp("pairs") / "run", REQUESTS, noise(16, levels=4))
    page_of(store, labels=DIGITS)
    return store


@pytest.fixture
def pairs(browser: Browser, paired: Store) -> Browser:
    browser.complaints.clear()
    browser.look(1280)
    browser.open(paired.path("report.html").as_uri())
    return browser


def part(place: int, selector: str, what: str) -> str:
    """A property of a part of the shown pair at a place."""
    return f"[...document.querySelectorAll('#duos .duo:not([hidden])')][{place}].querySelector('{selector}').{what}"


@pytest.mark.parametrize("score", ["twin_distance", "start_distance", "twin_psnr_db", "risk"])
def test_pairs_are_sorted(pairs: Browser, paired: Store, score: str) -> None:
    """Those without the score come last in either direction."""
    rows = rows_of(paired)
    before = pairs.evaluate(DUOS)
    pairs.choose("#pairs-sort", score)
    falling = pairs.evaluate(DUOS)
    pairs.click("#pairs-order")
    for keys, sign in ((falling, -1), (pairs.evaluate(DUOS), 1)):
        known = [key for key in keys if rows[key][score] != -1]
        assert keys[: len(known)] == known and sorted(keys) == sorted(before) and len(known) >= 10
        values = [sign * rows[key][score] for key in known]
        assert values == sorted(values)
    pairs.choose("#pairs-sort", "")
    pairs.choose("#pairs-request", "pair")
    assert {rows[key]["request"] for key in pairs.evaluate(DUOS)} == {"pair"}
    assert pairs.evaluate("document.querySelector('#pairs-count').textContent") == f"4 of {len(before)} shown"
    assert pairs.complaints == []


def test_the_slider_wipes_by_keys_and_by_dragging(pairs: Browser, paired: Store) -> None:
    """It says what it does and how far it is; at its ends one image is whole."""
    cut = part(0, ".frame.wipes", "style.getPropertyValue('--cut')")
    assert pairs.evaluate(cut) == "0%" and pairs.evaluate(part(0, ".cut", "hidden"))
    pairs.evaluate(part(0, ".panels input", "focus()"))
    for _ in range(3):
        pairs.press("ArrowRight")
    assert pairs.evaluate(cut) == "3%" and not pairs.evaluate(part(0, ".cut", "hidden"))
    assert pairs.evaluate(part(0, ".panels input", "getAttribute('aria-valuetext')")) == "3 % unguided twin"
    key = pairs.evaluate(DUOS)[0]
    label = pairs.evaluate(part(0, ".panels input", "getAttribute('aria-label')"))
    assert label == f"Wipe from the sample to its unguided twin, {key}"
    pairs.click("#duos .duo .frame.wipes")
    assert pairs.evaluate(cut) == "50%"
    # Of the two halves the left one is the twin's.
    assert pairs.evaluate(part(0, ".over", "src")) == pairs.evaluate(part(0, "[data-kind=twins] img", "src"))
    pairs.choose("#pairs-with", "starts")
    assert pairs.evaluate(part(0, ".over", "src")) == pairs.evaluate(part(0, "[data-kind=starts] img", "src"))
    assert pairs.evaluate(part(0, "[data-kind=difference] span", "textContent")) == "to the start"
    # A pair has no choice.
    pairs.choose("#pairs-request", "pair")
    assert pairs.evaluate(part(0, ".over", "src")) == pairs.evaluate(part(0, "[data-kind=twins] img", "src"))
    assert pairs.complaints == []


def test_the_difference_is_drawn_and_amplified(pairs: Browser) -> None:
    """On the screen: four levels of difference, times sixteen and times two; black without."""

    def drawn() -> np.ndarray:
        box = pairs.evaluate(
            f"(() => {{ const b = {part(0, '.blend', 'getBoundingClientRect()')};"
            " return {x: b.x + 8, y: b.y + scrollY + 8, width: b.width - 16, height: b.height - 16, scale: 1}; })()"
        )
        shot = pairs.send("Page.captureScreenshot", clip=box, captureBeyondViewport=True)
        return np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")).astype(int)

    pairs.choose("#pairs-gain", "4")
    assert pairs.evaluate("document.querySelector('#pairs-gain + output').value").endswith(" 16")
    assert np.abs(drawn() - 64).max() <= 2
    pairs.evaluate("document.querySelector('#pairs-gain').focus()")
    for _ in range(3):
        pairs.press("ArrowLeft")
    assert np.abs(drawn() - 8).max() <= 1
    pairs.evaluate(f"{part(0, '.top', 'src')} = {part(0, '.bottom', 'src')}")
    pairs.wait_for(part(0, ".top", "complete"))
    assert drawn().max() == 0
    assert pairs.complaints == []


def test_a_pair_opens_in_the_gallery(pairs: Browser) -> None:
    """Closed, it leaves the reader where it was opened, or at the sample that the arrows led to."""
    key = pairs.evaluate(DUOS)[2]
    focus = "[document.activeElement.className, document.activeElement.dataset.key]"
    for presses in (0, 1):
        pairs.click("#duos .key", 2)
        assert pairs.evaluate(IS_OPEN) and pairs.evaluate(TITLE) == key
        for _ in range(presses):
            pairs.press("ArrowRight")
        shown = pairs.evaluate(TITLE)
        pairs.press("Escape")
        # The page moves the focus when it hears that the dialog was closed.
        pairs.wait_for("!location.hash.includes('open=')")
        assert pairs.evaluate(focus) == (["tile", shown] if presses else ["key mono", key])


@pytest.mark.parametrize(("width", "dark"), [(1280, True), (390, False), (320, True)])
def test_pairs_fit_the_window(pairs: Browser, width: int, dark: bool) -> None:
    """Every image and slider lies inside its card, and nothing is wider than the window."""
    pairs.look(width, dark=dark)
    assert pairs.evaluate("document.documentElement.scrollWidth") <= width
    inside = (
        "[...document.querySelectorAll('.duo')].every((card) => { const a = card.getBoundingClientRect();"
        " return [...card.querySelectorAll('img, input, dl, h4')].every((one) => {"
        " const b = one.getBoundingClientRect();"
        " return b.width > 40 && b.left >= a.left && b.right <= a.right && b.bottom <= a.bottom; }); })"
    )
    assert pairs.evaluate(inside) and pairs.complaints == []
    assert pairs.evaluate("[...document.querySelectorAll('.duo img')].every((one) => one.classList.contains('tiny'))")
