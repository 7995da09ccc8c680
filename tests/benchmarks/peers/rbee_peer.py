"""rbee-worker's perplexity, through its engine, for the plot of quality; its speed is ``rbee-worker bench decode``'s.

    python rbee_peer.py JSON

The JSON has ``model``, ``dtype``, ``quantize`` and ``ids``. Or, as for ``llama_cpp_peer.py``, it has ``windows`` in
their place, and ``logits`` too if these are wanted; its cache is then float32.
"""

import json
import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rbee_worker.config import EngineConfig, GenerationRequest, SamplingParams
from rbee_worker.events import PromptLogprobs
from rbee_worker.runtime.engine.engine import Engine
from rbee_worker.runtime.model.decoder import Batch, Transformer


def logits_of(transformer: Transformer, ids: Sequence[int]) -> Tensor:
    """Of each token, float32 [tokens, vocabulary]."""
    cache = transformer.new_cache(len(ids))
    cache.reserve(len(ids))
    logits = transformer.forward(Batch.of([(cache, ids, len(ids))], transformer.device)).float()
    cache.release()
    return logits


def judge(transformer: Transformer, wanted: dict[str, Any]) -> list[float]:
    """The negative log-likelihood of each token after the first of its window."""
    nll: list[float] = []
    kept = []
    for ids in wanted["windows"]:
        logits = logits_of(transformer, ids)
        nll += functional.cross_entropy(logits[:-1].double(), torch.tensor(ids[1:]), reduction="none").tolist()
        if "logits" in wanted:
            kept.append(logits)
    if kept:
        np.save(wanted["logits"], torch.cat(kept).numpy())
    return nll


def measure(wanted: dict[str, Any]) -> dict[str, Any]:
    cache = "float32" if "windows" in wanted else "auto"
    engine = Engine(
        EngineConfig(device="cpu", dtype=wanted["dtype"], quantize=wanted["quantize"], kv_cache_dtype=cache)
    )
    for _ in engine.load(wanted["model"]):
        pass
    assert engine.model is not None
    if "windows" in wanted:
        return {"nll": judge(engine.model.transformer, wanted), "weights_bytes": engine.model.nbytes}
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0)
    events = list(engine.generate(GenerationRequest(prompt_ids=tuple(wanted["ids"]), sampling=sampling)))
    told = next(event for event in events if isinstance(event, PromptLogprobs))
    likely = [token.logprob for token in told.logprobs if token.logprob is not None]
    return {"perplexity": math.exp(-sum(likely) / len(likely)), "weights_bytes": engine.model.nbytes}


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
