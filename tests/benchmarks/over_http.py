"""What HTTP costs, and whether it holds: a real `rbee-worker serve`, real sockets.

    python tests/benchmarks/over_http.py throughput models/SmolLM2-135M-Instruct
    python tests/benchmarks/over_http.py streams --count 200 --seconds 60

``throughput``: decoded tokens a second of 1 and 8 streams, through HTTP (OpenAI chunks, and the worker's own events)
and from the engine alone, in turn. Clients and worker share the machine's cores.
``streams``: concurrent streams of a random tiny model, renewed as they end. Checks that no token is lost or doubled,
that every stream ends in ``[DONE]``, and that the worker's memory and descriptors stay flat; exits 1 where not.
"""

import argparse
import asyncio
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

PROGRAM = str(Path(sys.executable).parent / "rbee-worker")
PROMPT = "Question {0}: tell a story about the number {0} and what it did on its holidays by the sea last year."
MIB = 2**20


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[str, psutil.Process]]:
    """A worker that is ready: its URL and its process."""
    command = [PROGRAM, "serve", "--addr", "127.0.0.1:0", "--log-level", "info", *arguments]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
        try:
            url = ""
            while not url:
                time.sleep(0.05)
                log.seek(0)
                if found := re.search(r"listening on (http://\S+)", log.read()):
                    url = found[1]
                if process.poll() is not None:
                    log.seek(0)
                    sys.exit(log.read())
            while httpx.get(f"{url}/readyz").status_code != httpx.codes.OK:
                time.sleep(0.05)
            yield url, psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait()


