"""What a worker says over HTTP, from a real server on a real socket around a tiny model: answers, streams, metrics.

A bias makes the model say nothing but ``a``, or end at once, so that the text is the same on every machine.
"""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from rbee_worker.config import ServerConfig
from rbee_worker.worker.worker import Worker
from tests.snapshots.loading import ENGINE, cut
from tests.snapshots.plain import line, masked, once, plain, pretty
from tests.tiny import CHAT_TEMPLATE, byte_tokenizer, write_tiny_model
from tests.unit.server.conftest import Reply, Running

KEY = {"Authorization": "Bearer secret"}
CONTEXT = 32_768
"""Tokens: enough that a job that is to be cancelled still runs then, on the fastest machine."""

SECONDS = 60.0
DONE = "[DONE]"
UNTOLD = {"connection", "content-length", "date", "transfer-encoding"}
"""Headers that say how an answer travels, or when."""

CLOSED_LABELS = ("state", "outcome", "stop_reason", "kind")
"""Labels whose values are words of ours, all of them always there or made by any request."""

Json = dict[str, Any]


def _always(token: int) -> Json:
    return {str(token): 100}


_A = byte_tokenizer().token_to_id("a")
_END_ID = byte_tokenizer().get_vocab_size()
SAYS_A: Json = {"logit_bias": _always(_A), "seed": 7, "temperature": 0, "max_tokens": 3}
SAYS_END: Json = SAYS_A | {"logit_bias": _always(_END_ID)}
PROMPT: Json = {"prompt": "hello"}
MESSAGES: Json = {"messages": [{"role": "user", "content": "hello"}]}
NAME = {"model": "tiny"}
TOOL: Json = {
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "f",
                "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
            },
        }
    ],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "parallel_tool_calls": False,
    "temperature": 0,
    "logit_bias": _always(_END_ID) | {str(byte_tokenizer().token_to_id("Ġ")): -100},  # no white space between, then end
}
FIELDS = {"temperature": 3, "max_tokens": 0, "stop": [""]}
SSE = {"Accept": "text/event-stream"}


def take(folder: Path) -> dict[str, str]:
    """A file for each exchange, and ``metrics.txt``."""
    model = write_tiny_model(folder / "tiny", chat_template=CHAT_TEMPLATE, max_position_embeddings=CONTEXT)
    broken = cut(write_tiny_model(folder / "cut"))
    config = ServerConfig(port=0, api_keys=("secret",), allow_models=(str(broken),), keep_alive_seconds=0)
    server = Running(Worker(replace(ENGINE, max_batch_size=2)), config, model=str(model), has_start_model=True)
    try:
        exchanges = _Exchanges(server, folder)
        exchanges.without_a_model()
        exchanges.loading(str(broken))
        exchanges.of_the_worker()
        exchanges.inference()
        exchanges.openai()
        exchanges.refusals()
        exchanges.files["metrics.txt"] = _metrics(server.ask("GET", "/metrics", headers=KEY).body.decode())
        exchanges.ask("unload", "POST", "/v1/unload")
    finally:
        server.stop()
    return exchanges.files


