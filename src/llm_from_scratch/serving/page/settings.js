// Sampling settings: their controls and their storage (this browser, and a link).

import { button, element, stored } from "./say.js";

const STORED = "llm-settings";
const form = document.getElementById("settings-form");
const prompt = document.getElementById("prompt");
let fields = [];

// off: the value without effect, which is not sent.
function fieldsFor({ limits, vocab_size: ids, defaults }) {
  const list = [
    { name: "max_tokens", label: "Max tokens", min: 1, max: limits.max_tokens, step: 1, value: 200 },
    { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, value: 0.8, hint: "0: always the most likely token" },
    { name: "n", label: "Samples", min: 1, max: limits.max_n, slide: Math.min(limits.max_n, 8), step: 1, value: 1, only: "complete" },
    { name: "seed", label: "Seed", kind: "seed", value: "", hint: "empty: a new one each time" },
    { name: "top_k", label: "Top k", min: 0, max: ids, slide: Math.min(ids, 200), step: 1, value: 0, off: 0, more: true, hint: "0: all tokens" },
    { name: "top_p", label: "Top p", min: 0.01, max: 1, step: 0.01, value: 1, off: 1, more: true },
    { name: "min_p", label: "Min p", min: 0, max: 1, step: 0.01, value: 0, off: 0, more: true },
    { name: "repetition_penalty", label: "Repetition penalty", min: 0.5, max: 2, step: 0.05, value: 1, off: 1, more: true },
    { name: "presence_penalty", label: "Presence penalty", min: -2, max: 2, step: 0.1, value: 0, off: 0, more: true },
    { name: "frequency_penalty", label: "Frequency penalty", min: -2, max: 2, step: 0.1, value: 0, off: 0, more: true },
    { name: "stop", label: "Stop sequences", kind: "lines", value: "", more: true, hint: "one per line; \\n is a line break" },
  ];
  for (const [name, value] of Object.entries(defaults ?? {})) {
    const isKnown = list.some((field) => field.name === name);
    // a filter that was added to sampling.py
    if (!isKnown && typeof (value ?? 0) === "number") list.push({ name, label: name, min: -Infinity, max: Infinity, value: value ?? "", off: value ?? "", more: true });
  }
  for (const field of list) {
    field.value = allowed(field, defaults?.[field.name] ?? field.value);
    field.slide ??= field.max;
  }
  return list;
}

function allowed(field, value) {
  if (field.kind === "lines") return String(value);
  if (field.kind === "seed") return /^\d{1,15}$/.test(String(value).trim()) ? String(value).trim() : "";
  const number = String(value).trim() === "" ? NaN : Number(value);
  if (!Number.isFinite(number)) return field.value;
  const stepped = field.step === 1 ? Math.round(number) : number;
  return Math.min(Math.max(stepped, field.min), field.max);
}

export function build(info) {
  fields = fieldsFor(info);
  const more = element("details", "", element("summary", "", "More settings"));
  form.replaceChildren(...fields.filter((f) => !f.more).map(control), more);
  more.append(...fields.filter((f) => f.more).map(control));
  form.append(button("Reset", () => fill(Object.fromEntries(fields.map((f) => [f.name, f.value])))));
  const kept = stored.get(STORED) ?? {};
  fill(kept);
  prompt.value ||= kept.prompt ?? "";
  readLink();
  form.addEventListener("submit", (event) => event.preventDefault());
  prompt.addEventListener("input", keep);
  addEventListener("hashchange", readLink);
}

function control(field) {
  const row = element("div", `field ${field.only ?? ""}`);
  const id = `set-${field.name}`;
  const title = element("label", "", field.label);
  title.htmlFor = id;
  const box = document.createElement(field.kind === "lines" ? "textarea" : "input");
  Object.assign(box, { id, name: field.name, autocomplete: "off" });
  if (field.kind === "lines") box.rows = 2;
  row.append(title, box);
  if (field.kind === "seed") Object.assign(box, { inputMode: "numeric", placeholder: "random" });
  if (!field.kind) {
    Object.assign(box, { type: "number", min: field.min, max: field.max, step: field.step === 1 ? 1 : "any" });
    if (Number.isFinite(field.slide)) row.append(slider(field, box));
  }
  if (field.hint) {
    const hint = element("p", "note", field.hint);
    hint.id = `${id}-hint`;
    box.setAttribute("aria-describedby", hint.id);
    row.append(hint);
  }
  box.addEventListener("change", () => (fill({ [field.name]: box.value }), keep()));
  return row;
}

function slider(field, box) {
  const slide = Object.assign(document.createElement("input"), { type: "range", min: field.min, max: field.slide, step: field.step });
  slide.setAttribute("aria-label", `${field.label}, slider`);
  slide.addEventListener("input", () => ((box.value = slide.value), keep()));
  box.addEventListener("input", () => (slide.value = box.value));
  return slide;
}

// Shows values, clamped to their ranges. Unknown names are ignored.
function fill(values) {
  for (const field of fields) {
    const box = form.elements[field.name];
    const value = allowed(field, values[field.name] ?? (box.value === "" ? field.value : box.value));
    box.value = values[field.name] === "" && field.kind ? "" : value;
    const slide = box.parentNode.querySelector("[type=range]");
    if (slide) slide.value = box.value;
  }
  keep();
}

function read() {
  return Object.fromEntries(fields.map((f) => [f.name, allowed(f, form.elements[f.name].value)]));
}

function keep() {
  stored.set(STORED, { ...read(), prompt: prompt.value.slice(0, 100_000) });
}

// The sampling fields of a request.
export function sampling() {
  const values = read();
  const body = {};
  for (const field of fields) if (!field.kind && values[field.name] !== field.off) body[field.name] = values[field.name];
  body.seed = values.seed === "" ? Math.floor(Math.random() * 2 ** 31) : Number(values.seed);
  const stop = values.stop.split("\n").filter(Boolean).map((text) => text.replace(/\\n/g, "\n").replace(/\\t/g, "\t"));
  if (stop.length) body.stop = stop;
  return body;
}

// The address of this page with the prompt and the changed settings.
export function link() {
  const values = read();
  const changed = fields.filter((f) => String(values[f.name]) !== String(f.value)).map((f) => [f.name, values[f.name]]);
  history.replaceState(null, "", `#${new URLSearchParams([["prompt", prompt.value], ...changed])}`);
  return location.href;
}

function readLink() {
  const given = new URLSearchParams(location.hash.slice(1));
  if (!given.has("prompt")) return;
  prompt.value = given.get("prompt");
  prompt.dispatchEvent(new Event("input"));
  fill(Object.fromEntries(fields.map((f) => [f.name, given.get(f.name) ?? f.value])));
}
