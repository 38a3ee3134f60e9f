"""The page in a browser: completions, alternatives, tokens of every kind, errors, settings in links."""

from __future__ import annotations

import codecs
import dataclasses
import json
import math

import pytest
import torch

from llm_from_scratch.config import GenerationConfig
from llm_from_scratch.generation.generator import Generator
from llm_from_scratch.serving import service

from ..memorised import TEXT, TOKENIZER, memorised
from ..playground import (
    BPE,
    BYTES,
    ENDLESS,
    SCRIPTS,
    START,
    Served,
    finish,
    generate,
    learned,
    link,
    tokens,
    visit,
)

# --- completing ---


def test_the_typed_prompt_is_completed_in_every_sample(browser, site):
    visit(browser, site.url)
    browser.write("#prompt", START)
    browser.wait(lambda: browser.text("#count") == "6 tokens")
    browser.write("#set-max_tokens", "12")
    browser.write("#set-temperature", "0")
    browser.write("#set-n", "3")
    browser.press("TAB")
    generate(browser)
    expected = site.greedy(TOKENIZER.encode(START).tolist(), 12)
    assert [tokens(browser, card) for card in (1, 2, 3)] == [expected] * 3
    assert browser.text(".card .text") == START + TOKENIZER.decode(expected)
    assert "12 tokens" in browser.text(".stats") and "reached max tokens" in browser.text(".stats")
    assert browser.text("#status") == "Done: 36 tokens in 3 samples."


def test_a_stream_is_shown_immediately_and_stop_frees_its_slot(browser, site):
    visit(browser, link(site, max_tokens=ENDLESS, temperature=1))
    browser.click("#generate")
    browser.wait(lambda: len(tokens(browser)) > 5)
    assert site.running == 1
    browser.click("#stop")
    browser.wait(lambda: site.running == 0)
    browser.wait(lambda: "stopped" in browser.text(".stats"))
    assert 5 < len(tokens(browser)) < ENDLESS
    assert browser.focused() == "generate"
    before = tokens(browser)
    browser.write("#set-max_tokens", "5")
    browser.press("TAB")
    browser.click("#regenerate")
    browser.wait(lambda: len(tokens(browser)) == 5)
    assert tokens(browser) != before


def test_settings_reach_the_server(browser, site):
    """Every control: what the request says is what stands there, and what changes nothing is not said."""
    visit(browser, link(site))
    browser.js(
        "window.bodies = []; const real = fetch;"
        "window.fetch = (path, options) => "
        "(path.includes('completions') && bodies.push(options.body), real(path, options))"
    )
    generate(browser)
    plain = json.loads(browser.js("return bodies.pop()"))
    assert set(plain) == {"model", "prompt", "stream", "logprobs", "echo", "max_tokens", "temperature", "n", "seed"}
    browser.click("#settings-form details summary")
    values = {"top_k": 5, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.1, "presence_penalty": 0.5}
    values |= {"frequency_penalty": -0.5, "seed": 7}
    for name, value in values.items():
        browser.write(f"#set-{name}", str(value))
    browser.write("#set-stop", "END\n\\n\\n")
    browser.press("TAB")
    generate(browser)
    body = json.loads(browser.js("return bodies.pop()"))
    assert {name: body[name] for name in values} == values
    assert body["stop"] == ["END", "\n\n"]
    browser.write("#set-temperature", "99")  # brought into range
    browser.press("TAB")
    assert browser.find("#set-temperature").get_attribute("value") == "2"
    assert browser.find("#set-temperature ~ [type=range]").get_attribute("value") == "2"


