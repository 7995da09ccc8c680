"""Text to token ids and back.

Read ``tokenizer`` first, then what it uses: ``detokenizer``, ``chat_template``, ``lookalikes``. The other modules make
a tokenizer from a model's files: ``files`` from a folder, with ``ranks``, ``sentencepiece_model``, ``sentencepiece``
and ``byte_level``; ``gguf`` from a GGUF file. Both use ``pre_tokenizers``.
"""
