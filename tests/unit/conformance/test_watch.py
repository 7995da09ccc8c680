"""What a subscriber finds at servers that keep the contract, and at servers that do not: real sockets."""

import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler

import pytest

from rbee_worker.conformance.__main__ import main
from rbee_worker.conformance.watch import PROGRESS, Server, examine
from rbee_worker.events import LoadCancelled
from tests.unit.fake_worker import FakeWorker, answer, running
from tests.unit.samples import LOAD
from tests.unit.test_wire import ndjson, sse

DONE = b"data: [DONE]\n\n"
HEADERS = {"Content-Type": "text/event-stream", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
WHOLE = sse(*LOAD) + DONE
LATE = sse(LOAD[-3], LOAD[-1]) + DONE


@pytest.fixture
def worker() -> Iterator[FakeWorker]:
    with running() as fake:
        yield fake


def bodies(*each: bytes, stays_open: bool = False, **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    """Answers the first request with the first body, and so on; those after the last with the last."""
    left = list(each)

    def send(handler: BaseHTTPRequestHandler) -> None:
        body = left.pop(0) if len(left) > 1 else left[0]
        handler.send_response(200)
        for name, value in (HEADERS | headers).items():
            handler.send_header(name, value)
        handler.send_header("Connection", "close")
        if stays_open:
            handler.send_header("Content-Length", str(len(body) + 1))
        handler.end_headers()
        handler.wfile.write(body)
        handler.wfile.flush()
        if stays_open:
            handler.rfile.read(1)  # until the client leaves
        handler.close_connection = True

    return send


def failed(addr: str, keep_alive: float = 0.1, model: str | None = None) -> dict[str, str]:
    """Subscriber and check -> what is wrong."""
    told = examine(Server(addr, keep_alive=keep_alive), model)
    return {f"{name} {found.check}": found.detail for name, found in told if found.ok is False}


# Subscribers ask in this order: first, slow, the one that leaves, joined, late.
def test_a_server_that_keeps_the_contract(worker: FakeWorker):
    worker.answers[f"GET {PROGRESS}"] = bodies(WHOLE, WHOLE, WHOLE, LATE)
    assert failed(worker.addr) == {}


@pytest.mark.parametrize(
    ("each", "fault"),
    [
        ((WHOLE, WHOLE, WHOLE, LATE, WHOLE), "late story"),
        ((WHOLE, WHOLE, WHOLE, LATE, sse(LOAD[-1]) + DONE), "late order"),
        ((WHOLE, WHOLE, WHOLE, LATE, DONE), "late terminal"),
        ((WHOLE, sse(*LOAD[:-1]) + DONE, WHOLE, LATE), "slow terminal"),
        ((WHOLE, sse(*LOAD[:-1]) + DONE, WHOLE, LATE), "slow same end"),
        ((WHOLE, WHOLE, WHOLE, sse(LOAD[0], *LOAD[3:]) + DONE, LATE), "joined nothing missed"),
        ((WHOLE, WHOLE, WHOLE, sse(*LOAD) + DONE, LATE), "joined snapshot state"),
        ((WHOLE, WHOLE, WHOLE, LATE.replace(DONE, b""), LATE), "joined [DONE]"),
    ],
)
def test_subscribers_that_are_served_badly(worker: FakeWorker, each: tuple[bytes, ...], fault: str):
    worker.answers[f"GET {PROGRESS}"] = bodies(*each)
    assert fault in failed(worker.addr)


def test_a_load_that_is_cancelled_when_somebody_leaves(worker: FakeWorker):
    body = sse(*LOAD[:5], LoadCancelled(seq=5, elapsed_seconds=9.0, vram_mb_freed=0)) + DONE
    late = sse(LOAD[4], LoadCancelled(seq=5, elapsed_seconds=9.0, vram_mb_freed=0)) + DONE
    worker.answers[f"GET {PROGRESS}"] = bodies(body, body, body, late)
    assert failed(worker.addr).keys() == {"leaving cancels nothing"}


def test_headers_and_streams_that_stay_open(worker: FakeWorker):
    worker.answers[f"GET {PROGRESS}"] = bodies(WHOLE, **{"Cache-Control": "no-cache"})
    assert "first headers" in failed(worker.addr)
    worker.answers[f"GET {PROGRESS}"] = bodies(WHOLE, WHOLE, WHOLE, LATE, stays_open=True)
    assert "stays open" in failed(worker.addr)["late closed"]


def test_keep_alives_of_the_real_server(start, stand_in):
    script = [LOAD[0], 1.5, *LOAD[1:]]
    with_them = start(stand_in.Worker(progress=script, state="loading"), keep_alive_seconds=0.3)
    told = [found for name, found in examine(Server(f"127.0.0.1:{with_them.port}", keep_alive=0.3)) if name == "first"]
    assert next(found for found in told if found.check == "keep-alive").ok is True
    without = start(stand_in.Worker(progress=script, state="loading"), keep_alive_seconds=0)
    found = failed(f"127.0.0.1:{without.port}", keep_alive=0.3)
    assert "nothing came for 1." in found["first keep-alive"]


def test_what_is_refused(worker: FakeWorker):
    worker.answers[f"GET {PROGRESS}"] = answer(503, {"error": {}}, Retry_After="5")
    assert failed(worker.addr) == {
        "first status": "the stream was answered 503: nothing was loaded there, Retry-After 5"
    }
    worker.answers["POST /v1/loading"] = answer(409, {"error": {"message": "A load\nruns."}})
    assert "409" in failed(worker.addr, model="m")["load accepted"]
    assert "POST /v1/loading" in worker.asked()


# -- the command


def test_the_command_tells_line_by_line(worker: FakeWorker, capsys: pytest.CaptureFixture[str]):
    worker.answers[f"GET {PROGRESS}"] = bodies(WHOLE, WHOLE, WHOLE, LATE)
    assert main(["--addr", worker.addr, "--keep-alive", "0.1", "--api-key", "k"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("ok    first    headers")
    assert told[-1].endswith("ok, 0 failed")
    assert {call.headers["Authorization"] for call in worker.calls} == {"Bearer k"}
    worker.answers[f"GET {PROGRESS}"] = bodies(WHOLE)
    assert main(["--addr", worker.addr, "--keep-alive", "0.1", "--json"]) == 1
    objects = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    story = next(told for told in objects if told["check"] == "story")
    assert story.pop("detail").startswith("34 events, not the last counts")
    assert story == {"subscriber": "late", "check": "story", "ok": False}


def recorded(tmp_path, body: bytes, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    path = tmp_path / "recorded"
    path.write_bytes(body)
    return main(["--file", str(path)]), capsys.readouterr().out


def test_recorded_streams(tmp_path, capsys: pytest.CaptureFixture[str]):
    assert recorded(tmp_path, WHOLE, capsys)[0] == recorded(tmp_path, ndjson(*LOAD), capsys)[0] == 0
    for body, what in (
        (WHOLE.replace(DONE, b""), "FAIL  file     [DONE]           none came"),
        (ndjson(*LOAD[:-1]), "FAIL  file     terminal         none came"),
        (ndjson(*LOAD) + b"{\xff", "line 35 is no JSON"),
        (b"{}\n[]", "line 2 is no JSON object"),
        (b'data: {"status": "ready"}\n\n', "FAIL  file     events           event 1 has neither `stage` nor `event`"),
        (b"", "FAIL  file     terminal         none came"),
    ):
        code, out = recorded(tmp_path, body, capsys)
        assert code == 1
        assert what in out


def test_wrong_usage(tmp_path, capsys: pytest.CaptureFixture[str]):
    assert main(["--file", str(tmp_path / "none")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert main(["--addr", "nonsense"]) == 2
    for arguments in ([], ["--addr", "a:1", "--file", "b"], ["--addr", "a:1", "--keep-alive", "-1"]):
        with pytest.raises(SystemExit):
            main(arguments)


def test_nobody_there(capsys: pytest.CaptureFixture[str]):
    assert main(["--addr", "127.0.0.1:1"]) == 1
    assert "cannot be reached" in capsys.readouterr().out
