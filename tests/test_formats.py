from __future__ import annotations

import json
import math
import pickle
import resource

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import fot_jax
from fot_jax import checkpoint, model
from fot_jax.config import DtypePolicy, ModelConfig
from fot_jax.formats import hf, layout

PLAIN = ModelConfig(vocab_size=11, d_model=8, d_ff=12, n_layers=3, n_heads=2, window=16)
# Every size another, so that a wrong transposition cannot fit by chance.
GROUPED = PLAIN.replace(n_heads=6, n_kv_heads=3, head_size=10, n_layers=6, mem_layers=(2, 4), rope_base=1e6)
TIED = GROUPED.replace(tie_embeddings=True, qk_norm=True, mem_positionals=False, mem_layers=(0,))
CONFIGS = {"plain": PLAIN, "grouped": GROUPED, "tied": TIED}


def random_params(config: ModelConfig, dtype: str = "float32"):
    rng = np.random.default_rng(0)
    leaves = {path: rng.normal(size=shape).astype(dtype) for path, shape in layout.leaf_shapes(config).items()}
    return layout.nest(leaves)


def assert_same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for path, leaf in jax.tree_util.tree_leaves_with_path(wanted):
        other = found
        for key in path:
            other = other[key.key]
        assert other.dtype == leaf.dtype, path
        np.testing.assert_array_equal(np.asarray(other), np.asarray(leaf), err_msg=str(path))


@pytest.fixture
def saved(tmp_path):
    """A directory with GROUPED's random parameters in one file, and those parameters."""
    params = random_params(GROUPED)
    fot_jax.save_pretrained(tmp_path / "m", GROUPED, params)
    return tmp_path / "m", params


def rewrite(directory, change):
    """Applies `change` to the dictionary of tensors in `model.safetensors`."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


# The table


@given(
    n_layers=st.integers(1, 9),
    mem_layers=st.sets(st.integers(0, 8)),
    tied=st.booleans(),
    qk_norm=st.booleans(),
)
def test_the_table_is_a_bijection(n_layers, mem_layers, tied, qk_norm):
    mem_layers = tuple(layer for layer in mem_layers if layer < n_layers)
    config = GROUPED.replace(n_layers=n_layers, mem_layers=mem_layers, tie_embeddings=tied, qk_norm=qk_norm)
    entries = layout.table(hf.LAYOUT, config)
    assert len({entry.name for entry in entries}) == len(entries)
    assert len({(entry.path, entry.stack) for entry in entries}) == len(entries)
    shapes = layout.leaf_shapes(config)
    assert sum(math.prod(shape) for shape in shapes.values()) == layout.count_params(config)
    for entry in entries:
        assert shapes[entry.path] == shapes[entry.path][: len(entry.stack)] + entry.shape
        assert all(i < n for i, n in zip(entry.stack, shapes[entry.path]))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_table_makes_the_models_own_tree(name):
    abstract = model.abstract_params(CONFIGS[name])
    leaves = jax.tree_util.tree_leaves_with_path(abstract)
    found = {tuple(key.key for key in path): leaf.shape for path, leaf in leaves}
    assert found == layout.leaf_shapes(CONFIGS[name])


def test_orientations():
    """y = W x in their layout equals the model's contractions in ours."""
    rng = np.random.default_rng(0)
    entries = {entry.name: entry for entry in layout.table(hf.LAYOUT, GROUPED)}
    x_D, o_HK = rng.normal(size=8), rng.normal(size=(6, 10))
    for name, shape in [("q", (6, 10)), ("k", (3, 10)), ("v", (3, 10))]:
        entry = entries[f"model.layers.2.self_attn.{name}_proj.weight"]
        assert (entry.path, entry.stack) == (("segment_1", "memory", "attention", name), (0,))
        w = rng.normal(size=(shape[0] * shape[1], 8))
        assert entry.their_shape == w.shape
        # Head h owns rows h K ... (h+1) K - 1 of their matrix.
        np.testing.assert_allclose(np.einsum("d,dhk->hk", x_D, entry.to_ours(w)), (w @ x_D).reshape(shape))
        np.testing.assert_array_equal(entry.to_theirs(entry.to_ours(w)), w)
    entry = entries["model.layers.3.self_attn.o_proj.weight"]
    w = rng.normal(size=(8, 60))
    assert (entry.path, entry.stack) == (
        ("segment_1", "plain", "attention", "o"),
        (1, 0),
    ) and entry.their_shape == w.shape
    np.testing.assert_allclose(np.einsum("hk,hkd->d", o_HK, entry.to_ours(w)), w @ o_HK.reshape(60))
    entry = entries["model.layers.5.mlp.down_proj.weight"]
    w = rng.normal(size=(8, 12))
    np.testing.assert_array_equal(entry.to_ours(w), w.T)


