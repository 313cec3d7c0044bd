"""Checkpoints of a training run; the only module that uses Orbax.

A working directory holds `model.json` (the ModelConfig, so that an evaluation needs nothing but the directory) and
`checkpoints/STEP/`, each step with four parts that load by themselves:

    params      the parameter tree
    optimizer   the optimizer's arrays and the step, flat, named by their path
    data        JSON: the data iterator's state, the same on every process
    run         JSON: a checksum of each array, a hash of `data`, and whatever else the loop must remember

A step is written beside (`STEP.orbax-checkpoint-tmp`) and renamed when it is whole, so a name that is a number is a
complete checkpoint whatever killed the process. The array files have no checksum of their own: a flipped bit would load
as another number. The checksums in `run` make it an error.

The working directory may be at a URL. In Google's store (gs://) Orbax writes each step in its place, and a file in it
last, which makes it complete. To S3 (s3://) it cannot write: there a step is written to a disk (see `staging`) and
copied, in the same order.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import pathlib
import re
import shutil
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from fot_jax import files, staging
from fot_jax.config import DtypePolicy, ModelConfig

PyTree = Any
_JSON_PARTS = ("data", "run")
_CHUNK_BYTES = 64 * 2**20  # of an array; what is read or written at a time
# A checkpoint, one being written, one being copied from a URL; what else lies beside them is not ours.
_OURS = re.compile(r"\d+|\d+\.orbax-checkpoint-tmp.*|\.\d+\.partial-.*")
_LOOK_S = 0.1  # how often is looked whether a save has failed
_GRACE_S = 5.0  # how long Orbax may take to give up a save, once a thread of its own has failed


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message names its path and says how to go on."""


class _Damaged(CheckpointError):
    """Files that are not what was saved, or, where it is read from a copy, are not in the copy."""

    def __init__(self, path: files.Location, what: str, copy: files.Location | None = None):
        others = [step for step in steps(path.parent.parent) if str(step) != path.name]
        go_on = f"resume from step {others[-1]}" if others else "start again (there is no other checkpoint)"
        remove = "Remove that folder"
        if copy:
            remove = f"Remove its copy {copy}, which is made again; if that is damaged too, remove the folder itself"
        super().__init__(f"the checkpoint {path} is damaged: {what}. {remove} to {go_on}.")
        self.what = what


def _context() -> ocp.Context:
    registry = ocp.handlers.local_registry()
    for name in _JSON_PARTS:
        registry.add(ocp.handlers.JsonHandler, checkpointable_name=name)
    context = ocp.Context()
    context.checkpointables.registry = registry
    # In one chunk, as is the default, a stack of layers is compressed by one thread and read back whole only.
    context.array_options.saving.storage_options.chunk_byte_size = _CHUNK_BYTES
    return context


def write_model(workdir: str | pathlib.Path, config: ModelConfig) -> None:
    """Writes `model.json`."""
    files.write_json(files.location(workdir) / "model.json", dataclasses.asdict(config))


def read_model(workdir: str | pathlib.Path) -> ModelConfig:
    """The ModelConfig in `model.json`.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: not JSON, or fields that ModelConfig does not have.
    """
    path = files.location(workdir) / "model.json"
    try:
        fields = files.read_json(path)
        return ModelConfig(**{**fields, "dtypes": DtypePolicy(**fields["dtypes"])})
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: not a model configuration ({error})") from error


def steps(workdir: str | pathlib.Path) -> list[int]:
    """Steps with a complete checkpoint, ascending; reading only, so safe beside a running training."""
    directory = files.location(workdir) / "checkpoints"
    if not directory.is_dir():
        return []
    found = [entry for entry in directory.iterdir() if entry.name.isdecimal()]
    if files.store_of(workdir):
        found = [entry for entry in found if (entry / staging.COMMITTED).exists()]
    return sorted(int(entry.name) for entry in found)


def is_workdir(path: str | pathlib.Path) -> bool:
    """Whether `path` is a working directory with at least one checkpoint."""
    return (files.location(path) / "model.json").is_file() and bool(steps(path))


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Leaves by their path, 'embed.embedding' or '1.mu.embed.embedding'."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


