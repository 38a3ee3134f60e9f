"""Makes the README's pictures from a real run of the demo: terminal.png and loss.png, next to this file.

    .venv/bin/python assets/pictures.py [settings of llm-train, such as --max_iters=100]

The demo runs in a terminal of its own (80 columns), so this needs Linux or macOS; and matplotlib (extra: plots), which
brings the font and Pillow. terminal.png ends with the first sample.
"""

from __future__ import annotations

import os
import pty
import re
import shutil
import struct
import sys
import tempfile
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

HERE = Path(__file__).resolve().parent
COLUMNS, ROWS = 80, 40
FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono.ttf"
SIZE, LINE, MARGIN = 16, 20, 14  # pixels
CONTROL = re.compile(r"\x1b\[(\??[\d;]*)([A-Za-z])|\r|(\n)")
# Positions of the dots of a braille character in its cell of 2 columns and 4 rows, by bit (Unicode chart U+2800).
DOTS = ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (0, 3), (1, 3))


def record(command: list[str]) -> str:
    """The terminal output of a command. Raises SystemExit if it fails."""
    chunks: list[bytes] = []

    def read(terminal: int) -> bytes:
        if not chunks:
            import fcntl
            import termios

            fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        chunks.append(os.read(terminal, 1 << 16))
        return chunks[-1]

    os.environ |= {"COLUMNS": str(COLUMNS), "TERM": "xterm-256color"}
    status = pty.spawn(command, read)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with code {os.waitstatus_to_exitcode(status)}")
    return b"".join(chunks).decode("utf-8", "replace")


def screen(recorded: str) -> list[str]:
    """The final lines on the terminal, with their colours. Emulates only what a progress bar needs."""
    lines, row, at = [""], 0, 0
    for match in CONTROL.finditer(recorded + "\n"):
        lines[row] += recorded[at : match.start()]
        at = match.end()
        number, letter, newline = match.groups()
        if letter == "A":
            row = max(0, row - int(number or 1))
        elif letter == "K":
            lines[row] = ""
        elif letter == "m":
            lines[row] += match.group()
        elif newline:
            row += 1
            lines += [""] * (row == len(lines))
    return lines


def draw(lines: list[str], path: Path) -> None:
    """Text with ANSI colours as a picture: every character in its cell, independent of the viewer's fonts."""
    console = Console(width=COLUMNS, file=sys.stderr, force_terminal=True, color_system="truecolor")
    rows = console.render_lines(Text.from_ansi("\n".join(lines)))
    font = ImageFont.truetype(str(FONT), SIZE)
    cell = font.getlength("M")
    picture = Image.new("RGB", (round(COLUMNS * cell) + 2 * MARGIN, len(rows) * LINE + 2 * MARGIN), "#0c0c0c")
    pen = ImageDraw.Draw(picture)
    for y, segments in enumerate(rows):
        x = 0
        for text, style, _ in segments:
            colour = style.color.get_truecolor(MONOKAI) if style and style.color else MONOKAI.foreground_color
            for sign in text:
                left, top = MARGIN + x * cell, MARGIN + y * LINE
                if "\u2800" <= sign <= "\u28ff":  # the font lacks these characters
                    for bit, (column, dot) in enumerate(DOTS):
                        if (ord(sign) - 0x2800) >> bit & 1:
                            cx, cy = left + (column + 0.5) * cell / 2, top + (dot + 0.5) * LINE / 4
                            pen.ellipse((cx - 1.2, cy - 1.2, cx + 1.2, cy + 1.2), fill=tuple(colour))
                elif sign != " ":
                    pen.text((left, top), sign, font=font, fill=tuple(colour))
                x += 1
    picture.quantize(32).save(path, optimize=True)


def main(settings: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "out"
        recorded = record([sys.executable, "-m", "llm_from_scratch.cli.demo", f"--out_dir={run}", *settings])
        shutil.copy(run / "loss.png", HERE / "loss.png")
    lines = screen(recorded.replace(str(run), "out-demo"))
    rules = [i for i, line in enumerate(lines) if line.strip() and not line.strip(" -")]
    draw(["$ ./just demo", *lines[: rules[0] if rules else None]], HERE / "terminal.png")


if __name__ == "__main__":
    main(sys.argv[1:])
