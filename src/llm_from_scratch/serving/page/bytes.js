// Tokens to characters: a token may contain part of a character, or invalid bytes.

const strict = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

export const hex = (bytes) => `⟨${bytes.map((b) => b.toString(16).padStart(2, "0")).join(" ")}⟩`;

// The length in bytes of a character with this first byte; 0: invalid.
function lengthOf(lead) {
  if (lead < 0x80) return 1;
  if (lead < 0xc2 || lead > 0xf4) return 0;
  return lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
}

const isControl = (byte) => (byte < 0x20 && byte !== 9 && byte !== 10) || byte === 0x7f;

export class Joiner {
  pending = []; // bytes of an incomplete character

  // Adds a token's bytes. Returns its parts in order: strings, and arrays of bytes that are not text.
  // completed: the token completed a character of earlier tokens. The last bytes may wait in `pending`.
  push(bytes) {
    const parts = [];
    let earlier = this.pending.length; // pending bytes that belong to earlier tokens
    let completed = false;
    const text = (more) => (typeof parts.at(-1) === "string" ? (parts[parts.length - 1] += more) : parts.push(more));
    const raw = (some) => some.length && (Array.isArray(parts.at(-1)) ? parts.at(-1).push(...some) : parts.push(some));
    const giveUp = () => {
      raw(this.pending.slice(earlier));
      this.pending = [];
      earlier = 0;
    };
    for (const byte of bytes) {
      if (this.pending.length && (byte & 0xc0) !== 0x80) giveUp();
      this.pending.push(byte);
      const length = lengthOf(this.pending[0]);
      if (length === 0 || isControl(byte)) giveUp();
      else if (this.pending.length === length) {
        try {
          text(strict.decode(new Uint8Array(this.pending)));
          completed ||= earlier > 0;
          this.pending = [];
          earlier = 0;
        } catch {
          giveUp();
        }
      }
    }
    return { parts, completed, rest: this.pending.slice(earlier) };
  }
}

// A token on one line, for names and lists; pending: the bytes waiting before it.
export function label(bytes, pending = []) {
  if (!bytes.length) return "⟨⟩";
  const joiner = new Joiner();
  joiner.pending = [...pending];
  const { parts, completed, rest } = joiner.push(bytes);
  const shown = [...parts, ...(rest.length ? [rest] : [])].map((p) => (typeof p === "string" ? visible(p) : hex(p))).join("");
  return completed ? `${hex(bytes)} = ${shown}` : shown;
}

// White space as visible symbols.
export function visible(text) {
  return text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/^ +| +$/g, (spaces) => "␣".repeat(spaces.length));
}
