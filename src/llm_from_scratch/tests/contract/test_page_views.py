"""The page in a browser: a live run, a conversation, narrow windows, themes, and accessibility (axe-core)."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_from_scratch.generation.generator import Generator

from ..browser import Browser
from ..memorised import TOKENIZER, memorised
from ..playground import (
    ENDLESS,
    START,
    Served,
    generate,
    link,
    visit,
    write,
)

# --- a run ---


def test_a_run_is_watched_as_it_goes(browser, site, run_dir):
    metrics, samples = run_dir / "metrics.jsonl", run_dir / "samples.jsonl"
    for path in (metrics, samples):
        path.write_text("")
    visit(browser, site.url)
    browser.click("#tab-watch")
    browser.wait(lambda: browser.find("#watch").is_displayed())
    assert browser.find("#no-samples").is_displayed() and "no points yet" in browser.find("#chart").get_attribute(
        "aria-valuetext"
    )

    write(metrics, {"step": 0, "train_loss": 4.2, "val_loss": 4.25, "lr": 0.1})
    browser.wait(lambda: "4.2500" in browser.text("#figures"))
    write(metrics, *({"step": s, "loss": 4.0 - s / 100 if s != 7 else None, "tokens_per_s": 1000} for s in range(50)))
    write(samples, {"step": 0, "text": "xq"}, {"step": 25, "text": "the"})
    browser.wait(lambda: "3.5100" in browser.text("#figures") and browser.text("#written-text") == "the")
    assert browser.text("#slider-step") == "25"

    write(samples, {"step": 50, "text": "the king"})  # followed
    browser.wait(lambda: browser.text("#written-text") == "the king")
    browser.js("document.getElementById('slider').focus()")
    browser.press("ARROW_LEFT", "ARROW_LEFT")
    assert browser.text("#written-text") == "xq"
    assert browser.find("#slider").get_attribute("aria-valuetext") == "step 0"
    assert not browser.find("#follow").is_selected()
    write(samples, {"step": 75, "text": "the king’s"})
    browser.click("#tab-watch")  # looks at once
    browser.wait(lambda: browser.find("#slider").get_attribute("max") == "3")
    assert browser.text("#written-text") == "xq"  # no longer followed
    browser.click("#follow")
    assert browser.text("#written-text") == "the king’s"

    browser.js("document.getElementById('chart').focus()")
    browser.press("HOME", *["ARROW_RIGHT"] * 7)
    assert browser.text("#readout").startswith("step 7: train loss not finite")
    browser.press("END")
    assert browser.text("#readout") == "step 49: train loss 3.5100 · evaluated at 0: train 4.2000, validation 4.2500"
    assert browser.find("#chart").get_attribute("aria-valuetext") == browser.text("#readout")
    browser.js("document.querySelector('#watch details').open = true")
    assert browser.find("#values").text.split() == ["0", "4.2000", "4.2500"]
    for axis in ("#log-x", "#log-y"):
        browser.click(axis)

    metrics.write_text('{"step": 0, "loss": 9.0}\n')  # a new run
    browser.click("#tab-watch")  # looks at once
    browser.wait(lambda: "9.0000" in browser.text("#figures"))
    assert "4.2500" not in browser.text("#figures")


@pytest.mark.slow
def test_a_long_run_is_drawn(browser, site, run_dir):
    """More points than pixels: fetched in parts, and painted in a moment."""
    (run_dir / "metrics.jsonl").write_text("")
    write(run_dir / "metrics.jsonl", *({"step": s, "loss": 1 + math.exp(-s / 5000)} for s in range(30_000)))
    visit(browser, site.url)
    browser.click("#tab-watch")
    browser.wait(lambda: browser.find("#chart").get_attribute("aria-valuemax") == "29999")
    painted = (
        "const c = document.querySelector('canvas');"
        "return new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size"
    )
    browser.wait(lambda: browser.js(painted) > 10)


# --- a conversation ---


def test_a_conversation(browser, site):
    visit(browser, link(site))
    browser.click("#tab-chat")
    browser.write("#message", START)
    browser.press("ENTER")
    browser.wait(lambda: len(browser.all(".message.assistant")) == 1 and browser.find("#send").is_enabled())
    answer = browser.text(".message.assistant .text")
    assert len(answer) == 12 and browser.text(".message.user .text") == START
    notes = [note.text for note in browser.all(".message.assistant .note")]
    assert notes == ["Model", "reached max tokens"]
    browser.click("#chat-again")
    browser.wait(lambda: browser.find("#send").is_enabled() and browser.text(".message.assistant .text") == answer)
    assert len(browser.all(".message")) == 2 and len(browser.all(".message.assistant .note")) == 2
    browser.write("#message", START)
    browser.press("ENTER")  # the server refuses unknown fields of a message, such as the note
    browser.wait(lambda: browser.find("#send").is_enabled() and len(browser.all(".message.assistant")) == 2)
    browser.click("#chat-clear")
    assert not browser.all(".message")

    browser.write("#set-max_tokens", str(ENDLESS))
    browser.write("#message", START)
    browser.press("ENTER")
    browser.wait(lambda: browser.all(".message.assistant") and browser.text(".message.assistant .text"))
    browser.click("#chat-stop")
    browser.wait(lambda: site.running == 0 and browser.find("#send").is_enabled())
    assert 0 < len(browser.text(".message.assistant .text")) < ENDLESS
    assert browser.all(".message.assistant .note")[-1].text == "stopped"


@pytest.mark.slow
def test_a_message_without_an_answer_returns_to_the_field(browser):
    """Otherwise the next message would be the second of the user in a row, which many templates refuse."""
    own = Served(Generator(memorised(), TOKENIZER), chat=True)
    visit(browser, link(own))
    browser.click("#tab-chat")
    own.close()
    browser.write("#message", START)
    browser.press("ENTER")
    browser.wait(lambda: browser.text("#error"))
    assert browser.text("#error p") == "The server cannot be reached. Is it still running?"
    assert not browser.all(".message") and browser.find("#message").get_attribute("value") == START
    browser.js("document.querySelector('#chat-again').click()")  # disabled: there is nothing to answer
    assert browser.find("#send").is_enabled() and not browser.all(".message")


@pytest.mark.slow
def test_without_a_template_or_a_run(browser):
    own = Served(Generator(memorised(), TOKENIZER))
    try:
        visit(browser, own.url)
        assert not browser.find("#tab-chat").is_displayed()
        browser.find("#tab-complete").click()
        browser.press("ARROW_RIGHT")  # over the hidden one
        assert browser.focused() == "tab-watch"
        assert "No run to show" in browser.text("#watch-note")
    finally:
        own.close()


# --- every window, every eye ---


def views(browser: Browser, site: Served, run_dir: Path) -> Iterator[str]:
    """Goes through all that the page can show."""
    for name in ("metrics", "samples"):
        (run_dir / f"{name}.jsonl").write_text("")
    write(
        run_dir / "metrics.jsonl",
        *({"step": s, "train_loss": 4.0, "val_loss": 4.0, "loss": 4.0} for s in range(0, 500, 50)),
    )
    write(run_dir / "samples.jsonl", {"step": 100, "text": "w" * 200})
    visit(browser, link(site, prompt=START * 3, n=2, max_tokens=40))
    yield "empty"
    browser.js("document.querySelectorAll('details').forEach(d => (d.open = true))")
    yield "settings"
    browser.click("#echo")
    generate(browser)
    yield "samples"
    browser.js("document.querySelector('#bounded').click(); document.querySelectorAll('.t')[30].click()")
    yield "alternatives"
    browser.press("ESCAPE")
    browser.js("document.querySelector('#bounded').click(); document.querySelector('#key-dialog').showModal()")
    yield "key"
    browser.press("ESCAPE")
    browser.click("#tab-chat")
    browser.write("#message", START)
    browser.press("ENTER")
    browser.wait(lambda: browser.all(".message.assistant") and browser.find("#send").is_enabled())
    yield "chat"
    browser.click("#tab-watch")
    browser.wait(lambda: browser.find("#written").is_displayed())
    yield "watch"


@pytest.mark.slow
def test_a_narrow_window_scrolls_one_way(browser, site, run_dir):
    browser.window(320, 640)
    for view in views(browser, site, run_dir):
        width = browser.js("return document.documentElement.scrollWidth")
        assert width <= 320, view
        small = browser.js(
            "return [...document.querySelectorAll('button, summary, input')].filter(e => e.checkVisibility() && "
            "e.type !== 'checkbox' && e.getBoundingClientRect().height < 24).map(e => e.outerHTML)"
        )
        assert small == [], view


@pytest.mark.slow
def test_the_theme_is_the_systems_or_the_readers(browser, site):
    paper = "return getComputedStyle(document.body).backgroundColor"
    visit(browser, site.url)
    light = browser.js(paper)
    browser.window(1200, 900, "dark")
    dark = browser.js(paper)
    assert light != dark
    browser.click("#theme")
    assert browser.text("#theme") == "Theme: light" and browser.js(paper) == light
    browser.driver.refresh()
    browser.wait(lambda: browser.js("return document.body.dataset.ready"))
    assert browser.js(paper) == light


@pytest.mark.slow  # only .ci/run installs axe-core
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_serious_by_axe(browser, site, run_dir, scheme):
    """LLM_AXE_PATH: axe.min.js of the npm package axe-core."""
    axe = Path(os.environ.get("LLM_AXE_PATH", "axe.min.js"))
    if not axe.is_file():
        pytest.skip("needs axe-core: npm install axe-core, and LLM_AXE_PATH=.../axe-core/axe.min.js")
    source = axe.read_text(encoding="utf-8")
    browser.window(1200, 900, scheme)
    for view in views(browser, site, run_dir):
        browser.js(source)
        found = browser.driver.execute_async_script(
            "axe.run({ resultTypes: ['violations'], rules: { 'target-size': { enabled: true } } }).then(arguments[0])"
        )
        serious = [
            (entry["id"], node["html"][:200], node["failureSummary"][:300])
            for entry in found["violations"]
            if entry["impact"] in ("serious", "critical")
            for node in entry["nodes"]
        ]
        assert serious == [], view
