r"""LongLLaMA-Code 7B: Code Llama 7B, fine-tuned with crossbatch.

    python train.py --config=configs/longllama_code_7b.py:v5e:16x16 --workdir=DIR \
        --config.init_from=CodeLlama-7b-hf --config.data.tokenizer=CodeLlama-7b-hf/tokenizer.model

After the file's name comes what it runs on; see longllama_3b.py. Windows are Code Llama's 4096 tokens, so a batch of
256K tokens has 64 rows; a memory layer sees up to 7 other windows, as in the 7B. The published model was tuned on 35
billion tokens, most of them code (StarCoder data, RedPajama, RefinedWeb); the weights below are ours.

256K tokens a step, 133514 steps, 35 billion tokens of 45.3 GFLOP each. With half of the chips' peak (`--plan`): 17.5
hours on v5e:16x16, 70 on v5e:8x8 and 2*v5e:4x8, 50 on v4:4x4x4, 30 on v5p:4x4x4, 15 on v6e:8x8, 111 on h100:8. Not
trained by this project.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

from fot_jax.run_config import set_hardware

_7B = runpy.run_path(str(pathlib.Path(__file__).with_name("longllama_7b.py")))

# Source, share of documents in per cent, shortest document in tokens.
MIXTURE = (
    ("starcoder/python", 60, 4096),
    ("starcoder/other", 25, 4096),
    ("redpajama/arxiv", 5, 0),
    ("refinedweb", 10, 1024),
)


def get_config(hardware: str = "v5e:16x16") -> ConfigDict:
    """The configuration."""
    config = _7B["get_config"](hardware)
    config.steps = 133514
    config.model.size = "longllama_code_7b"
    config.batch.rows = 64
    sources, weights, min_tokens = zip(*MIXTURE, strict=True)
    config.data.update(train=sources, weights=weights, min_tokens=min_tokens)
    set_hardware(config, hardware)
    return config
