"""What the files of a model hold and where. Only the modules that decode or check values import torch.

Read ``checkpoint`` first: every format becomes one. Then ``safetensors``, ``gguf``, ``quantized`` and
``stacked_experts``.
"""
