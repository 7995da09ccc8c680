"""Logs: text or JSON lines on stderr, in the same form for the worker's loggers, uvicorn's and all others."""

import json
import logging
import os
import select
import sys
import threading
from collections import deque
from datetime import UTC, datetime
from textwrap import indent
from typing import Any, Literal, TextIO, get_args

from rbee_worker.escape import printable, printable_json, printable_lines

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]
LOG_LEVELS: tuple[LogLevel, ...] = get_args(LogLevel)
LOG_FORMATS: tuple[LogFormat, ...] = get_args(LogFormat)

_STANDARD = frozenset((*vars(logging.makeLogRecord({})), "message", "asctime", "taskName", "color_message"))
"""Attributes that every record has. All others came from ``extra``."""

_WAITING_CHARACTERS = 2**19
"""Characters of lines that may wait to be written: a few thousand lines."""
_FLUSH_SECONDS = 1.0
_HANDLER = "rbee_worker"

# Loggers with handlers of their own, and loggers that write too much.
_UVICORN = ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi")
_CHATTY = ("httpx", "httpcore", "asyncio", "filelock", "urllib3", "huggingface_hub", "sse_starlette")


def configure(level: LogLevel = "info", fmt: LogFormat = "text", *, background: bool = False) -> None:
    """Write every log record of ``level`` and above to stderr, one line each. May be called again.

    Tracebacks are written only at ``debug``. At other levels the same line names the exception.

    Args:
        level: the least severe level that is written.
        fmt: the form of the lines.
        background: whether a thread writes the lines, so that code that logs never waits for a reader of stderr (see
            :class:`BackgroundHandler`). If not, the code that logs writes them itself, so that log lines and other
            output of a command are in order.
    """
    handler: logging.Handler = BackgroundHandler() if background else _StderrHandler()
    handler.setFormatter(JsonFormatter(tracebacks=level == "debug") if fmt == "json" else TextFormatter(level))
    handler.set_name(_HANDLER)
    root = logging.getLogger()
    for old in [h for h in root.handlers if h.get_name() == _HANDLER]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(level.upper())
    for name in _UVICORN:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.NOTSET)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.NOTSET if level == "debug" else logging.WARNING)


def say(text: str, logger: str) -> None:
    """Write a line to stderr at any level: as it is; or as a record of ``logger``, if lines are JSON."""
    handler = next((h for h in logging.getLogger().handlers if h.get_name() == _HANDLER), None)
    if handler is not None and isinstance(handler.formatter, JsonFormatter):
        text = handler.format(logging.makeLogRecord({"name": logger, "levelname": "INFO", "msg": text}))
    if isinstance(handler, BackgroundHandler):
        handler.write(text)
    elif sys.stderr is not None:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def flush() -> None:
    """Wait until all log lines are written, for at most a second."""
    for handler in _background_handlers():
        handler.flush()


def lines_dropped() -> int:
    """How many log lines were lost because stderr was not read or could not be written to."""
    return sum(handler.dropped for handler in _background_handlers())


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``ts`` (UTC, RFC 3339, milliseconds), ``level``, ``logger``, ``message``, then extras."""

    def __init__(self, *, tracebacks: bool) -> None:
        super().__init__()
        self._tracebacks = tracebacks

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON. An extra of a type that JSON does not have is written as its ``str``."""
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
        return printable_json(json.dumps(out, ensure_ascii=False, default=str))


