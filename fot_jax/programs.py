"""What a run compiles: a training step, an evaluation, the state they work on, and how rows become a batch.

A step is one jitted function from (state, batch) to (state, metrics), with its shardings stated and the state donated.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from fot_jax import checkpoint, crossbatch, model, run_config, sharding
from fot_jax.config import ModelConfig
from fot_jax.losses import Batch, LossOptions, loss_sums
from fot_jax.run_config import learning_rate, make_optimizer

Array = jax.Array
PyTree = Any


@functools.partial(jax.tree_util.register_dataclass, data_fields=["step", "params", "opt_state"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step changes: steps done (int32), parameters, optimizer state."""

    step: Array
    params: PyTree
    opt_state: PyTree


def new_state(params: PyTree, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def state_shardings(mesh: Mesh | AbstractMesh, state: TrainState) -> TrainState:
    """Shardings of a state (of arrays or shapes): what an optimizer keeps of a parameter, whole or summed over one of
    its axes, lies as the parameter does; single numbers, and what `sharding.OPTIMIZER` names, are on every device.

    Raises:
        ValueError: an array of the optimizer's that is not that of a parameter; see also `sharding.param_shardings`.
    """
    params = sharding.param_shardings(mesh, state.params)
    shapes, places = checkpoint.named_leaves(state.params), checkpoint.named_leaves(params)

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        if math.prod(leaf.shape) == 1 or getattr(path[-1], "name", None) in sharding.OPTIMIZER:
            return sharding.replicated(mesh)
        name = "." + jax.tree_util.keystr(path, simple=True, separator=".")
        of = max((p for p in shapes if name.endswith("." + p)), key=len, default=None)
        if of is not None:
            whole, split = shapes[of].shape, tuple(places[of].spec)
            if leaf.shape == whole:
                return places[of]
            for axis in range(len(whole)):
                if leaf.shape == whole[:axis] + whole[axis + 1 :]:
                    return NamedSharding(mesh, P(*split[:axis], *split[axis + 1 :]))
        raise ValueError(
            f"optimizer state {name[1:]} of shape {leaf.shape} is not of a parameter; wanted the shape of one, with "
            "all of its axes or one fewer, or a single number"
        )

    return TrainState(sharding.replicated(mesh), params, jax.tree_util.tree_map_with_path(place, state.opt_state))


def train_step(
    config: ModelConfig,
    options: LossOptions,
    optimizer: optax.GradientTransformation,
    rate: Callable[[Array], Array],
    plan: crossbatch.Plan | None,
    state: TrainState,
    batch: Batch,
) -> tuple[TrainState, dict[str, Array]]:
    """One update from the gradient of the mean loss over all unmasked tokens of all microbatches.

    Args:
        rate: learning rate of an update number, reported.
        plan: crossbatch plan of a microbatch.
        batch: arrays as for `loss_sums`, with a leading axis of microbatches, [A, B, T].

    Returns:
        The next state and float32 scalars: loss, accuracy, tokens, grad_norm, param_norm, learning_rate.
    """
    grad = jax.value_and_grad(functools.partial(loss_sums, config, options, plan), has_aux=True)

    def add(total: PyTree, micro: Batch) -> tuple[PyTree, None]:
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, grad(state.params, micro)), None

    first = {key: x[0] for key, x in batch.items()}
    if batch["tokens"].shape[0] == 1:
        (loss, counts), grads = grad(state.params, first)
    else:  # sums, divided once by all tokens: a microbatch with more of them weighs more
        shapes = jax.eval_shape(grad, state.params, first)
        ((loss, counts), grads), _ = jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape), shapes), batch)
    tokens = jnp.maximum(counts["tokens"], 1.0)
    grads = jax.tree.map(lambda g: g / tokens, grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {
        "loss": loss / tokens,
        "accuracy": counts["right"] / tokens,
        "tokens": counts["tokens"],
        "grad_norm": optax.global_norm(grads),
        "param_norm": optax.global_norm(params),
        "learning_rate": rate(state.step),
    }
    return TrainState(state.step + 1, params, opt_state), metrics


def compiler_options() -> dict[str, Any] | None:
    """What XLA is told when it compiles a step.

    On a CPU, JAX 0.10.2 hands matrix products to its library one by one; told to hand over what follows them too, the
    step of bench/train_step.py takes 3 to 8% less time. The option is experimental: other versions, of which only 0.12
    was measured, without a difference, are told nothing. The known wrong results of that library (jax-ml/jax#39103,
    small matrices before a sum) are there without this too; a test compares gradients.
    """
    if sharding.platform() != "cpu" or jax.__version_info__ != (0, 10, 2):
        return None
    return {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_REDUCE"}


class Programs(NamedTuple):
    """What a run compiles, and where its arguments lie on the mesh of `jax.set_mesh`.

    Attributes:
        optimizer: what updates parameters.
        initial: key -> the state before the first step.
        state: shapes and places of a state.
        batch: shapes and places of a batch in microbatches, [A, B, T].
        step: the crossbatch plan of a microbatch -> (state, batch) -> (state, metrics), jitted; the state is donated.
        evaluate: (params, batch) -> sums, jitted; see `eval_step`.
    """

    optimizer: optax.GradientTransformation
    initial: Callable[[Array], TrainState]
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    step: Callable[[crossbatch.Plan | None], Any]
    evaluate: Any


def build(config: ConfigDict, model_config: ModelConfig, mesh: Mesh | AbstractMesh) -> Programs:
    """The programs of a run, jitted but not compiled; within `jax.set_mesh(mesh)`, whose devices need not be there. An
    abstract mesh is enough for shapes and places.

    Raises:
        ValueError: parameters that the mesh does not divide, or are not in the table.
    """
    optimizer, rate = make_optimizer(config), learning_rate(config)
    options = LossOptions(
        loss_chunk=config.loss_chunk,
        remat=config.remat,
        unroll=config.unroll,
        separate=config.batch.separate,
        loss_on_previous=config.crossbatch.loss_on_previous,
        kernel=config.attention,
        execution=config.crossbatch.execution,
    )

    def initial(key: Array) -> TrainState:
        return new_state(model.init_params(model_config, key), optimizer)

    abstract = jax.eval_shape(lambda: initial(jax.random.key(config.seed)))
    places = state_shardings(mesh, abstract)
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, places)
    batch_place, replicated = NamedSharding(mesh, P(None, *sharding.spec("batch"))), sharding.replicated(mesh)
    parts = config.batch.accumulate
    shape = parts, config.batch.rows // parts, run_config.batch_length(config, model_config)
    dtypes = dict(tokens=jnp.int32, targets=jnp.int32, loss_mask=jnp.bool_, segment_ids=jnp.int32)
    batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_place) for name, dtype in dtypes.items()}

    @functools.cache
    def step(plan: crossbatch.Plan | None) -> Any:
        return jax.jit(
            functools.partial(train_step, model_config, options, optimizer, rate, plan),
            in_shardings=(places, batch_place),
            out_shardings=(places, replicated),
            donate_argnums=0,
            compiler_options=compiler_options(),
        )

    evaluate = jax.jit(
        functools.partial(eval_step, model_config, options),
        in_shardings=(places.params, batch_place),
        out_shardings=replicated,
    )
    return Programs(optimizer, initial, state, batch, step, evaluate)


