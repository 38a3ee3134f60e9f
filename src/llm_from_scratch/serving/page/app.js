// Start: theme, tabs, and the server's description of itself.

import { getJson } from "./api.js";
import * as chat from "./chat.js";
import * as complete from "./complete.js";
import { calm, complain, stored } from "./say.js";
import { build } from "./settings.js";
import * as watch from "./watch.js";

const $ = (id) => document.getElementById(id);
const THEMES = ["auto", "light", "dark"];

function theme(name) {
  document.documentElement.dataset.theme = name;
  $("theme").textContent = `Theme: ${name}`;
  stored.set("llm-theme", name);
  dispatchEvent(new Event("themechange"));
}

$("theme").addEventListener("click", () => {
  theme(THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length]);
});
theme(THEMES.includes(stored.get("llm-theme")) ? stored.get("llm-theme") : "auto");

const tabs = [...document.querySelectorAll("[role=tab]")];

function show(tab) {
  for (const other of tabs) {
    const chosen = other === tab;
    other.setAttribute("aria-selected", chosen);
    other.tabIndex = chosen ? 0 : -1;
    $(other.getAttribute("aria-controls")).hidden = !chosen;
  }
  document.body.dataset.view = tab.id.slice("tab-".length);
  document.querySelector(".columns").hidden = tab.id === "tab-watch";
  watch.look(tab.id === "tab-watch");
  calm();
}

$("tabs").addEventListener("click", (event) => event.target.closest("[role=tab]") && show(event.target.closest("[role=tab]")));
$("tabs").addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  const there = tabs.filter((tab) => !tab.hidden);
  const next = there[(there.indexOf(document.activeElement) + step + there.length) % there.length];
  show(next);
  next.focus();
});

async function begin() {
  try {
    const info = await getJson("v1/info");
    const size = Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 }).format(info.parameters);
    const tokens = info.tokenizer === "hf" ? `vocabulary ${info.vocab_size.toLocaleString("en")}` : `${info.tokenizer} tokens`;
    const facts = [`${size} parameters`, tokens, `window ${info.block_size}`, info.dtype, info.device];
    $("model").replaceChildren(Object.assign(document.createElement("b"), { textContent: info.model }), " ", facts.join(" · "));
    document.title = `${info.model} · Playground`;
    $("tab-chat").hidden = !info.chat;
    build(info);
    complete.start(info);
    chat.start(info);
    watch.start(info);
    document.body.dataset.ready = "yes";
  } catch (error) {
    complain(error, begin);
  }
}

if (matchMedia("(max-width: 60rem)").matches) $("settings").open = false;
show(tabs[0]);
begin();
