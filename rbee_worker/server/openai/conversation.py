"""The next message of a conversation, for each wire format: from messages and tools to jobs, from text to deltas."""

import json
import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from rbee_worker.chat.output import ChatFormat, Delta, OutputParser, ToolCallDelta
from rbee_worker.chat.tools import read_tools, tools_as_text
from rbee_worker.config import JSON_LAYOUT, GenerationRequest, GrammarSpec, Message, SamplingParams
from rbee_worker.errors import ContextTooLong, FieldError, InvalidRequest, Unavailable
from rbee_worker.events import End, InferenceEvent, Token, TokenLogprob
from rbee_worker.runtime.tokenizer.tokenizer import ChatPrompt, Tokenizer
from rbee_worker.server.openai.choices import Choices, FinishReason, finish_reason
from rbee_worker.server.openai.requests import choice_ids, choice_seed
from rbee_worker.worker.job import Job
from rbee_worker.worker.worker import Worker

_TESTS_FOR_NONE: Final = re.compile(r"""\bcontent(?:['"]\])?\s+is\s+none""")
"""Matches templates that recognize a message with tool calls by the content None."""

_ANY_OBJECT: Final = '{"type":"object"}'


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """What a client asks for.

    Attributes:
        messages: the conversation so far. Arguments of tool calls are JSON text.
        sampling: without a grammar.
        grammar: what the answer must match, unless it is a tool call.
        tools: as OpenAI's ``tools``.
        tool_choice: whether tools may, must or must not be called.
        tool_name: the tool that must be called; None: any.
        parallel_tool_calls: whether one answer may have several calls.
        variables: further values for the chat template.
        choices: how many answers to make.
        prompt_progress, client, timeout_seconds: see :class:`~rbee_worker.config.GenerationRequest`.
    """

    messages: tuple[Message, ...]
    sampling: SamplingParams
    grammar: GrammarSpec | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    tool_choice: Literal["none", "auto", "required"] = "auto"
    tool_name: str | None = None
    parallel_tool_calls: bool = True
    variables: Mapping[str, Any] = field(default_factory=dict)
    choices: int = 1
    prompt_progress: bool = False
    client: str = ""
    timeout_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPiece:
    """What one event adds to a choice.

    Attributes:
        index: of the choice.
        event: the event.
        deltas: what it adds.
        logprobs: of all tokens since the last piece with deltas; empty if this piece has no deltas and is not the last.
        finish_reason: why the choice ended; None: it goes on.
    """

    index: int
    event: InferenceEvent
    deltas: tuple[Delta, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None


class ChatChoices(Choices):
    """The choices for the next message of a conversation. All have the same prompt.

    Args:
        worker, jobs: see :class:`~rbee_worker.server.openai.choices.Choices`.
        parsers: one for each choice.
        tokenizer: of the model that answers.
        parallel_tool_calls: whether one choice may have several calls.

    Attributes:
        tokenizer: as given.
    """

    def __init__(
        self,
        worker: Worker,
        jobs: Sequence[Job],
        parsers: Sequence[OutputParser],
        tokenizer: Tokenizer,
        *,
        parallel_tool_calls: bool,
    ) -> None:
        super().__init__(worker, jobs, per_prompt=len(jobs))
        self.tokenizer = tokenizer
        self._parsers = parsers
        self._parallel = parallel_tool_calls

    async def pieces(self) -> AsyncGenerator[ChatPiece, None]:
        """What each event adds to its choice, as deltas of content, reasoning and tool calls.

        Raises:
            RbeeError: as :meth:`~rbee_worker.server.openai.choices.Choices.events`.
        """
        logprobs: list[list[TokenLogprob]] = [[] for _ in self._parsers]
        async with aclosing(self.events()) as events:
            async for index, event in events:
                parser, reason = self._parsers[index], None
                deltas: tuple[Delta, ...] = ()
                if isinstance(event, Token):
                    logprobs[index] += event.logprobs or ()
                    deltas = self._kept(index, parser.push(event.t))
                elif isinstance(event, End):
                    deltas = self._kept(index, parser.finish())
                    reason = finish_reason(event)
                    if reason == "stop" and parser.tool_calls:
                        reason = "tool_calls"
                told: tuple[TokenLogprob, ...] = ()
                if deltas or reason is not None:
                    told, logprobs[index] = tuple(logprobs[index]), []
                yield ChatPiece(index=index, event=event, deltas=deltas, logprobs=told, finish_reason=reason)

    def _kept(self, index: int, deltas: list[Delta]) -> tuple[Delta, ...]:
        """The deltas. If only one call is allowed, a second call is removed, and the choice is cut there."""
        if self._parallel:
            return tuple(deltas)
        kept = tuple(delta for delta in deltas if not isinstance(delta, ToolCallDelta) or delta.index == 0)
        if len(kept) < len(deltas):
            self.cut(index)
        return kept


def begin_conversation(worker: Worker, conversation: Conversation, response_id: str) -> ChatChoices:
    """Render the prompt and submit the jobs, all or none. This takes time: do not call it on an event loop.

    Args:
        worker: its model answers.
        conversation: what the client asks for.
        response_id: the id of the first job. The ids of the others begin with it.

    Raises:
        InvalidRequest: the model has no chat template or it refuses the messages, a tool is wrong, or tools and grammar
            do not go together.
        RbeeError: as :meth:`~rbee_worker.worker.worker.Worker.submit`; or the model was replaced meanwhile.
    """
    tokenizer = worker.tokenizer()
    turn = _Turn(conversation, tokenizer)
    try:
        jobs = worker.submit_all(turn.requests(response_id))
    except InvalidRequest as error:
        raise type(error)(error.message, fields=list(map(_of_messages, error.fields)), hint=error.hint) from None
    choices = ChatChoices(worker, jobs, turn.parsers(), tokenizer, parallel_tool_calls=conversation.parallel_tool_calls)
    try:
        replaced = worker.tokenizer() is not tokenizer
    except Unavailable:
        replaced = False  # the model is being replaced, but only after these jobs
    if replaced:
        choices.cancel()
        raise Unavailable("The model was replaced; ask again.", retry_after=1)
    return choices


def _of_messages(error: FieldError) -> FieldError:
    return replace(error, field="messages") if error.field == "prompt" else error


class _Turn:
    """One conversation with one model: its prompt, its grammar, its parsers."""

    def __init__(self, conversation: Conversation, tokenizer: Tokenizer) -> None:
        self._asked = conversation
        self._template = tokenizer.chat_template or ""
        self._tools = conversation.tools if conversation.tool_choice != "none" else ()
        self._format = ChatFormat.detect(
            tokenizer.chat_template,
            added_tokens=tokenizer.added_tokens if self._tools else None,
            special_tokens=tokenizer.special_tokens,
        )
        if self._tools:
            read_tools(self._tools)
        self._prompt = self._render(tokenizer)
        self._opened = self._format.opens_reasoning(self._prompt.text)
        self._grammar = self._choose_grammar()

    def requests(self, response_id: str) -> list[GenerationRequest]:
        """A request for each answer."""
        asked, ids = self._asked, choice_ids(response_id)
        marked = bool(self._tools or self._format.reasoning) and self._format.keeps_special_tokens
        skip = asked.sampling.skip_special_tokens and not marked
        sampling = replace(asked.sampling, grammar=self._grammar, skip_special_tokens=skip)
        return [
            GenerationRequest(
                prompt_ids=tuple(self._prompt.ids),
                job_id=next(ids),
                prompt_progress=asked.prompt_progress,
                client=asked.client,
                timeout_seconds=asked.timeout_seconds,
                sampling=replace(sampling, seed=choice_seed(sampling.seed, choice)),
            )
            for choice in range(asked.choices)
        ]

    def parsers(self) -> list[OutputParser]:
        """A parser for each answer."""
        if self._opened and self._grammar is not None and self._grammar is self._asked.grammar:
            # The grammar makes the whole text the answer, although the prompt has opened reasoning.
            return [OutputParser(None, None) for _ in range(self._asked.choices)]
        names = [tool["function"]["name"] for tool in self._tools]
        return [
            self._format.parser(self._prompt.text, tools=bool(self._tools), tool_names=names)
            for _ in range(self._asked.choices)
        ]

    def _choose_grammar(self) -> GrammarSpec | None:
        asked, text = self._asked, self._prompt.text
        if self._tools and asked.tool_choice == "required":
            choice = asked.tool_name or "required"
            return self._format.tool_grammar(self._tools, choice, asked.parallel_tool_calls, prompt_text=text)
        if not self._tools or asked.grammar is None:
            return asked.grammar
        if self._format.calls_style.bare:
            # A call and an answer both begin with a brace, so they could not be told apart.
            constraint = "with tool_choice none or required, as this model's calls look like an answer in JSON"
            message = f"tools must be {constraint}."
            raise InvalidRequest(message, fields=[FieldError("tools", constraint, message)])
        calls = self._format.tool_grammar(self._tools, "required", asked.parallel_tool_calls, prompt_text=text)
        return _either(calls, asked.grammar, after_reasoning=self._opened)

    def _render(self, tokenizer: Tokenizer) -> ChatPrompt:
        variables = self._variables()
        messages = [self._message(message) for message in self._asked.messages]
        if self._tools and not self._format.takes_tools:
            messages = _with_system(messages, tools_as_text(self._tools))
        try:
            return tokenizer.encode_chat([_with_objects(message) for message in messages], **variables)
        except ContextTooLong:
            raise
        except InvalidRequest:
            if not any("tool_calls" in message for message in messages):
                raise
        # Older templates need the arguments as text.
        return tokenizer.encode_chat(messages, **variables)

    def _variables(self) -> dict[str, Any]:
        tools = [_for_template(tool) for tool in self._tools] if self._format.takes_tools else None
        variables = {"tools": tools or None} | dict(self._asked.variables)
        if self._asked.grammar is not None and not self._tools:
            # The grammar makes the text begin with the answer, so reasoning is turned off where the model can do that.
            variables.setdefault("enable_thinking", False)
        return variables

    def _message(self, message: Message) -> Message:
        if message["role"] == "developer" and "developer" not in self._template:
            message = {**message, "role": "system"}
        if message.get("tool_calls") and not message["content"] and _TESTS_FOR_NONE.search(self._template):
            message = {**message, "content": None}
        return message


def _either(calls: GrammarSpec, answer: GrammarSpec, *, after_reasoning: bool) -> GrammarSpec:
    """A grammar for tool calls or an answer in JSON.

    Raises:
        InvalidRequest: the grammar of the answer is not for JSON.
    """
    if answer.kind not in {"json_schema", "json_object"}:
        constraint = "with tool_choice none or required, when a regex or a grammar is given"
        raise InvalidRequest(
            f"tools must be {constraint}.", fields=[FieldError("tools", constraint, f"tools must be {constraint}.")]
        )
    head, _, rest = calls.text.partition("start: ")
    reasoning = "reasoning " if after_reasoning else ""
    schema = json.loads(answer.text or _ANY_OBJECT)
    if isinstance(schema, dict):
        schema = {**schema, "x-guidance": {**JSON_LAYOUT}}
    text = f"{head}start: calls | answer\nanswer: {reasoning}%json {json.dumps(schema)}\ncalls: {rest}"
    return GrammarSpec("lark", text, answer.field)


def _with_system(messages: list[Message], text: str) -> list[Message]:
    """Add a text to the end of the system message. If there is none, make one."""
    if messages and messages[0]["role"] == "system":
        first, *others = messages
        return [{**first, "content": f"{first['content']}\n\n{text}"}, *others]
    return [Message(role="system", content=text), *messages]


def _with_objects(message: Message) -> Message:
    """The message with the arguments of tool calls as objects, which most templates need."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    return {**message, "tool_calls": [_with_object(call) for call in calls]}


def _with_object(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def _for_template(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool as templates expect it: always with parameters, and without fields that are only for the server."""
    function = {"parameters": {"type": "object", "properties": {}}} | dict(tool["function"])
    order = ("name", "description", "parameters")
    return {"type": "function", "function": {key: function[key] for key in order if function.get(key) is not None}}
