"""Generates text from a model.

    fot-generate MODEL --prompt "Once upon a time" --max-new-tokens 100
    fot-generate MODEL --prompt-file book.txt --max-new-tokens 0 --save-memory book.memory
    fot-generate MODEL --load-memory book.memory --prompt "Who wrote the letter?" --temperature 0.8 --top-p 0.95

(or python -m fot_jax.generate). MODEL is any checkpoint that `fot_jax.load_pretrained` reads. Several prompts are read
and answered together, each as if alone. Text alone goes to stdout, streamed where there is one prompt; progress and
rates go to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from fot_jax import files, formats
from fot_jax import memory as memories
from fot_jax.checkpoint import CheckpointError
from fot_jax.config import FLOAT_DTYPES, MEMORY_DTYPES, ModelConfig
from fot_jax.generate import OUT_TOKENS, SPILLS, Reader, decode, extend, inspection, memory_tokens, prefill
from fot_jax.generate.sampling import Sampling
from fot_jax.generate.saved import check_model, check_saved, load_reader, save_reader
from fot_jax.generate.text import CONTEXT, TextStream
from fot_jax.host import keep_freed_memory, one_line
from fot_jax.pretrained import load_pretrained
from fot_jax.tokenizer import Tokenizer, check_vocab, open_tokenizer

REPORT_SECONDS = 5  # between lines of progress where stderr is no terminal
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class _Parser(argparse.ArgumentParser):
    """Errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _bytes(text: str) -> int:
    number, unit = text.rstrip("KMGT"), text[len(text.rstrip("KMGT")) :]
    try:
        value = int(float(number) * UNITS[unit])
    except (ValueError, KeyError, OverflowError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; wanted bytes, or a number with K, M, G or T") from error
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; wanted at least 1 byte")
    return value


def _at_least(least: int, most: int = 2**31 - 1) -> Any:
    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r}; wanted a whole number from {least} to {most}")
        return value

    return number


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("fot-generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory or file of a checkpoint; URL (gs://, s3://) of a working directory")
    parser.add_argument("--dtype", choices=FLOAT_DTYPES, help="of parameters and computation; the checkpoint's")
    parser.add_argument("--tokenizer", help="tokenizer.model, tokenizer.json or a directory with one; MODEL")

    prompts = parser.add_argument_group(
        "prompts", "in the order given; stdin where there is none and it is no terminal"
    )
    options = dict(action="append", dest="prompts", default=[])
    prompts.add_argument("--prompt", type=lambda x: ("text", x), metavar="TEXT", **options)
    prompts.add_argument("--prompt-file", type=lambda x: ("file", x), metavar="FILE", help="- is stdin", **options)
    prompts.add_argument(
        "--prompt-ids", type=lambda x: ("ids", x), metavar="IDS", help='token ids, as in "1 319 8"', **options
    )
    prompts.add_argument(
        "--prompt-ids-file", type=lambda x: ("ids file", x), metavar="FILE", help="a prompt of ids a line", **options
    )
    prompts.add_argument("--no-bos", action="store_true", help="no BOS before text, even if the tokenizer asks for it")

    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--max-new-tokens", type=_at_least(0), default=128, metavar="N", help="128; 0 only reads")
    sampling.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token")
    drawn = "where --temperature is above 0"
    sampling.add_argument("--top-k", type=_at_least(0), default=0, metavar="N", help=f"{drawn}; 0: no limit")
    sampling.add_argument("--top-p", type=float, default=1.0, metavar="P", help=f"{drawn}; 1: no limit")
    sampling.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X")
    sampling.add_argument("--seed", type=_at_least(0, most=2**63 - 1), default=0)
    sampling.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends a text; any number of them")

    memory = parser.add_argument_group("memory")
    memory.add_argument("--last-context-length", type=_at_least(1), metavar="N", help="tokens left in the open window")
    memory.add_argument("--spill", choices=SPILLS, default="block", help="what leaves a full window")
    memory.add_argument("--memory", choices=memories.KINDS, default="dense", help="how it is read")
    memory.add_argument("--k", type=_at_least(1), metavar="N", help="slots that a query retrieves, but with dense")
    memory.add_argument("--memory-dtype", choices=MEMORY_DTYPES, help="the checkpoint's by default")
    memory.add_argument("--memory-bytes", type=_bytes, metavar="SIZE", help="bound of the memory's size, as in 2G")
    memory.add_argument("--score-bytes", type=_bytes, metavar="SIZE", help="bytes of scores over memory at a time")
    memory.add_argument("--values-on-host", action="store_true", help="in the host's memory, for topk and approximate")
    memory.add_argument("--save-memory", metavar="FILE", help="writes what was read, once the prompt is")
    memory.add_argument("--load-memory", metavar="FILE", help="goes on from there; a prompt is read after it")

    output = parser.add_argument_group("output")
    output.add_argument("--print-ids", action="store_true", help="token ids in place of text; needs no tokenizer")
    output.add_argument("--json", metavar="FILE", help="results and rates; - is stdout, then without text")
    output.add_argument("--stream-every", type=_at_least(1), default=8, metavar="N", help="tokens between outputs; 8")
    output.add_argument("--quiet", action="store_true", help="no progress, no rates")
    return parser


