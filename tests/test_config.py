from __future__ import annotations

import json

import pytest

from fot_jax import config as config_lib
from fot_jax.config import DtypePolicy, ModelConfig, Segment
from fot_jax.formats import layout

TINY = ModelConfig(vocab_size=97, d_model=32, d_ff=88, n_layers=4, n_heads=4, window=32, mem_layers=(1, 3))


@pytest.mark.parametrize("size", config_lib.SIZES)
def test_segments_cover_the_layers_in_order(size):
    config = config_lib.named(size)
    layers = []
    for segment in config.segments:
        layers += ([False] * segment.plain + [True] * segment.memory) * segment.repeats
    assert tuple(i for i, memory in enumerate(layers) if memory) == config.mem_layers
    assert len(layers) == config.n_layers == sum(segment.n_layers for segment in config.segments)


@pytest.mark.parametrize(
    ("n_layers", "mem_layers", "segments"),
    [
        (26, (), [(26, False, 1)]),
        (26, (6, 12, 18), [(1, False, 1), (5, True, 3), (7, False, 1)]),
        (32, (8, 16, 24), [(1, False, 1), (7, True, 3), (7, False, 1)]),
        (12, (8,), [(8, True, 1), (3, False, 1)]),
        (4, (1, 3), [(1, True, 2)]),
        (3, (0, 1, 2), [(0, True, 3)]),
        (6, (0, 3), [(0, True, 1), (2, True, 1), (2, False, 1)]),
        (11, (2, 3, 10), [(2, False, 1), (0, True, 2), (6, True, 1)]),
    ],
)
def test_segments(n_layers, mem_layers, segments):
    config = TINY.replace(n_layers=n_layers, mem_layers=mem_layers)
    assert config.segments == tuple(Segment(*segment) for segment in segments)


@pytest.mark.parametrize(
    ("size", "count"),
    [
        # The published checkpoints' own counts.
        ("open_llama_3b", 3_426_473_600),
        ("open_llama_3b_v2", 3_426_473_600),
        ("longllama_3b", 3_426_473_600),
        ("longllama_3b_v1_1", 3_426_473_600),
        ("open_llama_7b", 6_738_415_616),
        ("open_llama_7b_v2", 6_738_415_616),
        ("longllama_7b", 6_738_415_616),
        ("longllama_code_7b", 6_738_546_688),
        ("open_llama_13b", 13_015_864_320),
    ],
)
def test_parameter_counts_of_published_checkpoints(size, count):
    assert layout.count_params(config_lib.named(size)) == count


@pytest.mark.parametrize(
    ("size", "count", "with_embedding"),
    [("fot_37m", 37e6, True), ("fot_184m", 184e6, True), ("fot_600m", 600e6, False), ("fot_1_2b", 1.2e9, False)],
)
def test_parameter_counts_of_the_papers_small_models(size, count, with_embedding):
    config = config_lib.named(size)
    found = layout.count_params(config) - (0 if with_embedding else config.vocab_size * config.d_model)
    assert abs(found / count - 1) < 0.025


def test_every_memory_model_reads_the_papers_layers():
    for size, config in config_lib.SIZES.items():
        if size.startswith("open_llama"):
            wanted = ()
        elif size.startswith("fot"):
            wanted = (8,)
        else:
            wanted = (6, 12, 18) if "3b" in size else (8, 16, 24)
        assert config.mem_layers == wanted


@pytest.mark.parametrize("size", config_lib.SIZES)
def test_hugging_face_round_trip_keeps_everything_but_the_compute_dtype(size):
    config = config_lib.named(size)
    fields = json.loads(json.dumps(config_lib.to_hf(config)))
    assert config_lib.from_hf(fields).replace(dtypes=config.dtypes) == config
    assert config_lib.from_hf(fields).dtypes == DtypePolicy("float32", "float32", "bfloat16")


