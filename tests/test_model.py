from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference as reference
import pytest
from jax.sharding import PartitionSpec as P

from fot_jax import config as configs
from fot_jax import crossbatch, memory, model, sharding
from fot_jax.config import DtypePolicy, ModelConfig

CONFIG = ModelConfig(
    vocab_size=48, d_model=16, d_ff=20, n_layers=2, n_heads=4, n_kv_heads=2, head_size=6, window=8, mem_layers=(1,)
)
PLAN = crossbatch.published_plan(4, 2)
TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (4, 6)).astype(np.int32)


# Layers and their scans.


@pytest.mark.parametrize(("n_layers", "mem_layers"), [(3, ()), (4, (0,)), (8, (2, 3, 7))])
def test_scanned_segments_are_the_layers_one_by_one(n_layers, mem_layers):
    config = CONFIG.replace(n_layers=n_layers, mem_layers=mem_layers)
    params = reference.random_params(config)
    wanted = reference.forward(config, params, TOKENS, context_rows=PLAN.context_rows, with_head=False)
    for unroll in (False, True) if mem_layers == (0,) else (False,):
        forward = functools.partial(model.forward, config, plan=PLAN, unroll=unroll)
        np.testing.assert_allclose(jax.jit(forward)(params, TOKENS), wanted, atol=2e-4)


def test_layers_come_out_in_order():
    config = CONFIG.replace(n_layers=11, mem_layers=(2, 3, 6, 9))
    params = reference.random_params(config)
    wanted = reference.blocks(config, params)
    found = jax.jit(model.layers, static_argnums=0)(config, params)
    assert len(found) == 11
    jax.tree.map(np.testing.assert_array_equal, found, jax.tree.map(lambda x: x.astype(np.float32), wanted))


def test_remat_keeps_less():
    # That it changes no gradient is shown in test_crossbatch, with each policy.
    params = reference.random_params(CONFIG)

    def kept(remat):
        forward = lambda params: model.forward(CONFIG, params, TOKENS, plan=PLAN, remat=remat)
        residuals = jax.eval_shape(lambda params: jax.vjp(forward, params)[1], params)
        return sum(math.prod(x.shape) for x in jax.tree.leaves(residuals))

    assert kept("full") < kept("dots") < kept("none")


def test_unknown_remat():
    with pytest.raises(ValueError, match="remat is 'some'; wanted one of none, full, dots"):
        model.forward(CONFIG, {}, TOKENS, remat="some")


# Parameters.


def test_the_tree_of_parameters():
    config = CONFIG.replace(n_layers=6, mem_layers=(2, 4), qk_norm=True)  # 1 plain, 2 x (1 plain, 1 memory), 1 plain
    V, D, H, G, K, F = 48, 16, 4, 2, 6, 20
    block = {
        "attention_norm": {"scale": (D,)},
        "attention": {"q": (D, H, K), "k": (D, G, K), "v": (D, G, K), "o": (H, K, D), "temperature": (H,)},
        "mlp_norm": {"scale": (D,)},
        "mlp": {"gate": (D, F), "up": (D, F), "down": (F, D)},
    }
    stacked = lambda *stack: jax.tree.map(lambda shape: (*stack, *shape), block, is_leaf=lambda x: isinstance(x, tuple))
    wanted = {
        "embed": {"embedding": (V, D)},
        "segment_0": {"plain": stacked(1, 1)},
        "segment_1": {"plain": stacked(2, 1), "memory": stacked(2)},
        "segment_2": {"plain": stacked(1, 1)},
        "norm": {"scale": (D,)},
        "head": {"kernel": (D, V)},
    }
    params = model.abstract_params(config)
    assert jax.tree.map(lambda x: x.shape, params) == wanted
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
    tied = model.abstract_params(
        config.replace(tie_embeddings=True, qk_norm=False, dtypes=DtypePolicy(params="bfloat16"))
    )
    assert "head" not in tied and "temperature" not in tied["segment_1"]["memory"]["attention"]
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(tied))