class _Exchanges:
    """Asks, and keeps what was asked and answered as text."""

    def __init__(self, server: Running, folder: Path) -> None:
        self.files: dict[str, str] = {}
        self._server = server
        self._folder = folder

    def ask(
        self, name: str, method: str, path: str, body: Json | None = None, headers: dict[str, str] | None = None
    ) -> None:
        self._keep(name, method, path, body, self._server.ask(method, path, body, KEY | (headers or {})))

    def without_a_model(self) -> None:
        for name, path in (("health", "/health"), ("ready", "/v1/ready"), ("readyz", "/readyz")):
            self.ask(f"{name}-no-model", "GET", path)
        self.ask("models-no-model", "GET", "/v1/models")
        self.ask("progress-no-model", "GET", "/v1/loading/progress")
        self.ask("load-cancel-no-load", "DELETE", "/v1/loading")
        self.ask("inference-no-model", "POST", "/v1/inference", PROMPT)
        self.ask("inference-no-model-sse", "POST", "/v1/inference", PROMPT, SSE)
        self.ask("chat-no-model", "POST", "/v1/chat/completions", MESSAGES)

    def loading(self, broken: str) -> None:
        self.ask("load-not-allowed", "POST", "/v1/loading", {"model": "org/other"})
        self._server.ask("POST", "/v1/loading", {"model": broken}, KEY)
        self._wait_for_the_load()
        self.ask("progress-failed", "GET", "/v1/loading/progress")
        self.ask("health-failed", "GET", "/health")
        self.ask("ready-failed", "GET", "/v1/ready")
        self.ask("load", "POST", "/v1/loading", {})
        self._wait_for_the_load()
        self.ask("progress-ready", "GET", "/v1/loading/progress")
        self.ask("history", "GET", "/v1/loading/history")

    def of_the_worker(self) -> None:
        for name, path in (
            ("index", "/"),
            ("health", "/health"),
            ("livez", "/livez"),
            ("ready", "/v1/ready"),
            ("readyz", "/readyz"),
            ("worker", "/v1/worker"),
            ("models", "/v1/models"),
            ("model", "/v1/models/tiny"),
        ):
            self.ask(name, "GET", path)
        self.ask("tokenize", "POST", "/tokenize", {"text": "abc"})
        self.ask("detokenize", "POST", "/detokenize", {"tokens": [_A]})

    def inference(self) -> None:
        def infer(name: str, **body: Any) -> None:
            self.ask(f"inference-{name}", "POST", "/v1/inference", PROMPT | SAYS_A | body)

        infer("max-tokens")
        infer("eos", logit_bias=SAYS_END["logit_bias"])
        infer("stop-sequence", stop=["aa"])
        infer("logprobs", logprobs=1, prompt_logprobs=0, prompt_progress=True)
        self._cancelled()
        self.ask("inference-cancel-unknown", "DELETE", "/v1/inference/unknown")
        infer("too-long", prompt="a" * (CONTEXT + 1))
        self.ask("inference-too-long-sse", "POST", "/v1/inference", {"prompt": "a" * (CONTEXT + 1)}, SSE)
        infer("fields", **FIELDS)
        self.ask("inference-fields-sse", "POST", "/v1/inference", PROMPT | FIELDS, SSE)

    def openai(self) -> None:
        usage = {"stream": True, "stream_options": {"include_usage": True}}
        for name, path, asked in (
            ("completions", "/v1/completions", PROMPT | {"logprobs": 0}),
            ("chat", "/v1/chat/completions", MESSAGES | {"logprobs": True, "top_logprobs": 0}),
        ):
            self.ask(name, "POST", path, NAME | asked | SAYS_A)
            self.ask(f"{name}-plain", "POST", path, NAME | asked | SAYS_A | {"logprobs": None, "top_logprobs": None})
            self.ask(f"{name}-stop", "POST", path, NAME | asked | SAYS_END)
            self.ask(f"{name}-stream", "POST", path, NAME | asked | SAYS_A | usage)
            self.ask(f"{name}-fields", "POST", path, NAME | asked | FIELDS)
            self.ask(f"{name}-other-model", "POST", path, asked | {"model": "other"})
        self.ask("chat-tools", "POST", "/v1/chat/completions", NAME | MESSAGES | TOOL)
        self.ask("chat-tools-stream", "POST", "/v1/chat/completions", NAME | MESSAGES | TOOL | usage)
        asked = NAME | {"input": "hello"} | {key: SAYS_A[key] for key in ("logit_bias", "seed", "temperature")}
        self.ask("responses", "POST", "/v1/responses", asked | {"max_output_tokens": 3})
        self.ask("responses-stream", "POST", "/v1/responses", asked | {"max_output_tokens": 3, "stream": True})

    def refusals(self) -> None:
        self.ask("no-route", "GET", "/nowhere")
        self.ask("no-method", "PUT", "/v1/models")
        self.ask("no-key", "GET", "/v1/models", headers={"Authorization": "Bearer wrong"})
        self.ask("no-model-of-this-name", "GET", "/v1/models/other")
        self.ask("compressed", "POST", "/tokenize", {"text": "a"}, {"Content-Encoding": "gzip"})

    def _cancelled(self) -> None:
        body = PROMPT | SAYS_A | {"max_tokens": CONTEXT // 2, "job_id": "mine"}
        stream = self._server.open("POST", "/v1/inference", body, KEY)
        stream.read_until(b'"event":"token"')
        self.ask("inference-conflict", "POST", "/v1/inference", body)
        self.ask("inference-cancel", "DELETE", "/v1/inference/mine")
        self._keep("inference-cancelled", "POST", "/v1/inference", body, stream.finish())

    def _wait_for_the_load(self) -> None:
        """Until the stream has ended, and the worker's state has followed."""
        self._server.ask("GET", "/v1/loading/progress", headers=KEY)
        deadline = time.monotonic() + SECONDS
        while self._server.worker.loads.running:
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def _keep(self, name: str, method: str, path: str, body: Json | None, reply: Reply) -> None:
        asked = f"{method} {path}\n" + (f"{_shortened(line(body))}\n" if body is not None else "")
        headers = [f"{key.lower()}: {value}" for key, value in reply.headers.items() if key.lower() not in UNTOLD]
        answer = "\n".join([str(reply.status), *sorted(headers)])
        assert f"{name}.txt" not in self.files
        self.files[f"{name}.txt"] = masked(f"{asked}\n{answer}\n", self._folder) + self._shown(reply)

    def _shown(self, reply: Reply) -> str:
        if not reply.body:
            return ""
        if reply.headers["content-type"].startswith("text/event-stream"):
            return "".join(f"\n{text}\n" for text in once([self._frame(frame.decode()) for frame in reply.frames]))
        return "\n" + pretty(_one_machine(plain(reply.json, self._folder)))

    def _frame(self, frame: str) -> str:
        head, _, data = frame.rpartition("data: ")
        if data != DONE:
            data = line(plain(json.loads(data), self._folder))
        return f"{head}data: {data}"


def _shortened(text: str) -> str:
    """Without the length of a prompt that is long on purpose."""
    return text.replace("a" * (CONTEXT + 1), "aaa…")


def _one_machine(value: Json) -> Json:
    """Without the devices that some machines have and others have not."""
    if "devices" in value:
        value["devices"] = [device for device in value["devices"] if device["name"] == "cpu"]
    return value


def _metrics(page: str) -> str:
    """Each family: name, type, labels and their values where these are words of ours, help."""
    told = []
    for family in text_string_to_metric_families(page):
        labels = sorted({label for sample in family.samples for label in sample.labels})
        lines = [f"{family.name} {family.type}", f"  {family.documentation}"]
        lines += [f"  samples: {', '.join(sorted({sample.name for sample in family.samples}))}"]
        for label in labels:
            values = sorted({sample.labels[label] for sample in family.samples if label in sample.labels})
            lines.append(f"  {label}: {', '.join(values)}" if label in CLOSED_LABELS else f"  {label}")
        told.append("\n".join(lines) + "\n")
    return "\n".join(sorted(told))
