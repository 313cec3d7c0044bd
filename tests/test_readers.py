"""Meta's, EasyLM's and GGUF's layouts, made here by hand from Hugging Face tensors, as their own tools make them."""

from __future__ import annotations

import json
import pathlib
import pickle
import struct
import sys
import time
import tracemalloc
from collections import OrderedDict

import flax.serialization
import jax.numpy as jnp
import ml_dtypes
import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict, config_dict
from safetensors.numpy import save_file

from fot_jax import model
from fot_jax.config import SIZES, ModelConfig, to_hf
from fot_jax.formats import easylm, hf, layout, meta, open_checkpoint, pickles
from fot_jax.formats import gguf as gguf_format
from fot_jax.formats.source import Source, read_params

PLAIN = ModelConfig(vocab_size=14, d_model=24, d_ff=20, n_layers=2, n_heads=4, window=32, norm_eps=1e-5)
GROUPED = ModelConfig(
    vocab_size=14, d_model=24, d_ff=44, n_layers=3, n_heads=4, n_kv_heads=2, window=64, norm_eps=1e-5, rope_base=5e5
)
CONFIGS = {"plain": PLAIN, "grouped": GROUPED}
TOKENS = np.array([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8])


# Other tools' layouts, from Hugging Face's


def hf_tensors(config: ModelConfig, dtype="float32", seed=0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    D, F, V = config.d_model, config.d_ff, config.vocab_size
    HK, GK = config.n_heads * config.head_size, config.n_kv_heads * config.head_size
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}
    for i in range(config.n_layers):
        for name, shape in {
            "input_layernorm": (D,),
            "self_attn.q_proj": (HK, D),
            "self_attn.k_proj": (GK, D),
            "self_attn.v_proj": (GK, D),
            "self_attn.o_proj": (D, HK),
            "post_attention_layernorm": (D,),
            "mlp.gate_proj": (F, D),
            "mlp.up_proj": (F, D),
            "mlp.down_proj": (D, F),
        }.items():
            shapes[f"model.layers.{i}.{name}.weight"] = shape
    noise = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    return {
        name: (1 + 0.2 * x if x.ndim == 1 else x * 1.5 / np.sqrt(x.shape[1])).astype(dtype) for name, x in noise.items()
    }


def wanted_params(tmp_path, config: ModelConfig, tensors) -> dict:
    """The tree that the Hugging Face reader, tested elsewhere, makes of the same tensors; nothing is rounded."""
    directory = tmp_path / "hf"
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(to_hf(config)))
    return read_params(hf.open_directory(directory), dtype=str(tensors["model.norm.weight"].dtype))


def to_adjacent(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head from halves (Hugging Face) to pairs: row 2 i + j was row i + j K/2."""
    out, K = np.empty_like(w), len(w) // heads
    for h in range(heads):
        for i in range(K // 2):
            for j in range(2):
                out[h * K + 2 * i + j] = w[h * K + i + j * K // 2]
    return out


META_NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "model.layers": "layers",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}


def to_meta(config: ModelConfig, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    out = {}
    for name, w in tensors.items():
        if "q_proj" in name or "k_proj" in name:
            w = to_adjacent(w, config.n_heads if "q_proj" in name else config.n_kv_heads)
        for old, new in META_NAMES.items():
            name = name.replace(old, new) if old in name and "feed_forward" not in name else name
        out[name] = w
    return out


def torch_of(array: np.ndarray):
    import torch

    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def write_meta(directory, config: ModelConfig, tensors, parts=1, rows=False, change=None, **params) -> pathlib.Path:
    """A directory in Meta's layout; `rows`: the embedding is cut as in Llama 3. `change` edits the parts."""
    import torch

    directory.mkdir(parents=True)
    fields = dict(dim=config.d_model, n_layers=config.n_layers, n_heads=config.n_heads, norm_eps=config.norm_eps)
    if config.n_kv_heads != config.n_heads:
        fields["n_kv_heads"] = config.n_kv_heads
    if config.rope_base != 10000:
        fields["rope_theta"] = config.rope_base
    fields |= {"vocab_size": -1, "max_seq_len": config.window, **params}
    (directory / "params.json").write_text(json.dumps(fields))
    axes = {"wo": 1, "w2": 1, "tok_embeddings": 0 if rows else 1}
    states = [{"rope.freqs": torch.ones(config.head_size // 2)} for _ in range(parts)]
    for name, w in to_meta(config, tensors).items():
        axis = axes.get(name.split(".")[-2], 0)
        for state, piece in zip(states, [w] * parts if w.ndim == 1 else np.split(w, parts, axis)):
            state[name] = torch_of(piece)
    if change is not None:
        change(states)
    for number, state in enumerate(states):
        torch.save(state, directory / f"consolidated.{number:02}.pth")
    return directory


def easylm_pairs(config: ModelConfig, tensors) -> dict[tuple[str, ...], np.ndarray]:
    names = {"tok_embeddings": "transformer.wte", "norm": "transformer.ln_f", "output": "lm_head"}
    out = {}
    for name, w in to_meta(config, tensors).items():
        name = name.removesuffix(".weight")
        if name == "tok_embeddings":
            out["transformer", "wte", "embedding"] = w
        else:
            key = names.get(name, f"transformer.h.{name.removeprefix('layers.')}").split(".")
            out[(*key, "kernel")] = np.ascontiguousarray(w.T)
    return out


def write_easylm(path: pathlib.Path, pairs, fields=None, **pickled) -> pathlib.Path:
    """As `StreamingCheckpointer` writes it, with metadata.pkl."""
    path.parent.mkdir(parents=True, exist_ok=True)
    packer = msgpack.Packer()
    with path.open("wb") as file:
        for key, value in pairs.items():
            file.write(packer.pack((key, flax.serialization.to_bytes(value))))
    if fields is not None:
        flags = ConfigDict({"llama": {"hidden_size": 1}})
        flags.coordinator = config_dict.placeholder(str)
        data = {"step": 7, "variant": {"a.b": 1}, "flags": flags, "llama_config": fields, **pickled}
        (path.parent / "metadata.pkl").write_bytes(pickle.dumps(data))
    return path


def easylm_fields(config: ModelConfig, **more):
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "max_sequence_length": config.window,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "resid_pdrop": 0.0,
        "remat_block": "nothing_saveable",
        "torch_dtype": None,
        **more,
    }


GGUF_NAMES = {
    "tok_embeddings": "token_embd",
    "layers": "blk",
    "attention_norm": "attn_norm",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
}


def to_gguf(config: ModelConfig, tensors) -> dict[str, np.ndarray]:
    out = {}
    for name, w in to_meta(config, tensors).items():
        for old, new in GGUF_NAMES.items():
            name = name.replace(old, new)
        out["output_norm.weight" if name == "norm.weight" else name] = w
    return out


def write_gguf(path, config: ModelConfig, tensors, types=None, change=None, arch="llama", **more) -> pathlib.Path:
    """Through the package's writer; `types`: tensor name -> the number type its bytes are in."""
    gguf = pytest.importorskip("gguf")
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.n_layers)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.n_heads)
    if config.n_kv_heads != config.n_heads:
        writer.add_head_count_kv(config.n_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_size)
    if config.rope_base != 10000:
        writer.add_rope_freq_base(config.rope_base)
    writer.add_context_length(config.window)
    writer.add_pad_token_id(0)
    if change is not None:
        change(writer)
    for name, w in tensors.items():
        raw = (types or {}).get(name)
        if raw is None and w.dtype == ml_dtypes.bfloat16:
            w, raw = w.view(np.uint8).reshape(*w.shape[:-1], -1), gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, w, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_same(found, wanted):
    found, wanted = layout.flatten(found), layout.flatten(wanted)
    assert found.keys() == wanted.keys()
    for path, leaf in wanted.items():
        assert found[path].dtype == leaf.dtype, path
        np.testing.assert_array_equal(found[path], leaf, err_msg=str(path))


def assert_holds(source: Source, config: ModelConfig, wanted) -> None:
    assert source.config == config
    assert_same(read_params(source, dtype=str(wanted["norm"]["scale"].dtype)), wanted)


# LLaMA with adjacent rotary pairs, on Meta's tensors


def adjacent_pair_logits(config: ModelConfig, w: dict[str, np.ndarray], tokens) -> np.ndarray:
    w = {name: np.asarray(x, np.float64) for name, x in w.items()}
    H, G, K, T = config.n_heads, config.n_kv_heads, config.head_size, len(tokens)
    norm = lambda x, scale: x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * scale
    turn = np.exp(1j * np.outer(np.arange(T), config.rope_base ** (-np.arange(0, K, 2) / K)))

    def rotate(x):
        pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * turn[:, None]
        return np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)

    x = w["tok_embeddings.weight"][tokens]
    for i in range(config.n_layers):
        at = lambda name, i=i: w[f"layers.{i}.{name}.weight"]
        h = norm(x, at("attention_norm"))
        q, k, v = ((h @ at(f"attention.{n}").T).reshape(T, heads, K) for n, heads in (("wq", H), ("wk", G), ("wv", G)))
        q, k = rotate(q), rotate(k)
        for head in range(H):
            scores = q[:, head] @ k[:, head * G // H].T / np.sqrt(K)
            p = np.exp(np.where(np.tri(T, dtype=bool), scores, -np.inf))
            o = p / p.sum(-1, keepdims=True) @ v[:, head * G // H]
            x = x + o @ at("attention.wo")[:, head * K : (head + 1) * K].T
        h = norm(x, at("ffn_norm"))
        gate = h @ at("feed_forward.w1").T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ at("feed_forward.w3").T)) @ at("feed_forward.w2").T
    return norm(x, w["norm.weight"]) @ w.get("output.weight", w["tok_embeddings.weight"]).T


