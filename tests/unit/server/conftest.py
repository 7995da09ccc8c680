"""A worker that only stands in for the real one, and a real uvicorn on a real loopback socket around it."""

import asyncio
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import h11
import pytest

from rbee_worker.config import AS_CONFIGURED, ServerConfig
from rbee_worker.errors import Unavailable
from rbee_worker.events import End, InferenceEvent, LoadCancelled, LoadingEvent, Started, Token
from rbee_worker.runtime.engine.stats import EngineStats
from rbee_worker.runtime.machine.devices import DeviceInfo
from rbee_worker.server.app import create_app
from rbee_worker.server.http.listen import listen
from rbee_worker.server.http.protocol import SPARE_CONNECTIONS, ConnectionLimits
from rbee_worker.server.http.tls import certificate
from rbee_worker.server.run import Server, http_config

SECONDS = 10.0


def token(i, text="x"):
    return Token(t=text, i=i)


def end(reason="max_tokens", tokens=1):
    return End(
        tokens_out=tokens,
        decode_time_ms=1,
        stop_reason=reason,
        prompt_tokens=1,
        cached_tokens=0,
        prefill_time_ms=1,
        tokens_per_second=1.0,
    )


def started(job_id="job"):
    return Started(job_id=job_id, model="m", started_at="2026-11-22T06:00:00.000Z", prompt_tokens=1, seed=7)


class StandInTokenizer:
    """Stands in for a tokenizer: one id per character."""

    vocab_size = 256

    def __init__(self):
        self.threads = []

    def encode(self, text, *, add_special_tokens):
        self.threads.append(threading.current_thread())
        return ([1] if add_special_tokens else []) + [ord(c) for c in text]

    def decode(self, ids, *, skip_special_tokens):
        self.threads.append(threading.current_thread())
        return "".join(map(chr, ids)) + ("" if skip_special_tokens else "!")


class StandInJobs:
    """Stands in for ``worker.jobs``."""

    def __init__(self):
        self.running = self.queued = 0
        self.observers = []

    def __len__(self):
        return self.running + self.queued


class StandInLoads:
    """Stands in for ``worker.loads``: plays a script as the progress of a load."""

    def __init__(self, play, progress, *, running):
        self.running = running
        self.error = self.latest = self.broadcast = None
        self.outcomes = Counter()
        self.asked = []
        self.watchers = 0
        self.cancelled = asyncio.Event()
        self._play = play
        self._script = progress

    def begin(self, model, settings=AS_CONFIGURED):
        self.asked.append((model, settings))
        return False

    def unload(self):
        return 5

    def cancel(self):
        self.cancelled.set()
        return self.running

    def progress(self):
        if self._script is None:
            raise Unavailable("No model was asked for.")
        return self._watch()

    async def _watch(self):
        self.watchers += 1
        end = LoadCancelled(seq=9, elapsed_seconds=1.0, vram_mb_freed=3)
        try:
            async for event in self._play(self._script, self.cancelled, end):
                yield event
        finally:
            self.watchers -= 1


class StandInWorker:
    """Stands in for ``rbee_worker.worker.worker.Worker``: plays scripts instead of running a model.

    A script is a list of events, of numbers (seconds to wait), of ``threading.Event`` (waited for), of exceptions
    (raised), and of ``HANG`` (waits for the cancellation, then ends with ``cancelled``).
    """

    HANG = object()

    def __init__(self, script=(), progress=None, state="ready"):
        self.id = "stand-in"
        self.state = state
        self.vram_bytes = 0
        self.uptime_seconds = 1.0
        model = SimpleNamespace(name="m", context_length=64)
        self.engine = SimpleNamespace(alive=True, model=model, stats=EngineStats())
        self.jobs = StandInJobs()
        self.loads = StandInLoads(self._play, progress, running=state == "loading")
        self.script = list(script)
        self.refusal = None  # raised by submit()
        self.requests = []
        self.cancelled = []
        self.calls = Counter()
        self.closed_sources = 0
        self.the_tokenizer = StandInTokenizer()
        self._cancellations = {}
        self.thread = None

    def start(self):
        self.calls["start"] += 1
        self.thread = threading.current_thread()

    async def close(self):
        self.calls["close"] += 1

    async def drain(self, grace):
        self.calls["drain"] += 1
        self.state = "draining"
        self.loads.cancel()
        deadline = time.monotonic() + grace
        while self._cancellations and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        for job_id in list(self._cancellations):
            self.cancel(job_id)

    def submit(self, request):
        self.requests.append(request)
        if self.refusal is not None:
            raise self.refusal
        job_id = request.job_id or f"job-{len(self.requests)}"
        cancelled = self._cancellations[job_id] = asyncio.Event()
        return SimpleNamespace(
            id=job_id,
            events=lambda: self._run(job_id, cancelled),
            cancel=lambda: self.cancel(job_id),
        )

    async def _run(self, job_id, cancelled):
        try:
            async for event in self._play(self.script, cancelled, end("cancelled")):
                yield event
        finally:
            self.closed_sources += 1
            self._cancellations.pop(job_id, None)

    async def _play(self, script, cancelled, last):
        for item in script:
            if isinstance(item, InferenceEvent | LoadingEvent):
                yield item
            elif isinstance(item, Exception):
                raise item
            elif item is self.HANG:
                await cancelled.wait()
                yield last
                return
            elif isinstance(item, threading.Event):
                await asyncio.to_thread(item.wait, SECONDS)
            else:
                await asyncio.sleep(item)

    def cancel(self, job_id):
        self.cancelled.append(job_id)
        if (event := self._cancellations.get(job_id)) is not None:
            event.set()

    @property
    def serves(self):
        return self.state == "ready" and self.engine.alive

    def retry_after(self):
        return 7

    def tokenizer(self):
        return self.the_tokenizer

    def memory(self):
        return [DeviceInfo("cpu", "CPU", 100, 60, 40)]


