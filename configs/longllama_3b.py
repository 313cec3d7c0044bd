r"""LongLLaMA 3B: OpenLLaMA 3B, fine-tuned with crossbatch (arXiv 2307.03170).

    python train.py --config=configs/longllama_3b.py:v5e:16x16 --workdir=DIR \
        --config.init_from=open_llama_3b --config.data.tokenizer=open_llama_3b/tokenizer.model

After the file's name comes what it runs on: TPUs (v4:4x4x4, v5e:8x8, v6e:8x8, 2*v5e:4x8 for two slices, ...) or a node
of GPUs (h100:8). Texts are read from folders `redpajama/arxiv` and so on; --config.data.train names others.

256K tokens a step, 38147 steps, 10 billion tokens of 21.4 GFLOP each. With half of the chips' peak (`--plan`): 2.4
hours on v5e:16x16, 9.4 on v5e:8x8 and 2*v5e:4x8, 6.8 on v4:4x4x4, 4.1 on v5p:4x4x4, 2.0 on v6e:8x8, 15 on h100:8.
What a chip needs the compiler says (`--compile_only`); how to start on several hosts, docs/running. Not trained by this
project. The paper reports 94.5% of passkeys found at 100k.
"""

from ml_collections import ConfigDict

from fot_jax.run_config import default_config, set_hardware

# The paper's fine-tuning data: source, share of documents in per cent, shortest document in tokens.
MIXTURE = (
    ("redpajama/arxiv", 25, 0),
    ("redpajama/python", 25, 4096),
    ("redpajama/book", 10, 0),
    ("redpajama/common_crawl", 29, 0),
    ("redpajama/c4", 5, 1024),
    ("redpajama/github", 2, 2048),
    ("redpajama/stackexchange", 2, 1024),
    ("redpajama/wikipedia", 2, 1024),
)


def get_config(hardware: str = "v5e:16x16") -> ConfigDict:
    """The configuration."""
    config = default_config()
    config.steps = 38147
    config.model.size = "longllama_3b"
    # Documents are packed without padding: there is nothing to hide from other rows.
    config.batch.update(rows=128, separate="none")
    config.crossbatch.kind = "longllama_3b"
    config.remat = "full"
    config.optimizer.update(name="adamw", learning_rate=2e-5, schedule="constant", warmup_steps=500, weight_decay=0.01)
    sources, weights, min_tokens = zip(*MIXTURE, strict=True)
    config.data.update(train=sources, weights=weights, min_tokens=min_tokens, skip_short=True)
    config.checkpoint.update(every=1000, keep_last=2, keep_every=10000)
    set_hardware(config, hardware)
    return config
