"""llm-serve as users call it: options, addresses, output, and shutdown."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_from_scratch.checkpoint.store import save_checkpoint
from llm_from_scratch.cli import serve
from llm_from_scratch.config import GenerationConfig
from llm_from_scratch.generation.generator import Generator

from ..forked import SERVER, Forked
from ..lazy import openai
from ..memorised import TEXT, TOKENIZER, memorised
from ..served import answer, http, until

KEY = "sk-of-the-test"
QUICK = ["--port=0", "--device=cpu", "--dtype=float32", "--threads=1"]


@pytest.fixture(scope="module")
def out_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "my-run"
    model = memorised("modern")
    save_checkpoint(folder, step=10, model_config=model.config, model=model.state_dict(), run_id="r",
                    tokenizer=TOKENIZER, val_loss=1.0)  # fmt: skip
    (folder / "metrics.jsonl").write_text('{"step": 9, "loss": 1.0}\n')
    return folder


@contextlib.contextmanager
def running(*argv: str, real: bool = False, **variables: str) -> Iterator[tuple[Any, str]]:
    """llm-serve in a process of its own, and its address. real: started as a user starts it, not forked."""
    environment = {**os.environ, "PYTHONPATH": str(Path(serve.__file__).resolve().parents[2]), **variables}
    process: Any
    if real:
        command = [sys.executable, "-m", "llm_from_scratch.cli.serve", *QUICK, *argv]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True
        )  # fmt: skip
    else:
        process = Forked("llm_from_scratch.cli.serve", *QUICK, *argv, env=environment, imports=SERVER)
    with process:
        try:
            line = process.stdout.readline()
            found = re.fullmatch(r"serving (\S+) at (http://\S+:\d+)\n", line)
            assert found, line + (process.stderr.read() if not line else "")
            yield process, found[2]
        finally:
            process.kill()


def client(url: str, key: str = "none") -> Any:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=30)


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_is_served_and_watched(out_dir, real):
    with running(f"--out_dir={out_dir}", real=real) as (process, url):
        assert url.startswith("http://127.0.0.1:")
        told = client(url).completions.create(model="my-run", prompt=TEXT[:6], temperature=0, max_tokens=8)
        params = GenerationConfig(num_samples=1, max_new_tokens=8, temperature=0.0)
        assert told.choices[0].text == Generator(memorised("modern"), TOKENIZER).generate(TEXT[:6], params)[0].text
        with urllib.request.urlopen(f"{url}/v1/watch") as reply:
            assert json.load(reply)["step"] == 9
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert process.stdout.read() == ""
        err = process.stderr.read()
        assert err.count("\n") == 1 and "step-00000010" in err, "one line: what serves, and on what"


def test_the_key_comes_from_the_environment(out_dir):
    with running(f"--out_dir={out_dir}", "--host=0.0.0.0", "--model_name=m", LLM_API_KEY=KEY) as (process, url):
        local = url.replace("0.0.0.0", "127.0.0.1")
        with pytest.raises(openai.AuthenticationError):
            client(local, "wrong").models.list()
        assert [model.id for model in client(local, KEY).models.list().data] == ["m"]
        with contextlib.suppress(OSError):
            assert KEY not in Path(f"/proc/{process.pid}/cmdline").read_text()


@contextlib.contextmanager
def asking(url: str, tokens: int) -> Iterator[list[str]]:
    """A stream that is read in a thread; the texts of its chunks, then how it ended."""
    seen: list[str] = []

    def read() -> None:
        try:
            for chunk in client(url).completions.create(
                model="my-run", prompt=TEXT[:6], max_tokens=tokens, stream=True, temperature=0
            ):
                seen.append(chunk.choices[0].text)
                if chunk.choices[0].finish_reason:
                    seen.append(chunk.choices[0].finish_reason)
        except Exception as error:
            seen.append(type(error).__name__)

    thread = threading.Thread(target=read)
    thread.start()
    assert until(lambda: bool(seen))
    yield seen
    thread.join(60)
    assert not thread.is_alive()


def test_sigterm_lets_requests_end(out_dir):
    with running(f"--out_dir={out_dir}") as (process, url), asking(url, 300) as seen:
        port = int(url.rpartition(":")[2])
        kept = socket.create_connection(("127.0.0.1", port))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", port))
        kept.close()
    assert seen[-1] == "length" and len("".join(seen[:-1])) == 300


def test_a_long_request_ends_with_the_text_so_far(out_dir):
    with running(f"--out_dir={out_dir}", "--drain_seconds=0.3", "--max_tokens=100000") as (process, url):
        with asking(url, 100_000) as seen:
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        assert seen[-1] == "length" and 0 < len("".join(seen[:-1])) < 100_000
        assert "1 requests have 0.15 s" in process.stderr.read()


def test_a_second_signal_ends_it_at_once(out_dir):
    with running(f"--out_dir={out_dir}", "--max_tokens=100000") as (process, url):
        with asking(url, 100_000) as seen:
            process.send_signal(signal.SIGTERM)
            assert until(lambda: "stopping" in process.stderr.readline())
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 128 + signal.SIGTERM
        assert "Error" in seen[-1]


@pytest.mark.slow
def test_clients_that_never_read_do_not_hold_it_up(out_dir):
    """200 streams whose clients leave everything unread; the exit comes within drain_seconds of the signal."""
    body = {"prompt": TEXT[:6], "max_tokens": 4096, "stream": True, "logprobs": 20, "ignore_eos": True}
    options = ["--drain_seconds=4", "--max_concurrent=50", "--max_queued=200", f"--out_dir={out_dir}"]
    with running(*options) as (process, url), contextlib.ExitStack() as stack:
        for _ in range(200):
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            client.settimeout(20)
            client.connect(("127.0.0.1", int(url.rpartition(":")[2])))
            client.sendall(http("/v1/completions", body))
        with urllib.request.urlopen(f"{url}/v1/models"):
            pass
        assert until(lambda: metric(url, "llm_requests_running") + metric(url, "llm_requests_waiting") == 200)
        # far more than the buffers of a stream hold: its sender waits for the client
        assert until(lambda: metric(url, "llm_generated_tokens_total") > 50 * 300, seconds=60)
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert time.monotonic() - begin < 4.0, process.stderr.read()


def metric(url: str, name: str) -> float:
    with urllib.request.urlopen(f"{url}/metrics") as reply:
        found = re.search(rf"^{name} (\S+)$", reply.read().decode(), re.MULTILINE)
    return float(found[1]) if found else 0.0


def refused(capsys, *argv: str) -> str:
    """The one line that a mistake gets."""
    assert serve.main([*QUICK, *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


def test_a_port_that_is_taken(capsys, out_dir):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        said = refused(capsys, f"--out_dir={out_dir}", f"--port={port}")
    assert f"port {port} on 127.0.0.1 is in use" in said and "--port" in said


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--host=0.0.0.0"], "LLM_API_KEY"),
        (["--host=0.0.0.0", "--api_key="], "visible"),
        (["--host=192.0.2.1", "--api_key=k"], "cannot listen on 192.0.2.1"),
        (["--out_dir=none"], "none"),
        (["--prot=1"], "did you mean port"),
        (["--port=http"], "port"),
        (["--max_tokens=0"], "max_tokens"),
        (["--cors_origins=*"], "without an API key"),
        (["--chat_template=no-such"], "chat template"),
        (["--watch=no-such"], "no such folder"),
        (["--out_dir=a", "--checkpoint=b"], "both select a model"),
        (["--temperature=1"], "unknown setting --temperature"),
    ],
    ids=str,
)
def test_mistakes_get_one_line(capsys, out_dir, argv, says, monkeypatch):
    monkeypatch.delenv("LLM_API_KEY", raising=False)
    given = argv if any(word.startswith("--out_dir") for word in argv) else [f"--out_dir={out_dir}", *argv]
    assert says in refused(capsys, *given)


def test_a_missing_extra_is_named(capsys, monkeypatch, out_dir):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else found(name))
    assert "[serve]'" in refused(capsys, f"--out_dir={out_dir}")


def test_help_answers_without_torch_and_fastapi():
    program = (
        "import sys; from llm_from_scratch.cli import serve\n"
        "try: serve.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'fastapi', 'uvicorn', 'jinja2'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "--max_concurrent" in ended.stdout and ended.stdout.splitlines()[-1] == "[]"


def test_other_commands_load_nothing_of_the_server():
    program = (
        "import sys\n"
        "from llm_from_scratch.cli import bench, evaluate, export, generate, plan, prepare_data, sample, train\n"
        "print([name for name in sys.modules if 'serving' in name or name in ('fastapi', 'uvicorn')])"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.stdout.strip() == "[]", ended.stderr


def test_health_reports_the_shutdown(out_dir):
    """A load balancer sees it: an open connection is still answered, with 503, while requests end."""
    with running(f"--out_dir={out_dir}", "--max_tokens=100000", "--drain_seconds=2") as (process, url):
        port = int(url.rpartition(":")[2])
        with asking(url, 100_000):
            # begun before the signal, finished after it
            late = socket.create_connection(("127.0.0.1", port), timeout=20)
            request = http("/v1/completions", {"prompt": "a"})
            late.sendall(request[:-3])
            assert until(lambda: metric(url, "llm_requests_running") >= 1)
            process.send_signal(signal.SIGTERM)
            assert until(lambda: "stopping" in process.stderr.readline())
            late.sendall(request[-3:])
            status, headers, _ = answer(late)
            assert status == 503 and headers["retry-after"]
