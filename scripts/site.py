"""Hooks of mkdocs for `./just docs`: the site also has the documents and pictures outside docs/, under project/.

Links work on GitHub and on the site. A link to a file that is not on the site, such as a source file, becomes text.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "AGENTS.md", "CHANGELOG.md", "SECURITY.md", "benchmarks/RESULTS.md")
PICTURES = [f"assets/{path.name}" for path in sorted((ROOT / "assets").iterdir()) if path.suffix in (".png", ".svg")]
PAGES = {name: f"project/{name}" for name in (*DOCUMENTS, *PICTURES)}  # path in the checkout: path on the site
PAGES |= {f"docs/{path.name}": path.name for path in (ROOT / "docs").glob("*.md")}

# The docstrings at the end of API.md, which mkdocstrings inserts. On GitHub such lines would be shown as they are.
REFERENCE = (
    "data.prepare.prepare", "presets.preset", "training.trainer.train", "training.loggers.read_metrics",
    "generation.generator.Generator", "core.model.GPT", "core.tokenizer.Tokenizer", "config",
)  # fmt: skip


def on_files(files: Any, config: Any) -> Any:
    for name in (*DOCUMENTS, *PICTURES):
        files.append(File.generated(config, PAGES[name], abs_src_path=os.fspath(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **rest: Any) -> str:
    here = page.file.src_uri
    source = next(path for path, target in PAGES.items() if target == here)
    if here == "API.md":
        markdown += "".join(f"\n::: llm_from_scratch.{name}\n" for name in REFERENCE)

    def link(match: re.Match[str]) -> str:
        shown, target, anchor = match.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target)) if target else source
        if path not in PAGES:
            return shown
        return f"[{shown}]({posixpath.relpath(PAGES[path], posixpath.dirname(here) or '.')}{anchor or ''})"

    return re.sub(r"\[([^\]]*)\]\((?!https?:)([^)#]*)(#[^)]*)?\)", link, markdown)
