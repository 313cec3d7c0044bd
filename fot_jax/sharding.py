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

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
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


# Names of arrays that an optimizer keeps and that belong to no parameter; every device holds them.
OPTIMIZER = ("ns_coeffs",)  # Muon's coefficients


def mesh_sizes(shape: Mapping[str, int] | None, devices: int, slices: int = 1) -> dict[str, int]:
    """Size of each of the four axes.

    Args:
        shape: size of each axis; those left out are 1, and `data` left out, or 0, takes what the others leave.
        devices: how many there are.
        slices: groups of devices that a slower network joins. Each has an equal part of `data`, and no other axis
            crosses them: what does is the sum of gradients and, in crossbatch, of a row's keys and values at the border
            for each context.

    Raises:
        ValueError: an unknown axis, or sizes that do not fit the devices and slices.
    """
    sizes = {axis: size for axis, size in (shape or {}).items() if size or axis != "data"}
    if unknown := sorted(set(sizes) - set(MESH_AXES)):
        raise ValueError(f"mesh axis is {unknown[0]!r}; wanted one of {', '.join(MESH_AXES)}")
    if min(sizes.values(), default=1) < 1:
        raise ValueError(f"mesh is {sizes}; wanted sizes of at least 1")
    rest = math.prod(size for axis, size in sizes.items() if axis != "data")
    if "data" not in sizes:
        if devices % rest:
            raise ValueError(f"mesh {sizes} does not divide {devices} devices; wanted a divisor, or data stated")
        sizes["data"] = devices // rest
    if rest * sizes["data"] > devices:
        raise ValueError(f"mesh {sizes} needs {rest * sizes['data']} devices; there are {devices}")
    if sizes["data"] % slices:
        raise ValueError(
            f"mesh.data is {sizes['data']} over {slices} slices; wanted a multiple: only data crosses them"
        )
    if slices > 1 and rest * sizes["data"] != devices:
        raise ValueError(f"mesh {sizes} has {rest * sizes['data']} of {devices} devices in {slices} slices; wanted all")
    return {axis: sizes.get(axis, 1) for axis in MESH_AXES}