@dataclass
class Reply:
    """A response read to its end."""

    status: int
    headers: dict
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def frames(self):
        assert self.body.endswith(b"\n\n")
        return self.body[:-2].split(b"\n\n")


@dataclass
class Exchange:
    """One request on a socket of its own, its response read as it comes."""

    sock: socket.socket
    http: h11.Connection
    body: bytes = b""
    status: int = 0
    headers: dict = field(default_factory=dict)
    complete: bool = False

    def read_more(self):
        """Bytes of the body, or b"" once the response is complete."""
        while True:
            event = self.http.next_event()
            if event is h11.NEED_DATA:
                self.http.receive_data(self.sock.recv(65536))
            elif isinstance(event, h11.Response):
                self.status = event.status_code
                self.headers = {k.decode(): v.decode() for k, v in event.headers}
            elif isinstance(event, h11.Data):
                self.body += event.data
                return bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                self.complete = True
                return b""

    def read_until(self, marker):
        while marker not in self.body:
            assert self.read_more(), f"the response ended without {marker!r}: {self.body!r}"
        return self.body

    def finish(self):
        while not self.complete:
            self.read_more()
        self.sock.close()
        return Reply(self.status, self.headers, self.body)

    def leave(self):
        self.sock.close()


class Running:
    """A server in a thread; ``worker`` is what stands behind it."""

    def __init__(self, worker, config, first_load=None, spare=SPARE_CONNECTIONS, **app_options):
        self.worker = worker
        self.sockets = listen(config)
        self.port = self.sockets[0].getsockname()[1]
        app = create_app(worker, config, **app_options)
        limits = ConnectionLimits(config.max_connections, config.header_seconds, spare)
        http = http_config(app, config, limits, certificate(config))
        self.server = Server(http, worker, config, streams=app.state.streams, first_load=first_load)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": self.sockets})
        self.thread.start()
        self.wait(lambda: self.server.started)

    def wait(self, condition):
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.005)

    def stop(self):
        self.server.should_exit = True
        self.thread.join(SECONDS)
        assert not self.thread.is_alive()

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS)

    def open(self, method, path, body=None, headers=()):
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        sent = {"Host": f"127.0.0.1:{self.port}", "Content-Length": str(len(data)), **dict(headers)}
        sock = self.connect()
        http = h11.Connection(h11.CLIENT)
        raw = http.send(h11.Request(method=method, target=path, headers=list(sent.items())))
        raw += http.send(h11.Data(data=data)) + http.send(h11.EndOfMessage())
        sock.sendall(raw)
        return Exchange(sock, http)

    def ask(self, method, path, body=None, headers=()):
        return self.open(method, path, body, headers).finish()

    def raw(self, request):
        """Every byte that answers ``request``, which asks for the connection to be closed."""
        with self.connect() as sock:
            sock.sendall(request)
            out = b""
            while data := sock.recv(65536):
                out += data
        return out


@pytest.fixture(scope="package", autouse=True)
def _uvicorn_looks_often() -> Iterator[None]:
    """uvicorn looks every 0.1 s whether it is to end, and pauses as long at its end: every test here ends a server."""
    often = ModuleType("asyncio")
    vars(often).update(vars(asyncio), sleep=lambda seconds: asyncio.sleep(seconds / 10))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("uvicorn.server.asyncio", often)
        yield


@pytest.fixture
def stand_in():
    """The class of stand-in workers, with the makers of their events."""
    return SimpleNamespace(Worker=StandInWorker, token=token, end=end, started=started, HANG=StandInWorker.HANG)


@pytest.fixture
def start():
    """Starts servers: ``start(worker, **fields of ServerConfig)``."""
    running = []

    def begin(worker=None, *, app_options=None, first_load=None, spare=SPARE_CONNECTIONS, **config):
        worker = worker or StandInWorker([started(), token(0), end()])
        options = {"port": 0, "keep_alive_seconds": 0.0, **config}
        running.append(Running(worker, ServerConfig(**options), first_load, spare, **(app_options or {})))
        return running[-1]

    yield begin
    for server in running:
        server.stop()
