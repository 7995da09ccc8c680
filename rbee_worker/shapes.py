"""Whether values from JSON have the types that a dataclass says: what was sent becomes the dataclass again."""

import functools
import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, get_args, get_origin

T = TypeVar("T")

_NAMES = {int: "an integer", float: "a number", str: "text", bool: "true or false", type(None): "null"}


def from_json(record: type[T], data: Mapping[str, Any]) -> T:
    """A dataclass from a JSON object. Keys that it does not have are ignored, because newer workers may send more.

    Raises:
        ValueError: a value is of another type than its field; the message names the field.
        TypeError: a field without a default is missing; the message names it.
    """
    hashable: Any = record  # mypy doubts it
    kinds = _kinds(hashable)
    return record(**{name: _fitted(name, kind, data[name]) for name, kind in kinds.items() if name in data})


@functools.cache
def _kinds(record: type) -> Mapping[str, Any]:
    hints = typing.get_type_hints(record)
    return {field.name: hints[field.name] for field in fields(record)}


def _fitted(name: str, kind: Any, value: Any) -> Any:
    """The value as the type has it: lists as tuples, objects as dataclasses."""
    origin = get_origin(kind)
    if origin in {types.UnionType, typing.Union}:
        options = get_args(kind)
        if value is None and type(None) in options:
            return None
        kind = next(option for option in options if option is not type(None))
        return _fitted(name, kind, value)
    if origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(_fitted(name, get_args(kind)[0], item) for item in value)
    elif origin is not None and origin is not typing.Literal and issubclass(origin, Mapping):
        if isinstance(value, Mapping):
            return {key: _fitted(f"{name}[{key!r}]", get_args(kind)[1], item) for key, item in value.items()}
    elif is_dataclass(kind):
        if isinstance(value, Mapping):
            return from_json(typing.cast("type", kind), value)
    else:
        # Of a word of a closed list a newer worker may send another.
        plain = str if origin is typing.Literal else kind
        if type(value) is plain or (plain is float and type(value) is int):
            return value
        raise ValueError(f"{name} is not {_NAMES.get(plain, plain)}")
    raise ValueError(f"{name} is not {'a list' if origin is tuple else 'an object'}")
