"""Sizes of the model, once; from and to a Hugging Face `config.json`.

A new model size is one constant in `SIZES`. Nothing else in the project knows a width or a depth.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import Any

FLOAT_DTYPES = ("float32", "bfloat16", "float16")
MEMORY_DTYPES = (*FLOAT_DTYPES, "int8")
MAX_SIZE = 2**31 - 1  # what an int32 index can address
_WHOLE = (
    "vocab_size",
    "d_model",
    "d_ff",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "head_size",
    "window",
    "last_context_length",
)


@dataclasses.dataclass(frozen=True)
class DtypePolicy:
    """Where each number format is used; softmax, norms, rotary angles, loss and merges are always float32.

    Attributes:
        params: dtype the parameters are stored in.
        compute: dtype of activations and of matrix products' operands.
        memory: dtype keys and values are stored in once they entered memory; int8 is with a scale for each.
    """

    params: str = "float32"
    compute: str = "float32"
    memory: str = "float32"

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            allowed = MEMORY_DTYPES if name == "memory" else FLOAT_DTYPES
            if value not in allowed:
                raise ValueError(f"dtypes.{name} is {value!r}; wanted one of {', '.join(allowed)}")


@dataclasses.dataclass(frozen=True)
class Segment:
    """Layers with one scanned body: `repeats` times (`plain` ordinary layers, then a memory layer if `memory`)."""

    plain: int
    memory: bool
    repeats: int = 1

    @property
    def n_layers(self) -> int:
        return self.repeats * (self.plain + self.memory)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A LLaMA with memory layers.

    Attributes:
        vocab_size: V, rows of the embedding.
        d_model: D, width of the residual stream.
        d_ff: F, width of the gated feed-forward.
        n_layers: L.
        n_heads: H, query heads.
        n_kv_heads: G, key/value heads; divides H. 0 stands for H.
        head_size: K; even. 0 stands for D / H. H x K need not be D.
        window: W, tokens of local context (`max_position_embeddings`).
        mem_layers: layers that read memory, counted from 0.
        mem_positionals: whether memory layers rotate local queries and keys (True in LongLLaMA, False in the paper's
            small models). Memory keys are never rotated: they count as position 0.
        qk_norm: queries and keys scaled to unit length, scores multiplied by a learned temperature per head (the
            paper's small models).
        rope_base: rotary base; angle of pair i at position p is p * rope_base ** (-2 i / K).
        norm_eps: RMSNorm's epsilon.
        tie_embeddings: whether the head is the embedding, transposed.
        last_context_length: tokens of a long prompt left in the open window; see `generate`. Brought into 1..W, because
            the default and files are often beyond a small window.
        init_std: standard deviation of initial weights.
        bos_id, eos_id, pad_id: special tokens; None where there is none. Several eos_ids are a tuple: each ends a text.
        dtypes: see DtypePolicy.
    """

    vocab_size: int
    d_model: int
    d_ff: int
    n_layers: int
    n_heads: int
    n_kv_heads: int = 0
    head_size: int = 0
    window: int = 2048
    mem_layers: tuple[int, ...] = ()
    mem_positionals: bool = True
    qk_norm: bool = False
    rope_base: float = 10000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    last_context_length: int = 1024
    init_std: float = 0.02
    bos_id: int | None = 1
    eos_id: int | tuple[int, ...] | None = 2
    pad_id: int | None = 0
    dtypes: DtypePolicy = DtypePolicy()

    def __post_init__(self):
        set_ = lambda name, value: object.__setattr__(self, name, value)
        self._check_types()
        for name in ("vocab_size", "d_model", "d_ff", "n_layers", "n_heads", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; wanted at least 1")
        for name in ("n_kv_heads", "head_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; wanted at least 1, or 0 for the default")
        set_("n_kv_heads", self.n_kv_heads or self.n_heads)
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads is {self.n_heads}; wanted a multiple of n_kv_heads, {self.n_kv_heads}")
        if not self.head_size and self.d_model % self.n_heads:
            raise ValueError(
                f"d_model is {self.d_model}; wanted a multiple of n_heads, {self.n_heads}, or head_size stated"
            )
        set_("head_size", self.head_size or self.d_model // self.n_heads)
        if self.head_size % 2:
            raise ValueError(f"head_size is {self.head_size}; wanted an even number (rotary pairs)")
        set_("mem_layers", tuple(sorted(set(self.mem_layers))))
        for layer in self.mem_layers:
            if not 0 <= layer < self.n_layers:
                raise ValueError(f"mem_layers has {layer}; wanted layers in 0..{self.n_layers - 1} (n_layers)")
        if isinstance(self.eos_id, (list, tuple)):
            ids = tuple(map(int, self.eos_id))
            set_("eos_id", ids if len(ids) > 1 else ids[0] if ids else None)
        set_("last_context_length", max(1, min(self.last_context_length, self.window)))

    def _check_types(self) -> None:
        """Files say anything; a wrong type would show much later, if at all."""
        whole = lambda value: isinstance(value, numbers.Integral) and not isinstance(value, bool)
        for name in _WHOLE:
            if not whole(getattr(self, name)) or getattr(self, name) > MAX_SIZE:
                raise ValueError(f"{name} is {getattr(self, name)!r}; wanted a whole number up to {MAX_SIZE}")
        for name in ("bos_id", "eos_id", "pad_id"):
            value = getattr(self, name)
            ids = value if name == "eos_id" and isinstance(value, (list, tuple)) else [value]
            if value is not None and not all(whole(i) and 0 <= i <= MAX_SIZE for i in ids):
                raise ValueError(f"{name} is {value!r}; wanted a token's number, or None")
        for name in ("rope_base", "norm_eps", "init_std"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value!r}; wanted a number, finite and not negative")
        if not self.rope_base:
            raise ValueError("rope_base is 0; wanted a positive number")
        for name in ("mem_positionals", "qk_norm", "tie_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; wanted True or False")
        layers = self.mem_layers
        if not isinstance(layers, (tuple, list, set, frozenset)) or not all(map(whole, layers)):
            raise ValueError(f"mem_layers is {layers!r}; wanted layers' numbers")

    @property
    def mem_dtype(self) -> str:
        """dtype that memory is kept in."""
        return self.dtypes.memory

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens each of which ends a text."""
        return self.eos_id if isinstance(self.eos_id, tuple) else () if self.eos_id is None else (self.eos_id,)

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed (checked again)."""
        return dataclasses.replace(self, **changes)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The layers as scanned runs, in order.

        Memory layers that follow one another at equal distance share a body; a longer first distance puts the excess
        into a plain run of its own. LongLLaMA 3B (26 layers, memory 6, 12, 18) is 1 plain, 3 x (5 plain, 1 memory),
        7 plain.
        """
        ends = (-1, *self.mem_layers)
        gaps = [b - a - 1 for a, b in zip(ends, self.mem_layers)]
        out: list[Segment] = []
        if len(gaps) > 1 and gaps[0] > gaps[1]:
            out.append(Segment(gaps[0] - gaps[1], False))
            gaps[0] = gaps[1]
        for gap in gaps:
            if out and out[-1].memory and out[-1].plain == gap:
                out[-1] = dataclasses.replace(out[-1], repeats=out[-1].repeats + 1)
            else:
                out.append(Segment(gap, True))
        if tail := self.n_layers - 1 - ends[-1]:
            out.append(Segment(tail, False))
        return tuple(out)


def _llama(**sizes: Any) -> ModelConfig:
    return ModelConfig(dtypes=DtypePolicy(compute="bfloat16", memory="bfloat16"), **sizes)


_3B: dict[str, Any] = dict(vocab_size=32000, d_model=3200, d_ff=8640, n_layers=26, n_heads=32)
_7B: dict[str, Any] = dict(vocab_size=32000, d_model=4096, d_ff=11008, n_layers=32, n_heads=32)
_13B: dict[str, Any] = dict(vocab_size=32000, d_model=5120, d_ff=13824, n_layers=40, n_heads=40)
_CODE_7B: dict[str, Any] = {**_7B, "vocab_size": 32016, "rope_base": 1e6, "window": 4096, "norm_eps": 1e-5}
# The paper's small models have LayerNorm and an ungated feed-forward 4 times the width of their attention, 2 D F'
# weights a layer. Ours are LLaMA blocks, 3 D F weights, so F = 2/3 F' (to a multiple of 8) keeps the paper's parameter
# count: 38M and 184M with the embedding, 604M and 1208M without it.
_SMALL: dict[str, Any] = dict(
    n_layers=12, mem_layers=(8,), mem_positionals=False, qk_norm=True, tie_embeddings=True, last_context_length=2048
)

SIZES: dict[str, ModelConfig] = {
    "open_llama_3b": _llama(**_3B),
    "open_llama_3b_v2": _llama(**_3B),
    "open_llama_7b": _llama(**_7B),
    "open_llama_7b_v2": _llama(**_7B),
    "open_llama_13b": _llama(**_13B),
    "longllama_3b": _llama(**_3B, mem_layers=(6, 12, 18)),
    "longllama_3b_v1_1": _llama(**_3B, mem_layers=(6, 12, 18)),
    "longllama_7b": _llama(**_7B, mem_layers=(8, 16, 24)),
    "longllama_code_7b": _llama(**_CODE_7B, mem_layers=(8, 16, 24)),
    # The 37M model's vocabulary is that of the dictionary task; the others have a 32k SentencePiece one.
    "fot_37m": _llama(**_SMALL, vocab_size=64, d_model=512, d_ff=1368, n_heads=8, window=256),
    "fot_184m": _llama(**_SMALL, vocab_size=32000, d_model=1024, d_ff=2728, n_heads=8),
    "fot_600m": _llama(**_SMALL, vocab_size=32000, d_model=2048, d_ff=5464, n_heads=16),
    "fot_1_2b": _llama(**_SMALL, vocab_size=32000, d_model=2048, d_ff=10920, n_heads=32, head_size=128),
}


def named(size: str) -> ModelConfig:
    """The configuration of a named size.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    if size not in SIZES:
        raise ValueError(f"model size is {size!r}; wanted one of {', '.join(sorted(SIZES))}")
    return SIZES[size]


# Our field -> Hugging Face's, where the value carries over unchanged.
_HF_FIELDS = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "d_ff": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "window": "max_position_embeddings",
    "mem_positionals": "mem_positionals",
    "rope_base": "rope_theta",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "last_context_length": "last_context_length",
    "init_std": "initializer_range",
    "bos_id": "bos_token_id",
    "eos_id": "eos_token_id",
    "pad_id": "pad_token_id",
}


def from_hf(fields: dict[str, Any]) -> ModelConfig:
    """The configuration that a LLaMA or LongLLaMA `config.json` describes.

    Args:
        fields: the parsed file. Where it says nothing of memory's dtype, that of the parameters is meant in a LLaMA's,
            and bfloat16 in a LongLLaMA's, as in the published code (`configuration_longllama.py`).

    Raises:
        ValueError: a field that changes the maths and that this model does not have.
    """
    kind = fields.get("model_type")
    if kind not in ("llama", "longllama"):
        raise ValueError(f"config.json: model_type is {kind!r}; wanted 'llama' or 'longllama'")
    unsupported = {"attention_bias": (False, None), "mlp_bias": (False, None), "hidden_act": ("silu", None)}
    for name, allowed in unsupported.items():
        if fields.get(name) not in allowed:
            raise ValueError(f"config.json: {name} is {fields[name]!r}; wanted {allowed[0]!r}")
    missing = [name for name in _HF_FIELDS.values() if name in _HF_REQUIRED and name not in fields]
    if missing:
        raise ValueError(f"config.json: {', '.join(missing)} missing")
    for name in sorted(_HF_REQUIRED):
        if not isinstance(fields[name], int):
            raise ValueError(f"config.json: {name} is {fields[name]!r}; wanted a whole number")
    # null stands for the default, but for special tokens, where it means that there is none.
    known = {
        ours: fields[theirs]
        for ours, theirs in _HF_FIELDS.items()
        if theirs in fields and (fields[theirs] is not None or theirs.endswith("token_id"))
    }
    known["rope_base"] = _rope_base(fields)
    if kind == "llama":  # the default of transformers; the published LongLLaMA's is 0
        known.setdefault("pad_id", None)
    for name in ("bos_id", "eos_id", "pad_id"):  # -1 stands for none in early LLaMA configurations
        if known.get(name) == -1:
            known[name] = None
    if isinstance(known.get("eos_id"), list):
        known["eos_id"] = [i for i in known["eos_id"] if i != -1]
    mem_layers = fields.get("mem_layers") or ()
    if not isinstance(mem_layers, (list, tuple)) or not all(isinstance(layer, int) for layer in mem_layers):
        raise ValueError(f"config.json: mem_layers is {mem_layers!r}; wanted a list of whole numbers")
    dtype = _dtype(fields, "dtype", "torch_dtype") or "float32"
    memory = _dtype(fields, "mem_dtype") or ("bfloat16" if kind == "longllama" else dtype)
    return ModelConfig(
        **known,
        mem_layers=tuple(mem_layers),
        qk_norm=fields.get("qk_norm", False),
        dtypes=DtypePolicy(params=dtype, compute=dtype, memory=memory),
    )


def _rope_base(fields: dict[str, Any]) -> Any:
    """The one base that all fields which state it agree on."""
    stated = {"rope_theta": fields.get("rope_theta")}
    partial = {"partial_rotary_factor": fields.get("partial_rotary_factor")}
    for name in ("rope_parameters", "rope_scaling"):  # of transformers since version 5, and before
        value = fields.get(name) or {}
        if not isinstance(value, dict) or value.get("rope_type", value.get("type", "default")) != "default":
            raise ValueError(f"config.json: {name} is {value!r}; wanted none that scales")
        stated[f"{name}.rope_theta"] = value.get("rope_theta")
        partial[f"{name}.partial_rotary_factor"] = value.get("partial_rotary_factor")
    for name, value in partial.items():
        if value not in (None, 1):
            raise ValueError(f"config.json: {name} is {value!r}; wanted 1")
    bases = {name: value for name, value in stated.items() if value is not None}
    first, *others = bases or {"": 10000.0}
    for other in others:
        if bases[other] != bases[first]:
            raise ValueError(f"config.json: {other} is {bases[other]!r}; wanted that of {first}, {bases[first]!r}")
    return bases[first] if bases else 10000.0


def _dtype(fields: dict[str, Any], *names: str) -> str | None:
    """The number format that the first of these fields which is there states."""
    for name in names:
        value = fields.get(name)
        if value is not None:
            dtype = value.removeprefix("torch.") if isinstance(value, str) else value
            if dtype not in FLOAT_DTYPES:
                raise ValueError(f"config.json: {name} is {value!r}; wanted one of {', '.join(FLOAT_DTYPES)}")
            return dtype
    return None


_HF_REQUIRED = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
}


