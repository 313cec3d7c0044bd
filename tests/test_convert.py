from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import toy
from safetensors.numpy import load_file, save_file
from test_formats import GROUPED, PLAIN, TIED, assert_same, random_params
from test_readers import hf_tensors, to_gguf, write_gguf

import fot_jax
from convert import plan as planning
from convert import writers
from convert.__main__ import main
from fot_jax import files, formats, model, run_config, training
from fot_jax.config import DtypePolicy
from fot_jax.formats import hf

ROOT = pathlib.Path(__file__).parent.parent
LONG = PLAIN.replace(n_layers=7, mem_layers=(2, 4), n_heads=2, rope_base=5e5, vocab_size=13, eos_id=None)


@pytest.fixture
def saved(tmp_path):
    """Writes a model's random parameters as a Hugging Face directory; its path and the parameters."""

    def save(config, dtype="float32", max_shard_bytes=hf.MAX_SHARD_BYTES, name="source"):
        config = config.replace(dtypes=DtypePolicy(dtype, dtype, "bfloat16"))
        params = random_params(config, dtype)
        hf.save(tmp_path / name, config, params, max_shard_bytes)
        return tmp_path / name, params

    return save


def convert(*args, fails=0):
    assert main([str(arg) for arg in args]) == fails


def tensors_of(directory):
    return {
        name: (x.dtype, x.tobytes()) for file in directory.glob("*.safetensors") for name, x in load_file(file).items()
    }


def names(directory):
    return sorted(path.name for path in directory.iterdir())


# There and back


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_hugging_face_to_orbax_and_back_is_bit_for_bit(tmp_path, saved, dtype):
    source, params = saved(LONG, dtype, max_shard_bytes=3000)
    (source / "tokenizer.model").write_bytes(b"a tokenizer")
    for name in ("tokenizer_config.json", "generation_config.json"):
        (source / name).write_text("{}")
    convert(source, tmp_path / "ours", "--to", "orbax")
    convert(tmp_path / "ours", tmp_path / "back", "--to", "hf", "--verify")
    assert tensors_of(tmp_path / "back") == tensors_of(source)
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads((source / "config.json").read_text())
    for directory in (tmp_path / "ours", tmp_path / "back"):
        assert (directory / "tokenizer.model").read_bytes() == b"a tokenizer"
        assert (directory / "tokenizer_config.json").is_file() and (directory / "generation_config.json").is_file()
    config, found = fot_jax.load_pretrained(tmp_path / "ours", dtype=None)
    assert config == LONG.replace(dtypes=DtypePolicy(dtype, dtype, "bfloat16"))
    assert_same(found, params)
    assert names(tmp_path) == ["back", "ours", "source"]


def test_dtypes_of_single_tensors_are_kept(tmp_path, saved):
    source, _ = saved(PLAIN, "bfloat16")
    tensors = load_file(source / "model.safetensors")
    for name, x in tensors.items():  # norms in float32, as many checkpoints have them; one layer's in float16
        if "norm" in name:
            tensors[name] = x.astype(np.float16 if "layers.1.input" in name else np.float32)
    save_file(tensors, source / "model.safetensors")
    convert(source, tmp_path / "again", "--to", "hf")
    assert tensors_of(tmp_path / "again") == tensors_of(source)
    convert(source, tmp_path / "ours", "--to", "orbax")
    opened = formats.open_checkpoint(tmp_path / "ours")
    found = {entry.part: tensor.dtype for entry, tensor in opened.entries()}
    assert found["attention/q"] == ml_dtypes.bfloat16
    # a stack has one dtype, which holds both layers' numbers
    assert found["norm/scale"] == found["attention_norm/scale"] == np.float32


def test_the_model_of_transformers_has_our_logits(tmp_path, saved):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    for config in (GROUPED.replace(d_model=12), TIED.replace(d_model=12, qk_norm=False, mem_positionals=True)):
        source, params = saved(config)
        # Weights of a trained model's size: with those of deviation 1 softmax turns rounding into differences.
        params = jax.tree.map(lambda x: x * np.float32(0.3), params)
        hf.save(source, config, params)
        convert(source, tmp_path / "ours", "--to", "orbax")
        convert(tmp_path / "ours", tmp_path / "llama", "--to", "hf-llama", "--verify")
        llama, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "llama", output_loading_info=True)
        assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 16))
        with torch.no_grad():
            wanted = llama(torch.from_numpy(tokens)).logits.numpy()
        found = model.logits(config, params, model.forward(config, params, jnp.asarray(tokens, jnp.int32)))
        np.testing.assert_allclose(found, wanted, atol=1e-4)
        for directory in ("source", "ours", "llama"):
            shutil.rmtree(tmp_path / directory)


