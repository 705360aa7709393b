"""The report of a frontier, as a page in a real browser where there is one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from chromium import requested, set_device, start_chromium, until
from made_frontier import frontier, language_modelling
from shoal.evaluate.bootstrap import Score
from shoal.evaluate.frontier_result import Example, FrontierResult, Refused
from shoal.evaluate.report import charts, render, verdict, write_report

HOSTILE = (
    "<script>window.hacked = 1</script>",
    "</script><img src=x onerror='window.hacked = 1'>",
    '" onmouseover="window.hacked=1" x="',
    "<!--<script>{{ 7 * 7 }}{% raw %}${window.hacked = 1}",
    "W" * 400,
    "Привет, 世界 — مرحبا بالعالم ‮abc 👩‍👩‍👧",
    "line\none\ttab & <b>bold</b>",
)
WIDTHS = {"laptop": (1280, 800), "phone": (390, 844)}


def hostile() -> FrontierResult:
    """Every text of the result is one that a page must not take at its word."""
    result = frontier()
    script, image, attribute, template, word, other, markup = HOSTILE
    labels = dict(zip((band.label for band in result.arms[0].by_length), (attribute, word, other), strict=True))
    arms = [
        replace(
            one,
            name=f"{HOSTILE[number % len(HOSTILE)]} {number}",
            policy=one.policy if one.policy == "dense" else f"{one.policy} {script}",
            by_length=tuple(replace(band, label=labels[band.label]) for band in one.by_length),
        )
        for number, one in enumerate(result.arms)
    ]
    metrics = tuple(replace(m, label=label) for m, label in zip(result.metrics, (image, word), strict=True))
    outputs = dict(zip((one.name for one in arms), HOSTILE, strict=False))
    return replace(
        result,
        task=script,
        model=(word, template),
        metrics=metrics,
        arms=tuple(arms),
        refused=(Refused(name=word, reason=image), Refused(name=other, reason=markup)),
        examples=(
            Example(prompt=attribute, references=(word, template), outputs=outputs),
            Example(prompt=word, references=(), outputs={word: "half a pair \ud800"}),
        ),
        conditions={script: image, "nested": {"a": [template, word]}},
        settings={word: HOSTILE},
    )


class Elements(HTMLParser):
    """Names, attributes and texts of a page, as a browser without scripts reads it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.starts: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.starts.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_every_text_is_escaped(tmp_path: Path):
    page = write_report(hostile(), tmp_path / "report.html").read_text(encoding="utf-8")
    elements = Elements(page)
    tags = [tag for tag, _ in elements.starts]
    assert tags.count("script") == 2
    assert "img" not in tags
    assert not [name for _, attributes in elements.starts for name in attributes if name.startswith("on")]
    assert set(HOSTILE) <= set(elements.texts)
    assert not list(tmp_path.glob(".*.part"))


def test_nothing_is_loaded_from_elsewhere():
    elements = Elements(render(frontier()))
    links = [v for _, attributes in elements.starts for n, v in attributes.items() if n in ("src", "href", "action")]
    assert links == ["data:,"]


def test_the_tables_hold_the_numbers():
    page = render(frontier())
    texts = " ".join(" ".join(Elements(page).texts).split()).replace("\N{MINUS SIGN}", "-")
    assert "64.4 63.4 to 65.4 -0.6 -1.0 to -0.2" in texts, (
        "skipdecode at 1/2: BLEU, its interval, its difference to dense"
    )
    assert "the router needs training: shoal tune --policy first" in texts
    assert "at depths 1/2 and 1/3 nobody wins" in texts
    assert "310" in texts, "MFLOP of the dense arm's decode passes"


def test_costs_are_shares_of_the_first_dense_arm():
    data = charts(frontier())
    small = data["arms"][-1]
    assert small["costs"]["decode.flops"] == pytest.approx(0.25)
    assert "decode.mean_layers" not in small["costs"], "3 layers of another model are not 3 of these 12"
    half = next(one for one in data["arms"] if one["depth"] == 0.5)
    assert half["costs"]["decode.mean_layers"] == pytest.approx(0.5)
    assert half["costs"]["decode.flops"] == pytest.approx(0.55)
    json.dumps(data, allow_nan=False)


