"""The texts that cleaning removed, with reasons, as text and as a page."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..machine.files import read_json
from .page import page, quotes, table

FILES = ("cleaning.txt", "cleaning.html")
EXAMPLES = 3  # per reason
DONE = "part.json"  # in the folder of a part, written last by the first step
DUPLICATES, BOILERPLATE = "duplicates.json", "boilerplate.json"  # by the second step


def summarise(folders: Sequence[Path]) -> dict[str, Any]:
    """The sum over parts: documents and bytes read and kept, removed by reason with examples, changed by filter.
    lines: of boilerplate, removed."""
    total, changed = Counter[str](), Counter[str]()
    removed: dict[str, dict[str, Any]] = {}
    for folder in folders:
        part = read_json(folder / DONE)
        boilerplate = read_json(folder / BOILERPLATE) if (folder / BOILERPLATE).is_file() else {}
        total.update(part["counts"])
        changed.update(part["changed"])
        changed.update(boilerplate.get("changed", {}))
        total.update(lines=boilerplate.get("lines", 0))
        for some in (part["removed"], read_json(folder / DUPLICATES), boilerplate.get("removed", {})):
            for reason, entry in some.items():
                sums = removed.setdefault(reason, {"bytes": 0, "documents": 0, "examples": []})
                sums["documents"] += entry["documents"]
                sums["bytes"] += entry["bytes"]
                sums["examples"] = [*sums["examples"], *entry["examples"]][:EXAMPLES]
    kept = total["read"] - sum(entry["documents"] for entry in removed.values())
    return {
        "bytes": total["read_bytes"],
        "changed": dict(sorted(changed.items())),
        "documents": total["read"],
        **({"lines": total["lines"]} if total["lines"] else {}),
        "kept": kept,
        "removed": dict(sorted(removed.items())),
    }


def without_examples(summary: dict[str, Any]) -> dict[str, Any]:
    removed = {reason: {k: v for k, v in entry.items() if k != "examples"}
               for reason, entry in summary["removed"].items()}  # fmt: skip
    return summary | {"removed": removed}


def rows(summary: dict[str, Any]) -> list[tuple[str, int, str]]:
    """(what, documents, bytes)"""
    removed = [(f"removed: {reason}", e["documents"], f"{e['bytes']:,}") for reason, e in summary["removed"].items()]
    return removed + [(f"changed: {name}", count, "") for name, count in summary["changed"].items()]


def as_text(summary: dict[str, Any]) -> list[str]:
    lines = [f"cleaning kept {summary['kept']:,} of {summary['documents']:,} documents"]
    lines += [f"  {count:>12,}  {what}" for what, count, _ in rows(summary)]
    return lines + ([f"{summary['lines']:,} lines of boilerplate were removed"] if "lines" in summary else [])


def write_reports(summary: dict[str, Any], folder: Path) -> None:
    lines = as_text(summary)
    for reason, entry in summary["removed"].items():
        lines += ["", f"removed: {reason}", *(f"  {example}" for example in entry["examples"])]
    (folder / FILES[0]).write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / FILES[1]).write_text(as_page(summary), encoding="utf-8")


def as_page(summary: dict[str, Any]) -> str:
    body = "".join(f"<p>{html.escape(line)}</p>" for line in as_text(summary) if not line.startswith(" "))
    body += table(("what", "documents", "bytes"), [(what, f"{count:,}", size) for what, count, size in rows(summary)])
    for reason, entry in summary["removed"].items():
        body += f"<h2>{html.escape(reason)}</h2>{quotes(entry['examples'])}"
    return page("Cleaning", body)
