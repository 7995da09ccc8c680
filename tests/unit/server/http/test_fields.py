"""Long lists of bad items: one of them is named."""

import pytest

from rbee_worker.errors import InvalidRequest
from rbee_worker.server.native.bodies import DetokenizeBody, InferenceBody
from rbee_worker.server.openai.chat.body import ChatBody
from rbee_worker.server.openai.completions.body import CompletionBody
from rbee_worker.server.openai.responses.body import ResponsesBody

BAD = [0] * 1000
MESSAGES = [{"role": "user", "content": "x"}]
CALL = {"role": "assistant", "content": "x", "tool_calls": BAD}
ALLOWED = {"type": "allowed_tools", "mode": "auto", "tools": BAD}
TOOLS = [{"type": "function", "name": "f"}]

LONG = {
    "messages": (InferenceBody, {"messages": BAD}),
    "tokens": (DetokenizeBody, {"tokens": [-1] * 1000}),
    "token ids": (CompletionBody, {"prompt": [-1] * 1000}),
    "prompts": (CompletionBody, {"prompt": [""] * 100}),
    "lists of token ids": (CompletionBody, {"prompt": [[]] * 100}),
    "too many prompts": (CompletionBody, {"prompt": [""] * 1000}),
    "choices": (CompletionBody, {"prompt": "x", "guided_choice": BAD}),
    "chat messages": (ChatBody, {"messages": BAD}),
    "parts": (ChatBody, {"messages": [{"role": "user", "content": BAD}]}),
    "tool calls": (ChatBody, {"messages": [CALL]}),
    "tools": (ChatBody, {"messages": MESSAGES, "tools": BAD}),
    "documents": (ChatBody, {"messages": MESSAGES, "documents": BAD}),
    "items": (ResponsesBody, {"input": BAD}),
    "parts of items": (ResponsesBody, {"input": [{"role": "user", "content": BAD}]}),
    "reasoning": (ResponsesBody, {"input": [{"type": "reasoning", "content": BAD}]}),
    "tools of responses": (ResponsesBody, {"input": "x", "tools": BAD}),
    "allowed tools": (ResponsesBody, {"input": "x", "tools": TOOLS, "tool_choice": ALLOWED}),
    "includes": (ResponsesBody, {"input": "x", "include": BAD}),
    "metadata": (ResponsesBody, {"input": "x", "metadata": {str(i): 0 for i in range(1000)}}),
}


@pytest.mark.parametrize("name", LONG)
def test_one_of_many_bad_items_is_named(name):
    kind, body = LONG[name]
    with pytest.raises(InvalidRequest) as refused:
        kind.parse(body)
    assert len(refused.value.fields) == 1


def test_messages_that_lack_something_are_not_all_listed():
    with pytest.raises(InvalidRequest) as refused:
        ChatBody.parse({"messages": [{}] * 10_000})
    assert len(refused.value.fields) < 200
