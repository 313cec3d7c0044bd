"""lm-evaluation-harness: every answer is what the model alone says, however requests are put together."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import json
import math
import os
import sys

# Read when lm-eval's packages are imported: nothing here may ask a network.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import jax
import numpy as np
import numpy_reference as reference
import pytest

import fot_jax
from fot_jax import files
from fot_jax.evals import requests
from fot_jax.evals.chat import Chat
from fot_jax.evals.subject import Likelihood, Subject
from fot_jax.generate import memory_tokens
from fot_jax.generate.sampling import Sampling
from fot_jax.tokenizer import open_tokenizer, train_tokenizer

lm_eval = pytest.importorskip("lm_eval")
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from fot_jax.evals import harness
from fot_jax.evals.harness import FotLM

W, C, ROWS = 16, 6, 4
TEXTS = ["the cat sat on the mat and the dog ate the hat", "a rat ran to the red barn at ten"] * 3
LONG = "the rat sat on the red hat and the cat ran to the mat at ten and ate the dog in the barn and ran on"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(TEXTS, folder / "tokenizer.model", 285)
    config = fot_jax.ModelConfig(
        vocab_size=tokenizer.vocab_size + 3,  # padded, as published models are
        d_model=32,
        d_ff=48,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        window=W,
        mem_layers=(1,),
        last_context_length=C,
    )
    fot_jax.save_pretrained(folder, config, reference.random_params(config))
    return folder


@pytest.fixture(scope="module")
def lm(folder):
    return FotLM(folder, rows=ROWS)


def instances(kind, *arguments):
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def starts(n, m):
    """Where the window of each of n + m tokens starts, by the rules of `requests`."""
    if n + m <= W:
        return np.zeros(n + m, int)
    return reference.window_starts(n, n + m, W, min(C, W - m) if m < W else min(C, n))


def log_p(subject, before, after, start=None):
    """log p, float64 [m, V], where each token after the others is predicted."""
    tokens, n, m = np.concatenate([before, after]).astype(int), len(before), len(after)
    start = starts(n, m) if start is None else start
    logits = reference.forward(subject.config, subject.params, tokens[None], start_BT=start[None])[0, n - 1 : -1]
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )


def wanted(lm, context, continuation):
    before, after = lm._encode_pair(context, continuation) if context else ([1], lm.tok_encode(continuation, False))
    found = log_p(lm.subject, before or [1], after)
    return found[np.arange(len(after)), after].sum(), bool((found.argmax(-1) == after).all())


PAIRS = [
    (LONG, " the cat"),
    (LONG, " a rat and the"),
    (LONG, " the rat"),
    (LONG, " a hat ate the red dog"),  # leaves less of the context in the open window
    ("the cat", " sat"),
    ("the cat", " sat on the mat and a"),  # with this one the same context does not fit
    ("", "the dog ate"),
    (" ", "the dog"),
    ("the rat ran ", "on"),
    ("a rat", " ran to the red barn at ten and sat on the mat and the dog ate the hat in it"),  # longer than a window
    (LONG, " and the cat ran to the red barn at ten and sat on the mat of the hat"),
    ("the rat ran to", " the red barn at ten and sat on the mat and the dog ate"),  # with a context that fits one
]


def test_loglikelihoods_are_those_of_the_model_alone(lm):
    sizes = [(len(a), len(b)) for a, b in (lm._encode_pair(*pair) for pair in PAIRS if pair[0])]
    assert C < sizes[-1][0] < W <= sizes[-1][1]
    assert {(n + m <= W, m <= W - C, m < W) for n, m in sizes} >= {
        (True, True, True),
        (False, True, True),
        (False, False, True),
        (False, False, False),
    }
    hook = []
    lm.cache_hook.add_partial, before = lambda *given: hook.append(given), lm.cache_hook.add_partial
    found = lm.loglikelihood(instances("loglikelihood", *PAIRS))
    lm.cache_hook.add_partial = before
    for pair, (likely, greedy) in zip(PAIRS, found, strict=True):
        sum_, best = wanted(lm, *pair)
        assert type(likely) is float and likely == pytest.approx(sum_, abs=1e-4) and greedy is best
    assert sorted(hook) == sorted(("loglikelihood", pair, each) for pair, each in zip(PAIRS, found, strict=True))
    for number in (1, 5, 9):
        ((alone, best),) = lm.loglikelihood(instances("loglikelihood", PAIRS[number]), disable_tqdm=True)
        assert alone == pytest.approx(found[number][0], abs=1e-5) and best is found[number][1]


def test_the_likeliest_continuation_is_greedy(lm):
    (answer,) = lm.generate_until(instances("generate_until", ("the cat", {"until": [], "max_gen_toks": 3})))
    ids = requests.answer(lm.subject, [np.array(lm.tok_encode("the cat"), np.int32)], requests.How(3))[0]
    assert lm.tok_decode(ids) == answer
    prompt, others = lm.tok_encode("the cat"), [list(ids), [*ids[:-1], ids[-1] ^ 1], [ids[0] ^ 1, *ids[1:]]]
    asked = [(None, prompt, other) for other in others]
    assert [greedy for _, greedy in lm._loglikelihood_tokens(asked)] == [True, False, False]


def test_requests_of_one_text_share_its_reading(lm):
    text, other = np.arange(100, dtype=np.int32), np.arange(2, dtype=np.int32)
    follows = [np.zeros(m, np.int32) for m in (3, 5, 12, 4, 12, 16)]
    pairs = [*((text, each) for each in follows), *[(other, follows[0])] * 9]
    found = requests.batches(lm.subject, pairs)
    rows = sorted(row for batch in found for row in batch)
    # 12 tokens leave other 4 than the 6 of the context in the window, 16 are as long as one; a short text is read anew
    # for every four.
    assert rows == [[0, 1, 3], [2, 4], [5], [6, 7, 8, 9], [10, 11, 12, 13], [14]]
    assert all(len(batch) <= ROWS for batch in found) and [[5]] in found
    assert sum(requests.count(pairs, batch) for batch in found) == 300 + 52 + 6 + 27
    assert requests.batches(lm.subject, pairs[:3], sharing=False) == [[[2], [1], [0]]]


def test_a_text_that_fills_its_memory(lm, monkeypatch):
    """Beside one that leaves the window less room than what follows another."""
    monkeypatch.setattr(sys.modules["fot_jax.generate"], "MEMORY_BYTES", (0, 0))  # no more than is needed
    assert memory_tokens(lm.subject.config, ROWS, 64) == 64
    pairs = [(np.arange(3, n + 3), np.arange(9, m + 9)) for n, m in ((64, 3), (14, 2), (3, 12))]
    pairs = [(text.astype(np.int32), follows.astype(np.int32)) for text, follows in pairs]
    (batch,) = requests.batches(lm.subject, pairs)
    for number, likely in requests.score(lm.subject, pairs, batch):
        after = pairs[number][1]
        sum_ = log_p(lm.subject, *pairs[number])[np.arange(len(after)), after].sum()
        assert likely.sum == pytest.approx(sum_, abs=1e-4)


DOCUMENTS = ["", "a cat", LONG, " ".join([LONG, *TEXTS[:2]]), "the rat ran to ten"]


def test_documents_are_read_in_windows_with_memory(lm):
    found = lm.loglikelihood_rolling(instances("loglikelihood_rolling", *((text,) for text in DOCUMENTS)))
    assert found[0] == 0.0
    for text, sum_ in zip(DOCUMENTS[1:], found[1:], strict=True):
        ids = lm.tok_encode(text, False)
        likely = log_p(lm.subject, [1], ids, np.arange(len(ids) + 1) // W * W)
        assert type(sum_) is float and sum_ == pytest.approx(likely[np.arange(len(ids)), ids].sum(), abs=1e-4)
        assert lm.loglikelihood(instances("loglikelihood", ("", text)))[0][0] == pytest.approx(sum_, abs=1e-5)


def test_without_memory_windows_of_documents_are_those_of_other_models(lm, folder):
    config = lm.subject.config.replace(mem_layers=())
    plain = FotLM(Subject(config, reference.random_params(config), open_tokenizer(folder), rows=2))
    ids = plain.tok_encode(DOCUMENTS[3], False)
    text = plain.tok_decode(ids[: len(ids) // W * W])
    ids = plain.tok_encode(text, False)
    assert len(ids) > W and len(ids) % W == 0  # the last window is a whole one, which both begin where the other ends
    total = 0.0
    for window in utils.get_rolling_token_windows(ids, 1, W, 1):
        before, after = utils.make_disjoint_window(window)
        total += log_p(plain.subject, before, after, np.zeros(W + 1, int))[np.arange(W), after].sum()
    assert plain.loglikelihood_rolling(instances("loglikelihood_rolling", (text,)))[0] == pytest.approx(total, abs=1e-4)
    with pytest.raises(ValueError, match=r"request 0, ' a rat and the' after .* no memory layers"):
        plain.loglikelihood(instances("loglikelihood", PAIRS[1]))
    with pytest.raises(ValueError, match=r"request 0, with max_gen_toks 14, has 1\d tokens; the model has no memory"):
        plain.generate_until(instances("generate_until", ("the cat", {"max_gen_toks": 14})))
    assert plain.max_length == W and lm.max_length > 10**9


def check_greedy(lm, prompt, text, new, stop=()):
    """That a text is what the likeliest tokens after a prompt say, before the first stop string."""
    ids = lm.tok_encode(prompt)
    n = len(ids)
    start = np.zeros(n + new, int) if n + new <= W else reference.window_starts(n, n + new, W, min(C, n))
    for _ in range(new):
        logits = reference.forward(
            lm.subject.config, lm.subject.params, np.array(ids)[None], start_BT=start[None, : len(ids)]
        )
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] == 2:
            break
    whole = lm.tok_decode(ids[n:])
    assert text == min((whole.split(s)[0] for s in stop), key=len, default=whole)
    return whole


def test_answers_are_the_likeliest_tokens(lm):
    asked = [(LONG, 5), ("the cat", 5), ("the cat sat on a mat and the", 5), (LONG, 20), ("the rat", 20), (LONG, 13)]
    asked += [("the rat ran to", 14)]
    assert C < len(lm.tok_encode(asked[-1][0])) < W
    given = [(prompt, {"until": [], "max_gen_toks": new, "do_sample": False}) for prompt, new in asked]
    found = lm.generate_until(instances("generate_until", *given))
    whole = [check_greedy(lm, prompt, text, new) for (prompt, new), text in zip(asked, found, strict=True)]
    stop = [whole[3][4:6], whole[3][9]]  # the first of them that comes
    given = [
        (LONG, {"until": stop, "max_new_tokens": 20, "temperature": 0}),
        ("the cat", {"until": "z", "max_tokens": 0}),
    ]
    kept = json.dumps(given)
    stopped, nothing = lm.generate_until(instances("generate_until", *given))
    check_greedy(lm, LONG, stopped, 20, stop)
    assert len(stopped) < len(whole[3]) and nothing == "" and json.dumps(given) == kept


def test_draws_depend_on_the_prompt_alone(lm, monkeypatch):
    hook = []
    monkeypatch.setattr(lm.cache_hook, "add_partial", lambda *given: hook.append(given))
    drawn = {"until": [], "max_gen_toks": 6, "do_sample": True, "top_k": 40}
    asked = instances("generate_until", ("the cat", drawn), (LONG, drawn), ("the cat", drawn))
    first, other, second = lm.generate_until(asked)
    assert first != second and lm.generate_until(asked[1:2]) == [other] and lm.generate_until(asked[:1]) == [first]
    (likeliest,) = lm.generate_until(instances("generate_until", ("the cat", {**drawn, "top_k": 1})))
    check_greedy(lm, "the cat", likeliest, 6)
    assert not hook  # whoever asks the same again is to get another
    likeliest = lm.generate_until(instances("generate_until", ("the cat", {**drawn, "do_sample": False})))
    assert [text for _, _, text in hook] == likeliest
    monkeypatch.setattr(lm, "seed", 1)
    assert lm.generate_until(asked[1:2]) != [other]


def test_draws_of_two_prompts_are_two(lm):
    """Of prompts of one length, where the model says the same of both."""
    even = {**lm.subject.params, "head": jax.tree.map(lambda x: 0 * x, lm.subject.params["head"])}
    subject, texts = dataclasses.replace(lm.subject, params=even), [np.full(3, i, np.int32) for i in (7, 8, 7)]
    how = requests.How(6, sampling=Sampling(1.0, top_k=40))
    first, other, again = (ids.tolist() for ids in requests.answer(subject, texts, how, [(0, 0)] * 3))
    assert first == again != other


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_beams": 4}, "num_beams is 4; wanted 1"),
        ({"typical_p": 0.9, "do_sample": True}, "generation arguments have typical_p; wanted only until, max_gen_toks"),
        ({"do_sample": True, "temperature": -1}, "temperature is -1"),
        ({"max_gen_toks": -1}, "max_gen_toks is -1"),
    ],
)
def test_bad_generation_arguments(lm, given, message):
    with pytest.raises(ValueError, match=message):
        lm.generate_until(instances("generate_until", ("a", given)))


def test_what_cannot_be_asked(lm, folder):
    with pytest.raises(ValueError, match="request 0, '' after 'a', has no token to score"):
        lm.loglikelihood(instances("loglikelihood", ("a", "")))
    with pytest.raises(ValueError, match="request 0, '' after '', has no token to score"):
        lm.loglikelihood(instances("loglikelihood", ("", "")))
    small = FotLM(lm.subject, capacity=20)
    assert small.max_length == 20
    with pytest.raises(ValueError, match=r"request 0, ' the cat' after .* capacity is 20"):
        small.loglikelihood(instances("loglikelihood", PAIRS[0]))
    with pytest.raises(ValueError, match="document 1 has .* tokens; capacity is 20"):
        small.loglikelihood_rolling(instances("loglikelihood_rolling", ("a",), (LONG,)))
    for options, message in (
        (dict(windows=3), "options have windows; wanted reading, k"),
        (dict(window=99), "window is 99; wanted 1..16"),
        (dict(reading="near"), "memory reading is 'near'"),
    ):
        with pytest.raises(ValueError, match=message):
            FotLM(folder, **options)
    with pytest.raises(ValueError, match="options rows are given; wanted none beside a model that is loaded"):
        FotLM(lm.subject, rows=3)
    with pytest.raises(FileNotFoundError, match="nowhere: no such directory"):
        FotLM("nowhere")


def test_tokens_are_as_the_tokenizer_has_them(lm, folder, tmp_path):
    ids = lm.tokenizer.encode("the cat").tolist()
    assert lm.tok_encode("the cat") == [1, *ids] and lm.tok_encode("the cat", add_special_tokens=False) == ids
    assert lm.tok_decode([1, *ids, 2, lm.tokenizer.vocab_size]) == "the cat" and lm.tok_decode(ids[0]) == "the"
    assert (lm.prefix_token_id, lm.eot_token_id) == (1, 2)
    lm.tokenizer.save(tmp_path / "tokenizer.model")
    files.write_json(tmp_path / "tokenizer_config.json", {"add_bos_token": False})
    other = FotLM(Subject(lm.subject.config, lm.subject.params, open_tokenizer(tmp_path)))
    assert other.tok_encode("the cat") == ids and other.prefix_token_id == 1


TEMPLATE = """{{ bos_token }}{% for message in messages %}
{% if message.role == 'system' %}{{ raise_exception('no system') }}{% endif %}
[{{ message.role }}] {{ message.content | trim }}{{ eos_token }}{% endfor %}
{% if add_generation_prompt %}[assistant]{% endif %}"""
MESSAGES = [
    dict(role="system", content="be good"),
    dict(role="user", content="the cat "),
    dict(role="assistant", content="sat"),
]


def test_chat_templates(lm, tmp_path):
    with pytest.raises(ValueError, match="no files beside the model: no chat template; wanted chat_template in"):
        FotLM(lm.subject).apply_chat_template(MESSAGES)
    added = {"7": {"content": "<|im|>", "special": True}, "1": {"content": "<s>", "special": True}}
    stated = dict(chat_template=TEMPLATE, bos_token={"content": "<s>"}, eos_token="</s>", added_tokens_decoder=added)
    files.write_json(tmp_path / "tokenizer_config.json", stated)
    chat = FotLM(lm.subject, tokenizer=tmp_path)
    assert chat.tok_encode("<s>")[1:] == lm.tokenizer.encode("<s>").tolist()  # text, where no template writes it
    text = chat.apply_chat_template(MESSAGES)
    assert text == "<s>[user] the cat</s>[assistant] sat</s>[assistant]"
    between = [lm.tokenizer.encode(part).tolist() for part in ("[user] the cat", "[assistant] sat", "[assistant]")]
    assert chat.tok_encode(text) == [1, *between[0], 2, *between[1], 2, *between[2]]
    assert chat.apply_chat_template(MESSAGES, add_generation_prompt=False) == "<s>[user] the cat</s>[assistant] sat"
    assert chat.chat_template(True) == TEMPLATE and chat.chat_template(False) is None
    with pytest.raises(ValueError, match=r"the chat template writes <\|im\|>, which tokenizer.model does not know"):
        chat.apply_chat_template([dict(role="user", content="<|im|>")])
    with pytest.raises(ValueError, match="chat template is 'tools'; wanted one of default"):
        chat.chat_template("tools")
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('never') }}")
    with pytest.raises(ValueError, match=r"the chat template refuses the messages \(never\)"):
        Chat(tmp_path).text(MESSAGES)


def task(path, name, kind, documents, **more):
    """A task of one's own: a YAML file and its documents."""
    (path / f"{name}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    kwargs = {"data_files": {"test": str(path / f"{name}.jsonl")}, "cache_dir": str(path / "cache")}
    stated = dict(task=name, dataset_path="json", dataset_kwargs=kwargs, test_split="test", output_type=kind, **more)
    (path / f"{name}.yaml").write_text(json.dumps(stated))


QUESTIONS = [
    {"q": LONG, "choices": ["the cat", "a rat and the", "the red dog"], "label": 1},
    {"q": "the cat", "choices": ["sat on the mat", "ran", "ate a hat"], "label": 0},
    {"q": "a rat", "choices": ["ran", "sat", "ate"], "label": 2},
    {"q": LONG[::2], "choices": ["ran", "sat", "ate"], "label": 2},
    {"q": LONG[:20], "choices": ["ran", "sat", "ate"], "label": 0},
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    path = tmp_path_factory.mktemp("tasks")
    choice = dict(doc_to_text="{{q}}", doc_to_choice="{{choices}}", doc_to_target="label")
    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    task(path, "fot_choice", "multiple_choice", QUESTIONS, metric_list=metrics, **choice)
    documents = [{"text": text} for text in DOCUMENTS[1:]]
    metrics = [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")]
    rolling = dict(doc_to_text="", doc_to_target="{{text}}", metric_list=metrics)
    task(path, "fot_rolling", "loglikelihood_rolling", documents, **rolling)
    exact = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    how = dict(until=["\n"], do_sample=False, max_gen_toks=5)
    both = [{"q": "the cat", "a": "no"}, {"q": LONG, "a": "never"}]
    until = dict(doc_to_text="{{q}}", doc_to_target="{{a}}", generation_kwargs=how, metric_list=exact)
    task(path, "fot_until", "generate_until", both, **until)
    return path


def test_tasks_of_all_kinds(lm, tasks):
    names = ["fot_choice", "fot_rolling", "fot_until"]
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = lm_eval.simple_evaluate(model=lm, tasks=names, task_manager=manager, bootstrap_iters=0)
    results, right, normed = found["results"], [], []
    for question in QUESTIONS:
        sums = [wanted(lm, question["q"], f" {choice}")[0] for choice in question["choices"]]
        right.append(np.argmax(sums) == question["label"])
        per_letter = [x / len(choice) for x, choice in zip(sums, question["choices"], strict=True)]
        normed.append(np.argmax(per_letter) == question["label"])
    assert results["fot_choice"]["acc,none"] == np.mean(right)
    assert results["fot_choice"]["acc_norm,none"] == np.mean(normed)
    total = sum(wanted(lm, "", text)[0] for text in DOCUMENTS[1:])
    size = sum(len(text.encode()) for text in DOCUMENTS[1:])
    assert results["fot_rolling"]["bits_per_byte,none"] == pytest.approx(-total / size / math.log(2), abs=1e-5)
    for sample, prompt in zip(found["samples"]["fot_until"], ("the cat", LONG), strict=True):
        check_greedy(lm, prompt, sample["resps"][0][0], 5, ["\n"])
    assert found["config"]["window"] == W and found["config"]["last_context_length"] == C


def test_a_task_of_lm_evals_own(lm, tmp_path):
    """Its prompt, choices and metrics as they are; documents of the same columns from a file."""
    own = os.path.join(os.path.dirname(lm_eval.__file__), "tasks", "arc", "arc_easy.yaml")
    letters = {"label": ["A", "B", "C"], "text": ["the mat", "a hat", "a rat"]}
    documents = [
        {"question": "where did the cat sit", "choices": letters, "answerKey": "A"},
        {"question": "what did the dog eat", "choices": letters, "answerKey": "B"},
    ]
    data = tmp_path / "arc.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in documents))
    kwargs = dict(
        data_files={split: str(data) for split in ("train", "validation", "test")}, cache_dir=str(tmp_path / "c")
    )
    stated = dict(include=own, dataset_path="json", dataset_name=None, dataset_kwargs=kwargs)
    (tmp_path / "local.yaml").write_text(json.dumps({**stated, "task": "arc_local"}))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = lm_eval.simple_evaluate(model=lm, tasks=["arc_local"], task_manager=manager, bootstrap_iters=0)
    right = []
    for sample, document in zip(found["samples"]["arc_local"], documents, strict=True):
        prompt = f"Question: {document['question']}\nAnswer:"
        assert [tuple(each) for each in sample["arguments"]] == [(prompt, f" {choice}") for choice in letters["text"]]
        sums = [wanted(lm, prompt, f" {choice}")[0] for choice in letters["text"]]
        np.testing.assert_allclose([each[0][0] for each in sample["resps"]], sums, atol=1e-4)
        right.append("ABC"[int(np.argmax(sums))] == document["answerKey"])
    assert found["results"]["arc_local"]["acc,none"] == np.mean(right)


def test_a_command_that_was_killed_ends_with_the_same_bytes(folder, tasks, tmp_path, monkeypatch, capsys):
    steps, fatal = [], 0

    def fatally(step):
        def call(*given, **more):
            steps.append(step)
            if len(steps) == fatal:
                raise KeyboardInterrupt
            return step(*given, **more)

        return call

    read = Subject.read
    monkeypatch.setattr(Subject, "read", fatally(read))
    monkeypatch.setattr(Likelihood, "sum", property(fatally(Likelihood.sum.fget)))  # of each request of a batch

    def run(out):
        steps.clear()
        gc.collect()  # a process that was killed has no file
        given = ["--checkpoint", folder, "--tasks", "fot_ch*,fot_rolling,fot_until", "--include-path", tasks]
        given += ["--out", tmp_path / out, "--rows", ROWS, "--bootstrap-iters", 0, "--log-samples"]
        return harness.main([*map(str, given), "--gen-kwargs", "do_sample=True,top_k=40"])

    def found(out):
        return {path.name: path.read_bytes() for path in (tmp_path / out).iterdir() if "speed" not in path.name}

    assert run("whole") == 0
    table, whole, all_steps = capsys.readouterr().out, found("whole"), [*steps]
    assert "fot_choice" in table and "acc_norm" in table and "bits_per_byte" in table and "tokens read" in table
    assert set(whole) == {"harness.json", *(f"harness.fot_{name}.jsonl" for name in ("choice", "rolling", "until"))}
    lines = whole["harness.fot_choice.jsonl"].decode().splitlines()
    assert [json.loads(line)["target"] for line in lines] == [1, 0, 2, 2, 0]
    values = json.loads(whole["harness.json"])
    assert values["n-samples"]["fot_choice"]["effective"] == 5 and values["config"]["checkpoint"] == str(folder)
    reads = [number for number, step in enumerate(all_steps) if step is read]
    assert len(reads) == 4  # batches: two of choices, one of documents, one of answers
    for point in (reads[0] + 6, reads[1] + 3, len(all_steps)):
        fatal = point
        with pytest.raises(KeyboardInterrupt):
            run(f"{point}")
        fatal = 0
        assert run(f"{point}") == 0 and found(f"{point}") == whole
        assert steps == all_steps[max(start for start in reads if start < point) :]
    assert "loglikelihood: 2 of 2 were done before" in capsys.readouterr().err


def test_the_command_says_what_is_wrong(folder, tasks, lm, tmp_path, capsys):
    files.write(tmp_path / "bad.yaml", b"task: [a, {b")
    files.write(tmp_path / "empty.yaml", b"dataset_path: json")
    files.write_json(tmp_path / "wrong.yaml", {**json.loads((tasks / "fot_until.yaml").read_text()), "doc_to": "q"})
    plain = lm.subject.config.replace(mem_layers=())
    fot_jax.save_pretrained(tmp_path / "plain", plain, reference.random_params(plain))
    given = ["--include-path", str(tasks), "--tokenizer", str(folder), "--checkpoint"]
    for checkpoint, name, more, message in (
        (folder, "missing.yaml", [], "missing.yaml: no such file"),
        (folder, tmp_path / "bad.yaml", [], "bad.yaml cannot be loaded: ParserError: while parsing a flow"),
        (folder, tmp_path / "empty.yaml", [], "empty.yaml cannot be loaded: ValueError: Unknown config shape"),
        (folder, tmp_path / "wrong.yaml", [], "wrong.yaml cannot be loaded: TypeError: "),
        (folder, "fot_choice", ["--window", "99"], "window is 99; wanted 1..16"),
        (folder, "fot_choice", ["--apply-chat-template"], "no chat template; wanted chat_template in tokenizer_config"),
        (tmp_path / "plain", "fot_until", [], "request 1, with max_gen_toks 5, has"),
    ):
        assert harness.main([*given, str(checkpoint), "--tasks", str(name), *more]) == 2
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("fot_jax.evals.harness: "))
        assert message in line
    for more, message in ((["--mesh", "rows=2"], "'rows=2'; wanted sizes of data"), (["--limit", "0"], "'0'; wanted")):
        with pytest.raises(SystemExit):
            harness.main([*given, str(folder), "--tasks", "fot_choice", *more])
        assert message in capsys.readouterr().err


def test_lm_eval_knows_the_model_by_name(folder, lm):
    assert get_model("fot") is FotLM
    extra = dict(batch_size=3, max_batch_size=None, device="cuda:0")
    made = FotLM.create_from_arg_string(f"checkpoint={folder},last_context_length=5,reading=topk,k=2", extra)
    assert made.subject.rows == 3 and made.subject.config.last_context_length == 5 and made.subject.reading.k == 2
    assert FotLM.create_from_arg_obj({"checkpoint": folder}, {"batch_size": 1}).subject.rows == 8
    assert lm.identity() == FotLM(folder, rows=ROWS).identity()
    for other in (dict(reading="topk"), dict(k=2, reading="topk"), dict(rows=2), dict(seed=1)):
        assert FotLM(folder, **{"rows": ROWS, **other}).identity() != lm.identity()


def test_without_lm_eval_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    spec = importlib.util.find_spec("fot_jax.evals.fot_lm")
    with pytest.raises(ImportError, match="needs the package lm-eval, .*pip install 'lm-eval>=0.4.10,<0.5'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_on_several_devices_as_on_one(folder, lm, devices):
    several = FotLM(folder, rows=ROWS, data=2, context=2)
    asked = instances("loglikelihood", PAIRS[0])
    assert several.loglikelihood(asked)[0][0] == pytest.approx(lm.loglikelihood(asked)[0][0], abs=1e-4)
    assert len(jax.tree.leaves(several.subject.params)[0].sharding.device_set) == 4


def test_as_lm_evals_model_for_transformers(tmp_path):
    """Where all fits the window, the numbers are its own."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    huggingface = pytest.importorskip("lm_eval.models.huggingface")

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    cut = tokenizers.pre_tokenizers.ByteLevel
    made.pre_tokenizer, made.decoder = cut(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    options = dict(special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=cut.alphabet(), show_progress=False)
    made.train_from_iterator(TEXTS, tokenizers.trainers.BpeTrainer(vocab_size=290, **options))
    names = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(tmp_path)
    sizes = dict(vocab_size=290, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4)
    config = transformers.LlamaConfig(**sizes, max_position_embeddings=64, initializer_range=0.2)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    theirs = huggingface.HFLM(str(tmp_path), device="cpu", dtype="float32", batch_size=2)
    ours = FotLM(tmp_path, rows=2)
    assert ours.tok_encode(LONG) == theirs.tok_encode(LONG)
    ends = {"until": ["e", "</s>"], "max_gen_toks": 9}
    for kind, asked in (
        ("loglikelihood", [*PAIRS[:3], *PAIRS[6:7]]),
        ("generate_until", [(LONG, ends), ("a", {**ends, "until": []})]),
    ):
        found, wanted = (getattr(lm, kind)(instances(kind, *asked), disable_tqdm=True) for lm in (ours, theirs))
        if kind == "generate_until":
            assert found == wanted
        else:
            np.testing.assert_allclose(np.array(found, float), np.array(wanted, float), atol=1e-3, rtol=1e-5)
