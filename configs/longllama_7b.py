r"""LongLLaMA 7B: OpenLLaMA 7B, fine-tuned with crossbatch as the 3B is, with more contexts (arXiv 2307.03170).

    python train.py --config=configs/longllama_7b.py:v5e:16x16 --workdir=DIR \
        --config.init_from=open_llama_7b --config.data.tokenizer=open_llama_7b/tokenizer.model

After the file's name comes what it runs on; see longllama_3b.py, whose data this takes, too.

256K tokens a step, and as many of them as for the 3B: 10 billion tokens of 42.5 GFLOP each. With half of the chips'
peak (`--plan`): 4.7 hours on v5e:16x16, 18.7 on v5e:8x8 and 2*v5e:4x8, 13.4 on v4:4x4x4, 8.0 on v5p:4x4x4, 4.0 on
v6e:8x8, 30 on h100:8. Not trained by this project.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

from fot_jax.run_config import set_hardware

_3B = runpy.run_path(str(pathlib.Path(__file__).with_name("longllama_3b.py")))


def get_config(hardware: str = "v5e:16x16") -> ConfigDict:
    """The configuration."""
    config = _3B["get_config"](hardware)
    config.model.size = config.crossbatch.kind = "longllama_7b"
    set_hardware(config, hardware)
    return config
