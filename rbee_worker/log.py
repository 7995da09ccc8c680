"""Logs: text or JSON lines on stderr, the same for our own loggers, uvicorn's and everyone else's."""

import json
import logging
import os
import select
import sys
import threading
from collections import deque
from datetime import UTC, datetime
from typing import Any, Literal, TextIO, get_args

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]
LOG_LEVELS: tuple[LogLevel, ...] = get_args(LogLevel)
LOG_FORMATS: tuple[LogFormat, ...] = get_args(LogFormat)

_STANDARD = frozenset((*vars(logging.makeLogRecord({})), "message", "asctime", "taskName", "color_message"))
"""What every record carries: the rest came in through ``extra``."""

_WAITING_CHARACTERS = 2**19
"""Of lines that wait to be written: some thousand of them."""
_FLUSH_SECONDS = 1.0
_HANDLER = "rbee_worker"

# Loggers with handlers or a chattiness of their own.
_UVICORN = ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi")
_CHATTY = ("httpx", "httpcore", "asyncio", "filelock", "urllib3", "huggingface_hub", "sse_starlette")


def configure(level: LogLevel = "info", fmt: LogFormat = "text", *, background: bool = False) -> None:
    """Send every log record of ``level`` and above to stderr, one line each; may be called again.

    A traceback is written at ``debug`` only; other levels name the exception in the same line.

    Args:
        level: least severe of the records that are written.
        fmt: form of the lines.
        background: a thread writes them, so that whoever logs never waits for a reader of stderr; see
            :class:`BackgroundHandler`. Else whoever logs writes, so that a line stands where it belongs among the
            progress and the messages of a command.
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
    """Write a line to stderr whatever the level: as it is, or as a record of ``logger`` where lines are JSON."""
    handler = next((h for h in logging.getLogger().handlers if h.get_name() == _HANDLER), None)
    if handler is not None and isinstance(handler.formatter, JsonFormatter):
        text = handler.format(logging.makeLogRecord({"name": logger, "levelname": "INFO", "msg": text}))
    if isinstance(handler, BackgroundHandler):
        handler.write(text)
    elif sys.stderr is not None:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def flush() -> None:
    """Wait until what was logged is written, a second at most."""
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
    """``2026-11-22T06:00:00.000Z INFO rbee_worker.worker.worker: message key=value``."""

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


class BackgroundHandler(logging.Handler):
    """Hands lines to a thread that writes them, in order. Whoever logs never waits for it.

    A line that finds no room, or that cannot be written, is lost and counted. One line says how many were lost, at the
    place where they are missing, as soon as writing works again. :meth:`flush`, which :func:`logging.shutdown` calls at
    exit, waits for the thread; an end of the process does not wait for it beyond that.

    Attributes:
        dropped: lines lost so far.
    """

    def __init__(self, waiting_characters: int = _WAITING_CHARACTERS) -> None:
        super().__init__()
        self.dropped = 0
        self._limit = waiting_characters
        self._waiting: deque[str | int] = deque()  # lines, and in their place numbers of lines that were lost
        self._characters = 0
        self._writing = self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Form the line here, where the request is known that it belongs to, and hand it over."""
        try:
            line = self.format(record)
        except Exception:  # noqa: BLE001  (a message and its arguments do not match: no reason to stop what logs it)
            line = f"{record.levelname} {record.name}: a log line could not be formed from {record.msg!r:.200}"
        self.write(line)

    def write(self, line: str) -> None:
        """Hand a line over; it is lost when there is no room for it."""
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
        """Wait until everything is written, a second at most."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and not self._writing, _FLUSH_SECONDS)

    def close(self) -> None:
        """End the thread once it has written what waits; lines that come later are lost."""
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
        """The next entry, once there is one; None: there will be no more."""
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
    """Write a line to whatever stderr is now; whether that worked."""
    stream, text = sys.stderr, f"{line}\n"
    replaced = stream is not sys.__stderr__
    try:
        if stream is None:  # the program was started without one
            return False
        if replaced:
            stream.write(text)
            stream.flush()
        else:
            # Not through the stream: its lock, held while nobody reads, would keep the interpreter from ending.
            _write_descriptor(stream.fileno(), text.encode(errors="backslashreplace"))
    except Exception:  # noqa: BLE001  (no reader any more, a full disk, a closed stream: the thread goes on)
        return False
    return True


def _write_descriptor(descriptor: int, data: bytes) -> None:
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:  # another process that has it too made it non-blocking
            select.select([], [descriptor], [])


def _timestamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _quoted(value: object) -> str:
    """A value as it is, or in quotes where it could be taken for more than one."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if not text or any(c in text for c in ' \t"=') else text
