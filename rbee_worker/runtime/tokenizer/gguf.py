"""Makes a tokenizer from a GGUF file's vocabulary: byte-level BPE or SentencePiece, equal to the model's own one.

For a SentencePiece vocabulary (``tokenizer.ggml.model`` is ``llama``) the file holds all that is needed. For
byte-level BPE it only names the rule that cuts text before the merges (``tokenizer.ggml.pre``); the table in
``pre_tokenizers`` holds the rules. A name that is not in the table is refused: with a wrong rule the text looks right,
but the model's answers are worse.
"""

from collections.abc import Mapping
from typing import Any, Final

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from rbee_worker.errors import ModelMalformed, ModelUnsupported
from rbee_worker.escape import one_line, quoted
from rbee_worker.runtime.formats.gguf.header import special_token, strings
from rbee_worker.runtime.formats.gguf.model import GGUFModel
from rbee_worker.runtime.tokenizer.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from rbee_worker.runtime.tokenizer.sentencepiece import build_sentencepiece
from rbee_worker.runtime.tokenizer.sentencepiece_model import Piece, PieceType, SentencePieceModel

_CONTROL: Final = 3
_USER_DEFINED: Final = 4
_SENTENCEPIECE: Final = "llama"
_PHI3_PLAIN: Final = frozenset({"<unk>", "<s>", "<|endoftext|>"})
_DOWNLOAD_AGAIN: Final = "Download the file again."


def read_tokenizer(model: GGUFModel) -> Tokenizer:
    """The tokenizer of a GGUF file.

    Raises:
        ModelUnsupported: as :func:`build_tokenizer`.
        ModelMalformed: as :func:`build_tokenizer`; or the vocabulary is larger than the embedding.
    """
    tokenizer = build_tokenizer(model.header.metadata, file=model.path.name)
    tokens, rows = tokenizer.get_vocab_size(), model.vocabulary_size
    if tokens > rows:
        raise ModelMalformed(
            f"{model.path.name}: the vocabulary has {tokens} tokens but the embedding {rows} rows.",
            hint=_DOWNLOAD_AGAIN,
        )
    return tokenizer


def tokenizer_config(model: GGUFModel) -> dict[str, Any]:
    """What Hugging Face's tokenizer_config.json would hold, as far as the file has it.

    Raises:
        ModelMalformed, ModelUnsupported: the id of a special token or the context length is wrong.
    """
    fields = model.header.metadata
    config: dict[str, Any] = {
        "add_bos_token": adds_bos(fields),
        "add_eos_token": bool(fields.get("tokenizer.ggml.add_eos_token", False)),
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.count("context_length"),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    for role, key in (("bos", "bos"), ("eos", "eos"), ("padding", "pad"), ("unknown", "unk")):
        found = model.special_token(role)
        if found is not None:
            config[f"{key}_token"] = found[1]
    template = model.chat_template()
    return config if template is None else config | {"chat_template": template}


def build_tokenizer(fields: Mapping[str, Any], *, file: str = "the GGUF file") -> Tokenizer:
    """Make the tokenizer that a GGUF file describes.

    Args:
        fields: the file's metadata, by key.
        file: the file's name for messages.

    Returns:
        A tokenizer. Control tokens are special added tokens; user-defined ones are added tokens that are not special.
        Encoding with special tokens puts BOS and EOS around the text where the file or its family says so.

    Raises:
        ModelUnsupported: a tokenizer model or pre-tokenizer that is not known.
        ModelMalformed: vocabulary, scores, types or merges are missing or inconsistent.
    """
    if fields.get("tokenizer.ggml.model") == _SENTENCEPIECE:
        return _build_sentencepiece(fields, file)
    family = _pre_tokenizer(fields, file)
    tokens = strings(fields, "tokenizer.ggml.tokens", file)
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
    tokens = strings(fields, "tokenizer.ggml.tokens", file)
    types, scores = _types(fields, len(tokens), file), fields.get("tokenizer.ggml.scores")
    numbers = isinstance(scores, list) and all(isinstance(score, int | float) for score in scores)
    if not isinstance(scores, list) or len(scores) != len(tokens) or not numbers:
        raise ModelMalformed(f"{file}: tokenizer.ggml.scores is not a score for each token.", hint=_DOWNLOAD_AGAIN)
    try:
        kinds = [PieceType(kind) for kind in types]
    except ValueError as error:
        raise ModelMalformed(
            f"{file}: tokenizer.ggml.token_type: {one_line(str(error))}.", hint=_DOWNLOAD_AGAIN
        ) from error
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
    # In Phi-3's own tokenizer.json, white space after a token that structures a conversation belongs to the token.
    stripped = fields.get("general.architecture") == "phi3"
    tokenizer = build_sentencepiece(model, file=file, strip_behind=_PHI3_PLAIN if stripped else None)
    _add_template(tokenizer, fields, tokens, file)
    return tokenizer


def adds_bos(fields: Mapping[str, Any]) -> bool:
    """Whether encoding puts BOS before a text: as the file says, else as is usual in its family."""
    if fields.get("tokenizer.ggml.model") == _SENTENCEPIECE:
        usual = True
    else:
        family = PRE_TOKENIZERS.get(fields.get("tokenizer.ggml.pre", ""))
        usual = family is not None and family.add_bos
    return bool(fields.get("tokenizer.ggml.add_bos_token", usual))


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


def _merges(fields: Mapping[str, Any], file: str) -> list[str]:
    # A vocabulary of single bytes has no merges, and an empty array has no element type to check.
    return [] if fields.get("tokenizer.ggml.merges") == [] else strings(fields, "tokenizer.ggml.merges", file)


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
    # A space inside a byte-level token is written "Ġ", so the only space is the one between the two tokens.
    left, _, right = pair.partition(" ")
    if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
        raise ModelMalformed(
            f"{file}: tokenizer.ggml.merges[{index}] is {quoted(pair)}, which does not join two tokens into a third.",
            hint=_DOWNLOAD_AGAIN,
        )
    return left, right


def _add_template(tokenizer: Tokenizer, fields: Mapping[str, Any], tokens: list[str], file: str) -> None:
    """Make the tokenizer put BOS and EOS around a text, where the file or the family says so."""
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
