"""Random LLaMAs of `transformers`, saved by it, give the same logits here (memory layers it does not have)."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import fot_jax
from fot_jax.formats import layout

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

WINDOW = 48
BASE = dict(
    vocab_size=131,
    hidden_size=64,
    intermediate_size=152,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=WINDOW,
    initializer_range=0.15,
)
# Scores as spread as at the other width: wider ones make softmax a choice, whose rounding goes into the logits.
WIDE = dict(hidden_size=200, initializer_range=0.085)
CASES = {
    "plain": {},
    "grouped_queries": dict(num_key_value_heads=2),
    "one_key_value_head": dict(num_key_value_heads=1),
    "tied_embeddings": dict(tie_word_embeddings=True),
    "head_size_100": dict(WIDE, num_attention_heads=2),
    "heads_wider_than_the_model": dict(head_dim=32),
    "rope_base_1e6": dict(rope_theta=1e6),
    "all": dict(
        WIDE, num_attention_heads=4, num_key_value_heads=2, head_dim=100, rope_theta=1e6,
        tie_word_embeddings=True, rms_norm_eps=1e-5,
    ),
}  # fmt: skip


def llama(case: str):
    fields = {**BASE, **CASES[case]}
    if "rope_theta" in fields and int(transformers.__version__.split(".")[0]) >= 5:
        fields["rope_parameters"] = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).eval()


def torch_logits(reference, tokens_BT: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return reference(torch.from_numpy(tokens_BT).long()).logits.numpy()


@pytest.fixture(scope="module", params=CASES)
def models(request, tmp_path_factory):
    """transformers' model, and config and params loaded from what it saved."""
    reference = llama(request.param)
    directory = tmp_path_factory.mktemp(request.param)
    reference.save_pretrained(directory)
    return request.param, reference, *fot_jax.load_pretrained(directory)


def test_what_is_loaded(models):
    case, reference, config, params = models
    assert layout.count_params(config) == reference.num_parameters()
    assert config.rope_base == (1e6 if case in ("rope_base_1e6", "all") else 1e4)
    assert config.tie_embeddings == (case in ("tied_embeddings", "all"))
    assert ("head" in params) == (not config.tie_embeddings)
    assert config.norm_eps == (1e-5 if case == "all" else 1e-6)


def test_logits(models):
    _, reference, config, params = models
    tokens_BT = np.random.default_rng(1).integers(0, config.vocab_size, (2, WINDOW)).astype(np.int32)
    wanted = torch_logits(reference, tokens_BT)
    assert wanted.std() > 0.1
    hidden_BTD = fot_jax.forward(config, params, tokens_BT)
    np.testing.assert_allclose(fot_jax.logits(config, params, hidden_BTD), wanted, rtol=0, atol=1e-4)
    # One window: nothing enters memory.
    found = fot_jax.long_forward(config, params, tokens_BT, last_context_length=WINDOW)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


def test_greedy_tokens(models):
    _, reference, config, params = models
    tokens_BT = np.random.default_rng(2).integers(3, config.vocab_size, (1, 9)).astype(np.int32)
    with torch.no_grad():
        wanted = reference.generate(
            torch.from_numpy(tokens_BT).long(),
            attention_mask=torch.ones(tokens_BT.shape, dtype=torch.long),
            max_new_tokens=16,
            min_new_tokens=16,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        ).numpy()[:, 9:]
    config = config.replace(eos_id=None)
    found = fot_jax.generate(config, params, tokens_BT, max_new_tokens=16, last_context_length=WINDOW)
    np.testing.assert_array_equal(np.asarray(found), wanted)


def test_what_we_save_transformers_loads(models, tmp_path):
    """As a LLaMA, once model_type says so: names, orientation and metadata are its own."""
    _, reference, config, params = models
    fot_jax.save_pretrained(tmp_path / "m", config, params)
    loaded, report = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "m", config=reference.config, output_loading_info=True
    )
    assert not any(report.get(key) for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for (name, wanted), (other, found) in zip(reference.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other and torch.equal(found.float(), wanted.float()), name


def test_sharded_pickles_of_transformers_layout(tmp_path):
    reference = llama("grouped_queries")
    reference.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    _, params = fot_jax.load_pretrained(tmp_path)
    for path in tmp_path.glob("model*"):
        path.unlink()
    torch.save(reference.state_dict(), tmp_path / "pytorch_model.bin")
    _, pickled = fot_jax.load_pretrained(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, params, pickled)
