"""The alphabet of byte-level vocabularies (GPT-2): one printable character for each byte."""

from collections.abc import Mapping
from types import MappingProxyType


def _alphabet() -> dict[int, str]:
    """A printable Latin-1 character stands for itself. The other bytes, in order, are the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + n) for n, byte in enumerate(others)}


CHAR_OF: Mapping[int, str] = MappingProxyType(_alphabet())
"""Byte -> character."""

BYTE_OF: Mapping[str, int] = MappingProxyType({char: byte for byte, char in CHAR_OF.items()})
"""Character -> byte."""
