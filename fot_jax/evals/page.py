"""A page that shows where in a document tokens retrieve, in one HTML file without scripts; and the text of tokens.

The document is shown with the retrieved places marked, stronger with a greater kNN score, and the tokens that were
looked at framed. Choosing one of those, by its text or in the list, leaves its own places marked and its own table;
style sheets alone do that, and a browser that cannot shows all of them. What is far from any mark is folded.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fot_jax.generate.text import REPLACEMENT, TextStream
from fot_jax.tokenizer import Tokenizer

MARGIN = 60  # tokens shown on either side of a mark, and as many more up to a line's end
FOLDED = 16384  # tokens of a fold, at most
ROWS = 8  # of a table before the rest is folded
CONTEXT = 24  # characters on either side of a token in tables

# Control characters in signs of their own; as U+FFFD later ones, those that turn text round, and lone surrogates, which
# no file can hold.
_CONTROLS = {i: 0x2400 + i for i in range(32) if chr(i) not in "\n\t\r"} | {0x7F: 0x2421}
_TURNING = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_CONTROLS |= dict.fromkeys([*range(0x80, 0xA0), *_TURNING, *range(0xD800, 0xE000)], "\ufffd")
_LINE = {**_CONTROLS, ord("\n"): "⏎", ord("\t"): "→", ord("\r"): "␍"}


def pieces(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray) -> list[str]:
    """The text of each token, which together are the text of all: of a character in several tokens the last has all,
    the others nothing; BOS and its like have nothing.
    """
    ids, text = [int(i) for i in ids], tokenizer.decode(ids)
    found = _by_token(tokenizer, ids)
    if "".join(found) == text:
        return found
    # A tokenizer whose tokens have other texts after others.
    ends = np.minimum(np.cumsum([0, *map(len, _streamed(tokenizer, [], ids))]), len(text))
    ends[-1] = len(text)
    return [text[a:b] for a, b in zip(ends[:-1], ends[1:])]


def _streamed(tokenizer: Tokenizer, before: Sequence[int], ids: Sequence[int]) -> list[str]:
    """What text comes with each token."""
    stream = TextStream(tokenizer, before)
    out = [stream.push([i]) for i in ids]
    return [*out[:-1], out[-1] + stream.finish()] if out else out


def _by_token(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Texts of tokens that are the same after any text; of parts of characters those of the parts together."""
    letter = [int(i) for i in tokenizer.encode("a")[-1:]]
    known = len(tokenizer.decode(letter))
    alone = {i: tokenizer.decode([*letter, i])[known:] for i in set(ids)}
    first = next((n for n, i in enumerate(ids) if alone[i]), len(ids))  # whose space a tokenizer may take away
    out, run = _streamed(tokenizer, [], ids[: first + 1]), []
    for i in [*ids[first + 1 :], None]:
        if i is not None and REPLACEMENT in alone[i]:
            run.append(i)
            continue
        if run:
            out += _streamed(tokenizer, letter, run)
            run = []
        out += [] if i is None else [alone[i]]
    return out


def signs(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray, pieces: Sequence[str]) -> dict[int, str]:
    """What tokens without a text are called, by position: ‹bos›, or ‹1/3 of €› for the first byte of three."""
    out: dict[int, str] = {}
    special = {tokenizer.eos_id: "‹eos›", tokenizer.bos_id: "‹bos›"}
    run: list[int] = []
    for i, piece in enumerate(pieces):
        if not piece and not tokenizer.decode([ids[i]]):
            out[i] = special.get(int(ids[i]), f"‹token {int(ids[i])}›")
        elif not piece:
            run.append(i)
        else:
            out |= {j: f"‹{n}/{len(run) + 1} of {piece[:1]}›" for n, j in enumerate(run, 1)}
            run = []
    return out