def test_a_difference_whose_interval_holds_zero_is_none():
    bleu, errors = frontier().metrics
    assert verdict(Score(-0.5, -0.9, -0.1), bleu) == "worse"
    assert verdict(Score(-0.5, -0.9, -0.1), errors) == "better"
    assert verdict(Score(-0.5, -1.1, 0.1), bleu) == "same"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Of all tests here."""
    with start_chromium() as driver:
        yield driver


def open_page(browser: Any, page: Path, *, size: tuple[int, int], scheme: str = "light") -> list[str]:
    """Load the page; returns the addresses that it asked for."""
    browser.get("about:blank")
    set_device(browser, size=size, scheme=scheme)
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(page.as_uri())
    return requested(browser)


def assert_sound(browser: Any) -> None:
    """No message on the console, no scrolling sideways, nothing that came in with a text has run."""
    assert browser.get_log("browser") == []
    across = browser.execute_script("return [document.scrollingElement.scrollWidth, innerWidth]")
    assert across[0] <= across[1]
    assert browser.execute_script("return window.hacked === undefined")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_opens(browser: Any, tmp_path: Path, width: str, scheme: str):
    page = write_report(frontier(), tmp_path / "report.html")
    requests = open_page(browser, page, size=WIDTHS[width], scheme=scheme)
    until(lambda: browser.execute_script("return document.querySelectorAll('.plot svg').length === 3"))
    assert {url for url in requests if not url.startswith("data:")} == {page.as_uri()}
    assert_sound(browser)
    assert browser.execute_script("return innerWidth") == WIDTHS[width][0]
    marks = browser.execute_script("return document.querySelectorAll('#frontier .mark[tabindex]').length")
    assert marks == len(frontier().arms)
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 300) == (scheme == "dark")


def test_pointing_at_an_arm_shows_its_numbers(browser: Any, tmp_path: Path):
    from selenium.webdriver import ActionChains

    page = write_report(frontier(), tmp_path / "report.html")
    open_page(browser, page, size=WIDTHS["laptop"])
    until(lambda: browser.execute_script("return document.querySelectorAll('.plot svg').length === 3"))
    mark = browser.find_element("css selector", "#frontier [aria-label*='skipdecode@0.5']")
    ActionChains(browser).move_to_element(mark).perform()
    tip = browser.find_element("css selector", "#frontier .tip")
    assert tip.is_displayed()
    assert tip.text.splitlines() == [
        "shoal-e2e skipdecode@0.5", "6.00 of 12 layers", "BLEU 64.4 (63.4 to 65.4)", "FLOPs, decode: 55%",
    ]  # fmt: skip

    # Another cost leaves out the model whose layers are others; a series that is switched off goes away.
    choose = "const s = document.querySelector('#frontier [data-choice=cost]'); s.value = [...s.options].findIndex("
    browser.execute_script(
        f"{choose} o => o.text === 'layers per token, decode'); s.dispatchEvent(new Event('change'))"
    )
    count = "return document.querySelectorAll('#frontier .mark[tabindex]').length"
    assert browser.execute_script(count) == len(frontier().arms) - 1
    assert "small-3 dense" in browser.find_element("css selector", "#frontier .absent").text
    browser.find_element("xpath", "//*[@id='frontier']//button[contains(., 'unified')]").click()
    assert browser.execute_script(count) == len(frontier().arms) - 4
    assert_sound(browser)


@pytest.mark.parametrize("width", WIDTHS)
def test_hostile_texts_stay_texts(browser: Any, tmp_path: Path, width: str):
    open_page(browser, write_report(hostile(), tmp_path / "report.html"), size=WIDTHS[width])
    until(lambda: browser.execute_script("return document.querySelectorAll('.plot svg').length === 3"))
    browser.execute_script("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert browser.execute_script("return document.querySelector('h1').textContent") == HOSTILE[0]
    for number in range(len(hostile().arms)):
        browser.execute_script(
            "const m = document.querySelectorAll('#frontier .mark[tabindex]')[arguments[0]]; if (m) m.focus()", number
        )
        assert_sound(browser)


def test_a_result_with_little_in_it(browser: Any, tmp_path: Path):
    open_page(browser, write_report(language_modelling(), tmp_path / "report.html"), size=WIDTHS["phone"])
    until(lambda: browser.execute_script("return document.querySelectorAll('.plot svg').length === 2"))
    assert_sound(browser)
    text = browser.find_element("tag name", "main").text
    assert "Effect of output length" not in text
    assert "Side by side" not in text
