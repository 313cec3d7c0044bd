"""Damaged and hostile checkpoints: they are refused with a message that names the file, or read as what they say.

Bits of the weights themselves carry no checksum in Hugging Face's formats, so other numbers may come of them; nothing
else may. A few hundred cases here; `make nightly` runs thousands.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
import shutil
import signal

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from test_formats import random_params
from test_readers import easylm_fields, easylm_pairs, to_gguf, write_easylm, write_gguf, write_meta

from convert.__main__ import main
from fot_jax.config import ModelConfig
from fot_jax.formats import hf

CONFIG = ModelConfig(vocab_size=12, d_model=8, d_ff=12, n_layers=2, n_heads=2, window=16, mem_layers=(1,))
FEW = dict(deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same model in every layout whose package is there, by name."""
    directory = tmp_path_factory.mktemp("whole")
    params = random_params(CONFIG)
    hf.save(directory / "single", CONFIG, params)
    hf.save(directory / "sharded", CONFIG, params, max_shard_bytes=2000)
    tensors = load_file(directory / "single" / "model.safetensors")
    write_easylm(directory / "easylm" / "streaming_params", easylm_pairs(CONFIG, tensors), easylm_fields(CONFIG))
    with contextlib.suppress(pytest.skip.Exception):
        write_gguf(directory / "gguf" / "model.gguf", CONFIG, to_gguf(CONFIG, tensors))
    assert main([str(directory / "single"), str(directory / "ours"), "--to", "orbax"]) == 0
    with contextlib.suppress(ImportError):
        import torch

        (directory / "bin").mkdir()
        shutil.copy(directory / "single" / "config.json", directory / "bin")
        torch.save({name: torch.from_numpy(x) for name, x in tensors.items()}, directory / "bin" / "pytorch_model.bin")
        write_meta(directory / "meta", CONFIG, tensors, parts=2)
    return directory


def damaged(whole: pathlib.Path, tmp_path: pathlib.Path, layout: str) -> pathlib.Path:
    """A fresh copy to damage."""
    copy = tmp_path / "model"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(whole / layout, copy)
    return copy


@contextlib.contextmanager
def in_time(seconds: int = 60):
    """Fails where a few kilobytes take a reader for ever."""

    def late(number, frame):
        raise AssertionError(f"no answer after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check(model: pathlib.Path, whole: pathlib.Path | None = None) -> bool:
    """Converts; whether it was read, with the very numbers of `whole` where that is given. A refusal is one line that
    names a file of the model, and leaves nothing.
    """
    result = model.parent / "result"
    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()), in_time():
        status = main([str(model), str(result), "--to", "hf"])
    message = error.getvalue()
    if status == 0:
        entries = hf.open_directory(result).entries()
        wanted = {entry.name: tensor for entry, tensor in hf.open_directory(whole or result).entries()}
        for entry, tensor in entries:
            np.testing.assert_array_equal(tensor.read(), wanted[entry.name].read())
        shutil.rmtree(result)
    else:
        assert status == 2 and message.startswith("fot-convert: ") and message.count("\n") == 1, message
        assert str(model) in message, message
    assert [path.name for path in model.parent.iterdir()] == [model.name]
    return status == 0


def file_of(model: pathlib.Path, data: st.DataObject) -> pathlib.Path:
    files = sorted(path for path in model.rglob("*") if path.is_file())
    return data.draw(st.sampled_from(files))


def flip_or_cut(whole, tmp_path, layout, data):
    model = damaged(whole, tmp_path, layout)
    path = file_of(model, data)
    content = bytearray(path.read_bytes())
    how = data.draw(st.sampled_from(["flip", "cut", "overwrite", "delete", "insert"]))
    if how == "delete":
        path.unlink()
    elif how == "cut":
        os.truncate(path, data.draw(st.integers(0, max(len(content) - 1, 0))))
    else:
        # Most of a file is weights; what matters lies at its ends.
        place = st.one_of(st.integers(0, 300), st.integers(-300, -1), st.integers(0, len(content)))
        at = data.draw(place.filter(lambda i: -len(content) <= i < len(content))) if content else 0
        if how == "flip" and content:
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        elif how == "insert":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=20))
        else:
            new = data.draw(st.binary(min_size=1, max_size=20))
            content[at : at + len(new)] = new
        path.write_bytes(bytes(content))
    # Our own checkpoints have sums of their bits: other numbers cannot come of them, but of another description.
    check(model, whole / "single" if layout == "ours" and path.name != "model.json" else None)


LAYOUTS = ("single", "sharded", "bin", "ours", "meta", "easylm", "gguf")


@pytest.mark.parametrize("number", [40, pytest.param(1500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_damaged_files(whole, tmp_path, layout, number):
    if not (whole / layout).exists():
        pytest.skip("the package that reads it is not installed")
    run = given(st.data())(lambda data: flip_or_cut(whole, tmp_path, layout, data))
    settings(max_examples=number, **FEW)(run)()


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([-1, 0, 1, 2, 3, 2**63]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


def wrong_json(whole, tmp_path, layout, file, field, value):
    model = damaged(whole, tmp_path, layout)
    fields = json.loads((model / file).read_text())
    at = fields if field in fields else fields.get("weight_map", fields)
    if field is None:
        fields = value
    else:
        at[field] = value
    (model / file).write_text(json.dumps(fields))
    check(model)


CONFIG_FIELDS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "max_position_embeddings rope_theta rope_scaling rope_parameters rms_norm_eps tie_word_embeddings mem_layers "
    "mem_dtype mem_positionals qk_norm last_context_length bos_token_id eos_token_id pad_token_id torch_dtype "
    "model_type hidden_act attention_bias initializer_range"
).split()
FILES = [
    ("single", "config.json", CONFIG_FIELDS),
    ("ours", "model.json", ["n_layers", "mem_layers", "dtypes", "window"]),
]


@pytest.mark.parametrize("number", [80, pytest.param(3000, marks=pytest.mark.slow)])
def test_wrong_values_in_configurations(whole, tmp_path, number):
    @settings(max_examples=number, **FEW)
    @given(place=st.sampled_from(FILES), data=st.data(), value=VALUES)
    def run(place, data, value):
        layout, file, fields = place
        wrong_json(whole, tmp_path, layout, file, data.draw(st.sampled_from([None, *fields])), value)

    run()


@pytest.mark.parametrize("number", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_hostile_indices(whole, tmp_path, number):
    names = json.loads((whole / "sharded" / "model.safetensors.index.json").read_text())["weight_map"]
    targets = st.one_of(
        VALUES,
        st.sampled_from(
            ["../single/model.safetensors", "/etc/passwd", "config.json", ".", "model.safetensors.index.json"]
        ),
    )

    @settings(max_examples=number, **FEW)
    @given(name=st.sampled_from([*names, "weight_map", "metadata"]) | st.text(max_size=5), value=targets)
    def run(name, value):
        wrong_json(whole, tmp_path, "sharded", "model.safetensors.index.json", name, value)

    run()


def test_what_is_whole_is_read(whole, tmp_path):
    for layout in LAYOUTS:
        if (whole / layout).exists():
            assert check(damaged(whole, tmp_path, layout)), layout
