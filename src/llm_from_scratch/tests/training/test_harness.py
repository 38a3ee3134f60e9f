"""training/harness.py: tasks of lm-evaluation-harness."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llm_from_scratch.cli import evaluate
from llm_from_scratch.config import GenerationConfig, GPTConfig
from llm_from_scratch.core.chat import ChatTemplate
from llm_from_scratch.core.model import GPT
from llm_from_scratch.core.tokenizer import ByteTokenizer, CharTokenizer, HFTokenizer
from llm_from_scratch.errors import UserError
from llm_from_scratch.generation.generator import Generator
from llm_from_scratch.training.harness import TaskModel, evaluate_tasks, figures, first_token, load_tasks
from llm_from_scratch.training.loggers import scores_line
from llm_from_scratch.training.trainer import train

from ..memorised import BLOCK, TEXT, TOKENIZER, memorised
from ..tiny import babble, read_metrics, tiny_config, write_data

needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")


def asked(*args: Any) -> SimpleNamespace:
    """A request of the harness."""
    return SimpleNamespace(args=args)


def log_probabilities(model: GPT, ids: list[int]) -> list[float]:
    """Of every token but the first, each after all tokens before it."""
    with torch.no_grad():
        rows = [model.eval()(torch.tensor([ids[:at]]))[0][0, -1].double().log_softmax(-1) for at in range(1, len(ids))]
    return [float(row[i]) for row, i in zip(rows, ids[1:], strict=True)]


@pytest.fixture(scope="module")
def model() -> TaskModel:
    return TaskModel(Generator(memorised("modern"), TOKENIZER))


def test_a_continuation_after_a_context(model: TaskModel) -> None:
    context, continuation = TEXT[:6], TEXT[6:9]
    ids = TOKENIZER.encode(context + continuation).tolist()
    found = model.loglikelihood([asked(context, continuation), asked(context, "ab")])
    assert found[0] == (pytest.approx(sum(log_probabilities(memorised("modern"), ids)[5:]), abs=1e-4), True)
    assert found[1][0] < found[0][0] and found[1][1] is False


def test_spaces_at_the_end_of_a_context_belong_to_the_continuation() -> None:
    tokenizer = HFTokenizer.train([" the cat sat on the mat, the end"] * 20, 300)
    torch.manual_seed(0)
    config = GPTConfig(block_size=16, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_embd=16)
    model = TaskModel(Generator(GPT(config), tokenizer))
    seen: list[Any] = []
    model.likelihoods.scores = lambda pairs: seen.extend(pairs) or [(0.0, True)] * len(pairs)  # type: ignore
    model.loglikelihood([asked("the ", "cat"), asked("the", " cat"), asked("", "the"), asked(" ", "the")])
    whole = tokenizer.encode("the cat").tolist()
    assert len(tokenizer.encode(" cat")) == 1 and seen[0] == seen[1] == (tuple(whole[:-1]), tuple(whole[-1:]))
    assert seen[2] == ((tokenizer.eot_id,), tuple(tokenizer.encode("the").tolist()))
    assert seen[3] == ((tokenizer.eot_id,), tuple(tokenizer.encode(" the").tolist()))
    seen.clear()
    model.loglikelihood([asked("the c", "at"), asked("the c", "at on the mat")])  # a border inside a token
    before, longer = (tuple(tokenizer.encode(text).tolist()) for text in ("the c", "the cat on the mat"))
    assert len(before) >= len(whole) and before != longer[: len(before)]
    assert seen == [(tuple(whole[:-1]), tuple(whole[-1:])), (before, longer[len(before) :])]
    seen.clear()
    model.loglikelihood([asked("", "<|endoftext|>the")])
    assert seen == [((tokenizer.eot_id,), tuple(tokenizer.encode("the").tolist()))]


@pytest.mark.cases(2)
@pytest.mark.parametrize("length", [3 * BLOCK + 7, 1, 5, BLOCK, BLOCK + 1, 2 * BLOCK])
def test_a_rolling_text(model: TaskModel, length: int) -> None:
    """Windows by hand: full ones one after another; the last one ends with the text and is full, too."""
    text, gpt = TEXT[:length], memorised("modern")
    ids = [first_token(TOKENIZER), *TOKENIZER.encode(text).tolist()]
    total, done = 0.0, 1
    while done < len(ids):
        end = min(done + BLOCK, len(ids))
        window = ids[max(0, end - BLOCK - 1) : end]
        total += sum(log_probabilities(gpt, window)[done - end :])
        done = end
    (found,) = model.loglikelihood_rolling([asked(text)])
    assert found == pytest.approx(total, rel=1e-5)
    assert model.loglikelihood_rolling([asked(""), asked(text)]) == [0.0, found]


def test_texts_up_to_a_stop(model: TaskModel) -> None:
    greedy = Generator(memorised("modern"), TOKENIZER)
    params = GenerationConfig(num_samples=1, max_new_tokens=10, temperature=0.0, top_k=None)
    plain = [greedy.generate([prompt[-14:]], params)[0].text for prompt in (TEXT[:4], TEXT[3:30])]
    kwargs = {"max_gen_toks": 10, "do_sample": False, "temperature": 0.7}
    requests = [asked(TEXT[:4], kwargs), asked(TEXT[3:30], kwargs), asked(TEXT[:4], {**kwargs, "until": [plain[0][4]]})]
    assert model.generate_until(requests) == [*plain, plain[0][:4]]


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"num_beams": 4}, "num_beams=4, which is not supported"),
        ({"max_gen_toks": BLOCK}, f"up to {BLOCK} tokens, which leaves no room for its prompt in block_size={BLOCK}"),
        ({}, "up to 256 tokens"),
    ],
)
def test_generation_that_is_refused(model: TaskModel, kwargs: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        model.generate_until([asked("a", kwargs)])


def test_the_token_before_a_text() -> None:
    tokenizer = HFTokenizer.train(["abc abd"], 260)
    assert first_token(tokenizer) == 0
    for begin, token in (("a", tokenizer.encode("a")[0]), ("", 0), ("not one token", 0)):
        tokenizer.chat = ChatTemplate("", bos=begin)
        assert first_token(tokenizer) == token
    assert first_token(ByteTokenizer()) == 10
    assert first_token(CharTokenizer.from_text(["ab\n"])) == 0
    assert first_token(CharTokenizer.from_text(["xab"])) == 0


def test_scores_of_results() -> None:
    results = {
        "results": {
            "a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": 0.05, "sample_len": 4, "f1,strict": 0.25},
            "b": {"name": "b", "bits_per_byte,none": 2.0, "bits_per_byte_stderr,none": "N/A"},
        }
    }
    found = figures(results)
    assert found == {"a/acc": 0.5, "a/acc_stderr": 0.05, "a/f1,strict": 0.25, "b/bits_per_byte": 2.0}
    assert scores_line(found) == "a/acc 0.5 ± 0.05, a/f1,strict 0.25, b/bits_per_byte 2"


def test_without_the_harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_data: Path) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else found(name))
    with pytest.raises(UserError, match=r"--tasks needs the package lm_eval: pip install .*\[eval\]"):
        load_tasks("a.yaml")
    with pytest.raises(UserError, match=r"--eval_tasks needs the package lm_eval"):
        train(tiny_config(tiny_data, out_dir=str(tmp_path / "run"), eval_tasks="a.yaml"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="eval_limit needs --eval_tasks"):
        train(tiny_config(tiny_data, out_dir=str(tmp_path / "run"), eval_limit=3))


# --- with the harness, which takes seconds to import ---

CHOICE = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choices.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
"""
ROLLING = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/texts.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
"""
GENERATION = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/answers.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6, do_sample: false}}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


def write_tasks(folder: Path, texts: list[str]) -> Path:
    """Three tasks from texts: which continuation is the right one, bits per byte, and what comes next."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, Any]]] = {"choices": [], "texts": [], "answers": []}
    for i, text in enumerate(texts):
        cut = text.index(" ", 2)  # inside a word, the harness's hf model may find a continuation of no token
        others = [" " + other.split()[0][: 2 + j] for j, other in enumerate((texts * 2)[i + 1 : i + 4])]
        choices = [*others[: i % 4], text[cut : cut + 4], *others[i % 4 :]]
        rows["choices"].append({"question": text[:cut], "choices": choices, "answer": i % 4})
        rows["texts"].append({"text": text})
        rows["answers"].append({"question": text[:cut], "answer": text[cut : cut + 6]})
    for name, content in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    for name, yaml in (("choice", CHOICE), ("rolling", ROLLING), ("generation", GENERATION)):
        (folder / f"{name}.yaml").write_text(yaml.format(name=f"own_{name}", folder=folder))
    return folder


