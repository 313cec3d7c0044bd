"""Tokenizers: SentencePiece `.model` files, and `tokenizer.json` where that is all there is.

`open_tokenizer` opens what a model's directory holds, `Tokenizer.load` the same for documents, which need BOS and EOS;
`train_tokenizer` makes a SentencePiece model with LLaMA's conventions: BOS 1, EOS 2, unknown 0, byte fallback, text
taken as it is; `write_from_gguf` turns the vocabulary of a GGUF file into files of either kind.
"""

from __future__ import annotations

import abc
import hashlib
import io
import json
import os
import pathlib
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import sentencepiece

from fot_jax import files

# SentencePiece drops training sentences longer than its limit (bytes); lines are cut to this many characters first.
_MAX_LINE_CHARS = 4096
# Documents are encoded in chunks of about this many characters.
_CHUNK_CHARS = 1 << 16

# Beside either kind of file: which tokens are BOS, EOS, padding and unknown, and whether BOS goes before a text.
_CONFIG = "tokenizer_config.json"
_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
# What a special token is for where nothing but its name tells.
_WELL_KNOWN = {
    "bos_token": ("<s>", "<bos>", "<|begin_of_text|>", "<|endoftext|>"),
    "eos_token": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>"),
    "pad_token": ("<pad>", "[PAD]"),
    "unk_token": ("<unk>", "[UNK]"),
}


class Tokenizer(abc.ABC):
    """Text to token ids and back.

    Attributes:
        file_name: what the file is called in a model's directory, tokenizer.model or tokenizer.json.
        vocab_size: V; ids are below it.
        bos_id, eos_id: ids that open and close a document; None where a tokenizer.json has none. `encode` adds neither.
        pad_id: id that fills unused places; where the model has none its unknown token's, as LLaMA's; else EOS; else 0.
        adds_bos: whether the model expects BOS before a document.
        fingerprint: 16 hexadecimal digits of a hash of the file, and of the special tokens where others name them.
    """

    file_name: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int
    adds_bos: bool
    fingerprint: str

    @staticmethod
    def load(path: str | os.PathLike) -> Tokenizer:
        """`open_tokenizer`, for documents: training and evaluation put BOS before each and EOS after it.

        Raises:
            FileNotFoundError, ValueError, ImportError: as `open_tokenizer`.
            ValueError: no BOS or no EOS.
        """
        tokenizer = open_tokenizer(path)
        if tokenizer.bos_id is None or tokenizer.eos_id is None:
            found = f"bos_token's id is {tokenizer.bos_id}, eos_token's is {tokenizer.eos_id}"
            raise ValueError(f"tokenizer {path}: {found}; wanted both ({_CONFIG} beside the file may name them)")
        return tokenizer

    @abc.abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Ids [n] int32 of a text of any length, without BOS and EOS; time grows with the length, not its square."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of ids; BOS, EOS, padding and unknown give nothing, bytes that are not UTF-8 give U+FFFD."""

    @abc.abstractmethod
    def save(self, path: str | os.PathLike) -> None:
        """Writes the file so that `open_tokenizer(path)` gives the same tokenizer; beside and renamed.

        Args:
            path: the file, named `file_name` where a directory is to be opened. What the file itself does not say goes
                into tokenizer_config.json beside it.
        """


