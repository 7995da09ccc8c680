"""Log lines: one line each, on whatever stderr is now."""

import json
import logging
import re
from collections.abc import Iterator

import pytest

from rbee_worker import log


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name in (*log._UVICORN, *log._CHATTY):
        logging.getLogger(name).setLevel(logging.NOTSET)


def test_json_lines_carry_the_extras(capsys: pytest.CaptureFixture[str]):
    log.configure("info", "json")
    logging.getLogger("rbee_worker.x").info("took %d", 3, extra={"correlation_id": "c-1", "path": object})
    line = json.loads(capsys.readouterr().err)
    assert list(line)[:4] == ["ts", "level", "logger", "message"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["ts"])
    assert (line["level"], line["logger"], line["message"]) == ("info", "rbee_worker.x", "took 3")
    assert line["correlation_id"] == "c-1"
    assert line["path"] == str(object)


def test_an_extra_never_replaces_a_field(capsys: pytest.CaptureFixture[str]):
    log.configure("info", "json")
    logging.getLogger("x").info("true", extra={"level": "forged", "ts": "forged"})
    line = json.loads(capsys.readouterr().err)
    assert (line["level"], line["message"]) == ("info", "true")
    assert line["ts"] != "forged"


def test_text_is_one_line_whatever_the_message(capsys: pytest.CaptureFixture[str]):
    log.configure("warning", "text")
    logging.getLogger("x").info("not shown")
    logging.getLogger("x").warning("two\r\nlines", extra={"correlation_id": "c"})
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.endswith("WARNING x: two\\r\\nlines correlation_id=c\n")


def test_a_value_in_text_cannot_forge_another(capsys: pytest.CaptureFixture[str]):
    log.configure("info", "text")
    logging.getLogger("x").info("m", extra={"job_id": 'a b="1" status=200', "client": "", "ms": 1.5})
    assert capsys.readouterr().err.endswith('x: m job_id="a b=\\"1\\" status=200" client="" ms=1.5\n')


@pytest.mark.parametrize("fmt", log.LOG_FORMATS)
def test_tracebacks_at_debug_only(fmt: log.LogFormat, capsys: pytest.CaptureFixture[str]):
    for level, shown in (("error", False), ("debug", True)):
        log.configure(level, fmt)  # type: ignore[arg-type]
        try:
            {}["key"]
        except KeyError:
            logging.getLogger("x").exception("failed")
        err = capsys.readouterr().err
        assert ("Traceback" in err) == shown
        assert "KeyError" in err


def test_configuring_again_replaces(capsys: pytest.CaptureFixture[str]):
    log.configure("info", "text")
    log.configure("info", "json")
    logging.getLogger("x").info("once")
    assert capsys.readouterr().err.count("once") == 1


def test_uvicorn_flows_through_and_httpx_is_quiet(capsys: pytest.CaptureFixture[str]):
    logging.getLogger("uvicorn.access").addHandler(logging.StreamHandler())
    log.configure("info", "json")
    logging.getLogger("uvicorn.access").info("GET /")
    logging.getLogger("httpx").info("noise")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["logger"] for line in lines] == ["uvicorn.access"]
