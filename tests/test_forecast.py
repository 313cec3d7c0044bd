"""What a run needs: by arithmetic, against numbers reckoned here; and what compiled programs do, loops counted."""

from __future__ import annotations

import ast
import json
import pathlib
import re
import runpy
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fot_jax import crossbatch, forecast, hlo, metrics, model, programs, run_config, sharding
from fot_jax.hardware import CHIPS, Hardware, hardware

ROOT = pathlib.Path(__file__).parent.parent


def run_of(name, text):
    return runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"](text)


@pytest.mark.parametrize(
    ("text", "wanted", "chips"),
    [
        ("v5e:16x16", Hardware("v5e", (16, 16)), 256),
        ("2*v5e:4x8", Hardware("v5e", (4, 8), 2), 64),
        ("v4:4x4x4", Hardware("v4", (4, 4, 4)), 64),
        ("h100:8", Hardware("h100", (8,)), 8),
    ],
)
def test_hardware(text, wanted, chips):
    assert hardware(text) == wanted and str(wanted) == text and wanted.chips == chips


@pytest.mark.parametrize(
    "text", ["", "v5e", "v5e:", "v9:4x4", "v5e:4x", "0*v5e:4x4", "v5e:0x4", "x*v5e:4x4", "v5e:4 x4"]
)
def test_hardware_that_there_is_not(text):
    with pytest.raises(ValueError, match="hardware is '"):
        hardware(text)


@pytest.mark.parametrize("text", ["v4:4x4x4", "v5e:8x8", "v5e:16x16", "v5p:4x4x4", "v6e:8x8", "2*v5e:4x8", "h100:8"])
@pytest.mark.parametrize("name", ["longllama_3b", "longllama_7b", "longllama_code_7b"])
def test_the_papers_runs_are_laid_out_for_every_hardware(name, text):
    config = run_of(name, text)
    found = forecast.arithmetic(config, hardware(text), 0.5)
    assert found.rows * found.length == 2**18
    assert found.mesh["data"] == hardware(text).slices and np.prod(list(found.mesh.values())) == found.hardware.chips
    assert sum(found.nbytes.values()) < found.hardware.chip.nbytes
    assert f"{found.parameters:,}" in found.table() and json.dumps(found.summary())


def test_arithmetic_of_the_3b():
    found = forecast.arithmetic(run_of("longllama_3b", "v5e:16x16"), hardware("v5e:16x16"), 0.4)
    D, F, L, V, T = 3200, 8640, 26, 32000, 2048
    layer = 4 * D * D + 3 * D * F
    assert found.parameters == L * (layer + 2 * D) + 2 * V * D + D
    # Two FLOPs a weight; scores and averages over half a window, in 3 layers over 2 more windows (0, 2, 3, 3; rows at
    # the start of the batch have fewer before them).
    seen = np.mean([min((0, 2, 3, 3)[row % 4], row) for row in range(128)])
    forward = 2 * (L * layer + D * V) + 4 * D * (L * T / 2 + 3 * seen * T)
    assert found.flops_per_token == pytest.approx(3 * forward)
    assert found.tokens_per_second == pytest.approx(0.4 * 256 * 197e12 / (3 * forward))
    assert found.days == pytest.approx(38147 * 2**18 / found.tokens_per_second / 86400)
    norms = 2 * L * D + D  # split by fsdp alone
    of_chip = ((found.parameters - norms) / 256 + norms / 128) * 4
    assert found.mesh == {"data": 1, "fsdp": 128, "tensor": 2, "context": 1}
    assert found.nbytes["parameters"] == found.nbytes["gradients"] == of_chip
    assert found.nbytes["optimizer state"] == pytest.approx(2 * of_chip, abs=100)
    # And what layers that read contexts read, split by tensor: bfloat16, and a float32 log-sum-exp a head.
    assert found.nbytes["activations kept"] == L * T * D * 2 + 3 * T * (D * 2 + 32 * 4) // 2


COMPILED = runpy.run_path(str(ROOT / "bench/compiled_steps.py"))["RUNS"]


