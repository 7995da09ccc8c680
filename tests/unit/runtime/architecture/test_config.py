from typing import Any

import pytest

from rbee_worker.errors import ModelMalformed, ModelUnsupported, RbeeError
from rbee_worker.runtime.architecture.config import ModelConfig
from rbee_worker.runtime.architecture.table import parse_config
from tests.tiny import CONFIG


def parse(**changes: Any) -> ModelConfig:
    config = {key: value for key, value in (CONFIG | changes).items() if value is not None}
    return parse_config(config, file="config.json")


def test_defaults_follow_from_the_other_keys() -> None:
    config = parse(num_key_value_heads=None)
    assert config.num_key_value_heads == config.num_attention_heads == 4
    assert config.head_dim == 16
    assert parse(head_dim=32).head_dim == 32


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_both_spellings_of_rotary_parameters(key: str) -> None:
    scaling = {"rope_type": "linear", "factor": 4, "rope_theta": 777.0}
    rope = parse(**{key: scaling}).rope
    assert (rope.kind, rope.factor, rope.theta) == ("linear", 4.0, 777.0)
    assert parse(rope_theta=5.0).rope.theta == 5.0


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8,
    "low_freq_factor": 4,
    "high_freq_factor": 4,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"architectures": ["MambaForCausalLM"]},
            ModelUnsupported,
            r"architecture MambaForCausalLM .*Supported: Llama",
        ),
        ({"architectures": "x"}, ModelMalformed, "'architectures' names no model class"),
        ({"architectures": None}, ModelMalformed, "'architectures' names no model class"),
        ({"hidden_size": None}, ModelMalformed, "config.json: hidden_size is missing"),
        ({"hidden_size": "64"}, ModelMalformed, "hidden_size is '64'; it must be a positive integer"),
        ({"hidden_size": True}, ModelMalformed, "hidden_size is True"),
        ({"hidden_size": 2**40}, ModelMalformed, f"hidden_size is {2**40}"),
        ({"num_hidden_layers": 0}, ModelMalformed, "num_hidden_layers is 0"),
        ({"hidden_size": 66}, ModelMalformed, "hidden_size 66 is not a multiple of num_attention_heads 4"),
        (
            {"num_key_value_heads": 3},
            ModelMalformed,
            "num_attention_heads 4 is not a multiple of num_key_value_heads 3",
        ),
        ({"head_dim": 15}, ModelMalformed, "head_dim 15 is odd"),
        ({"rms_norm_eps": float("nan")}, ModelMalformed, "rms_norm_eps is nan"),
        ({"tie_word_embeddings": 1}, ModelMalformed, "tie_word_embeddings is 1; it must be true or false"),
        ({"hidden_act": "relu"}, ModelUnsupported, "hidden_act 'relu'"),
        ({"partial_rotary_factor": 0.5}, ModelUnsupported, "partial_rotary_factor 0.5"),
        ({"rope_scaling": {"rope_type": "xpos", "factor": 2}}, ModelUnsupported, "rotary scaling 'xpos' is not"),
        ({"rope_scaling": {"rope_type": "linear"}}, ModelMalformed, "factor is missing"),
        ({"rope_scaling": [1]}, ModelMalformed, r"rope_scaling is \[1\]; it must be an object"),
        ({"rope_scaling": LLAMA3}, ModelMalformed, "low_freq_factor 4 is not below high_freq_factor 4"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], error: type[RbeeError], message: str) -> None:
    with pytest.raises(error, match=message):
        parse(**changes)
