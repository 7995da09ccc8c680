import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rbee_worker.errors import ModelMalformed, ModelUnsupported
from rbee_worker.runtime.architectures import LLAMA
from rbee_worker.runtime.checkpoint import TensorInfo, read_safetensors
from rbee_worker.runtime.linear import choose_format
from rbee_worker.runtime.model_config import parse_config
from rbee_worker.runtime.transformer import DecoderLayer, Embedding, Output, Part
from rbee_worker.runtime.weights import WeightGroup, WeightReader, plan_weights, to_tensor
from tests.tiny import write_tiny_model

CPU = torch.device("cpu")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model")


def plan(path: Path) -> list[WeightGroup]:
    config = parse_config(
        json.loads((path / "config.json").read_text()), file="config.json", supported=("LlamaForCausalLM",)
    )
    return plan_weights(config, LLAMA, read_safetensors(path))


def reader_of(path: Path) -> WeightReader:
    config = parse_config(
        json.loads((path / "config.json").read_text()), file="config.json", supported=("LlamaForCausalLM",)
    )
    return WeightReader(plan(path), config, choose_format(CPU, "float32"), CPU)


def rewrite(path: Path, **tensors: torch.Tensor | None) -> None:
    """Add, replace or (None) remove tensors, named with __ for a dot."""
    file = path / "model.safetensors"
    held = load_file(file)
    for name, tensor in tensors.items():
        held.pop(name.replace("__", "."), None)
        if tensor is not None:
            held[name.replace("__", ".")] = tensor
    save_file(held, file)


def test_layers_come_by_number_not_by_name(tmp_path: Path) -> None:
    groups = plan(write_tiny_model(tmp_path, num_hidden_layers=12))
    assert [group.kind for group in groups] == ["embedding", *["layer"] * 12, "output"]
    names = [group.tensors["q.weight"].name for group in groups[1:-1]]
    assert names == [f"model.layers.{index}.self_attn.q_proj.weight" for index in range(12)]


def test_a_missing_tensor_is_named(path: Path) -> None:
    rewrite(path, model__layers__1__mlp__up_proj__weight=None)
    with pytest.raises(
        ModelMalformed, match=r"model\.safetensors: tensor 'model\.layers\.1\.mlp\.up_proj\.weight' is missing"
    ):
        plan(path)


def test_a_leftover_tensor_is_named(path: Path) -> None:
    rewrite(path, model__layers__3__mlp__up_proj__weight=torch.zeros(2))
    with pytest.raises(ModelMalformed, match=r"1 tensors are not part of .* with 3 layers: 'model\.layers\.3"):
        plan(path)


def test_a_shape_that_the_config_contradicts_is_named(path: Path) -> None:
    rewrite(path, model__norm__weight=torch.ones(32))
    with pytest.raises(ModelMalformed, match=r"'model\.norm\.weight' has shape \[32\]; config\.json says \[64\]"):
        plan(path)


def test_stored_rotary_frequencies_are_ignored(path: Path) -> None:
    rewrite(path, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8))
    assert len(plan(path)) == 5


def test_a_tied_head_that_is_stored_too_is_ignored(path: Path) -> None:
    config = json.loads((path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (path / "config.json").write_text(json.dumps(config))
    assert "head" not in plan(path)[-1].tensors


def drain(reader: WeightReader) -> list[Part]:
    parts: list[Part] = []
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            part = reader.next_part(1.0)
        except StopIteration:
            return parts
        if part is not None:
            parts.append(part)
    raise AssertionError("the reader does not come to an end")


def test_parts_come_in_order_with_every_byte_counted(path: Path) -> None:
    reader = reader_of(path)
    parts = drain(reader)
    reader.close()
    assert [type(part) for part in parts] == [Embedding, *[DecoderLayer] * 3, Output]
    stored = load_file(path / "model.safetensors")
    assert reader.bytes_read == reader.bytes_total == sum(tensor.nbytes for tensor in stored.values())
    embedding = parts[0]
    assert isinstance(embedding, Embedding)
    assert torch.equal(embedding.table, stored["model.embed_tokens.weight"])


def test_a_file_that_ends_early_is_named(path: Path) -> None:
    reader_plan = plan(path)
    config = parse_config(
        json.loads((path / "config.json").read_text()), file="config.json", supported=("LlamaForCausalLM",)
    )
    with (path / "model.safetensors").open("r+b") as file:
        file.truncate(2000)
    reader = WeightReader(reader_plan, config, choose_format(CPU, "float32"), CPU)
    with pytest.raises(ModelMalformed, match=r"model\.safetensors: ends inside tensor '.*', \d+ bytes short"):
        drain(reader)
    reader.close()


@pytest.mark.parametrize(
    ("dtype", "torch_dtype"), [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)]
)
def test_plain_dtypes_are_read_bit_for_bit(dtype: str, torch_dtype: torch.dtype) -> None:
    values = torch.tensor([[1.5, -2.25, 0.0], [3.0, 4.0, -0.5]], dtype=torch_dtype)
    raw = values.view(torch.uint8).flatten().numpy()
    info = TensorInfo(name="t", shape=(2, 3), dtype=dtype, file=Path("a.safetensors"), offset=0, nbytes=raw.nbytes)
    assert torch.equal(to_tensor(info, raw), values)


def test_integers_are_no_weights() -> None:
    info = TensorInfo(name="t", shape=(2,), dtype="I8", file=Path("a.safetensors"), offset=0, nbytes=2)
    with pytest.raises(ModelUnsupported, match=r"a\.safetensors: tensor 't' is stored as I8"):
        to_tensor(info, np.zeros(2, dtype=np.uint8))
