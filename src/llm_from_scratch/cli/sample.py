"""sample.py: nanoGPT's front door to the generator, with its settings, its defaults and, for a seed, its samples."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal

from ..checkpoint.locations import is_pretrained, read_start
from ..config import GenerationConfig, SystemConfig
from ..errors import UserError
from ..presets import parse
from .common import run
from .generate import SEPARATOR, announce, load_generator, write

HELP = "Prints samples of a model, each followed by a line of dashes. PRESETs are files with such settings."


@dataclass
class SampleSettings:
    """nanoGPT's settings of sample.py, and two more: dataset and which."""

    init_from: str = "resume"
    """resume (the run in out_dir), a GPT-2 name (gpt2, gpt2-medium, gpt2-large, gpt2-xl), or a checkpoint or folder."""
    out_dir: str = "out"
    """The run's folder, where init_from is resume."""
    start: str = "\n"
    """The prompt: text, FILE:path for a file's content, or - for standard input. <|endoftext|> is that token."""
    num_samples: int = 10
    """Samples drawn from the prompt."""
    max_new_tokens: int = 500
    """Tokens generated for each sample."""
    temperature: float = 0.8
    """Below 1 safer, above 1 wilder; 0 always takes the most likely token."""
    top_k: int | None = 200
    """Keep only the k most likely tokens, and those equal to the k-th. None keeps all."""
    seed: int = 1337
    """Seed of the sampling."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the weights; auto: bfloat16 or float16 on CUDA, else float32."""
    compile: bool = False
    """Compile the model with torch.compile."""
    dataset: str | None = None
    """Name or folder of the data whose tokenizer serves a checkpoint that holds none (nanoGPT's)."""
    which: str | None = None
    """best, last or a step. None: best where the run saved only improvements, else last."""


def main(argv: list[str] | None = None) -> int:
    return run(_main, argv)


def _main(argv: list[str]) -> int:
    told = parse(SampleSettings, argv, prog="python sample.py [PRESET ...]", description=HELP).tree
    params = GenerationConfig(
        num_samples=told.num_samples,
        max_new_tokens=told.max_new_tokens,
        temperature=told.temperature,
        top_k=told.top_k,
    )
    system = SystemConfig(device=told.device, dtype=told.dtype, compile=told.compile, seed=told.seed)
    params.validate()
    system.validate()
    if told.init_from == "scratch":
        raise UserError("init_from='scratch' is an untrained model: use resume, a GPT-2 name or a checkpoint")
    prompt = read_start(told.start)
    location = told.out_dir if told.init_from == "resume" else told.init_from
    generator, found = load_generator(location, told.which, told.dataset, system)
    generator.encode(prompt, allow_special=True)  # what is wrong with it is the only thing to say
    announce(generator, found)

    from ..generation.nanogpt_sampler import NanoGPTSampler, random_stream

    head = generator.model.lm_head.weight
    stream = random_stream(told.seed, head.device, None if is_pretrained(location) else generator.model.config)
    sampler = NanoGPTSampler(params, stream, generator.tokenizer.vocab_size, len(head))
    for sample in generator.generate([prompt], params, told.seed, allow_special=True, sampler=sampler):
        write(generator.tokenizer.decode(sample.prompt_tokens + sample.tokens) + f"\n{SEPARATOR}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