# XLA's own attention, and many contexts side by side, are in no configuration.
@pytest.mark.parametrize("name", [name for name in COMPILED if not name.startswith(("plain", "concatenate"))])
def test_the_plan_is_near_what_the_compilers_say(name):
    report = json.loads((ROOT / "docs/compiled" / f"{name}.json").read_text())
    file, *changes = COMPILED[name]
    name, _, text = file.partition(":")
    config = run_of(name.removesuffix(".py"), text)
    for key, _, value in (change.partition("=") for change in changes):
        config.update_from_flattened_dict({key: ast.literal_eval(value) if value[0] in "(0123456789" else value})
    plan = forecast.arithmetic(config, hardware(text), 0.5)
    assert plan.mesh == report["mesh"] and plan.attention == report["attention"]
    assert 0.85 < sum(plan.nbytes.values()) / report["peak_bytes"] < 1.3
    assert sum(plan.nbytes[kind] for kind in ("parameters", "optimizer state")) <= report["argument_bytes"]


@pytest.mark.parametrize("name", ["longllama_3b", "longllama_7b", "longllama_code_7b"])
def test_the_hours_that_a_configuration_states_are_those_of_the_plan(name):
    header = (ROOT / "configs" / f"{name}.py").read_text().split('"""')[1]
    stated = re.findall(r"([\d.]+)(?:\s+hours)?\s+on\s+([\w*]+:[\dx]+(?:\s+and\s+[\w*]+:[\dx]+)*)", header)
    assert len(stated) == 6  # two chips have the same number
    for hours, several in stated:
        for text in re.split(r"\s+and\s+", several):
            found = 24 * forecast.arithmetic(run_of(name, text), hardware(text), 0.5).days
            assert f"{found:.{len(hours.partition('.')[2])}f}" == hours, text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(batch__rows=100), r"batch.rows / batch.accumulate is 100; wanted a multiple of"),
        (dict(mesh__data=1), "mesh.data is 1 over 2 slices; wanted a multiple"),
        (dict(mesh__fsdp=48), "does not divide 64 devices"),
        (dict(hardware="v9"), "hardware is 'v9'"),
        (dict(attention="flash"), "config key attention is 'flash'"),
    ],
)
def test_runs_that_do_not_fit_their_hardware(changes, message):
    config = run_of("longllama_3b", "2*v5e:4x8")
    config.mesh.data = 0
    flat = {key.replace("__", "."): value for key, value in changes.items()}
    config.update_from_flattened_dict(flat)
    with pytest.raises(ValueError, match=message):
        forecast.arithmetic(config, hardware("2*v5e:4x8"), 0.5)


def test_forecasts_for_other_chips_than_the_mesh_has():
    config = run_of("longllama_3b", "v5e:8x8")
    with pytest.raises(ValueError, match="mesh fsdp 64 has 64 of the 256 chips of v5e:16x16; wanted all"):
        forecast.arithmetic(config, hardware("v5e:16x16"), 0.5)
    with pytest.raises(ValueError, match="share is 1.5"):
        forecast.arithmetic(config, hardware("v5e:8x8"), 1.5)


@pytest.mark.parametrize(("text", "package"), [("h100:8", "gpu_compiler"), ("v5e:8x8", "tpu")])
def test_a_compiler_that_is_missing_is_named(text, package, monkeypatch):
    def missing(**_):
        raise RuntimeError("no such platform")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(ValueError, match=rf"{text} cannot be compiled for: no such platform; .*fot-jax\[{package}\]"):
        forecast.compiled(run_of("longllama_3b", text), hardware(text))


