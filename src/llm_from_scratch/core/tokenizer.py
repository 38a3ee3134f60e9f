"""The tokenizers: text to token ids and back. Five kinds with one interface: characters (as in nanoGPT), bytes,
tiktoken's GPT-2 family, any Hugging Face `tokenizer.json`, and byte-level BPE trained on your text. The tokenizer is
saved with the data and in every checkpoint, so loading it needs no network."""

from __future__ import annotations

import binascii
import functools
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError, one_line
from ..machine.files import parse_json, read_file
from ..settings import did_you_mean
from .characters import CharTable, characters_of
from .chat import ChatTemplate, chat_in
from .cuts import cut_text as cut_text
from .cuts import divide, without_surrogates
from .cuts import safe_cut as safe_cut
from .vocab_files import EOT, byte_to_char, growth, read_meta_pkl, tiktoken_parts

MAX_DEFINITION, MAX_RANKS = 64 << 20, 16 << 20  # bytes of a tokenizer.json or meta file, of a ranks file
MAX_GROWTH = 64  # how much longer the replacements of a tokenizer.json may make a text
TRAINED_PART = 1 << 16  # characters of the parts of a text on which BPE is trained
META_FILE, RANKS_FILE, HF_FILE = "tokenizer.meta.json", "ranks.tiktoken", "tokenizer.json"
NAMES = ("char", "byte", "gpt2", "cl100k_base", "o200k_base", "bpe:8192")
TIKTOKEN_NAMES = ("gpt2", "cl100k_base", "o200k_base")
# tokenizer.json has no field for the end-of-text token; these are its usual names.
HF_EOT_NAMES = (EOT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[EOS]")


class Tokenizer:
    """The interface of all tokenizers. Ids are 0 to vocab_size - 1. eot_id ends a document (None: no such id). ends:
    more ids that end a text or a turn. chat: how conversations are written; None: the model is not for conversations.
    """

    name: str
    vocab_size: int
    eot_id: int | None = None
    ends: frozenset[int] = frozenset()
    chat: ChatTemplate | None = None

    @property
    def end_ids(self) -> frozenset[int]:
        """Every id that ends a text or a turn."""
        return self.ends if self.eot_id is None else self.ends | {self.eot_id}

    @property
    def dtype(self) -> np.dtype:
        """uint16 if every id fits, else uint32 (little-endian)."""
        return np.dtype("<u2") if self.vocab_size <= 1 << 16 else np.dtype("<u4")

    def encode(self, text: str, allow_special: bool = False) -> np.ndarray:
        """The token ids of a text, 1-D. allow_special: parse special tokens in the text. Lone surrogates become U+FFFD.
        Raises UserError if the vocabulary cannot express the text."""
        return self.encode_uncast(text, allow_special).astype(self.dtype, copy=False)

    def encode_uncast(self, text: str, allow_special: bool = False) -> np.ndarray:
        """As encode, in any type of integers: the caller casts when it copies."""
        if not text:
            return np.empty(0, self.dtype)
        try:
            return self._encode(text, allow_special)
        except (UserError, KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except UnicodeEncodeError:
            return self.encode(without_surrogates(text), allow_special)
        except BaseException as error:  # a Rust panic is not an Exception
            # Long runs of the same kind of character overflow the stack of the regular expression engine.
            if len(text) < 2:
                raise UserError(f"the {self.name} tokenizer fails on {text!r}: {error}") from None
            parts = divide(text, successor=self.name in TIKTOKEN_NAMES[1:])
            return np.concatenate([self.encode(part, allow_special) for part in parts])

    def decode(self, ids: Any) -> str:
        """The text of token ids (list, array or tensor). Invalid UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Any) -> bytes:
        """The UTF-8 bytes of token ids. A token may be part of a character. Raises UserError for an unknown id."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """The sha256 (hex) of the tokenizer's definition. Equal fingerprints give equal ids."""
        if not hasattr(self, "_fingerprint"):
            self._fingerprint = hashlib.sha256(self._definition()).hexdigest()
        return self._fingerprint

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.meta.json and the files it needs to folder, which is created if missing."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        meta = {"format": "llm-from-scratch-tokenizer", "version": 1, "name": self.name, "vocab_size": self.vocab_size}
        meta |= {"eot_id": self.eot_id, "fingerprint": self.fingerprint()} | self._save(Path(folder))
        meta |= {"ends": sorted(self.ends)} if self.ends else {}
        if self.chat is not None:
            meta["chat"] = {"template": self.chat.source, "bos_token": self.chat.bos, "eos_token": self.chat.eos}
        (Path(folder) / META_FILE).write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def exists(folder: str | Path) -> bool:
        """Whether folder contains a saved tokenizer."""
        return (Path(folder) / META_FILE).is_file()

    @staticmethod
    def load(folder: str | Path) -> Tokenizer:
        """Loads a saved tokenizer. Raises UserError if it is missing, damaged or of another version."""
        path = Path(folder) / META_FILE
        if not path.is_file():
            raise UserError(f"no tokenizer in {folder}: expected {META_FILE} from llm-prepare")
        try:
            meta = parse_json(read_file(path, MAX_DEFINITION))
            if meta["format"] != "llm-from-scratch-tokenizer" or meta["version"] != 1:
                raise UserError(f"{path} has the format {meta['format']} {meta['version']}; this program reads 1")
            tokenizer = build_tokenizer(Path(folder), meta)
            if tokenizer.fingerprint() != meta["fingerprint"]:
                raise ValueError("its fingerprint differs")
            tokenizer.ends = frozenset(tokenizer._known(meta.get("ends", [])).tolist())
            if chat := meta.get("chat"):
                texts = [chat[part] for part in ("template", "bos_token", "eos_token")]
                if not all(isinstance(text, str) for text in texts):
                    raise TypeError("its chat template is not a string")
                tokenizer.chat = ChatTemplate(*texts)
            return tokenizer
        except (UserError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a Rust panic is not an Exception
            raise UserError(f"the tokenizer in {folder} is damaged ({one_line(error)}): prepare it again") from None

    @staticmethod
    def from_name(spec: str, text: str | Iterable[str] | None = None) -> Tokenizer:
        """A tokenizer by name: char and bpe:N (both trained on text), byte, gpt2, cl100k_base, o200k_base, the path of
        a tokenizer.json, or a folder with a tokenizer (prepared data, a checkpoint). Raises UserError."""
        texts = [text] if isinstance(text, str) else text
        kind, _, size = spec.partition(":")
        if spec == "byte":
            return ByteTokenizer()
        if spec in TIKTOKEN_NAMES:
            return TiktokenTokenizer(spec, *tiktoken_parts(spec))
        if spec == "char" or kind == "bpe":
            if kind == "bpe" and (not size.isdecimal() or int(size) < 257):
                raise UserError(f"tokenizer {spec!r}: expected bpe:N with N at least 257, such as bpe:8192")
            if texts is None:
                raise UserError(f"the {kind} tokenizer needs a text to build its vocabulary")
            return CharTokenizer.from_text(texts) if kind == "char" else HFTokenizer.train(texts, int(size))
        path = Path(spec) / HF_FILE if spec and Path(spec).is_dir() else Path(spec)
        if path.name == HF_FILE and (saved := tokenizer_of(path.parent)):
            return saved
        if path.is_file():
            return HFTokenizer.from_file(path)
        if spec.endswith(".json") or len(path.parts) > 1:
            raise UserError(f"no tokenizer in {spec}: expected a Hugging Face {HF_FILE} or a folder with one")
        expected = f"expected one of {', '.join(NAMES)}, a {HF_FILE} or a folder"
        raise UserError(f"unknown tokenizer {spec!r}: {did_you_mean(spec, NAMES, expected)}")

    @staticmethod
    def from_nanogpt_meta(path: str | Path) -> CharTokenizer:
        """The tokenizer of a nanoGPT meta.pkl. Builds only dicts, strings and integers. Raises UserError."""
        return CharTokenizer(read_meta_pkl(Path(path)))

    # implemented by each tokenizer

    def _encode(self, text: str, allow_special: bool) -> np.ndarray:
        raise NotImplementedError

    def _definition(self) -> bytes:
        raise NotImplementedError

    def _save(self, folder: Path) -> dict[str, Any]:
        """Writes more files. Returns more fields for the meta file."""
        return {}

    def _known(self, ids: Any) -> np.ndarray:
        array = np.asarray(ids).reshape(-1)
        if array.size and (array.min() < 0 or array.max() >= self.vocab_size):
            wrong = array[(array < 0) | (array >= self.vocab_size)][0]
            raise UserError(f"token id {wrong} is outside the {self.name} vocabulary of {self.vocab_size} ids")
        return array.astype(np.int64)


class CharTokenizer(Tokenizer):
    """One id per character, in the order of `chars`."""

    name = "char"

    def __init__(self, chars: str) -> None:
        if not chars or len(set(chars)) != len(chars):
            raise UserError("a char vocabulary needs at least one character and no duplicates")
        self.chars, self.vocab_size, self._table = chars, len(chars), CharTable(chars)

    @classmethod
    def from_text(cls, texts: Iterable[str]) -> CharTokenizer:
        """The sorted characters of all texts, numbered as in nanoGPT."""
        if not (chars := characters_of(texts)):
            raise UserError("the text is empty: a char vocabulary needs at least one character")
        return cls(chars)

    def _encode(self, text: str, allow_special: bool) -> np.ndarray:
        ids = self._table.encode(text)
        if ids.max(initial=0) == self.vocab_size:
            char = text[int(ids.argmax())]
            raise UserError(
                f"This model never saw the character {char!r} (U+{ord(char):04X}). Remove it, or retrain with "
                "--tokenizer=byte."
            )
        return ids

    def decode_bytes(self, ids: Any) -> bytes:
        return self._table.codes[self._known(ids)].tobytes().decode("utf-32-le").encode("utf-8")

    def _definition(self) -> bytes:
        return b"char\0" + self.chars.encode("utf-8")

    def _save(self, folder: Path) -> dict[str, Any]:
        return {"chars": self.chars}


class ByteTokenizer(Tokenizer):
    """One id per byte of the UTF-8 text."""

    name = "byte"
    vocab_size = 256

    def _encode(self, text: str, allow_special: bool) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8)

    def decode_bytes(self, ids: Any) -> bytes:
        return self._known(ids).astype(np.uint8).tobytes()

    def _definition(self) -> bytes:
        return b"byte"


class TiktokenTokenizer(Tokenizer):
    """tiktoken's byte-level BPE. ranks: token bytes -> id. special: text -> id. pattern splits text into words."""

    def __init__(self, name: str, ranks: dict[bytes, int], pattern: str, special: dict[str, int]) -> None:
        import tiktoken

        ids = [*ranks.values(), *special.values()]
        if any(type(i) is not int or not 0 <= i < 2 * len(ids) + 1024 for i in ids):  # some have gaps
            raise ValueError(f"the {name} vocabulary has an id that is out of range")
        self.name, self.pattern, self.special = name, pattern, special
        self.ranks = dict(sorted(ranks.items(), key=lambda item: item[1]))
        self._bpe = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        self.vocab_size = self._bpe.n_vocab
        self.eot_id = special.get(EOT)

    def _encode(self, text: str, allow_special: bool) -> np.ndarray:
        allowed = self._bpe.special_tokens_set if allow_special else set()
        return self._bpe.encode_to_numpy(text, allowed_special=allowed, disallowed_special=())

    def decode_bytes(self, ids: Any) -> bytes:
        try:
            return self._bpe.decode_bytes(self._known(ids).tolist())
        except KeyError as error:  # the ids of GPT-2's successors have gaps
            raise UserError(f"token id {error} is unused in the {self.name} vocabulary") from None

    def _definition(self) -> bytes:
        # Without the pattern, because tiktoken's releases spell the same pattern differently.
        ranks = b"".join(b"%d %s\n" % (rank, token.hex().encode()) for token, rank in self.ranks.items())
        return f"{self.name}\0{json.dumps(self.special, sort_keys=True)}\0".encode() + ranks

    def _save(self, folder: Path) -> dict[str, Any]:
        lines = (b"%s %d\n" % (binascii.b2a_base64(token, newline=False), rank) for token, rank in self.ranks.items())
        (folder / RANKS_FILE).write_bytes(b"".join(lines))
        return {"pattern": self.pattern, "special": self.special}


class HFTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library: from a tokenizer.json, or trained here (name "bpe")."""

    def __init__(self, definition: str, name: str = "hf", eot_id: int | None = None) -> None:
        self.name, self.eot_id, self.json_text = name, eot_id, definition
        try:
            body = parse_json(definition.encode("utf-8"))
            kind, longer = json.dumps(body.get("decoder")), growth(body)
            self._plain = self.backend(special_is_text=True)
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # a Rust panic is not an Exception
            raise UserError(f"not a tokenizer.json in Hugging Face's format: {str(error)[:200]}") from None
        if longer > MAX_GROWTH:
            raise UserError("unusable tokenizer.json: its replacements make texts too long")
        self.vocab_size = max(self._plain.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if not 0 < self.vocab_size <= len(definition):  # each id needs some characters
            raise UserError(f"impossible id count in tokenizer.json: {self.vocab_size}")
        if eot_id is not None and not (type(eot_id) is int and 0 <= eot_id < self.vocab_size):
            raise UserError(f"the end-of-text id {str(eot_id)[:40]} is not in the vocabulary")
        self._added = {i: t.content.encode("utf-8") for i, t in self._plain.get_added_tokens_decoder().items()}
        self._byte_level, self._sentence_pieces = '"ByteLevel"' in kind, "ByteFallback" in kind or "Metaspace" in kind
        self._to_byte = {char: byte for byte, char in enumerate(byte_to_char())}

    def backend(self, special_is_text: bool) -> Any:
        from tokenizers import Tokenizer as Backend

        backend = Backend.from_str(self.json_text)
        backend.no_truncation()  # some files truncate every text to the context length of their model
        backend.no_padding()
        backend.encode_special_tokens = special_is_text
        return backend

    @functools.cached_property
    def _with_special(self) -> Any:
        return self.backend(special_is_text=False)

    @classmethod
    def from_file(cls, path: Path) -> HFTokenizer:
        try:
            definition = read_file(path, MAX_DEFINITION).decode("utf-8")
            beside = path.parent / "tokenizer_config.json"
            eos = parse_json(read_file(beside, MAX_DEFINITION)).get("eos_token") if beside.is_file() else None
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise UserError(f"cannot read the tokenizer {path}: {str(error)[:200]}") from None
        try:
            tokenizer = cls(definition)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        names = [eos.get("content") if isinstance(eos, dict) else eos, *HF_EOT_NAMES]
        names = [name.encode("utf-8", "replace").decode() for name in names if isinstance(name, str)]
        ids = (tokenizer._plain.token_to_id(name) for name in names)
        tokenizer.eot_id = next((i for i in ids if i is not None), None)
        eot = "" if tokenizer.eot_id is None else tokenizer.decode([tokenizer.eot_id])
        tokenizer.chat, tokenizer.ends = chat_in(path.parent, eot, tokenizer.vocab_size)
        return tokenizer

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> HFTokenizer:
        """Trains byte-level BPE with at most vocab_size ids (fewer if the texts have fewer pairs). Id 0 ends a text."""
        from tokenizers import pre_tokenizers, trainers

        backend = cls.untrained()
        options: dict[str, Any] = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[EOT], **options)
        # The trainer reads 256 texts ahead, so they must be short.
        backend.train_from_iterator((part for text in texts for part in cut_text(text, TRAINED_PART)), trainer)
        return cls(backend.to_str(), "bpe", backend.token_to_id(EOT))

    @staticmethod
    def untrained(**model: Any) -> Any:
        """Byte-level BPE with these vocabulary and merges, as the object of the library."""
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, pre_tokenizers

        backend = Backend(models.BPE(**model))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        return backend

    def _encode(self, text: str, allow_special: bool) -> np.ndarray:
        backend = self._with_special if allow_special else self._plain
        text.encode("utf-8")  # raises UnicodeEncodeError for a lone surrogate; the backend raises TypeError
        return np.array(backend.encode(text, add_special_tokens=False).ids, np.int64)

    def decode(self, ids: Any) -> str:
        return self._plain.decode(self._known(ids).tolist(), skip_special_tokens=False)

    def decode_bytes(self, ids: Any) -> bytes:
        known = self._known(ids).tolist()
        if self._byte_level or self._sentence_pieces:
            return b"".join(self._token_bytes(i) for i in known)
        return self.decode(known).encode("utf-8")

    def _token_bytes(self, i: int) -> bytes:
        token = self._plain.id_to_token(i)
        if i in self._added or token is None:
            return self._added.get(i, b"")
        if self._byte_level and self._to_byte.keys() >= set(token):
            return bytes(self._to_byte[char] for char in token)
        if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode("utf-8")

    def _definition(self) -> bytes:
        return f"{self.name}\0{self.eot_id}\0{json.dumps(json.loads(self.json_text), sort_keys=True)}".encode()

    def _save(self, folder: Path) -> dict[str, Any]:
        (folder / HF_FILE).write_text(self.json_text, encoding="utf-8")
        return {}


def tokenizer_of(folder: str | Path) -> Tokenizer | None:
    """The tokenizer in a data folder: tokenizer.meta.json, else nanoGPT's meta.pkl, else None."""
    if Tokenizer.exists(folder):
        return Tokenizer.load(folder)
    meta = Path(folder) / "meta.pkl"
    if not meta.is_file() and (described := sorted(Path(folder).glob("*.ds.metadata"))):
        return _of_datatrove(Path(folder), described[0])
    return Tokenizer.from_nanogpt_meta(meta) if meta.is_file() else None


def _of_datatrove(folder: Path, described: Path) -> Tokenizer | None:
    """The tokenizer of datatrove's shards, which name it. None: GPT-2's, or unknown."""
    with described.open(encoding="utf-8", errors="replace") as file:
        name = one_line(file.readline(256).partition("|")[0])
    if (folder / HF_FILE).is_file():
        return HFTokenizer.from_file(folder / HF_FILE)
    if name in ("gpt2", "openai-community/gpt2", "Unknown Tokenizer", ""):
        return None
    raise UserError(f"the shards in {folder} were made with {name}: copy its {HF_FILE} into the folder")


def build_tokenizer(folder: Path, meta: dict[str, Any]) -> Tokenizer:
    name = meta["name"]
    if name == "char":
        return CharTokenizer(meta["chars"])
    if name == "byte":
        return ByteTokenizer()
    if name in ("bpe", "hf"):
        return HFTokenizer(read_file(folder / HF_FILE, MAX_DEFINITION).decode("utf-8"), name, meta["eot_id"])
    if name not in TIKTOKEN_NAMES:
        raise UserError(f"the tokenizer in {folder} has the unknown kind {name!r}")
    lines = read_file(folder / RANKS_FILE, MAX_RANKS).split(b"\n")
    ranks = {binascii.a2b_base64(token): int(rank) for token, rank in (line.split() for line in lines if line)}
    return TiktokenTokenizer(name, ranks, meta["pattern"], meta["special"])
