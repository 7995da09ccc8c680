import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rbee_worker.runtime.architecture.table import LLAMA, parse_config
from rbee_worker.runtime.formats.checkpoint import TensorInfo
from rbee_worker.runtime.formats.safetensors import read_safetensors
from rbee_worker.runtime.loading.groups import group_weights
from rbee_worker.runtime.loading.parts import PartBuilder, RowBlocks, empty_on, rows_of
from rbee_worker.runtime.model.linear.linear import LinearFormat, make_linear
from tests.tiny import write_tiny_model

CPU = torch.device("cpu")


def test_rows_of_a_matrix_are_a_tensor_of_their_own() -> None:
    info = TensorInfo("t", (8, 6), "F16", Path("a.gguf"), offset=100, nbytes=96, rope_heads=4)
    part = rows_of(info, 2, 6)
    assert (part.shape, part.offset, part.nbytes, part.rope_heads) == ((4, 6), 124, 48, 2)


@pytest.mark.parametrize("shape", [(3, 5), (1024, 700)])
def test_memory_of_a_tensor_goes_with_it(shape: tuple[int, int]) -> None:
    tensor = empty_on(CPU, shape, torch.float32)
    tensor.fill_(1.5)
    part = tensor[1:]
    del tensor
    assert torch.equal(part, torch.full((shape[0] - 1, shape[1]), 1.5))


def test_no_memory_is_a_memory_error() -> None:
    with pytest.raises(MemoryError, match="bytes"):
        empty_on(CPU, (2**46,), torch.float32)


def test_blocks_of_rows_are_one_linear_layer() -> None:
    form = LinearFormat("dense", torch.float32, torch.float32)
    weight, x = torch.randn(10, 4), torch.randn(3, 4)
    whole = make_linear(weight, None, form)
    blocks = RowBlocks([make_linear(block, None, form) for block in weight.split(3)])
    assert torch.allclose(blocks(x), whole(x), atol=1e-6)
    assert blocks.nbytes == whole.nbytes


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_is_packed_in_blocks_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    monkeypatch.setattr("rbee_worker.runtime.loading.parts._BLOCK_WEIGHTS", 64 * 100)  # of 320 rows
    folder = write_tiny_model(tmp_path, intermediate_size=48, tie_word_embeddings=tied)
    stored = load_file(folder / "model.safetensors")
    sizes = []

    def packed(weight: torch.Tensor, bias: torch.Tensor | None, form: LinearFormat) -> object:
        sizes.append(len(weight))
        # A copy, as packing makes one: the staging that it came from is used again.
        return make_linear(weight.clone(), bias, LinearFormat("dense", torch.float32, form.activation_dtype))

    def read(info: TensorInfo, target: torch.Tensor, _held: torch.dtype) -> None:
        begin = (info.offset - whole[info.name].offset) // (info.nbytes // info.shape[0])
        target.copy_(stored[info.name][begin : begin + info.shape[0]])

    monkeypatch.setattr("rbee_worker.runtime.loading.parts.make_linear", packed)
    config = parse_config(json.loads((folder / "config.json").read_text()), file="config.json")
    groups = group_weights(config, LLAMA, read_safetensors(folder))
    whole = {info.name: info for group in groups for info in group.tensors.values()}
    form = LinearFormat("packed-fp16", torch.float16, torch.float32)
    part = PartBuilder(config, form, CPU, read).build(groups[0 if tied else 1])
    assert sizes == [96, 96, 96, 32]
    x = torch.randn(2, 64)
    table = stored["model.embed_tokens.weight" if tied else "lm_head.weight"]
    assert part.head is not None
    assert torch.allclose(part.head(x), x @ (table.half().float() if tied else table).T, atol=2e-2)
