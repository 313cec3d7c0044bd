"""Evaluation: what counts as recall, that memory is what it is said to be, and the report's files."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fot_jax
from fot_jax import memory, model, sharding
from fot_jax.config import DtypePolicy
from fot_jax.evals import Report, perplexity, quickstart
from fot_jax.evals.journal import Journal
from fot_jax.evals.subject import Subject

CONFIG = fot_jax.ModelConfig(vocab_size=19, d_model=16, d_ff=24, n_layers=2, n_heads=2, window=4, mem_layers=(1,))


@pytest.fixture(scope="module")
def params():
    return jax.jit(model.init_params, static_argnums=0)(CONFIG.replace(init_std=0.5), jax.random.key(0))


def subject(params, options=None, config=CONFIG, reading=memory.DENSE):
    """The model as options, or a way of reading, have it read."""
    return Subject(config, params, None, reading) if options is None else Subject.of(config, params, None, options)


def evaluated(params, options, given, config=CONFIG, journal=None):
    return perplexity.run(subject(params, options, config), options, given, journal or Journal())


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
    found = perplexity.losses(subject(params, reading=reading), perplexity.cut([document], 4, 1), 100)
    # 22 inputs in windows of 4: the last two are long_forward's open window.
    logits = fot_jax.long_forward(
        CONFIG, params, document[None, :-1], last_context_length=2, memory=reading.kind, k=reading.k
    )
    wanted = -jnp.take_along_axis(jax.nn.log_softmax(logits[0]), document[1:, None], axis=1).mean()
    np.testing.assert_allclose(found.all, wanted, rtol=1e-5)
    assert found.tokens == 22


def test_memory_is_cleared_at_documents_or_kept(params):
    first, second = documents(17, 13)
    alone = [perplexity.losses(subject(params), perplexity.cut([d], 4, 1), 8).all for d in (first, second)]
    both = perplexity.cut([first, second], 4, 1)
    single = perplexity.losses(subject(params), both, 8)
    np.testing.assert_allclose(single.all, (16 * alone[0] + 12 * alone[1]) / 28, rtol=1e-5)
    multi = perplexity.losses(subject(params), both, 8, clear_at_documents=False)
    assert abs(multi.all - single.all) > 1e-4


def test_a_short_memory_is_the_last_tokens(params):
    (document,) = documents(25)
    longer = perplexity.losses(subject(params), perplexity.cut([document], 4, 1), 4).all
    # With memory of one window, every window's loss is that of the document cut before its predecessor, as this
    # model's only memory layer is its last: its keys do not depend on what memory held before.
    wanted = []
    for s in range(0, 24, 4):
        piece = document[None, max(0, s - 4) : s + 5]
        logits = fot_jax.long_forward(CONFIG, params, piece[:, :-1], last_context_length=4)[0, -4:]
        wanted.append(-np.asarray(jax.nn.log_softmax(logits))[np.arange(4), piece[0, -4:]])
    np.testing.assert_allclose(longer, np.mean(wanted), rtol=1e-5)


def test_report(params, tmp_path):
    options = perplexity.default_options()
    options.update(memory_tokens=(8, 0), rows=2, max_tokens=12)
    report = evaluated(params, options, documents(20, 9))
    assert [row[0] for row in report.rows] == [0, 8] and "memory tokens" in report.table()
    report.write(tmp_path, "perplexity")
    values = json.loads((tmp_path / "perplexity.json").read_text())
    assert set(values["perplexity"]) == {"0", "8"} and values["tokens"] == 11 + 8
    assert (tmp_path / "perplexity.png").stat().st_size > 1000
    assert {p.name for p in tmp_path.iterdir()} == {"perplexity.json", "perplexity.png"}
    Report("t", ("a",), ((1,),), {"x": float("nan")}, lambda path: path.touch()).write(tmp_path, "nan")
    assert json.loads((tmp_path / "nan.json").read_text()) == {"x": None}


def test_every_token_is_cut_once_with_a_stride():
    (document,) = documents(23)
    cut = perplexity.cut([document], 8, 1, stride=3)
    assert cut.counts.sum() == 22 and cut.position[cut.counts].tolist() == list(range(22))
    assert cut.counts[0].sum() == 8 and (cut.counts[1:-1].sum(axis=(1, 2)) == 3).all()
    np.testing.assert_array_equal(cut.position[:, 0, 0], np.arange(len(cut.tokens)) * 3)


@pytest.mark.parametrize("clears", [True, False])
def test_sliding_windows_are_those_that_are_spelled_out(params, clears):
    """Each window with a memory made by hand: of each token the keys and values of the window that counts it."""
    config, given, m, stride, W = CONFIG.replace(window=6), documents(25, 17), 7, 2, 6
    windows = perplexity.cut(given, W, 1, stride)
    found = perplexity.token_losses(subject(params, config=config), windows, m, clear_at_documents=clears)

    @jax.jit
    def read(tokens, valid, keys, values, count):
        mem = memory.append(memory.init_memory(config, 1, m), (keys,), (values,), count)
        hidden, (keys,), (values,) = model.read_window(config, params, tokens, mem=mem, valid_BT=valid)
        return jax.nn.log_softmax(model.logits(config, params, hidden))[0], keys, values

    nothing = np.zeros((1, config.n_kv_heads, config.head_size, 1), np.float32)
    stream, wanted = [], []  # (key, value) of every token so far
    for document in given:  # longest first, as they are cut
        stream = [] if clears else stream
        before, n = len(stream), len(document) - 1
        for start in range(0, n, stride):
            fresh = 0 if start == 0 else W - stride  # first column that counts
            if start + fresh >= n:
                break
            seen = stream[max(0, before + start - m) : before + start]
            pad = [nothing] * (m - len(seen))
            keys, values = (np.concatenate([*x, *pad], -1) for x in (zip(*seen) if seen else ((), ())))
            at = np.minimum(start + np.arange(W), n - 1)[None]
            valid = start + np.arange(W)[None] < n
            log_p, keys, values = map(np.asarray, read(document[at], valid, keys, values, np.array([len(seen)])))
            for t in range(fresh, min(W, n - start)):
                wanted.append(-float(log_p[t, document[start + t + 1]]))
                stream.append((keys[..., t : t + 1], values[..., t : t + 1]))
    np.testing.assert_allclose(found[windows.counts], wanted, rtol=2e-5)


@pytest.mark.parametrize(("clears", "stride"), [(True, 4), (False, 4), (False, 3)])
def test_memory_dealt_to_devices_holds_as_many_tokens(params, devices, clears, stride):
    windows = perplexity.cut(documents(40, 33, 17, 22), 4, 2, stride)
    wanted = perplexity.token_losses(subject(params), windows, 13, clear_at_documents=clears)
    mesh = sharding.make_mesh(dict(data=2, context=4), devices)
    with jax.set_mesh(mesh):
        put = jax.device_put(params, sharding.replicated(mesh))
        found = perplexity.token_losses(subject(put), windows, 13, clear_at_documents=clears)
    np.testing.assert_allclose(found[windows.counts], wanted[windows.counts], rtol=2e-5)


def test_with_the_window_as_stride_nothing_changes(params):
    options = perplexity.default_options()
    options.update(memory_tokens=(0, 6), rows=2)
    found = [evaluated(params, options.copy_and_resolve_references(), documents(30, 9, 14)).values]
    options.stride = 4
    found.append(evaluated(params, options, documents(30, 9, 14)).values)
    assert found[0]["perplexity"] == found[1]["perplexity"]


def test_perplexity_by_position(params):
    options = perplexity.default_options()
    options.update(memory_tokens=(6,), rows=2)
    values = evaluated(params, options, documents(30, 9, 14)).values
    assert values["positions"] == [0, 4, 8, 16] and values["tokens_at_positions"] == [12, 12, 5 + 8, 13]
    logs, counts = np.log(values["perplexity_at_positions"]["6"]), values["tokens_at_positions"]
    np.testing.assert_allclose(np.average(logs, weights=counts), np.log(values["perplexity"]["6"]))


def test_memory_is_stored_as_asked(params):
    options = perplexity.default_options()
    options.update(memory_tokens=(0, 12), rows=2, memory_dtype="int8")
    found = evaluated(params, options, documents(40, 33))
    assert "int8" in found.title and found.values["options"]["memory_dtype"] == "int8"
    as_int8 = CONFIG.replace(dtypes=DtypePolicy(memory="int8"))
    options.memory_dtype = ""
    same, exact = (evaluated(params, options, documents(40, 33), config) for config in (as_int8, CONFIG))
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
        (dict(rows=0), "rows is 0 and capacity 0; wanted at least 1 and 0"),
        (dict(max_tokens=-1), "max_tokens is -1"),
        (dict(stride=5), r"stride is 5; wanted 1..4 \(the window\)"),
        (dict(window=5), "window is 5; wanted 1..4, the checkpoint's"),
        (dict(last_context_length=5), "last_context_length is 5; wanted 1..4"),
        (dict(mode="multi", rows=1), "rows is 1 for 1 documents; mode 'multi' wanted at least two documents a row"),
    ],
)
def test_bad_options(params, changes, message):
    options = perplexity.default_options()
    options.update(changes)
    with pytest.raises(ValueError, match=message):
        evaluated(params, options, documents(20))


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