def open_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer of a model's directory, or in a file.

    Which tokens of a tokenizer.json are BOS, EOS, padding and unknown is read from tokenizer_config.json beside it,
    else from special_tokens_map.json, else from what the file itself puts round a text, else from well-known names.
    Whether the model expects BOS is `add_bos_token` of tokenizer_config.json; without it, yes for a SentencePiece
    model, and for a tokenizer.json whether the file puts BOS before a text.

    Args:
        path: a directory with tokenizer.model or tokenizer.json, the former preferred, as conversions to the latter are
            not always exact (OpenLLaMA v1's keeps the spaces that the model takes away). Or a file: a name in `.json`
            is a tokenizer.json's, any other a SentencePiece model's.

    Raises:
        FileNotFoundError: nothing there, or a directory without either file.
        ValueError: a damaged file, a SentencePiece model without BOS or EOS, or a special token that is not in the
            vocabulary.
        ImportError: a tokenizer.json where the package tokenizers is not installed.
    """
    path = files.location(path)
    if path.is_dir():
        found = next((path / kind.file_name for kind in _KINDS if (path / kind.file_name).is_file()), None)
        if found is None:
            names = sorted(entry.name for entry in path.iterdir())
            shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            wanted = " or ".join(kind.file_name for kind in _KINDS)
            raise FileNotFoundError(f"tokenizer {path}: found {shown or 'an empty directory'}; wanted {wanted}")
        path = found
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer {path}: no such file")
    config = _read_object(path.with_name(_CONFIG))
    adds_bos = config.get("add_bos_token")
    if adds_bos is not None and not isinstance(adds_bos, bool):
        raise ValueError(f"{path.with_name(_CONFIG)}: add_bos_token is {adds_bos!r}; wanted true or false")
    try:
        if path.suffix == ".json":
            names = {**_read_object(path.with_name("special_tokens_map.json")), **config}
            return TokenizerJson(path.read_bytes(), names, adds_bos)
        return SentencePiece(path.read_bytes(), True if adds_bos is None else adds_bos)
    except ValueError as error:
        raise ValueError(f"tokenizer {path}: {error}") from error


class SentencePiece(Tokenizer):
    """The tokenizer in a SentencePiece model."""

    file_name = "tokenizer.model"

    def __init__(self, model: bytes, adds_bos: bool = True):
        """Reads the bytes of a model file.

        Raises:
            ValueError: not a SentencePiece model, or one without the tokens that open and close a document.
        """
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"not a SentencePiece model ({error})") from error
        self._model, self.adds_bos = model, adds_bos
        self.fingerprint = hashlib.sha256(model).hexdigest()[:16]
        self.vocab_size = self._processor.vocab_size()
        self.bos_id, self.eos_id = self._processor.bos_id(), self._processor.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise ValueError(f"bos_id {self.bos_id}, eos_id {self.eos_id}; wanted both at least 0")
        self._unknown = self._processor.unk_id()
        self.pad_id = self._processor.pad_id() if self._processor.pad_id() >= 0 else self._unknown
        # Where a newline is a byte of its own no piece reaches over it, so text may be encoded in parts that begin with
        # one; the space that SentencePiece puts before each part is then a piece by itself and is taken off again.
        pieces = self._processor.encode("\n", out_type=str)
        self._cut_at_newlines = pieces[-1:] == ["<0x0A>"] and not any(
            "\n" in self._processor.id_to_piece(i) for i in range(self.vocab_size)
        )
        self._newline_prefix = len(pieces) - 1

    def encode(self, text: str) -> np.ndarray:
        """See `Tokenizer.encode`; control tokens written in the text are text."""
        if not self._cut_at_newlines or len(text) <= _CHUNK_CHARS:
            return np.asarray(self._processor.encode(text), np.int32)
        parts = [
            np.asarray(self._processor.encode(chunk), np.int32)[self._newline_prefix if i else 0 :]
            for i, chunk in enumerate(_chunks(text))
        ]
        return np.concatenate(parts)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """See `Tokenizer.decode`.

        `decode(encode(text)) == text` for models of `train_tokenizer`, save that U+2581, which stands for the space
        inside SentencePiece, comes back as a space.
        """
        # SentencePiece itself gives nothing for control tokens, but a sign for the unknown token, LLaMA's padding.
        return self._processor.decode([int(i) for i in ids if i != self._unknown])

    def save(self, path: str | os.PathLike) -> None:
        """See `Tokenizer.save`; tokenizer_config.json is needed only for a model that expects no BOS."""
        path = files.location(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not self.adds_bos:
            files.write_json(path.with_name(_CONFIG), {"add_bos_token": False})
        files.write(path, self._model)


class TokenizerJson(Tokenizer):
    """The tokenizer in a tokenizer.json, run by the package tokenizers."""

    file_name = "tokenizer.json"

    def __init__(self, data: bytes, names: Mapping[str, Any], adds_bos: bool | None = None):
        """Reads the bytes of a file.

        Args:
            data: the file's.
            names: bos_token, eos_token, pad_token and unk_token, those that are known: a string, an object with
                `content`, or None where the model has no such token. Other keys are not looked at.
            adds_bos: None to ask the file.

        Raises:
            ValueError: not a tokenizer.json, or a name that is not in its vocabulary.
            ImportError: no package tokenizers.
        """
        library = _tokenizers()
        try:
            self._tokenizer = library.Tokenizer.from_str(data.decode())
        except Exception as error:  # the package raises nothing narrower
            raise ValueError(f"not a tokenizer.json ({error})") from error
        # How a file cuts and fills batches is no part of its vocabulary.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._data = data
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values(), default=-1)

        self._special = {i for i, t in self._tokenizer.get_added_tokens_decoder().items() if t.special}
        self._byte_fallback = '"ByteFallback"' in json.dumps(json.loads(data).get("decoder"))
        # What the file puts round a text.
        encoding = self._tokenizer.encode("a")
        text = [i for i, added in enumerate(encoding.special_tokens_mask) if not added]
        before, after = (encoding.ids[: text[0]], encoding.ids[text[-1] + 1 :]) if text else ([], [])
        round_text = {"bos_token": before[:1], "eos_token": after[-1:]}
        self._ids = {role: self._find(role, names, round_text.get(role, ())) for role in _ROLES}

        self.bos_id, self.eos_id = self._ids["bos_token"], self._ids["eos_token"]
        fill = (self._ids[role] for role in ("pad_token", "unk_token", "eos_token"))
        self.pad_id = next((i for i in fill if i is not None), 0)
        self.adds_bos = self.bos_id is not None and (self.bos_id in before if adds_bos is None else adds_bos)
        # Documents prepared with another EOS are other documents, though the file is the same.
        self.fingerprint = hashlib.sha256(data + json.dumps(self._ids).encode()).hexdigest()[:16]

    def _find(self, role: str, names: Mapping[str, Any], round_text: Sequence[int]) -> int | None:
        name = names.get(role, "")
        name = name.get("content") if isinstance(name, Mapping) else name
        if name is None:
            return None
        if name != "":  # early conversions of LLaMA leave the names empty
            found = self._tokenizer.token_to_id(name) if isinstance(name, str) else None
            if found is None:
                raise ValueError(f"{role} is {name!r}; wanted a token of the vocabulary")
            return found
        if round_text:
            return round_text[0]
        special = {t.content: i for i, t in self._tokenizer.get_added_tokens_decoder().items() if t.special}
        return next((special[name] for name in _WELL_KNOWN[role] if name in special), None)

    def encode(self, text: str) -> np.ndarray:
        """See `Tokenizer.encode`; special tokens written in the text are those tokens, as everywhere for such files."""
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """See `Tokenizer.decode`; other special tokens give nothing either."""
        silent = set(self._ids.values())
        shown = [int(i) for i in ids if int(i) not in silent]
        if not self._byte_fallback:
            return self._tokenizer.decode(shown, skip_special_tokens=True)
        tokens = [self._tokenizer.id_to_token(i) for i in shown if i not in self._special]
        return self._tokenizer.decoder.decode(_joined_bytes([token for token in tokens if token is not None]))

    def save(self, path: str | os.PathLike) -> None:
        """See `Tokenizer.save`."""
        path = files.location(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        names = {role: None if i is None else self._tokenizer.id_to_token(i) for role, i in self._ids.items()}
        files.write_json(path.with_name(_CONFIG), {**names, "add_bos_token": self.adds_bos})
        files.write(path, self._data)


def _joined_bytes(tokens: Iterable[str]) -> list[str]:
    """Tokens with every run of bytes, <0xNN>, as its text. The package makes a sign for the unknown of each byte of a
    run that is not UTF-8 as a whole: what was a character before it would be none after the next byte.
    """
    out: list[str] = []
    run = bytearray()
    for token in [*tokens, None]:
        if token is not None and re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
            run.append(int(token[3:5], 16))
            continue
        if run:
            out.append(run.decode("utf-8", "replace"))
            run.clear()
        if token is not None:
            out.append(token)
    return out


# In the order in which a directory is searched.
_KINDS = (SentencePiece, TokenizerJson)


def _tokenizers() -> Any:
    """The package tokenizers, imported by those who need it: processes that load data seldom do."""
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "a tokenizer.json needs the package tokenizers, which cannot be imported; "
            "pip install 'tokenizers>=0.21,<1', or use a SentencePiece tokenizer.model"
        ) from error
    return tokenizers


def _read_object(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is no file."""
    if not path.is_file():
        return {}
    found = files.read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path}: found a {type(found).__name__}; wanted an object")
    return found


