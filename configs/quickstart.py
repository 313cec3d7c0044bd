"""The quickstart's models: small, on Python's own library, with and without crossbatch.

    python train.py --config=configs/quickstart.py:fot,1 --workdir=/tmp/fot1 --config.data.tokenizer=X.model
    python train.py --config=configs/quickstart.py:fot,2 --workdir=/tmp/fot2 --config.data.tokenizer=X.model \
        --config.init_from=/tmp/fot1

`make quickstart` runs them, on one CPU core each; three to six minutes a stage there.

The first stage shows a row up to 8 windows, most of them earlier ones of its own document, so that copying is learned
soon (it appears after about a million tokens). The second has larger batches and more contexts, so that windows of the
other documents of the batch are among them.
"""

from ml_collections import ConfigDict

from fot_jax.run_config import default_config

CONTEXTS = {"1": 8, "2": 12}


def get_config(which: str = "fot,1") -> ConfigDict:
    """The configuration: model "fot" or "standard" and stage "1" or "2", as in "fot,1"; "fot,1,long" has more steps."""
    model, stage, *length = which.split(",")
    if model not in ("fot", "standard") or stage not in CONTEXTS or length not in ([], ["long"]):
        raise ValueError(f"quickstart config is {which!r}; wanted fot or standard, comma, 1 or 2, and perhaps ',long'")
    first = stage == "1"
    config = default_config()
    config.steps = (1400 if first else 640) * (4 if length else 1)
    config.model.update(
        vocab_size=1024,
        d_model=128,
        d_ff=344,
        n_layers=3,
        n_heads=2,
        window=64,
        mem_layers=(2,),
        mem_positionals=False,
        qk_norm=True,
        rope_base=100.0,
        tie_embeddings=True,
        last_context_length=64,
        init_std=0.08,
    )
    config.batch.update(rows=32 if first else 64, separate="none")
    config.data.update(train=("python:train",), validation=("python:validation",), max_tokens=8192)
    config.optimizer.update(
        name="muon",
        learning_rate=6e-3 if first else 3e-3,
        muon_rate=4.0,
        schedule="cosine",
        final_share=0.0,
        warmup_steps=60 if first else 30,
        weight_decay=0.02,
        b2=0.98,
    )
    # Both models read the same 16 consecutive windows of a document side by side.
    config.crossbatch.update(packing=16)
    if model == "fot":
        config.crossbatch.update(kind="published", contexts=(CONTEXTS[stage],))
    config.validation.update(every=config.steps // 2, batches=8)
    config.checkpoint.update(every=config.steps // 2, keep_last=1)
    config.log_every = 100
    return config
