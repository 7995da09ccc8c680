"""Completions: text continued as it is, in OpenAI's older shape."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NotRequired, Self

from typing_extensions import TypedDict

from rbee_worker.config import GenerationRequest
from rbee_worker.events import End, InferenceEvent, PromptLogprobs, PromptProgress, Started, Token
from rbee_worker.server.openai.answers import Answers, FinishReason, Usage, UsedTokens, finish_reason
from rbee_worker.server.openai.completions.body import CompletionBody
from rbee_worker.server.openai.logprobs import CompletionLogprobs, LogprobsWriter, joined
from rbee_worker.server.openai.requests import PromptFigures, choice_ids, choice_seed, new_id, prompt_figures
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
class CompletionStep:
    """What one event adds to a completion.

    Attributes:
        index: of the choice.
        event: as it came.
        text: what it adds to the text.
        logprobs: what it adds to ``logprobs``; None: nothing.
    """

    index: int
    event: InferenceEvent
    text: str = ""
    logprobs: CompletionLogprobs | None = None


class CompletionReply:
    """The answers to one completion: an asynchronous iterator of steps.

    Attributes:
        id: of the response; without its choice's number also that of the first job.
        created: seconds since 1970.
        usage: so far.
    """

    def __init__(self, answers: Answers, body: CompletionBody, response_id: str, echoes: Sequence[str]) -> None:
        self.id = response_id
        self.created = int(time.time())
        self.usage = UsedTokens()
        self._answers = answers
        self._body = body
        self._echoes = echoes
        self._logprobs = [LogprobsWriter() for _ in range(len(body.prompts) * body.n)]

    @property
    def ended(self) -> bool:
        """Whether the last step has been given."""
        return self._answers.ended

    def cancel(self) -> None:
        """Ask for the end."""
        self._answers.cancel()

    async def aclose(self) -> None:
        """Stop listening; what has not ended is cancelled."""
        await self._answers.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> CompletionStep:
        index, event = await anext(self._answers)
        if isinstance(event, End):
            self._count(index, event)
        return self._step(index, event)

    def _step(self, index: int, event: InferenceEvent) -> CompletionStep:
        body, logprobs = self._body, self._logprobs[index]
        wanted = body.logprobs is not None
        match event:
            # The prompt's text comes with its log-probabilities, where those come too.
            case Started() if body.echo and not wanted:
                return CompletionStep(index=index, event=event, text=self._echoes[index // body.n])
            case PromptLogprobs() if body.echo:
                text = self._echoes[index // body.n]
                told = logprobs.prompt(event.logprobs, text)
                return CompletionStep(index=index, event=event, text=text, logprobs=told)
            case Token() if body.max_tokens != 0:
                tokens = logprobs.tokens(event.logprobs) if wanted and event.logprobs else None
                return CompletionStep(index=index, event=event, text=event.t, logprobs=tokens)
            case _:
                return CompletionStep(index=index, event=event)

    def _count(self, index: int, end: End) -> None:
        self.usage.add(end, first=index % self._body.n == 0)
        if self._body.max_tokens == 0:
            self.usage.completion_tokens = 0

    def finish_reason(self, end: End) -> FinishReason:
        """Why a choice ended."""
        return "length" if self._body.max_tokens == 0 else finish_reason(end)


def begin_completion(worker: Worker, body: CompletionBody, client: str) -> CompletionReply:
    """Submit a completion's jobs, all or none.

    Raises:
        RbeeError: as :meth:`~rbee_worker.worker.worker.Worker.submit`.
    """
    response_id = new_id("cmpl")
    requests = list(_requests(body, client, response_id))
    echoes = [_text(worker, prompt) for prompt in body.prompts] if body.echo else []
    return CompletionReply(Answers(worker, worker.submit_all(requests)), body, response_id, echoes)


def _requests(body: CompletionBody, client: str, response_id: str) -> Iterator[GenerationRequest]:
    ids = choice_ids(response_id)
    for prompt in body.prompts:
        for choice in range(body.n):
            sampling = body.sampling(
                # An answer of no tokens is one of a single token that is not told.
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


class CompletionChunks:
    """Writes the steps of a reply as the chunks of a stream."""

    def __init__(self, reply: CompletionReply, body: CompletionBody, model: str) -> None:
        self._reply = reply
        self._body = body
        self._model = model

    def __call__(self, step: CompletionStep) -> list[CompletionChunk]:
        """The chunks of one step."""
        event = step.event
        if isinstance(event, PromptProgress):
            if step.index > 0:
                return []
            chunk = self._chunk([_choice(step)])
            chunk["prompt_progress"] = prompt_figures(event)
            return [chunk]
        if not isinstance(event, End):
            return [self._chunk([_choice(step)])] if step.text or step.logprobs else []
        chunks = [self._chunk([_choice(step, self._reply.finish_reason(event))])]
        if self._reply.ended and self._body.include_usage:
            chunks.append(self._chunk([], self._reply.usage.to_dict()))
        return chunks

    def _chunk(self, choices: list[CompletionChoice], usage: Usage | None = None) -> CompletionChunk:
        chunk: CompletionChunk = {
            "id": self._reply.id,
            "object": "text_completion",
            "created": self._reply.created,
            "model": self._model,
            "choices": choices,
        }
        if self._body.include_usage:
            chunk["usage"] = usage
        return chunk


def _choice(step: CompletionStep, finish: FinishReason | None = None) -> CompletionChoice:
    return {"index": step.index, "text": step.text, "logprobs": step.logprobs, "finish_reason": finish}


@dataclass(slots=True)
class _Choice:
    text: list[str] = field(default_factory=list)
    logprobs: list[CompletionLogprobs] = field(default_factory=list)
    finish: FinishReason | None = None


async def whole_completion(reply: CompletionReply, body: CompletionBody, model: str) -> Completion:
    """The response to a completion that is not streamed.

    Raises:
        RbeeError: an answer failed.
    """
    choices = [_Choice() for _ in range(len(body.prompts) * body.n)]
    async for step in reply:
        choice = choices[step.index]
        choice.text.append(step.text)
        if step.logprobs is not None:
            choice.logprobs.append(step.logprobs)
        if isinstance(step.event, End):
            choice.finish = reply.finish_reason(step.event)
    wanted = body.logprobs is not None
    return {
        "id": reply.id,
        "object": "text_completion",
        "created": reply.created,
        "model": model,
        "choices": [
            {
                "index": index,
                "text": "".join(choice.text),
                "logprobs": joined(choice.logprobs) if wanted else None,
                "finish_reason": choice.finish,
            }
            for index, choice in enumerate(choices)
        ],
        "usage": reply.usage.to_dict(),
    }
