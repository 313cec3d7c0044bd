"""The configuration of a run: every key with its default, its checks, and what it means for model, optimizer, data."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import logging
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict, config_dict

from fot_jax import attention, checkpoint, crossbatch, data, formats, sources
from fot_jax.config import FLOAT_DTYPES, DtypePolicy, ModelConfig, named
from fot_jax.formats.source import read_params
from fot_jax.hardware import hardware
from fot_jax.host import warn_once
from fot_jax.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


def default_config() -> ConfigDict:
    """Every key there is, with its default; a file in `configs/` starts from it and changes some."""
    kinds = {"bool": bool, "tuple[int, ...]": tuple, "float": float}
    fields = {
        field.name: config_dict.placeholder(kinds.get(field.type, int))
        for field in dataclasses.fields(ModelConfig)
        if field.name != "dtypes"
    }
    return ConfigDict(
        dict(
            seed=0,
            steps=1000,
            init_from="",  # Hugging Face directory or working directory whose parameters training starts from
            hardware="",  # chips that the run is for, as v5e:16x16, 2*v5e:4x8 or h100:8; what --plan is about
            peak_flops=0.0,  # FLOP/s of all devices together, for the share that is used; 0: those of hardware, if any
            log_every=10,
            loss_chunk=0,  # tokens whose float32 logits exist at a time; 0: all of a microbatch
            remat="none",  # none, full or dots; see model.forward
            unroll=False,  # whether layers of a kind are compiled one by one, for CPUs; see model.forward
            attention="auto",  # what computes attention: auto, xla, splash or cudnn; see attention.kernel
            # A named size, or that of init_from; any field of ModelConfig stated here replaces it.
            model=dict(
                size="",
                **fields,
                dtypes={name: config_dict.placeholder(str) for name in ("params", "compute", "memory")},
            ),
            batch=dict(
                rows=8,  # of a step, over all devices and microbatches
                length=0,  # tokens of a row; 0: the model's window
                accumulate=1,  # microbatches a step; the crossbatch plan is that of one of them
                separate="padding",  # what local attention does not cross: none, padding or documents
            ),
            crossbatch=dict(
                kind="none",  # none, published, longllama_3b, longllama_7b or blocks
                packing=1,  # consecutive windows of a document in a batch (none, published)
                stepping=False,  # published
                windows=1,  # earlier windows (blocks)
                loss_on_previous=True,  # whether rows of earlier windows count in the loss (blocks)
                execution="auto",  # how contexts come to rows: auto, concatenate or ring; see crossbatch_attention
                contexts=(1,),  # range (published) or d (blocks); the schedule chooses among them
                schedule="constant",  # constant, switch_step, switch_accuracy or draw
                switch_step=0,  # last step with the first of two contexts
                switch_accuracy=0.98,  # share of right tokens that a step must reach for the second of two contexts
            ),
            optimizer=dict(
                name="adamw",  # adamw, adafactor, lion or muon
                learning_rate=1e-3,
                schedule="constant",  # constant, cosine or inverse_sqrt
                warmup_steps=0,
                final_share=0.1,  # share of the learning rate that cosine ends with
                b1=0.9,
                b2=0.95,
                eps=1e-8,
                weight_decay=0.0,  # of matrices, times the learning rate; never of norms and temperatures
                decay_embeddings=False,
                clip_norm=1.0,  # of the whole gradient; 0: none
                muon_rate=4.0,  # muon: learning rate of the blocks' matrices, in learning_rates
            ),
            mesh=dict(data=0, fsdp=1, tensor=1),  # data 0: the devices that the others leave
            data=dict(
                train=(),  # sources, as sources.open_corpus takes them: file, folder, python:train, tfds:NAME:SPLIT
                weights=(),  # of the training sources' documents; none: equal
                min_tokens=(),  # shortest document taken of each training source; none: no limit
                max_tokens=0,  # training documents are cut into documents of so many tokens, and shuffled; 0: whole
                validation=(),  # held-out sources
                field="text",  # that holds the text, where documents have fields
                skip_short=False,  # leave out documents of fewer than two tokens, instead of refusing them
                align_documents=False,  # start every document in a window of its own, padding its last one
                tokenizer="",  # SentencePiece model, tokenizer.json or directory
                prepared="",  # folder for tokenised documents; none: WORKDIR/data
                seed=0,  # of the order of documents
            ),
            validation=dict(every=0, batches=8),  # held-out loss, without memory; every 0: never
            checkpoint=dict(every=1000, keep_last=2, keep_every=0),
            # Every so many steps, a multiple of checkpoint.every, fot-convert writes the model to WORKDIR/exports.
            export=dict(every=0, to="hf", dtype=""),  # 0: never; hf or hf-llama; dtype "": that of training
            stall=dict(factor=10.0, seconds=60.0),  # a step is reported that takes so many times the usual, and so long
            wandb="",  # project at Weights & Biases to send metrics to; none: they stay here
        )
    ).lock()


_CHOICES = {
    "remat": ("none", "full", "dots"),
    "attention": attention.NAMES,
    "crossbatch.execution": crossbatch.EXECUTIONS,
    "batch.separate": ("none", "padding", "documents"),
    "crossbatch.kind": ("none", "published", "longllama_3b", "longllama_7b", "blocks"),
    "crossbatch.schedule": ("constant", "switch_step", "switch_accuracy", "draw"),
    "optimizer.name": ("adamw", "adafactor", "lion", "muon"),
    "export.to": ("hf", "hf-llama"),
    "export.dtype": ("", *FLOAT_DTYPES),
    "optimizer.schedule": ("constant", "cosine", "inverse_sqrt"),
}


# Settings that only some values of another setting use; with the others they change nothing, which is worth a warning.
_USED_WITH = {
    "crossbatch.packing": ("crossbatch.kind", ("none", "published")),
    "crossbatch.stepping": ("crossbatch.kind", ("published",)),
    "crossbatch.windows": ("crossbatch.kind", ("blocks",)),
    "crossbatch.loss_on_previous": ("crossbatch.kind", ("blocks",)),
    "crossbatch.contexts": ("crossbatch.kind", ("published", "blocks")),
    "crossbatch.execution": ("crossbatch.kind", ("published", "longllama_3b", "longllama_7b", "blocks")),
    "crossbatch.schedule": ("crossbatch.kind", ("published", "blocks")),
    "crossbatch.switch_step": ("crossbatch.schedule", ("switch_step",)),
    "crossbatch.switch_accuracy": ("crossbatch.schedule", ("switch_accuracy",)),
}


def _get(config: ConfigDict, key: str) -> Any:
    """The value of a dotted key."""
    return functools.reduce(lambda c, name: c[name], key.split("."), config)


def check_config(config: ConfigDict) -> None:
    """Refuses a configuration whose keys or values cannot be trained, before any long work.

    Raises:
        ValueError: unknown or missing keys, a choice that does not exist, numbers that do not fit each other.
    """
    flat = lambda c: (
        {key for key, _ in c.iteritems(preserve_field_references=False)} if isinstance(c, ConfigDict) else set()
    )

    def compare(found: ConfigDict, wanted: ConfigDict, path: str) -> None:
        if wrong := sorted(flat(found) ^ flat(wanted)):
            what = "unknown" if wrong[0] in found else "missing"
            raise ValueError(f"config key {path}{wrong[0]} is {what}; wanted {', '.join(sorted(flat(wanted)))}")
        for key, value in wanted.items():
            if isinstance(value, ConfigDict):
                compare(found[key], value, f"{path}{key}.")

    compare(config, default_config(), "")
    for key, choices in _CHOICES.items():
        if (value := _get(config, key)) not in choices:
            raise ValueError(f"config key {key} is {value!r}; wanted one of {', '.join(choices)}")
    least = dict.fromkeys(("steps", "log_every", "batch.rows", "batch.accumulate", "validation.batches"), 1)
    least |= dict.fromkeys(("checkpoint.every", "checkpoint.keep_last"), 1)
    least |= dict.fromkeys(("seed", "data.seed", "loss_chunk", "optimizer.clip_norm"), 0)
    least |= dict.fromkeys(("validation.every", "export.every", "stall.factor", "checkpoint.keep_every"), 0)
    for key, lowest in least.items():
        if (value := _get(config, key)) < lowest:
            raise ValueError(f"config key {key} is {value}; wanted at least {lowest}")
    for key in ("seed", "data.seed"):
        if (value := _get(config, key)) >= 2**32:
            raise ValueError(f"config key {key} is {value}; wanted less than 2**32")
    for key in ("export.every", "checkpoint.keep_every"):
        if (value := _get(config, key)) % config.checkpoint.every:
            raise ValueError(
                f"config key {key} is {value}; wanted a multiple of checkpoint.every, {config.checkpoint.every}"
            )
    if config.stall.seconds <= 0:
        raise ValueError(f"config key stall.seconds is {config.stall.seconds}; wanted more than 0")
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError(f"config key wandb is {config.wandb!r}; wanted the package wandb (pip install wandb), or none")
    if config.hardware:
        hardware(config.hardware)
    found = len(config.crossbatch.contexts)
    values = {"constant": 1, "draw": max(found, 1)}.get(config.crossbatch.schedule, 2)
    if found != values:
        raise ValueError(
            f"crossbatch.contexts is {config.crossbatch.contexts}; crossbatch.schedule {config.crossbatch.schedule!r} "
            f"wanted {values} value{'s' if values > 1 else ''}"
        )
    default = default_config()
    for key, (choice, users) in _USED_WITH.items():
        if _get(config, choice) not in users and _get(config, key) != _get(default, key):
            value, chosen = _get(config, key), _get(config, choice)
            warn_once(_log, f"config key {key} is {value!r}; {choice} {chosen!r} does not use it")


def model_config(config: ConfigDict, pretrained: ModelConfig | None = None) -> ModelConfig:
    """The model that `config.model` describes: a named size or the pretrained one, with the stated fields replaced.

    Raises:
        ValueError: an unknown size, values that ModelConfig refuses, or too few of them; a size whose maths is not that
            of the pretrained model.
    """
    stated = {key: value for key, value in config.model.items() if value is not None and key not in ("size", "dtypes")}
    base = named(config.model.size) if config.model.size else pretrained
    if config.model.size and pretrained:
        # Shapes are compared elsewhere; parameters do not show these.
        for name in ("norm_eps", "rope_base", "qk_norm", "mem_positionals"):
            ours, theirs = getattr(base, name), getattr(pretrained, name)
            if ours != theirs and name not in stated and (name != "mem_positionals" or pretrained.mem_layers):
                raise ValueError(
                    f"{name} is {theirs!r} in the model to start from and {ours!r} in model.size "
                    f"{config.model.size!r}; wanted model.{name} stated"
                )
    if base is None:
        needed = [f.name for f in dataclasses.fields(ModelConfig) if f.default is dataclasses.MISSING]
        if missing := [f"model.{name}" for name in needed if name not in stated]:
            raise ValueError(f"config keys {', '.join(missing)} are not set; wanted them, or model.size, or init_from")
    dtypes = {key: value for key, value in config.model.dtypes.items() if value is not None}
    stated["dtypes"] = dataclasses.replace(base.dtypes if base else DtypePolicy(), **dtypes)
    if base and ("d_model" in stated or "n_heads" in stated):  # derived from them, unless stated
        stated = {"head_size": 0, **stated}
    if base and "n_heads" in stated:
        stated = {"n_kv_heads": 0, **stated}
    return base.replace(**stated) if base else ModelConfig(**stated)


def read_model(path: str | os.PathLike) -> ModelConfig:
    """The configuration of the model in a checkpoint of any format; parameters become float32."""
    if (pathlib.Path(path) / "model.json").is_file() and not checkpoint.is_workdir(path):
        raise checkpoint.CheckpointError(f"{path} is a working directory without a checkpoint; wanted one with")
    base = checkpoint.read_model(path) if checkpoint.is_workdir(path) else formats.open_checkpoint(path).config
    return base.replace(dtypes=dataclasses.replace(base.dtypes, params="float32"))


def starting_model(found: ModelConfig, wanted: ModelConfig) -> ModelConfig:
    """The configuration of the parameters that `starting_params` gives of the model `found`: memory layers as wanted,
    if there are as many layers.
    """
    found = found.replace(dtypes=wanted.dtypes)
    return found.replace(mem_layers=wanted.mem_layers) if found.n_layers == wanted.n_layers else found


def starting_params(path: str | os.PathLike, wanted: ModelConfig, shardings: Any = None) -> Any:
    """Parameters of the model in a checkpoint of any format, to train `wanted` from.

    Memory layers have no parameters of their own, so any LLaMA can go on as a Focused Transformer: only the stacks that
    hold its layers change.

    Args:
        shardings: tree of shardings to place them by.

    Returns:
        The tree, of NumPy arrays, or as `shardings` says.

    Raises:
        ValueError: tensors that are not those of `wanted`, named.
    """
    return read_params(formats.open_checkpoint(path), wanted, shardings=shardings)


def learning_rate(config: ConfigDict) -> Callable[[jax.Array], jax.Array]:
    """Learning rate of an update, from the number of updates before it: linear warm-up, then the schedule."""
    c, warm = config.optimizer, max(config.optimizer.warmup_steps, 1)

    def at(count: jax.Array) -> jax.Array:
        step = jnp.asarray(count, jnp.float32) + 1
        done = jnp.clip((step - c.warmup_steps) / max(config.steps - c.warmup_steps, 1), 0, 1)
        shape = {
            "constant": jnp.ones_like(step),
            "cosine": c.final_share + (1 - c.final_share) * 0.5 * (1 + jnp.cos(jnp.pi * done)),
            "inverse_sqrt": jnp.sqrt(warm / jnp.maximum(step, warm)),
        }[c.schedule]
        return c.learning_rate * jnp.minimum(step / warm, 1) * shape

    return at


def decay_mask(params: Any, embeddings: bool) -> Any:
    """Which parameters weight decay is for: matrices; not norms and temperatures; embeddings if asked."""
    kept = {"scale", "temperature"} | (set() if embeddings else {"embedding"})
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in kept, params)


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Clipping, the optimizer's direction, decoupled weight decay, learning rate."""
    c = config.optimizer
    clip = optax.clip_by_global_norm(c.clip_norm) if c.clip_norm else optax.identity()
    decayed = functools.partial(decay_mask, embeddings=c.decay_embeddings)
    rate = learning_rate(config)
    if c.name == "muon":  # momentum of matrices made orthogonal; Adam for embedding, head, norms and temperatures
        muon = optax.contrib.muon(
            lambda count: c.muon_rate * rate(count),
            beta=c.b1,
            adam_b1=c.b1,
            adam_b2=c.b2,
            eps=c.eps,
            weight_decay=c.weight_decay,
            weight_decay_mask=decayed,
            adam_learning_rate=rate,
            muon_weight_dimension_numbers=_muon_axes,
        )
        return optax.chain(clip, muon)
    direction = {
        "adamw": lambda: optax.scale_by_adam(c.b1, c.b2, c.eps),
        "lion": lambda: optax.scale_by_lion(c.b1, c.b2),
        # arXiv 1804.04235: factored second moments, updates clipped, and relative to the size of the parameter.
        "adafactor": lambda: optax.chain(
            optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms()
        ),
    }[c.name]()
    decay = optax.add_decayed_weights(c.weight_decay, decayed)
    return optax.chain(clip, direction, decay, optax.scale_by_learning_rate(rate))


