"""Opening tokenizers of both kinds, OpenLLaMA's ids, and vocabularies out of GGUF files.

What `train_tokenizer` makes is tested in test_data.py. OpenLLaMA's two models are looked for in `shared/tokenizers`
beside the checkout; without them those tests are skipped.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fot_jax import tokenizer
from fot_jax.generate.text import TextStream
from fot_jax.tokenizer import SentencePiece, Tokenizer, TokenizerJson, open_tokenizer, train_tokenizer, write_from_gguf

ROOT = pathlib.Path(__file__).parents[1]
OPEN_LLAMA = ROOT.parent / "shared" / "tokenizers"
TEXTS = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests").glob("test_c*.py"))]
# U+2581 is SentencePiece's space: the text that holds it does not come back.
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=60)


# ---- OpenLLaMA

# Computed by SentencePiece's own library. A plain reading of the method (merge the adjacent pair with the best score
# until none is left; UTF-8 bytes for what is then no piece) gives the same on all of them. Control tokens' names in a
# text are text. transformers 5's LlamaTokenizer, which goes by way of a tokenizer.json, gives the same save where there
# are extra spaces or such names.
#
# The models differ in more than vocabulary: v1 was made with remove_extra_whitespaces, so leading and trailing spaces
# are dropped and runs of them count as one (newlines and tabs do not); v2 keeps every space, with pieces for up to 16.
GOLDEN = {
    # text: (v1, v2)
    "": ([], []),
    " ": ([], [263]),
    "   ": ([], [283]),
    "Hello": ([16644], [8479]),
    " Hello": ([16644], [263, 19019]),
    "  Hello": ([16644], [263, 8479]),
    "   Hello  world": ([16644, 924], [283, 19019, 263, 9360]),
    "trailing ": ([30174], [28690, 29500]),
    "trailing   ": ([30174], [28690, 1618]),
    "\n": ([31822, 13], [29500, 13]),
    "\n\n": ([31822, 13, 13], [29500, 13, 13]),
    " \n ": ([31822, 13], [263, 13, 29500]),
    "a\nb": ([260, 13, 31842], [260, 13, 29521]),
    "a\n\n  b": ([260, 13, 13, 284], [260, 13, 13, 263, 29521]),
    "\r\n": ([3674, 13], [983, 13]),
    "\t": ([31822, 12], [29500, 12]),
    "\tx": ([31822, 12, 31859], [29500, 12, 29535]),
    "a\t\tb": ([260, 12, 12, 31842], [260, 12, 12, 29521]),
    "def f(x):\n    return  x\n": (
        [918, 278, 31864, 31859, 2151, 13, 1199, 2574, 13],
        [898, 279, 29534, 29535, 2094, 13, 283, 1439, 263, 29535, 13],
    ),
    "1234567890": (
        [31822, 31853, 31855, 31878, 31882, 31880, 31887, 31888, 31886, 31877, 31852],
        [29500, 29532, 29536, 29556, 29562, 29561, 29570, 29574, 29571, 29567, 29529],
    ),
    "year 2023, 3.14": (
        [584, 31822, 31855, 31852, 31855, 31878, 31844, 31822, 31878, 31843, 31853, 31882],
        [669, 29500, 29536, 29529, 29536, 29556, 29522, 29500, 29556, 29520, 29532, 29562],
    ),
    "😀": ([31822, 243, 162, 155, 131], [28176]),
    "👩\u200d👩\u200d👧 ok": (
        [31822, 243, 162, 148, 172, 229, 131, 144, 243, 162, 148, 172, 229, 131, 144, 243, 162, 148, 170, 7551],
        [29500, 243, 162, 148, 172, 31824, 243, 162, 148, 172, 31824, 243, 162, 148, 170, 4787],
    ),
    "zażółć gęślą": (
        [27762, 200, 191, 31947, 31974, 199, 138, 318, 199, 156, 200, 158, 31832, 199, 136],
        [21200, 29710, 29625, 29651, 29741, 315, 29686, 29712, 29509, 29690],
    ),
    "e\u0301": ([315, 207, 132], [316, 29998]),
    "日本語": ([31822, 233, 154, 168, 233, 159, 175, 235, 173, 161], [29500, 29917, 29879, 30717]),
    "ꙮ": ([31822, 237, 156, 177], [29500, 237, 156, 177]),
    "\0": ([31822, 3], [29500, 3]),
    "\x7f\x80": ([31822, 130, 197, 131], [29500, 31040, 197, 131]),
    "\ufffd": ([18694], [29500, 29659]),
    "\xa0x\u3000y": ([31822, 31963, 31859, 230, 131, 131, 31840], [19858, 29535, 30277, 29518]),
    "<s></s>": ([718, 31829, 3138, 31829, 31901], [506, 29508, 2362, 29508, 29569]),
    "<unk>": ([718, 3290, 31901], [506, 2850, 29569]),
    "<0x0A>": ([718, 31852, 31859, 31852, 31849, 31901], [506, 29529, 29535, 29529, 29530, 29569]),
}

versions = pytest.mark.parametrize("version", [1, 2])


@functools.cache
def open_llama(version: int) -> SentencePiece:
    path = OPEN_LLAMA / f"open_llama_v{version}.model"
    if not path.is_file():
        pytest.skip(f"no {path}")
    return open_tokenizer(path)


@versions
def test_open_llamas_ids(version):
    made = open_llama(version)
    assert (made.vocab_size, made.bos_id, made.eos_id, made.pad_id, made.adds_bos) == (32000, 1, 2, 0, True)
    for text, wanted in GOLDEN.items():
        found = made.encode(text)
        assert found.dtype == np.int32 and found.tolist() == wanted[version - 1], repr(text)


@versions
def test_open_llamas_text(version):
    made = open_llama(version)
    for text in GOLDEN:
        if version == 1:  # what is left of the text where extra spaces go
            kept = " ".join(part for part in text.split(" ") if part)
        assert made.decode(made.encode(text)) == (kept if version == 1 else text), repr(text)
    assert made.decode([1, *made.encode("fox"), 2, 0, 0]) == "fox"
    # A token that is half of a character.
    assert made.decode(made.encode("ꙮ")[:-1]).startswith("\ufffd")


@versions
def test_open_llamas_ids_of_long_texts(version):
    made = open_llama(version)
    words = [
        "a",
        "\n",
        "  ",
        " \n",
        "\u2581\n",
        "\t",
        "the quick",
        "12",
        "\n\n\n",
        "żółw",
        "😀",
        "def f(x):\n    return x",
    ]
    text = "".join(np.random.RandomState(0).choice(words, 60_000))
    assert len(list(tokenizer._chunks(text))) > 2
    whole = sentencepiece.SentencePieceProcessor(model_file=str(OPEN_LLAMA / f"open_llama_v{version}.model"))
    np.testing.assert_array_equal(made.encode(text), whole.encode(text))


# ---- SentencePiece


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tokenizer.model"
    train_tokenizer(TEXTS, path, 500)
    return path


def test_directory_and_file_give_the_same(small_model, tmp_path):
    made = open_tokenizer(small_model.parent)
    assert isinstance(made, SentencePiece) and made.file_name == "tokenizer.model" and made.adds_bos
    assert made.fingerprint == open_tokenizer(str(small_model)).fingerprint == Tokenizer.load(small_model).fingerprint
    # The SentencePiece model comes first.
    (tmp_path / "tokenizer.model").write_bytes(small_model.read_bytes())
    (tmp_path / "tokenizer.json").write_text("damaged")
    assert open_tokenizer(tmp_path).fingerprint == made.fingerprint


def test_sentencepiece_expects_bos_unless_told(small_model, tmp_path):
    copy = tmp_path / "any.name"
    copy.write_bytes(small_model.read_bytes())
    for told, wanted in [({}, True), ({"add_bos_token": None}, True), ({"add_bos_token": False}, False)]:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(told))
        assert open_tokenizer(copy).adds_bos is wanted
    open_tokenizer(copy).save(tmp_path / "saved" / "tokenizer.model")
    saved = open_tokenizer(tmp_path / "saved")
    assert not saved.adds_bos and saved.fingerprint == open_tokenizer(small_model).fingerprint


def test_padding_gives_no_text(small_model):
    made = open_tokenizer(small_model)
    assert made.pad_id == 0 and made.decode(np.array([1, *made.encode("fox"), 2, 0, 0], np.int32)) == "fox"


def test_nothing_to_open(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such file"):
        open_tokenizer(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"found an empty directory; wanted tokenizer.model or tokenizer.json"):
        open_tokenizer(tmp_path)
    for i in range(10):
        (tmp_path / f"{i}.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"found 0.txt, .*, 7.txt and 2 more; wanted tokenizer.model"):
        open_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "name, content, config, message",
    [
        ("tokenizer.model", "no", "{}", r"tokenizer.model: not a SentencePiece model"),
        ("tokenizer.json", "no", "{}", r"tokenizer.json: not a tokenizer.json"),
        ("tokenizer.json", "\udcff", "{}", r"tokenizer.json: not a tokenizer.json"),
        ("tokenizer.json", "{}", "{}", r"tokenizer.json: not a tokenizer.json"),
        ("tokenizer.model", "no", "{", r"tokenizer_config.json: not JSON"),
        ("tokenizer.model", "no", "[]", r"tokenizer_config.json: found a list; wanted an object"),
        ("tokenizer.model", "no", '{"add_bos_token": "yes"}', r"add_bos_token is 'yes'; wanted true or false"),
    ],
)
def test_damaged_files(tmp_path, name, content, config, message):
    (tmp_path / name).write_text(content, errors="surrogateescape")
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(ValueError, match=message):
        open_tokenizer(tmp_path)


def test_a_model_without_bos_is_refused(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[0].split("\n")),
        model_prefix=tmp_path / "x",
        vocab_size=200,
        bos_id=-1,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match=r"x.model: bos_id -1, eos_id \d; wanted both at least 0"):
        open_tokenizer(tmp_path / "x.model")


# ---- tokenizer.json


def byte_level(special: list[str]):
    """A small byte-level BPE of the package tokenizers, GPT-2's kind."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    return made