def test_a_new_filter_has_a_control(browser, site, monkeypatch):
    @dataclasses.dataclass
    class Settings(GenerationConfig):
        only_below: int = 100
        only_above: int | None = None

    monkeypatch.setattr(service, "GenerationConfig", Settings)
    monkeypatch.setattr(service, "SAMPLING", (*service.SAMPLING, "only_below", "only_above"))
    visit(browser, link(site, only_below="7.5", only_above="2"))
    browser.click("#settings-form details summary")
    assert browser.find("#set-only_below").get_attribute("value") == "7.5"
    body = "return import('/static/settings.js').then((page) => page.sampling())"
    assert [browser.js(body)[name] for name in ("only_below", "only_above")] == [7.5, 2]
    for name, value in (("only_below", "100"), ("only_above", "")):  # without effect
        browser.write(f"#set-{name}", value)
        browser.press(*([] if value else ["DELETE"]), "TAB")
        assert name not in browser.js(body)
    browser.write("#set-only_above", "5")
    browser.click("#settings-form > button")  # Reset
    assert not {"only_below", "only_above"} & {*browser.js(body)}


@pytest.mark.slow
def test_a_stop_text_is_marked_as_not_part_of_the_sample(browser, site):
    expected = TOKENIZER.decode(site.greedy(TOKENIZER.encode(START).tolist(), 12))
    visit(browser, link(site, stop=expected[5:7].replace("\n", "\\n")))
    generate(browser)
    kept = browser.js("return [...document.querySelectorAll('.t:not(.beyond)')].map(s => s.textContent).join('')")
    assert kept == expected[:5]
    assert "ended by a stop sequence" in browser.text(".stats")


# --- looking at tokens ---


def test_an_alternative_is_chosen_by_keyboard_and_continued_from(browser, site):
    visit(browser, link(site))
    generate(browser)
    first = tokens(browser)
    browser.js("document.querySelector('.t[tabindex]').focus()")
    assert len(browser.all(".t[tabindex]")) == 1  # one tab stop for all
    browser.press("ARROW_RIGHT", "ARROW_RIGHT", "ARROW_RIGHT")
    assert browser.js("return document.activeElement.index") == 3
    assert browser.js("return !document.getElementById('tip').hidden")
    name = browser.find(".t:focus").get_attribute("aria-label")
    assert "%" in name and browser.text("#tip") == name

    browser.press("ENTER")
    assert browser.find("#alternatives").is_displayed()
    choices = browser.js(
        "return [...document.querySelectorAll('#alternatives li button')]"
        ".map(b => [Number(b.dataset.id), b.querySelector('.number').textContent])"
    )
    with torch.no_grad():
        logits = site.generator.model(torch.tensor([TOKENIZER.encode(START).tolist() + first[:3]]))[0][0, -1]
    best = logits[: TOKENIZER.vocab_size].log_softmax(-1).topk(len(choices))
    assert [choice[0] for choice in choices] == best.indices.tolist()
    for (_, shown), logprob in zip(choices, best.values.tolist(), strict=True):
        p, number = 100 * math.exp(logprob), float(shown.strip("<> %"))
        assert abs(number - p) <= (0.051 if p < 10 else 0.51) or (shown == "< 0.1%" and p < 0.1), shown

    browser.press("ESCAPE")
    assert not browser.find("#alternatives").is_displayed()
    assert browser.js("return document.activeElement.index") == 3
    browser.press("ENTER")
    browser.press("ARROW_DOWN", "ENTER")
    finish(browser)
    browser.wait(lambda: len(tokens(browser)) == 3 + 1 + 12)
    chosen = choices[1][0]
    assert chosen != first[3]
    begun = [*first[:3], chosen]
    assert tokens(browser) == begun + site.greedy(TOKENIZER.encode(START).tolist() + begun, 12)
    assert browser.js("return document.activeElement.index") == 3
    assert "chosen" in browser.find(".t:focus").get_attribute("class")

    browser.js("[...document.querySelectorAll('.card button')].find(b => b.textContent === 'Undo').click()")
    browser.wait(lambda: tokens(browser) == first)


def test_continue_adds_tokens(browser, site):
    visit(browser, link(site))
    generate(browser)
    browser.js("[...document.querySelectorAll('.card button')].find(b => b.textContent === 'Continue').click()")
    browser.wait(lambda: len(tokens(browser)) == 24)
    assert tokens(browser) == site.greedy(TOKENIZER.encode(START).tolist(), 24)


