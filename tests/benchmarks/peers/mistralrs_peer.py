"""mistral.rs, through its bindings; run by an interpreter that has them.

    python mistralrs_peer.py JSON

The JSON is that of ``llama_cpp_peer.py``; so are the figures, as far as it tells them: prefill and decode of one
sequence. It takes text, not tokens, so a prompt is as many words, and it says itself how long it took. Prompts after
which nothing is decoded are left out: it takes minutes for the longest.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from mistralrs import Architecture, CompletionRequest, Runner, Which

WORD = " hello"


def measure(wanted: dict[str, Any]) -> dict[str, float]:
    path = Path(wanted["model"])
    began = time.perf_counter()
    if path.is_dir():
        which = Which.Plain(model_id=str(path), arch=Architecture.Llama)
    else:
        which = Which.GGUF(quantized_model_id=str(path.parent), quantized_filename=path.name)
    runner = Runner(which=which, max_seqs=1, prefix_cache_n=0, token_source="none")  # noqa: S106
    figures = {"load_s": time.perf_counter() - began}

    def run(count: int, tokens: int) -> Any:
        request = CompletionRequest(
            model="default", prompt=WORD * count, max_tokens=tokens, temperature=0.0, ignore_eos=True
        )
        return runner.send_completion_request(request).usage

    run(wanted["batch_prompt"], 4)
    for count in wanted["contexts"]:
        if count + wanted["tokens"] >= wanted["longest"]:
            continue
        used = run(count, wanted["tokens"] + 1)
        if not count <= used.prompt_tokens <= count + 2:
            sys.exit(f"a prompt of {count} tokens became {used.prompt_tokens}")
        figures[f"prefill_{count}_tok_s"] = used.avg_prompt_tok_per_sec
        figures[f"decode_{count}_tok_s"] = used.avg_compl_tok_per_sec
    return figures


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
