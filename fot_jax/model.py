"""LLaMA with memory layers: pure functions over one tree of parameters, which Linen modules name.

Parameters are stacked by segment (`ModelConfig.segments`) so that layers of one kind are scanned, not unrolled:

    embed/embedding [V, D]
    segment_i/plain   a block, stacked [repeats, plain, ...]      (ordinary layers before each memory layer)
    segment_i/memory  a block, stacked [repeats, ...]             (the memory layers)
    norm/scale [D], head/kernel [D, V]                            (no head where embeddings are tied)

A block is the same in every layer; what differs is the attention function handed to it. In training (`forward`) that
is the causal window or a crossbatch plan, in inference (`read_window`) the window, its cache and memory, merged into
one softmax.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fot_jax import attention, crossbatch, memory, sharding
from fot_jax.config import ModelConfig
from fot_jax.sharding import constrain

Array = jax.Array
Params = Any
# (q_BHTK, k_BGTK, v_BGTK), un-rotated -> o_BHTK in their dtype
Attend = Callable[[Array, Array, Array], Array]

WINDOW_SCORE_BYTES = 2**29  # of scores within whole windows, at a time
_KEPT = jax.checkpoint_policies.save_only_these_names(crossbatch.SAVED)
REMAT = {
    "none": None,
    "full": _KEPT,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _KEPT
    ),
}


def rms_norm(x_BTD: Array, scale_D: Array, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) * scale (arXiv 1910.07467), computed in float32, in x's dtype."""
    x = x_BTD.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    return (x * scale_D.astype(jnp.float32)[None, None, :]).astype(x_BTD.dtype)


def unit_norm(x_BHTK: Array) -> Array:
    """x scaled to unit length along its last axis, computed in float32, in x's dtype."""
    x = x_BHTK.astype(jnp.float32)
    return (x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)).astype(x_BHTK.dtype)


def swiglu(x_BTD: Array, gate_DF: Array, up_DF: Array, down_FD: Array) -> Array:
    """(silu(x gate) * x up) down (arXiv 2002.05202)."""
    hidden_BTF = jax.nn.silu(dense(x_BTD, gate_DF)) * dense(x_BTD, up_DF)
    return dense(constrain(hidden_BTF, "batch", "time", "mlp"), down_FD)


def dense(x_BTD: Array, w_DF: Array, dtype: Any = None) -> Array:
    """x w, [B, T, F], as one product of matrices: a weight's gradient that sums over B and T apart is slow on a CPU."""
    B, T, D = x_BTD.shape
    return jnp.matmul(x_BTD.reshape(B * T, D), w_DF, preferred_element_type=dtype).reshape(B, T, w_DF.shape[-1])


def to_heads(x_BTD: Array, w_DHK: Array) -> Array:
    """[B, H, T, K]. One plain matrix product, then activations change places: written as one einsum, a CPU
    transposes weights.
    """
    D, H, K = w_DHK.shape
    return jnp.swapaxes(dense(x_BTD, w_DHK.reshape(D, H * K)).reshape(*x_BTD.shape[:2], H, K), 1, 2)


def from_heads(o_BHTK: Array, w_HKD: Array) -> Array:
    """[B, T, D], the other way."""
    B, H, T, K = o_BHTK.shape
    return dense(jnp.swapaxes(o_BHTK, 1, 2).reshape(B, T, H * K), w_HKD.reshape(H * K, w_HKD.shape[-1]))


@jax.custom_vjp
def in_turn(x: Array, params: Params) -> tuple[Array, Params]:
    """Both, unchanged. In the backward pass the gradient of `x` is not there before that of `params` is.

    Nothing else waits for the gradients of weights: a compiler may leave them, with all that they are computed from, to
    the end of the step. (Neither does a gradient go away that nobody asks for.)
    """
    return x, params


in_turn.defvjp(lambda x, params: ((x, params), None), lambda _, grads: jax.lax.optimization_barrier(grads))


def score_scale(config: ModelConfig) -> float:
    """What attention scores are multiplied by: K ** -0.5, or 1 where normalised queries carry a learned temperature."""
    return 1.0 if config.qk_norm else config.head_size**-0.5


