"""How much memory a device has room for."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp

from fot_jax.config import ModelConfig
from fot_jax.memory.cache import token_bytes
from fot_jax.memory.reading import RETRIEVED_BYTES, SCORE_BYTES


class Forecast(NamedTuple):
    """What memory takes, and how much of it fits.

    Attributes:
        token_bytes: of a token's keys and values in all memory layers, on all devices together.
        device_token_bytes: of a token of each row, on a device.
        fixed_bytes: what a device holds besides: parameters, the open windows, scores.
        tokens: the largest memory of each row, in whole windows, and as many for each device; 0 where nothing fits.
    """

    token_bytes: int
    device_token_bytes: float
    fixed_bytes: int
    tokens: int


def forecast(
    config: ModelConfig,
    device_bytes: int,
    *,
    params_bytes: int,
    rows: int = 1,
    ways: int = 1,
    tensor: int = 1,
    values_on_host: bool = False,
) -> Forecast:
    """The largest memory that fits devices beside the model, as memory is on the platform that programs are made for.

    Args:
        device_bytes: of one device.
        params_bytes: of all parameters as they are computed with.
        rows: B, of each of which there is a memory.
        ways: devices that memory is dealt to (mesh axis context); each holds all parameters that `tensor` leaves it.
        tensor: devices that heads and parameters are split over.
        values_on_host: whether values lie in the host's memory; of int8 their scales stay.

    Raises:
        ValueError: numbers below 1, or heads that `tensor` does not divide.
    """
    for name, value in dict(device_bytes=device_bytes, rows=rows, ways=ways, tensor=tensor).items():
        if value < 1:
            raise ValueError(f"{name} is {value}; wanted at least 1")
    if config.n_kv_heads % tensor:
        raise ValueError(f"tensor is {tensor}; wanted a divisor of n_kv_heads, {config.n_kv_heads}")
    token = token_bytes(config)
    scales = 2 * len(config.mem_layers) * config.n_kv_heads if config.mem_dtype == "int8" else 0
    on_device = (token // 2 + scales if values_on_host else token) * rows / (ways * tensor)
    compute = jnp.dtype(config.dtypes.compute).itemsize
    window = 2 * config.n_layers * rows * config.window * config.n_kv_heads * config.head_size * compute // tensor
    # What top-k holds where it is given no budget: scores, and values retrieved.
    fixed = params_bytes // tensor + window + SCORE_BYTES + RETRIEVED_BYTES
    room = max(device_bytes - fixed, 0)
    whole = math.lcm(config.window, ways)
    tokens = int(room / on_device) // whole * whole if token else 0
    return Forecast(token, on_device, fixed, tokens)