# Runs train.py once for each list of arguments, imported once; what the n-th says goes to files n.out and n.err.
EACH = """
import json, os, sys
import train
from absl import app, flags

flags.mark_flags_as_required(["config"])
for n, arguments in enumerate(json.loads(sys.argv[1])):
    if not (child := os.fork()):
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{sys.argv[2]}/{n}.{name}", os.O_CREAT | os.O_WRONLY), stream)
        sys.argv = ["train.py", *arguments]
        app.run(train.main)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def train_py(folder, *cases):
    """Status, output and errors of each."""
    words = [sys.executable, "-c", EACH, json.dumps(cases), str(folder)]
    statuses = subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    said = [[(folder / f"{n}.{name}").read_text() for name in ("out", "err")] for n in range(len(cases))]
    return [(int(status), *texts) for status, texts in zip(statuses, said, strict=True)]


def test_the_command_plans_without_data_or_workdir(tmp_path):
    file, other = "--config=configs/longllama_7b.py:v5p:4x4x4", "--config=configs/longllama_3b.py:h100:8"
    laid_out = {"v5e:4x8": "fsdp 32", "2*v5e:8x16": "data 2, fsdp 64, tensor 2"}
    refused = (
        (["--plan", "--topology=v9:4"], "train.py: hardware is 'v9:4'; wanted CHIP:SHAPE"),
        (["--plan", "--share=0"], "train.py: share is 0.0"),
        (["--plan", "--compilation_cache=x"], "--compilation_cache goes with runs"),
        (["--plan", "--config.hardware="], "no hardware is stated; wanted --topology or config.hardware"),
        ([], "--workdir is not set"),
    )
    first, *rest = train_py(
        tmp_path,
        [file, "--plan", f"--report={tmp_path}/r.json"],
        *([file, "--plan", f"--topology={text}"] for text in laid_out),
        *([other, *arguments] for arguments, _ in refused),
    )
    assert first[0] == 0, first
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["chips"] == 64 and report["parameters"] == 6_738_415_616 and report["contexts"] == 7
    assert "6,738,415,616" in first[1] and "up to 7 other windows a row, 4.16 on average, ring" in first[1]
    # Other chips than the file is laid out for, fewer and more.
    for (text, mesh), (status, out, errors) in zip(laid_out.items(), rest, strict=False):
        assert status == 0, errors
        assert f"laid out for {text}, not for v5p:4x4x4" in out and mesh in out
    for (_, message), (status, out, errors) in zip(refused, rest[len(laid_out) :], strict=True):
        assert status != 0 and message in errors + out and "Traceback" not in errors


def test_a_step_that_does_not_fit_ends_with_1():
    script = (
        "import sys, types, train; from absl import app; from fot_jax import forecast; "
        "sys.argv = ['train.py', '--config=configs/longllama_3b.py:v5e:8x8', '--compile_only']; "
        "forecast.compiled = lambda *_: types.SimpleNamespace(table=str, fits={}); app.run(train.main)"
    )
    for fits, status in ((True, 0), (False, 1)):
        done = subprocess.run([sys.executable, "-c", script.format(fits)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == status, done.stderr


def test_a_step_that_the_compiler_refuses_is_reported(tmp_path):
    script = (
        "import sys, train; from absl import app; from fot_jax import forecast\n"
        "def refuse(*_): raise forecast.DoesNotFit('the step does not fit v5e:8x8: 99G of 16G')\n"
        "sys.argv = ['train.py', '--config=configs/longllama_3b.py:v5e:8x8', '--compile_only', "
        f"'--report={tmp_path}/r']\n"
        "forecast.compiled = refuse; app.run(train.main)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "train.py: the step does not fit v5e:8x8: 99G of 16G" in done.stderr
    report = json.loads((tmp_path / "r").read_text())
    assert report == {"hardware": "v5e:8x8", "fits": False, "refused": "the step does not fit v5e:8x8: 99G of 16G"}


def test_a_plan_that_does_not_fit_says_so():
    assert (
        "DOES NOT FIT" not in forecast.arithmetic(run_of("longllama_7b", "v5e:8x8"), hardware("v5e:8x8"), 0.5).table()
    )
    found = forecast.arithmetic(run_of("longllama_7b", "v5e:2x4"), hardware("v5e:2x4"), 0.5)
    assert "16.00 GB: DOES NOT FIT" in found.table() and "8 microbatches" in found.table()


def test_microbatches_hold_whole_documents():
    config = run_of("longllama_3b", "v5e:1x1")
    assert config.batch.rows // config.batch.accumulate == 4
    assert run_of("longllama_3b", "h100:8").batch.accumulate == 2  # a chip with more memory takes more rows at a time
    assert run_of("longllama_3b", "h100:8").loss_chunk == 4096 * 8
    assert run_of("longllama_3b", "v5e:16x16").loss_chunk == 4096 * 128  # tensor 2: half as many shares of the rows


# Compiled programs.


def test_loops_are_counted_as_often_as_they_run(devices):
    mesh = sharding.make_mesh({"data": 8}, devices)
    place = NamedSharding(mesh, P("data"))

    def f(x, ws):
        def body(x, w):
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ w), P("data")), None

        x, _ = jax.lax.scan(body, x, ws)
        return jax.lax.fori_loop(0, 3, lambda _, x: jnp.cos(x - jnp.sum(x, axis=0, keepdims=True)), x)

    arrays = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=place), jax.ShapeDtypeStruct((7, 32, 32), jnp.float32)
    with jax.set_mesh(mesh):
        program = hlo.Program(jax.jit(f, out_shardings=place).lower(*arrays).compile().as_text())
    assert program.matmul_flops() == 7 * 2 * 2 * 32 * 32
    assert program.collectives() == {"all-reduce": hlo.Collective(3, 3 * 32 * 4)}


# As a TPU's program has them: a loop from 1 to 8 by 2, and a sum of which each chip takes its part.
TPU_TEXT = """HloModule jit_step

