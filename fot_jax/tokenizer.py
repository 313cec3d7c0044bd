"""SentencePiece tokenizer with LLaMA's conventions: BOS 1, EOS 2, unknown 0, byte fallback, text taken as it is."""

from __future__ import annotations

import hashlib
import io
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import sentencepiece

# SentencePiece drops training sentences longer than its limit (bytes); lines are cut to this many characters first.
_MAX_LINE_CHARS = 4096
# Documents are encoded in chunks of about this many characters.
_CHUNK_CHARS = 1 << 16


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        vocab_size: V.
        bos_id, eos_id: ids that open and close a document; `encode` adds neither.
        pad_id: id that fills unused places; 0 (unknown) where the model has none, as LLaMA's.
        fingerprint: hash of the model, 16 hexadecimal digits.
    """

    def __init__(self, model: bytes):
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._model = model
        self.fingerprint = hashlib.sha256(model).hexdigest()[:16]
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        self.pad_id: int = max(self._processor.pad_id(), 0)
        # Where a newline is a byte of its own no piece reaches over it, so text may be encoded in parts that begin with
        # one; the space that SentencePiece puts before each part is then a piece by itself and is taken off again.
        pieces = self._processor.encode("\n", out_type=str)
        self._cut_at_newlines = pieces[-1:] == ["<0x0A>"] and not any(
            "\n" in self._processor.id_to_piece(i) for i in range(self.vocab_size)
        )
        self._newline_prefix = len(pieces) - 1

    @classmethod
    def load(cls, path: str | os.PathLike) -> Tokenizer:
        """The tokenizer in a SentencePiece `.model` file.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a SentencePiece model, or one without the tokens that open and close a document.
        """
        path = pathlib.Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"tokenizer {path}: no such file")
        try:
            tokenizer = cls(path.read_bytes())
        except RuntimeError as error:
            raise ValueError(f"tokenizer {path}: not a SentencePiece model ({error})") from error
        if tokenizer.bos_id < 0 or tokenizer.eos_id < 0:
            found = f"bos_id {tokenizer.bos_id}, eos_id {tokenizer.eos_id}"
            raise ValueError(f"tokenizer {path}: {found}; wanted both at least 0")
        return tokenizer

    def save(self, path: str | os.PathLike) -> None:
        """Writes the model, beside and renamed."""
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        beside.write_bytes(self._model)
        os.replace(beside, path)

    def encode(self, text: str) -> np.ndarray:
        """Ids [n] int32 of a text of any length, without BOS and EOS; time grows with the length, not its square."""
        if not self._cut_at_newlines or len(text) <= _CHUNK_CHARS:
            return np.asarray(self._processor.encode(text), np.int32)
        parts = [
            np.asarray(self._processor.encode(chunk), np.int32)[self._newline_prefix if i else 0 :]
            for i, chunk in enumerate(_chunks(text))
        ]
        return np.concatenate(parts)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of ids; BOS, EOS and padding give nothing, bytes that are not UTF-8 give U+FFFD.

        `decode(encode(text)) == text` for models of `train_tokenizer`, save that U+2581, which stands for the space
        inside SentencePiece, comes back as a space.
        """
        return self._processor.decode([int(i) for i in ids])


def _chunks(text: str) -> Iterator[str]:
    """Parts of about `_CHUNK_CHARS`; each but the first begins with a newline, and none ends in white space.

    A model that removes extra white space would do so at the end of every part, hence the last condition.
    """
    start = 0
    while start < len(text):
        end = start + _CHUNK_CHARS
        while True:
            end = text.find("\n", end)
            if end < 0 or not text[end - 1].isspace():
                break
            end += 1
        end = len(text) if end < 0 else end
        yield text[start:end]
        start = end


def check_vocab(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuses a model that does not have the tokenizer's vocabulary.

    Raises:
        ValueError: the two sizes differ.
    """
    if tokenizer.vocab_size != vocab_size:
        raise ValueError(
            f"the tokenizer's vocabulary has {tokenizer.vocab_size} tokens, the model's vocab_size is {vocab_size}; "
            "wanted the same"
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
) -> Tokenizer:
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
    tokenizer = Tokenizer(model.getvalue())
    tokenizer.save(path)
    return tokenizer
