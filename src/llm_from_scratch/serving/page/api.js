// Calls to the server: API key, errors as sentences, server-sent events.

const STORED = "llm-key";

export class ServerError extends Error {}

// Sends a request; a 401 asks for the key and tries again. Throws ServerError with a readable message.
export async function call(path, { body, signal } = {}) {
  let note;
  for (;;) {
    const headers = {};
    const key = sessionStorage.getItem(STORED);
    if (key) headers.Authorization = `Bearer ${key}`;
    if (body) headers["Content-Type"] = "application/json";
    let response;
    try {
      response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
    } catch (error) {
      throw gone(error);
    }
    if (response.ok) return response;
    if (response.status !== 401) throw new ServerError(await sentence(response));
    if (sessionStorage.getItem(STORED) === key) {
      note = key ? "The server rejected this key." : undefined;
      if (!(await askForKey(note))) throw new ServerError("This server requires an API key.");
    }
  }
}

export async function getJson(path, options) {
  try {
    return await (await call(path, options)).json();
  } catch (error) {
    throw error instanceof SyntaxError ? new ServerError("The server’s answer could not be read.") : gone(error);
  }
}

// The JSON objects of a stream of server-sent events, up to [DONE].
export async function* events(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder(); // keeps incomplete characters between chunks
  let buffer = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      buffer += done ? decoder.decode() : decoder.decode(value, { stream: true });
      const blocks = buffer.split(/\r\n\r\n|\n\n/); // an incomplete event stays in the buffer
      buffer = blocks.pop();
      for (const block of blocks) {
        const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        const data = lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
        if (data === "[DONE]") return;
        if (!data) continue;
        const event = JSON.parse(data);
        if (event.error) throw new ServerError(asSentence(event.error.message ?? "The server failed."));
        yield event;
      }
      if (done) throw new ServerError("The connection ended before the text was complete.");
    }
  } catch (error) {
    throw error instanceof SyntaxError ? new ServerError("The server’s answer could not be read.") : gone(error);
  } finally {
    reader.cancel().catch(() => {});
  }
}

function gone(error) {
  if (error instanceof ServerError || error.name === "AbortError") return error;
  return new ServerError("The server cannot be reached. Is it still running?");
}

async function sentence(response) {
  const told = await response.json().then((body) => body.error?.message, () => undefined);
  const seconds = parseInt(response.headers.get("Retry-After"), 10);
  const again = seconds >= 0 ? ` Try again in ${seconds} s.` : " Try again in a moment.";
  if (response.status === 429) return "The server is busy with other requests." + again;
  if (response.status === 503) return `The server is not ready${told ? `: ${told}` : ""}.` + again;
  return told ? asSentence(told) : `The server refused the request (status ${response.status}).`;
}

function asSentence(text) {
  const begun = String(text).trim().replace(/^[a-z](?=[a-z]* )/, (letter) => letter.toUpperCase());
  return /[.!?]$/.test(begun) ? begun : begun + ".";
}

let asking;

// One dialog for all waiting requests.
function askForKey(note) {
  asking ??= new Promise((resolve) => {
    const dialog = document.getElementById("key-dialog");
    const input = document.getElementById("key");
    if (note) document.getElementById("key-note").textContent = note;
    dialog.returnValue = input.value = "";
    dialog.addEventListener("close", () => {
      asking = undefined;
      const given = dialog.returnValue === "ok" && input.value;
      if (given) sessionStorage.setItem(STORED, input.value.trim());
      resolve(Boolean(given));
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}