def make_mesh(shape: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of the four axes; of devices in several slices, one in which `data` alone crosses them.

    Args:
        shape: see `mesh_sizes`.
        devices: the devices to use; all of them by default, or with every axis stated as many as the shape needs.

    Raises:
        ValueError: see `mesh_sizes`.
    """
    devices = list(devices or jax.devices())
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    sizes = mesh_sizes(shape, len(devices), slices)
    # Explicit axes, the default, type every intermediate value; the partitioner's own propagation is what we want.
    kinds = (AxisType.Auto,) * len(MESH_AXES)
    within = [size // (slices if axis == "data" else 1) for axis, size in sizes.items()]
    if slices > 1:
        across = [slices if axis == "data" else 1 for axis in sizes]
        laid = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    else:
        needed = devices[: math.prod(within)]
        laid = mesh_utils.create_device_mesh(within, needed, allow_split_physical_axes=True)
    return Mesh(laid, MESH_AXES, axis_types=kinds)


def abstract_mesh(shape: Mapping[str, int] | None, devices: int, slices: int = 1) -> AbstractMesh:
    """The same without devices: enough for shardings."""
    sizes = mesh_sizes(shape, devices, slices)
    return AbstractMesh(tuple(sizes.values()), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


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


def whole(logical: Sequence[str | None]) -> tuple[str | None, ...]:
    """A parameter's logical axes as products take it: gathered along what `fsdp` splits."""
    return tuple(None if axis and AXES[axis] == "fsdp" else axis for axis in logical)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gathered(x: jax.Array, parameter: tuple[str, str]) -> jax.Array:
    """A parameter of one layer, told to be `whole`; its gradient is told to lie as the table says.

    Args:
        parameter: last two names of its path, in `PARAMETERS`.

    Raises:
        ValueError: see `constrain`.
    """
    # Told where it comes from too, or what it is computed from is gathered, as early as in the forward pass.
    logical = PARAMETERS[parameter]
    return constrain(constrain(x, *logical), *whole(logical))


gathered.defvjp(
    lambda x, parameter: (gathered(x, parameter), None),
    lambda parameter, _, grad: (constrain(grad, *PARAMETERS[parameter]),),
)


def axes(logical: str) -> tuple[str, ...]:
    """The axes of the mesh of `jax.set_mesh`, of more than one device, that split a logical axis."""
    (found,) = spec(logical)
    shape = jax.sharding.get_abstract_mesh().shape
    return tuple(axis for axis in ((found,) if isinstance(found, str) else found or ()) if shape.get(axis, 1) > 1)


def ways(logical: str) -> int:
    """How many ways the mesh of `jax.set_mesh` splits a logical axis; 1 without a mesh."""
    return size(axes(logical))


def size(mesh_axes: tuple[str, ...]) -> int:
    """Devices along axes of the mesh of `jax.set_mesh` together; 1 of none."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in mesh_axes)


def each_device(f: Callable[..., Any], arguments: Any, results: Any) -> Callable[..., Any]:
    """`f`, run by each device of the mesh of `jax.set_mesh` on its part of the arguments; where there is one, `f`.

    Args:
        f: of arrays, or None in an array's place.
        arguments, results: of each array the logical axes that it is split along.

    Raises:
        ValueError: when called, an axis of an argument that the devices do not divide.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return f

    def sharded(*arrays: Any) -> Any:
        for x, names in zip(arrays, arguments, strict=True):
            for length, name in zip(x.shape if x is not None else (), names, strict=False):
                if name and length % ways(name):
                    raise ValueError(
                        f"{name}: {length} over {ways(name)} devices of mesh {mesh.shape}; wanted a multiple"
                    )
        given = tuple(spec(*names) if x is not None else None for x, names in zip(arrays, arguments, strict=True))
        wanted = tuple(spec(*names) for names in results)
        return jax.shard_map(f, in_specs=given, out_specs=wanted, check_vma=False)(*arrays)

    return sharded


def roll_rows(x: jax.Array, by: int, mesh_axes: tuple[str, ...]) -> jax.Array:
    """Row i + by of all devices' rows, in place of row i; within `each_device`, whose rows are split over `mesh_axes`,
    all of the mesh of `jax.set_mesh`.

    By one row each device sends one row to the next: rows are passed on round a ring.
    """
    n = size(mesh_axes)
    devices, part = divmod(by % (n * x.shape[0]), x.shape[0])
    if n == 1:
        return jnp.roll(x, -part, axis=0)
    pieces = [_from_device(x[part:], devices, mesh_axes), _from_device(x[:part], devices + 1, mesh_axes)]
    return jnp.concatenate(pieces) if part else pieces[0]


def _from_device(x: jax.Array, distance: int, mesh_axes: tuple[str, ...]) -> jax.Array:
    """What the device so many further on has."""
    n = size(mesh_axes)
    if distance % n == 0 or not x.size:
        return x
    return jax.lax.ppermute(x, mesh_axes, [(i, (i - distance) % n) for i in range(n)])


def platform() -> str:
    """What kind of device programs are made for, "cpu", "gpu" or "tpu": that of the mesh of `jax.set_mesh`, which may
    be one that is only compiled for, or else the process's own.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return getattr(device, "platform", None) or jax.default_backend()


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Sharding of an array whose first axis is batch rows."""
    return NamedSharding(mesh, spec("batch"))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Sharding of an array that every device holds whole."""
    return NamedSharding(mesh, P())


def param_shardings(mesh: Mesh | AbstractMesh, tree: Any) -> Any:
    """Shardings of parameters, stacked by layer or not. (Optimizer state: `programs.state_shardings`.)

    Raises:
        ValueError: a parameter that is not in the table, or a dimension its mesh axes do not divide.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names, logical = _of_parameter(path, leaf)
        stacked = (None,) * (leaf.ndim - len(logical))
        split = spec(*stacked, *logical)
        for length, over in zip(leaf.shape, split, strict=True):
            parts = math.prod(mesh.shape[axis] for axis in ((over,) if isinstance(over, str) else over or ()))
            if length % parts:
                raise ValueError(
                    f"parameter {'/'.join(names)} of shape {leaf.shape}: a dimension of {length} is to be split "
                    f"{parts} ways over mesh axis {over!r}; wanted a multiple"
                )
        return NamedSharding(mesh, split)

    return jax.tree_util.tree_map_with_path(sharding, tree)


def constrain_params(tree: Any, *before: str | None, gather: bool = False) -> Any:
    """Parameters of one layer or of none, or arrays of their shapes, told to lie as the table says; see `constrain`.

    Args:
        before: logical axes that arrays have in front of the parameter's own.
        gather: to be `whole`.

    Raises:
        ValueError: a parameter that is not in the table.
    """

    def told(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        _, logical = _of_parameter(path, x)
        return constrain(x, *before, *(whole(logical) if gather else logical))

    return jax.tree_util.tree_map_with_path(told, tree)


def _of_parameter(path: tuple[Any, ...], leaf: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """A parameter's names, from the outermost, and its row of the table."""
    names = tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path)
    if names[-2:] not in PARAMETERS:
        raise ValueError(f"parameter {'/'.join(names)} of shape {leaf.shape} has no row in sharding.PARAMETERS")
    return names, PARAMETERS[names[-2:]]
