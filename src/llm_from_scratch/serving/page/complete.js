// The Complete view: requests, samples side by side, continuing from an alternative.

import { call, events, getJson } from "./api.js";
import { inspect } from "./inspect.js";
import { button, calm, complain, element, say, stored } from "./say.js";
import { link, sampling } from "./settings.js";
import { LEVELS, TokenText } from "./tokens.js";

const $ = (id) => document.getElementById(id);
const TAIL = 300; // characters of the prompt that a sample shows before it
const ENDS = { stop: "ended by a stop sequence or token", length: "reached max tokens" };

let info;
let last; // the prompt that was completed last: {text, ids}
let running; // the AbortController of the run

export function start(given) {
  info = given;
  count();
}

class Card {
  constructor(number, prompt, echo) {
    this.number = number;
    this.promptIds = echo ? [] : prompt.ids; // before the shown tokens
    this.promptText = echo ? "" : prompt.text;
    this.awaited = echo ? prompt.ids.length : 0; // prompt tokens still to arrive
    this.history = [];
    this.stats = element("p", "note stats");
    const body = element("div", "text");
    const name = element("h3", "", `Sample ${number}`);
    name.id = `sample-${number}`;
    body.setAttribute("role", "group");
    body.setAttribute("aria-labelledby", name.id);
    this.text = new TokenText(body, (this.promptText.length > TAIL ? "…" : "") + this.promptText.slice(-TAIL));
    this.text.card = this;
    this.more = button("Continue", () => this.proceed());
    this.undo = button("Undo", () => this.back());
    this.more.title = "Add tokens at the end";
    this.undo.title = "Restore the previous text";
    const copy = button("Copy", () => copyText(this.plain(), "Sample copied."));
    const actions = element("div", "actions small", this.more, this.undo, copy);
    this.node = element("article", "card", element("header", "", name, actions), body, this.stats);
    this.begin(undefined);
  }

  begin(seed) {
    Object.assign(this, { seed, from: this.text.tokens.length, given: "", end: undefined, began: performance.now() });
    this.show();
  }

  take({ text, logprobs, finish_reason: reason }) {
    logprobs?.token_ids.forEach((id, i) => {
      const [bytes, logprob, top] = [logprobs.token_bytes[i], logprobs.token_logprobs[i], logprobs.top?.[i] ?? null];
      this.text.push({ id, bytes, logprob, top, prompt: this.awaited > 0 });
      if (this.awaited > 0) this.awaited--;
    });
    this.given += text ?? "";
    if (reason) this.finish(ENDS[reason] ?? reason);
    if (reason === "stop") this.text.markCut(this.given, this.from);
    this.frame ??= requestAnimationFrame(() => this.show());
  }

  finish(end) {
    this.end ??= end;
    this.text.render();
    this.show();
  }

  show() {
    cancelAnimationFrame(this.frame);
    this.frame = undefined;
    const { drawn, logprob } = this.text;
    const rate = (this.text.tokens.length - this.from) / ((performance.now() - this.began) / 1000);
    if (!this.end) this.rate = rate;
    const facts = [`${drawn} token${drawn === 1 ? "" : "s"}`];
    if (drawn && this.rate) facts.push(`${Math.round(this.rate).toLocaleString()} tokens/s`);
    if (drawn) facts.push(`perplexity ${Math.exp(-logprob / drawn).toFixed(2)}`);
    if (this.seed !== undefined) facts.push(`seed ${this.seed}`);
    facts.push(this.end ?? (drawn ? "generating" : "waiting"));
    this.stats.textContent = facts.join(" · ");
    this.more.disabled = !this.end || !this.text.tokens.length;
    this.undo.disabled = !this.history.length;
  }

  plain() {
    const bytes = this.text.tokens.filter((token) => !token.beyond).flatMap((token) => token.bytes);
    return this.promptText + new TextDecoder("utf-8", { ignoreBOM: true }).decode(new Uint8Array(bytes));
  }

  ids(count = this.text.tokens.length) {
    return [...this.promptIds, ...this.text.tokens.slice(0, count).map((token) => token.id)];
  }

  // Continues after the first `count` tokens, and after the chosen one if there is one.
  async proceed(count = this.text.tokens.length, chosen = undefined) {
    const prompt = [...this.ids(count), ...(chosen ? [chosen.id] : [])];
    const settings = { ...sampling(), n: 1 };
    await run(() => ({ ...settings, prompt: [prompt] }), () => {
      this.history.push(this.text.tokens.slice());
      this.text.cut(count);
      if (chosen) {
        this.text.push({ ...chosen, chosen: true, prompt: false });
        this.text.render();
        this.text.select(count, true);
      }
      this.begin(settings.seed);
      return [this];
    });
  }

  back() {
    running?.abort();
    this.text.reset(this.text.before, this.history.pop());
    Object.assign(this, { end: "restored", seed: undefined, rate: undefined });
    this.from = this.text.tokens.length;
    this.show();
  }
}

