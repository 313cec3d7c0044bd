"""eval.py: refusals before any long work; killed and started again, and on more devices, the same files."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import pytest

import fot_jax
from fot_jax.evals import EVALUATIONS, passkey
from fot_jax.tokenizer import open_tokenizer, train_tokenizer

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny model of random numbers with a tokenizer; beside it one without memory layers."""
    folder = tmp_path_factory.mktemp("model")
    text = "\n".join([passkey.TASK, passkey.GARBAGE, passkey.QUESTION, *(passkey.KEY.format(key=k) for k in range(99))])
    for name, mem_layers in (("fot", (1,)), ("plain", ())):
        (folder / name).mkdir()
        train_tokenizer([text] * 4, folder / name / "tokenizer.model", 360)
        config = fot_jax.ModelConfig(
            vocab_size=open_tokenizer(folder / name).vocab_size,
            d_model=16,
            d_ff=24,
            n_layers=2,
            n_heads=2,
            window=32,
            mem_layers=mem_layers,
        )
        fot_jax.save_pretrained(folder / name, config, fot_jax.init_params(config, jax.random.key(0)))
    return folder


def start(out, checkpoint, devices=1, **options):
    arguments = [f"--config.{key}={value}" for key, value in options.items()]
    flags_ = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    env = {**os.environ, "XLA_FLAGS": flags_, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "eval.py"), f"--config={ROOT / 'configs/eval/passkey.py'}", f"--out={out}"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([*command, f"--checkpoint={checkpoint}", *arguments], env=env, cwd=ROOT, **pipes)


def test_killed_and_started_again_and_on_eight_devices(checkpoint, tmp_path):
    options = {"options.lengths": "(700,150)", "options.samples": 16, "options.depths": "(0.5,)", "options.rows": 8}
    lines = lambda: sum(path.read_text().count("\n") for path in (tmp_path / "killed").glob("passkey.*.partial.jsonl"))
    killed = start(tmp_path / "killed", checkpoint / "fot", **options)
    while killed.poll() is None and lines() < 2:
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL and 2 <= lines() <= 4
    assert not (tmp_path / "killed" / "passkey.json").exists()
    again = start(tmp_path / "killed", checkpoint / "fot", **options)
    eight = start(tmp_path / "eight", checkpoint / "fot", devices=8, **options, **{"mesh.data": 8})
    for process, before in ((again, True), (eight, False)):
        out, errors = process.communicate()
        assert process.returncode == 0, errors
        assert "share of keys found" in out and "tokens/s" in out and ("were done before" in errors) == before
    assert not lines()
    files = [(tmp_path / name / "passkey.json") for name in ("killed", "eight")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert len(json.loads(files[0].read_text())["prompts"]["700"]) == 16
    speed = json.loads((tmp_path / "eight" / "passkey.speed.json").read_text())
    assert speed["tokens_read"] > 16 * 840 and 0 <= speed["outside_model"] <= 1


@functools.cache
def loaded(path):
    """A Python file of the checkout as a module."""
    spec = importlib.util.spec_from_file_location(path.replace("/", "_"), ROOT / f"{path}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "model", "changes", "message"),
    [
        ("passkey", "fot", {"evaluation": "passkeys"}, "evaluation is 'passkeys'; wanted one of dictionary, dis"),
        ("passkey", "none", {}, "none: no such directory"),
        (
            "passkey",
            "plain",
            {},
            r"a prompt of 1,024 tokens .*; the model has no memory layers \(mem_layers is empty\)",
        ),
        ("passkey", "fot", {"options.capacity": 1000}, "a prompt of 1,024 tokens and its answer has 1,034 tokens; cap"),
        ("passkey", "fot", {"options.window": 64}, "window is 64; wanted 1..32"),
        ("passkey", "fot", {"mesh.data": 64}, "mesh .* needs 64 devices; there are 8"),
        ("passkey", "fot", {"options.lengths": (50,)}, "lengths has 50; wanted at least"),
        ("perplexity", "fot", {"data.sources": ()}, "data.sources is empty"),
        ("perplexity", "plain", {}, "the model has no memory layers"),
        ("perplexity", "fot", {"data.sources": ("none.txt",)}, "none.txt"),
        ("fewshot", "fot", {"options.train": "a.label", "options.test": "b.label"}, "a.label"),
        ("retrieval", "plain", {}, "the model has no memory layers"),
    ],
)
def test_refused_before_any_long_work(checkpoint, tmp_path, monkeypatch, name, model, changes, message):
    monkeypatch.setattr("fot_jax.pretrained.read_params", None)  # would fail
    config = loaded(f"configs/eval/{name}").get_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        loaded("eval").evaluate(config, str(checkpoint / model), str(tmp_path))
    assert not list(tmp_path.glob("*.json*"))


def test_every_evaluation_has_its_contract_and_a_configuration():
    for name, module in EVALUATIONS.items():
        evaluation = importlib.import_module(module)
        assert all(callable(getattr(evaluation, part)) for part in ("default_options", "check", "inputs", "run"))
        config = loaded(f"configs/eval/{name}").get_config()
        assert config.evaluation == name and set(config.options) == set(evaluation.default_options())