# There and back


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_is_exact(tmp_path, name, dtype):
    config = CONFIGS[name].replace(dtypes=DtypePolicy(dtype, dtype, "bfloat16"))
    params = random_params(config, dtype)
    fot_jax.save_pretrained(tmp_path / "m", config, params)
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]
    found_config, found = fot_jax.load_pretrained(tmp_path / "m", dtype=None)
    assert found_config == config
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found))
    assert_same(found, params)
    found_config, found = fot_jax.load_pretrained(tmp_path / "m", dtype="float32")
    assert found_config.dtypes == DtypePolicy("float32", "float32", "bfloat16")
    assert_same(found, jax.tree.map(lambda x: x.astype(np.float32), params))


def test_names_and_shapes_are_transformers_own(saved):
    tensors = load_file(saved[0] / "model.safetensors")
    shapes = {name: tensor.shape for name, tensor in tensors.items() if "layers." not in name or "layers.5." in name}
    assert shapes == {
        "model.embed_tokens.weight": (11, 8),
        "model.layers.5.input_layernorm.weight": (8,),
        "model.layers.5.self_attn.q_proj.weight": (60, 8),
        "model.layers.5.self_attn.k_proj.weight": (30, 8),
        "model.layers.5.self_attn.v_proj.weight": (30, 8),
        "model.layers.5.self_attn.o_proj.weight": (8, 60),
        "model.layers.5.post_attention_layernorm.weight": (8,),
        "model.layers.5.mlp.gate_proj.weight": (12, 8),
        "model.layers.5.mlp.up_proj.weight": (12, 8),
        "model.layers.5.mlp.down_proj.weight": (8, 12),
        "model.norm.weight": (8,),
        "lm_head.weight": (11, 8),
    }
    assert len(tensors) == 6 * 9 + 3


def test_shards_and_their_index(tmp_path):
    params = random_params(GROUPED)
    hf.save(tmp_path / "m", GROUPED, params, max_shard_bytes=5000)
    shards = sorted((tmp_path / "m").glob("model-*.safetensors"))
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert len(shards) > 3 and all(shard.name.endswith(f"-of-{len(shards):05}.safetensors") for shard in shards)
    held = {name: shard.name for shard in shards for name in load_file(shard)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == 4 * layout.count_params(GROUPED)
    assert max(sum(x.nbytes for x in load_file(shard).values()) for shard in shards) <= 5000
    assert_same(fot_jax.load_pretrained(tmp_path / "m")[1], params)


def test_sharded_arrays_and_gradients_can_be_saved(tmp_path, devices):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    place = lambda x: jax.device_put(
        x, jax.NamedSharding(mesh, jax.P(*["x" if n == 8 else None for n in x.shape][: x.ndim]))
    )
    params = random_params(PLAIN)
    params["embed"]["embedding"] = place(params["embed"]["embedding"])
    fot_jax.save_pretrained(tmp_path / "m", PLAIN, params)
    assert_same(fot_jax.load_pretrained(tmp_path / "m")[1], random_params(PLAIN))


def test_a_working_directory_of_training_can_be_loaded(tmp_path):
    params = jax.tree.map(jnp.asarray, random_params(GROUPED))
    run = checkpoint.Checkpoints(tmp_path / "w", GROUPED, save_every=1, keep_last=1)
    run.save(1, params, {"step": jnp.int32(1)}, {"offset": 0}, {})
    run.close()
    config, found = fot_jax.load_pretrained(tmp_path / "w")
    assert config == GROUPED
    assert_same(found, params)
    config, found = fot_jax.load_pretrained(tmp_path / "w", dtype="bfloat16")
    assert config.dtypes == DtypePolicy("bfloat16", "bfloat16", "float32")
    assert found["norm"]["scale"].dtype == jnp.bfloat16


# Pickled files


def test_bin_files(tmp_path, saved):
    torch = pytest.importorskip("torch")
    directory, params = saved
    tensors = {name: torch.from_numpy(x) for name, x in load_file(directory / "model.safetensors").items()}
    (directory / "model.safetensors").unlink()
    torch.save(tensors, directory / "pytorch_model.bin")
    assert_same(fot_jax.load_pretrained(directory)[1], params)
    torch.save(tensors, directory / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="pytorch_model.bin: .* of torch before 1.6, whose files"):
        hf.open_directory(directory)
    # a transposed view, as a tied or converted checkpoint may hold
    tensors["lm_head.weight"] = tensors["lm_head.weight"].T.contiguous().T
    torch.save(tensors, directory / "pytorch_model.bin")
    assert_same(fot_jax.load_pretrained(directory)[1], params)

    (directory / "pytorch_model.bin").unlink()
    names = sorted(tensors)
    parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, held in parts.items():
        torch.save({name: tensors[name].bfloat16() for name in held}, directory / file)
    weight_map = {name: file for file, held in parts.items() for name in held}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), params)
    assert_same(fot_jax.load_pretrained(directory)[1], jax.tree.map(lambda x: x.astype(np.float32), rounded))
    assert_same(fot_jax.load_pretrained(directory, dtype="bfloat16")[1], rounded)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_is_no_checkpoint_is_refused_and_not_run(tmp_path, saved):
    torch = pytest.importorskip("torch")
    directory, _ = saved
    (directory / "model.safetensors").unlink()
    path = directory / "pytorch_model.bin"

    class Touch:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    path.write_bytes(pickle.dumps(Touch()))
    with pytest.raises(ValueError, match="pytorch_model.bin: not a pickled checkpoint, or a damaged one"):
        fot_jax.load_pretrained(directory)
    torch.save({"model.norm.weight": Touch()}, path)
    with pytest.raises(ValueError, match="not a pickled checkpoint"):
        fot_jax.load_pretrained(directory)
    assert not (tmp_path / "ran").exists()
    torch.save({"state_dict": {"model.norm.weight": torch.ones(8)}}, path)
    with pytest.raises(ValueError, match="state_dict is a dict; wanted tensors by name"):
        fot_jax.load_pretrained(directory)
    torch.save(torch.ones(8), path)
    with pytest.raises(ValueError, match="holds a Tensor; wanted tensors by name"):
        fot_jax.load_pretrained(directory)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="damaged"):
        fot_jax.load_pretrained(directory)


