"""Text to token ids and back.

Read ``tokenizer`` first, then what it uses: ``detokenizer``, ``chat_template``, ``lookalikes``. The other files make
a tokenizer of what a model has: ``files`` for a folder, with ``ranks``, ``sentencepiece_model``, ``sentencepiece``
and ``byte_level``; ``gguf`` for a GGUF file. ``pre_tokenizers`` has what both need.
"""