def with_template(made, single: str):
    tokenizers = pytest.importorskip("tokenizers")
    names = [(t.content, i) for i, t in made.get_added_tokens_decoder().items()]
    made.post_processor = tokenizers.processors.TemplateProcessing(single=single, special_tokens=names)
    return made


def write_json(directory, made, config=None, special_tokens_map=None):
    directory.mkdir(exist_ok=True)
    made.save(str(directory / "tokenizer.json"))
    for name, content in (("tokenizer_config", config), ("special_tokens_map", special_tokens_map)):
        if content is not None:
            (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


@pytest.fixture(scope="module")
def small_json(tmp_path_factory):
    made = byte_level(["<unk>", "<s>", "</s>", "<fill>"])
    return write_json(tmp_path_factory.mktemp("json"), made, {"add_bos_token": True, "pad_token": "<fill>"})


@settings(max_examples=100)
@given(ANY_TEXT)
@example("  two\n\n\n\tthree 123   \r\n ")
def test_round_trip_of_a_tokenizer_json(small_json, text):
    made = open_tokenizer(small_json)
    ids = made.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1 and not set(ids.tolist()) & {1, 2, 3}
    assert made.decode(ids) == made.decode([1, *ids, 2, 3]) == text


def test_tokenizer_json(small_json, tmp_path):
    made = open_tokenizer(small_json)
    assert isinstance(made, TokenizerJson) and made.file_name == "tokenizer.json"
    assert (made.vocab_size, made.bos_id, made.eos_id, made.pad_id, made.adds_bos) == (400, 1, 2, 3, True)
    assert made.encode("<s>x</s>").tolist() == [1, *made.encode("x"), 2]
    made.save(tmp_path / "deep" / made.file_name)
    assert sorted(os.listdir(tmp_path / "deep")) == ["tokenizer.json", "tokenizer_config.json"]
    saved = Tokenizer.load(tmp_path / "deep")
    for name in ("vocab_size", "bos_id", "eos_id", "pad_id", "adds_bos", "fingerprint"):
        assert getattr(saved, name) == getattr(made, name), name
    # How a file cuts and fills batches is not obeyed.
    whole = byte_level(["<s>"])
    whole.enable_truncation(2)
    whole.enable_padding(length=5)
    cut = open_tokenizer(write_json(tmp_path / "cut", whole))
    assert cut.decode(cut.encode("one two three four")) == "one two three four"


def test_special_tokens_of_a_tokenizer_json(tmp_path):
    made = byte_level(["<unk>", "<s>", "</s>", "<|endoftext|>", "<|turn|>"])
    turn, text_end = made.token_to_id("<|turn|>"), made.token_to_id("<|endoftext|>")
    cases = [
        # tokenizer_config.json, special_tokens_map.json -> bos, eos, pad
        ({"bos_token": "<|turn|>", "eos_token": {"content": "<|endoftext|>"}}, None, (turn, text_end, 0)),
        (None, {"bos_token": "<|turn|>", "eos_token": "<|endoftext|>"}, (turn, text_end, 0)),
        ({"bos_token": "<s>"}, {"bos_token": "<|turn|>"}, (1, 2, 0)),
        ({"bos_token": None, "eos_token": "<|turn|>", "unk_token": None}, None, (None, turn, turn)),
        ({"bos_token": "", "eos_token": ""}, None, (1, 2, 0)),
        ({"bos_token": None, "eos_token": None, "unk_token": None}, None, (None, None, 0)),
        (None, None, (1, 2, 0)),
    ]
    fingerprints = set()
    for i, (config, special_tokens_map, wanted) in enumerate(cases):
        found = open_tokenizer(write_json(tmp_path / str(i), made, config, special_tokens_map))
        assert (found.bos_id, found.eos_id, found.pad_id) == wanted and not found.adds_bos
        fingerprints.add(found.fingerprint)
    assert len(fingerprints) == 4  # cases 0 and 1; 2, 4 and 6; 3; 5
    with pytest.raises(ValueError, match=r"bos_token's id is None, eos_token's is \d+; wanted both"):
        Tokenizer.load(tmp_path / "3")
    (tmp_path / "3" / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    with pytest.raises(ValueError, match=r"eos_token is '<\|im_end\|>'; wanted a token of the vocabulary"):
        open_tokenizer(tmp_path / "3" / "tokenizer.json")
    # Nothing tells but what the file puts round a text.
    unnamed = open_tokenizer(write_json(tmp_path / "7", with_template(made, "<|turn|> $A <|endoftext|>")))
    assert (unnamed.bos_id, unnamed.eos_id, unnamed.adds_bos) == (turn, text_end, True)
    assert unnamed.encode("x").tolist() == open_tokenizer(tmp_path / "0").encode("x").tolist()  # nothing added


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory):
    """A tokenizer.json as those of Llama 2: pieces with U+2581, bytes for what has no piece."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"\u2581abcde"]
    tokenizers = pytest.importorskip("tokenizers")
    ids = {word: i for i, word in enumerate(words)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(ids, [], unk_token="<unk>", byte_fallback=True))
    forward, back = tokenizers.normalizers, tokenizers.decoders
    made.normalizer = forward.Sequence([forward.Prepend("\u2581"), forward.Replace(" ", "\u2581")])
    made.decoder = back.Sequence([back.Replace("\u2581", " "), back.ByteFallback(), back.Fuse(), back.Strip(" ", 1, 0)])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return open_tokenizer(write_json(tmp_path_factory.mktemp("bytes"), made))


@given(text=st.text(alphabet="ab d\n€é🙂日", max_size=40), cuts=st.lists(st.integers(1, 5), min_size=1, max_size=9))
def test_bytes_in_a_tokenizer_json_are_streamed_as_they_become_characters(byte_fallback, text, cuts):
    prompt, ids = byte_fallback.encode("ab"), byte_fallback.encode(text)
    assert byte_fallback.decode(ids) == text
    wanted = byte_fallback.decode([*prompt, *ids]).removeprefix("ab")
    stream, out, turn = TextStream(byte_fallback, prompt), "", 0
    while len(ids):
        size = cuts[turn % len(cuts)]
        out, ids, turn = out + stream.push(ids[:size]), ids[size:], turn + 1
        assert wanted.startswith(out)
    assert out + stream.finish() == wanted
    # Bytes that are no character are a sign each, or one for the beginning of a character, and change nothing before.
    broken = [int(i) for i in byte_fallback.encode("🙂")]
    assert byte_fallback.decode([*broken, *broken[1:4]]) == "🙂\ufffd"


def test_whether_a_tokenizer_json_expects_bos(tmp_path):
    made = byte_level(["<s>", "</s>"])
    for i, (template, told, wanted) in enumerate(
        [
            ("$A", None, False),
            ("$A </s>", None, False),
            ("<s> $A", None, True),
            ("<s> $A", False, False),
            ("$A", True, True),
        ]
    ):
        config = {} if told is None else {"add_bos_token": told}
        found = open_tokenizer(write_json(tmp_path / str(i), with_template(made, template), config))
        assert found.adds_bos is wanted and (found.bos_id, found.eos_id) == (0, 1)


def test_the_package_tokenizers_is_imported_when_needed(small_json, monkeypatch):
    code = "import sys, fot_jax.tokenizer; assert not {'tokenizers', 'jax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install 'tokenizers>=0.21,<1'"):
        open_tokenizer(small_json)


# ---- GGUF


def gguf_of(path, **more):
    """The fields that a conversion of a SentencePiece model to GGUF writes."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ids = range(model.vocab_size())
    kinds = ((model.is_unknown, 2), (model.is_control, 3), (model.is_unused, 5), (model.is_byte, 6))
    fields = {
        "model": "llama",
        "tokens": [model.id_to_piece(i) for i in ids],
        "scores": [model.get_score(i) for i in ids],
        "token_type": [next((number for test, number in kinds if test(i)), 1) for i in ids],
        "bos_token_id": model.bos_id(),
        "eos_token_id": model.eos_id(),
        "unknown_token_id": model.unk_id(),
        **more,
    }
    return {"general.architecture": "llama", **{f"tokenizer.ggml.{key}": value for key, value in fields.items()}}


def gguf_of_bpe(made, pre: str, special: list[str], user_defined: tuple[str, ...] = (), **more):
    """The fields that a conversion of a byte-level tokenizer.json to GGUF writes."""
    model = json.loads(made.to_str())["model"]
    tokens = [made.id_to_token(i) for i in range(made.get_vocab_size())]
    fields = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "merges": [" ".join(pair) for pair in model["merges"]],
        "token_type": [3 if token in special else 4 if token in user_defined else 1 for token in tokens],
        **more,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items()}


