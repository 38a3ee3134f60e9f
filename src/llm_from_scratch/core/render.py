"""Renders chat templates in a separate process, which may be killed. Started by chat.py with the folder of jinja2;
reads one JSON line per request: messages, a list of [how many of them, add_generation_prompt], and the total processor
time in seconds (null: no limit; a millisecond is added for each message). It writes one line for each text: how many
characters of the text before it begins with (all or none), and the others. A template is untrusted code: the sandbox
blocks access to files and objects, and the limits here bound its memory and time."""

from __future__ import annotations

import datetime
import json
import signal
import sys
import time
from typing import Any

if __name__ == "__main__":
    sys.path.append(sys.argv[1])  # jinja2's folder: an isolated Python may not find it

import jinja2  # noqa: E402
from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: E402

MEMORY = 192 << 20  # bytes of address space
SECONDS = 1.0  # of processor time for a text, and for reading the template; then the system ends the process
MESSAGE_SECONDS = 1e-3  # an elaborate template takes a tenth of it
MAX_TEXT = 4 << 20  # characters of a rendered conversation


def main() -> None:
    _limit_memory()
    requests = sys.stdin.buffer
    source, tokens = json.loads(requests.readline())
    _limit_time(SECONDS)
    try:
        template = _environment().from_string(source)
    except Exception as error:  # of the template's syntax, or of a constant that jinja2 computes at once
        return _answer(error=_reason(error))
    _answer(kept=0, text="")
    written = 0  # messages
    for line in requests:
        before = ""
        _limit_time(SECONDS)
        try:
            messages, asked, total = json.loads(line)
            for count, opens in asked:
                _limit_time(SECONDS)
                written += count
                if total is not None and time.process_time() > total + MESSAGE_SECONDS * written:
                    raise ValueError(f"it took {time.process_time():.0f} s for {written:,} messages")
                text = _rendered(template, messages=messages[:count], add_generation_prompt=opens, **tokens)
                kept = len(before) if text.startswith(before) else 0
                _answer(kept=kept, text=text[kept:])
                before = text
        except Exception as error:  # any error of the template
            _answer(error=_reason(error))
        _limit_time(0)


def _environment() -> jinja2.Environment:
    """With what templates have in transformers: raise_exception, strftime_now, tojson without HTML escapes, and Jinja's
    loop controls."""
    loops = ["jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=loops)
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _rendered(template: jinja2.Template, **variables: Any) -> str:
    parts, length = [], 0
    for part in template.generate(tools=None, **variables):
        parts.append(part)
        length += len(part)
        if length > MAX_TEXT:
            raise ValueError(f"the text is longer than {MAX_TEXT} characters")
    return "".join(parts)


def _limit_time(seconds: float) -> None:
    if hasattr(signal, "setitimer"):  # not on Windows
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def _answer(**content: Any) -> None:
    sys.stdout.write(json.dumps(content) + "\n")
    sys.stdout.flush()


def _reason(error: Exception) -> str:
    return "it needs too much memory" if isinstance(error, MemoryError) else str(error)[:300]


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **others: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **others)


if __name__ == "__main__":
    main()
