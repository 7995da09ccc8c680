"""EngineStats: what an engine has done and what it holds. It can be read at any moment."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """One reading. Counts begin when the engine is made and never go down.

    Attributes:
        steps: forward passes.
        batch_sizes: entry ``n``: steps that had ``n`` sequences in them.
        prefilled_tokens: prompt tokens that were computed. Reused ones are not counted.
        generated_tokens: tokens sampled.
        drafted_tokens: tokens that were guessed, and computed along.
        accepted_tokens: those of them that were guessed right.
        preemptions: how often a sequence lost its place and its cache to others.
        prefix_query_tokens: prompt tokens that were looked up in the prefix cache.
        prefix_hit_tokens: those of them that were found there and reused.
        kv_blocks_total: blocks of the KV cache; 0 without a model.
        kv_blocks_used: blocks that running sequences hold.
        kv_blocks_cached: blocks that no sequence holds but a prompt could reuse.
        block_tokens: tokens that a block holds.
    """

    steps: int = 0
    batch_sizes: tuple[int, ...] = ()
    prefilled_tokens: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    preemptions: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    kv_blocks_total: int = 0
    kv_blocks_used: int = 0
    kv_blocks_cached: int = 0
    block_tokens: int = 0
