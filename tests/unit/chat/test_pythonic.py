"""Calls in Python's syntax, and their arguments as JSON."""

import json

import pytest

from rbee_worker.chat.pythonic import keywords_as_json


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", {}),
        ("x=1", {"x": 1}),
        (" x = -2.5 , y=+3, z=1e3, w=.5,", {"x": -2.5, "y": 3, "z": 1000.0, "w": 0.5}),
        ("a=True, b=False, c=None", {"a": True, "b": False, "c": None}),
        ("a=true, b=false, c=null", {"a": True, "b": False, "c": None}),
        ("""a='x"y', b="x'y", c='a\\nb\\x41\\u00e9\\'\\d'""", {"a": 'x"y', "b": "x'y", "c": "a\nbAé'\\d"}),
        ("a='\\ud83d\\ude00', b='😀', c='\\U0001F600'", {"a": "😀", "b": "😀", "c": "😀"}),
        ("a=[], b=[1, [2,],], c=(1, 2)", {"a": [], "b": [1, [2]], "c": [1, 2]}),
        ("d={}, e={'k': {'l': ()}}", {"d": {}, "e": {"k": {"l": []}}}),
        ("end='='", {"end": "="}),
    ],
)  # fmt: skip
def test_literals(text, value):
    assert json.loads(keywords_as_json(text)) == value


@pytest.mark.parametrize(
    "text",
    [
        "1", "x", "x=", "x=1 y=2", "x=1,,y=2", ",", "x=y", "x=f(1)", "x=[1", "x=1]", "x=[,]", "x={1: 2}", "x={'a'}",
        "x={'a': }", "x='a", "x=01", "x=1e999", "x='\\ud800'", "'x'=1", "x: 1", "x=1+2", "x=$", "x={'a'=1}", "x=[1)",
    ],
)  # fmt: skip
def test_what_is_no_literal_is_refused(text):
    with pytest.raises(ValueError):
        keywords_as_json(text)
