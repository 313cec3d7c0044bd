"""What a long run says of itself: stalled steps, profiles, batches of bad numbers, exports, metrics elsewhere."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
import types

import jax
import numpy as np
import pytest
import toy

from fot_jax import checkpoint, exports, formats, mirror, programs, training, watching

pytestmark = pytest.mark.usefixtures("compiled_once")


class Slow(toy.Batches):
    """Batches of which one does not come before `told` says that the wait for it was told, or half a minute is gone."""

    def __init__(self, told):
        super().__init__()
        self.told = told

    def __next__(self):
        end = time.monotonic() + 30
        while self.n == 6 and not self.told() and time.monotonic() < end:
            time.sleep(0.2)
        return super().__next__()


def test_a_stalled_step_is_told_with_what_it_waits_for(tmp_path, caplog):
    told = lambda: [text for r in caplog.records if "it waits for data" in (text := r.getMessage())]
    training.train(toy.config(stall__factor=3.0, stall__seconds=0.5), tmp_path, Slow(told))
    assert told() and all(text.startswith("process 0: step 7 has taken") for text in told())
    assert all("in __next__ (test_watching.py" in text for text in told())


def test_steps_that_take_as_long_as_usual_are_not_told_nor_is_validation(caplog):
    stalls = watching.Stalls(factor=10.0, seconds=0.5)
    for step in range(1, 30):
        stalls.begin(step)
        time.sleep(0.001)
        if step % 10 == 0:
            with stalls.paused("validation"):
                time.sleep(0.75)
    stalls.close()
    assert not [r for r in caplog.records if "has taken" in r.getMessage()]


def test_a_profile_of_some_steps(tmp_path):
    training.train(toy.config(), tmp_path, toy.Batches(), profile=(3, 4))
    (trace,) = tmp_path.glob("profile/process_0/plugins/profile/*/*.xplane.pb")
    steps = {
        dict(event.stats)["step_num"]
        for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    }
    assert steps == {3, 4}
    (perfetto,) = tmp_path.glob("profile/process_0/plugins/profile/*/perfetto_trace.json.gz")
    assert perfetto.stat().st_size


@pytest.mark.parametrize("text", ["3", "5:3", "0:2", "a:b", "1:2:3"])
def test_profiles_of_no_steps(text):
    with pytest.raises(ValueError, match="wanted FIRST:LAST"):
        watching.steps_of_profile(text, 8)
    assert watching.steps_of_profile("", 8) is None and watching.steps_of_profile("3:8", 8) == (3, 8)
    with pytest.raises(ValueError, match="profile_steps is '3:9'; wanted steps of the run, 1 to 8"):
        watching.steps_of_profile("3:9", 8)


def test_the_batch_that_made_numbers_bad_is_kept(tmp_path, monkeypatch):
    config = toy.config()
    seen = []
    together = programs.Rows.together
    monkeypatch.setattr(programs.Rows, "together", lambda self, batch: seen.append(batch) or together(self, batch))
    train_step = programs.train_step

    def bad(*args):
        state, values = train_step(*args)
        return state, values | {"loss": jax.numpy.where(state.step == 5, jax.numpy.nan, values["loss"])}

    monkeypatch.setattr(programs, "train_step", bad)
    with pytest.raises(training.TrainingError, match=r"step 5: loss is nan.*refused/step_5\.process_0\.npz"):
        training.train(config, tmp_path, toy.Batches())
    kept = dict(np.load(tmp_path / "refused" / "step_5.process_0.npz"))
    assert kept.pop("row").tolist() == list(range(8))
    assert kept.keys() == seen[4].keys() and all((kept[name] == seen[4][name]).all() for name in kept)


def test_exports_in_the_background(tmp_path):
    config = toy.config(steps=8, export__every=4, export__dtype="float32", model__n_kv_heads=4)
    (tmp_path / "exports" / ".4.partial-1").mkdir(parents=True)  # of a run that was killed
    state = training.train(config, tmp_path, toy.Batches())
    assert sorted(path.name for path in (tmp_path / "exports").iterdir()) == ["4", "8"]
    exported = formats.open_checkpoint(tmp_path / "exports" / "8")
    ours = formats.open_checkpoint(tmp_path, step=8)
    assert exported.layout.format != ours.layout.format
    embedding = np.asarray(state.params["embed"]["embedding"])
    name = "model.embed_tokens.weight"
    np.testing.assert_array_equal(exported.tensors[name].read(), embedding)


def test_a_model_that_cannot_be_exported_is_refused_before_it_is_trained(tmp_path):
    with pytest.raises(ValueError, match="n_kv_heads is 2 for 4 query heads"):
        training.train(toy.config(export__every=4), tmp_path, toy.Batches())
    for key in ("export.every", "checkpoint.keep_every"):
        with pytest.raises(ValueError, match=f"{key} is 3; wanted a multiple of checkpoint.every, 2"):
            training.train(toy.config(**{key.replace(".", "__"): 3}), tmp_path, toy.Batches())


def test_an_export_that_fails_is_a_warning(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    training.train(toy.config(export__every=4, model__n_kv_heads=4), tmp_path, toy.Batches())
    assert [r for r in caplog.records if "step 4: the export to" in r.getMessage()]
    assert not (tmp_path / "exports" / "4").exists()


@pytest.fixture
def endless_exports(tmp_path, monkeypatch):
    """Conversions that never end; the file that is there when one has begun."""
    begun, command = tmp_path / "begun", tmp_path / "convert"
    command.write_text(f"#!/bin/sh\necho $$ > {begun}\nexec sleep 600\n")
    command.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(command))
    return begun


def wait_for(path):
    end = time.monotonic() + 60
    while not (path.exists() and path.read_text().endswith("\n")):
        assert time.monotonic() < end
        time.sleep(0.01)
    return path.read_text()


def test_who_stops_a_run_does_not_wait_for_exports(tmp_path, caplog, endless_exports):
    workdir, config = tmp_path / "run", toy.config(export__every=4, model__n_kv_heads=4)
    kill = lambda: wait_for(endless_exports) and os.kill(os.getpid(), signal.SIGTERM)
    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    training.train(config, workdir, toy.Batches())
    killer.join()
    with pytest.raises(ProcessLookupError):
        os.kill(int(endless_exports.read_text()), 0)
    if checkpoint.steps(workdir)[-1] == config.steps:
        (said,) = (text for r in caplog.records if "stopped by SIGTERM" in (text := r.getMessage()))
        assert "before the export of step 4, 8; the same command makes it" in said
    assert exports.exports_due(workdir, 4)[0] == 4


def test_who_ends_begins_no_export(tmp_path, endless_exports):
    training.train(toy.config(steps=4), tmp_path / "run", toy.Batches())
    exporting = exports.Exports(tmp_path / "run", 4, "hf", "")
    exporting.close([4], wait=lambda: False)
    assert not endless_exports.exists() and exports.exports_due(tmp_path / "run", 4) == [4]
    exporting.poll()  # one that was begun just before is stopped
    exporting.close(wait=lambda: False)
    assert not exporting._thread.is_alive()


def test_what_is_due_when_an_export_ends_is_not_left(tmp_path, monkeypatch):
    """Whether one is under way may change between two looks."""
    exporting, done = exports.Exports(tmp_path, 4, "hf", ""), []
    monkeypatch.setattr(exporting, "_export", done.append)
    answers = iter([True, False])
    exporting._thread = types.SimpleNamespace(is_alive=lambda: next(answers), join=lambda timeout: None)
    exporting.close([4, 8], wait=lambda: True)
    assert done == [4, 8]


def test_weights_and_biases_gets_what_the_file_gets(tmp_path, monkeypatch):
    logged, begun = [], []
    run = types.SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append(0))
    stand_in = types.ModuleType("wandb")
    stand_in.init = lambda **what: begun.append(what) or run
    stand_in.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    training.train(toy.config(wandb="project", steps=3), tmp_path, toy.Batches())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert logged == [*((line.pop("step"), line) for line in lines), 0]
    assert begun[0]["project"] == "project" and begun[0]["resume"] == "allow" and begun[0]["config"]["steps"] == 3
    wanted = {"seconds_per_step", "tokens_per_second", "data_wait_share", "memory_bytes", "memory_peak_bytes"}
    assert wanted <= logged[1][1].keys() | logged[2][1].keys()


def test_a_mirror_copies_what_changed(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(mirror.files, "store_of", lambda path: "gs" if "away" in str(path) else "")
    away = tmp_path / "away"
    monkeypatch.setattr(mirror.files, "location", lambda path: mirror.pathlib.Path(path))
    away.mkdir()
    (away / "metrics.jsonl").write_text("before\n")
    copies = mirror.Mirror(away, every_s=0.05)
    copies.fetch("metrics.jsonl")
    with (copies.local / "metrics.jsonl").open("a") as file:
        file.write("now\n")
    (copies.local / "board").mkdir()
    (copies.local / "board" / "events").write_bytes(b"1")
    deadline = time.monotonic() + 10
    while not (away / "board" / "events").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (away / "metrics.jsonl").read_text() == "before\nnow\n"
    away.rename(tmp_path / "gone")
    (tmp_path / "away").write_text("in the way")
    (copies.local / "more").write_text("2")
    with caplog.at_level(logging.WARNING):
        copies.close()
    assert "kept in" in caplog.text and (copies.local / "more").exists()


def test_memory_in_use_is_that_of_the_process():
    found = watching.memory_in_use()
    assert 2**26 < found["memory_bytes"] <= 1.1 * found["memory_peak_bytes"]
