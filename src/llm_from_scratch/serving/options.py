"""The server's settings. Imports neither torch nor FastAPI: `--help` must answer at once."""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError

KEY_VARIABLE = "LLM_API_KEY"


@dataclass
class ServeOptions:
    """The server, and what one client may ask of it."""

    host: str = "127.0.0.1"
    """Address to listen on. Any other than this machine's own (127.0.0.1, localhost, ::1) needs an API key."""
    port: int = 8000
    """Port; 0 takes a free one and says which."""
    api_key: str | None = None
    """Key that clients must send. None reads the variable LLM_API_KEY, which does not show in the process list."""
    model_name: str | None = None
    """What the model is called in the API. None: the name of its folder."""
    chat_template: str | None = None
    """File with a chat template (Jinja). None: the one in the model's folder, where there is one."""
    watch: str | None = None
    """Folder of the run whose curves and samples the page shows. None: the run that the model is from."""
    allowed_hosts: tuple[str, ...] = ()
    """Further names under which clients reach the server (Host header): one, or '["a.org", "b.org"]'; * allows all."""
    cors_origins: tuple[str, ...] = ()
    """Web pages of these origins may use the server, for example https://app.example.org; none by default."""
    max_concurrent: int = 32
    """Samples decoded at once."""
    max_queued: int = 128
    """Samples that wait for their turn; beyond them the answer is 429."""
    max_tokens: int = 4096
    """Tokens that one request may ask for, per sample."""
    max_prompt_tokens: int | None = None
    """Tokens of a prompt, of which the model sees the last block_size. None: 8192, or four times block_size."""
    max_body_bytes: int = 1 << 20
    """Size that a request's body may have."""
    max_seconds: float = 300.0
    """Time that a request may take, waiting included; it then ends with what there is."""
    drain_seconds: float = 30.0
    """Time that running requests get to end after SIGTERM or Ctrl-C."""

    def validate(self) -> None:
        if not 0 <= self.port < 1 << 16:
            raise UserError(f"port={self.port} is out of range: expected 0 to 65535")
        for name in ("max_concurrent", "max_tokens", "max_body_bytes"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} is out of range: expected 1 or more")
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 1:
            raise UserError(f"max_prompt_tokens={self.max_prompt_tokens} is out of range: expected 1 or more")
        if self.max_queued < 0:
            raise UserError(f"max_queued={self.max_queued} is out of range: expected 0 or more")
        if not 0 < self.max_seconds < float("inf"):
            raise UserError(f"max_seconds={self.max_seconds} is out of range: expected a finite number above 0")
        if not 0 <= self.drain_seconds < float("inf"):
            raise UserError(f"drain_seconds={self.drain_seconds} is out of range: expected 0 or more")
        if self.api_key is not None and not re.fullmatch(r"[!-~]+", self.api_key):
            raise UserError("api_key must be visible ASCII characters without spaces, at least one")
        if self.model_name is not None and not re.fullmatch(r"[\w./:@+-]{1,200}", self.model_name):
            raise UserError(f"model_name={self.model_name!r} holds other characters than letters, digits and ./:@+-_")
        for origin in self.cors_origins:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
                raise UserError(f"cors_origins: {origin!r} is no origin; expected one such as https://app.example.org")
        if self.api_key is None:
            if not is_loopback(self.host):
                raise UserError(
                    f"--host={self.host} lets other machines in, and without a key whoever reaches it may use the "
                    f"model: set the environment variable {KEY_VARIABLE} (or --api_key), or leave out --host"
                )
            if "*" in self.cors_origins:
                raise UserError(
                    "--cors_origins=* lets every web page use a server without a key: name the origins, or set "
                    f"{KEY_VARIABLE}"
                )
        if self.watch is not None and not Path(self.watch).is_dir():
            raise UserError(f"--watch={self.watch}: no such folder")


def addresses(host: str, port: int) -> list[tuple[socket.AddressFamily, tuple]]:
    """Where to listen for a host's name, IPv4 first. Raises UserError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host={host} is no address of this machine ({reason})") from None
    return sorted(((family, address) for family, _, _, _, address in found), key=lambda pair: pair[0].name != "AF_INET")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server at that host. Raises UserError for a name that is none."""
    return bool(host) and all(
        ipaddress.ip_address(address[0].partition("%")[0]).is_loopback for _, address in addresses(host, 0)
    )
