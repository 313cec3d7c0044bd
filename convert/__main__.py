"""Converts checkpoints: Hugging Face LLaMA and LongLLaMA, Meta, EasyLM, GGUF and our own, recognised by themselves.

    fot-convert SRC DST --to orbax                  a working directory: train.py --config.init_from=DST, eval.py
    fot-convert SRC DST --to hf                     Hugging Face LongLLaMA, for the published inference code
    fot-convert SRC DST --to hf-llama               Hugging Face LLaMA, for stock transformers
    fot-convert SRC DST --to orbax --memory-layers 6,12,18      makes a LLaMA a LongLLaMA, to be tuned
    fot-convert SRC --to orbax --plan               only says what would be done

(`python -m convert` is the same.) Nothing is cast unless --dtype is given. The model is never held in memory, and DST
appears when it is complete.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import glob
import math
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence

import jax
import tqdm
from absl import logging

from convert import plan as planning
from convert import writers
from fot_jax import checkpoint, files, formats
from fot_jax.config import FLOAT_DTYPES, MEMORY_DTYPES, SIZES, named
from fot_jax.formats import easylm
from fot_jax.host import one_line, row, size

EXIT_NOT_VERIFIED, EXIT_ERROR = 1, 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fot-convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", metavar="SRC", help="directory or file of the checkpoint; URL of a working directory")
    add("destination", metavar="DST", type=pathlib.Path, nargs="?", help="directory to make")
    add("--to", choices=planning.TARGETS, required=True, help="format of the result")
    add("--dtype", choices=FLOAT_DTYPES, help="of all tensors (default: each keeps its own)")
    add("--memory-layers", type=_layers, metavar="L,L,...", help="layers that read memory, from 0; 'none' for none")
    add("--memory-dtype", choices=MEMORY_DTYPES, help="what memory is kept in (default: the source's)")
    add("--expand-kv-heads", action="store_true", help="repeat key and value heads, one for each query head")
    add("--size", choices=sorted(SIZES), metavar="NAME", help="the model's size, for EasyLM without configuration")
    add("--no-tokenizer", action="store_true", help="leave out the tokenizer's files")
    add("--window", type=int, metavar="W", help="tokens of the window, where the source does not say it or is wrong")
    add("--verify", action="store_true", help="compare the result with the source; DST appears only if they agree")
    add("--tolerance", type=float, help="of --verify: greatest difference over greatest logit")
    add("--step", type=int, metavar="N", help="which checkpoint of a working directory (default: the latest)")
    add("--plan", action="store_true", help="say what would be done, and what it needs; read no weights")
    add("--overwrite", action="store_true", help="replace DST")
    add("--json", type=pathlib.Path, metavar="FILE", help="write plan and results there")
    return parser


def _layers(text: str) -> tuple[int, ...]:
    try:
        return () if text == "none" else tuple(int(layer) for layer in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; wanted layers, as in 6,12,18, or none") from None


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its exit status: 0, 1 where --verify found a difference, 2 for an error."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.destination is None and not args.plan:
        parser.error("DST is missing; only --plan needs none")
    if args.tolerance is not None and not args.verify:
        parser.error("--tolerance is of --verify, which is not given")
    if args.plan and args.verify:
        parser.error("--verify reads what --plan does not write; wanted one of them")
    if args.tolerance is not None and not 0 <= args.tolerance < math.inf:
        parser.error(f"--tolerance is {args.tolerance}; wanted a number of 0 or more")
    if args.json and (not args.json.absolute().parent.is_dir() or args.json.is_dir()):
        parser.error(f"--json {args.json}: wanted a file in a folder that is there")
    try:
        with _quietly_on_the_cpu(), _terminated():
            return _convert(args)
    except (ValueError, OSError, ImportError, checkpoint.CheckpointError) as error:
        print(f"fot-convert: {one_line(error)}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("fot-convert: interrupted; DST is what it was, or complete", file=sys.stderr)
        return EXIT_ERROR


def _convert(args: argparse.Namespace) -> int:
    stated = named(args.size) if args.size else None
    source = formats.open_checkpoint(args.source, size=stated, window=args.window, step=args.step)
    if stated and source.layout is not easylm.LAYOUT:
        raise ValueError(
            f"--size is for EasyLM's checkpoints; {args.source} is {source.layout.format}'s and says its own"
        )
    if args.no_tokenizer:
        source = dataclasses.replace(source, tokenizer=lambda to: [])
    plan = planning.make_plan(
        source,
        args.to,
        dtype=args.dtype,
        memory_layers=args.memory_layers,
        memory_dtype=args.memory_dtype,
        expand_kv_heads=args.expand_kv_heads,
    )
    print(plan.table(), flush=True)
    if args.plan:
        with tempfile.TemporaryDirectory() as directory:
            print(row("tokenizer", ", ".join(writers.write_tokenizer(source, pathlib.Path(directory))) or "none"))
    results = {"plan": plan.summary()}
    if args.destination is not None:
        room = _check_destination(args.destination, plan, overwrite=args.overwrite)
        print(row("disk needed", f"{size(plan.nbytes)}, {size(room)} are free"), flush=True)
        if room < plan.nbytes and not args.plan:
            raise OSError(
                f"{args.destination}: the result needs {plan.nbytes:,} bytes, the disk has {room:,}; wanted more room"
            )
    else:
        print(row("disk needed", size(plan.nbytes)))
    passed = True
    if not args.plan:
        with files.beside(args.destination) as partial:
            start = time.perf_counter()
            with _progress(plan.nbytes) as progress:
                tokenizer = writers.write(plan, partial, progress)
            seconds = time.perf_counter() - start
            results["seconds"], results["bytes"], results["tokenizer"] = seconds, plan.nbytes, tokenizer
            print(row("tokenizer", ", ".join(tokenizer) or "none"))
            print(row("took", f"{seconds:.1f} s, {size(plan.nbytes / seconds)}/s"), flush=True)
            if args.verify:
                from convert.verify import verify

                report = verify(plan, partial, args.tolerance)
                passed = report.passed
                print(report.table(), flush=True)
                results["verify"] = report.as_dict()
            if passed:
                files.put_in_place(partial, args.destination, replace=args.overwrite)
                print(row("written", args.destination))
            else:
                print(f"fot-convert: {args.destination} is not written: the result differs", file=sys.stderr)
    if args.json:
        files.write_json(args.json, results)
    return 0 if passed else EXIT_NOT_VERIFIED


def _check_destination(destination: pathlib.Path, plan: planning.Plan, *, overwrite: bool) -> int:
    """Bytes free where the result is to go."""
    destination = pathlib.Path(os.path.abspath(destination))
    if destination.exists() and not overwrite:
        raise FileExistsError(f"{destination} is there; wanted a new directory, or --overwrite")
    if destination.is_symlink():
        raise ValueError(f"{destination} is a symbolic link; wanted the directory itself, {destination.resolve()}")
    if destination.exists() and not destination.is_dir():
        raise NotADirectoryError(f"{destination} is a file; wanted a directory to replace")
    source, there = plan.source.path.resolve(), destination.resolve()
    # Any file of the source, as they may be links, in Hugging Face's cache for one.
    walk = (pathlib.Path(root, name) for root, folders, names in os.walk(source) for name in (*folders, *names))
    for file in (source, *walk):  # a walk that bears files that go, as checkpoints of a run do
        if file.resolve().is_relative_to(there):
            raise ValueError(f"{destination} holds the source, {file.resolve()}; wanted another directory")
    for what in ("partial", "replaced"):
        for left in destination.parent.glob(f".{glob.escape(destination.name)}.{what}-*"):
            said = (
                "remove it" if what == "partial" or destination.exists() else f"it is what {destination} was: rename it"
            )
            print(row("left over", f"{left}, of a conversion that is running or was killed; if it was, {said}"))
    existing = next(parent for parent in destination.parents if parent.exists())
    return shutil.disk_usage(existing).free


@contextlib.contextmanager
def _quietly_on_the_cpu() -> Iterator[None]:
    """A conversion has nothing to do on an accelerator, which another process may be using. What it has to say of an
    error is one line; Orbax would log tracebacks.
    """
    before = jax.config.jax_platforms, logging.get_verbosity()
    jax.config.update("jax_platforms", "cpu")
    logging.set_verbosity(logging.FATAL)
    try:
        yield
    finally:
        jax.config.update("jax_platforms", before[0])
        logging.set_verbosity(before[1])


@contextlib.contextmanager
def _terminated() -> Iterator[None]:
    """Makes SIGTERM and a terminal that is closed end the conversion as Ctrl-C does, with nothing left behind."""

    def stop(number, frame):
        raise KeyboardInterrupt

    numbers = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    if threading.current_thread() is not threading.main_thread():
        numbers = []  # only the main thread may handle signals
    # What is ignored stays so, as under nohup.
    before = {n: signal.signal(n, stop) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _progress(total: int) -> Iterator:
    """A function to call with bytes done: a bar on a terminal, a line every ten seconds elsewhere."""
    bar = tqdm.tqdm(total=total, unit="B", unit_scale=True, desc="converting", disable=not sys.stderr.isatty())
    done, start, said = 0, time.perf_counter(), time.perf_counter()

    def progress(nbytes: int) -> None:
        nonlocal done, said
        done += nbytes
        bar.update(nbytes)
        if bar.disable and time.perf_counter() - said > 10:
            said = time.perf_counter()
            rate = size(done / (said - start))
            print(f"converting: {size(done)} of {size(total)}, {rate}/s", file=sys.stderr)

    with bar:
        yield progress


if __name__ == "__main__":
    sys.exit(main())