def _chunks(text: str) -> Iterator[str]:
    """Parts of about `_CHUNK_CHARS`; each but the first begins with a newline, and none ends in white space.

    A model that removes extra white space would do so at the end of every part, hence the last condition; its space is
    U+2581.
    """
    start = 0
    while start < len(text):
        end = start + _CHUNK_CHARS
        while True:
            end = text.find("\n", end)
            if end < 0 or not (text[end - 1].isspace() or text[end - 1] == "\u2581"):
                break
            end += 1
        end = len(text) if end < 0 else end
        yield text[start:end]
        start = end


def encode_prompt(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Ids [n] int32 of a text, after BOS where the model expects one."""
    bos = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    return np.concatenate([np.asarray(bos, np.int32), tokenizer.encode(text)]).astype(np.int32)


def check_vocab(tokenizer: Tokenizer, vocab_size: int, *, padded: bool = False) -> None:
    """Refuses a model that does not have the tokenizer's vocabulary.

    Args:
        vocab_size: the model's.
        padded: whether the model may have more words: embeddings of published checkpoints are padded.

    Raises:
        ValueError: the two sizes differ.
    """
    n = tokenizer.vocab_size
    if n > vocab_size or (n < vocab_size and not padded):
        raise ValueError(
            f"the tokenizer's vocabulary has {n} tokens, the model's vocab_size is {vocab_size}; wanted "
            + ("no more than that" if padded else "the same")
        )


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), _MAX_LINE_CHARS):
                yield line[start : start + _MAX_LINE_CHARS]


def train_tokenizer(
    texts: Iterable[str],
    path: str | os.PathLike,
    vocab_size: int,
    *,
    max_lines: int = 1_000_000,
) -> SentencePiece:
    """Trains a byte-pair SentencePiece model as LLaMA's and writes it.

    No normalisation, digits apart, runs of spaces kept and mergeable, unknown characters as UTF-8 bytes; newlines are a
    byte token each.

    Args:
        texts: documents.
        path: where the model goes; written beside and renamed.
        vocab_size: V, with the 3 special and 256 byte tokens among them.
        max_lines: lines drawn (always the same ones) from longer corpora.

    Raises:
        ValueError: no text, or a vocabulary too small or too large for it.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.99995,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            max_sentence_length=4 * _MAX_LINE_CHARS,
            input_sentence_size=max_lines,
            shuffle_input_sentence=True,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"vocab_size is {vocab_size}; SentencePiece cannot make that of this text ({error})"
        ) from error
    tokenizer = SentencePiece(model.getvalue())
    tokenizer.save(path)
    return tokenizer


