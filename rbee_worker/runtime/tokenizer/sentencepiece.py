"""Makes tokenizers from SentencePiece models: from ``tokenizer.model``, or from the vocabulary of a GGUF file.

The result equals that of transformers' converters, with one difference: control, unknown and byte pieces never come
from merges, as in SentencePiece itself. Algorithms: Kudo 2018 (unigram), Sennrich et al. 2016 (BPE).
"""

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from rbee_worker.errors import ModelMalformed
from rbee_worker.escape import quoted
from rbee_worker.panics import panics_as_errors
from rbee_worker.runtime.tokenizer.bombs import MAX_REPLACEMENT, longest_replacement
from rbee_worker.runtime.tokenizer.sentencepiece_model import Piece, PieceType, SentencePieceModel

SPACE: Final = "\N{LOWER ONE EIGHTH BLOCK}"
"""The character that stands for a space in a piece."""

MAX_PIECE_LENGTH: Final = 512
"""In characters. SentencePiece's own default is 16; Gemma has pieces of a few dozen spaces."""

_NEVER: Final = -1e6
"""A score so low that a unigram piece is never chosen."""

_MERGED: Final = frozenset({PieceType.NORMAL, PieceType.USER_DEFINED})


def build_sentencepiece(
    model: SentencePieceModel,
    *,
    legacy: bool = True,
    file: str = "tokenizer.model",
    listed: Mapping[int, AddedToken] = MappingProxyType({}),
    strip_behind: Collection[str] | None = None,
) -> Tokenizer:
    """Make a tokenizer of a model.

    Args:
        model: what the file holds.
        legacy: where a space is added. True: always, before the text and after each special token, as in SentencePiece,
            llama.cpp and transformers' ``legacy=True``. False: only before the text, and only where it does not begin
            with a space, as in transformers' ``legacy=False``.
        file: the file's name for messages.
        listed: tokens by id that replace the pieces with these ids, from tokenizer_config.json.
        strip_behind: white space after a control or user-defined piece belongs to the piece, except for the pieces
            named here. None: it never does.

    Raises:
        ModelMalformed: the vocabulary is inconsistent.
    """
    texts = [listed[i].content if i in listed else piece.text for i, piece in enumerate(model.pieces)]
    vocabulary = _vocabulary(texts, model, file)
    if model.algorithm == "bpe":
        core: Any = models.BPE(
            vocab=vocabulary,
            merges=_merges(model.pieces, texts),
            unk_token=texts[model.unknown_id],
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
        )
    else:
        scores = [(text, _score(piece)) for text, piece in zip(texts, model.pieces, strict=True)]
        core = models.Unigram(scores, unk_id=model.unknown_id, byte_fallback=model.byte_fallback)
    tokenizer = Tokenizer(core)
    _set_normalizer(tokenizer, model, file, legacy=legacy)
    tokenizer.decoder = _decoder(model)
    added = [
        listed.get(i)
        or AddedToken(
            text,
            special=piece.type is PieceType.CONTROL,
            # A piece of spaces is found after spaces were replaced, unless an added space could become a part of it.
            normalized=SPACE in text and not model.add_dummy_prefix,
            rstrip=strip_behind is not None and text not in strip_behind,
        )
        for i, (text, piece) in enumerate(zip(texts, model.pieces, strict=True))
        if piece.type in (PieceType.CONTROL, PieceType.USER_DEFINED)
    ]
    tokenizer.add_special_tokens([token for token in added if token.special])
    tokenizer.add_tokens([token for token in added if not token.special])
    tokenizer.add_special_tokens([AddedToken(texts[model.unknown_id], special=True, normalized=False)])
    return tokenizer


def _vocabulary(texts: list[str], model: SentencePieceModel, file: str) -> dict[str, int]:
    vocabulary = {text: i for i, text in enumerate(texts)}
    if len(vocabulary) != len(texts):
        twice = next(text for i, text in enumerate(texts) if vocabulary[text] != i)
        raise ModelMalformed(f"{file} holds the piece {quoted(twice)} twice.", hint="Download the file again.")
    longest = max(map(len, texts))
    if longest > MAX_PIECE_LENGTH or "" in vocabulary:
        what = "an empty piece" if "" in vocabulary else f"a piece of {longest} characters"
        raise ModelMalformed(f"{file} holds {what}.", hint="Download the file again.")
    if model.byte_fallback and (lacking := [b for b in range(256) if f"<0x{b:02X}>" not in vocabulary]):
        raise ModelMalformed(
            f"{file} falls back to bytes but lacks {len(lacking)} of them, <0x{lacking[0]:02X}> for one.",
            hint="Download the file again.",
        )
    return vocabulary


def _score(piece: Piece) -> float:
    return piece.score if piece.type in _MERGED else _NEVER if piece.type is not PieceType.UNKNOWN else 0.0


def _merges(pieces: tuple[Piece, ...], texts: list[str]) -> list[tuple[str, str]]:
    """Every pair of pieces that joins into a third; the third with the best score first, as SentencePiece merges."""
    rank = {text: i for i, (text, piece) in enumerate(zip(texts, pieces, strict=True)) if piece.type in _MERGED}
    found = []
    for text, index in rank.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in rank and right in rank:
                found.append((-pieces[index].score, index, cut, left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]


def _set_normalizer(tokenizer: Tokenizer, model: SentencePieceModel, file: str, *, legacy: bool) -> None:
    steps = _charsmap(model.charsmap, file) if model.charsmap else []
    if model.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.escape_whitespaces and (legacy or not model.add_dummy_prefix):
        if model.add_dummy_prefix:
            steps.append(normalizers.Prepend(SPACE))
        steps.append(normalizers.Replace(" ", SPACE))
    elif model.escape_whitespaces:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="first", split=False)
    elif model.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps) if len(steps) > 1 else steps[0]


def _charsmap(data: bytes, file: str) -> list[Any]:
    """The compiled rules. They are tried on every character of the basic plane: the library checks them only in use."""
    if longest_replacement(data) > 4 * MAX_REPLACEMENT:
        raise ModelMalformed(
            f"{file}: the rules of its normaliser make {longest_replacement(data)} bytes of a character; "
            f"{4 * MAX_REPLACEMENT} are allowed."
        )
    probe = "".join(map(chr, [*range(1, 0xD800), *range(0xE000, 0x10000)]))
    try:
        with panics_as_errors():
            rules = normalizers.Precompiled(data)
            rules.normalize_str(probe)
            line_end = rules.normalize_str("\r") + rules.normalize_str("\n")
    except Exception as error:  # the library raises plain Exception
        raise ModelMalformed(
            f"{file}: the rules of its normaliser (precompiled_charsmap) are damaged.", hint="Download the file again."
        ) from error
    # The library takes "\r\n" for one character and applies the rule of "\r" to both.
    return [rules] if line_end == "\r\n" else [normalizers.Replace("\r\n", line_end), rules]


def _decoder(model: SentencePieceModel) -> Any:
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)
