"""Tasks of EleutherAI's lm-evaluation-harness.

    python -m fot_jax.evals.harness --checkpoint DIR --tasks hellaswag,lambada_openai --out results/harness

prints lm-eval's table and writes its results into a folder as JSON; a run that was killed goes on where it was when the
same command is given again. `FotLM` is the model in lm-eval's terms (lm_eval/api/model.py of its version 0.4.13), and
its name there, once this module is imported, is fot:

    python -c "import fot_jax.evals.harness, lm_eval.__main__ as m; m.cli_evaluate()" \\
        run --model fot --model_args checkpoint=DIR,rows=16 --tasks hellaswag

Nothing is cut off: what does not fit the window is read from memory; see `FotLM` for where each token is. Needs the
package lm-eval, without its extras.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn

from fot_jax import files, memory, sharding
from fot_jax.checkpoint import CheckpointError
from fot_jax.config import FLOAT_DTYPES, MEMORY_DTYPES
from fot_jax.evals import finite
from fot_jax.evals.fot_lm import FotLM
from fot_jax.evals.journal import Journal
from fot_jax.evals.subject import reading_options
from fot_jax.host import keep_freed_memory, one_line

# Of lm-eval's results, what differs between runs that find the same.
_NOT_FOUND = ("samples", "date", "pretty_env_info", "git_hash", "upper_git_hash")


class _Parser(argparse.ArgumentParser):
    """Errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _mesh(text: str) -> dict[str, int]:
    try:
        sizes = {axis: int(size) for axis, size in (pair.split("=") for pair in text.split(","))}
    except ValueError:
        sizes = {text: 0}
    if set(sizes) - set(sharding.MESH_AXES) or min(sizes.values()) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; wanted sizes of {', '.join(sharding.MESH_AXES)}, as in data=2")
    return sizes


def _limit(text: str) -> int | float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if value <= 0 or (value > 1 and value != int(value)):
        raise argparse.ArgumentTypeError(f"{text!r}; wanted a number of documents, or a share of them below 1")
    return int(value) if value >= 1 else value


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("fot_jax.evals.harness", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", required=True, help="working directory of train.py or its URL, or another model"
    )
    parser.add_argument("--tokenizer", default="", help="file or directory; the checkpoint's")
    parser.add_argument("--dtype", choices=FLOAT_DTYPES, default="float32", help="of parameters and computation")
    parser.add_argument("--mesh", type=_mesh, default={}, metavar="AXIS=SIZE,..", help="as in data=2,context=4")

    tasks = parser.add_argument_group("tasks")
    tasks.add_argument("--tasks", required=True, help="names (* stands for anything) and files, with commas between")
    tasks.add_argument("--include-path", metavar="DIR", help="folder with tasks of one's own")
    tasks.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each question; the task's")
    tasks.add_argument("--limit", type=_limit, metavar="N", help="documents of each task, or a share; all")
    tasks.add_argument("--gen-kwargs", metavar="KEY=VALUE,..", help="in place of a task's, as in max_gen_toks=64")
    tasks.add_argument("--apply-chat-template", action="store_true", help="the one beside the tokenizer")
    tasks.add_argument(
        "--bootstrap-iters", type=int, default=1000, metavar="N", help="for standard errors; 1000, 0: none"
    )
    tasks.add_argument("--seed", type=int, default=0, help="of what is drawn, where a task has do_sample")

    options, reads = reading_options(), parser.add_argument_group("reading", "see fot_jax/evals/subject.py")
    reads.add_argument("--rows", type=int, default=options["rows"], metavar="N", help="texts read together")
    reads.add_argument("--reading", choices=memory.KINDS, default=options["reading"], help="how memory is read")
    reads.add_argument(
        "--k", type=int, default=options["k"], metavar="N", help="slots a query retrieves, but with dense"
    )
    reads.add_argument("--window", type=int, default=0, metavar="W", help="tokens of a window; the checkpoint's")
    reads.add_argument("--last-context-length", type=int, default=0, metavar="C", help="the checkpoint's")
    reads.add_argument("--capacity", type=int, default=0, metavar="N", help="most tokens of a text; any number")
    reads.add_argument("--memory-dtype", choices=MEMORY_DTYPES, default="", help="the checkpoint's")

    output = parser.add_argument_group("output")
    output.add_argument("--out", type=pathlib.Path, metavar="FOLDER", help="for harness.json; none is written without")
    output.add_argument("--log-samples", action="store_true", help="also harness.TASK.jsonl, a line for each document")
    return parser


