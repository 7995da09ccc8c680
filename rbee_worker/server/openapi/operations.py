"""What the routes do: the table from which they are described. Every route has its row; a test holds that."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from rbee_worker.errors import (
    Cancelled,
    Conflict,
    ContextTooLong,
    DeadlineExceeded,
    DeviceUnavailable,
    InferenceError,
    ModelMalformed,
    ModelNotFound,
    ModelNotLoaded,
    ModelUnsupported,
    NotFound,
    OutOfMemory,
    QueueFull,
    RbeeError,
    Unavailable,
)
from rbee_worker.server.http.envelope import INFERENCE_PATH
from rbee_worker.server.http.fields import Body
from rbee_worker.server.native.bodies import DetokenizeBody, InferenceBody, LoadingBody, TokenizeBody
from rbee_worker.server.native.routes import PROGRESS_PATH
from rbee_worker.server.observe.metrics import CONTENT_TYPE
from rbee_worker.server.openai.bodies import CompletionBody
from rbee_worker.server.openai.chat.body import ChatBody
from rbee_worker.server.openai.responses.body import ResponsesBody
from rbee_worker.server.openapi import answers, answers_openai, answers_responses

JSON: Final = "application/json"
EVENT_STREAM: Final = "text/event-stream"
PLAIN_TEXT: Final = CONTENT_TYPE.partition(";")[0]

Errors = tuple[type[RbeeError], ...]

_WORK: Final[Errors] = (ContextTooLong, Conflict, QueueFull, Unavailable, ModelNotLoaded)
_COMPLETIONS: Final[Errors] = (ModelNotFound, *_WORK, Cancelled, InferenceError, OutOfMemory, DeadlineExceeded)
_STREAMED: Final = "With `stream` the answer is a stream, the last frame of which is `[DONE]`."
_REFUSED: Final = (
    "Fields of other servers that would change the answer are refused by name; other unknown ones are not."
)


@dataclass(frozen=True, slots=True)
class Answer:
    """What an answer holds.

    Attributes:
        json: the shape of a JSON answer; None: there is no such answer. ``dict``: any object.
        frames: names of the schemas of what a stream's frames hold; empty: there is no such answer.
        text: the media type of another answer.
    """

    json: type | None = None
    frames: tuple[str, ...] = ()
    text: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """What a method of a route does.

    Attributes:
        tag: the group it is listed in.
        summary: what it does, in a few words.
        description: what else there is to know.
        body: the schema of the request's body; None: there is none.
        answers: by status, those that are no errors.
        parameters: the parts of the path, each with what it means.
        errors: those that its handler may answer with.
        streams_errors: whether errors may come as frames, too.
    """

    tag: str
    summary: str
    description: str = ""
    body: type[Body] | None = None
    answers: Mapping[int, Answer]
    parameters: Mapping[str, str] = field(default_factory=dict)
    errors: Errors = ()
    streams_errors: bool = False


def _get(tag: str, summary: str, answer: Answer) -> Operation:
    return Operation(tag=tag, summary=summary, answers={200: answer})


OPERATIONS: Final[Mapping[tuple[str, str], Operation]] = {
    ("POST", INFERENCE_PATH): Operation(
        tag="inference",
        summary="Generate text, streamed",
        description="Whatever can be refused is refused before the stream begins. A client that leaves ends its job.",
        body=InferenceBody,
        answers={200: Answer(frames=("InferenceEvent",))},
        errors=_WORK,
        streams_errors=True,
    ),
    ("DELETE", INFERENCE_PATH + "/{job_id}"): Operation(
        tag="inference",
        summary="Cancel a job",
        description="204 whether or not there is such a job. Its stream ends with `end`, `cancelled`.",
        parameters={"job_id": "The job's id, or the id of one of OpenAI's responses."},
        answers={204: Answer()},
    ),
    ("GET", "/v1/models"): _get("openai", "The model, by its names", Answer(json=answers_openai.ModelList)),
    ("GET", "/v1/models/{model}"): Operation(
        tag="openai",
        summary="One of the names",
        parameters={"model": "The name; it may hold slashes."},
        answers={200: Answer(json=answers_openai.Model)},
        errors=(ModelNotFound,),
    ),
    ("POST", "/v1/completions"): Operation(
        tag="openai",
        summary="Continue prompts, in OpenAI's shape",
        description=f"{_STREAMED} {_REFUSED}",
        body=CompletionBody,
        answers={200: Answer(json=answers_openai.Completion, frames=("CompletionChunk", "FailedChunk"))},
        errors=_COMPLETIONS,
    ),
    ("POST", "/v1/chat/completions"): Operation(
        tag="openai",
        summary="Answer a conversation, in OpenAI's shape",
        description=f"{_STREAMED} {_REFUSED}",
        body=ChatBody,
        answers={200: Answer(json=answers_openai.ChatCompletion, frames=("ChatCompletionChunk", "FailedChunk"))},
        errors=_COMPLETIONS,
    ),
    ("POST", "/v1/responses"): Operation(
        tag="openai",
        summary="Make a response, in OpenAI's shape",
        description=f"Nothing of it is kept. {_STREAMED} Each frame has an `event` line too. {_REFUSED}",
        body=ResponsesBody,
        answers={
            200: Answer(
                json=answers_responses.ResponseObject,
                frames=tuple(kind.__name__ for kind in answers_responses.RESPONSE_EVENTS),
            )
        },
        errors=_COMPLETIONS,
    ),
    ("POST", "/tokenize"): Operation(
        tag="tokens",
        summary="Text to token ids",
        body=TokenizeBody,
        answers={200: Answer(json=answers.TokenIds)},
        errors=(Unavailable, ModelNotLoaded),
    ),
    ("POST", "/detokenize"): Operation(
        tag="tokens",
        summary="Token ids to text",
        body=DetokenizeBody,
        answers={200: Answer(json=answers.DecodedText)},
        errors=(Unavailable, ModelNotLoaded),
    ),
    ("GET", PROGRESS_PATH): Operation(
        tag="loading",
        summary="The load's events, streamed",
        description="The latest state first, then what follows, to the terminal event. Leaving cancels nothing.",
        answers={200: Answer(frames=("LoadingEvent",))},
        errors=(Unavailable,),
    ),
    ("POST", "/v1/loading"): Operation(
        tag="loading",
        summary="Load a model",
        description="Answers at once. A model that serves goes on where both fit; else it is unloaded first.",
        body=LoadingBody,
        answers={202: Answer(json=answers.LoadAccepted)},
        errors=(
            DeviceUnavailable,
            ModelNotFound,
            Conflict,
            ModelMalformed,
            ModelUnsupported,
            Unavailable,
        ),
    ),
    ("DELETE", "/v1/loading"): Operation(
        tag="loading",
        summary="Cancel the load",
        answers={202: Answer(json=answers.CancelAccepted)},
        errors=(NotFound,),
    ),
    ("POST", "/v1/unload"): Operation(
        tag="loading",
        summary="Free the model's memory",
        description="Running jobs end first. No body is needed.",
        answers={200: Answer(json=answers.Unloaded)},
        errors=(Conflict, Unavailable),
    ),
    ("GET", "/"): _get("worker", "Who answers here", Answer(json=answers.Index)),
    ("GET", "/health"): Operation(
        tag="worker",
        summary="Whether the worker is well",
        description="503 when its load failed and left it without a model, or when its engine died.",
        answers={200: Answer(json=answers.Health), 503: Answer(json=answers.Health)},
    ),
    ("GET", "/livez"): Operation(
        tag="worker",
        summary="Whether the process is worth keeping",
        description="503 when its engine's thread has died: restart it.",
        answers={200: Answer(json=answers.Life), 503: Answer(json=answers.Life)},
    ),
    ("GET", "/readyz"): Operation(
        tag="worker",
        summary="Whether requests would be served, as a status",
        answers={200: Answer(json=answers.ReadyStatus), 503: Answer(json=answers.ReadyStatus)},
    ),
    ("GET", "/v1/ready"): _get("worker", "The same in words, always 200", Answer(json=answers.Readiness)),
    ("GET", "/metrics"): _get("worker", "Figures for Prometheus", Answer(text=PLAIN_TEXT)),
    ("GET", "/v1/worker"): _get("worker", "The worker, its model and devices", Answer(json=answers.WorkerDescription)),
    ("GET", "/openapi.json"): _get("worker", "This description", Answer(json=dict)),
    ("GET", "/docs"): _get("worker", "This description, as a page", Answer(text="text/html")),
}
