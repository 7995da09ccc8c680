"""Byte-level BPE without tokenizer.json: tiktoken's rank files, Mistral's ``tekken.json``, ``vocab.json`` + merges.txt.

A rank file has a line for each token: its bytes in base64, and its rank, which is its id. It holds neither the special
tokens nor the rule that cuts text before the merges. The rule comes from the family, by the table below. A family that
is not in the table is refused: with a wrong rule the model's answers are worse. ``tekken.json`` holds its own rule.
"""

import base64
import binascii
import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from rbee_worker.errors import ModelMalformed, ModelUnsupported, sentence
from rbee_worker.escape import one_line, quoted
from rbee_worker.runtime.tokenizer.byte_level import CHAR_OF
from rbee_worker.runtime.tokenizer.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from rbee_worker.runtime.untrusted import parse_json_object

_HINT: Final = "Download the file again."
_OTHER_FILE: Final = "Put a tokenizer.json of this model into the folder: transformers' save_pretrained writes one."
_LONGEST_TOKEN: Final = 1024
_TEKKEN_VALUES: Final = 2**21
"""JSON values in a tekken.json. Each token has three, and the known vocabularies have 150,000 tokens."""

_LINE: Final = re.compile(rb"([A-Za-z0-9+/=]+) (\d{1,9})")

RANK_FAMILIES: Mapping[str, PreTokenizer] = MappingProxyType(
    {
        "llama": PRE_TOKENIZERS["llama-bpe"],
        "chatglm": PRE_TOKENIZERS["llama-bpe"],
        "glm": PRE_TOKENIZERS["llama-bpe"],
        "glm4": PRE_TOKENIZERS["llama-bpe"],
        "qwen": PRE_TOKENIZERS["qwen2"],
        "qwen2": PRE_TOKENIZERS["qwen2"],
        "qwen3": PRE_TOKENIZERS["qwen2"],
    }
)
"""How text is cut for rank files. Key: ``model_type`` of config.json."""

MERGES_FAMILIES: Mapping[str, PreTokenizer] = MappingProxyType(
    {
        "gpt2": PRE_TOKENIZERS["gpt-2"],
        "qwen2": PRE_TOKENIZERS["qwen2"],
        "qwen2_moe": PRE_TOKENIZERS["qwen2"],
        "qwen3": PRE_TOKENIZERS["qwen2"],
        "qwen3_moe": PRE_TOKENIZERS["qwen2"],
    }
)
"""The same for a ``vocab.json`` with ``merges.txt``."""


