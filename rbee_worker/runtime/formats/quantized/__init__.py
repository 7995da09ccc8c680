"""Quantized checkpoints, presented as plain ones.

Read ``tensor`` first: there the stored parts of a matrix become one tensor. ``methods`` finds the method that a config
names, and ``options`` reads its options. The methods are ``fp8``, ``gptq``, ``compressed`` and ``bitsandbytes``.
``dequantize`` computes the values.
"""