def test_a_llama_becomes_a_longllama_that_training_starts_from(tmp_path, saved):
    source, params = saved(PLAIN)
    convert(source, tmp_path / "ours", "--to", "orbax", "--memory-layers", "1", "--memory-dtype", "float16")
    config, found = fot_jax.load_pretrained(tmp_path / "ours")
    assert config == PLAIN.replace(mem_layers=(1,), dtypes=DtypePolicy(memory="float16"))
    np.testing.assert_array_equal(
        found["segment_0"]["memory"]["mlp"]["up"][0], params["segment_0"]["plain"]["mlp"]["up"][0, 1]
    )
    start = run_config.starting_params(tmp_path / "ours", PLAIN)
    assert_same(start, params)
    convert(tmp_path / "ours", tmp_path / "plain", "--to", "hf", "--memory-layers", "none")
    assert tensors_of(tmp_path / "plain") == tensors_of(source)
    convert(source, tmp_path / "x", "--to", "orbax", "--memory-layers", "3", fails=2)
    with pytest.raises(fot_jax.checkpoint.CheckpointError, match="parameters alone.* wanted --config.init_from=.*ours"):
        training.check(toy.config(), tmp_path / "ours")


def test_memory_layers_that_make_another_model_of_it_are_said_to(tmp_path, saved, capsys):
    source, params = saved(LONG.replace(mem_positionals=False))
    convert(source, tmp_path / "x", "--to", "hf-llama", "--memory-layers", "none", fails=2)
    assert "mem_positionals is False; wanted True: LLaMA rotates" in capsys.readouterr().err
    convert(source, tmp_path / "other", "--to", "hf", "--memory-layers", "3", "--verify")
    assert "this is another model until it is tuned" in capsys.readouterr().out
    convert(source, tmp_path / "same", "--to", "hf", "--memory-layers", "2,4", "--verify")
    assert "another model" not in capsys.readouterr().out
    rotated, _ = saved(LONG, name="rotated")
    convert(rotated, tmp_path / "x", "--to", "hf-llama", "--memory-layers", "3", fails=2)
    assert "hf-llama has no memory" in capsys.readouterr().err
    convert(rotated, tmp_path / "llama", "--to", "hf-llama", "--memory-layers", "none", "--verify")


def test_a_padding_token_beyond_the_vocabulary_is_left_out_for_pytorch(tmp_path, saved, capsys):
    source, _ = saved(PLAIN)
    fields = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**fields, "pad_token_id": 11, "eos_token_id": [3, 4]}))
    for to, pad_id in (("orbax", 11), ("hf", None), ("hf-llama", None)):
        convert(source, tmp_path / to, "--to", to, "--verify")
        assert ("padding token 11 is left out" in capsys.readouterr().out) == (pad_id is None)
        found = formats.open_checkpoint(tmp_path / to).config
        assert (found.pad_id, found.eos_ids) == (pad_id, (3, 4))


def test_what_is_asked_of_memory_does_not_depend_on_the_format(tmp_path, saved):
    """A LLaMA says nothing of memory's dtype: it follows the parameters', whatever they are read from or into."""
    source, _ = saved(PLAIN, "float16")
    fields = {**fot_jax.config.to_hf_llama(PLAIN), "torch_dtype": "float16"}
    (source / "config.json").write_text(json.dumps(fields))
    opened = formats.open_checkpoint(source)
    assert opened.config.pad_id == PLAIN.pad_id
    for name in ("torch_dtype", "pad_token_id"):  # without them, what the tensors have, and none
        del fields[name]
    (source / "config.json").write_text(json.dumps(fields))
    opened = formats.open_checkpoint(source)
    assert opened.config.pad_id is None
    assert not opened.states_memory_dtype and opened.config.dtypes == DtypePolicy(*["float16"] * 3)
    assert fot_jax.load_pretrained(source)[0].dtypes == DtypePolicy(*["float32"] * 3)
    for dtype, memory in (("bfloat16", "bfloat16"), (None, "float16")):
        options = [] if dtype is None else ["--dtype", dtype]
        convert(source, tmp_path / memory, "--to", "orbax", *options)
        assert fot_jax.load_pretrained(tmp_path / memory)[0].mem_dtype == memory