def test_initial_parameters():
    config = CONFIG.replace(d_ff=48, n_layers=4, mem_layers=(1, 3), qk_norm=True)
    params = jax.jit(model.init_params, static_argnums=0)(config, jax.random.key(0))
    like = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert like(params) == like(model.abstract_params(config))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path[-1].key
        if name in ("scale", "temperature"):
            np.testing.assert_allclose(leaf, 1.0 if name == "scale" else 2 * math.sqrt(6), rtol=1e-6)
            continue
        # What writes to the residual stream is smaller by the root of how many do.
        wanted = config.init_std / math.sqrt(8) if name in ("o", "down") else config.init_std
        assert 0.8 * wanted < np.std(leaf) < 1.2 * wanted, jax.tree_util.keystr(path)
        assert abs(np.mean(leaf)) < 0.3 * wanted
    blocks = reference.blocks(config, params)
    matrices = [block["mlp"][name] for block in blocks for name in ("gate", "up")]
    assert len({matrix.tobytes() for matrix in matrices}) == 8  # no two layers begin the same


@pytest.mark.parametrize(
    ("size", "count"),
    [
        # OpenLLaMA 3B: 2 x 32000 x 3200 + 26 x (4 x 3200^2 + 3 x 3200 x 8640 + 2 x 3200) + 3200.
        ("longllama_3b", 3_426_473_600),
        ("longllama_code_7b", 6_738_546_688),
        # 64 x 512 + 12 x (4 x 512^2 + 3 x 512 x 1368 + 2 x 512 + 8) + 512.
        ("fot_37m", 37_843_552),
    ],
)
def test_parameter_counts(size, count):
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(model.abstract_params(configs.named(size)))) == count


def test_linen_module_is_forward_and_logits():
    params = reference.random_params(CONFIG)
    ids = np.ones((4, 6), np.int32)
    ids[:, 3:] = 2
    options = dict(plan=PLAN, segment_ids_BT=ids)
    module = model.LongLlama(CONFIG)
    found = jax.jit(lambda p: module.apply({"params": p}, TOKENS, **options))(params)
    hidden = jax.jit(lambda p: model.forward(CONFIG, p, TOKENS, **options))(params)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, jax.jit(model.logits, static_argnums=0)(CONFIG, params, hidden), atol=1e-5)
    made = jax.eval_shape(module.init, jax.random.key(0), TOKENS)
    assert set(made) == {"params"}
    assert jax.tree.map(jnp.shape, made["params"]) == jax.tree.map(np.shape, params)


# Number formats.


def test_bfloat16_computation_is_near_float32():
    low = CONFIG.replace(dtypes=DtypePolicy(compute="bfloat16", memory="bfloat16"))
    params = reference.random_params(CONFIG)
    forward = jax.jit(model.forward, static_argnums=0, static_argnames="plan")
    hidden = forward(low, params, TOKENS, plan=PLAN)
    assert hidden.dtype == jnp.bfloat16
    logits = model.logits(low, params, hidden)
    assert logits.dtype == jnp.float32
    wanted = reference.forward(CONFIG, params, TOKENS, context_rows=PLAN.context_rows)
    error = np.linalg.norm(logits - wanted) / np.linalg.norm(wanted)
    assert 1e-5 < error < 0.05


def test_norms_are_computed_in_float32():
    x = (1000 + np.random.default_rng(0).standard_normal((1, 2, 16))).astype(jnp.bfloat16)
    scale = np.linspace(0.5, 2, 16).astype(np.float32)
    found = jax.jit(functools.partial(model.rms_norm, eps=1e-6))(x, scale)
    assert found.dtype == jnp.bfloat16
    wanted = reference.rms_norm(x.astype(np.float64), scale, 1e-6)
    np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=2**-8)
    unit = jax.jit(model.unit_norm)(x)
    assert unit.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.linalg.norm(np.asarray(unit, np.float64), axis=-1), 1, rtol=2**-8)
    # Padding's zeros do not become NaN.
    assert not np.any(jax.jit(model.unit_norm)(np.zeros((1, 1, 4), np.float32)))


# Windows read piece by piece.


