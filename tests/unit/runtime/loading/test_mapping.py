"""Files that are mapped: their bytes and pages, what is refused, and whole models that run from them."""

import ctypes
import errno
import gc
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file
from torch import Tensor

from rbee_worker.config import EngineConfig, GenerationRequest, SamplingParams
from rbee_worker.errors import InferenceError, InvalidRequest, ModelMalformed
from rbee_worker.events import End, LoadingToVram, LoadReport, Ready
from rbee_worker.kernels.library import Kernels
from rbee_worker.runtime import inspection
from rbee_worker.runtime.engine.engine import Engine
from rbee_worker.runtime.formats.checkpoint import TensorInfo
from rbee_worker.runtime.formats.safetensors import read_safetensors
from rbee_worker.runtime.inspection import inspect_model
from rbee_worker.runtime.loading import load as load_module
from rbee_worker.runtime.loading import mapping
from rbee_worker.runtime.loading import plan as plan_module
from rbee_worker.runtime.loading import report as report_module
from rbee_worker.runtime.loading.fit import needs
from rbee_worker.runtime.loading.groups import WeightGroup
from rbee_worker.runtime.loading.mapping import MappedFile
from rbee_worker.runtime.loading.reader import ReadState, TensorReader, open_raw
from rbee_worker.runtime.machine.storage import Storage
from rbee_worker.runtime.model.decoder import Batch
from rbee_worker.runtime.model.linear import linear
from rbee_worker.runtime.source import resolve
from tests.engines import loaded, run
from tests.tiny import write_tiny_model
from tests.unit.kernels.matrices import HERE, MISSING

CPU = torch.device("cpu")
PAGE = mmap.PAGESIZE
MIB = 2**20
Change = Callable[[Path], None]

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="madvise is asked on Linux alone")


# ------------------------------------------------------------------------------------------------------------ files


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(np.random.default_rng(0).bytes(3 * PAGE + 100))
    return path


def mapped(path: Path) -> MappedFile:
    with path.open("rb") as opened:
        return MappedFile(path, opened.fileno())


def test_a_part_is_the_bytes_of_the_file_at_any_offset(file: Path) -> None:
    held = mapped(file)
    for offset, nbytes in ((0, 1), (7, PAGE), (PAGE, 2 * PAGE), (3 * PAGE + 1, 99)):
        assert held.part(offset, nbytes).numpy().tobytes() == file.read_bytes()[offset : offset + nbytes]


def test_a_part_outlives_the_file_s_name_and_what_made_it(file: Path) -> None:
    expected = file.read_bytes()
    part = mapped(file).part(5, 2 * PAGE)
    file.unlink()
    gc.collect()
    assert part.numpy().tobytes() == expected[5 : 5 + 2 * PAGE]


def test_a_mapping_goes_with_its_last_part(file: Path) -> None:
    def maps() -> str:
        return Path("/proc/self/maps").read_text()

    if not Path("/proc/self/maps").exists():
        pytest.skip("the system does not list mappings")
    held = mapped(file)
    part = held.part(0, PAGE)
    del held
    gc.collect()
    assert str(file) in maps()
    del part
    gc.collect()
    assert str(file) not in maps()