class Place(NamedTuple):
    """A token between its neighbours, in one line: line ends, tabs and the like are signs.

    Attributes:
        before, token, after: `CONTEXT` characters, if there are as many, the token, as many again.
    """

    before: str
    token: str
    after: str

    def line(self) -> str:
        """With the token in brackets, at the same column for every token."""
        return f"{self.before:>{CONTEXT}}⟦{self.token}⟧{self.after:<{CONTEXT}}"


class Text(NamedTuple):
    """A document's tokens as text; see `pieces` and `signs`."""

    pieces: Sequence[str]
    signs: Mapping[int, str]

    def name(self, i: int) -> str:
        """A token as it is shown where it must be seen: blanks and what has no text as signs."""
        piece = self.pieces[i]
        if piece and not piece.strip(" "):
            return "␣" * len(piece) if len(piece) < 4 else f"␣×{len(piece)}"
        return (piece or self.signs.get(i, "‹›")).translate(_LINE)

    def place(self, i: int) -> Place:
        """A token between its neighbours."""
        near = CONTEXT + 8  # every token has a character, as good as
        line = lambda parts: re.sub("(⏎ ?)+", "⏎", re.sub(" +", " ", "".join(parts).translate(_LINE)))
        before, after = line(self.pieces[max(i - near, 0) : i]), line(self.pieces[i + 1 : i + 1 + near])
        return Place(before[-CONTEXT:], self.name(i), after[:CONTEXT])


def page(title: str, facts: Mapping[str, str], text: Text, looked: Sequence[Mapping[str, Any]]) -> str:
    """The page.

    Args:
        title: its heading.
        facts: what it says of the reading, by name.
        text: of the document.
        looked: tokens that were looked at, by position, each with `position`, `memory` (tokens held), `places`
            (`position`, `knn`, `layer`, `head`, `focus`, `knn_mean`; best first) and `heads` (`layer`, `head` and
            lists `positions`, `knn`, `focus`; best first).
    """
    n = len(looked)
    rules = "".join(
        f"body:has(#q{i}:checked) .text mark{{--w:var(--k{i},0)}}"
        f"body:has(#q{i}:checked) .card:not(#c{i}){{display:none}}"
        f"body:has(#q{i}:checked) #t{i}{{background:var(--at);color:var(--paper)}}\n"
        for i in range(n)
    )
    said = "".join(f"<div><dt>{_escaped(name)}</dt><dd>{_escaped(fact)}</dd></div>" for name, fact in facts.items())
    legend = " ".join(
        f'<mark style="--a:{share**0.5:.3f}">&nbsp;{share:g}&nbsp;</mark>' for share in (0.01, 0.1, 0.3, 1)
    )
    choice = '<label><input type="radio" name="q" id="all" checked> <span>all of them</span></label>' + "".join(
        f'<label><input type="radio" name="q" id="q{i}"> <b>{one["position"]:,}</b> '
        f"{_place(text, one['position'])}</label>"
        for i, one in enumerate(looked)
    )
    mono = " checked" if _is_code("".join(text.pieces)) else ""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_escaped(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark">\n<style>{_STYLE}{rules}</style></head>\n<body>\n'
        f"<header><h1>{_escaped(title)}</h1><dl>{said}</dl>\n"
        f"<p>Marked is where the chosen tokens retrieve, by the greatest kNN score of a head: "
        f'<span class="legend">{legend}</span>. '
        '<span class="at">Framed</span> are the tokens that were looked at; choose one to see its places alone. '
        "Point at a mark for its scores.</p></header>\n"
        f'<main>\n<section class="side"><h2>Tokens</h2><div class="choice">{choice}</div>\n'
        + "\n".join(_card(i, one, text) for i, one in enumerate(looked))
        + '</section>\n<article><h2>Document <label class="mono"><input type="checkbox" id="mono"'
        f"{mono}> monospaced</label></h2>\n"
        + "\n".join(_document(text, looked))
        + "\n</article>\n</main>\n</body></html>\n"
    )


