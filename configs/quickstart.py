"""The quickstart's models: small, on Python's own library, with and without crossbatch.

    python train.py --config=configs/quickstart.py:fot --workdir=/tmp/fot --config.data.tokenizer=X.model

`make quickstart` runs them. One CPU core each.
"""

from ml_collections import ConfigDict

from fot_jax.run_config import default_config


def get_config(which: str) -> ConfigDict:
    """The configuration: "fot" or "standard", ",long" behind it for more steps."""
    which, _, length = which.partition(",")
    config = default_config()
    config.steps = 6000 if length else 1400
    config.model.update(
        vocab_size=1024,
        d_model=128,
        d_ff=344,
        n_layers=2,
        n_heads=2,
        window=64,
        mem_layers=(1,),
        mem_positionals=False,
        qk_norm=True,
        rope_base=100.0,
        tie_embeddings=True,
        last_context_length=64,
        init_std=0.08,
    )
    config.batch.update(rows=32, separate="none")
    config.data.update(train=("python:train",), validation=("python:validation",), max_tokens=8192)
    config.optimizer.update(
        name="muon",
        learning_rate=6e-3,
        muon_rate=4.0,
        schedule="cosine",
        final_share=0.0,
        warmup_steps=60,
        weight_decay=0.02,
        b2=0.98,
    )
    config.crossbatch.update(packing=16)
    if which == "fot":
        config.crossbatch.update(kind="published", contexts=(8,))
    elif which != "standard":
        raise ValueError(f"quickstart model is {which!r}; wanted fot or standard")
    config.validation.update(every=700, batches=8)
    config.checkpoint.update(every=700, keep_last=1)
    config.log_every = 100
    return config
