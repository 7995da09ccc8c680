"""The models that are measured: a folder in Hugging Face layout, and GGUF files of the same weights."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from safetensors import safe_open

from tests.benchmarks.load import write_model

DEFAULT = "SmolLM2-135M-Instruct"
RANDOM = "random-1.1b"
TWINS = {"F16": 1, "Q8_0": 7, "Q4_0": 2, "Q4_K_M": 15}
"""Name of a GGUF form -> its number in llama.cpp (``llama_ftype``)."""
QUANTIZER = Path(__file__).parent / "quantize.py"

_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


@dataclass(frozen=True, slots=True)
class Model:
    """A model, ready to be measured.

    Attributes:
        name: of it.
        folder: in Hugging Face layout, stored as float16.
        twins: the GGUF files by form, and the ONNX folder; ``F16`` alone where the others' tools are not there.
        longest: tokens that its context holds.
        trained: whether its weights mean something, so that its perplexity does.
    """

    name: str
    folder: Path
    twins: dict[str, Path]
    longest: int
    trained: bool


ONNX = "ONNX int4"
"""The form that onnxruntime-genai's builder makes: blocks of 4-bit weights, beside the GGUF forms in ``twins``."""


def prepare(name: str, work: Path, quantizing_python: str | None, building_python: str | None = None) -> Model:
    """Make what is not there yet: the default model, the random one, or the twins of any Llama folder.

    Args:
        name: ``DEFAULT``, ``RANDOM`` or a folder.
        work: where the files go, some gigabytes.
        quantizing_python: an interpreter that has llama-cpp-python; None: only the F16 twin.
        building_python: one that has onnxruntime-genai and what its builder needs; None: no ONNX model.
    """
    default = work / DEFAULT
    if name in (DEFAULT, RANDOM) and not (default / "model.safetensors").is_file():
        command = [sys.executable, "-m", "rbee_worker", "convert", DEFAULT, str(default), "--dtype", "float16"]
        subprocess.run(command, check=True)
    folder = {DEFAULT: default, RANDOM: work / RANDOM}.get(name, Path(name))
    if name == RANDOM:
        # Its vocabulary has as many tokens as the default model's: it takes that tokenizer.
        write_model(folder, "float16")
        for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            shutil.copy(default / file, folder)
    twins = {}
    for form, number in TWINS.items():
        path = work / f"{folder.name}-{form}.gguf"
        if form != "F16" and quantizing_python is None:
            continue
        if not path.is_file():
            part = path.with_suffix(".part")
            if form == "F16":
                write_gguf(folder, part)
            else:
                quantize(str(quantizing_python), twins["F16"], part, number)
            part.rename(path)
        twins[form] = path
    if building_python is not None and (built := build_onnx(building_python, folder, work)) is not None:
        twins[ONNX] = built
    config = json.loads((folder / "config.json").read_text("utf-8"))
    return Model(folder.name, folder, twins, config["max_position_embeddings"], trained=name != RANDOM)


def quantize(python: str, source: Path, target: Path, number: int) -> None:
    """Have llama.cpp quantize a file; it is quiet unless it fails.

    Raises:
        SystemExit: with what it said.
    """
    command = [python, str(QUANTIZER), str(source), str(target), str(number)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)


def build_onnx(python: str, folder: Path, work: Path) -> Path | None:
    """The folder that onnxruntime-genai's builder makes of a model; None: it failed, and what it said is told."""
    built = work / f"{folder.name}-onnx-int4"
    if not built.is_dir():
        part = work / f"{folder.name}-onnx-int4.part"
        shutil.rmtree(part, ignore_errors=True)
        command = [python, "-m", "onnxruntime_genai.models.builder", "-i", str(folder), "-o", str(part)]
        options = ["-p", "int4", "-e", "cpu", "-c", str(work / "onnx-cache")]
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:]
            sys.stderr.write(f"onnxruntime-genai's builder failed: {''.join(last)}\n")
            return None
        part.rename(built)
    return built


def write_gguf(folder: Path, path: Path) -> None:
    """Write a folder's Llama as GGUF: matrices in float16, vectors in float32.

    Raises:
        ValueError: the folder holds something else.
    """
    config = json.loads((folder / "config.json").read_text("utf-8"))
    if config["model_type"] != "llama" or config.get("rope_scaling"):
        raise ValueError(f"{folder}: only plain Llamas are written as GGUF here.")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = GGUFWriter(path, "llama")
    writer.add_name(folder.name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(TWINS["F16"])
    _add_tokenizer(writer, folder, config)
    for name, tensor in _tensors(folder / "model.safetensors"):
        stem = name.removesuffix(".weight")
        if stem.endswith(("q_proj", "k_proj")):
            tensor = interleaved(tensor, heads if stem.endswith("q_proj") else kv_heads)  # noqa: PLW2901
        vector = tensor.ndim == 1
        kind = GGMLQuantizationType.F32 if vector else GGMLQuantizationType.F16
        writer.add_tensor(_gguf_name(stem), tensor.astype(np.float32 if vector else np.float16), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleaved(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head as GGUF's Llama has them: the two halves that rotate together side by side."""
    rows = matrix.shape[0] // heads
    return matrix.reshape(heads, 2, rows // 2, -1).swapaxes(1, 2).reshape(matrix.shape)


def _gguf_name(stem: str) -> str:
    if stem in _WHOLE:
        return f"{_WHOLE[stem]}.weight"
    _, _, number, part = stem.split(".", 3)
    return f"blk.{number}.{_LAYER[part]}.weight"


def _tensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    with safe_open(path, framework="numpy") as file:
        for name in file.keys():  # noqa: SIM118 - it is no mapping
            yield name, file.get_tensor(name)


def _add_tokenizer(writer: GGUFWriter, folder: Path, config: dict[str, Any]) -> None:
    """The folder's byte-level BPE; ids that it does not have are named and marked as unused."""
    found = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    by_id = {number: text for text, number in found["model"]["vocab"].items()}
    special = {entry["id"]: entry["content"] for entry in found["added_tokens"]}
    tokens, kinds = [], []
    for number in range(config["vocab_size"]):
        tokens.append(special.get(number) or by_id.get(number) or f"[unused{number}]")
        known = TokenType.NORMAL if number in by_id else TokenType.UNUSED
        kinds.append(TokenType.CONTROL if number in special else known)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in found["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_bos_token_id(config.get("bos_token_id") or 0)
    writer.add_eos_token_id(config.get("eos_token_id") or 0)
    settings = folder / "tokenizer_config.json"
    template = json.loads(settings.read_text("utf-8")).get("chat_template") if settings.is_file() else None
    if template is not None:
        writer.add_chat_template(template)
