"""Rank files, tekken.json and vocab.json with merges.txt: read whole or refused, and never cut by a guess."""

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbee_worker.errors import ModelMalformed, ModelUnsupported
from rbee_worker.runtime.tokenizer.byte_level import CHAR_OF
from rbee_worker.runtime.tokenizer.pre_tokenizers import PRE_TOKENIZERS
from rbee_worker.runtime.tokenizer.ranks import (
    MERGES_FAMILIES,
    RANK_FAMILIES,
    build_from_merges,
    build_from_ranks,
    build_tekken,
    family_of,
    read_ranks,
)

TOKENS = [*(bytes([byte]) for byte in range(256)), b"he", b"ll", b"hell", b"hello", b" w"]


def lines(tokens: list[bytes]) -> bytes:
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


def test_ranks_are_ids_and_order_the_merges() -> None:
    ranks = read_ranks(lines(TOKENS) + b"\n", file="x")
    assert list(ranks) == TOKENS
    tokenizer = build_from_ranks(ranks, PRE_TOKENIZERS["llama-bpe"])
    assert tokenizer.encode("hello shell w").ids == [259, 32, ord("s"), 258, 260]
    assert tokenizer.decode([259, 0xC3, 0xA9]) == "helloé"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"YQ==\n", "line 1 is not a new token"),
        (b"YQ== 0\nYQ== 1\n", "line 2 is not a new token"),
        (b"Y 0\n", "line 1 is not a new token"),
        (b"YQ== x\n", "line 1 is not a new token"),
        (b"YQ== 1\n", "the ranks of its 1 tokens are not 0 to 0"),
        (b"", "256 bytes have no token, 0x00 for one"),
        (lines(TOKENS[1:]), "1 bytes have no token, 0x00 for one"),
    ],
)
def test_what_is_no_rank_file_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ModelMalformed, match=f"^x: {message}"):
        read_ranks(data, file="x")


@given(st.binary(max_size=80), st.integers(0, 300))
def test_any_bytes_are_ranks_or_one_error(data: bytes, at: int) -> None:
    good = lines(TOKENS)
    try:
        ranks = read_ranks(good[:at] + data + good[at + len(data) :], file="x")
    except ModelMalformed:
        return
    assert len(ranks) >= 256


def test_a_family_that_is_not_known_is_refused() -> None:
    assert family_of({"model_type": "llama"}, RANK_FAMILIES, file="x") is PRE_TOKENIZERS["llama-bpe"]
    for config in ({"model_type": "kimi_k2"}, {"model_type": ["llama"]}, {}):
        with pytest.raises(ModelUnsupported, match=r"x: this file does not say how text is cut .* known: gpt2, qwen2"):
            family_of(config, MERGES_FAMILIES, file="x")


def merges_files(merges: str) -> tuple[bytes, bytes]:
    vocab = {char: i for i, char in enumerate(CHAR_OF.values())} | {"he": 256, "ll": 257, "hell": 258}
    return json.dumps(vocab).encode(), merges.encode()


def test_vocabulary_and_merges() -> None:
    tokenizer = build_from_merges(*merges_files("#version: 0.2\nl l\nh e\nhe ll\n"), PRE_TOKENIZERS["qwen2"])
    assert tokenizer.encode("hell").ids == [258]
    assert tokenizer.decode(tokenizer.encode("e\u0301 x").ids) == "é x"


@pytest.mark.parametrize(
    ("vocab", "merges", "message"),
    [
        (b"[]", b"", "vocab.json"),
        (b"{}", b"", "vocab.json does not map tokens to ids of their own"),
        (b'{"a": 0, "b": 0}', b"", "vocab.json does not map"),
        (b'{"a": true}', b"", "vocab.json does not map"),
        (b'{"a": 0}', b"\xff", "merges.txt is not UTF-8"),
        (b'{"a": 0}', b"#version\na b", r"merges.txt: line 2 is 'a b', which does not join"),
        (b'{"a": 0}', b"ab", r"merges.txt: line 1 is 'ab', which does not join"),
    ],
)
def test_damaged_vocabularies_and_merges_are_refused(vocab: bytes, merges: bytes, message: str) -> None:
    with pytest.raises(ModelMalformed, match=message):
        build_from_merges(vocab, merges, PRE_TOKENIZERS["qwen2"])


def tekken(**changes: Any) -> bytes:
    config = {"pattern": r"\s+|\S+", "default_vocab_size": 3 + len(TOKENS), "default_num_special_tokens": 3}
    vocab = [{"rank": i, "token_bytes": base64.b64encode(token).decode()} for i, token in enumerate(TOKENS)]
    special = [{"rank": 1, "token_str": "<s>"}]
    return json.dumps({"config": config, "vocab": vocab, "special_tokens": special} | changes).encode()


def test_tekken() -> None:
    tokenizer = build_tekken(tekken())
    assert tokenizer.encode("<s>hello").ids == [1, 3 + 259]
    assert tokenizer.id_to_token(2) == "<SPECIAL_2>"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {}}, "is not laid out as one: KeyError"),
        ({"vocab": 5}, "is not laid out as one: TypeError"),
        ({"vocab": [{"token_bytes": "?"}]}, "is not laid out as one: Error"),
        ({"vocab": []}, "256 bytes have no token"),
        ({"vocab": [{"token_bytes": "YQ=="}] * 2}, "a token is empty, far too long or there twice"),
        (
            {"config": {"pattern": "(", "default_vocab_size": 999, "default_num_special_tokens": 3}},
            "its pattern is refused",
        ),
    ],
)
def test_a_damaged_tekken_file_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelMalformed, match=f"tekken.json.*{message}"):
        build_tekken(tekken(**changes))
