"""Loading a model of 1.1 billion weights, measured against reading its file; and what watchers cost.

    python tests/benchmarks/load.py /tmp/random-1b            # writes the model there first: 2.3 GB
    python tests/benchmarks/load.py /tmp/random-1b --watchers 0 100

The model has the shape of TinyLlama-1.1B with a vocabulary of 49,152 and random weights, in ``--stored`` float16
unless said otherwise. Without ``--watchers`` this is ``rbee-worker bench load`` for each ``--dtype``. With it,
``rbee-worker serve`` loads the model while that many clients, in a process of their own, read its progress over
sockets; the seconds are those of its load report, with the numbers of watchers in turn. Run it on an idle machine.
"""

import argparse
import asyncio
import json
import re
import statistics
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 49152,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
DTYPES = {"float16": ("F16", 2), "bfloat16": ("BF16", 2), "float32": ("F32", 4)}
PROGRAM = str(Path(sys.executable).parent / "rbee-worker")
CHUNK = 2**22


def tensors(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, in the order of the file."""
    hidden, inner, kv = CONFIG["hidden_size"], CONFIG["intermediate_size"], 4 * 64
    yield "lm_head.weight", (CONFIG["vocab_size"], hidden)
    yield "model.embed_tokens.weight", (CONFIG["vocab_size"], hidden)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        for name, rows in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
            yield f"{prefix}self_attn.{name}_proj.weight", (rows, hidden)
        for name, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
            yield f"{prefix}mlp.{name}_proj.weight", shape
    yield "model.norm.weight", (hidden,)


def values(count: int, dtype: str, generator: np.random.Generator) -> bytes:
    """Random weights of about 0.02, as stored."""
    floats = generator.standard_normal(count, dtype=np.float32) * np.float32(0.02)
    if dtype == "float32":
        return floats.tobytes()
    return (
        floats.astype(np.float16).tobytes()
        if dtype == "float16"
        else (floats.view(np.uint32) >> 16).astype("<u2").tobytes()
    )


def write_model(path: Path, dtype: str, layers: int = CONFIG["num_hidden_layers"]) -> None:
    """Write the model folder, a few megabytes at a time; a finished one is kept."""
    stored, size = DTYPES[dtype]
    config = path / "config.json"
    wanted = json.dumps(CONFIG | {"num_hidden_layers": layers, "torch_dtype": dtype})
    if config.is_file() and config.read_text() == wanted:
        return
    path.mkdir(parents=True, exist_ok=True)
    header, end = {}, 0
    for name, shape in tensors(layers):
        begin, end = end, end + size * int(np.prod(shape))
        header[name] = {"dtype": stored, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    generator = np.random.default_rng(0)
    with (path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in tensors(layers):
            left = int(np.prod(shape))
            while left:
                count = min(left, CHUNK)
                ones = name.endswith("norm.weight")
                file.write(values(count, dtype, generator) if not ones else _ones(count, dtype))
                left -= count
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from tests.tiny import byte_tokenizer

    byte_tokenizer().save(str(path / "tokenizer.json"))
    config.write_text(wanted)  # last: it says that the rest is there


def _ones(count: int, dtype: str) -> bytes:
    if dtype == "bfloat16":
        return np.full(count, 0x3F80, dtype="<u2").tobytes()
    return np.ones(count, dtype=dtype).tobytes()


async def watch(address: str, count: int) -> int:
    """Follow the progress of a load with ``count`` clients to its end; returns the events seen by all."""
    host, port = address.split(":")

    async def one() -> int:
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"GET /v1/loading/progress HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n".encode())
        seen = 0
        while line := await reader.readline():
            seen += line.startswith(b"data: ")
        writer.close()
        return seen

    return sum(await asyncio.gather(*(one() for _ in range(count))))


def seconds_with(model: Path, dtype: str, watchers: int) -> tuple[float, int]:
    """Seconds of ``loading_to_vram`` in a worker that so many watch, and the events they were sent in all."""
    command = [PROGRAM, "serve", "--addr", "127.0.0.1:0", "--no-load", "--dtype", dtype, "--allow-model", str(model)]
    worker = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        address = next(found[1] for line in worker.stderr if (found := re.search(r"http://(\S+)", line)))
        crowd = [sys.executable, __file__, "--watch", address, str(watchers)]
        watching = subprocess.Popen(crowd, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        watching.stdout.readline()  # it waits
        load = [PROGRAM, "load", str(model), "--addr", address, "--json"]
        loading = subprocess.Popen(load, stdout=subprocess.PIPE, text=True)
        first = loading.stdout.readline()  # the load has begun: there is something to watch
        seen = int(watching.communicate("go\n")[0])
        last = (first + loading.communicate()[0]).splitlines()[-1]
    finally:
        worker.terminate()
        worker.communicate()
    return json.loads(last)["report"]["phases"]["loading_to_vram"], seen


def compare_watchers(model: Path, dtype: str, crowds: list[int], runs: int) -> None:
    results: dict[int, list[float]] = {count: [] for count in crowds}
    events: dict[int, int] = {}
    for _ in range(runs):
        for count, seconds in results.items():
            taken, events[count] = seconds_with(model, dtype, count)
            seconds.append(taken)
    base = statistics.median(results[crowds[0]])
    print("| watchers | events sent | loading_to_vram s | ratio |\n|---|---|---|---|")
    for count, seconds in results.items():
        median = statistics.median(seconds)
        spread = f"{median:.2f} ({min(seconds):.2f}-{max(seconds):.2f})"
        print(f"| {count} | {events[count]:,} | {spread} | {median / base:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="folder to write the model to, or that has it")
    parser.add_argument("--stored", choices=DTYPES, default="float16", help="what the weights are stored in")
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
    parser.add_argument("--dtype", nargs="+", default=["auto"], help="what they are loaded as")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--watchers", nargs="+", type=int, help="numbers of watchers to compare")
    parser.add_argument("--write-only", action="store_true", help="write the model and stop")
    parser.add_argument("--watch", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.watch:
        address, count = options.watch
        print("waiting", flush=True)
        sys.stdin.readline()
        print(asyncio.run(watch(address, int(count))))
        return
    if options.model is None:
        parser.error("say where the model is to be")
    write_model(options.model, options.stored, options.layers)
    if options.write_only:
        return
    for dtype in options.dtype:
        if options.watchers:
            compare_watchers(options.model, dtype, options.watchers, options.runs)
        else:
            command = [PROGRAM, "bench", "load", str(options.model), "--dtype", dtype, "--runs", str(options.runs)]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
