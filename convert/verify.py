"""Comparing the result of a conversion with its source: every number, and what both models say of the same tokens."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np

from convert.plan import Plan
from fot_jax import formats, model
from fot_jax.config import DtypePolicy
from fot_jax.files import first_line
from fot_jax.formats import gguf, hf
from fot_jax.formats.source import Source, read_params
from fot_jax.host import row

ROWS, TOKENS = 2, 64
# Largest difference of logits over the largest logit. Two float32 implementations of one model differ by their order of
# summation; rounded weights by as much as their mantissa says, a little more with depth.
TOLERANCES = {None: 1e-4, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}


@dataclasses.dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        reference: who ran the source.
        independent: whether that is another implementation, which read the files itself.
        config: fields of the result's configuration that are not as planned; empty where all are.
        tensor, tensor_difference: where parameters differ most, and by how much.
        reader_difference: greatest difference of logits between an independent reference and our forward pass over the
            source, before anything is cast; 0 where there is none.
        logit_difference: greatest difference of logits between the source, as the reference runs it, and the result.
        largest_logit: greatest logit of the source.
        position: (row, token, word) of the greatest difference.
        same_choice: share of tokens after which both find the same word likeliest.
        tolerance: of logit_difference / largest_logit; reader_difference has that of float32.
    """

    reference: str
    independent: bool
    config: str
    tensor: str
    tensor_difference: float
    reader_difference: float
    logit_difference: float
    largest_logit: float
    position: tuple[int, int, int]
    same_choice: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether configuration and every parameter are as planned and logits agree. Logits that are not finite never
        do.
        """
        read_right = bool(self.reader_difference <= TOLERANCES[None] * self.largest_logit)
        same_logits = bool(self.logit_difference <= self.tolerance * self.largest_logit)
        return not self.config and not self.tensor_difference and read_right and same_logits

    def table(self) -> str:
        """For people."""
        relative = self.logit_difference / self.largest_logit if self.largest_logit else float("nan")
        rows = {
            "source run by": self.reference,
            "configuration": self.config or "as planned",
            "parameters": f"greatest difference {self.tensor_difference:.3g}"
            + (f", in {self.tensor}" if self.tensor_difference else ": every number is the same"),
            "logits": f"greatest difference {self.logit_difference:.3g} of {self.largest_logit:.4g} ({relative:.2g}; "
            f"tolerance {self.tolerance:g}), at row {self.position[0]}, token {self.position[1]}, "
            f"word {self.position[2]}",
            "likeliest word": f"the same after {100 * self.same_choice:.1f}% of tokens",
            "verified": ("yes" if self.independent else "yes, by our own reading alone") if self.passed else "NO",
        }
        return "\n".join(row(name, value) for name, value in rows.items())

    def as_dict(self) -> dict[str, Any]:
        """For programs."""
        return {**dataclasses.asdict(self), "passed": self.passed}


def verify(plan: Plan, directory: pathlib.Path, tolerance: float | None = None) -> Report:
    """Reads back what was written and compares it with the source.

    Parameters are compared bit for bit, in the result's dtype. Logits are those of 2 rows of 64 random words (or
    of the window, if that is shorter), in float32: the source's by transformers where it reads the source and is
    installed, else by our forward pass; the result's always by ours. Where numbers were rounded, the two also run the
    source as it is, so that rounding does not hide a tensor read wrongly. Needs room for one model in float32.

    Args:
        directory: what `writers.write` wrote.
        tolerance: of the greatest difference of logits, as a share of the greatest logit; None goes by the dtype.

    Raises:
        ValueError, CheckpointError: the result cannot be read.
    """
    result = formats.open_checkpoint(directory)
    tensor, tensor_difference = _compare_tensors(plan, result)
    vocab, length = plan.config.vocab_size, min(TOKENS, plan.config.window)
    tokens_BT = np.random.default_rng(0).integers(0, vocab, (ROWS, length), dtype=np.int32)
    # With the result's memory layers: within a window they change a model only where it says so (`Plan.notes`).
    source = plan.source.with_config(plan.source.config.replace(mem_layers=plan.config.mem_layers))
    reference, independent, wanted = _reference(source, tokens_BT)
    rounded = any(piece.dtype != piece.tensor.dtype for piece in plan.pieces)
    exact = _ours(source, tokens_BT) if independent and rounded else wanted
    found = _ours(result, tokens_BT)
    difference = np.abs(found - wanted)
    # NaN is the greatest difference there can be.
    worst = np.unravel_index(np.argmax(np.where(np.isnan(difference), np.inf, difference)), difference.shape)
    return Report(
        reference=reference,
        independent=independent,
        config=_compare_configs(plan, result),
        tensor=tensor,
        tensor_difference=tensor_difference,
        reader_difference=float(np.abs(exact - wanted).max()),
        logit_difference=float(difference[worst]),
        largest_logit=float(np.abs(wanted).max()),
        position=tuple(int(i) for i in worst),
        same_choice=float(np.mean(found.argmax(-1) == wanted.argmax(-1))),
        tolerance=TOLERANCES[plan.dtype if rounded else None] if tolerance is None else tolerance,
    )


def _compare_configs(plan: Plan, result: Source) -> str:
    found, wanted = dataclasses.asdict(result.config), dataclasses.asdict(plan.config)
    left_out = set()
    if plan.to != "orbax":  # Hugging Face's has one dtype for parameters and computation
        for fields in (found, wanted):
            fields |= {f"{name} dtype": value for name, value in fields.pop("dtypes").items() if name != "compute"}
    if plan.to == "hf-llama":  # and a LLaMA's no place for memory; `to_hf_llama` refuses what would change its maths
        left_out = {"mem_layers", "last_context_length", "mem_positionals", "memory dtype"}
    return "; ".join(
        f"{name} is {found[name]}, wanted {wanted[name]}"
        for name in wanted
        if found[name] != wanted[name] and name not in left_out
    )


def _compare_tensors(plan: Plan, result: Source) -> tuple[str, float]:
    pieces = {(piece.target.part, piece.target.layer): piece for piece in plan.pieces}
    worst = ("", 0.0)
    for entry, found in result.arrays():
        piece = pieces.pop((entry.part, entry.layer))
        wanted = piece.read()
        if wanted.tobytes() != np.ascontiguousarray(found).tobytes():
            difference = float(np.max(np.abs(found.astype(np.float64) - wanted.astype(np.float64))))
            worst = max(worst, (piece.entry.name, difference or 5e-324), key=lambda x: (np.isnan(x[1]), x[1]))
    return worst


def _reference(source: Source, tokens_BT: np.ndarray) -> tuple[str, bool, np.ndarray]:
    """Who ran the source, whether it is another implementation, and its logits, float32 [B, T, V]."""
    c = source.config
    reason = ""
    if source.layout in (hf.LAYOUT, gguf.LAYOUT) and not c.qk_norm and (c.mem_positionals or not c.mem_layers):
        try:
            name, logits = _transformers(source, tokens_BT)
            return name, True, logits
        except Exception as error:  # of whatever kind: transformers and its packages have their own
            reason = f" (transformers does not: {first_line(error)})"
    return f"our forward pass{reason}", False, _ours(source, tokens_BT)


def _transformers(source: Source, tokens_BT: np.ndarray) -> tuple[str, np.ndarray]:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    options: dict[str, Any] = {"dtype": torch.float32, "local_files_only": True}
    path = source.path
    if source.layout is gguf.LAYOUT:
        path, options["gguf_file"] = path.parent, path.name
    else:  # a LongLLaMA's configuration is a LLaMA's with more fields; within its window it is one
        options["config"] = transformers.LlamaConfig.from_json_file(path / "config.json")
    llama = transformers.LlamaForCausalLM.from_pretrained(path, **options)
    with torch.no_grad():
        logits = llama(torch.from_numpy(tokens_BT.astype(np.int64))).logits.float().numpy()
    return f"transformers {transformers.__version__}", logits


def _ours(source: Source, tokens_BT: np.ndarray) -> np.ndarray:
    config = source.config.replace(dtypes=DtypePolicy())
    cpu = jax.devices("cpu")[0]
    params = read_params(source, config, shardings=jax.sharding.SingleDeviceSharding(cpu))
    forward = jax.jit(lambda p, t: model.logits(config, p, model.forward(config, p, t)))
    return np.asarray(forward(params, jax.device_put(tokens_BT, cpu)))
