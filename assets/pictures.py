"""Makes the README's pictures from a real run of the demo: demo.svg, terminal.png and loss.png, next to this file.

    .venv/bin/python assets/pictures.py [settings of llm-train, such as --max_iters=100]

The demo runs in a terminal of its own, so this needs Linux or macOS. It needs the extra dev: pyte interprets the
terminal's output, matplotlib brings the font and Pillow. demo.svg is an animation of at most PLAY seconds. terminal.png
ends with the first sample. The text is data/raw/tinyshakespeare.txt, to which `./just demo` downloads it.
"""

from __future__ import annotations

import itertools
import os
import pty
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path

import matplotlib
import pyte
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
COMMAND = "./just demo"
COLUMNS, ROWS = 80, 24
PLAY, LONGEST, SHORTEST, END = 20.0, 1.0, 0.3, 5.0  # seconds of the run, of a pause, of a frame, of the last frame
CELL, LINE, MARGIN = 8, 17, 12  # pixels
FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSansMono.ttf"
BACKGROUND, FOREGROUND = "#0c0c0c", "#d9d9d9"
COLOURS = {
    "default": FOREGROUND, "black": "#555555", "red": "#f4005f", "green": "#98e024", "brown": "#fa8419",
    "blue": "#9d65ff", "magenta": "#f4005f", "cyan": "#58d1eb", "white": "#c4c5b5", "brightblack": "#888888",
}  # fmt: skip
# Positions of the dots of a braille character in its cell of 2 columns and 4 rows, by bit (Unicode chart U+2800).
DOTS = ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (0, 3), (1, 3))

Run = tuple[int, str, str]  # column, text without spaces around it, colour
Row = tuple[Run, ...]


def record(command: list[str]) -> list[tuple[float, bytes]]:
    """The terminal output of a command, as (seconds since the output before, bytes). Raises SystemExit if it fails."""
    chunks: list[tuple[float, bytes]] = []
    last = time.monotonic()

    def read(terminal: int) -> bytes:
        nonlocal last
        if not chunks:
            import fcntl
            import termios

            fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        chunk = os.read(terminal, 1 << 16)
        chunks.append((time.monotonic() - last, chunk))
        last = time.monotonic()
        return chunk

    os.environ |= {"COLUMNS": str(COLUMNS), "LINES": str(ROWS), "TERM": "xterm-256color"}
    status = pty.spawn(command, read)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with code {os.waitstatus_to_exitcode(status)}")
    return chunks


def rows_of(screen: pyte.Screen) -> tuple[Row, ...]:
    """What is on a screen."""
    rows = []
    for y in range(screen.lines):
        cells = [(x, screen.buffer[y][x]) for x in range(screen.columns)]
        runs = []
        for colour, group in itertools.groupby(cells, lambda cell: COLOURS.get(cell[1].fg, f"#{cell[1].fg}")):
            part = list(group)
            text = "".join(cell.data for _, cell in part)
            if text.strip():
                runs.append((part[0][0] + len(text) - len(text.lstrip()), text.strip(), colour))
        rows.append(tuple(runs))
    return tuple(rows)


def screen(recorded: bytes, lines: int = 400) -> list[Row]:
    """The final lines on a terminal that is high enough for all of them."""
    terminal = pyte.Screen(COLUMNS, lines)
    pyte.ByteStream(terminal).feed(recorded)
    return list(rows_of(terminal))


def frames(chunks: Sequence[tuple[float, bytes]]) -> tuple[list[float], list[tuple[Row, ...]]]:
    """The animation: the start of each frame in seconds, and what is on the screen."""
    speed = max(1.0, sum(gap for gap, _ in chunks) / PLAY)
    terminal = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.ByteStream(terminal)
    stream.feed(b"$ ")
    typed = [(SHORTEST / 2, key.encode()) for key in COMMAND] + [(LONGEST, b"\r\n")]
    starts, shown, now = [0.0], [], 0.0
    for index, (gap, chunk) in enumerate(itertools.chain(typed, chunks)):
        now += gap if index < len(typed) else min(gap / speed, LONGEST)
        if index < len(typed) or now - starts[-1] >= SHORTEST:
            starts.append(now)
            shown.append(rows_of(terminal))
        stream.feed(chunk)
    return starts, [*shown, rows_of(terminal)]