def eval_step(config: ModelConfig, options: LossOptions, params: PyTree, batch: Batch) -> tuple[Array, Array, Array]:
    """Sums over a batch [A, B, T] without crossbatch: loss, unmasked tokens, tokens predicted right."""

    def one(micro: Batch) -> tuple[Array, Array, Array]:
        loss, counts = loss_sums(config, options, None, params, micro)
        return loss, counts["tokens"], counts["right"]

    return jax.tree.map(lambda x: x.sum(), jax.lax.map(one, batch))


def microbatches(config: ConfigDict, shards: int = 1) -> np.ndarray:
    """int [A, R / A]: the numbers of a batch's rows as microbatches have them. Each keeps whole documents (see
    `run_config.layout`), its blocks dealt to shards (see `crossbatch.Plan.dealt`).
    """
    blocks = run_config.layout(config)[1] if config.crossbatch.kind == "blocks" else 1
    apart = np.arange(config.batch.rows).reshape(blocks, config.batch.accumulate, shards if blocks > 1 else 1, -1)
    return np.moveaxis(apart, 0, 2).reshape(config.batch.accumulate, -1)


class Rows:
    """Which rows of a batch this process has, and how they become the batch of all.

    Attributes:
        numbers: int [n], of the rows that this process's devices take, ascending: what its data should make.
    """

    def __init__(self, config: ConfigDict, mesh: Mesh):
        order = microbatches(config, mesh.shape["data"] * mesh.shape["fsdp"])
        self._place = NamedSharding(mesh, P(None, *sharding.spec("batch")))
        indices = self._place.addressable_devices_indices_map(order.shape).values()
        self._columns = np.unique(np.concatenate([np.arange(order.shape[1])[columns] for _, columns in indices]))
        self.numbers = np.sort(order[:, self._columns], axis=None)
        self._taken = np.searchsorted(self.numbers, order[:, self._columns])
        self._rows = order.shape[1]

    def together(self, batch: Batch) -> Batch:
        """Arrays of all processes, [A, R / A, T], from this one's rows [n, T]."""

        def joined(x: np.ndarray) -> Array:
            micro = np.asarray(x)[self._taken]

            def part(index: tuple[slice, ...]) -> np.ndarray:
                columns = np.arange(self._rows)[index[1]]
                return micro[:, np.searchsorted(self._columns, columns)]

            shape = (micro.shape[0], self._rows, micro.shape[-1])
            return jax.make_array_from_callback(shape, self._place, part)

        return {key: joined(batch[key]) for key in ("tokens", "targets", "loss_mask", "segment_ids")}
