"""nanoGPT's sample.py: the same settings and defaults, and the same samples for the same seed."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal

from ..config import GenerationConfig, SystemConfig
from ..errors import UserError
from ..generation.prompt import first_text, read_start
from ..presets import parse
from .common import command
from .generate import SEPARATOR, announce, load_generator, write

HELP = "Prints samples of a model, each followed by a line of dashes. PRESETs are files with these settings."


@dataclass
class SampleSettings:
    """The settings of nanoGPT's sample.py, plus dataset and which."""

    init_from: str = "resume"
    """resume (the run in out_dir), a GPT-2 name (gpt2, gpt2-medium, gpt2-large, gpt2-xl), or a checkpoint or folder."""
    out_dir: str = "out"
    """The run's folder, used with init_from=resume."""
    start: str = "\n"
    """The prompt: text (special tokens such as <|endoftext|> are parsed), FILE:path, or - for standard input."""
    num_samples: int = 10
    """Number of samples."""
    max_new_tokens: int = 500
    """Tokens per sample."""
    temperature: float = 0.8
    """Below 1: more predictable. Above 1: more random. 0: always the most likely token."""
    top_k: int | None = 200
    """Sample from the k most likely tokens, including ties. None: from all."""
    seed: int = 1337
    """Random seed."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the weights. auto: bfloat16 or float16 on CUDA, else float32."""
    compile: bool = False
    """Compile the model with torch.compile."""
    dataset: str | None = None
    """Name or folder of the data with the tokenizer, if the checkpoint does not have one (nanoGPT's)."""
    which: str | None = None
    """best, last or a step. None: best if the run saved only improvements, else last."""


@command
def main(argv: list[str]) -> int:
    settings = parse(SampleSettings, argv, prog="python sample.py [PRESET ...]", description=HELP).tree
    params = GenerationConfig(
        num_samples=settings.num_samples, max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature, top_k=settings.top_k, ignore_eos=True,
    )  # fmt: skip
    system = SystemConfig(device=settings.device, dtype=settings.dtype, compile=settings.compile, seed=settings.seed)
    params.validate()
    system.validate()
    if settings.init_from == "scratch":
        raise UserError("init_from='scratch' does not have trained weights: use resume, a GPT-2 name or a checkpoint")
    prompt = read_start(settings.start)
    location = settings.out_dir if settings.init_from == "resume" else settings.init_from
    generator, found = load_generator(location, settings.which, settings.dataset, system)
    prompt = first_text(prompt, generator.tokenizer)
    generator.encode(prompt, allow_special=True)  # report a bad prompt before printing anything
    announce(generator, found)

    from ..checkpoint.load import is_pretrained
    from ..generation.nanogpt_sampler import NanoGPTSampler, random_stream

    head = generator.model.lm_head.weight
    stream = random_stream(settings.seed, head.device, None if is_pretrained(location) else generator.model.config)
    sampler = NanoGPTSampler(params, stream, generator.tokenizer.vocab_size, len(head))
    for sample in generator.generate([prompt], params, settings.seed, allow_special=True, sampler=sampler):
        write(generator.tokenizer.decode(sample.prompt_tokens + sample.tokens) + f"\n{SEPARATOR}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
