"""Definitions of tools: what is refused, by name; and the page about them."""

import re
from pathlib import Path

import pytest

from rbee_worker.chat import styles
from rbee_worker.chat.output import ChatFormat
from rbee_worker.chat.tools import MAX_TOOLS, Tool, read_tools, tools_as_text
from rbee_worker.errors import InvalidRequest
from tests.unit.chat import templates as t


def tool(name="f", **function):
    return {"type": "function", "function": {"name": name, **function}}


def test_a_tool_is_read():
    parameters = {"type": "object", "properties": {"x": {"type": "integer"}}}
    [read] = read_tools([tool("get-it_2", description="Gets it.", parameters=parameters, strict=True)])
    assert read == Tool("get-it_2", "Gets it.", parameters, True)


def test_without_parameters_there_are_none():
    [read] = read_tools([tool(description=None, strict=None)])
    assert read == Tool("f", "", {"type": "object", "properties": {}}, False)


@pytest.mark.parametrize(
    ("tools", "fields"),
    [
        ([], ["tools"]),
        ([tool(f"f{index}") for index in range(MAX_TOOLS + 1)], ["tools"]),
        ([7], ["tools[0].type"]),
        ([{"type": "retrieval"}], ["tools[0].type"]),
        ([{"type": "function"}], ["tools[0].function"]),
        ([tool(), tool("g", parameters=[])], ["tools[1].function.parameters"]),
        ([tool("g", parameters={"type": "array"})], ["tools[0].function.parameters.type"]),
        ([tool(""), tool("a b"), tool("a" * 65), tool(None)], [f"tools[{index}].function.name" for index in range(4)]),
        ([tool(None), tool(None)], ["tools[0].function.name", "tools[1].function.name"]),
        ([tool(), tool("g"), tool()], ["tools[2].function.name"]),
        ([tool(description=1, strict="yes")], ["tools[0].function.description", "tools[0].function.strict"]),
    ],
)
def test_bad_fields_are_named(tools, fields):
    with pytest.raises(InvalidRequest) as caught:
        read_tools(tools)
    assert [error.field for error in caught.value.fields] == fields
    assert all(error.field in caught.value.message for error in caught.value.fields)


def test_a_choice_that_is_no_tool_is_refused():
    with pytest.raises(InvalidRequest) as caught:
        ChatFormat.detect(t.HERMES).tool_grammar([tool()], "g", parallel=False)
    assert [error.field for error in caught.value.fields] == ["tool_choice"]


def test_the_text_for_models_without_tools_shows_what_the_parser_reads():
    text = tools_as_text([tool("lookup", description="Looks it up.")])
    assert '"name": "lookup", "description": "Looks it up."' in text
    call = text[text.index("<tool_call>") :]
    assert t.assembled(t.parse(t.PLAIN, [call]))[1:] == (
        "",
        [("the function's name", '{"argument": "value"}')],
    )


def test_the_page_names_every_style_and_marker():
    page = (Path(__file__).parents[3] / "docs/tools.md").read_text("utf-8").replace("\\|", "|")
    named = re.findall(r"^\| `([a-z0-9-]+)` \| .*`.*$", page, re.MULTILINE)
    known = [style for style in vars(styles).values() if isinstance(style, styles.ToolStyle)]
    assert sorted(named) == sorted(style.name for style in known)
    markers = {marker for style in known for marker in (*style.opens, *style.closes)}
    markers |= {marker for pair in styles._REASONING for marker in (pair.opens, pair.closes)}
    assert {marker for marker in markers if marker not in page} == set()
    assert f"up to {MAX_TOOLS} tools" in page