def test_heads_are_expanded_for_the_published_code(tmp_path, saved, capsys):
    config = GROUPED.replace(head_size=4, n_heads=4, n_kv_heads=2, d_model=16)
    source, params = saved(config)
    convert(source, tmp_path / "x", "--to", "hf", fails=2)
    assert "n_kv_heads is 2 for 4 query heads; the published LongLLaMA code knows no" in capsys.readouterr().err
    convert(source, tmp_path / "hf", "--to", "hf", "--expand-kv-heads", "--verify")
    wide, found = fot_jax.load_pretrained(tmp_path / "hf")
    assert wide.n_kv_heads == 4 and json.loads((tmp_path / "hf/config.json").read_text())["num_key_value_heads"] == 4
    tokens = jnp.arange(16, dtype=jnp.int32).reshape(1, 16) % config.vocab_size
    logits = lambda config, params: fot_jax.long_forward(config, params, tokens, last_context_length=4)
    wanted = logits(config.replace(dtypes=wide.dtypes), params)
    np.testing.assert_allclose(logits(wide, found), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "to", "message"),
    [
        (TIED, "hf-llama", "qk_norm is True; wanted False"),
        (PLAIN.replace(qk_norm=True), "hf", "qk_norm is True; the published"),
        (LONG.replace(mem_positionals=False), "hf-llama", "mem_positionals is False; wanted True"),
        (GROUPED, "hf-llama", "d_model is 8; wanted a multiple of n_heads, 6"),
        (PLAIN.replace(head_size=6), "hf", "head_size is 6; the published LongLLaMA code wanted d_model / n_heads"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(tmp_path, saved, capsys, config, to, message):
    convert(saved(config)[0], tmp_path / "x", "--to", to, fails=2)
    assert message in capsys.readouterr().err
    assert names(tmp_path) == ["source"]


# Number formats


def test_casting_rounds_and_never_overflows(tmp_path, saved, capsys):
    source, params = saved(PLAIN)
    convert(source, tmp_path / "half", "--to", "orbax", "--dtype", "bfloat16", "--verify")
    config, found = fot_jax.load_pretrained(tmp_path / "half", dtype=None)
    assert config.dtypes == DtypePolicy("bfloat16", "bfloat16", "bfloat16")
    assert_same(found, jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), params))

    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    for value in (1e6, -np.inf):
        tensors[name][3, 4] = value
        save_file(tensors, source / "model.safetensors")
        convert(source, tmp_path / "x", "--to", "hf", "--dtype", "float16", fails=2 if value > 0 else 0)
    assert f"tensor {name} holds 1000000.0, beyond float16, whose greatest number is 65504" in capsys.readouterr().err


# Plan and verification


