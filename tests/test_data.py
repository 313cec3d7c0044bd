"""Tokenizer, sources, prepared sets, mixtures and the packing of documents into rows."""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import os
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fot_jax import data, sources, tokenizer

TEXTS = [
    "def f(x):\n    return x + 1\n\n\ndef g(x):\n\treturn f(x) * 2\n" * 20,
    "The quick brown fox jumps over the lazy dog.\nPack my box with five dozen liquor jugs in 1999.\n" * 20,
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n        pass\n" * 20,
]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    tokenizer.train_tokenizer(TEXTS, path, 340)
    return path


@pytest.fixture(scope="module")
def small(model_path):
    return tokenizer.Tokenizer.load(model_path)


# ---- tokenizer


def test_tokenizer_has_llamas_conventions(small):
    assert (small.vocab_size, small.bos_id, small.eos_id, small.pad_id) == (340, 1, 2, 0)
    ids = small.encode("the żółw 12")
    assert ids.dtype == np.int32 and not set(ids.tolist()) & {0, 1, 2}  # unknown characters are bytes, nothing added
    assert [small.decode([i]) for i in small.encode("x1999")][-4:] == list("1999")  # digits apart, however frequent
    assert len(small.encode("        self")) <= 4  # runs of spaces are pieces
    assert small.decode([1, *small.encode("fox"), 2]) == "fox"


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=60))
@example("  two\n\n\n\tthree   \r\n ")
@example(" ")
@example("<s></s><0x0A>\0")
def test_tokenizer_round_trip(small, text):
    assert small.decode(small.encode(text)) == text


def test_long_documents_are_encoded_as_the_whole(small, monkeypatch):
    rng = np.random.RandomState(0)
    text = "".join(rng.choice(list("abc  \n\n\t1é"), 5000))
    whole = small.encode(text)
    for size in (1, 7, 300):
        monkeypatch.setattr(tokenizer, "_CHUNK_CHARS", size)
        assert max(map(len, tokenizer._chunks("abc\n" * 500))) <= size + 4
        np.testing.assert_array_equal(small.encode(text), whole)
    assert small.decode(whole) == text


def test_training_a_tokenizer_twice_gives_the_same_file(model_path, small, tmp_path):
    again = tokenizer.train_tokenizer(iter(TEXTS), tmp_path / "deep" / "again.model", 340)
    assert again.fingerprint == small.fingerprint
    assert (tmp_path / "deep" / "again.model").read_bytes() == model_path.read_bytes()
    assert os.listdir(tmp_path / "deep") == ["again.model"]


def test_tokenizer_errors(small, tmp_path):
    with pytest.raises(ValueError, match="340 tokens.*32000"):
        tokenizer.check_vocab(small, 32000)
    tokenizer.check_vocab(small, 340)
    tokenizer.check_vocab(small, 384, padded=True)
    with pytest.raises(ValueError, match="340 tokens, the model's vocab_size is 339; wanted no more"):
        tokenizer.check_vocab(small, 339, padded=True)
    with pytest.raises(FileNotFoundError, match="none.model"):
        tokenizer.Tokenizer.load(tmp_path / "none.model")
    (tmp_path / "bad.model").write_text("no model")
    with pytest.raises(ValueError, match="bad.model.*not a SentencePiece model"):
        tokenizer.Tokenizer.load(tmp_path / "bad.model")
    with pytest.raises(ValueError, match="vocab_size is 5000"):
        tokenizer.train_tokenizer(TEXTS, tmp_path / "x.model", 5000)
    with pytest.raises(ValueError, match="vocab_size is 340"):
        tokenizer.train_tokenizer([], tmp_path / "x.model", 340)
    assert not (tmp_path / "x.model").exists()