class TextFormatter(logging.Formatter):
    """``2026-11-22T06:00:00.000Z INFO rbee_worker.worker.worker: message key=value``."""

    def __init__(self, level: LogLevel) -> None:
        super().__init__()
        self._tracebacks = level == "debug"

    def format(self, record: logging.LogRecord) -> str:
        """The record in one line, with its extras at the end. At ``debug`` a traceback follows."""
        extras = "".join(f" {key}={_quoted(value)}" for key, value in vars(record).items() if key not in _STANDARD)
        line = f"{_timestamp(record.created)} {record.levelname} {record.name}: {record.getMessage()}{extras}"
        # Text from outside must not be able to make a second line that looks like a record, or to draw.
        line = printable(line)
        if record.exc_info and record.exc_info[1] is not None:
            traceback = self.formatException(record.exc_info) if self._tracebacks else ""
            # Indented, so that no line of a message in it looks like a record.
            line += (
                f"\n{indent(printable_lines(traceback), '  ')}" if traceback else f" ({_one_line(record.exc_info[1])})"
            )
        return line


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Uses the current ``sys.stderr`` for each record. A live progress display replaces it, to keep lines out of it."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class BackgroundHandler(logging.Handler):
    """Passes lines to a thread that writes them in order. Code that logs never waits for the thread.

    A line is lost when too many wait, or when it cannot be written. Lost lines are counted. As soon as writing works
    again, one line says how many were lost, at the place where they are missing. At exit, :func:`logging.shutdown`
    calls :meth:`flush`, which waits for the thread; beyond that the process does not wait.

    Attributes:
        dropped: how many lines were lost so far.
    """

    def __init__(self, waiting_characters: int = _WAITING_CHARACTERS) -> None:
        super().__init__()
        self.dropped = 0
        self._limit = waiting_characters
        self._waiting: deque[str | int] = deque()  # lines; a number stands for that many lost lines
        self._characters = 0
        self._writing = self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Format the line on the thread that logs, where its request is known, and pass it on."""
        try:
            line = self.format(record)
        except Exception:  # noqa: BLE001  (the arguments do not fit the message; the code that logs must go on)
            line = f"{record.levelname} {record.name}: a log line could not be formed from {record.msg!r:.200}"
        self.write(line)

    def write(self, line: str) -> None:
        """Pass a line to the thread. The line is lost if too many wait."""
        with self._changed:
            if not self._closed and self._characters + len(line) <= self._limit:
                self._waiting.append(line)
                self._characters += len(line)
            else:
                self.dropped += 1
                if self._waiting and isinstance(self._waiting[-1], int):
                    self._waiting[-1] += 1
                else:
                    self._waiting.append(1)
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait until all lines are written, for at most a second."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and not self._writing, _FLUSH_SECONDS)

    def close(self) -> None:
        """End the thread after it has written the waiting lines. Later lines are lost."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        super().close()

    def _run(self) -> None:
        untold = 0
        while (entry := self._next()) is not None:
            if isinstance(entry, int):
                untold += entry
            if untold and _write_stderr(self._loss(untold)):
                untold = 0
            if isinstance(entry, str) and (untold or not _write_stderr(entry)):
                untold += 1
                with self._changed:
                    self.dropped += 1

    def _next(self) -> str | int | None:
        """Wait for the next entry and return it. None: the handler is closed and nothing waits."""
        with self._changed:
            self._writing = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if not self._waiting:
                return None
            self._writing = True
            entry = self._waiting.popleft()
            self._characters -= len(entry) if isinstance(entry, str) else 0
            return entry

    def _loss(self, lines: int) -> str:
        text = f"{lines} log lines were lost here: stderr was not read, or could not be written to"
        record = {"name": __name__, "levelname": "WARNING", "msg": text, "lines_lost": lines}
        return self.format(logging.makeLogRecord(record))


def _background_handlers() -> list[BackgroundHandler]:
    return [handler for handler in logging.getLogger().handlers if isinstance(handler, BackgroundHandler)]


def _write_stderr(line: str) -> bool:
    """Write a line to the current stderr. Returns whether that worked."""
    stream, text = sys.stderr, f"{line}\n"
    if stream is None:  # the program was started without stderr
        return False
    try:
        if (descriptor := _descriptor(stream)) is None:
            stream.write(text)
            stream.flush()
        else:
            # Not through the stream: while nobody reads, its lock would be held, and the interpreter could not end.
            _write_descriptor(descriptor, text.encode(errors="backslashreplace"))
    except Exception:  # noqa: BLE001  (the reader has gone, the disk is full, the stream is closed: the thread goes on)
        return False
    return True


def _descriptor(stream: TextIO) -> int | None:
    """What the stream writes to; None: not to a descriptor."""
    try:
        return stream.fileno()
    except (AttributeError, OSError, ValueError):  # as streams say it that somebody put in the place of stderr
        return None


def _write_descriptor(descriptor: int, data: bytes) -> None:
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:  # another process that shares the descriptor made it non-blocking
            select.select([], [descriptor], [])


def _timestamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _one_line(error: BaseException) -> str:
    return printable(" ".join(f"{type(error).__name__}: {error}".split()))


def _quoted(value: object) -> str:
    """A value as text. In quotes if it is empty or could be read as several values."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if not text or any(c in text for c in ' \t"=') else text
