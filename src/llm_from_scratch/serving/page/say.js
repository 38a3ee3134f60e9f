// What the page tells: errors in a box that stays, progress to those who listen.

const box = document.getElementById("error");
const status = document.getElementById("status");

// again: what a button "Try again" does.
export function complain(error, again) {
  if (error.name === "AbortError") return;
  console.debug(error);
  const text = document.createElement("p");
  text.textContent = error.message;
  const buttons = [again && button("Try again", () => (calm(), again())), button("Dismiss", calm)];
  box.replaceChildren(text, ...buttons.filter(Boolean));
}

export function calm() {
  box.replaceChildren();
}

export function say(text) {
  status.textContent = text;
}

export function button(text, onClick) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  made.addEventListener("click", onClick);
  return made;
}

// An element with a class and children (nodes or texts).
export function element(name, className = "", ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

// Storage that a browser may refuse to give.
export const stored = {
  get(name) {
    try {
      return JSON.parse(localStorage.getItem(name));
    } catch {
      return null;
    }
  },
  set(name, value) {
    try {
      localStorage.setItem(name, JSON.stringify(value));
    } catch {
      // the page works without
    }
  },
};