# What is refused


def test_tensors_that_do_not_fit_are_named(saved):
    directory, _ = saved
    name = "model.layers.4.self_attn.k_proj.weight"

    def expect(change, message):
        before = (directory / "model.safetensors").read_bytes()
        rewrite(directory, change)
        with pytest.raises(ValueError, match=message):
            fot_jax.load_pretrained(directory)
        (directory / "model.safetensors").write_bytes(before)

    expect(lambda t: t.pop(name), f"tensor missing: {name}")
    expect(
        lambda t: t.update({"model.layers.6.mlp.up_proj.weight": np.ones((12, 8))}), "model.layers.6.mlp.* is unknown"
    )
    expect(lambda t: t.update({"model.norm.bias": np.ones(8)}), "model.norm.bias is unknown")
    expect(lambda t: t.update({name: np.ones((60, 8), np.float32)}), rf"{name} is \(60, 8\); wanted \(30, 8\)")
    expect(lambda t: t.update({name: np.ones((30, 8), np.int32)}), f"{name} is I32; wanted floating point")
    expect(lambda t: [t.pop(key) for key in list(t) if "mlp" in key], "tensor missing: .* and 13 more")
    fot_jax.load_pretrained(directory)


def test_a_name_in_two_shards_is_refused(tmp_path):
    hf.save(tmp_path / "m", GROUPED, random_params(GROUPED), max_shard_bytes=5000)
    first, second, *_ = sorted((tmp_path / "m").glob("model-*.safetensors"))
    save_file({**load_file(second), "model.embed_tokens.weight": np.ones((11, 8), np.float32)}, second)
    with pytest.raises(ValueError, match=f"model.embed_tokens.weight is in {first.name} and in {second.name}"):
        fot_jax.load_pretrained(tmp_path / "m")


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "..", "", "a/b.safetensors", "a\\b", 3, None])
def test_an_index_may_not_point_elsewhere(tmp_path, saved, file):
    directory, _ = saved
    names = list(load_file(directory / "model.safetensors"))
    (directory / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = {"weight_map": {name: file for name in names}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="wanted the name of a file beside the index"):
        fot_jax.load_pretrained(directory)


def test_an_index_that_is_wrong_is_refused(tmp_path):
    directory = tmp_path / "m"
    hf.save(directory, GROUPED, random_params(GROUPED), max_shard_bytes=5000)
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name, file = next(iter(index["weight_map"].items()))

    path.write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
    with pytest.raises(ValueError, match="tensor a is listed twice"):
        fot_jax.load_pretrained(directory)
    path.write_text("{")
    with pytest.raises(ValueError, match="index.json: not JSON"):
        fot_jax.load_pretrained(directory)
    path.write_text("{}")
    with pytest.raises(ValueError, match="weight_map missing"):
        fot_jax.load_pretrained(directory)
    moved = {**index["weight_map"], name: sorted(directory.glob("model-*"))[-1].name}
    path.write_text(json.dumps({"weight_map": moved}))
    with pytest.raises(ValueError, match=f"tensor {name} missing; .* says it is there"):
        fot_jax.load_pretrained(directory)
    path.write_text(json.dumps(index))
    (directory / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"{file}: no such file"):
        fot_jax.load_pretrained(directory)
    (directory / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="are both there; wanted one of them"):
        fot_jax.load_pretrained(directory)


def test_damaged_and_absent_files(tmp_path, saved):
    directory, _ = saved
    path = directory / "model.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:100], b"", b"x" * 64):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="not a safetensors file, or a damaged one"):
            fot_jax.load_pretrained(directory)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no model; wanted config.json and weights"):
        fot_jax.load_pretrained(directory)
    with pytest.raises(FileNotFoundError, match="no such file or directory"):
        fot_jax.load_pretrained(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="no model; wanted config.json"):
        fot_jax.load_pretrained(tmp_path)
    with pytest.raises(ValueError, match="dtype is 'int8'; wanted one of float32"):
        fot_jax.load_pretrained(directory, dtype="int8")


def test_old_rotary_buffers_are_left_out(saved):
    directory, params = saved
    rewrite(directory, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(5, np.float32)}))
    assert_same(fot_jax.load_pretrained(directory)[1], params)


