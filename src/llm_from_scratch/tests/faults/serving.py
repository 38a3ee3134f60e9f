"""The server under attack and overload: full size as a command, smaller in the test suite.

    python -m llm_from_scratch.tests.faults.serving [--hostile=400] [--disconnects=300] [--slow=200] [--seconds=10]
        [--n_layer=4] [--n_embd=128] [PART ...]

A server in a separate process, on 127.0.0.1, with a random model; well-behaved clients run next to hostile ones. The
smaller the model, the more requests per second, and the larger the server's own share of the work. Prints a table, and
the figures as a line of JSON last. Exit code 0 if every check passed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..forked import SERVER, Forked
from ..served import http
from .hostile_http import COMPLETIONS, hostile_requests

TIMES = 2.0  # what the good ones' p99 may grow by under attack
GOODPUT = 0.95  # what of the goodput stays in overload
SLOTS, QUEUED = 16, 32
ROOM = 200 << 20  # bytes by which the server may grow


Wire = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass
class Findings:
    figures: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def row(self, what: str, good: bool, told: str, **figures: Any) -> None:
        print(f"{'ok' if good else 'FAILED':7}{what:38}{told}", flush=True)
        self.figures[what] = figures | {"ok": good}
        if not good:
            self.failures.append(f"{what}: {told}")


@dataclass
class Target:
    """The server, as its clients see it."""

    port: int
    pid: int

    async def ask(self, request: bytes, seconds: float = 60.0) -> tuple[int, bytes]:
        """Status and body, read to the end of the answer; status 0 if the connection was closed without one."""
        async with self.connection() as (reader, writer):
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                writer.write(request)
                await asyncio.wait_for(writer.drain(), seconds)
                return await asyncio.wait_for(_reply(reader), seconds)
        return 0, b""

    @contextlib.asynccontextmanager
    async def connection(
        self, limit: int = 1 << 22
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=limit)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    async def metrics(self) -> dict[str, float]:
        text = (await self.ask(http("/metrics")))[1].decode()
        return {name: float(value) for name, value in re.findall(r"^(\w+(?:\{.*\})?) (\S+)$", text, re.MULTILINE)}

    async def at_rest(self, seconds: float = 10.0) -> bool:
        """Whether within that time nothing runs or waits any more."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = await self.metrics()
            if not found["llm_requests_running"] and not found["llm_requests_waiting"]:
                return True
            await asyncio.sleep(0.05)
        return False

    async def all_slots_free(self) -> bool:
        """Whether as many samples as there are places for, run and waiting, are taken at once, and served."""
        answers = await asyncio.gather(*(self.ask(good(n=SLOTS)) for _ in range((SLOTS + QUEUED) // SLOTS)))
        return all(status == 200 for status, _ in answers)

    def memory(self) -> int:
        """Resident bytes of the server; 0 if unknown."""
        with contextlib.suppress(OSError):
            return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return 0


async def _reply(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    status = 100
    while status == 100:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        status = int(head.split()[1])
    if found := re.search(rb"content-length: (\d+)", head):
        return status, await reader.readexactly(int(found[1]))
    body = b""
    if b"chunked" in head:
        while size := int(await reader.readline(), 16):
            body += (await reader.readexactly(size + 2))[:-2]
    return status, body


def good(tokens: int = 8, **fields: Any) -> bytes:
    return http(COMPLETIONS, {"prompt": "once upon a time", "max_tokens": tokens, "ignore_eos": True, **fields})


class GoodClients:
    """A few clients that ask one request after the other, and what became of those."""

    def __init__(self, target: Target, count: int = 3):
        self.target, self.count = target, count
        self.seconds: list[float] = []
        self.failed: Counter[int] = Counter()

    async def __aenter__(self) -> GoodClients:
        self.over = False
        self.tasks = [asyncio.create_task(self._ask(k)) for k in range(self.count)]
        return self

    async def __aexit__(self, *error: object) -> None:
        self.over = True
        await asyncio.gather(*self.tasks)

    async def _ask(self, k: int) -> None:
        turn = 0
        while not self.over:
            turn += 1
            begin = time.monotonic()
            status, body = await self.target.ask(good(stream=turn % 2 == 0))
            if status == 200 and (b"[DONE]" in body or b'"usage"' in body) and b'"error"' not in body:
                self.seconds.append(time.monotonic() - begin)
            else:
                self.failed[status] += 1
            await asyncio.sleep(0.02)

    def quantile(self, q: float) -> float:
        return (
            sorted(self.seconds)[min(len(self.seconds) - 1, int(q * len(self.seconds)))] * 1000 if self.seconds else 0.0
        )


async def hostile(target: Target, findings: Findings, count: int, patience: float = 15.0) -> None:
    """Hostile requests among good ones, at 50 a second, in turns with phases of good ones alone."""
    requests, statuses, wrong = hostile_requests(count, seed=0), Counter[int](), []
    calm, attacked = GoodClients(target), GoodClients(target)

    async def attack(request: bytes) -> None:
        try:
            status, body = await target.ask(request, patience)
        except (OSError, ValueError, asyncio.TimeoutError, asyncio.LimitOverrunError) as error:
            status, body = 0, type(error).__name__.encode()
        statuses[status] += 1
        if status >= 500 or (status >= 400 and status != 405 and b'"error"' not in body and b"HEAD" != request[:4]):
            wrong.append((status, request[:120], body[:120]))

    turns = max(1, count // 100)
    for turn in range(turns):
        part = requests[turn * count // turns : (turn + 1) * count // turns]
        async with calm:
            await asyncio.sleep(len(part) / 50)
        async with attacked:
            running = []
            for request in part:
                running.append(asyncio.create_task(attack(request)))
                await asyncio.sleep(0.02)
            await asyncio.wait(running, timeout=0.5)  # what is never complete waits for its time to run out
        await asyncio.gather(*running)
    ratio = attacked.quantile(0.99) / max(1e-9, calm.quantile(0.99))
    alive = (await target.ask(http("/health")))[0] == 200
    told = ", ".join(f"{n} x {status or 'closed'}" for status, n in sorted(statuses.items()))
    findings.row(f"{count} hostile requests", not wrong and alive, f"{told}; server {'lives' if alive else 'is gone'}"
                 + "".join(f"\n         {item}" for item in wrong[:5]),
                 statuses=dict(statuses), alive=alive)  # fmt: skip
    failed = sum(calm.failed.values()) + sum(attacked.failed.values())
    findings.row(
        "good requests meanwhile", ratio <= TIMES and not failed,
        f"p99 {calm.quantile(0.99):.0f} ms alone ({len(calm.seconds)}), {attacked.quantile(0.99):.0f} ms under attack "
        f"({len(attacked.seconds)}): {ratio:.2f} x; p50 {calm.quantile(0.5):.0f} and {attacked.quantile(0.5):.0f} ms; "
        f"{failed} failed", p99_ratio=round(ratio, 3), failed=failed,
        p99_ms=[round(calm.quantile(0.99), 1), round(attacked.quantile(0.99), 1)],
    )  # fmt: skip


async def disconnects(target: Target, findings: Findings, count: int) -> None:
    """Clients that leave: within headers or body, while they wait, after some events, behind further bytes."""
    rng = random.Random(1)

    async def leave(k: int) -> None:
        request = good(tokens=2000, stream=k % 2 == 0, n=rng.choice((1, 1, 2)))
        async with target.connection() as (reader, writer):
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                kind = k % 5
                cut = {0: rng.randrange(1, 60), 1: len(request) - rng.randrange(1, 40)}.get(kind, len(request))
                writer.write(request[:cut] + (b"GET / HTTP/1.1\r\n" if kind == 4 else b""))
                await writer.drain()
                if kind == 3:
                    await asyncio.wait_for(reader.read(300), 0.5)
                await asyncio.sleep(rng.random() * 0.2)

    await _beside_good_ones(target, findings, f"{count} disconnects", [leave(k) for k in range(count)], at_once=20)


async def slow(target: Target, findings: Findings, count: int, seconds: float) -> None:
    """Clients that send a byte now and then, or read so: all at once, each for some seconds."""
    rng = random.Random(2)

    async def crawl(k: int) -> None:
        request = good(tokens=2000, stream=True, logprobs=5) if k % 2 else good()
        with contextlib.suppress(OSError):
            async with target.connection(limit=256) as (reader, writer):
                end = time.monotonic() + seconds * (0.5 + rng.random() / 2)
                if k % 2:
                    writer.write(request)
                    with contextlib.suppress(asyncio.TimeoutError):
                        while (left := end - time.monotonic()) > 0 and len(
                            await asyncio.wait_for(reader.read(16), left)
                        ):
                            await asyncio.sleep(0.1)
                    return
                sent = 0 if k % 4 else len(request) - 60
                writer.write(request[:sent])
                while time.monotonic() < end and sent < len(request):
                    writer.write(request[sent : sent + 1])
                    await writer.drain()
                    sent += 1
                    await asyncio.sleep(0.25)

    await _beside_good_ones(target, findings, f"{count} slow clients", [crawl(k) for k in range(count)], at_once=count)


async def _beside_good_ones(target: Target, findings: Findings, what: str, bad: list[Any], at_once: int) -> None:
    """Good ones wait for places that the bad ones hold, and may be told so (429), but nothing else goes wrong."""
    before, gate = target.memory(), asyncio.Semaphore(at_once)

    async def one(client: Awaitable[None]) -> None:
        async with gate:
            await client

    async with GoodClients(target) as clients:
        await asyncio.gather(*map(one, bad))
    rest = await target.at_rest()
    free = rest and await target.all_slots_free()
    grown = max(0, target.memory() - before)
    busy = clients.failed.pop(429, 0)
    served, failed = len(clients.seconds), sum(clients.failed.values())
    share = served / max(1, served + failed)
    findings.row(
        what, rest and free and grown < ROOM and share >= GOODPUT and served > 0,
        f"{'no slot leaked' if free else 'SLOTS LEAKED'}; good ones: {served} served, {busy} told to wait, "
        f"{failed} failed {dict(clients.failed) or ''}, p99 {clients.quantile(0.99):.0f} ms; {grown >> 20} MB more",
        served=served, told_to_wait=busy, failed=failed, leaked=not free, grown_mb=grown >> 20,
    )  # fmt: skip


async def overload(target: Target, findings: Findings, seconds: float, times: int = 10) -> None:
    """Requests that arrive at 10 times the rate that the server manages, in turns with arrivals at that rate."""
    tokens, request = 64, good(tokens=64)

    async def closed_loop(clients: int, span: float) -> float:
        end, done = time.monotonic() + span, 0

        async def client() -> None:
            nonlocal done
            while time.monotonic() < end:
                status, _ = await target.ask(request)
                done += status == 200 and time.monotonic() < end

        await asyncio.gather(*(client() for _ in range(clients)))
        return done / span

    async def arrivals(rate: float, span: float) -> float:
        begin, done, running = time.monotonic(), 0, set()

        async def client() -> None:
            nonlocal done
            with contextlib.suppress(OSError, asyncio.TimeoutError, asyncio.IncompleteReadError):
                reader, writer = idle.pop() if idle else await asyncio.open_connection("127.0.0.1", target.port)
                writer.write(request)
                status, body = await asyncio.wait_for(_reply(reader), 60)
                idle.append((reader, writer))
                statuses[status] += 1
                done += (
                    status == 200
                    and f'"completion_tokens":{tokens}'.encode() in body
                    and time.monotonic() < begin + span
                )

        sent = 0
        while (now := time.monotonic()) < begin + span:
            for _ in range(int((now - begin) * rate) - sent):
                sent += 1
                running.add(task := asyncio.create_task(client()))
                task.add_done_callback(running.discard)
            await asyncio.sleep(0.005)
        offered.append(sent / span)
        await asyncio.gather(*running)
        return done / span

    offered: list[float] = []
    statuses, idle = Counter[int](), list[Any]()  # connections, kept as OpenAI's client keeps them
    await closed_loop(SLOTS, 1.0)  # to warm up
    turns = max(2, round(seconds / 5))
    alone, pressed = [], []
    for _ in range(turns):
        most = await closed_loop(SLOTS + QUEUED // 2, seconds / turns)
        alone.append(max(most, await arrivals(most, seconds / turns)))
        pressed.append(await arrivals(times * alone[-1], seconds / turns))
    share = sum(pressed) / max(1e-9, sum(alone))
    rest = await target.at_rest()
    free = rest and await target.all_slots_free()
    strange = {status: n for status, n in statuses.items() if status not in (200, 429)}
    findings.row(
        f"{times} x overload", share >= GOODPUT and free and not strange,
        f"{sum(alone) / turns:.0f} requests/s served at the maximum rate, {sum(pressed) / turns:.0f} of "
        f"{sum(offered[1::2]) / turns:.0f} that arrive: goodput {100 * share:.0f}%; "
        f"{statuses[200]} x 200, {statuses[429]} x 429{f', others {strange}' if strange else ''}; "
        f"{'no slot leaked' if free else 'SLOTS LEAKED'}",
        goodput=round(share, 3), capacity=round(sum(alone) / turns, 1), offered=round(sum(offered[1::2]) / turns, 1),
        statuses=dict(statuses),
    )  # fmt: skip


def make_run(folder: Path, n_layer: int, n_embd: int) -> Path:
    """A run with a random byte model, with heads of 32 dimensions."""
    import torch

    from llm_from_scratch.checkpoint.store import save_checkpoint
    from llm_from_scratch.config import GPTConfig
    from llm_from_scratch.core.model import GPT
    from llm_from_scratch.core.tokenizer import ByteTokenizer

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_layer": n_layer, "n_head": max(1, n_embd // 32), "n_embd": n_embd}
    model = GPT(GPTConfig(vocab_size=256, block_size=128, bias=False, **sizes))
    save_checkpoint(folder / "out", step=1, model_config=model.config, model=model.state_dict(), run_id="r",
                    tokenizer=ByteTokenizer(), val_loss=1.0)  # fmt: skip
    return folder / "out"


@contextlib.contextmanager
def server(folder: Path, forks: bool = False, n_layer: int = 4, n_embd: int = 128) -> Iterator[Target]:
    """llm-serve in a process of its own; its standard error is printed if it fails. forks:
    in a forked process, which is there sooner."""
    template = folder / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}", encoding="utf-8")
    out_dir = make_run(folder, n_layer, n_embd)
    words = [f"--out_dir={out_dir}", "--port=0", "--device=cpu", "--dtype=float32", "--threads=1",
             f"--max_concurrent={SLOTS}", f"--max_queued={QUEUED}", f"--chat_template={template}"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    command = "llm_from_scratch.cli.serve"
    process: Any
    with (folder / "log").open("wb") as log:
        if forks:
            process = Forked(command, *words, stderr=log, env=environment, imports=SERVER)
        else:
            start = [sys.executable, "-m", command, *words]
            process = subprocess.Popen(start, stdout=subprocess.PIPE, stderr=log, env=environment, text=True)
    with process:
        line = process.stdout.readline()
        found = re.search(r":(\d+)$", line.strip())
        try:
            if not found:
                raise RuntimeError(f"the server did not start: {(folder / 'log').read_text()}")
            yield Target(int(found[1]), process.pid)
            process.send_signal(signal.SIGTERM)
            if code := process.wait(60):
                raise RuntimeError(f"the server ended with {code}: {(folder / 'log').read_text()[-2000:]}")
        finally:
            if process.poll() is None:
                process.kill()


def run(
    parts: dict[str, Callable[[Target, Findings], Coroutine[Any, Any, None]]],
    folder: Path,
    forks: bool = False,
    **sizes: int,
) -> Findings:  # fmt: skip
    findings = Findings()
    with server(folder, forks, **sizes) as target:
        for part in parts.values():
            asyncio.run(part(target, findings))
    said = [line for line in (folder / "log").read_text().splitlines() if "llm-serve:" in line or "rror" in line]
    findings.row("the server's log", not said, "; ".join(said[:5]) or "no errors")
    return findings


def all_parts(hostiles: int, leavers: int, crawlers: int, seconds: float, patience: float = 15.0) -> dict[str, Any]:
    return {
        "hostile": lambda target, findings: hostile(target, findings, hostiles, patience),
        "disconnects": lambda target, findings: disconnects(target, findings, leavers),
        "slow": lambda target, findings: slow(target, findings, crawlers, seconds),
        "overload": lambda target, findings: overload(target, findings, 2 * seconds),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Attacks and overloads a server.")
    parser.add_argument("parts", nargs="*", help="some of hostile, disconnects, slow, overload (default: all)")
    parser.add_argument("--hostile", type=int, default=400)
    parser.add_argument("--disconnects", type=int, default=300)
    parser.add_argument("--slow", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=10.0, help="of the slow clients; overload: twice that")
    parser.add_argument("--n_layer", type=int, default=4)
    parser.add_argument("--n_embd", type=int, default=128)
    options = parser.parse_args(argv)
    every = all_parts(options.hostile, options.disconnects, options.slow, options.seconds)
    if unknown := set(options.parts) - set(every):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; expected some of {', '.join(every)}")
    with tempfile.TemporaryDirectory(prefix="serving-") as folder:
        parts = {name: every[name] for name in options.parts or every}
        findings = run(parts, Path(folder), n_layer=options.n_layer, n_embd=options.n_embd)
    print(json.dumps({"failures": len(findings.failures), **findings.figures}))
    return 1 if findings.failures else 0


if __name__ == "__main__":
    sys.exit(main())
