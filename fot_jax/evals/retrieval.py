"""What tokens of a document retrieve from memory, and how sharply (arXiv 2307.03170, appendix B.4 and table 7).

For a query of a head, which retrieves the k keys of memory that score highest with it,

    the *kNN score* of a key is its share of the attention that goes to the k keys: a softmax over these alone;
    its *focus score* is its share of a softmax over the key and the 32 before and the 32 after it in memory, fewer at
    the ends.

Scores are those that attention takes its softmax of: inner products of queries, rotated by their position in the window
where the layer rotates them, with the keys that memory stores, times K ** -0.5, or with the learned temperature of the
head (`model.score_scale`). The paper does not say of which head its table is; here all are reported, and places in the
document by the head that gives them the greatest kNN score.

Where a token is looked at does not depend on which others are: windows open every W - c tokens of the document, c the
`last_context_length` (at most W - 1), and a token is looked at in the last that has c tokens before it. The window is
what follows a prompt that left c tokens open; memory holds all before, read in windows of W as that prompt's would be.
So the first token that has anything in memory is token W.
"""

from __future__ import annotations

import functools
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from fot_jax import host
from fot_jax.config import ModelConfig
from fot_jax.evals import Report, page, plots, texts
from fot_jax.evals.journal import Journal, Part
from fot_jax.evals.subject import Subject, check_length, check_reading, described, reading_options
from fot_jax.generate import prefill
from fot_jax.generate.inspection import begun, surroundings
from fot_jax.tokenizer import Tokenizer, encode_prompt

LAST = 8  # tokens looked at where none are chosen
LOOKED = 1000  # most tokens looked at
BINS = 96  # of positions in the figure
NAMED = 30  # most tokens that the figure names


def default_options() -> ConfigDict:
    """Every option with its default."""
    options = reading_options()
    options.update(
        document=0,  # number of the document in data.sources
        text="",  # a text file to read instead, in UTF-8
        max_tokens=0,  # tokens taken of it, from its start; 0: all
        tokens=(),  # looked at: tokens at these positions, counted from 0
        find="",  # and the tokens of this text, where it occurs in the document
        occurrences=1,  # so many times, counted from the last; 0: wherever it does behind the first window
        last=0,  # and the last so many tokens; where none are chosen 8, fewer if memory has nothing for so many
        layers=(),  # memory layers; none: all
        heads=(),  # query heads; none: all
        k=32,  # keys that a query retrieves, in dense reading too, where it reads all others as well
        shown=5,  # keys of each head that are reported
        focus=32,  # keys on either side that a focus score is over
        rows=1,
    )
    return ConfigDict(options)


def check(config: ModelConfig, options: ConfigDict) -> None:
    """Refuses options that cannot be, before any long work.

    Raises:
        ValueError: an option out of range; a model without memory layers; a token within the first window.
    """
    if not config.mem_layers:
        raise ValueError(
            "the model has no memory layers (mem_layers is empty): nothing is retrieved; wanted one that has"
        )
    config = check_reading(config, options)
    if options.rows != 1:
        raise ValueError(f"rows is {options.rows}; wanted 1: one document is read")
    if options.document and options.text:
        raise ValueError(f"document is {options.document} and text {options.text}; wanted one of them")
    for name, least in dict(document=0, max_tokens=0, occurrences=0, last=0, k=1, shown=1, focus=0).items():
        if options[name] < least:
            raise ValueError(f"{name} is {options[name]}; wanted at least {least}")
    if options.shown > options.k:
        raise ValueError(f"shown is {options.shown}; wanted at most k, {options.k}")
    for name, there in dict(layers=config.mem_layers, heads=range(config.n_heads)).items():
        if wrong := [i for i in options[name] if i not in there]:
            raise ValueError(f"{name} has {wrong[0]}; wanted some of {', '.join(map(str, there))}")
    if other := [position for position in options.tokens if not isinstance(position, int)]:
        raise ValueError(f"tokens has {other[0]!r}; wanted positions in the document, whole numbers")
    if early := [position for position in options.tokens if position < config.window]:
        raise ValueError(
            f"tokens has position {early[0]}, within the first window of {config.window} tokens, before which memory "
            f"holds nothing; wanted {config.window} or more"
        )


