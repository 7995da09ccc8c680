"""Models and requests that are wrong, each with its message and its exit code or status."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.tiny import damage_normalizer, write_tiny_model

from .conftest import Served, run, serving

Damage = Callable[[Path], None]


def weights(path: Path) -> Path:
    return path / "model.safetensors"


def with_header(change: Callable[[dict[str, Any]], None]) -> Damage:
    """Damage that rewrites the safetensors header."""

    def damage(path: Path) -> None:
        data = weights(path).read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        weights(path).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])

    return damage


def set_tensor(name: str, **values: Any) -> Damage:
    return with_header(lambda header: header[name].update(values))


def truncate(path: Path) -> None:
    data = weights(path).read_bytes()
    weights(path).write_bytes(data[: len(data) // 2])


def long_header(path: Path) -> None:
    weights(path).write_bytes(struct.pack("<Q", 2**40) + weights(path).read_bytes()[8:])


def overlap(path: Path) -> None:
    with_header(lambda header: header["model.norm.weight"].update(data_offsets=[0, 256]))(path)


def config(**values: Any) -> Damage:
    def damage(path: Path) -> None:
        file = path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return damage


def missing_shard(path: Path) -> None:
    names = with_names(path)
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(names, "model-00001-of-00002.safetensors")})
    )
    weights(path).unlink()


def with_names(path: Path) -> list[str]:
    data = weights(path).read_bytes()
    return [name for name in json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]]) if name != "__metadata__"]


MODELS: dict[str, tuple[Damage, int, tuple[str, ...]]] = {
    "truncated file": (truncate, 3, ("model.safetensors", "bytes")),
    "header beyond the file": (long_header, 3, ("model.safetensors", "header", str(2**40))),
    "overlapping offsets": (overlap, 3, ("model.safetensors", "model.norm.weight")),
    "offsets out of range": (
        set_tensor("model.norm.weight", data_offsets=[10**9, 10**9 + 256]),
        3,
        ("model.norm.weight", "beyond the file's"),
    ),
    "unknown dtype": (set_tensor("model.norm.weight", dtype="F7"), 3, ("model.norm.weight", "F7")),
    "shape against the config": (config(intermediate_size=128), 3, ("mlp.gate_proj.weight", "[96, 64]", "[128, 64]")),
    "missing shard": (missing_shard, 3, ("model-00001-of-00002.safetensors",)),
    "missing tokenizer": (lambda path: (path / "tokenizer.json").unlink(), 3, ("tokenizer.json",)),
    "missing config": (lambda path: (path / "config.json").unlink(), 3, ("config.json",)),
    "config that is not JSON": (
        lambda path: void((path / "config.json").write_text("{oops")),
        3,
        ("config.json", "JSON"),
    ),
    "tokenizer that is none": (lambda path: void((path / "tokenizer.json").write_text("{}")), 3, ("tokenizer.json",)),
    "other architecture": (config(architectures=["MambaForCausalLM"]), 4, ("MambaForCausalLM", "LlamaForCausalLM")),
    "quantized checkpoint": (config(quantization_config={"quant_method": "spqr"}), 4, ("spqr",)),
    "a layer too many": (config(num_hidden_layers=4), 3, ("model.layers.3.", "missing")),
    "a layer too few": (config(num_hidden_layers=2), 3, ("model.layers.2.", "2 layers")),
}


def void(_: object) -> None:
    """Nothing, from something."""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model")


@pytest.mark.parametrize(("damage", "code", "words"), MODELS.values(), ids=MODELS.keys())
def test_a_wrong_model_is_one_message_and_an_exit_code(
    model: Path, damage: Damage, code: int, words: tuple[str, ...]
) -> None:
    damage(model)
    done = run("load", str(model), "--json")
    assert done.returncode == code, done.stderr
    first, *_ = done.stderr.splitlines()
    assert first.startswith("error: ")
    for word in words:
        assert word in done.stderr
    assert "Traceback" not in done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["stage"] for event in events] == ["resolving", "error"]
    assert events[1]["message"].startswith(first.removeprefix("error: "))


def test_a_model_over_which_a_library_panics_is_one_message_too(model: Path) -> None:
    damage_normalizer(model)
    done = run("load", str(model), "--json")
    assert done.returncode == 3, done.stderr
    # The library writes of its panic to stderr itself.
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "tokenizer.json" in message
    assert "Traceback" not in done.stderr
    *_, last = [json.loads(line) for line in done.stdout.splitlines()]
    assert (last["stage"], last["code"]) == ("error", "MODEL_MALFORMED")
    assert last["message"].startswith(message.removeprefix("error: "))


def test_a_wrong_model_is_told_over_http_too(model: Path) -> None:
    truncate(model)
    with serving("--model", str(model)) as worker:
        event = worker.events()[-1]
        health = httpx.get(f"{worker.url}/health")
    assert (event["stage"], event["code"]) == ("error", "MODEL_MALFORMED")
    assert "model.safetensors" in event["message"]
    assert health.status_code == 503
    assert event["message"] in health.text.replace('\\"', '"')


FIELDS: dict[str, tuple[Any, ...]] = {
    "prompt": ("", 5, ["a"], {"a": 1}),
    "job_id": ("", "x" * 129, "a\nb", 5),
    "max_tokens": (0, -1, 1.5, "1", True),
    "temperature": (-0.1, 2.1, "hot", True),
    "top_p": (-0.1, 1.1, "1"),
    "top_k": (-1, 0.5, "1"),
    "min_p": (-0.1, 1.1),
    "repetition_penalty": (0, -1, 2.1),
    "presence_penalty": (-2.1, 2.1),
    "frequency_penalty": (-2.1, 2.1),
    "seed": (2**64, -(2**63) - 1, 0.5, "1"),
    "stop": ("", [""], ["x"] * 17, [1], 5),
    "ignore_eos": (1, "yes"),
    "messages": ([], "hi", [{"role": "user"}], [{"content": "x"}]),
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in FIELDS.items() for value in values])
def test_every_field_out_of_range_is_named(served: Served, field: str, value: Any) -> None:
    body = {"prompt": "secret words", field: value}
    if field == "messages":
        del body["prompt"]
    answer = httpx.post(f"{served.url}/v1/inference", json=body)
    assert answer.status_code == 400
    envelope = answer.json()
    assert envelope["error"]["type"] == "invalid_request_error"
    assert {error["field"].split(".")[0].split("[")[0] for error in envelope["errors"]} == {field}
    assert all(error["constraint"] and error["message"] for error in envelope["errors"])
    assert "secret" not in answer.text


def test_all_bad_fields_are_listed_at_once(served: Served) -> None:
    answer = httpx.post(f"{served.url}/v1/inference", json={"prompt": "x", "top_p": 2, "top_k": -1, "min_p": 3})
    assert {error["field"] for error in answer.json()["errors"]} == {"top_p", "top_k", "min_p"}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"not json", 400),
        (b"[1, 2]", 400),
        (b"", 400),
        (b'{"prompt": "\xff"}', 400),
        (b'{"prompt": "x", "temperature": NaN}', 400),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
        (b'{"prompt": "' + b"x" * 5_000_000 + b'"}', 413),
        (b'{"prompt": "x", "messages": [{"role": "user", "content": "x"}]}', 400),
        (b"{}", 400),
    ],
    ids=["text", "array", "empty", "bad UTF-8", "NaN", "deep", "huge", "both", "neither"],
)
def test_bodies_that_are_no_requests(served: Served, body: bytes, status: int) -> None:
    answer = httpx.post(f"{served.url}/v1/inference", content=body)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]
    assert httpx.get(f"{served.url}/health").status_code == 200


def test_a_prompt_beyond_the_context_is_refused_with_the_figures(served: Served) -> None:
    answer = httpx.post(f"{served.url}/v1/inference", json={"prompt": "x" * 5000})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "CONTEXT_TOO_LONG")
    assert "5000 tokens" in answer.text
    assert "4096" in answer.text


def test_unknown_routes_and_wrong_methods(served: Served) -> None:
    assert httpx.get(f"{served.url}/nowhere").status_code == 404
    wrong = httpx.get(f"{served.url}/v1/inference")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert wrong.json()["error"]["code"] == "METHOD_NOT_ALLOWED"


def test_correlation_ids_are_kept_made_and_never_injected(served: Served) -> None:
    given = "123e4567-e89b-12d3-a456-426614174000"
    answer = httpx.get(f"{served.url}/v1/worker", headers={"X-Correlation-ID": given})
    assert answer.headers["x-correlation-id"] == answer.headers["x-request-id"] == given
    made = httpx.get(f"{served.url}/nowhere", headers={"X-Correlation-ID": "not a uuid"}).headers["x-correlation-id"]
    assert len(made) == 36
    assert any(given in line for line in served.log)


def test_prompts_are_in_no_log(served: Served) -> None:
    served.infer(prompt="xyzzy", max_tokens=1)
    httpx.post(f"{served.url}/v1/inference", json={"prompt": "xyzzy", "top_p": 7})
    assert not any("xyzzy" in line for line in served.log)


def test_tokens_and_back(served: Served) -> None:
    tokens = httpx.post(f"{served.url}/tokenize", json={"text": "héllo"}).json()["tokens"]
    assert len(tokens) == 6
    assert httpx.post(f"{served.url}/detokenize", json={"tokens": tokens}).json() == {"text": "héllo"}
    assert httpx.post(f"{served.url}/detokenize", json={"tokens": [10**9]}).status_code == 400
