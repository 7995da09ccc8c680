"""Structured output of the real model, by the commands and over HTTP, beside other streams."""

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import pytest

from tests.integration.conftest import SECONDS, Served, run, serving

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "country": {"enum": ["France", "Italy", "Spain"]},
        "rivers": {"type": "array", "items": {"type": "string", "maxLength": 10}, "maxItems": 3},
        "inhabitants": {"type": "integer", "minimum": 0, "maximum": 99_999_999},
    },
    "required": ["city", "country", "rivers", "inhabitants"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def worker(model_dir: Path) -> Iterator[Served]:
    with serving("--model", str(model_dir), "--max-context", "512", "--no-prefix-cache") as served:
        yield served


def ask(worker: Served, text: str, **body: Any) -> str:
    """The answer, which must end by itself."""
    messages = [{"role": "user", "content": text}]
    events = worker.infer(**{"messages": messages, "max_tokens": 200, "seed": 1} | body)
    assert events[-1]["stop_reason"] in {"eos", "max_tokens"}, events[-1]
    return "".join(event["t"] for event in events if event["event"] == "token")


def test_generate_by_a_schema(model_dir: Path, tmp_path: Path):
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMA))
    result = run(
        *("generate", "--model", str(model_dir), "--prompt", "Describe Paris.", "--json-schema", str(schema)),
        *("--temperature", "1.5", "--seed", "3", "--max-tokens", "200", "--quiet"),
    )
    assert result.returncode == 0, result.stderr
    jsonschema_rs.validate(SCHEMA, json.loads(result.stdout))


def test_generate_by_an_impossible_expression(worker: Served):
    result = run("generate", "--addr", worker.url, "--prompt", "hi", "--regex", "(?=a)b")
    assert result.returncode == 2
    assert "look-ahead" in result.stderr
    assert result.stdout == ""


def test_constrained_and_free_answers_in_one_batch(worker: Served):
    def free() -> str:
        return ask(worker, "Tell me a story.", temperature=0, max_tokens=24)

    alone = free()
    found: dict[str, str] = {}
    asked = {
        "free": free,
        "schema": lambda: ask(worker, "Describe Rome.", json_schema=SCHEMA, temperature=1.5),
        "regex": lambda: ask(worker, "What year is it?", regex="(19|20)[0-9]{2}", temperature=2),
        "lark": lambda: ask(worker, "Is water wet?", grammar='start: "yes" | "no"', temperature=2),
    }
    threads = [
        threading.Thread(target=lambda name=name, call=call: found.update({name: call()}))
        for name, call in asked.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert found["free"] == alone
    jsonschema_rs.validate(SCHEMA, json.loads(found["schema"]))
    assert re.fullmatch("(19|20)[0-9]{2}", found["regex"])
    assert found["lark"] in {"yes", "no"}


def test_what_cannot_be_followed_is_a_400_that_names_the_reason(worker: Served):
    for body, reason in (
        ({"json_schema": {"type": "integer", "minimum": 3, "maximum": 2}}, "minimum"),
        ({"regex": "(a"}, "regex"),
        ({"grammar": "start: nothing"}, "nothing"),
        ({"regex": "a" * 65_537}, "65536"),
    ):
        response = httpx.post(f"{worker.url}/v1/inference", json={"prompt": "secret prompt"} | body, timeout=SECONDS)
        assert response.status_code == 400, response.text
        assert reason in response.json()["error"]["message"]
        assert "secret" not in response.text
