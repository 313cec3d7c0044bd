"""A memory on disk: what was read once is kept, moved to other devices, and read again.

One safetensors file, of the slots that are filled, in their order, whatever devices or pages held them. Saved readers
(`fot_jax.generate.saved`) are made of the same parts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors.numpy import save_file

from fot_jax import files
from fot_jax.memory import host
from fot_jax.memory.cache import Cache, Deal, Pages, check_deals, place
from fot_jax.memory.editing import restrict, seen_slots
from fot_jax.memory.stored import format_of

FORMAT = "fot_jax memory 1"
SCALE = jax.tree_util.GetAttrKey("scale")  # of int8, which stays on the device


class SavedMemoryError(ValueError):
    """A file that is no saved memory, is damaged, or does not fit what it is read for; the message names it and says
    which.
    """


def save(path: str | os.PathLike, cache: Cache | Pages, metadata: dict[str, str] | None = None) -> None:
    """Writes a memory, beside and renamed: a file of that name is whole.

    Args:
        path: the file; an earlier one is replaced.
        cache: on any devices; stays as it is. Slots that the longest row has filled are written, as they are stored,
            and the mask of all, if there is one.
        metadata: what else is to be known; `describe` gives it back.

    Raises:
        OSError: the file cannot be written; a path that is no ordinary file's.
        TypeError: metadata that are not strings.
    """
    metadata = metadata or {}
    if not all(isinstance(x, str) for pair in metadata.items() for x in pair):
        raise TypeError(f"metadata of a saved memory is {metadata}; wanted strings by strings")
    arrays = arrays_of(cache, "memory")
    about = {**_about(cache), "tokens": int(arrays["memory.length_B"].max())}
    write(path, FORMAT, arrays, {"memory": json.dumps(about), "metadata": json.dumps(metadata)})


def describe(path: str | os.PathLike) -> dict[str, Any]:
    """Looks at the head of a saved memory.

    Returns:
        {"layers", "rows": B, "kv_heads": G, "head_size": K, "dtype": its name, "capacity": M, "tokens": slots filled in
        the longest row, "metadata": as it was given to `save`}. Without layers, heads and their dtype are None.

    Raises:
        FileNotFoundError: no such file.
        SavedMemoryError: not a saved memory, or a damaged one.
    """
    with opened(path, FORMAT) as file:
        return _described(file)


def load(path: str | os.PathLike, like: Cache | Pages, *, resize: bool = False) -> Cache | Pages:
    """What `save` wrote, in another memory.

    Args:
        path: the file.
        like: a memory of `init_memory` or `init_pages`, made under the mesh of `jax.set_mesh`: says capacity, layers,
            rows, heads, dtype, how slots are dealt and where values lie. What is in it, a mask too, is not in the
            result. Its arrays are not looked at and not used up: with values on the device what `jax.eval_shape` gives
            of one will do, and takes no room.
        resize: whether the capacity may be another, where all tokens fit. Of a mask, slots that the saved memory had no
            room for are read.

    Returns:
        A memory as `like`, placed on the mesh of `jax.set_mesh`, with the saved tokens, bit for bit, and mask.

    Raises:
        FileNotFoundError: no such file.
        SavedMemoryError: not a saved memory, a damaged one, or one that does not fit `like`; a `like` that was dealt to
            other devices than the mesh has. All but damage to arrays is found before they are read.
    """
    with opened(path, FORMAT) as file:
        found, wanted = _described(file), _about(like)
        for name, want in wanted.items():
            if found[name] != want and not (resize and name == "capacity"):
                hint = ", or resize=True" if name == "capacity" else ""
                raise SavedMemoryError(f"saved memory {path}: its {name} is {found[name]}; wanted {want}{hint}")
        if found["tokens"] > wanted["capacity"]:
            raise SavedMemoryError(
                f"saved memory {path}: it has {found['tokens']} tokens in a row; wanted at most {wanted['capacity']}, "
                "the capacity"
            )
        try:
            check_deals(like.deals)
        except ValueError as error:
            raise SavedMemoryError(f"saved memory {path}: what it is to be read into does not fit: {error}") from None
        out = filled(like, read(file), "memory", like.values_on_host)
    return jax.tree.map(jnp.asarray, place(out))


def _about(cache: Cache | Pages) -> dict[str, Any]:
    """What must be the same in a saved memory and the one that it is read into."""
    page = cache.pages[0]
    heads = size = dtype = None
    if page.keys:
        heads, size = page.keys[0].shape[1], page.head_size
        dtype = format_of(page.keys[0])
    rows = page.length_B.shape[0]
    sizes = {"layers": len(page.keys), "rows": rows, "kv_heads": heads, "head_size": size}
    return {**sizes, "dtype": dtype, "capacity": cache.capacity}


def _described(file: Any) -> dict[str, Any]:
    metadata = file.metadata()
    about = json.loads(metadata["memory"])
    names = ("layers", "rows", "kv_heads", "head_size", "dtype", "capacity", "tokens")
    return {**{name: about[name] for name in names}, "metadata": json.loads(metadata["metadata"])}


# What all files of memories are made of.


def arrays_of(cache: Cache | Pages, kind: str) -> dict[str, np.ndarray]:
    """The filled slots of a cache, [B, G, K, filled] or [B, G, 1, filled], its lengths and its mask, if there is one,
    under names that begin with `kind`.
    """
    length_B = np.asarray(cache.length_B)
    out = {f"{kind}.length_B": length_B}
    pages = [jax.tree_util.tree_leaves_with_path(_buffers(page)) for page in cache.pages]
    for same in zip(*pages, strict=True):
        K, most = cache.pages[0].head_size, int(length_B.max())
        out[_name(kind, same[0][0])] = _filled_slots([x for _, x in same], cache.deals, K, most)
    if any(seen is not None for seen in cache.each_seen):
        out[f"{kind}.seen"] = np.asarray(seen_slots(cache))
    return out


def _buffers(page: Cache) -> dict[str, Any]:
    return {"keys": page.keys, "values": page.values}


def _name(kind: str, path: Any) -> str:
    """As `memory.keys.0`, and in int8 `memory.keys.0.scale`."""
    return f"{kind}.{jax.tree_util.keystr(path, simple=True, separator='.')}"


def _filled_slots(arrays: Sequence[Any], deals: Sequence[Deal], K: int, filled: int) -> np.ndarray:
    """[B, G, K, filled] of the arrays of pages, in the order of slots."""
    parts, start = [], 0
    for page, deal in zip(arrays, deals, strict=True):
        if start < filled or not parts:
            # Of a device's memory only what is filled is fetched; what lies in the host's is there.
            whole = np.asarray(page) if deal.ways > 1 or host.holds(page) else page
            whole = deal.in_order(whole) if deal.ways > 1 else whole
            parts.append(np.asarray(whole[:, :, :K, : filled - start]))
        start += page.shape[-1]
    return np.ascontiguousarray(np.concatenate(parts, axis=-1))


def filled(
    like: Cache | Pages, arrays: dict[str, np.ndarray], kind: str, values_on_host: bool = False
) -> Cache | Pages:
    """A memory as `like`, with what `arrays_of` gave of another. It is of NumPy arrays, but for values on the host: put
    on devices one by one, each where it belongs, they never are on one together.

    Raises:
        KeyError, ValueError: arrays of other layers, heads or dtypes.
    """
    pages, first = [], 0
    for page in like.pages:
        pages.append(_filled_page(page, arrays, kind, first, values_on_host))
        first += page.capacity
    out = like.with_pages(pages)
    if f"{kind}.seen" not in arrays:
        return out
    seen_BM = arrays[f"{kind}.seen"][:, : out.capacity]
    more = [(0, 0), (0, out.capacity - seen_BM.shape[1])]
    return restrict(out, np.pad(seen_BM, more, constant_values=True))


def _filled_page(page: Cache, arrays: dict[str, np.ndarray], kind: str, first: int, values_on_host: bool) -> Cache:
    """A page with the slots from `first` on, as many as it has room for."""
    if values_on_host and page.keys:
        host.check(page.capacity // page.deal.ways, format_of(page.keys[0]))

    def buffer(path: Any, like: Any) -> Any:
        x, name = arrays[_name(kind, path)], _name(kind, path)
        sizes = *like.shape[:2], min(like.shape[2], page.head_size)
        if x.shape[:-1] != sizes or x.dtype != like.dtype:
            raise ValueError(f"{name} is {x.dtype} {x.shape}; wanted {like.dtype} {sizes} and slots")
        part = x[..., first : first + page.capacity]
        more = like.shape[2] - part.shape[2], page.capacity - part.shape[3]
        dealt = page.deal.as_dealt(np.pad(part, [(0, 0), (0, 0), *((0, n) for n in more)]))
        on_host = values_on_host and path[0].key == "values" and path[-1] != SCALE
        return host.there(dealt) if on_host else dealt

    buffers = jax.tree_util.tree_map_with_path(buffer, _buffers(page))
    # A cache without layers has room for nothing, whatever was read.
    length_B = np.clip(arrays[f"{kind}.length_B"] - first, 0, page.capacity).astype(np.int32)
    return dataclasses.replace(page, **buffers, length_B=length_B, seen=None)


def write(path: str | os.PathLike, form: str, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes arrays and metadata, with a name of their format and a checksum, beside and renamed.

    Raises:
        OSError: the file cannot be written; a path that is no ordinary file's.
    """
    path = pathlib.Path(path)
    if path.exists() and not path.is_file():
        raise OSError(f"saved memory {path}: a device or a directory; wanted a file")
    metadata = {"format": form, **metadata}
    metadata["checksum"] = _checksum(arrays, metadata)
    try:
        with files.replacing(path) as partial:
            save_file(arrays, partial, metadata)
    except safetensors.SafetensorError as error:
        raise OSError(f"saved memory {path}: cannot be written ({error})") from error


