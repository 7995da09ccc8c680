"""Which files a tokenizer is made of, and what the others put on top."""

import json
from pathlib import Path
from typing import Any

import pytest

from rbee_worker.errors import ModelMalformed, ModelNotFound, ModelUnsupported
from rbee_worker.runtime.source import resolve
from rbee_worker.runtime.tokenizer.files import find_tokenizer, load_tokenizer, read_templates
from tests.tiny import byte_tokenizer
from tests.unit.runtime.tokenizer.test_ranks import TOKENS, lines, tekken
from tests.unit.runtime.tokenizer.test_sentencepiece_model import LETTERS, spec

RANKS = lines(TOKENS)


def write(folder: Path, **files: Any) -> Path:
    for name, content in files.items():
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / name).write_bytes(data)
    return folder


def test_which_file_is_taken(tmp_path: Path) -> None:
    assert find_tokenizer(tmp_path) is None
    write(tmp_path, **{"vocab.json": {}})
    assert find_tokenizer(tmp_path) is None
    for name in ("merges.txt", "qwen.tiktoken", "tekken.json", "tokenizer.model", "tokenizer.json"):
        write(tmp_path, **{name: b""})
        found = find_tokenizer(tmp_path)
        assert found is not None
        assert found.name == name.replace("merges.txt", "vocab.json")


def test_tokenizer_json_is_taken_as_it_is(tmp_path: Path) -> None:
    text = byte_tokenizer().to_str(pretty=True)
    write(tmp_path, **{"tokenizer.json": text.encode()})
    config = {"add_bos_token": False, "eos_token": "not there", "added_tokens_decoder": {"7": {"content": "x"}}}
    assert load_tokenizer(tmp_path, {}, config).json == text


@pytest.mark.parametrize("name", ["tokenizer.model", "qwen.tiktoken", "tekken.json"])
def test_the_other_files(tmp_path: Path, name: str) -> None:
    data = {"tokenizer.model": LETTERS + spec(model_type=2), "qwen.tiktoken": RANKS, "tekken.json": tekken()}[name]
    write(tmp_path, **{name: data})
    loaded = load_tokenizer(tmp_path, {"model_type": "qwen"}, {})
    ids = loaded.backend.encode("ab").ids
    assert loaded.backend.decode(ids) == "ab"
    assert json.loads(loaded.json)["model"]["type"] == "BPE"
    # Those that are trained with a beginning token put it first, unless told otherwise.
    assert (ids[0] == 1) is (name != "qwen.tiktoken")
    assert load_tokenizer(tmp_path, {"model_type": "qwen"}, {"add_bos_token": False}).backend.encode("").ids == []


def test_ranks_in_tokenizer_model_are_cut_as_the_family_does(tmp_path: Path) -> None:
    write(tmp_path, **{"tokenizer.model": RANKS})
    assert load_tokenizer(tmp_path, {"model_type": "llama"}, {}).backend.encode("1234").ids == [*b"1234"]
    with pytest.raises(ModelUnsupported, match=r"tokenizer\.model: this file does not say how text is cut") as caught:
        load_tokenizer(tmp_path, {"model_type": "mystery"}, {})
    assert caught.value.exit_code == 4
    assert "tokenizer.json" in (caught.value.hint or "")


def test_no_files(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"tokenizer\.json: no such file"):
        load_tokenizer(tmp_path, {}, {})


def test_tokens_that_tokenizer_json_lacks(tmp_path: Path) -> None:
    write(tmp_path, **{"tokenizer.json": byte_tokenizer().to_str().encode(), "added_tokens.json": {"<old>": 256}})
    decoder = {
        "258": {"content": "<|end|>", "special": True, "rstrip": True},
        "5": {"content": "taken", "special": True},
        "259": {"content": "<tool>", "special": False},
    }
    loaded = load_tokenizer(tmp_path, {}, {"added_tokens_decoder": decoder, "eos_token": "!", "pad_token": "<pad>"})
    added = loaded.backend.get_added_tokens_decoder()
    assert {i: (t.content, t.special) for i, t in added.items() if i > 255} == {
        256: ("<old>", False),
        257: ("<|reserved_token_257|>", True),
        258: ("<|end|>", True),
        259: ("<tool>", False),
    }
    assert added[258].rstrip
    # A token that plays a role is special, be it in the vocabulary; one that has no id anywhere gets none.
    assert {token.content for token in added.values() if token.special} >= {"!"}
    assert loaded.backend.token_to_id("<pad>") is None
    assert loaded.backend.encode("a<|end|>  b").ids[1] == 258
    assert json.loads(loaded.json)["added_tokens"][-1]["content"] == "<tool>"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"added_tokens_decoder": {"x": {"content": "a"}}}, "added_tokens_decoder has the id 'x'"),
        ({"added_tokens_decoder": {"99999999": {"content": "a"}}}, "has the id '99999999'; it must be a number below"),
        ({"added_tokens_decoder": {"300": {}}}, "added_tokens_decoder has no token for id '300'"),
    ],
)
def test_damaged_lists_of_tokens_are_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    write(tmp_path, **{"tokenizer.json": byte_tokenizer().to_str().encode()})
    with pytest.raises(ModelMalformed, match=message):
        load_tokenizer(tmp_path, {}, config)