# ---- sources


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_files_of_three_kinds(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = write(
        tmp_path / "d",
        b__txt="one\r\ntwo\n",
        a__jsonl='{"text": "zażółć"}\n\n{"text": "x y", "id": "named"}',
        c__md="no",
    )
    parquet.write_table(pyarrow.table({"text": ["p", "q"], "n": [1, 2]}), folder / "t.parquet")
    got = [tuple(d) for d in sources.corpus_of_files([folder]).documents()]
    assert got == [
        ("a.jsonl:1", "zażółć"),
        ("named", "x y"),
        ("b.txt", "one\r\ntwo\n"),
        ("t.parquet:1", "p"),
        ("t.parquet:2", "q"),
    ]
    with pytest.raises(ValueError, match="t.parquet: no column 'body'; found 'text', 'n'"):
        list(sources.corpus_of_files([folder / "t.parquet"], field="body").documents())
    parquet.write_table(pyarrow.table({"text": ["p", None]}), folder / "t.parquet")
    with pytest.raises(ValueError, match="row 2: field 'text' is a NoneType"):
        list(sources.open_corpus(folder / "t.parquet").documents())
    write(folder, t__parquet="PAR1 not")
    with pytest.raises(ValueError, match="t.parquet: not a parquet file"):
        list(sources.open_corpus(folder / "t.parquet").documents())


BAD = {
    "missing": (None, FileNotFoundError, "x.txt: no such file"),
    "empty": ({"x__txt": ""}, ValueError, "x.txt: empty file"),
    "kind": ({"x__doc": "a"}, ValueError, "x.doc: a .doc file; wanted one of .txt"),
    "utf8": ({"x__txt": b"ok \xff\xfe"}, ValueError, "x.txt: invalid UTF-8 at byte 3"),
    "utf8 line": ({"x__jsonl": b'{"text": "a b c"}\n{"text": "\xc3("}\n'}, ValueError, "invalid UTF-8 at byte 28"),
    "json": ({"x__jsonl": '{"text": "a b c"}\n{"text": \n'}, ValueError, "x.jsonl:2: not JSON"),
    "field": ({"x__jsonl": '{"body": "a", "n": 1}'}, ValueError, "x.jsonl:1: no field 'text'; found 'body', 'n'"),
    "object": ({"x__jsonl": "[1]"}, ValueError, "x.jsonl:1: no field 'text'; found list"),
    "value": ({"x__jsonl": '{"text": 7}'}, ValueError, "x.jsonl:1: field 'text' is a int"),
    "surrogate": (
        {"x__jsonl": r'{"text": "a \ud800"}'},
        ValueError,
        "x.jsonl:1: field 'text' has no UTF-8 at character 2",
    ),
    "short": (
        {"x__jsonl": '{"text": "a b c"}\n{"text": ""}'},
        ValueError,
        "'x.jsonl:2' has 0 tokens; wanted at least 2",
    ),
    "blank": ({"x__jsonl": "\n\n"}, ValueError, "no documents"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_sources_are_refused_before_anything_is_tokenised(case, small, tmp_path, monkeypatch):
    files, kind, message = BAD[case]
    path = tmp_path / "x.txt"
    if files:
        path = next(write(tmp_path / "in", **files).iterdir())
    monkeypatch.setattr(data, "TokenisedDocuments", None)  # any attempt to build fails
    with pytest.raises(kind, match=message):
        data.prepare(sources.open_corpus(path), small, tmp_path / "out")
    assert not (tmp_path / "out").exists() or not [f for f in os.listdir(tmp_path / "out") if not f.startswith(".")]


def test_folders_without_text_and_missing_pyarrow(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no .txt, .jsonl, .parquet file"):
        sources.open_corpus(write(tmp_path / "d", a__md="x"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="a.parquet: .*pip install pyarrow"):
        sources.open_corpus(write(tmp_path / "e", a__parquet="x"))
    with pytest.raises(ValueError, match="a source by itself"):
        sources.open_corpus("python:train", tmp_path)


def test_a_parquet_file_with_damaged_pages_is_named(tmp_path):
    import pyarrow.parquet

    path = tmp_path / "x.parquet"
    texts = np.random.default_rng(0).bytes(40000).hex()
    pyarrow.parquet.write_table(pyarrow.table({"text": [texts]}), path, compression="gzip", use_dictionary=False)
    raw = bytearray(path.read_bytes())
    raw[1000:3000] = bytes(2000)
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="x.parquet, after row 0: damaged"):
        list(sources.open_corpus(path).documents())


def test_unreadable_file(tmp_path, monkeypatch):
    path = write(tmp_path, x__txt="abc") / "x.txt"
    path.chmod(0)
    if os.access(path, os.R_OK):  # a superuser may read it all the same
        monkeypatch.setattr("builtins.open", lambda *a, **k: (_ for _ in ()).throw(PermissionError(13, "denied", a[0])))
    with pytest.raises(PermissionError, match="x.txt"):
        sources.open_corpus(path)


# ---- prepared sets


def documents(n, seed=0):
    rng = np.random.RandomState(seed)
    return [sources.Document(f"d{i}", "".join(rng.choice(list("ab \n"), 5 + 40 * (i % 3)))) for i in range(n)]


def test_prepared_set_gives_the_documents_back(small, tmp_path):
    texts = documents(12)
    made = data.prepare(sources.corpus_of_documents(texts, "mine"), small, tmp_path)
    assert len(made) == 12 and made.skipped == 0
    assert (made.vocab_size, made.bos_id, made.eos_id, made.pad_id) == (340, 1, 2, 0)
    for i, (name, text) in enumerate(texts):
        assert made.id(i) == name and small.decode(made[i]) == text and made.lengths[i] == len(made[i])
        assert made[i].dtype == np.int32
    assert made.tokenizer().fingerprint == small.fingerprint
    assert data.TokenSet(made.path).fingerprint == made.fingerprint
    again = data.prepare(sources.corpus_of_documents(texts, "again"), small, tmp_path)
    assert again.path != made.path and again.fingerprint == made.fingerprint
    changed = [*texts[:-1], sources.Document("d11", texts[-1].text + "a")]
    assert data.prepare(sources.corpus_of_documents(changed, "mine"), small, tmp_path).fingerprint != made.fingerprint
    records = b"".join(p.read_bytes() for p in made.path.rglob("*") if p.is_file())
    assert str(tmp_path).encode() not in records


def test_a_stale_preparation_is_not_used(small, tmp_path):
    path = write(tmp_path / "in", x__txt="some text") / "x.txt"
    first = data.prepare(sources.open_corpus(path), small, tmp_path / "out")
    stamp = os.stat(first.path / "prepared.json").st_mtime_ns
    assert data.prepare(sources.open_corpus(path), small, tmp_path / "out").path == first.path
    assert os.stat(first.path / "prepared.json").st_mtime_ns == stamp
    other = tokenizer.train_tokenizer(TEXTS, tmp_path / "other.model", 330)
    assert data.prepare(sources.open_corpus(path), other, tmp_path / "out").path != first.path
    path.write_text("some more")
    os.utime(path, ns=(1, 1))
    second = data.prepare(sources.open_corpus(path), small, tmp_path / "out")
    assert small.decode(second[0]) == "some more" and small.decode(first[0]) == "some text"


def test_an_interrupted_preparation_does_not_look_complete(small, tmp_path):
    corpus = sources.corpus_of_documents(documents(9), "mine")
    calls = itertools.count()

    def dies():
        for i, document in enumerate(corpus.documents()):
            if i == 5 and next(calls) == 1:  # in the second pass, which tokenises
                raise KeyboardInterrupt
            yield document

    broken = sources.Corpus(corpus.name, corpus.fingerprint, dies)
    with pytest.raises(KeyboardInterrupt):
        data.prepare(broken, small, tmp_path)
    assert all(name.startswith(".") for name in os.listdir(tmp_path))
    made = data.prepare(broken, small, tmp_path)
    assert [made.id(i) for i in range(len(made))] == [f"d{i}" for i in range(9)]
    with pytest.raises(FileNotFoundError, match="not a prepared token set"):
        data.TokenSet(tmp_path)


def test_short_documents_can_be_skipped(small, tmp_path):
    corpus = sources.corpus_of_documents([sources.Document("a", ""), *documents(3)], "mine")
    made = data.prepare(corpus, small, tmp_path, skip_short=True)
    assert (len(made), made.skipped, made.id(0)) == (3, 1, "d0")
    with pytest.raises(ValueError, match="no documents of two tokens or more"):
        data.prepare(sources.corpus_of_documents([sources.Document("a", "")], "mine"), small, tmp_path, skip_short=True)


def test_of_two_that_prepare_one_does_the_work(small, tmp_path):
    corpus, passes = sources.corpus_of_documents(documents(5), "mine"), []

    def counted():
        passes.append(1)
        time.sleep(0.02)
        return corpus.documents()

    slow = sources.Corpus(corpus.name, corpus.fingerprint, counted)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first, second = (f.result() for f in [pool.submit(data.prepare, slow, small, tmp_path) for _ in range(2)])
    assert first.path == second.path and len(passes) == 2  # one to check, one to tokenise


class TinyPoems(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"text": tfds.features.Text(), "label": tfds.features.Scalar(np.int32)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(range(6)), "test": self._generate_examples(range(6, 8))}

    def _generate_examples(self, numbers):
        for i in numbers:
            yield i, {"text": f"poem nr {i}, ważny", "label": i}


def test_a_tfds_set_by_name(small, tmp_path):
    def make(split, **k):
        return sources.corpus_of_tfds("tiny_poems", split, data_dir=str(tmp_path / "tfds"), **k)

    made = data.prepare(make("train"), small, tmp_path / "out")
    assert sorted(small.decode(made[i]) for i in range(len(made))) == [f"poem nr {i}, ważny" for i in range(6)]
    assert len(list(make("test").documents())) == 2 and len(list(make("train[:50%]").documents())) == 3
    assert make("test").fingerprint != make("train").fingerprint
    with pytest.raises(ValueError, match="no text feature 'label'; found 'text', 'label'|no text feature 'label'"):
        make("train", field="label")


def test_command_line_without_tensorflow(tmp_path):
    source = write(tmp_path / "in", **{f"d{i}__txt": text for i, text in enumerate(TEXTS)})
    script = f"""
import sys
from fot_jax import data, sources
model, out = {str(tmp_path / "t.model")!r}, {str(tmp_path / "o")!r}
data.main(["train-tokenizer", {str(source)!r}, "--output", model, "--vocab_size", "330"])
data.main(["prepare", {str(source)!r}, "--tokenizer", model, "--output", out])
assert "tensorflow" not in sys.modules and "torch" not in sys.modules
data.main(["prepare", "/nowhere.txt", "--tokenizer", model, "--output", out])
"""
    root = os.path.dirname(os.path.dirname(os.path.abspath(data.__file__)))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root)
    assert done.returncode == 1 and done.stderr.endswith("error: /nowhere.txt: no such file or folder\n"), done.stderr
    assert ": 3 documents, " in done.stdout
    (folder,) = (p for p in (tmp_path / "o").iterdir() if p.is_dir())
    assert data.TokenSet(folder).vocab_size == 330


# ---- mixtures


def tokens_of(lengths, start=10, fingerprint="f"):
    """Stands for a TokenSet: the tokens of document i are 10 000 i + start, + 1, ..."""

    class Arrays(list):
        pass

    made = Arrays(np.arange(n, dtype=np.int32) + start + 10_000 * i for i, n in enumerate(lengths))
    made.lengths = np.array(lengths, np.int32)
    made.fingerprint, made.tokenizer_fingerprint, made.vocab_size = fingerprint, "t", 10**6
    made.bos_id, made.eos_id, made.pad_id = 1, 2, 0
    return made


def test_mixture_draws_by_weight_and_goes_through_each_source_in_turn():
    lengths = [5] * 7, [3, 9, 4, 8], [5] * 50
    sources = [data.Source(tokens_of(n), w, m) for n, w, m in zip(lengths, (25, 10, 65), (0, 5, 0), strict=True)]
    mixture = data.Mixture(sources, seed=3)
    drawn = [mixture.locate(n) for n in range(2048)]
    counts = np.bincount([s for s, _ in drawn[:1024]], minlength=3)
    assert counts.sum() == 1024 and np.abs(counts / 1024 - (0.25, 0.10, 0.65)).max() < 2 / 1024
    for source, kept in enumerate((range(7), (1, 3), range(50))):
        order = [i for s, i in drawn if s == source]
        rounds = [order[i : i + len(kept)] for i in range(0, len(order) - len(kept) + 1, len(kept))]
        assert all(sorted(r) == sorted(kept) for r in rounds)  # every document once in each round
        assert len(set(map(tuple, rounds))) > 1  # in another order
    # no stream of 8 is fed by one source only, as a fixed pattern of draws would have it
    assert all(len({s for s, _ in drawn[r::8]}) == 3 for r in range(8))
    assert [data.Mixture(sources, seed=3).locate(n) for n in (2047, 5, 900)] == [drawn[2047], drawn[5], drawn[900]]
    assert [data.Mixture(sources, seed=4).locate(n) for n in range(50)] != drawn[:50]
    assert mixture.tokens(0).tolist()[:: mixture.length(0) + 1] == [1, 2]


def test_a_mixture_gone_through_once():
    sources = [data.Source(tokens_of([4, 2, 6])), data.Source(tokens_of([9, 1, 7]), min_tokens=5)]
    stored = data.Mixture(sources, seed=None, repeat=False)
    assert [stored.locate(n) for n in range(stored.n_documents)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 2)]
    shuffled = data.Mixture(sources, seed=1, repeat=False)
    assert sorted(shuffled.locate(n) for n in range(5)) == [stored.locate(n) for n in range(5)]
    with pytest.raises(IndexError):
        stored.locate(5)


def test_mixture_errors():
    with pytest.raises(ValueError, match="source 1: weight is 0"):
        data.Mixture([data.Source(tokens_of([3])), data.Source(tokens_of([3]), 0)], seed=0)
    with pytest.raises(ValueError, match=r"source 0: no document of 4 tokens \(longest: 3\)"):
        data.Mixture([data.Source(tokens_of([3]), min_tokens=4)], seed=0)
    with pytest.raises(ValueError, match="no sources"):
        data.Mixture([], seed=0)
    with pytest.raises(ValueError, match="seed is None"):
        data.Mixture([data.Source(tokens_of([3]))], seed=None)
    other = tokens_of([3])
    other.tokenizer_fingerprint = "u"
    with pytest.raises(ValueError, match="source 1: made with another tokenizer"):
        data.Mixture([data.Source(tokens_of([3])), data.Source(other)], seed=0)


# ---- packing


def simulate(mixture, streams, window, k, align, steps):
    """Every stream written out token by token, then cut: a list of batches [streams][k] of lists of 5-tuples."""
    tapes = []
    for r in range(streams):
        tape, draw = [], r
        while len(tape) < steps * k * window:
            if mixture.n_documents is not None and draw >= mixture.n_documents:
                tape.append((0, 0, False, -1))
                continue
            text = mixture.tokens(draw).tolist()
            tape += [(a, b, True, draw) for a, b in itertools.pairwise(text)] + [(text[-1], 0, False, draw)]
            while align and len(tape) % window:
                tape.append((0, 0, False, -1))
            draw += streams
        tapes.append(tape)
    batches = []
    for step in range(steps):
        batch = [[None] * k for _ in range(streams)]
        for r, j in itertools.product(range(streams), range(k)):
            cut = tapes[r][(step * k + j) * window :][:window]
            seen = []
            for *_, draw in cut:
                if draw >= 0 and draw not in seen:
                    seen.append(draw)
            batch[r][j] = [(*cell, seen.index(cell[3]) + 1 if cell[3] >= 0 else 0) for cell in cut]
        batches.append(batch)
    while batches and mixture.n_documents is not None and all(c[3] < 0 for r in batches[-1] for w in r for c in w):
        batches.pop()
    return batches


NAMES = ("tokens", "targets", "loss_mask", "document", "segment_ids")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(2, 25), min_size=1, max_size=9),
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(1, 3),
    st.sampled_from(["packed", "blocks"]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_packing_equals_the_streams_written_out(lengths, streams, window, k, layout, align, repeat, seed):
    mixture = data.Mixture([data.Source(tokens_of(lengths))], seed=seed, repeat=repeat)
    sizes = dict(streams=streams, window=window, windows_per_step=k, layout=layout, align_documents=align)
    steps = 12 if repeat else 400
    got = list(itertools.islice(data.Packed(mixture, **sizes), steps))
    want = simulate(mixture, streams, window, k, align, steps)
    assert len(got) == len(want)
    for batch, expected in zip(got, want, strict=True):
        assert {name: (a.shape, a.dtype.name) for name, a in batch.items()} == {
            name: ((streams * k, window), "bool" if name == "loss_mask" else "int32") for name in NAMES
        }
        for r, j in itertools.product(range(streams), range(k)):
            row = r * k + j if layout == "packed" else j * streams + r
            cells = [tuple(int(batch[name][row, t]) for name in NAMES) for t in range(window)]
            assert cells == [tuple(map(int, cell)) for cell in expected[r][j]]


def test_targets_cross_the_border_of_windows_and_steps():
    mixture = data.Mixture([data.Source(tokens_of([10]))], seed=None, repeat=False)
    first, second = list(data.Packed(mixture, streams=1, window=4, windows_per_step=2))
    assert first["tokens"].tolist() == [[1, 10, 11, 12], [13, 14, 15, 16]]
    assert first["targets"].tolist() == [[10, 11, 12, 13], [14, 15, 16, 17]]
    assert second["tokens"].tolist() == [[17, 18, 19, 2], [0, 0, 0, 0]]
    assert second["targets"].tolist()[0] == [18, 19, 2, 0]
    assert second["loss_mask"].tolist() == [[True, True, True, False], [False] * 4]
    assert second["segment_ids"].tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]


def same(a, b):
    return all(np.array_equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in NAMES)


def mixture_of_two(seed=5):
    rng = np.random.RandomState(0)
    sources = [data.Source(tokens_of(rng.randint(2, 60, n)), w) for n, w in ((20, 2), (13, 1))]
    return data.Mixture(sources, seed=seed)


@pytest.mark.parametrize("ahead", [0, 3])
def test_resuming_twice_gives_the_same_batches(ahead):
    packed = data.Packed(mixture_of_two(), streams=4, window=16, windows_per_step=2)
    whole = list(itertools.islice(packed, 30))
    runs, state = [], None
    for steps in (7, 11, 12):
        batches = data.Batches(packed, ahead=ahead)
        if state is not None:
            batches.set_state(json.loads(state))
        runs += [next(batches) for _ in range(steps)]
        state = json.dumps(batches.get_state())
        batches.close()
    assert len(runs) == 30 and all(map(same, runs, whole))
    assert not same(whole[0], whole[1])
    assert len(state) < 150


@pytest.mark.parametrize("layout", ["packed", "blocks"])
def test_the_stream_does_not_depend_on_who_makes_which_rows(layout):
    def make(rows=None):
        return data.Packed(mixture_of_two(), streams=4, window=8, windows_per_step=2, layout=layout, rows=rows)

    def joined(parts, batches):
        whole = {name: np.empty((8, 8), batches[0][name].dtype) for name in NAMES}
        for rows, batch in zip(parts, batches, strict=True):
            for name, x in batch.items():
                whole[name][list(rows)] = x
        return whole

    whole = list(itertools.islice(make(), 12))
    splits = [[range(8)], [(0, 1, 4, 5), (2, 3, 7, 6)], [(i,) for i in range(8)]]
    for parts in splits[1:]:
        made = [list(itertools.islice(make(rows), 12)) for rows in parts]
        for step, batch in enumerate(whole):
            assert same(batch, joined(parts, [one[step] for one in made]))
    state, got = None, []
    for parts, steps in zip((splits[1], splits[0], splits[2]), (5, 3, 4), strict=True):  # one run, three numbers
        iterators = [iter(make(rows)) for rows in parts]
        for iterator in iterators:
            if state is not None:
                iterator.set_state(state)
        for _ in range(steps):
            got.append(joined(parts, [next(iterator) for iterator in iterators]))
        assert all(iterator.get_state() == iterators[0].get_state() for iterator in iterators)
        state = iterators[-1].get_state()
    assert all(map(same, got, whole))


def test_only_documents_of_the_rows_asked_for_are_read():
    source = tokens_of([30] * 8)
    mixture = data.Mixture([data.Source(source)], seed=None, repeat=False)
    read = []
    recorder = types.SimpleNamespace(
        tokens=lambda n: read.append(n) or mixture.tokens(n),
        **{n: getattr(mixture, n) for n in ("length", "n_documents", "fingerprint", "pad_id")},
    )
    list(data.Packed(recorder, streams=4, window=8, rows=(2, 3)))
    assert read == [2, 3, 6, 7]  # each of them once, though read in several windows


def test_packing_errors():
    mixture = mixture_of_two()
    with pytest.raises(ValueError, match="layout is 'rows'; wanted 'packed' or 'blocks'"):
        data.Packed(mixture, streams=3, window=8, layout="rows")
    with pytest.raises(ValueError, match="window is 0"):
        data.Packed(mixture, streams=3, window=0)
    for rows in ((0, 4), (-1,), (2, 2)):
        with pytest.raises(ValueError, match=r"rows are .*; wanted some of 0..3, each once"):
            data.Packed(mixture, streams=4, window=8, rows=rows)
    state = iter(data.Packed(mixture, streams=4, window=8)).get_state()
    for other in (dict(streams=5, window=8), dict(streams=4, window=9)):
        with pytest.raises(ValueError, match="data position"):
            iter(data.Packed(mixture, **other)).set_state(state)
    with pytest.raises(ValueError, match="data position"):
        iter(data.Packed(mixture_of_two(seed=6), streams=4, window=8)).set_state(state)


def test_errors_in_the_background_reach_the_loop():
    source = tokens_of([5] * 8)
    source[3] = None
    batches = data.Batches(data.Packed(data.Mixture([data.Source(source)], seed=0), streams=4, window=8))
    with pytest.raises((TypeError, ValueError)):
        list(batches)
    batches.close()


def test_from_files_to_batches(small, tmp_path):
    made = data.prepare(sources.corpus_of_documents(documents(12), "mine"), small, tmp_path)
    mixture = data.Mixture([data.Source(made, min_tokens=5)], seed=None, repeat=False)
    pieces = {}
    for batch in data.Batches(data.Packed(mixture, streams=3, window=8, windows_per_step=2, layout="packed")):
        for tokens, names in zip(batch["tokens"], batch["document"], strict=True):
            for token, name in zip(tokens, names, strict=True):
                pieces.setdefault(int(name), []).append(int(token))
    pieces.pop(-1, None)
    kept = [i for i in range(12) if made.lengths[i] >= 5]
    assert len(pieces) == len(kept) > 0
    for draw, ids in pieces.items():
        assert small.decode(ids) == documents(12)[kept[draw]].text


# ---- Python's library


def test_packages_become_documents(tmp_path):
    def code(i):
        return f"value_{i} = {i}\n" * 30

    root = tmp_path / "lib"
    write(root / "pkg", __init____py="", b__py=code(1), a__py=code(2), copy__py=code(1), data__txt="no")
    write(root / "pkg" / "sub", z__py="# coding: latin-1\nname = '\xe9'\n".encode("latin-1") + code(3).encode())
    write(root / "pkg" / "tests", t__py=code(4))
    write(root / "site-packages" / "other", x__py=code(5))
    write(root / "encodings", cp1__py=code(6))
    write(root / "test", test_pkg__py=code(7), test_mod__py=code(8))
    write(root, mod__py=code(9), tiny__py="x = 1\n", broken__py=b"\xff\xfe\x00")
    got = dict(sources.python_library_documents(roots=[root], min_chars=100))
    assert sorted(got) == ["lib/mod", "lib/pkg"]
    heads = [line for line in got["lib/pkg"].splitlines() if line.startswith("# pkg")]
    assert heads == ["# pkg/a.py", "# pkg/b.py", "# pkg/sub/z.py"]  # the copy is left out
    assert "name = 'é'" in got["lib/pkg"]
    with_tests = dict(sources.python_library_documents(roots=[root], min_chars=100, tests=True))
    assert sorted(with_tests) == ["lib/mod", "lib/pkg", "test/test_mod", "test/test_pkg"]
    cut = sources.python_library_documents(roots=[root], min_chars=100, max_chars=900, packages=["pkg"])
    assert [d.id for d in cut] == ["lib/pkg", "lib/pkg#1", "lib/pkg#2"][: len(cut)] and len(cut) > 1
    assert all(len(d.text) <= 900 for d in cut)
    with pytest.raises(ValueError, match="no Python package"):
        sources.python_library_documents(roots=[root], min_chars=10**7)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        sources.python_library_documents(roots=[root / "nowhere"])
    with pytest.raises(ValueError, match="split is 'test'"):
        sources.python_library_documents("test", roots=[root])


def test_pythons_own_library_splits_by_package():
    train, validation = (sources.python_library_documents(split) for split in ("train", "validation"))
    assert sum(len(d.text) for d in train) > 4_000_000 and sum(len(d.text) for d in validation) > 300_000
    assert len(train) + len(validation) == len(sources.python_library_documents())
    assert not {d.id for d in train} & {d.id for d in validation}
    for names in ("_pydecimal decimal test_decimal _decimal", "asyncio test_asyncio", "_pyio io"):
        assert len({sources._is_held_out(name, 0.5) for name in names.split()}) == 1
