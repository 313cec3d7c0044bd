"""Contexts that travel and contexts side by side, on one device and on eight, are one softmax in float64."""

from __future__ import annotations

import functools

import float64_reference
import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference
import pytest

from fot_jax import attention, crossbatch, model, sharding
from fot_jax.config import ModelConfig

T = 8
CONFIG = ModelConfig(
    vocab_size=48, d_model=16, d_ff=24, n_layers=3, n_heads=4, n_kv_heads=2, head_size=8, window=T, mem_layers=(0, 2)
)
PLANS = {
    "published": (crossbatch.published_plan(16, 5), {}),
    "stepping": (crossbatch.published_plan(16, 3, 4, True), {"n_kv_heads": 4}),
    "3b": (crossbatch.longllama_3b_plan(16), {}),
    "7b": (crossbatch.longllama_7b_plan(16), {}),
    "blocks": (crossbatch.block_plan(16, 3), {"mem_positionals": False, "qk_norm": True, "tie_embeddings": True}),
    "all documents": (crossbatch.block_plan(16, 8), {"mem_layers": (1,)}),
    "one document": (crossbatch.block_plan(16, 1), {"mem_layers": (1,)}),
    "two earlier windows": (crossbatch.block_plan(24, 5, windows=2), {"mem_positionals": False}),
    "two documents": (crossbatch.block_plan(24, 2, windows=2), {"mem_layers": (1,)}),
}
MESHES = {"one": {"data": 1}, "data": {"data": 8}, "all": {"data": 2, "fsdp": 2, "tensor": 2}}


def padded(rows):
    """Two documents in row 0, padding behind in row 1, before in row 2, nothing but padding in row 3."""
    ids = np.ones((rows, T), np.int32)
    ids[0, 3:], ids[1, 5:], ids[2, :2], ids[3] = 2, 0, 0, 0
    return ids


@functools.cache
def case(name, with_segments):
    plan, changes = PLANS[name]
    config = CONFIG.replace(**changes)
    rng = np.random.default_rng(0)
    # Logits of about one: what float32 rounds is then below 1e-5.
    params = jax.tree.map(lambda x: x * np.float32(0.6), numpy_reference.random_params(config))
    tokens = rng.integers(0, config.vocab_size, (plan.rows, T)).astype(np.int32)
    ids = padded(plan.rows) if with_segments else None
    weight = rng.standard_normal((plan.rows, T, config.vocab_size)) * (1 if ids is None else (ids > 0)[..., None])
    wanted = float64_reference.value_and_gradients(config, params, tokens, plan, ids, weight)
    return config, plan, params, tokens, ids, weight, wanted


@pytest.mark.parametrize("execution, mesh_name", [("concatenate", "one"), ("ring", "one"), ("ring", "all")])
@pytest.mark.parametrize("name, with_segments", [(name, name in ("published", "blocks")) for name in PLANS])
def test_every_scheme_is_the_float64_model(name, with_segments, execution, mesh_name, devices):
    check(name, with_segments, execution, mesh_name, devices)


def test_contexts_side_by_side_come_from_other_devices_too(devices):
    check("7b", False, "concatenate", "all", devices)
    check("blocks", True, "concatenate", "all", devices)


@pytest.mark.slow
@pytest.mark.parametrize("execution, mesh_name", [("concatenate", "data"), ("concatenate", "all"), ("ring", "data")])
@pytest.mark.parametrize("name, with_segments", [(name, name in ("published", "blocks")) for name in PLANS])
def test_every_scheme_is_the_float64_model_on_other_meshes(name, with_segments, execution, mesh_name, devices):
    check(name, with_segments, execution, mesh_name, devices)


def test_a_rings_memory_is_the_same_for_any_number_of_contexts(devices):
    mesh = sharding.make_mesh({"data": 8}, devices)
    x_BHTK = jax.ShapeDtypeStruct((32, 2, 64, 16), np.float32, sharding=sharding.batch_sharding(mesh))

    def temporaries(contexts, execution):
        plan = crossbatch.block_plan(32, contexts).dealt(8)
        read = functools.partial(crossbatch.crossbatch_attention, plan, scale=0.25, execution=execution)
        loss = lambda q, k, v: read(q, k, v, None, None).sum()
        with jax.set_mesh(mesh):
            gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x_BHTK, x_BHTK, x_BHTK).compile()
        return gradients.memory_analysis().temp_size_in_bytes

    ring = temporaries(2, "ring")
    assert temporaries(16, "ring") <= 1.01 * ring
    assert temporaries(16, "concatenate") > 3 * ring


