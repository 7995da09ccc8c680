"""EngineStats: what an engine has done and holds, read at any moment without stopping it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """One reading. What is counted is counted since the engine was made, and never goes down.

    Attributes:
        steps: forward passes that were run.
        batch_sizes: entry ``n``: steps that had ``n`` sequences in them.
        prefilled_tokens: prompt tokens that were computed; those whose keys and values were reused are not among them.
        generated_tokens: tokens sampled.
        preemptions: sequences that lost their place, and their cache, to others.
        prefix_query_tokens: prompt tokens that were looked up in the prefix cache.
        prefix_hit_tokens: those of them whose keys and values were reused.
        kv_blocks_total: blocks of the KV cache; 0 without a model.
        kv_blocks_used: blocks that running sequences hold now.
        kv_blocks_cached: blocks that no sequence holds, but that a prompt could reuse now.
        block_tokens: tokens that a block holds.
    """

    steps: int = 0
    batch_sizes: tuple[int, ...] = ()
    prefilled_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    kv_blocks_total: int = 0
    kv_blocks_used: int = 0
    kv_blocks_cached: int = 0
    block_tokens: int = 0
