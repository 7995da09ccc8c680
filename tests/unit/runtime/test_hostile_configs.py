"""Each key of a config with each extreme value: the model is read or refused, and nothing else happens, soon."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rbee_worker.errors import ModelError, ModelMalformed
from rbee_worker.runtime.architecture.table import ARCHITECTURES, parse_config
from rbee_worker.runtime.formats.quantized.methods import METHODS, read_quantization
from rbee_worker.runtime.inspection import inspect_model
from rbee_worker.runtime.model.rope import rotaries
from rbee_worker.runtime.source import resolve
from rbee_worker.runtime.untrusted import MAX_DIMENSION, ConfigReader
from tests.tiny import CONFIG, write_tiny_model

nested: dict[str, Any] = {}
for _ in range(300):
    nested = {"a": nested}

EXTREMES: list[Any] = [
    *(0, -1, 1, 3, 2**24, 2**24 + 1, 2**63, 10**90, 10**400, 0.0, -0.5, 1e-320, 1e-30, 1e30, 1e308, float("nan")),
    *(float("inf"), "", "\x1b]0;x\x07\n", "x" * 100_000, [], [1e308], [0] * 10_000, [[[]]], {}, {"\x1b[2J": 1}, nested),
    *(None, True, False),
]
ROPES: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
]
for rope in ROPES:
    rope["original_max_position_embeddings"] = 256
QUANTIZED = [{"quant_method": name, "bits": 4, "group_size": 32} for name in (*METHODS, "mxfp4")]
HANG_SECONDS = 100
"""Ten times what a test takes on a slow machine; all the values together."""


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Every key that a reader of some family asks a config for."""
    seen: set[str] = set()
    get = ConfigReader._get

    def noting(self: ConfigReader, key: str, default: object) -> Any:
        seen.add(key)
        return get(self, key, default)

    with monkeypatch.context() as patched:
        patched.setattr(ConfigReader, "_get", noting)
        for name in ARCHITECTURES:
            parse(CONFIG | {"architectures": [name]})
        for rope in ROPES:
            parse(CONFIG | {"rope_scaling": rope})
        for quantization in QUANTIZED:
            read(quantization)
    assert {"vocab_size", "rope_scaling", "num_experts", "beta_fast", "desc_act", "partial_rotary_factor"} <= seen
    return seen | set(CONFIG)


def parse(config: dict[str, Any]) -> None:
    """Read a config and make the tables of its rotary embedding, as a load does; or refuse it."""
    try:
        model = parse_config(config, file="config.json")
    except ModelError as error:
        assert_clean(error)
        return
    assert model.longest_context <= MAX_DIMENSION
    if model.rotary_dim <= 2**8:
        assert rotaries(model, 16, torch.device("cpu"))
        assert rotaries(model, 600, torch.device("cpu"))


def read(quantization: object) -> None:
    try:
        read_quantization(ConfigReader({"quantization_config": quantization}, "config.json"))
    except ModelError as error:
        assert_clean(error)


def assert_clean(error: ModelError) -> None:
    assert str(error).isprintable()
    assert len(str(error)) < 1500


def without_digits(values: list[Any]) -> Iterator[Any]:
    """What the reader of JSON passes on: no integer of more than a hundred digits, no NaN."""
    return (value for value in values if json.dumps(value) not in {"NaN", "Infinity", str(10**400)})


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_family_reads_or_refuses_every_value(name: str, keys: set[str]) -> None:
    began = time.monotonic()
    for key in sorted(keys):
        for value in without_digits(EXTREMES):
            parse(CONFIG | {"architectures": [name], key: value})
    assert time.monotonic() - began < HANG_SECONDS


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_every_rotary_scaling_reads_or_refuses_every_value(rope: dict[str, Any], keys: set[str]) -> None:
    for key in sorted(keys):
        for value in without_digits(EXTREMES):
            parse(CONFIG | {"rope_scaling": rope | {key: value}})


@pytest.mark.parametrize("quantization", QUANTIZED, ids=lambda options: options["quant_method"])
def test_every_quantization_reads_or_refuses_every_value(quantization: dict[str, Any], keys: set[str]) -> None:
    for key in sorted(keys):
        for value in without_digits(EXTREMES):
            read(quantization | {key: value})


def test_inspect_shows_or_refuses_every_value_that_a_file_may_hold(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model")
    shown = 0
    for key in [
        *CONFIG,
        "rope_scaling",
        "rope_parameters",
        "quantization_config",
        "eos_token_id",
        "head_dim",
        "\x1b[2J",
    ]:
        for value in EXTREMES:
            (folder / "config.json").write_text(json.dumps(CONFIG | {key: value}))
            try:
                inspect_model(resolve(str(folder)), None)
                shown += 1
            except ModelError as error:
                assert_clean(error)
    assert shown > len(EXTREMES)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 1e308}}, "factor is 1e+308; it must be a positive number from"),
        ({"rope_scaling": {"type": "dynamic", "factor": 1e6}}, "makes a context of 5.12e+08 tokens; 16777216 are"),
        ({"rope_scaling": ROPES[3] | {"beta_fast": 1e308}}, "beta_fast is 1e+308; it must be"),
        ({"rope_scaling": ROPES[3] | {"beta_slow": 1e-308}}, "beta_slow is 1e-308; it must be"),
        ({"partial_rotary_factor": 1e308}, "partial_rotary_factor is 1e+308; it must be"),
        ({"max_position_embeddings": 2**24 + 1}, "is 16777217; it must be a positive integer of at most 16777216"),
        ({"rope_scaling": {"rope_type": "x" * 10**6}}, "rotary scaling 'xxxx"),
    ],
)  # fmt: skip
def test_what_is_refused_is_named_with_its_figure(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError) as caught:
        parse_config(CONFIG | changes, file="config.json")
    assert message in str(caught.value)
    assert_clean(caught.value)


def test_the_name_of_a_shard_is_no_longer_than_names_are(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "y" * 5000 + ".safetensors"}}))
    with pytest.raises(ModelMalformed, match=r"tensor 'x' is said to be in 'yyyy.*which is not the plain name"):
        inspect_model(resolve(str(folder)), None)