def _escaped(text: str) -> str:
    """Text for HTML, between tags or in a quoted attribute."""
    return html.escape(text.translate(_CONTROLS), quote=True).replace("\r", "&#13;")


def _place(text: Text, i: int) -> str:
    before, token, after = map(_escaped, text.place(i))
    return f'<span class="place"><span>{before}</span><b>{token}</b><span>{after}</span></span>'


def _is_code(text: str) -> bool:
    """Whether lines are indented as a program's, so that their columns matter."""
    lines = [line for line in text[:100_000].splitlines() if line.strip()]
    return sum(line[:1] in " \t" for line in lines) > 0.2 * len(lines)


def _card(i: int, one: Mapping[str, Any], text: Text) -> str:
    """What a token retrieves: its places, and the best of each head."""
    score = lambda x: f'<td class="score" style="--v:{x:.4f}">{x:.3f}</td>'
    head = lambda each: f"<td>{each['layer']}.{each['head']}</td>"
    at = lambda position: f'<td><a href="#p{position}">{position:,}</a></td><td>{_place(text, position)}</td>'
    places = [
        f"<tr>{at(each['position'])}{head(each)}{score(each['knn'])}{score(each['focus'])}{score(each['knn_mean'])}</tr>"
        for each in one["places"]
    ]
    heads = [
        f"<tr>{at(each['positions'][0])}{head(each)}{score(each['knn'][0])}{score(each['focus'][0])}</tr>"
        for each in one["heads"]
    ]
    of_places = "position|text|<abbr title='layer.head of the greatest kNN score'>head</abbr>|kNN|focus|mean kNN"
    of_heads = "position|text|head|kNN|focus"
    more = f"<summary>places of lower scores: {len(places) - ROWS}</summary>{_table(of_places, places[ROWS:])}"
    return (
        f'<section class="card" id="c{i}"><h3><a href="#t{i}">{one["position"]:,}</a> '
        f"{_place(text, one['position'])}</h3>"
        f"<p>{one['memory']:,} tokens in memory, {one['position'] - one['memory']:,} before it in the window</p>"
        f"{_table(of_places, places[:ROWS])}{f'<details>{more}</details>' if len(places) > ROWS else ''}"
        f"<details><summary>the best of each head</summary>{_table(of_heads, heads)}</details></section>"
    )


def _table(names: str, rows: Iterable[str]) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in names.split("|"))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _document(text: Text, looked: Sequence[Mapping[str, Any]]) -> list[str]:
    """The document in blocks, those without a mark folded."""
    tokens = {one["position"]: i for i, one in enumerate(looked)}
    found: dict[int, list[tuple[int, Mapping[str, Any]]]] = {}
    for i, one in enumerate(looked):
        for place in one["places"]:
            found.setdefault(place["position"], []).append((i, {**place, "by": one["position"]}))
    out, n = [], len(text.pieces)
    for first, end, shown in _blocks(text.pieces, sorted({*tokens, *found})):
        if shown:
            out.append(f'<div class="text">{_marked(text, first, end, tokens, found)}</div>')
            continue
        for start in range(first, end, FOLDED):
            stop = min(start + FOLDED, end)
            inside = _escaped("".join(text.pieces[start:stop]))
            what = f"{stop - start:,} tokens, {start:,} to {stop - 1:,} of {n:,}"
            out.append(f'<details class="fold"><summary>{what}</summary><div class="text">{inside}</div></details>')
    return out


