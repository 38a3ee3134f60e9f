"""llm-serve: an OpenAI-compatible server for a trained model, with a playground."""

from __future__ import annotations

import functools
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..config import SystemConfig
from ..errors import UserError
from ..interop import is_peft
from ..machine.extras import require
from ..presets import parse
from ..serving.options import KEY_VARIABLE, ServeOptions
from ..settings import validate
from .common import check_location, command
from .generate import SourceOptions, SpeedOptions, announce, load_generator, location_of

if TYPE_CHECKING:
    from ..generation.batch import Overflow
    from ..serving.service import Service

PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "jinja2")
COMMON = (
    "out_dir", "checkpoint", "init_from", "which", "host", "port", "api_key", "allowed_hosts", "max_concurrent",
    "max_tokens", "chat_template", "watch", "quantize", "device", "dtype",
)  # fmt: skip
HELP = """Starts an OpenAI-compatible server for a trained model.

  llm-serve --out_dir=out
  llm-serve --out_dir=out --host=0.0.0.0 --api_key=SECRET
  llm-serve --init_from=gpt2 --port=8001

The API is at /v1, a playground at /, metrics at /metrics. PRESETs are files with these settings."""


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
    parsed = parse(ServeCommand, argv, prog="llm-serve [PRESET ...]", description=HELP, common=COMMON)
    tree, options = parsed.tree, parsed.tree.serving
    options.api_key = options.api_key if options.api_key is not None else os.environ.get(KEY_VARIABLE)
    for package in PACKAGES:
        require(package, "serve", "llm-serve")
    validate(tree)
    from ..serving.app import make_app
    from ..serving.server import listen, make_server, url
    from ..serving.service import open_service

    with listen(options) as bound:
        location, source = location_of(parsed), tree.source
        speed = SpeedOptions(quantize=tree.engine.quantize)
        generator, found = load_generator(location, source.which, source.dataset, tree.system, speed)
        seed = tree.system.seed if "seed" in parsed.sources else None
        service = open_service(generator, options, location, found, tree.engine.overflow, seed)
        announce(generator, found)
        add_adapters(service, location, source, tree.engine.overflow, seed)
        server = make_server(make_app(service), service)
        print(f"serving {service.name} at {url(options, bound)}", flush=True)
        sys.setswitchinterval(0.0001)  # less waiting for the GIL in the engine's thread
        server.run(sockets=[bound])
        sys.stdout.flush()
        if server.should_exit:  # by a signal: the end of the interpreter takes seconds on a busy machine
            os._exit(0)
    return 0


def add_adapters(service: Service, location: str, source: SourceOptions, overflow: Overflow, seed: int | None) -> None:
    """Serves the adapters of --adapters. Raises UserError if one is not an adapter of the served model."""
    from ..checkpoint.adapter import weights_hash
    from ..checkpoint.load import load
    from ..checkpoint.store import find_checkpoint, load_checkpoint
    from ..core.adapters import merged
    from ..core.weights import build_model, cropped
    from ..generation.generator import Generator
    from ..interop.hf_tokenizer import read_tokenizer
    from ..interop.peft import read_peft
    from ..serving.service import open_service

    options, base = service.options, service.generator
    if not options.adapters:
        return
    served = functools.cache(
        lambda: weights_hash(load(location, source.which, source.dataset, weights_only=True).model)
    )
    for name, folder in options.adapters.items():
        check_location(folder, None)
        if is_peft(Path(folder)):  # peft does not record the base's hash, so only the shapes are checked
            path, config, scale = Path(folder), base.model.config, 1.0
            adapter, tokenizer = read_peft(path, config), read_tokenizer(path, gpt2=False)
        else:
            path = find_checkpoint(folder, verify=False)
            found = load_checkpoint(path, weights_only=True) if path.is_dir() else None
            if found is None or found.base is None or found.base.sha256 != served():
                raise UserError(f"--adapters: {folder} is not an adapter of {location}")
            config, scale, adapter, tokenizer = found.model_config, found.base.scale, found.adapter, found.tokenizer
        weights = cropped(base.model.state_dict(), base.model.config, config.block_size)
        model = build_model(config, merged(config, weights, adapter, scale))
        weight = base.model.lm_head.weight
        tokenizer = tokenizer or base.tokenizer
        generator = Generator(model, tokenizer, weight.device, weight.dtype, base.quantize)
        generator.graphed = base.graphed
        own = replace(options, model_name=name, adapters={}, watch=None)
        service.add(open_service(generator, own, folder, path, overflow, seed))
        announce(generator, path)


if __name__ == "__main__":
    sys.exit(main())
