"""Memory: caches of fixed capacity, and reading them, dense and by exact top-k."""

from fot_jax.memory.cache import (
    Cache,
    Deal,
    Pages,
    append,
    compact,
    constrain,
    init_cache,
    init_memory,
    init_pages,
    place,
    places,
    power_of_two,
    token_bytes,
)
from fot_jax.memory.editing import clear, evict_oldest, merge, restrict, seen_slots, take
from fot_jax.memory.forecast import Forecast, forecast
from fot_jax.memory.host import of_kind
from fot_jax.memory.reading import DENSE, KINDS, Reading, dense, read, search, topk, topk_attention
from fot_jax.memory.saving import SavedMemoryError, describe, load, save
from fot_jax.memory.stored import Int8

__all__ = [
    "DENSE",
    "KINDS",
    "Cache",
    "Deal",
    "Forecast",
    "Int8",
    "Pages",
    "Reading",
    "SavedMemoryError",
    "append",
    "clear",
    "compact",
    "constrain",
    "dense",
    "describe",
    "evict_oldest",
    "forecast",
    "init_cache",
    "init_memory",
    "init_pages",
    "load",
    "merge",
    "of_kind",
    "place",
    "places",
    "power_of_two",
    "read",
    "restrict",
    "save",
    "search",
    "seen_slots",
    "take",
    "token_bytes",
    "topk",
    "topk_attention",
]
