"""Parts that chunks of completions and of chat completions share: prompt progress, and the error of a stream."""

from typing import Annotated

from pydantic import Field
from typing_extensions import TypedDict

from rbee_worker.errors import RbeeError
from rbee_worker.events import PromptProgress
from rbee_worker.server import sse
from rbee_worker.server.http.envelope import OPENAI_CODES, ErrorDetail, envelope


class PromptFigures(TypedDict):
    """How much of the prompt has been processed."""

    total: Annotated[int, Field(description="Its tokens.")]
    cache: Annotated[int, Field(description="Those whose keys and values were reused.")]
    processed: Annotated[int, Field(description="Those done, reused ones included.")]
    time_ms: Annotated[int, Field(description="Milliseconds since it began.")]


class FailedChunk(TypedDict):
    """The error with which a stream of chunks ends when it fails."""

    error: ErrorDetail


def prompt_figures(event: PromptProgress) -> PromptFigures:
    """``prompt_progress`` of a chunk, in llama.cpp's form."""
    return {"total": event.total, "cache": event.cached, "processed": event.processed, "time_ms": event.elapsed_ms}


def failed_chunk(error: RbeeError) -> bytes:
    """The last frame, before ``[DONE]``, of a stream that fails."""
    chunk: FailedChunk = {"error": envelope(error, OPENAI_CODES)["error"]}
    return sse.frame(chunk)
