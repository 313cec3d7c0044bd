"""Crossbatch in float64 by plain operations that JAX differentiates: every row's contexts gathered, one softmax.

Its values are checked against `numpy_reference`; what it adds is gradients of all parameters.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference

from fot_jax import model


def logits(config, params, tokens_BT, context_rows, segment_BT):
    """[B, T, V] of a batch whose row b reads the whole windows of rows context_rows[b], but where they are -1."""
    B, T = tokens_BT.shape
    K = config.head_size
    angle = np.arange(T)[:, None] * config.rope_base ** (-2 * np.arange(K // 2) / K)[None, :]
    cos, sin = np.cos(angle)[None, :, None], np.sin(angle)[None, :, None]

    def rotate(x):
        first, second = x[..., : K // 2], x[..., K // 2 :]
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    def norm(x, scale):
        return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * scale[None, None]

    own = np.tri(T, dtype=bool) & (segment_BT[:, :, None] == segment_BT[:, None, :])
    written = np.where(context_rows[:, :, None] >= 0, segment_BT[context_rows] > 0, False).reshape(B, 1, -1)
    seen = np.concatenate([own, np.broadcast_to(written, (B, T, written.shape[2]))], axis=2)
    x = params["embed"]["embedding"][tokens_BT]
    for number, block in enumerate(model.layers(config, params)):
        reads = number in config.mem_layers
        weight = block["attention"]
        h = norm(x, block["attention_norm"]["scale"])
        q, k, v = (jnp.einsum("btd,dhk->bthk", h, weight[name]) for name in "qkv")
        scale = K**-0.5
        if config.qk_norm:
            q = q / jnp.linalg.norm(q, axis=-1, keepdims=True) * weight["temperature"][None, None, :, None]
            k, scale = k / jnp.linalg.norm(k, axis=-1, keepdims=True), 1.0
        k, v = (jnp.repeat(a, config.n_heads // config.n_kv_heads, axis=2) for a in (k, v))
        turn = rotate if config.mem_positionals or not reads else (lambda a: a)
        q, keys, values = turn(q), turn(k), v
        if reads and context_rows.shape[1]:
            far = lambda a: a[context_rows].reshape(B, -1, *a.shape[2:])
            keys, values = jnp.concatenate([keys, far(k)], axis=1), jnp.concatenate([values, far(v)], axis=1)
        s = jnp.einsum("bthk,bshk->bhts", q, keys) * scale
        p = jax.nn.softmax(jnp.where(seen[:, None, :, : keys.shape[1]], s, -jnp.inf))
        x = x + jnp.einsum("bthk,hkd->btd", jnp.einsum("bhts,bshk->bthk", p, values), weight["o"])
        h = norm(x, block["mlp_norm"]["scale"])
        x = x + (jax.nn.silu(h @ block["mlp"]["gate"]) * (h @ block["mlp"]["up"])) @ block["mlp"]["down"]
    head = params["embed"]["embedding"].T if config.tie_embeddings else params["head"]["kernel"]
    return norm(x, params["norm"]["scale"]) @ head


def value_and_gradients(config, params, tokens_BT, plan, segment_BT, weight_BTV):
    """(logits, gradients of sum(log_softmax(logits) * weight)) in float64."""
    segment_BT = np.ones(tokens_BT.shape, int) if segment_BT is None else segment_BT

    def loss(params):
        found = logits(config, params, tokens_BT, plan.context_rows, segment_BT)
        return jnp.sum(jax.nn.log_softmax(found) * weight_BTV), found

    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        grads, found = jax.jit(jax.grad(loss, has_aux=True))(params)
        assert found.dtype == jnp.float64
        found, grads = jax.tree.map(np.asarray, (found, grads))
    plain = numpy_reference.forward(config, params, tokens_BT, segment_BT=segment_BT, context_rows=plan.context_rows)
    real = segment_BT > 0
    np.testing.assert_allclose(found[real], plain[real], rtol=1e-9, atol=1e-9)
    return found, grads