def read_ranks(data: bytes, *, file: str) -> dict[bytes, int]:
    """Read a rank file: token bytes -> rank.

    Raises:
        ModelMalformed: a line is not a token and its rank, ranks are not 0, 1, 2, …, or a byte has no token.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.strip())
        try:
            token = base64.b64decode(match[1], validate=True) if match is not None else b""
        except binascii.Error:
            token = b""
        if match is None or not 0 < len(token) <= _LONGEST_TOKEN or token in ranks:
            raise ModelMalformed(f"{file}: line {number} is not a new token in base64 and its rank.", hint=_HINT)
        ranks[token] = int(match[2])
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ModelMalformed(f"{file}: the ranks of its {len(ranks)} tokens are not 0 to {len(ranks) - 1}.", hint=_HINT)
    _require_bytes(ranks, file)
    return ranks


def build_from_ranks(ranks: Mapping[bytes, int], family: PreTokenizer, *, special: Sequence[str] = ()) -> Tokenizer:
    """Byte-level BPE from ranks.

    Args:
        ranks: token bytes -> rank; each of the 256 bytes has one.
        family: how text is cut.
        special: special tokens, which have the first ids. The id of another token is its rank plus their number.
    """
    vocabulary = {text: i for i, text in enumerate(special)}
    vocabulary |= {_characters(token): rank + len(special) for token, rank in ranks.items()}
    # In every tokenizer of this kind, a piece that equals a token becomes that token without merges.
    core = models.BPE(vocab=vocabulary, merges=_merges(ranks), ignore_merges=True)
    tokenizer = _assemble(core, family)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return tokenizer


def build_from_merges(vocab: bytes, merges: bytes, family: PreTokenizer) -> Tokenizer:
    """Byte-level BPE from ``vocab.json`` and ``merges.txt``.

    Raises:
        ModelMalformed: a file is damaged, or the files disagree.
    """
    vocabulary = parse_json_object(vocab, what="vocab.json")
    ids = list(vocabulary.values())
    if not ids or any(type(i) is not int or not 0 <= i < 2**31 for i in ids) or len(set(ids)) != len(ids):
        raise ModelMalformed("vocab.json does not map tokens to ids of their own.", hint=_HINT)
    try:
        lines = merges.decode().splitlines()
    except UnicodeDecodeError as error:
        raise ModelMalformed(f"merges.txt is not UTF-8 (byte {error.start}).", hint=_HINT) from error
    pairs = []
    for number, line in enumerate(lines, 1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, _, right = line.partition(" ")
        if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise ModelMalformed(
                f"merges.txt: line {number} is {quoted(line)}, which does not join two tokens into a third.", hint=_HINT
            )
        pairs.append((left, right))
    return _assemble(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=family.ignore_merges), family)


def build_tekken(data: bytes, *, file: str = "tekken.json") -> Tokenizer:
    """Byte-level BPE from Mistral's ``tekken.json``. Special tokens have the first ids.

    Raises:
        ModelMalformed: the file is damaged.
    """
    content = parse_json_object(data, what=file, most_values=_TEKKEN_VALUES)
    try:
        config = content["config"]
        count, pattern = int(config["default_num_special_tokens"]), str(config["pattern"])
        entries = content["vocab"][: max(int(config["default_vocab_size"]) - count, 0)]
        tokens = [base64.b64decode(entry["token_bytes"], validate=True) for entry in entries]
        named = {int(token["rank"]): str(token["token_str"]) for token in content.get("special_tokens") or []}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ModelMalformed(f"{file} is not laid out as one: {type(error).__name__}.", hint=_HINT) from error
    special = [named.get(i, f"<SPECIAL_{i}>") for i in range(min(count, 2**20))]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    texts = {*special, *map(_characters, tokens)}
    if len(texts) != len(special) + len(tokens) or any(not 0 < len(token) <= _LONGEST_TOKEN for token in tokens):
        raise ModelMalformed(f"{file}: a token is empty, far too long or there twice.", hint=_HINT)
    _require_bytes(ranks, file)
    try:
        return build_from_ranks(ranks, PreTokenizer(split=pattern), special=special)
    except Exception as error:  # the library raises plain Exception for a wrong pattern
        raise ModelMalformed(
            f"{file}: its pattern is refused: {sentence(one_line(str(error)[:120]))}", hint=_HINT
        ) from error


def family_of(config: Mapping[str, Any], families: Mapping[str, PreTokenizer], *, file: str) -> PreTokenizer:
    """How the family of a model cuts text, by ``model_type`` of its config.

    Raises:
        ModelUnsupported: the family is not in the table.
    """
    name = config.get("model_type")
    family = families.get(name) if isinstance(name, str) else None
    if family is None:
        raise ModelUnsupported(
            f"{file}: this file does not say how text is cut before its merges, and for model_type {quoted(name)} it "
            f"is not known; known: {', '.join(families)}.",
            hint=_OTHER_FILE,
        )
    return family


def _require_bytes(ranks: Mapping[bytes, int], file: str) -> None:
    lacking = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if lacking:
        raise ModelMalformed(f"{file}: {len(lacking)} bytes have no token, 0x{lacking[0]:02X} for one.", hint=_HINT)


def _merges(ranks: Mapping[bytes, int]) -> list[tuple[str, str]]:
    """Every pair of tokens that joins into a third, in the order of the third's rank."""
    found = []
    for token, rank in ranks.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ranks and right in ranks:
                found.append((rank, ranks[left], ranks[right], _characters(left), _characters(right)))
    found.sort()
    return [(left, right) for *_, left, right in found]


def _characters(token: Iterable[int]) -> str:
    return "".join([CHAR_OF[byte] for byte in token])


def _assemble(core: Any, family: PreTokenizer) -> Tokenizer:
    tokenizer = Tokenizer(core)
    if family.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = family.build()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