def _muon_axes(params: Any) -> Any:
    """Which axes of a block's stacked matrices are input and output; None for what is not such a matrix."""
    axes = optax.contrib.MuonDimensionNumbers
    table = dict.fromkeys("qkv", axes(-3, (-2, -1))) | {"o": axes((-3, -2), -1)}
    table |= dict.fromkeys(("gate", "up", "down"), axes(-2, -1))
    return jax.tree_util.tree_map_with_path(lambda path, _: table.get(path[-1].key), params)


def layout(config: ConfigDict) -> tuple[str, int]:
    """How data lays a document's consecutive windows out in a batch: ('packed' or 'blocks', windows a document)."""
    c = config.crossbatch
    if c.kind == "blocks":
        return "blocks", c.windows + 1
    return "packed", 4 if c.kind.startswith("longllama") else c.packing


def plan_at(config: ConfigDict, step: int, switched_at: int | None = None) -> crossbatch.Plan | None:
    """The crossbatch plan of a microbatch in a step (counted from 1): a function of the arguments alone.

    Args:
        switched_at: step from which `switch_accuracy` uses the second of its contexts; None: not yet known.
    """
    c = config.crossbatch
    late = {
        "switch_step": step > c.switch_step,
        "switch_accuracy": switched_at is not None and step >= switched_at,
        # RandomState's results are frozen: processes, and who resumes, may have other versions of NumPy.
        "draw": np.random.RandomState([config.seed, step]).randint(len(c.contexts)),
    }
    return make_plan(config, c.contexts[int(late.get(c.schedule, 0))])


