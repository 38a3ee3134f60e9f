"""The copy of a run's checkpoints in a store: nothing is lost, nothing wrong is loaded, whatever the store does."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_from_scratch.checkpoint import mirror
from llm_from_scratch.checkpoint.load import load
from llm_from_scratch.checkpoint.mirror import Mirror, Store, restore
from llm_from_scratch.checkpoint.store import list_checkpoints
from llm_from_scratch.cli.train import main
from llm_from_scratch.config import TrainingConfig
from llm_from_scratch.errors import DamagedError, UserError

from ..tiny import arguments
from .test_store import damage, save

fsspec = pytest.importorskip("fsspec")


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(mirror, "RETRIES", (0.01, 0.05))
    yield
    store = fsspec.filesystem("memory")
    store.store.clear()
    store.pseudo_dirs[:] = [""]


def opened(url: str, out: Path, keep_last: int = 2, **more: Any) -> Mirror:
    found = Mirror(url, out, "run-a", keep_last, more.get("keep_every"))
    found.start()
    return found


def restored(url: str, out: Path) -> list[str]:
    lines: list[str] = []
    restore(url, out, lines.append)
    return lines


def steps(url: str) -> list[int]:
    return [found.step for found in Store(url).complete()]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_a_lost_folder_is_restored_bit_for_bit(tmp_path: Path, kind: str) -> None:
    url, out = "memory" if kind == "memory" else f"file://{tmp_path}/store", tmp_path / "out"
    for step in (1, 2):
        save(out, step)
    copy = opened(url, out)
    assert copy.wait(10) and steps(url) == [2, 1] and copy.lines == []
    before = tree(out / "step-00000002")
    shutil.rmtree(out)
    assert restored(url, out) == [f"restored {out}/step-00000002 from {Store(url).url}"]
    assert tree(out / "step-00000002") == before
    assert restored(url, out) == []  # there is nothing to do
    damage(out / "step-00000002" / "model.safetensors")
    restored(url, out)
    assert tree(out / "step-00000002") == before and (out / "damaged-step-00000002").is_dir()


def test_old_ones_are_removed_by_the_rule_of_the_folder(tmp_path: Path) -> None:
    copy = opened("memory", tmp_path, keep_last=1, keep_every=4)
    for step, loss in ((2, 1.0), (3, 3.0), (4, 2.0), (5, 2.5), (6, 2.2)):
        save(tmp_path, step, val_loss=loss)
        copy.saved()
        assert copy.wait(10)
    assert steps("memory") == [6, 4, 2]
    names = {name.split("/")[-1] for name in fsspec.filesystem("memory").ls("/mirror", detail=False)}
    assert names == {f"step-0000000{step}{end}" for step in (2, 4, 6) for end in ("", ".complete")}


def interrupted(monkeypatch: pytest.MonkeyPatch, after: int) -> Callable[[], None]:
    """Makes uploads end after a number of files, as if the process were killed. Returns what undoes it."""
    write, count = Store.write, iter(range(10_000))

    def cut(self: Store, name: str, chunks: Any, on_chunk: Any) -> None:
        if next(count) >= after:
            raise SystemExit
        write(self, name, chunks, on_chunk)

    monkeypatch.setattr(Store, "write", cut)
    return lambda: monkeypatch.setattr(Store, "write", write)


@pytest.mark.cases(2)
@pytest.mark.parametrize("after", [0, 1, 5, 7, 8])
def test_an_upload_that_was_cut_short_does_not_count_and_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    save(tmp_path / "out", 1)
    assert opened("memory", tmp_path / "out").wait(10)
    save(tmp_path / "out", 2)
    undo = interrupted(monkeypatch, after)
    with pytest.raises(SystemExit):
        Store("memory").upload(tmp_path / "out" / "step-00000002", lambda: None)
    undo()
    assert steps("memory") == [1]
    restored("memory", tmp_path / "other")
    assert load(tmp_path / "other", need_tokenizer=False).step == 1
    assert opened("memory", tmp_path / "out").wait(10) and steps("memory") == [2, 1]


def test_wrong_bytes_in_the_store_are_not_used(tmp_path: Path) -> None:
    url, out = f"file://{tmp_path}/store", tmp_path / "out"
    for step in (1, 2, 3):
        save(out, step)
    assert opened(url, out, keep_last=3).wait(10)
    damage(tmp_path / "store" / "step-00000003" / "optimizer.safetensors")
    (tmp_path / "store" / "step-00000002" / "config.json").unlink()
    shutil.rmtree(out)
    lines = restored(url, out)
    assert len(lines) == 3 and "optimizer.safetensors does not match" in lines[0]
    assert [step for step, _ in list_checkpoints(out)] == steps(url) == [1]


def test_a_file_that_reads_back_differently_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    read, wrong = Store.read, iter([True, False, True])

    def flipped(self: Store, name: str, limit: int) -> Iterator[bytes]:
        flip = "optimizer.safetensors" in name and next(wrong, False)
        return (bytes([chunk[0] ^ 1]) + chunk[1:] if flip else chunk for chunk in read(self, name, limit))

    monkeypatch.setattr(Store, "read", flipped)
    copy = opened("memory", tmp_path)
    assert copy.wait(10) and steps("memory") == [1]
    assert len(copy.lines) == 2 and "differs from the upload" in copy.lines[0] and "up to date" in copy.lines[1]


def test_a_store_that_cannot_be_reached_delays_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        for name in ("ls", "open"):
            patch.setattr(fsspec.implementations.memory.MemoryFileSystem, name, unreachable)
        copy = opened("memory", tmp_path)
        save(tmp_path, 2)
        copy.saved()
        assert not copy.wait(0.3)
        assert copy.lines == ["warning: mirror: memory://mirror: no route to host; trying again"]
        with pytest.raises(UserError, match="no checkpoint in .* and the mirror cannot be read: .*no route"):
            restored("memory", tmp_path / "empty")
        assert restored("memory", tmp_path)[0].startswith("warning: the mirror cannot be read")
    assert copy.wait(10) and steps("memory") == [2, 1]
    assert copy.lines[1:] == ["mirror: memory://mirror is up to date again"]


def test_a_run_keeps_what_is_being_uploaded_and_abandoned_uploads_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    going, begun = threading.Event(), threading.Event()
    write = Store.write

    def slowly(self: Store, name: str, *rest: Any) -> None:
        begun.set()
        assert going.wait(10)
        write(self, name, *rest)

    save(tmp_path, 1)
    monkeypatch.setattr(Store, "write", slowly)
    copy = opened("memory", tmp_path, keep_last=1)
    assert begun.wait(10) and copy.uploading == tmp_path / "step-00000001"
    save(tmp_path, 2, keep_last=1, in_use=lambda: copy.uploading)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1, 2]
    copy.saved()
    folder = fsspec.filesystem("memory")
    folder.pipe("/mirror/step-00000000/model.safetensors", b"abandoned")
    going.set()
    assert copy.wait(10) and copy.lines == [] and steps("memory") == [2] and copy.uploading is None
    assert not folder.exists("/mirror/step-00000000")


def test_an_abandoned_upload_gets_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pruned(self: Store, folder: Path, on_chunk: Any) -> None:
        shutil.rmtree(folder)
        raise DamagedError(f"{folder} was removed")

    save(tmp_path, 1)
    monkeypatch.setattr(Store, "upload", pruned)
    monkeypatch.setattr(Store, "partial", lambda self: [])
    copy = opened("memory", tmp_path)
    assert copy.wait(10) and copy.lines == ["warning: mirror: step-00000001 was removed before it was uploaded"]


def unreachable(*_: Any, **__: Any) -> Any:
    raise OSError("no route to host")


def test_runs_do_not_mix(tmp_path: Path) -> None:
    save(tmp_path / "a", 1)
    assert opened("memory", tmp_path / "a").wait(10)
    with pytest.raises(UserError, match=r"holds the checkpoints of another run \(run-a\)"):
        Mirror("memory", tmp_path / "b", "run-b", 2, None)
    save(tmp_path / "b", 0, run_id="run-b")
    with pytest.raises(UserError, match="another run, not "):
        restored("memory", tmp_path / "b")


@pytest.mark.parametrize("marker", ["step-00000009.complete", "step-00000001.complete"])
@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"step": 1, "run_id": "a", "val_loss": 1, "manifest": "x"}'])
def test_files_that_are_not_markers_are_ignored(tmp_path: Path, marker: str, content: bytes) -> None:
    save(tmp_path / "out", 2)
    url = f"file://{tmp_path}/store"
    assert opened(url, tmp_path / "out").wait(10)
    (tmp_path / "store" / marker).write_bytes(content)
    assert steps(url) == [2]


@pytest.mark.parametrize("url", ["s3:/bucket", "folder", "s3://key:secret@bucket/x", "://x"])
def test_invalid_urls_and_urls_with_keys_are_refused(url: str) -> None:
    with pytest.raises(UserError, match="is not a URL"):
        TrainingConfig(mirror=url).validate()


def test_an_unknown_store_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="unsupported URL"):
        Store("nosuch://place")


def test_a_run_resumes_from_its_mirror(here: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same weights as a run that lost nothing."""
    given = {"dataset": tiny_data, "eval_interval": 4, "optimizer_type": "muon", "decay_lr": False}
    url = f"file://{here}/store"
    assert main(arguments(**given, out_dir="whole", max_iters=8)) == 0
    assert main(arguments(**given, out_dir="lost", max_iters=4, mirror=url)) == 0
    shutil.rmtree("lost")
    assert main(arguments(**given, out_dir="lost", max_iters=8, mirror=url, init_from="auto")) == 0
    printed = capsys.readouterr()
    assert "restored lost/step-00000004 from file://" in printed.err + printed.out
    assert "resuming from lost/step-00000004" in printed.out
    assert steps(url) == [8, 4]
    for name in ("model.safetensors", "optimizer.safetensors"):
        whole, lost = (Path(run, "step-00000008", name).read_bytes() for run in ("whole", "lost"))
        assert whole == lost


