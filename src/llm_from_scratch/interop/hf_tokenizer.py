"""Tokenizers in Hugging Face's format, read and written. Every kind is written as a tokenizer.json for transformers,
next to our own files, from which we read back exactly the same tokenizer."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from ..core.chat import chat_in
from ..core.tokenizer import HF_FILE, MAX_DEFINITION, CharTokenizer, HFTokenizer, TiktokenTokenizer, Tokenizer
from ..core.vocab_files import EOT, GPT2_SHA256, byte_to_char, gpt2_parts
from ..errors import UserError, one_line
from ..machine.files import parse_json, read_file, to_json

# ordinary words, and inputs on which word patterns differ: contractions, digits, spaces, line ends, other scripts
PROBE = """The quick brown fox jumps over the lazy dog. It's what they'd SAY: "WE'LL see", isn't it?  12345 67 8,901.5%
\tif x_1==f(y)<z>:    return {a:[b]}   # naïve\r\n\r\n   \n Ωμέγα привет 東京 مرحبا 👩‍💻😀 ½ e\u0301  \n """


def read_tokenizer(folder: Path, gpt2: bool) -> Tokenizer | None:
    """The tokenizer of a folder in Hugging Face's format, with its chat template and end-of-text ids; None if it has no
    supported tokenizer. gpt2: whether the model is GPT-2-shaped, so that vocab.json and merges.txt split words as GPT-2
    does. GPT-2's own vocabulary becomes our gpt2 tokenizer, which gives the same ids faster. Raises UserError for a
    damaged file."""
    if Tokenizer.exists(folder):
        return Tokenizer.load(folder)
    found = _read(folder, gpt2)
    if found is not None:
        eot = "" if found.eot_id is None else found.decode([found.eot_id])
        found.chat, found.ends = chat_in(folder, eot, found.vocab_size)
    return found


