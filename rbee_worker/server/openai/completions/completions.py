"""Completions: they continue text as it is. The form of the answer is OpenAI's older one."""

import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Literal, NotRequired

from typing_extensions import TypedDict

from rbee_worker.config import GenerationRequest
from rbee_worker.events import End, InferenceEvent, PromptLogprobs, PromptProgress, Started, Token
from rbee_worker.server.openai.choices import Choices, FinishReason, Usage, finish_reason
from rbee_worker.server.openai.chunks import PromptFigures, prompt_figures
from rbee_worker.server.openai.completions.body import CompletionBody
from rbee_worker.server.openai.logprobs import CompletionLogprobs, LogprobsWriter, joined
from rbee_worker.server.openai.requests import choice_ids, choice_seed, new_id
from rbee_worker.server.sse import Frames, frame
from rbee_worker.worker.job import Job
from rbee_worker.worker.worker import Worker


class CompletionChoice(TypedDict):
    """One continuation."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Completion(TypedDict):
    """The continuations of one prompt or several."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(TypedDict):
    """A piece of a streamed completion."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]
    prompt_progress: NotRequired[PromptFigures]


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionPiece:
    """What one event adds to a choice.

    Attributes:
        index: of the choice.
        event: the event.
        text: added to the text.
        logprobs: added to ``logprobs``; None: nothing.
        finish_reason: why the choice ended; None: it goes on.
    """

    index: int
    event: InferenceEvent
    text: str = ""
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None


class CompletionChoices(Choices):
    """The choices of one completion.

    Args:
        worker, jobs: see :class:`~rbee_worker.server.openai.choices.Choices`.
        body: the request.
        response_id: see ``id``.
        echoes: the text of each prompt; empty unless the body asks for ``echo``.

    Attributes:
        id: the id of the response, and of the first job.
        created: in seconds since 1970.
    """

    def __init__(
        self, worker: Worker, jobs: Sequence[Job], body: CompletionBody, response_id: str, echoes: Sequence[str]
    ) -> None:
        super().__init__(worker, jobs, per_prompt=body.n)
        self.id = response_id
        self.created = int(time.time())
        self._body = body
        self._echoes = echoes
        self._logprobs = [LogprobsWriter() for _ in jobs]

    async def pieces(self) -> AsyncGenerator[CompletionPiece, None]:
        """What each event adds to its choice.

        Raises:
            RbeeError: as :meth:`~rbee_worker.server.openai.choices.Choices.events`.
        """
        async with aclosing(self.events()) as events:
            async for index, event in events:
                if self._body.max_tokens == 0:
                    self.used.completion = 0
                yield self._piece(index, event)

    def _piece(self, index: int, event: InferenceEvent) -> CompletionPiece:
        body, logprobs = self._body, self._logprobs[index]
        wanted = body.logprobs is not None
        match event:
            # With log-probabilities, the prompt's text is sent together with them.
            case Started() if body.echo and not wanted:
                return CompletionPiece(index=index, event=event, text=self._echoes[index // body.n])
            case PromptLogprobs() if body.echo:
                text = self._echoes[index // body.n]
                told = logprobs.prompt(event.logprobs, text)
                return CompletionPiece(index=index, event=event, text=text, logprobs=told)
            case Token() if body.max_tokens != 0:
                tokens = logprobs.tokens(event.logprobs) if wanted and event.logprobs else None
                return CompletionPiece(index=index, event=event, text=event.t, logprobs=tokens)
            case End():
                reason = "length" if body.max_tokens == 0 else finish_reason(event)
                return CompletionPiece(index=index, event=event, finish_reason=reason)
            case _:
                return CompletionPiece(index=index, event=event)


def begin_completion(worker: Worker, body: CompletionBody, client: str) -> CompletionChoices:
    """Submit the jobs of a completion, all or none.

    Raises:
        RbeeError: as :meth:`~rbee_worker.worker.worker.Worker.submit`.
    """
    response_id = new_id("cmpl")
    requests = list(_requests(body, client, response_id))
    echoes = [_text(worker, prompt) for prompt in body.prompts] if body.echo else []
    return CompletionChoices(worker, worker.submit_all(requests), body, response_id, echoes)


def _requests(body: CompletionBody, client: str, response_id: str) -> Iterator[GenerationRequest]:
    ids = choice_ids(response_id)
    for prompt in body.prompts:
        for choice in range(body.n):
            sampling = body.sampling(
                # For no tokens one token is generated, but not sent.
                max_tokens=1 if body.max_tokens == 0 else body.max_tokens,
                seed=choice_seed(body.seed, choice),
                logprobs=body.logprobs,
                prompt_logprobs=body.logprobs if body.echo else None,
            )
            yield GenerationRequest(
                prompt=prompt if isinstance(prompt, str) else None,
                prompt_ids=None if isinstance(prompt, str) else tuple(prompt),
                job_id=next(ids),
                prompt_progress=body.prompt_progress and body.stream,
                client=client,
                timeout_seconds=body.timeout,
                sampling=sampling,
            )


def _text(worker: Worker, prompt: str | list[int]) -> str:
    if isinstance(prompt, str):
        return prompt
    tokenizer = worker.tokenizer()
    return tokenizer.decode([token for token in prompt if token < tokenizer.vocab_size], skip_special_tokens=False)


async def completion_frames(choices: CompletionChoices, body: CompletionBody, model: str) -> Frames:
    """The frames of a streamed completion. ``model``: the name of the model in the answer.

    Raises:
        RbeeError: a choice failed.
    """

    def chunk(*pieces: CompletionPiece) -> CompletionChunk:
        return {
            "id": choices.id,
            "object": "text_completion",
            "created": choices.created,
            "model": model,
            "choices": [
                {
                    "index": piece.index,
                    "text": piece.text,
                    "logprobs": piece.logprobs,
                    "finish_reason": piece.finish_reason,
                }
                for piece in pieces
            ],
        }

    async with aclosing(choices.pieces()) as pieces:
        async for piece in pieces:
            made = chunk(piece)
            if body.include_usage:
                made["usage"] = None
            if isinstance(piece.event, PromptProgress):
                if piece.index == 0:
                    made["prompt_progress"] = prompt_figures(piece.event)
                    yield frame(made)
            elif piece.text or piece.logprobs or piece.finish_reason:
                yield frame(made)
    if body.include_usage:
        last = chunk()
        last["usage"] = choices.used.to_usage()
        yield frame(last)


@dataclass(slots=True)
class _Whole:
    """One choice, collected from its pieces."""

    text: list[str] = field(default_factory=list)
    logprobs: list[CompletionLogprobs] = field(default_factory=list)
    finish: FinishReason | None = None


async def whole_completion(choices: CompletionChoices, body: CompletionBody, model: str) -> Completion:
    """The answer to a completion that is not streamed. ``model``: the name of the model in the answer.

    Raises:
        RbeeError: a choice failed.
    """
    wholes = [_Whole() for _ in range(len(body.prompts) * body.n)]
    async with aclosing(choices.pieces()) as pieces:
        async for piece in pieces:
            whole = wholes[piece.index]
            whole.text.append(piece.text)
            whole.logprobs += [piece.logprobs] if piece.logprobs is not None else []
            whole.finish = piece.finish_reason
    return {
        "id": choices.id,
        "object": "text_completion",
        "created": choices.created,
        "model": model,
        "choices": [
            {
                "index": index,
                "text": "".join(whole.text),
                "logprobs": joined(whole.logprobs) if body.logprobs is not None else None,
                "finish_reason": whole.finish,
            }
            for index, whole in enumerate(wholes)
        ],
        "usage": choices.used.to_usage(),
    }
