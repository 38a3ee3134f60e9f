// The Watch view: curves and samples of a run, fetched as they are written.

import { getJson } from "./api.js";
import { Chart, Curve } from "./chart.js";
import { element } from "./say.js";

const $ = (id) => document.getElementById(id);
const EVERY = { live: 1000, ended: 5000, failed: 5000 }; // milliseconds between two requests

const curves = { loss: new Curve(), train: new Curve(), val: new Curve() };
const chart = new Chart($("chart").firstElementChild, curves);
const rates = []; // the newest points with a speed
let samples = []; // {step, text}
let at = { metrics: 0, samples: 0 }; // bytes read so far
let run; // the answer of /v1/watch
let finals = {};
let wanted = false; // the view is shown
let served = false;
let timer;
let looking = false;

export function start(info) {
  served = info.watch;
  if (!served) $("watch-note").textContent = "No run to show. Start the server with --watch=FOLDER.";
  look(wanted);
}

export function look(shown) {
  wanted = shown;
  clearTimeout(timer);
  if (wanted && served && !document.hidden) poll();
}

async function poll() {
  if (looking) return;
  looking = true;
  let next = EVERY.failed;
  try {
    run = await getJson("v1/watch");
    await fetchAll("metrics", "points", forget, takePoint);
    await fetchAll("samples", "samples", () => (samples = []), takeSample);
    next = run.live ? EVERY.live : EVERY.ended;
    show();
  } catch (error) {
    $("watch-note").hidden = false;
    $("watch-note").textContent = error.message;
  }
  looking = false;
  clearTimeout(timer);
  if (wanted && !document.hidden) timer = setTimeout(poll, next);
}

// The lines written since the last request; one response is limited in size.
async function fetchAll(what, list, startOver, take) {
  for (;;) {
    const answer = await getJson(`v1/watch/${what}?after=${at[what]}`);
    if (answer.reset) startOver();
    answer[list].forEach(take);
    const done = answer.next === at[what] && !answer.reset;
    at[what] = answer.next;
    if (done || !answer[list].length) return;
    if (what === "metrics") chart.draw();
  }
}

function forget() {
  for (const curve of Object.values(curves)) curve.steps.length = curve.values.length = 0;
  rates.length = 0;
  finals = {};
}

function takePoint(point) {
  if ("loss" in point) curves.loss.add(point.step, point.loss);
  if ("train_loss" in point) curves.train.add(point.step, point.train_loss);
  if ("val_loss" in point) curves.val.add(point.step, point.val_loss);
  if ("val_loss_full" in point) finals = point;
  if (point.tokens_per_s) rates.push(point.tokens_per_s);
  if (rates.length > 20) rates.shift();
}

function takeSample(sample) {
  while (samples.length && samples.at(-1).step >= sample.step) samples.pop(); // repeated after a resume
  samples.push(sample);
}

function show() {
  $("watch-note").hidden = true;
  $("watch").hidden = false;
  const of = run.max_iters ? ` of ${run.max_iters.toLocaleString()}` : "";
  const state = element("span", run.live ? "live" : "", run.live ? "live" : "not running");
  $("run").replaceChildren(element("b", "", run.name), ` · step ${(run.step ?? 0).toLocaleString()}${of} · `, state);
  figures();
  table();
  const range = chart.range() ?? [0, 0];
  $("chart").ariaValueMin = range[0];
  $("chart").ariaValueMax = range[1];
  if (chart.cursor === undefined) $("chart").ariaValueText = describe(range[1]);
  showSamples();
  chart.draw();
}

function figures() {
  const loss = curves.loss.values.at(-1);
  const known = curves.val.values.filter((value) => value !== null);
  const best = known.length ? known.reduce((a, b) => Math.min(a, b)) : undefined;
  const speed = rates.length ? rates.reduce((a, b) => a + b) / rates.length : undefined;
  const facts = [
    ["train loss", curves.loss.steps.length ? figure(loss) : "–"],
    [`best validation loss${best === undefined ? "" : `, step ${curves.val.steps[curves.val.values.indexOf(best)].toLocaleString()}`}`, best === undefined ? "–" : figure(best)],
    ["tokens/s", speed ? Math.round(speed).toLocaleString() : "–"],
  ];
  if (finals.val_loss_full) facts.push(["whole validation split", figure(finals.val_loss_full)]);
  $("figures").replaceChildren(...facts.map(([name, value]) => element("div", "", element("dt", "", name), element("dd", "", value))));
}

