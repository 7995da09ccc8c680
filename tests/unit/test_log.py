"""Log lines: one line each, on whatever stderr is now."""

import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from rbee_worker import log


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in root.handlers:
        if isinstance(handler, log.BackgroundHandler):
            handler.close()
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
    logging.getLogger("x").warning("two\r\nlines\x1b[2J", extra={"correlation_id": "c"}, exc_info=OSError("\x1b[2J"))
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.endswith("WARNING x: two\\r\\nlines\\x1b[2J correlation_id=c (OSError: \\x1b[2J)\n")


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


class Gate:
    """A stderr that takes nothing until it is opened, as a pipe does that nobody reads; or that fails."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.entered = threading.Event()
        self.fails = False
        self.lines: list[str] = []

    def write(self, text: str) -> None:
        self.entered.set()
        assert self.open.wait(60)
        if self.fails:
            raise OSError(28, "No space left on device")
        self.lines.append(text)

    def flush(self) -> None:
        pass


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open.set()
    log.flush()


def background(fmt: log.LogFormat = "text") -> log.BackgroundHandler:
    log.configure("info", fmt, background=True)
    (handler,) = [h for h in logging.getLogger().handlers if isinstance(h, log.BackgroundHandler)]
    return handler


def test_lines_of_the_background_keep_their_order(capsys: pytest.CaptureFixture[str]):
    background()
    for number in range(500):
        logging.getLogger("x").info("line %d", number)
    log.flush()
    found = re.findall(r"line (\d+)\n", capsys.readouterr().err)
    assert found == [str(number) for number in range(500)]
    assert log.lines_dropped() == 0


def test_who_logs_never_waits_and_what_is_lost_is_counted_and_told_in_its_place(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "stderr", gate)
    handler = background("json")
    logging.getLogger("x").info("first")
    assert gate.entered.wait(60)  # the thread is stuck in this one
    handler._limit = 3000
    for number in range(100):
        logging.getLogger("x").info("line %d %s", number, "x" * 200)
    lost = log.lines_dropped()
    assert 80 < lost < 100
    gate.open.set()
    log.flush()
    logging.getLogger("x").info("last")
    log.flush()
    lines = [json.loads(text) for text in gate.lines]
    assert lines[0]["message"] == "first"
    assert [line["message"].split()[1] for line in lines[1:-2]] == [str(n) for n in range(100 - lost)]
    assert (lines[-2]["level"], lines[-2]["lines_lost"]) == ("warning", lost)
    assert lines[-1]["message"] == "last"
    assert log.lines_dropped() == lost


def test_lines_between_two_losses_stand_between_their_notices(gate: Gate, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stderr", gate)
    handler = background("json")
    handler.write("{}")
    assert gate.entered.wait(60)
    handler._limit = 10
    for line in ('"a"', '"too long to wait"', '"too long to wait"', '"b"', '"too long to wait"'):
        handler.write(line)
    gate.open.set()
    log.flush()
    found = [json.loads(text) for text in gate.lines]
    assert [line["lines_lost"] if isinstance(line, dict) and line else line for line in found] == [{}, "a", 2, "b", 1]


def test_what_cannot_be_written_is_counted_and_told_when_it_can_be_again(gate: Gate, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stderr", gate)
    background("json")
    gate.fails = True
    gate.open.set()
    for number in range(3):
        logging.getLogger("x").info("line %d", number)
    log.flush()
    assert (gate.lines, log.lines_dropped()) == ([], 3)
    gate.fails = False
    logging.getLogger("x").info("again")
    log.flush()
    notice, line = (json.loads(text) for text in gate.lines)
    assert notice["lines_lost"] == 3
    assert line["message"] == "again"


def test_the_thread_outlives_a_stderr_that_is_none_and_a_line_that_cannot_be_formed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    handler = background()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", None)
        logging.getLogger("x").info("nobody sees this")
        log.flush()
    assert log.lines_dropped() == 1
    handler.emit(logging.makeLogRecord({"name": "x", "levelname": "INFO", "msg": "%d", "args": ("no number",)}))
    log.flush()
    err = capsys.readouterr().err
    assert "1 log lines were lost" in err
    assert "INFO x: a log line could not be formed from '%d'\n" in err


def test_a_closed_handler_ends_its_thread_and_takes_no_more(capsys: pytest.CaptureFixture[str]):
    handler = background()
    handler.write("last")
    handler.close()
    handler._thread.join(60)
    handler.write("too late")
    assert capsys.readouterr().err == "last\n"
    assert handler.dropped == 1


PROGRAM = """
import logging, sys
from rbee_worker import log

log.configure("info", "text", background=True)
for number in range(int(sys.argv[1])):
    logging.getLogger("x").info("line %d", number)
"""


def test_nothing_is_lost_at_the_end_of_a_process():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "1000"], capture_output=True, text=True, timeout=60, check=True
    )
    assert re.findall(r"line (\d+)\n", done.stderr) == [str(number) for number in range(1000)]


REPLACED = "import os, sys; sys.stderr = os.fdopen(2, 'w', buffering=1, closefd=False)"


@pytest.mark.parametrize("before", ["", REPLACED], ids=["own", "replaced"])
def test_a_process_ends_though_nobody_reads(before: str):
    with subprocess.Popen([sys.executable, "-c", before + PROGRAM, "5000"], stderr=subprocess.PIPE) as process:
        try:
            assert process.wait(60) == 0
        finally:
            process.kill()


def test_a_stderr_that_does_not_block_gets_every_line():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with subprocess.Popen([sys.executable, "-c", PROGRAM, "4000"], stderr=writer) as process:
        os.close(writer)
        with os.fdopen(reader) as lines:
            found = re.findall(r"line (\d+)\n", lines.read())
        assert process.wait(60) == 0
    assert found == [str(number) for number in range(4000)]


def test_what_is_logged_cannot_draw_in_any_format(capsys: pytest.CaptureFixture[str]):
    draws = "x\x1b[2J\x9b31m\u202e\U000e0041\nforged"
    for fmt in log.LOG_FORMATS:
        for level in ("warning", "debug"):
            log.configure(level, fmt)  # type: ignore[arg-type]
            logging.getLogger("x").error(draws, extra={"model": draws, draws: 1}, exc_info=ValueError(draws))
            lines = capsys.readouterr().err.removesuffix("\n").split("\n")
            assert all(line.isprintable() for line in lines)
            # Only the record itself stands where records do.
            assert [line.startswith(" ") for line in lines] == [False] + [True] * (len(lines) - 1)
    log.configure("info", "json")
    logging.getLogger("x").info(draws, extra={"model": draws})
    line = json.loads(capsys.readouterr().err)
    assert line["message"] == line["model"] == draws
