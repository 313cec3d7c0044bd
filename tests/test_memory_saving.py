"""A memory saved and loaded: bit for bit, on other devices, in pages or not; and what is refused."""

from __future__ import annotations

import functools
import json

import jax
import numpy as np
import pytest
import safetensors
from test_memory_editing import mesh
from test_memory_sharded import model_config

from fot_jax import memory, sharding

LENGTH_B = np.array([51, 20], np.int32)
SEEN_BM = np.random.default_rng(9).random((2, 64)) < 0.5


def empty_pages(config, rows, capacity):
    sizes = capacity // 4, capacity // 4, capacity // 2
    return memory.Pages(tuple(memory.init_memory(config, rows, n) for n in sizes))


EMPTY = {"cache": memory.init_memory, "pages": empty_pages}
CONFIG = model_config(2, 4, 4, layers=2)


def tokens(layers=2, start=0, size=64):
    """Keys and values, [2, 2, 4, size] of each layer."""
    x = np.random.default_rng(0).standard_normal((2, layers, 2, 2, 4, 64)).astype(np.float32)
    return ([layer[..., start : start + size] for layer in kind] for kind in x)


APPEND = jax.jit(memory.append, donate_argnums=0)
TAKE = jax.jit(memory.take, static_argnums=(1, 2))


def filled(empty, length_B=LENGTH_B):
    mem = memory.place(empty)
    for start in range(0, 64, 16):
        mem = APPEND(mem, *tokens(start=start, size=16), np.clip(length_B - start, 0, 16))
    return mem


def contents(mem):
    """Everything in it, in the order of slots, whatever it lies on."""
    buffers = jax.tree.map(lambda x: np.asarray(x)[..., : int(LENGTH_B.max())], TAKE(mem, 0, 64))
    return buffers, np.asarray(mem.length_B), np.asarray(memory.seen_slots(mem))


def parts(path):
    """Head, whose names are in any order, and body of a file."""
    whole = path.read_bytes()
    size = 8 + int.from_bytes(whole[:8], "little")
    return json.loads(whole[8:size]), whole[size:]


def same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), found, wanted)


@pytest.mark.parametrize("form", EMPTY)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_what_is_loaded_is_what_was_saved(tmp_path, dtype, masked, form):
    empty = functools.partial(EMPTY[form], model_config(2, 4, 4, layers=2, dtype=dtype), 2, 64)
    mem = memory.restrict(filled(empty()), SEEN_BM if masked else None)
    memory.save(tmp_path / "read", mem, {"book": "Emma"})
    assert [path.name for path in tmp_path.iterdir()] == ["read"]
    about = memory.describe(tmp_path / "read")
    sizes = dict(layers=2, rows=2, kv_heads=2, head_size=4, dtype=dtype, capacity=64, tokens=51)
    assert about == {**sizes, "metadata": {"book": "Emma"}}
    found = memory.load(tmp_path / "read", empty())
    same(found, mem)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(found))
    same(memory.load(tmp_path / "read", jax.eval_shape(empty)), mem)
    # Of a memory that is not empty nothing is left, and it stays as it is.
    other = memory.restrict(filled(empty(), np.array([64, 64])), ~SEEN_BM)
    before = jax.device_get(other)
    same(memory.load(tmp_path / "read", other), mem)
    same(jax.device_get(other), before)


