"""Where every array of the 3B and the 7B lies, against files that show a change for what it is.

python tests/test_golden.py        # writes the files anew
"""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import optax
import pytest

from fot_jax import memory, model, programs, run_config, sharding
from fot_jax.checkpoint import named_leaves
from fot_jax.config import named
from fot_jax.memory import cache
from fot_jax.run_config import default_config

FOLDER = pathlib.Path(__file__).parent / "golden"
MESH = {"data": 1, "fsdp": 2, "tensor": 2, "context": 2}
OPTIMIZERS = {"longllama_3b": "adamw", "longllama_7b": "adafactor"}


def lines(size, devices):
    """A line for each array: its name, shape, and the mesh axes that split it."""
    config = named(size)
    run = default_config()
    run.optimizer.name = OPTIMIZERS[size]
    optimizer = run_config.make_optimizer(run)
    state = jax.eval_shape(lambda: programs.new_state(model.init_params(config, jax.random.key(0)), optimizer))
    mesh = sharding.make_mesh(MESH, devices)
    places = programs.state_shardings(mesh, state)
    with jax.set_mesh(mesh):
        caches = jax.eval_shape(lambda: memory.init_memory(config, 2, 2**18))
        of_caches = cache.specs(caches)
    trees = {
        f"parameters and {run.optimizer.name}": (state, jax.tree.map(lambda place: place.spec, places)),
        "memory of 2 rows, 262,144 slots": (caches, of_caches),
    }
    for title, (tree, specs) in trees.items():
        yield f"# {size}, {title}, on {', '.join(f'{axis} {n}' for axis, n in MESH.items())}"
        specs = named_leaves(specs)
        for name, leaf in named_leaves(tree).items():
            split = [*specs[name], *[None] * leaf.ndim][: leaf.ndim]
            axes = " ".join("+".join([axis] if isinstance(axis, str) else axis or "-") for axis in split)
            yield f"{name} {leaf.dtype}[{','.join(map(str, leaf.shape))}] {axes}".rstrip()


@pytest.mark.parametrize("size", OPTIMIZERS)
def test_shardings_are_those_of_the_golden_file(size, devices):
    assert list(lines(size, devices)) == (FOLDER / f"{size}.txt").read_text().splitlines()


def test_an_optimizer_array_that_belongs_to_no_parameter_is_an_error(devices):
    config = named("fot_37m")
    params = model.abstract_params(config)
    mesh = sharding.make_mesh({"fsdp": 8}, devices)
    state = programs.TrainState(jnp.zeros((), jnp.int32), params, {"extra": jax.ShapeDtypeStruct((5,), jnp.float32)})
    with pytest.raises(ValueError, match=r"optimizer state extra of shape \(5,\) is not of a parameter"):
        programs.state_shardings(mesh, state)
    strange = {"mu": jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), params)}
    with pytest.raises(ValueError, match="optimizer state mu.embed.embedding of shape"):
        programs.state_shardings(mesh, programs.TrainState(state.step, params, strange))
    factored = optax.scale_by_factored_rms()
    kept = jax.eval_shape(factored.init, params)
    places = programs.state_shardings(mesh, programs.TrainState(state.step, params, kept)).opt_state
    assert kept.v_row["segment_0"]["plain"]["mlp"]["up"].shape == (1, 8, 512)
    assert places.v_row["segment_0"]["plain"]["mlp"]["up"].spec == jax.sharding.PartitionSpec(None, None, "fsdp")


if __name__ == "__main__":
    import os

    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    FOLDER.mkdir(exist_ok=True)
    for size in OPTIMIZERS:
        (FOLDER / f"{size}.txt").write_text("".join(f"{line}\n" for line in lines(size, jax.devices())))
