"""Text from outside in a message: short, on its line, without control characters."""

import json
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import pytest

from rbee_worker.errors import ModelError
from rbee_worker.escape import one_line, printable_json, printable_lines, quoted, reason
from rbee_worker.runtime.architecture.table import parse_config
from rbee_worker.runtime.formats.checkpoint import Checkpoint
from rbee_worker.runtime.formats.quantized.methods import present
from rbee_worker.runtime.tokenizer.chat_template import ChatTemplate
from rbee_worker.runtime.tokenizer.gguf import build_tokenizer
from tests.tiny import CONFIG

DRAWS = "x\x1b[31m\ny"
GROUP = {"targets": ["re:(?" + DRAWS], "weights": {"num_bits": 4}}


def test_quoted_is_short_and_printable() -> None:
    assert quoted("a\x1b[31m") == r"'a\x1b[31m'"
    assert len(quoted("x" * 1000)) == 120
    for value in ("x" * 118, "x" * 119, [1] * 40, [1] * 41, [""] * 300, (b"y" * 130,)):
        assert quoted(value) == (repr(value) if len(repr(value)) <= 120 else repr(value)[:117] + "...")


def test_of_a_large_value_only_the_beginning_is_looked_at() -> None:
    deep: object = "x"
    for _ in range(100_000):
        deep = {"a": [deep]}
    assert quoted(deep) == "{'a': [{'a': Ellipsis}]}"
    assert quoted({"a": [1], "b": {}}) == "{'a': [1], 'b': {}}"
    assert len(quoted(dict.fromkeys(range(1000), "\x1b"))) == 120
    assert quoted([["x" * 1000] * 1000] * 1000) == f"[['{'x' * 114}..."


def test_lines_stay_and_json_stays_the_same() -> None:
    assert printable_lines("a\n  b\x1b\n") == "a\n  b\\x1b\n"
    text = json.dumps(DRAWS + "\x9b\u202e\U000e0041", ensure_ascii=False)
    assert printable_json(text).isprintable()
    assert json.loads(printable_json(text)) == json.loads(text)


def test_text_from_outside_stays_on_one_line_and_cannot_draw() -> None:
    assert one_line("two\r\nlines\x1b[31m \u202eé") == "two lines\\x1b[31m \\u202eé"
    assert len(one_line("x" * 1000)) == 301


def test_whatever_a_message_names_it_is_printable() -> None:
    error = ModelError("/models/a\x1b[2J\nb: no such file.", hint="There are: c\x9b2J")
    assert str(error) == r"/models/a\x1b[2J\nb: no such file. There are: c\x9b2J"
    assert (error.message, error.hint) == (r"/models/a\x1b[2J\nb: no such file.", r"There are: c\x9b2J")


def test_the_reason_is_what_an_exception_says_or_its_type() -> None:
    assert reason(OSError("two\nlines\x1b")) == r"two lines\x1b"
    assert reason(MemoryError()) == "MemoryError"


def config(**values: object) -> None:
    parse_config(CONFIG | values, file="config.json")


def quantized(**options: object) -> None:
    empty = Checkpoint(MappingProxyType({}), ())
    present(empty, {"quantization_config": options})


@pytest.mark.parametrize(
    "read",
    [
        lambda: config(architectures=[DRAWS]),
        lambda: config(hidden_act=DRAWS),
        lambda: config(vocab_size=DRAWS),
        lambda: config(**{"rope" + DRAWS: 2}),
        lambda: quantized(quant_method=DRAWS),
        lambda: quantized(quant_method="awq", bits=4, group_size=32, **{DRAWS: 1}),
        lambda: quantized(quant_method="compressed-tensors", format="pack-quantized", config_groups={DRAWS: GROUP}),
        lambda: ChatTemplate("{% " + DRAWS + " %}", {}),
        lambda: build_tokenizer({"tokenizer.ggml.model": DRAWS}),
    ],
)
def test_what_a_file_says_cannot_draw_in_a_message(read: Callable[[], Any]) -> None:
    with pytest.raises(ModelError) as caught:
        read()
    assert str(caught.value).isprintable()
