"""A stand-in for a worker: a real HTTP server on a real socket that answers from a script."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from rbee_worker.events import Event, to_json

DONE = "data: [DONE]\n\n"
HANG = 10.0


@dataclass
class Call:
    """One request that came in."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any


@dataclass
class FakeWorker:
    """Answers ``METHOD /path`` by the function under that key, which writes the whole answer."""

    answers: dict[str, Callable[[BaseHTTPRequestHandler], None]] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    addr: str = ""

    def asked(self) -> list[str]:
        return [f"{call.method} {call.path}" for call in self.calls]


def frames(*events: Event, done: bool = True) -> str:
    return "".join(f"data: {to_json(event)}\n\n" for event in events) + (DONE if done else "")


def stream(
    *parts: str, status: int = 200, gate: threading.Semaphore | None = None, cut: bool = False
) -> Callable[..., None]:
    """An SSE answer in chunks, each of which waits at ``gate``; ``cut``: the connection ends without the last chunk."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Type", "text/event-stream")
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for part in parts:
            if gate is not None and not gate.acquire(timeout=HANG):
                raise ConnectionResetError
            data = part.encode()
            handler.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
            handler.wfile.flush()
        if not cut:
            handler.wfile.write(b"0\r\n\r\n")
        handler.close_connection = True

    return answer


def answer(status: int, body: Any = None, **headers: str) -> Callable[..., None]:
    """A JSON answer, or text when ``body`` is a string."""

    def send(handler: BaseHTTPRequestHandler) -> None:
        data = b"" if body is None else (body if isinstance(body, str) else json.dumps(body)).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "text/html" if isinstance(body, str) else "application/json")
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    return send


def refused(status: int, code: str, message: str, **headers: str) -> Callable[..., None]:
    """The error envelope."""
    return answer(status, {"error": {"message": message, "type": "x", "param": None, "code": code}}, **headers)


@contextmanager
def running() -> Iterator[FakeWorker]:
    """A fake worker that listens; ``answers`` may be filled at any time."""
    fake = FakeWorker()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _any(self) -> None:
            length = int(self.headers.get("Content-Length", "0"))
            body = json.loads(self.rfile.read(length)) if length else None
            fake.calls.append(Call(self.command, self.path, dict(self.headers), body))
            key = f"{self.command} {self.path}"
            found = fake.answers.get(key) or fake.answers.get(f"{self.command} *")
            try:
                (found or refused(404, "NOT_FOUND", f"no route {key}"))(self)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        do_GET = do_POST = do_DELETE = _any  # noqa: N815 - http.server's names

        def log_message(self, *_: object) -> None:
            """Tests print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    fake.addr = f"127.0.0.1:{server.server_address[1]}"
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