@pytest.mark.parametrize(
    ("platform", "length", "ring_from"), [("tpu", 2048, 3), ("gpu", 2048, 3), ("cpu", 256, 17), ("cpu", 64, 65)]
)
def test_the_ring_is_chosen_where_there_are_many_contexts(platform, length, ring_from):
    """A ring holds a context and the next: one that is read with others needs more from the third on."""
    together = lambda contexts, how: crossbatch.together(crossbatch.block_plan(256, contexts), length, how, platform)
    size = 256 // length if platform == "cpu" else ring_from - 1
    assert together(ring_from - 1, "auto") == size and together(ring_from, "auto") == 0
    assert together(1, "ring") == 0 and together(128, "concatenate") == (size if platform == "cpu" else 128)
    with pytest.raises(ValueError, match="crossbatch execution is 'rings'; wanted one of auto, concatenate, ring"):
        together(1, "rings")


@pytest.mark.parametrize(("execution", "ways"), [("concatenate", 1), ("ring", 2)])
def test_splash_reads_contexts_as_xla_does(execution, ways, devices):
    """Interpreted; with padding, and rows that see fewer contexts than others."""
    rng, plan, length = np.random.default_rng(5), crossbatch.published_plan(4, 2), 128
    q, do = (jnp.asarray(rng.standard_normal((4, 2, length, 16)), jnp.float32) for _ in range(2))
    k, v = (jnp.asarray(rng.standard_normal((4, 1, length, 16)), jnp.float32) for _ in range(2))
    ids = np.ones((4, length), np.int32)
    ids[0, 100:], ids[1, :20], ids[2, 60:] = 0, 0, 2
    angles = attention.rotary_angles(length, 16, 100.0)

    def value(kernel, q, k, v):
        options = dict(scale=0.25, kernel=kernel, execution=execution)
        o = crossbatch.crossbatch_attention(plan, q, k, v, angles, jnp.asarray(ids), **options)
        real = jnp.asarray(ids > 0)[:, None, :, None]
        return jnp.sum(jnp.where(real, o * do, 0.0)), jnp.where(real, o, 0.0)

    with jax.set_mesh(sharding.make_mesh({"data": ways}, devices[:ways])):
        found, wanted = (
            jax.jit(jax.value_and_grad(value, argnums=(1, 2, 3), has_aux=True), static_argnums=0)(kernel, q, k, v)
            for kernel in ("splash", "xla")
        )
    np.testing.assert_allclose(found[0][1], wanted[0][1], atol=1e-5)
    for got, want in zip(found[1], wanted[1], strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def check(name, with_segments, execution, mesh_name, devices):
    config, plan, params, tokens, ids, weight, (wanted, wanted_grads) = case(name, with_segments)
    real = np.ones(tokens.shape, bool) if ids is None else ids > 0
    shape = MESHES[mesh_name]
    mesh = sharding.make_mesh(shape, devices)
    plan = plan.dealt(shape["data"] * shape.get("fsdp", 1))
    rows = lambda x: None if x is None else x[plan.order]

    def loss(params, tokens, ids, weight):
        found = model.crossbatch_forward(config, params, tokens, plan, ids, execution=execution)
        return jnp.sum(jax.nn.log_softmax(found) * weight), found

    with jax.set_mesh(mesh):
        places = sharding.param_shardings(mesh, params), *[sharding.batch_sharding(mesh)] * 3
        step = jax.jit(jax.grad(loss, has_aux=True), in_shardings=places)
        grads, found = step(params, rows(tokens), rows(ids), rows(weight.astype(np.float32)))
    np.testing.assert_allclose(np.asarray(found)[rows(real)], rows(wanted)[rows(real)], atol=1e-5)
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    for (path, grad), want in zip(leaves, jax.tree.leaves(wanted_grads), strict=True):
        assert np.abs(grad - want).max() <= 1e-4 * np.abs(want).max(), jax.tree_util.keystr(path)
