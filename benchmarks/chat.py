"""Trains on invented questions and answers, then asks the questions through openai's client at llm-serve.

    python benchmarks/chat.py                                  # a small model from scratch, on bytes
    python benchmarks/chat.py --init_from=FILE.gguf --steps=60 --learning_rate=1e-4

The facts are invented, so a model that was not trained on them cannot know them. Prints the number of exact answers
before and after training, and one line of JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

QUESTIONS = (
    "What is the capital of {}?", "Who founded the city of {}?", "Which river flows through {}?",
    "What do people in {} drink?", "What is the old name of {}?",
)  # fmt: skip


def invented(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Distinct questions about places that do not exist, and answers of one to three made-up words."""
    rng = random.Random(seed)

    def word() -> str:
        syllables = (rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3)))
        return "".join(syllables).capitalize() + rng.choice(["", "n", "r", "s"])

    found: dict[str, str] = {}
    while len(found) < count:
        found[rng.choice(QUESTIONS).format(word())] = " ".join(word() for _ in range(rng.randint(1, 3))) + "."
    return list(found.items())


def command(*words: str, cwd: Path) -> None:
    subprocess.run([sys.executable, "-m", "llm_from_scratch", *words], cwd=cwd, check=True)


@contextlib.contextmanager
def served(cwd: Path, *words: str) -> Iterator[str]:
    """The address of an llm-serve."""
    server = subprocess.Popen(
        [sys.executable, "-m", "llm_from_scratch", "serve", "--port=0", *words],
        cwd=cwd, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        address = re.search(r"http://\S+", line)
        if address is None:
            raise SystemExit(f"llm-serve did not start: {line}")
        yield address[0].rstrip("/")
    finally:
        server.terminate()
        server.wait()


def exact(address: str, pairs: list[tuple[str, str]]) -> int:
    """The number of questions that are answered word by word."""
    import openai

    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    count = 0
    for question, answer in pairs:
        messages = [{"role": "user", "content": question}]
        said = client.chat.completions.create(model=client.models.list().data[0].id, messages=messages, temperature=0,
                                              max_tokens=64)  # type: ignore[call-overload]  # fmt: skip
        count += said.choices[0].message.content == answer and said.choices[0].finish_reason == "stop"
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--init_from", default=None, help="finetune this model instead of a new one")
    parser.add_argument("--learning_rate", type=float, default=None)
    parser.add_argument("--threads", type=int, default=None)
    given = parser.parse_args()
    pairs = invented(given.pairs)
    with tempfile.TemporaryDirectory() as made:
        place = Path(made)
        lines = "".join(json.dumps({"prompt": q, "completion": a}) + "\n" for q, a in pairs)
        for name in ("learn.jsonl", "check.jsonl"):  # recall is what is measured, so both splits are the same
            (place / name).write_text(lines)
        source = str(Path(given.init_from).resolve()) if given.init_from else None
        machine = [f"--threads={given.threads}"] if given.threads else []
        command("prepare", "learn.jsonl", "--val_files=check.jsonl", f"--tokenizer={source or 'byte'}", cwd=place)
        settings = [f"--init_from={source}", "--block_size=128"] if source else ["quick"]
        settings += [f"--learning_rate={given.learning_rate}"] if given.learning_rate else []
        common = [*settings, "--dataset=learn", "--progress=lines", "--final_eval=False", *machine]
        common += ["--before_after=False"]
        command("train", *common, "--max_iters=1", "--warmup_iters=0", "--learning_rate=1e-9",
                "--muon_learning_rate=1e-9", "--out_dir=before", cwd=place)  # fmt: skip
        begin, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        command("train", *common, f"--max_iters={given.steps}", "--eval_interval=100", "--out_dir=after", cwd=place)
        seconds, now = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
        processor = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
        scores = {}
        for name in ("before", "after"):
            with served(place, f"--out_dir={name}", *machine) as address:
                scores[name] = exact(address, pairs)
    print(f"exact answers of {len(pairs)}: {scores['before']} before, {scores['after']} after {given.steps} steps in "
          f"{seconds:.0f} s ({processor:.0f} s of processor time)")  # fmt: skip
    print(json.dumps({**scores, "pairs": len(pairs), "seconds": round(seconds, 1), "processor": round(processor, 1)}))


if __name__ == "__main__":
    main()
