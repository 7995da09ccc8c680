"""onnxruntime-genai; run by an interpreter that has it.

    python onnx_peer.py JSON

The JSON is that of ``llama_cpp_peer.py``; so are the figures. ``model`` is a folder that its builder wrote.
"""

import json
import random
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai


class Peer:
    """A model on the CPU."""

    def __init__(self, folder: str) -> None:
        began = time.perf_counter()
        self.model = onnxruntime_genai.Model(folder)
        self.load_seconds = time.perf_counter() - began
        config = json.loads((Path(folder) / "genai_config.json").read_text("utf-8"))
        self.vocabulary = config["model"]["vocab_size"]
        self.bytes = sum(file.stat().st_size for file in Path(folder).glob("model.onnx*"))
        self._random = random.Random(0)  # noqa: S311

    def generator(self, sequences: int, length: int) -> Any:
        """One that makes exactly so many tokens of each sequence, its prompt counted."""
        params = onnxruntime_genai.GeneratorParams(self.model)
        params.set_search_options(do_sample=False, batch_size=sequences, max_length=length, min_length=length)
        return onnxruntime_genai.Generator(self.model, params)

    def run(self, sequences: int, count: int, tokens: int) -> tuple[float, float]:
        """Seconds until the first tokens of prompts of one length, and from there to ``tokens`` more of each."""
        rows = [[self._random.randrange(self.vocabulary) for _ in range(count)] for _ in range(sequences)]
        generator = self.generator(sequences, count + tokens + 1)
        began = time.perf_counter()
        generator.append_tokens(np.array(rows, np.int32))
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(tokens):
            generator.generate_next_token()
        return first - began, time.perf_counter() - first

    def perplexity(self, ids: list[int]) -> float:
        """Of the tokens after the first. The head is made for the last token alone, so they go in one by one."""
        generator = self.generator(1, len(ids) + 1)
        likely = []
        for token, following in pairwise(ids):
            generator.append_tokens(np.array([[token]], np.int32))
            logits = generator.get_logits().reshape(-1).astype(float)
            logits -= logits.max()
            likely.append(logits[following] - np.log(np.exp(logits).sum()))
        return float(np.exp(-np.mean(likely)))


def measure(wanted: dict[str, Any]) -> dict[str, float]:
    peer = Peer(wanted["model"])
    if ids := wanted.get("ids"):
        return {"perplexity": peer.perplexity(ids), "weights_bytes": peer.bytes}
    tokens, short = wanted["tokens"], wanted["batch_prompt"]
    figures = {"load_s": peer.load_seconds, "weights_bytes": peer.bytes}
    peer.run(1, short, 4)
    for count in wanted["prefills"]:
        if count + 1 < wanted["longest"]:
            decoded = tokens if count in wanted["contexts"] else 0
            first, rest = peer.run(1, count, decoded)
            figures[f"prefill_{count}_tok_s"] = count / first
            if decoded:
                figures[f"decode_{count}_tok_s"] = tokens / rest
    for sequences in wanted["batches"]:
        figures[f"together_{sequences}_tok_s"] = sequences * tokens / peer.run(sequences, short, tokens)[1]
    return figures


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
