"""Evaluation: what counts as recall, that memory is what it is said to be, and the report's files."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fot_jax
from fot_jax import memory, model
from fot_jax.config import DtypePolicy
from fot_jax.evals import Report, perplexity, quickstart

CONFIG = fot_jax.ModelConfig(vocab_size=19, d_model=16, d_ff=24, n_layers=2, n_heads=2, window=4, mem_layers=(1,))


@pytest.fixture(scope="module")
def params():
    return jax.jit(model.init_params, static_argnums=0)(CONFIG.replace(init_std=0.5), jax.random.key(0))


def documents(*lengths):
    rng = np.random.default_rng(0)
    return [rng.integers(0, CONFIG.vocab_size, n).astype(np.int32) for n in lengths]


def test_recall_tokens_by_hand():
    # Windows of inputs: 1 2 3 4 | 1 2 3 9 | 1 2 3 1 2 3. The token after a window's last belongs to that window.
    tokens = np.array([1, 2, 3, 4, 1, 2, 3, 9, 1, 2, 3, 1, 2, 3])
    got = np.flatnonzero(perplexity.recall_targets(tokens, 4))
    # 6 completes 1 2 3, last seen ending at 2, before window 1; 10 the one ending at 6, before window 2. 13's last
    # occurrence ends at 10, within window 3's start at 12: also before it.
    np.testing.assert_array_equal(got, [6, 10, 13])
    np.testing.assert_array_equal(np.flatnonzero(perplexity.recall_targets(tokens, 16)), [])


def test_recall_tokens_are_those_of_a_search():
    tokens, W = np.random.default_rng(1).integers(0, 3, 200), 7
    wanted = np.zeros(200, bool)
    for i in range(2, 200):
        before = [j for j in range(2, i) if list(tokens[j - 2 : j + 1]) == list(tokens[i - 2 : i + 1])]
        wanted[i] = bool(before) and before[-1] < (i - 1) // W * W
    np.testing.assert_array_equal(perplexity.recall_targets(tokens, W), wanted)


def test_every_token_is_cut_once():
    given = documents(9, 2, 30, 5)
    cut = perplexity.cut(given, 4, rows=3)
    assert cut.counts.sum() == sum(len(d) - 1 for d in given) and cut.starts.sum() == 4
    got = sorted(tuple(pair) for pair in np.stack([cut.tokens[cut.counts], cut.targets[cut.counts]], 1).tolist())
    assert got == sorted(pair for d in given for pair in zip(d[:-1].tolist(), d[1:].tolist(), strict=True))
    with pytest.raises(ValueError, match="document 1 has fewer than two tokens"):
        perplexity.cut(documents(3, 1), 4, rows=2)


@pytest.mark.parametrize("reading", [memory.DENSE, memory.Reading("topk", 3)])
def test_with_all_of_memory_the_losses_are_those_of_long_forward(params, reading):
    (document,) = documents(23)
    found = perplexity.losses(CONFIG, params, perplexity.cut([document], 4, 1), 100, reading=reading)
    # 22 inputs in windows of 4: the last two are long_forward's open window.
    logits = fot_jax.long_forward(
        CONFIG, params, document[None, :-1], last_context_length=2, memory=reading.kind, k=reading.k
    )
    wanted = -jnp.take_along_axis(jax.nn.log_softmax(logits[0]), document[1:, None], axis=1).mean()
    np.testing.assert_allclose(found.all, wanted, rtol=1e-5)
    assert found.tokens == 22


def test_memory_is_cleared_at_documents_or_kept(params):
    first, second = documents(17, 13)
    alone = [perplexity.losses(CONFIG, params, perplexity.cut([d], 4, 1), 8).all for d in (first, second)]
    both = perplexity.cut([first, second], 4, 1)
    single = perplexity.losses(CONFIG, params, both, 8)
    np.testing.assert_allclose(single.all, (16 * alone[0] + 12 * alone[1]) / 28, rtol=1e-5)
    multi = perplexity.losses(CONFIG, params, both, 8, clear_at_documents=False)
    assert abs(multi.all - single.all) > 1e-4


def test_a_short_memory_is_the_last_tokens(params):
    (document,) = documents(25)
    longer = perplexity.losses(CONFIG, params, perplexity.cut([document], 4, 1), 4).all
    # With memory of one window, every window's loss is that of the document cut before its predecessor...
    pieces = [perplexity.cut([document[max(0, s - 4) : s + 5]], 4, 1) for s in range(0, 24, 4)]
    config = CONFIG
    last = []
    for s, piece in zip(range(0, 24, 4), pieces, strict=True):
        mem = memory.init_memory(config, 1, 8)
        for step in range(len(piece.tokens)):
            arrays = piece.tokens[step], piece.targets[step], piece.valid[step]
            mem, loss = perplexity._step(config, params, *arrays, mem, jnp.int32(4), reading=memory.DENSE)
        last.append(np.asarray(loss)[0])
        assert len(piece.tokens) == (1 if s == 0 else 2)
    # ...as this model's only memory layer is its last: its keys do not depend on what memory held before.
    np.testing.assert_allclose(longer, np.concatenate(last).mean(), rtol=1e-5)


def test_report(params, tmp_path):
    options = perplexity.default_options()
    options.update(memory_tokens=(8, 0), rows=2, max_tokens=12)
    report = perplexity.run(CONFIG, params, options, documents(20, 9))
    assert [row[0] for row in report.rows] == [0, 8] and "memory tokens" in report.table()
    report.write(tmp_path, "perplexity")
    values = json.loads((tmp_path / "perplexity.json").read_text())
    assert set(values["perplexity"]) == {"0", "8"} and values["tokens"] == 11 + 8
    assert (tmp_path / "perplexity.png").stat().st_size > 1000
    assert {p.name for p in tmp_path.iterdir()} == {"perplexity.json", "perplexity.png"}
    Report("t", ("a",), ((1,),), {"x": float("nan")}, lambda path: path.touch()).write(tmp_path, "nan")
    assert json.loads((tmp_path / "nan.json").read_text()) == {"x": None}


def test_memory_is_stored_as_asked(params):
    options = perplexity.default_options()
    options.update(memory_tokens=(0, 12), rows=2, memory_dtype="int8")
    found = perplexity.run(CONFIG, params, options, documents(40, 33))
    assert "int8" in found.title and found.values["options"]["memory_dtype"] == "int8"
    as_int8 = CONFIG.replace(dtypes=DtypePolicy(memory="int8"))
    options.memory_dtype = ""
    same, exact = (perplexity.run(config, params, options, documents(40, 33)) for config in (as_int8, CONFIG))
    assert found.values["perplexity"] == same.values["perplexity"]
    assert found.values["perplexity"]["0"] == exact.values["perplexity"]["0"]
    np.testing.assert_allclose(found.values["perplexity"]["12"], exact.values["perplexity"]["12"], rtol=0.01)
    assert found.values["perplexity"]["12"] != exact.values["perplexity"]["12"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(mode="both"), "mode is 'both'"),
        (dict(memory_tokens=(-1,)), "memory_tokens is"),
        (dict(reading="near"), "memory reading is 'near'"),
        (dict(memory_dtype="int4"), "dtypes.memory is 'int4'; wanted one of float32, bfloat16, float16, int8"),
        (dict(rows=0), "rows is 0 and max_tokens 0; wanted at least 1 and 0"),
        (dict(mode="multi", rows=1), "rows is 1 for 1 documents; mode 'multi' wanted at least two documents a row"),
    ],
)
def test_bad_options(params, changes, message):
    options = perplexity.default_options()
    options.update(changes)
    with pytest.raises(ValueError, match=message):
        perplexity.run(CONFIG, params, options, documents(20))


def test_quickstart_compares_two_models():
    curves = lambda p: {"perplexity": {"0": p, "64": p - 1}, "recall": {"0": p, "64": p - 2}}
    found = {
        which: {**curves(p), "window": 4, "tokens": 9, "options": {"reading": "topk", "k": 7}}
        for which, p in (("fot", 10.0), ("standard", 11.0))
    }
    for facts in found.values():
        facts["recall_tokens"] = 3
    report = quickstart.compare(found)
    assert report.rows == ((0, 10.0, 11.0, 10.0, 11.0), (64, 9.0, 10.0, 8.0, 9.0))
    assert {"fot", "standard", "fot_recall", "standard_recall"} <= set(report.values)
    assert "by 10.0%" in quickstart.verdict(report.values) and "by 20.0%" in quickstart.verdict(report.values)
