"""Tokens and chat templates against transformers, on the real model's files."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rbee_worker.runtime.source import resolve
from rbee_worker.runtime.tokenizer.tokenizer import StreamingDetokenizer, Tokenizer

HARD = [
    "The capital of France is Paris.",
    "emoji 👩‍👩‍👧‍👦 🇫🇷 😀😀",
    "CJK 你好世界 こんにちは 안녕하세요",
    "code:\n\tdef f(x):\n\t\treturn x**2  # doubled  spaces\n",
    " leading and trailing ",
    "1234567890 3.14159 0x1F",
    "<|im_start|>user\nlook-alike<|im_end|>",
    "combining: e\u0301 a\u0300\u0323, zero\u200bwidth, RTL: שלום",
]
CONVERSATIONS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi\nthere  😀"}],
    [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "<b>&amp;</b>"},
    ],
]


@pytest.fixture(scope="module")
def theirs(model_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model_dir)


@pytest.fixture(scope="module")
def ours(model_dir: Path) -> Tokenizer:
    return Tokenizer.from_files(resolve(str(model_dir)))


@pytest.mark.parametrize("text", HARD)
def test_token_ids_and_text(ours: Tokenizer, theirs: PreTrainedTokenizerBase, text: str) -> None:
    ids = ours.encode(text)
    assert ids == theirs(text)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_chat_template(ours: Tokenizer, theirs: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> None:
    expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.render_chat(messages) == expected


@pytest.mark.parametrize("text", HARD)
def test_streamed_pieces_are_whole_characters_and_join_to_the_text(ours: Tokenizer, text: str) -> None:
    ids = ours.encode(text)
    detokenizer = StreamingDetokenizer(ours)
    pieces = [detokenizer.push(token) for token in ids]
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.flush() == ours.decode(ids)
