"""Training: a step, and the loop round it.

A step is one jitted function from (state, batch) to (state, metrics), with its shardings stated and the state donated.
Everything that decides what a step computes is a function of the configuration, the step number and what the checkpoint
holds, so that a run killed at any moment and started again ends with the same bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from fot_jax import attention, checkpoint, crossbatch, files, model, processes, run_config, sharding
from fot_jax.config import ModelConfig, check_target
from fot_jax.exports import Exports
from fot_jax.losses import Batch, LossOptions, loss_sums
from fot_jax.metrics import Meter, Metrics, flops_per_token
from fot_jax.mirror import Mirror
from fot_jax.run_config import learning_rate, make_optimizer
from fot_jax.watching import Profile, Stalls, memory_in_use

Array = jax.Array
PyTree = Any
_log = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """Training cannot go on; the message names the step and says what is kept."""


# ------------------------------------------------------------------------------------------------------------- step


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


def programs(config: ConfigDict, model_config: ModelConfig, mesh: Mesh | AbstractMesh) -> Programs:
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


# ------------------------------------------------------------------------------------------------------------- loop


def check(config: ConfigDict, workdir: str | os.PathLike) -> tuple[ModelConfig, jax.sharding.Mesh]:
    """The run's model and mesh, after every check that needs no data and no long work.

    Raises:
        ValueError: see `run_config.check_config`, `model_config` and `check_batch`, `sharding.make_mesh` and
            `attention.kernel`.
        CheckpointError: the model in `workdir` or `init_from` is another, or that in `workdir` was never in training.
    """
    run_config.check_config(config)
    mesh = sharding.make_mesh(config.mesh)
    source = config.init_from
    if checkpoint.is_workdir(workdir):
        checkpoint.check_resumable(workdir)
        source = workdir
    pretrained = run_config.read_model(source) if source else None
    model_config = run_config.model_config(config, pretrained)
    run_config.check_batch(config, model_config, mesh.shape)
    if config.export.every:
        check_target(model_config, config.export.to)
    with jax.set_mesh(mesh):
        length, dtype = run_config.batch_length(config, model_config), model_config.dtypes.compute
        attention.kernel(config.attention, length, model_config.head_size, dtype)
    wanted = model.abstract_params(model_config)
    sharding.param_shardings(mesh, wanted)
    if source == workdir:
        checkpoint.check_same_model(workdir, model_config)
    elif source:
        found = model.abstract_params(run_config.starting_model(pretrained, model_config))
        checkpoint.check_shapes(source, "params", found, wanted)
    return model_config, mesh


def _starting_state(
    config: ConfigDict, model_config: ModelConfig, workdir: str | os.PathLike, programs: Programs, batches: Any
) -> tuple[TrainState, dict[str, Any]]:
    """From, in this order: a checkpoint of this run, parameters to start from, initial parameters. Brings the data to
    their place.

    Returns:
        The state, and what else the loop must remember.
    """
    shapes = programs.state
    places = jax.tree.map(lambda x: x.sharding, shapes)
    if checkpoint.steps(workdir):
        rest = {"step": shapes.step, "opt_state": shapes.opt_state}
        params, rest, position, run = checkpoint.restore(workdir, shapes.params, rest)
        batches.set_state(position)
        return TrainState(rest["step"], params, rest["opt_state"]), run
    run = {"switched_at": None}
    if config.init_from:
        params = run_config.starting_params(config.init_from, model_config, places.params)
        begin = functools.partial(new_state, optimizer=programs.optimizer)
        return jax.jit(begin, out_shardings=places)(params), run
    # Run once: on a CPU, optimising the random number generator takes the compiler longer than running it.
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    initial = jax.jit(programs.initial, out_shardings=places, compiler_options=quick)
    return initial(jax.random.key(config.seed)), run


class _Pending(NamedTuple):
    """A step that was started, and whose numbers were not looked at."""

    step: int
    plan: crossbatch.Plan | None
    values: dict[str, Array]
    batch: Batch


def _keep_batch(workdir: str | os.PathLike, step: int, rows: np.ndarray, batch: Batch) -> str:
    """Writes the rows of a batch that this process has, for whoever looks into it. Says where they are, or why not."""
    written = io.BytesIO()
    np.savez_compressed(written, row=rows, **batch)
    path = files.location(workdir) / "refused" / f"step_{step}.process_{jax.process_index()}.npz"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, written.getvalue())
    except Exception as error:  # a full disk, a store out of reach
        return f"Its batch could not be written to {path} ({files.first_line(error)})."
    return f"Its batch is in {path}."


def train(
    config: ConfigDict,
    workdir: str | os.PathLike,
    batches: Iterator[Batch],
    validation: Iterable[Batch] = (),
    profile: tuple[int, int] | None = None,
    group: processes.Group | None = None,
) -> TrainState:
    """Trains to `config.steps`, from the latest checkpoint in `workdir` if there is one.

    SIGTERM and SIGINT, to any of the processes, end it after the step under way, with a checkpoint.

    Args:
        config: see `run_config.default_config`.
        workdir: holds checkpoints, metrics and the model's configuration; a folder that all processes share, or a URL
            (gs://, s3://).
        batches: endless iterator with get_state() -> JSON value and set_state(), of this process's rows (see `Rows`);
            see `data.Batches`.
        validation: held-out batches; as many as `config.validation.batches` are kept and used every time.
        profile: first and last step of a trace, which every process writes to `workdir/profile`.
        group: the processes, as `processes.together` gives them; None if this is the only one.

    Returns:
        The last state.

    Raises:
        ValueError: see `check`; several processes without a group.
        CheckpointError: a checkpoint that cannot be written or read.
        OSError: a full disk, or a store that is out of reach.
        TrainingError: numbers that are not finite, whose batch is kept in `workdir/refused`; or data that ended. The
            last checkpoint is from before.
    """
    group = group or processes.Group()
    if group.at.processes != jax.process_count():
        raise ValueError(f"group is of {group.at.processes} processes; wanted that of all {jax.process_count()}")
    model_config, mesh = check(config, workdir)
    workdir = files.location(workdir)
    c = config.checkpoint
    with jax.set_mesh(mesh), group.signals(), contextlib.ExitStack() as closing:
        saved = checkpoint.Checkpoints(
            workdir,
            model_config,
            save_every=c.every,
            keep_last=c.keep_last,
            keep_every=c.keep_every,
            exported_every=config.export.every,
        )
        run_programs = programs(config, model_config, mesh)
        state, run = _starting_state(config, model_config, workdir, run_programs, batches)
        shards, rows = sharding.ways("batch"), Rows(config, mesh)
        step = first = int(state.step)
        length = run_config.batch_length(config, model_config)
        tokens = config.batch.rows * length
        # All of these are closed, whatever happens to one of them: the last first.
        traced = Mirror(workdir / "profile" / f"process_{jax.process_index()}") if profile else None
        if traced:
            closing.callback(traced.close)
        if jax.process_index() == 0:
            exports = Exports(workdir, **config.export)
            wait = lambda: step == config.steps and not group.asked
            closing.push(lambda failed, *_: exports.close(saved.completed(), wait=wait if not failed else bool))
        closing.callback(saved.close)
        metrics = Metrics(workdir, step, config.steps, config.wandb, config.to_dict())
        closing.callback(metrics.close)
        tracing = Profile(traced.local if traced else None, profile)
        closing.callback(tracing.close)
        stalls = Stalls(**config.stall)
        closing.callback(stalls.close)
        # First of all the others are told, who may wait for this process in a collective or a save.
        closing.push(lambda _, error, __: group.leave(files.first_line(error)) if error else None)
        meter = Meter(run_config.peak_flops(config, mesh.size))
        held_out = list(itertools.islice(validation, config.validation.batches)) if config.validation.every else []
        pending: list[_Pending] = []

        def settle() -> None:
            """Fetches the numbers of the step before, so that the device is never waited for; refuses bad ones."""
            while pending:
                done, plan, values, batch = pending.pop()
                with stalls.at(f"the devices, in step {done}"):
                    values = {key: float(value) for key, value in jax.device_get(values).items()}
                if not all(map(math.isfinite, (values["loss"], values["grad_norm"], values["param_norm"]))):
                    kept = _keep_batch(workdir, done, rows.numbers, batch)
                    saved.wait()
                    raise TrainingError(
                        f"step {done}: loss is {values['loss']}, gradient norm {values['grad_norm']}, parameter norm "
                        f"{values['param_norm']}; wanted finite numbers. {kept} The step is not saved; good "
                        f"checkpoints in {saved.directory}: {checkpoint.steps(workdir) or 'none'}"
                    )
                if run["switched_at"] is None and values["accuracy"] >= config.crossbatch.switch_accuracy:
                    run["switched_at"] = done + 2  # the step after it may have been started already
                meter.count(tokens, tokens * flops_per_token(model_config, plan, length))
                if done % config.log_every == 0 or done in (first + 1, config.steps):
                    loss = {"loss": values.pop("loss")}
                    loss["perplexity"] = math.exp(min(loss["loss"], 700))
                    metrics.write(done, loss | values | meter.rates() | memory_in_use())

        def validate() -> None:
            each = map(rows.together, held_out)
            sums = np.sum([jax.device_get(run_programs.evaluate(state.params, batch)) for batch in each], axis=0)
            loss, accuracy = float(sums[0] / max(sums[1], 1)), float(sums[2] / max(sums[1], 1))
            values = {"loss": loss, "perplexity": math.exp(min(loss, 700)), "accuracy": accuracy}
            metrics.write(step, {f"validation_{key}": value for key, value in values.items()})

        if jax.process_index() == 0:
            files.write_json(workdir / "config.json", config.to_dict())
        if step:
            _log.info("resuming from step %d in %s", step, workdir)
        last = step >= config.steps
        while not last:
            stalls.begin(step + 1)
            with meter.waiting(), stalls.at("data"):
                batch = next(batches, None)
            if batch is None:
                raise TrainingError(f"step {step + 1}: the training data ended; wanted {config.steps} steps of it")
            plan = run_config.plan_at(config, step + 1, run["switched_at"])
            plan = plan and plan.dealt(shards)
            with tracing.step(step + 1), stalls.at("the compiler, or the devices to take the step"):
                state, values = run_programs.step(plan)(state, rows.together(batch))
            step += 1
            settle()
            pending.append(_Pending(step, plan, values, batch))
            tracing.ended(step, state)
            saved.poll()
            if jax.process_index() == 0:
                exports.poll(saved.completed())
            stopped = group.stop(step)
            last = step == config.steps or bool(stopped)
            # Validation comes before the save, so that a run killed in between does it again; who asks a run to
            # stop should not have to wait for it.
            if held_out and not stopped and (last or step % config.validation.every == 0):
                with meter.pause(), stalls.at("validation"):
                    settle()
                    validate()
            if last or saved.should_save(step):
                settle()  # before the save: a state that is not finite must not become a checkpoint
                rest = {"step": state.step, "opt_state": state.opt_state}
                with stalls.at(f"the checkpoint of step {step}, or the one before"):
                    saved.save(step, state.params, rest, batches.get_state(), run)
    if step < config.steps:
        _log.warning("stopped by %s after step %d, which is saved; the same command resumes", stopped, step)
    return state