def our_logits(source: Source) -> np.ndarray:
    params = read_params(source, dtype="float32")
    hidden_BTD = model.forward(source.config, params, jnp.asarray(TOKENS[None]))
    return np.asarray(model.logits(source.config, params, hidden_BTD))[0]


# Meta


@pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16])
@pytest.mark.parametrize("parts, rows", [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("name", CONFIGS)
def test_meta(tmp_path, name, parts, rows, dtype):
    pytest.importorskip("torch")
    config, tensors = CONFIGS[name], hf_tensors(CONFIGS[name], dtype)
    source = meta.open_directory(write_meta(tmp_path / "m", config, tensors, parts, rows))
    assert {tensor.dtype for name, tensor in source.tensors.items() if name != "rope.freqs"} == {np.dtype(dtype)}
    assert_holds(source, config.replace(pad_id=None), wanted_params(tmp_path, config, tensors))
    assert open_checkpoint(tmp_path / "m").config.dtypes.params == np.dtype(dtype).name


@pytest.mark.parametrize("name", CONFIGS)
def test_meta_computes_what_its_tensors_say(tmp_path, name):
    pytest.importorskip("torch")
    config, tensors = CONFIGS[name], hf_tensors(CONFIGS[name])
    found = our_logits(meta.open_directory(write_meta(tmp_path / "m", config, tensors, parts=2)))
    wanted = adjacent_pair_logits(config, to_meta(config, tensors), TOKENS)
    np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_meta_maps_one_part_and_joins_copies(tmp_path):
    pytest.importorskip("torch")
    tensors = hf_tensors(PLAIN)
    whole = meta.open_directory(write_meta(tmp_path / "1", PLAIN, tensors)).tensors["output.weight"]
    assert np.shares_memory(whole.read(), whole.read())
    cut = meta.open_directory(write_meta(tmp_path / "2", PLAIN, tensors, parts=2)).tensors["output.weight"]
    assert not np.shares_memory(cut.read(), cut.read())


@pytest.mark.parametrize(
    "d_model, d_ff, multiple_of, multiplier",
    [
        (4096, 11008, 256, None),  # LLaMA and Llama 2 7B
        (5120, 13824, 256, None),  # 13B
        (8192, 22016, 256, None),  # LLaMA 65B
        (8192, 28672, 4096, 1.3),  # Llama 2 70B
        (8192, 22016, 256, 1.0),  # Code Llama 34B
        (4096, 14336, 1024, 1.3),  # Llama 3 8B
    ],
)
def test_meta_feed_forward_of_published_models(tmp_path, d_model, d_ff, multiple_of, multiplier):
    shapes = {"tok_embeddings.weight": (32, d_model), "layers.0.feed_forward.w1.weight": (d_ff, d_model)}
    tensors = {n: meta.Tensor("x.pth", shape, np.dtype(np.float16), lambda: None) for n, shape in shapes.items()}
    params = dict(dim=d_model, n_layers=1, n_heads=32, norm_eps=1e-5, vocab_size=-1, multiple_of=multiple_of)
    if multiplier is not None:
        params["ffn_dim_multiplier"] = multiplier
    fields = meta.Fields(tmp_path / "params.json", params)
    assert meta._config(fields, tensors).d_ff == d_ff
    params["multiple_of"] = 8192
    with pytest.raises(ValueError, match=rf"give a feed-forward of \d+; wanted {d_ff}"):
        meta._config(fields, tensors)


def test_meta_window_and_special_tokens(tmp_path):
    pytest.importorskip("torch")
    tensors = hf_tensors(PLAIN)
    directory = write_meta(tmp_path / "a", PLAIN, tensors, max_seq_len=None)
    assert meta.open_directory(directory).config.window == 2048
    assert open_checkpoint(directory, window=96).config.window == 96
    assert meta.open_directory(directory).config.bos_id == 1
    assert meta.open_directory(write_meta(tmp_path / "b", PLAIN, tensors)).config.window == 32


def test_meta_tokenizer_is_looked_for_in_the_folder_and_above(tmp_path):
    pytest.importorskip("torch")
    directory, out = write_meta(tmp_path / "7B" / "m", PLAIN, hf_tensors(PLAIN)), tmp_path / "out"
    out.mkdir()
    source = meta.open_directory(directory)
    assert source.tokenizer(out) == []
    (tmp_path / "7B" / "tokenizer.model").write_bytes(b"above")
    assert source.tokenizer(out) == ["tokenizer.model"] and (out / "tokenizer.model").read_bytes() == b"above"
    (directory / "tokenizer.model").write_bytes(b"here")
    assert source.tokenizer(out) == ["tokenizer.model"] and (out / "tokenizer.model").read_bytes() == b"here"


def _drop(name, part):
    return lambda states: states[part].pop(name)


def _put(name, part, make):
    return lambda states: states[part].update({name: make(states[part].get(name))})


@pytest.mark.parametrize(
    "change, message",
    [
        (
            _drop("layers.1.attention.wk.weight", 1),
            r"consolidated.01.pth: tensor layers.1.attention.wk.weight is missing",
        ),
        (
            _drop("layers.1.attention.wk.weight", 0),
            r"01.pth: tensor layers.1.attention.wk.weight is not in consolidated.00",
        ),
        (
            _put("norm.weight", 1, lambda w: w[:-1]),
            r"01.pth: tensor norm.weight is float32\(23,\); wanted float32\(24,\)",
        ),
        (_put("output.weight", 1, lambda w: w.half()), r"01.pth: tensor output.weight is float16.*; wanted float32"),
        (_put("lora.weight", 0, lambda w: torch_of(np.ones(1, np.float32))), r"tensor lora.weight is unknown"),
        (
            _put("layers.0.attention.wq.bias", 0, lambda w: torch_of(np.ones(1, np.float32))),
            r"tensor layers.0.attention.wq.bias is unknown",
        ),
    ],
)
def test_meta_parts_that_do_not_fit_are_refused(tmp_path, change, message):
    pytest.importorskip("torch")
    directory = write_meta(tmp_path / "m", PLAIN, hf_tensors(PLAIN), parts=2, change=change)
    with pytest.raises(ValueError, match=message):
        meta.open_directory(directory)


def test_meta_norms_that_differ_between_parts_show_when_read(tmp_path):
    pytest.importorskip("torch")
    change = _put("layers.1.ffn_norm.weight", 1, lambda w: w + 1e-6)
    source = meta.open_directory(write_meta(tmp_path / "m", PLAIN, hf_tensors(PLAIN), parts=2, change=change))
    with pytest.raises(ValueError, match=r"consolidated.01.pth: tensor layers.1.ffn_norm.weight differs from .*00.pth"):
        read_params(source)


def test_meta_parts_left_out_are_named(tmp_path):
    pytest.importorskip("torch")
    directory = write_meta(tmp_path / "m", PLAIN, hf_tensors(PLAIN), parts=2)
    (directory / "consolidated.01.pth").rename(directory / "consolidated.02.pth")
    with pytest.raises(FileNotFoundError, match="consolidated.01.pth is missing; .* as there is consolidated.02.pth"):
        meta.open_directory(directory)
    (directory / "consolidated.02.pth").rename(directory / "consolidated.2.pth")
    with pytest.raises(ValueError, match="consolidated.2.pth: no part of a checkpoint by its name"):
        meta.open_directory(directory)
    (directory / "consolidated.2.pth").unlink()
    with pytest.raises(ValueError, match=r"tok_embeddings.weight is \(14, 12\); wanted \(14, 24\)"):
        meta.open_directory(directory)
    (directory / "consolidated.00.pth").unlink()
    with pytest.raises(FileNotFoundError, match="no consolidated.00.pth"):
        meta.open_directory(directory)
    (directory / "params.json").unlink()
    with pytest.raises(FileNotFoundError, match="params.json"):
        meta.open_directory(directory)


@pytest.mark.parametrize("value", [None, "24", [24], {}, True, 1.5, 0, -2, 2**40, 10**400])
def test_meta_sizes_are_checked(tmp_path, value):
    pytest.importorskip("torch")
    path = write_meta(tmp_path / "m", PLAIN, hf_tensors(PLAIN)) / "params.json"
    fields = json.loads(path.read_text())
    for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")[: 3 if value is None else 6]:
        path.write_text(json.dumps(fields | {name: value}))
        with pytest.raises(ValueError, match=f"params.json: {name} is .*; wanted (a whole number|14, rows)"):
            meta.open_directory(path.parent)


def test_meta_models_of_other_maths_are_refused(tmp_path):
    pytest.importorskip("torch")
    directory = write_meta(tmp_path / "m", PLAIN, hf_tensors(PLAIN))
    path = directory / "params.json"
    fields = json.loads(path.read_text())
    for more, message in [
        ({"use_scaled_rope": True}, "params.json: use_scaled_rope is True; wanted none"),
        ({"sliding_window": 4096}, "params.json: sliding_window is 4096"),
        ({"norm_eps": 10**400}, "params.json: norm_eps is .*; wanted a finite number above 0"),
        ({"norm_eps": "1e-5"}, "params.json: norm_eps is '1e-5'; wanted a finite number above 0"),
        ({"norm_eps": float("nan")}, "params.json: norm_eps is nan"),
        ({"rope_theta": True}, "params.json: rope_theta is True"),
        ({"rope_theta": -1}, "params.json: rope_theta is -1"),
        ({"vocab_size": 15}, "params.json: vocab_size is 15; wanted 14, rows of tok_embeddings.weight"),
        ({"n_layers": 3}, "tensor missing: layers.2.attention_norm.weight"),
        ({"n_layers": 1}, "layers.1.* is unknown"),
        ({"n_heads": 5}, "params.json: d_model is 24; wanted a multiple of n_heads"),
        ({"multiple_of": 256}, "give a feed-forward of 256; wanted 20"),
        ({"multiple_of": 20, "ffn_dim_multiplier": 1e300}, "give a feed-forward of .*; wanted 20"),
        ({"dim": 48}, r"tok_embeddings.weight is \(14, 24\); wanted \(14, 48\)"),
    ]:
        path.write_text(json.dumps(fields | more))
        with pytest.raises(ValueError, match=message):
            meta.open_directory(directory)
    path.write_text(json.dumps(fields | {"use_scaled_rope": False, "multiple_of": 20, "ffn_dim_multiplier": 0.25}))
    assert meta.open_directory(directory).config == PLAIN.replace(pad_id=None)
    for text in ("[1]", "{", "[" * 10**5, '{"dim": ' + "1" * 5000 + "}", "null"):
        path.write_text(text)
        with pytest.raises(ValueError, match="params.json: (not JSON|holds a)"):
            meta.open_directory(directory)


# EasyLM


@pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16])
@pytest.mark.parametrize("prefix", [(), ("params",), ("params", "params")])
def test_easylm(tmp_path, prefix, dtype):
    tensors = hf_tensors(GROUPED, dtype)
    pairs = {(*prefix, *key): w for key, w in easylm_pairs(GROUPED, tensors).items()}
    if len(prefix) == 2:  # a training state
        pairs = {("step",): 3, **pairs, ("opt_state", "0", "mu", "params", "lm_head", "kernel"): np.ones(3)}
        pairs["opt_state", "0", "count"] = np.int32(3)
    path = write_easylm(tmp_path / "e" / "streaming_params", pairs, easylm_fields(GROUPED, mem_layers=[1]))
    wanted = wanted_params(tmp_path, GROUPED.replace(mem_layers=(1,)), tensors)
    for source in (easylm.open_checkpoint(path), easylm.open_checkpoint(path.parent)):
        assert {tensor.dtype for tensor in source.tensors.values()} == {np.dtype(dtype)}
        assert_holds(source, GROUPED.replace(mem_layers=(1,), pad_id=None), wanted)
    assert open_checkpoint(path.parent).config.dtypes.params == np.dtype(dtype).name


