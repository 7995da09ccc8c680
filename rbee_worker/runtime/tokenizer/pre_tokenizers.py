"""How families cut text before the merges of byte-level BPE. The rules are from the tokenizer.json of each family."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from tokenizers import Regex, pre_tokenizers

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How one family cuts text before the merges.

    Attributes:
        split: the regular expression whose matches are the pieces; None: GPT-2's, which ByteLevel has built in.
        single_digits: whether text is first cut so that every digit is a piece of its own.
        nfc: whether text is first brought to Unicode normal form C.
        ignore_merges: whether a piece that equals a token becomes that token without merges.
        add_bos: whether BOS is put before a text where the files do not say so.
    """

    split: str | None = None
    single_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        """The pre-tokenizer of the tokenizers library. Its last step writes bytes as characters."""
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
"""Key: the value of ``tokenizer.ggml.pre``."""
