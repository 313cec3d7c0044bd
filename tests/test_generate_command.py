"""The command line of generation, run in this process so that programs are compiled once."""

from __future__ import annotations

import io
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import numpy_reference as reference
import pytest

import fot_jax
from fot_jax import files
from fot_jax.config import ModelConfig
from fot_jax.generate.__main__ import main
from fot_jax.tokenizer import open_tokenizer, train_tokenizer

SHIPPED = pathlib.Path(__file__).parent / "reference" / "longllama"
BESIDE = pathlib.Path(os.environ.get("FOT_REFERENCE", pathlib.Path(__file__).parents[2] / "shared" / "reference"))


def published() -> list:
    """(directory, name of an array of greedy tokens): the published code's cases without padding, which it cuts by
    column.
    """
    out = []
    for path in sorted(SHIPPED.iterdir()) + sorted(BESIDE.glob("longllama/*")):
        with np.load(path / "reference.npz") as file:
            names = [name for name in file if name.startswith("greedy_tokens_last")]
            if "attention_mask" in file or not names:
                continue
        shipped = path.is_relative_to(SHIPPED)
        marks = () if shipped or path.name == "batch2" else (pytest.mark.slow,)
        out.append(pytest.param(path, names[0], id=f"{'shipped-' if shipped else ''}{path.name}", marks=marks))
    return out