# An array's checksum is the sum, modulo 2^32, of a hash of every element's bits and place. A sum, so that it is the
# same on any mesh and may be made of parts; a hash, so that no two flipped bits or exchanged elements cancel. Bits and
# place, times an odd number, meet in an exclusive or; then the finaliser of MurmurHash3 mixes them.
_PLACE = 0x9E3779B1
_MIXING = ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1))  # shift right into, then multiply


@jax.jit
def _device_checksums(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    def one(x):
        bits = x if x.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
        place, size = jnp.zeros(x.shape, jnp.uint32), 1
        for axis in reversed(range(x.ndim)):
            place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(size % 2**32)
            size *= x.shape[axis]
        mixed = bits.astype(jnp.uint32) ^ place * jnp.uint32(_PLACE)
        for shift, factor in _MIXING:
            mixed = (mixed ^ mixed >> shift) * jnp.uint32(factor)
        return mixed.sum(dtype=jnp.uint32)

    return {name: one(x) for name, x in leaves.items()}


def _checksums(**parts: PyTree) -> dict[str, int]:
    leaves = {f"{part}.{name}": x for part, tree in parts.items() for name, x in named_leaves(tree).items()}
    return {name: int(total) for name, total in jax.device_get(_device_checksums(leaves)).items()}


def checksum(array: np.ndarray, first: int = 0) -> int:
    """The checksum of elements that lie in a row in an array, from number `first` on, without a device."""
    bits = np.ascontiguousarray(array).reshape(-1).view(f"uint{8 * min(array.dtype.itemsize, 4)}")
    first *= max(array.dtype.itemsize // 4, 1)  # a float64 counts as two
    size, total = 2**15, 0  # what the cache of a core holds
    places = np.arange(size, dtype=np.uint32) * np.uint32(_PLACE)
    mixed, shifted = np.empty_like(places), np.empty_like(places)
    for start in range(0, bits.size, size):
        part = bits[start : start + size]
        m, s = mixed[: part.size], shifted[: part.size]
        np.add(places[: part.size], np.uint32((first + start) * _PLACE % 2**32), out=m)
        np.bitwise_xor(m, part, out=m)
        for shift, factor in _MIXING:
            np.right_shift(m, shift, out=s)
            np.bitwise_xor(m, s, out=m)
            if factor != 1:
                np.multiply(m, np.uint32(factor), out=m)
        total += int(m.sum(dtype=np.uint64))
    return total % 2**32


def _hash(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class _Kept:
    """Which checkpoints are kept, as a policy for Orbax; see `Checkpoints`."""

    last: int
    every: int
    exported_every: int

    def of(self, steps: Iterable[int]) -> set[int]:
        """Those of some steps that are kept."""
        found = sorted(steps)
        milestones = [step for step in found if self.every and step % self.every == 0]
        exported = [step for step in found if self.exported_every and step % self.exported_every == 0]
        return {*found[-self.last :], *milestones, *exported[-2:]}

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        """What Orbax asks."""
        kept = self.of(c.step for c in checkpoints)
        return [c.step in kept for c in checkpoints]


class _Failures(logging.Handler):
    """What the threads of Orbax say of themselves. When one of them fails, a save of several processes is over, but all
    others wait for it until Orbax's own time is up, which are many minutes.

    Attributes:
        first: the first error of the save under way.
    """

    def __init__(self):
        super().__init__(logging.ERROR)
        self.first: BaseException | None = None
        self.told = 0.0
        logging.getLogger("absl").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and self.first is None and "orbax" in pathlib.PurePath(record.pathname).parts:
            self.first, self.told = record.exc_info[1], time.monotonic()

    def close(self) -> None:
        logging.getLogger("absl").removeHandler(self)
        super().close()


def _everywhere(what: str) -> None:
    """Waits for all processes to come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


class Checkpoints:
    """The checkpoints of the one process group that trains in a working directory.

    Args:
        workdir: made if absent; half-written checkpoints of a killed run are removed from it.
        config: written to `model.json`.
        save_every: steps between checkpoints.
        keep_last: how many of the newest are kept.
        keep_every: steps that are multiples of this are kept for good; 0 for none.
        exported_every: of steps that are multiples of this the newest two are kept, for who reads them; 0 for none.
        barrier: waits for all processes, if not the devices are to: process 0 may have a checkpoint to fetch before it
            is there, which can take longer than devices wait for one another.

    Attributes:
        directory: where they are.

    Raises:
        CheckpointError: `model.json` is there and says another model.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        config: ModelConfig,
        *,
        save_every: int,
        keep_last: int,
        keep_every: int = 0,
        exported_every: int = 0,
        barrier: Callable[[], None] | None = None,
    ):
        workdir = files.location(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        if steps(workdir):
            check_same_model(workdir, config)
        self.directory = workdir / "checkpoints"
        self._every, self._kept = save_every, _Kept(keep_last, keep_every, exported_every)
        self._staged = files.location(_staged(workdir)) if files.store_of(workdir) == "s3" else None
        if jax.process_index() == 0:
            write_model(workdir, config)
            _remove_incomplete(self.directory, steps(workdir))
            if self._staged:
                _remove_incomplete(self._staged, steps(workdir))
                for step in steps(workdir)[-1:]:  # before Orbax looks there, which counts what it has seen
                    _fetch_step(self.directory / str(step), pathlib.Path(self._staged / str(step)))
        if barrier:
            barrier()
        else:
            _everywhere(f"{self.directory} is as it was left")
        self._orbax = ocp.training.Checkpointer(
            self._staged or self.directory,
            preservation_policy=self._kept,
            context=_context(),
        )
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="save")
        self._failures = _Failures()
        self._pending: tuple[int, concurrent.futures.Future] | None = None
        self._broken = False
        self._completed: list[int] = []
        self._last: int | None = (steps(workdir) or [0])[-1]

    def should_save(self, step: int) -> bool:
        """Whether `step` is due."""
        return step % self._every == 0

    def save(self, step: int, params: PyTree, optimizer: PyTree, data: Any, run: dict[str, Any]) -> None:
        """Starts saving a step; returns when the arrays are copied, and the files are written behind.

        Args:
            step: steps done.
            params: parameter tree.
            optimizer: any pytree of arrays.
            data: JSON object, the data iterator's state, the same on every process.
            run: JSON values the loop must remember.

        Raises:
            CheckpointError: this save, or the one before it, failed.
        """
        self.wait()
        flat = named_leaves(optimizer)
        parts = {
            "params": params,
            "optimizer": flat,
            "data": data,
            "run": {**run, "checksums": _checksums(params=params, optimizer=flat), "data_hash": _hash(data)},
        }
        self._failures.first = None
        try:
            saving = self._orbax.save_checkpointables_async(step, parts, force=True)
        except Exception as error:
            raise self._failed(step, error) from error
        finish = saving.result
        if self._staged and jax.process_index() == 0:
            there = self.directory / str(step)
            finish = functools.partial(
                staging.copied, saving, pathlib.Path(self._staged / str(step)), there, self._kept.of
            )
        self._pending = step, self._thread.submit(finish)

    def under_way(self) -> bool:
        """Whether a save is under way that may still be completed."""
        pending = self._pending  # which another thread may change
        return pending is not None and not pending[1].done() and self._failures.first is None

    def broken(self) -> bool:
        """Whether a save has failed."""
        return self._broken

    def last(self) -> int | None:
        """The last step whose checkpoint is known to be whole; 0 if there is none, None if only process 0 knows."""
        step, saving = self._pending or (0, None)
        if saving and saving.done() and not saving.exception():
            return self._known(step)
        return self._last

    def _known(self, step: int) -> int | None:
        # Orbax completes a checkpoint before it says so to any process; of copies only process 0 hears.
        return None if self._staged and jax.process_index() else step

    def poll(self) -> None:
        """Raises CheckpointError if the save under way has failed; never waits for one that has not."""
        if self._pending and not self.under_way():
            self.wait()

    def wait(self) -> None:
        """Waits for the save under way. Raises CheckpointError if it failed."""
        if self._pending is None:
            return
        step, saving = self._pending
        while not saving.done() and not (self._failures.first and time.monotonic() > self._failures.told + _GRACE_S):
            concurrent.futures.wait([saving], timeout=_LOOK_S)
        error = saving.exception() if saving.done() else self._failures.first
        if error:
            raise self._failed(step, error) from error
        self._last, self._pending = self._known(step), None
        self._completed.append(step)

    def completed(self) -> list[int]:
        """Steps whose checkpoints were completed since this was last asked."""
        done, self._completed = self._completed, []
        return done

    def close(self) -> None:
        """Waits for the save under way and releases Orbax's threads. Raises CheckpointError if the save failed."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception if self._broken else ()):  # Orbax tells of the failed save once more
                self._orbax.close()
            self._thread.shutdown(wait=not self._broken)
            self._failures.close()

    def _failed(self, step: int, error: BaseException) -> CheckpointError:
        self._pending, self._broken = None, True
        with contextlib.suppress(Exception):  # others may still be writing there; who resumes removes it
            if jax.process_index() == 0:
                for half in (self._staged or self.directory).glob(f"{step}.orbax-checkpoint-tmp*"):
                    half.rmtree(missing_ok=True)  # on a full disk it only takes room
        try:
            whole = steps(self.directory.parent)
            left = f"the checkpoint of step {whole[-1]} is whole" if whole else "no earlier checkpoint exists"
        except Exception as other:  # a store that is out of reach
            left = f"earlier checkpoints could not be listed ({files.first_line(other)})"
        return CheckpointError(
            f"saving step {step} to {self.directory / str(step)} failed: {files.first_line(error)}; {left}. "
            "Make room, or repair what stores it, then run the same command to resume."
        )


def _staged(workdir: str | os.PathLike) -> pathlib.Path:
    """The checkpoints on the disk of a working directory at a URL that Orbax cannot write to."""
    return staging.folder(files.location(workdir)) / "checkpoints"


def _remove_incomplete(directory: files.Location, complete: list[int]) -> None:
    """Removes what a killed run left of checkpoints."""
    for entry in directory.iterdir() if directory.is_dir() else ():
        whole = entry.name.isdecimal() and int(entry.name) in complete
        if _OURS.fullmatch(entry.name) and not whole:
            entry.rmtree(missing_ok=True)


def check_same_model(workdir: str | pathlib.Path, config: ModelConfig) -> None:
    """Raises CheckpointError if `model.json` says another model, each field by name; number formats may differ."""
    found, wanted = dataclasses.asdict(read_model(workdir)), dataclasses.asdict(config)
    # Number formats may change between runs (a TPU's bfloat16, a CPU's float32); what the parameters mean may not.
    wrong = [
        f"{name} is {found[name]!r}, wanted {wanted[name]!r}"
        for name in wanted
        if name != "dtypes" and found[name] != wanted[name]
    ]
    if wrong:
        raise CheckpointError(
            f"{workdir} holds checkpoints of another model: {'; '.join(wrong)}. Use another --workdir for a new model."
        )


def check_resumable(workdir: str | pathlib.Path) -> None:
    """Raises CheckpointError if the latest checkpoint is one of parameters alone, as a conversion writes."""
    path = _path(workdir, None)
    try:
        sums = dict(files.read_json(path / "run" / "data.json")["checksums"])
    except (OSError, ValueError, KeyError, TypeError):
        return  # damaged, which is for `restore` to say
    if not any(name.startswith("optimizer.") for name in sums):
        raise CheckpointError(
            f"{workdir} holds a model's parameters alone, as a conversion writes them, and no training to go on with; "
            f"wanted --config.init_from={workdir} and another --workdir"
        )


def restore(
    workdir: str | pathlib.Path, params: PyTree, optimizer: PyTree, step: int | None = None
) -> tuple[PyTree, PyTree, Any, dict[str, Any]]:
    """Loads a whole checkpoint, onto any mesh.

    Args:
        workdir: working directory.
        params, optimizer: trees of `jax.ShapeDtypeStruct` with the shardings wanted.
        step: which; the latest if None.

    Returns:
        params, optimizer, data, run, as given to `Checkpoints.save`.

    Raises:
        FileNotFoundError: no such checkpoint.
        CheckpointError: a tensor of another shape or dtype, missing or too many; damaged files.
    """
    path = _path(workdir, step)
    if files.store_of(workdir) == "s3":
        there, path = path, _staged(workdir) / path.name
        if jax.process_index() == 0:
            _fetch_step(there, path)
        _everywhere(f"{there} is on the disk")
        try:
            return _restored(path, params, optimizer)
        except _Damaged as error:
            raise _Damaged(there, error.what, copy=path) from error
    return _restored(path, params, optimizer)


def _restored(path: pathlib.Path, params: PyTree, optimizer: PyTree) -> tuple[PyTree, PyTree, Any, dict[str, Any]]:
    """A checkpoint on a disk, or where Orbax reads; see `restore`."""
    flat = named_leaves(optimizer)
    loaded = _load(path, {"params": params, "optimizer": flat, "data": None, "run": None})
    _check_checksums(path, loaded["run"], params=loaded["params"], optimizer=loaded["optimizer"])
    if loaded["run"].pop("data_hash", None) != _hash(loaded["data"]):
        raise _Damaged(path, "another data position than was saved")
    del loaded["run"]["checksums"]
    leaves = [loaded["optimizer"][name] for name in flat]
    return loaded["params"], jax.tree.unflatten(jax.tree.structure(optimizer), leaves), loaded["data"], loaded["run"]


def _path(workdir: str | pathlib.Path, step: int | None) -> pathlib.Path:
    found = steps(workdir)
    directory = files.location(workdir) / "checkpoints"
    if not found or (step is not None and step not in found):
        wanted = "a step" if step is None else f"step {step}"
        raise FileNotFoundError(f"{directory} holds steps {found}; wanted {wanted}")
    return directory / str(found[-1] if step is None else step)


def fetch(workdir: str | os.PathLike, directory: pathlib.Path, step: int | None = None) -> None:
    """Copies of a working directory at a URL what an evaluation needs: the model, its parameters, the tokenizer. What
    was copied before, and is the same, stays.

    Args:
        workdir: the URL.
        directory: working directory to make of it.
        step: of the checkpoint; the latest if None.

    Raises:
        FileNotFoundError: no such checkpoint.
    """
    path = _path(workdir, step)
    for name in ("model.json", *files.TOKENIZER_FILES):
        if (there := files.location(workdir) / name).exists():
            files.write(directory / name, there.read_bytes())
    _fetch_step(path, directory / "checkpoints" / path.name, without=("optimizer", "data"))


def _fetch_step(there: files.Location, step: pathlib.Path, without: tuple[str, ...] = ()) -> None:
    """Copies a checkpoint from a URL, but its parts `without`, unless the one on the disk is the same, by the checksums
    of all that is in it; for one process to call.
    """
    told = pathlib.PurePosixPath("run", "data.json")
    if not ((step / told).exists() and (step / told).read_bytes() == (there / told).read_bytes()):
        staging.download(there, step, without)


def _metadata(path: pathlib.Path, *wanted: str) -> dict[str, PyTree]:
    """Trees of shapes and dtypes of the array parts `wanted`."""
    try:
        with _context():
            parts = dict(ocp.checkpointables_metadata(path).metadata)
    except Exception as error:  # Orbax and TensorStore raise many kinds for damaged files
        raise _Damaged(path, files.first_line(error)) from error
    if missing := [part for part in wanted if parts.get(part) is None]:
        raise _Damaged(path, f"no readable description of {' and '.join(missing)}")
    return parts


def _load(path: pathlib.Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """The parts of a checkpoint that `wanted` names; arrays as its trees of shapes say, JSON where it says None."""
    arrays = [part for part in wanted if part not in _JSON_PARTS]
    found = _metadata(path, *arrays)
    for part in arrays:
        check_shapes(path, part, found[part], wanted[part])
    try:
        with _context():
            return ocp.load_checkpointables(path, wanted)
    except Exception as error:
        raise _Damaged(path, files.first_line(error.__cause__ or error)) from error


class ParamsWriter:
    """Writes the parameters of a model into a working directory a piece at a time, for checkpoints that are converted.

    Orbax saves whole trees only: fed leaf by leaf (its partial saving) it still holds three copies of a leaf. So the
    arrays are written in its layout (Zarr 3, no OCDBT) with TensorStore, a chunk a layer, and its description of them
    last; Orbax writes the rest, and reads all of it like any other checkpoint.

    Args:
        workdir: an empty directory, or one to make.
        config: written to `model.json`.
        leaves: path in the tree -> (shape, dtype, number of leading dimensions that stack layers).

    Raises:
        OSError: the disk is full, or the like.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        config: ModelConfig,
        leaves: dict[tuple[str, ...], tuple[tuple[int, ...], Any, int]],
    ):
        self._step = pathlib.Path(workdir).absolute() / "checkpoints" / "0"
        self._config = config
        self._arrays: dict[tuple[str, ...], tensorstore.TensorStore] = {}
        self._missing: dict[tuple[str, ...], int] = {}
        self._shapes = {path: shape for path, (shape, _, _) in leaves.items()}
        self._sums: dict[str, int] = {}
        self._params = self._step.parent.parent / "params"
        self._params.mkdir(parents=True)
        for path, (shape, dtype, stacked) in leaves.items():
            chunk = [1] * stacked + list(shape[stacked:])
            while math.prod(chunk) * np.dtype(dtype).itemsize > _CHUNK_BYTES:
                if not (even := [n for n in chunk if n % 2 == 0]):
                    break
                chunk[chunk.index(max(even))] //= 2
            metadata = {
                "shape": list(shape),
                "data_type": np.dtype(dtype).name,
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
                "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
            }
            self._arrays[path] = self._do(tensorstore.open(self._spec(path, metadata=metadata), create=True))
            self._missing[path] = math.prod(shape[:stacked])
            self._sums[".".join(path)] = 0

    def _spec(self, path: tuple[str, ...], **more: Any) -> dict[str, Any]:
        place = {"driver": "file", "path": f"{self._params / '.'.join(path)}/"}
        # Numbers that are all zero are written too: Orbax takes a chunk that is not there for one that is lost.
        return {"driver": "zarr3", "kvstore": place, "store_data_equal_to_fill_value": True, **more}

    def _do(self, future: Any) -> Any:
        try:
            return future.result()
        except ValueError as error:  # how TensorStore says that a write failed
            raise OSError(f"{self._params}: cannot be written ({_said(error)})") from error

    def write(self, path: tuple[str, ...], stack: tuple[int, ...], array: np.ndarray) -> None:
        """Writes one layer of a leaf (`stack` says which; () for a leaf that is not stacked), once."""
        self._do(self._arrays[path][stack].write(np.ascontiguousarray(array)))
        name = ".".join(path)
        first = _first(stack, self._shapes[path])
        self._sums[name] = (self._sums[name] + checksum(array, first)) % 2**32
        self._missing[path] -= 1

    def finish(self) -> None:
        """Makes the working directory's checkpoint 0 of what was written."""
        if unwritten := [".".join(path) for path, n in self._missing.items() if n]:
            raise ValueError(f"{unwritten[0]} was not written whole")
        described = {
            str(path): {
                "key_metadata": [{"key": key, "key_type": 2} for key in path],  # 2: of a dictionary
                "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False},
            }
            for path in self._arrays
        }
        flags = {"use_ocdbt": False, "use_zarr3": True, "store_array_data_equal_to_fill_value": True}
        files.write_json(self._params / "_METADATA", {"tree_metadata": described, **flags, "custom_metadata": None})
        # Orbax writes everything round the arrays for a stand-in, whose place they take.
        run = {"checksums": {f"params.{name}": total for name, total in self._sums.items()}}
        self._step.parent.mkdir()
        try:
            with _context():
                ocp.save_checkpointables(self._step, {"params": {"stand_in": np.zeros(1)}, "run": run})
        except Exception as error:  # Orbax raises many kinds
            raise OSError(f"{self._step}: cannot be written ({files.first_line(error)})") from error
        shutil.rmtree(self._step / "params")
        self._params.rename(self._step / "params")
        write_model(self._step.parent.parent, self._config)


class ParamsReader:
    """Reads the parameters of a checkpoint a layer at a time, any checkpoint of `train.py` or of `ParamsWriter`.

    (Orbax loads whole leaves, and holds several copies of one while it does.) The bits of a leaf are checked when the
    last of its layers is read.

    Args:
        workdir: working directory.
        step: which; the latest if None.

    Attributes:
        config: the model.
        leaves: path in the tree -> (shape, dtype).

    Raises:
        FileNotFoundError: no such checkpoint.
        CheckpointError: damaged files.
    """

    def __init__(self, workdir: str | pathlib.Path, step: int | None = None):
        self._path = _path(workdir, step)
        self.config = read_model(workdir)
        try:
            self._checksums = dict(files.read_json(self._path / "run" / "data.json")["checksums"])
            described = files.read_json(self._path / "params" / "_METADATA")
            self._ocdbt, self._zarr3 = bool(described["use_ocdbt"]), bool(described["use_zarr3"])
            paths = [tuple(key["key"] for key in leaf["key_metadata"]) for leaf in described["tree_metadata"].values()]
            self._arrays = {path: self._tensorstore(path, cache_bytes=0) for path in paths}
        except Exception as error:  # JSON of any other kind; TensorStore raises many kinds
            raise _Damaged(self._path, _said(error)) from error
        self.leaves = {path: (tuple(array.shape), array.dtype.numpy_dtype) for path, array in self._arrays.items()}
        self._open: tuple[tuple[str, ...], Any] | None = None
        self._sums: dict[tuple[str, ...], dict[tuple[int, ...], int]] = {path: {} for path in self.leaves}

    def _array(self, path: tuple[str, ...], stacked: int) -> Any:
        if self._open is None or self._open[0] != path:
            shape, dtype = self.leaves[path]
            array = self._arrays[path]
            if any(n > 1 for n in array.chunk_layout.read_chunk.shape[:stacked]):
                # Layers that lie in one chunk: it is decoded once, not for each of them.
                array = self._tensorstore(path, cache_bytes=math.prod(shape) * dtype.itemsize + 2 * _CHUNK_BYTES)
            self._open = path, array
        return self._open[1]

    def _tensorstore(self, path: tuple[str, ...], cache_bytes: int) -> Any:
        store: dict[str, Any] = {"driver": "file", "path": f"{self._path / 'params'}/"}
        name = ".".join(path) + "/"
        if self._ocdbt:
            store = {"driver": "ocdbt", "base": store, "path": name}
        else:
            store["path"] += name
        spec = {"driver": "zarr3" if self._zarr3 else "zarr", "kvstore": store}
        context = tensorstore.Context({"cache_pool": {"total_bytes_limit": cache_bytes}})
        options = dict(open=True, read=True, context=context, recheck_cached_data=False)
        return tensorstore.open(spec, **options).result()

    def read(self, path: tuple[str, ...], stack: tuple[int, ...]) -> np.ndarray:
        """One layer of a leaf; `stack` says which, () is all of a leaf.

        Raises:
            CheckpointError: damaged files.
        """
        try:
            array = self._array(path, len(stack))[stack].read().result()
        except Exception as error:  # TensorStore raises many kinds
            raise _Damaged(self._path, f"{'.'.join(path)}: {_said(error)}") from error
        sums, name = self._sums[path], f"params.{'.'.join(path)}"
        sums[stack] = checksum(array, _first(stack, self.leaves[path][0]))
        whole = len(sums) == math.prod(self.leaves[path][0][: len(stack)])
        if whole and sum(sums.values()) % 2**32 != self._checksums.get(name):
            raise _Damaged(self._path, f"other bits than were saved in {name}")
        return array


def _first(stack: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """Number of the first element of a layer, in a leaf of that shape."""
    layer = int(np.ravel_multi_index(stack, shape[: len(stack)])) if stack else 0
    return layer * math.prod(shape[len(stack) :])


def check_shapes(path: str | pathlib.Path, part: str, found: PyTree, wanted: PyTree) -> None:
    """Compares two trees of arrays or shapes.

    Args:
        path, part: where `found` is from, for the message.

    Raises:
        CheckpointError: tensors missing, too many, or of another shape or dtype, each by name with found and wanted.
    """
    have, want = named_leaves(found), named_leaves(wanted)
    wrong = [
        f"{name} is {_describe(have.get(name))}, wanted {_describe(want.get(name))}"
        for name in sorted(have.keys() | want.keys())
        if _describe(have.get(name)) != _describe(want.get(name))
    ]
    if wrong:
        more = f" (and {len(wrong) - 8} more)" if len(wrong) > 8 else ""
        raise CheckpointError(f"{path}: the tensors of {part} do not fit: {'; '.join(wrong[:8])}{more}")


def _describe(leaf: Any) -> str:
    return "absent" if leaf is None else f"{jnp.dtype(leaf.dtype).name}{list(leaf.shape)}"


def _check_checksums(path: pathlib.Path, run: Any, **parts: PyTree) -> None:
    wanted = run.get("checksums") if isinstance(run, dict) else None
    if not isinstance(wanted, dict):
        raise _Damaged(path, "no checksums of the saved arrays")
    wrong = [name for name, total in _checksums(**parts).items() if wanted.get(name) != total]
    if wrong:
        raise _Damaged(path, f"other bits than were saved in {', '.join(wrong[:8])}")


def _said(error: BaseException) -> str:
    """What TensorStore says of an error, without its specification of the array."""
    return files.first_line(error).partition(" [tensorstore_spec=")[0]