@pytest.mark.slow
def test_the_prompts_tokens_show_their_likelihood(browser, site):
    visit(browser, link(site))
    browser.click("#echo")
    generate(browser)
    prompt = TOKENIZER.encode(START).tolist()
    assert tokens(browser) == prompt + site.greedy(prompt, 12)
    assert len(browser.all(".t.of-prompt")) == len(prompt)
    names = browser.js("const t = document.querySelector('.text').tokens; return t.tokens.map((_, i) => t.name(i))")
    assert names[0].endswith("no probability") and all("%" in name for name in names[1:])


TEXTS_AND_BYTES = (
    "const own = t => [...t.childNodes].filter(n => n.nodeType === 3).map(n => n.data).join('');"
    "return [...document.querySelectorAll('.t')].map(t => [own(t), t.querySelector('.raw')?.textContent ?? ''])"
)


def texts_and_bytes(pieces: list[bytes]) -> list[list[str]]:
    """What each token is to show: the characters that end in it, and its bytes of one that does not."""
    shown, decoder = [], codecs.getincrementaldecoder("utf-8")()
    for piece in pieces:
        read, waiting = decoder.decode(piece), decoder.getstate()[0]
        shown.append([read, f"⟨{waiting[-len(piece) :].hex(' ')}⟩" if waiting else ""])
    return shown


@pytest.mark.slow
@pytest.mark.parametrize(
    "tokenizer",
    [BYTES, TOKENIZER, BPE],
    ids=["byte", "char", "bpe"],
)
def test_tokens_of_every_kind(browser, site, tokenizer):
    """The text reads as text, whichever tokens share a character; boundaries show each token, and its bytes."""
    text = TEXT if tokenizer is TOKENIZER else SCRIPTS
    own = site if tokenizer is TOKENIZER else Served(learned(tokenizer, SCRIPTS))
    try:
        prompt, count = tokenizer.encode(text[:14]).tolist(), 60
        visit(browser, link(own, prompt=text[:14], max_tokens=count))
        generate(browser)
        ids = own.greedy(prompt, count)
        assert len({*ids}) >= 20
        assert tokens(browser) == ids
        pieces = [tokenizer.decode_bytes([i]) for i in ids]
        shown = texts_and_bytes(pieces)
        assert browser.js(TEXTS_AND_BYTES) == shown
        parts = sum(bool(raw) for _, raw in shown[:-1])  # of characters that are completed
        assert (parts > 5) is (tokenizer is not TOKENIZER)
        widths = "return [...document.querySelectorAll('.raw.done')].map(r => r.offsetWidth)"
        assert len(browser.js(widths)) == parts and all(width < 12 for width in browser.js(widths))
        browser.click("#bounded")
        assert len(browser.js(widths)) == parts and all(width > 12 for width in browser.js(widths))
        spaces = browser.js("return [...document.querySelectorAll('.t[data-space]')].map(t => t.dataset.space)")
        signs = {b" ": "␣", b"\n": "↵", b"\t": "⇥"}
        assert spaces == [signs[piece] for piece in pieces if piece.isspace()]
        assert browser.js("return getComputedStyle(document.querySelector('.t')).boxShadow") != "none"
    finally:
        if own is not site:
            own.close()


@pytest.mark.slow
def test_an_alternative_within_a_character(browser, site):
    """The sample is cut in the middle of a character, at the very token."""
    own = Served(learned(BYTES, SCRIPTS))
    try:
        visit(browser, link(own, prompt="The price is 5", max_tokens=6))
        generate(browser)
        assert tokens(browser)[:3] == [0xE2, 0x82, 0xAC]
        browser.js("document.querySelector('.t').parentNode.parentNode.tokens.select(1, true)")
        browser.press("ENTER")
        browser.click("#alternatives [data-id='128']")  # the text has e2 80 as well
        browser.wait(lambda: len(tokens(browser)) == 1 + 1 + 6)
        begun = [0xE2, 0x80]
        ids = begun + own.greedy(list(b"The price is 5") + begun, 6)
        assert tokens(browser) == ids
        assert browser.js(TEXTS_AND_BYTES) == texts_and_bytes([bytes([i]) for i in ids])
    finally:
        own.close()


