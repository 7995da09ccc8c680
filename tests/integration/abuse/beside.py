"""A client that behaves."""

import threading
import uuid

import httpx

from tests.integration.conftest import SECONDS, Served, events_of, eventually

from .wire import INFER


class Beside:
    """A client that streams one text after the other and looks at every token."""

    def __init__(self, worker: Served) -> None:
        self.tokens = 0
        self.broken = ""
        self._worker = worker
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self.goes_on()

    def goes_on(self) -> None:
        """Wait for more of its tokens."""
        before = self.tokens
        eventually(lambda: self.tokens > before or self.broken)
        assert not self.broken

    def leave(self) -> None:
        """Cancel its job, in order; nothing may be missing of what came before."""
        self._leaving.set()
        self._thread.join(SECONDS)
        assert not self._thread.is_alive()
        assert not self.broken

    def _run(self) -> None:
        try:
            while not self._leaving.is_set():
                self._stream(f"beside-{uuid.uuid4()}")
        except Exception as error:  # noqa: BLE001 - told to the test, which runs in another thread
            self.broken = repr(error)

    def _stream(self, job_id: str) -> None:
        body = {"prompt": "x", "job_id": job_id, "ignore_eos": True, "max_tokens": 4000, "temperature": 0}
        # The same letter again and again, so that text and events can be counted.
        body |= {"logit_bias": {"97": 100}}
        received, cancelled = b"", False
        with httpx.stream("POST", self._worker.url + INFER, json=body, timeout=SECONDS) as response:
            assert response.status_code == 200
            for chunk in response.iter_bytes():
                received += chunk
                self.tokens += chunk.count(b'"event":"token"')
                if self._leaving.is_set() and not cancelled:
                    cancelled = True
                    httpx.delete(f"{self._worker.url}{INFER}/{job_id}", timeout=SECONDS)
        _, *tokens, end = events_of(received)
        assert end["stop_reason"] in {"cancelled", "max_tokens"}, end
        assert [token["i"] for token in tokens] == list(range(end["tokens_out"]))
        assert len({token["t"] for token in tokens}) <= 1