def _fields_of(config: ModelConfig) -> dict[str, Any]:
    fields = {theirs: getattr(config, ours) for ours, theirs in _HF_FIELDS.items()}
    if isinstance(config.eos_id, tuple):
        fields["eos_token_id"] = list(config.eos_id)
    if not holds_padding(config):
        fields["pad_token_id"] = None
    return fields


def holds_padding(config: ModelConfig) -> bool:
    """Whether the padding token, if there is one, is within the vocabulary. PyTorch's embedding refuses another, so a
    `config.json` leaves it out."""
    return config.pad_id is None or config.pad_id < config.vocab_size


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The fields of a LongLLaMA `config.json`, every one that the published inference code reads among them.

    Raises:
        ValueError: memory in int8, which that code would cast to.
    """
    if config.mem_dtype not in FLOAT_DTYPES:
        raise ValueError(
            f"memory dtype is {config.mem_dtype}; wanted one that LongLLaMA has, {', '.join(FLOAT_DTYPES)}"
        )
    return {
        "architectures": ["LongLlamaForCausalLM"],
        "model_type": "longllama",
        "hidden_act": "silu",
        "rope_scaling": None,
        **_fields_of(config),
        "mem_layers": list(config.mem_layers),
        "mem_dtype": config.mem_dtype,
        "mem_attention_grouping": None,
        "qk_norm": config.qk_norm,
        "gradient_checkpoint_every_ith": 1,
        "torch_attention": False,
        "torch_dtype": config.dtypes.params,
        "use_cache": True,
    }


def to_hf_llama(config: ModelConfig) -> dict[str, Any]:
    """The fields of a plain LLaMA `config.json`, for stock `transformers`. Within its window, where there is no memory
    yet, a model computes the same without memory layers.

    Raises:
        ValueError: maths that LLaMA does not have.
    """
    if config.qk_norm:
        raise ValueError("qk_norm is True; wanted False: LLaMA has no query/key normalisation")
    if config.mem_layers and not config.mem_positionals:
        raise ValueError("mem_positionals is False; wanted True: LLaMA rotates queries and keys in every layer")
    if config.d_model % config.n_heads:
        raise ValueError(
            f"d_model is {config.d_model}; wanted a multiple of n_heads, {config.n_heads}: transformers refuses others"
        )
    ours = ("mem_positionals", "last_context_length")
    fields = {name: value for name, value in _fields_of(config).items() if name not in ours}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_scaling": None,
        **fields,
        "torch_dtype": config.dtypes.params,
        "use_cache": True,
    }


def check_target(config: ModelConfig, to: str) -> None:
    """Refuses a model that a format for others' code cannot hold.

    Args:
        to: 'hf', LongLLaMA for the published code; 'hf-llama', LLaMA for `transformers`.

    Raises:
        ValueError: names what is in the way.
    """
    if to == "hf-llama":
        to_hf_llama(config)
        return
    to_hf(config)
    if config.n_kv_heads != config.n_heads:
        raise ValueError(
            f"n_kv_heads is {config.n_kv_heads} for {config.n_heads} query heads; the published LongLLaMA code knows "
            "no grouped queries: wanted --expand-kv-heads, which repeats key and value heads, or another target"
        )
    if config.head_size * config.n_heads != config.d_model:
        raise ValueError(
            f"head_size is {config.head_size}; the published LongLLaMA code wanted d_model / n_heads, "
            f"{config.d_model} / {config.n_heads}: take another target"
        )
    if config.qk_norm:
        raise ValueError(
            "qk_norm is True; the published LongLLaMA code has no query/key normalisation: take another target"
        )
