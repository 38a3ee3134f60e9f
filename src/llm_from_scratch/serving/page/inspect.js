// Inspecting a token: its probability on hover and focus, its alternatives on click and Enter.

import { hex, label } from "./bytes.js";
import { button, element } from "./say.js";
import { percent } from "./tokens.js";

const tip = document.getElementById("tip");
const popover = document.getElementById("alternatives");
let opener; // the token whose alternatives are shown

// choose(tokenText, index, alternative) is called with the user's choice.
export function inspect(root, choose) {
  const found = (event) => event.target.closest?.(".t");
  for (const type of ["pointerover", "focusin"]) {
    root.addEventListener(type, (event) => (found(event) ? showTip(found(event)) : hideTip()));
  }
  for (const type of ["pointerleave", "focusout"]) root.addEventListener(type, hideTip);
  root.addEventListener("click", (event) => found(event) && String(getSelection()) === "" && open(found(event), choose));
  root.addEventListener("keydown", (event) => {
    const span = found(event);
    if (!span || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Enter" || event.key === " ") open(span, choose);
    else if (event.key === "Escape") hideTip();
    else if (!owner(span).move(event.key)) return;
    event.preventDefault();
  });
}

const owner = (span) => span.closest(".text").tokens;

function showTip(span) {
  tip.textContent = owner(span).name(span.index);
  tip.hidden = false;
  place(tip, span);
}

function hideTip() {
  tip.hidden = true;
}

// Below the token, or above it if there is no room; inside the window.
function place(box, span) {
  const at = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const [width, height] = [box.offsetWidth, box.offsetHeight];
  const below = at.bottom + 6;
  const top = below + height > innerHeight && at.top - height - 6 > 0 ? at.top - height - 6 : below;
  box.style.left = `${Math.max(8, Math.min(at.left, document.documentElement.clientWidth - width - 8))}px`;
  box.style.top = `${Math.max(8, Math.min(top, innerHeight - height - 8))}px`;
}

function open(span, choose) {
  const text = owner(span);
  const token = text.tokens[span.index];
  text.select(span.index);
  hideTip();
  opener = span;
  const title = element("h2", "token", label(token.bytes, token.pending));
  title.id = "alternatives-title";
  const top = token.top ?? [];
  const rank = top.findIndex((other) => other.id === token.id) + 1;
  const facts = [
    token.logprob === null ? "no probability: the first token" : percent(token.logprob),
    rank ? `rank ${rank}` : top.length ? `not in the top ${top.length}` : "",
    `id ${token.id}`,
    `bytes ${hex(token.bytes).slice(1, -1)}`,
    token.chosen ? "chosen by you" : "",
  ];
  const list = element("ul");
  for (const other of top) {
    const bar = element("span", "bar");
    bar.style.width = `${100 * Math.exp(other.logprob)}%`;
    const name = element("span", "token", label(other.bytes, token.pending));
    const pick = button("", () => {
      popover.hidePopover();
      choose(text, span.index, other);
    });
    pick.append(name, element("span", "track", bar), element("span", "number", percent(other.logprob)));
    pick.dataset.id = other.id;
    if (other.id === token.id) pick.setAttribute("aria-current", "true");
    list.append(element("li", "", pick));
  }
  const rest = 1 - top.reduce((sum, other) => sum + Math.exp(other.logprob), 0);
  const all = token.logprob === null ? "" : "No alternatives: the text is too long for the server to list them.";
  const hint = top.length ? `Choose one to continue from it. All other tokens: ${percent(Math.log(Math.max(rest, 1e-9)))}` : all;
  popover.replaceChildren(title, element("p", "note", facts.filter(Boolean).join(" · ")), list, element("p", "note", hint));
  popover.append(button("Close", () => popover.hidePopover()));
  popover.showPopover();
  place(popover, span);
  popover.querySelector("button").focus();
}

popover.addEventListener("keydown", (event) => {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!step) return;
  const all = [...popover.querySelectorAll("button")];
  all[(all.indexOf(document.activeElement) + step + all.length) % all.length].focus();
  event.preventDefault();
});

popover.addEventListener("beforetoggle", (event) => {
  const inside = popover.contains(document.activeElement) || document.activeElement === document.body;
  if (event.newState === "closed" && inside && opener?.isConnected) opener.focus({ preventScroll: true });
});
addEventListener("scroll", hideTip, { passive: true, capture: true });