def test_only_what_is_filled_is_in_the_file(tmp_path):
    memory.save(tmp_path / "read", filled(memory.init_memory(CONFIG, 2, 64)))
    with safetensors.safe_open(tmp_path / "read", "numpy") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    kinds = ("keys.0", "keys.1", "values.0", "values.1")
    assert shapes == {"memory.length_B": [2], **{f"memory.{kind}": [2, 2, 4, 51] for kind in kinds}}
    memory.save(tmp_path / "none", memory.init_memory(CONFIG, 2, 64))
    same(memory.load(tmp_path / "none", empty_pages(CONFIG, 2, 64)), empty_pages(CONFIG, 2, 64))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_other_devices_and_other_pages(devices, tmp_path, dtype):
    """From one memory to the next, each on other devices and in another form: nothing changes, the file neither."""
    config, before = model_config(2, 4, 4, layers=2, dtype=dtype), None
    turns = [(8, "cache"), (1, "pages"), (2, "cache"), (8, "pages"), (1, "cache"), (8, "cache")]
    for turn, (ways, form) in enumerate(turns):
        with mesh(devices, ways):
            empty = EMPTY[form](config, 2, 64)
            if before is None:
                mem = memory.restrict(filled(empty), SEEN_BM)
            else:
                mem = memory.load(before, empty)
            assert type(mem) is type(empty) and {deal.ways for deal in mem.deals} == {ways}
            for x in jax.tree.leaves([page.keys for page in mem.pages]):
                assert x.sharding.shard_shape(x.shape)[3] == x.shape[3] // ways
            found = contents(mem)
            if before is None:
                wanted = found
            same(found, wanted)
            memory.save(tmp_path / str(turn), mem)
        assert before is None or parts(tmp_path / str(turn)) == parts(before)
        before = tmp_path / str(turn)


@pytest.mark.parametrize("axes", [{"data": 2, "context": 4}, {"tensor": 2, "context": 2}, {"data": 8}, None])
def test_what_was_loaded_is_appended_to_in_place(devices, tmp_path, axes):
    """Copies on several devices, too, are each their own."""
    memory.save(tmp_path / "read", filled(memory.init_memory(CONFIG, 2, 64)))
    more = list(tokens(size=13))
    wanted = APPEND(filled(memory.init_memory(CONFIG, 2, 64)), *more, np.array([13, 2]))
    with mesh(devices, 1) if axes is None else jax.set_mesh(sharding.make_mesh(axes, devices)):
        found = APPEND(memory.load(tmp_path / "read", memory.init_memory(CONFIG, 2, 64)), *more, np.array([13, 2]))
        same(contents(found), contents(wanted))


@pytest.mark.parametrize(("form", "capacity"), [("cache", 51), ("pages", 80), ("pages", 56)])
def test_another_capacity(tmp_path, form, capacity):
    memory.save(tmp_path / "read", memory.restrict(filled(memory.init_memory(CONFIG, 2, 64)), SEEN_BM))
    like = EMPTY[form](CONFIG, 2, capacity)
    with pytest.raises(memory.SavedMemoryError, match=f"its capacity is 64; wanted {capacity}, or resize=True"):
        memory.load(tmp_path / "read", like)
    mem = memory.load(tmp_path / "read", like, resize=True)
    assert mem.capacity == capacity
    buffers, length_B, seen_BM = contents(mem)
    whole = memory.take(filled(memory.init_memory(CONFIG, 2, 64)), 0, 51)
    same(buffers, jax.device_get(whole))
    np.testing.assert_array_equal(length_B, LENGTH_B)
    np.testing.assert_array_equal(seen_BM[:, :64], SEEN_BM[:, :capacity])
    assert seen_BM[:, 64:].all()
    small = memory.init_memory(CONFIG, 2, 50)
    with pytest.raises(memory.SavedMemoryError, match="read: it has 51 tokens in a row; wanted at most 50"):
        memory.load(tmp_path / "read", small, resize=True)


@pytest.mark.parametrize(
    ("config", "rows", "message"),
    [
        (model_config(2, 4, 4, layers=3), 2, "its layers is 2; wanted 3"),
        (CONFIG, 1, "its rows is 2; wanted 1"),
        (model_config(4, 4, 4, layers=2), 2, "its kv_heads is 2; wanted 4"),
        (model_config(2, 4, 2, layers=2), 2, "its head_size is 4; wanted 2"),
        (model_config(2, 4, 4, layers=2, dtype="int8"), 2, "its dtype is float32; wanted int8"),
        (model_config(2, 4, 4, layers=2, dtype="bfloat16"), 2, "its dtype is float32; wanted bfloat16"),
    ],
)
def test_a_memory_that_does_not_fit_is_refused_before_it_is_read(tmp_path, monkeypatch, config, rows, message):
    memory.save(tmp_path / "read", filled(memory.init_memory(CONFIG, 2, 64)))
    monkeypatch.setattr(memory.saving, "read", None)
    for resize in (False, True):
        with pytest.raises(memory.SavedMemoryError, match=f"^saved memory {tmp_path / 'read'}: {message}$"):
            memory.load(tmp_path / "read", memory.init_memory(config, rows, 64), resize=resize)