@pytest.mark.parametrize(
    "changes", [{}, {"mem_positionals": False, "qk_norm": True, "n_kv_heads": 1}], ids=["rotary", "small"]
)
def test_a_window_read_in_pieces_is_the_window_read_at_once(changes):
    config = CONFIG.replace(**changes)
    params = jax.tree.map(jnp.asarray, reference.random_params(config))
    rng = np.random.default_rng(1)
    past, now = rng.integers(0, config.vocab_size, (2, 2, 6)).astype(np.int32)

    @jax.jit
    def read(tokens_BT, mem, count_B):
        hidden, keys, values = model.read_window(config, params, tokens_BT, mem=mem)
        return hidden, memory.append(mem, keys, values, count_B)

    extend = jax.jit(lambda tokens_BT, local: model.extend_window(config, params, tokens_BT, mem=mem, local=local))
    # Row 1 remembers three tokens only.
    mem = read(past, memory.init_memory(config, 2, 9), np.array([6, 3], np.int32))[1]
    whole, pieces = read(now, mem, np.zeros(2, np.int32))[0], []
    local = memory.init_cache(config, 2, config.n_layers, config.window, "float32")
    for start, stop in ((0, 1), (1, 2), (2, 5), (5, 6)):
        hidden, local, _ = extend(now[:, start:stop], local)
        pieces.append(hidden)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), whole, atol=2e-5)
    np.testing.assert_array_equal(local.length_B, [6, 6])
    # Rows at positions of their own: row 1 starts its window again where row 0 goes on.
    uneven = memory.Cache(local.keys, local.values, np.array([2, 0], np.int32))
    hidden, uneven, _ = extend(np.stack([now[0, 2:5], now[1, :3]]), uneven)
    np.testing.assert_allclose(hidden, np.stack([whole[0, 2:5], whole[1, :3]]), atol=2e-5)
    np.testing.assert_array_equal(uneven.length_B, [5, 3])
    for b, n in enumerate((6, 3)):
        tokens = np.concatenate([past[b, :n], now[b]])[None]
        start = np.array([[0] * n + [n] * 6])
        wanted = reference.forward(config, params, tokens, start_BT=start, with_head=False)
        np.testing.assert_allclose(whole[b], wanted[0, n:], atol=1e-4)


def test_inference_is_differentiable_in_either_mode():
    config = CONFIG.replace(mem_layers=(1,))
    params = jax.tree.map(jnp.asarray, reference.random_params(config))
    tokens = np.arange(6, dtype=np.int32)[None] % config.vocab_size
    mem = memory.init_memory(config, 1, 6)
    value = lambda scale: model.read_window(
        config, jax.tree.map(lambda x: scale * x, params), tokens, mem=mem, reading=memory.DENSE
    )[0].sum()
    forward = jax.jit(lambda x: jax.jvp(value, (x,), (jnp.ones_like(x),))[1])(jnp.float32(1.0))
    np.testing.assert_allclose(forward, jax.jit(jax.grad(value))(jnp.float32(1.0)), rtol=1e-4)


# Meshes.


