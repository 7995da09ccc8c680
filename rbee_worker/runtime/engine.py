"""Engine: a model, the sequences running on it, and the loop that moves them one step.

Not thread-safe: one thread loads, submits and steps. Only :meth:`Engine.cancel` may be called from another.
"""

import secrets
import threading
import uuid
from collections import deque
from collections.abc import Generator, Iterator

import torch

from rbee_worker.config import EngineConfig, GenerationRequest, Message
from rbee_worker.errors import Conflict, ContextTooLong, FieldError, InferenceError, InvalidRequest, ModelNotLoaded
from rbee_worker.events import InferenceEvent, LoadingEvent, Ready
from rbee_worker.runtime.loading import LoadedModel, load_model, release_memory
from rbee_worker.runtime.scheduler import Scheduled, Scheduler
from rbee_worker.runtime.sequence import Sequence
from rbee_worker.runtime.transformer import Batch, Segment

JobEvents = list[tuple[str, InferenceEvent]]
"""Events of one step, each with the id of its job, in order."""


class Engine:
    """Loads a model and generates text.

    Attributes:
        config: device, dtype, context and batch limits.
        model: the loaded model; None before the first load and after :meth:`unload`.
    """

    def __init__(self, config: EngineConfig | None = None) -> None:
        self.config = config or EngineConfig()
        self.model: LoadedModel | None = None
        self._scheduler = Scheduler(self.config.max_batch_size, self.config.prefill_chunk)
        self._sequences: dict[str, Sequence] = {}
        self._followed: dict[str, deque[InferenceEvent]] = {}
        self._undelivered: JobEvents = []

    def load(self, model: str | None, cancel: threading.Event | None = None) -> Iterator[LoadingEvent]:
        """Load a model and make it the one that runs; see :func:`rbee_worker.runtime.loading.load_model`.

        A model loaded before is replaced once the new one is ready, and stays when the load fails or is cancelled.

        Raises:
            Conflict: at the call, while jobs run.
            RbeeError: after the terminal ``error`` event.
        """
        self._refuse_while_busy()
        loading = load_model(model, self.config, cancel or threading.Event())
        return self._install_when_done(loading)

    def install(self, model: LoadedModel) -> None:
        """Make a loaded model the one that runs.

        Raises:
            Conflict: jobs still run on the one before.
        """
        self._refuse_while_busy()
        self.model = model

    def unload(self) -> int:
        """Drop the model; what still runs on it ends with an ``error`` event.

        Returns:
            Bytes of weights freed.
        """
        for sequence in self._sequences.values():
            self._deliver([(sequence.job_id, sequence.fail(InferenceError.code, "The model was unloaded."))])
        self._retire()
        model, self.model = self.model, None
        if model is None:
            return 0
        freed = model.nbytes
        del model
        release_memory()
        return freed

    def generate(self, request: GenerationRequest) -> Iterator[InferenceEvent]:
        """Run one job to its end; closing the iterator cancels it. Several may be iterated in turn.

        Raises:
            InvalidRequest, ContextTooLong, ModelNotLoaded: at the call, before anything is generated.
            Conflict: at the first event, when the job id runs already.
        """
        return self._follow(prepare(self.model, request))

    def submit(self, request: GenerationRequest) -> Sequence:
        """Queue a job for :meth:`step`.

        Raises:
            InvalidRequest: no prompt, or the chat template refuses the messages.
            ContextTooLong: the prompt leaves no room for a token.
            ModelNotLoaded: there is no model.
            Conflict: the job id runs already.
        """
        sequence = prepare(self.model, request)
        self.add(sequence)
        return sequence

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence prepared for the model that runs.

        Raises:
            Conflict: its job id runs already.
        """
        if sequence.job_id in self._sequences:
            raise Conflict(f"Job {sequence.job_id} is running already.")
        self._sequences[sequence.job_id] = sequence
        self._scheduler.add(sequence)

    def cancel(self, job_id: str) -> None:
        """End a job at the next step; unknown and finished jobs are ignored. Any thread may call this."""
        sequence = self._sequences.get(job_id)
        if sequence is not None:
            sequence.cancelled = True

    @property
    def running(self) -> int:
        """Sequences that have a place in the batch."""
        return len(self._scheduler.running)

    @property
    def waiting(self) -> int:
        """Sequences that wait for one."""
        return len(self._scheduler.waiting)

    @property
    def has_work(self) -> bool:
        """Whether :meth:`step` has anything to do."""
        return bool(self._sequences or self._undelivered)

    def step(self) -> JobEvents:
        """Move the running sequences: admit, one forward pass, sample, and tell.

        A failing forward pass ends every running sequence with an ``error`` event, a failing sampler its own; the
        engine goes on. Events of jobs that :meth:`generate` iterates go there.
        """
        self._undelivered, events = [], self._undelivered
        for sequence in self._scheduler.take_cancelled():
            events.extend((sequence.job_id, event) for event in sequence.cancel())
        try:
            self._admit(events)
            self._run(events)
        except Exception as error:  # noqa: BLE001  (whatever a pass raises fails its jobs, not the worker)
            self._fail(error, events)
        self._retire()
        return [item for item in events if not self._is_followed(*item)]

    def _refuse_while_busy(self) -> None:
        if self._sequences:
            raise Conflict(f"{len(self._sequences)} jobs still run on the model before.")

    def _admit(self, events: JobEvents) -> None:
        model = self.model
        if model is None:
            raise ModelNotLoaded("Model not loaded")
        for sequence in self._scheduler.admit():
            events.append((sequence.job_id, sequence.admit(model.name, model.transformer.new_cache())))

    def _run(self, events: JobEvents) -> None:
        shares = self._scheduler.schedule()
        if not shares or self.model is None:
            return
        transformer = self.model.transformer
        logits = transformer.forward(_batch(shares, transformer.device))
        for row, share in enumerate(shares):
            sequence = share.sequence
            sequence.computed += share.count
            if sequence.pending:
                continue
            try:
                for event in sequence.append(sequence.sampler.sample(logits[row])):
                    events.append((sequence.job_id, event))
            except Exception as error:  # noqa: BLE001  (the others' tokens are not lost with it)
                events.append((sequence.job_id, sequence.fail(InferenceError.code, f"Sampling failed: {error}")))

    def _fail(self, error: Exception, events: JobEvents) -> None:
        failed = [sequence for sequence in self._scheduler.running if not sequence.finished]
        if self.model is None:
            failed.extend(self._scheduler.waiting)
        message = str(error) if isinstance(error, InferenceError) else f"A step failed: {error}"
        events.extend((sequence.job_id, sequence.fail(InferenceError.code, message)) for sequence in failed)

    def _retire(self) -> None:
        for sequence in [sequence for sequence in self._sequences.values() if sequence.finished]:
            self._scheduler.remove(sequence)
            del self._sequences[sequence.job_id]

    def _is_followed(self, job_id: str, event: InferenceEvent) -> bool:
        """Give the event to the iterator of its job, when it has one."""
        inbox = self._followed.get(job_id)
        if inbox is not None:
            inbox.append(event)
        return inbox is not None

    def _deliver(self, events: JobEvents) -> None:
        """Keep for the next :meth:`step` what no iterator of :meth:`generate` takes."""
        self._undelivered.extend(item for item in events if not self._is_followed(*item))

    def _follow(self, sequence: Sequence) -> Iterator[InferenceEvent]:
        self.add(sequence)
        inbox = self._followed[sequence.job_id] = deque()
        try:
            while True:
                while inbox:
                    event = inbox.popleft()
                    yield event
                    if event.terminal:
                        return
                self._undelivered = self.step()
        finally:
            del self._followed[sequence.job_id]
            if not sequence.finished:
                sequence.cancelled = True
                self._undelivered = [item for item in self.step() if item[0] != sequence.job_id]

    def _install_when_done(
        self, loading: Generator[LoadingEvent, None, LoadedModel | None]
    ) -> Generator[LoadingEvent, None, None]:
        """The events of a load, with the model in its place before ``ready`` is told."""
        ready: Ready | None = None
        try:
            while True:
                event = next(loading)
                if isinstance(event, Ready):
                    ready = event
                else:
                    yield event
        except StopIteration as stop:
            if stop.value is not None and ready is not None:
                self.install(stop.value)
                yield ready
        finally:
            loading.close()


def prepare(model: LoadedModel | None, request: GenerationRequest) -> Sequence:
    """Check a request and tokenize it. Touches no weights, so that any thread may do it.

    Raises:
        InvalidRequest, ContextTooLong, ModelNotLoaded: as :meth:`Engine.submit`.
    """
    if model is None:
        raise ModelNotLoaded("Model not loaded", hint="Load one first.", retry_after=1)
    prompt = _prompt_ids(model, request)
    longest = model.context_length - 1
    if len(prompt) > longest:
        problem = f"The prompt has {len(prompt)} tokens; the context holds {model.context_length} with the answer."
        raise ContextTooLong(problem, fields=[FieldError(_prompt_field(request), f"at most {longest} tokens", problem)])
    params = request.sampling
    return Sequence(
        request.job_id or str(uuid.uuid4()),
        prompt,
        params,
        params.seed if params.seed is not None else secrets.randbits(32),
        model.tokenizer,
        context_length=model.context_length,
        vocab_size=model.config.vocab_size,
    )


def _prompt_ids(model: LoadedModel, request: GenerationRequest) -> list[int]:
    tokenizer, messages = model.tokenizer, request.messages
    if (request.prompt is None) == (messages is None):
        raise InvalidRequest("Give either a prompt or messages.")
    if request.prompt == "":
        problem = "The prompt is empty."
        raise InvalidRequest(problem, fields=[FieldError("prompt", "at least 1 character", problem)])
    if request.prompt is not None and not request.raw and tokenizer.has_chat_template:
        messages = (Message(role="user", content=request.prompt),)
    if messages is not None:
        ids = tokenizer.encode(tokenizer.render_chat(messages), add_special_tokens=False)
    else:
        ids = tokenizer.encode(request.prompt or "")
    if not ids:
        problem = "The prompt has no tokens."
        raise InvalidRequest(problem, fields=[FieldError(_prompt_field(request), "at least 1 token", problem)])
    if max(ids) >= model.config.vocab_size:
        problem = f"The prompt has token {max(ids)}; the model knows {model.config.vocab_size}."
        constraint = f"tokens below {model.config.vocab_size}"
        raise InvalidRequest(problem, fields=[FieldError(_prompt_field(request), constraint, problem)])
    return ids


def _prompt_field(request: GenerationRequest) -> str:
    return "prompt" if request.messages is None else "messages"


def _batch(shares: list[Scheduled], device: torch.device) -> Batch:
    """The pending tokens of all shares, side by side."""
    tokens: list[int] = []
    positions: list[int] = []
    segments = []
    for share in shares:
        sequence = share.sequence
        assert sequence.cache is not None  # noqa: S101  (running sequences have one)
        begin, end = sequence.computed, sequence.computed + share.count
        segments.append(Segment(sequence.cache, len(tokens), share.count))
        tokens.extend(sequence.tokens[begin:end])
        positions.extend(range(begin, end))
    return Batch(torch.tensor(tokens, device=device), torch.tensor(positions, device=device), segments)
