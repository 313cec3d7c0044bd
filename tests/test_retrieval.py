"""What tokens retrieve: scores against float64, the text of tokens, and the page."""

from __future__ import annotations

import contextlib
import html.parser
import json
import pathlib
import sys
import unittest.mock

import jax
import numpy as np
import numpy_reference as reference
import pytest
from test_tokenizer import byte_level, write_json

import fot_jax
from configs.eval import retrieval as configuration
from fot_jax import memory, sharding
from fot_jax.config import DtypePolicy
from fot_jax.evals import page, retrieval
from fot_jax.evals.journal import Journal
from fot_jax.evals.subject import Subject
from fot_jax.generate import inspection, prefill
from fot_jax.generate.inspection import begun, retrieved, surroundings
from fot_jax.memory import cache
from fot_jax.tokenizer import open_tokenizer, train_tokenizer

TEXT = (
    "A <script>alert('&amp;')</script> & \"more\" \u20ac 5,\r\n\tna\u00efve\u2014\u4e2d\u6587 of it.\n"
    "More &lt; of it, and it"
)
W, C, K, SHOWN, FOCUS = 8, 3, 6, 3, 4
STEP = W - C


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(["of it and more of naive script", "alert script more"] * 4, path, 290)
    return open_tokenizer(path)


@pytest.fixture(scope="module")
def models(tokenizer):
    """By name, of two kinds: LongLLaMA's, and the paper's small models."""
    # In layer 0 keys of equal tokens would be equal, and which of them is retrieved a matter of rounding.
    sizes = dict(d_model=16, d_ff=24, n_layers=3, n_heads=4, n_kv_heads=2, window=W, last_context_length=W)
    long = fot_jax.ModelConfig(vocab_size=tokenizer.vocab_size, mem_layers=(1, 2), **sizes)
    changes = dict(mem_positionals=False, qk_norm=True, mem_layers=(1,), n_layers=2, last_context_length=C)
    small = long.replace(**changes)
    return {name: (config, reference.random_params(config)) for name, config in dict(long=long, small=small).items()}


@pytest.fixture(autouse=True)
def small_pages(monkeypatch):
    """Memories of 128 slots, in two pages."""
    monkeypatch.setattr(cache, "FIRST_PAGE_BYTES", 2048)
    monkeypatch.setitem(prefill.__globals__, "MEMORY_BYTES", (1, 2**30))


def options(tmp_path, content=TEXT, **changes):
    config = configuration.get_config()
    (tmp_path / "a<b>.txt").write_bytes(content.encode())
    config.options.update(text=str(tmp_path / "a<b>.txt"), k=K, shown=SHOWN, focus=FOCUS)
    config.options.update(changes)
    return config


def evaluated(model, tokenizer, config, journal=None):
    found, params = model
    retrieval.check(found, config.options)
    inputs = retrieval.inputs(config, found, tokenizer, None)
    subject = Subject.of(found, params, tokenizer, config.options)
    return retrieval.run(subject, config.options, inputs, journal or Journal())


