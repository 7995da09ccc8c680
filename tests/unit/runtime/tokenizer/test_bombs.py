"""Tokenizers and texts that would keep the library busy, or take its memory: refused before they are used."""

import json
import struct
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from rbee_worker.errors import ContextTooLong, InferenceError, ModelMalformed
from rbee_worker.runtime.tokenizer.bombs import MAX_ADDED, MAX_STEPS, growth_of, longest_replacement
from rbee_worker.runtime.tokenizer.files import load_tokenizer
from rbee_worker.runtime.tokenizer.sentencepiece import build_sentencepiece
from rbee_worker.runtime.tokenizer.sentencepiece_model import SentencePieceModel
from rbee_worker.runtime.tokenizer.tokenizer import Tokenizer as Own
from tests.tiny import byte_tokenizer

DOUBLE = [normalizers.Replace("a", "aa")] * 40


def with_parts(**parts: Any) -> Tokenizer:
    backend = byte_tokenizer()
    for name, part in parts.items():
        setattr(backend, name, part)
    return backend


def around(count: int) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single=["!"] * count + ["$A"], special_tokens=[("!", 0)])


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"normalizer": normalizers.Sequence(DOUBLE)}, r"its normalizer has 40 steps, .* 1\.1e\+12 times as long"),
        ({"normalizer": normalizers.Sequence([normalizers.Sequence(DOUBLE)])}, "its normalizer has 40 steps"),
        ({"normalizer": normalizers.Sequence([normalizers.Replace(Regex("(?=a)"), "a")] * 40)}, "has 40 steps"),
        ({"normalizer": normalizers.Sequence([normalizers.Prepend("ab")] * 30)}, "has 30 steps"),
        ({"normalizer": normalizers.Replace("a", "b" * 5000)}, r"has 1 steps, .* 5e\+03 times as long"),
        ({"normalizer": normalizers.Sequence([normalizers.Replace("a", "b")] * 65)}, "has 65 steps"),
        ({"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.ByteLevel()] * 30)}, "its pre_tokenizer has 30"),
        ({"decoder": decoders.Sequence([decoders.Replace("a", "aa")] * 40)}, "its decoder has 40 steps"),
        ({"post_processor": around(1025)}, "its post_processor puts 1025 tokens around a text; 1024 are allowed"),
        ({"post_processor": processors.Sequence([around(600)] * 2)}, "puts 1200 tokens around"),
    ],
)
def test_a_tokenizer_that_makes_too_much_of_a_text_is_refused(
    tmp_path: Path, parts: dict[str, Any], message: str
) -> None:
    backend = with_parts(**parts)
    with pytest.raises(ModelMalformed, match=f"^x: .*{message}"):
        growth_of(backend, "x")
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelMalformed, match=rf"tokenizer\.json: .*{message}"):
        load_tokenizer(tmp_path, {}, {})


def test_what_known_tokenizers_do_is_allowed() -> None:
    steps = [
        *(normalizers.Replace("``", '"'), normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()),
        *(normalizers.Replace(Regex(" {2,}"), " "), normalizers.Prepend("_"), normalizers.Replace(" ", "_")),
    ]
    assert growth_of(with_parts(normalizer=normalizers.Sequence(steps)), "x") < 500
    assert growth_of(with_parts(normalizer=normalizers.Sequence(steps[:1] * MAX_STEPS)), "x") == 4
    assert growth_of(with_parts(post_processor=around(MAX_ADDED)), "x") == 4
    assert growth_of(byte_tokenizer(), "x") == 4


def test_compiled_rules_that_make_much_of_a_character_are_refused() -> None:
    table = struct.pack("<II", 4, 0)
    assert longest_replacement(table + b"ab\0abc\0") == 3
    model = SentencePieceModel((), "unigram", charsmap=table + b"x" * 300 + b"\0")
    with pytest.raises(ModelMalformed, match="rules of its normaliser make 300 bytes of a character; 256 are allowed"):
        build_with(model)


def build_with(model: SentencePieceModel) -> Tokenizer:
    from rbee_worker.runtime.tokenizer.sentencepiece_model import Piece, PieceType

    pieces = (Piece("<unk>", 0.0, PieceType.UNKNOWN), Piece("a", -1.0, PieceType.NORMAL))
    return build_sentencepiece(SentencePieceModel(pieces, "unigram", charsmap=model.charsmap))


