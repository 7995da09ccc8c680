"""Sequence: one job on its way through the engine."""

import math
import time
from collections.abc import Iterator
from datetime import UTC, datetime

from rbee_worker.config import GenerationRequest
from rbee_worker.events import (
    End,
    InferenceEvent,
    InferenceFailed,
    PromptLogprobs,
    PromptProgress,
    Started,
    StopReason,
    Token,
    TokenLogprob,
)
from rbee_worker.runtime.cache.kv_cache import SequenceCache
from rbee_worker.runtime.engine.prompt_lookup import PromptLookup
from rbee_worker.runtime.engine.sampler import Likelihood, Sampled, Sampler
from rbee_worker.runtime.engine.stop import StopMatcher
from rbee_worker.runtime.grammar.compiler import GrammarMatcher
from rbee_worker.runtime.tokenizer.tokenizer import StreamingDetokenizer, Tokenizer


class Sequence:
    """The tokens, text and timing of one job, and the events made of them.

    Attributes:
        job_id: unique among running jobs.
        tokens: prompt and generated token ids.
        prompt_tokens: how many of them are the prompt.
        cache: None while waiting and when finished.
        arrival: counts up from one sequence to the next.
        client: who asked.
        deadline: on the monotonic clock, when it must have ended.
        cancelled: may be set from any thread; the engine reads it before the next step.
        finished: its terminal event has been made.
    """

    def __init__(
        self,
        job_id: str,
        prompt: list[int],
        request: GenerationRequest,
        seed: int,
        tokenizer: Tokenizer,
        *,
        context_length: int,
        grammar: GrammarMatcher | None = None,
        speculate: int = 0,
    ) -> None:
        params = request.sampling
        self.job_id = job_id
        self.tokens = list(prompt)
        self.prompt_tokens = len(prompt)
        self.params = params
        self.seed = seed
        self.finished = False
        self.cache: SequenceCache | None = None
        self.arrival = 0
        self.client = request.client
        self.deadline = math.inf if request.timeout_seconds is None else time.monotonic() + request.timeout_seconds
        self.cancelled = False
        self._tokenizer = tokenizer
        self._context_length = context_length
        # When the text of a grammar is complete, only an end token can follow: ignore_eos would never end.
        endless = params.ignore_eos and grammar is None
        self._eos_ids = frozenset() if endless else tokenizer.eos_ids
        self.sampler = Sampler(params, seed, prompt, grammar)
        self._lookup = PromptLookup(speculate) if speculate else None
        self._detokenizer = StreamingDetokenizer(tokenizer, prompt, skip_special_tokens=params.skip_special_tokens)
        self._stop = StopMatcher(params.stop)
        self._tells_progress = request.prompt_progress
        self._prompt_logprobs: list[TokenLogprob] | None = [] if params.prompt_logprobs is not None else None
        self._logprobs: list[TokenLogprob] = []
        self._texts = 0
        self._tokens_out = 0
        self._cached_tokens = 0
        self._admitted_at = self._first_at = self._last_at = 0.0

    @property
    def computed(self) -> int:
        """Tokens whose keys and values are cached."""
        return self.cache.length if self.cache is not None else 0

    @property
    def pending(self) -> int:
        """Tokens that must be computed before the next token can be predicted."""
        return len(self.tokens) - self.computed

    @property
    def shares_prefix(self) -> bool:
        """Whether it may reuse a cached prefix. It may not when the logits of its whole prompt are wanted."""
        return self._prompt_logprobs is None

    @property
    def tokens_left(self) -> int:
        """How many more tokens it may generate."""
        left = self._context_length - len(self.tokens)
        return left if self.params.max_tokens is None else min(left, self.params.max_tokens - self._tokens_out)

    def prompt_outputs(self, count: int) -> int:
        """For how many of its next ``count`` tokens the logits are wanted."""
        inside = self._prompt_logprobs is not None and self.computed < self.prompt_tokens
        return count if inside else 1

    def draft(self) -> tuple[int, ...]:
        """Drafts of the next tokens; empty without speculation."""
        if self._lookup is None:
            return ()
        return self._lookup.draft(self.tokens)[: max(self.tokens_left - 1, 0)]

    def admit(self, model: str, cache: SequenceCache) -> Iterator[Started]:
        """Take a place in the batch. The first time, ``started`` is emitted."""
        self.cache = cache
        if self._prompt_logprobs is not None:
            self._prompt_logprobs.clear()
        if self._admitted_at:
            return
        self._admitted_at = time.monotonic()
        self._cached_tokens = cache.reused
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        yield Started(job_id=self.job_id, model=model, started_at=now, prompt_tokens=self.prompt_tokens, seed=self.seed)

    def preempt(self) -> None:
        """Lose its place and its cache. It starts again later with the tokens it has so far."""
        self._release()

    def progress(self) -> Iterator[InferenceEvent]:
        """How much of the prompt is prefilled, after a step that computed a part of it."""
        if self._tells_progress and not self._tokens_out:
            yield PromptProgress(
                total=self.prompt_tokens,
                cached=self._cached_tokens,
                processed=min(self.computed, self.prompt_tokens),
                elapsed_ms=round((time.monotonic() - self._admitted_at) * 1000),
            )

    def prompt_targets(self, count: int) -> list[int]:
        """The prompt tokens that the logits of the next ``count`` tokens predict; empty unless they are wanted."""
        if self._prompt_logprobs is None:
            return []
        return self.tokens[self.computed + 1 : min(self.computed + count + 1, self.prompt_tokens)]

    def take_prompt_likelihoods(self, likelihoods: list[Likelihood]) -> Iterator[PromptLogprobs]:
        """Take the likelihoods of the prompt's next tokens. They are emitted when all are there."""
        told = self._prompt_logprobs
        if told is None:
            return
        # They are converted as they come. All at once, after a long prompt, would delay other sequences by seconds.
        if not told:
            told.append(self._logprob(self.tokens[0], None))
        told += map(self._logprob, self.tokens[len(told) : len(told) + len(likelihoods)], likelihoods)
        if len(told) < self.prompt_tokens:
            return
        yield PromptLogprobs(logprobs=tuple(told))
        self._prompt_logprobs = None

    def append(self, sampled: Sampled) -> Iterator[InferenceEvent]:
        """Take a generated token: the text it completes, and the end when it is one."""
        token = sampled.token
        self.sampler.accept(token)
        now = time.monotonic()
        if not self._first_at:
            self._first_at = self._last_at = now
        if token in self._eos_ids:
            yield from self._finish("eos")
            return
        self._last_at = now  # of those that are counted: the end token is not, so neither is its time
        self.tokens.append(token)
        self._tokens_out += 1
        if sampled.likelihood is not None:
            self._logprobs.append(self._logprob(token, sampled.likelihood))
        yield from self._text(self._stop.push(self._detokenizer.push(token)))
        if self._stop.matched is not None:
            yield self._end("stop_sequence")
        elif self.sampler.grammar is not None and self.sampler.grammar.finished:
            yield from self._finish("eos")
        elif self._tokens_out == self.params.max_tokens:
            yield from self._finish("max_tokens")
        elif len(self.tokens) >= self._context_length:
            yield from self._finish("context_full")

    def cancel(self) -> Iterator[InferenceEvent]:
        """End it now. Text that was held back is still emitted."""
        yield from self._finish("cancelled")

    def fail(self, code: str, message: str) -> InferenceFailed:
        """End it with an error."""
        self._close()
        return InferenceFailed(code=code, message=message)

    def _finish(self, reason: StopReason) -> Iterator[InferenceEvent]:
        yield from self._text(self._stop.push(self._detokenizer.flush()))
        if self._stop.matched is not None:
            yield self._end("stop_sequence")
            return
        yield from self._text(self._stop.flush(), last=True)
        yield self._end(reason)

    def _text(self, text: str, *, last: bool = False) -> Iterator[Token]:
        # The last tokens may make no text, and yet have been asked for.
        if text or (last and self._logprobs):
            told = self.params.logprobs is not None
            yield Token(t=text, i=self._texts, logprobs=tuple(self._logprobs) if told else None)
            self._logprobs.clear()
            self._texts += 1

    def _logprob(self, token: int, likelihood: Likelihood | None) -> TokenLogprob:
        text, data = self._tokenizer.token_text(token), tuple(self._tokenizer.token_bytes(token))
        if likelihood is None:
            return TokenLogprob(id=token, token=text, bytes=data, logprob=None)
        top = tuple(self._logprob(other, Likelihood(logprob)) for other, logprob in likelihood.top)
        return TokenLogprob(id=token, token=text, bytes=data, logprob=likelihood.logprob, top=top)

    def _end(self, reason: StopReason) -> End:
        self._close()
        decode = self._last_at - self._first_at
        later_tokens = max(self._tokens_out - 1, 0)
        prefill = self._first_at - self._admitted_at if self._first_at else 0.0
        return End(
            tokens_out=self._tokens_out,
            decode_time_ms=round(decode * 1000),
            stop_reason=reason,
            stop_sequence_matched=self._stop.matched if reason == "stop_sequence" else None,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self._cached_tokens,
            prefill_time_ms=round(prefill * 1000),
            tokens_per_second=round(later_tokens / decode, 2) if decode > 0 else 0.0,
        )

    def _close(self) -> None:
        self._release()
        self.finished = True

    def _release(self) -> None:
        cache, self.cache = self.cache, None
        if cache is not None:
            cache.release()
