"""Scores and times of tasks: llm-eval --tasks compared with lm-evaluation-harness's own `hf` model.

python benchmarks/evaluation.py --model=MODEL [--text=FILE] [--documents=40] [--rounds=1] [--threads=N] [--hf_batch=8]
       [--server=True] [--clock=wall|cpu]

--model: a Hugging Face folder, a GGUF file or a run. `hf` reads our export of it. The tasks are made from the text
(default: tiny Shakespeare in LLM_TEST_DATA_DIR): choose the right continuation of four, with 0 and 3 examples; the
likelihood of whole texts; greedy generation of 32 tokens. --server: also the `local-completions` model on llm-serve.
On a shared machine, --clock=cpu --threads=1 compares processor time.
Needs `pip install 'lm_eval[hf,api]'`. Prints a table, and a line of JSON last.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from contenders import arguments, machine

KINDS = ("choice", "fewshot", "rolling", "generation")


def write_tasks(folder: Path, text: str, documents: int) -> None:
    """A YAML file for each of KINDS."""
    size = 1200  # characters: about 300 tokens
    starts = [i * (len(text) // documents) for i in range(documents)]
    rows: dict[str, list[dict[str, Any]]] = {"choice": [], "rolling": [], "generation": []}
    for i, start in enumerate(starts):
        ends = [starts[(i + k) % documents] + 400 for k in range(4)]
        choices = [text[end : end + 40 + 30 * (k % 3)] for k, end in enumerate(ends)]
        rows["choice"].append({"text": text[start : start + 400], "choices": choices})
        rows["rolling"].append({"text": text[start : start + size]})
        rows["generation"].append({"text": text[start : start + 300], "answer": text[start + 300 : start + 340]})
    mean = {"aggregation": "mean", "higher_is_better": True}
    outputs: dict[str, dict[str, Any]] = {
        "choice": {"output_type": "multiple_choice", "doc_to_text": "{{text}}", "doc_to_choice": "{{choices}}",
                   "doc_to_target": 0, "metric_list": [{"metric": "acc", **mean}, {"metric": "acc_norm", **mean}]},
        "rolling": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
                    "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}]},
        "generation": {"output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": "{{answer}}",
                       "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 32, "do_sample": False},
                       "metric_list": [{"metric": "exact_match", **mean}]},
    }  # fmt: skip
    outputs["fewshot"] = outputs["choice"] | {
        "num_fewshot": 3, "fewshot_split": "test", "fewshot_config": {"sampler": "first_n"}
    }  # fmt: skip
    for name, content in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    for name, output in outputs.items():
        file = folder / f"{'choice' if name == 'fewshot' else name}.jsonl"
        given = {"task": f"bench_{name}", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}},
                 "test_split": "test", "target_delimiter": "", **output}  # fmt: skip
        (folder / f"{name}.yaml").write_text(json.dumps(given))  # YAML includes JSON


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--documents", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--hf_batch", type=int, default=8)
    parser.add_argument("--server", default="False")
    parser.add_argument("--tasks", default=",".join(KINDS))
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    options = parser.parse_args()
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    torch.set_num_threads(options.threads)
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    from llm_from_scratch.checkpoint.load import load
    from llm_from_scratch.core.weights import build_model
    from llm_from_scratch.generation.generator import Generator
    from llm_from_scratch.interop.hf import export_hf
    from llm_from_scratch.training.harness import TaskModel, figures, load_tasks

    text_file = options.text or Path(os.environ.get("LLM_TEST_DATA_DIR", ".")) / "tinyshakespeare.txt"
    loaded = load(options.model, weights_only=True)
    weights = {name: tensor.float() for name, tensor in loaded.model.items()}
    assert loaded.tokenizer is not None
    results: dict[str, dict[str, float]] = {}
    times: dict[str, dict[str, list[float]]] = {}

    def score(who: str, kind: str, model: Any, folder: Path) -> None:
        tasks = load_tasks(str(folder / f"{kind}.yaml"))
        begin = clock()
        with contextlib.redirect_stdout(io.StringIO()):
            found = lm_eval.evaluate(lm=model, task_dict=tasks, bootstrap_iters=10, log_samples=False)
        times.setdefault(who, {}).setdefault(kind, []).append(clock() - begin)
        results.setdefault(who, {}).update(
            {name: value for name, value in figures(found).items() if not name.endswith("_stderr")}
        )

    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        (folder / "tasks").mkdir()
        write_tasks(folder / "tasks", text_file.read_text(encoding="utf-8"), options.documents)
        export_hf(loaded.model_config, weights, loaded.tokenizer, folder / "hf")
        ours = Generator(build_model(loaded.model_config, weights).eval(), loaded.tokenizer)
        models: dict[str, Any] = {"ours": TaskModel(ours)}
        models["hf"] = HFLM(pretrained=str(folder / "hf"), device="cpu", dtype="float32", batch_size=options.hf_batch)
        if options.server == "True":
            from lm_eval.models.openai_completions import LocalCompletionsAPI

            from llm_from_scratch.tests.served import NAME, served

            url = stack.enter_context(served(ours, max_seconds=3600.0)).url
            models["server"] = LocalCompletionsAPI(
                base_url=f"{url}/v1/completions", model=NAME, tokenizer=str(folder / "hf"),
                max_length=loaded.model_config.block_size + 1, batch_size=8, timeout=3600,
            )  # fmt: skip
        for _ in range(options.rounds):
            for kind in options.tasks.split(","):
                for who, model in models.items():
                    score(who, kind, model, folder / "tasks")

    print(f"{'figure':<32}" + "".join(f"{who:>16}" for who in models))
    for figure in results["ours"]:
        print(f"{figure:<32}" + "".join(f"{results[who][figure]:>16.9g}" for who in models))
    seconds = {who: {kind: statistics.median(values) for kind, values in of.items()} for who, of in times.items()}
    for kind in options.tasks.split(","):
        print(f"{'seconds, ' + kind:<32}" + "".join(f"{seconds[who][kind]:>16.2f}" for who in models))
    total = {who: sum(of.values()) for who, of in seconds.items()}
    differences = [
        abs(results[who][name] - value) / max(1e-9, abs(value))
        for who in models
        for name, value in results["ours"].items()
    ]
    print(f"{'seconds, all':<32}" + "".join(f"{total[who]:>16.2f}" for who in models))
    print(f"ours / hf: {total['ours'] / total['hf']:.2f}; largest relative difference {max(differences):.1e}")
    print(json.dumps({**machine(), "threads": options.threads, "rounds": options.rounds, "results": results,
                      "seconds": seconds, "difference": max(differences)}))  # fmt: skip


if __name__ == "__main__":
    main()
