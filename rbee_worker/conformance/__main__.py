"""``python -m rbee_worker.conformance``: tells line by line how a server's stream of loading events keeps the contract.

The exit code is 0 where every check that could be made is passed, 1 where one is not, 2 for wrong usage.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rbee_worker.conformance.frames import check_body
from rbee_worker.conformance.order import EventOrder, Finding
from rbee_worker.conformance.watch import PROGRESS, Server, Told, examine
from rbee_worker.errors import InvalidRequest
from rbee_worker.escape import printable, reason

MARKS = {True: "ok  ", False: "FAIL", None: "-   "}


def main(arguments: Sequence[str] | None = None) -> int:
    """Check what the arguments name; returns the exit code."""
    options = _parser().parse_args(arguments)
    server = Server(options.addr or "", options.api_key, options.path, options.keep_alive)
    failed = passed = 0
    try:
        found: Iterable[Told] = _recorded(options.file) if options.file else examine(server, options.load)
        for name, finding in found:
            failed += finding.ok is False
            passed += finding.ok is True
            _tell(name, finding, as_json=options.json)
    except InvalidRequest as error:
        sys.stderr.write(f"error: {error.message}\n")
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return 130
    if not options.json:
        sys.stdout.write(f"{passed} ok, {failed} failed\n")
    return 0 if passed and not failed else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m rbee_worker.conformance", description=__doc__.partition("\n")[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--addr", metavar="HOST:PORT", help="the server: an address or an http(s):// URL")
    source.add_argument("--file", type=Path, help="a stream that was recorded: SSE or NDJSON, of one load or one job")
    key = os.environ.get("RBEE_API_KEY")
    parser.add_argument("--api-key", metavar="KEY", default=key, help="the server's key; else that of RBEE_API_KEY")
    parser.add_argument("--load", metavar="MODEL", help="load this model first; else what is there is watched")
    parser.add_argument("--path", default=PROGRESS, help="of the stream; %(default)s")
    parser.add_argument(
        "--keep-alive", type=_seconds, default=10.0, metavar="SECONDS", help="the server's; 0: it has none; %(default)g"
    )
    parser.add_argument("--json", action="store_true", help="an object a line")
    return parser


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds <= 3600:  # noqa: PLR2004 - an hour
        raise ValueError(text)
    return seconds


def _recorded(path: Path) -> Iterator[Told]:
    """What is in a file.

    Raises:
        InvalidRequest: it cannot be read.
    """
    try:
        body = path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {reason(error)}.") from None
    try:
        findings = _of_lines(body) if body.lstrip().startswith(b"{") else check_body(body)[1]
    except ValueError as error:
        findings = [Finding("frames", ok=False, detail=reason(error))]
    yield from (("file", finding) for finding in findings)


def _of_lines(body: bytes) -> list[Finding]:
    """Of NDJSON, which has no frames."""
    order = EventOrder()
    for number, line in enumerate(body.split(b"\n"), start=1):
        if line.strip():
            event = _object(line, number)
            order.take(event)
    return order.findings()


def _object(line: bytes, number: int) -> dict[str, object]:
    try:
        event = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {number} is no JSON: {reason(error)}") from None
    if not isinstance(event, dict):
        raise ValueError(f"line {number} is no JSON object")  # noqa: TRY004 - a wrong value
    return event


def _tell(name: str, finding: Finding, *, as_json: bool) -> None:
    if as_json:
        told = {"subscriber": name, "check": finding.check, "ok": finding.ok, "detail": finding.detail}
        line = json.dumps(told)
    else:
        line = f"{MARKS[finding.ok]}  {name:8} {finding.check:16} {printable(finding.detail)}"
    sys.stdout.write(line.rstrip() + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
