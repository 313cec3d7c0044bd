"""Files of questions with their answers: TREC's, WebQuestions', and JSON lines.

TREC (Li and Roth, 2002; `train_5500.label`, `TREC_10.label`): a line a question, `COARSE:fine question`, in which one
byte is not ASCII (read as a blank, as datasets/trec of huggingface/datasets does). WebQuestions (Berant et al., 2013;
`webquestions.examples.{train,test}.json`): a list of objects, whose `targetValue` is a list of descriptions in
parentheses. JSON lines: objects with `text` and `label`, or with `question` (or `text`) and `answers`. Files whose
names end in .bz2 are unpacked.
"""

from __future__ import annotations

import bz2
import json
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

FORMATS = ("trec", "webqs", "jsonl")

# TREC's coarse labels: the word of Hao et al. (2022; microsoft/LMOps, structured_prompting), who have no fine ones; the
# word of Ratner et al. (2022; AI21Labs/Parallel-Context-Windows), whose fine labels are that word and a second; and the
# fine labels, with that second word where it is another.
_TREC = dict(
    ABBR=("Expression", "abbreviation", "abb=abbreviation exp=expansion"),
    DESC=("Description", "description", "def=definition desc=description manner reason"),
    ENTY=(
        "Entity",
        "entity",
        "animal body color cremat=creation currency dismed=disease event food instru=instrument lang=language letter "
        "other plant product religion sport substance symbol techmeth=technique termeq=term veh=vehicle word",
    ),
    HUM=("Person", "human", "gr=group ind=individual title desc=description"),
    LOC=("Location", "location", "city country mount=mountain other state"),
    NUM=(
        "Number",
        "numeric",
        "code count date dist=distance money ord=order other period perc=percent speed temp=temperature volsize=size "
        "weight",
    ),
)
_PAIRS = {
    f"{coarse}:{fine.partition('=')[0]}": (word, f"{first} {fine.rpartition('=')[2]}")
    for coarse, (word, first, fines) in _TREC.items()
    for fine in fines.split()
}
COARSE = {label: coarse for label, (coarse, _) in _PAIRS.items()}  # TREC's labels, as in its files, and their words
FINE = {label: fine for label, (_, fine) in _PAIRS.items()}


class Example(NamedTuple):
    """A question.

    Attributes:
        text: what is asked, or to be classified.
        answers: those that are right, at least one; of a text with a label that alone.
        line: where it begins in its file, counted from 1.
    """

    text: str
    answers: tuple[str, ...]
    line: int


class Examples(NamedTuple):
    """A file of questions.

    Attributes:
        path: the file's.
        labelled: whether answers are labels, one of a few.
        examples: at least one.
    """

    path: str
    labelled: bool
    examples: list[Example]


def read(path: str | os.PathLike, format: str, labels: str = "coarse") -> Examples:
    """The questions in a file.

    Args:
        format: "trec", "webqs" or "jsonl".
        labels: "coarse" or "fine", which of TREC's; other formats have one kind.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another format, with the file, the line, what was found there and what was wanted.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; wanted examples of format {format!r}")
    data = path.read_bytes()
    if path.suffix == ".bz2":
        try:
            data = bz2.decompress(data)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: not a whole bz2 file ({error})") from error
    if not data.strip():
        raise ValueError(f"{path} is empty; wanted examples of format {format!r}")
    if format == "trec":
        return Examples(str(path), True, list(_trec(path, data, labels)))
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: byte {data[error.start]:#04x} is not UTF-8") from error
    if format == "webqs":
        return Examples(str(path), False, list(_webqs(path, text)))
    return _jsonl(path, text)


def _trec(path: pathlib.Path, data: bytes, labels: str) -> Iterator[Example]:
    """TREC's questions, each with the word for its label."""
    words = COARSE if labels == "coarse" else FINE
    for number, row in enumerate(data.replace(b"\xf0", b" ").decode("latin-1").split("\n"), 1):
        if not row.strip():
            continue
        label, _, text = row.strip().partition(" ")
        if label not in words:
            coarse = label.partition(":")[0]
            near = [other for other in words if other.startswith(f"{coarse}:")] or [f"{name}:..." for name in _TREC]
            raise ValueError(
                f"{path}, line {number}: the label is {label[:40]!r}; wanted a line 'LABEL question' with one of "
                f"{', '.join(near)}"
            )
        if not text.strip():
            raise ValueError(f"{path}, line {number}: {row.strip()!r} has no question after the label")
        yield Example(text.strip(), (words[label],), number)