def test_a_listed_token_that_its_id_cannot_be_given_to_is_refused(tmp_path: Path) -> None:
    write(tmp_path, **{"tokenizer.json": byte_tokenizer().to_str().encode()})
    decoder = {"256": {"content": "<a>"}, "257": {"content": "A"}}  # the vocabulary has "A" already
    own = byte_tokenizer().token_to_id("A")
    with pytest.raises(ModelMalformed, match=rf": the token 'A' is listed with id 257, but gets {own}\."):
        load_tokenizer(tmp_path, {}, {"added_tokens_decoder": decoder})


@pytest.mark.parametrize("legacy", [None, True, False])
def test_the_space_before_a_text_is_as_the_file_says(tmp_path: Path, legacy: bool | None) -> None:
    write(tmp_path, **{"tokenizer.model": LETTERS + spec(model_type=2)})
    config = {"tokenizer_class": "LlamaTokenizer"} | ({} if legacy is None else {"legacy": legacy})
    backend = load_tokenizer(tmp_path, {}, config).backend
    assert (backend.pre_tokenizer is None) is (legacy is True)
    for unsaid in ({}, {"legacy": True}):
        assert load_tokenizer(tmp_path, {}, unsaid).backend.pre_tokenizer is None


@pytest.mark.parametrize(
    ("config", "around"),
    [
        ({"add_bos_token": True}, ([1], [])),
        ({"add_bos_token": True, "add_eos_token": True}, ([1], [2])),
        ({"add_bos_token": False, "add_eos_token": True}, ([], [2])),
        ({"add_eos_token": True, "bos_token": None}, ([], [2])),
        ({"bos_token": {"content": "</s>"}}, ([2], [])),
    ],
)
def test_beginning_and_end_tokens(tmp_path: Path, config: dict[str, Any], around: tuple[list[int], list[int]]) -> None:
    write(tmp_path, **{"tokenizer.model": LETTERS + spec(model_type=2)})
    backend = load_tokenizer(tmp_path, {}, config).backend
    assert backend.encode("ab").ids == [*around[0], 7, *around[1]]
    assert backend.encode("ab", add_special_tokens=False).ids == [7]


def test_special_tokens_map_fills_what_tokenizer_config_lacks(tmp_path: Path) -> None:
    write(tmp_path, **{"config.json": {}, "tokenizer.model": LETTERS, "model.safetensors": b""})
    write(tmp_path, **{"special_tokens_map.json": {"eos_token": "</s>", "bos_token": "x"}})
    write(tmp_path, **{"tokenizer_config.json": {"bos_token": "<s>"}})
    assert resolve(str(tmp_path)).tokenizer_config == {"eos_token": "</s>", "bos_token": "<s>"}
    assert resolve(str(tmp_path)).tokenizer.encode("ab").tokens == ["<s>", "▁ab"]


def test_templates(tmp_path: Path) -> None:
    assert read_templates(tmp_path, {}) == {}
    assert read_templates(tmp_path, {"chat_template": "S"}) == {"default": "S"}
    named = [{"name": "default", "template": "D"}, {"name": "rag", "template": "R"}]
    assert read_templates(tmp_path, {"chat_template": named}) == {"default": "D", "rag": "R"}
    assert read_templates(tmp_path, {"chat_template": {"tool_use": "T"}}) == {"tool_use": "T"}
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("file")
    (tmp_path / "chat_template.jinja").write_text("J")
    assert read_templates(tmp_path, {"chat_template": named}) == {"default": "J", "rag": "file"}
    for wrong in (5, [{"name": "default", "template": 5}]):
        with pytest.raises(ModelMalformed, match="chat_template is a int"):
            read_templates(tmp_path / "none", {"chat_template": wrong})
