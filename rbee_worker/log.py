"""Logs: text or JSON lines on stderr, the same for our own loggers, uvicorn's and everyone else's."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, Literal, TextIO, get_args

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]
LOG_LEVELS: tuple[LogLevel, ...] = get_args(LogLevel)
LOG_FORMATS: tuple[LogFormat, ...] = get_args(LogFormat)

_STANDARD = frozenset((*vars(logging.makeLogRecord({})), "message", "asctime", "taskName", "color_message"))
"""What every record carries: the rest came in through ``extra``."""

# Loggers with handlers or a chattiness of their own.
_UVICORN = ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi")
_CHATTY = ("httpx", "httpcore", "asyncio", "filelock", "urllib3", "huggingface_hub", "sse_starlette")


def configure(level: LogLevel = "info", fmt: LogFormat = "text") -> None:
    """Send every log record of ``level`` and above to stderr, one line each; may be called again.

    A traceback is written at ``debug`` only; other levels name the exception in the same line.
    """
    handler = _StderrHandler()
    handler.setFormatter(JsonFormatter(tracebacks=level == "debug") if fmt == "json" else TextFormatter(level))
    handler.set_name("rbee_worker")
    root = logging.getLogger()
    for old in [h for h in root.handlers if h.get_name() == "rbee_worker"]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    for name in _UVICORN:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.NOTSET)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.NOTSET if level == "debug" else logging.WARNING)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``ts`` (UTC, RFC 3339, milliseconds), ``level``, ``logger``, ``message``, then extras."""

    def __init__(self, *, tracebacks: bool) -> None:
        super().__init__()
        self._tracebacks = tracebacks

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON; an extra that JSON does not know is written as ``str`` gives it."""
        out: dict[str, Any] = {
            "ts": _timestamp(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        out.update((key, value) for key, value in vars(record).items() if key not in _STANDARD and key not in out)
        if record.exc_info and record.exc_info[1] is not None:
            out["exception"] = _one_line(record.exc_info[1])
            if self._tracebacks:
                out["traceback"] = self.formatException(record.exc_info)
        return json.dumps(out, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """``2026-11-22T06:00:00.000Z INFO rbee_worker.worker: message key=value``."""

    def __init__(self, level: LogLevel) -> None:
        super().__init__()
        self._tracebacks = level == "debug"

    def format(self, record: logging.LogRecord) -> str:
        """The record in one line, its extras at the end."""
        extras = "".join(f" {key}={_quoted(value)}" for key, value in vars(record).items() if key not in _STANDARD)
        line = f"{_timestamp(record.created)} {record.levelname} {record.name}: {record.getMessage()}{extras}"
        # A message from outside must not be able to forge a second line.
        line = line.replace("\r", "\\r").replace("\n", "\\n")
        if record.exc_info and record.exc_info[1] is not None:
            traceback = self.formatException(record.exc_info) if self._tracebacks else ""
            line += f"\n{traceback}" if traceback else f" ({_one_line(record.exc_info[1])})"
        return line


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Looks ``sys.stderr`` up at each record, so that a line never lands inside a live progress display."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def _timestamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _quoted(value: object) -> str:
    """A value as it is, or in quotes where it could be taken for more than one."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if not text or any(c in text for c in ' \t"=') else text
