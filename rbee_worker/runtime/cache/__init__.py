"""The KV cache.

Read ``block_pool`` first: who owns which block, without a tensor. Then ``kv_cache``: the keys and values themselves,
and each sequence's way through them.
"""