class _Clock:
    """Seconds that went by, without those of compiling."""

    def __init__(self) -> None:
        self.compiling = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._event)
        self._begin = time.perf_counter()

    def _event(self, event: str, seconds: float, **_: Any) -> None:
        if event in ("/jax/core/compile/backend_compile_duration", "/jax/core/compile/jaxpr_to_mlir_module_duration"):
            self.compiling += seconds

    def now(self) -> float:
        return time.perf_counter() - self._begin - self.compiling

    def close(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self._event)


@contextlib.contextmanager
def _progress(total: int, clock: _Clock, quiet: bool) -> Iterator[Any]:
    """A function to be called with tokens read: a bar on a terminal, a line now and then elsewhere."""
    if quiet:
        yield lambda tokens: None
    elif sys.stderr.isatty():
        with tqdm.tqdm(total=total, unit=" tokens", desc="reading", file=sys.stderr, leave=False) as bar:
            yield bar.update
    else:
        done, begin, reported = 0, clock.now(), time.monotonic()

        def line(tokens: int) -> None:
            nonlocal done, reported
            done += tokens
            if time.monotonic() - reported >= REPORT_SECONDS:
                reported = time.monotonic()
                rate = done / max(clock.now() - begin, 1e-9)
                print(f"read {done:,} of {total:,} tokens, {rate:,.0f} tokens/s", file=sys.stderr, flush=True)

        yield line


def _read_file(name: str) -> str:
    try:
        return sys.stdin.read() if name == "-" else pathlib.Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt file {name}: not UTF-8 ({error})") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"prompt file {name}: no such file") from error


def _ids(text: str, what: str) -> list[int]:
    try:
        return [int(word) for word in text.split()]
    except ValueError as error:
        raise ValueError(f"{what}: {error}; wanted token ids, as in '1 319 8'") from error


def _prompts(args: argparse.Namespace, tokenizer: Tokenizer | None, config: ModelConfig) -> list[list[int]]:
    """Token ids of every prompt."""
    given = args.prompts
    if not given and not args.load_memory:
        if sys.stdin is None or sys.stdin.isatty():
            raise ValueError("no prompt; wanted --prompt, --prompt-file, --prompt-ids, --load-memory, or text on stdin")
        given = [("file", "-")]
    begin = [] if args.no_bos or args.load_memory or tokenizer is None or not tokenizer.adds_bos else [tokenizer.bos_id]
    rows: list[list[int]] = []
    for kind, value in given:
        if kind == "ids":
            rows.append(_ids(value, "--prompt-ids"))
        elif kind == "ids file":
            rows += [
                _ids(line, f"--prompt-ids-file {value}") for line in _read_file(value).splitlines() if line.strip()
            ]
        else:
            text = value if kind == "text" else _read_file(value)
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"--prompt {text!r}: not UTF-8 ({error.reason})") from error
            rows.append([*begin, *map(int, tokenizer.encode(text))])
    for number, row in enumerate(rows):
        if not row and not args.load_memory:
            raise ValueError(f"prompt {number} is empty; wanted at least 1 token")
        for token in row:
            if not 0 <= token < config.vocab_size:
                raise ValueError(f"prompt {number} has token {token}; wanted 0..{config.vocab_size - 1} (vocab_size)")
    if not rows and not args.load_memory:
        raise ValueError("no prompt in the files given; wanted at least one")
    return rows