# ---- vocabularies of GGUF files (github.com/ggml-org/ggml, docs/gguf.md)

# Token types, numbered as SentencePiece's.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = _TYPES = range(1, 7)

# Regular expressions by which text is cut into words before merging, by `tokenizer.ggml.pre`; all but LLaMA 3's words
# are cut further by GPT-2's, which the package knows.
_WORDS = {
    "gpt-2": "",
    "smollm": r"\p{N}",
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def write_from_gguf(directory: str | os.PathLike, fields: Mapping[str, Any]) -> list[str]:
    """Writes the vocabulary that a GGUF file holds as files that `open_tokenizer` opens.

    `tokenizer.ggml.model` 'llama' gives tokenizer.model, a SentencePiece model that encodes as the one the file was
    made from, save that extra spaces stay unless `tokenizer.ggml.remove_extra_whitespaces` is true (conversions of
    OpenLLaMA v1 lose that property). 'gpt2', byte-level BPE, gives tokenizer.json: control and user-defined tokens are
    one id each wherever they stand in a text. tokenizer_config.json comes with either.

    Args:
        directory: where the files go, each written beside and renamed.
        fields: the file's keys with plain values: strings, numbers, lists. Of these, those that begin with
            `tokenizer.ggml.` are read.

    Returns:
        names of the files written.

    Raises:
        ValueError: a key that is missing, or a value of another kind than these, each named.
        ImportError: 'gpt2' where the package tokenizers is not installed.
    """
    directory = pathlib.Path(directory)
    vocabulary = {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()}
    kind = _need(vocabulary, "model")
    if kind not in ("llama", "gpt2"):
        raise ValueError(f"tokenizer.ggml.model is {kind!r}; wanted 'llama' or 'gpt2'")
    tokens = list(_need(vocabulary, "tokens"))
    types = [int(t) for t in _need(vocabulary, "token_type")]
    if not set(types) <= set(_TYPES):
        raise ValueError(f"tokenizer.ggml.token_type has {min(set(types) - set(_TYPES))}; wanted numbers from 1 to 6")
    if len(types) != len(tokens):
        raise ValueError(f"tokenizer.ggml.token_type has {len(types)} values; wanted {len(tokens)}, one a token")
    ids = {}
    for role, key in zip(_ROLES, ("bos", "eos", "padding", "unknown")):
        found = vocabulary.get(f"{key}_token_id")
        if found is not None and not 0 <= found < len(tokens):
            raise ValueError(f"tokenizer.ggml.{key}_token_id is {found}; wanted one of {len(tokens)} tokens")
        ids[role] = None if found is None else int(found)

    # Files that do not say whether the model expects BOS: llama.cpp's defaults.
    adds_bos = bool(vocabulary.get("add_bos_token", kind == "llama" or vocabulary.get("pre") == "llama-bpe"))
    names = {role: tokens[i] for role, i in ids.items() if i is not None}
    if kind == "llama":
        name, tokenizer_class = SentencePiece.file_name, "LlamaTokenizer"
        data = _sentencepiece_model(vocabulary, tokens, types, ids)
    else:
        name, tokenizer_class = TokenizerJson.file_name, "PreTrainedTokenizerFast"
        data = _byte_level_json(vocabulary, tokens, types, names.get("bos_token") if adds_bos else None)
    config = {"tokenizer_class": tokenizer_class, "add_bos_token": adds_bos, **names}
    directory.mkdir(parents=True, exist_ok=True)
    files.write_json(directory / _CONFIG, config)
    files.write(directory / name, data)
    return [name, _CONFIG]


def _need(vocabulary: Mapping[str, Any], key: str) -> Any:
    if vocabulary.get(key) is None:
        raise ValueError(f"no tokenizer.ggml.{key}; wanted it, as the vocabulary cannot be rebuilt without")
    return vocabulary[key]


def _byte_level_json(vocabulary: Mapping[str, Any], tokens: list[str], types: list[int], bos: str | None) -> bytes:
    """A tokenizer.json of byte-level BPE.

    Args:
        bos: the token to put before a text, for those who ask the file to; None for none.
    """
    library = _tokenizers()
    pre = _need(vocabulary, "pre")
    if pre not in _WORDS:
        raise ValueError(f"tokenizer.ggml.pre is {pre!r}; wanted one of {', '.join(map(repr, _WORDS))}")
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if ids[token] != i)
        raise ValueError(f"tokenizer.ggml.tokens has {twice!r} twice; wanted every token once")
    merges = [tuple(merge.split(" ")) for merge in _need(vocabulary, "merges")]
    for pair in merges:
        if len(pair) != 2 or pair[0] not in ids or pair[1] not in ids or "".join(pair) not in ids:
            raise ValueError(f"tokenizer.ggml.merges has {' '.join(pair)!r}; wanted two tokens that make a third")
    # LLaMA 3's whole words count as tokens though no merges lead to them.
    made = library.Tokenizer(library.models.BPE(ids, merges, ignore_merges=pre == "llama-bpe"))
    cut = library.pre_tokenizers
    regex = _WORDS[pre]
    first = [cut.Split(library.Regex(regex), "isolated")] if regex else []
    made.pre_tokenizer = cut.Sequence([*first, cut.ByteLevel(add_prefix_space=False, use_regex=pre != "llama-bpe")])
    made.decoder = library.decoders.ByteLevel()
    for kind, add in ((_CONTROL, made.add_special_tokens), (_USER_DEFINED, made.add_tokens)):
        special = kind == _CONTROL
        add([library.AddedToken(t, special=special, normalized=False) for t, k in zip(tokens, types) if k == kind])
    if bos is not None:
        made.post_processor = library.processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B:1"], special_tokens=[(bos, ids[bos])]
        )
    return made.to_str(pretty=True).encode()


