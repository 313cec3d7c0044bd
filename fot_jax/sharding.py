"""Where every array lives: one table from logical axes to mesh axes, one from parameter names to logical axes.

The mesh has the same four axes everywhere; an axis nobody asked for has size 1, so that one device is the ordinary
case:

    data     batch rows, parameters replicated
    fsdp     batch rows, parameters split along the model width
    tensor   heads, feed-forward and vocabulary
    context  memory slots

"pjit" is today's `jax.jit` with `in_shardings` and `out_shardings`; the trees of shardings it takes are made here.
"""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

MESH_AXES = ("data", "fsdp", "tensor", "context")

# Logical axis -> mesh axis or axes. `model` is the residual stream's width in activations, `embed` the same width in
# parameters.
AXES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "time": None,
    "model": None,
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_size": None,
    "mlp": "tensor",
    "memory": "context",
}

# Last two names of a parameter's path -> its logical axes; leading stack dimensions (layers) are never split.
PARAMETERS: dict[tuple[str, str], tuple[str, ...]] = {
    ("embed", "embedding"): ("vocab", "embed"),
    ("attention_norm", "scale"): ("embed",),
    ("attention", "q"): ("embed", "heads", "head_size"),
    ("attention", "k"): ("embed", "kv_heads", "head_size"),
    ("attention", "v"): ("embed", "kv_heads", "head_size"),
    ("attention", "o"): ("heads", "head_size", "embed"),
    ("attention", "temperature"): ("heads",),
    ("mlp_norm", "scale"): ("embed",),
    ("mlp", "gate"): ("embed", "mlp"),
    ("mlp", "up"): ("embed", "mlp"),
    ("mlp", "down"): ("mlp", "embed"),
    ("norm", "scale"): ("embed",),
    ("head", "kernel"): ("embed", "vocab"),
}


def make_mesh(shape: dict[str, int] | None = None, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of the four axes.

    Args:
        shape: size of each axis; those left out are 1, and `data` left out takes what the others leave.
        devices: the devices to use; all of them by default, or with every axis stated as many as the shape needs.

    Raises:
        ValueError: an unknown axis, or sizes that do not fit the devices.
    """
    sizes = dict(shape or {})
    if unknown := sorted(set(sizes) - set(MESH_AXES)):
        raise ValueError(f"mesh axis is {unknown[0]!r}; wanted one of {', '.join(MESH_AXES)}")
    devices = list(devices or jax.devices())
    if min(sizes.values(), default=1) < 1:
        raise ValueError(f"mesh is {sizes}; wanted sizes of at least 1")
    rest = math.prod(size for axis, size in sizes.items() if axis != "data")
    if "data" not in sizes and len(devices) % rest:
        raise ValueError(f"mesh {sizes} does not divide {len(devices)} devices; wanted a divisor, or data stated")
    needed = rest * sizes.setdefault("data", len(devices) // rest)
    if needed > len(devices):
        raise ValueError(f"mesh {sizes} needs {needed} devices; there are {len(devices)}")
    return jax.make_mesh(
        tuple(sizes.get(axis, 1) for axis in MESH_AXES),
        MESH_AXES,
        # Explicit axes, the default, type every intermediate value; the partitioner's own propagation is what we want.
        axis_types=(AxisType.Auto,) * len(MESH_AXES),
        devices=devices[:needed],
    )


def spec(*logical: str | None) -> P:
    """The PartitionSpec of logical axes, by the table.

    Raises:
        ValueError: an axis that is not in the table, or two that claim one mesh axis.
    """
    if unknown := [axis for axis in logical if axis is not None and axis not in AXES]:
        raise ValueError(f"logical axis is {unknown[0]!r}; wanted one of {', '.join(AXES)}")
    mesh_axes = [AXES[axis] if axis is not None else None for axis in logical]
    flat = [axis for entry in mesh_axes if entry for axis in ((entry,) if isinstance(entry, str) else entry)]
    if len(flat) != len(set(flat)):
        raise ValueError(f"logical axes {logical} claim a mesh axis twice: {flat}")
    return P(*mesh_axes)


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """`x`, told to the partitioner to be split along `logical` on the mesh of `jax.set_mesh`; `x` itself without a
    mesh.

    Raises:
        ValueError: an unknown axis, or a number of axes other than `x` has.
    """
    wanted = spec(*logical)
    if len(logical) != x.ndim:
        raise ValueError(f"{len(logical)} logical axes {logical} for an array of shape {x.shape}")
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, wanted)


def axes(logical: str) -> tuple[str, ...]:
    """The axes of the mesh of `jax.set_mesh`, of more than one device, that split a logical axis."""
    (found,) = spec(logical)
    shape = jax.sharding.get_abstract_mesh().shape
    return tuple(axis for axis in ((found,) if isinstance(found, str) else found or ()) if shape.get(axis, 1) > 1)


def ways(logical: str) -> int:
    """How many ways the mesh of `jax.set_mesh` splits a logical axis; 1 without a mesh."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape[axis] for axis in axes(logical))


def platform() -> str:
    """What kind of device programs are made for, "cpu", "gpu" or "tpu": that of the mesh of `jax.set_mesh`, which may
    be one that is only compiled for, or else the process's own.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return getattr(device, "platform", None) or jax.default_backend()


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of an array whose first axis is batch rows."""
    return NamedSharding(mesh, spec("batch"))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of an array that every device holds whole."""
    return NamedSharding(mesh, P())


def param_shardings(mesh: Mesh, tree: Any) -> Any:
    """Shardings of parameters, stacked by layer or not. (Optimizer state: `training.state_shardings`.)

    Raises:
        ValueError: a parameter that is not in the table, or a dimension its mesh axes do not divide.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path)
        logical = PARAMETERS.get(names[-2:])
        if logical is None:
            raise ValueError(f"parameter {'/'.join(names)} of shape {leaf.shape} has no row in sharding.PARAMETERS")
        stacked = (None,) * (leaf.ndim - len(logical))
        split = spec(*stacked, *logical)
        for size, axes in zip(leaf.shape, split, strict=True):
            ways = math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))
            if size % ways:
                raise ValueError(
                    f"parameter {'/'.join(names)} of shape {leaf.shape}: a dimension of {size} is to be split {ways} "
                    f"ways over mesh axis {axes!r}; wanted a multiple"
                )
        return NamedSharding(mesh, split)

    return jax.tree_util.tree_map_with_path(sharding, tree)
