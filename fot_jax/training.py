"""Training: the loop round a step, from a checkpoint or a beginning to the last step, or until it is stopped.

Everything that decides what a step computes is a function of the configuration, the step number and what the checkpoint
holds, so that a run killed at any moment and started again ends with the same bits.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import logging
import math
import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from fot_jax import attention, checkpoint, crossbatch, files, model, processes, programs, run_config, sharding
from fot_jax.config import ModelConfig, check_target
from fot_jax.exports import Exports, exports_due
from fot_jax.losses import Batch
from fot_jax.metrics import Meter, Metrics, flops_per_token
from fot_jax.mirror import Mirror
from fot_jax.programs import Programs, TrainState, new_state
from fot_jax.watching import Profile, Stalls, memory_in_use

_log = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """Training cannot go on, and the same command would end in the same way: numbers that are not finite, data that
    ended. The message names the step and says what is kept.

    Attributes:
        exit_status: of a command that ends with it, for schedulers that start others again.
    """

    exit_status = 3


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
    config: ConfigDict, model_config: ModelConfig, workdir: str | os.PathLike, made: Programs, batches: Any
) -> tuple[TrainState, dict[str, Any]]:
    """From, in this order: a checkpoint of this run, parameters to start from, initial parameters. Brings the data to
    their place.

    Returns:
        The state, and what else the loop must remember.
    """
    shapes = made.state
    places = jax.tree.map(lambda x: x.sharding, shapes)
    if checkpoint.steps(workdir):
        rest = {"step": shapes.step, "opt_state": shapes.opt_state}
        params, rest, position, run = checkpoint.restore(workdir, shapes.params, rest)
        batches.set_state(position)
        return TrainState(rest["step"], params, rest["opt_state"]), run
    run = {"switched_at": None}
    if config.init_from:
        params = run_config.starting_params(config.init_from, model_config, places.params)
        begin = functools.partial(new_state, optimizer=made.optimizer)
        return jax.jit(begin, out_shardings=places)(params), run
    # Run once: on a CPU, optimising the random number generator takes the compiler longer than running it.
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    initial = jax.jit(made.initial, out_shardings=places, compiler_options=quick)
    return initial(jax.random.key(config.seed)), run


class _Started(NamedTuple):
    """A step that was started, and whose numbers were not looked at."""

    step: int
    plan: crossbatch.Plan | None
    values: dict[str, jax.Array]
    batch: Batch


class _Numbers:
    """The numbers of steps, which are looked at when the next step is started, so that the device is never waited for.

    Args:
        run: what the loop must remember beside the state; gets the step that a schedule switches at.
        saved: checkpoints, which numbers that are not finite do not get into.
    """

    def __init__(
        self,
        config: ConfigDict,
        model_config: ModelConfig,
        first: int,
        run: dict[str, Any],
        rows: programs.Rows,
        saved: checkpoint.Checkpoints,
        metrics: Metrics,
        meter: Meter,
        stalls: Stalls,
    ):
        self._config, self._model, self._first, self._run, self._rows = config, model_config, first, run, rows
        self._saved, self._metrics, self._meter, self._stalls = saved, metrics, meter, stalls
        self._length = run_config.batch_length(config, model_config)
        self._started: _Started | None = None

    def started(self, one: _Started) -> None:
        """Takes a step that was started, and looks at the one before."""
        self.settle()
        self._started = one

    def settle(self) -> None:
        """Looks at the numbers of the step under way.

        Raises:
            TrainingError: they are not finite.
        """
        if self._started is None:
            return
        (step, plan, values, batch), self._started = self._started, None
        with self._stalls.at(f"the devices, in step {step}"):
            values = {key: float(value) for key, value in jax.device_get(values).items()}
        if not all(map(math.isfinite, (values["loss"], values["grad_norm"], values["param_norm"]))):
            workdir = self._saved.directory.parent
            kept = _keep_batch(workdir, step, self._rows.numbers, batch)
            self._saved.wait()
            raise TrainingError(
                f"step {step}: loss is {values['loss']}, gradient norm {values['grad_norm']}, parameter norm "
                f"{values['param_norm']}; wanted finite numbers. {kept} The step is not saved; good checkpoints in "
                f"{self._saved.directory}: {checkpoint.steps(workdir) or 'none'}"
            )
        config = self._config
        if self._run["switched_at"] is None and values["accuracy"] >= config.crossbatch.switch_accuracy:
            self._run["switched_at"] = step + 2  # the step after it may have been started already
        tokens = config.batch.rows * self._length
        self._meter.count(tokens, tokens * flops_per_token(self._model, plan, self._length))
        if step % config.log_every == 0 or step in (self._first + 1, config.steps):
            loss = {"loss": values.pop("loss")}
            loss["perplexity"] = math.exp(min(loss["loss"], 700))
            self._metrics.write(step, loss | values | self._meter.rates() | memory_in_use())


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


def _validated(made: Programs, params: Any, rows: programs.Rows, held_out: list[Batch]) -> dict[str, float]:
    """Numbers of held-out batches."""
    each = map(rows.together, held_out)  # one after another, as each is only there while it is needed
    sums = np.sum([jax.device_get(made.evaluate(params, batch)) for batch in each], axis=0)
    loss, accuracy = float(sums[0] / max(sums[1], 1)), float(sums[2] / max(sums[1], 1))
    values = {"loss": loss, "perplexity": math.exp(min(loss, 700)), "accuracy": accuracy}
    return {f"validation_{key}": value for key, value in values.items()}


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
    group = group or processes.Group(begun=True)
    if group.at.processes != jax.process_count():
        raise ValueError(f"group is of {group.at.processes} processes; wanted that of all {jax.process_count()}")
    model_config, mesh = check(config, workdir)
    workdir, c = files.location(workdir), config.checkpoint
    # What `closing` is given is closed at the end, whatever happened, the last first.
    with jax.set_mesh(mesh), group.signals(), contextlib.ExitStack() as closing:
        saved = checkpoint.Checkpoints(
            workdir,
            model_config,
            save_every=c.every,
            keep_last=c.keep_last,
            keep_every=c.keep_every,
            exported_every=config.export.every,
            barrier=group.wait,
        )
        group.saving, group.saved, group.broken = saved.under_way, saved.last, saved.broken
        made, rows = programs.build(config, model_config, mesh), programs.Rows(config, mesh)
        state, run = _starting_state(config, model_config, workdir, made, batches)
        step = first = int(state.step)

        traced = Mirror(workdir / "profile" / f"process_{jax.process_index()}") if profile else None
        if traced:
            closing.callback(traced.close)
        if jax.process_index() == 0:
            files.write_json(workdir / "config.json", config.to_dict())
            exports = Exports(workdir, **config.export)
            done = lambda: step == config.steps and not group.asked
            closing.push(lambda failed, *_: exports.close(saved.completed(), wait=lambda: not failed and done()))
        stalls = Stalls(**config.stall)
        closing.callback(stalls.close)
        closing.callback(lambda: _closed(saved, stalls))
        metrics = Metrics(workdir, step, config.steps, config.wandb, config.to_dict())
        closing.callback(metrics.close)
        tracing = Profile(traced.local if traced else None, profile)
        closing.callback(tracing.close)
        meter = Meter(run_config.peak_flops(config, mesh.size))
        # Before all that, the others are told, who may wait for this process in a collective or a save.
        closing.push(lambda _, error, __: group.leave(error) if error else None)

        numbers = _Numbers(config, model_config, first, run, rows, saved, metrics, meter, stalls)
        held_out = list(itertools.islice(validation, config.validation.batches)) if config.validation.every else []
        shards = sharding.ways("batch")
        if step:
            _log.info("resuming from step %d in %s", step, workdir)
        if profile and profile[1] <= step:
            _log.warning("steps %d to %d, which a profile was to be of, are done", *profile)
        last = step >= config.steps
        if last:
            group.stop(step)  # what is left to end may be stopped
        while not last:
            stalls.begin(step + 1)
            with meter.waiting(), stalls.at("data"):
                batch = next(batches, None)
            if batch is None:
                raise TrainingError(f"step {step + 1}: the training data ended; wanted {config.steps} steps of it")
            plan = run_config.plan_at(config, step + 1, run["switched_at"])
            plan = plan and plan.dealt(shards)
            with tracing.step(step + 1), stalls.at("the compiler, or the devices to take the step"):
                state, values = made.step(plan)(state, rows.together(batch))
            step += 1
            numbers.started(_Started(step, plan, values, batch))
            tracing.ended(step, state)
            saved.poll()
            if jax.process_index() == 0:
                exports.poll(saved.completed())
            with stalls.at("the other processes, to stop with the same step"):
                stopped = group.stop(step)
            last = step == config.steps or bool(stopped)
            # Validation comes before the save, so that a run killed in between does it again; who asks a run to
            # stop should not have to wait for it.
            if held_out and not stopped and (last or step % config.validation.every == 0):
                with meter.pause(), stalls.paused("validation"):
                    numbers.settle()
                    metrics.write(step, _validated(made, state.params, rows, held_out))
            if last or saved.should_save(step):
                numbers.settle()  # before the save: a state that is not finite must not become a checkpoint
                with stalls.at("the store, for the numbers of steps"):
                    metrics.copy()  # as who resumes from it finds no other numbers of the steps before
                rest = {"step": state.step, "opt_state": state.opt_state}
                with stalls.at(f"the checkpoint of step {step}, or the one before"):
                    saved.save(step, state.params, rest, batches.get_state(), run)
    if group.asked and jax.process_index() == 0:
        if step < config.steps:
            _log.warning("stopped by %s after step %d, which is saved; the same command resumes", group.asked, step)
        elif left := exports_due(workdir, config.export.every):
            steps = ", ".join(map(str, left))
            _log.warning("stopped by %s before the export of step %s; the same command makes it", group.asked, steps)
    return state


def _closed(saved: checkpoint.Checkpoints, stalls: Stalls) -> None:
    with stalls.at("the last checkpoint"):
        saved.close()
