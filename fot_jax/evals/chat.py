"""Chat templates: dialogues as the text that a model was trained on."""

from __future__ import annotations

import json
import pathlib
import time
from typing import Any, NoReturn

from fot_jax import files


class Chat:
    """What the files beside a tokenizer say of dialogues: `chat_template` of tokenizer_config.json, one or several by
    name, or chat_template.jinja.

    Attributes:
        tokens: bos_token, eos_token, pad_token and unk_token, those that are stated, as texts.
        added: other special tokens that tokenizer_config.json has.
    """

    def __init__(self, path: pathlib.Path | None):
        """
        Args:
            path: the tokenizer's file or directory; None where there is none.

        Raises:
            ValueError: a file that is not JSON.
        """
        folder = None if path is None or path.is_dir() else path.parent
        folder = folder or path
        self._where = "no files beside the model" if folder is None else str(folder)
        config = _object(folder, "tokenizer_config.json")
        stated = config.get("chat_template") or {}
        if isinstance(stated, list):
            stated = {each["name"]: each["template"] for each in stated}
        self._templates = {"default": stated} if isinstance(stated, str) else stated
        if folder is not None and (at := folder / "chat_template.jinja").is_file():
            self._templates = {**self._templates, "default": at.read_text(encoding="utf-8")}
        names = {**_object(folder, "special_tokens_map.json"), **config}
        roles = {role: _content(names.get(role)) for role in ("bos_token", "eos_token", "pad_token", "unk_token")}
        self.tokens = {"bos_token": "<s>", "eos_token": "</s>"} | {role: name for role, name in roles.items() if name}
        added = [each for each in config.get("added_tokens_decoder", {}).values() if each.get("special")]
        self.added = tuple({_content(each) for each in added} - set(self.tokens.values()))

    def template(self, name: bool | str = True) -> str:
        """The template of a name, by default "default".

        Raises:
            ValueError: none of that name.
        """
        if not self._templates:
            raise ValueError(
                f"{self._where}: no chat template; wanted chat_template in tokenizer_config.json or chat_template.jinja"
            )
        name = name if isinstance(name, str) else "default"
        if name not in self._templates:
            raise ValueError(f"chat template is {name!r}; wanted one of {', '.join(sorted(self._templates))}")
        return self._templates[name]

    def text(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A dialogue as text. What a template may use is what transformers gives it (its "Chat templates" guide). A
        system message that it has no place for is left out, as lm-eval's models for transformers do.

        Args:
            messages: [{"role": ..., "content": ...}, ...].
            add_generation_prompt: whether an answer is to follow; else the last message is to be gone on with.

        Raises:
            ValueError: no template, or one that refuses the messages.
            ImportError: no jinja2.
        """
        import jinja2
        import jinja2.ext
        import jinja2.sandbox

        def refuse(message: str) -> NoReturn:
            raise jinja2.TemplateError(message)

        options = dict(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(**options)
        environment.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
        environment.globals |= dict(raise_exception=refuse, strftime_now=time.strftime)
        given = dict(self.tokens, messages=messages, add_generation_prompt=add_generation_prompt)
        try:
            text = environment.from_string(self.template()).render(**given)
        except jinja2.TemplateError as error:
            without = [message for message in messages if message["role"] != "system"]
            if len(without) < len(messages):
                return self.text(without, add_generation_prompt)
            raise ValueError(f"{self._where}: the chat template refuses the messages ({error})") from error
        if add_generation_prompt or not messages:
            return text
        last = messages[-1]["content"]
        if (at := text.rfind(last.strip())) < 0:
            raise ValueError(f"{self._where}: the chat template changes the last message, which is to be gone on with")
        kept = last.lstrip() if text.startswith(last.lstrip(), at) else last.strip()
        return text[: at + len(kept)]


def _object(folder: pathlib.Path | None, name: str) -> dict[str, Any]:
    found = files.read_json(folder / name) if folder is not None and (folder / name).is_file() else {}
    return found if isinstance(found, dict) else {}


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token