def animation(starts: list[float], shown: list[tuple[Row, ...]]) -> str:
    """SVG: the frames side by side, and a window that jumps from one to the next. Equal rows are stored once."""
    width, height = COLUMNS * CELL + 2 * MARGIN, ROWS * LINE + 2 * MARGIN
    names: dict[Row, str] = {}
    film = []
    for index, rows in enumerate(shown):
        uses = [
            f'<use href="#{names.setdefault(row, f"r{len(names)}")}" y="{y * LINE}"/>'
            for y, row in enumerate(rows)
            if row
        ]
        film.append(f'<g transform="translate({index * width})">{"".join(uses)}</g>')
    rows_svg = []
    for row, name in names.items():
        texts = []
        for column, text, colour in row:
            fill = "" if colour == FOREGROUND else f' fill="{colour}"'
            place = f'x="{column * CELL}" textLength="{len(text) * CELL}"'
            texts.append(f"<text {place}{fill}>{escape(text, quote=False)}</text>")
        rows_svg.append(f'<g id="{name}">{"".join(texts)}</g>')
    seconds = starts[-1] + END
    keys = [f"{start / seconds:.3%}{{transform:translateX({-index * width}px)}}" for index, start in enumerate(starts)]
    last = f"transform:translateX({-(len(starts) - 1) * width}px)"
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">
<title>{COMMAND} in a terminal</title>
<style>
text{{font:13px ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace;white-space:pre}}
#film{{animation:play {seconds:.1f}s step-end infinite}}
@keyframes play{{{"".join(keys)}}}
@media (prefers-reduced-motion:reduce){{#film{{animation:none;{last}}}}}
</style>
<defs>{"".join(rows_svg)}</defs>
<rect width="100%" height="100%" rx="6" fill="{BACKGROUND}"/>
<g transform="translate({MARGIN} {MARGIN + 12})" fill="{FOREGROUND}" xml:space="preserve">
<g id="film">{"".join(film)}</g></g>
</svg>
"""


def draw(rows: list[Row], path: Path) -> None:
    """Rows as a picture: every character in its cell, independent of the viewer's fonts."""
    size, line = 16, 20
    font = ImageFont.truetype(str(FONT), size)
    cell = font.getlength("M")
    picture = Image.new("RGB", (round(COLUMNS * cell) + 2 * MARGIN, len(rows) * line + 2 * MARGIN), BACKGROUND)
    pen = ImageDraw.Draw(picture)
    for y, row in enumerate(rows):
        for column, text, colour in row:
            for x, sign in enumerate(text, column):
                left, top = MARGIN + x * cell, MARGIN + y * line
                if "\u2800" <= sign <= "\u28ff":  # the font lacks these characters
                    for bit, (across, down) in enumerate(DOTS):
                        if (ord(sign) - 0x2800) >> bit & 1:
                            cx, cy = left + (across + 0.5) * cell / 2, top + (down + 0.5) * line / 4
                            pen.ellipse((cx - 1.2, cy - 1.2, cx + 1.2, cy + 1.2), fill=colour)
                elif sign != " ":
                    pen.text((left, top), sign, font=font, fill=colour)
    picture.quantize(64).save(path, optimize=True)


def main(settings: list[str]) -> None:
    text = HERE.parent / "data" / "raw" / "tinyshakespeare.txt"
    if not text.is_file():
        raise SystemExit(f"{text} is missing: without it the demo may train on another text")
    with tempfile.TemporaryDirectory() as folder:  # the working directory, so no path of this machine is shown
        os.chdir(folder)
        Path("data/raw").mkdir(parents=True)
        shutil.copy(text, "data/raw")
        chunks = record([sys.executable, "-m", "llm_from_scratch.cli.demo", *settings])
        shutil.copy(Path("out-demo") / "loss.png", HERE / "loss.png")
        os.chdir(HERE)
    (HERE / "demo.svg").write_text(animation(*frames(chunks)), encoding="utf-8")
    rows = screen(f"$ {COMMAND}\r\n".encode() + b"".join(chunk for _, chunk in chunks))
    rules = [y for y, row in enumerate(rows) if row and not "".join(text for _, text, _ in row).strip("-")]
    draw(rows[: rules[0] if rules else None], HERE / "terminal.png")


if __name__ == "__main__":
    main(sys.argv[1:])