def test_a_tied_head_may_be_there_when_it_is_equal(tmp_path):
    params = random_params(TIED)
    fot_jax.save_pretrained(tmp_path / "m", TIED, params)
    embedding = params["embed"]["embedding"]
    rewrite(tmp_path / "m", lambda t: t.update({"lm_head.weight": embedding}))
    assert_same(fot_jax.load_pretrained(tmp_path / "m")[1], params)
    rewrite(tmp_path / "m", lambda t: t.update({"lm_head.weight": embedding + 1}))
    with pytest.raises(ValueError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        fot_jax.load_pretrained(tmp_path / "m")


# Saving


def test_a_tree_of_another_shape_is_refused_and_leaves_nothing(tmp_path):
    for change, message in [
        (lambda p: p["embed"].update(embedding=np.ones((12, 8))), r"embed/embedding: \(12, 8\); wanted \(11, 8\)"),
        (lambda p: p.pop("head"), r"head/kernel: missing; wanted \(8, 11\)"),
        (lambda p: p["norm"].update(bias=np.ones(8)), r"norm/bias: \(8,\); wanted no such leaf"),
    ]:
        params = random_params(PLAIN)
        change(params)
        with pytest.raises(ValueError, match=message):
            fot_jax.save_pretrained(tmp_path / "m", PLAIN, params)
        assert list(tmp_path.iterdir()) == []


def test_an_earlier_model_is_replaced_and_other_files_stay(tmp_path):
    directory = tmp_path / "m"
    hf.save(directory, GROUPED, random_params(GROUPED), max_shard_bytes=5000)
    (directory / "tokenizer.model").write_bytes(b"kept")
    fot_jax.save_pretrained(directory, PLAIN, random_params(PLAIN))
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", "model.safetensors", "tokenizer.model"]
    config, params = fot_jax.load_pretrained(directory)
    assert config == PLAIN
    assert_same(params, random_params(PLAIN))
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    """A limit on the size of files stands for a full disk: the system refuses the write in the same place."""
    old = random_params(PLAIN)
    fot_jax.save_pretrained(tmp_path / "m", PLAIN, old)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(OSError, match=r"model.safetensors: cannot be written"):
            fot_jax.save_pretrained(tmp_path / "m", GROUPED, random_params(GROUPED))
        with pytest.raises(OSError, match=r"model.safetensors: cannot be written"):
            fot_jax.save_pretrained(tmp_path / "new", GROUPED, random_params(GROUPED))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert_same(fot_jax.load_pretrained(tmp_path / "m")[1], old)


def test_configurations_that_are_no_objects_are_refused(saved):
    path = saved[0] / "config.json"
    for text, message in (("{", "config.json: not JSON"), ("[]", "config.json: holds a list; wanted fields by name")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            hf.open_directory(saved[0])
