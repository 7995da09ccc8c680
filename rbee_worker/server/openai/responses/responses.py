"""OpenAI's responses: they use the same conversation as chat completions, but the answer consists of items."""

import re
from dataclasses import replace
from typing import Any, Final

from rbee_worker.errors import FieldError, InvalidRequest
from rbee_worker.server.bodies import only_grammar
from rbee_worker.server.openai.conversation import ChatChoices, Conversation, begin_conversation
from rbee_worker.server.openai.responses.body import AllowedTools, NamedFunction, ResponsesBody
from rbee_worker.server.openai.responses.input import to_messages
from rbee_worker.worker.worker import Worker

_OF_TOOLS: Final = re.compile(r"(tools\[[0-9]+\])\.function\.")


def to_conversation(body: ResponsesBody, client: str) -> Conversation:
    """The conversation that a body asks for. ``client``: the name of the client.

    Raises:
        InvalidRequest: several fields say what the answer must match, or a value is out of range.
    """
    choice, effort = body.tool_choice, body.reasoning.effort
    named = choice.name if isinstance(choice, NamedFunction) else None
    variables: dict[str, Any] = {}
    if effort is not None:
        variables["reasoning_effort"] = effort
        if effort == "none":
            variables["enable_thinking"] = False
    word = choice.mode if isinstance(choice, AllowedTools) else choice
    return Conversation(
        messages=to_messages(body.input, body.instructions),
        sampling=body.sampling(logprobs=body.told_logprobs, grammar=None),
        grammar=only_grammar(body.grammars()),
        tools=tuple(tool.to_tool() for tool in body.usable_tools),
        tool_choice=word if isinstance(word, str) else "required",
        tool_name=named,
        parallel_tool_calls=body.parallel_tool_calls,
        variables=variables | (body.chat_template_kwargs or {}),
        client=client,
        timeout_seconds=body.timeout,
    )


def begin_response(worker: Worker, conversation: Conversation, response_id: str) -> ChatChoices:
    """As :func:`~rbee_worker.server.openai.conversation.begin_conversation`; errors name the fields of a response."""
    try:
        return begin_conversation(worker, conversation, response_id)
    except InvalidRequest as error:
        fields = [_of_response(field) for field in error.fields]
        message = _OF_TOOLS.sub(r"\1.", error.message)
        raise type(error)(message, fields=fields, hint=error.hint) from None


def _of_response(error: FieldError) -> FieldError:
    name = "input" if error.field == "messages" else _OF_TOOLS.sub(r"\1.", error.field)
    return replace(error, field=name, message=_OF_TOOLS.sub(r"\1.", error.message))