def _blocks(pieces: Sequence[str], marks: Sequence[int]) -> list[tuple[int, int, bool]]:
    """(first, end, whether shown) of blocks of tokens that follow one another: shown are those round marks, from the
    start of a line to the end of one where there is one near.
    """
    n, shown = len(pieces), []
    for mark in marks:
        first, end = max(mark - MARGIN, 0), min(mark + MARGIN + 1, n)
        first = next((i for i in range(first, max(first - MARGIN, 0), -1) if pieces[i - 1].endswith("\n")), first)
        end = next((i for i in range(end, min(end + MARGIN, n)) if pieces[i - 1].endswith("\n")), end)
        first, end = (first if first >= MARGIN else 0), (end if n - end >= MARGIN else n)
        if shown and first <= shown[-1][1] + MARGIN:  # a fold is a line itself
            shown[-1][1] = max(end, shown[-1][1])
        else:
            shown.append([first, end])
    edges = [0, *(edge for block in shown for edge in block), n]
    return [(a, b, i % 2 == 1) for i, (a, b) in enumerate(zip(edges[:-1], edges[1:], strict=True)) if a < b]


def _marked(
    text: Text,
    first: int,
    end: int,
    tokens: Mapping[int, int],
    found: Mapping[int, Sequence[tuple[int, Mapping[str, Any]]]],
) -> str:
    """Tokens first .. end, with marks."""
    out, plain = [], first
    for i in range(first, end):
        if i not in tokens and i not in found:
            continue
        piece = text.pieces[i]
        body = piece.lstrip(" ") or piece  # a word's space is not marked
        out.append(_escaped("".join(text.pieces[plain:i]) + piece[: len(piece) - len(body)]))
        # Line ends, and tokens without a text, have a sign that is no part of the text.
        sign = "" if body.strip("\n\r") else f' data-sign="{_escaped(text.name(i))}"'
        inner = _escaped(body)
        if i in tokens:
            q = tokens[i]
            inner = f'<label class="at" for="q{q}" id="t{q}"{sign} title="token {i:,}">{inner}</label>'
            sign = ""
        if i in found:
            best = max(place["knn"] for _, place in found[i])
            style = "".join(f";--k{q}:{place['knn'] ** 0.5:.3f}" for q, place in found[i])
            said = sorted(found[i], key=lambda each: -each[1]["knn"])
            lines = [f"token {i:,} is retrieved"] + [
                f"{place['knn']:.3f} kNN, {place['focus']:.3f} focus: by {place['by']:,}, "
                f"layer {place['layer']}, head {place['head']}"
                for _, place in said[:ROWS]
            ]
            lines += [f"and by {len(said) - ROWS} more"] if len(said) > ROWS else []
            inner = (
                f'<mark id="p{i}" style="--a:{best**0.5:.3f}{style}"{sign} title="{"&#10;".join(lines)}">{inner}</mark>'
            )
        out.append(inner)
        plain = i + 1
    return "".join([*out, _escaped("".join(text.pieces[plain:end]))])


