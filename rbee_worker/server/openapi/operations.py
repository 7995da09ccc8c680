"""What OpenAI's routes do."""

from collections.abc import Mapping
from typing import Any, Final

from rbee_worker.errors import Cancelled, DeadlineExceeded, InferenceError, ModelNotFound, OutOfMemory
from rbee_worker.server.http.operation import ERRORS_OF_JOBS, Errors, Operation
from rbee_worker.server.openai.chat.body import ChatBody
from rbee_worker.server.openai.completions.body import CompletionBody
from rbee_worker.server.openai.responses.body import ResponsesBody
from rbee_worker.server.openapi import answers_openai, answers_responses

_COMPLETIONS: Final[Errors] = (ModelNotFound, *ERRORS_OF_JOBS, Cancelled, InferenceError, OutOfMemory, DeadlineExceeded)
_STREAMED: Final = "With `stream` the answer is a stream, the last frame of which is `[DONE]`."
_REFUSED: Final = (
    "Fields of other servers that would change the answer are refused by name; other unknown ones are not."
)

OPENAI: Final[Mapping[tuple[str, str], tuple[Operation, str, Any]]] = {
    ("POST", "/v1/completions"): (
        Operation(
            "POST",
            "/v1/completions",
            tag="openai",
            body=CompletionBody,
            frames=(answers_openai.CompletionChunk, answers_openai.FailedChunk),
            errors=_COMPLETIONS,
        ),
        f"Continue prompts, in OpenAI's shape.\n\n{_STREAMED} {_REFUSED}",
        answers_openai.Completion,
    ),
    ("POST", "/v1/chat/completions"): (
        Operation(
            "POST",
            "/v1/chat/completions",
            tag="openai",
            body=ChatBody,
            frames=(answers_openai.ChatCompletionChunk, answers_openai.FailedChunk),
            errors=_COMPLETIONS,
        ),
        f"Answer a conversation, in OpenAI's shape.\n\n{_STREAMED} {_REFUSED}",
        answers_openai.ChatCompletion,
    ),
    ("POST", "/v1/responses"): (
        Operation(
            "POST",
            "/v1/responses",
            tag="openai",
            body=ResponsesBody,
            frames=answers_responses.RESPONSE_EVENTS,
            errors=_COMPLETIONS,
        ),
        (
            f"Make a response, in OpenAI's shape.\n\nNothing of it is kept. {_STREAMED}"
            f" Each frame has an `event` line too. {_REFUSED}"
        ),
        answers_responses.ResponseObject,
    ),
}
