r"""LongLLaMA 3B: OpenLLaMA 3B, fine-tuned with crossbatch (arXiv 2307.03170).

    python train.py --config=configs/longllama_3b.py --workdir=DIR \
        --config.init_from=open_llama_3b --config.data.tokenizer=open_llama_3b/tokenizer.model \
        --config.data.train="('arxiv/', 'github/')"

For a pod of 256 TPU v5e chips: 256K tokens a step, 38147 steps, 10 billion tokens of 21 GFLOP each; 2.5 hours if half
of the 197 TFLOP/s of a chip are used. Not trained by this project. The paper reports 94.5% of passkeys found at 100k.
"""

from ml_collections import ConfigDict

from fot_jax.run_config import default_config


def get_config() -> ConfigDict:
    """The configuration."""
    config = default_config()
    config.steps = 38147
    config.model.size = "longllama_3b"
    config.batch.rows = 128
    config.crossbatch.kind = "longllama_3b"
    config.remat = "full"
    config.loss_chunk = 32768
    config.optimizer.update(name="adamw", learning_rate=2e-5, schedule="constant", warmup_steps=500, weight_decay=0.01)
    config.mesh.update(data=0, fsdp=32, tensor=2)
    config.data.update(skip_short=True)
    config.checkpoint.update(every=1000, keep_last=2, keep_every=10000)
    return config
