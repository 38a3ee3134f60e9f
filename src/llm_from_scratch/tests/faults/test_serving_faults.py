"""A few cases of each fault in serving.py, without checks that depend on the machine's speed."""

from __future__ import annotations

import asyncio
from pathlib import Path

from . import serving


def test_the_server_lives_through_it(tmp_path: Path) -> None:
    parts = serving.all_parts(hostiles=40, leavers=20, crawlers=12, seconds=1.0, patience=2.0)
    del parts["overload"]
    findings = serving.run(parts, tmp_path, forks=True)
    speed = "good requests meanwhile"
    assert [line for line in findings.failures if not line.startswith(speed)] == []
    assert findings.figures[speed]["failed"] == 0
    for what in ("20 disconnects", "12 slow clients"):
        assert findings.figures[what]["served"] > 0 and not findings.figures[what]["leaked"]


def test_leaks_and_crashes_are_detected(tmp_path: Path) -> None:
    findings = serving.Findings()

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 500 x\r\ncontent-length: 0\r\n\r\n")
        writer.close()

    async def attack() -> None:
        server = await asyncio.start_server(refuse, "127.0.0.1", 0)
        async with server:
            target = serving.Target(server.sockets[0].getsockname()[1], 0)
            assert not await target.all_slots_free()
            await serving.hostile(target, findings, 5)

    asyncio.run(attack())
    assert len(findings.failures) == 2