def make_plan(config: ConfigDict, contexts: int, parts: int | None = None) -> crossbatch.Plan | None:
    """The crossbatch plan of a microbatch with a given range or d; None without crossbatch.

    Args:
        parts: microbatches of a batch; those of the configuration by default.

    Raises:
        ValueError: rows that packing or blocks do not divide, or contexts that the rows do not have.
    """
    c, rows = config.crossbatch, config.batch.rows // (parts or config.batch.accumulate)
    if c.kind == "none":
        return None
    if c.kind == "blocks":
        return crossbatch.block_plan(rows, contexts, c.windows)
    if c.kind == "published":
        return crossbatch.published_plan(rows, contexts, c.packing, c.stepping)
    return crossbatch.longllama_3b_plan(rows) if c.kind == "longllama_3b" else crossbatch.longllama_7b_plan(rows)


def set_hardware(config: ConfigDict, text: str) -> None:
    """Lays a run out on chips: each slice an equal part of the rows (data), whose chips hold the parameters in shares
    (fsdp); chips beyond the rows, or beyond what the model's width can be shared by, split heads, feed-forward and
    vocabulary (tensor). Where a chip would have more than 4096 tokens for each 16 GB of its memory (rounded down to a
    power of two), or one row, rows come in microbatches. The loss takes 4096 tokens of each chip at a time: logits of
    fewer would save less than the sum of the head's gradient over chunks takes.

    Args:
        config: with model and batch stated; hardware, mesh, batch.accumulate and loss_chunk are set.
        text: see `hardware.hardware`.

    Raises:
        ValueError: hardware that there is not.
    """
    chips, model = hardware(text), model_config(config)
    per_slice, rows = chips.chips // chips.slices, config.batch.rows
    tokens = 4096 * 2 ** int(math.log2(chips.chip.nbytes / 16e9))
    at_once = chips.chips * max(1, tokens // batch_length(config, model))
    parts = max(1, rows // at_once) if rows % at_once == 0 else 1
    while parts > 1 and rows // parts % layout(config)[1]:  # a microbatch holds whole documents
        parts //= 2
    config.batch.accumulate = parts
    rows //= parts * chips.slices
    fsdp = math.gcd(per_slice, math.gcd(model.d_model, rows))
    config.hardware, config.loss_chunk = text, 4096 * chips.slices * fsdp
    config.mesh.update(data=chips.slices, fsdp=fsdp, tensor=per_slice // fsdp)


def peak_flops(config: ConfigDict, devices: int) -> float:
    """FLOP/s of all devices together; 0 where the configuration does not say."""
    if config.peak_flops or not config.hardware:
        return config.peak_flops
    return devices * hardware(config.hardware).chip.flops


def batch_length(config: ConfigDict, model: ModelConfig) -> int:
    """T, tokens of a row."""
    return config.batch.length or model.window


def check_batch(config: ConfigDict, model: ModelConfig, mesh_shape: Mapping[str, int]) -> None:
    """Refuses a batch that does not divide into microbatches, documents and devices; warns of microbatches that are so
    small that rows read fewer contexts.

    Args:
        mesh_shape: size of each mesh axis.

    Raises:
        ValueError: each number that does not fit, with what it was to be divided by.
    """
    rows, parts = config.batch.rows, config.batch.accumulate
    if rows % parts:
        raise ValueError(f"batch.rows is {rows}; wanted a multiple of batch.accumulate, {parts}")
    _, windows = layout(config)
    if windows < 1 or (rows // parts) % windows:
        raise ValueError(
            f"batch.rows / batch.accumulate is {rows // parts}; wanted a multiple of {windows}, the windows that a "
            f"document has in a batch (packing; crossbatch.kind {config.crossbatch.kind!r})"
        )
    ways = mesh_shape["data"] * mesh_shape["fsdp"]
    if (rows // parts) % ways:
        raise ValueError(
            f"batch.rows / batch.accumulate is {rows // parts}; wanted a multiple of mesh.data x mesh.fsdp, {ways}"
        )
    length = batch_length(config, model)
    if not 1 <= length <= model.window:
        raise ValueError(f"batch.length is {length}; wanted 1..{model.window}, the model's window")
    if config.crossbatch.kind != "none" and not model.mem_layers:
        raise ValueError(
            f"crossbatch.kind is {config.crossbatch.kind!r}, but model.mem_layers is empty; wanted a memory layer"
        )
    for contexts in config.crossbatch.contexts:
        plan = make_plan(config, contexts)
        if plan is None:
            continue
        plan.dealt(ways)
        whole = make_plan(config, contexts, parts=1)
        seen, wanted = plan.visible.sum(1).mean(), whole.visible.sum(1).mean()
        if seen < 0.9 * wanted:  # rows at the beginning of a microbatch have few before them
            warn_once(
                _log,
                f"in microbatches of {plan.rows} rows a row reads {seen:.2f} other windows on average, among all "
                f"{whole.rows} rows {wanted:.2f}; with config.batch.accumulate below {parts} it reads more",
            )


def open_corpora(config: ConfigDict, split: str) -> list[sources.Corpus]:
    """The sources of a split of `config.data`, found but not read.

    Raises:
        ValueError: no sources, lists of different lengths, or what opening the sources raises.
    """
    c = config.data
    names, each = (c.train, (c.weights, c.min_tokens)) if split == "train" else (c.validation, ())
    if not names:
        raise ValueError(f"data.{split} is empty; wanted at least one source")
    if wrong := [x for x in each if len(x) not in (0, len(names))]:
        raise ValueError(
            f"data.weights or data.min_tokens has {len(wrong[0])} values; wanted {len(names)}, one a source, or none"
        )
    return [sources.open_corpus(source, field=c.field) for source in names]


def data_source(
    config: ConfigDict,
    split: str,
    corpora: Sequence[sources.Corpus],
    tokenizer: Tokenizer,
    prepared: str | os.PathLike,
) -> data.Mixture:
    """The documents of `config.data`, tokenised where they are not yet.

    Args:
        split: 'train', drawn without end by weight; or 'validation', every document once, in order.
        corpora: the split's, from `open_corpora`.
        prepared: folder for tokenised documents.

    Raises:
        ValueError: what reading the files raises.
    """
    c = config.data
    longest = c.max_tokens if split == "train" else 0
    weights, shortest = (c.weights, c.min_tokens) if split == "train" else ((), ())
    weights, shortest = weights or (1.0,) * len(corpora), shortest or (0,) * len(corpora)
    sets = [data.prepare(corpus, tokenizer, prepared, skip_short=c.skip_short) for corpus in corpora]
    parts = [
        data.Source(documents, weight, least, longest)
        for documents, weight, least in zip(sets, weights, shortest, strict=True)
    ]
    if split == "train":
        return data.Mixture(parts, seed=c.seed)
    return data.Mixture(parts, seed=None, repeat=False)


def packed(
    config: ConfigDict, model: ModelConfig, documents: data.Mixture, rows: Sequence[int] | None = None
) -> data.Packed:
    """Batches of `config.batch.rows` rows, laid out as crossbatch wants them; all, or those of some numbers."""
    kind, windows = layout(config)
    return data.Packed(
        documents,
        streams=config.batch.rows // windows,
        window=batch_length(config, model),
        windows_per_step=windows,
        layout=kind,
        align_documents=config.data.align_documents,
        rows=rows,
    )
