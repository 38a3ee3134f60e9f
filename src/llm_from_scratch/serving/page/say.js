// Messages of the page: errors in a box until dismissed, progress for screen readers.

const box = document.getElementById("error");
const status = document.getElementById("status");

// again: the action of the button "Try again".
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

// Local storage, which a browser may refuse.
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
      // the page works without it
    }
  },
};