%windowed_cond (p: (bf16[4,8], u32[])) -> pred[] {
  %p = (bf16[4,8]{1,0}, u32[]{:T(128)}) parameter(0)
  %limit = u32[]{:T(128)} constant(8), metadata={op_name="x"}
  %counter = u32[]{:T(128)} get-tuple-element(%p), index=1
  ROOT %less = pred[]{:T(512)} compare(%counter, %limit), direction=LT
}

%windowed_body (q: (bf16[4,8], u32[])) -> (bf16[4,8], u32[]) {
  %q = (bf16[4,8]{1,0}, u32[]{:T(128)}) parameter(0)
  %x = bf16[4,8]{1,0} get-tuple-element(%q), index=0
  %c = u32[]{:T(128)} get-tuple-element(%q), index=1
  %start = (bf16[4,8]{1,0}, bf16[4,8]{1,0}, u32[], u32[]) collective-permute-start(%x), channel_id=3, source_target_pairs={{0,1},{1,0}}
  %done = bf16[4,8]{1,0} collective-permute-done(%start)
  %two = u32[]{:T(128)} constant(2)
  %next = u32[]{:T(128)} add(%c, %two)
  ROOT %out = (bf16[4,8]{1,0}, u32[]{:T(128)}) tuple(%done, %next)
}

%all-reduce-scatter.1 (input: f32[16,4]) -> f32[2,4] {
  %input = f32[16,4]{1,0} parameter(0)
  %all-reduce.1 = f32[16,4]{1,0} all-reduce(%input), channel_id=1, to_apply=%add
  %zero = u32[] constant(0)
  ROOT %part = f32[2,4]{1,0} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={2,4}
}