def test_a_plan_reads_no_weights(tmp_path, saved, capsys):
    source, _ = saved(LONG, "bfloat16")
    opened = formats.open_checkpoint(source)

    def read():
        raise AssertionError("weights are read")

    closed = {name: dataclasses.replace(tensor, read=read) for name, tensor in opened.tensors.items()}
    plan = planning.make_plan(dataclasses.replace(opened, tensors=closed), "orbax", dtype="float32")
    n = formats.layout.count_params(LONG)
    assert plan.summary()["source_bytes"] == {"bfloat16": 2 * n} and plan.nbytes == 4 * n
    assert f"{n:,} in 66 tensors" in plan.table()

    convert(source, "--to", "orbax", "--plan", "--json", tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["plan"]["parameters"] == n
    assert "memory layers  2, 4" in capsys.readouterr().out
    assert names(tmp_path) == ["plan.json", "source"]


def test_verification_finds_one_changed_number(tmp_path, saved, monkeypatch, capsys):
    source, _ = saved(PLAIN)
    write = writers.write

    def write_another(plan, directory, progress):
        out = write(plan, directory, progress)
        tensors = load_file(directory / "model.safetensors")
        tensors["model.layers.2.self_attn.o_proj.weight"][1, 2] += 0.5
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return out

    monkeypatch.setattr(writers, "write", write_another)
    convert(source, tmp_path / "x", "--to", "hf", "--verify", "--json", tmp_path / "r.json", fails=1)
    printed = capsys.readouterr()
    assert "greatest difference 0.5, in model.layers.2.self_attn.o_proj.weight" in printed.out
    assert "x is not written" in printed.err
    found = json.loads((tmp_path / "r.json").read_text())["verify"]
    assert not found["passed"] and found["logit_difference"] > 1e-4 * found["largest_logit"]
    assert names(tmp_path) == ["r.json", "source"]


def test_numbers_that_are_not_finite_are_not_verified(tmp_path, saved, capsys):
    source, _ = saved(PLAIN)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = np.nan
    save_file(tensors, source / "model.safetensors")
    convert(source, tmp_path / "x", "--to", "hf", "--verify", fails=1)
    assert "verified       NO" in capsys.readouterr().out


def test_a_model_that_computes_in_another_dtype_is_verified(tmp_path):
    config = PLAIN.replace(mem_positionals=False, dtypes=DtypePolicy("float32", "bfloat16", "bfloat16"))
    params = jax.tree.map(jnp.asarray, random_params(config))
    run = fot_jax.checkpoint.Checkpoints(tmp_path / "w", config, save_every=1, keep_last=1)
    run.save(1, params, {"step": jnp.int32(1)}, {}, {})
    run.close()
    for to in planning.TARGETS:
        convert(tmp_path / "w", tmp_path / to, "--to", to, "--verify")


def test_verification_reads_the_configuration_too(tmp_path, saved, monkeypatch, capsys):
    source, _ = saved(LONG)
    write_config = hf.write_config
    monkeypatch.setattr(hf, "write_config", lambda to, fields: write_config(to, {**fields, "mem_layers": [3]}))
    convert(source, tmp_path / "x", "--to", "hf", "--verify", fails=1)
    assert "configuration  mem_layers is (3,), wanted (2, 4)" in capsys.readouterr().out


def test_rounding_does_not_hide_a_tensor_that_is_read_wrongly(tmp_path, saved, monkeypatch, capsys):
    pytest.importorskip("transformers")
    source, _ = saved(PLAIN)
    to_ours = formats.layout.Entry.to_ours
    turned = lambda entry, x: to_ours(entry, x[::-1] if entry.name.endswith("1.self_attn.q_proj.weight") else x)
    monkeypatch.setattr(formats.layout.Entry, "to_ours", turned)
    convert(source, tmp_path / "x", "--to", "hf", "--dtype", "bfloat16", "--verify", "--tolerance", "10", fails=1)
    assert "verified       NO" in capsys.readouterr().out


# Nothing half-written


def test_a_destination_that_is_there_is_kept_unless_told_otherwise(tmp_path, saved, capsys):
    source, params = saved(PLAIN)
    other, _ = saved(LONG, name="other")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "kept").write_text("")
    convert(source, tmp_path / "there", "--to", "orbax", fails=2)
    assert "there is there; wanted a new directory, or --overwrite" in capsys.readouterr().err
    assert names(tmp_path / "there") == ["kept"]
    for before in (other, source):
        convert(before, tmp_path / "there", "--to", "orbax", "--overwrite")
    assert_same(fot_jax.load_pretrained(tmp_path / "there")[1], params)
    assert names(tmp_path) == ["other", "source", "there"]
    convert(source, source, "--to", "hf", "--overwrite", fails=2)
    assert "holds the source" in capsys.readouterr().err
    convert(tmp_path / "there", tmp_path / "there" / "checkpoints", "--to", "hf", "--overwrite", fails=2)
    assert "holds the source" in capsys.readouterr().err
    (tmp_path / "links").mkdir()
    for file in source.iterdir():
        (tmp_path / "links" / file.name).symlink_to(file)
    convert(tmp_path / "links", source, "--to", "hf", "--overwrite", fails=2)
    assert "holds the source" in capsys.readouterr().err


