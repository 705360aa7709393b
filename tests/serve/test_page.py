"""The page of `shoal serve` in a real browser."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from chromium import (
    CONTRASTS,
    emulate_network,
    fill,
    one,
    press,
    press_ctrl_enter,
    requested,
    set_device,
    start_chromium,
    texts,
    until,
)  # fmt: skip
from scripted_server import ALL_LAYERS, MARKUP, Scripted

WIDTHS = {"laptop": (1280, 800), "phone": (360, 740)}


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[str]:
    """`shoal serve` as users start it; its address."""
    said = folder / "stderr"
    command = (sys.executable, "-m", "shoal.cli.main", "serve", "shoal-e2e", "--port", "0", *options)
    with said.open("w") as stderr, subprocess.Popen(command, stderr=stderr) as server:
        try:
            until(lambda: server.poll() is not None or "http://" in said.read_text(), timeout_s=60)
            assert server.poll() is None, said.read_text()
            yield re.findall(r"http://\S+/", said.read_text())[0]
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with the model that ships with Shoal."""
    with serving(tmp_path_factory.mktemp("open")) as url:
        yield url


@pytest.fixture
def locked_url(tmp_path: Path) -> Iterator[str]:
    """A server that asks for the key `sesame`."""
    (tmp_path / "keys").write_text("sesame\n")
    with serving(tmp_path, "--api-key-file", str(tmp_path / "keys")) as url:
        yield url


@pytest.fixture
def scripted_url() -> Iterator[str]:
    """A server of `Scripted`."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Scripted) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Of all tests here."""
    with start_chromium() as driver:
        yield driver


@pytest.fixture
def browser(chromium: Any) -> Iterator[Any]:
    """The browser with nothing on its console before; nothing may be there after a test, refused requests aside."""
    chromium.get("about:blank")
    chromium.get_log("browser"), chromium.get_log("performance")
    yield chromium
    emulate_network(chromium)
    assert [entry for entry in chromium.get_log("browser") if entry["source"] != "network"] == []


def open_page(
    browser: Any, url: str, *, width: str = "laptop", scheme: str = "light", motion: str = "no-preference"
) -> None:
    """Load the page as a device would, as if for the first time."""
    set_device(browser, size=WIDTHS[width], scheme=scheme, motion=motion)
    browser.get(url)
    browser.execute_script("localStorage.clear(); sessionStorage.clear()")
    browser.refresh()


def finish(browser: Any) -> None:
    """Wait for the end of a run."""
    until(lambda: "Generating" not in one(browser, "#status").text and not one(browser, "#stop").is_enabled())


def forecasts(browser: Any) -> list[str]:
    """Of the depths that are shown, once they are there."""
    until(lambda: all("Forecast" in text for text in shown_forecasts(browser)) and shown_forecasts(browser))
    return shown_forecasts(browser)


def shown_forecasts(browser: Any) -> list[str]:
    """What stands there now."""
    return [note.text for note in browser.find_elements("css selector", ".forecast") if note.is_displayed()]


def test_tokens_stream_in_the_colours_of_their_layers(browser: Any, server_url: str):
    from selenium.webdriver import Keys

    open_page(browser, server_url)
    (before,) = forecasts(browser)
    assert one(browser, "h1").text == "shoal-e2e"
    assert len(browser.find_elements("css selector", "#tuned option")) == 5
    one(browser, "input[type=range]").send_keys(Keys.ARROW_LEFT * 8)
    assert one(browser, ".setting output").text == "0.25, about 3 of 12 layers"
    until(lambda: forecasts(browser) != [before])
    assert len(browser.find_elements("css selector", ".bars rect")) > 1

    fill(browser, "#prompt", "name[The Mill], eatType[coffee shop], near[Avalon]")
    one(browser, "#generate").click()
    finish(browser)
    assert "The Mill" in one(browser, ".text").text
    assert one(browser, "#status").text.startswith("Depth 0.25: ")
    first, last = (one(browser, f".token:{which}-child") for which in ("first", "last"))
    assert first.get_attribute("title") == f"token 1, {ALL_LAYERS} of {ALL_LAYERS} layers"
    assert first.value_of_css_property("background-color") != last.value_of_css_property("background-color")
    assert " fewer FLOPs" in one(browser, ".saved").text.replace("\n", " ")
    rows = dict(zip(texts(browser, "#costs tbody th"), texts(browser, "#costs td"), strict=True))
    assert float(rows["Mean layers"].removesuffix(f" of {ALL_LAYERS}")) < 0.5 * ALL_LAYERS
    assert rows["Drafts accepted"] == "no drafting"

    asked = requested(browser)
    assert len(asked) > 3
    assert all(url.startswith((server_url, "about:", "data:")) for url in asked)