class Norm(nn.Module):
    """RMSNorm's scale."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        scale_D = self.param("scale", nn.initializers.ones, (self.config.d_model,), self.config.dtypes.params)
        return rms_norm(x_BTD, scale_D, self.config.norm_eps)


class Attention(nn.Module):
    """Projections round an attention function. Queries and keys reach it un-rotated, head-major; keys and values are
    returned.
    """

    config: ModelConfig
    training: bool = False

    @nn.compact
    def __call__(self, x_BTD: Array, attend: Attend) -> tuple[Array, tuple[Array, Array]]:
        c = self.config
        weight = _weights(self, c, x_BTD.dtype)

        def projected(name: str, heads: int) -> Array:
            w_DHK = weight(name, (c.d_model, heads, c.head_size))
            # Not said, a TPU's compiler gathers a weight of three axes twice in the backward pass, in two layouts.
            w_DHK = sharding.gathered(w_DHK, ("attention", name)) if self.training else w_DHK
            return to_heads(x_BTD, w_DHK)

        q_BHTK, k_BGTK, v_BGTK = projected("q", c.n_heads), projected("k", c.n_kv_heads), projected("v", c.n_kv_heads)
        if c.qk_norm:
            # Inner products of random unit vectors have a deviation of K ** -0.5: scores start with one of 2.
            start = nn.initializers.constant(2 * c.head_size**0.5)
            temperature_H = self.param("temperature", start, (c.n_heads,), c.dtypes.params)
            q_BHTK = (unit_norm(q_BHTK) * temperature_H[None, :, None, None]).astype(x_BTD.dtype)
            k_BGTK = unit_norm(k_BGTK)
        q_BHTK = constrain(q_BHTK, "batch", "heads", "time", "head_size")
        k_BGTK, v_BGTK = (constrain(x, "batch", "kv_heads", "time", "head_size") for x in (k_BGTK, v_BGTK))
        o_BHTK = attend(q_BHTK, k_BGTK, v_BGTK)
        return from_heads(o_BHTK, weight("o", (c.n_heads, c.head_size, c.d_model))), (k_BGTK, v_BGTK)


class Mlp(nn.Module):
    """The gated feed-forward."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: Array) -> Array:
        c = self.config
        weight = _weights(self, c, x_BTD.dtype)
        return swiglu(
            x_BTD,
            weight("gate", (c.d_model, c.d_ff)),
            weight("up", (c.d_model, c.d_ff)),
            weight("down", (c.d_ff, c.d_model)),
        )


class Block(nn.Module):
    """One pre-norm layer: x + attention(norm(x)), then x + mlp(norm(x)). Returns x and the layer's un-rotated keys
    and values.

    Attributes:
        training: whether gradients are taken, in reverse only, and how weights are gathered for them is stated.
    """

    config: ModelConfig
    training: bool = False

    @nn.compact
    def __call__(self, x_BTD: Array, attend: Attend) -> tuple[Array, tuple[Array, Array]]:
        c = self.config
        out_BTD, keys_values = Attention(c, self.training, name="attention")(
            Norm(c, name="attention_norm")(x_BTD), attend
        )
        x_BTD = x_BTD + out_BTD
        x_BTD = x_BTD + Mlp(c, name="mlp")(Norm(c, name="mlp_norm")(x_BTD))
        return constrain(x_BTD, "batch", "time", "model"), keys_values


def _weights(module: nn.Module, config: ModelConfig, dtype: Any) -> Callable[[str, tuple[int, ...]], Array]:
    """Declares a module's matrices: normal initial values, stored in the parameters' dtype, used in that of
    activations.
    """
    # What 2 L layers add to the residual stream should not grow with their number.
    deviation = {
        "o": config.init_std / (2 * config.n_layers) ** 0.5,
        "down": config.init_std / (2 * config.n_layers) ** 0.5,
    }

    def weight(name: str, shape: tuple[int, ...]) -> Array:
        init = nn.initializers.normal(deviation.get(name, config.init_std))
        return module.param(name, init, shape, config.dtypes.params).astype(dtype)

    return weight