def test_a_destination_that_appears_meanwhile_is_kept(tmp_path, saved, monkeypatch, capsys):
    source, _ = saved(PLAIN)
    write = writers.write

    def slow(plan, directory, progress):
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "kept").write_text("")
        return write(plan, directory, progress)

    monkeypatch.setattr(writers, "write", slow)
    convert(source, tmp_path / "x", "--to", "hf", fails=2)
    assert "x is there now; wanted a new directory" in capsys.readouterr().err
    assert names(tmp_path / "x") == ["kept"] and names(tmp_path) == ["source", "x"]


@pytest.mark.parametrize("last", [1, 2])
@pytest.mark.parametrize("done", [False, True])
def test_overwriting_keeps_the_old_or_has_the_new(tmp_path, monkeypatch, last, done):
    """Interrupted just before or after each of the two renames."""
    rename, calls = pathlib.Path.rename, []

    def interrupted(self, target):
        calls.append(target)
        if len(calls) != last:
            return rename(self, target)
        if done:
            rename(self, target)
        raise KeyboardInterrupt

    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "old").write_text("")
    monkeypatch.setattr(pathlib.Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), files.beside(tmp_path / "there") as partial:
        (partial / "new").write_text("")
        files.put_in_place(partial, tmp_path / "there", replace=True)
    assert names(tmp_path / "there") == (["new"] if (last, done) == (2, True) else ["old"])