ENTRY %main (a: bf16[4,8], b: f32[16,4]) -> f32[2,4] {
  %a = bf16[4,8]{1,0} parameter(0)
  %b = f32[16,4]{1,0} parameter(1)
  %one = u32[]{:T(128)} constant(1)
  %before = (bf16[4,8]{1,0}, u32[]{:T(128)}) tuple(%a, %one)
  %while.1 = (bf16[4,8]{1,0}, u32[]{:T(128)}) while(%before), condition=%windowed_cond, body=%windowed_body
  ROOT %fusion.1 = f32[2,4]{1,0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.1
}
"""  # noqa: E501


def test_a_tpus_loops_and_sums_are_read():
    found = hlo.Program(TPU_TEXT).collectives()
    assert found["collective-permute"] == hlo.Collective(4, 4 * 4 * 8 * 2)  # 1, 3, 5, 7
    assert found["reduce-scatter"] == hlo.Collective(1, 16 * 4 * 4) and "all-reduce" not in found
    from_0 = TPU_TEXT.replace("%one = u32[]{:T(128)} constant(1)", "%one = u32[]{:T(128)} constant(0)")
    by_1 = from_0.replace("%two = u32[]{:T(128)} constant(2)", "%two = u32[]{:T(128)} constant(1)")
    assert hlo.Program(from_0).collectives()["collective-permute"].count == 4  # 0, 2, 4, 6
    assert hlo.Program(by_1).collectives()["collective-permute"].count == 8


def step_of(config, devices):
    """The compiled step of a run, read."""
    model_config = run_config.model_config(config)
    mesh = sharding.make_mesh(config.mesh, devices)
    with jax.set_mesh(mesh):
        made = programs.build(config, model_config, mesh)
        plan = run_config.plan_at(config, 1).dealt(sharding.ways("batch"))
        return hlo.Program(made.step(plan).lower(made.state, made.batch).compile().as_text())


RUN = dict(
    batch__rows=16,
    batch__length=16,
    model__d_model=64,
    model__d_ff=128,
    model__n_heads=8,
    model__n_kv_heads=8,
    model__n_layers=3,
    remat="full",
)


@pytest.mark.parametrize(
    "kind, contexts, execution",
    [("longllama_3b", 1, "ring"), ("longllama_3b", 1, "concatenate"), ("blocks", 8, "ring")],
)
def test_eight_devices_do_an_eighth_of_the_work_each(kind, contexts, execution, devices):
    changes = dict(crossbatch__packing=1, crossbatch__contexts=(contexts,), crossbatch__execution=execution)
    config = lambda **mesh: toy.config(**RUN, crossbatch__kind=kind, **changes, **mesh)
    one = step_of(config(), devices[:1]).matmul_flops()
    # At least what the mathematics needs; beyond it, layers are computed again, and masked scores too.
    plan = run_config.plan_at(config(), 1)
    needed = metrics.flops_per_token(run_config.model_config(config()), plan, 16) * 16 * 16
    assert needed < one < 2 * needed
    for mesh in (dict(mesh__data=8), dict(mesh__fsdp=4, mesh__tensor=2)):
        assert needed / 8 <= step_of(config(**mesh), devices).matmul_flops() <= 1.1 * one / 8, mesh


@pytest.mark.parametrize("loss_chunk", [0, 64])  # of 256 tokens
def test_collectives_are_those_that_fsdp_and_crossbatch_call_for(loss_chunk, devices):
    config = toy.config(
        **RUN, crossbatch__kind="longllama_3b", crossbatch__packing=1, crossbatch__contexts=(1,),
        crossbatch__execution="ring", mesh__fsdp=8, model__vocab_size=512, loss_chunk=loss_chunk,
    )  # fmt: skip
    model_config = run_config.model_config(config)
    found = step_of(config, devices).collectives()
    # Embedding: tokens' vectors, of which each device has an eighth of all, to those whose rows they are; and back.
    assert set(found) == {"all-gather", "all-reduce", "collective-permute", "all-to-all"}, found
    assert found["all-to-all"].count == 2
    # Three contexts' keys, values and numbers come a row further each time, forward and backward; the gradients of keys
    # and values go on twice with them, and three rows home: one to the next device, one to that behind it.
    assert crossbatch.longllama_3b_plan(16).n_contexts == 3
    row = 8 * 8 * 16 * 4  # bytes of one row of keys; each device has two
    permuted = found["collective-permute"]
    numbers = permuted.count - (2 * 3 * 2 + 2 * 2 + 2 * 2)  # of which the compiler finds some to be the same
    assert 3 <= numbers <= 2 * 3
    assert permuted.nbytes == (2 * 3 * 2 + 2 * 2 + 2 * 2) * row + numbers * 16 * 4
    # A layer's weights are gathered forward, and again where it is recomputed; the head's once, however many chunks the
    # loss has. Each gradient is summed once. The rest are norms' scales and single numbers.
    params = model.abstract_params(model_config)
    nbytes = lambda tree: sum(x.size for x in jax.tree.leaves(tree)) * 4
    head, layers = nbytes(params["head"]), nbytes([params[key] for key in params if key.startswith("segment")])
    assert 2 * layers + head <= found["all-gather"].nbytes <= 1.02 * (2 * layers + head)
    assert layers + head <= found["all-reduce"].nbytes <= 1.02 * (layers + head)


def test_a_step_is_compiled_and_reported(monkeypatch, devices):
    # CPU devices in the place of descriptions of TPUs.
    monkeypatch.setattr(forecast, "devices", lambda chips: devices)
    config = toy.config(
        **RUN, crossbatch__kind="blocks", crossbatch__packing=1, crossbatch__contexts=(2, 8), mesh__fsdp=4,
        mesh__data=0, crossbatch__schedule="switch_step", crossbatch__execution="ring",
    )  # fmt: skip
    found = forecast.compiled(config, hardware("v5e:2x4"))
    assert found.fits and found.argument_bytes > 0 and found.temporary_bytes > 0
    assert found.peak_bytes >= found.argument_bytes + found.temporary_bytes
    assert (found.attention, found.execution, found.contexts) == ("xla", "ring", 8)  # the most of the schedule
    assert found.mesh == {"data": 2, "fsdp": 4, "tensor": 1, "context": 1}
    for text in ("v5e:2x4: 8 chips", "data 2, fsdp 4", "8 other windows, ring", "collective-permute"):
        assert text in found.table()
    report = json.loads(json.dumps(found.summary()))
    assert report["fits"] and report["collectives"]["all-gather"]["nbytes"] > 0
    assert report["versions"]["jax"] == jax.__version__
    monkeypatch.setitem(CHIPS, "v5e", CHIPS["v5e"]._replace(nbytes=found.peak_bytes - 1))
    assert not found.fits and "DOES NOT FIT" in found.table()

    def too_much(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory. Used 99G of 16G hbm.\n\nAnd so on")

    monkeypatch.setattr(jax.stages.Lowered, "compile", too_much)
    with pytest.raises(
        forecast.DoesNotFit, match="the step does not fit v5e:2x4: RESOURCE_EXHAUSTED: .*Used 99G of 16G hbm.; w"
    ):
        forecast.compiled(config, hardware("v5e:2x4"))
