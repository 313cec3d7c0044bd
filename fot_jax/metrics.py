"""What a run tells while it trains: how many FLOPs its maths needs, rates, and where the numbers are written."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import sys
import time
from typing import Any

import jax
import numpy as np
import tqdm

from fot_jax import crossbatch, files
from fot_jax.config import ModelConfig
from fot_jax.mirror import Mirror

_log = logging.getLogger(__name__)


def flops_per_token(config: ModelConfig, plan: crossbatch.Plan | None = None, length: int | None = None) -> float:
    """FLOPs that training needs for a token: matrix products and attention, forward and backward (3 times forward).

    Causal attention counts as half, contexts as far as the plan lets them be seen. Nothing recomputed, and no
    element-wise work, is counted.

    Args:
        length: T, tokens of a row; the model's window if None.
    """
    T, heads = length or config.window, config.n_heads * config.head_size
    projections = 4 * config.d_model * (heads + config.n_kv_heads * config.head_size)
    local = 4 * heads * T / 2
    contexts = 4 * heads * T * float(np.mean(plan.seen)) if plan else 0.0
    layers = config.n_layers * (projections + 6 * config.d_model * config.d_ff + local)
    return 3.0 * (layers + len(config.mem_layers) * contexts + 2 * config.d_model * config.vocab_size)


class Metrics:
    """Writes numbers where people look: a progress bar or plain lines, `metrics.jsonl`, TensorBoard's files,
    and Weights & Biases if asked. Only process 0 writes.

    Lines of `metrics.jsonl` after `step`, left by a run that was killed beyond its last checkpoint, are taken out.

    Args:
        workdir: folder, or URL of one: files then go there every half a minute.
        step: steps done.
        steps: steps there will be.
        wandb: project at Weights & Biases; "" for none.
        config: of the run, for Weights & Biases.
    """

    def __init__(
        self, workdir: str | os.PathLike, step: int, steps: int, wandb: str = "", config: dict[str, Any] | None = None
    ):
        self.active = jax.process_index() == 0
        if not self.active:
            return
        import tensorboardX  # which imports PyTorch where that is installed

        self.mirror = Mirror(workdir)
        self.mirror.fetch("metrics.jsonl")
        self.path = self.mirror.local / "metrics.jsonl"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        files.write(self.path, "".join(f"{line}\n" for line in kept).encode())
        self.board = tensorboardX.SummaryWriter(
            str(self.mirror.local / "tensorboard"), purge_step=step + 1 if step else None, flush_secs=10
        )
        self.wandb = _wandb_run(wandb, str(workdir), config or {}) if wandb else None
        self.bar = tqdm.tqdm(total=steps, initial=step, unit="step", disable=not sys.stderr.isatty())

    def write(self, step: int, values: dict[str, float]) -> None:
        """Records the values of a step."""
        if not self.active:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(values, step=step)
        text = ", ".join(f"{name} {value:.6g}" for name, value in values.items())
        if self.bar.disable:
            _log.info("step %d: %s", step, text)
        else:
            self.bar.update(step - self.bar.n)
            self.bar.write(f"step {step}: {text}")

    def copy(self) -> None:
        """Where the working directory is at a URL, brings there what was written so far."""
        if self.active:
            self.mirror.try_copy()

    def close(self) -> None:
        """Flushes everything."""
        if self.active:
            self.bar.close()
            self.board.close()
            if self.wandb:
                self.wandb.finish()
            self.mirror.close()


def _wandb_run(project: str, workdir: str, config: dict[str, Any]) -> Any:
    """A run at Weights & Biases that is the same one whenever this working directory's is resumed."""
    import wandb

    number = hashlib.sha256(workdir.encode()).hexdigest()[:16]
    name = workdir.rstrip("/").rpartition("/")[2]
    return wandb.init(project=project, name=name, id=number, resume="allow", config=config)


class Meter:
    """Rates between one report and the next; the first step, which compiles, is not counted."""

    def __init__(self, peak_flops: float):
        self.peak, self.start = peak_flops, None
        self.steps = 0
        self.tokens = self.flops = self.waited = 0.0

    def count(self, tokens: float, flops: float) -> None:
        """Adds a finished step."""
        if self.start is None:
            self.start, self.waited = time.perf_counter(), 0.0
        else:
            self.steps, self.tokens, self.flops = self.steps + 1, self.tokens + tokens, self.flops + flops

    @contextlib.contextmanager
    def waiting(self):
        """Counts the time inside as time without data."""
        before = time.perf_counter()
        yield
        self.waited += time.perf_counter() - before

    @contextlib.contextmanager
    def pause(self):
        """Leaves the time inside out."""
        before = time.perf_counter()
        yield
        if self.start is not None:
            self.start += time.perf_counter() - before

    def rates(self) -> dict[str, float]:
        """Rates since the last call; nothing after a first step."""
        if not self.tokens:
            return {}
        now = time.perf_counter()
        seconds, self.start = now - self.start, now
        out = {
            "seconds_per_step": seconds / self.steps,
            "tokens_per_second": self.tokens / seconds,
            "flops_per_second": self.flops / seconds,
        }
        if self.peak:
            out["flops_share"] = out["flops_per_second"] / self.peak
        out["data_wait_share"] = self.waited / seconds
        self.steps = 0
        self.tokens = self.flops = self.waited = 0.0
        return out