def _webqs(path: pathlib.Path, text: str) -> Iterator[Example]:
    """WebQuestions' questions."""
    wanted = "a list of objects with utterance and targetValue"
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: {error.msg}, no JSON; wanted {wanted}") from error
    if not isinstance(items, list) or not items:
        found = "an empty list" if items == [] else f"{_kind(items)} and no list"
        raise ValueError(f"{path}, line 1: {found}; wanted {wanted}")
    for item, line in zip(items, _lines(text), strict=True):
        keys = ("utterance", "targetValue")
        if not isinstance(item, dict) or not all(isinstance(item.get(key), str) for key in keys):
            raise ValueError(f"{path}, line {line}: {_described(item)}; wanted utterance and targetValue, both texts")
        try:
            answers = _descriptions(item["targetValue"])
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: targetValue {error}") from error
        yield Example(item["utterance"].strip(), answers, line)


def _lines(text: str) -> Iterator[int]:
    """The lines on which the items of a JSON list begin."""
    decode, between = json.JSONDecoder().raw_decode, re.compile(r"[\s,]*")
    at, line, before = text.index("[") + 1, 1, 0
    while text[at := between.match(text, at).end()] != "]":
        line, before = line + text.count("\n", before, at), at
        yield line
        _, at = decode(text, at)


_TOKEN = re.compile(r'\s*(?:([()])|"((?:[^"\\]|\\.)*)"|([^\s()"]+))')


def _descriptions(value: str) -> tuple[str, ...]:
    """The answers in `(list (description "Jazmyn Bieber") (description Stay))`; a single word may have no quotes.

    Raises:
        ValueError: another form.
    """
    tokens, at = [], 0
    value = value.rstrip()
    while at < len(value):
        found = _TOKEN.match(value, at)
        if found is None:
            raise ValueError(f"is {value!r}, not understood from {value[at : at + 20]!r} on")
        at, (mark, quoted, word) = found.end(), found.groups()
        # (whether it is a mark or a word, text)
        tokens.append((mark, "") if mark else ("word", word if quoted is None else re.sub(r"\\(.)", r"\1", quoted)))
    form, answers = "".join({"word": "w"}.get(kind, kind) for kind, _ in tokens), []
    if re.fullmatch(r"\(w(\(ww+\))+\)", form) and tokens[1][1] == "list":
        for start, end in (found.span() for found in re.finditer(r"\(ww+\)", form)):
            words = [text for _, text in tokens[start + 1 : end - 1]]
            answers += [" ".join(words[1:])] if words[0] == "description" else []
    if not answers or len(answers) != form.count("(") - 1:
        raise ValueError(f"is {value!r}; wanted '(list (description \"...\") ...)', with one description or more")
    return tuple(answers)


def _jsonl(path: pathlib.Path, text: str) -> Examples:
    """Texts with labels, or questions with answers."""
    wanted = "text and label, or question (or text) and answers, a list"
    labelled, examples = None, []
    for number, row in enumerate(text.split("\n"), 1):
        if not row.strip():
            continue
        try:
            item = json.loads(row)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number}: {row[:40]!r} is no JSON ({error.msg}); wanted an object with {wanted}"
            ) from error
        keys = item.keys() if isinstance(item, dict) else set()
        question = item["question"] if "question" in keys else item["text"] if "text" in keys else None
        given = [item["label"]] if "label" in keys else item["answers"] if "answers" in keys else None
        texts = isinstance(question, str) and question.strip()
        if not texts or {"label", "answers"} <= keys or not isinstance(given, list):
            raise ValueError(f"{path}, line {number}: {_described(item)}; wanted an object with {wanted}")
        if not given or not all(isinstance(answer, str) and answer.strip() for answer in given):
            name = "label" if "label" in keys else "answers"
            raise ValueError(f"{path}, line {number}: {name} is {item[name]!r}; wanted text, not empty")
        if labelled is not None and labelled != ("label" in keys):
            raise ValueError(f"{path}, line {number}: {_described(item)}; wanted the same keys as in the lines before")
        labelled = "label" in keys
        examples.append(Example(question.strip(), tuple(answer.strip() for answer in given), number))
    return Examples(str(path), labelled, examples)


def _kind(item: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", type(None): "null", bool: "true or false"}
    return kinds.get(type(item), "a number")


def _described(item: Any) -> str:
    """What a JSON value is, by its keys."""
    return f"an object with keys {', '.join(item) or 'none'}" if isinstance(item, dict) else _kind(item)
