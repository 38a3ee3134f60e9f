// The tokens of one sample as text: coloured by likelihood, appended as they arrive, with one tab stop.

import { Joiner, hex, label } from "./bytes.js";
import { element } from "./say.js";

export const LEVELS = [0.5, 0.2, 0.05, 0.01]; // probabilities at which the colour changes

export function percent(logprob) {
  const p = 100 * Math.exp(logprob);
  if (p < 0.1) return "< 0.1%";
  return p > 99.9 ? "> 99.9%" : `${p.toFixed(p < 10 || p > 99.4 ? 1 : 0)}%`;
}

// A token: {id, bytes, logprob, top: [{id, bytes, logprob}], prompt, chosen, beyond}. logprob, top: null if unknown.
// The last three are flags: part of the prompt, chosen by the reader, beyond the sample's end.
export class TokenText {
  tokens = [];
  spans = []; // may lag behind tokens until the next frame
  current = -1; // the tab stop
  drawn = 0; // tokens without the prompt's, and the sum of their log-probabilities
  logprob = 0;

  // before: the text before the first token
  constructor(root, before = "") {
    this.root = root;
    root.tokens = this;
    this.reset(before);
  }

  reset(before, tokens = []) {
    Object.assign(this, { before, tokens: [], spans: [], current: -1, joiner: new Joiner(), drawn: 0, logprob: 0 });
    this.line = element("div", "line");
    if (before) this.line.append(element("span", "before", before));
    this.root.replaceChildren(this.line);
    tokens.forEach((token) => this.push(token));
  }

  push(token) {
    this.tokens.push(token);
    this.count(token, 1);
    this.frame ??= requestAnimationFrame(() => this.render());
  }

  count(token, sign) {
    if (token.prompt) return;
    this.drawn += sign;
    this.logprob += sign * (token.logprob ?? 0);
  }

  render() {
    cancelAnimationFrame(this.frame);
    this.frame = undefined;
    while (this.spans.length < this.tokens.length) this.append(this.tokens[this.spans.length]);
    if (this.current < 0 && this.spans.length) this.select(0);
  }

  append(token) {
    token.pending = [...this.joiner.pending];
    const { parts, completed, rest } = this.joiner.push(token.bytes);
    if (completed) this.markParts(true);
    const span = element("span", "t");
    for (const part of parts) span.append(typeof part === "string" ? part : element("span", "raw", hex(part)));
    if (rest.length) span.append(element("span", "raw rest", hex(rest)));
    if (!token.bytes.length) span.append(element("span", "raw", "⟨⟩"));
    const text = span.textContent;
    if (/^\s+$/.test(text)) span.dataset.space = text.replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥");
    if (token.logprob !== null) {
      const p = Math.exp(token.logprob);
      span.classList.add(`level-${LEVELS.filter((limit) => p < limit).length}`);
    }
    const marks = { chosen: token.chosen, "of-prompt": token.prompt, beyond: token.beyond };
    for (const [name, holds] of Object.entries(marks)) span.classList.toggle(name, Boolean(holds));
    span.dataset.id = token.id;
    span.index = this.spans.length;
    // each line is a block, so that a long text is not laid out again for each token
    if (this.spans.at(-1)?.textContent.endsWith("\n")) this.root.append((this.line = element("div", "line")));
    this.line.append(span);
    this.spans.push(span);
  }

  // Whether the pending bytes of the last tokens have become a character.
  markParts(done) {
    for (let i = this.spans.length - 1; i >= 0; i--) {
      const rest = this.spans[i].querySelector(".rest");
      if (!rest || rest.classList.contains("done") === done) return;
      rest.classList.toggle("done", done);
      if (this.spans[i].textContent !== rest.textContent) return; // the first token of the character
    }
  }

  // Keeps the first `count` tokens.
  cut(count) {
    this.render();
    this.tokens.forEach((token, i) => token.beyond && this.markBeyond(i, false));
    if (count >= this.tokens.length) return;
    const pending = this.tokens[count].pending;
    for (const span of this.spans.splice(count)) span.remove();
    for (const token of this.tokens.splice(count)) this.count(token, -1);
    this.joiner.pending = [...pending];
    if (pending.length) this.markParts(false);
    for (const line of [...this.root.children].slice(1)) if (!line.hasChildNodes()) line.remove();
    this.line = this.root.lastElementChild;
    if (this.current >= count) this.current = -1;
    if (count) this.select(Math.min(Math.max(this.current, 0), count - 1));
  }

  // Makes one token the tab stop, and a button with a name for screen readers.
  select(index, focus = false) {
    const old = this.spans[this.current];
    for (const name of ["tabindex", "role", "aria-label", "aria-haspopup"]) old?.removeAttribute(name);
    this.current = index;
    const span = this.spans[index];
    span.tabIndex = 0;
    span.setAttribute("role", "button");
    span.setAttribute("aria-haspopup", "dialog");
    span.setAttribute("aria-label", this.name(index));
    if (focus) span.focus();
  }

  name(index) {
    const { bytes, pending, logprob } = this.tokens[index];
    return `${label(bytes, pending)}, ${logprob === null ? "no probability" : percent(logprob)}`;
  }

  // Marks the tokens after the end of the sample's text (a stop text); from: the first candidate.
  markCut(text, from) {
    this.render();
    const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    let length = 0;
    for (let i = from; i < this.tokens.length; i++) {
      if (length >= text.length) this.markBeyond(i, true);
      length += decoder.decode(new Uint8Array(this.tokens[i].bytes), { stream: true }).length;
    }
  }

  markBeyond(index, beyond) {
    this.tokens[index] = { ...this.tokens[index], beyond }; // a copy: an undo may need the old one
    this.spans[index].classList.toggle("beyond", beyond);
  }

  // Moves the tab stop by a key. Returns whether the key did that.
  move(key) {
    const last = this.spans.length - 1;
    const to = {
      ArrowLeft: () => this.current - 1,
      ArrowRight: () => this.current + 1,
      Home: () => 0,
      End: () => last,
      ArrowUp: () => this.vertical(-1),
      ArrowDown: () => this.vertical(1),
    }[key]?.();
    if (to === undefined) return false;
    this.select(Math.max(0, Math.min(last, to)), true);
    return true;
  }

  // The nearest token in the next row, above or below.
  vertical(step) {
    const box = (i) => this.spans[i].getBoundingClientRect();
    const middle = (b) => (b.left + b.right) / 2;
    const here = box(this.current);
    let best = this.current;
    let row;
    for (let i = this.current + step; i >= 0 && i < this.spans.length; i += step) {
      const there = box(i);
      if (Math.abs(there.bottom - here.bottom) < here.height / 2) continue;
      row ??= there.bottom;
      if (Math.abs(there.bottom - row) > here.height / 2) break;
      if (best === this.current || Math.abs(middle(there) - middle(here)) < Math.abs(middle(box(best)) - middle(here))) best = i;
    }
    return best;
  }
}