@pytest.mark.parametrize(("path", "name"), published())
def test_greedy_tokens_of_the_published_code(path, name, tmp_path, capfd):
    if not (path / "model.safetensors").exists():
        pytest.importorskip("torch", reason="the weights are pickled")
    with np.load(path / "reference.npz") as file:
        prompts, wanted = file["input_ids"], file[name]
    (tmp_path / "ids").write_text("\n".join(" ".join(map(str, row)) for row in prompts))
    words = f"{path} --prompt-ids-file {tmp_path}/ids --print-ids --json {tmp_path}/out.json --dtype float32"
    lengths = ["--max-new-tokens", str(wanted.shape[1]), "--last-context-length", name.rpartition("_last")[2]]
    assert main([*words.split(), *lengths]) == 0
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    np.testing.assert_array_equal([result["tokens"] for result in results], wanted)
    printed = [line for line in capfd.readouterr().out.splitlines() if not line.startswith("---")]
    np.testing.assert_array_equal([list(map(int, line.split())) for line in printed], wanted)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A model with a tokenizer of a smaller vocabulary beside it."""
    path = tmp_path_factory.mktemp("model")
    text = pathlib.Path(__file__).read_text(encoding="utf-8")
    tokenizer = train_tokenizer([text + "żółw €"], path / "tokenizer.model", 400)
    sizes = dict(vocab_size=404, d_model=16, d_ff=20, n_layers=1, n_heads=2, window=16, mem_layers=(0,))
    config = ModelConfig(**sizes, last_context_length=8, eos_id=None)
    fot_jax.save_pretrained(path, config, jax.tree.map(np.asarray, reference.random_params(config, seed=4)))
    assert tokenizer.vocab_size == 400
    return path


PROMPT = "Programs are compiled once, and text is streamed as it comes."


@pytest.fixture
def command(directory, capfd, tmp_path):
    """Runs the command quietly: (exit status, stdout, stderr, what --json gives)."""

    def run(*arguments):
        out = tmp_path / "out.json"
        out.unlink(missing_ok=True)
        capfd.readouterr()
        try:
            status = main([str(directory), "--json", str(out), *map(str, arguments)])
        except SystemExit as error:
            status = error.code
        captured = capfd.readouterr()
        return status, captured.out, captured.err, json.loads(out.read_text()) if out.exists() else None

    return run


def test_text_of_one_prompt_is_the_tokens_that_the_library_gives(command, directory):
    status, out, err, found = command("--prompt", PROMPT, "--max-new-tokens", 40, "--stream-every", 3)
    assert status == 0
    tokenizer = open_tokenizer(directory)
    ids = np.array([[tokenizer.bos_id, *tokenizer.encode(PROMPT)]])
    config, params = fot_jax.load_pretrained(directory)
    (result,) = found["results"]
    np.testing.assert_array_equal(result["tokens"], np.asarray(fot_jax.generate(config, params, ids, 40))[0])
    assert result["finish"] == "length" and result["prompt_tokens"] == ids.size == found["prompt_tokens"]
    known = [token for token in result["tokens"] if token < 400]
    whole = tokenizer.decode([*ids[0], *known])
    assert out == result["text"] + "\n" and whole == PROMPT + result["text"]
    assert f"read {ids.size} tokens" in err and "wrote 40 tokens" in err and "tokens/s after the first" in err
    assert found["memory_tokens"] > 0 and found["decode_tokens_per_second"] > 0


def test_a_batch_is_its_rows(command):
    prompts = [PROMPT, "żółw", PROMPT[:30]]
    options = ["--max-new-tokens", 30, "--quiet"]
    each = [command("--prompt", prompt, *options)[3]["results"][0] for prompt in prompts]
    status, out, err, together = command(*(x for prompt in prompts for x in ("--prompt", prompt)), *options)
    assert status == 0 and err == ""
    for b, (result, alone) in enumerate(zip(together["results"], each, strict=True)):
        assert {**result, "prompt": 0} == alone and result["prompt"] == b
    assert out == "".join(f"--- prompt {b + 1} of 3 ---\n{alone['text']}\n" for b, alone in enumerate(each))


def test_a_stop_string_ends_the_text(command):
    free = command("--prompt", PROMPT, "--max-new-tokens", 40)[3]["results"][0]
    stop = free["text"][12:15]
    status, out, _, found = command("--prompt", PROMPT, "--max-new-tokens", 40, "--stop", stop, "--stop", "\0")
    (result,) = found["results"]
    assert status == 0 and result["finish"] == "stop"
    assert result["text"] == free["text"][: free["text"].index(stop)] and out == result["text"] + "\n"
    assert len(result["tokens"]) < 40
    # What is found does not depend on how often it is looked at.
    one = command("--prompt", PROMPT, "--max-new-tokens", 40, "--stop", stop, "--stream-every", 1)[3]["results"]
    assert one == [result]


def test_files_and_stdin_give_prompts(command, tmp_path, monkeypatch):
    (tmp_path / "prompt").write_text(PROMPT)
    wanted = command("--prompt", PROMPT, "--max-new-tokens", 8)[1]
    assert command("--prompt-file", tmp_path / "prompt", "--max-new-tokens", 8)[1] == wanted
    for arguments in ([], ["--prompt-file", "-"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
        assert command(*arguments, "--max-new-tokens", 8)[1] == wanted


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_results_go_where_a_link_or_a_pipe_leads(command, tmp_path, kind):
    (tmp_path / "there").write_text("old")
    path = tmp_path / kind
    if kind == "link":
        path.symlink_to(tmp_path / "there")
    else:
        os.mkfifo(path)
        reading = subprocess.Popen(["cat", path], stdout=(tmp_path / "there").open("wb"))
    files.write_json(path, {"a": 1})
    if kind == "pipe":
        assert reading.wait() == 0 and path.is_fifo()
        status, _, err, _ = command("--prompt", PROMPT, "--max-new-tokens", 0, "--save-memory", path)
        assert status == 2 and "a device; wanted a file's name" in err
    assert path.is_symlink() == (kind == "link")
    assert json.loads((tmp_path / "there").read_text()) == {"a": 1}


def test_a_model_without_memory_says_what_it_leaves_out(tmp_path, capfd):
    config = ModelConfig(vocab_size=20, d_model=16, d_ff=20, n_layers=1, n_heads=2, window=16, last_context_length=8)
    fot_jax.save_pretrained(tmp_path, config, jax.tree.map(np.asarray, reference.random_params(config)))
    args = [str(tmp_path), "--print-ids", "--max-new-tokens", "1", "--prompt-ids"]
    assert main([*args, " ".join(["3"] * 50)]) == 0
    err = capfd.readouterr().err
    assert "has no memory layers: only the last 8 tokens of a prompt are read" in err and "read 8 tokens" in err
    assert main([*args, "3 4 5"]) == 0
    assert "memory layers" not in capfd.readouterr().err


def test_sampling_follows_its_seed(command):
    draw = lambda seed: command("--prompt", PROMPT, "--temperature", 1.5, "--top-p", 0.9, "--seed", seed)[3]["results"]
    first = draw(1)
    assert draw(1) == first and draw(2) != first


def test_a_saved_memory_answers_as_if_the_prompt_were_read_again(command, tmp_path):
    file, options = tmp_path / "read", ["--max-new-tokens", 30, "--repetition-penalty", 1.5]
    whole = command("--prompt", PROMPT, *options)[3]["results"][0]
    status, out, _, found = command("--prompt", PROMPT, "--max-new-tokens", 0, "--save-memory", file)
    assert (status, out, found["results"][0]["tokens"]) == (0, "", [])
    status, _, _, found = command("--load-memory", file, *options)
    assert status == 0 and found["results"][0]["tokens"] == whole["tokens"]
    assert found["results"][0]["text"] == whole["text"]
    # Reading on is as if the tokens had been generated; two questions about one memory.
    ids = " ".join(map(str, whole["tokens"][:11]))
    questions = ["--prompt-ids", ids, "--prompt-ids", ids, "--max-new-tokens", 19, "--repetition-penalty", 1.5]
    status, _, _, found = command("--load-memory", file, *questions)
    assert status == 0 and [result["tokens"] for result in found["results"]] == [whole["tokens"][11:]] * 2


def test_an_approximate_search_says_what_it_finds(command):
    options = ["--prompt", PROMPT, "--max-new-tokens", 8, "--k", 3]
    exact = command(*options, "--memory", "topk")[3]
    status, _, err, found = command(*options, "--memory", "approximate")
    # A CPU makes the approximate search exactly.
    assert status == 0 and found["recall"] == {"0": 1.0} and "recall" not in exact
    assert "of the best of memory, layer 0 found 100.0%" in err
    assert found["results"][0]["tokens"] == exact["results"][0]["tokens"]
    status, _, _, found = command(*options[:2], "--max-new-tokens", 0, "--k", 3, "--memory", "approximate")
    assert status == 0 and "recall" not in found


def test_values_may_lie_on_the_host(command, tmp_path):
    options = ["--max-new-tokens", 30, "--memory", "topk", "--k", 3]
    wanted = command("--prompt", PROMPT, *options)[3]["results"][0]["tokens"]
    status, _, _, found = command("--prompt", PROMPT, *options, "--values-on-host", "--save-memory", tmp_path / "read")
    assert status == 0 and found["results"][0]["tokens"] == wanted
    for more in ([], ["--values-on-host"]):
        status, _, _, found = command("--load-memory", tmp_path / "read", *options, *more)
        assert status == 0 and found["results"][0]["tokens"] == wanted


def test_a_budget_bounds_memory(command):
    # 2 heads x 8 dimensions x 2 x 4 bytes = 128 bytes a token, windows of 16.
    status, _, _, found = command("--prompt", PROMPT, "--max-new-tokens", 5, "--memory-bytes", "64K")
    assert status == 0 and found["memory_bytes"] == 2**16 and found["memory_capacity"] == 512
    status, _, _, found = command(
        "--prompt", PROMPT, "--max-new-tokens", 5, "--memory-bytes", 2**16, "--memory-dtype=bfloat16"
    )
    assert status == 0 and found["memory_capacity"] == 1024


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt-ids", "1 x"], "--prompt-ids: invalid literal.*'x'; wanted token ids"),
        (["--prompt-ids", "1 404"], r"prompt 0 has token 404; wanted 0\.\.403"),
        (["--prompt-ids", ""], "prompt 0 is empty"),
        (["--prompt-file", "/nowhere"], "prompt file /nowhere: no such file"),
        (["--prompt", "a", "--temperature", "-1"], "temperature is -1.0; wanted a number of at least 0"),
        (["--prompt", "a", "--temperature", "1e-50"], "temperature is 1e-50; wanted a number of at least 0"),
        (["--prompt", "a", "--save-memory", "/tmp"], "/tmp: a folder; wanted a file's name"),
        (["--prompt", "a", "--top-p", "2"], "top_p is 2.0"),
        (["--prompt", "a", "--memory", "topk"], "wanted k for 'topk'"),
        (["--prompt", "a", "--values-on-host"], "--values-on-host with --memory dense, .* wanted topk or approximate"),
        (["--prompt", "a", "--k", "3"], "wanted k for 'topk' and 'approximate', and only there"),
        (["--prompt", "a", "--last-context-length", "17"], r"--last-context-length is 17; wanted 1\.\.16"),
        (["--prompt", "a", "--max-new-tokens", "-1"], "argument --max-new-tokens: '-1'; wanted a whole number"),
        (["--prompt", "a", "--memory-bytes", "2X"], "argument --memory-bytes: '2X' is no size"),
        (
            ["--prompt-ids", "1 2 3", "--memory-bytes", "4K", "--max-new-tokens", "50"],
            "--memory-bytes is 4,096, which holds 32 tokens in each of 1 rows; prompt and new tokens need 53, in whole "
            "windows 64: 8,192 bytes",
        ),
        (["--prompt", "a", "--stop", ""], "--stop is empty"),
        (["--prompt", "a", "--save-memory", "/nowhere/file"], "/nowhere/file: its folder does not exist"),
        (["--load-memory", "/nowhere"], "saved memory /nowhere: no such file"),
        (["--prompt", "a", "--tokenizer", "/nowhere"], "tokenizer /nowhere: no such file"),
        (["--prompt", "a", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["--prompt", "a\udcff"], r"--prompt 'a\\udcff': not UTF-8"),
    ],
)
def test_input_that_does_not_fit_is_one_line(command, monkeypatch, arguments, message):
    # Nothing is read before.
    monkeypatch.setattr(sys.modules["fot_jax.generate.__main__"], "load_pretrained", None)
    status, out, err, _ = command(*arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("fot-generate: ")
    assert re.search(message, err), err


def test_no_model_is_one_line(capfd):
    assert main(["/nowhere", "--prompt", "a"]) == 2
    assert capfd.readouterr().err == "fot-generate: /nowhere: no such file or directory; wanted a checkpoint\n"