def words_without_unknown() -> Tokenizer:
    options = {"unk_token": "[UNK]"}
    return Tokenizer(models.WordLevel({"a": 0}, **options))


def test_a_vocabulary_without_its_unknown_word_is_refused(tmp_path: Path) -> None:
    backend = words_without_unknown()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelMalformed, match=r"tokenizer\.json: the vocabulary lacks '\[UNK\]'"):
        load_tokenizer(tmp_path, {}, {})


def test_a_text_that_the_library_refuses_is_an_error_of_the_request() -> None:
    own = Own(words_without_unknown(), eos_ids=frozenset())
    assert own.encode("a") == [0]
    with pytest.raises(InferenceError, match=r"^The model's tokenizer cannot encode this text\.$"):
        own.encode("secret")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("added_tokens.json", {"\ud800": 300}),
        ("tokenizer_config.json", {"bos_token": "\ud800", "add_bos_token": True}),
        ("tokenizer_config.json", {"additional_special_tokens": ["a\udfff"]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"300": {"content": "\ud800"}}}),
    ],
)
def test_half_of_a_character_is_no_token(tmp_path: Path, file: str, content: dict[str, Any]) -> None:
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / file).write_text(json.dumps(content))
    config = content if file == "tokenizer_config.json" else {}
    with pytest.raises(ModelMalformed, match=rf"^{file}: the token '.*' holds half of a surrogate pair \(U\+D"):
        load_tokenizer(tmp_path, {}, config)


def listed(folder: Path, tokens: dict[str, int]) -> Tokenizer:
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "added_tokens.json").write_text(json.dumps(tokens))
    return load_tokenizer(folder, {}, {}).backend


def test_a_token_far_behind_the_others_gets_its_id_at_once(tmp_path: Path) -> None:
    began = time.monotonic()
    backend = listed(tmp_path, {"<x>": 20_000, "<y>": 20_002, **{f"<{i}>": 30_000 + i for i in range(3000)}})
    assert time.monotonic() - began < 10
    assert [backend.token_to_id(text) for text in ("<x>", "<y>", "<0>", "<2999>")] == [20_000, 20_002, 30_000, 32_999]
    assert backend.id_to_token(20_001) == "<|reserved_token_20001|>"
    assert backend.get_vocab_size() == 33_000


def test_a_token_too_far_behind_the_others_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelMalformed, match="the token '<x>' is listed with id 4194303, but the tokenizer has 256"):
        listed(tmp_path, {"<x>": 2**22 - 1})


def test_a_prompt_far_too_long_is_refused_before_it_is_tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    own, seen = Own(byte_tokenizer(), eos_ids=frozenset()), []
    encoded = own._encoded

    def noting(backend: Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
        seen.append(len(text))
        return encoded(backend, text, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(own, "_encoded", noting)
    own.require_room("x" * 3_000_000, "prompt")  # the context is not known
    own.context_length = 512
    own.require_room("x" * 8 * 512, "prompt")
    assert not seen
    with pytest.raises(ContextTooLong, match="more than 1024 tokens; the context holds 512") as caught:
        own.require_room("x" * 3_000_000, "prompt")
    assert [(field.field, field.constraint) for field in caught.value.fields] == [("prompt", "at most 511 tokens")]
    assert sum(seen) < 200_000


def test_a_long_text_with_few_tokens_is_not_refused() -> None:
    backend = with_parts(normalizer=normalizers.Replace(Regex("x+"), "x"))
    own = Own(backend, eos_ids=frozenset())
    own.context_length = 512
    own.require_room("x" * 3_000_000, "prompt")
    assert own.encode("x" * 3_000_000) == own.encode("x")


def test_other_threads_run_while_a_long_text_is_tokenized() -> None:
    own = Own(byte_tokenizer(), eos_ids=frozenset())
    ended, ticks = threading.Event(), 0
    encoding = threading.Thread(target=lambda: (own.encode("word " * 200_000), ended.set()))
    encoding.start()
    while not ended.wait(0.002):
        ticks += 1
    encoding.join()
    assert ticks > 10