def test_meshes_have_four_axes(devices):
    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2}, devices)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2, "context": 1}
    assert dict(sharding.make_mesh({"data": 0}, devices).shape) == {"data": 8, "fsdp": 1, "tensor": 1, "context": 1}
    assert dict(sharding.make_mesh({"data": 2}, devices).shape) == {"data": 2, "fsdp": 1, "tensor": 1, "context": 1}
    assert sharding.batch_sharding(mesh).spec == P(("data", "fsdp"))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"model": 2}, "mesh axis is 'model'; wanted one of data, fsdp, tensor, context"),
        ({"data": 16}, "needs 16 devices; there are 8"),
        ({"data": 4, "fsdp": 4}, "needs 16 devices; there are 8"),
        ({"fsdp": 16}, "does not divide 8 devices"),
        ({"fsdp": 3}, "does not divide 8 devices"),
        ({"tensor": 0}, "wanted sizes of at least 1"),
    ],
)
def test_meshes_that_do_not_fit(devices, shape, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(shape, devices)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What is asked of a TPU that is to be part of a mesh."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    device_kind: str = "TPU v5 lite"
    platform: str = "tpu"
    process_index: int = 0


@pytest.mark.parametrize("shape", [{"fsdp": 4}, {"data": 4, "fsdp": 2, "tensor": 2}, {"data": 2, "fsdp": 8}])
def test_data_alone_crosses_slices(shape):
    chips = [Chip(8 * i + j, i, (j % 4, j // 4, 0)) for j in range(8) for i in range(2)]
    mesh = sharding.make_mesh(shape, chips)
    assert dict(mesh.shape) == sharding.mesh_sizes(shape, 16, 2) == dict(sharding.abstract_mesh(shape, 16, 2).shape)
    slices = [{chip.slice_index for chip in part.flat} for part in mesh.devices]
    assert slices == [{0}] * (mesh.shape["data"] // 2) + [{1}] * (mesh.shape["data"] // 2)
    # A slice's chips are neighbours along the axis of gathers and sums: of a ring, only the ends may be further apart.
    for line in mesh.devices.reshape(-1, mesh.shape["fsdp"], mesh.shape["tensor"])[..., 0]:
        steps = [sum(abs(a - b) for a, b in zip(x.coords, y.coords, strict=True)) for x, y in zip(line, line[1:])]
        assert max(steps) <= 2 and len(set(line)) == len(line)
    for bad, message in (
        ({"data": 2, "fsdp": 4}, "has 8 of 16 devices in 2 slices; wanted all"),
        ({"data": 1, "fsdp": 16}, "mesh.data is 1 over 2 slices; wanted a multiple"),
    ):
        with pytest.raises(ValueError, match=message):
            sharding.make_mesh(bad, chips)


@pytest.mark.parametrize("size", configs.SIZES)
def test_every_parameter_of_every_size_has_a_row(devices, size):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, devices)
    params = model.abstract_params(configs.named(size))
    specs = jax.tree.map(lambda s: s.spec, sharding.param_shardings(mesh, params))
    assert jax.tree.structure(specs, is_leaf=lambda x: isinstance(x, P)) == jax.tree.structure(params)
    for path, spec in jax.tree_util.tree_leaves_with_path(specs, is_leaf=lambda x: isinstance(x, P)):
        assert any(spec), f"{jax.tree_util.keystr(path)} is on every device"
    q = next(
        specs[name]["memory" if "memory" in specs[name] else "plain"] for name in specs if name.startswith("segment")
    )
    assert tuple(q["attention"]["q"])[-3:] == ("fsdp", "tensor", None)
    assert tuple(q["mlp"]["down"])[-2:] == ("tensor", "fsdp")


@pytest.mark.parametrize("plan", [crossbatch.published_plan(8, 3, 2, True), crossbatch.block_plan(8, 3)])
def test_crossbatch_on_a_mesh_is_crossbatch_on_one_device(plan, devices):
    params, tokens_BT = reference.random_params(CONFIG), np.tile(TOKENS, (2, 1))[:, ::-1]

    @jax.value_and_grad
    def loss(params):
        return jnp.square(model.forward(CONFIG, params, tokens_BT, plan=plan)).mean()

    alone = jax.jit(loss)(params)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, devices)
    with jax.set_mesh(mesh):
        assert sharding.ways("batch") == 4
        split = jax.jit(loss)(jax.device_put(params, sharding.param_shardings(mesh, params)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), split, alone)


def test_trees_that_the_table_does_not_fit(devices):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, devices)
    with pytest.raises(ValueError, match=r"parameter attention/bias of shape \(4,\) has no row in sharding.PARAMETERS"):
        sharding.param_shardings(mesh, {"attention": {"bias": jnp.zeros(4)}})
    with pytest.raises(
        ValueError, match=r"mlp/gate of shape \(16, 5\): a dimension of 5 is to be split 2 ways over mesh axis 'tensor'"
    ):
        sharding.param_shardings(mesh, {"mlp": {"gate": jnp.zeros((16, 5))}})


def test_constrain(devices):
    x = jnp.zeros((8, 4, 6))
    assert sharding.constrain(x, "batch", "time", "model") is x  # no mesh
    with pytest.raises(ValueError, match="logical axis is 'rows'; wanted one of batch"):
        sharding.constrain(x, "rows", "time", "model")
    with pytest.raises(ValueError, match=r"2 logical axes .* for an array of shape \(8, 4, 6\)"):
        sharding.constrain(x, "batch", "time")
    with pytest.raises(ValueError, match="claim a mesh axis twice"):
        sharding.constrain(x, "heads", "mlp", None)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, devices)
    with jax.set_mesh(mesh):
        found = jax.jit(lambda x: sharding.constrain(x + 1, "batch", None, "mlp"))(x)
    assert found.sharding.spec == P(("data", "fsdp"), None, "tensor")


def test_eight_devices_compute_what_one_does(devices):
    params = reference.random_params(CONFIG)
    tokens_BT = np.concatenate([TOKENS, TOKENS[::-1]])
    plan = crossbatch.published_plan(8, 3, 2, True)

    def loss(params, tokens_BT):
        logits = model.crossbatch_forward(CONFIG, params, tokens_BT, plan)
        return jnp.mean(jnp.square(logits)), logits

    step = jax.value_and_grad(loss, has_aux=True)
    (_, one), one_grads = jax.jit(step)(params, tokens_BT)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, devices)
    where = sharding.param_shardings(mesh, params), sharding.batch_sharding(mesh)
    with jax.set_mesh(mesh):
        found, grads = jax.jit(step, in_shardings=where)(*jax.device_put((params, tokens_BT), where))
    np.testing.assert_allclose(found[1], one, atol=2e-5)
    assert len(found[1].sharding.device_set) == 8
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()), grads, one_grads)
