"""Tokenizers rebuilt from GGUF metadata: the cut before the merges, special tokens, round trips."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from rbee_worker.errors import ModelMalformed, ModelUnsupported
from rbee_worker.runtime.formats.gguf.header import special_token
from rbee_worker.runtime.formats.gguf.model import read_gguf
from rbee_worker.runtime.tokenizer.gguf import adds_bos, build_tokenizer, read_tokenizer
from rbee_worker.runtime.tokenizer.pre_tokenizers import PRE_TOKENIZERS

HARD = [
    "",
    " ",
    "Hello, world!",
    "  two  spaces   three \t tab\n\n newline \r\n",
    "été naïve Ångström e\u0301",
    "你好，世界。日本語とカタカナ 한국어",  # noqa: RUF001 (the comma is the point)
    "🎉👩‍👩‍👧‍👦🇳🇱 emoji",
    "def f(x):\n    return x ** 2  # ok\n\n\n",
    "1234567 3.14 v2.0 ½ ٣٤",
    "don't I'LL we've 'tis",
    "\u200b\ufeff\0\x7f",
    "العربية עברית हिन्दी",
]

PIECES: dict[str, list[tuple[str, list[str]]]] = {
    # Sequence[Digits(individual), ByteLevel]: each digit alone, the blank before a number too
    "smollm": [
        ("it's 1234 a-b", ["it", "'s", " ", "1", "2", "3", "4", " a", "-", "b"]),
        ("a  b\n\nc", ["a", " ", " b", "\n", "\n", "c"]),
        ("IT'S", ["IT", "'", "S"]),
    ],
    # GPT-2: numbers whole, with the blank before them
    "gpt-2": [
        ("it's 1234 a-b", ["it", "'s", " 1234", " a", "-", "b"]),
        ("a  b\n\nc", ["a", " ", " b", "\n", "\n", "c"]),
    ],
    # Llama 3: up to three digits, contractions in any case, line ends kept with what precedes them
    "llama-bpe": [
        ("it's 1234 a-b", ["it", "'s", " ", "123", "4", " a", "-b"]),
        ("a  b\n\nc", ["a", " ", " b", "\n\n", "c"]),
        ("IT'S", ["IT", "'S"]),
        ("x;\n y", ["x", ";\n", " y"]),
    ],
    "dbrx": [("it's 1234 a-b", ["it", "'s", " ", "123", "4", " a", "-b"])],
    # Mistral: single digits, words cut where small letters are followed by capitals, no contractions
    "tekken": [
        ("it's 1234 camelCase", ["it", "'s", " ", "1", "2", "3", "4", " camel", "Case"]),
        ("a  b\n\nc ://x", ["a", " ", " b", "\n\n", "c", " ://", "x"]),
    ],
    # Qwen 2: the same with single digits
    "qwen2": [
        ("it's 1234 a-b", ["it", "'s", " ", "1", "2", "3", "4", " a", "-b"]),
        ("a  b\n\nc", ["a", " ", " b", "\n\n", "c"]),
    ],
}


def fields(files: SimpleNamespace, **metadata: Any) -> dict[str, Any]:
    vocabulary: dict[str, Any] = files.bpe_vocabulary()
    return vocabulary | {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}


@pytest.mark.parametrize(("pre", "text", "pieces"), [(pre, *case) for pre, cases in PIECES.items() for case in cases])
def test_text_is_cut_as_the_family_does(files: SimpleNamespace, pre: str, text: str, pieces: list[str]) -> None:
    tokenizer = build_tokenizer(fields(files, pre=pre, add_bos_token=False))
    cut = [text[begin:end] for _, (begin, end) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    assert cut == pieces


@pytest.mark.parametrize(
    ("same", "family"),
    [
        ("llama3", "llama-bpe"),
        ("llama-v3", "llama-bpe"),
        ("deepseek-r1-qwen", "qwen2"),
        ("smaug-bpe", "dbrx"),
        ("default", "gpt-2"),
    ],
)
def test_names_for_one_family(same: str, family: str) -> None:
    assert PRE_TOKENIZERS[same] is PRE_TOKENIZERS[family]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
@pytest.mark.parametrize("text", HARD)
def test_round_trip(files: SimpleNamespace, pre: str, text: str) -> None:
    tokenizer = build_tokenizer(fields(files, pre=pre, add_bos_token=False))
    text = text if pre not in ("qwen2", "deepseek-r1-qwen") else text.replace("e\u0301", "é")
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_qwen_text_is_normalised(files: SimpleNamespace) -> None:
    tokenizer = build_tokenizer(fields(files, pre="qwen2"))
    assert tokenizer.decode(tokenizer.encode("e\u0301").ids) == "é"


@given(text=st.text(max_size=60))
def test_any_text_round_trips_through_the_real_vocabulary(
    real_tokenizer: Tokenizer, files: SimpleNamespace, text: str
) -> None:
    # The published vocabulary lacks some bytes that its training text had none of, such as 0xF1: what they make up
    # is lost by design.
    lacking = {byte for byte, char in files.byte_characters().items() if real_tokenizer.token_to_id(char) is None}
    assert len(lacking) < 30
    text = "".join(char for char in text if not lacking & set(char.encode()))
    assert real_tokenizer.decode(real_tokenizer.encode(text).ids, skip_special_tokens=False) == text


@pytest.fixture(scope="session")
def real_tokenizer(real_gguf: Path) -> Tokenizer:
    return read_tokenizer(read_gguf(real_gguf))


@pytest.mark.parametrize("text", HARD)
def test_real_round_trip(real_tokenizer: Tokenizer, text: str) -> None:
    assert real_tokenizer.decode(real_tokenizer.encode(text).ids) == text


def test_real_ids(real_tokenizer: Tokenizer) -> None:
    assert real_tokenizer.get_vocab_size() == 49152
    # Whole words of the vocabulary, the blank belonging to the second.
    assert real_tokenizer.encode("Hello, world!").ids == [19556, 28, 905, 17]
    turn = real_tokenizer.encode("<|im_start|>user\n1 2<|im_end|>\n")
    assert turn.tokens == ["<|im_start|>", "user", "Ċ", "1", "Ġ", "2", "<|im_end|>", "Ċ"]
    assert turn.ids[0] == 1
    assert turn.ids[-2] == 2
    assert real_tokenizer.decode(turn.ids) == "user\n1 2\n"


def test_merges_apply_in_order(files: SimpleNamespace) -> None:
    merges = [("l", "l"), ("h", "e"), ("he", "ll"), ("hell", "o"), ("Ġ", "w")]
    tokenizer = build_tokenizer(files.bpe_vocabulary(merges))
    assert tokenizer.encode("hello wow shell").tokens == ["hello", "Ġw", "o", "w", "Ġ", "s", "hell"]


def test_llama3_takes_a_whole_piece_whatever_the_merges_say(files: SimpleNamespace) -> None:
    # "wow" is a token, but (w, o) is merged first and nothing joins "wo" and "w".
    metadata = files.bpe_vocabulary([("o", "w"), ("w", "ow"), ("w", "o")])
    metadata["tokenizer.ggml.merges"] = ["w o", "o w", "w ow"]
    assert build_tokenizer(metadata).encode("wow").tokens == ["wo", "w"]
    llama = build_tokenizer(metadata | {"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False})
    assert llama.encode("wow").tokens == ["wow"]
    assert llama.encode("wows").tokens == ["wo", "w", "s"]


def test_token_types(files: SimpleNamespace) -> None:
    metadata = files.bpe_vocabulary(extra={"<|ctl|>": 3, "<tool>": 4, "[PAD9]": 5})
    tokenizer = build_tokenizer(metadata)
    ids = tokenizer.encode("a<|ctl|><tool>").ids
    assert [tokenizer.id_to_token(i) for i in ids] == ["a", "<|ctl|>", "<tool>"]
    assert tokenizer.decode(ids) == "a<tool>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a<|ctl|><tool>"
    added = {token.content: token.special for token in tokenizer.get_added_tokens_decoder().values()}
    assert added == {"<|ctl|>": True, "<tool>": False}
    assert "[PAD9]" not in tokenizer.encode("[PAD9]").tokens


def test_without_types_every_token_is_plain(files: SimpleNamespace) -> None:
    metadata = files.bpe_vocabulary()
    del metadata["tokenizer.ggml.token_type"]
    assert build_tokenizer(metadata).get_added_tokens_decoder() == {}


@pytest.mark.parametrize(
    ("metadata", "tokens"),
    [
        ({}, ["a"]),
        ({"add_bos_token": True}, ["<|im_start|>", "a"]),
        ({"add_bos_token": True, "add_eos_token": True}, ["<|im_start|>", "a", "<|im_end|>"]),
        ({"pre": "llama-bpe"}, ["<|im_start|>", "a"]),
        ({"pre": "llama-bpe", "add_bos_token": False}, ["a"]),
    ],
)
def test_beginning_and_end_tokens(files: SimpleNamespace, metadata: dict[str, Any], tokens: list[str]) -> None:
    given_fields = fields(files, bos_token_id=258, eos_token_id=259, **metadata)
    tokenizer = build_tokenizer(given_fields)
    assert tokenizer.encode("a").tokens == tokens
    assert tokenizer.encode("a", add_special_tokens=False).tokens == ["a"]
    assert adds_bos(given_fields) is ("<|im_start|>" in tokens)


def test_survives_being_saved(files: SimpleNamespace) -> None:
    tokenizer = build_tokenizer(fields(files, pre="llama-bpe", bos_token_id=258))
    again = Tokenizer.from_str(tokenizer.to_str())
    for text in [*HARD, "<|im_start|>he<|im_end|>"]:
        assert again.encode(text).ids == tokenizer.encode(text).ids


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"model": "t5"}, "tokenizer.ggml.model is 't5'; supported: 'gpt2' (byte-level BPE), 'llama' (SentencePiece)."),
        ({"model": None}, "tokenizer.ggml.model is missing; supported: 'gpt2'"),
        ({"pre": "viking"}, "tokenizer.ggml.pre is 'viking'; supported: smollm, llama-bpe,"),
        ({"pre": None}, "tokenizer.ggml.pre is missing; supported: smollm,"),
        ({"pre": ["smollm"]}, "tokenizer.ggml.pre is ['smollm']; supported: smollm,"),
    ],
)
def test_names_what_is_not_supported(files: SimpleNamespace, metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelUnsupported) as caught:
        build_tokenizer(fields(files, **metadata), file="x.gguf")
    assert caught.value.message.startswith(f"x.gguf: {message}")
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"tokens": None}, "tokenizer.ggml.tokens is missing or not a list of strings."),
        ({"tokens": [1, 2]}, "tokenizer.ggml.tokens is missing or not a list of strings."),
        ({"tokens": ["a", "b", "a"]}, "tokenizer.ggml.tokens holds 'a' twice (again at 2)."),
        ({"merges": None}, "tokenizer.ggml.merges is missing or not a list of strings."),
        ({"merges": ["h e", "h x"]}, "tokenizer.ggml.merges[1] is 'h x', which does not join two tokens into a third."),
        ({"merges": ["he"]}, "tokenizer.ggml.merges[0] is 'he', which does not join"),
        ({"token_type": [1, 3]}, "tokenizer.ggml.token_type has 2 entries for 260 tokens."),
        ({"token_type": 1}, "tokenizer.ggml.token_type has no entries for 260 tokens."),
        ({"add_bos_token": True}, "tokenizer.ggml.add_bos_token is set, but there is no tokenizer.ggml.bos_token_id"),
        ({"add_bos_token": True, "bos_token_id": 260}, "tokenizer.ggml.bos_token_id is 260; the vocabulary"),
        ({"add_eos_token": True, "eos_token_id": -1}, "tokenizer.ggml.eos_token_id is -1; the vocabulary"),
    ],
)
def test_refuses_an_inconsistent_vocabulary(files: SimpleNamespace, metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelMalformed) as caught:
        build_tokenizer(fields(files, **metadata), file="x.gguf")
    assert caught.value.message.startswith(f"x.gguf: {message}")
    assert caught.value.exit_code == 3


SENTENCEPIECE: dict[str, Any] = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "\N{LOWER ONE EIGHTH BLOCK}", "a"],
    "tokenizer.ggml.token_type": [2, 1, 1],
    "tokenizer.ggml.scores": [0.0, -1.0, -2.0],
    "tokenizer.ggml.add_bos_token": False,
}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"scores": None}, "tokenizer.ggml.scores is not a score for each token."),
        ({"scores": [0.0, 1.0]}, "tokenizer.ggml.scores is not a score for each token."),
        ({"scores": [0.0, 1.0, "2"]}, "tokenizer.ggml.scores is not a score for each token."),
        ({"token_type": [2, 1, 9]}, "tokenizer.ggml.token_type: 9 is not a valid PieceType."),
        ({"token_type": [1, 1, 1]}, "tokenizer.ggml.unknown_token_id is -1, which is no token."),
        ({"unknown_token_id": 3}, "tokenizer.ggml.unknown_token_id is 3, which is no token."),
        ({"unknown_token_id": "0"}, "tokenizer.ggml.unknown_token_id is '0', which is no token."),
    ],
)
def test_refuses_an_inconsistent_sentencepiece_vocabulary(metadata: dict[str, Any], message: str) -> None:
    assert build_tokenizer(SENTENCEPIECE, file="x.gguf").encode("a?").ids == [1, 2, 0]
    with pytest.raises(ModelMalformed) as caught:
        build_tokenizer(
            SENTENCEPIECE | {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}, file="x.gguf"
        )
    assert caught.value.message.startswith(f"x.gguf: {message}")


def test_special_token(files: SimpleNamespace) -> None:
    assert special_token(fields(files, eos_token_id=259), "eos", file="x.gguf") == (259, "<|im_end|>")
    assert special_token(fields(files), "eos", file="x.gguf") is None
