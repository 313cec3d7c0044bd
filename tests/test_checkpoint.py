"""Checkpoints: what is kept, what comes back, and what is said when it cannot."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from fot_jax import checkpoint, sharding
from fot_jax.config import DtypePolicy, ModelConfig

CONFIG = ModelConfig(vocab_size=8, d_model=4, d_ff=8, n_layers=1, n_heads=2, dtypes=DtypePolicy(memory="bfloat16"))
DATA = {"draw": [3, 1], "offset": [0, 17], "fingerprint": "a"}


def tree():
    random = np.random.default_rng(0)
    params = {"embed": {"embedding": jnp.asarray(random.normal(size=(8, 4)), jnp.float32)}}
    optimizer = ((jnp.int32(3), {"embed": {"embedding": jnp.ones((8, 4), jnp.bfloat16)}}), ())
    return params, optimizer


def shapes(tree, place=None):
    place = place or SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)


@pytest.fixture
def workdir(tmp_path):
    params, optimizer = tree()
    saved = checkpoint.Checkpoints(tmp_path, CONFIG, save_every=2, keep_last=2, keep_every=6)
    assert [saved.should_save(step) for step in (1, 2)] == [False, True]
    for step in (2, 4, 6, 8, 10, 12):
        saved.save(step, params, optimizer, DATA, {"switched_at": None})
        saved.poll()
    saved.close()
    return tmp_path


def test_what_is_kept_and_what_comes_back(workdir):
    assert checkpoint.steps(workdir) == [6, 10, 12] and checkpoint.is_workdir(workdir)
    params, optimizer = tree()
    got = checkpoint.restore(workdir, shapes(params), shapes(optimizer))
    jax.tree.map(np.testing.assert_array_equal, got[:2], (params, optimizer))
    assert jax.tree.structure(got[1]) == jax.tree.structure(optimizer)
    assert got[2:] == (DATA, {"switched_at": None})
    assert got[1][0][0].dtype == jnp.int32 and got[1][0][1]["embed"]["embedding"].dtype == jnp.bfloat16
    for part in ("data", "run"):  # plain JSON: nothing of NumPy's
        json.loads(next((workdir / "checkpoints" / "12" / part).glob("*.json")).read_text())
    with pytest.raises(FileNotFoundError, match=r"holds steps \[6, 10, 12\]; wanted step 4"):
        checkpoint.restore(workdir, shapes(params), shapes(optimizer), step=4)


def test_parameters_alone_need_nothing_but_the_directory(workdir):
    shutil.rmtree(workdir / "checkpoints" / "12" / "optimizer" / "d")  # its arrays are not read
    reader = checkpoint.ParamsReader(workdir)
    assert reader.config == CONFIG
    assert reader.leaves == {("embed", "embedding"): ((8, 4), np.float32)}
    np.testing.assert_array_equal(reader.read(("embed", "embedding"), ()), tree()[0]["embed"]["embedding"])


def test_restores_onto_another_mesh(workdir, devices):
    params, optimizer = tree()
    mesh = sharding.make_mesh({"data": 1, "fsdp": 4, "tensor": 2}, devices)
    split = NamedSharding(mesh, P("tensor", "fsdp"))
    whole = NamedSharding(mesh, P())
    got, opt, *_ = checkpoint.restore(workdir, shapes(params, split), shapes(optimizer, whole))
    assert got["embed"]["embedding"].sharding == split
    jax.tree.map(np.testing.assert_array_equal, (got, opt), (params, optimizer))


def test_another_shape_is_named_with_found_and_wanted(workdir):
    params, optimizer = tree()
    params["embed"]["embedding"] = jnp.zeros((9, 4))
    params["norm"] = {"scale": jnp.zeros((4,))}
    with pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoint.restore(workdir, shapes(params), shapes(optimizer))
    assert "embed.embedding is float32[8, 4], wanted float32[9, 4]" in str(caught.value)
    assert "norm.scale is absent, wanted float32[4]" in str(caught.value)
    assert str(workdir / "checkpoints" / "12") in str(caught.value)


def test_another_model_in_the_same_directory_is_an_error(workdir):
    other = CONFIG.replace(rope_base=500.0, dtypes=DtypePolicy(compute="bfloat16"))
    with pytest.raises(checkpoint.CheckpointError, match="another model: rope_base is 10000.0, wanted 500.0"):
        checkpoint.Checkpoints(workdir, other, save_every=1, keep_last=1)
    (workdir / "model.json").write_text('{"vocab_size": 8}')
    with pytest.raises(checkpoint.CheckpointError, match="model.json: not a model configuration"):
        checkpoint.ParamsReader(workdir)


FILES = ("params/d/*", "params/_METADATA", "params/manifest.ocdbt", "data/data.json", "run/data.json")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("how", ["deleted", "cut"])
def test_a_damaged_checkpoint_is_named_and_never_passed_over(workdir, file, how):
    params, optimizer = map(shapes, tree())
    step = workdir / "checkpoints" / "12"
    for path in step.glob(file):
        path.unlink() if how == "deleted" else os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoint.restore(workdir, params, optimizer)
    assert f"the checkpoint {step} is damaged" in str(caught.value)
    assert "Remove that folder to resume from step 10" in str(caught.value)
    shutil.rmtree(step)
    checkpoint.restore(workdir, params, optimizer)


@pytest.mark.parametrize(
    ("part", "content", "message"),
    [("data", '{"n": 11}', "another data position than was saved"), ("run", "{}", "no checksums of the saved arrays")],
)
def test_json_that_was_not_saved_is_found(workdir, part, content, message):
    (workdir / "checkpoints" / "12" / part / "data.json").write_text(content)
    with pytest.raises(checkpoint.CheckpointError, match=f"12 is damaged: {message}"):
        checkpoint.restore(workdir, *map(shapes, tree()))


def test_a_flipped_bit_is_found(tmp_path):
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(64, 64)), jnp.float32)}
    saved = checkpoint.Checkpoints(tmp_path, CONFIG, save_every=1, keep_last=1)
    saved.save(1, params, {"step": jnp.int32(1)}, {}, {})
    saved.close()
    for row in (3, 0):  # a layer at a time is what is read of a stack
        np.testing.assert_array_equal(checkpoint.ParamsReader(tmp_path).read(("w",), (row,)), params["w"][row])
    np.testing.assert_array_equal(checkpoint.ParamsReader(tmp_path).read(("w",), ()), params["w"])
    largest = max((tmp_path / "checkpoints" / "1" / "params" / "d").iterdir(), key=lambda p: p.stat().st_size)
    raw = bytearray(largest.read_bytes())
    raw[len(raw) // 2] ^= 1
    largest.write_bytes(bytes(raw))
    with pytest.raises(checkpoint.CheckpointError, match="1 is damaged: .*start again"):
        reader = checkpoint.ParamsReader(tmp_path)
        for row in range(64):
            reader.read(("w",), (row,))


def test_checksums_are_those_of_a_device_and_of_parts(devices):
    """Of one device, of eight, of layers one by one, and of the definition in Python's own numbers."""
    rng = np.random.default_rng(0)
    mesh = sharding.make_mesh({"data": 1, "fsdp": 4, "tensor": 2}, devices)
    for dtype in ("float32", "bfloat16", "int32", "bool"):
        array = rng.integers(0, 2**31, (4, 8, 300)).astype(jnp.dtype(dtype))
        wanted = checkpoint.checksum(array)
        parts = sum(checkpoint.checksum(layer, i * layer.size) for i, layer in enumerate(array))
        assert parts % 2**32 == wanted
        for place in (devices[0], NamedSharding(mesh, P("tensor", "fsdp"))):
            assert checkpoint._checksums(a=jax.device_put(array, place)) == {"a.": wanted}
        bits = array.reshape(-1).view(f"uint{8 * array.dtype.itemsize}")[:100]

        def one(bits, place):
            x = bits ^ place * 0x9E3779B1 % 2**32
            x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
            x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
            return x ^ x >> 16

        first = array.reshape(-1)[:100]
        assert checkpoint.checksum(first) == sum(one(int(b), i) for i, b in enumerate(bits)) % 2**32


