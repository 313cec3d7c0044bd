"""A model as EleutherAI's lm-evaluation-harness asks it (lm_eval/api/model.py of its version 0.4.13), where its name is
fot. The command is `harness`.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import os
import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

import fot_jax
from fot_jax import formats, model, run_config, sharding
from fot_jax.evals import identity
from fot_jax.evals.chat import Chat
from fot_jax.evals.journal import Journal, Part
from fot_jax.evals.requests import Batch, How, Pair, answer, batches, count, score
from fot_jax.evals.subject import Ids, Subject, check_length, check_reading, reading_options
from fot_jax.generate.sampling import Sampling
from fot_jax.pretrained import load_pretrained
from fot_jax.tokenizer import SentencePiece, check_vocab, open_tokenizer

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError as error:
    raise ImportError(
        f"fot_jax.evals.harness needs the package lm-eval, which cannot be imported ({error}); "
        "pip install 'lm-eval>=0.4.10,<0.5'"
    ) from error

MAX_GEN_TOKS = 256  # new tokens where a task does not say how many, as lm-eval's other models have it


@register_model("fot")
class FotLM(TemplateLM):
    """A model of this package, as lm-eval asks it.

    Nothing is cut off: of what does not fit the window, `requests` says which part of it is memory. What is found does
    not depend on what else is asked, nor on how many texts are read together, but for rounding. What is asked in one
    call is put into the same batches whenever it is asked; `journal`, where one is set, keeps the answers to each, so
    that a run that was stopped ends as it would have, to the last bit.

    An empty context is the prefix token: BOS, or EOS where there is none. BOS precedes other texts where the tokenizer
    has it (`adds_bos`). A model without memory layers refuses what does not fit its window, with one exception:
    whole documents (`loglikelihood_rolling`), which it reads in windows that know nothing of one another.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike | Subject,
        *,
        tokenizer: str | os.PathLike = "",
        dtype: str = "float32",
        seed: int = 0,
        capacity: int = 0,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **options: Any,
    ):
        """
        Args:
            checkpoint: a working directory of train.py, or a model in any format that `load_pretrained` reads; or a
                model that is loaded, for which `dtype` and `options` are settled.
            tokenizer: a file or directory; the checkpoint's by default. The chat template is looked for there.
            dtype: of parameters and computation.
            seed: of what is drawn, where a task has `do_sample`.
            capacity: most tokens of a text, with what follows it, that are read; 0: any number.
            batch_size: texts read together, where it is above 1 and `rows` is not stated: lm-eval says 1 by default.
            max_batch_size, device: what lm-eval says to every model; JAX chooses the device.
            options: of `subject.reading_options`; and data, fsdp, tensor, context: devices that rows, parameters, heads
                and memory go over, 1 each by default.

        Raises:
            ValueError: an option out of range, or unknown.
            FileNotFoundError, ImportError, CheckpointError: as `load_pretrained` and `open_tokenizer`.
        """
        super().__init__()
        self.name, self.mesh, self.seed, self.capacity = "", None, seed, capacity
        self.journal: Journal | None = None
        if isinstance(checkpoint, Subject):
            subject = checkpoint
            if options:
                raise ValueError(f"options {', '.join(options)} are given; wanted none beside a model that is loaded")
        else:
            self.name, folder = str(checkpoint), formats.local(str(checkpoint)).absolute()
            if not folder.exists():
                raise FileNotFoundError(f"{folder}: no such directory; wanted train.py's or another model's")
            if "rows" not in options and str(batch_size).isdigit() and int(batch_size) > 1:
                options["rows"] = int(batch_size)
            tokenizer = str(tokenizer) or folder
            subject = self._load(folder, tokenizer, dtype, dict(options, capacity=capacity))
        if subject.tokenizer is None:
            raise ValueError("the model has no tokenizer; wanted one")
        self.tokenizer = subject.tokenizer
        eos = (*subject.config.eos_ids, *([] if self.tokenizer.eos_id is None else [self.tokenizer.eos_id]))
        if not eos:
            raise ValueError("neither the model nor its tokenizer has an EOS token; wanted one")
        self.subject = dataclasses.replace(subject, config=subject.config.replace(eos_id=tuple(dict.fromkeys(eos))))
        self._chat = Chat(pathlib.Path(tokenizer) if tokenizer else None)
        self._in_chat = False  # whether texts come from a chat template
        # Contexts are encoded for each of their continuations.
        self._encode = functools.lru_cache(maxsize=4)(self._encoded)

    def _load(self, folder: pathlib.Path, tokenizer: str | os.PathLike, dtype: str, given: dict[str, Any]) -> Subject:
        axes = {axis: given.pop(axis, 1) for axis in sharding.MESH_AXES}
        if unknown := sorted(set(given) - set(reading_options())):
            raise ValueError(f"options have {unknown[0]}; wanted {', '.join([*reading_options(), *axes])}")
        options = ConfigDict(reading_options() | given)
        found = run_config.read_model(folder)
        check_reading(found, options)
        opened = open_tokenizer(tokenizer)
        check_vocab(opened, found.vocab_size, padded=True)
        mesh, shardings = sharding.make_mesh(axes), None
        if mesh.size > 1:
            self.mesh = mesh
            shardings = lambda loaded: sharding.param_shardings(mesh, model.abstract_params(loaded))
        with self._on_mesh():
            return Subject.of(*load_pretrained(folder, dtype, shardings), opened, options)

    def _on_mesh(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def identity(self) -> dict[str, Any]:
        """All that answers to the same questions depend on, as a `Journal` wants it."""
        kind, k, rows = self.subject.reading.kind, self.subject.reading.k, self.subject.rows
        mesh = {} if self.mesh is None else dict(self.mesh.shape)
        given = ConfigDict(dict(reading=kind, k=k, rows=rows, seed=self.seed, mesh=mesh))
        with self._on_mesh():
            return identity.of(given, self.subject.config, self.subject.params, None, self.tokenizer)

    # ---- what lm-eval asks of every model

    @property
    def eot_token_id(self) -> int:
        """EOS."""
        return self.subject.config.eos_ids[-1] if self.tokenizer.eos_id is None else self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands for an empty context."""
        return self.eot_token_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    @property
    def max_length(self) -> int:
        """Tokens that can be read."""
        most = sys.maxsize if self.subject.config.mem_layers else self.subject.config.window
        return min(self.capacity or most, most)

    @property
    def max_gen_toks(self) -> int:
        """New tokens where a task does not say how many."""
        return MAX_GEN_TOKS

    @property
    def tokenizer_name(self) -> str:
        """A name that no other tokenizer has."""
        return self.tokenizer.fingerprint

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside its results."""
        config, reading = self.subject.config, self.subject.reading
        return dict(
            checkpoint=self.name,
            fot_jax=fot_jax.__version__,
            parameters=sum(x.size for x in jax.tree.leaves(self.subject.params)),
            reading=reading.kind,
            k=reading.k,
            window=config.window,
            last_context_length=config.last_context_length,
            capacity=self.capacity,
            dtype=config.dtypes.compute,
            memory_dtype=config.mem_dtype,
        )

    def _encoded(self, text: str) -> Ids:
        if not (self._in_chat and isinstance(self.tokenizer, SentencePiece)):
            return self.tokenizer.encode(text)
        # A template writes special tokens as text, and SentencePiece takes them as text. What is between is encoded
        # apart, as LLaMA's own code does with the turns of a dialogue.
        ids = {self._chat.tokens["bos_token"]: self.tokenizer.bos_id, self._chat.tokens["eos_token"]: self.eot_token_id}
        parts = re.split("(" + "|".join(map(re.escape, ids)) + ")", text)
        encoded = [[ids[part]] if part in ids else self.tokenizer.encode(part) for part in parts if part]
        return np.concatenate([[], *encoded]).astype(np.int32)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a text, after BOS where the model expects one and the text does not begin with it."""
        ids = self._encode(string).tolist()
        bos = self.tokenizer.bos_id
        adds = self.tokenizer.adds_bos and bos is not None and add_special_tokens is not False
        return [bos, *ids] if adds and ids[:1] != [bos] else ids

    def tok_decode(self, tokens: int | Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of tokens. Special ones give none, whatever is asked for; nor do those of a padded vocabulary."""
        return self.subject.text(np.atleast_1d(np.asarray(tokens, np.int32)))

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template of that name, or the only one; None for False."""
        return self._chat.template(chat_template) if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A dialogue as text, by the template beside the tokenizer.

        Args:
            chat_history: [{"role": ..., "content": ...}, ...].
            add_generation_prompt: whether an answer is to follow; else the last message is to be gone on with.

        Raises:
            ValueError: no template; one that refuses the dialogue, or writes special tokens that the tokenizer has not.
        """
        text = self._chat.text(chat_history, add_generation_prompt)
        if isinstance(self.tokenizer, SentencePiece):
            if unknown := sorted(token for token in self._chat.added if token in text):
                raise ValueError(
                    f"the chat template writes {', '.join(unknown)}, which tokenizer.model does not know as special; "
                    "wanted --tokenizer (tokenizer=) with a tokenizer.json that does"
                )
            if not self._in_chat:
                self._encode.cache_clear()
        self._in_chat = True
        return text

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of each continuation given its context, and whether each of its tokens was the likeliest."""
        asked, contexts = [], {}
        for request in requests:
            context, continuation = request.args
            if context:
                before, after = self._encode_pair(context, continuation)
            else:
                before, after = self._after_prefix(continuation)
            before = np.asarray(before, np.int32)
            before = contexts.setdefault(before.tobytes(), before)
            asked.append(((context, continuation), before, np.asarray(after, np.int32)))
        return self._loglikelihood_tokens(asked, disable_tqdm=disable_tqdm)

    def _after_prefix(self, text: str) -> tuple[list[int], list[int]]:
        prefix, ids = [self.prefix_token_id], self.tok_encode(text, add_special_tokens=False)
        return (ids[:1], ids[1:]) if ids[:1] == prefix else (prefix, ids)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], Ids, Ids]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = []
        for number, (texts, before, after) in enumerate(requests):
            before = before if len(before) else [self.prefix_token_id]
            what = f"request {number}, {texts[1][:40]!r} after {texts[0][-40:]!r}," if texts else f"request {number}"
            if not len(after):
                raise ValueError(f"{what} has no token to score; wanted 1 or more")
            self._check_length(len(before) + len(after), what)
            pairs.append((np.asarray(before, np.int32), np.asarray(after, np.int32)))

        def tell(number: int, likely: tuple[float, bool]) -> None:
            if requests[number][0]:
                self.cache_hook.add_partial("loglikelihood", requests[number][0], likely)

        return self._scores(pairs, "loglikelihood", tell, disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each document after the prefix token, in one pass over windows that spill into memory.

        The windows are those of lm-eval's models of limited length, W tokens that begin with the one before the first
        that is predicted (HFLM: `get_rolling_token_windows`, `make_disjoint_window`), so that a document of at most W
        tokens gets the same number. Of longer ones later windows remember the earlier; and the last begins where the
        one before ends, while HFLM's has as many tokens before it as fit. HFLM also scores the BOS that its tokenizer
        may add, after the prefix.
        """
        pairs, numbers = [], []
        for number, request in enumerate(requests):
            before, after = (np.asarray(ids, np.int32) for ids in self._after_prefix(request.args[0]))
            if self.capacity and len(after) > self.capacity:
                raise ValueError(f"document {number} has {len(after):,} tokens; capacity is {self.capacity:,}")
            if len(after):
                pairs.append((before, after))
                numbers.append(number)
        kind = "loglikelihood_rolling"
        tell = lambda pair, likely: self.cache_hook.add_partial(kind, requests[numbers[pair]].args, likely[0])
        found = dict(zip(numbers, self._scores(pairs, kind, tell, disable_tqdm, sharing=False), strict=True))
        return [found[number][0] if number in found else 0.0 for number in range(len(requests))]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """A text for each context, up to the first of its stop strings, an EOS, or `max_gen_toks` tokens.

        Generation arguments that are known: until, max_gen_toks (and lm-eval's other names for it), do_sample,
        temperature, top_k, top_p, repetition_penalty. The likeliest token is taken unless `do_sample` is true, or left
        out and `temperature` above 0; then a draw depends on the seed, the prompt, and how often the same was asked
        before, not on other requests. What a task leaves out is temperature 1, top_k 0 and top_p 1.

        Raises:
            ValueError: other generation arguments, or values out of range.
        """
        prompts, times, groups = [], collections.Counter(), collections.defaultdict(list)
        for number, request in enumerate(requests):
            context, given = request.args
            how = self._how(given)
            ids = np.asarray(self.tok_encode(context) or [self.prefix_token_id], np.int32)
            self._check_length(len(ids) + how.new_tokens, f"request {number}, with max_gen_toks {how.new_tokens},")
            prompts.append((ids, (self.seed, times[context, how])))
            times[context, how] += 1
            groups[how].append(number)

        def ask(how: How, numbers: list[int]) -> list[str]:
            texts, seeds = zip(*(prompts[number] for number in numbers), strict=True)
            found = [_cut(self.tok_decode(ids), how.stop) for ids in answer(self.subject, texts, how, seeds)]
            if not how.sampling.temperature:  # what was drawn is no answer to who asks the same again
                for number, text in zip(numbers, found, strict=True):
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
            return found

        asked = []
        for how, numbers in groups.items():
            numbers.sort(key=lambda number: -len(prompts[number][0]))
            for start in range(0, len(numbers), self.subject.rows):
                some = numbers[start : start + self.subject.rows]
                given = [prompts[number] for number in some]
                asked.append((some, [how, given], sum(len(ids) for ids, _ in given), functools.partial(ask, how, some)))
        return self._answers("generate_until", asked, disable_tqdm)

    def _how(self, given: dict[str, Any]) -> How:
        """Generation arguments of a request."""
        kwargs = dict(normalize_gen_kwargs(given, MAX_GEN_TOKS))
        new_tokens, until, draws = kwargs.pop("max_gen_toks"), kwargs.pop("until"), kwargs.pop("do_sample")
        if kwargs.pop("num_beams", 1) != 1:
            raise ValueError(f"num_beams is {given['num_beams']}; wanted 1, as beams are not searched")
        temperature = kwargs.pop("temperature", 1.0)
        chosen = {name: kwargs.pop(name) for name in ("top_k", "top_p", "repetition_penalty") if name in kwargs}
        if kwargs:
            known = "until, max_gen_toks, do_sample, temperature, top_k, top_p, repetition_penalty"
            raise ValueError(f"generation arguments have {', '.join(sorted(kwargs))}; wanted only {known}")
        if new_tokens < 0:
            raise ValueError(f"max_gen_toks is {new_tokens}; wanted at least 0")
        stop = tuple(dict.fromkeys(text for text in until if text))
        ends = tuple(i for text in stop for i in self._special(text))
        return How(new_tokens, stop, Sampling(float(temperature) if draws else 0.0, **chosen), ends)

    def _special(self, stop: str) -> list[int]:
        """The special token that a stop string is, if it is one: it gives no text that the string could be found in."""
        ids = self.tokenizer.encode(stop).tolist()
        return ids if stop.strip() and len(ids) == 1 and not self.tokenizer.decode(ids) else []

    # ---- asking the model

    def _check_length(self, tokens: int, what: str) -> None:
        check_length(self.subject.config, ConfigDict(dict(window=0, capacity=self.capacity)), tokens, what)

    def _answers(
        self, kind: str, asked: Sequence[tuple[list[int], Any, int, Callable[[], list]]], quiet: bool
    ) -> list[Any]:
        """Answers to requests, by number. A batch has their numbers, what is asked, how many tokens that is, and what
        asks the model; it is not asked again where the journal has its answers. If `quiet`, without progress and
        journal.
        """
        parts = [Part(f"{kind} {i} {identity.digest(what)}", *more) for i, (_, what, *more) in enumerate(asked)]
        with self._on_mesh():
            if quiet:
                found = [part.measure() for part in parts]
            else:
                found = (self.journal or Journal()).results(parts, kind, self.subject.clock)
        numbers = (number for batch in asked for number in batch[0])
        by_number = dict(zip(numbers, itertools.chain.from_iterable(found), strict=True))
        return [by_number[number] for number in range(len(by_number))]

    def _scores(
        self,
        pairs: Sequence[Pair],
        kind: str,
        tell: Callable[[int, tuple[float, bool]], None],
        quiet: bool,
        sharing: bool = True,
    ) -> list[tuple[float, bool]]:
        """The likelihood of each pair, and whether it is the likeliest; `tell` is told it as soon as it is known."""

        def ask(batch: Batch) -> list[tuple[float, bool]]:
            found = [(number, (likely.sum, likely.greedy)) for number, likely in score(self.subject, pairs, batch)]
            for number, likely in found:
                tell(number, likely)
            return [likely for _, likely in found]

        asked = []
        for batch in batches(self.subject, pairs, sharing):
            what = [[pairs[number] for number in row] for row in batch]
            asked.append((sum(batch, []), what, count(pairs, batch), functools.partial(ask, batch)))
        return [(sum_, greedy) for sum_, greedy in self._answers(kind, asked, quiet)]


def _cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop string."""
    return text[: min((at for at in map(text.find, stop) if at >= 0), default=len(text))]
