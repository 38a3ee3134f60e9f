"""The server's settings. Imports neither torch nor FastAPI, so that `--help` is fast."""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UserError
from ..settings import above, at_least

KEY_VARIABLE = "LLM_API_KEY"
MODEL_NAME = r"[\w./:@+-]{1,200}"


@dataclass
class ServeOptions:
    """The server and its limits."""

    host: str = "127.0.0.1"
    """Address to listen on. Any address that other machines can reach needs an API key."""
    port: int = 8000
    """Port. 0: any free port, which is printed."""
    api_key: str | None = None
    """API key for clients. None: from the environment variable LLM_API_KEY, which the process list does not show."""
    model_name: str | None = None
    """Name of the model in the API. None: the name of its folder."""
    adapters: dict[str, str] = field(default_factory=dict)
    """More models in the API: LoRA runs or peft folders with the served model as base, such as '{poet: out-a, coder:
    out-b}'. Layers without an adapter are shared."""
    chat_template: str | None = None
    """File with a chat template (Jinja). None: the template in the model's folder, if there is one."""
    watch: str | None = None
    """Run folder to show in the playground (curves and samples). None: the run of the model."""
    allowed_hosts: tuple[str, ...] = ()
    """Other accepted Host headers. One, or a list such as '["a.org", "b.org"]'. *: any."""
    cors_origins: tuple[str, ...] = ()
    """Origins of web pages that may use the server, for example https://app.example.org."""
    max_concurrent: int = 32
    """Maximum number of samples decoded in parallel."""
    max_queued: int = 128
    """Maximum number of waiting samples. Beyond it, requests get status 429."""
    max_tokens: int = 4096
    """Maximum number of generated tokens per sample."""
    max_prompt_tokens: int | None = None
    """Maximum number of prompt tokens; the model sees the last block_size. None: 8192, or 4 * block_size if larger."""
    max_body_bytes: int = 1 << 20
    """Maximum size of a request body in bytes."""
    max_seconds: float = 300.0
    """Maximum seconds per request, including waiting. The answer then ends with the text so far."""
    drain_seconds: float = 30.0
    """Maximum seconds from SIGTERM or Ctrl-C to exit. Running requests get up to 4 s less."""

    def validate(self) -> None:
        if not 0 <= self.port < 1 << 16:
            raise UserError(f"port={self.port} is out of range: expected 0 to 65535")
        at_least(self, 1, "max_concurrent", "max_tokens", "max_body_bytes", "max_prompt_tokens")
        at_least(self, 0, "max_queued", "drain_seconds")
        above(self, 0, "max_seconds")
        if self.api_key is not None and not re.fullmatch(r"[!-~]+", self.api_key):
            raise UserError("api_key must have at least one character, only visible ASCII and no spaces")
        if self.model_name is not None and not re.fullmatch(MODEL_NAME, self.model_name):
            raise UserError(f"model_name={self.model_name!r} may only contain letters, digits and ./:@+-_")
        for name in self.adapters:
            if not re.fullmatch(MODEL_NAME, name):
                raise UserError(f"adapters: the name {name[:100]!r} may only contain letters, digits and ./:@+-_")
        for origin in self.cors_origins:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
                raise UserError(f"cors_origins: {origin!r} is not an origin such as https://app.example.org")
        if self.api_key is None:
            if not is_loopback(self.host):
                raise UserError(
                    f"--host={self.host} is open to other machines, so it needs an API key: set the environment "
                    f"variable {KEY_VARIABLE} (or --api_key), or remove --host"
                )
            if "*" in self.cors_origins:
                raise UserError(
                    "--cors_origins=* lets every web page use a server without an API key: list the origins or set "
                    f"{KEY_VARIABLE}"
                )
        if self.watch is not None and not Path(self.watch).is_dir():
            raise UserError(f"--watch={self.watch}: no such folder")


def addresses(host: str, port: int) -> list[tuple[socket.AddressFamily, tuple]]:
    """The socket addresses of a host name, IPv4 first. Raises UserError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host={host} is not an address of this machine ({reason})") from None
    return sorted(((family, address) for family, _, _, _, address in found), key=lambda pair: pair[0].name != "AF_INET")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server at that host. Raises UserError for an unknown name."""
    return bool(host) and all(
        ipaddress.ip_address(address[0].partition("%")[0]).is_loopback for _, address in addresses(host, 0)
    )
