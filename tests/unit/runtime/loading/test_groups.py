import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rbee_worker.errors import ModelMalformed, ModelUnsupported
from rbee_worker.runtime.architecture.table import LLAMA, parse_config
from rbee_worker.runtime.formats.safetensors import read_safetensors
from rbee_worker.runtime.loading.groups import WeightGroup, group_weights
from tests.tiny import write_tiny_model


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model")


def plan(path: Path) -> list[WeightGroup]:
    config = parse_config(json.loads((path / "config.json").read_text()), file="config.json")
    return group_weights(config, LLAMA, read_safetensors(path))


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
    assert [group.kind for group in groups] == ["embedding", "output", *["layer"] * 12]
    names = [group.tensors["q.weight"].name for group in groups[2:]]
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


def test_of_many_leftover_tensors_the_first_are_named(path: Path) -> None:
    names = [f"model__layers__{layer}__mlp__up_proj__weight" for layer in range(3, 8)]
    rewrite(path, **{name: torch.zeros(2) for name in names})
    named = r"5 tensors are not part of .*layers\.3\..*layers\.5\..*', …\."
    with pytest.raises(ModelMalformed, match=named) as refused:
        plan(path)
    assert "layers.6" not in str(refused.value)


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
    assert "head" not in plan(path)[1].tensors


def test_integers_are_no_weights(path: Path) -> None:
    rewrite(path, model__norm__weight=torch.ones(64, dtype=torch.int8))
    with pytest.raises(ModelUnsupported, match=r"model\.safetensors: tensor 'model\.norm\.weight' is stored as I8"):
        plan(path)