class LongLlama(nn.Module):
    """The whole model as a Linen module: `LongLlama(config).apply({"params": params}, tokens_BT, plan=plan)`.

    A thin namer: it owns the parameters and calls `forward` and `logits`.
    """

    config: ModelConfig

    def __call__(self, tokens_BT: Array, **options: Any) -> Array:
        """Logits, float32 [B, T, V]; options as for `forward`."""
        params = self.parameters()
        return logits(self.config, params, forward(self.config, params, tokens_BT, **options))

    @nn.compact
    def parameters(self) -> Params:
        """The tree that `forward` and `logits` take."""
        c = self.config
        normal = nn.initializers.normal(c.init_std)
        params = {
            "embed": self.param(
                "embed", lambda key: {"embedding": normal(key, (c.vocab_size, c.d_model), c.dtypes.params)}
            )
        }
        for i, segment in enumerate(c.segments):
            params[f"segment_{i}"] = self.param(f"segment_{i}", _init_segment, c, segment)
        params["norm"] = self.param("norm", lambda key: {"scale": jnp.ones((c.d_model,), c.dtypes.params)})
        if not c.tie_embeddings:
            params["head"] = self.param(
                "head", lambda key: {"kernel": normal(key, (c.d_model, c.vocab_size), c.dtypes.params)}
            )
        return params


def _init_segment(key: Array, config: ModelConfig, segment: Any) -> Params:
    """Stacked blocks of a segment: `plain` [repeats, plain, ...] and `memory` [repeats, ...]."""

    def init(key: Array) -> Params:
        x = jnp.zeros((1, 1, config.d_model))
        return Block(config).init(key, x, lambda q_BHTK, k_BGTK, v_BGTK: q_BHTK)["params"]

    plain, mem = jax.random.split(key)
    out = {}
    if segment.plain:
        out["plain"] = jax.vmap(jax.vmap(init))(jax.random.split(plain, (segment.repeats, segment.plain)))
    if segment.memory:
        out["memory"] = jax.vmap(init)(jax.random.split(mem, segment.repeats))
    return out


def init_params(config: ModelConfig, key: Array) -> Params:
    """Initial parameters: matrices normal with `init_std`, those that write to the residual stream with
    init_std / sqrt(2 L); scales 1; temperatures 2 sqrt(K)."""
    return LongLlama(config).init(key, method="parameters")["params"]