def _read(folder: Path, gpt2: bool) -> Tokenizer | None:
    file, backend = folder / HF_FILE, None
    try:
        if file.is_file():
            definition = parse_json(read_file(file, MAX_DEFINITION))
        elif gpt2 and (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            vocab = parse_json(read_file(folder / "vocab.json", MAX_DEFINITION))
            lines = read_file(folder / "merges.txt", MAX_DEFINITION).decode("utf-8").splitlines()
            pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
            backend = byte_level(vocab, pairs, {EOT: vocab[EOT]} if EOT in vocab else {})
            definition = json.loads(backend.to_str())
        else:
            return None
        if _is_gpt2(definition):
            return TiktokenTokenizer("gpt2", *gpt2_parts(definition["model"]["vocab"]))
        return HFTokenizer(backend.to_str(), "hf", vocab.get(EOT)) if backend else HFTokenizer.from_file(file)
    except (UserError, KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # malformed JSON, or any error of the Rust side: a panic is not an Exception
        raise UserError(f"the tokenizer in {folder} cannot be read: {one_line(error)}") from None


def to_backend(tokenizer: Tokenizer) -> Backend:
    """Any of our tokenizers in Hugging Face's form. Raises UserError if it would give other ids than ours."""
    if isinstance(tokenizer, HFTokenizer):
        backend = tokenizer.backend(special_is_text=False)  # transformers also truncates and pads only on request
    elif isinstance(tokenizer, CharTokenizer):
        backend = Backend(models.WordLevel({char: i for i, char in enumerate(tokenizer.chars)}))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        backend.decoder = decoders.Fuse()
    elif tokenizer.name == "byte":
        backend = byte_level({char: byte for byte, char in enumerate(byte_to_char())}, [], {}, pattern="")
    elif isinstance(tokenizer, TiktokenTokenizer):
        ranks, chars = tokenizer.ranks, byte_to_char()
        vocab = {"".join(chars[b] for b in token): rank for token, rank in ranks.items()}
        pairs = [tuple("".join(chars[b] for b in part) for part in pair) for pair in merges(ranks)]
        backend = byte_level(vocab, pairs, tokenizer.special, None if tokenizer.name == "gpt2" else tokenizer.pattern)
    else:
        raise UserError(f"the {tokenizer.name} tokenizer cannot be written in Hugging Face's format")
    for text in probes(tokenizer):
        if not np.array_equal(tokenizer.encode(text), backend.encode(text, add_special_tokens=False).ids):
            raise UserError(f"the {tokenizer.name} tokenizer cannot be exported: tokenizer.json would give other ids")
    return backend


def write_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> Backend:
    """Writes tokenizer.json, tokenizer_config.json and our own files. max_length: the model's context in tokens.
    Returns the tokenizer that transformers will use. Raises UserError if it would give other ids than ours."""
    tokenizer.save(folder)
    backend = to_backend(tokenizer)
    if not isinstance(tokenizer, HFTokenizer):
        (folder / HF_FILE).write_text(backend.to_str(), encoding="utf-8")
    eot = None if tokenizer.eot_id is None else backend.id_to_token(tokenizer.eot_id)
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length}
    config["clean_up_tokenization_spaces"] = False  # otherwise decoding would drop the space before a comma
    config |= {"eos_token": eot, "bos_token": eot} if eot == EOT else {"eos_token": eot} if eot else {}
    if tokenizer.chat is not None:
        texts = {"bos_token": tokenizer.chat.bos, "eos_token": tokenizer.chat.eos}
        tokens = {name: text for name, text in texts.items() if backend.token_to_id(text) is not None}
        config |= tokens
        # a text that is not a token there, such as the byte tokenizer's end of a turn, is set in the template
        literals = {name: json.dumps(text, ensure_ascii=False) for name, text in texts.items() if text}
        own = "".join(f"{{% set {name} = {text} %}}\n" for name, text in literals.items() if name not in tokens)
        config["chat_template"] = own + tokenizer.chat.source
    (folder / "tokenizer_config.json").write_bytes(to_json(config))
    return backend


def probes(tokenizer: Tokenizer) -> list[str]:
    """Texts that reveal differences between tokenizers: the characters of a char tokenizer, PROBE for the others."""
    if tokenizer.name != "char":
        return [PROBE]
    every = tokenizer.decode(np.arange(tokenizer.vocab_size))
    return [every, every[::-1]]


def merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merge rules, in order, of a vocabulary with ids in merge order: the last merge that makes each token."""
    found = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            steps = [(ranks.get(a + b, rank), i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))]
            best, i = min(steps)
            if best >= rank:
                break  # no rule leads here: such a token only ever matches as a whole word
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            found.append((parts[0], parts[1]))
    return found


def byte_level(
    vocab: dict[str, int], pairs: list[Any], special: dict[str, int], pattern: str | None = None, gpt2: bool = False,
    whole: bool = True,
) -> Backend:  # fmt: skip
    """Byte-level BPE. pattern: tiktoken's, which splits words; None: GPT-2's own; "": no splitting. gpt2: GPT-2's own
    splits what the pattern has left. whole: a word that is a token is that token, as in tiktoken (not with gpt2)."""
    model = models.BPE(vocab=vocab | special, merges=pairs)
    model.ignore_merges = whole and bool(pattern) and not gpt2
    backend = Backend(model)
    words: Any = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None or gpt2)
    if pattern:
        # This engine reads a{1,3}+ as a repetition and $ as the end of a line; possessive repeats only save time.
        pattern = re.sub(r"([+*?}])\+", r"\1", pattern).replace("$", r"\z")
        words = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), words])
    backend.pre_tokenizer = words
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return backend


def _is_gpt2(definition: dict[str, Any]) -> bool:
    """Whether a parsed tokenizer.json is GPT-2's. Rebuilds OpenAI's two files from it and compares their hashes."""
    model, words = definition.get("model") or {}, definition.get("pre_tokenizer") or {}
    vocab, pairs = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or len(vocab) != 50257 or not isinstance(pairs, list):
        return False
    plain = words.get("type") == "ByteLevel" and not words.get("add_prefix_space") and words.get("use_regex", True)
    added = [token.get("content") for token in definition.get("added_tokens") or []]
    if not plain or definition.get("normalizer") or added not in ([], [EOT]):
        return False
    lines = [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs]
    files = {
        "encoder.json": json.dumps(dict(sorted(vocab.items(), key=lambda item: item[1]))),
        "vocab.bpe": "#version: 0.2\n" + "\n".join(lines) + "\n",
    }
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items()} == GPT2_SHA256
