"""Commands in processes forked from one that has imported torch, for all workers: importing it for each takes longer
than a test of a running command. The start of a command itself is tested with real processes.

The folder of shared.py has the socket of the forking process. It ends when the folder or the test run is gone.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from filelock import FileLock

from .shared import FOLDER

SOURCES = str(Path(__file__).resolve().parents[2])
SERVER = ("llm_from_scratch.serving.app", "llm_from_scratch.serving.server")
ALWAYS = ("llm_from_scratch.training.trainer", "llm_from_scratch.generation.generator")


class Forked:
    """What subprocess.Popen is for `python -m MODULE ARGV...`, or for a script, if the name ends in .py."""

    def __init__(
        self, module: str, *argv: str, env: Mapping[str, str] = os.environ, stdin: Any = subprocess.DEVNULL,
        stdout: Any = subprocess.PIPE, stderr: Any = subprocess.PIPE, imports: tuple[str, ...] = (),
        start_new_session: bool = False,
    ):  # fmt: skip
        """imports: modules that the forking process imports before, once for all."""
        self.returncode: int | None = None
        self.stdin: Any = None
        self.stdout: Any = None
        self.stderr: Any = None
        theirs: list[int] = []
        for name, given in (("stdin", stdin), ("stdout", stdout), ("stderr", stderr)):
            if given == subprocess.PIPE:
                reader, writer = os.pipe()
                theirs.append(reader if name == "stdin" else writer)
                own = open(writer, "w") if name == "stdin" else open(reader, encoding="utf-8")
                setattr(self, name, own)
            elif given == subprocess.STDOUT:
                theirs.append(os.dup(theirs[-1]))
            elif given == subprocess.DEVNULL:
                theirs.append(os.open(os.devnull, os.O_RDWR))
            else:
                theirs.append(os.dup(given if isinstance(given, int) else given.fileno()))
        reader, writer = os.pipe()
        self._status = open(reader, "rb", buffering=0)
        request = {"module": module, "argv": argv, "env": dict(env), "cwd": os.getcwd(), "imports": imports,
                   "session": start_new_session}  # fmt: skip
        socket.send_fds(_connection(), [json.dumps(request).encode()], [*theirs, writer])
        for fd in (*theirs, writer):
            os.close(fd)
        self.pid = int(self._status.readline())

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self.returncode = int(self._status.readline())
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        if self.returncode is None and not select.select([self._status], [], [], timeout)[0]:
            raise TimeoutError(f"process {self.pid} still runs after {timeout} s")
        code = self.poll()
        assert code is not None
        return code

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()
        for stream in (self.stdin, self.stdout, self.stderr, self._status):
            if stream is not None:
                stream.close()


def run(module: str, *argv: str, timeout: float = 300, **options: Any) -> subprocess.CompletedProcess[str]:
    """As subprocess.run with capture_output=True, text=True. options: of Forked."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        with Forked(module, *argv, **{"stdout": out, "stderr": err, **options}) as process:
            try:
                code = process.wait(timeout)
            except TimeoutError:
                process.kill()
                raise
        for file in (out, err):
            file.seek(0)
        return subprocess.CompletedProcess([module, *argv], code, out.read(), err.read())


def forks(commands: list[list[str]]) -> Any:
    """What a module that starts `[python, -m, MODULE, ...]` may have in place of subprocess. commands: gets each."""

    def start(command: list[str], env: Mapping[str, str], stdout: Any, **others: Any) -> Forked:
        commands.append(command)
        assert command[1] == "-m" and others["stderr"] == subprocess.STDOUT
        return Forked(*command[2:], env=env, stdout=stdout, stderr=subprocess.STDOUT)

    return SimpleNamespace(Popen=start, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT)


@contextlib.contextmanager
def rendezvous(processes: int) -> Iterator[dict[str, str]]:
    """The variables by which processes meet. This process listens, as torchrun does: a port that is only chosen may be
    another's, or connected to itself, before the first rank listens."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield {
        "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip
    del store


_connections: dict[int, socket.socket] = {}


def _connection() -> socket.socket:
    """The socket of the forking process, which is started if there is none."""
    if (pid := os.getpid()) not in _connections:
        folder = os.environ[FOLDER]
        path, connection = f"{folder}/forks", socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with FileLock(f"{path}.lock"):
            if not os.path.exists(path):
                environment = {**os.environ, "PYTHONPATH": SOURCES, "OPENBLAS_NUM_THREADS": "1"}
                command = [sys.executable, "-m", __name__, path]
                subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd="/")
                while not os.path.exists(path):
                    time.sleep(0.01)
        connection.connect(path)
        _connections[pid] = connection
    return _connections[pid]


# --- the process that forks ---


def _listen(path: str) -> int:
    """Forks for each request; returns the exit code of the command in the forked process."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path + ".new")
    listener.listen()
    os.rename(path + ".new", path)
    for name in ALWAYS:
        importlib.import_module(name)
    gc.freeze()  # the processes need not collect what they share
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that only report
    clients: list[socket.socket] = []
    while os.path.exists(path):
        for ready in select.select([listener, *clients], [], [], 1.0)[0]:
            if ready is listener:
                clients.append(listener.accept()[0])
                continue
            data, fds, *_ = socket.recv_fds(ready, 1 << 20, 4)
            if not data:
                clients.remove(ready)
                continue
            request = json.loads(data)
            for name in request["imports"]:
                importlib.import_module(name)
            if os.fork() == 0:
                for connection in (listener, *clients):
                    connection.close()
                return _report(fds.pop(), fds, request)
            for fd in fds:
                os.close(fd)
    return 0


def _report(status: int, streams: list[int], request: dict[str, Any]) -> int:
    """Forks once more; the first process writes the id and the exit code of the second, which runs the command."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        os.close(status)
        return _command(streams, request)
    for fd in streams:
        os.close(fd)
    with contextlib.suppress(BrokenPipeError):
        os.write(status, b"%d\n" % pid)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.write(status, b"%d\n" % code)
    os._exit(0)


def _command(streams: list[int], request: dict[str, Any]) -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if request["session"]:
        os.setsid()
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    for number, fd in enumerate(streams):
        os.dup2(fd, number)
        os.close(fd)
    encoding = os.environ.get("PYTHONIOENCODING") or "utf-8"
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        raw = open(number, mode + "b")
        lines = os.isatty(number) or name == "stderr"
        errors = "backslashreplace" if name == "stderr" else "surrogateescape" if name == "stdin" else "strict"
        stream = io.TextIOWrapper(raw, encoding=encoding, errors=errors, line_buffering=lines)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    module = request["module"]
    sys.argv = [module, *request["argv"]]
    if module.endswith(".py"):
        sys.path.insert(0, os.path.dirname(os.path.abspath(module)))
        runpy.run_path(module, run_name="__main__")
        return 0
    return importlib.import_module(module).main() or 0


if __name__ == "__main__":
    sys.exit(_listen(sys.argv[1]))
