from __future__ import annotations

import pathlib
import re

import jax

import fot_jax

README = pathlib.Path(__file__).parent.parent / "README.md"


def run(number):
    """Names after a block of Python of the README, of which there are two."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    names: dict = {}
    exec(compile(blocks[number], str(README), "exec"), names)
    return names


def test_memory_on_several_devices_runs(devices, monkeypatch):
    named = fot_jax.named
    narrow = dict(d_model=32, d_ff=64, head_size=4)  # of the model's other sizes: it is run without optimisation here
    monkeypatch.setattr(fot_jax, "named", lambda name: named(name).replace(**narrow))
    names = run(1)
    found, reader = names["found"], names["reader"]
    assert reader.mem.deals[0].ways == len(jax.devices())
    assert found.layer == 8 and found.slots_BHTN.shape == (1, 8, 1, 8) and (found.slots_BHTN >= 0).all()
    assert (found.tokens_BHTN == names["tokens_BT"][0][found.slots_BHTN]).all()


def test_the_library_tour_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run(0)
    config = names["config"]
    assert names["logits_BTV"].shape == (2, 300, config.vocab_size) and names["tokens_BN"].shape == (2, 40)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(names["params"])} == {"bfloat16"}