def test_a_mirror_of_another_run_is_refused_before_the_folder_changes(
    here: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(here / "run", 1)
    assert opened("memory", here / "run").wait(10)
    before = tree(here / "run")
    assert main(arguments(dataset=tiny_data, out_dir="run", max_iters=1, mirror="memory")) == 2
    assert "holds the checkpoints of another run" in capsys.readouterr().err
    assert {name: data for name, data in tree(here / "run").items() if name != ".lock"} == before


# --- a real server ---


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """moto's S3 server with a bucket, in another process."""
    for package in ("s3fs", "moto"):
        pytest.importorskip(package)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    for name, value in {**here, "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(600):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                time.sleep(0.1)
            Store("s3://bucket/run").fs.mkdir("bucket")
            yield process
        finally:
            process.send_signal(signal.SIGCONT)
            process.kill()


UPLOAD = "from llm_from_scratch.tests.checkpoint.test_mirror import upload_slowly as f; import sys; f(*sys.argv[1:])"


def upload_slowly(url: str, folder: str) -> None:
    """Uploads in another process, which prints each file that has arrived."""
    write = Store.write

    def slowly(self: Store, name: str, chunks: Any, on_chunk: Any) -> None:
        write(self, name, chunks, on_chunk)
        print(name, flush=True)
        time.sleep(0.2)

    Store.write = slowly  # type: ignore[method-assign]
    Store(url).upload(Path(folder), lambda: None)


@pytest.mark.slow
def test_with_s3_a_killed_upload_wrong_bytes_and_a_silent_server_lose_nothing(
    tmp_path: Path, server: subprocess.Popen[bytes]
) -> None:
    out, url = tmp_path / "out", "s3://bucket/run"
    save(out, 1)
    assert opened(url, out).wait(30) and steps(url) == [1]
    save(out, 2)
    command = [sys.executable, "-c", UPLOAD, url, str(out / "step-00000002")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(3):
            assert "step-00000002/" in process.stdout.readline()
        process.kill()
    assert steps(url) == [1]
    restored(url, tmp_path / "new")
    assert tree(tmp_path / "new" / "step-00000001") == tree(out / "step-00000001")
    copy = opened(url, out)
    assert copy.wait(30) and steps(url) == [2, 1]
    server.send_signal(signal.SIGSTOP)  # it accepts connections, and says nothing
    begin = time.monotonic()
    save(out, 3)
    copy.saved()
    assert time.monotonic() - begin < 5 and not copy.wait(3)
    server.send_signal(signal.SIGCONT)
    assert copy.wait(60) and steps(url) == [3, 2]
    store = Store(url)
    key = f"{store.root}/step-00000003/optimizer.safetensors"
    data = bytearray(store.fs.cat(key))
    data[-1] ^= 1
    store.fs.pipe(key, bytes(data))
    shutil.rmtree(out)
    assert "optimizer.safetensors does not match" in restored(url, out)[0]
    assert [step for step, _ in list_checkpoints(out)] == [2]
    assert load(out, need_tokenizer=False).step == 2
