"""llm-serve: an OpenAI-compatible server for a trained model, with a playground."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..config import SystemConfig, validate
from ..machine.extras import require
from ..presets import parse
from ..serving.options import KEY_VARIABLE, ServeOptions
from .common import command
from .generate import SourceOptions, SpeedOptions, announce, load_generator, location_of

PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "jinja2")
HELP = """Starts an OpenAI-compatible server for a trained model: the API at /v1, a playground at /, metrics at \
/metrics. PRESETs are YAML or Python files with these settings."""


@dataclass
class EngineOptions:
    """Precision and long texts."""

    quantize: Literal["none", "int8"] = "none"
    """int8: weights and activations of the linear layers in 8 bits. Faster on a CPU, slightly less exact."""
    overflow: Literal["recompute", "drop_half"] = "recompute"
    """Beyond block_size: recompute the whole window for every token (exact), or drop the older half of the cache each
    time it is full (much faster, different text)."""


@dataclass
class ServeCommand:
    source: SourceOptions = field(default_factory=SourceOptions)
    serving: ServeOptions = field(default_factory=ServeOptions)
    engine: EngineOptions = field(default_factory=EngineOptions)
    system: SystemConfig = field(default_factory=SystemConfig)


@command
def main(argv: list[str]) -> int:
    parsed = parse(ServeCommand, argv, prog="llm-serve [PRESET ...]", description=HELP)
    tree, options = parsed.tree, parsed.tree.serving
    options.api_key = options.api_key if options.api_key is not None else os.environ.get(KEY_VARIABLE)
    for package in PACKAGES:
        require(package, "serve", "llm-serve")
    validate(tree)
    from ..serving.server import listen, url

    with listen(options) as bound:
        location = location_of(parsed)
        speed = SpeedOptions(quantize=tree.engine.quantize)
        source, overflow = tree.source, tree.engine.overflow
        generator, found = load_generator(location, source.which, source.dataset, tree.system, speed)
        from ..checkpoint.load import is_pretrained
        from ..generation.engine import Engine
        from ..serving.app import make_app
        from ..serving.chat import end_ids, find_template
        from ..serving.server import make_server
        from ..serving.service import Service

        folder = Path(location) if is_pretrained(location) and Path(location).is_dir() else None
        tokenizer = generator.tokenizer
        eot = "" if tokenizer.eot_id is None else tokenizer.decode([tokenizer.eot_id])
        template = find_template(options.chat_template, folder, eot)
        announce(generator, found)
        service = Service(
            generator,
            lambda: Engine(generator, options.max_concurrent, overflow),
            options,
            name=options.model_name or _name(location),
            template=template,
            ends=end_ids(folder, tokenizer.vocab_size),
            watch=_watched(options.watch, found),
            seed=tree.system.seed if "seed" in parsed.sources else None,
        )
        server = make_server(make_app(service), service)
        print(f"serving {service.name} at {url(options, bound)}", flush=True)
        sys.setswitchinterval(0.0001)  # less waiting for the GIL in the engine's thread
        server.run(sockets=[bound])
    return 0


def _name(location: str) -> str:
    path = Path(location).resolve()
    return location if not path.exists() else path.stem if path.is_file() else path.name


def _watched(given: str | None, found: Path | None) -> Path | None:
    """The run on the page: --watch, else the run of the checkpoint."""
    if given is not None:
        return Path(given)
    run_folder = found.parent if found is not None else None
    return run_folder if run_folder is not None and (run_folder / "metrics.jsonl").is_file() else None


if __name__ == "__main__":
    sys.exit(main())
