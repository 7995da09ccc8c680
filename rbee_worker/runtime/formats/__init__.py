"""What the files of a model hold and where; no torch but where values are decoded.

Read ``safetensors`` first: its ``Checkpoint`` is what every format becomes. Then ``gguf``, ``quantized`` and
``stacked_experts``.
"""
