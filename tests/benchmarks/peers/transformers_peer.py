"""transformers; run by an interpreter that has it.

    python transformers_peer.py JSON

The JSON is that of ``llama_cpp_peer.py``, with ``dtype``; so are the figures.
"""

import json
import random
import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM


class Peer:
    """A model in one dtype."""

    def __init__(self, path: str, dtype: str) -> None:
        began = time.perf_counter()
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
        self.load_seconds = time.perf_counter() - began
        self.vocabulary = self.model.config.vocab_size
        self.bytes = sum(weight.nbytes for weight in self.model.parameters())
        self._random = random.Random(0)  # noqa: S311

    @torch.inference_mode()
    def run(self, sequences: int, count: int, tokens: int) -> tuple[float, float]:
        """Seconds until the first tokens of prompts of one length, and from there to ``tokens`` more of each."""
        rows = [[self._random.randrange(self.vocabulary) for _ in range(count)] for _ in range(sequences)]
        prompts = torch.tensor(rows)
        began = time.perf_counter()
        out = self.model(prompts, use_cache=True, logits_to_keep=1)
        last = out.logits[:, -1:].argmax(-1)
        first = time.perf_counter()
        for _ in range(tokens):
            out = self.model(last, past_key_values=out.past_key_values, use_cache=True)
            last = out.logits[:, -1:].argmax(-1)
        last.tolist()
        return first - began, time.perf_counter() - first

    @torch.inference_mode()
    def perplexity(self, ids: list[int]) -> float:
        """Of the tokens after the first."""
        tokens = torch.tensor([ids])
        logits = self.model(tokens).logits[0, :-1].double()
        return float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:]).exp())


def measure(wanted: dict[str, Any]) -> dict[str, float]:
    peer = Peer(wanted["model"], wanted["dtype"])
    if ids := wanted.get("ids"):
        return {"perplexity": peer.perplexity(ids), "weights_bytes": peer.bytes}
    tokens, short = wanted["tokens"], wanted["batch_prompt"]
    figures = {"load_s": peer.load_seconds, "weights_bytes": peer.bytes}
    peer.run(1, short, 4)
    for count in wanted["prefills"]:
        if count < wanted["longest"]:
            first, rest = peer.run(1, count, tokens if count in wanted["contexts"] else 0)
            figures[f"prefill_{count}_tok_s"] = count / first
            if count in wanted["contexts"]:
                figures[f"decode_{count}_tok_s"] = tokens / rest
    for sequences in wanted["batches"]:
        figures[f"together_{sequences}_tok_s"] = sequences * tokens / peer.run(sequences, short, tokens)[1]
    return figures


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
