"""What a training run needs before anybody pays for the chips: by arithmetic, and by the compiler.

`arithmetic` needs nothing but the configuration. `compiled` runs the real compiler for TPUs or GPUs that are not there
(`jax.experimental.topologies`; the packages libtpu and jax-cuda13-plugin compile on any machine) and reads what it
made.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from fot_jax import attention, crossbatch, hlo, programs, run_config, sharding
from fot_jax.config import ModelConfig
from fot_jax.hardware import Hardware
from fot_jax.host import row, size, versions
from fot_jax.metrics import flops_per_token


class DoesNotFit(ValueError):
    """The compiler says that a step does not fit its chips."""


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """A run, reckoned.

    Attributes:
        hardware: chips.
        mesh: size of each axis.
        parameters: how many.
        rows, length: of a batch.
        accumulate: microbatches of it.
        contexts, mean_contexts: other windows that a row of a memory layer reads, at most and on average, under the
            schedule's largest plan.
        attention: the kernel that computes attention.
        execution: how contexts come to rows; "none" without crossbatch.
        flops_per_token: forward and backward, crossbatch counted, nothing recomputed.
        steps, tokens: of the run.
        nbytes: bytes on a chip by kind.
        share: of the chips' peak that is reckoned with.
    """

    hardware: Hardware
    mesh: dict[str, int]
    parameters: int
    rows: int
    length: int
    accumulate: int
    contexts: int
    mean_contexts: float
    attention: str
    execution: str
    flops_per_token: float
    steps: int
    tokens: int
    nbytes: dict[str, int]
    share: float

    @property
    def tokens_per_second(self) -> float:
        """Of all chips together."""
        return self.share * self.hardware.chip.flops * self.hardware.chips / self.flops_per_token

    @property
    def days(self) -> float:
        """The whole run."""
        return self.tokens / self.tokens_per_second / 86400

    def summary(self) -> dict[str, Any]:
        """Everything, for programs."""
        return {
            **dataclasses.asdict(self),
            "hardware": str(self.hardware),
            "chips": self.hardware.chips,
            "bytes_of_chip": self.hardware.chip.nbytes,
            "tokens_per_second": self.tokens_per_second,
            "days": self.days,
        }

    def table(self) -> str:
        """The same, for people."""
        chip, total = self.hardware.chip, sum(self.nbytes.values())
        rows = {
            "hardware": f"{self.hardware}: {self.hardware.chips} chips, {chip.flops / 1e12:g} TFLOP/s each",
            "mesh": _mesh(self.mesh),
            "parameters": f"{self.parameters:,}",
            "batch": _batch(self),
            "attention": self.attention,
            "crossbatch": f"up to {self.contexts} other windows a row, {self.mean_contexts:.2f} on average, "
            f"{self.execution}"
            if self.contexts
            else "none",
            "FLOPs a token": f"{self.flops_per_token / 1e9:,.2f} GFLOP, forward and backward",
            "tokens/s": f"{self.tokens_per_second:,.0f} at {self.share:.0%} of peak",
            "run": f"{self.steps:,} steps, {self.tokens / 1e9:,.2f} G tokens, {self.days:,.2f} days",
            **{f"chip, {kind}": size(n) for kind, n in self.nbytes.items()},
            "chip, all": f"{size(total)} of {size(chip.nbytes)}{'' if total <= chip.nbytes else ': DOES NOT FIT'}",
        }
        return _table(rows)


def arithmetic(config: ConfigDict, chips: Hardware, share: float) -> Arithmetic:
    """Reckons a run. Bytes of activations are an estimate: what is kept between layers, and one layer's working set.

    Args:
        config: see `run_config.default_config`.
        share: of the chips' peak that the run reaches, above 0 and up to 1.

    Raises:
        ValueError: a share that is none, what `training.check` refuses, and a kernel that is not for these chips.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}; wanted above 0 and at most 1")
    model_config = _model(config)
    mesh = sharding.abstract_mesh(config.mesh, chips.chips, chips.slices)
    _check_mesh(mesh, chips)
    run_config.check_batch(config, model_config, mesh.shape)
    state = programs.build(config, model_config, mesh).state
    held = lambda tree: sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )
    params = held(state.params)
    length, how = run_config.batch_length(config, model_config), _how(config, model_config, chips.platform)
    nbytes = {
        "parameters": params,
        "optimizer state": held(state.opt_state),
        # Of microbatches the sum so far, and those of one.
        "gradients": params * (2 if config.batch.accumulate > 1 else 1),
        **_activations(config, model_config, mesh.shape),
        "crossbatch": _contexts(how, length, model_config, mesh.shape),
    }
    return Arithmetic(
        hardware=chips,
        mesh=dict(mesh.shape),
        parameters=sum(math.prod(x.shape) for x in jax.tree.leaves(state.params)),
        rows=config.batch.rows,
        length=length,
        contexts=max(max(plan.seen, default=0) if plan else 0 for plan in how.plans),
        mean_contexts=float(how.plan.visible.sum(1).mean()) if how.plan else 0.0,
        accumulate=config.batch.accumulate,
        attention=how.kernel,
        execution=how.execution,
        flops_per_token=max(flops_per_token(model_config, plan, length) for plan in how.plans),
        steps=config.steps,
        tokens=config.steps * config.batch.rows * length,
        nbytes=nbytes,
        share=share,
    )


