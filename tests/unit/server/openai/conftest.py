"""A worker whose jobs have happened already, and a tokenizer with a chat template."""

import asyncio
import json
import time
from collections import Counter
from dataclasses import replace

import pytest

from rbee_worker.events import End, Started, Token, TokenLogprob
from rbee_worker.runtime.tokenizer.chat_template import ChatTemplate
from rbee_worker.runtime.tokenizer.tokenizer import Tokenizer
from rbee_worker.worker.job import Job
from tests.tiny import CHAT_TEMPLATE, byte_tokenizer


def end(reason="eos", tokens=2, cached=0, prompt=5):
    return End(
        tokens_out=tokens,
        decode_time_ms=1,
        stop_reason=reason,
        prompt_tokens=prompt,
        cached_tokens=cached,
        prefill_time_ms=1,
        tokens_per_second=1.0,
    )


def started():
    return Started(job_id="j", model="m", started_at="2026-11-22T06:00:00.000Z", prompt_tokens=5, seed=7)


def logprob(text, value=-0.5, *top):
    return TokenLogprob(id=1, token=text, bytes=tuple(text.encode()), logprob=value, top=top)


def texts(*pieces, reason="eos"):
    """The events of a job that says ``pieces``."""
    tokens = [Token(t=piece, i=i, logprobs=(logprob(piece),)) for i, piece in enumerate(pieces)]
    return [started(), *tokens, end(reason, len(pieces))]


class ScriptedWorker:
    """Stands in for a worker: each job is one of ``scripts``, over and over."""

    def __init__(self, *scripts, template=CHAT_TEMPLATE, special_tokens=()):
        self.scripts = scripts
        self.state = "ready"
        self.requests = []
        self.cancelled = []
        compiled = ChatTemplate(template, {}) if template is not None else None
        backend = byte_tokenizer()
        backend.add_special_tokens(list(special_tokens))
        self.the_tokenizer = Tokenizer(backend, eos_ids=frozenset(), template=compiled)

    def tokenizer(self):
        return self.the_tokenizer

    def submit_all(self, requests):
        self.requests += requests
        jobs = [Job(request.job_id, self.cancelled.append, request) for request in requests]
        for index, job in enumerate(jobs):
            for event in self.scripts[index % len(self.scripts)]:
                untold = isinstance(event, Token) and job.request.sampling.logprobs is None
                job.put(replace(event, logprobs=None) if untold else event, time.monotonic())
            job.ended = None  # to its reader the end is still to come
        return jobs

    def prompt(self):
        """The text of the first request's prompt."""
        return self.the_tokenizer.decode(self.requests[0].prompt_ids, skip_special_tokens=False)


async def objects(frames):
    """What the frames of a stream hold."""
    return [json.loads(frame.split(b"data: ", 1)[1]) async for frame in frames]


@pytest.fixture
def worker_of(stand_in):
    """Makes workers whose jobs play a script: events, seconds to wait, and HANG, which waits to be cancelled."""

    class LiveWorker(stand_in.Worker):
        def __init__(self, *scripts):
            super().__init__()
            self.scripts = scripts
            self.the_tokenizer = ScriptedWorker().the_tokenizer
            self.ended = Counter()

        def submit_all(self, requests):
            if self.refusal is not None:
                raise self.refusal
            self.requests += requests
            jobs = [Job(request.job_id, self.cancel, request) for request in requests]
            for index, job in enumerate(jobs):
                self._cancellations[job.id] = asyncio.Event()
                self._playing = asyncio.ensure_future(self.play(job, self.scripts[index % len(self.scripts)]))
            return jobs

        async def play(self, job, script):
            self.jobs.running += 1
            async for event in self._play(script, self._cancellations[job.id], end("cancelled")):
                job.put(event, time.monotonic())
            self.jobs.running -= 1

    return LiveWorker