@pytest.mark.parametrize("to", planning.TARGETS)
def test_a_full_disk_leaves_nothing(tmp_path, saved, to, capsys):
    """A limit on the size of files stands for the disk: the system refuses the write in the same place."""
    source, _ = saved(PLAIN.replace(vocab_size=400))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        convert(source, tmp_path / "x", "--to", to, fails=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot be written" in capsys.readouterr().err
    assert names(tmp_path) == ["source"]


def test_no_room_is_said_before_the_work(tmp_path, saved, monkeypatch, capsys):
    source, _ = saved(PLAIN)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    monkeypatch.setattr(writers, "write", None)
    convert(source, tmp_path / "deep" / "x", "--to", "orbax", fails=2)
    assert "bytes, the disk has 10; wanted more room" in capsys.readouterr().err
    assert names(tmp_path) == ["source"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_an_interruption_leaves_nothing(tmp_path, saved, monkeypatch, capsys, number):
    source, _ = saved(PLAIN)
    write = writers.write
    # A process that a shell put in the background ignores SIGINT, one under nohup SIGHUP; the tests may be either.
    before = signal.signal(number, signal.default_int_handler)

    def interrupted(plan, directory, progress):
        def stop(nbytes):
            progress(nbytes)
            os.kill(os.getpid(), number)

        return write(plan, directory, stop)

    monkeypatch.setattr(writers, "write", interrupted)
    try:
        convert(source, tmp_path / "made" / "for" / "x", "--to", "orbax", fails=2)
    finally:
        signal.signal(number, before)
    assert "interrupted; DST is what it was, or complete" in capsys.readouterr().err
    assert names(tmp_path) == ["source"]


BIG = PLAIN.replace(vocab_size=64, d_model=256, d_ff=1024, n_layers=96, n_heads=4, n_kv_heads=4, head_size=64)


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """A model of many layers, all alike."""
    directory = tmp_path_factory.mktemp("big") / "source"
    directory.mkdir()
    tensors = {e.name: (e.their_shape, np.float32) for e in formats.layout.table(hf.LAYOUT, BIG)}
    writer = hf.Writer(directory, tensors)
    for i, (name, (shape, _)) in enumerate(tensors.items()):
        writer.write(name, np.full(shape, i, np.float32))
    writer.close()
    hf.write_config(directory, fot_jax.config.to_hf(BIG))
    return directory


def run(*args, **options):
    command = [sys.executable, "-m", "convert", *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options)


def test_memory_needed_does_not_grow_with_the_model(tmp_path, big):
    """The largest stacked array has 100 MB, the model 400; Python and its modules take some 150 MB."""
    peaks = []
    for source, destination, to in ((big, "ours", "orbax"), (tmp_path / "ours", "back", "hf")):
        process = run(source, tmp_path / destination, "--to", to)
        peak = 0
        while process.poll() is None:
            status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
            peak = max([peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))])
            time.sleep(0.01)
        assert process.returncode == 0, process.communicate()
        peaks.append(peak // 1024)
    assert peaks[0] < 220 and peaks[1] < 320, peaks
    tensors = hf.open_directory(tmp_path / "back").tensors
    for i, entry in enumerate(formats.layout.table(hf.LAYOUT, BIG)):
        assert (tensors[entry.name].read() == i).all()


def test_a_killed_conversion_never_looks_complete(tmp_path, big):
    process = run(big, tmp_path / "x", "--to", "orbax")
    while not any(tmp_path.glob(".x.partial-*/params/*/c")):
        assert process.poll() is None, process.communicate()
    process.kill()
    process.communicate()
    assert not (tmp_path / "x").exists()
    (left,) = tmp_path.iterdir()
    with pytest.raises((FileNotFoundError, ValueError)):
        fot_jax.load_pretrained(left)
    process = run(big, tmp_path / "x", "--to", "orbax", "--plan")
    assert "left over" in process.communicate()[0]


def test_no_accelerator_is_initialised(tmp_path, saved):
    source, _ = saved(PLAIN)
    code = f"""
from convert.__main__ import main
status = main([{str(source)!r}, {str(tmp_path / "x")!r}, "--to", "orbax", "--verify"])
import jax
assert status == 0 and {{device.platform for device in jax.devices()}} == {{"cpu"}}
assert jax.config.jax_platforms == "cuda,tpu"
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cuda,tpu", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environment)


# What users get wrong


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["absent", "x", "--to", "orbax"], "absent: no such file or directory"),
        (["empty", "x", "--to", "orbax"], "empty: no model; wanted config.json and weights"),
        (["file", "x", "--to", "orbax"], "file: begins with b'abcd'"),
        (["pipe", "x", "--to", "orbax"], "pipe: a device or a pipe; wanted a file or a directory"),
        (["source", "x", "--to", "orbax", "--window", "0"], "window is 0; wanted at least 1"),
        (["a\x1b[31m\nb", "x", "--to", "orbax"], "a\\x1b[31m b: no such file or directory"),
    ],
)
def test_errors_are_one_line(tmp_path, saved, monkeypatch, capsys, args, message):
    saved(PLAIN)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"abcdefgh")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    convert(*args, fails=2)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_arguments_that_do_not_fit_together_are_refused(tmp_path):
    for args in (
        ["a", "--to", "orbax"],
        ["a", "b", "--to", "nothing"],
        ["a", "b", "--to", "hf", "--tolerance", "1"],
        ["a", "b", "--to", "hf", "--verify", "--tolerance", "nan"],
        ["a", "b", "--to", "hf", "--json", str(tmp_path)],
    ):
        with pytest.raises(SystemExit):
            main(args)


def test_a_vocabulary_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch, capsys):
    pytest.importorskip("gguf")

    def vocabulary(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("of-some-other-model")
        writer.add_token_list([f"t{i}" for i in range(PLAIN.vocab_size)])
        writer.add_token_types([1] * PLAIN.vocab_size)

    path = write_gguf(tmp_path / "in" / "m.gguf", PLAIN, to_gguf(PLAIN, hf_tensors(PLAIN)), change=vocabulary)
    write = hf.Writer
    monkeypatch.setattr(hf, "Writer", None)
    for args in ([tmp_path / "x"], ["--plan"]):
        convert(path, *args, "--to", "hf", fails=2)
        error = capsys.readouterr().err
        assert f"{path}: tokenizer.ggml.pre is 'of-some-other-model'" in error and "--no-tokenizer" in error
    monkeypatch.setattr(hf, "Writer", write)
    convert(path, tmp_path / "x", "--to", "hf", "--no-tokenizer")
    assert names(tmp_path) == ["in", "x"] and names(tmp_path / "x") == ["config.json", "model.safetensors"]


def test_another_thread_may_convert(tmp_path, saved):
    source, _ = saved(PLAIN)
    with concurrent.futures.ThreadPoolExecutor() as threads:
        assert threads.submit(main, [str(source), str(tmp_path / "x"), "--to", "orbax"]).result() == 0


def test_a_larger_window_has_the_default_context_again(saved):
    source, _ = saved(PLAIN)  # whose window is 16
    assert formats.open_checkpoint(source).config.last_context_length == 16
    wide = formats.open_checkpoint(source, window=4096).config
    assert (wide.window, wide.last_context_length) == (4096, 1024)
