"""The reading threads: order, bytes, files that change or hang, and what is left when they are closed."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rbee_worker.cancellation import Cancellation
from rbee_worker.config import EngineConfig
from rbee_worker.conformance.order import faults_in
from rbee_worker.errors import ModelMalformed
from rbee_worker.events import LoadCancelled, LoadingEvent, Ready, Stalled, to_dict
from rbee_worker.runtime.architecture.table import LLAMA, parse_config
from rbee_worker.runtime.engine.engine import Engine
from rbee_worker.runtime.formats.checkpoint import TensorInfo
from rbee_worker.runtime.formats.safetensors import read_safetensors
from rbee_worker.runtime.loading import load as load_module
from rbee_worker.runtime.loading.groups import WeightGroup, group_weights
from rbee_worker.runtime.loading.parts import PartBuilder
from rbee_worker.runtime.loading.reader import RawFile, ReadState, Stopped, TensorReader, WeightReader, open_raw
from rbee_worker.runtime.machine.storage import Storage
from rbee_worker.runtime.model.decoder import DecoderLayer, Embedding, Output, Part
from rbee_worker.runtime.model.linear.linear import choose_format
from tests.tiny import write_tiny_model

CPU = torch.device("cpu")
DISK, NETWORK = Storage("ext4", network=False), Storage("nfs4", network=True)
OPEN = "rbee_worker.runtime.loading.reader.open_raw"


class Gate:
    """A pipe that reads wait at: a real read of a real descriptor, which does not return until the gate is opened."""

    def __init__(self) -> None:
        self._out, self._in = os.pipe()
        self.reached = threading.Event()

    def wait(self) -> None:
        """Until :meth:`open`."""
        self.reached.set()
        os.read(self._out, 1)

    def open(self) -> None:
        """Let everyone through, now and later."""
        os.close(self._in)


class GatedFile:
    """A weights file that gives no byte beyond ``until`` before the gate opens."""

    def __init__(self, path: Path, gate: Gate, until: int) -> None:
        self._file, self._gate, self._until, self._position = open_raw(path), gate, until, 0

    def fileno(self) -> int:
        return self._file.fileno()

    def seek(self, offset: int, /) -> int:
        self._position = self._file.seek(offset)
        return self._position

    def readinto(self, buffer: memoryview, /) -> int | None:
        if self._position + len(buffer) > self._until:
            self._gate.wait()
        count = self._file.readinto(buffer)
        self._position += count or 0
        return count

    def close(self) -> None:
        self._file.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "model")


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    opened: list[None] = []
    close = made.open

    def open_once() -> None:
        if not opened:
            opened.append(None)
            close()

    made.open = open_once  # type: ignore[method-assign]
    yield made
    made.open()
    deadline = time.monotonic() + 10
    while any(thread.name.startswith("weight-reader") for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "a reading thread outlives its file"
        time.sleep(0.01)


def plan(path: Path) -> list[WeightGroup]:
    return group_weights(config_of(path), LLAMA, read_safetensors(path))


def config_of(path: Path):
    return parse_config(json.loads((path / "config.json").read_text()), file="config.json")


def reader_of(
    path: Path, groups: list[WeightGroup] | None = None, storage: Storage = DISK, **kwargs: Callable[[Path], RawFile]
) -> WeightReader:
    return WeightReader(groups or plan(path), config_of(path), choose_format(CPU, "float32"), CPU, storage, **kwargs)


def drain(reader: WeightReader) -> list[Part]:
    parts: list[Part] = []
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            part = reader.next_part(1.0)
        except StopIteration:
            return parts
        if part is not None:
            parts.append(part)
    raise AssertionError("the reader does not come to an end")


@pytest.mark.parametrize("storage", [DISK, NETWORK], ids=str)
def test_parts_come_in_order_with_every_byte_counted(tmp_path: Path, storage: Storage) -> None:
    path = write_tiny_model(tmp_path, num_hidden_layers=9)
    reader = reader_of(path, storage=storage)
    parts = drain(reader)
    reader.close()
    assert [type(part) for part in parts] == [Embedding, Output, *[DecoderLayer] * 9]
    stored = load_file(path / "model.safetensors")
    assert reader.state.bytes_read == reader.state.bytes_total == sum(tensor.nbytes for tensor in stored.values())
    assert torch.equal(parts[0].table, stored["model.embed_tokens.weight"])
    for index, layer in enumerate(parts[2:]):
        names = [f"model.layers.{index}.self_attn.{name}_proj.weight" for name in "qkv"]
        assert torch.equal(layer.attention.qkv.weight, torch.cat([stored[name] for name in names]))
        assert torch.equal(layer.mlp.down.weight, stored[f"model.layers.{index}.mlp.down_proj.weight"])


def test_nobody_reads_far_ahead_of_what_is_taken(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path, num_hidden_layers=30)
    reader = reader_of(path)
    per_part = reader.state.bytes_total / 32
    time.sleep(0.5)
    read = reader.state.bytes_read
    reader.close()
    assert read < 8 * per_part


STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("wanted", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_values_are_those_that_torch_converts_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: str, wanted: torch.dtype
) -> None:
    monkeypatch.setattr("rbee_worker.runtime.loading.copier._CONVERT_BYTES", 1024)
    values = (torch.randn(7, 331) * 3).to(STORED[stored])
    values[0, :4] = torch.tensor([0.0, -0.0, 65280.0, -1e-7], dtype=values.dtype)
    save_file({"t": values}, tmp_path / "a.safetensors")
    info = read_safetensors(tmp_path / "a.safetensors").tensors["t"]
    target = torch.empty(7, 331, dtype=wanted)
    with TensorReader(ReadState([WeightGroup("layer", {"t": info})]), CPU, 1000, open_raw) as reader:
        reader.read(info, target, wanted)
    assert torch.equal(target, values.to(wanted))


def test_a_file_that_ends_early_is_named(path: Path) -> None:
    groups = plan(path)
    with (path / "model.safetensors").open("r+b") as file:
        file.truncate(2000)
    reader = reader_of(path, groups)
    with pytest.raises(ModelMalformed, match=r"model\.safetensors: ends inside tensor '.*', \d+ bytes short"):
        drain(reader)
    reader.close()


def rewritten(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.seek(-8, os.SEEK_END)
        stream.write(b"\0" * 8)
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))  # file systems count time in steps


def grown(file: Path) -> None:
    with file.open("ab") as stream:
        stream.write(b"\0")


@pytest.mark.parametrize("change", [rewritten, grown], ids=lambda change: change.__name__)
def test_a_file_that_changes_meanwhile_is_told_at_the_next_tensor(
    path: Path, gate: Gate, change: Callable[[Path], None]
) -> None:
    file = path / "model.safetensors"
    reader = reader_of(path, open_file=lambda name: GatedFile(name, gate, 60_000))
    change(file)
    gate.open()
    with pytest.raises(ModelMalformed, match=r"model\.safetensors: the file was changed while it was being read"):
        drain(reader)
    reader.close()


def test_a_file_that_is_replaced_between_header_and_data_is_told(path: Path, tmp_path: Path) -> None:
    file = path / "model.safetensors"
    other = tmp_path / "other"
    other.write_bytes(file.read_bytes())

    def replace_then_open(name: Path) -> RawFile:
        if other.exists():
            other.replace(file)
        return open_raw(name)

    reader = reader_of(path, storage=NETWORK, open_file=replace_then_open)
    with pytest.raises(ModelMalformed, match="changed while it was being read"):
        drain(reader)
    reader.close()


def test_a_file_that_is_gone_is_named(path: Path) -> None:
    groups = plan(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(ModelMalformed, match=r"model\.safetensors: cannot be read: No such file"):
        reader_of(path, groups)


def test_an_error_of_the_disk_is_told_with_the_file(path: Path) -> None:
    class Broken(GatedFile):
        def readinto(self, _: memoryview, /) -> int | None:
            raise OSError(5, "Input/output error")

    reader = reader_of(path, open_file=lambda name: Broken(name, Gate(), 0))
    with pytest.raises(ModelMalformed, match=r"model\.safetensors: cannot be read: Input/output error") as told:
        drain(reader)
    reader.close()
    # Whoever keeps the error does not keep the tensors that were being read with it.
    frames = []
    trace = told.value.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    held = [value for frame in frames if "parts.py" in frame.f_code.co_filename for value in frame.f_locals.values()]
    assert not [value for value in held if isinstance(value, torch.Tensor)]


def test_closing_does_not_wait_for_a_read_that_never_returns(path: Path, gate: Gate) -> None:
    reader = reader_of(path, open_file=lambda name: GatedFile(name, gate, 0))
    assert gate.reached.wait(30)
    began = time.monotonic()
    reader.close()
    assert time.monotonic() - began < 10  # the gate stays closed for as long as the test runs
    assert reader.next_part(0.0) is None


def test_closing_ends_threads_that_do_not_hang(path: Path) -> None:
    reader = reader_of(path)
    reader.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("weight-reader")]


def test_closing_waits_for_a_thread_that_computes(path: Path, monkeypatch: pytest.MonkeyPatch, gate: Gate) -> None:
    monkeypatch.setattr(PartBuilder, "build", lambda *_, **__: gate.wait())
    reader = reader_of(path)
    assert gate.reached.wait(30)
    closing = threading.Thread(target=reader.close)
    closing.start()
    closing.join(1)  # far longer than a thread that reads is waited for
    assert closing.is_alive()
    gate.open()
    closing.join(30)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("weight-reader")]


def test_no_call_of_the_system_begins_once_the_reading_ends(path: Path) -> None:
    state = ReadState(plan(path))
    state.end()
    with pytest.raises(Stopped), state.system_call(path):
        pytest.fail("it began")
    assert not state.in_system(threading.current_thread())


def load(path: Path, monkeypatch: pytest.MonkeyPatch, gate: Gate, cancel: Cancellation, **config: float):
    monkeypatch.setattr(OPEN, lambda name: GatedFile(name, gate, 300_000))
    return Engine(EngineConfig(dtype="float32", **config)).load(str(path), cancel)


def test_a_stall_is_told_again_and_again_and_loading_goes_on(
    path: Path, monkeypatch: pytest.MonkeyPatch, gate: Gate
) -> None:
    events: list[LoadingEvent] = []
    for event in load(path, monkeypatch, gate, Cancellation(), stall_seconds=0.2):
        events.append(event)
        if sum(isinstance(event, Stalled) for event in events) == 3:
            gate.open()
    stalls = [event for event in events if isinstance(event, Stalled)]
    assert {event.where for event in stalls} == {"model.safetensors"}
    seconds = [event.seconds for event in stalls[:3]]
    assert seconds == sorted(set(seconds))
    assert seconds[0] >= 0.2
    assert isinstance(events[-1], Ready)
    assert faults_in(map(to_dict, events)) == []
    assert events[0].seq == 0


def test_a_stalled_load_is_cancelled_at_once(path: Path, monkeypatch: pytest.MonkeyPatch, gate: Gate) -> None:
    cancel = Cancellation()
    events = []
    began = 0.0
    for event in load(path, monkeypatch, gate, cancel, stall_seconds=0.2):
        events.append(event)
        if isinstance(event, Stalled) and not cancel.is_set():
            cancel.set()
            began = time.monotonic()
    assert isinstance(events[-1], LoadCancelled)
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("end", ["cancelled", "read"])
def test_a_load_that_waits_is_woken_by_what_it_waits_for_alone(
    path: Path, monkeypatch: pytest.MonkeyPatch, gate: Gate, end: str
) -> None:
    cancel, waits = Cancellation(), []
    next_part = WeightReader.next_part

    def noted(reader: WeightReader, timeout: float) -> Part | None:
        waits.append(timeout)
        return next_part(reader, timeout)

    def act() -> None:
        assert gate.reached.wait(60)
        cancel.set() if end == "cancelled" else gate.open()

    monkeypatch.setattr(WeightReader, "next_part", noted)
    monkeypatch.setattr(load_module, "_EVENT_SECONDS", 3600.0)
    monkeypatch.setattr(OPEN, lambda name: GatedFile(name, gate, 0))
    actor = threading.Thread(target=act)
    actor.start()
    *_, last = Engine(EngineConfig(dtype="float32", stall_seconds=3600)).load(str(path), cancel)
    actor.join()
    assert isinstance(last, LoadCancelled if end == "cancelled" else Ready)
    assert min(waits) > 1000  # nothing was looked at in between


def test_closing_a_stalled_load_does_not_hang(path: Path, monkeypatch: pytest.MonkeyPatch, gate: Gate) -> None:
    loading = load(path, monkeypatch, gate, Cancellation(), stall_seconds=0.2)
    assert any(isinstance(event, Stalled) for event in loading if isinstance(event, Stalled))
    loading.close()


def test_the_tensor_info_names_what_is_short(path: Path) -> None:
    info = TensorInfo("t", (4, 4), "F32", path / "model.safetensors", offset=10**6 * 8, nbytes=64)
    state = ReadState([WeightGroup("layer", {"t": info})])
    with TensorReader(state, CPU, 1000, open_raw) as reader, pytest.raises(ModelMalformed, match="'t', 64 bytes short"):
        reader.read(info, torch.empty(4, 4), torch.float32)
