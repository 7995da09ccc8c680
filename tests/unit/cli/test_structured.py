"""The options that say what the text must match."""

from pathlib import Path

import pytest

from rbee_worker.config import GrammarSpec
from tests.unit.cli.harness import Script, run
from tests.unit.fake_worker import FakeWorker, frames, stream
from tests.unit.samples import JOB

SCHEMA = '{"type": "object"}'


@pytest.fixture
def schema(tmp_path: Path) -> str:
    file = tmp_path / "schema.json"
    file.write_text(SCHEMA)
    return str(file)


def test_each_option_asks_for_its_kind(engine: Script, schema: str, tmp_path: Path):
    lark = tmp_path / "list.lark"
    lark.write_text("\N{BYTE ORDER MARK}start: /é/", "utf-8")
    for arguments in (["--json-schema", schema], ["--regex", "a+"], ["--grammar", str(lark)], []):
        assert run("generate", "-p", "x", *arguments).exit_code == 0
    assert [request.sampling.grammar for request in engine.requests] == [
        GrammarSpec("json_schema", SCHEMA),
        GrammarSpec("regex", "a+"),
        GrammarSpec("lark", "start: /é/"),
        None,
    ]


def test_a_worker_is_asked_the_same(worker: FakeWorker, schema: str):
    worker.answers["POST /v1/inference"] = stream(frames(*JOB))
    assert run("generate", "-p", "x", "--json-schema", schema, "--addr", worker.addr).exit_code == 0
    assert run("generate", "-p", "x", "--regex", "a+", "--addr", worker.addr).exit_code == 0
    assert worker.calls[0].body["json_schema"] == {"type": "object"}
    assert worker.calls[1].body["regex"] == "a+"
    assert "grammar" not in worker.calls[0].body.keys() | worker.calls[1].body.keys()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"a":\n 1,}', "schema.json:2:4: not JSON"),
        (b"[1]", "holds no JSON object"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
    ],
)
def test_a_file_that_holds_no_schema(engine: Script, schema: str, content: bytes, expected: str):
    Path(schema).write_bytes(content)
    result = run("generate", "-p", "x", "--json-schema", schema)
    assert result.exit_code == 2
    assert expected in result.stderr
    assert engine.models == [], "it is told before the model is loaded"


@pytest.mark.parametrize("option", ["--json-schema", "--grammar"])
def test_a_file_that_is_not_there(engine: Script, option: str):
    result = run("generate", "-p", "x", option, "no/such.file")
    assert result.exit_code == 2
    assert f"{option}: no/such.file cannot be read" in result.stderr
    assert engine.requests == []


def test_one_of_them_at_most(engine: Script, schema: str):
    result = run("generate", "-p", "x", "--json-schema", schema, "--regex", "a")
    assert result.exit_code == 2
    assert "--json-schema and --regex: give one of them" in result.stderr
    assert engine.requests == []
