"""What is read from each family's config, and what is refused rather than run wrongly."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from rbee_worker.errors import ModelMalformed, ModelUnsupported, RbeeError
from rbee_worker.runtime.architecture import readers
from rbee_worker.runtime.architecture.config import LayerTraits, ModelConfig
from rbee_worker.runtime.architecture.roles import layer_shapes, parameters, stored_shapes, tensor_name
from rbee_worker.runtime.architecture.table import ARCHITECTURES, parse_config
from rbee_worker.runtime.untrusted import ConfigReader
from tests.tiny import CONFIG

ROOT = Path(__file__).parents[4]
SIZES = {key: value for key, value in CONFIG.items() if key.startswith(("num_", "hidden_size", "inter", "vocab"))}


def parse(family: str, **changes: Any) -> ModelConfig:
    values = SIZES | {"architectures": [f"{family}ForCausalLM"], "num_hidden_layers": 4} | changes
    return parse_config(values, file="config.json")


def windows(config: ModelConfig) -> list[int | None]:
    return [layer.window for layer in config.layers]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_family_reads_a_config_of_sizes_alone(name: str) -> None:
    config = parse(name.removesuffix("ForCausalLM"))
    assert len(config.layers) == config.num_hidden_layers
    for index in range(config.num_hidden_layers):
        for role in stored_shapes(config, index):
            assert tensor_name(ARCHITECTURES[name], index, role).startswith(f"model.layers.{index}.")
    assert parameters(config) >= parameters(config, active=True) > 0


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_bidirectional_attention", True),
        ("clip_qkv", 8.0),
        ("some_new_rope_trick", {"a": 1}),
        ("attention_temperature_tuning", True),
        ("moe_layer_freq", [1, 0]),
        ("num_shared_experts", 1),
        ("value_residual", "learned"),
    ],
)
def test_what_might_matter_and_is_not_known_is_refused(name: str, key: str, value: object) -> None:
    with pytest.raises(ModelUnsupported, match=rf"config\.json: {key} is .* does not handle for "):
        parse(name.removesuffix("ForCausalLM"), **{key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pretraining_tp", 2),
        ("attention_dropout", 0.1),
        ("_name_or_path", "a/b"),
        ("rope_interleaved", False),
        ("use_mrope", False),
        ("full_attn_mod", 1),
        ("lm_head_bias", False),
        ("initializer_range", 0.02),
        ("eos_token_id", [1, 2]),
        ("torch_dtype", "bfloat16"),
        ("auto_map", {"AutoConfig": "x"}),
        ("quantization_config", None),
    ],
)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_does_not_matter_may_be_there(name: str, key: str, value: object) -> None:
    parse(name.removesuffix("ForCausalLM"), **{key: value})


@pytest.mark.parametrize(
    ("family", "changes", "error", "message"),
    [
        ("Llama", {"sliding_window": 64}, ModelUnsupported, "sliding_window is 64, .* for Llama"),
        ("Llama", {"partial_rotary_factor": 0.5}, ModelUnsupported, "partial_rotary_factor 0.5 is not supported"),
        ("Gemma3", {"attn_logit_softcapping": 50.0}, ModelUnsupported, "attn_logit_softcapping is 50.0"),
        ("Gemma2", {"layer_types": ["full_attention"]}, ModelMalformed, "must be a list of 4 values"),
        ("Gemma2", {"layer_types": ["chunked_attention"] * 4}, ModelUnsupported, "names 'chunked_attention'"),
        ("Gemma2", {"hidden_activation": "relu"}, ModelUnsupported, "hidden_activation 'relu'"),
        ("SmolLM3", {"no_rope_layers": [1, 0]}, ModelMalformed, "no_rope_layers is .* list of 4 values"),
        ("Mixtral", {"num_experts_per_tok": 9}, ModelMalformed, "9 experts a token, of 8"),
        ("Cohere2", {"position_embedding_type": "alibi"}, ModelUnsupported, "position_embedding_type"),
        ("StableLm", {"partial_rotary_factor": 0.95}, ModelMalformed, "15 of 16 .* an even number"),
        ("StableLm", {"partial_rotary_factor": 1.5}, ModelMalformed, "24 of 16"),
        ("GptOss", {"quantization_config": {"quant_method": "awq"}}, ModelUnsupported, "mxfp4 and plain"),
        ("GptOss", {"compression_config": {"quant_method": "awq"}}, ModelUnsupported, "mxfp4 and plain"),
        (
            "Phi3",
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 8}},
            ModelMalformed,
            "short_factor is .* list of 8 values",
        ),
        (
            "Phi3",
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 7 + ["x"]}},
            ModelMalformed,
            "long_factor is 'x'",
        ),
        (
            "Llama",
            {"rope_scaling": {"rope_type": "yarn", "factor": 4, "scale_base": 512}},
            ModelUnsupported,
            "scale_base is 512, .* 'yarn'",
        ),
        (
            "Qwen2",
            {"rope_parameters": {"full_attention": {"rope_type": "default"}, "sliding_attention": {}}},
            ModelUnsupported,
            "one set of rotary parameters",
        ),
        ("Llama", {"rope_theta": 1}, ModelMalformed, "divide by zero"),
        ("Llama", {"rope_scaling": {"type": "yarn", "rope_theta": 0.5}}, ModelMalformed, "divide by zero"),
        ("Llama", {"num_hidden_layers": 2**20}, ModelMalformed, "num_hidden_layers is 1048576"),
        ("Qwen3Moe", {"num_experts": 2**20}, ModelMalformed, "num_experts is 1048576"),
        ("Qwen3Moe", {"mlp_only_layers": 3}, ModelMalformed, "mlp_only_layers is 3"),
        ("Gemma3", {"layer_types": [["x"]] * 4}, ModelUnsupported, r"names \['x'\]"),
        ("Llama", {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 2]}}, ModelUnsupported, "mrope"),
    ],
)
def test_what_is_wrong_is_named(family: str, changes: dict[str, Any], error: type[RbeeError], message: str) -> None:
    with pytest.raises(error, match=message):
        parse(family, **changes)


def test_windows_are_where_the_config_says() -> None:
    assert windows(parse("Mistral")) == [4096] * 4
    assert windows(parse("Mistral", sliding_window=None)) == [None] * 4
    assert windows(parse("Qwen2", sliding_window=9, max_window_layers=1)) == [None] * 4
    used = {"use_sliding_window": True, "sliding_window": 9}
    assert windows(parse("Qwen2", **used, max_window_layers=3)) == [None, None, None, 9]
    assert windows(parse("Qwen3", **used, max_window_layers=0)) == [9] * 4
    assert windows(parse("Qwen3Moe", **used, max_window_layers=3)) == [9] * 4
    assert windows(parse("Gemma2", sliding_window=5)) == [5, None, 5, None]
    assert windows(parse("Gemma3", sliding_window=5, sliding_window_pattern=3)) == [5, 5, None, 5]
    assert windows(parse("Cohere2", sliding_window=5)) == [5, 5, 5, None]
    assert windows(parse("GptOss", sliding_window=5, layer_types=["full_attention"] * 4)) == [None] * 4
    assert windows(parse("Llama")) == windows(parse("SmolLM3")) == [None] * 4


def test_layers_without_positions() -> None:
    assert [layer.rope for layer in parse("SmolLM3").layers] == ["global", "global", "global", "none"]
    assert [layer.rope for layer in parse("SmolLM3", no_rope_layers=[0, 1, 1, 0]).layers] == [
        *("none", "global", "global", "none")
    ]
    assert parse("Cohere2").layers[-1] == LayerTraits(rope="none")


def test_gemma_3_has_rotary_parameters_of_two_kinds_in_either_spelling() -> None:
    old = parse("Gemma3", rope_theta=5e5, rope_local_base_freq=77.0, rope_scaling={"rope_type": "linear", "factor": 8})
    both = {
        "full_attention": {"rope_type": "linear", "factor": 8, "rope_theta": 5e5},
        "sliding_attention": {"rope_theta": 77.0},
    }
    assert old.local_rope is not None
    assert old == parse("Gemma3", rope_parameters=both)
    assert (old.rope.kind, old.rope.theta, old.local_rope.kind, old.local_rope.theta) == (
        "linear",
        5e5,
        "default",
        77.0,
    )
    assert parse("Gemma3").rope.theta == 1e6


def test_the_context_is_what_the_scaling_reaches() -> None:
    def contexts(family: str = "Llama", **scaling: Any) -> tuple[int, int]:
        config = parse(family, rope_scaling=scaling, max_position_embeddings=100)
        return config.default_context, config.longest_context

    assert contexts(rope_type="default") == (100, 100)
    assert contexts(rope_type="linear", factor=4) == (100, 100)
    assert contexts(rope_type="dynamic", factor=4) == (100, 400)
    assert contexts(rope_type="yarn", factor=4, original_max_position_embeddings=50) == (200, 200)
    assert contexts(rope_type="yarn", factor=4, original_max_position_embeddings=10) == (100, 100)


@pytest.mark.parametrize("name", ["su", "yarn", "longrope"])
def test_the_names_that_phi_3_gave_longrope(name: str) -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    rope = parse("Phi3", max_position_embeddings=65536, rope_scaling={"type": name, **factors}).rope
    assert (rope.kind, rope.original_max_positions, rope.factor) == ("longrope", 4096, 16.0)
    assert rope.attention_factor == pytest.approx((1 + 4 / 12) ** 0.5)


def test_experts_are_in_the_layers_that_have_them() -> None:
    config = parse("Qwen3Moe", mlp_only_layers=[3], decoder_sparse_step=2, num_experts=3, num_experts_per_tok=2)
    assert [layer.experts for layer in config.layers] == [False, True, False, False]
    assert "experts.2.down.weight" in layer_shapes(config, 1)
    assert "down.weight" in layer_shapes(config, 0)
    name = tensor_name(ARCHITECTURES[config.architecture], 1, "experts.2.down.weight")
    assert name == "model.layers.1.mlp.experts.2.down_proj.weight"


def test_a_reader_s_docstring_says_what_its_family_is() -> None:
    used = {architecture.traits for architecture in ARCHITECTURES.values()}
    assert all(inspect.getdoc(reader) for reader in used)
    assert readers.llama in used


@pytest.mark.parametrize(("method", "value"), [("items", "x"), ("text", 3), ("section", [1]), ("boolean", 1)])
def test_a_value_of_the_wrong_type_is_named(method: str, value: object) -> None:
    reader = ConfigReader({"some_key": value}, "config.json")
    arguments: dict[str, Any] = {"text": {"default": ""}, "boolean": {"default": True}}.get(method, {})
    with pytest.raises(ModelMalformed, match=r"config\.json: some_key is "):
        getattr(reader, method)("some_key", **arguments)


def test_the_page_on_adding_a_model_quotes_the_code() -> None:
    page = (ROOT / "docs" / "adding-a-model.md").read_text("utf-8")
    blocks = re.findall(r"^```\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    files = [ROOT / name for name in re.findall(r"`((?:rbee_worker|tests)/[\w/]+\.py)`", page)]
    code = "".join(file.read_text("utf-8") for file in files)
    assert len(blocks) == 4
    assert sum(block.count("\n") for block in blocks) < 30
    for block in blocks:
        assert block in code, block
