"""llama.cpp, through its bindings; run by an interpreter that has llama-cpp-python.

    python llama_cpp_peer.py JSON

The JSON has ``model``, ``tokens``, ``prefills``, ``contexts``, ``batches``, ``batch_prompt`` and ``longest``, for
speed; or ``model`` and ``ids``, for perplexity. Prints one line of JSON: figures by the keys of ``rbee-worker bench
decode``.

With ``windows``, lists of tokens, it has ``nll``: the negative log-likelihood of each token after a window's first.
Then ``logits`` may name a file for the logits of all of them (.npy), and ``threads``, ``batch`` (tokens of a pass) and
``repack`` say how they are computed. The cache is float32, so that only weights and activations are rounded.
"""

import json
import os
import random
import sys
import time
from typing import Any

import llama_cpp as lib
import numpy as np

UBATCH = 512
"""Tokens of a forward pass at most: llama.cpp's default."""


class Peer:
    """A model and a context."""

    def __init__(self, path: str, context: int, sequences: int, **how: Any) -> None:
        """``how``: ``threads``; ``repack``: weights may be laid out anew; ``exact``: its cache is float32."""
        lib.llama_backend_init()
        began = time.perf_counter()
        loading = lib.llama_model_default_params()
        loading.use_extra_bufts = how.get("repack", True)
        self.model = lib.llama_model_load_from_file(path.encode(), loading)
        if not self.model:
            sys.exit(f"llama.cpp cannot load {path}")
        params = lib.llama_context_default_params()
        params.n_ctx = context
        params.n_batch = max(UBATCH, context)
        params.n_ubatch = UBATCH
        params.n_seq_max = sequences
        # One pool for all sequences: else each gets its share of the context.
        params.kv_unified = True
        params.n_threads = params.n_threads_batch = how.get("threads") or threads()
        if how.get("exact"):
            params.type_k = params.type_v = lib.GGML_TYPE_F32
            params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = lib.llama_init_from_model(self.model, params)
        self.load_seconds = time.perf_counter() - began
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self._batch = lib.llama_batch_init(params.n_batch, 0, 1)
        self._random = random.Random(0)  # noqa: S311

    def clear(self) -> None:
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)

    def prompt(self, count: int) -> list[int]:
        return [self._random.randrange(self.vocabulary) for _ in range(count)]

    def run(self, rows: list[tuple[int, int, int, bool]]) -> list[np.ndarray]:
        """One pass over rows of token, position, sequence and whether its logits are wanted; those logits."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for place, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[place] = token
            batch.pos[place] = position
            batch.n_seq_id[place] = 1
            batch.seq_id[place][0] = sequence
            batch.logits[place] = wanted
        if failed := lib.llama_decode(self.context, batch):
            sys.exit(f"llama_decode: {failed}")
        places = [place for place, row in enumerate(rows) if row[3]]
        return [
            np.ctypeslib.as_array(lib.llama_get_logits_ith(self.context, place), (self.vocabulary,)) for place in places
        ]

    def prefill(self, prompt: list[int], sequence: int = 0) -> int:
        """The likeliest token after a prompt."""
        last = len(prompt) - 1
        rows = [(token, place, sequence, place == last) for place, token in enumerate(prompt)]
        return int(self.run(rows)[0].argmax())

    def alone(self, count: int, tokens: int) -> tuple[float, float]:
        """Seconds until the first token of a prompt, and from there to ``tokens`` more."""
        self.clear()
        prompt = self.prompt(count)
        began = time.perf_counter()
        token = self.prefill(prompt)
        first = time.perf_counter()
        for number in range(tokens):
            token = int(self.run([(token, count + number, 0, True)])[0].argmax())
        return first - began, time.perf_counter() - first

    def together(self, sequences: int, prompt: int, tokens: int) -> float:
        """Tokens a second of several sequences, after their prompts."""
        self.clear()
        last = [self.prefill(self.prompt(prompt), sequence) for sequence in range(sequences)]
        began = time.perf_counter()
        for number in range(tokens):
            rows = [(token, prompt + number, sequence, True) for sequence, token in enumerate(last)]
            last = [int(row.argmax()) for row in self.run(rows)]
        return sequences * tokens / (time.perf_counter() - began)

    def perplexity(self, ids: list[int]) -> float:
        """Of the tokens after the first."""
        return float(np.exp(np.mean(unlikely(self.logits(ids, len(ids)), ids))))

    def logits(self, ids: list[int], batch: int) -> np.ndarray:
        """Of each token, float32 [tokens, vocabulary]; so many tokens a pass."""
        self.clear()
        rows = [(token, place, 0, True) for place, token in enumerate(ids)]
        passes = (self.run(rows[begin : begin + batch]) for begin in range(0, len(rows), batch))
        return np.concatenate([np.stack(found) for found in passes])


def unlikely(logits: np.ndarray, ids: list[int]) -> np.ndarray:
    """The negative log-likelihood of each token after the first."""
    logits = logits[:-1].astype(float)
    logits -= logits.max(1, keepdims=True)
    return np.log(np.exp(logits).sum(1)) - logits[np.arange(len(ids) - 1), ids[1:]]


def threads() -> int:
    """The cores that this process may use, or what OMP_NUM_THREADS says."""
    told = os.environ.get("OMP_NUM_THREADS", "")
    return int(told) if told.isdecimal() else len(os.sched_getaffinity(0))


def judge(wanted: dict[str, Any]) -> dict[str, list[float]]:
    windows: list[list[int]] = wanted["windows"]
    longest = max(map(len, windows))
    how = {key: wanted[key] for key in ("threads", "repack") if key in wanted}
    peer = Peer(wanted["model"], longest + 1, 1, exact=True, **how)
    nll: list[float] = []
    kept = []
    for ids in windows:
        logits = peer.logits(ids, wanted.get("batch", longest))
        nll += unlikely(logits, ids).tolist()
        if "logits" in wanted:
            kept.append(logits)
    if "logits" in wanted:
        np.save(wanted["logits"], np.concatenate(kept))
    return {"nll": nll}


def measure(wanted: dict[str, Any]) -> dict[str, Any]:
    if "windows" in wanted:
        return judge(wanted)
    if ids := wanted.get("ids"):
        peer = Peer(wanted["model"], len(ids) + 1, 1)
        return {"perplexity": peer.perplexity(ids), "weights_bytes": lib.llama_model_size(peer.model)}
    tokens, batches, short = wanted["tokens"], wanted["batches"], wanted["batch_prompt"]
    room = max([*wanted["prefills"], max(batches) * (short + tokens)]) + tokens + 1
    peer = Peer(wanted["model"], room, max(batches))
    figures = {"load_s": peer.load_seconds, "weights_bytes": lib.llama_model_size(peer.model)}
    peer.alone(short, 4)
    for count in wanted["prefills"]:
        if count < wanted["longest"]:
            first, rest = peer.alone(count, tokens if count in wanted["contexts"] else 0)
            figures[f"prefill_{count}_tok_s"] = count / first
            if count in wanted["contexts"]:
                figures[f"decode_{count}_tok_s"] = tokens / rest
    for sequences in batches:
        figures[f"together_{sequences}_tok_s"] = peer.together(sequences, short, tokens)
    return figures


if __name__ == "__main__":
    # llama.cpp writes to stdout what it does; the figures are the last line.
    print(json.dumps(measure(json.loads(sys.argv[1]))), flush=True)
    os._exit(0)  # nothing is left to free that the system does not free faster