@pytest.fixture(scope="module")
def small_rebuilt(small_model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("gguf")
    assert write_from_gguf(directory, gguf_of(small_model)) == ["tokenizer.model", "tokenizer_config.json"]
    return open_tokenizer(directory)


@given(ANY_TEXT)
@example("".join(GOLDEN))
@example(TEXTS[0])
def test_sentencepiece_model_out_of_gguf(small_rebuilt, small_model, text):
    original = open_tokenizer(small_model)
    for name in ("vocab_size", "bos_id", "eos_id", "pad_id", "adds_bos"):
        assert getattr(small_rebuilt, name) == getattr(original, name), name
    assert small_rebuilt.encode(text).tolist() == original.encode(text).tolist()
    assert small_rebuilt.decode(original.encode(text)) == text


@versions
def test_open_llama_out_of_gguf(version, tmp_path):
    original = open_llama(version)
    path = OPEN_LLAMA / f"open_llama_v{version}.model"
    write_from_gguf(tmp_path, gguf_of(path, remove_extra_whitespaces=version == 1))
    rebuilt = open_tokenizer(tmp_path)

    @settings(max_examples=200)
    @given(ANY_TEXT)
    @example("\u2581 \u2581")
    @example("".join(TEXTS))
    def same(text):
        assert rebuilt.encode(text).tolist() == original.encode(text).tolist()

    same()
    for text in GOLDEN:
        assert rebuilt.encode(text).tolist() == original.encode(text).tolist()
        assert rebuilt.decode(original.encode(text)) == original.decode(original.encode(text))


def test_sentencepiece_options_in_gguf(small_model, tmp_path):
    fields = gguf_of(small_model, add_space_prefix=False, add_bos_token=False, remove_extra_whitespaces=True)
    write_from_gguf(tmp_path, fields)
    made = open_tokenizer(tmp_path)
    assert not made.adds_bos
    assert made.decode(made.encode("  two  spaces ")) == "two spaces"
    assert made.encode("return").tolist() == [i for i in made.encode("\nreturn") if i != made.encode("\n")[0]]
    # Tokens added after training: one to close a turn with, as EOS, and one to fill places with.
    for key, values in {"tokens": ["<|end|>", "<fill>"], "scores": [-1000.0, -1000.0], "token_type": [4, 4]}.items():
        fields[f"tokenizer.ggml.{key}"] += values
    fields |= {"tokenizer.ggml.eos_token_id": 500, "tokenizer.ggml.padding_token_id": 501}
    fields["tokenizer.ggml.token_type"][0] = 3  # some conversions call the unknown token so
    write_from_gguf(tmp_path, fields)
    made = open_tokenizer(tmp_path)
    assert (made.vocab_size, made.bos_id, made.eos_id, made.pad_id) == (502, 1, 500, 501)
    assert made.decode([1, *made.encode("x"), 500, 501, 0]) == "x"


@pytest.fixture(scope="module")
def small_bpe():
    return byte_level(["<|begin|>", "<|end|>", "<|user|>"])


@given(ANY_TEXT)
@example("it's  12345 <|begin|>done<|end|>\n\n <|user|> ")
def test_byte_level_bpe_out_of_gguf(small_bpe, tmp_path_factory, text):
    directory = tmp_path_factory.getbasetemp() / "bpe"
    if not directory.exists():
        fields = gguf_of_bpe(
            small_bpe, "gpt-2", ["<|begin|>", "<|end|>"], ("<|user|>",), bos_token_id=0, eos_token_id=1
        )
        assert write_from_gguf(directory, fields) == ["tokenizer.json", "tokenizer_config.json"]
    made = open_tokenizer(directory)
    assert (made.vocab_size, made.bos_id, made.eos_id, made.pad_id, made.adds_bos) == (400, 0, 1, 1, False)
    assert made.encode(text).tolist() == small_bpe.encode(text).ids
    # Control tokens give no text, the user's do.
    assert made.decode(made.encode(text)) == text.replace("<|begin|>", "").replace("<|end|>", "")


@pytest.mark.parametrize(
    "pre, wanted",
    [
        ("gpt-2", ["It", "'s", " ", " 12345", "\n\n", " I", "'", "LL", " don", "'t", "...", "\n"]),
        ("smollm", ["It", "'s", "  ", *"12345", "\n\n", " I", "'", "LL", " don", "'t", "...", "\n"]),
        ("llama-bpe", ["It", "'s", " ", " ", "123", "45", "\n\n", " I", "'LL", " don", "'t", "...\n"]),
    ],
)
def test_words_before_merging(small_bpe, tmp_path, pre, wanted):
    tokenizers = pytest.importorskip("tokenizers")
    write_from_gguf(tmp_path, gguf_of_bpe(small_bpe, pre, [], bos_token_id=0, eos_token_id=1))
    cut = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).pre_tokenizer
    words = cut.pre_tokenize_str("It's  12345\n\n I'LL don't...\n")
    assert [word.replace("Ġ", " ").replace("Ċ", "\n") for word, _ in words] == wanted
    assert open_tokenizer(tmp_path).adds_bos is (pre == "llama-bpe")