@pytest.mark.parametrize("name", CONFIGS)
def test_easylm_computes_what_its_tensors_say(tmp_path, name):
    config, tensors = CONFIGS[name], hf_tensors(CONFIGS[name])
    found = our_logits(
        easylm.open_checkpoint(write_easylm(tmp_path / "e", easylm_pairs(config, tensors), easylm_fields(config)))
    )
    np.testing.assert_allclose(found, adjacent_pair_logits(config, to_meta(config, tensors), TOKENS), atol=2e-5)


@pytest.mark.parametrize("chunk", [100, 512])
def test_easylm_arrays_in_chunks(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", chunk)
    tensors = hf_tensors(PLAIN)
    path = write_easylm(tmp_path / "e", easylm_pairs(PLAIN, tensors), easylm_fields(PLAIN))
    assert b"__msgpack_chunked_array__" in path.read_bytes()
    assert_holds(easylm.open_checkpoint(path), PLAIN.replace(pad_id=None), wanted_params(tmp_path, PLAIN, tensors))


def test_easylm_is_mapped(tmp_path):
    path = write_easylm(tmp_path / "e", easylm_pairs(PLAIN, hf_tensors(PLAIN)), easylm_fields(PLAIN))
    tracemalloc.start()
    for tensor in easylm.open_checkpoint(path).tensors.values():
        assert np.shares_memory(tensor.read(), tensor.read()) and not tensor.read().flags.writeable
    tracemalloc.stop()


def test_easylm_without_configuration_names_the_sizes_that_fit(tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, "tiny", PLAIN)
    monkeypatch.setitem(SIZES, "tiny_with_memory", PLAIN.replace(mem_layers=(1,)))
    tensors = hf_tensors(PLAIN)
    path = write_easylm(tmp_path / "e", easylm_pairs(PLAIN, tensors))
    with pytest.raises(ValueError, match="e: no configuration beside it.* fit tiny, tiny_with_memory; .*--size NAME"):
        easylm.open_checkpoint(path)
    assert_holds(easylm.open_checkpoint(path, size=PLAIN), PLAIN, wanted_params(tmp_path, PLAIN, tensors))
    assert open_checkpoint(path, size=PLAIN, window=17).config.window == 17
    with pytest.raises(ValueError, match=r"wk/kernel is \(24, 24\); wanted \(24, 12\)"):
        easylm.open_checkpoint(path, size=GROUPED)
    del SIZES["tiny"], SIZES["tiny_with_memory"]
    with pytest.raises(ValueError, match="fit none of open_llama_3b"):
        easylm.open_checkpoint(path)


def test_easylm_configurations(tmp_path):
    path = write_easylm(tmp_path / "d" / "streaming_params_100", easylm_pairs(PLAIN, hf_tensors(PLAIN)))
    fields, beside = easylm_fields(PLAIN), path.with_name
    beside("config.json").write_text(json.dumps(fields | {"max_position_embeddings": 8, "max_sequence_length": None}))
    assert easylm.open_checkpoint(path).config.window == 8
    beside("llama_config.pkl").write_bytes(pickle.dumps(ConfigDict(fields | {"max_sequence_length": 9})))
    assert easylm.open_checkpoint(path).config.window == 9
    beside("metadata.pkl").write_bytes(pickle.dumps({"llama_config": fields | {"max_sequence_length": 10}}))
    assert easylm.open_checkpoint(path).config.window == 10
    beside("metadata_100.pkl").write_bytes(pickle.dumps({"llama_config": fields | {"pad_token_id": -1}}))
    assert easylm.open_checkpoint(path).config == PLAIN.replace(pad_id=None)
    deep = []
    for _ in range(300):
        deep = [deep]
    for more, message in [
        ({"hidden_size": 32}, r"wanted \(14, 32\)"),
        ({"vocab_size": 15}, r"wanted \(15, 24\)"),
        (
            {"num_hidden_layers": 2**31 - 1},
            r"metadata_100.pkl: num_hidden_layers is 2147483647; wanted a whole .* 1 to 21",
        ),
        ({"num_attention_heads": "4"}, "metadata_100.pkl: num_attention_heads is '4'; wanted a whole number"),
        ({"num_attention_heads": 10**9999}, "metadata_100.pkl: num_attention_heads is a very great int"),
        ({"num_attention_heads": deep}, "metadata_100.pkl: num_attention_heads is "),
        ({"num_attention_heads": None}, "metadata_100.pkl: num_attention_heads is None"),
        ({"rms_norm_eps": [1]}, "metadata_100.pkl: rms_norm_eps"),
        ({"mem_layers": [2]}, "mem_layers is .*; wanted a list of layers from 0 to 1"),
        ({"mem_layers": "01"}, "mem_layers"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling is .*; wanted none"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; wanted 'silu'"),
        ({"tie_word_embeddings": True}, "lm_head/kernel"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; wanted true or false"),
    ]:
        beside("metadata_100.pkl").write_bytes(pickle.dumps({"llama_config": fields | more}))
        with pytest.raises(ValueError, match=message):
            easylm.open_checkpoint(path).check_tied_head()
    for data in (b"", pickle.dumps([1]), pickle.dumps({"llama_config": 1}), pickle.dumps(print)):
        beside("metadata_100.pkl").write_bytes(data)
        with pytest.raises(ValueError, match="metadata_100.pkl"):
            easylm.open_checkpoint(path)


# A dictionary, and on it a tuple of one tuple twice, which holds another twice, and so on: as a key, 2**60 to hash.
DOUBLED = b"\x80\x04})" + b"".join(b"\x94h" + bytes([i]) + b"\x86" for i in range(60))
BIG = b"\x80\x04(" + b"N" * 100_000 + b"l\x94"  # a list, object 0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DOUBLED + b"Ns.", "a dict has a tuple for a key"),
        (b"\x80\x04](N\x90.", "it adds to a list as to a set"),
        (b"\x80\x04(}" + DOUBLED[3:] + b"Nd.", "for a key"),
        (b"\x80\x04})" + b"\x85" * 500_000 + b"Ns.", "a dict has a tuple for a key"),
        (b"\x80\x04" + b"]0" * 600_000 + b"].", "1,200,004 bytes; wanted at most 1,048,576"),
        (BIG + b"0" + b"cbuiltins\ndict\nh\x00\x85R" * 30_000 + b".", "TypeError"),
        (BIG + b"]h\x00b.", "it gives a list a state"),
    ],
)
def test_pickles_that_would_take_for_ever_are_refused(tmp_path, data, message):
    (tmp_path / "x.pkl").write_bytes(data)
    with pytest.raises(ValueError, match=f"x.pkl.*{message}"):
        pickles.read_values(tmp_path / "x.pkl")


