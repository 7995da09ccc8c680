"""A tokenizer from a GGUF file's vocabulary: byte-level BPE or SentencePiece, as the model's own files have it.

A SentencePiece vocabulary (``tokenizer.ggml.model`` is ``llama``) says all that is needed. For byte-level BPE GGUF
names the rule that cuts text before the merges (``tokenizer.ggml.pre``) but does not hold it; the table below does, one
entry per name, from the tokenizer.json that the family publishes. A name that is not in the table is refused: a wrong
cut gives text that looks right and a model that is quietly worse.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from rbee_worker.errors import ModelMalformed, ModelUnsupported
from rbee_worker.runtime.formats.safetensors import quoted
from rbee_worker.runtime.tokenizer.sentencepiece import build_sentencepiece
from rbee_worker.runtime.tokenizer.sentencepiece_model import Piece, PieceType, SentencePieceModel

_CONTROL: Final = 3
_USER_DEFINED: Final = 4
_SENTENCEPIECE: Final = "llama"
_PHI3_PLAIN: Final = frozenset({"<unk>", "<s>", "<|endoftext|>"})
_DOWNLOAD_AGAIN: Final = "Download the file again."

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How one family cuts text before the merges.

    Attributes:
        split: the regular expression whose matches are the pieces; None: GPT-2's, which ByteLevel has built in.
        single_digits: every digit is a piece of its own, before anything else.
        nfc: text is brought to Unicode normal form C first.
        ignore_merges: a piece that is a whole token is taken as it is, whatever the merges make of it.
        add_bos: the default of ``tokenizer.ggml.add_bos_token``.
    """

    split: str | None = None
    single_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        """The pre-tokenizer, ending in bytes."""
        if self.split is None:
            last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
            steps: list[Any] = [last]
        else:
            cut = pre_tokenizers.Split(Regex(self.split), behavior="isolated")
            steps = [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        if self.single_digits:
            steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
        return pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]


_WORD_CASES = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
)
_TEKKEN_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

_LLAMA3 = PreTokenizer(split=rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}", ignore_merges=True, add_bos=True)
_QWEN2 = PreTokenizer(split=rf"{_WORDS}|\p{{N}}|{_REST}", nfc=True)
_CL100K = PreTokenizer(split=_LLAMA3.split)
_TEKKEN = PreTokenizer(split=rf"{_WORD_CASES}|\p{{N}}|{_TEKKEN_REST}", ignore_merges=True, add_bos=True)
_GPT2 = PreTokenizer()

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = MappingProxyType(
    {
        "smollm": PreTokenizer(single_digits=True),
        "llama-bpe": _LLAMA3,
        "llama3": _LLAMA3,
        "llama-v3": _LLAMA3,
        "qwen2": _QWEN2,
        "deepseek-r1-qwen": _QWEN2,
        "tekken": _TEKKEN,
        "dbrx": _CL100K,
        "smaug-bpe": _CL100K,
        "gpt-2": _GPT2,
        "default": _GPT2,
    }
)
"""By the value of ``tokenizer.ggml.pre``."""


def build_tokenizer(fields: Mapping[str, Any], *, file: str = "the GGUF file") -> Tokenizer:
    """Rebuild the tokenizer that a GGUF file describes.

    Args:
        fields: the file's metadata, by key.
        file: how a message names it.

    Returns:
        A tokenizer; control tokens are special added tokens, user-defined ones plain added
        tokens. Encoding with special tokens puts the beginning-of-sequence token first where the file says so.

    Raises:
        ModelUnsupported: a tokenizer model or pre-tokenizer that is not in the table.
        ModelMalformed: vocabulary, types or merges are missing or inconsistent.
    """
    if fields.get("tokenizer.ggml.model") == _SENTENCEPIECE:
        return _build_sentencepiece(fields, file)
    family = _pre_tokenizer(fields, file)
    tokens = _strings(fields, "tokenizer.ggml.tokens", file)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        first: dict[str, int] = {}
        twice = next(i for i, token in enumerate(tokens) if first.setdefault(token, i) != i)
        raise ModelMalformed(f"{file}: tokenizer.ggml.tokens holds {quoted(tokens[twice])} twice (again at {twice}).")
    merges = [_merge(pair, index, vocabulary, file) for index, pair in enumerate(_merges(fields, file))]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=family.ignore_merges))
    if family.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = family.build()
    tokenizer.decoder = decoders.ByteLevel()
    types = _types(fields, len(tokens), file)
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    plain = [token for token, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED]
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    _add_template(tokenizer, fields, tokens, file)
    return tokenizer


def _build_sentencepiece(fields: Mapping[str, Any], file: str) -> Tokenizer:
    tokens = _strings(fields, "tokenizer.ggml.tokens", file)
    types, scores = _types(fields, len(tokens), file), fields.get("tokenizer.ggml.scores")
    numbers = isinstance(scores, list) and all(isinstance(score, int | float) for score in scores)
    if not isinstance(scores, list) or len(scores) != len(tokens) or not numbers:
        raise ModelMalformed(f"{file}: tokenizer.ggml.scores is not a score for each token.", hint=_DOWNLOAD_AGAIN)
    try:
        kinds = [PieceType(kind) for kind in types]
    except ValueError as error:
        raise ModelMalformed(f"{file}: tokenizer.ggml.token_type: {error}.", hint=_DOWNLOAD_AGAIN) from error
    unknown = fields.get("tokenizer.ggml.unknown_token_id")
    if unknown is None:
        unknown = kinds.index(PieceType.UNKNOWN) if PieceType.UNKNOWN in kinds else -1
    if not isinstance(unknown, int) or not 0 <= unknown < len(tokens):
        raise ModelMalformed(f"{file}: tokenizer.ggml.unknown_token_id is {quoted(unknown)}, which is no token.")
    model = SentencePieceModel(
        pieces=tuple(map(Piece, tokens, map(float, scores), kinds)),
        algorithm="bpe",
        byte_fallback=PieceType.BYTE in kinds,
        unknown_id=unknown,
        add_dummy_prefix=bool(fields.get("tokenizer.ggml.add_space_prefix", True)),
        remove_extra_whitespaces=False,
    )
    # In Phi-3's own tokenizer.json blanks behind a token that structures a conversation belong to it.
    stripped = fields.get("general.architecture") == "phi3"
    tokenizer = build_sentencepiece(model, file=file, strip_behind=_PHI3_PLAIN if stripped else None)
    _add_template(tokenizer, fields, tokens, file)
    return tokenizer


