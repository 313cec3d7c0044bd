"""Distraction: the share of attention that goes to the own context, against sums of weights in float64."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest
from ml_collections import ConfigDict

import fot_jax
from fot_jax import crossbatch, model, sharding
from fot_jax.evals import distraction
from fot_jax.evals.journal import Journal
from fot_jax.evals.subject import Subject

R, T = 8, 5
SIZES = dict(vocab_size=20, d_model=16, d_ff=24, n_layers=4, n_heads=4, n_kv_heads=2, head_size=4, window=T)
CONFIG = fot_jax.ModelConfig(**SIZES, mem_layers=(1, 2))
SMALL = fot_jax.ModelConfig(**SIZES, mem_layers=(1, 2), mem_positionals=False, qk_norm=True)  # as the paper's models
TOKENS = np.random.default_rng(0).integers(0, 20, (2, R, T)).astype(np.int32)  # previous and current windows


@pytest.fixture(scope="module")
def params():
    return reference.random_params(CONFIG)


def masses_by(score_bytes, monkeypatch):
    """Programs anew, that make so many bytes of scores at a time."""
    monkeypatch.setattr(model, "WINDOW_SCORE_BYTES", score_bytes)
    distraction.previous.clear_cache()
    distraction.masses.clear_cache()


def found(config, params, *contexts, layers=None):
    """r_d for each number of contexts, [contexts, layers, H]."""
    layers = layers or config.mem_layers
    before = distraction.previous(config, params, TOKENS[0], layers=layers)
    return np.stack(
        [distraction.masses(config, params, TOKENS[1], before, np.int32(d), layers=layers) for d in contexts]
    )


def by_hand(config, params, d, tokens=TOKENS, layers=None):
    """r_d, [layers, H]: previous windows tokens[0] and current ones tokens[1] through every layer in float64, weights
    added up one by one.
    """
    R = tokens.shape[1]
    plan = crossbatch.block_plan(2 * R, d)
    K, H, out = config.head_size, config.n_heads, []
    ones = np.ones((2 * R, T), int)
    x = np.asarray(params["embed"]["embedding"], np.float64)[tokens.reshape(2 * R, T)]
    for number, block in enumerate(reference.blocks(config, params)):
        reads, w = number in (layers or config.mem_layers), block["attention"]
        h = reference.rms_norm(x, block["attention_norm"]["scale"], config.norm_eps)
        q, k, v = (np.einsum("btd,dhk->bthk", h, w[name]) for name in "qkv")
        scale = K**-0.5
        if config.qk_norm:
            q = q / np.linalg.norm(q, axis=-1, keepdims=True) * w["temperature"][:, None]
            k, scale = k / np.linalg.norm(k, axis=-1, keepdims=True), 1.0
        k, v = (np.repeat(a, H // config.n_kv_heads, axis=2) for a in (k, v))
        rotates = config.mem_positionals or number not in config.mem_layers
        theta = config.rope_base ** (-2 * np.arange(K // 2) / K) * rotates
        if reads:
            r = np.zeros((H, R, T))
            for head, i, t in np.ndindex(r.shape):
                pairs = (q[R + i, t, head, : K // 2] + 1j * q[R + i, t, head, K // 2 :]) * np.exp(1j * t * theta)
                turned = np.concatenate([pairs.real, pairs.imag])
                weights = [np.exp(k[(i + c) % R, :, head] @ turned * scale).sum() for c in range(d)]
                r[head, i, t] = weights[0] / sum(weights)
            out.append(r.mean(axis=(1, 2)))
        rows = plan.context_rows if reads else None
        o = reference.attend_rows(q, k, v, theta, scale, 0 * ones, ones > 0, ones, reads, rows)
        x = x + np.einsum("bthk,hkd->btd", o, w["o"])
        h = reference.rms_norm(x, block["mlp_norm"]["scale"], config.norm_eps)
        gate = h @ block["mlp"]["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ block["mlp"]["up"])) @ block["mlp"]["down"]
    return np.stack(out)


@pytest.mark.parametrize(
    ("config", "layers", "score_bytes"),
    # 160 bytes: scores of two queries of a row
    [(CONFIG, (1, 2), 2**29), (SMALL, (1, 2), 160), (SMALL, (0, 2), 2**29)],
    ids=["llama", "small, by blocks", "small, other layers"],
)
def test_shares_are_those_of_weights_added_up(config, layers, score_bytes, monkeypatch):
    masses_by(score_bytes, monkeypatch)
    params = reference.random_params(config)
    wanted = np.stack([by_hand(config, params, d, layers=layers) for d in (1, 2, 8)])
    np.testing.assert_allclose(found(config, params, 1, 2, 8, layers=layers), wanted, atol=2e-6)
    assert (wanted[0] == 1).all() and np.abs(wanted[2] - 1 / 8).max() > 0.01  # attention is not even


def test_scores_of_some_rows_exist_at_a_time():
    config = fot_jax.ModelConfig(**{**SIZES, "window": 512}, mem_layers=(1,))  # 4 MiB of scores a row
    params, took = model.abstract_params(config), {}
    for rows in (128, 512):
        tokens = jax.ShapeDtypeStruct((rows, 512), np.int32)
        contexts = jax.eval_shape(lambda p, t: distraction.previous(config, p, t, layers=(1,)), params, tokens)
        for f, more in ((distraction.previous, ()), (distraction.masses, (contexts, np.int32(3)))):
            compiled = f.lower(config, params, tokens, *more, layers=(1,)).compile()
            took[f, rows] = compiled.memory_analysis().temp_size_in_bytes
    for f in (distraction.previous, distraction.masses):
        assert took[f, 512] < 1.2 * took[f, 128] < 1.2 * 3 * model.WINDOW_SCORE_BYTES


def test_equal_keys_share_alike(params):
    flat = jax.tree_util.tree_map_with_path(lambda path, x: 0 * x if path[-1].key == "k" else x, params)
    numbers = (1, 2, 3, 8)
    for d, shares in zip(numbers, found(CONFIG, flat, *numbers)):
        np.testing.assert_allclose(shares, 1 / d, rtol=1e-6)


def test_one_program_for_any_number_of_contexts(params):
    before = distraction.masses._cache_size()
    found(CONFIG, params, 1, 4, 5)
    assert distraction.masses._cache_size() <= before + 1


@pytest.mark.parametrize("score_bytes", [2**29, 1], ids=["all rows", "row by row"])
def test_on_a_mesh(params, devices, score_bytes, monkeypatch):
    wanted = found(CONFIG, params, 1, 3, 8)
    masses_by(score_bytes, monkeypatch)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, devices)
    with jax.set_mesh(mesh):
        put = jax.device_put(params, sharding.param_shardings(mesh, params))
        np.testing.assert_allclose(found(CONFIG, put, 1, 3, 8), wanted, atol=2e-6)


def test_layers_of_a_model_without_memory(params):
    """Any layer can be looked at: the same as if it were a memory layer."""
    stacked = jax.tree.map(lambda *x: jnp.stack(x)[None], *model.layers(CONFIG, params))
    plain = {**{name: params[name] for name in ("embed", "norm", "head")}, "segment_0": {"plain": stacked}}
    config = CONFIG.replace(mem_layers=())
    np.testing.assert_allclose(
        found(config, plain, 4, layers=(1, 2)), found(CONFIG, params, 4, layers=(1, 2)), rtol=1e-6
    )


def options(**changes):
    given = distraction.default_options()
    given.update({"rows": 4, "contexts": (4, 1), **changes})
    return given


def test_windows_of_documents_by_hand():
    documents = [np.arange(100 * i, 100 * i + n, dtype=np.int32) for i, n in enumerate((20, 14, 15, 16, 15))]
    (cut,) = distraction.batches_of(documents, options(first=1, windows=1), 5)  # windows 1 and 2, of three needed
    assert cut.shape == (4, 2, 5) and cut[0].flatten().tolist() == list(range(cut[0, 0, 0], cut[0, 0, 0] + 10))
    assert sorted(cut[:, 0, 0]) == [5, 205, 305, 405]  # document 1 is too short
    with pytest.raises(ValueError, match=r"4 of 5 documents have 15 tokens \(1 \+ 1 \+ 1 windows\); wanted at least 8"):
        distraction.batches_of(documents, options(first=1, batches=2), 5)


def test_inputs_are_batches_of_windows_or_refused(monkeypatch):
    """Before weights are read: of the model there is only its configuration."""
    documents = [np.arange(n, dtype=np.int32) for n in (12, 13, 11, 12)]
    monkeypatch.setattr(distraction.texts, "documents", lambda *_: documents)
    config = lambda **changes: ConfigDict(dict(data={}, options=options(**changes)))
    (cut,) = distraction.inputs(config(), CONFIG, None, None)
    assert cut.tolist() == [[[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]] * 4
    with pytest.raises(ValueError, match=r"1 of 4 documents have 13 tokens .*; wanted at least 4 \(rows x batches\)"):
        distraction.inputs(config(windows=12, window=1), CONFIG, None, None)
    with pytest.raises(ValueError, match="0 of 4 documents have 15 tokens"):
        distraction.inputs(config(windows=2), CONFIG, None, None)


@pytest.fixture(scope="module")
def batches():
    rng = np.random.default_rng(1)
    documents = [rng.integers(0, 20, 17).astype(np.int32) for _ in range(9)]
    return distraction.batches_of(documents, options(batches=2, windows=2), T)


def run(params, cut, journal=None, **changes):
    given = options(**{"batches": 2, "windows": 2, **changes})
    return distraction.run(Subject.of(CONFIG, params, None, given), given, cut, journal or Journal())


def test_report(params, batches, tmp_path):
    report = run(params, batches)
    assert report.columns == ("contexts", "1/d", "layer 1", "layer 2") and [row[:2] for row in report.rows] == [
        (1, 1.0),
        (4, 0.25),
    ]
    each = [by_hand(CONFIG, params, 4, cut[:, w : w + 2].swapaxes(0, 1)) for cut in batches for w in range(2)]
    report.write(tmp_path, "distraction")
    values = json.loads((tmp_path / "distraction.json").read_text())
    wanted = np.mean(each, axis=0)  # [layers, H]
    np.testing.assert_allclose([values["mass_of_heads"][str(layer)]["4"] for layer in (1, 2)], wanted, atol=2e-6)
    np.testing.assert_allclose(report.rows[1][2:], wanted.mean(1), atol=2e-6)
    assert values["mass"]["2"] == {"1": 1.0, "4": report.rows[1][3]} and values["queries"] == 2 * 2 * 4 * T
    assert (tmp_path / "distraction.png").stat().st_size > 1000


def test_stopped_and_gone_on_with(params, batches, tmp_path, monkeypatch):
    whole, previous, calls = run(params, batches).values, distraction.previous, []

    def stops(*arguments, **options):
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return previous(*arguments, **options)

    monkeypatch.setattr(distraction, "previous", stops)
    path = tmp_path / "journal.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(params, batches, Journal(path, {}))
    assert run(params, batches, Journal(path, {})).values == whole
    assert len(calls) == 3 + 2  # two of four parts were there


def test_the_same_report_on_eight_devices(params, batches, devices):
    batch = [np.concatenate(batches)]
    whole = run(params, batch, rows=8, batches=1).values
    mesh = sharding.make_mesh({"data": 8}, devices)
    with jax.set_mesh(mesh):
        put = jax.device_put(params, sharding.param_shardings(mesh, params))
        split = run(put, batch, rows=8, batches=1).values
        with pytest.raises(ValueError, match="rows is 4; wanted a multiple of 8, over which mesh .*'data': 8"):
            run(put, batches)
    for found in "mass", "mass_of_heads":
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), split.pop(found), whole.pop(found))
    assert split == whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(contexts=(1, 5)), r"contexts is \(1, 5\); wanted numbers in 1..4 \(rows\)"),
        (dict(contexts=(0,)), r"contexts is \(0,\)"),
        (dict(window=6), "window is 6; wanted 1..5"),
        (dict(windows=0), "windows 0, first 0"),
        (dict(layers=(4,)), r"layers is \(4,\); wanted numbers in 0..3"),
        (dict(rows=0), "rows is 0"),
    ],
)
def test_bad_options(changes, message):
    assert not {"reading", "k", "memory_dtype", "last_context_length", "capacity"} & set(options())  # do nothing here
    given = options()
    given.update(changes)
    with pytest.raises(ValueError, match=message):
        distraction.check(CONFIG, given)


def test_a_model_without_memory_needs_layers_stated():
    plain = CONFIG.replace(mem_layers=())
    with pytest.raises(ValueError, match="the model has no memory layers .*; wanted layers stated"):
        distraction.check(plain, options())
    distraction.check(plain, options(layers=(1,)))
