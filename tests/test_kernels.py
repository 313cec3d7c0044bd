"""Attention for training: every kernel is one softmax in float64, and refuses what it cannot do."""

from __future__ import annotations

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn_calls
from jax.interpreters import mlir

from fot_jax import attention, crossbatch, host, sharding
from fot_jax.attention import kernels

T = 128


# cuDNN's two calls, as they are documented, by plain operations: what JAX hands to a GPU is computed on a CPU.


def cudnn_scores(q, k, bias, scale, variadic_args, mask_type):
    repeats = q.shape[1] // k.shape[1]
    s = jnp.einsum("bhtk,bhsk->bhts", *(x.astype(jnp.float32) for x in (q, jnp.repeat(k, repeats, axis=1)))) * scale
    s = s + bias.astype(jnp.float32) if variadic_args[0] else s
    assert mask_type in (cudnn_calls.MaskType.CAUSAL, cudnn_calls.MaskType.NO_MASK)
    if mask_type == cudnn_calls.MaskType.CAUSAL:
        s = jnp.where(np.tri(*s.shape[2:], dtype=bool)[None, None], s, -jnp.inf)
    return s


def cudnn_forward(q, k, v, bias, *_, scale, variadic_args, mask_type, layout, is_training, **__):
    assert layout == cudnn_calls.AttentionLayout.BNTH.value and is_training and q.shape[-1] % 8 == 0
    s = cudnn_scores(q, k, bias, scale, variadic_args, mask_type)
    v = jnp.repeat(v, q.shape[1] // v.shape[1], axis=1).astype(jnp.float32)
    return jnp.einsum("bhts,bhsk->bhtk", jax.nn.softmax(s), v).astype(q.dtype), jax.nn.logsumexp(s, axis=-1)


def cudnn_backward(q, k, v, bias, *rest, scale, variadic_args, mask_type, **_):
    *_, lse, o, do = rest
    repeats = q.shape[1] // k.shape[1]
    p = jnp.exp(cudnn_scores(q, k, bias, scale, variadic_args, mask_type) - lse[..., None])
    q, k, v, o, do = (x.astype(jnp.float32) for x in (q, k, v, o, do))
    dp = jnp.einsum("bhtk,bhsk->bhts", do, jnp.repeat(v, repeats, axis=1))
    ds = p * (dp - (do * o).sum(-1, keepdims=True)) * scale
    summed = lambda x: x.reshape(x.shape[0], -1, repeats, *x.shape[2:]).sum(2)
    dq = jnp.einsum("bhts,bhsk->bhtk", ds, jnp.repeat(k, repeats, axis=1))
    dk = summed(jnp.einsum("bhts,bhtk->bhsk", ds, q))
    return tuple(x.astype(rest[-1].dtype) for x in (dq, dk, summed(jnp.einsum("bhts,bhtk->bhsk", p, do))))


@pytest.fixture
def a_gpu(monkeypatch):
    """A GPU, as far as our kernel can tell."""
    rules = mlir._platform_specific_lowerings["cpu"]
    for primitive, rule in (
        (cudnn_calls._dot_product_attention_fwd_p, cudnn_forward),
        (cudnn_calls._dot_product_attention_bwd_p, cudnn_backward),
    ):
        mlir.register_lowering(primitive, mlir.lower_fun(rule, multiple_results=True), platform="cpu")
        monkeypatch.setitem(rules, primitive, rules.pop(primitive))  # taken out again when the test is over
    monkeypatch.setattr(cudnn_calls, "check_cudnn_version", lambda: 91900)
    monkeypatch.setattr(cudnn_calls, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(cudnn_calls, "is_cuda_compute_capability_equal", lambda _: False)
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")


def sources(rng, dtype, B=3, H=4, G=2, K=20, T=T, other_rows=2):
    """Queries; a window with three documents; a context that rows see whole or not, one of them padded; two more of
    which all is seen.
    """
    q, k, v = (rng.standard_normal((B, heads, T, K)) for heads in (H, G, G))
    far = [[rng.standard_normal((other_rows, G, S, K)) for _ in "kv"] for S in (T, T, 2 * T)]
    ids = np.sort(rng.integers(1, 4, (B, T)))
    rows = np.array([[1], [0]])[-other_rows:]
    written = np.broadcast_to(np.arange(T) < 0.8 * T, (other_rows, T)) * rows[::-1]
    one = np.ones((1, 1))
    numbers = [(one, rows), (one, written), (None, None)]
    cast = lambda x: None if x is None else jnp.asarray(x, jnp.int32)
    arrays = [jnp.asarray(x, dtype) for x in (q, k, v)]
    own = attention.Keys(*arrays[1:], cast(ids), cast(ids))
    others = tuple(
        attention.Keys(*(jnp.asarray(x, dtype) for x in kv), *map(cast, pair))
        for kv, pair in zip(far, numbers, strict=True)
    )
    return arrays[0], own, others


def plain(q, own, others, scale):
    """One softmax over all, of whatever floats are given."""
    B, H, T, _ = q.shape
    ks, vs, seen = [], [], []
    for keys in (own, *others):
        k, v, q_ids, kv_ids = keys
        S, first = k.shape[2], B - k.shape[0]
        mask = np.ones((k.shape[0], T, S), bool)
        if kv_ids is not None:
            mask = mask & (np.asarray(q_ids)[:, :, None] == np.asarray(kv_ids)[:, None, :])
        if keys is own:
            mask = mask & np.tri(T, dtype=bool)
        before = ((first, 0), (0, 0), (0, 0))
        seen.append(np.pad(mask, before))
        ks.append(jnp.pad(jnp.repeat(k, H // k.shape[1], axis=1), (*before, (0, 0))))
        vs.append(jnp.pad(jnp.repeat(v, H // v.shape[1], axis=1), (*before, (0, 0))))
    s = jnp.einsum("bhtk,bhsk->bhts", q, jnp.concatenate(ks, axis=2)) * scale
    s = jnp.where(np.concatenate(seen, axis=2)[:, None], s, -jnp.inf)
    return jnp.einsum("bhts,bhsk->bhtk", jax.nn.softmax(s), jnp.concatenate(vs, axis=2)), jax.nn.logsumexp(s, axis=-1)


def wanted(q, own, others, scale, do):
    """(o, lse, dq, (dk, dv) of own, of the others) in float64."""
    with jax.enable_x64(True):
        wide = lambda x: jnp.asarray(np.asarray(x, np.float64)) if jnp.issubdtype(x.dtype, jnp.floating) else x
        q, own, others = jax.tree.map(wide, (q, own, others))
        kv = [keys[:2] for keys in (own, *others)]

        def value(q, kv):
            given = [attention.Keys(*pair, *keys[2:]) for pair, keys in zip(kv, (own, *others), strict=True)]
            return plain(q, given[0], given[1:], scale)

        o, vjp, lse = jax.vjp(value, q, kv, has_aux=True)
        return jax.tree.map(np.asarray, (o, lse, *vjp(np.asarray(do, np.float64))))


def compare(kernel, dtype, tolerance, head=20, length=T):
    q, own, others = sources(np.random.default_rng(0), dtype, K=head, T=length)
    do = jnp.asarray(np.random.default_rng(1).standard_normal(q.shape), dtype)
    scale = head**-0.5
    o, lse, dq, kv = wanted(q, own, others, scale, do)
    found = jax.jit(lambda q, own, others: kernel.forward(q, own, others, scale))(q, own, others)
    assert found.o_BHTK.dtype == found.lse_BHT.dtype == jnp.float32
    np.testing.assert_allclose(found.o_BHTK, o, atol=tolerance)
    np.testing.assert_allclose(found.lse_BHT, lse, atol=tolerance)
    # Gradients from the softmax over all, of all sources at once and of each by itself.
    merged = found.o_BHTK.astype(dtype), found.lse_BHT, do
    backward = jax.jit(lambda q, own, others: kernel.backward(q, own, others, scale, *merged))
    got_dq, got_kv = backward(q, own, others)
    alone = [backward(q, own, ()), *(backward(q, None, (keys,)) for keys in others)]
    assert got_dq.dtype == jnp.float32
    for got in (got_dq, sum(x[0] for x in alone)):
        np.testing.assert_allclose(got, dq, atol=tolerance * np.abs(dq).max())
    for pairs in (got_kv, [x[1][0] for x in alone]):
        for pair, want in zip(pairs, kv, strict=True):
            for got, x in zip(pair, want, strict=True):
                np.testing.assert_allclose(got.astype(jnp.float32), x, atol=tolerance * max(1, np.abs(x).max()))


# Splash in one block, and in several: of a causal window it leaves some out.
@pytest.mark.parametrize(
    "name, length, head, dtype, tolerance",
    [
        *(("xla", length, 20, jnp.float32, 2e-5) for length in (1, 5, 69, 133)),
        *(("splash", length, 20, jnp.float32, 2e-5) for length in (128, 640)),
        ("splash", T, 100, jnp.bfloat16, 2e-2),
    ],
)
def test_kernels_are_one_softmax_in_float64(name, length, head, dtype, tolerance):
    if name == "splash" and sharding.platform() == "gpu":
        pytest.skip("splash is for TPUs, and interpreted on CPUs")
    compare(attention.kernel(name, length, head, dtype), dtype, tolerance, head=head, length=length)


def test_kernels_keep_to_the_dtype_of_what_they_are_given():
    q, own, others = sources(np.random.default_rng(13), jnp.bfloat16)
    plan = crossbatch.published_plan(3, 1)

    def loss(q, k, v):
        return jnp.sum(crossbatch.crossbatch_attention(plan, q, k, v, None, None, scale=0.2))

    value, grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q, *own[:2])
    assert {x.dtype for x in (value, *grads)} == {jnp.dtype(jnp.bfloat16)}


def test_the_backward_pass_holds_the_scores_of_one_layer_at_a_time():
    layers, B, H, length, K = 8, 2, 4, 256, 16
    plan = crossbatch.published_plan(B, 0)

    def value(x):
        for _ in range(layers):
            x = x + crossbatch.crossbatch_attention(plan, x, x, x, None, None, scale=0.25)
        return jnp.sum(jnp.square(x))

    compiled = jax.jit(jax.grad(value)).lower(jax.ShapeDtypeStruct((B, H, length, K), jnp.float32)).compile()
    of_a_layer = 4 * B * H * length * length * 5 // 8  # float32; of the causal square, five eighths are computed
    assert compiled.memory_analysis().temp_size_in_bytes < layers * of_a_layer


def test_cudnn_is_one_softmax_in_float64(a_gpu):
    # bfloat16 is all that cuDNN has; heads of 20 are filled up to 24.
    compare(attention.kernel("cudnn", T, 20, jnp.bfloat16), jnp.bfloat16, 2e-2)


@pytest.mark.skipif(sharding.platform() != "gpu", reason="no GPU")
@pytest.mark.parametrize("head", [20, 64, 100])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_cudnn_is_one_softmax_in_float64_on_a_gpu(head, dtype):
    compare(attention.kernel("cudnn", T, head, dtype), dtype, 2e-2, head=head)


@pytest.mark.skipif(sharding.platform() != "gpu", reason="no GPU")
@pytest.mark.parametrize("execution", ["concatenate", "ring"])
def test_crossbatch_by_cudnn_is_that_by_xla_on_a_gpu(execution):
    rng, plan = np.random.default_rng(3), crossbatch.longllama_3b_plan(8)
    q, k, v, do = (jnp.asarray(rng.standard_normal((8, 4, 256, 100)), jnp.bfloat16) for _ in range(4))

    def value(kernel, q, k, v):
        options = dict(scale=0.1, kernel=kernel, execution=execution)
        angles = attention.rotary_angles(256, 100, 10000.0)
        return jnp.sum(
            (crossbatch.crossbatch_attention(plan, q, k, v, angles, None, **options) * do).astype(jnp.float32)
        )

    grad = jax.jit(jax.grad(value, argnums=(1, 2, 3)), static_argnums=0)
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    for got, want in zip(grad("cudnn", q, k, v), grad("xla", *wide), strict=True):
        error = jnp.linalg.norm((got.astype(jnp.float32) - want).ravel()) / jnp.linalg.norm(want.ravel())
        assert error < 2e-2


def test_cudnn_is_called_as_a_gpu_expects(a_gpu):
    kernel = attention.kernel("auto", T, 100, jnp.bfloat16)
    assert kernel.name == "cudnn"
    q, own, others = sources(np.random.default_rng(0), jnp.bfloat16, K=100)
    found = jax.jit(lambda *a: kernel.backward(*a, 0.1, q, q[..., 0].astype(jnp.float32), q)).trace(q, own, others)
    text = found.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__cudnn$fmhaScaleBiasSoftmaxBackward") == 2  # documents, a padded context
    assert text.count("@__cudnn$fmhaSoftmaxBackward") == 2  # rows that see all or nothing, all that is seen
    assert "x104xbf16" in text


@pytest.mark.parametrize(
    ("platform", "name", "length", "head", "dtype", "message"),
    [
        ("cpu", "flash", T, 64, "float32", "attention kernel is 'flash'; wanted one of auto, xla, splash, cudnn"),
        (
            "tpu",
            "splash",
            100,
            64,
            "bfloat16",
            "window of 100 tokens; wanted a multiple of 128, or attention 'xla'",
        ),
        (
            "tpu",
            "splash",
            T,
            64,
            "float16",
            "splash attention in float16; wanted bfloat16 or float32, or attention 'xla'",
        ),
        (
            "gpu",
            "splash",
            T,
            64,
            "bfloat16",
            "splash attention on a gpu; it is made for TPUs: wanted attention 'xla' or",
        ),
        ("tpu", "cudnn", T, 64, "bfloat16", "cuDNN attention on a tpu; it is for GPUs: wanted attention 'xla'"),
        ("cpu", "cudnn", T, 64, "bfloat16", "cuDNN attention on a cpu"),
        (
            "gpu",
            "cudnn",
            T,
            64,
            "float32",
            "cuDNN attention in float32; wanted bfloat16 or float16, or attention 'xla'",
        ),
        ("gpu", "cudnn", T, 64, "bfloat16", "heads of 64: no cuDNN; wanted attention 'xla'"),
        ("gpu", "cudnn", 77, 64, "bfloat16", "window of 77 tokens; wanted an even number"),
    ],
)
def test_what_kernels_refuse(platform, name, length, head, dtype, message, monkeypatch):
    def no_cudnn():
        raise RuntimeError("no cuDNN")

    monkeypatch.setattr(sharding, "platform", lambda: platform)
    monkeypatch.setattr(jax, "default_backend", lambda: platform)  # a chip that is here, not only compiled for
    monkeypatch.setattr(cudnn_calls, "check_cudnn_version", no_cudnn)
    with pytest.raises(ValueError, match=message):
        attention.kernel(name, length, head, dtype)


def test_cudnn_is_compiled_for_heads_that_every_gpu_takes():
    """Where there is no GPU to ask."""
    if sharding.platform() == "gpu":
        pytest.skip("there is one")
    assert attention.kernel("cudnn", T, 128, jnp.bfloat16, "gpu").name == "cudnn"
    for head in (129, 256, 300):
        with pytest.raises(ValueError, match=f"heads of {head}: a GPU that is not here takes 128 .*wanted att"):
            attention.kernel("cudnn", T, head, jnp.bfloat16, "gpu")


@pytest.mark.parametrize(
    ("platform", "length", "dtype", "chosen", "said"),
    [
        ("cpu", 100, "float32", "xla", ""),
        ("tpu", 256, "bfloat16", "splash", ""),
        ("tpu", 100, "bfloat16", "xla", "window of 100 tokens; wanted a multiple of 128"),
        ("gpu", 256, "bfloat16", "cudnn", ""),
        ("gpu", 256, "float32", "xla", "cuDNN attention in float32"),
    ],
)
def test_what_auto_chooses_it_says(platform, length, dtype, chosen, said, monkeypatch, caplog, a_gpu):
    monkeypatch.setattr(sharding, "platform", lambda: platform)
    host.warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert attention.kernel("auto", length, 64, dtype).name == chosen
        attention.kernel("auto", length, 64, dtype)
    assert len(caplog.records) == bool(said)
    assert said in caplog.text


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("cudnn", "_dot_product_attention_fwd_impl"),
        ("cudnn", "_dot_product_attention_bwd_impl"),
        ("splash", "_splash_attention_bwd"),
    ],
)
def test_another_interface_of_jax_is_noticed(name, call, monkeypatch, a_gpu):
    module = getattr(kernels, name)
    monkeypatch.setattr(sharding, "platform", lambda: "gpu" if name == "cudnn" else "tpu")
    attention.kernel(name, T, 64, jnp.bfloat16)
    monkeypatch.setattr(module.calls, call, lambda q, k, v: None)
    with pytest.raises(ValueError, match="wanted attention 'xla'"):
        attention.kernel(name, T, 64, jnp.bfloat16)
    monkeypatch.delattr(module.calls, call)
    with pytest.raises(ValueError, match="wanted attention 'xla'"):
        attention.kernel(name, T, 64, jnp.bfloat16)
