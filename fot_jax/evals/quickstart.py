"""The whole of fot_jax on real text, from nothing: a tokenizer, two models, and what memory is worth to each.

    python -m fot_jax.evals.quickstart --out results/quickstart

Runs the project's own commands and shows each: a SentencePiece model is trained on Python's standard library, then
two models of one size on the same tokens of it, one with crossbatch (`fot`) and one without (`standard`), each on a
core of its own. Both are evaluated on held-out packages with memory of growing length. Writes
OUT/metrics.json and OUT/quickstart.png. A run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

from fot_jax.evals import Report, perplexity
from fot_jax.evals.subject import described

ROOT = pathlib.Path(__file__).parents[2]
MODELS = ("fot", "standard")
STAGES = (1, 2)


def command(*words: str, log: pathlib.Path | None = None, core: int | None = None) -> subprocess.Popen:
    """Starts `python ...` in the checkout, shows it, and pins it to one core if asked."""
    print(f"\n$ python {' '.join(words)}" + (f"   (output: {log})" if log else ""), flush=True)
    pin = None if core is None else (lambda: os.sched_setaffinity(0, {core}))
    output = None if log is None else open(log, "w")
    return subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, preexec_fn=pin, stdout=output, stderr=output and subprocess.STDOUT
    )


def finish(*processes: subprocess.Popen) -> None:
    """Waits for commands; the first that fails ends the others and this one."""
    while any(process.poll() is None for process in processes):
        time.sleep(0.2)
        if any(process.poll() for process in processes):
            break
    for process in processes:
        if process.poll():
            for other in processes:
                other.terminate()
            sys.exit(f"command failed with status {process.returncode}: {' '.join(process.args[1:])}")


def platform() -> str:
    """JAX's default platform, said by a process of its own: an accelerator is one process's at a time."""
    code = "import jax; print(jax.default_backend())"
    return subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def side_by_side(commands: dict[str, tuple[str, ...]], out: pathlib.Path) -> None:
    """One command a core, where there are enough: small models use one core much better than a share of several. One
    after another, with all cores, where there is an accelerator.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < len(commands) or platform() != "cpu":
        for words in commands.values():
            finish(command(*words))
        return
    running = [
        command(*words, log=out / f"{name}.log" if i else None, core=cores[i])
        for i, (name, words) in enumerate(commands.items())
    ]
    finish(*running)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="results/quickstart", help="folder for everything that is made")
    parser.add_argument("--long", action="store_true", help="four times the steps")
    args = parser.parse_args()
    out, start = pathlib.Path(args.out).absolute(), time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    length = ",long" if args.long else ""
    stage = lambda which, n: out / f"{which}{n}"

    tokenizer = out / "tokenizer.model"
    if not tokenizer.exists():
        finish(
            command(
                "-m", "fot_jax.data", "train-tokenizer", "python:train", f"--output={tokenizer}", "--vocab_size=1024"
            )
        )
    train = lambda which, n: (
        "train.py",
        f"--config=configs/quickstart.py:{which},{n}{length}",
        f"--workdir={stage(which, n)}",
        f"--config.data.tokenizer={tokenizer}",
        f"--config.data.prepared={out / 'data'}",
        f"--config.init_from={stage(which, n - 1) if n > 1 else ''}",
    )
    for n in STAGES:
        side_by_side({f"{which}{n}": train(which, n) for which in MODELS}, out)
    trained = time.monotonic()
    evaluate = lambda which: (
        "eval.py",
        "--config=configs/eval/quickstart.py",
        f"--checkpoint={stage(which, STAGES[-1])}",
        f"--config.data.prepared={out / 'data'}",
    )
    side_by_side({f"{which}_eval": evaluate(which) for which in MODELS}, out)

    found = {which: json.loads((stage(which, STAGES[-1]) / "eval" / "perplexity.json").read_text()) for which in MODELS}
    report = compare(found)
    report.write(out, "metrics")
    (out / "metrics.png").replace(out / "quickstart.png")
    print(f"\n{report.table()}\n\n{verdict(report.values)}\n")
    print(f"{trained - start:.0f} s of training, {time.monotonic() - trained:.0f} s of evaluation")
    print(f"written: {out}/metrics.json and quickstart.png")


def compare(found: dict[str, dict]) -> Report:
    """Both models' curves in one table and one figure."""
    curves = {}
    for which in MODELS:
        curves[which] = found[which]["perplexity"]
        curves[f"{which}_recall"] = found[which]["recall"]
    facts = found["fot"]
    titles = {"": "perplexity on held-out packages", "_recall": "recall tokens alone"}
    return Report(
        title=(
            f"Perplexity by memory length on {facts['tokens']:,} held-out tokens, window {facts['window']}, "
            f"memory read by {described(facts['options'])}"
        ),
        columns=("memory tokens", "fot", "standard", "fot, recall", "standard, recall"),
        rows=tuple(
            (int(m), *(curves[f"{which}{kind}"][m] for kind in titles for which in MODELS)) for m in facts["perplexity"]
        ),
        values={
            **curves,
            "options": facts["options"],
            "window": facts["window"],
            "tokens": facts["tokens"],
            "recall_tokens": facts["recall_tokens"],
        },
        plot=lambda path: perplexity.plot(
            path, {f"{which}: {title}": curves[f"{which}{kind}"] for kind, title in titles.items() for which in MODELS}
        ),
    )


def verdict(curves: dict[str, dict[str, float]]) -> str:
    """What the table says, in three sentences."""
    fot, recall = curves["fot"], curves["fot_recall"]
    gain = lambda curve: 100 * (1 - min(curve.values()) / curve["0"])
    longest = max(fot, key=int)
    drift = 100 * (fot[longest] / min(fot.values()) - 1)
    return (
        f"Memory lowers the crossbatch model's perplexity by {gain(fot):.1f}%, on recall tokens by "
        f"{gain(recall):.1f}%.\n"
        f"With {int(longest):,} tokens of memory it is {drift:.2f}% above its best.\n"
        f"Its best is {min(fot.values()):.2f}, the standard model's {min(curves['standard'].values()):.2f}."
    )


if __name__ == "__main__":
    main()
