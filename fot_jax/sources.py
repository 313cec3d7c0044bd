"""Where documents come from: files and folders, TFDS sets by name, Python's own library.

A `Corpus` is texts that can be read from the start as often as wanted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import pathlib
import re
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import tensorflow_datasets as tfds


class Document(NamedTuple):
    """A text and its name within its source."""

    id: str
    text: str


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents that can be read from the start as often as wanted.

    Attributes:
        name: letters, digits, `_`, `-`; opens the name of the prepared folder.
        fingerprint: changes when the documents may have changed.
        documents: called, gives an iterator over them.
    """

    name: str
    fingerprint: str
    documents: Callable[[], Iterator[Document]]


def hash_of(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def corpus_of_documents(documents: Sequence[Document], name: str) -> Corpus:
    """A corpus of documents in memory."""
    digest = hashlib.sha256()
    for document in documents:
        for part in document:
            digest.update(hashlib.sha256(part.encode()).digest())
    return Corpus(name, digest.hexdigest()[:16], lambda: iter(documents))


def corpus_of_files(paths: Sequence[str | os.PathLike], *, field: str = "text", name: str | None = None) -> Corpus:
    """A corpus of `.txt` (one document a file), `.jsonl` and `.parquet` (one a row) files, or folders of such.

    The fingerprint is of the files' names, sizes and times of change.

    Args:
        paths: files and folders; folders are searched with all their subfolders, in order of path.
        field: of a JSON object or a table that holds the text.
        name: of the corpus; by default that of the first path.

    Raises:
        FileNotFoundError: a path that is not there.
        ImportError: a `.parquet` file without pyarrow.
        ValueError: an empty or other kind of file, a folder with none of the three kinds. While reading: invalid UTF-8,
            a malformed line, a missing field, each with file and place.
    """
    files: list[tuple[str, pathlib.Path]] = []
    for path in map(pathlib.Path, paths):
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix in _READERS and p.is_file())
            files += [(p.relative_to(path).as_posix(), p) for p in found]
            if not found:
                raise ValueError(f"{path}: no {', '.join(_READERS)} file in this folder")
        elif not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        elif path.suffix not in _READERS:
            raise ValueError(f"{path}: a {path.suffix or 'nameless'} file; wanted one of {', '.join(_READERS)}")
        else:
            files.append((path.name, path))
    if not files:
        raise ValueError("no files given")
    stats = []
    for file_name, path in files:
        if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
            raise ImportError(f"{path}: reading parquet files needs pyarrow; pip install pyarrow")
        with open(path, "rb") as file:  # so that a file without permission to read is found now
            stat = os.fstat(file.fileno())
        if not stat.st_size:
            raise ValueError(f"{path}: empty file")
        stats.append((file_name, stat.st_size, stat.st_mtime_ns))

    def documents() -> Iterator[Document]:
        for file_name, path in files:
            yield from _READERS[path.suffix](path, file_name, field)

    name = re.sub(r"[^\w-]+", "_", name or pathlib.Path(paths[0]).resolve().stem)
    return Corpus(name, hash_of(stats, field), documents)


def _utf8(data: bytes, path: pathlib.Path, start: int = 0) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: invalid UTF-8 at byte {start + error.start} ({error.reason})") from error


def _text_field(record: Any, field: str, place: str) -> str:
    if not isinstance(record, dict) or field not in record:
        found = ", ".join(map(repr, record)) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{place}: no field {field!r}; found {found}")
    if not isinstance(record[field], str):
        raise ValueError(f"{place}: field {field!r} is a {type(record[field]).__name__}; wanted a text")
    try:
        record[field].encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise ValueError(
            f"{place}: field {field!r} has no UTF-8 at character {error.start} ({error.reason})"
        ) from error
    return record[field]


def _read_txt(path: pathlib.Path, name: str, field: str) -> Iterator[Document]:
    del field
    yield Document(name, _utf8(path.read_bytes(), path))


def _read_jsonl(path: pathlib.Path, name: str, field: str) -> Iterator[Document]:
    start = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            text = _utf8(line, path, start)
            start += len(line)
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not JSON ({error})") from error
            text = _text_field(record, field, f"{path}:{number}")
            yield Document(str(record.get("id", f"{name}:{number}")), text)


def _read_parquet(path: pathlib.Path, name: str, field: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a parquet file ({error})") from error
    if field not in table.schema_arrow.names:
        raise ValueError(f"{path}: no column {field!r}; found {', '.join(map(repr, table.schema_arrow.names))}")
    number = 0
    batches = table.iter_batches(batch_size=256, columns=[field])
    while True:
        try:
            batch = next(batches, None)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path}, after row {number}: damaged ({error})") from error
        if batch is None:
            return
        for value in batch.column(0):
            number += 1
            place = f"{path}, row {number}"
            try:
                text = value.as_py()
            except UnicodeDecodeError as error:
                raise ValueError(f"{place}: invalid UTF-8 at byte {error.start} ({error.reason})") from error
            yield Document(f"{name}:{number}", _text_field({field: text}, field, place))


_READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def corpus_of_tfds(name: str, split: str = "train", *, field: str = "text", data_dir: str | None = None) -> Corpus:
    """A corpus of one split of a TFDS set, made into ArrayRecord files first where it is not there yet.

    Args:
        name: as `tfds.builder` takes it, `set/config:version`.
        split: as TFDS takes it, slices too: `train[:1%]`.
        field: feature that holds the text.
        data_dir: TFDS's folder; its default if None.

    Raises:
        ValueError: the set has no such text feature.
    """
    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    if not isinstance(dict(builder.info.features).get(field), tfds.features.Text):
        found = ", ".join(map(repr, builder.info.features))
        raise ValueError(f"TFDS set {name}: no text feature {field!r}; found {found}")
    builder.download_and_prepare(file_format="array_record")
    source = builder.as_data_source(split)

    def documents() -> Iterator[Document]:
        for i in range(len(source)):
            yield Document(f"{split}:{i}", source[i][field].decode())

    key = hash_of(builder.info.full_name, split, field, len(source), builder.info.dataset_size)
    return Corpus(re.sub(r"[^\w-]+", "_", f"{name}_{split}"), key, documents)


def open_corpus(*sources: str | os.PathLike, field: str = "text") -> Corpus:
    """The corpus that a command line or a config names.

    Args:
        sources: files and folders; or one of `python:train`, `python:validation` (Python's own library, see
            `python_library_documents`), `tfds:NAME:SPLIT`.
        field: that holds the text, where documents have fields.
    """
    kind, _, rest = str(sources[0]).partition(":") if sources else ("", "", "")
    if kind not in ("python", "tfds"):
        return corpus_of_files(sources, field=field)
    if len(sources) > 1:
        raise ValueError(f"{sources[0]} is a source by itself; found {len(sources)} sources")
    if kind == "python":
        return corpus_of_documents(python_library_documents(rest), f"python_{rest}")
    name, _, split = rest.rpartition(":")
    return corpus_of_tfds(name or rest, split if name else "train", field=field)


# Tables and generated files: long, repetitive, not written by anyone.
_NOT_PROSE = re.compile(r"^(encodings|pydoc_data|_sysconfigdata.*|config-.*|lib-dynload|__pycache__|_vendor|_bundled)$")
_TESTS = re.compile(r"^(test|tests|idle_test)$")
_INSTALLED = re.compile(r"^(site-packages|dist-packages)$")


def python_library_documents(
    split: str | None = None,
    *,
    roots: Sequence[str | os.PathLike] = (),
    packages: Iterable[str] | None = None,
    tests: bool = False,
    min_chars: int = 4096,
    max_chars: int = 1_000_000,
    validation_share: float = 0.1,
) -> list[Document]:
    """Python source as long documents: the files of one package, in order of their paths, are one document.

    Before each file stands a line `# path`. Which split a package is in depends on its name alone, tests with what they
    test. Files seen before, tables and generated code are left out.

    Args:
        split: 'train', 'validation' or None for both.
        roots: folders whose modules and packages are taken; by default the running Python's standard library.
        packages: only these (top-level names).
        tests: whether test packages are taken too; those of the standard library are one document a test module.
        min_chars: smaller packages are left out.
        max_chars: larger packages are cut, between files, into documents of at most this size (if no file exceeds it).
        validation_share: share of packages held out.

    Raises:
        ValueError: unknown split, or no document found.
        FileNotFoundError: a root that is not there.
    """
    if split not in ("train", "validation", None):
        raise ValueError(f"split is {split!r}; wanted 'train', 'validation' or None")
    folders = [pathlib.Path(root) for root in roots or (sysconfig.get_path("stdlib"),)]
    folders += [folder / "test" for folder in folders if tests and (folder / "test").is_dir()]
    wanted = None if packages is None else set(packages)
    documents, seen = [], set()
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder of Python source")
        for entry in sorted(folder.iterdir()):
            name = entry.name.removesuffix(".py")
            skip = _NOT_PROSE.match(name) or _INSTALLED.match(name) or _TESTS.match(name)
            if skip or (wanted is not None and name not in wanted):
                continue
            pieces = [""]
            for path in _python_files(entry, tests):
                text = _read_python(path)
                digest = hashlib.sha256(text.encode()).digest()
                if not text.strip() or digest in seen:
                    continue
                seen.add(digest)
                text = f"# {path.relative_to(folder).as_posix()}\n{text.rstrip()}\n\n"
                if pieces[-1] and len(pieces[-1]) + len(text) > max_chars:
                    pieces.append("")
                pieces[-1] += text
            if split is not None and _is_held_out(name, validation_share) != (split == "validation"):
                continue
            for i, piece in enumerate(pieces):
                if len(piece) >= min_chars:
                    documents.append(Document(f"{folder.name}/{name}" + f"#{i}" * (i > 0), piece))
    if not documents:
        raise ValueError(f"no Python package of {min_chars} characters found in {', '.join(map(str, folders))}")
    return documents


def _is_held_out(name: str, validation_share: float) -> bool:
    """Whether a package is for validation; `_pydecimal`, `test_decimal` and `decimal` go together."""
    stem = re.sub(r"^(test_)?_*(py)?", "", name) or name
    return int.from_bytes(hashlib.sha256(stem.encode()).digest()[:4], "big") / 2**32 < validation_share


def _python_files(entry: pathlib.Path, tests: bool) -> Iterable[pathlib.Path]:
    if entry.is_file():
        if entry.suffix == ".py":
            yield entry
    elif entry.is_dir():
        for path in sorted(entry.iterdir()):
            if not _NOT_PROSE.match(path.name.removesuffix(".py")) and (tests or not _TESTS.match(path.name)):
                yield from _python_files(path, tests)


def _read_python(path: pathlib.Path) -> str:
    """Text of a source file in the encoding it declares; nothing where it cannot be read as such."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError, OSError):
        return ""