async def frames(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> list[tuple[float, Any]]:
    """The data of every frame, with the moment of its arrival; the last is ``[DONE]``."""
    out: list[tuple[float, Any]] = []
    async with client.stream("POST", path, json=body) as response:
        response.raise_for_status()
        rest = b""
        # Split at line feeds alone: text may hold other characters that end a line.
        async for chunk in response.aiter_bytes():
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                if line.startswith(b"data: "):
                    data = line.removeprefix(b"data: ")
                    out.append((time.perf_counter(), "[DONE]" if data == b"[DONE]" else json.loads(data)))
    return out


def rate(arrivals: list[list[float]]) -> float:
    """Tokens a second of all streams together, while all of them run."""
    begin, end = max(times[0] for times in arrivals), min(times[-1] for times in arrivals)
    return sum(begin < moment <= end for times in arrivals for moment in times) / (end - begin)


async def through_http(url: str, kind: str, count: int, tokens: int, salt: int) -> float:
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        jobs = []
        for number in range(count):
            body: dict[str, Any] = {"prompt": PROMPT.format(salt + number), "max_tokens": tokens, "temperature": 0}
            body["ignore_eos"] = True
            if kind == "completions":
                jobs.append(frames(client, "/v1/completions", body | {"stream": True}))
            else:
                jobs.append(frames(client, "/v1/inference", body))
        streams = await asyncio.gather(*jobs)
    arrivals = []
    for stream in streams:
        assert stream[-1][1] == "[DONE]"
        texts = [at for at, data in stream[:-1] if data.get("event") == "token" or _text(data)]
        arrivals.append(texts)
    return rate(arrivals)


def _text(data: dict[str, Any]) -> str:
    choices = data.get("choices") or [{}]
    return choices[0].get("text") or ""


def alone(engine: Any, count: int, tokens: int, salt: int) -> float:
    from rbee_worker.config import GenerationRequest, SamplingParams
    from rbee_worker.events import Token

    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    for number in range(count):
        engine.submit(GenerationRequest(prompt=PROMPT.format(salt + number), job_id=str(number), sampling=sampling))
    arrivals: list[list[float]] = [[] for _ in range(count)]
    while engine.has_work:
        events = engine.step()
        now = time.perf_counter()
        for job_id, event in events:
            if isinstance(event, Token):
                arrivals[int(job_id)].append(now)
    return rate(arrivals)


def throughput(options: argparse.Namespace) -> None:
    from rbee_worker.config import EngineConfig
    from rbee_worker.runtime.engine.engine import Engine

    engine = Engine(EngineConfig(dtype=options.dtype, max_batch_size=8, prefix_cache=False))
    for _ in engine.load(options.model):
        pass
    places = ("--max-batch-size", "8", "--no-prefix-cache")
    kinds = ("engine alone", "inference", "completions")
    rates: dict[tuple[str, int], list[float]] = {(kind, size): [] for size in (1, 8) for kind in kinds}
    with serving("--model", options.model, "--dtype", options.dtype, *places) as (url, _):
        for turn in range(options.runs + 1):
            for (kind, size), measured in rates.items():
                salt = 1000 * turn
                if kind == "engine alone":
                    figure = alone(engine, size, options.tokens, salt)
                else:
                    figure = asyncio.run(through_http(url, kind, size, options.tokens, salt))
                if turn:  # the first one warms up
                    measured.append(figure)
    print("| streams | way | tok/s | against the engine alone |\n|---|---|---|---|")
    for (kind, size), measured in rates.items():
        middle = statistics.median(measured)
        against = middle / statistics.median(rates["engine alone", size])
        print(f"| {size} | {kind} | {middle:.1f} ({min(measured):.1f}-{max(measured):.1f}) | {against:.3f} |")


async def one_stream(client: httpx.AsyncClient, number: int) -> tuple[int, str]:
    """Tokens of a stream, and what is wrong with it (empty: nothing)."""
    tokens = 8 + number % 57
    body = {"prompt": f"stream {number}", "max_tokens": tokens, "seed": number, "ignore_eos": True}
    events = [data for _, data in await frames(client, "/v1/inference", body)]
    if events.count("[DONE]") != 1 or events[-1] != "[DONE]":
        return 0, "[DONE] is not the last frame, once"
    end = events[-2]
    if end.get("event") != "end" or end["stop_reason"] != "max_tokens" or end["tokens_out"] != tokens:
        return 0, f"ended with {end}"
    texts = [event for event in events[:-1] if event["event"] == "token"]
    if [event["i"] for event in texts] != list(range(len(texts))):
        return 0, "tokens are lost or doubled"
    return tokens, ""


async def keep_streaming(url: str, options: argparse.Namespace, process: psutil.Process) -> list[str]:
    limits = httpx.Limits(max_connections=options.count)
    ends = time.monotonic() + options.seconds
    problems: list[str] = []
    done = tokens = 0
    samples: list[tuple[float, int]] = []

    async def client_loop(client: httpx.AsyncClient, first: int) -> None:
        nonlocal done, tokens
        number = first
        while time.monotonic() < ends:
            count, problem = await one_stream(client, number)
            if problem:
                problems.append(f"stream {number}: {problem}")
            done, tokens, number = done + 1, tokens + count, number + options.count

    async def watch() -> None:
        while time.monotonic() < ends:
            samples.append((process.memory_info().rss / MIB, process.num_fds()))
            await asyncio.sleep(options.seconds / 30)

    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        await asyncio.gather(watch(), *(client_loop(client, number) for number in range(options.count)))
    third = len(samples) // 3
    memory = [statistics.median(rss for rss, _ in part) for part in (samples[third : 2 * third], samples[2 * third :])]
    descriptors = [max(fds for _, fds in part) for part in (samples[third : 2 * third], samples[2 * third :])]
    print(f"{done} streams, {tokens} tokens, {tokens / options.seconds:.0f} tok/s, {len(problems)} problems")
    print(f"resident memory, median of the middle and the last third: {memory[0]:.0f}, {memory[1]:.0f} MiB")
    print(f"descriptors, maximum of the middle and the last third: {descriptors[0]}, {descriptors[1]}")
    if memory[1] > memory[0] + 16:
        problems.append("memory grows")
    if descriptors[1] > descriptors[0]:
        problems.append("descriptors grow")
    return problems


def streams(options: argparse.Namespace) -> None:
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tests.tiny import write_tiny_model

    with tempfile.TemporaryDirectory() as folder:
        model = str(write_tiny_model(Path(folder) / "tiny"))
        places = ("--max-batch-size", "32", "--max-queue", str(options.count))
        with serving("--model", model, "--dtype", "float32", *places) as (url, process):
            problems = asyncio.run(keep_streaming(url, options, process))
    for problem in problems[:10]:
        print(problem, file=sys.stderr)
    sys.exit(1 if problems else 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(required=True)
    measure = kinds.add_parser("throughput")
    measure.add_argument("model", help="a folder in Hugging Face layout")
    measure.add_argument("--dtype", default="auto")
    measure.add_argument("--runs", type=int, default=3)
    measure.add_argument("--tokens", type=int, default=100)
    measure.set_defaults(run=throughput)
    soak = kinds.add_parser("streams")
    soak.add_argument("--count", type=int, default=200)
    soak.add_argument("--seconds", type=float, default=60)
    soak.set_defaults(run=streams)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