def scores_of(config, params, tokens, position, start, k):
    """By layer, float64 [H, start]: scores of a token's queries with the keys before its window, which opens at
    `start`; windows before it are of W tokens from the first.
    """
    seen, plain = [], reference.attend_rows

    def watched(q, keys, values, theta, scale, start_BT, *rest, **options):
        pairs = lambda x: x[..., : x.shape[-1] // 2] + 1j * x[..., x.shape[-1] // 2 :]
        turned = pairs(q[0, position]) * np.exp(1j * (position - start) * theta)  # memory's keys are at position 0
        seen.append(np.einsum("hc,mhc->hm", turned, pairs(keys[0, :start]).conj()).real * scale)
        return plain(q, keys, values, theta, scale, start_BT, *rest, **options)

    starts = reference.window_starts(start + 1, position + 1, W, 1)
    with unittest.mock.patch.object(reference, "attend_rows", watched):
        reference.forward(config, params, tokens[None, : position + 1], start_BT=starts[None], k=k)
    return {layer: seen[layer] for layer in config.mem_layers}


@pytest.mark.parametrize(("name", "reading"), [("long", "dense"), ("small", "topk")])
def test_scores_are_those_of_float64(models, tokenizer, tmp_path, name, reading):
    config, params = models[name]
    tokens = retrieval.inputs(options(tmp_path), config, tokenizer, None)["tokens"]
    starts = {8: 5, 30: 25, 31: 25, 78: 75} if name == "small" else {8: 1, 78: 71}
    report = evaluated(models[name], tokenizer, options(tmp_path, tokens=tuple(starts), reading=reading))
    for (position, start), token in zip(starts.items(), report.values["tokens"]):
        assert (token["position"], token["memory"], token["id"]) == (position, start, tokens[position])
        scores = scores_of(config, params, tokens, position, start, K if reading == "topk" else None)
        assert {(each["layer"], each["head"]) for each in token["heads"]} == {(n, h) for n in scores for h in range(4)}
        mass = {}
        for each in token["heads"]:
            s = scores[each["layer"]][each["head"]]
            best = np.argsort(-s)[:K]
            assert each["positions"] == best[:SHOWN].tolist()
            knn = np.exp(s[best]) / sum(np.exp(s[i]) for i in best)
            np.testing.assert_allclose(each["knn"], knn[:SHOWN], atol=2e-5)
            focus = [np.exp(s[i]) / np.exp(s[max(i - FOCUS, 0) : i + FOCUS + 1]).sum() for i in best[:SHOWN]]
            np.testing.assert_allclose(each["focus"], focus, atol=2e-5)
            for i, share in zip(best, knn):
                mass[i] = mass.get(i, 0.0) + share / len(token["heads"])
        firsts = [each["knn"][0] for each in token["heads"]]
        assert firsts == sorted(firsts, reverse=True)
        for place in token["places"]:
            np.testing.assert_allclose(place["knn_mean"], mass[place["position"]], atol=2e-5)
            (head,) = (h for h in token["heads"] if (h["layer"], h["head"]) == (place["layer"], place["head"]))
            n = head["positions"].index(place["position"])
            assert (place["knn"], place["focus"]) == (head["knn"][n], head["focus"][n])
            others = [h for h in token["heads"] if place["position"] in h["positions"]]
            assert place["knn"] == max(h["knn"][h["positions"].index(place["position"])] for h in others)


def test_where_windows_open(models):
    config, _ = models["small"]
    for position in range(W, 60):
        start = retrieval.opens(config, position)
        assert start % STEP == 0 and start >= 1 and C <= position - start < W
    whole = config.replace(last_context_length=W)
    assert [retrieval.opens(whole, position) for position in (8, 9, 30)] == [1, 2, 23]


def test_a_window_begins_anew_before_memory_read_once(models):
    """A reader begun at 21 of a memory of 60 is one that a prompt of 21 + 3 tokens leaves, without its open window."""
    config, params = models["small"]
    tokens = np.random.default_rng(0).integers(1, config.vocab_size, (1, 70)).astype(np.int32)
    reading = dict(memory="topk", k=K)
    reader = begun(prefill(config, params, tokens[:, :61], 1, room=W, **reading), 21)
    prompt = prefill(config, params, tokens[:, : 21 + C], C, **reading)
    options = dict(k=K, reading=memory.Reading("topk", K))
    (found,) = surroundings(config, params, reader, tokens[:, 21:26], [C, 4], first=SHOWN, around=FOCUS, **options)
    (wanted,) = retrieved(config, params, prompt, tokens[:, 21 + C : 26], **options)
    np.testing.assert_array_equal(found.slots_BHQN, wanted.slots_BHTN)
    np.testing.assert_allclose(found.scores_BHQN, wanted.scores_BHTN, atol=1e-5)  # the temperature is in the queries
    with pytest.raises(ValueError, match="61 tokens of a memory that holds 60"):
        begun(prefill(config, params, tokens[:, :61], 1, **reading), 61)
    for at, first, around, message in (
        ([5], 2, 1, r"queries are those of tokens \[5\]; wanted one or more of 0..4"),
        ([0], K + 1, 1, "first is 7 and around 1; wanted 1..6"),
        ([0], 1, -1, "first is 1 and around -1"),
    ):
        with pytest.raises(ValueError, match=message):
            surroundings(config, params, reader, tokens[:, 21:26], at, k=K, first=first, around=around)


def test_a_window_is_read_in_bounded_pieces(models, monkeypatch):
    """After a full window, in the order of the queries that are asked for, with pieces between that have none."""
    config, params = models["small"]
    tokens = np.random.default_rng(0).integers(1, config.vocab_size, (1, 40)).astype(np.int32)
    reader, given = prefill(config, params, tokens[:, :32], W), (tokens[:, 32:], [7, 1, 6, 0])
    of = dict(k=K, first=SHOWN, around=FOCUS)
    (whole,) = surroundings(config, params, reader, *given, **of)
    generate = sys.modules["fot_jax.generate"]  # which the function of that name hides
    monkeypatch.setattr(generate, "OPEN_BYTES", 4 * config.n_heads * W * 2)
    monkeypatch.setattr(generate, "OPEN_TOKENS", 1)
    with unittest.mock.patch.object(inspection, "_surroundings", side_effect=inspection._surroundings) as asked:
        (pieces,) = surroundings(config, params, reader, *given, **of)
    assert [call.args[3].shape[1] for call in asked.call_args_list] == [2, 2, 2, 2]
    np.testing.assert_array_equal(whole.slots_BHQN, pieces.slots_BHQN)
    np.testing.assert_allclose(whole.scores_BHQN, pieces.scores_BHQN, atol=1e-5)
    np.testing.assert_allclose(whole.around_BHQNR, pieces.around_BHQNR, atol=1e-5)


def test_neighbours_are_those_that_memory_stores_and_reads(models):
    config, _ = models["small"]
    config = config.replace(n_layers=1, mem_layers=(0,), dtypes=DtypePolicy(memory="int8"))
    params = reference.random_params(config)
    tokens = np.random.default_rng(0).integers(1, config.vocab_size, (2, 40)).astype(np.int32)
    reader = begun(prefill(config, params, tokens, 1), 30)
    seen_BM = np.random.default_rng(1).random((2, reader.mem.capacity)) < 0.5
    reader = reader.__class__(**{**vars(reader), "mem": memory.restrict(reader.mem, seen_BM)})
    (found,) = surroundings(config, params, reader, tokens[:, 30:33], [2], k=K, first=SHOWN, around=FOCUS)
    centre = found.around_BHQNR[..., FOCUS]
    np.testing.assert_allclose(centre, found.scores_BHQN[..., :SHOWN], atol=1e-5)
    near = found.slots_BHQN[..., :SHOWN, None] + np.arange(-FOCUS, FOCUS + 1)
    there = (near >= 0) & (near < 30)
    there &= np.stack([row[np.clip(at, 0, 29)] for row, at in zip(seen_BM, near)])
    np.testing.assert_array_equal(np.isfinite(found.around_BHQNR), there)


def test_on_eight_devices(models, tokenizer, tmp_path, devices):
    config, params = models["small"]
    given = options(tmp_path, tokens=(30, 31, 77, 78), reading="topk")
    alone = evaluated((config, params), tokenizer, given).values
    mesh = sharding.make_mesh({"data": 2, "tensor": 2, "context": 2}, devices)
    with jax.set_mesh(mesh):
        put = jax.device_put(params, sharding.param_shardings(mesh, params))
        spread = evaluated((config, put), tokenizer, given).values
    numbers = [[], []]

    def without(x, found):
        """With every fraction put into a list, and heads and places, which come by score, in an order of their own."""
        if isinstance(x, dict):
            return {key: without(x[key], found) for key in sorted(x)}
        if isinstance(x, (list, tuple)):
            known = {"layer", "position"} & x[0].keys() if x and isinstance(x[0], dict) else ()
            name = lambda each: (each.get("position", 0), each["layer"], each["head"])
            return [without(each, found) for each in (sorted(x, key=name) if "layer" in known else x)]
        return found.append(x) if isinstance(x, float) else x

    assert without(alone, numbers[0]) == without(spread, numbers[1]) and len(numbers[0]) > 500
    np.testing.assert_allclose(*numbers, atol=1e-5)


class Parsed(html.parser.HTMLParser):
    """The document's text in a page, what is marked in it, and all tags."""

    def __init__(self, text):
        super().__init__()
        self.text, self.inside, self.tags, self.marks, self.tokens = "", False, set(), {}, {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.add(tag)
        self.inside |= tag == "div" and attrs.get("class") == "text"
        if tag == "mark" and self.inside:
            self.marks[int(attrs["id"].removeprefix("p"))] = attrs["style"]
        if tag == "label" and self.inside:
            self.tokens[attrs["id"]] = attrs["for"]

    def handle_endtag(self, tag):
        self.inside &= tag != "div"

    def handle_data(self, data):
        self.text += data if self.inside else ""


def test_report_and_page_say_the_same(models, tokenizer, tmp_path):
    given = options(tmp_path, find="of", occurrences=2, last=3, heads=(1, 2))
    report = evaluated(models["long"], tokenizer, given)
    report.write(tmp_path / "out", "retrieval")
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json", ".png", ".html"}
    assert (tmp_path / "out" / "retrieval.png").stat().st_size > 10_000
    values = json.loads((tmp_path / "out" / "retrieval.json").read_text())
    text = (tmp_path / "out" / "retrieval.html").read_bytes().decode()
    parsed = Parsed(text)
    assert parsed.text == TEXT and not parsed.tags & {"script", "img", "link", "iframe", "b<b>"}
    assert "<script" not in text and "a<b>" not in text and "a&lt;b&gt;.txt" in text

    tokens = values["tokens"]
    assert {each["head"] for token in tokens for each in token["heads"]} == {1, 2}
    assert parsed.tokens == {f"t{i}": f"q{i}" for i in range(len(tokens))}
    assert parsed.marks.keys() == {place["position"] for token in tokens for place in token["places"]}
    for position, style in parsed.marks.items():
        strength = dict(part.split(":") for part in style.split(";"))
        scores = {
            f"--k{i}": place["knn"]
            for i, token in enumerate(tokens)
            for place in token["places"]
            if place["position"] == position
        }
        scores["--a"] = max(scores.values())
        assert strength == {key: f"{score**0.5:.3f}" for key, score in scores.items()}

    n = values["document_tokens"]
    found = [token["position"] for token in tokens]
    assert found[-3:] == [n - 3, n - 2, n - 1] and "".join(token["text"] for token in tokens[:-3]) == " of of"
    shown = [row for row in report.rows if row[0] == ""]
    assert [row[1] for row in shown[:SHOWN]] == [place["position"] for place in tokens[0]["places"][:SHOWN]]
    np.testing.assert_allclose(np.sum(values["figure"]["mass"], axis=1), 1, atol=1e-4)
    assert all(curve[-1] == 1 for curve in [*values["figure"]["near"].values(), values["figure"]["even"]])


def test_a_stopped_evaluation_goes_on(models, tokenizer, tmp_path):
    given, path = options(tmp_path, tokens=(31, 64)), tmp_path / "partial.jsonl"
    whole = evaluated(models["long"], tokenizer, given, Journal(path, {}))
    path.write_text("\n".join(path.read_text().split("\n")[:2]) + "\n{")  # one window of two
    with unittest.mock.patch.object(retrieval, "surroundings", side_effect=retrieval.surroundings) as asked:
        again = evaluated(models["long"], tokenizer, given, Journal(path, {}))
    assert asked.call_count == 1 and again.values == whole.values and again.pages == whole.pages


def test_progress_ends_at_all_of_it(models, tokenizer, tmp_path):
    path, told = tmp_path / "partial.jsonl", []

    @contextlib.contextmanager
    def progress(total, desc):
        told.append([total])
        yield told[-1].append

    with unittest.mock.patch("fot_jax.evals.journal.progress", progress):
        for _ in range(2):
            evaluated(models["long"], tokenizer, options(tmp_path, tokens=(31, 64)), Journal(path, {}))
            path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    # Memory of 57 tokens and one more; windows from 24 to 31 and from 57 to 64.
    assert [(total, sum(advanced)) for total, *advanced in told] == [(74, 74), (66, 66)]


def test_a_file_name_that_no_terminal_and_no_page_can_show(models, tokenizer, tmp_path):
    given = options(tmp_path)
    path = pathlib.Path(given.options.text).rename(tmp_path / "a\udcff\x1b[31mb.txt")
    given.options.text = str(path)
    report = evaluated(models["long"], tokenizer, given)
    report.write(tmp_path / "out", "retrieval")
    (tmp_path / "table").write_text(report.table(), encoding="utf-8")
    assert "from memory\ndocument: a?\\x1b[31mb.txt, " in report.table() and "\x1b" not in report.table()
    assert "a?\u241b[31mb.txt, " in (tmp_path / "out" / "retrieval.html").read_text(encoding="utf-8")
    turned = page.page("t \udcff\u200e\u200f\u061c\u202e", {}, page.Text(["\ud800"], {}), [])
    assert "<h1>t \ufffd\ufffd\ufffd\ufffd\ufffd</h1>" in turned and turned.encode()


def test_what_is_looked_at_by_default(models, tokenizer, tmp_path):
    config, _ = models["long"]
    looked = lambda **changes: retrieval.inputs(options(tmp_path, **changes), config, tokenizer, None)["looked"]
    assert looked(max_tokens=W + 3) == [8, 9, 10] and looked(max_tokens=W + 9) == [9, 10, 11, 12, 13, 14, 15, 16]
    assert looked(max_tokens=W + 3, tokens=(8,)) == [8]


TEXTS = [
    TEXT,
    "",
    "  two  \u20ac\u20ac\n\n\U0001f600\u4e2d  a",
    "\u4e2d\u6587",
    "x\ufffd\ufffd\ufffd\ufffd\u20ac\ufffd y",
    "e\u0301 \U0001f469\u200d\U0001f467 \x00\x0b ",
]


@pytest.fixture(scope="module", params=["sentencepiece", "bytes"])
def either(request, tokenizer, tmp_path_factory):
    if request.param == "sentencepiece":
        return tokenizer
    folder = tmp_path_factory.mktemp("json")
    return open_tokenizer(write_json(folder, byte_level(["<s>", "</s>"])))


@pytest.mark.parametrize("text", TEXTS)
def test_texts_of_tokens_are_the_document(either, text):
    ids = [either.bos_id, *either.encode(text), either.eos_id]
    pieces = page.pieces(either, ids)
    assert len(pieces) == len(ids) and "".join(pieces) == either.decode(ids) == text
    with unittest.mock.patch.object(page, "_by_token", lambda *_: [""]):  # as for tokenizers of another kind
        assert "".join(page.pieces(either, ids)) == text
    signs = page.signs(either, ids, pieces)
    assert signs[0] == "\u2039bos\u203a" and signs[len(ids) - 1] == "\u2039eos\u203a"
    assert all(sign for i, sign in signs.items()) and all(not pieces[i] for i in signs)


def test_a_character_is_its_last_token(tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.encode("of\u20ac\u4e2d mo")]
    with unittest.mock.patch.object(page, "_streamed", side_effect=page._streamed) as streamed:
        pieces = page.pieces(tokenizer, ids)
    assert streamed.call_count == 2  # the beginning, and six bytes
    assert pieces == ["", "of", "", "", "\u20ac", "", "", "\u4e2d", " mo"]
    text = page.Text(pieces, page.signs(tokenizer, ids, pieces))
    assert [text.name(i) for i in range(5)] == ["‹bos›", "of", "‹1/3 of €›", "‹2/3 of €›", "€"]
    assert text.place(4) == page.Place("of", "€", "中 mo")
    assert retrieval.occurrences(pieces, "\u20ac") == [[2, 3, 4]]
    assert retrieval.occurrences(pieces, "f\u20ac") == [[1, 2, 3, 4]]
    assert retrieval.occurrences(["ab", "c", "ab", "cab", "c"], "abc") == [[0, 1], [2, 3], [3, 4]]
    blank = page.Text(["a", "    ", " ", "\n", "\t", "b\r"], {})
    assert [blank.name(i) for i in range(1, 6)] == ["␣×4", "␣", "⏎", "→", "b␍"]
    assert blank.place(3).line().strip() == "a ⟦⏎⟧→b␍"


def test_what_is_far_from_marks_is_folded():
    rng = np.random.default_rng(0)
    for n, marks in ((5000, 3), (5000, 40), (100, 2), (40_000, 1)):
        pieces = [("w\n" if rng.random() < 0.05 else "w ") for _ in range(n)]
        marked = sorted(rng.choice(n, marks, replace=False).tolist())
        blocks = page._blocks(pieces, marked)
        assert [first for first, _, _ in blocks] == [0, *(end for _, end, _ in blocks)][:-1] and blocks[-1][1] == n
        for mark in marked:
            ((first, end),) = [(a, b) for a, b, shown in blocks if shown and a <= mark < b]
            assert first <= max(mark - page.MARGIN, 0) and end >= min(mark + page.MARGIN + 1, n)
        assert all(b - a >= page.MARGIN for a, b, shown in blocks if not shown)
        looked = [dict(position=marked[0], memory=1, places=[], heads=[])]
        made = page.page("t", {}, page.Text(pieces, {}), looked)
        assert Parsed(made).text == "".join(pieces)
        folds = made.count('class="fold"')
        assert folds == sum(-(-(b - a) // page.FOLDED) for a, b, shown in page._blocks(pieces, marked[:1]) if not shown)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(tokens=(9, 7)), "tokens has position 7, within the first window of 8 tokens"),
        (dict(tokens=("it",)), "tokens has 'it'; wanted positions in the document, whole numbers"),
        (dict(tokens=(9, 700)), "tokens has position 700; a<b>.txt has .* tokens: wanted at most"),
        (dict(find="nowhere"), "find is 'nowhere'; wanted a text that occurs in a<b>.txt"),
        (
            dict(find="A <", max_tokens=30),
            "find is 'A <', which occurs in a<b>.txt within the first window of 8 tokens",
        ),
        (dict(last=30, max_tokens=30), "last is 30, of 30 tokens; wanted at most 22"),
        (dict(max_tokens=8), "a<b>.txt has 8 tokens; wanted more than 8"),
        (dict(document=1), "document is 1 and text .*a<b>.txt; wanted one of them"),
        (dict(capacity=20), "a<b>.txt has .* tokens; capacity is 20"),
        (dict(text="/none/x.txt"), "text is /none/x.txt: no such file"),
        (dict(rows=2), "rows is 2; wanted 1: one document is read"),
        (dict(shown=9), "shown is 9; wanted at most k, 6"),
        (dict(focus=-1), "focus is -1; wanted at least 0"),
        (dict(layers=(0, 1)), "layers has 0; wanted some of 1, 2"),
        (dict(heads=(4,)), "heads has 4; wanted some of 0, 1, 2, 3"),
        (dict(reading="near"), "memory reading is 'near'"),
    ],
)
def test_what_cannot_be(models, tokenizer, tmp_path, changes, message):
    config, given = models["long"][0], options(tmp_path, **changes)
    with pytest.raises((ValueError, FileNotFoundError), match=message):  # with no parameters yet
        retrieval.check(config, given.options)
        retrieval.inputs(given, config, tokenizer, None)


def test_so_many_tokens_are_looked_at_and_no_more(models, tokenizer, tmp_path):
    config, _ = models["long"]
    given = options(tmp_path, content=" of" * 1020, find="of", occurrences=1000)
    assert len(retrieval.inputs(given, config, tokenizer, None)["looked"]) == 1000
    given.options.occurrences = 0
    message = r"find \(1,0.. times .*\) and last choose 1,0.. tokens to look at; wanted at most 1,000$"
    with pytest.raises(ValueError, match=message):
        retrieval.inputs(given, config, tokenizer, None)


def test_documents_and_models_that_cannot_be(models, tokenizer, tmp_path):
    config, params = models["long"]
    given = options(tmp_path, content="")
    (tmp_path / "more").mkdir()
    for name in "ab":
        (tmp_path / "more" / f"{name}.txt").write_text(f"{name} more of it and more of it")
    given.data.sources = (str(tmp_path / "more"), str(tmp_path / "more" / "a.txt"))
    given.options.text = ""
    found = []
    for number in range(3):
        given.options.document = number
        inputs = retrieval.inputs(given, config, tokenizer, None)
        found.append((inputs["name"], "".join(inputs["pieces"])))
    assert found == [(f"{name}.txt", f"{name} more of it and more of it") for name in "aba"]
    given.options.document = 3
    with pytest.raises(ValueError, match=r"document is 3; data.sources have 3: wanted 0..2"):
        retrieval.inputs(given, config, tokenizer, None)
    with pytest.raises(ValueError, match="the model has no memory layers"):
        retrieval.check(config.replace(mem_layers=()), given.options)
    bad = options(tmp_path)
    (tmp_path / "a<b>.txt").write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match="invalid UTF-8 at byte 2"):
        retrieval.inputs(bad, config, tokenizer, None)
