"""Parity with the published code: PyTorch inference (logits, greedy tokens) and JAX training (logits, loss, gradients).

`tests/reference` holds three of the cases, cut down to some positions and some gradients; a folder with whole cases,
named by FOT_REFERENCE or lying in `shared/reference` beside the checkout, is tested too. All through public names.
"""

from __future__ import annotations

import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import fot_jax
from fot_jax import sharding

SHIPPED = pathlib.Path(__file__).parent / "reference"
BESIDE = pathlib.Path(__file__).parents[2] / "shared" / "reference"


def cases(kind: str) -> list:
    named = os.environ.get("FOT_REFERENCE")
    if named and not pathlib.Path(named, kind).is_dir():
        raise FileNotFoundError(f"FOT_REFERENCE is {named}; wanted a folder with {kind}/")
    found = [(f"shipped-{path.name}", path) for path in sorted((SHIPPED / kind).iterdir())]
    whole = pathlib.Path(named) if named else BESIDE
    if whole.is_dir():
        found += [(path.name, path) for path in sorted((whole / kind).iterdir())]
    return [pytest.param(path, id=name) for name, path in found]


def load(path: pathlib.Path):
    if not (path / "model.safetensors").exists():
        pytest.importorskip("torch", reason="the weights are pickled")
    config, params = fot_jax.load_pretrained(path, dtype="float32")
    with np.load(path / "reference.npz") as file:
        return config, params, dict(file)


@pytest.mark.parametrize("path", cases("longllama"))
def test_logits_and_greedy_tokens_of_the_published_inference_code(path):
    check_inference(*load(path))


@pytest.mark.parametrize("axes", [{"context": 8}, {"tensor": 2, "context": 4}], ids=["8 ways", "heads and 4 ways"])
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(*case.values, id=case.id, marks=() if case.id.startswith("shipped") else pytest.mark.slow)
        for case in cases("longllama")
    ],
)
def test_memory_may_be_dealt_to_eight_devices(devices, path, axes):
    config, params, reference = load(path)
    mesh = sharding.make_mesh({"data": 1, **axes}, devices)
    with jax.set_mesh(mesh):
        check_inference(config, jax.device_put(params, sharding.replicated(mesh)), reference)


def check_inference(config, params, reference):
    tokens_BT = reference["input_ids"].astype(np.int32)
    mask_BT = reference.get("attention_mask")
    positions = reference.get("positions", np.arange(tokens_BT.shape[1]))
    tolerance = 2e-3 if config.mem_dtype == "bfloat16" else 1e-4
    compared = 0
    for name, wanted in reference.items():
        kind, _, c = name.rpartition("_last")
        if kind == "logits_no_cache":
            found = fot_jax.long_forward(config, params, tokens_BT, last_context_length=int(c), attention_mask=mask_BT)
            assert found.dtype == jnp.float32 and found.shape == (*tokens_BT.shape, config.vocab_size)
            difference = np.abs(np.asarray(found)[:, positions] - wanted)
            if mask_BT is not None:
                difference = difference[mask_BT[:, positions] != 0]
            assert difference.max() <= tolerance, name
            compared += 1
        elif kind == "greedy_tokens":
            found = fot_jax.generate(
                config, params, tokens_BT, max_new_tokens=wanted.shape[1], last_context_length=int(c)
            )
            assert found.dtype == jnp.int32
            np.testing.assert_array_equal(np.asarray(found), wanted, err_msg=name)
            compared += 1
    assert compared


@pytest.mark.parametrize("path", cases("crossbatch"))
def test_logits_loss_and_gradients_of_the_published_training_code(path, tmp_path):
    config, params, reference = load(path)
    fields = json.loads((path / "config.json").read_text())
    tokens_BT, targets_BT = reference["input_tokens"], reference["target_tokens"]
    mask_BT = reference["loss_masks"]
    plan = fot_jax.crossbatch.published_plan(
        rows=len(tokens_BT),
        range_=fields["cross_batch_range"],
        packing=fields["dataset_packing"],
        stepping=fields["cross_batch_stepping"],
    )

    def loss(params):
        logits_BTV = fot_jax.crossbatch_forward(config, params, tokens_BT, plan)
        target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
        losses_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - target_BT
        # The published loss: the mean over rows of each row's mean over its unmasked tokens.
        return jnp.mean((losses_BT * mask_BT).sum(1) / mask_BT.sum(1)), logits_BTV

    (value, logits_BTV), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert np.abs(logits_BTV - reference["logits"]).max() <= 2e-5
    assert abs(float(value) / float(reference["loss"]) - 1) <= 1e-5
    fot_jax.save_pretrained(tmp_path / "gradients", config, gradients)
    found = load_file(tmp_path / "gradients" / "model.safetensors")
    wanted = {name.removeprefix("grad."): x for name, x in reference.items() if name.startswith("grad.")}
    assert wanted and wanted.keys() <= found.keys()
    if not path.is_relative_to(SHIPPED):
        assert wanted.keys() == found.keys()
    for name, x in wanted.items():
        assert np.abs(found[name] - x).max() <= 1e-4 * np.abs(x).max(), name