def adds_bos(fields: Mapping[str, Any]) -> bool:
    """Whether encoding puts the beginning-of-sequence token first: as the file says, else as its family does."""
    if fields.get("tokenizer.ggml.model") == _SENTENCEPIECE:
        usual = True
    else:
        family = PRE_TOKENIZERS.get(fields.get("tokenizer.ggml.pre", ""))
        usual = family is not None and family.add_bos
    return bool(fields.get("tokenizer.ggml.add_bos_token", usual))


def special_token(fields: Mapping[str, Any], role: str, *, file: str) -> tuple[int, str] | None:
    """The id and text of a token that the metadata names by its role: ``bos``, ``eos`` or ``padding``.

    Raises:
        ModelMalformed: the id is outside the vocabulary.
    """
    key = f"tokenizer.ggml.{role}_token_id"
    index = fields.get(key)
    if index is None:
        return None
    tokens = _strings(fields, "tokenizer.ggml.tokens", file)
    if not isinstance(index, int) or not 0 <= index < len(tokens):
        raise ModelMalformed(f"{file}: {key} is {quoted(index)}; the vocabulary has {len(tokens)} tokens.")
    return index, tokens[index]


def _pre_tokenizer(fields: Mapping[str, Any], file: str) -> PreTokenizer:
    model = fields.get("tokenizer.ggml.model")
    if model != "gpt2":
        raise ModelUnsupported(
            f"{file}: tokenizer.ggml.model is {_shown(model)}; supported: 'gpt2' (byte-level BPE), "
            "'llama' (SentencePiece).",
            hint="Use the model's safetensors folder, which has its own tokenizer.json.",
        )
    pre = fields.get("tokenizer.ggml.pre")
    family = PRE_TOKENIZERS.get(pre) if isinstance(pre, str) else None
    if family is None:
        raise ModelUnsupported(
            f"{file}: tokenizer.ggml.pre is {_shown(pre)}; supported: {', '.join(PRE_TOKENIZERS)}.",
            hint="Use the model's safetensors folder, or a newer GGUF file of it.",
        )
    return family


def _shown(value: object) -> str:
    return "missing" if value is None else quoted(value)


def _strings(fields: Mapping[str, Any], key: str, file: str) -> list[str]:
    value = fields.get(key)
    if not isinstance(value, list) or not value or not isinstance(value[0], str):
        raise ModelMalformed(f"{file}: {key} is missing or not a list of strings.", hint=_DOWNLOAD_AGAIN)
    return value


def _merges(fields: Mapping[str, Any], file: str) -> list[str]:
    # A vocabulary of single bytes has no merges, and an empty array has no element type to check.
    return [] if fields.get("tokenizer.ggml.merges") == [] else _strings(fields, "tokenizer.ggml.merges", file)


def _types(fields: Mapping[str, Any], count: int, file: str) -> list[int]:
    types = fields.get("tokenizer.ggml.token_type")
    if types is None:
        return [1] * count
    if not isinstance(types, list) or len(types) != count:
        held = len(types) if isinstance(types, list) else "no"
        raise ModelMalformed(
            f"{file}: tokenizer.ggml.token_type has {held} entries for {count} tokens.", hint=_DOWNLOAD_AGAIN
        )
    return types


def _merge(pair: str, index: int, vocabulary: Mapping[str, int], file: str) -> tuple[str, str]:
    # Tokens are byte-level: a space inside one is written "Ġ", so the only blank is the one between the two.
    left, _, right = pair.partition(" ")
    if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
        raise ModelMalformed(
            f"{file}: tokenizer.ggml.merges[{index}] is {quoted(pair)}, which does not join two tokens into a third.",
            hint=_DOWNLOAD_AGAIN,
        )
    return left, right


def _add_template(tokenizer: Tokenizer, fields: Mapping[str, Any], tokens: list[str], file: str) -> None:
    """Put the beginning and end tokens around what is encoded, where the file or the family says so."""
    roles = {"bos": adds_bos(fields), "eos": bool(fields.get("tokenizer.ggml.add_eos_token", False))}
    wanted = {}
    for role, is_added in roles.items():
        if is_added:
            found = special_token(fields, role, file=file)
            if found is None:
                raise ModelMalformed(
                    f"{file}: tokenizer.ggml.add_{role}_token is set, but there is no tokenizer.ggml.{role}_token_id "
                    f"among {len(tokens)} tokens."
                )
            wanted[role] = found
    if wanted:
        parts = [wanted["bos"][1]] if "bos" in wanted else []
        parts += ["$A"] + ([wanted["eos"][1]] if "eos" in wanted else [])
        tokenizer.post_processor = processors.TemplateProcessing(
            single=parts, special_tokens=[(text, index) for index, text in wanted.values()]
        )