def inputs(config: ConfigDict, model: ModelConfig, tokenizer: Tokenizer, folder: pathlib.Path) -> dict[str, Any]:
    """The document and the tokens of it that are to be looked at.

    Returns:
        `name`, `tokens` int32 [n], with BOS where the model expects one, `pieces` and `signs` (see `page`), and
        `looked`, the positions of those that are looked at, in order.

    Raises:
        FileNotFoundError: a text or a source that is not there.
        ValueError: a document or a token that is not there, a text that does not occur; a document longer than
            `capacity`, or no longer than a window; see `looked_at`.
    """
    options, W = config.options, check_reading(model, config.options).window
    name, text = _document(config)
    name = name.encode(errors="replace").decode()  # a file's may be no UTF-8
    tokens = encode_prompt(tokenizer, text)[: options.max_tokens or None]
    check_length(model, options, len(tokens), name)
    if len(tokens) <= W:
        raise ValueError(
            f"{name} has {len(tokens):,} tokens; wanted more than {W}, the first window's, before which memory holds "
            "nothing"
        )
    pieces = page.pieces(tokenizer, tokens)
    looked = looked_at(options, name, pieces, W)
    return dict(name=name, tokens=tokens, pieces=pieces, signs=page.signs(tokenizer, tokens, pieces), looked=looked)


def _document(config: ConfigDict) -> tuple[str, str]:
    """A document's name and its text."""
    options = config.options
    if options.text:
        path = pathlib.Path(options.text)
        if not path.is_file():
            raise FileNotFoundError(f"text is {path}: no such file")
        try:
            return path.name, path.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: invalid UTF-8 at byte {error.start} ({error.reason})") from error
    number = 0
    for document in itertools.chain.from_iterable(corpus.documents() for corpus in texts.corpora(config.data)):
        if number == options.document:
            return document.id, document.text
        number += 1
    raise ValueError(f"document is {options.document}; data.sources have {number}: wanted 0..{number - 1}")


def occurrences(pieces: Sequence[str], wanted: str) -> list[list[int]]:
    """The tokens of each occurrence of a text in that of all tokens, those that share only a part of it too; the
    occurrences do not overlap.
    """
    text, ends, out = "".join(pieces), np.cumsum([len(piece) for piece in pieces]), []
    at = text.find(wanted)
    while at >= 0:
        end = at + len(wanted)
        first, last = np.searchsorted(ends, at, "right"), np.searchsorted(ends, end, "left")
        while first and ends[first - 1] == at and not pieces[first - 1]:  # the first bytes of its first character
            first -= 1
        out.append(list(range(int(first), int(last) + 1)))
        at = text.find(wanted, end)
    return out


def looked_at(options: ConfigDict, name: str, pieces: Sequence[str], W: int) -> list[int]:
    """Positions of all tokens that are looked at, in order.

    Args:
        name, pieces: of a document of more than W tokens, a window.

    Raises:
        ValueError: a token that is not there, or has nothing in memory; a text that does not occur, or in the first
            window alone; more than `LOOKED` tokens.
    """
    n = len(pieces)
    if late := [position for position in options.tokens if position >= n]:
        raise ValueError(f"tokens has position {late[0]}; {name} has {n:,} tokens: wanted at most {n - 1}")
    if options.last > n - W:
        raise ValueError(
            f"last is {options.last}, of {n:,} tokens; wanted at most {n - W}: memory holds nothing before token {W}"
        )
    last = options.last or (0 if options.tokens or options.find else min(LAST, n - W))
    found = occurrences(pieces, options.find) if options.find else []
    if options.find and not found:
        raise ValueError(f"find is {options.find!r}; wanted a text that occurs in {name}")
    behind = [tokens for tokens in found if tokens[0] >= W]
    if found and not behind:
        raise ValueError(
            f"find is {options.find!r}, which occurs in {name} within the first window of {W} tokens alone, before "
            "which memory holds nothing; wanted a text that occurs later"
        )
    of_find = (i for tokens in behind[-options.occurrences :] for i in tokens)
    looked = sorted({*options.tokens, *range(n - last, n), *of_find})
    if len(looked) > LOOKED:
        raise ValueError(
            f"tokens, find ({len(behind):,} times behind the first window) and last choose {len(looked):,} tokens to "
            f"look at; wanted at most {LOOKED:,}"
        )
    return looked