def test_from_hf_defaults_are_llamas():
    fields = dict(
        model_type="llama",
        vocab_size=97,
        hidden_size=32,
        intermediate_size=88,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
    )
    config = config_lib.from_hf({**fields, "num_key_value_heads": None, "rope_theta": None, "head_dim": None})
    assert config == config_lib.from_hf(fields)
    assert (config.n_kv_heads, config.head_size, config.rope_base, config.norm_eps) == (4, 8, 10000.0, 1e-6)
    assert not config.tie_embeddings and config.mem_layers == ()
    assert config_lib.from_hf({**fields, "eos_token_id": None}).eos_id is None
    assert config_lib.from_hf({**fields, "eos_token_id": [5]}).eos_id == 5
    assert config_lib.from_hf({**fields, "eos_token_id": []}).eos_id is None
    several = config_lib.from_hf({**fields, "eos_token_id": [5, 6]})
    assert several.eos_ids == (5, 6) and config_lib.to_hf(several)["eos_token_id"] == [5, 6]
    rotary = {"rope_type": "default", "rope_theta": 1e6}
    assert config_lib.from_hf({**fields, "rope_parameters": rotary}).rope_base == 1e6
    assert config_lib.from_hf({**fields, "rope_parameters": rotary, "rope_theta": 1e6}).rope_base == 1e6
    for name in ("dtype", "torch_dtype"):
        assert config_lib.from_hf({**fields, name: "torch.bfloat16"}).dtypes == DtypePolicy(*["bfloat16"] * 3)
    assert config_lib.from_hf({**fields, "model_type": "longllama"}).mem_dtype == "bfloat16"


def test_a_padding_token_that_pytorch_refuses_is_left_out():
    for pad_id, written in ((96, 96), (97, None), (None, None)):
        for to in (config_lib.to_hf, config_lib.to_hf_llama):
            assert to(TINY.replace(pad_id=pad_id))["pad_token_id"] == written


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model_type="mistral"), "model_type is 'mistral'; wanted 'llama' or 'longllama'"),
        (dict(attention_bias=True), "attention_bias is True; wanted False"),
        (dict(mlp_bias=True), "mlp_bias is True"),
        (dict(hidden_act="gelu"), "hidden_act is 'gelu'; wanted 'silu'"),
        (dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "rope_scaling is .*llama3"),
        (dict(rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling is .*linear"),
        (dict(hidden_size="32"), "hidden_size is '32'; wanted a whole number"),
        (dict(torch_dtype="int8"), "config.json: torch_dtype is 'int8'; wanted one of float32"),
        (dict(mem_layers=[4]), r"mem_layers has 4; wanted layers in 0..3"),
        (dict(vocab_size=0), "vocab_size is 0; wanted at least 1"),
        (dict(num_key_value_heads=-2), "n_kv_heads is -2; wanted at least 1"),
        (dict(head_dim=-6), "head_size is -6; wanted at least 1"),
        (dict(mem_layers="1"), "mem_layers is '1'; wanted a list of whole numbers"),
        (dict(rope_theta="x"), "rope_base is 'x'; wanted a number"),
        (
            dict(rope_parameters={"rope_theta": 1e6}),
            "rope_parameters.rope_theta is 1000000.0; wanted that of rope_theta, 10000.0",
        ),
        (dict(rope_scaling={"type": "default", "rope_theta": 1.0}), "rope_scaling.rope_theta is 1.0; wanted that of"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5; wanted 1"),
        (dict(rope_parameters={"partial_rotary_factor": 0.5}), "rope_parameters.partial_rotary_factor is 0.5"),
        (dict(dtype="auto"), "config.json: dtype is 'auto'; wanted one of float32"),
        (dict(mem_dtype="float64"), "config.json: mem_dtype is 'float64'; wanted one of float32"),
    ],
)
def test_from_hf_refuses_what_it_cannot_do(change, message):
    with pytest.raises(ValueError, match=message):
        config_lib.from_hf({**config_lib.to_hf(TINY), **change})


def test_from_hf_names_missing_fields():
    fields = config_lib.to_hf(TINY)
    del fields["vocab_size"], fields["hidden_size"]
    with pytest.raises(ValueError, match="config.json: vocab_size, hidden_size missing"):
        config_lib.from_hf(fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(mem_layers=(-1,)), "mem_layers has -1"),
        (dict(mem_layers=(1, 4)), "mem_layers has 4; wanted layers in 0..3"),
        (dict(n_kv_heads=3), "n_heads is 4; wanted a multiple of n_kv_heads, 3"),
        (dict(n_heads=5, n_kv_heads=0, head_size=0), "d_model is 32; wanted a multiple of n_heads, 5"),
        (dict(head_size=7), "head_size is 7; wanted an even number"),
        (dict(n_layers=0), "n_layers is 0; wanted at least 1"),
        (dict(window=0), "window is 0; wanted at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TINY.replace(**change)


def test_sizes_are_completed():
    assert (TINY.n_kv_heads, TINY.head_size, TINY.last_context_length) == (4, 8, 32)
    assert TINY.replace(mem_layers=(3, 1, 3)).mem_layers == (1, 3)
    assert TINY == TINY.replace() and hash(TINY) == hash(TINY.replace())


def test_named_lists_the_known_sizes():
    with pytest.raises(ValueError, match="model size is 'llama'; wanted one of fot_184m, .*open_llama_7b_v2"):
        config_lib.named("llama")