def test_a_memory_of_other_devices_is_not_filled(devices, tmp_path, monkeypatch):
    memory.save(tmp_path / "read", filled(memory.init_memory(CONFIG, 2, 64)))
    monkeypatch.setattr(memory.saving, "read", None)
    with mesh(devices, 8):
        like = memory.init_memory(CONFIG, 2, 64)
    for ways in (1, 4):
        message = f"read: what .* does not fit: memory was dealt to 8 devices; the mesh has {ways} for it"
        with mesh(devices, ways), pytest.raises(memory.SavedMemoryError, match=message):
            memory.load(tmp_path / "read", like)


def test_damage_and_other_files(tmp_path):
    path, like = tmp_path / "read", memory.init_memory(CONFIG, 2, 64)
    memory.save(path, memory.restrict(filled(like), SEEN_BM), {"book": "Emma"})
    whole = path.read_bytes()

    def refused(message, error=memory.SavedMemoryError):
        with pytest.raises(error, match=f"^saved memory {path}: {message}"):
            memory.load(path, like)

    head = 8 + int.from_bytes(whole[:8], "little")
    for at in (head, (head + len(whole)) // 2, len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        refused(r"damaged \(ValueError: its checksum is not that of its contents\)")
    for at in np.random.default_rng(0).integers(0, head, 60):  # names, shapes, offsets, what it says of itself, the sum
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 2]) + whole[at + 1 :])
        refused("")
    for size in (0, 20, head, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused("truncated, damaged or no safetensors file")
    path.write_bytes(whole.replace(b"Emma", b"Anna"))
    refused(r"damaged \(ValueError: its checksum")
    path.write_bytes(whole.replace(rb"\"tokens\"", rb"\"token5\""))
    refused(r"damaged \(KeyError: 'tokens'\)")
    safetensors.numpy.save_file({"x": np.zeros(3)}, path, {"format": "fot_jax reader 2"})
    refused("its format is 'fot_jax reader 2'; wanted 'fot_jax memory 1'")
    safetensors.numpy.save_file({"x": np.zeros(3)}, path)
    refused("its format is None; wanted 'fot_jax memory 1'")
    with pytest.raises(memory.SavedMemoryError, match="its format is None"):
        memory.describe(path)
    path.unlink()
    refused("no such file", FileNotFoundError)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_the_file_before(tmp_path, monkeypatch, error):
    memory.save(tmp_path / "read", filled(memory.init_memory(CONFIG, 2, 64)))
    before = (tmp_path / "read").read_bytes()

    def half(arrays, path, metadata):
        path.write_bytes(before[:100])
        raise error

    monkeypatch.setattr(memory.saving, "save_file", half)
    with pytest.raises(error):
        memory.save(tmp_path / "read", memory.init_memory(CONFIG, 2, 64))
    assert (tmp_path / "read").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["read"]


def test_what_cannot_be_saved_is_refused(tmp_path):
    mem = memory.init_memory(CONFIG, 2, 64)
    with pytest.raises(TypeError, match="metadata of a saved memory is {'pages': 3}; wanted strings by strings"):
        memory.save(tmp_path / "read", mem, {"pages": 3})
    with pytest.raises(OSError, match=f"saved memory {tmp_path}: a device or a directory; wanted a file"):
        memory.save(tmp_path, mem)
    assert not list(tmp_path.iterdir())