def _sentencepiece_model(
    vocabulary: Mapping[str, Any], tokens: list[str], types: list[int], ids: Mapping[str, int | None]
) -> bytes:
    """A SentencePiece model: byte-pair merges by score, text taken as it is."""
    scores = [float(score) for score in _need(vocabulary, "scores")]
    if len(scores) != len(tokens):
        raise ValueError(f"tokenizer.ggml.scores has {len(scores)} values; wanted {len(tokens)}, one a token")
    normal = {score for score, kind in zip(scores, types) if kind == _NORMAL}
    if len(normal) == 1:
        raise ValueError(f"tokenizer.ggml.scores are {normal.pop()} throughout; wanted the order of the merges")
    for role, key in (("bos_token", "bos"), ("eos_token", "eos")):
        if ids[role] is None:
            _need(vocabulary, f"{key}_token_id")
    types = list(types)
    if _UNKNOWN not in types:  # some conversions make it a control token
        types[int(_need(vocabulary, "unknown_token_id"))] = _UNKNOWN
    unknown = types.index(_UNKNOWN)
    special = {role: i for role, i in ids.items() if i is not None and i != unknown} | {"unk_token": unknown}
    for role, i in special.items():
        types[i] = _UNKNOWN if role == "unk_token" else _CONTROL  # other tokens are text for SentencePiece

    # Field numbers of sentencepiece_model.proto (github.com/google/sentencepiece, src). Written by hand, as the classes
    # that come with the package work only with protobuf's newest release.
    pieces = [(1, _message([(1, token), (2, score), (3, kind)])) for token, score, kind in zip(tokens, scores, types)]
    numbers = {"unk_token": 45, "bos_token": 46, "eos_token": 47, "pad_token": 48}
    trainer = [
        (3, 2),  # model_type: BPE
        (4, len(tokens)),  # vocab_size
        (35, _BYTE in types),  # byte_fallback
        *((numbers[role], tokens[i]) for role, i in special.items()),
    ]
    normalizer = [
        (1, "identity"),
        (3, bool(vocabulary.get("add_space_prefix", True))),  # add_dummy_prefix
        (4, bool(vocabulary.get("remove_extra_whitespaces", False))),
    ]
    model = _message([*pieces, (2, _message(trainer)), (3, _message(normalizer))])
    try:
        SentencePiece(model)
    except ValueError as error:
        raise ValueError(f"tokenizer.ggml.tokens, of {len(tokens)}: {error}") from error
    return model


def _message(fields: Iterable[tuple[int, int | float | str | bytes]]) -> bytes:
    """A protobuf message: (field number, value) as varint, 32-bit float, or length and bytes."""
    out = bytearray()
    for number, value in fields:
        if isinstance(value, int):
            out += _varint(number << 3) + _varint(value)
        elif isinstance(value, float):
            out += _varint(number << 3 | 5) + struct.pack("<f", value)
        else:
            data = value.encode() if isinstance(value, str) else value
            out += _varint(number << 3 | 2) + _varint(len(data)) + data
    return bytes(out)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
