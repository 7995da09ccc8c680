"""rbee-worker's perplexity, through its engine, for the plot of quality; its speed is ``rbee-worker bench decode``'s.

    python rbee_peer.py JSON

The JSON has ``model``, ``dtype``, ``quantize`` and ``ids``.
"""

import json
import math
import sys
from typing import Any

from rbee_worker.config import EngineConfig, GenerationRequest, SamplingParams
from rbee_worker.events import PromptLogprobs
from rbee_worker.runtime.engine.engine import Engine


def measure(wanted: dict[str, Any]) -> dict[str, float]:
    engine = Engine(EngineConfig(device="cpu", dtype=wanted["dtype"], quantize=wanted["quantize"]))
    for _ in engine.load(wanted["model"]):
        pass
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0)
    events = list(engine.generate(GenerationRequest(prompt_ids=tuple(wanted["ids"]), sampling=sampling)))
    told = next(event for event in events if isinstance(event, PromptLogprobs))
    likely = [token.logprob for token in told.logprobs if token.logprob is not None]
    assert engine.model is not None
    return {"perplexity": math.exp(-sum(likely) / len(likely)), "weights_bytes": engine.model.nbytes}


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
