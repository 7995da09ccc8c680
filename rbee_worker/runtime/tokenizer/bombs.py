"""Refuses tokenizers that turn a short text into an endless one.

The parts of a tokenizer are chains of small steps, and many of these write more text than they read. Forty steps of
which each doubles the text make a terabyte of one character. So for each step a bound of its growth is known here, and
that of a chain is their product.
"""

import base64
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

import tokenizers

from rbee_worker.errors import ModelMalformed

MAX_GROWTH: Final = 1024
"""How many times as long a chain may make a text. Those of known tokenizers are below 300."""

MAX_STEPS: Final = 64
"""Steps of a chain. Known tokenizers have a dozen at most."""

MAX_ADDED: Final = 1024
"""Tokens that may be put around a text. Known tokenizers put one or two."""

MAX_REPLACEMENT: Final = 64
"""Characters that compiled rules may make of one. Unicode's compatibility forms have 18 at most."""

_FORMS: Final[Mapping[str, float]] = {"NFKC": 18, "NFKD": 18, "NFD": 4, "NFC": 3, "Lowercase": 3, "Precompiled": 18}
"""Steps that change nothing of what another of them has changed. The largest counts; of compiled rules the first."""

_GROWTH: Final[Mapping[str, float]] = {
    "ByteLevel": 4,  # a character for each byte
    "Metaspace": 2,  # a mark in front of each piece
    "BertNormalizer": 12,  # decomposed, and spaces around Chinese characters
    "WordPiece": 2,  # the rest are decoders: spaces between tokens
    "BPEDecoder": 2,
    "CTC": 2,
}
"""Type of any other step -> how many characters it makes of one, at most. Types that are not here make one, or none."""


def growth_of(backend: tokenizers.Tokenizer, what: str) -> float:
    """How many times as long the steps of a tokenizer can make a text.

    Args:
        backend: the tokenizer.
        what: the tokenizer or its file, for messages.

    Raises:
        ModelMalformed: a chain of steps is too long or could make far too much of a text, or too many tokens are put
            around a text.
    """
    grown = {part: _of_chain(getattr(backend, part), f"{what}: its {part}") for part in ("normalizer", "pre_tokenizer")}
    _of_chain(backend.decoder, f"{what}: its decoder")
    added = backend.num_special_tokens_to_add(is_pair=False)
    if added > MAX_ADDED:
        raise ModelMalformed(f"{what}: its post_processor puts {added} tokens around a text; {MAX_ADDED} are allowed.")
    return math.prod(grown.values())


def longest_replacement(charsmap: bytes) -> int:
    """How many bytes the compiled rules of SentencePiece can make of one character.

    They are the size of a table (four bytes), the table, and the replacements with a zero byte behind each.
    """
    size = int.from_bytes(charsmap[:4], "little")
    return max(map(len, charsmap[4 + size :].split(b"\0")))


def _of_chain(step: Any, what: str) -> float:
    if step is None:
        return 1.0
    steps = list(_steps(json.loads(step.__getstate__())))
    forms = [_FORMS[one["type"]] for one in steps if one["type"] in _FORMS]
    growth = max(forms, default=1.0)
    compiled = [one for one in steps if one["type"] == "Precompiled"]
    for one in compiled:
        longest = longest_replacement(base64.b64decode(one["precompiled_charsmap"] or ""))
        if longest > 4 * MAX_REPLACEMENT:
            raise ModelMalformed(f"{what} makes {longest} bytes of a character; {4 * MAX_REPLACEMENT} are allowed.")
        growth *= 1 if one is compiled[0] else longest
    growth *= math.prod(map(_growth, steps))
    if len(steps) > MAX_STEPS or growth > MAX_GROWTH:
        raise ModelMalformed(
            f"{what} has {len(steps)} steps, which can make a text {growth:.3g} times as long; {MAX_STEPS} steps and "
            f"{MAX_GROWTH} times are allowed."
        )
    return growth


def _steps(step: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The steps of a chain, those of chains in it too."""
    for key in ("normalizers", "pretokenizers", "decoders"):
        if key in step:
            for inner in step[key]:
                yield from _steps(inner)
            return
    yield step


def _growth(step: Mapping[str, Any]) -> float:
    if step["type"] == "Prepend":
        return 1 + len(step["prepend"])
    if step["type"] != "Replace":
        return _GROWTH.get(step["type"], 1)
    text, put = step["pattern"].get("String"), len(step["content"])
    # An expression may match between two characters. Then it takes none for those that it puts there.
    return 1 + put if not text else max(1.0, put / len(text))
