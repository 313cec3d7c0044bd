"""Training steps of the paper's runs, compiled for pods and GPU nodes that are not there: what `docs/compiled` shows.

    pip install '.[tpu,gpu_compiler]' && python bench/compiled_steps.py             # an hour or two on two cores
    python bench/compiled_steps.py --only 3b_v5e --out /tmp/compiled                # what has a name that begins so
    python bench/compiled_steps.py --write                                          # the tables, from the reports alone

Every report is that of `train.py --compile_only`, with the commit; one that is there already is not made again. Then
tables.md is written beside them.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
CODE = ("fot_jax", "configs", "train.py")
PLAIN = ("attention=xla", "crossbatch.execution=concatenate")


def of_contexts(d: int, execution: str) -> tuple[str, ...]:
    """512 rows in two blocks: each of 256 documents' current windows reads d earlier ones."""
    blocks = "crossbatch.kind=blocks", "crossbatch.windows=1", f"crossbatch.contexts=({d},)"
    return "longllama_3b.py:v5e:16x16", "batch.rows=512", f"crossbatch.execution={execution}", *blocks


# Name: configuration, then what is changed of it.
RUNS: dict[str, tuple[str, ...]] = {
    "3b_v5e_8x8": ("longllama_3b.py:v5e:8x8",),
    "3b_v5e_16x16": ("longllama_3b.py:v5e:16x16",),
    "3b_v4_4x4x4": ("longllama_3b.py:v4:4x4x4",),
    "3b_v6e_8x8": ("longllama_3b.py:v6e:8x8",),
    "3b_2_v5e_4x8": ("longllama_3b.py:2*v5e:4x8",),
    "7b_v5e_16x16": ("longllama_7b.py:v5e:16x16",),
    "7b_v5p_4x4x4": ("longllama_7b.py:v5p:4x4x4",),
    "3b_h100_8": ("longllama_3b.py:h100:8",),
    "7b_h100_8": ("longllama_7b.py:h100:8",),
    "plain_3b_v5e_8x8": ("longllama_3b.py:v5e:8x8", *PLAIN),
    **{f"ring_{d}": of_contexts(d, "ring") for d in (2, 8, 64, 256)},
    **{f"concatenate_{d}": of_contexts(d, "concatenate") for d in (2, 8, 64, 256)},
}


def compiled(name: str, out: pathlib.Path) -> None:
    """Makes a report, or says why there is none."""
    config, *changes = RUNS[name]
    path = out / f"{name}.json"
    command = [sys.executable, "train.py", f"--config=configs/{config}", "--compile_only", f"--report={path}"]
    ran = subprocess.run(
        [*command, *(f"--config.{change}" for change in changes)], cwd=ROOT, capture_output=True, text=True
    )
    if not path.exists():
        raise SystemExit(f"{name} ended with {ran.returncode}: {ran.stderr[-2000:]}")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"commit": commit()}, indent=2) + "\n")


def commit() -> str:
    """The last one that changed what is compiled."""

    def git(*command: str) -> str:
        return subprocess.run(["git", *command, "--", *CODE], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    return git("log", "-1", "--format=%h") + ("-dirty" if git("diff", "HEAD", "--name-only") else "")


def gigabytes(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f}"


def line(name: str, report: dict) -> str:
    """A row of the table of runs."""
    if "refused" in report:
        return f"| `{name}` | {report['refused']} |" + " |" * 8
    mesh = ", ".join(f"{axis} {size}" for axis, size in report["mesh"].items() if size > 1)
    moved = ", ".join(
        f"{kind} {one['count']:,}: {gigabytes(one['nbytes'])}" for kind, one in report["collectives"].items()
    )
    cells = (
        f"`{name}`",
        report["hardware"],
        mesh,
        f"{report['rows']}",
        f"{report['attention']}, {report['execution']}",
        gigabytes(report["argument_bytes"]),
        gigabytes(report["temporary_bytes"]),
        f"{gigabytes(report['peak_bytes'])} of {report['bytes_of_chip'] / 1e9:.0f}",
        moved,
        f"{report['seconds']:.0f}",
    )
    return "| " + " | ".join(cells) + " |"


def tables(out: pathlib.Path) -> str:
    """The tables of what there is."""
    found = {name: json.loads(path.read_text()) for name in RUNS if (path := out / f"{name}.json").exists()}
    runs = [line(name, report) for name, report in found.items() if not name.startswith(("ring_", "concatenate_"))]
    heads = "report", "chips", "mesh", "rows", "attention, contexts", "arguments", "temporaries", "peak", "collectives"
    text = ["| " + " | ".join((*heads, "compiled in s")) + " |", "|" + " --- |" * 10, *runs]
    if any(name.startswith("ring_") for name in found):
        text += ["", "| contexts d | ring | concatenating |", "| --- | --- | --- |"]
        for d in (2, 8, 64, 256):
            cells = []
            for way in ("ring", "concatenate"):
                report = found.get(f"{way}_{d}", {"refused": "not compiled"})
                cells.append(report.get("refused") or gigabytes(report["temporary_bytes"]))
            text.append(f"| {d} | {' | '.join(cells)} |")
    return "\n".join(text) + "\n"


def main() -> None:
    """Makes what is missing, then writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "docs/compiled", help="folder of the reports")
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of names")
    parser.add_argument("--write", action="store_true", help="compile nothing")
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in RUNS:
        if not args.write and name.startswith(tuple(args.only)) and not (args.out / f"{name}.json").exists():
            print(f"{name} ...", flush=True)
            compiled(name, args.out)
    (args.out / "tables.md").write_text(tables(args.out))
    print(tables(args.out))


if __name__ == "__main__":
    main()