def test_drafting_is_counted(browser: Any, server_url: str):
    open_page(browser, server_url)
    forecasts(browser)
    browser.execute_script("document.querySelector('#draft').value = 'ngram'")
    one(browser, "#generate").click()
    finish(browser)
    assert " of " in texts(browser, "#costs td")[-1]


def test_two_depths_side_by_side(browser: Any, server_url: str):
    open_page(browser, server_url)
    one(browser, "#compare").click()
    assert len(forecasts(browser)) == 2
    assert len({box.rect["y"] for box in browser.find_elements("css selector", ".setting")}) == 1
    one(browser, "#generate").click()
    finish(browser)
    assert texts(browser, ".result h2") == ["ADepth 0.33", "BDepth 1.00"]
    outputs = [output.text for output in browser.find_elements("css selector", ".text")]
    said, clock = one(browser, "#difference").text, one(browser, "#clock").text
    assert said.startswith("Both depths gave the same" if outputs[0] == outputs[1] else "The first difference is token")
    assert clock.startswith("Wall clock of one run each, one after the other:")
    columns = [row.find_elements("tag name", "td") for row in browser.find_elements("css selector", "#costs tbody tr")]
    assert {len(cells) for cells in columns} == {2}
    assert columns[0][1].text == f"{ALL_LAYERS}.00 of {ALL_LAYERS}"

    # At a high temperature the depths take other words: the first that differs is marked in both.
    one(browser, "#together").click()
    fill(browser, "#temperature", "1.5")
    one(browser, "#generate").click()
    finish(browser)
    assert "do not compare the depths" in one(browser, "#clock").text
    assert one(browser, "#difference").text.startswith("The first difference is token")
    assert all(
        result.find_elements("css selector", ".token.first")
        for result in browser.find_elements("css selector", ".text")
    )
    assert browser.find_elements("css selector", ".token.differs")


def test_stop_keeps_what_has_come(browser: Any, server_url: str):
    from selenium.webdriver import Keys

    open_page(browser, server_url)
    forecasts(browser)
    emulate_network(browser, bytes_per_s=1500)
    for stop in (lambda: press(browser, Keys.ESCAPE), lambda: one(browser, "#stop").click()):
        one(browser, "#generate").click()
        until(lambda: browser.find_elements("css selector", ".token"))
        stop()
        finish(browser)
        assert one(browser, "#status").text.startswith("Stopped after ")
        assert one(browser, "#alert").text == ""
        assert browser.find_elements("css selector", ".token")
        assert not one(browser, "#costs").is_displayed()
    assert browser.switch_to.active_element == one(browser, "#generate")


def test_what_the_server_refuses_is_said(browser: Any, server_url: str):
    open_page(browser, server_url)
    forecasts(browser)
    prompt = "word " * 2000
    browser.execute_script("document.querySelector('#prompt').value = arguments[0]", prompt)
    one(browser, "#generate").click()
    finish(browser)
    body = json.dumps({"model": "shoal-e2e", "prompt": prompt, "max_tokens": 64}).encode()
    with pytest.raises(HTTPError) as refused:
        urlopen(Request(f"{server_url}v1/completions", body, {"Content-Type": "application/json"}))
    assert one(browser, "#alert[role=alert]").text == json.load(refused.value)["error"]["message"]
    fill(browser, "#prompt", "name[The Mill]")
    one(browser, "#generate").click()
    finish(browser)
    assert one(browser, "#alert").text == ""

    emulate_network(browser, offline=True)
    one(browser, "#generate").click()
    finish(browser)
    assert one(browser, "#alert").text == "The server cannot be reached."


def test_a_key_is_asked_for_only_where_one_is_needed(browser: Any, server_url: str, locked_url: str):
    from selenium.webdriver import Keys

    open_page(browser, server_url)
    forecasts(browser)
    assert not one(browser, "#key").is_displayed()
    open_page(browser, locked_url)
    until(lambda: one(browser, "#key").is_displayed())
    for key in ("guess", "sesame"):
        fill(browser, "#key", key)
        one(browser, "#key").send_keys(Keys.ENTER)
        until(lambda: one(browser, "#alert").text or not one(browser, "#key").is_displayed())
    forecasts(browser)
    assert one(browser, "#alert").text == ""
    browser.refresh()
    forecasts(browser)
    assert not one(browser, "#key").is_displayed()


