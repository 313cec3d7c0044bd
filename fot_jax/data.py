"""Documents, from text to batches for training.

`prepare` tokenises a corpus (see `sources`), once, into a
`TokenSet`: an ArrayRecord data set with an index of lengths. A `Mixture` is the order in which documents are drawn from
token sets. `Packed` lays the documents out in rows; `Batches` makes them ready in the background.

    python -m fot_jax.data train-tokenizer SOURCE... --output X.model --vocab_size N
    python -m fot_jax.data prepare SOURCE... --tokenizer X.model --output DIR
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import pathlib
import shutil
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds

from fot_jax import files
from fot_jax.sources import Corpus, hash_of, open_corpus
from fot_jax.tokenizer import Tokenizer, train_tokenizer


class TokenisedDocuments(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of tokenised documents: features `id` (text) and `tokens` (int32), in the order they are given."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # there are no checksums beside this file; TFDS looks for them with a package it does not require

    def __init__(self, *, examples: Callable[[], Iterator[tuple[str, np.ndarray]]], **kwargs: Any):
        self._examples = examples
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        # A document of 2 million tokens is read in 45 ms as bytes, 80 ms as a list of integers, 1.2 s as a Sequence.
        tokens = tfds.features.Tensor(shape=(None,), dtype=np.int32, encoding="bytes")
        return tfds.core.DatasetInfo(
            builder=self,
            description="Tokenised documents.",
            features=tfds.features.FeaturesDict({"id": tfds.features.Text(), "tokens": tokens}),
            disable_shuffling=True,  # keeps the order, so that the index of lengths needs no keys
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"documents": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for key, (name, tokens) in enumerate(self._examples()):
            yield key, {"id": name, "tokens": tokens}


class TokenSet:
    """Tokenised documents on disk, by number.

    Attributes:
        lengths: int32 [documents], tokens of each.
        fingerprint: of all tokens and the tokenizer; the same text prepared anew has the same.
        vocab_size, bos_id, eos_id, pad_id, tokenizer_fingerprint: of the tokenizer they were made with.
        skipped: documents left out because they were too short.
    """

    def __init__(self, path: str | os.PathLike):
        """Opens what `prepare` wrote.

        Raises:
            FileNotFoundError: no complete prepared set there.
        """
        self.path = pathlib.Path(path)
        if not (self.path / "prepared.json").is_file():
            raise FileNotFoundError(f"{self.path}: no prepared.json; not a prepared token set")
        facts = json.loads((self.path / "prepared.json").read_text())
        self.fingerprint: str = facts["fingerprint"]
        self.tokenizer_fingerprint: str = facts["tokenizer"]
        self.vocab_size, self.skipped = facts["vocab_size"], facts["skipped"]
        self.bos_id, self.eos_id, self.pad_id = facts["bos_id"], facts["eos_id"], facts["pad_id"]
        self.lengths = np.load(self.path / "lengths.npy")

    @functools.cached_property
    def _records(self):
        (folder,) = (self.path / TokenisedDocuments.name).iterdir()
        return tfds.builder_from_directory(str(folder)).as_data_source("documents")

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> np.ndarray:
        """Tokens [lengths[i]] int32 of document i, without BOS and EOS."""
        return self._records[int(i)]["tokens"]

    def id(self, i: int) -> str:
        """Name of document i."""
        return self._records[int(i)]["id"].decode()

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the set was made with."""
        return Tokenizer.load(self.path)


# A text of so many characters, outer spaces not counted, has two tokens at least; shorter ones are tokenised to see.
_SURELY_LONG = 1024