@pytest.mark.slow
def test_thousands_of_tokens_stay_quick(browser, site):
    visit(browser, link(site))
    generate(browser)
    took = browser.js("""
        const text = document.querySelector(".text").tokens;
        const like = text.tokens[0];
        const began = performance.now();
        for (let i = 0; i < 5000; i += 50) {
          for (let k = 0; k < 50; k++) text.push({ ...like, bytes: k ? [97 + k % 26] : [10] });
          text.render();
          text.root.getBoundingClientRect();  // lays out, as a frame does
        }
        return performance.now() - began;""")
    assert len(tokens(browser)) == 5012
    assert took < 3000  # 100 frames; rendering all again would take minutes


# --- errors ---

STREAM = """
const bytes = new TextEncoder().encode(arguments[0]);
window.real ??= window.fetch;
window.fetch = async (path, options) => path !== "v1/completions" ? real(path, options) : new Response(
  new ReadableStream({ start(c) { for (const b of bytes) c.enqueue(new Uint8Array([b])); c.close(); } }),
  { headers: { "Content-Type": "text/event-stream" } });
"""
ANSWER = """
const [status, headers, body] = arguments;
window.real ??= window.fetch;
window.fetch = async (path, options) =>
  path !== "v1/completions" ? real(path, options) : new Response(body, { status, headers });
"""


@pytest.mark.slow
def test_a_stream_in_pieces_of_one_byte(browser, site):
    """Chunks may cut anywhere: within a line's end, within a character."""
    logprobs = {"token_ids": [5, 6], "token_bytes": [[0xC3], [0xA9]], "token_logprobs": [-0.1, -3], "top": [None, None]}
    chunk = {"choices": [{"index": 0, "text": "é", "logprobs": logprobs, "finish_reason": None}]}
    ended = {"choices": [{"index": 0, "text": "", "logprobs": None, "finish_reason": "length"}]}
    parts = [
        ": a comment",
        f"data: {json.dumps(chunk, ensure_ascii=False)}",
        f"data:{json.dumps(ended)}",
        "data: [DONE]",
    ]
    visit(browser, link(site))
    for end in ("\n\n", "\r\n\r\n"):
        browser.js("document.querySelector('#samples').replaceChildren()")
        browser.js(STREAM, "".join(part + end for part in parts))
        generate(browser)
        assert tokens(browser) == [5, 6]
        assert browser.js("return document.querySelectorAll('.t')[1].textContent") == "é"
        assert not browser.text("#error")


@pytest.mark.slow
def test_a_stream_that_breaks(browser, site):
    visit(browser, link(site))
    for stream, sentence in (
        ('data: {"error": {"message": "the engine’s thread ended"}}\n\n', "The engine’s thread ended."),
        ('data: {"choi', "The connection ended before the text was complete."),
        ("data: {oops}\n\n", "The server’s answer could not be read."),
    ):
        browser.js(STREAM, stream)
        generate(browser)
        assert browser.text("#error p") == sentence
        assert "interrupted" in browser.text(".stats")


def test_an_error_is_a_sentence_and_costs_nothing(browser, site):
    visit(browser, link(site))
    generate(browser)
    before = tokens(browser)
    for status, headers, body, sentence in (
        (503, {"Retry-After": "2"}, "it drains", "The server is not ready: it drains. Try again in 2 s."),
        (429, {}, "full", "The server is busy with other requests. Try again in a moment."),
        (400, {}, "max_tokens is too large", "max_tokens is too large."),
        (502, {}, None, "The server refused the request (status 502)."),
    ):
        browser.js(ANSWER, status, headers, json.dumps({"error": {"message": body}}) if body else "<html>Bad</html>")
        browser.click("#regenerate")
        browser.wait(lambda: browser.text("#error"))
        assert browser.text("#error p") == sentence
        assert browser.find("#error").get_attribute("role") == "alert"
        assert tokens(browser) == before and browser.find("#prompt").get_attribute("value") == START
        browser.click("#error button")
        assert browser.text("#error") == ""


