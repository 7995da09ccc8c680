"""Sequence: one job on its way through the engine."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from enum import Enum, auto

from rbee_worker.config import SamplingParams
from rbee_worker.events import End, InferenceEvent, InferenceFailed, Started, StopReason, Token
from rbee_worker.runtime.kv_cache import SequenceCache
from rbee_worker.runtime.sampler import Sampler
from rbee_worker.runtime.stop import StopMatcher
from rbee_worker.runtime.tokenizer import StreamingDetokenizer, Tokenizer


class State(Enum):
    """Where a sequence stands."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class Sequence:
    """Tokens, text and timing of one job, and the events that tell of them.

    Attributes:
        job_id: unique among running jobs.
        tokens: prompt and generated token ids.
        prompt_tokens: how many of them are the prompt.
        computed: tokens whose keys and values are cached.
        cache: None while waiting and when finished.
        cancelled: set from any thread; taken up before the next step.
    """

    def __init__(
        self,
        job_id: str,
        prompt: list[int],
        params: SamplingParams,
        seed: int,
        tokenizer: Tokenizer,
        *,
        context_length: int,
        vocab_size: int,
    ) -> None:
        self.job_id = job_id
        self.tokens = list(prompt)
        self.prompt_tokens = len(prompt)
        self.params = params
        self.seed = seed
        self.computed = 0
        self.state = State.WAITING
        self.cache: SequenceCache | None = None
        self.cancelled = False
        self._context_length = context_length
        self._eos_ids = frozenset() if params.ignore_eos else tokenizer.eos_ids
        self.sampler = Sampler(params, seed, prompt, vocab_size)
        self._detokenizer = StreamingDetokenizer(tokenizer, prompt)
        self._stop = StopMatcher(params.stop)
        self._texts = 0
        self._tokens_out = 0
        self._admitted_at = self._first_at = self._last_at = 0.0

    @property
    def pending(self) -> int:
        """Tokens that the model has yet to see before it can predict the next one."""
        return len(self.tokens) - self.computed

    @property
    def finished(self) -> bool:
        """Whether its terminal event has been made."""
        return self.state is State.FINISHED

    def admit(self, model: str, cache: SequenceCache) -> Started:
        """Take its place in the batch."""
        self.state = State.RUNNING
        self.cache = cache
        self._admitted_at = time.monotonic()
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return Started(
            job_id=self.job_id, model=model, started_at=now, prompt_tokens=self.prompt_tokens, seed=self.seed
        )

    def append(self, token: int) -> Iterator[InferenceEvent]:
        """Take a generated token: the text it completes, and the end when it is one."""
        self._last_at = time.monotonic()
        if not self._first_at:
            self._first_at = self._last_at
        if token in self._eos_ids:
            yield from self._finish("eos")
            return
        self.tokens.append(token)
        self._tokens_out += 1
        yield from self._text(self._stop.push(self._detokenizer.push(token)))
        if self._stop.matched is not None:
            yield self._end("stop_sequence")
        elif self._tokens_out == self.params.max_tokens:
            yield from self._finish("max_tokens")
        elif len(self.tokens) >= self._context_length:
            yield from self._finish("context_full")

    def cancel(self) -> Iterator[InferenceEvent]:
        """End it here; what was held back still belongs to the text."""
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
        yield from self._text(self._stop.flush())
        yield self._end(reason)

    def _text(self, text: str) -> Iterator[Token]:
        if text:
            yield Token(t=text, i=self._texts)
            self._texts += 1

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
            cached_tokens=0,
            prefill_time_ms=round(prefill * 1000),
            tokens_per_second=round(later_tokens / decode, 2) if decode > 0 else 0.0,
        )

    def _close(self) -> None:
        self.state = State.FINISHED
        self.cache = None