@on_linux
def test_pages_are_there_once_they_were_brought_in(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        held = MappedFile(file, opened.fileno())
    assert held.bring_in(PAGE + 10, 2 * PAGE) in (True, False)  # an older kernel has no such call
    if held.bring_in(PAGE + 10, 2 * PAGE):
        there = (ctypes.c_ubyte * 3)()
        libc = ctypes.CDLL(None)
        assert libc.mincore(ctypes.c_void_p(held._address + PAGE), ctypes.c_size_t(2 * PAGE + 10), there) == 0
        assert [byte & 1 for byte in there] == [1, 1, 1]


@on_linux
def test_pages_that_the_file_has_lost_are_an_error_and_no_signal(file: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from rbee_worker.runtime.loading.mapping import MappedFile\n"
        "path = Path(sys.argv[1]); held = MappedFile(path, os.open(path, os.O_RDONLY)); os.truncate(path, 10)\n"
        "try: print(held.bring_in(8192, 4096))\n"
        "except OSError as error: print(error.errno)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in (str(errno.EIO), "False")


@pytest.mark.parametrize("change", ["write", "cut", "grow"])
def test_a_file_that_was_changed_is_told(file: Path, change: str) -> None:
    held = mapped(file)
    held.check_unchanged()
    rewrite = {"write": b"\0" * 9, "cut": b"", "grow": b"\0" * 99_999}[change]
    file.write_bytes(rewrite)
    with pytest.raises(InferenceError, match="weights: the file was changed while the model runs from it"):
        held.check_unchanged()


def test_a_file_that_is_replaced_by_another_is_still_there(file: Path, tmp_path: Path) -> None:
    held = mapped(file)
    before = held.part(0, 100).clone()
    (tmp_path / "other").write_bytes(b"\0" * 100)
    (tmp_path / "other").replace(file)
    held.check_unchanged()
    assert torch.equal(held.part(0, 100), before)


def test_an_empty_file_cannot_be_mapped(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(OSError, match="the file is empty"):
        mapped(tmp_path / "empty")


# ---------------------------------------------------------------------------------------------------------- tensors


def without_call() -> None:
    """As on systems that have no ``madvise``."""


def older() -> Callable[[int, int, int], int]:
    """As on a kernel that does not know the advice."""

    def refuse(_address: int, _nbytes: int, _advice: int) -> int:
        ctypes.set_errno(errno.EINVAL)
        return -1

    return refuse


@pytest.fixture(params=["populated", "no call", "older kernel"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {"no call": without_call, "older kernel": older}.get(request.param)
    if made is not None:
        monkeypatch.setattr(mapping, "_madvise", made)


def tensor_in(path: Path, values: Tensor) -> TensorInfo:
    save_file({"t": values}, path)
    return read_safetensors(path).tensors["t"]


def map_in(info: TensorInfo, state: ReadState, held: torch.dtype, chunk: int = 1000) -> Tensor:
    with TensorReader(state, CPU, chunk, open_raw) as reader:
        return reader.map_in(info, held)


def state_of(info: TensorInfo) -> ReadState:
    return ReadState([WeightGroup("layer", {"t": info})])


@pytest.mark.usefixtures("system")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_tensor_is_mapped_with_every_byte_counted_once(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.randn(70, 50).to(dtype)
    info = tensor_in(tmp_path / "a.safetensors", values)
    state = state_of(info)
    raw = map_in(info, state, dtype)
    assert torch.equal(raw.view(dtype).view(70, 50), values)
    assert (state.bytes_read, state.bytes_mapped) == (info.nbytes, info.nbytes)


@pytest.mark.usefixtures("system")
def test_a_number_that_is_not_finite_is_told_with_its_tensor(tmp_path: Path) -> None:
    values = torch.ones(70, 50, dtype=torch.float16)
    values[69, 49] = torch.nan
    info = tensor_in(tmp_path / "a.safetensors", values)
    with pytest.raises(ModelMalformed, match=r"a\.safetensors: tensor 't' holds numbers that are not finite"):
        map_in(info, state_of(info), torch.float16)


@pytest.mark.usefixtures("system")
@pytest.mark.parametrize("change", ["cut", "rewritten"])
def test_a_file_that_changed_since_its_header_was_read_is_told(tmp_path: Path, change: str) -> None:
    path = tmp_path / "a.safetensors"
    info = tensor_in(path, torch.ones(70, 50, dtype=torch.float16))
    state = state_of(info)
    os.truncate(path, 500) if change == "cut" else os.utime(path, ns=(0, 0))
    with pytest.raises(ModelMalformed, match=r"a\.safetensors: the file was changed while it was being read"):
        map_in(info, state, torch.float16)


@pytest.mark.usefixtures("system")
def test_a_file_that_is_cut_while_it_is_brought_in_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    info = tensor_in(path, torch.ones(700, 500, dtype=torch.float16))
    bring_in, calls = MappedFile.bring_in, []

    def cut_then_bring_in(self: MappedFile, offset: int, nbytes: int) -> bool:
        calls.append(offset)
        if len(calls) == 3:
            os.truncate(path, 500)
        return bring_in(self, offset, nbytes)

    monkeypatch.setattr(MappedFile, "bring_in", cut_then_bring_in)
    with pytest.raises(ModelMalformed, match=r"a\.safetensors: (the file was changed|ends inside tensor 't')"):
        map_in(info, state_of(info), torch.float16, chunk=4 * PAGE)
    assert len(calls) == 3


@pytest.mark.parametrize("how", ["read", "mapped"])
@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_1, Type.Q6_K], ids=lambda kind: kind.name)
@pytest.mark.parametrize("damage", [np.inf, np.nan])
def test_a_scale_that_is_not_finite_is_told_with_its_tensor(
    tmp_path: Path, how: str, kind: Type, damage: float
) -> None:
    path = tmp_path / "a.gguf"
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.zeros((3, 4 * block_bytes), dtype=np.uint8)
    at = {Type.Q8_0: 0, Type.Q4_1: 2, Type.Q6_K: 208}[kind] + 2 * block_bytes
    path.write_bytes(b"head" + blocks.tobytes())
    columns = 4 * gguf.GGML_QUANT_SIZES[kind][0]
    info = TensorInfo("blk.0.t", (3, columns), kind.name, path, offset=4, nbytes=blocks.nbytes)

    def take() -> Tensor:
        with TensorReader(state_of(info), CPU, 1000, open_raw) as reader:
            if how == "mapped":
                return reader.map_in(info, torch.uint8)
            reader.read(info, target := torch.empty(blocks.shape, dtype=torch.uint8), torch.uint8)
            return target

    assert not take().any()
    blocks[1, at : at + 2] = np.frombuffer(np.float16(damage).tobytes(), dtype=np.uint8)
    path.write_bytes(b"head" + blocks.tobytes())
    with pytest.raises(ModelMalformed, match=r"a\.gguf: tensor 'blk\.0\.t' has scales that are not finite"):
        take()


# ----------------------------------------------------------------------------------------------------------- models


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    if not HERE:
        pytest.skip("; ".join(MISSING.values()))
    return Kernels(HERE[-1], 1)


@pytest.fixture
def native(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels run, whatever the environment says, on a CPU that has no arithmetic for bfloat16."""
    features = replace(linear.cpu_features(), kernels=kernels.variant, bf16_arithmetic=False)
    monkeypatch.setattr(linear, "cpu_features", lambda: features)
    monkeypatch.setattr(linear, "cpu_kernels", lambda: kernels)
    for module in (plan_module, report_module):
        monkeypatch.setattr(module, "missing_reason", lambda: None)
    monkeypatch.setattr(inspection, "expected_variant", lambda: kernels.variant)


def sixteen(path: Path, dtype: torch.dtype, **config: object) -> Path:
    write_tiny_model(path, **config)
    weights = path / "model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(weights).items()}, weights)
    return path


def report_of(path: Path, **config: object) -> tuple[Engine, LoadReport, list[LoadingToVram]]:
    engine = loaded(path, "auto", max_context=64, **config)
    events = list(engine.load(str(path)))
    ready = events[-1]
    assert isinstance(ready, Ready)
    return engine, ready.report, [event for event in events if isinstance(event, LoadingToVram)]


def logits(engine: Engine) -> Tensor:
    assert engine.model is not None
    transformer = engine.model.transformer
    cache = transformer.new_cache()
    cache.reserve(9)
    found = transformer.forward(Batch.of([(cache, list(range(9)), 9)], CPU))
    cache.release()
    return found


@pytest.fixture(params=["float16", "bfloat16", "tied", "gguf"])
def model(request: pytest.FixtureRequest, tmp_path: Path, files: SimpleNamespace) -> Path:
    if request.param != "gguf":
        dtype = torch.bfloat16 if request.param == "bfloat16" else torch.float16
        return sixteen(tmp_path / "m", dtype, tie_word_embeddings=request.param == "tied")
    rng = np.random.default_rng(1)
    names = {"token_embd": 260, "blk.0.attn_q": 64, "blk.0.attn_output": 64, "blk.0.ffn_gate": 96, "blk.0.ffn_up": 96}
    raw = {
        f"{name}.weight": (gguf.quantize(rng.normal(0, 0.1, (rows, 64)).astype(np.float32), Type.Q8_0), Type.Q8_0)
        for name, rows in names.items()
    }
    return files.write_gguf(tmp_path / "m.gguf", raw=raw)  # type: ignore[no-any-return]


@pytest.mark.usefixtures("native")
def test_a_mapped_model_gives_the_same_bits_and_says_what_is_mapped(model: Path) -> None:
    read, plain, _ = report_of(model)
    engine, report, events = report_of(model, mmap=True)
    assert torch.equal(logits(engine), logits(read))
    assert engine.model is not None
    assert read.model is not None
    assert plain.storage.endswith("local")
    assert report.storage == f"{plain.storage}, mapped"
    assert read.model.mapped_bytes == plain.mapped_mb == 0
    assert 0 < engine.model.mapped_bytes < engine.model.nbytes
    assert engine.model.nbytes == read.model.nbytes
    assert inspect_model(resolve(str(model)), None, mmap=True).mapped_bytes == engine.model.mapped_bytes
    assert [event.layers_loaded for event in events] == sorted(event.layers_loaded for event in events)
    assert events[-1].bytes_loaded == events[-1].bytes_total == plain.bytes_read == report.bytes_read


@pytest.mark.usefixtures("native")
def test_a_layer_counts_when_its_pages_are_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = sixteen(tmp_path / "m", torch.float16, num_hidden_layers=5)
    tensors = read_safetensors(path).tensors.values()
    matrices = [info for info in tensors if len(info.shape) > 1 and ".layers." in info.name]
    brought: set[int] = set()
    bring_in = MappedFile.bring_in

    def slowly(self: MappedFile, offset: int, nbytes: int) -> bool:
        time.sleep(0.005)
        there = bring_in(self, offset, nbytes)
        brought.add(offset)
        return there

    monkeypatch.setattr(MappedFile, "bring_in", slowly)
    counts = set()
    for event in Engine(EngineConfig(device="cpu", mmap=True)).load(str(path)):
        if isinstance(event, LoadingToVram):
            counts.add(event.layers_loaded)
            loaded_ones = {f".layers.{number}." for number in range(event.layers_loaded)}
            needed = {info.offset for info in matrices if any(name in info.name for name in loaded_ones)}
            assert needed <= brought
    assert counts == {0, 1, 2, 3, 4, 5}


@pytest.mark.usefixtures("native")
def test_a_network_s_files_are_read_and_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = sixteen(tmp_path / "m", torch.float16)
    for module in (plan_module, inspection):
        monkeypatch.setattr(module, "storage_of", lambda _: Storage("nfs4", network=True))
    engine, report, _ = report_of(path, mmap=True)
    assert (report.storage, report.mapped_mb) == ("nfs4, network: read sequentially, not mapped", 0)
    assert engine.model is not None
    assert engine.model.mapped_bytes == inspect_model(resolve(str(path)), None, mmap=True).mapped_bytes == 0


@pytest.mark.usefixtures("native")
def test_weights_that_become_another_type_are_read_and_that_is_said(tmp_path: Path) -> None:
    engine, report, _ = report_of(write_tiny_model(tmp_path / "m"), mmap=True)  # of float32
    assert report.storage.endswith("local, not mapped")
    assert engine.model is not None
    assert engine.model.mapped_files == ()


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"quantize": "int8"}, "they become int8 as they are loaded. Use quantize=none."),
        ({"dtype": "float32"}, "they become float32 as they are loaded. Use dtype=auto."),
    ],
)
def test_what_does_not_run_as_it_is_stored_is_refused(tmp_path: Path, config: dict[str, str], why: str) -> None:
    path = sixteen(tmp_path / "m", torch.float16)
    with pytest.raises(InvalidRequest) as told:
        loaded(path, **({"dtype": "auto"} | config), mmap=True)
    assert str(told.value).endswith(f"here {why}")


def test_without_kernels_it_is_refused_once_and_plainly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = sixteen(tmp_path / "m", torch.float16)
    features = replace(linear.cpu_features(), kernels=None)
    monkeypatch.setattr(linear, "cpu_features", lambda: features)
    monkeypatch.setattr(plan_module, "missing_reason", lambda: "They were not built.")
    with pytest.raises(InvalidRequest, match=r"here there are no CPU kernels \(They were not built\)\. Load the model"):
        loaded(path, "auto", mmap=True)
    monkeypatch.setattr(inspection, "expected_variant", lambda: None)
    with pytest.raises(InvalidRequest, match="here there are no CPU kernels"):
        inspect_model(resolve(str(path)), None, mmap=True)


@pytest.fixture
def running(tmp_path: Path, native: None) -> tuple[Path, Engine]:  # noqa: ARG001
    path = sixteen(tmp_path / "m", torch.float16)
    return path, loaded(path, "auto", mmap=True)


def test_a_job_is_refused_once_the_file_was_changed(running: tuple[Path, Engine]) -> None:
    path, engine = running
    request = GenerationRequest(prompt="abc", sampling=SamplingParams(max_tokens=3, temperature=0, ignore_eos=True))
    engine.submit(request)
    (events,) = run(engine).values()
    assert isinstance(events[-1], End)
    assert events[-1].tokens_out == 3
    os.utime(path / "model.safetensors", ns=(0, 0))
    with pytest.raises(InferenceError, match=r"model\.safetensors: the file was changed while the model runs from it"):
        engine.submit(request)


def test_the_cache_leaves_room_for_mapped_pages(running: tuple[Path, Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    """The system counts them as free; they are read from all the time."""
    path, engine = running
    assert engine.model is not None
    mapped_bytes = engine.model.mapped_bytes
    info = replace(load_module.device_info(CPU), free_bytes=16 * MIB)
    monkeypatch.setattr(load_module, "device_info", lambda _: info)
    frees: list[int] = []
    positions = load_module.cache_positions

    def noted(*args: object, free: int, **more: object) -> int:
        frees.append(free)
        return positions(*args, free=free, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(load_module, "cache_positions", noted)
    loaded(path, "auto", mmap=True, max_context=64)
    loaded(path, "auto", max_context=64)
    assert frees == [16 * MIB - mapped_bytes, 16 * MIB]


def test_another_model_does_not_take_the_room_of_mapped_pages(
    running: tuple[Path, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, engine = running
    resident = engine.model
    assert resident is not None
    config = replace(engine.config, max_context=64)
    plan = plan_module.make_plan(resolve(str(path)), config)
    needed = needs(plan.config, plan.form, 64, config).total
    info = replace(plan_module.device_info(CPU), free_bytes=needed + resident.mapped_bytes - 1)
    monkeypatch.setattr(plan_module, "device_info", lambda _: info)
    assert load_module.has_room(plan, config, None)
    assert not load_module.has_room(plan, config, resident)
    assert load_module.has_room(plan, config, resident, instead=True)


def test_an_unloaded_model_maps_nothing(running: tuple[Path, Engine]) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("the system does not list mappings")
    path, engine = running
    assert str(path) in maps.read_text()
    engine.unload()
    gc.collect()
    assert str(path) not in maps.read_text()