def test_the_theme_follows_the_system_until_one_is_chosen(browser: Any, server_url: str):
    def page_colour() -> str:
        return str(one(browser, "body").value_of_css_property("background-color"))

    open_page(browser, server_url, scheme="light")
    light = page_colour()
    set_device(browser, size=WIDTHS["laptop"], scheme="dark")
    until(lambda: page_colour() != light)
    dark = page_colour()
    one(browser, "#theme").click()
    browser.refresh()
    assert page_colour() == light
    assert one(browser, "#theme").text == "Dark theme"
    one(browser, "#theme").click()
    assert page_colour() == dark
    set_device(browser, size=WIDTHS["laptop"], scheme="light")
    until(lambda: page_colour() == light)


def test_everything_by_keyboard(browser: Any, server_url: str):
    from selenium.webdriver import Keys

    open_page(browser, server_url)
    forecasts(browser)
    wanted = [
        "theme", "prompt", "max-tokens", "temperature", "seed", "draft", "compare", "together", "range", "range", "generate",
    ]  # fmt: skip
    reached = []
    for _ in wanted:
        press(browser, Keys.TAB)
        focused = browser.switch_to.active_element
        reached.append(focused.get_attribute("id") or focused.get_attribute("type"))
        assert focused.value_of_css_property("outline-style") == "solid"
        if reached[-1] == "compare":
            press(browser, Keys.SPACE)
    assert reached == wanted

    one(browser, "#prompt").click()
    press_ctrl_enter(browser)
    finish(browser)
    output = one(browser, ".text")
    while browser.switch_to.active_element != output:
        press(browser, Keys.TAB)
    press(browser, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
    assert f"token 1, {ALL_LAYERS} of {ALL_LAYERS} layers" in one(browser, ".inspected").text


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_only_down(browser: Any, server_url: str, scheme: str):
    open_page(browser, server_url, width="phone", scheme=scheme)
    one(browser, "#compare").click()
    forecasts(browser)
    assert len({box.rect["x"] for box in browser.find_elements("css selector", ".setting")}) == 1
    one(browser, "#generate").click()
    finish(browser)
    assert one(browser, "#costs").is_displayed()
    assert browser.execute_script("return [innerWidth, document.scrollingElement.scrollWidth]") == [360, 360]
    contrasts = browser.execute_script(CONTRASTS)
    assert len(contrasts) > 50
    assert {text: ratio for text, ratio in contrasts if ratio < 4.5} == {}


def test_reduced_motion(browser: Any, scripted_url: str):
    for motion, animation in (("reduce", "none"), ("no-preference", "appear")):
        open_page(browser, scripted_url, motion=motion)
        chat(browser, "markup")
        assert one(browser, ".token").value_of_css_property("animation-name") == animation


def test_texts_stay_texts_and_layers_their_tokens(browser: Any, scripted_url: str):
    open_page(browser, scripted_url)
    chat(browser, "markup")
    assert one(browser, "h1").text == MARKUP
    assert texts(browser, ".token") == [MARKUP, " é\n"]
    titles = [token.get_attribute("title") for token in browser.find_elements("css selector", ".token")]
    assert titles == ["token 1, 12 of 12 layers", "tokens 2 to 4, 4, 4, 3 of 12 layers"]
    assert texts(browser, ".saved li") == ["8.0of 12 layers per token", "75%fewer layer-tokens", "5%more FLOPs"]
    assert texts(browser, "#costs td") == [
        "8.00 of 12", "2575% fewer", "1.05 M5% more", "3", "4", "0.50", "8.0", "3 of 4",
    ]  # fmt: skip
    assert one(browser, "#status").text == "Depth 0.33: 4 tokens, ended by the model."
    assert browser.execute_script("return window.hacked === undefined")


@pytest.mark.parametrize(
    ("prompt", "text", "message"),
    [
        ("error", "one", "the cache is full"),
        ("cut", "one two", "The connection broke off before the answer was complete."),
    ],
)
def test_streams_that_end_badly(browser: Any, scripted_url: str, prompt: str, text: str, message: str):
    open_page(browser, scripted_url)
    chat(browser, prompt)
    assert one(browser, ".text").text == text
    assert one(browser, "#alert").text == message
    assert one(browser, "#status").text.startswith("Broken off after ")


def chat(browser: Any, prompt: str) -> None:
    """A run as a chat, which the page offers where the model has a template."""
    forecasts(browser)
    fill(browser, "#prompt", prompt)
    one(browser, "#endpoint option[value=chat]").click()
    one(browser, "#generate").click()
    finish(browser)