def test_pickles_take_no_more_memory_than_they_say(tmp_path):
    """An object numbered 2**31 - 1, for which a list of so many would be made; a long list that sets are made of."""
    sets = DOUBLED + b"0\x8f(" + b"h\x01" * 100 + b"\x90."
    for data in (sets, b"\x80\x04Nr\xff\xff\xff\x7f.", BIG + b"0" + b"cbuiltins\nset\nh\x00\x85R" * 30_000 + b"."):
        (tmp_path / "x.pkl").write_bytes(data)
        tracemalloc.start()
        pickles.read_values(tmp_path / "x.pkl")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 30e6


def test_plain_pickles_are_read(tmp_path):
    shared = (0.9, 0.95)
    config = ConfigDict({"b": shared, "c": {"d": None}})
    config.e = config_dict.placeholder(tuple)
    values = {"a": [shared] * 20, "f": OrderedDict(g=True), "h": config, 3: -1.5}
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "x.pkl").write_bytes(pickle.dumps(values, protocol))
        found = pickles.read_values(tmp_path / "x.pkl")
        fields = found.pop("h").state["_fields"]
        assert fields["b"] == shared and fields["c"].state["_fields"] == {"d": None}
        assert found == {name: value for name, value in values.items() if name != "h"}


def test_easylm_files_are_found_by_content(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        easylm.open_checkpoint(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="no streamed EasyLM checkpoint"):
        easylm.open_checkpoint(tmp_path)
    (tmp_path / "notes.msgpack").write_bytes(b"text")
    with pytest.raises(ValueError, match="notes.msgpack: not a streamed EasyLM checkpoint"):
        easylm.open_checkpoint(tmp_path / "notes.msgpack")
    for name in ("open_llama_3b_v2_easylm", "streaming_params_7"):
        assert easylm.find(tmp_path) is None or easylm.find(tmp_path).name == "open_llama_3b_v2_easylm"
        write_easylm(tmp_path / name, easylm_pairs(PLAIN, hf_tensors(PLAIN)), easylm_fields(PLAIN))
    with pytest.raises(ValueError, match="holds open_llama_3b_v2_easylm, streaming_params_7; wanted one"):
        easylm.open_checkpoint(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"kept")
    out = tmp_path / "out"
    out.mkdir()
    assert easylm.open_checkpoint(tmp_path / "streaming_params_7").tokenizer(out) == ["tokenizer.model"]


def _pair(key, value: bytes) -> bytes:
    return msgpack.packb((key, value))


def _array(shape, dtype, buffer, code=1) -> bytes:
    return msgpack.packb(msgpack.ExtType(code, msgpack.packb((shape, dtype, buffer))))


@pytest.mark.parametrize(
    "tail, message",
    [
        (b"\x00", "byte {at}: whole 0; wanted array 2"),
        (b"garbage", "byte {at}: "),
        (_pair(("lm_head", "kernel"), _array((1,), "float32", bytes(4))), "key lm_head/kernel, which is at byte"),
        (
            _pair(("params", "lm_head", "kernel"), _array((1,), "float32", bytes(4))),
            "parameter lm_head/kernel for the sec",
        ),
        (_pair(("more",), _array((2,), "float32", bytes(4))), r"4 bytes of numbers; wanted 8 for float32\(2,\)"),
        (_pair(("more",), _array((1,), "int8", bytes(1))), "an array of 'int8'; wanted floating point"),
        (_pair(("more",), _array((1,), "float32", bytes(4), 3)), "extension type 3; wanted type 1"),
        (_pair(("more",), msgpack.packb(None)), "begins with 0xc0"),
        (_pair(("more",), msgpack.packb({"a": 1})), "map 1; wanted map 3"),
        (_pair(("more",), _array((1,), "float32", bytes(4)) + b"\0"), "an array up to byte .*; wanted one up to"),
        (_pair(("more",), _array((2**62, 2**62), "float32", bytes(4))), "4 bytes of numbers"),
        (_pair(("more",), _array((1,), "float32", bytes(4))), "tensor more is unknown"),
        (_pair(("opt_states",), msgpack.packb(1)), "whole 1; wanted an array"),
        (b"\x92\x91\xa1a\xc6\xff\xff\xff\xff", "4294967295 bytes up to .*; wanted them to end by"),
        (b"\x92\xdd\xff\xff\xff\xff", "array 4294967295; wanted array of at most 32"),
        (b"\x92\x91\xdb\xff\xff\xff\xff", "text 4294967295; wanted text of at most 255"),
        (b"\x92\x91\xa2\xff\xff", "wanted UTF-8"),
    ],
)
def test_easylm_damage_is_named_with_its_place(tmp_path, tail, message):
    path = write_easylm(tmp_path / "e", easylm_pairs(PLAIN, hf_tensors(PLAIN)), easylm_fields(PLAIN))
    at = path.stat().st_size
    path.write_bytes(path.read_bytes() + tail)
    with pytest.raises(ValueError, match=f"{path}: .*{message.format(at=at)}"):
        easylm.open_checkpoint(path)


# GGUF


@pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_gguf(tmp_path, tied, dtype):
    config, tensors = GROUPED.replace(tie_embeddings=tied), hf_tensors(GROUPED, dtype)
    if tied:
        del tensors["lm_head.weight"]
    path = write_gguf(tmp_path / "m.gguf", config, to_gguf(config, tensors))
    source = gguf_format.open_file(path)
    assert {tensor.dtype for tensor in source.tensors.values()} == {np.dtype(dtype)}
    for tensor in source.tensors.values():
        assert np.shares_memory(tensor.read(), tensor.read()) and not tensor.read().flags.writeable
    assert_holds(source, config, wanted_params(tmp_path, config, tensors))
    assert open_checkpoint(path.parent).config.dtypes.params == np.dtype(dtype).name
    assert open_checkpoint(path, window=5).config.window == 5
    assert source.tokenizer(tmp_path) == []


@pytest.mark.parametrize("tied", [False, True])
def test_gguf_computes_what_its_tensors_say(tmp_path, tied):
    tensors = hf_tensors(GROUPED)
    if tied:
        del tensors["lm_head.weight"]
    found = our_logits(gguf_format.open_file(write_gguf(tmp_path / "m.gguf", GROUPED, to_gguf(GROUPED, tensors))))
    np.testing.assert_allclose(found, adjacent_pair_logits(GROUPED, to_meta(GROUPED, tensors), TOKENS), atol=2e-5)


WIDE = ModelConfig(vocab_size=10, d_model=256, d_ff=512, n_layers=1, n_heads=4, n_kv_heads=2, window=16)


def _random_blocks(rng, rows, columns, type_bytes, block, scales):
    """Blocks of random bytes, but for the half-precision scales in them, which are small numbers."""
    out = rng.integers(0, 256, (rows, columns // block, type_bytes), np.uint8)
    for at in scales:
        small = rng.uniform(0.001, 0.01, out.shape[:2]).astype(np.float16)
        out[:, :, at : at + 2] = small[..., None].view(np.uint8)
    return out.reshape(rows, -1)


@pytest.mark.parametrize(
    "kind, block, size, scales",
    [
        ("Q8_0", 32, 34, [0]),
        ("Q4_0", 32, 18, [0]),
        ("Q4_1", 32, 20, [0, 2]),
        ("Q4_K", 256, 144, [0, 2]),
        ("Q6_K", 256, 210, [208]),
    ],
)
def test_gguf_quantised(tmp_path, kind, block, size, scales):
    gguf = pytest.importorskip("gguf")
    rng, type_ = np.random.default_rng(0), gguf.GGMLQuantizationType[kind]
    plain = to_gguf(WIDE, hf_tensors(WIDE))
    raw = {n: _random_blocks(rng, *w.shape, size, block, scales) for n, w in plain.items() if w.ndim == 2}
    path = write_gguf(tmp_path / "m.gguf", WIDE, plain | raw, types=dict.fromkeys(raw, type_))
    source = gguf_format.open_file(path)
    assert source.config == WIDE
    for name, w in plain.items():
        found = source.tensors[name].read()
        assert found.dtype == np.float32 == source.tensors[name].dtype and found.shape == w.shape
        wanted = gguf.dequantize(raw[name], type_) if name in raw else w
        np.testing.assert_array_equal(found, wanted)
        if kind == "Q8_0" and name in raw:
            blocks = raw[name].reshape(-1, 34)
            by_hand = blocks[:, :2].copy().view(np.float16).astype(np.float32) * blocks[:, 2:].view(np.int8)
            np.testing.assert_array_equal(found, by_hand.reshape(w.shape))
    assert len(layout.flatten(read_params(source))) == 12


def test_gguf_quantised_by_the_package_is_near(tmp_path):
    gguf = pytest.importorskip("gguf")
    plain = to_gguf(WIDE, hf_tensors(WIDE))
    type_ = gguf.GGMLQuantizationType.Q8_0
    raw = {name: gguf.quantize(w, type_) for name, w in plain.items() if w.ndim == 2}
    path = write_gguf(tmp_path / "m.gguf", WIDE, plain | raw, types=dict.fromkeys(raw, type_))
    wanted = adjacent_pair_logits(WIDE, to_meta(WIDE, hf_tensors(WIDE)), TOKENS)
    assert np.abs(our_logits(gguf_format.open_file(path)) - wanted).max() < 0.1 * np.abs(wanted).max()


def _field(kind, *args):
    return lambda writer: getattr(writer, f"add_{kind}")(*args)


@pytest.mark.parametrize(
    "change, message",
    [
        (_field("string", "llama.rope.scaling.type", "yarn"), "llama.rope.scaling.type is 'yarn'; wanted 'none'"),
        (_field("float32", "llama.rope.scaling.factor", 4.0), "llama.rope.scaling.factor is 4.0; wanted 1.0"),
        (_field("float32", "llama.rope.scale_linear", 4.0), "llama.rope.scale_linear is 4.0; wanted 1.0"),
        (_field("uint32", "llama.expert_count", 8), "llama.expert_count is 8; wanted none"),
        (_field("uint16", "split.count", 2), "split.count is 2; wanted a model in one file"),
        (_field("uint32", "llama.attention.key_length", 8), "dimension_count is 6; wanted the head size, 8"),
        (_field("uint32", "llama.attention.value_length", 8), "value_length is 8; wanted the head size, 6"),
        (_field("array", "llama.attention.head_count_kv", [2, 2]), "head_count_kv is .*; wanted a whole number"),
        (_field("array", "llama.expert_count", [0, 0]), r"llama.expert_count is array\(\[0, 0\].*; wanted none"),
        (_field("array", "llama.rope.scaling.factor", [1, 1]), "llama.rope.scaling.factor is array"),
        (_field("array", "tokenizer.ggml.model", [1, 1]), "tokenizer.ggml.model is array.*; wanted a text"),
        (_field("string", "tokenizer.ggml.bos_token_id", "1"), "bos_token_id is '1'; wanted a whole number"),
        (_field("uint32", "general.alignment", 3), "general.alignment is 3; wanted a power of two"),
    ],
)
def test_gguf_models_of_other_maths_are_refused(tmp_path, change, message):
    path = write_gguf(tmp_path / "m.gguf", PLAIN, to_gguf(PLAIN, hf_tensors(PLAIN)), change=change)
    with pytest.raises(ValueError, match=f"{path}: .*{message}"):
        gguf_format.open_file(path)


def test_gguf_tensors_of_other_models_are_refused(tmp_path):
    gguf = pytest.importorskip("gguf")
    tensors = to_gguf(PLAIN, hf_tensors(PLAIN))
    ones, norms = np.ones(3, np.float32), {"blk.0.attn_norm.weight": np.ones(24, np.int8)}
    source = gguf_format.open_file(write_gguf(tmp_path / "1.gguf", PLAIN, tensors | {"rope_freqs.weight": ones}))
    assert source.config == PLAIN
    q5 = gguf.GGMLQuantizationType.Q5_K
    for more, types, message in [
        ({"rope_freqs.weight": ones * 2}, {}, "tensor rope_freqs.weight is not all ones"),
        ({"blk.0.attn_q.bias": np.ones(24, np.float32)}, {}, "tensor blk.0.attn_q.bias is unknown"),
        (norms, {}, "tensor blk.0.attn_norm.weight is in I8; wanted F32, F16, BF16, Q8_0"),
        ({"output.weight": np.ones((14, 176), np.uint8)}, {"output.weight": q5}, "output.weight is in Q5_K; wanted"),
        ({"output.weight": np.ones((13, 24), np.float32)}, {}, r"output.weight is \(13, 24\); wanted \(14, 24\)"),
    ]:
        path = write_gguf(tmp_path / "2.gguf", PLAIN, tensors | more, types=types)
        with pytest.raises(ValueError, match=f"{path}: .*{message}"):
            gguf_format.open_file(path)
    del tensors["blk.1.ffn_up.weight"]
    with pytest.raises(ValueError, match="tensor missing: blk.1.ffn_up.weight"):
        gguf_format.open_file(write_gguf(tmp_path / "3.gguf", PLAIN, tensors))
    with pytest.raises(ValueError, match="general.architecture is 'gemma'; wanted 'llama'"):
        gguf_format.open_file(write_gguf(tmp_path / "4.gguf", PLAIN, tensors, arch="gemma"))


def test_gguf_says_which_package_it_needs(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf", PLAIN, to_gguf(PLAIN, hf_tensors(PLAIN)))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'fot-jax\[convert\]'"):
        gguf_format.open_file(path)


def test_gguf_tokenizer_gets_plain_values(tmp_path, monkeypatch):
    def change(writer):
        writer.add_tokenizer_model("llama")
        writer.add_token_list(["a", "b"])
        writer.add_token_scores([0.0, -1.5])
        writer.add_bos_token_id(0)
        writer.add_add_bos_token(True)

    path = write_gguf(tmp_path / "m.gguf", PLAIN, to_gguf(PLAIN, hf_tensors(PLAIN)), change=change)
    seen = {}
    monkeypatch.setattr("fot_jax.tokenizer.write_from_gguf", lambda to, fields: seen.update(fields) or ["x"])
    source = gguf_format.open_file(path)
    assert source.config.bos_id == 0
    assert source.tokenizer(tmp_path) == ["x"]
    wanted = {"tokens": ["a", "b"], "scores": [0.0, -1.5], "add_bos_token": True, "model": "llama"}
    assert {key: seen[f"tokenizer.ggml.{key}"] for key in wanted} == wanted


def _text(text: bytes, length=None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


def _gguf(n_tensors, n_values, body=b"", version=3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_values) + body


_ARCH = _text(b"general.architecture") + struct.pack("<I", 8) + _text(b"llama")


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "shorter than a GGUF header"),
        (b"GGUX" + bytes(60), "byte 0: b'GGUX'; wanted b'GGUF'"),
        (_gguf(0, 0, version=1), "byte 4: version 1; wanted 2 or 3"),
        (_gguf(0, 0, version=3 << 24), "version 50331648; wanted 2 or 3, little-endian"),
        (_gguf(2**60, 1, _ARCH), "there the file ends"),
        (_gguf(1, 2**60, _ARCH), "there the file ends"),
        (_gguf(0, 1, _text(b"x", 2**63)), "a name of 9223372036854775808 bytes; wanted at most 65535"),
        (_gguf(0, 1, _text(b"x") + struct.pack("<I", 8) + _text(b"", 2**62)), "a text of 4611686018427387904 bytes"),
        (_gguf(0, 1, _text(b"x") + struct.pack("<I", 13)), "a value of type 13; wanted one of 0 to 12"),
        (_gguf(0, 1, _text(b"x") + struct.pack("<IIQ", 9, 0, 2**60)), "a list of 1152921504606846976 values"),
        (_gguf(0, 1, _text(b"x") + struct.pack("<IIQ", 9, 8, 2**24)), "there the file ends"),
        (_gguf(0, 1, _text(b"x") + struct.pack("<IIQ", 9, 12, 2**24)), "a list of 134217728 bytes"),
        (_gguf(0, 1, _text(b"x") + struct.pack("<IIQ", 9, 9, 1)), "a list of 1 values of type 9"),
        (_gguf(0, 2, _ARCH + _ARCH), "key general.architecture for the second time"),
        (_gguf(0, 0), "general.architecture is missing; wanted a text"),
        (_gguf(1, 1, _ARCH + _text(b"t") + struct.pack("<I", 2**31)), "tensor t of 2147483648 dimensions"),
        (
            _gguf(1, 1, _ARCH + _text(b"t") + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0)),
            r"wanted them within the file",
        ),
        (_gguf(1, 1, _ARCH + _text(b"t") + struct.pack("<IQQIQ", 2, 32, 1, 0, 2**63)), r"wanted them within the file"),
        (_gguf(1, 1, _ARCH + _text(b"t") + struct.pack("<IQIQ", 1, 32, 99, 0)), "tensor t is in number type 99"),
        (_gguf(1, 1, _ARCH + _text(b"t") + struct.pack("<IQIQ", 1, 33, 8, 0)), "wanted rows of a multiple of 32"),
    ],
)
def test_gguf_hostile_headers(tmp_path, data, message):
    pytest.importorskip("gguf")
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    begin = time.monotonic()
    with pytest.raises(ValueError, match=f"{path}: .*{message}"):
        gguf_format.open_file(path)
    assert time.monotonic() - begin < 1 and tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


