from __future__ import annotations

import pathlib
import re

import jax

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_the_library_tour_runs(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code, str(README), "exec"), names)
    config = names["config"]
    assert names["logits_BTV"].shape == (2, 300, config.vocab_size) and names["tokens_BN"].shape == (2, 40)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(names["params"])} == {"bfloat16"}