def _capacity(config: ModelConfig, budget: int | None, rows: int, needed: int) -> int | None:
    """Slots of memory in a budget, whole windows of them."""
    if budget is None or not config.mem_layers:
        return None
    token = memories.token_bytes(config) * rows
    capacity = budget // (token * config.window) * config.window
    if capacity < needed:
        wanted = -(-needed // config.window) * config.window
        raise ValueError(
            f"--memory-bytes is {budget:,}, which holds {capacity:,} tokens in each of {rows} rows; prompt and new "
            f"tokens need {needed:,}, in whole windows {wanted:,}: {wanted * token:,} bytes"
        )
    # No more than can be filled: what is allocated is compiled for, and zeroed.
    return min(capacity, memory_tokens(config, rows, needed))


def _padded(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [B, T], padded at the left, and their mask."""
    T = max(1, *map(len, rows))
    tokens_BT, mask_BT = np.zeros((len(rows), T), np.int32), np.zeros((len(rows), T), bool)
    for b, row in enumerate(rows):
        tokens_BT[b, T - len(row) :], mask_BT[b, T - len(row) :] = row, True
    return tokens_BT, mask_BT


class _Row:
    """What came of one prompt."""

    def __init__(self, stream: TextStream | None, eos_ids: tuple[int, ...]):
        self.tokens: list[int] = []
        self.finish: str | None = None  # "eos", "stop" or "length"
        self._stream, self._eos_ids = stream, eos_ids

    def push(self, ids: Sequence[int]) -> str:
        """Takes tokens; the output that is certain now."""
        if self.finish:
            return ""
        ids = [int(i) for i in ids]
        if ends := [at for at, i in enumerate(ids) if i in self._eos_ids]:
            ids, self.finish = ids[: ends[0] + 1], "eos"
        if self._stream is None:
            before = " " if self.tokens else ""
            self.tokens += ids
            return before + " ".join(map(str, ids))
        out = ""
        for i in ids:  # one by one, so that a row ends with the token that a stop string does
            self.tokens.append(i)
            if i in self._eos_ids:
                return out + self._stream.finish()
            out += self._stream.push([i])
            if self._stream.stopped:
                self.finish = "stop"
                break
        return out

    def end(self) -> str:
        """No more tokens: the rest of the output."""
        if self.finish:
            return ""
        self.finish = "length"
        return "" if self._stream is None else self._stream.finish()

    @property
    def text(self) -> str | None:
        return None if self._stream is None else self._stream.text


def _write_over(rows: list[_Row], pieces: list[str], outputs: list[str], printed: int, silent: bool) -> int:
    """Prints what can be: of one row every piece, of several each whole, in order. How many rows are printed whole."""
    for b, piece in enumerate(pieces):
        outputs[b] += piece
    if silent:
        return printed
    if len(rows) == 1:
        print(pieces[0], end="")
    else:
        while printed < len(rows) and rows[printed].finish:
            print(f"--- prompt {printed + 1} of {len(rows)} ---\n{outputs[printed]}")
            printed += 1
    print(end="", flush=True)
    return printed


def _model(args: argparse.Namespace) -> ModelConfig:
    """The configuration of the checkpoint, without reading weights."""
    return formats.open_checkpoint(args.model).with_dtypes(args.dtype, args.memory_dtype).config


def run(args: argparse.Namespace) -> None:
    """Checks, then reading, then writing."""
    numbers = args.temperature, args.top_k, args.top_p, args.repetition_penalty
    sampling, reading = Sampling(*numbers), memories.Reading(args.memory, args.k, args.score_bytes)
    if args.values_on_host and reading.kind == "dense":
        raise ValueError(
            "--values-on-host with --memory dense, which would need all of them; wanted topk or approximate"
        )
    if "" in args.stop:
        raise ValueError("--stop is empty; wanted at least 1 character")
    if args.stop and args.print_ids:
        raise ValueError("--stop with --print-ids: stop strings are looked for in text; wanted one of them")
    for name in (args.save_memory, args.json):
        if name and name != "-" and not pathlib.Path(name).absolute().parent.is_dir():
            raise FileNotFoundError(f"{name}: its folder does not exist")
        if name and pathlib.Path(name).is_dir():
            raise IsADirectoryError(f"{name}: a folder; wanted a file's name")
    if args.save_memory and pathlib.Path(args.save_memory).exists() and not pathlib.Path(args.save_memory).is_file():
        raise ValueError(f"--save-memory {args.save_memory}: a device; wanted a file's name")
    if args.load_memory and args.last_context_length:
        raise ValueError("--last-context-length with --load-memory: what was read is in memory already; wanted one")
    args.model = formats.local(args.model)
    config = _model(args)
    c = args.last_context_length
    if c is not None and c > config.window:
        raise ValueError(f"--last-context-length is {c}; wanted 1..{config.window} (the window)")
    texts = not args.prompts and not args.load_memory or any(kind in ("text", "file") for kind, _ in args.prompts)
    tokenizer = None
    if texts or not args.print_ids:
        tokenizer = open_tokenizer(args.tokenizer or args.model)
        check_vocab(tokenizer, config.vocab_size, padded=True)
    prompts = _prompts(args, tokenizer, config)
    saved = check_saved(args.load_memory) if args.load_memory else {"rows": len(prompts), "tokens": 0}
    prompts = prompts or [[]] * saved["rows"]
    if saved["rows"] not in (1, len(prompts)):
        raise ValueError(f"{args.load_memory} has {saved['rows']} rows and there are {len(prompts)} prompts")
    if args.load_memory:
        check_model(args.load_memory, saved["model"], config)
    befores = saved.get("last_tokens", [[]])
    befores = befores * len(prompts) if len(befores) == 1 else befores
    N, B = args.max_new_tokens, len(prompts)
    new = max(map(len, prompts)) + N
    capacity = _capacity(config, args.memory_bytes, B, saved["tokens"] + new)

    _, params = load_pretrained(args.model, dtype=args.dtype)
    clock = _Clock()
    try:
        total = _tokens_read(args, config, prompts)
        reader, seconds = _read(args, config, params, prompts, total, new, capacity, clock)
        if args.save_memory:
            last = [[*before, *prompt][-CONTEXT:] for before, prompt in zip(befores, prompts, strict=True)]
            save_reader(args.save_memory, config, params, reader, last)
        rows = [
            _Row(None if args.print_ids else TextStream(tokenizer, [*before, *prompt], args.stop), config.eos_ids)
            for before, prompt in zip(befores, prompts, strict=True)
        ]
        found = _recall(config, params, reader, reading) if N else {}
        begin = clock.now()
        reader, first = _write(args, config, params, reader, rows, sampling, reading, clock)
        # The first token of each row is what reading gave.
        written, later = sum(len(row.tokens) for row in rows), clock.now() - begin - first
        rates = {
            "prompt_tokens": total,
            "prefill_seconds": round(seconds, 4),
            "prefill_tokens_per_second": round(total / max(seconds, 1e-9), 2),
            "seconds_to_first_token": round(seconds + first, 4) if N else None,
            "new_tokens": written,
            "decode_tokens_per_second": round((written - B) / max(later, 1e-9), 2) if written > B else None,
            "memory_tokens": int(np.max(reader.mem.length_B)),
            "memory_capacity": reader.mem.capacity,
            "memory_bytes": reader.mem.nbytes,
            "compile_seconds": round(clock.compiling, 2),
            **found,
        }
    finally:
        clock.close()
    if args.json:
        results = [
            {"prompt": b, "prompt_tokens": len(prompt), "tokens": row.tokens, "text": row.text, "finish": row.finish}
            for b, (prompt, row) in enumerate(zip(prompts, rows, strict=True))
        ]
        if args.json == "-":
            print(json.dumps({"results": results, **rates}, indent=2))
        else:
            files.write_json(args.json, {"results": results, **rates})
    if not args.quiet:
        print(_summary(rates), file=sys.stderr)


def _tokens_read(args: argparse.Namespace, config: ModelConfig, prompts: list[list[int]]) -> int:
    """How many tokens of the prompts the model reads: without memory, those that stay in the open window."""
    lengths = list(map(len, prompts))
    if config.mem_layers or args.load_memory:
        return sum(lengths)
    c = args.last_context_length or config.last_context_length
    if max(lengths) > c and not args.quiet:
        print(f"{args.model} has no memory layers: only the last {c:,} tokens of a prompt are read", file=sys.stderr)
    return sum(min(length, c) for length in lengths)


def _read(
    args: argparse.Namespace,
    config: ModelConfig,
    params: Any,
    prompts: list[list[int]],
    total: int,
    new: int,
    capacity: int | None,
    clock: _Clock,
) -> tuple[Reader, float]:
    """What the prompts, and the memory before them, leave to go on from; seconds it took."""
    tokens_BT, mask_BT = _padded(prompts)
    options = dict(memory=args.memory, k=args.k, score_bytes=args.score_bytes)
    reader = None
    if args.load_memory:
        room = dict(room=new, memory_capacity=capacity, values_on_host=args.values_on_host)
        reader = load_reader(args.load_memory, config, params, rows=len(prompts), **room)
    begin = clock.now()
    with _progress(total, clock, args.quiet) as progress:
        if reader is None:
            inputs = tokens_BT, args.last_context_length, mask_BT
            room = args.max_new_tokens
            options |= dict(room=room, memory_capacity=capacity, progress=progress, values_on_host=args.values_on_host)
            reader = prefill(config, params, *inputs, **options)
        elif mask_BT.any():
            options |= dict(spill=args.spill, progress=progress)
            reader = extend(config, params, reader, tokens_BT, mask_BT, **options)
    jax.block_until_ready(reader)
    return reader, clock.now() - begin


def _recall(config: ModelConfig, params: Any, reader: Reader, reading: memories.Reading) -> dict[str, Any]:
    """What an approximate search finds of the k best for the likeliest next token, a share for each memory layer."""
    if reading.kind != "approximate" or not config.mem_layers:
        return {}
    likeliest_BT = np.argmax(np.asarray(reader.logits_BV), axis=-1)[:, None]
    found = inspection.recall(config, params, reader, likeliest_BT, reading)
    return {"recall": {str(layer): round(share, 4) for layer, share in found.items()}}


def _write(
    args: argparse.Namespace,
    config: ModelConfig,
    params: Any,
    reader: Reader,
    rows: list[_Row],
    sampling: Sampling,
    reading: memories.Reading,
    clock: _Clock,
) -> tuple[Reader, float]:
    """New tokens into the rows and their text to stdout; seconds to the first token."""
    key, N, silent = jax.random.key(args.seed), args.max_new_tokens, args.json == "-"
    outputs, printed, done, first = [""] * len(rows), 0, 0, 0.0
    begin = clock.now()
    while done < N and not all(row.finish for row in rows):
        count = min(args.stream_every if done else 1, OUT_TOKENS, N - done)
        options = dict(max_new_tokens=count, spill=args.spill, reading=reading)
        out, reader = decode(config, params, reader, sampling, key, **options)
        new_BN = np.asarray(out)
        first = first or clock.now() - begin
        pieces = [row.push(new) for row, new in zip(rows, new_BN, strict=True)]
        done += count
        printed = _write_over(rows, pieces, outputs, printed, silent)
        over_B = jnp.asarray([row.finish is not None for row in rows])
        reader = dataclasses.replace(reader, ended_B=reader.ended_B | over_B)
    if N:
        printed = _write_over(rows, [row.end() for row in rows], outputs, printed, silent)
        if len(rows) == 1 and not silent:
            print(flush=True)  # before the rates on stderr
    return reader, first


def _summary(rates: dict[str, Any]) -> str:
    out = f"read {rates['prompt_tokens']:,} tokens, {rates['prefill_tokens_per_second']:,.0f} tokens/s"
    if rates["new_tokens"]:
        out += f"; first token after {rates['seconds_to_first_token']:.3f} s; wrote {rates['new_tokens']:,} tokens"
    if rates["decode_tokens_per_second"] is not None:
        out += f", {rates['decode_tokens_per_second']:,.1f} tokens/s after the first"
    for layer, share in rates.get("recall", {}).items():
        out += f"; of the best of memory, layer {layer} found {100 * share:.1f}%"
    return (
        f"{out}; memory {rates['memory_tokens']:,} of {rates['memory_capacity']:,} tokens a row, "
        f"{rates['memory_bytes'] / 2**20:,.1f} MiB; {rates['compile_seconds']:.1f} s of compiling not counted"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 0, or 2 where something does not fit."""
    args = _parser().parse_args(argv)
    keep_freed_memory()
    try:
        run(args)
    except jax.errors.JaxRuntimeError as error:
        print(f"fot-generate: {one_line(error)} (--memory-bytes and --score-bytes bound what is used)", file=sys.stderr)
        return 2
    except (ValueError, OSError, ImportError, CheckpointError) as error:
        print(f"fot-generate: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nfot-generate: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
