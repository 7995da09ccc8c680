"""Quantized checkpoints, seen as plain ones.

Read ``tensor`` first: several stored parts become one tensor of its true shape. ``methods`` finds the method that
a config names, ``options`` reads its options; ``fp8``, ``gptq``, ``compressed`` and ``bitsandbytes`` are the methods;
``dequantize`` computes the values.
"""