def opens(config: ModelConfig, position: int) -> int:
    """Where the window opens that a token is looked at in, which is how many tokens memory holds."""
    c = min(config.last_context_length, config.window - 1)
    return (position - c) // (config.window - c) * (config.window - c)


def softmax(scores: Any) -> np.ndarray:
    """Over the last axis, float64; zeros where all are -inf."""
    scores = np.asarray(scores, np.float64)
    top = scores.max(axis=-1, keepdims=True, initial=-1e300)
    p = np.exp(scores - top)
    return p / np.maximum(p.sum(axis=-1, keepdims=True), 1e-300)


def run(subject: Subject, options: ConfigDict, inputs: Mapping[str, Any], journal: Journal) -> Report:
    """What each token that is looked at retrieves.

    Raises:
        ValueError: see `check`.
    """
    config, tokens, name, looked = subject.config, inputs["tokens"], inputs["name"], inputs["looked"]
    check(config, options)
    windows = {start: list(each) for start, each in itertools.groupby(looked, functools.partial(opens, config))}
    layers = sorted(set(options.layers)) or list(config.mem_layers)
    heads = sorted(set(options.heads)) or list(range(config.n_heads))
    reading = dict(memory=subject.reading.kind, k=subject.reading.k, score_bytes=subject.reading.score_bytes)

    @functools.cache
    def read() -> Any:
        """All that memory is to hold before any window, read once, and one token more: a prompt ends with one."""
        prompt, room = tokens[None, : max(windows) + 1], config.window
        with subject.clock.model():
            return prefill(config, subject.params, prompt, 1, room=room, progress=subject.clock.count, **reading)

    def look(start: int, positions: Sequence[int]) -> list[dict[str, Any]]:
        """For each position slots and kNN scores [layers, heads, k], and focus scores [layers, heads, shown]."""
        given = tokens[None, start : positions[-1] + 1], [position - start for position in positions]
        reader, of = begun(read(), start), dict(k=options.k, first=options.shown, around=options.focus)
        with subject.clock.model():
            found = surroundings(config, subject.params, reader, *given, reading=subject.reading, **of)
        subject.clock.count(given[0].size)
        found = [each for each in found if each.layer in layers]
        of_heads = lambda part: np.stack([getattr(each, part)[0, heads] for each in found])  # [layers, heads, Q, ...]
        slots, scores, around = map(of_heads, ("slots_BHQN", "scores_BHQN", "around_BHQNR"))
        each = dict(slots=slots, knn=softmax(scores), focus=softmax(around)[..., options.focus])
        return [{key: x[:, :, i].tolist() for key, x in each.items()} for i in range(len(positions))]

    # The first of those that were not measured before reads all that memory is to hold.
    first = next((start for start in windows if f"window {start}" not in journal.done), None)
    held = {first: max(windows) + 1}
    parts = [
        Part(
            f"window {start}", positions[-1] + 1 - start + held.get(start, 0), functools.partial(look, start, positions)
        )
        for start, positions in windows.items()
    ]
    found = [one for each in journal.results(parts, "retrieval", subject.clock) for one in each]
    found = [{key: np.asarray(x) for key, x in one.items()} for one in found]
    text = page.Text(inputs["pieces"], inputs["signs"])
    values = [
        dict(position=position, memory=opens(config, position), id=int(tokens[position]), text=text.name(position))
        | dict(context=text.place(position).line().strip())
        | of_token(one, layers, heads, options.shown, text)
        for position, one in zip(looked, found)
    ]
    best = {key: float(np.mean([one[key][..., 0] for one in found])) for key in ("knn", "focus")}
    facts = {
        "document": f"{name}, {len(tokens):,} tokens",
        "window": f"{config.window:,}",
        "memory read": described(options),
        "retrieved": f"{options.k} keys by each of {_counted(heads, 'head')} of {_counted(layers, 'layer')}",
        "best key of a head, mean": f"kNN score {best['knn']:.3f}, focus score {best['focus']:.3f}",
    }
    verb = "retrieves" if len(looked) == 1 else "retrieve"
    title = f"What {_counted(looked, 'token')} of {pathlib.PurePath(name).name} {verb} from memory"
    figure = masses(looked, [opens(config, position) for position in looked], found, layers, len(tokens))
    return Report(
        title="\n".join(map(host.printable, [title, *(f"{key}: {fact}" for key, fact in facts.items())])),
        columns=("token", "retrieved", "text", "layer.head", "kNN", "focus", "mean kNN"),
        rows=tuple(row for one in values for row in _rows(one, options.shown, text)),
        values=dict(
            options=options.to_dict(),
            document=name,
            document_tokens=len(tokens),
            window=config.window,
            last_context_length=config.last_context_length,
            memory_layers=list(config.mem_layers),
            best_knn=best["knn"],
            best_focus=best["focus"],
            heads=by_head(found, layers, heads),
            tokens=values,
            figure=figure,
        ),
        plot=lambda path: plot(path, figure, looked, [one["text"] for one in values]),
        pages={"html": page.page(title, facts, text, values)},
    )