def prepare(corpus: Corpus, tokenizer: Tokenizer, output: str | os.PathLike, *, skip_short: bool = False) -> TokenSet:
    """Tokenises a corpus into `output/NAME-FINGERPRINT`, or opens it if that was done before.

    The folder gets its name when it is complete; the fingerprint covers text, tokenizer and options. All documents are
    read and checked before the first is tokenised. Of several processes one does the work, the others wait for it.

    Args:
        skip_short: leaves documents of fewer than two tokens out, and counts them, instead of refusing them.

    Raises:
        ValueError: no document; a document of fewer than two tokens; or what reading the corpus raises.
    """
    final = pathlib.Path(output) / f"{corpus.name}-{hash_of(corpus.fingerprint, tokenizer.fingerprint, skip_short)}"
    if final.exists():
        return TokenSet(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    with files.locked(final.with_name(f".{final.name}.lock")):
        if final.exists():
            return TokenSet(final)
        work = final.with_name(f".{final.name}.incomplete")
        shutil.rmtree(work, ignore_errors=True)
        found = short = 0
        for document in corpus.documents():
            found += 1
            if len(document.text.strip()) < _SURELY_LONG and (tokens := len(tokenizer.encode(document.text))) < 2:
                short += 1
                if not skip_short:
                    what = f"document {document.id!r} has {tokens} tokens"
                    raise ValueError(f"{what}; wanted at least 2 (skip_short leaves such documents out)")
        if found == short:
            raise ValueError(f"{corpus.name}: no documents{' of two tokens or more' if found else ''}")
        lengths: list[int] = []
        content = hashlib.sha256(tokenizer.fingerprint.encode())

        def examples() -> Iterator[tuple[str, np.ndarray]]:
            for document in corpus.documents():
                tokens = tokenizer.encode(document.text)
                if len(tokens) >= 2:
                    lengths.append(len(tokens))
                    content.update(np.int64(len(tokens)).tobytes() + tokens.tobytes())
                    yield document.id, tokens

        builder = TokenisedDocuments(examples=examples, data_dir=str(work))
        # Its words on stdout are of a download of unknown size; progress is on stderr.
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
        np.save(work / "lengths.npy", np.asarray(lengths, np.int32))
        tokenizer.save(work / tokenizer.file_name)
        facts = {
            "fingerprint": content.hexdigest()[:16],
            "tokenizer": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            **{name: getattr(tokenizer, name) for name in ("bos_id", "eos_id", "pad_id")},
            "documents": len(lengths),
            "tokens": sum(lengths),
            "skipped": short,
        }
        (work / "prepared.json").write_text(json.dumps(facts, indent=1))
        os.replace(work, final)
    return TokenSet(final)


@dataclasses.dataclass(frozen=True)
class Source:
    """A part of a mixture.

    Attributes:
        documents: a TokenSet, or anything with its lengths, fingerprint, bos_id, eos_id, pad_id, vocab_size,
            tokenizer_fingerprint and documents by number.
        weight: share of the documents drawn, relative to the other sources' weights.
        min_tokens: shorter documents are left out.
        max_tokens: longer documents are cut into documents of so many tokens, to be shuffled by themselves; 0: whole.
    """

    documents: Any
    weight: float = 1.0
    min_tokens: int = 0
    max_tokens: int = 0

    def pieces(self) -> np.ndarray:
        """int64 [documents drawn from, 3]: number of the stored document, first token and end in it."""
        lengths = np.asarray(self.documents.lengths, np.int64)
        kept = np.flatnonzero(lengths >= max(self.min_tokens, 1))
        size = self.max_tokens or int(lengths.max(initial=1))
        counts = -(-lengths[kept] // size)
        document = np.repeat(kept, counts)
        start = (np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)) * size
        return np.stack([document, start, np.minimum(start + size, lengths[document])], axis=1)


# Draws come in blocks in which each source has its exact share, in shuffled order.
_BLOCK = 1024


class Mixture:
    """The order in which documents are drawn from several sources: a pure function of seed and number of the draw.

    Weights are shares of documents, not of tokens, as a table of sampling weights says which document a stream turns to
    next (to a 1024th; every source at least that). Each source is shuffled anew every time it has been gone through.

    Attributes:
        n_documents: draws there are; None without end.
        fingerprint: changes when any draw may.
        bos_id, eos_id, pad_id, vocab_size: of the sources' tokenizer.
    """

    def __init__(self, sources: Sequence[Source], *, seed: int | None, repeat: bool = True):
        """Prepares the order.

        Args:
            sources: what to draw from.
            seed: of the order, 0 to 2**32 - 1; with `repeat=False` None keeps the stored order.
            repeat: without end, by weight; or else every document once, whatever its weight.

        Raises:
            ValueError: no source, a weight that is not positive, tokenizers that differ, no document long enough.
        """
        if not sources:
            raise ValueError("a mixture of no sources")
        if repeat and seed is None:
            raise ValueError("seed is None; a mixture that repeats wants an integer")
        self.sources = tuple(sources)
        self._pieces = [source.pieces() for source in sources]
        for i, (source, kept) in enumerate(zip(sources, self._pieces, strict=True)):
            if not source.weight > 0:
                raise ValueError(f"source {i}: weight is {source.weight}; wanted more than 0")
            if not len(kept):
                longest = max(source.documents.lengths, default=0)
                raise ValueError(f"source {i}: no document of {source.min_tokens} tokens (longest: {longest})")
        first = sources[0].documents
        for i, source in enumerate(sources):
            if source.documents.tokenizer_fingerprint != first.tokenizer_fingerprint:
                raise ValueError(f"source {i}: made with another tokenizer than source 0; wanted the same")
        self.bos_id, self.eos_id, self.pad_id = first.bos_id, first.eos_id, first.pad_id
        self.vocab_size: int = first.vocab_size
        self.n_documents = None if repeat else sum(map(len, self._pieces))
        self._seed, self._quotas = seed, _quotas([s.weight for s in sources])
        self._ends = np.cumsum(list(map(len, self._pieces)))
        parts = [(s.documents.fingerprint, s.weight, s.min_tokens, s.max_tokens) for s in sources]
        self.fingerprint = hash_of(parts, seed, repeat)

    def locate(self, n: int) -> tuple[int, int]:
        """Source and number within the source's documents of draw n."""
        source, (document, _, _) = self._draw(n)
        return source, document

    def _draw(self, n: int) -> tuple[int, tuple[int, int, int]]:
        """Source of draw n; number within its documents, first token and end."""
        if self.n_documents is None:
            picks, ranks = _draws(self._quotas, self._seed, n // _BLOCK)
            source = int(picks[n % _BLOCK])
            kept = self._pieces[source]
            epoch, rank = divmod(n // _BLOCK * self._quotas[source] + int(ranks[n % _BLOCK]), len(kept))
            return source, tuple(kept[_permutation(len(kept), self._seed, source, epoch)[rank]].tolist())
        if not 0 <= n < self.n_documents:
            raise IndexError(f"draw {n}; there are {self.n_documents}")
        place = n if self._seed is None else int(_permutation(self.n_documents, self._seed)[n])
        source = int(np.searchsorted(self._ends, place, side="right"))
        return source, tuple(self._pieces[source][place - (self._ends[source - 1] if source else 0)].tolist())

    def length(self, n: int) -> int:
        """Tokens of draw n, without BOS and EOS."""
        _, (_, start, stop) = self._draw(n)
        return stop - start

    def tokens(self, n: int) -> np.ndarray:
        """Draw n as `<bos> document <eos>`, int32."""
        source, (document, start, stop) = self._draw(n)
        tokens = self.sources[source].documents[document][start:stop]
        return np.concatenate([[self.bos_id], tokens, [self.eos_id]]).astype(np.int32)


@functools.lru_cache(maxsize=32)
def _permutation(n: int, *seed: int) -> np.ndarray:
    """0..n-1 in shuffled order, int32. RandomState's results are frozen: the same with any version of NumPy."""
    return np.random.RandomState(seed).permutation(n).astype(np.int32)


def _quotas(weights: Sequence[float]) -> tuple[int, ...]:
    """Draws of each source in a block, by largest remainder, at least one each."""
    shares = np.asarray(weights, np.float64) / np.sum(weights) * (_BLOCK - len(weights))
    quotas = np.floor(shares).astype(int)
    quotas[np.argsort(quotas - shares, kind="stable")[: _BLOCK - len(weights) - quotas.sum()]] += 1
    return tuple(int(q) + 1 for q in quotas)


@functools.lru_cache(maxsize=256)
def _draws(quotas: tuple[int, ...], seed: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Source of each draw of a block, and how many draws of that source came before it in the block."""
    picks = np.random.RandomState([seed, block]).permutation(np.repeat(np.arange(len(quotas)), quotas))
    ranks = np.zeros_like(picks)
    for source in range(len(quotas)):
        ranks[picks == source] = np.arange(quotas[source])
    return picks, ranks


class Packed(grain.IterDataset):
    """Batches for crossbatch: streams of documents, each read in consecutive windows.

    Stream r of R reads draws r, r+R, r+2R ... as `<bos> document <eos>`, one after another. Every step takes the next
    k windows of each stream. A batch is a dict of arrays [rows, T] (T tokens a window, rows = R k, or this process's):

        tokens int32
        targets int32: the next token of the document, also where that is in the next window
        loss_mask bool: whether there is a target; not at `<eos>` and padding
        segment_ids int32: 1, 2, ... by document within the row, 0 at padding
        document int32: number of the draw, -1 at padding

    The iterator's state is the draw and the offset in it of every stream. It does not depend on which rows are made:
    lengths are enough to advance all streams, and tokens are read of those rows only. A run may go on with another
    number of processes, each of which makes the rows of its own devices.
    """

    def __init__(
        self,
        documents: Mixture,
        *,
        streams: int,
        window: int,
        windows_per_step: int = 1,
        layout: str = "packed",
        align_documents: bool = False,
        rows: Sequence[int] | None = None,
    ):
        """Describes the batches.

        Args:
            documents: what to read.
            streams: R.
            window: T.
            windows_per_step: k.
            layout: which row holds window j of stream r: 'packed' r k + j, 'blocks' j R + r.
            align_documents: every document starts a window; the rest of its last one is padding.
            rows: which rows are made, in this order; None: all.

        Raises:
            ValueError: an argument out of its range.
        """
        super().__init__()
        for name, value in (("streams", streams), ("window", window), ("windows_per_step", windows_per_step)):
            if value < 1:
                raise ValueError(f"{name} is {value}; wanted at least 1")
        if layout not in ("packed", "blocks"):
            raise ValueError(f"layout is {layout!r}; wanted 'packed' or 'blocks'")
        total = streams * windows_per_step
        self.rows = tuple(range(total) if rows is None else map(int, rows))
        if set(self.rows) - set(range(total)) or len(set(self.rows)) < len(self.rows):
            raise ValueError(f"rows are {self.rows}; wanted some of 0..{total - 1}, each once")
        self.documents, self.streams, self.window, self.windows_per_step = documents, streams, window, windows_per_step
        self.layout, self.align_documents = layout, align_documents
        # What a state may not be carried over between. The layout moves rows, not streams; it may change.
        self.fingerprint = hash_of(documents.fingerprint, streams, window, windows_per_step, align_documents)

    def __iter__(self) -> PackedIterator:
        return PackedIterator(self)


class PackedIterator(grain.DatasetIterator):
    """See `Packed`."""

    def __init__(self, packed: Packed):
        super().__init__()
        self._packed = packed
        self._draw, self._offset = list(range(packed.streams)), [0] * packed.streams
        self._places = {row: place for place, row in enumerate(packed.rows)}
        # Of each stream's document: the draw and its length, the draw and its tokens. Made anew for another draw.
        self._lengths: dict[int, tuple[int, int]] = {}
        self._tokens: dict[int, tuple[int, np.ndarray]] = {}

    def __next__(self) -> dict[str, np.ndarray]:
        packed = self._packed
        if all(map(self._is_over, self._draw)):
            raise StopIteration
        shape = (len(packed.rows), packed.window)
        batch = {
            "tokens": np.full(shape, packed.documents.pad_id, np.int32),
            "targets": np.full(shape, packed.documents.pad_id, np.int32),
            "loss_mask": np.zeros(shape, bool),
            "segment_ids": np.zeros(shape, np.int32),
            "document": np.full(shape, -1, np.int32),
        }
        for stream in range(packed.streams):
            for j in range(packed.windows_per_step):
                k = packed.windows_per_step
                row = stream * k + j if packed.layout == "packed" else j * packed.streams + stream
                place = self._places.get(row)
                self._read_window(stream, None if place is None else {name: x[place] for name, x in batch.items()})
        return batch

    def _is_over(self, draw: int) -> bool:
        return self._packed.documents.n_documents is not None and draw >= self._packed.documents.n_documents

    def _read_window(self, stream: int, out: dict[str, np.ndarray] | None) -> None:
        """Takes one window off a stream, and writes it to a row of the batch, if that row is made."""
        packed, at, segment = self._packed, 0, 0
        while at < packed.window and not self._is_over(draw := self._draw[stream]):
            if self._lengths.get(stream, (-1,))[0] != draw:
                self._lengths[stream] = draw, packed.documents.length(draw) + 2
            length, offset = self._lengths[stream][1], self._offset[stream]
            n, segment = min(packed.window - at, length - offset), segment + 1
            if out is not None:
                if self._tokens.get(stream, (-1,))[0] != draw:
                    self._tokens[stream] = draw, packed.documents.tokens(draw)
                tokens = self._tokens[stream][1][offset : offset + n + 1]
                targets = len(tokens) - 1  # n; one fewer where the document ends
                out["tokens"][at : at + n] = tokens[:n]
                out["targets"][at : at + targets] = tokens[1 : 1 + targets]
                out["loss_mask"][at : at + targets] = True
                out["segment_ids"][at : at + n] = segment
                out["document"][at : at + n] = draw
            at, self._offset[stream] = at + n, offset + n
            if self._offset[stream] == length:
                self._draw[stream], self._offset[stream] = draw + packed.streams, 0
                if packed.align_documents:
                    break

    def get_state(self) -> dict[str, Any]:
        """JSON-able: draw and offset of every stream, and the fingerprint of what they count in."""
        return {"draw": list(self._draw), "offset": list(self._offset), "fingerprint": self._packed.fingerprint}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a state of `get_state`.

        Raises:
            ValueError: the state is of other data, another seed or other sizes.
        """
        if state["fingerprint"] != self._packed.fingerprint:
            raise ValueError(
                f"the data position is of data {state['fingerprint']}, this run's data is {self._packed.fingerprint}; "
                "wanted the same texts, tokenizer, mixture, seed, streams, window and windows_per_step"
            )
        self._draw, self._offset = list(state["draw"]), list(state["offset"])


class Batches:
    """Iterator over batches that are made ahead of time in a thread.

    Attributes:
        close: called, ends the thread.
    """

    def __init__(self, packed: Packed, *, ahead: int = 4):
        """Args: packed: what to iterate over; ahead: batches kept ready, 0 for no thread."""
        self._iterators = [iter(grain.experimental.ThreadPrefetchIterDataset(packed, prefetch_buffer_size=ahead))]
        # Runs at the latest before the interpreter takes grain's modules down; later grain's thread ends with noise.
        self.close = weakref.finalize(self, _close, self._iterators)

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._iterators[0])

    def get_state(self) -> dict[str, Any]:
        """State after the last batch handed out, whatever was made ahead."""
        return self._iterators[0].get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a state of `get_state`, of any number of processes; see `PackedIterator.set_state`."""
        self._iterators[0].set_state(state)


def _close(iterators: list[Any]) -> None:
    while iterators:
        iterators.pop().close()


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: trains a tokenizer, prepares a token set."""
    parser = argparse.ArgumentParser(prog="python -m fot_jax.data", description="Prepares text for training.")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train-tokenizer", help="train a SentencePiece model with LLaMA's conventions")
    train.add_argument("--output", required=True, help="the .model file to write")
    train.add_argument("--vocab_size", type=int, required=True)
    make = commands.add_parser("prepare", help="tokenise documents into a folder that training reads")
    make.add_argument("--tokenizer", required=True, help="SentencePiece model, tokenizer.json, or directory")
    make.add_argument("--output", required=True, help="folder in which the prepared set gets a folder of its own")
    make.add_argument("--skip_short", action="store_true", help="leave out documents of fewer than two tokens")
    for command in (train, make):
        command.add_argument("source", nargs="+", help=".txt, .jsonl, .parquet, folder; tfds:NAME:SPLIT; python:train")
        command.add_argument("--field", default="text", help="field or column that holds the text")
    args = parser.parse_args(argv)
    try:
        if args.command == "train-tokenizer":
            corpus = open_corpus(*args.source, field=args.field)
            train_tokenizer((d.text for d in corpus.documents()), args.output, args.vocab_size)
            print(args.output)
        else:
            tokenizer = Tokenizer.load(args.tokenizer)
            corpus = open_corpus(*args.source, field=args.field)
            done = prepare(corpus, tokenizer, args.output, skip_short=args.skip_short)
            print(
                f"{done.path}: {len(done)} documents, {done.lengths.sum(dtype=np.int64)} tokens, {done.skipped} skipped"
            )
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