# Damage of any kind


def _write_each(kind: str, directory: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """(what is opened, the file that gets damaged)."""
    tensors = hf_tensors(PLAIN)
    if kind == "meta":
        write_meta(directory / "meta", PLAIN, tensors, parts=2)
        return directory / "meta", directory / "meta" / "consolidated.01.pth"
    if kind == "params.json":
        write_meta(directory / "json", PLAIN, tensors)
        return directory / "json", directory / "json" / "params.json"
    if kind == "easylm":
        path = write_easylm(directory / "easylm", easylm_pairs(PLAIN, tensors), easylm_fields(PLAIN))
        return path, path
    if kind == "metadata.pkl":
        path = write_easylm(directory / "pkl" / "params", easylm_pairs(PLAIN, tensors), easylm_fields(PLAIN))
        return path, path.parent / "metadata.pkl"
    path = write_gguf(directory / "m.gguf", PLAIN, to_gguf(PLAIN, tensors))
    return path, path


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    made = {}

    def get(kind):
        if kind not in made:
            opened, damaged = _write_each(kind, tmp_path_factory.mktemp("damage"))
            made[kind] = opened, damaged, damaged.read_bytes()
        return made[kind]

    return get


@st.composite
def _damage(draw):
    """A function of the whole file's bytes, and whether it only cuts."""
    kind = draw(st.sampled_from(["cut", "flip", "flip early", "replace", "random"]))
    if kind == "random":
        data = draw(st.binary(max_size=200))
        return lambda whole: data
    at = draw(st.floats(0, 1, exclude_max=True))
    if kind == "cut":
        return lambda whole: whole[: int(at * len(whole))]
    bit, junk = draw(st.integers(0, 7)), draw(st.binary(min_size=1, max_size=12))

    def change(whole):
        i = int(at * (len(whole) if kind != "flip early" else min(len(whole), 1500)))
        out = bytearray(whole)
        if kind == "replace":
            out[i : i + len(junk)] = junk
        else:
            out[i] ^= 1 << bit
        return bytes(out)

    return change


@pytest.mark.parametrize("kind", ["meta", "params.json", "easylm", "metadata.pkl", "gguf"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_refused_or_still_a_model(written, kind):
    pytest.importorskip({"meta": "torch", "params.json": "torch", "gguf": "gguf"}.get(kind, "numpy"))
    opened, damaged, whole = written(kind)
    opens = {"meta": meta.open_directory, "params.json": meta.open_directory, "gguf": gguf_format.open_file}
    slowest = 0.0

    @settings(max_examples=150)
    @given(_damage())
    def check(change):
        nonlocal slowest
        damaged.unlink(missing_ok=True)  # never into a file that is still mapped
        damaged.write_bytes(change(whole))
        begin = time.monotonic()
        try:
            source = opens.get(kind, easylm.open_checkpoint)(opened)
            params = layout.flatten(read_params(source))
        except (ValueError, FileNotFoundError) as error:
            assert str(opened) in str(error) or str(damaged) in str(error)
        else:
            # Numbers have no checksum, so a flipped bit may be one of theirs.
            assert {path: leaf.shape for path, leaf in params.items()} == layout.leaf_shapes(source.config)
        slowest = max(slowest, time.monotonic() - begin)

    tracemalloc.start()
    check()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert slowest < 5 and peak < 2**26


@pytest.mark.parametrize("kind", ["meta", "easylm", "gguf"])
def test_a_cut_file_is_refused_wherever_it_is_cut(written, kind):
    pytest.importorskip({"meta": "torch", "gguf": "gguf"}.get(kind, "numpy"))
    opened, damaged, whole = written(kind)
    opens = {"meta": meta.open_directory, "easylm": easylm.open_checkpoint, "gguf": gguf_format.open_file}
    # Behind the last tensor GGUF is padded.
    ends = {"gguf": len(whole) - 32}.get(kind, len(whole) - 1)
    for end in [*range(0, ends, max(1, ends // 60)), ends]:
        damaged.unlink(missing_ok=True)
        damaged.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=str(opened)):
            opens[kind](opened)
    damaged.unlink()
    damaged.write_bytes(whole)
    assert opens[kind](opened).config.d_model == PLAIN.d_model
