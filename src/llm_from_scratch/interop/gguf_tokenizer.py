"""Tokenizers in a GGUF file's entries, tokenizer.ggml.*: byte-level BPE, SentencePiece's BPE, and our char and byte
tokenizers, which llama.cpp can express as its "rwkv": the longest token that matches. Source: llama-vocab.cpp."""

from __future__ import annotations

import sys
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Backend

from ..core.chat import template_of
from ..core.tokenizer import ByteTokenizer, CharTokenizer, HFTokenizer, Tokenizer
from ..errors import UserError, one_line
from ..machine.files import parse_json
from .hf_tokenizer import byte_level, probes, to_backend

CHAT = "tokenizer.chat_template"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of tokens; USER_DEFINED is not special
MAX_PIECE = 512  # characters of a token of SentencePiece
# How byte-level BPE splits text into words: its names in llama.cpp, and the arguments of byte_level
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2: dict[str, Any] = {"gpt2": True}
_SMOLLM: dict[str, Any] = {"pattern": r"\p{N}", "gpt2": True}
_LLAMA: dict[str, Any] = {"pattern": _LLAMA3}
_QWEN2: dict[str, Any] = {"pattern": _LLAMA3.replace("{1,3}", ""), "whole": False}
WORDS = {
    "gpt-2": _GPT2, "phi-2": _GPT2, "smollm": _SMOLLM, "starcoder": _SMOLLM, "refact": _SMOLLM,
    "llama-bpe": _LLAMA, "llama3": _LLAMA, "llama-v3": _LLAMA, "qwen2": _QWEN2, "deepseek-r1-qwen": _QWEN2,
}  # fmt: skip


def read_tokenizer(entries: dict[str, Any], where: str) -> Tokenizer:
    """Raises UserError for a kind that is not supported."""
    own = {key[len("tokenizer.ggml.") :]: value for key, value in entries.items() if key.startswith("tokenizer.ggml.")}
    kind, pre = own.get("model"), own.get("pre", "gpt-2")
    if "tokens" not in own:
        raise UserError(f"{where} does not have tokenizer.ggml.tokens")
    tokens = [str(token) for token in own["tokens"]]
    types = own.get("token_type", [NORMAL] * len(tokens))
    if kind == "rwkv":
        read = _single(tokens, where)
        tokens = [read.decode([i]) for i in range(read.vocab_size)]
    elif kind == "gpt2" and pre in WORDS:
        read = HFTokenizer(_byte_level(tokens, types, own["merges"], pre).to_str(), "hf", own.get("eos_token_id"))
    elif kind == "llama":
        backend = _sentence_pieces(tokens, types, own["scores"], own.get("add_space_prefix", True))
        read = HFTokenizer(backend.to_str(), "hf", own.get("eos_token_id"))
    else:
        found = f"tokenizer.ggml.model={one_line(kind)} with tokenizer.ggml.pre={one_line(pre)}"
        raise UserError(f"{where}: {found} is not supported; supported: llama, and gpt2 with {', '.join(WORDS)}")
    ends = (own.get(f"{kind}_token_id") for kind in ("eos", "eot", "eom"))
    read.ends = frozenset(i for i in ends if type(i) is int and 0 <= i < read.vocab_size)
    chat = {f"{kind}_token": tokens[own[f"{kind}_token_id"]] for kind in ("bos", "eos") if f"{kind}_token_id" in own}
    read.chat = template_of(chat | {"chat_template": entries.get(CHAT)})
    return read


def describe_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """The entries of a tokenizer. Raises UserError for a kind that llama.cpp does not support."""
    if tokenizer.name in ("char", "byte"):
        every = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)]
        tokens = ["".join(f"\\x{byte:02x}" for byte in token) for token in every]
        entries: dict[str, Any] = {"model": "rwkv", "tokens": tokens, "token_type": [NORMAL] * len(tokens)}
        if tokenizer.end_ids:  # first the one that the chat template writes
            eos = "" if tokenizer.chat is None else tokenizer.chat.eos
            entries["eos_token_id"] = min(tokenizer.end_ids, key=lambda i: (tokenizer.decode([i]) != eos, i))
    else:
        eot = tokenizer.eot_id
        if eot is None:
            raise UserError(
                f"llama.cpp needs a token that ends a text, which the {tokenizer.name} tokenizer does not have: export "
                "with --format=hf, or train on data prepared with --tokenizer=bpe:N"
            )
        entries = _merged(tokenizer) | {"bos_token_id": eot, "eos_token_id": eot, "add_bos_token": False}
        if tokenizer.chat is not None and tokenizer.chat.bos in entries["tokens"]:
            entries["bos_token_id"] = entries["tokens"].index(tokenizer.chat.bos)
    others = sorted(tokenizer.end_ids - {entries.get("eos_token_id")})
    entries |= zip(("eot_token_id", "eom_token_id"), others, strict=False)
    if others[2:]:
        print(f"note: GGUF stores at most three end-of-turn ids; omitted: {str(others[2:])[1:-1]}", file=sys.stderr)
    found = {f"tokenizer.ggml.{key}": value for key, value in entries.items()}
    return found if tokenizer.chat is None else found | {CHAT: tokenizer.chat.source}