@pytest.mark.slow
def test_the_servers_own_complaint(browser, site):
    visit(browser, link(site, prompt="日本"))
    browser.click("#generate")
    browser.wait(lambda: browser.text("#error"))
    assert "never saw the character" in browser.text("#error p")


@pytest.mark.slow
def test_a_server_that_is_busy(browser):
    own = Served(Generator(memorised(), TOKENIZER), max_concurrent=1, max_queued=0)
    try:
        visit(browser, link(own))
        body = {"prompt": START, "max_tokens": ENDLESS, "stream": True}
        browser.js(
            "window.other = new AbortController(); fetch('v1/completions', {method: 'POST', signal: other.signal, "
            "headers: {'Content-Type': 'application/json'}, body: JSON.stringify(arguments[0])}).catch(() => {})",
            body,
        )
        browser.wait(lambda: own.running == 1)
        browser.click("#generate")
        browser.wait(lambda: browser.text("#error"))
        sentence = browser.text("#error p")
        assert sentence.startswith("The server is busy with other requests. Try again in ") and sentence.endswith(" s.")
        browser.js("other.abort()")
        browser.wait(lambda: own.running == 0)
        generate(browser)
        assert len(tokens(browser)) == 12 and not browser.text("#error")
    finally:
        own.close()


@pytest.mark.slow
def test_a_server_that_is_gone(browser):
    own = Served(Generator(memorised(), TOKENIZER))
    visit(browser, link(own))
    generate(browser)
    before = tokens(browser)
    own.close()
    browser.click("#generate")
    browser.wait(lambda: browser.text("#error"))
    assert browser.text("#error p") == "The server cannot be reached. Is it still running?"
    assert tokens(browser) == before and browser.find("#prompt").get_attribute("value") == START


@pytest.mark.slow
def test_the_page_asks_for_the_key(browser, site):
    own = Served(Generator(memorised(), TOKENIZER), api_key="sesame")
    try:
        browser.open(link(own))
        browser.wait(lambda: browser.find("#key-dialog").is_displayed())
        browser.press("w", "r", "o", "n", "g", "ENTER")
        browser.wait(lambda: "rejected" in browser.text("#key-note"))
        browser.wait(lambda: browser.find("#key-dialog").is_displayed())
        browser.press("ESCAPE")
        browser.wait(lambda: browser.text("#error"))
        assert "requires an API key" in browser.text("#error p")
        browser.click("#error button")  # Try again
        browser.wait(lambda: browser.find("#key-dialog").is_displayed())
        browser.press(*"sesame", "ENTER")
        browser.wait(lambda: browser.js("return document.body.dataset.ready"))
        generate(browser)
        assert len(tokens(browser)) == 12
        assert browser.js("return JSON.stringify(localStorage) + location.href").count("sesame") == 0
        assert "sesame" in browser.js("return JSON.stringify(sessionStorage)")
    finally:
        own.close()


# --- settings that travel ---


@pytest.mark.slow
def test_a_link_holds_prompt_and_settings(browser, site):
    prompt = START + " é€&=#%\n" + TEXT[:3]
    visit(browser, site.url)
    browser.js("document.getElementById('prompt').value = arguments[0]", prompt)
    browser.write("#set-seed", "42")
    browser.write("#set-temperature", "0.35")
    browser.press("TAB")
    browser.click("#link")
    address = browser.wait(lambda: "#" in browser.driver.current_url and browser.driver.current_url)
    assert "sample" not in address and "42" in address
    visit(browser, address)
    shown = [browser.find(f"#{name}").get_attribute("value") for name in ("prompt", "set-seed", "set-temperature")]
    assert shown == [prompt, "42", "0.35"]
    browser.driver.get("about:blank")
    browser.driver.get(site.url)  # without the link: as it was left
    browser.wait(lambda: browser.js("return document.body.dataset.ready"))
    shown = [browser.find(f"#{name}").get_attribute("value") for name in ("prompt", "set-seed", "set-temperature")]
    assert shown == [prompt, "42", "0.35"]
