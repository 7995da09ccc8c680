"""GGUF to GGUF by llama.cpp's quantizer; run by an interpreter that has llama-cpp-python.

python quantize.py FROM TO NUMBER
"""

import ctypes
import sys

import llama_cpp

source, target, number = sys.argv[1:]
params = llama_cpp.llama_model_quantize_default_params()
params.ftype = int(number)
if failed := llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)):
    sys.exit(f"llama.cpp cannot quantize {source}: {failed}")
