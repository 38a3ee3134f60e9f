// The Chat view: a streamed conversation.

import { call, events } from "./api.js";
import { calm, complain, element, say } from "./say.js";
import { sampling } from "./settings.js";

const $ = (id) => document.getElementById(id);
const EMPTY = $("messages").firstElementChild;
const messages = []; // {role, content, end}: end is a note below an answer
let info;
let running;

export function start(given) {
  info = given;
}

function draw() {
  const bubbles = messages.map(({ role, content, end }) => {
    const who = element("p", "note", role === "user" ? "You" : "Model");
    return element("div", `message ${role}`, who, element("div", "text", content), ...(end ? [element("p", "note", end)] : []));
  });
  $("messages").replaceChildren(...(bubbles.length ? bubbles : [EMPTY]));
  $("messages").scrollTop = $("messages").scrollHeight;
  return $("messages").querySelector(".message:last-child .text");
}

function busy(yes) {
  const focused = document.activeElement;
  $("chat-stop").disabled = !yes;
  $("send").disabled = yes;
  $("chat-again").disabled = yes || !messages.length;
  if (focused === $("chat-stop") || focused === $("chat-again")) $("message").focus();
}

// Requests an answer to the conversation. The old answer stays until the new one begins.
async function answer() {
  running?.abort();
  const mine = (running = new AbortController());
  calm();
  busy(true);
  say("Waiting for the server.");
  const { n, ...settings } = sampling();
  const asked = messages.at(-1)?.role === "assistant" ? messages.slice(0, -1) : messages.slice();
  let reply;
  try {
    const body = { model: info.model, messages: asked.map(({ role, content }) => ({ role, content })), stream: true, ...settings };
    const response = await call("v1/chat/completions", { body, signal: mine.signal });
    messages.length = asked.length;
    reply = { role: "assistant", content: "" };
    messages.push(reply);
    const text = draw();
    for await (const event of events(response)) {
      const { delta, finish_reason: reason } = event.choices[0] ?? {};
      const box = $("messages");
      const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
      reply.content += delta?.content ?? "";
      text.append(delta?.content ?? "");
      if (reason === "length") reply.end = "reached max tokens";
      else if (reason && !reply.content) reply.end = "empty answer";
      if (reason && reply.end) text.after(element("p", "note", reply.end));
      if (atEnd) box.scrollTop = box.scrollHeight; // unless the reader has scrolled back
    }
    say(`Model: ${reply.content}`);
  } catch (error) {
    if (reply) reply.end = error.name === "AbortError" ? "stopped" : "interrupted";
    if (messages.at(-1)?.content === "") messages.pop(); // an answer that never began
    // without an answer, the message returns to the field: roles must alternate
    if (messages.at(-1)?.role === "user") $("message").value = [messages.pop().content, $("message").value].filter(Boolean).join("\n");
    draw();
    say(error.name === "AbortError" ? "Stopped." : "");
    complain(error);
  } finally {
    if (running === mine) {
      running = undefined;
      busy(false);
    }
  }
}

function send(event) {
  event.preventDefault();
  const content = $("message").value;
  if (!content.trim() || running || !info) return;
  messages.push({ role: "user", content });
  $("message").value = "";
  draw();
  answer();
}

function clear() {
  running?.abort();
  messages.length = 0;
  draw();
  calm();
  $("message").focus();
  busy(false);
}

$("chat-form").addEventListener("submit", send);
$("message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
});
$("chat-stop").addEventListener("click", () => running?.abort());
$("chat-again").addEventListener("click", answer);
$("chat-clear").addEventListener("click", clear);