def test_llama_3s_whole_words_need_no_merges(small_bpe, tmp_path):
    fields = gguf_of_bpe(small_bpe, "llama-bpe", [], merges=[], bos_token_id=0, eos_token_id=1)
    word = max((token for token in fields["tokenizer.ggml.tokens"] if token.isascii() and token.isalpha()), key=len)
    for pre, wanted in (("llama-bpe", 1), ("gpt-2", len(word))):
        write_from_gguf(tmp_path, {**fields, "tokenizer.ggml.pre": pre})
        assert len(word) > 1 and len(open_tokenizer(tmp_path).encode(word)) == wanted


def test_bos_in_a_tokenizer_json_out_of_gguf(small_bpe, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    fields = gguf_of_bpe(small_bpe, "smollm", ["<|begin|>"], bos_token_id=0, eos_token_id=1, add_bos_token=True)
    write_from_gguf(tmp_path, fields)
    (tmp_path / "tokenizer_config.json").unlink()  # the file itself says it too
    assert open_tokenizer(tmp_path).adds_bos and open_tokenizer(tmp_path).bos_id == 0
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("x").ids[0] == 0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": "bert"}, r"tokenizer.ggml.model is 'bert'; wanted 'llama' or 'gpt2'"),
        ({"model": None}, r"no tokenizer.ggml.model"),
        ({"tokens": None}, r"no tokenizer.ggml.tokens"),
        ({"scores": None}, r"no tokenizer.ggml.scores"),
        ({"scores": [0.0]}, r"scores has 1 values; wanted 500"),
        ({"scores": [-1000.0] * 500}, r"scores are -1000.0 throughout; wanted the order of the merges"),
        ({"token_type": [1]}, r"token_type has 1 values; wanted 500"),
        ({"token_type": [7] * 500}, r"token_type has 7; wanted numbers from 1 to 6"),
        ({"bos_token_id": None}, r"no tokenizer.ggml.bos_token_id"),
        ({"eos_token_id": 500}, r"eos_token_id is 500; wanted one of 500 tokens"),
        ({"tokens": ["x"] * 500}, r"tokens, of 500: not a SentencePiece model"),
    ],
)
def test_sentencepiece_models_that_gguf_cannot_give(small_model, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        write_from_gguf(tmp_path, gguf_of(small_model, **changes))
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"pre": None}, r"no tokenizer.ggml.pre"),
        ({"pre": "tekken"}, r"tokenizer.ggml.pre is 'tekken'; wanted one of 'gpt-2', 'smollm', 'llama-bpe'"),
        ({"merges": None}, r"no tokenizer.ggml.merges"),
        ({"merges": ["a b c"]}, r"merges has 'a b c'; wanted two tokens that make a third"),
        ({"merges": ["a ż"]}, r"merges has 'a ż'; wanted two tokens"),
        ({"tokens": ["x"] * 400}, r"tokens has 'x' twice"),
    ],
)
def test_byte_level_bpe_that_gguf_cannot_give(small_bpe, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        write_from_gguf(tmp_path, gguf_of_bpe(small_bpe, **{"pre": "gpt-2", "special": [], **changes}))
    assert not os.listdir(tmp_path)
