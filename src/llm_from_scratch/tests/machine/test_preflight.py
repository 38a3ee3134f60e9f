"""machine/preflight.py: why processes do not find each other, and what torchrun's variables must be."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from llm_from_scratch.errors import UserError
from llm_from_scratch.machine import preflight
from llm_from_scratch.machine.processes import distributed_env


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        yield found


def told(
    monkeypatch: pytest.MonkeyPatch, address: str, port: int, backend: str = "gloo", missing: object = None
) -> str:
    monkeypatch.setattr(preflight, "PROBE", 0.2)
    monkeypatch.setenv("MASTER_ADDR", address)
    monkeypatch.setenv("MASTER_PORT", str(port))
    return str(preflight.diagnosed(RuntimeError("of torch"), backend, 1, missing))  # type: ignore[arg-type]


def test_a_store_that_is_not_reached(monkeypatch: pytest.MonkeyPatch, listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    refused = told(monkeypatch, "127.0.0.1", port)
    assert refused.startswith(f"rank 1 on {socket.gethostname()} cannot join the other processes: nothing listens at ")
    assert f"127.0.0.1:{port}: is rank 0 running, and is MASTER_ADDR the address of its machine? (of torch)" in refused
    listener.listen()
    assert "is in use by another program: choose another port" in told(monkeypatch, "127.0.0.1", port)
    assert "MASTER_ADDR=no-host.invalid is not the name of a host" in told(monkeypatch, "no-host.invalid", port)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("fails", ["connect", "__init__"])  # a machine may not have IPv6 at all
def test_a_silent_address(monkeypatch: pytest.MonkeyPatch, family: socket.AddressFamily, fails: str) -> None:
    def silent(*given: object) -> None:
        raise TimeoutError("timed out") if fails == "connect" else OSError("Address family not supported")

    found = [(family, socket.SOCK_STREAM, 6, "", ("2001:db8::1", 29500))]
    with monkeypatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", lambda *given, **settings: found)
        patch.setattr(socket.socket, fails, silent)
        text = told(monkeypatch, "gpu-1", 29500)
    assert "2001:db8::1:29500 does not answer: a firewall, another network, or a wrong MASTER_ADDR" in text
    assert ("(gpu-1 has IPv6 addresses only)" in text) == (family == socket.AF_INET6)


def test_processes_that_reach_the_store_but_not_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "rank 3 not found: look for their errors above" in told(monkeypatch, "a", 1, missing=[3])
    assert "ranks 1 to 2, 5 not found" in told(monkeypatch, "a", 1, missing=[1, 2, 5])
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth7")])
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth9")
    gloo, nccl = (told(monkeypatch, "a", 1, backend, []) for backend in ("gloo", "nccl"))
    assert "wrong interface (GLOO_SOCKET_IFNAME=eth9; interfaces: eth7)" in gloo and "NCCL" not in gloo
    assert "resolves to a loopback address" in gloo and "a firewall between the machines" in gloo
    assert "(NCCL_SOCKET_IFNAME is not set; interfaces: eth7)" in nccl
    assert "or InfiniBand: try NCCL_IB_DISABLE=1" in nccl


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MASTER_PORT", "http", "RANK, LOCAL_RANK, WORLD_SIZE and MASTER_PORT must be whole numbers"),
        ("MASTER_PORT", "70000", "MASTER_PORT=70000 must be between 0 and 65535"),
        ("RANK", "2", "RANK=2 must be between 0 and WORLD_SIZE - 1 = 1"),
        ("WORLD_SIZE", "two", "must be whole numbers; start with torchrun"),
        ("MASTER_ADDR", "", "MASTER_ADDR missing; start with torchrun"),
    ],
)
def test_wrong_variables_are_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str) -> None:
    right = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for variable, text in right.items():
        monkeypatch.setenv(variable, text)
    assert distributed_env() == (1, 1, 2)
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        distributed_env()