def _counted(things: Sequence[Any], name: str) -> str:
    return f"{len(things)} {name}{'s' * (len(things) != 1)}"


def _rounded(x: Any) -> Any:
    return np.round(np.asarray(x, np.float64), 6).tolist()


def of_token(
    one: Mapping[str, np.ndarray], layers: Sequence[int], heads: Sequence[int], shown: int, text: page.Text
) -> dict[str, Any]:
    """What a token retrieves, in words.

    Args:
        one: `slots` and `knn` [layers, heads, k], `focus` [layers, heads, shown].

    Returns:
        `heads`: for each head its first `shown` keys; heads of greater kNN scores come first. `places`: the positions
        of all these keys, by the greatest kNN score that a head gives it, with that head and its focus score, and how
        much of all heads' attention to what they retrieve goes to the place (`knn_mean`).
    """
    of_heads, places = [], {}
    slots, knn, focus = (one[key][..., :shown] for key in ("slots", "knn", "focus"))
    for m, h in np.ndindex(slots.shape[:2]):
        n = int((slots[m, h] >= 0).sum())
        scores = dict(knn=_rounded(knn[m, h, :n]), focus=_rounded(focus[m, h, :n]))
        of_heads.append(dict(layer=layers[m], head=heads[h], positions=slots[m, h, :n].tolist(), **scores))
        for position, share, sharp in zip(of_heads[-1]["positions"], scores["knn"], scores["focus"]):
            if share > places.get(position, dict(knn=-1.0))["knn"]:
                places[position] = dict(knn=share, layer=layers[m], head=heads[h], focus=sharp)
    everywhere = one["slots"].ravel()
    for position, place in places.items():
        mean = one["knn"].ravel()[everywhere == position].sum() / (len(layers) * len(heads))
        place |= dict(knn_mean=_rounded(mean), position=position, text=text.place(position).line().strip())
    return dict(
        places=sorted(places.values(), key=lambda place: (-place["knn"], place["position"])),
        heads=sorted(of_heads, key=lambda each: (-each["knn"][0], each["layer"], each["head"])),
    )


def by_head(
    found: Sequence[Mapping[str, np.ndarray]], layers: Sequence[int], heads: Sequence[int]
) -> list[dict[str, Any]]:
    """Mean kNN and focus scores of each head's best key over all tokens, heads of greater kNN scores first."""
    knn, focus = (np.mean([one[key][..., 0] for one in found], axis=0) for key in ("knn", "focus"))
    each = [
        dict(layer=layers[m], head=heads[h], knn=_rounded(knn[m, h]), focus=_rounded(focus[m, h]))
        for m, h in np.ndindex(knn.shape)
    ]
    return sorted(each, key=lambda one: -one["knn"])


