"""Reports as one HTML page without scripts or other files."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

STYLE = """body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem }
table { border-collapse: collapse; width: 100% } th, td { text-align: left; padding: .3rem .6rem;
border-bottom: 1px solid #8884; overflow-wrap: anywhere } blockquote { margin: .5rem 0; padding: .3rem 1rem;
border-left: 3px solid #8888; white-space: pre-wrap; overflow-wrap: anywhere } .bar { background: #58c; height: 1rem }
@media (prefers-color-scheme: dark) { body { background: #111; color: #eee } }"""


def page(title: str, body: str) -> str:
    title = html.escape(title)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    return (
        f'<!doctype html><html lang="en"><head>{head}<style>{STYLE}</style></head>'
        f"<body><h1>{title}</h1>{body}</body></html>\n"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    def row(tag: str, cells: Sequence[object]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{row('th', head)}{''.join(row('td', cells) for cells in rows)}</table>"


def quotes(texts: Iterable[str]) -> str:
    return "".join(f"<blockquote>{html.escape(text)}</blockquote>" for text in texts)


def bars(counts: dict[str, int]) -> str:
    """A plot of counts."""
    most = max(counts.values(), default=1)
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td style='width:70%'><div class=bar style='width:{100 * count / most:.1f}%'>"
        f"</div></td><td>{count:,}</td></tr>"
        for name, count in counts.items()
    )
    return f"<table>{rows}</table>"