def _merged(tokenizer: Tokenizer) -> dict[str, Any]:
    """The entries of a BPE tokenizer, after a comparison with the tokenizer that they give."""
    backend = to_backend(tokenizer)
    model, known = parse_json(backend.to_str().encode())["model"], backend.get_added_tokens_decoder()
    if model["type"] != "BPE":
        raise UserError(f"the {tokenizer.name} tokenizer is not byte-pair encoding, which llama.cpp needs")
    tokens, types = [f"[UNUSED{i}]" for i in range(tokenizer.vocab_size)], [UNUSED] * tokenizer.vocab_size
    for token, i in model["vocab"].items():
        is_byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        tokens[i], types[i] = token, BYTE if is_byte and model["byte_fallback"] else NORMAL
    for i, token in known.items():
        tokens[i], types[i] = token.content, CONTROL if token.special else USER_DEFINED
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    entries: dict[str, Any] = {"tokens": tokens, "token_type": types}
    ways: list[tuple[dict[str, Any], Backend]] = []
    if model["byte_fallback"]:
        scores, unknown = _scores(tokens, types, merges), model["unk_token"]
        types[tokens.index(unknown)] = UNKNOWN
        for prefix in (True, False):
            more = {"scores": scores, "add_space_prefix": prefix, "unknown_token_id": tokens.index(unknown)}
            ways.append(({"model": "llama", **more}, _sentence_pieces(tokens, types, scores, prefix)))
    else:
        different = {id(words): pre for pre, words in reversed(WORDS.items())}.values()
        ways = [
            ({"model": "gpt2", "pre": pre, "merges": merges}, _byte_level(tokens, types, merges, pre))
            for pre in reversed(different)
        ]
    expected = [backend.encode(text, add_special_tokens=False).ids for text in probes(tokenizer)]
    for more, same in ways:
        if [same.encode(text, add_special_tokens=False).ids for text in probes(tokenizer)] == expected:
            return entries | more
    raise UserError(f"llama.cpp does not support the pre-tokenizer of the {tokenizer.name} tokenizer")


def _byte_level(tokens: list[str], types: list[int], merges: list[str], pre: str) -> Backend:
    vocab = {token: i for i, token in enumerate(tokens)}
    special = {token: i for i, token in enumerate(tokens) if types[i] == CONTROL}
    backend = byte_level(vocab, [tuple(pair.split(" ")) for pair in merges], special, **WORDS[pre])
    return _with_added(backend, tokens, types)


def _with_added(backend: Backend, tokens: list[str], types: list[int]) -> Backend:
    added = [token for token, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED]
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    return backend


def _sentence_pieces(tokens: list[str], types: list[int], scores: list[float], prefix: bool) -> Backend:
    """SentencePiece's BPE: the merge with the highest score first. Characters without a token become bytes."""
    if len(longest := max(tokens, key=len, default="")) > MAX_PIECE:
        raise ValueError(f"a token of {len(longest)} characters")  # has that many ways to be merged
    vocab = {token: i for i, token in enumerate(tokens)}
    special = [token for token, kind in zip(tokens, types, strict=True) if kind in (CONTROL, UNKNOWN)]
    plain = {i for i, kind in enumerate(types) if kind == NORMAL}
    pairs = []
    for token, i in vocab.items():
        parts = ((token[:cut], token[cut:]) for cut in range(1, len(token) if i in plain else 1))
        pairs += [(-scores[i], i, vocab[a], vocab[b]) for a, b in parts if {vocab.get(a), vocab.get(b)} <= plain]
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    merges = [(tokens[a], tokens[b]) for _, _, a, b in sorted(pairs)]
    backend = Backend(models.BPE(vocab, merges, unk_token=unknown, byte_fallback=True, fuse_unk=True))
    blanks: list[Any] = [normalizers.Prepend("\u2581")] if prefix else []
    backend.normalizer = normalizers.Sequence([*blanks, normalizers.Replace(" ", "\u2581")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return _with_added(backend, tokens, types)


def _scores(tokens: list[str], types: list[int], merges: list[str]) -> list[float]:
    """A score for each token: the earlier its first merge, the higher."""
    first: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        first.setdefault(pair.replace(" ", "", 1), rank)
    return [-float(first.get(token, len(merges))) if types[i] == NORMAL else 0.0 for i, token in enumerate(tokens)]


def _single(tokens: list[str], where: str) -> Tokenizer:
    """Our char or byte tokenizer: its tokens are written as escaped bytes."""
    try:
        every = [bytes.fromhex(token.replace("\\x", "")) for token in tokens]
        if every == [bytes([byte]) for byte in range(256)]:
            return ByteTokenizer()
        chars = [token.decode("utf-8") for token in every]
        if all(len(char) == 1 for char in chars):
            return CharTokenizer("".join(chars))
    except ValueError:
        pass
    raise UserError(f"{where}: tokenizer.ggml.model=rwkv is only supported for tokens of one character or one byte")