def _model(config: ConfigDict) -> ModelConfig:
    """The run's model, after every check of the configuration."""
    run_config.check_config(config)
    start = run_config.read_model(config.init_from) if config.init_from and not config.model.size else None
    return run_config.model_config(config, start)


def _check_mesh(mesh: Any, chips: Hardware) -> None:
    """A forecast for chips that lie idle would be wrong."""
    if mesh.size != chips.chips:
        raise ValueError(
            f"mesh {_mesh(dict(mesh.shape))} has {mesh.size} of the {chips.chips} chips of {chips}; wanted all: "
            "config.mesh to fit, or hardware stated behind the configuration's file (FILE.py:v5e:16x16)"
        )


def _activations(config: ConfigDict, c: ModelConfig, mesh: dict[str, int]) -> dict[str, int]:
    """Bytes on a chip of what a step computes."""
    ways, tensor = mesh["data"] * mesh["fsdp"], mesh["tensor"]
    tokens = config.batch.rows // config.batch.accumulate * run_config.batch_length(config, c) // ways
    compute = jnp.dtype(c.dtypes.compute).itemsize
    heads = (c.n_heads + 2 * c.n_kv_heads) * c.head_size
    # With nothing recomputed a layer keeps what its products and norms read.
    layer = 4 * c.d_model + (heads + c.n_heads * c.head_size + 3 * c.d_ff) // tensor
    kept = {"full": c.d_model, "dots": c.d_model + (heads + c.d_model + 3 * c.d_ff) // tensor, "none": layer}
    # Layers that read contexts keep their output and its log-sum-exp, whatever is recomputed.
    reads = len(c.mem_layers) if config.crossbatch.kind != "none" and config.remat != "none" else 0
    read = c.n_heads * (c.head_size * compute + 4) // tensor
    # Of the head its weights as products take them and a chip's own gradient in float32; of a layer both as they are
    # computed with.
    head, of_layer = c.vocab_size * c.d_model, c.d_model * (heads + c.n_heads * c.head_size + 3 * c.d_ff)
    whole = max(head * (compute + 4), 2 * of_layer * compute) // tensor
    chunk = min(config.loss_chunk or config.batch.rows * run_config.batch_length(config, c), tokens * ways) // ways
    return {
        "activations kept": tokens * (c.n_layers * kept[config.remat] * compute + reads * read),
        "a layer's work": 2 * tokens * layer * compute,
        "gathered weights": whole if mesh["fsdp"] > 1 else 0,
        "logits": 2 * chunk * c.vocab_size // tensor * 4,
    }


class _How(NamedTuple):
    """How a run's memory layers read.

    Attributes:
        plans: the crossbatch plan for each of the numbers of contexts that the schedule chooses among.
        kernel: that computes attention.
        together: contexts read together under the largest plan; 0 for a ring.
    """

    plans: tuple[crossbatch.Plan | None, ...]
    kernel: str
    together: int

    @property
    def plan(self) -> crossbatch.Plan | None:
        """The one with the most contexts."""
        return max(self.plans, key=lambda plan: plan.n_contexts if plan else 0)

    @property
    def contexts(self) -> int:
        return self.plan.n_contexts if self.plan else 0

    @property
    def execution(self) -> str:
        if not self.contexts:
            return "none"
        return "concatenate" if self.together else "ring"


def _how(config: ConfigDict, c: ModelConfig, platform: str) -> _How:
    length = run_config.batch_length(config, c)
    plans = tuple(run_config.make_plan(config, contexts) for contexts in config.crossbatch.contexts)
    kernel = attention.kernel(config.attention, length, c.head_size, c.dtypes.compute, platform)
    how = _How(plans, kernel.name, 0)
    if how.plan is None:
        return how
    return how._replace(together=crossbatch.together(how.plan, length, config.crossbatch.execution, platform))


def _contexts(how: _How, length: int, c: ModelConfig, mesh: dict[str, int]) -> int:
    """Bytes on a chip of keys and values of contexts, in a layer that reads them, and of their gradients in float32: of
    as many as are read at once, or in a ring of one that is read and one on its way.
    """
    if not how.contexts:
        return 0
    rows = how.plan.block_rows // (mesh["data"] * mesh["fsdp"])
    of_context = 2 * rows * length * c.n_kv_heads * c.head_size // mesh["tensor"]
    return (how.together or 2) * of_context * (jnp.dtype(c.dtypes.compute).itemsize + 4)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A training step that was compiled.

    Attributes:
        hardware, mesh, rows, length, accumulate, attention, execution: as for `Arithmetic`.
        contexts: other windows that a row reads.
        argument_bytes: of a chip: parameters, optimizer state, batch.
        temporary_bytes: what the step needs beside them.
        peak_bytes: of a chip: arguments, results that are not in their place, temporaries and program together.
        code_bytes: of the program.
        collectives: by kind, how many and how many bytes a chip takes or gives; see `hlo.Collective`.
        seconds: that compiling took.
        versions: of JAX and the chips' compiler.
    """

    hardware: Hardware
    mesh: dict[str, int]
    rows: int
    length: int
    accumulate: int
    attention: str
    execution: str
    contexts: int
    argument_bytes: int
    temporary_bytes: int
    peak_bytes: int
    code_bytes: int
    collectives: dict[str, hlo.Collective]
    seconds: float
    versions: dict[str, str]

    @property
    def fits(self) -> bool:
        """Whether a chip has room for it."""
        return self.peak_bytes <= self.hardware.chip.nbytes

    def summary(self) -> dict[str, Any]:
        """Everything, for programs."""
        return {
            **dataclasses.asdict(self),
            "hardware": str(self.hardware),
            "chips": self.hardware.chips,
            "bytes_of_chip": self.hardware.chip.nbytes,
            "collectives": {kind: one._asdict() for kind, one in self.collectives.items()},
            "fits": self.fits,
        }

    def table(self) -> str:
        """The same, for people."""
        rows = {
            "hardware": f"{self.hardware}: {self.hardware.chips} chips",
            "mesh": _mesh(self.mesh),
            "batch": _batch(self),
            "attention": self.attention,
            "crossbatch": f"{self.contexts} other windows, {self.execution}" if self.contexts else "none",
            "chip, arguments": size(self.argument_bytes),
            "chip, temporaries": size(self.temporary_bytes),
            "chip, program": size(self.code_bytes),
            "chip, peak": f"{size(self.peak_bytes)} of {size(self.hardware.chip.nbytes)}"
            + ("" if self.fits else ": DOES NOT FIT"),
            **{kind: f"{one.count:,} a step, {size(one.nbytes)} a chip" for kind, one in self.collectives.items()},
            "compiled in": f"{self.seconds:,.0f} s, by " + ", ".join(map(" ".join, self.versions.items())),
        }
        return _table(rows)


def devices(chips: Hardware) -> list[Any]:
    """Descriptions of chips that need not be there, to compile for.

    Raises:
        ValueError: no compiler for them, or a shape that it does not know.
    """
    from jax.experimental import topologies

    if chips.chip.gpu:
        platform, wanted = "cuda", "its compiler (pip install 'fot-jax[gpu_compiler]')"
        nodes = f"{chips.slices}x1x{math.prod(chips.shape)}"
        more: dict[str, Any] = {"target_config": chips.chip.gpu.description(chips.chip.nbytes), "topology": nodes}
    else:
        platform, wanted = "tpu", "a topology that libtpu knows (pip install 'fot-jax[tpu]')"
        # Without a chip libtpu would look for one on the network, and would not be loaded twice.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        more = {"num_slices": chips.slices} if chips.slices > 1 else {}
        more |= {"chip_config_name": "megacore"} if chips.chip.megacore else {}
    try:
        found = topologies.get_topology_desc(platform=platform, topology_name=chips.topology, **more)
    except Exception as error:
        raise ValueError(f"{chips} cannot be compiled for: {error}; wanted {wanted}") from error
    return list(found.devices)


def compiled(config: ConfigDict, chips: Hardware) -> Compiled:
    """Compiles a training step of a run, with the most contexts of its schedule, for chips that need not be there.

    Raises:
        ValueError: what `training.check` and `devices` refuse.
        DoesNotFit: what the compiler says so of, before it says what the step needs.
    """
    model_config = _model(config)
    mesh = sharding.make_mesh(config.mesh, devices(chips))
    _check_mesh(mesh, chips)
    run_config.check_batch(config, model_config, mesh.shape)
    with jax.set_mesh(mesh):
        made, how = programs.build(config, model_config, mesh), _how(config, model_config, sharding.platform())
        plan = how.plan and how.plan.dealt(sharding.ways("batch"))
        begin = time.perf_counter()
        try:
            program = made.step(plan).lower(made.state, made.batch).compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            said = str(error).split("\n\n")[0]
            raise DoesNotFit(
                f"the step does not fit {chips}: {said}; wanted fewer rows a chip, or more chips"
            ) from error
        seconds = time.perf_counter() - begin
    found = program.memory_analysis()
    # The compiler's own peak leaves temporaries out that have been allocated all the same.
    held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    held += found.temp_size_in_bytes
    return Compiled(
        hardware=chips,
        mesh=dict(mesh.shape),
        rows=config.batch.rows,
        length=run_config.batch_length(config, model_config),
        accumulate=config.batch.accumulate,
        attention=how.kernel,
        execution=how.execution,
        contexts=how.contexts,
        argument_bytes=found.argument_size_in_bytes,
        temporary_bytes=found.temp_size_in_bytes,
        peak_bytes=max(found.peak_memory_in_bytes, held) + found.generated_code_size_in_bytes,
        code_bytes=found.generated_code_size_in_bytes,
        collectives=hlo.Program(program.as_text()).collectives(),
        seconds=seconds,
        versions=versions("jax", "jaxlib", "jax-cuda13-plugin" if chips.chip.gpu else "libtpu"),
    )


def _batch(of: Arithmetic | Compiled) -> str:
    parts = f", in {of.accumulate} microbatches" if of.accumulate > 1 else ""
    return f"{of.rows} rows of {of.length}: {of.rows * of.length:,} tokens a step{parts}"


def _mesh(mesh: dict[str, int]) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1) or "one chip"


def _table(rows: dict[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join(row(name, value, width + 1) for name, value in rows.items())
