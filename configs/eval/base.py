"""What the configurations of all evaluations have in common; each has its own file beside this one."""

from ml_collections import ConfigDict


def get_config(evaluation: str, options: ConfigDict) -> ConfigDict:
    """The configuration of an evaluation."""
    return ConfigDict(
        dict(
            evaluation=evaluation,
            dtype="float32",  # parameters and computation
            tokenizer="",  # SentencePiece model, tokenizer.json or directory; the checkpoint's by default
            mesh=dict(data=1, fsdp=1, tensor=1, context=1),  # devices that rows, parameters, heads and memory go over
            options=options,
        )
    )