def numbers(results: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in figures(results).items() if not name.endswith("_stderr")}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"), [babble(14, seed=seed) for seed in range(8)])


@needs_harness
@pytest.mark.slow
def test_a_uniform_model_has_eight_bits_per_byte(tasks: Path) -> None:
    gpt = GPT(
        GPTConfig(block_size=8, vocab_size=256, n_layer=1, n_head=1, n_embd=8, zero_init=True, tie_embeddings=False)
    )
    found = figures(evaluate_tasks(TaskModel(Generator(gpt, ByteTokenizer())), load_tasks(str(tasks / "rolling.yaml"))))
    assert found["own_rolling/bits_per_byte"] == pytest.approx(8.0, abs=1e-6)
    assert found["own_rolling/byte_perplexity"] == pytest.approx(256.0, rel=1e-6)


@needs_harness
@pytest.mark.slow
def test_tasks_on_the_command_line(
    tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a task without files makes the harness search the working directory for some
    out, data = tmp_path / "run", write_data(tmp_path / "data")
    names = f"{tasks},{tasks / 'rolling.yaml'}"
    settings = {"block_size": 16, "eval_tasks": str(tasks / "choice.yaml"), "eval_limit": 6, "tensorboard": True}
    train(tiny_config(data, out_dir=str(out), **settings))
    printed = capsys.readouterr().out
    lines = [line for line in read_metrics(out) if "val_loss" in line]
    assert [line["step"] for line in lines] == [0, 4, 8]
    for line in lines:
        assert 0 <= line["own_choice/acc"] <= 1 and 0 <= line["own_choice/acc_stderr"] < 1
        assert f"step {line['step']}/8  own_choice/acc {line['own_choice/acc']:.4g} ± " in printed
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard")).Reload()
    assert [event.step for event in events.Tensors("own_choice/acc")] == [0, 4, 8]

    assert evaluate.main([f"--out_dir={out}", f"--tasks={tasks / 'choice.yaml'}", "--limit=6", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert figures(found)["own_choice/acc"] == pytest.approx(lines[-1]["own_choice/acc"])
    assert found["n-samples"]["own_choice"] == {"original": 8, "effective": 6}
    assert evaluate.main([f"--out_dir={out}", f"--tasks={names}", "--num_fewshot=2"]) == 0
    table = capsys.readouterr().out
    for words in (
        "own_choice",
        "own_rolling",
        "own_generation",
        "acc_norm",
        "bits_per_byte",
        "exact_match",
        "±",
        "|     2|",
    ):
        assert words in table
    for given, says in (
        ("hellaswg", "unknown task 'hellaswg'; did you mean hellaswag"),
        ("no.yaml", "no such file: no.yaml"),
        (str(tmp_path), "contains no task"),
        (",", "--tasks is empty"),
    ):
        assert evaluate.main([f"--out_dir={out}", f"--tasks={given}"]) == 2
        told = capsys.readouterr()
        assert says in told.err and told.err.count("\n") == 1 and not told.out
    (tmp_path / "broken.yaml").write_text("task: broken\ndataset_path: json\noutput_type: multiple_choice\n")
    assert evaluate.main([f"--out_dir={out}", f"--tasks={tmp_path / 'broken.yaml'}"]) == 2
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and "broken.yaml failed" in told.err


@pytest.mark.cases(1)
@pytest.mark.parametrize("fused", ["on", "off"])
def test_each_evaluation_scores_the_weights_of_its_step(
    fused: str, tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's fused optimizers change weights without a new version of the tensor."""
    decoders = []

    def scores(model: TaskModel, *_: Any) -> dict[str, Any]:
        fresh = TaskModel(Generator(copy.deepcopy(model.generator.model), model.tokenizer))
        text = [SimpleNamespace(args=("b", "obabo"))]
        prompt = [SimpleNamespace(args=("bo", {"max_gen_toks": 5}))]
        found = model.loglikelihood(text)
        assert found == fresh.loglikelihood(text)
        assert model.generate_until(prompt) == fresh.generate_until(prompt)
        decoders.append(model.generator.decoder)
        return {"results": {"fixed": {"text,none": found[0][0]}}}

    monkeypatch.setattr("llm_from_scratch.training.check.require", lambda *_: None)
    monkeypatch.setattr("llm_from_scratch.training.setup.load_tasks", lambda *_: {"tasks": {"fixed": None}})
    monkeypatch.setattr("llm_from_scratch.training.run.evaluate_tasks", scores)
    train(tiny_config(tiny_data, out_dir=str(tmp_path), eval_tasks="fixed", fused=fused, learning_rate=0.05))
    lines = [line["fixed/text"] for line in read_metrics(tmp_path) if "val_loss" in line]
    assert len(set(lines)) == len(lines) == len(set(decoders)) == 3


@needs_harness
@pytest.mark.slow
def test_a_run_with_tasks_has_the_weights_of_one_without(tasks: Path, tmp_path: Path, tiny_data: Path) -> None:
    settings = {"block_size": 16, "dropout": 0.1}
    runs = []
    for name, more in (("plain", {}), ("scored", {"eval_tasks": str(tasks)})):
        train(tiny_config(tiny_data, out_dir=str(tmp_path / name), **settings, **more), quiet=True)
        runs.append([line["loss"] for line in read_metrics(tmp_path / name) if "loss" in line])
    assert runs[0] == runs[1] and len(runs[0]) == 8