def abstract_params(config: ModelConfig) -> Params:
    """Shapes and dtypes of the parameters, without making them."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def embed(config: ModelConfig, params: Params, tokens_BT: Array) -> Array:
    """[B, T, D] in the compute dtype."""
    x_BTD = params["embed"]["embedding"][tokens_BT].astype(config.dtypes.compute)
    return constrain(x_BTD, "batch", "time", "model")


def logits(config: ModelConfig, params: Params, hidden_BTD: Array) -> Array:
    """Scores of the next token, float32 [B, T, V], from what `forward` returns."""
    if config.tie_embeddings:
        head_DV = params["embed"]["embedding"].T
    else:
        head_DV = params["head"]["kernel"]
    return dense(hidden_BTD, head_DV.astype(hidden_BTD.dtype), jnp.float32)


def forward(
    config: ModelConfig,
    params: Params,
    tokens_BT: Array,
    *,
    plan: crossbatch.Plan | None = None,
    segment_ids_BT: Array | None = None,
    remat: str = "none",
    unroll: bool = False,
    kernel: str = "auto",
    execution: str = "auto",
) -> Array:
    """The model over one window a row, without memory: what training differentiates.

    Args:
        tokens_BT: int32.
        plan: rows that memory layers read besides their own; None: none. Where devices share the rows, its blocks are
            dealt to them for the time being; `plan.dealt` saves moving rows there and back.
        segment_ids_BT: int32; local attention stays within a segment, segment 0 is padding. None: one segment.
        remat: what the backward pass recomputes: "none", "full" (layers, from their inputs), or "dots" (all but matrix
            products with weights); never the attention of layers that read contexts.
        unroll: whether layers of a kind are compiled one by one. On a CPU that saves a tenth of a step; elsewhere it
            costs compile time and memory.
        kernel: what computes attention; see `attention.kernel`.
        execution: how contexts come to the rows that read them; see `crossbatch.crossbatch_attention`.

    Returns:
        [B, T, D] in the compute dtype, after the last norm; `logits` takes it.

    Raises:
        ValueError: an unknown remat policy, or a batch that is not the plan's.
    """
    if remat not in REMAT:
        raise ValueError(f"remat is {remat!r}; wanted one of {', '.join(REMAT)}")
    B, T = tokens_BT.shape
    if plan is not None and plan.rows != B:
        raise ValueError(f"batch has {B} rows; the crossbatch plan is for {plan.rows}")
    ways = sharding.ways("batch")
    if plan is not None and plan.blocks > 1 and plan.shards != ways:
        dealt = plan.dealt(ways)
        take = np.argsort(plan.order)[dealt.order]
        segment_ids_BT = None if segment_ids_BT is None else segment_ids_BT[take]
        options = dict(plan=dealt, segment_ids_BT=segment_ids_BT, remat=remat, unroll=unroll)
        hidden = forward(config, params, tokens_BT[take], **options, kernel=kernel, execution=execution)
        return constrain(hidden[np.argsort(take)], "batch", "time", "model")
    angles = attention.rotary_angles(T, config.head_size, config.rope_base)
    own_only = crossbatch.published_plan(B, 0)

    def layer(memory_layer: bool) -> Callable[[Array, Params], Array]:
        def attend(q_BHTK: Array, k_BGTK: Array, v_BGTK: Array) -> Array:
            return crossbatch.crossbatch_attention(
                plan if memory_layer and plan is not None else own_only,
                q_BHTK,
                k_BGTK,
                v_BGTK,
                angles if config.mem_positionals or not memory_layer else None,
                segment_ids_BT,
                scale=score_scale(config),
                kernel=kernel,
                execution=execution,
            )

        body = Block(config, training=True, parent=None)  # not a part of a module that calls this

        def apply(x_BTD: Array, block: Params) -> Array:
            x_BTD, block = in_turn(x_BTD, block)
            return body.apply({"params": block}, x_BTD, attend)[0]

        return apply if remat == "none" else jax.checkpoint(apply, policy=REMAT[remat])

    plain, mem = layer(False), layer(True)

    def group(x_BTD: Array, blocks: Params) -> Array:
        if "plain" in blocks:
            x_BTD = _scan(plain, x_BTD, blocks["plain"], unroll)
        return mem(x_BTD, blocks["memory"]) if "memory" in blocks else x_BTD

    x_BTD = embed(config, params, tokens_BT)
    for i in range(len(config.segments)):
        x_BTD = _scan(group, x_BTD, params[f"segment_{i}"], unroll)
    return rms_norm(x_BTD, params["norm"]["scale"], config.norm_eps)


def _scan(f: Callable[[Array, Params], Array], x: Array, stack: Params, unroll: bool) -> Array:
    """f(... f(f(x, stack[0]), stack[1]) ...)."""
    n = jax.tree.leaves(stack)[0].shape[0]
    if n == 1:
        return f(x, jax.tree.map(lambda leaf: leaf[0], stack))
    return jax.lax.scan(lambda x, one: (f(x, one), None), x, stack, unroll=n if unroll else 1)[0]


def crossbatch_forward(
    config: ModelConfig,
    params: Params,
    tokens_BT: Array,
    plan: crossbatch.Plan,
    segment_ids_BT: Array | None = None,
    *,
    kernel: str = "auto",
    execution: str = "auto",
) -> Array:
    """Logits, float32 [B, T, V], of a batch whose rows read each other as `plan` says; differentiable throughout.

    Args:
        kernel, execution: as for `forward`.
    """
    options = dict(plan=plan, segment_ids_BT=segment_ids_BT, kernel=kernel, execution=execution)
    return logits(config, params, forward(config, params, tokens_BT, **options))


def layers(config: ModelConfig, params: Params) -> list[Params]:
    """The blocks one by one, in order: slices of the stacks."""
    return [block(i) for numbers, block in _runs(config, params) for i in range(len(numbers))]


def _runs(config: ModelConfig, params: Params) -> Iterator[tuple[range, Callable[[Array | int], Params]]]:
    """The layers in order, plain ones that follow one another together: their numbers, and a function that cuts the
    block of the i-th of them out of the stack (a slice of the stack for a loop to scan would be copied first).
    """
    number = 0
    for i, segment in enumerate(config.segments):
        stacks = params[f"segment_{i}"]
        for r in range(segment.repeats):
            for kind, n in (("plain", segment.plain), ("memory", int(segment.memory))):
                if n == 0:
                    continue

                def block(i: Array | int, stack=stacks[kind], start=r * n, nested=int(kind == "plain")) -> Params:
                    flat = lambda x: x.reshape(-1, *x.shape[1 + nested :])
                    cut = lambda x: jax.lax.dynamic_index_in_dim(flat(x), start + i, keepdims=False)
                    return jax.tree.map(cut, stack)

                yield range(number, number + n), block
                number += n


def read_window(
    config: ModelConfig,
    params: Params,
    tokens_BT: Array,
    *,
    mem: memory.Cache | memory.Pages,
    valid_BT: Array | None = None,
    reading: memory.Reading = memory.DENSE,
) -> tuple[Array, tuple[Array, ...], tuple[Array, ...]]:
    """The model over a window's tokens, from its first on, with `mem` before it. Memory is only read.

    Args:
        tokens_BT: int32, T tokens of each row.
        mem: memory, one layer for each of `config.mem_layers`.
        valid_BT: bool, False for padding, which no token sees. None: all valid.
        reading: how memory is read.

    Returns:
        hidden [B, T, D] as from `forward`; the tokens' un-rotated keys and values, [B, G, K, T] for each of
        `config.mem_layers`, to be appended to memory.
    """
    T = tokens_BT.shape[1]
    visible_BTT = attention.causal_mask(T)
    if valid_BT is not None:
        visible_BTT = visible_BTT & valid_BT[:, None, :]
    angles = attention.rotary_angles(T, config.head_size, config.rope_base)

    def attend(layer: int, turn: Callable[..., Array], q_BHTK: Array, k_BGTK: Array, v_BGTK: Array):
        q, k = turn(q_BHTK, angles), turn(k_BGTK, angles)
        options = dict(scale=score_scale(config), score_bytes=WINDOW_SCORE_BYTES)
        return q, attention.attend_by_blocks(q, k, v_BGTK, visible_BTT, **options)

    layer = _inference_layer(config, attend, mem, reading)
    x_BTD, keys, values = embed(config, params, tokens_BT), [], []
    for numbers, block in _runs(config, params):
        one = lambda x_BTD, i, numbers=numbers, block=block: layer(numbers[0], x_BTD, block(i))
        if len(numbers) > 1:
            # One body for all of them, whose keys and values nobody needs.
            x_BTD, _ = jax.lax.scan(lambda x_BTD, i, one=one: (one(x_BTD, i)[0], None), x_BTD, jnp.arange(len(numbers)))
            continue
        x_BTD, (k_BGKT, v_BGKT) = one(x_BTD, 0)
        if numbers[0] in config.mem_layers:
            keys, values = [*keys, k_BGKT], [*values, v_BGKT]
    return rms_norm(x_BTD, params["norm"]["scale"], config.norm_eps), tuple(keys), tuple(values)


def extend_window(
    config: ModelConfig,
    params: Params,
    tokens_BT: Array,
    *,
    mem: memory.Cache | memory.Pages,
    local: memory.Cache,
    rotated: tuple[Array, ...] | None = None,
    count_B: Array | None = None,
    reading: memory.Reading = memory.DENSE,
    blocks: list[Params] | None = None,
    watch: Callable[[int, Array], None] | None = None,
) -> tuple[Array, memory.Cache, tuple[Array, ...]]:
    """The model over tokens that follow what `local` holds of the open window, with `mem` before it.

    Args:
        tokens_BT: int32, the next T tokens of each row's window, which has room for them.
        mem: memory, one layer for each of `config.mem_layers`; only read.
        local: the open window so far, one layer for each of the model's; written in place where it is donated.
        rotated: `rotated_keys(config, local)`, kept where a loop over tokens should not rotate all of them each time.
        count_B: int32, how many of the T tokens, from the first, each row takes. None: all.
        reading: how memory is read.
        blocks: `layers(config, params)`, taken apart before where a loop over tokens should not do it each time.
        watch: called with the place of each memory layer among them, and the queries [B, H, T, K] it reads memory with.

    Returns:
        hidden [B, T, D] as from `forward`; `local` and `rotated` with the tokens in them.
    """
    T = tokens_BT.shape[1]
    rotated = rotated_keys(config, local) if rotated is None else rotated
    table = attention.rotary_angles(local.capacity, config.head_size, config.rope_base)
    angles = table.at(local.length_B[:, None] + jnp.arange(T)[None, :])
    filled_BTS = (jnp.arange(local.capacity)[None, :] < local.length_B[:, None])[:, None, :]

    def attend(layer: int, turn: Callable[..., Array], q_BHTK: Array, k_BGTK: Array, v_BGTK: Array):
        q, k_BGKT, v_BGKT = turn(q_BHTK, angles), *(jnp.swapaxes(x, 2, 3) for x in (k_BGTK, v_BGTK))
        now = attention.Source(turn(k_BGKT, angles, slots_last=True), v_BGKT, attention.causal_mask(T))
        before = rotated[layer], local.values[layer], filled_BTS
        return q, attention.attend(q, *before, now, scale=score_scale(config), slots_last=True)

    layer = _inference_layer(config, attend, mem, reading, watch)
    x_BTD, keys, values = embed(config, params, tokens_BT), [], []
    for number, block in enumerate(layers(config, params) if blocks is None else blocks):
        x_BTD, (k_BGKT, v_BGKT) = layer(number, x_BTD, block)
        keys, values = [*keys, k_BGKT], [*values, v_BGKT]
    hidden_BTD = rms_norm(x_BTD, params["norm"]["scale"], config.norm_eps)
    # Only this zero makes the append wait for the last read of the cache; without it, it is made in a copy.
    zero_B = jnp.minimum(jnp.argmax(hidden_BTD[:, 0], axis=-1), 0).astype(jnp.int32)
    local = dataclasses.replace(local, length_B=local.length_B + zero_B)
    new = [_turn(config, layer)(k_BGKT, angles, slots_last=True) for layer, k_BGKT in enumerate(keys)]
    rotated = memory.append(memory.Cache(rotated, (), local.length_B), new, (), count_B).keys
    return hidden_BTD, memory.append(local, keys, values, count_B), rotated


def rotated_keys(config: ModelConfig, local: memory.Cache) -> tuple[Array, ...]:
    """The keys of an open window as its queries meet them, [B, G, K, S] for each layer: rotated by slot, but where the
    layer rotates nothing.
    """
    table = attention.rotary_angles(local.capacity, config.head_size, config.rope_base)
    return tuple(_turn(config, layer)(k_BGKS, table, slots_last=True) for layer, k_BGKS in enumerate(local.keys))


def _turn(config: ModelConfig, layer: int) -> Callable[..., Array]:
    """The rotation that a layer applies to local queries and keys."""
    rotates = layer not in config.mem_layers or config.mem_positionals
    return attention.rotate if rotates else (lambda x, angles, slots_last=False: x)


def _inference_layer(
    config: ModelConfig,
    attend: Callable[..., tuple[Array, attention.Partial]],
    mem: memory.Cache | memory.Pages,
    reading: memory.Reading,
    watch: Callable[[int, Array], None] | None = None,
) -> Callable[[int, Array, Params], tuple[Array, tuple[Array, Array]]]:
    """(number, x [B, T, D], block) -> the layer's output [B, T, D]; un-rotated keys and values [B, G, K, T].

    Args:
        attend: (layer, rotation that the layer applies, q, k, v) -> (the queries that memory is read with, the partial
            over the open window).
    """

    def layer(number: int, x_BTD: Array, block: Params) -> tuple[Array, tuple[Array, Array]]:
        m = config.mem_layers.index(number) if number in config.mem_layers else None

        def with_memory(q_BHTK: Array, k_BGTK: Array, v_BGTK: Array) -> Array:
            q, *partials = attend(number, _turn(config, number), q_BHTK, k_BGTK, v_BGTK)
            if m is not None and watch is not None:
                watch(m, q)
            if m is not None and mem.capacity:
                arrays, lies = (mem.keys[m], mem.values[m], mem.length_B), dict(deals=mem.deals, seen=mem.each_seen)
                partials.append(memory.read(reading, q, *arrays, scale=score_scale(config), **lies))
            return attention.merge(*partials).o_BHTK.astype(q.dtype)

        x_BTD, (k_BGTK, v_BGTK) = Block(config).apply({"params": block}, x_BTD, with_memory)
        return x_BTD, (jnp.swapaxes(k_BGTK, 2, 3), jnp.swapaxes(v_BGTK, 2, 3))

    return layer
