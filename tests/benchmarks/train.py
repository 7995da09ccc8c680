"""A small Llama trained on a text: weights that were never quantized and that mean something.

    python tests/benchmarks/train.py TEXT FOLDER [--steps 1000]

Rounding random weights tells little of what it costs: trained ones are spread otherwise, and their errors add up
otherwise. The widths are multiples of 256, so that all of GGUF's blocks hold them. The last twentieth of the text is
left out: measure with that. It takes a quarter of an hour on one core.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY, CONTEXT, BATCH = 2048, 128, 8
RATE = 2e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("text", type=Path, help="what it learns")
    parser.add_argument("folder", type=Path, help="where the model goes, in Hugging Face layout")
    parser.add_argument("--steps", type=int, default=1000, help="of 1,024 tokens each")
    options = parser.parse_args()
    text = options.text.read_text("utf-8")
    text = text[: len(text) * 19 // 20]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet))
    ids = torch.tensor(tokenizer.encode(text).ids)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(options.steps):
        warm, done = min(1.0, (step + 1) / 20), step / options.steps
        for group in optimizer.param_groups:
            group["lr"] = RATE * warm * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)
        begins = torch.randint(len(ids) - CONTEXT - 1, (BATCH,))
        batch = torch.stack([ids[begin : begin + CONTEXT + 1] for begin in begins])
        logits = model(batch[:, :-1]).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0 or step == options.steps - 1:
            sys.stderr.write(f"step {step}: loss {float(loss.detach()):.3f}\n")
    model.half().save_pretrained(options.folder)
    tokenizer.save(str(options.folder / "tokenizer.json"))
    # transformers writes the rotation in its newer place; GGUF is written from the older one.
    path = options.folder / "config.json"
    told = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(told | {"rope_theta": 10000.0, "rope_scaling": None}, indent=2), "utf-8")


if __name__ == "__main__":
    main()