const figure = (value) => (value === null || value === undefined ? "not finite" : value.toFixed(4));

function table() {
  const rows = curves.val.steps.map((step, i) => [step, curves.train.values[curves.train.steps.indexOf(step)], curves.val.values[i]]);
  const cells = rows.slice(-10).map(([step, ...losses]) => [String(step), ...losses.map(figure)]);
  $("values").replaceChildren(...cells.map((row) => element("tr", "", ...row.map((cell) => element("td", "", cell)))));
}

// The values at a step, in words.
function describe(step) {
  const parts = [];
  const i = curves.loss.nearest(step);
  if (i >= 0) parts.push(`step ${curves.loss.steps[i]}: train loss ${figure(curves.loss.values[i])}`);
  const j = curves.val.nearest(step);
  if (j >= 0) {
    const k = curves.train.steps.indexOf(curves.val.steps[j]);
    const train = k >= 0 ? `train ${figure(curves.train.values[k])}, ` : "";
    parts.push(`evaluated at ${curves.val.steps[j]}: ${train}validation ${figure(curves.val.values[j])}`);
  }
  return parts.join(" · ") || "no points yet";
}

function point(step) {
  const { steps } = curves.loss.steps.length ? curves.loss : curves.val;
  if (!steps.length || step === undefined) return;
  const curve = curves.loss.steps.length ? curves.loss : curves.val;
  chart.cursor = steps[curve.nearest(step)];
  $("readout").textContent = describe(chart.cursor);
  $("chart").ariaValueNow = chart.cursor;
  $("chart").ariaValueText = describe(chart.cursor);
  chart.draw();
}

function leave() {
  if (document.activeElement === $("chart")) return;
  chart.cursor = undefined;
  $("readout").textContent = "\u00a0";
  chart.draw();
}

$("chart").addEventListener("pointermove", (event) => point(chart.stepAt(event.offsetX)));
$("chart").addEventListener("pointerdown", (event) => point(chart.stepAt(event.offsetX)));
$("chart").addEventListener("click", (event) => {
  if (samples.length && chart.x) pick(nearestSample(chart.stepAt(event.offsetX)));
});
$("chart").addEventListener("pointerleave", leave);
$("chart").addEventListener("blur", leave);
$("chart").addEventListener("focus", () => point(chart.cursor ?? Infinity));
$("chart").addEventListener("keydown", (event) => {
  const curve = curves.loss.steps.length ? curves.loss : curves.val;
  const last = curve.steps.length - 1;
  if (last < 0) return;
  const here = curve.nearest(chart.cursor ?? Infinity);
  const small = Math.max(1, Math.round(last / 200));
  const to = {
    ArrowLeft: here - small, ArrowDown: here - small, ArrowRight: here + small, ArrowUp: here + small,
    PageDown: here - 10 * small, PageUp: here + 10 * small, Home: 0, End: last,
  }[event.key];
  if (to === undefined) return;
  point(curve.steps[Math.max(0, Math.min(last, to))]);
  event.preventDefault();
});

// samples

function nearestSample(step) {
  return samples.reduce((best, { step: s }, i) => (Math.abs(s - step) < Math.abs(samples[best].step - step) ? i : best), 0);
}

function pick(index) {
  $("follow").checked = false;
  $("slider").value = index;
  showSamples();
}

function showSamples() {
  $("no-samples").hidden = samples.length > 0;
  $("written").hidden = !samples.length;
  const slider = $("slider");
  slider.max = Math.max(0, samples.length - 1);
  if ($("follow").checked) slider.value = slider.max;
  const shown = samples[Number(slider.value)];
  chart.mark = shown?.step;
  chart.draw();
  if (!shown) return;
  $("slider-step").textContent = shown.step.toLocaleString();
  slider.setAttribute("aria-valuetext", `step ${shown.step}`);
  if ($("written-text").textContent !== shown.text) $("written-text").textContent = shown.text;
}

$("slider").addEventListener("input", () => pick(Number($("slider").value)));
$("follow").addEventListener("change", showSamples);
for (const [id, name] of [["log-x", "logX"], ["log-y", "logY"]]) {
  $(id).addEventListener("change", (event) => {
    chart[name] = event.target.checked;
    chart.draw();
  });
}
document.addEventListener("visibilitychange", () => look(wanted));
