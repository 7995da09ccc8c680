from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from rbee_worker.errors import InvalidRequest, ModelMalformed
from rbee_worker.runtime.tokenizer.chat_template import ChatTemplate
from rbee_worker.runtime.tokenizer.tokenizer import StreamingDetokenizer, Tokenizer
from tests.tiny import byte_tokenizer

BYTES = Tokenizer(byte_tokenizer(), eos_ids=frozenset())


class Files:
    """A model's files in memory."""

    def __init__(self, config: Any = None, generation: Any = None, tokenizer: Any = None, template: str | None = None):
        self._config, self._generation, self._tokenizer = config or {}, generation or {}, tokenizer or {}
        self._template = template

    @property
    def tokenizer(self) -> tokenizers.Tokenizer:
        backend = byte_tokenizer()
        backend.add_special_tokens(["</s>"])
        backend.enable_truncation(2)
        return backend

    @property
    def tokenizer_config(self) -> dict[str, Any]:
        return self._tokenizer

    @property
    def config(self) -> dict[str, Any]:
        return self._config

    @property
    def generation_config(self) -> dict[str, Any]:
        return self._generation

    @property
    def chat_templates(self) -> dict[str, str]:
        return {} if self._template is None else {"default": self._template}


@given(st.text(max_size=60))
def test_streaming_agrees_with_one_shot_decoding_on_any_text(text: str) -> None:
    ids = BYTES.encode(text)
    detokenizer = StreamingDetokenizer(BYTES)
    pieces = [detokenizer.push(token) for token in ids]
    # A character of several bytes comes out whole, at its last byte.
    assert "".join(pieces) + detokenizer.flush() == text
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert "".join(pieces) == text
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@given(st.lists(st.integers(0, 255), max_size=40))
def test_streaming_agrees_with_one_shot_decoding_on_any_bytes(ids: list[int]) -> None:
    detokenizer = StreamingDetokenizer(BYTES)
    text = "".join(detokenizer.push(token) for token in ids) + detokenizer.flush()
    assert text == BYTES.decode(ids)


def test_a_leading_space_behind_a_prompt_is_kept() -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"▁is": 0, "▁Paris": 1, "!": 2}, unk_token="!"))  # noqa: S106
    backend.decoder = tokenizers.decoders.Metaspace()
    detokenizer = StreamingDetokenizer(Tokenizer(backend, eos_ids=frozenset()), prompt=[0])
    assert [detokenizer.push(1), detokenizer.push(2)] == [" Paris", "!"]


def test_all_end_of_sequence_ids_count() -> None:
    assert Tokenizer.from_files(Files({"eos_token_id": 3}, {"eos_token_id": [5, 7]})).eos_ids == {3, 5, 7}
    assert Tokenizer.from_files(Files(tokenizer={"eos_token": {"content": "</s>"}})).eos_ids == {256}
    with pytest.raises(ModelMalformed, match=r"config\.json: eos_token_id is 'x'"):
        Tokenizer.from_files(Files({"eos_token_id": "x"}))


def test_truncation_that_the_file_asks_for_is_undone() -> None:
    assert len(Tokenizer.from_files(Files()).encode("abcdef")) == 6


def test_templates_see_the_special_tokens_and_jinja_extras() -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}\n    {%- if m.role == 'skip' %}{% continue %}{% endif %}\n"
        "{{ m.content | tojson }}{% generation %}!{% endgeneration %}{% endfor %}{{ strftime_now('%Y') }}"
    )
    files = Files(tokenizer={"bos_token": "<s>"}, template=template)
    rendered = Tokenizer.from_files(files).render_chat(
        [{"role": "user", "content": "<é>"}, {"role": "skip", "content": "x"}]
    )
    assert rendered[:-4] == '<s>"<é>"!'
    assert rendered[-4:].isdecimal()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('no system role') }}", "refuses these messages: no system role"),
        ("{{ raise_exception('not ' ~ messages[0].content) }}", r"refuses these messages\.$"),
        ("{% set a = 'x' * 10**9 %}", "fails on these messages: SecurityError"),
        ("{{ 2 ** 100000000 }}", "fails on these messages: SecurityError"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "fails on these messages: SecurityError"),
        ("{{ messages.append(1) }}", "fails on these messages: SecurityError"),
        ("{{ 1 / 0 }}", "fails on these messages: ZeroDivisionError"),
        ("{% for i in range(10**9) %}{% endfor %}", "fails on these messages: OverflowError"),
    ],
)
def test_a_template_that_refuses_or_misbehaves_is_the_requests_error(source: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        ChatTemplate(source, {}).render([{"role": "user", "content": "secret"}])


def test_a_template_sees_what_transformers_gives_it() -> None:
    source = "{{ messages[0].thinking }}{{ messages[0].reasoning_content }}{{ tools }}{{ add_generation_prompt }}"
    message = {"role": "assistant", "content": "", "reasoning_content": "hm"}
    template = ChatTemplate(source, {}, named={"rag": "R", "other": "{% broken"})
    assert template.render([message], messages=[]) == "hmhmNoneTrue"  # type: ignore[list-item]
    assert template.render([message], documents=[], add_generation_prompt=False) == "R"  # type: ignore[list-item]
    with pytest.raises(ModelMalformed, match="cannot be compiled"):
        ChatTemplate("", {}, named={"tool_use": "{% broken"})


def test_a_template_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rbee_worker.runtime.tokenizer.chat_template._SECONDS", 0.1)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(InvalidRequest, match="fails on these messages: TimeoutError"):
        ChatTemplate(endless, {}).render([{"role": "user", "content": "x"}])


def test_a_template_that_is_none_is_malformed() -> None:
    with pytest.raises(ModelMalformed, match="cannot be compiled"):
        ChatTemplate("{% for %}", {})


def test_messages_without_a_template_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="no chat template"):
        BYTES.render_chat([{"role": "user", "content": "Hi"}])
