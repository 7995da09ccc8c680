"""What the files of a model hold and where; no torch but where values are decoded.

Read ``checkpoint`` first: what every format becomes. Then ``safetensors``, ``gguf``, ``quantized`` and
``stacked_experts``.
"""