def _tasks(stated: str, include: str | None) -> tuple[list[Any], Any]:
    """Tasks and groups, and lm-eval's index: of a folder alone where that has all, as the whole takes seconds."""
    from lm_eval.tasks import TaskManager

    if include is not None and not pathlib.Path(include).is_dir():
        raise FileNotFoundError(f"{include}: no such directory; wanted --include-path with tasks")
    patterns = [name for name in stated.split(",") if name]
    paths = [name for name in patterns if name.endswith((".yaml", ".yml"))]
    if missing := [path for path in paths if not pathlib.Path(path).is_file()]:
        raise FileNotFoundError(f"{missing[0]}: no such file; wanted a task")
    for defaults in (False, True):
        manager = TaskManager(include_path=include, include_defaults=defaults)
        found = {name: manager.match_tasks([name]) for name in patterns if name not in paths}
        names = [name for each in found.values() for name in each]
        if all(found.values()) and (defaults or set(names) <= set(manager.all_subtasks)):
            return [each for name in [*names, *paths] for each in _loaded(name, manager)], manager
    missing = ", ".join(name for name, each in found.items() if not each)
    raise ValueError(f"tasks has {missing}, which lm-eval does not know; `lm_eval ls tasks` lists those that it does")


def _loaded(name: str, manager: Any) -> list[Any]:
    """The tasks and groups that a name or a file stands for, but for those within these groups."""
    try:
        found = manager.load([name])
    except Exception as error:  # a task is a file, of which anything can be wrong, and code
        raise ValueError(f"task {name} cannot be loaded: {type(error).__name__}: {error}") from error
    inner = {child for children in found["group_map"].values() for child in children}
    return [each for key, each in {**found["tasks"], **found["groups"]}.items() if key not in inner]


def _run(args: argparse.Namespace, lm: FotLM, tasks: list[Any], manager: Any) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.utils import handle_non_serializable, make_table

    began = time.perf_counter()
    if args.out is not None:
        lm.journal = Journal(args.out / "harness.partial.jsonl", lm.identity())
    results = simple_evaluate(
        model=lm,
        tasks=tasks,
        task_manager=manager,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        gen_kwargs=args.gen_kwargs,
        apply_chat_template=args.apply_chat_template,
        bootstrap_iters=args.bootstrap_iters,
        log_samples=args.log_samples,
    )
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    speed = lm.subject.clock.speed(time.perf_counter() - began)
    print(lm.subject.clock.described(speed))
    if args.out is None:
        return
    # A function's text has its address, which differs from run to run.
    other = lambda value: (
        f"<function {value.__name__}>" if inspect.isfunction(value) else handle_non_serializable(value)
    )
    plain = lambda value: finite(json.loads(json.dumps(value, default=other)))
    kept = {key: value for key, value in results.items() if key not in _NOT_FOUND}
    for task, samples in (results.get("samples") or {}).items():
        lines = "".join(json.dumps(plain(sample)) + "\n" for sample in samples)
        files.write(args.out / f"harness.{task.replace('/', '_')}.jsonl", lines.encode())
    files.write_json(args.out / "harness.speed.json", speed)
    files.write_json(args.out / "harness.json", plain(kept))
    lm.journal.close()
    print(f"written: {args.out / 'harness.json'}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 0, or 2 where something does not fit."""
    args = _parser().parse_args(argv)
    keep_freed_memory()
    # Standard errors are found by this process alone: a fork of one with JAX's threads can hang.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    reading = {name: getattr(args, name) for name in reading_options()}
    try:
        tasks, manager = _tasks(args.tasks, args.include_path)
        more = dict(tokenizer=args.tokenizer, dtype=args.dtype, seed=args.seed, **args.mesh)
        lm = FotLM(args.checkpoint, **reading, **more)
        if args.apply_chat_template:
            lm.chat_template(True)
        _run(args, lm, tasks, manager)
    except (ValueError, KeyError, OSError, ImportError, CheckpointError) as error:
        kind = "KeyError: " if isinstance(error, KeyError) else ""  # its message is the key alone
        print(f"fot_jax.evals.harness: {kind}{one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