def test_what_a_plain_sum_would_miss_changes_a_checksum():
    array = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    signs, exchanged = array.copy(), array[[1, 0, 2, 3]]
    signs[0, 3], signs[2, 7] = -signs[0, 3], -signs[2, 7]
    assert len({checkpoint.checksum(x) for x in (array, signs, exchanged)}) == 3


def test_half_written_checkpoints_are_not_seen_and_are_removed(workdir):
    half = workdir / "checkpoints" / "14.orbax-checkpoint-tmp"
    shutil.copytree(workdir / "checkpoints" / "12", half)
    assert checkpoint.steps(workdir)[-1] == 12
    assert half.exists()  # reading removes nothing: a training may be writing it
    aside = (workdir / "checkpoints" / "10").rename(workdir / "checkpoints" / "10.damaged")
    checkpoint.Checkpoints(workdir, CONFIG, save_every=1, keep_last=2).close()
    assert not half.exists() and checkpoint.steps(workdir)[-1] == 12
    assert aside.exists()  # what is not ours to remove


def test_a_save_that_took_too_long_has_failed(tmp_path, monkeypatch):
    """Not to be taken for one that is under way: both are a TimeoutError."""
    saved = checkpoint.Checkpoints(tmp_path, CONFIG, save_every=1, keep_last=1)

    def result(timeout=None):
        raise TimeoutError("the store did not answer")

    late = types.SimpleNamespace(result=result)
    monkeypatch.setattr(saved._orbax, "save_checkpointables_async", lambda *_, **__: late)
    saved.save(1, {"x": jnp.zeros(2)}, {}, {}, {})
    with pytest.raises(checkpoint.CheckpointError, match="saving step 1 to .* failed: TimeoutError: the store did not"):
        while True:
            saved.poll()
    assert saved.completed() == []


def test_a_full_disk_is_an_error_and_the_checkpoint_before_is_whole(tmp_path):
    toy = [sys.executable, str(pathlib.Path(__file__).parent / "toy.py"), str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parent.parent)}
    env["XLA_FLAGS"], env["JAX_PLATFORMS"] = "--xla_backend_optimization_level=0", "cpu"  # it is about disks
    env["JAX_COMPILATION_CACHE_DIR"], env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = str(tmp_path / "cache"), "0"
    first = subprocess.run([*toy, "steps=2"], env=env, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    before = {p: p.read_bytes() for p in (tmp_path / "checkpoints" / "2").rglob("*") if p.is_file()}
    limit = max(map(len, before.values())) // 2
    full = subprocess.run([*toy, "steps=4", f"file_size_limit={limit}"], env=env, capture_output=True, text=True)
    assert full.returncode != 0
    assert f"saving step 4 to {tmp_path / 'checkpoints' / '4'} failed" in full.stderr
    assert "File too large" in full.stderr and "the checkpoint of step 2 is whole" in full.stderr
    assert checkpoint.steps(tmp_path) == [2]
    assert {p: p.read_bytes() for p in before} == before
    again = subprocess.run([*toy, "steps=4"], env=env, capture_output=True, text=True)
    assert again.returncode == 0 and "resuming from step 2" in again.stderr
    assert checkpoint.steps(tmp_path) == [2, 4]