@contextlib.contextmanager
def opened(path: str | os.PathLike, form: str) -> Iterator[Any]:
    """What `write` wrote, opened. What is found not to be as it should while it is open is damage.

    Raises:
        FileNotFoundError: no such file.
        SavedMemoryError: a file of another format, or a damaged one.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"saved memory {path}: no such file")
    try:
        opening = safetensors.safe_open(path, "numpy")
    except safetensors.SafetensorError as error:
        raise SavedMemoryError(f"saved memory {path}: truncated, damaged or no safetensors file ({error})") from error
    with opening as file:
        found = (file.metadata() or {}).get("format")
        if found != form:
            raise SavedMemoryError(f"saved memory {path}: its format is {found!r}; wanted {form!r}")
        try:
            yield file
        except SavedMemoryError:
            raise
        except (safetensors.SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
            raise SavedMemoryError(f"saved memory {path}: damaged ({type(error).__name__}: {error})") from error


def read(file: Any) -> dict[str, np.ndarray]:
    """All arrays of an opened file.

    Raises:
        ValueError: its checksum is of other contents.
    """
    arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if _checksum(arrays, file.metadata()) != file.metadata()["checksum"]:
        raise ValueError("its checksum is not that of its contents")
    return arrays


def _checksum(arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> str:
    crc = zlib.crc32(json.dumps({k: v for k, v in metadata.items() if k != "checksum"}, sort_keys=True).encode())
    for name in sorted(arrays):
        crc = zlib.crc32(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8), zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"