_STYLE = """
:root{color-scheme:light dark;--ink:#211f1c;--paper:#fbfaf7;--soft:#6a645b;--rule:#dcd7cc;--panel:#f2efe8;
 --hit:250 166 26;--at:#1a56b0;--at-paper:#dfeafb}
@media (prefers-color-scheme:dark){:root{--ink:#e8e4dc;--paper:#181715;--soft:#a69f93;--rule:#3d3a34;--panel:#211f1c;
 --hit:184 96 0;--at:#93bcff;--at-paper:#1b2c48}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:92rem;padding:1.5rem;background:var(--paper);color:var(--ink);
 font:1rem/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif}
h1{font-size:1.5rem;line-height:1.25;margin:0 0 .75rem;overflow-wrap:anywhere}
h2{font-size:1.05rem;margin:0 0 .5rem}
h3{font-size:1rem;margin:0}
a{color:var(--at)}
dl{display:flex;flex-wrap:wrap;gap:.25rem 2rem;margin:0 0 .75rem;font-size:.9rem}
dl div{display:flex;gap:.5ch}
dt{color:var(--soft)}
dd{margin:0;overflow-wrap:anywhere}
header p{max-width:75ch;margin:0 0 1.25rem}
main{display:grid;gap:1.5rem 2.5rem;grid-template-columns:minmax(0,1fr)}
@media (min-width:64rem){main{grid-template-columns:minmax(0,1fr) minmax(0,1fr)}article{grid-column:1;grid-row:1}
 .side{grid-column:2;grid-row:1;position:sticky;top:0;max-height:100vh;overflow-y:auto;padding:1rem 1rem 2rem;
 background:var(--panel);border-radius:.5rem;align-self:start}article{padding-top:1rem}}
.choice{max-height:13rem;overflow-y:auto;border:1px solid var(--rule);border-radius:.375rem;background:var(--paper)}
.choice label{display:flex;gap:.75ch;align-items:baseline;padding:.2rem .6rem;cursor:pointer}
.choice label:hover{background:var(--at-paper)}
.choice label:has(:checked){background:var(--at-paper)}
.choice label>b{min-width:7ch;text-align:right;font-variant-numeric:tabular-nums;font-weight:500}
.place{font:.8125rem/1.5 ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace;white-space:pre;
 unicode-bidi:isolate;color:var(--soft);overflow:hidden}
td .place,.choice .place{display:grid;grid-template-columns:minmax(0,1fr) auto minmax(0,1fr);flex:1}
.place span{overflow:hidden}
td .place span:first-child,.choice .place span:first-child{display:flex;justify-content:flex-end}
.place b{color:var(--ink);font-weight:600;box-shadow:inset 0 -2px var(--ink)}
.card{margin-top:1.25rem;padding-top:1rem;border-top:1px solid var(--rule)}
.card p{margin:.1rem 0 .5rem;color:var(--soft);font-size:.875rem}
table{border-collapse:collapse;width:100%;font-size:.875rem;font-variant-numeric:tabular-nums}
th{font-weight:500;color:var(--soft);text-align:right;padding:.2rem 0 .2rem .75rem;border-bottom:1px solid var(--rule);
 vertical-align:bottom}
.legend{white-space:nowrap}
td{text-align:right;padding:.2rem 0 .25rem .75rem;border-bottom:1px solid var(--rule);vertical-align:top}
th:first-child,td:first-child{padding-left:0}
th:nth-child(2),td:nth-child(2){width:99%;max-width:0}
th:nth-child(2){text-align:center}
abbr{text-decoration:none;border-bottom:1px dotted}
.score{min-width:3.5rem;background:linear-gradient(rgb(var(--hit)),rgb(var(--hit))) right bottom/
 calc(var(--v)*(100% - .75rem)) 3px no-repeat}
summary{cursor:pointer;color:var(--soft);font-size:.875rem;padding:.3rem 0}
summary:hover{color:var(--ink)}
.text{white-space:pre-wrap;overflow-wrap:anywhere;tab-size:4;unicode-bidi:plaintext;max-width:72ch;
 font:1.0625rem/1.6 Charter,"Bitstream Charter",Georgia,Cambria,"Liberation Serif",serif}
body:has(#mono:checked) .text{max-width:92ch;
 font:.875rem/1.6 ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace}
.mono{font-size:.875rem;font-weight:400;color:var(--soft);margin-left:1.5ch;cursor:pointer}
.fold{margin:.5rem 0;border:solid var(--rule);border-width:1px 0}
.fold[open]>summary{border-bottom:1px solid var(--rule)}
mark{--w:var(--a,0);color:inherit;border-radius:.15em;scroll-margin-block:30vh;
 background:rgb(var(--hit)/calc(min(1,var(--w)*999)*(.12 + .88*var(--w))))}
mark:target{outline:2px solid var(--ink);outline-offset:1px}
.at{color:var(--at);background:var(--at-paper);border-radius:.15em;box-shadow:0 0 0 1.5px var(--at);
 scroll-margin-block:30vh}
label.at{cursor:pointer}
[data-sign]::before{content:attr(data-sign);font-size:.85em;opacity:.75}
"""