// One request at a time. body(signal) makes it. begin() is called when the server has accepted it, and returns the cards
// to fill. Until then the page does not change.
async function run(body, begin) {
  running?.abort();
  const mine = (running = new AbortController());
  let filled = [];
  calm();
  busy(true);
  say("Waiting for the server.");
  try {
    const request = { model: info.model, stream: true, ...(await body(mine.signal)) };
    request.logprobs = alternatives(request);
    const response = await call("v1/completions", { body: request, signal: mine.signal });
    filled = begin();
    say("Generating.");
    for await (const event of events(response)) for (const choice of event.choices) filled[choice.index]?.take(choice);
    filled.forEach((card) => card.finish("ended"));
    const tokens = filled.reduce((sum, card) => sum + card.text.tokens.length - card.from, 0);
    say(`Done: ${tokens} tokens in ${filled.length === 1 ? "one sample" : `${filled.length} samples`}.`);
  } catch (error) {
    filled.forEach((card) => card.finish(error.name === "AbortError" ? "stopped" : "interrupted"));
    say(error.name === "AbortError" ? "Stopped." : "");
    complain(error);
  } finally {
    if (running === mine) busy(false);
  }
}

// Alternatives to request: fewer if the response would exceed the server's limit of log-probabilities.
function alternatives({ prompt, echo, max_tokens, n }) {
  const tokens = n * (max_tokens + (echo ? prompt[0].length : 0));
  const limit = info.limits.max_told ?? 1 << 17;
  return Math.max(0, Math.min(8, info.limits.max_logprobs, Math.floor(limit / tokens) - 1));
}

function busy(yes) {
  if (!yes) running = undefined;
  const focused = document.activeElement;
  $("stop").disabled = !yes;
  $("generate").disabled = yes;
  $("regenerate").disabled = yes || !last;
  if (focused === $("stop") && !yes) $("generate").focus();
  if (focused === $("generate") && yes) $("stop").focus();
}

// prompt(signal): {text, ids}
async function generate(prompt) {
  const settings = sampling();
  const echo = $("echo").checked;
  let taken;
  const body = async (signal) => {
    taken = await prompt(signal);
    // ids, not text: continuing later uses exactly these tokens
    return { ...settings, prompt: taken.ids.length ? [taken.ids] : "", echo };
  };
  await run(body, () => {
    last = taken;
    const cards = Array.from({ length: settings.n }, (_, k) => new Card(k + 1, taken, echo));
    cards.forEach((card, k) => card.begin(settings.seed + k));
    $("samples").replaceChildren(...cards.map((card) => card.node));
    return cards;
  });
}

function submit(event) {
  event.preventDefault();
  const text = $("prompt").value;
  if (running || !info) return;
  generate(async (signal) => ({ text, ids: (await getJson("tokenize", { body: { prompt: text }, signal })).tokens }));
}

let counting;

// Shows the number of tokens of the prompt.
async function count() {
  counting?.abort();
  const mine = (counting = new AbortController());
  const text = $("prompt").value;
  try {
    const found = text ? (await getJson("tokenize", { body: { prompt: text }, signal: mine.signal })).count : 0;
    const beyond = found > info.block_size ? `; the model sees the last ${info.block_size}` : "";
    $("count").textContent = `${found.toLocaleString()} token${found === 1 ? "" : "s"}${beyond}`;
  } catch {
    if (!mine.signal.aborted) $("count").textContent = "\u00a0"; // the request itself will report the error
  }
}

export async function copyText(text, done) {
  try {
    await navigator.clipboard.writeText(text);
    say(done);
    return true;
  } catch {
    say("This browser does not allow copying.");
    return false;
  }
}

async function copyLink() {
  const copied = await copyText(link(), "Link copied.");
  $("link").textContent = copied ? "Copied" : "See the address bar";
  setTimeout(() => ($("link").textContent = "Copy link"), 2000);
}

let pause;
$("prompt").addEventListener("input", () => {
  clearTimeout(pause);
  if (info) pause = setTimeout(count, 250);
});
$("prompt").addEventListener("keydown", (event) => (event.ctrlKey || event.metaKey) && event.key === "Enter" && submit(event));
$("prompt-form").addEventListener("submit", submit);
$("stop").addEventListener("click", () => running?.abort());
$("regenerate").addEventListener("click", () => generate(() => last));
$("link").addEventListener("click", copyLink);
inspect($("samples"), (text, index, alternative) => text.card.proceed(index, alternative));

$("bounded").checked = stored.get("llm-bounded") ?? false;
const showBounds = () => $("samples").classList.toggle("bounded", $("bounded").checked);
$("bounded").addEventListener("change", () => (stored.set("llm-bounded", $("bounded").checked), showBounds()));
showBounds();

const names = LEVELS.map((limit, i) => (i ? `${100 * limit}–${100 * LEVELS[i - 1]}%` : `≥ ${100 * limit}%`));
names.push(`< ${100 * LEVELS.at(-1)}%`);
$("legend").append(...names.map((name, i) => element("span", `level-${i}`, name)));