def _rows(one: Mapping[str, Any], shown: int, text: page.Text) -> list[tuple[Any, ...]]:
    """A token's rows of the table: its own, and the best of its places."""
    own = (one["position"], "", text.place(one["position"]).line(), "", "", "", "")
    return [own] + [
        ("", place["position"], text.place(place["position"]).line(), f"{place['layer']}.{place['head']}")
        + (place["knn"], place["focus"], place["knn_mean"])
        for place in one["places"][:shown]
    ]


def masses(
    looked: Sequence[int],
    held: Sequence[int],
    found: Sequence[Mapping[str, np.ndarray]],
    layers: Sequence[int],
    n: int,
) -> dict[str, Any]:
    """Where kNN scores lie, the mean over heads.

    Args:
        held: tokens in memory for each that is looked at.
        n: tokens of the document.

    Returns:
        `edges` of ranges of positions and `mass` [tokens, ranges], over all layers; `distances` from the token, and the
        share that is no farther, for each layer, `near`, and of keys drawn evenly, `even`; means over tokens.
    """
    edges = np.unique(np.linspace(0, n, BINS + 1).astype(int))
    distances = 2 ** np.arange(int(np.ceil(np.log2(n))) + 1)
    mass, near, even = [], [], []
    for position, size, one in zip(looked, held, found):
        slots, weight = one["slots"], one["knn"] / one["knn"][..., 0].size
        mass.append(np.histogram(slots, edges, weights=weight)[0])
        far = (position - slots)[..., None] <= distances
        near.append((one["knn"][..., None] * far).sum(axis=2).mean(axis=1))
        even.append(np.clip(distances - (position - size), 0, size) / size)
    return dict(
        edges=edges.tolist(),
        mass=_rounded(mass),
        distances=distances.tolist(),
        near=dict(zip(map(str, layers), _rounded(np.mean(near, axis=0)))),
        even=_rounded(np.mean(even, axis=0)),
    )


def plot(path: pathlib.Path, figure: Mapping[str, Any], looked: Sequence[int], names: Sequence[str]) -> None:
    """A map of kNN scores by position for every token, and how far from it what it retrieves lies."""
    plt = plots._pyplot()
    height = 2.2 + 0.24 * min(len(looked), NAMED)
    drawn, (left, right) = plt.subplots(1, 2, figsize=(12, max(height, 3.8)), width_ratios=(2, 1), layout="constrained")
    mass, edges = np.asarray(figure["mass"]), figure["edges"]
    norm = plt.matplotlib.colors.PowerNorm(0.5, 0, max(float(mass.max()), 1e-6))
    picture = left.pcolormesh(edges, np.arange(len(looked) + 1) - 0.5, mass, cmap="Reds", norm=norm)
    left.scatter(looked, range(len(looked)), marker="|", color="tab:blue")
    few = len(looked) <= NAMED
    rows = range(len(looked)) if few else np.linspace(0, len(looked) - 1, NAMED).astype(int)
    labels = [f"{looked[i]:,}  {names[i][:16]}" if few else f"{looked[i]:,}" for i in rows]
    left.set_yticks(list(rows), labels, parse_math=False, fontsize=8)
    left.set_ylim(len(looked) - 0.5, -0.5)
    left.set_xlabel("position in the document, tokens (blue: the token itself)")
    left.set_ylabel("token that retrieves")
    left.set_title("kNN score by place, mean over heads")
    drawn.colorbar(picture, ax=left, label=f"kNN score in {edges[1] - edges[0]:,} tokens")
    for layer, curve in figure["near"].items():
        right.plot(figure["distances"], curve, marker=".", label=f"layer {layer}")
    right.plot(figure["distances"], figure["even"], color="grey", linestyle="--", label="any key as likely")
    right.set_xscale("log", base=2)
    right.set_xticks(figure["distances"][::2], [f"{far:,}" for far in figure["distances"][::2]], rotation=30)
    right.set_xlabel("distance from the token, tokens")
    right.set_ylabel("share of kNN scores that is no farther")
    right.set_ylim(0, 1.02)
    right.set_title("how far it reaches")
    right.grid(alpha=0.3)
    right.legend()
    drawn.savefig(path, dpi=130)
    plt.close(drawn)
