"""What huggingface_hub is used for: a repository's files, the cache that they go to, and what failures mean."""

import contextlib
import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from rbee_worker import __version__
from rbee_worker.errors import ModelError, ModelMalformed, ModelNotFound, ModelUnsupported, sentence
from rbee_worker.escape import one_line, quoted
from rbee_worker.runtime.formats.safetensors import INDEX_NAME, SINGLE_NAME, TEMPLATES_FOLDER
from rbee_worker.runtime.hub.transfer import ConnectionLost, Refused, RemoteFile, Transfer
from rbee_worker.runtime.untrusted import read_json_object

if TYPE_CHECKING:
    from types import ModuleType

    from huggingface_hub.hf_api import RepoSibling

logger = logging.getLogger(__name__)

CONFIG_NAMES: Final = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
"""Files that are fetched beside the weights, where the repository has them."""

TOKENIZER_NAMES: Final = (
    "tokenizer.model",
    "tekken.json",
    "tiktoken.model",
    "qwen.tiktoken",
    "vocab.json",
    "merges.txt",
)
"""Files that a tokenizer can be made from. They are fetched where there is no tokenizer.json."""

MAX_TEMPLATES: Final = 64
MAX_TEMPLATE_BYTES: Final = 1024 * 1024
"""Limits for the chat templates in the folder ``additional_chat_templates``."""

LISTING_RETRY_SECONDS: tuple[float, ...] = (0.5, 1.0)
"""Pauses before each new try to get a repository's listing."""

_DESCRIBING: Final = frozenset({*CONFIG_NAMES, *TOKENIZER_NAMES, INDEX_NAME})

COMMIT: Final = re.compile(r"[0-9a-f]{40}")
"""A revision that is a commit."""

_TEMPLATE: Final = re.compile(rf"{TEMPLATES_FOLDER}/\w[\w.-]{{0,99}}\.jinja", re.ASCII)
"""The only files in a folder that are fetched. Their names must be plain, because they become paths on this machine."""

_PICKLE_SUFFIXES: Final = (".bin", ".pt", ".pth", ".ckpt")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_UNAUTHORIZED: Final = 401
_FORBIDDEN: Final = 403
_SHOWN: Final = 5


@dataclass(frozen=True, slots=True)
class HubModel:
    """A repository of the hub.

    Attributes:
        repo: ``org/name``.
        revision: branch, tag or commit; None: the main branch.
        name: the name that users see.
    """

    repo: str
    revision: str | None
    name: str

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


@dataclass(frozen=True, slots=True)
class Listing:
    """The files at the root of one commit of a repository, and its additional chat templates.

    Attributes:
        model: the repository.
        commit: the commit's hash.
        names: the names of all of these files.
        files: by name, the files that may be needed.
        path: gives the path of a file in the cache; None: the file is not there.
    """

    model: HubModel
    commit: str
    names: frozenset[str]
    files: Mapping[str, RemoteFile]
    path: Callable[[str], Path | None]

    def bytes_on_disk(self, name: str) -> int:
        """How many bytes of a file are on disk already."""
        file = self.files[name]
        return file.bytes_on_disk if self.path(name) is None else file.size

    def place(self) -> Path | None:
        """The folder that holds the files; for GGUF, the file itself. None: the last file is not in the cache.

        Raises:
            ModelError: as :meth:`choose`.
        """
        found = self.path(self.choose()[-1])
        return found if found is None or found.suffix == ".gguf" else found.parent

    def choose(self) -> list[str]:
        """The names of the files that are needed, weights last. The index of the weights is used if it is on disk.

        Raises:
            ModelError: as :func:`choose_files`; or the index is malformed.
        """
        index = self.path(INDEX_NAME)
        shards = _shards_of(index) if index is not None else None
        return choose_files(str(self.model), self.names, shards)


class HubClient:
    """Access to one model through huggingface_hub.

    Attributes:
        offline: whether ``HF_HUB_OFFLINE`` is set.
        cache: the folder of the hub's cache.

    Raises:
        ModelNotFound: huggingface_hub is not installed.
    """

    def __init__(self, model: HubModel) -> None:
        try:
            import huggingface_hub as hub  # noqa: PLC0415 (an optional extra)
            from huggingface_hub import constants, errors, utils  # noqa: PLC0415
            from huggingface_hub.file_download import repo_folder_name  # noqa: PLC0415
        except ImportError as error:
            raise ModelNotFound(
                f"{model}: no such file or folder, and hub ids need the hub extra, which is not installed.",
                hint="Install it, in a checkout of rbee-worker: pip install '.[hub]'.",
            ) from error
        self._model = model
        self._hub: ModuleType = hub
        self._errors: ModuleType = errors
        self._utils: ModuleType = utils
        # The exception of its HTTP library for a broken connection. Which library depends on the release.
        bases = [base for base in errors.HfHubHTTPError.__bases__ if issubclass(base, Exception)]
        self._broken: tuple[type[Exception], ...] = (*bases, OSError)
        self._failures: tuple[type[Exception], ...] = (*self._broken, ValueError, TypeError, KeyError)
        self.offline: bool = constants.HF_HUB_OFFLINE
        self.cache = Path(constants.HF_HUB_CACHE)
        self._folder = self.cache / repo_folder_name(repo_id=model.repo, repo_type="model")
        self._locks = self.cache / ".locks" / self._folder.name
        self._endpoint: str = constants.ENDPOINT
        self._seconds: float = constants.HF_HUB_ETAG_TIMEOUT

    def cached(self) -> Path | None:
        """The model in the cache, as :meth:`Listing.place` gives it. None: it is not there, or not complete."""
        try:
            # With the pattern, huggingface_hub does not require files that are not needed here.
            snapshot = Path(
                self._hub.snapshot_download(
                    self._model.repo,
                    revision=self._model.revision,
                    cache_dir=self.cache,
                    local_files_only=True,
                    allow_patterns=["config.json"],
                )
            )
        except (self._errors.LocalEntryNotFoundError, self._errors.HFValidationError):
            return None
        names = {path.name for path in snapshot.iterdir() if path.is_file()}
        try:
            index = snapshot / INDEX_NAME
            chosen = choose_files(str(self._model), names, _shards_of(index) if index.name in names else None)
        except ModelError:
            return None
        return snapshot / chosen[-1] if chosen[-1].endswith(".gguf") else snapshot

    def listing(self) -> "Listing | Path":
        """The repository's files. If the hub fails, the path of the complete model in the cache.

        Raises:
            ModelNotFound: the hub fails, and the cache does not hold the model; or the revision does not exist.
            ModelMalformed: too many chat templates, or a too large one.
        """
        for pause in (*LISTING_RETRY_SECONDS, None):
            try:
                return self._ask()
            except self._errors.RevisionNotFoundError as error:
                raise self._explained(error) from error
            except self._failures as error:
                cached = self.cached()
                if cached is not None:
                    logger.warning("%s: taken from the cache: %s", self._model, _first_line(error))
                    return cached
                if pause is None or not self._may_pass(error):
                    raise self._explained(error) from error
                time.sleep(pause)
        raise AssertionError  # the last pause is None

    def _ask(self) -> "Listing":
        api = self._hub.HfApi(endpoint=self._endpoint, library_name="rbee-worker", library_version=__version__)
        info = api.model_info(
            self._model.repo, revision=self._model.revision, files_metadata=True, timeout=self._seconds
        )
        if not info.sha:
            raise ValueError("its listing names no commit")

        def path(name: str) -> Path | None:
            try:
                found = self._hub.try_to_load_from_cache(
                    self._model.repo, name, cache_dir=self.cache, revision=info.sha
                )
            except OSError as error:
                raise ModelError(
                    f"{self._model}: the hub's cache cannot be read: {error.filename}: {error.strerror}.",
                    hint="Mend or remove it, or set HF_HOME to another folder.",
                ) from error
            return Path(found) if isinstance(found, str) else None

        siblings = {file.rfilename: file for file in info.siblings or ()}
        templates = {name for name in siblings if _TEMPLATE.fullmatch(name)}
        if len(templates) > MAX_TEMPLATES:
            raise ModelMalformed(
                f"{self._model}: {len(templates)} chat templates in {TEMPLATES_FOLDER}; "
                f"at most {MAX_TEMPLATES} are read."
            )
        names = templates | {name for name in siblings if "/" not in name and name.isprintable()}
        files = {
            name: self._remote(siblings[name], info.sha)
            for name in sorted(names)
            if name in templates or name in _DESCRIBING or is_weights(name)
        }
        for name in sorted(templates):
            if files[name].size > MAX_TEMPLATE_BYTES:
                raise ModelMalformed(
                    f"{self._model}: {name} has {files[name].size:,} bytes, too many for a chat template "
                    f"(at most {MAX_TEMPLATE_BYTES:,})."
                )
        return Listing(self._model, info.sha, frozenset(names), files, path)

    def _remote(self, file: "RepoSibling", commit: str) -> RemoteFile:
        url = self._hub.hf_hub_url(self._model.repo, file.rfilename, revision=commit, endpoint=self._endpoint)
        size, digest = file.size, file.lfs.sha256 if file.lfs is not None else file.blob_id
        if size is None or digest is None:  # some mirrors list only names
            given = self._hub.get_hf_file_metadata(url, timeout=self._seconds, endpoint=self._endpoint)
            size, digest = given.size, given.etag
        if size is None or not digest or not re.fullmatch(r"\w+", digest):
            raise ValueError(f"it gives no size or no ETag for {quoted(file.rfilename)}")
        algorithm: Literal["sha256", "git-sha1"] = "sha256" if _SHA256.fullmatch(digest) else "git-sha1"
        known = _SHA256.fullmatch(digest) or COMMIT.fullmatch(digest)
        return RemoteFile(
            f"{self._model.repo}/{file.rfilename}",
            url,
            size,
            digest if known else None,
            algorithm,
            self._folder / "blobs" / digest,
        )

    def transfer(self, listing: Listing, names: Iterable[str]) -> Transfer:
        """A transfer of the named files into the cache. It is not started yet."""
        names_of = {listing.files[name].name: name for name in names}

        def lock(file: RemoteFile, seconds: float) -> Any:
            self._locks.mkdir(parents=True, exist_ok=True)
            file.blob.parent.mkdir(parents=True, exist_ok=True)
            return self._utils.WeakFileLock(self._locks / f"{file.blob.name}.lock", timeout=seconds)

        def install(file: RemoteFile) -> None:
            """huggingface_hub finds the blob and links it into the snapshot."""
            try:
                self._hub.hf_hub_download(
                    self._model.repo,
                    names_of[file.name],
                    revision=listing.commit,
                    cache_dir=self.cache,
                    endpoint=self._endpoint,
                )
            except self._broken as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise
                if self._may_pass(error):
                    raise ConnectionLost(_first_line(error)) from error
                raise self._explained(error) from error

        headers = self._utils.build_hf_headers(library_name="rbee-worker", library_version=__version__)
        return Transfer(
            (listing.files[name] for name in names_of.values()), headers=headers, lock=lock, install=install
        )

    def remember(self, listing: Listing) -> None:
        """Write to the cache which commit the revision stands for, so that it is found offline."""
        revision = self._model.revision or "main"
        if COMMIT.fullmatch(revision):
            return
        path = self._folder / "refs" / revision
        with contextlib.suppress(OSError):  # the cache may be read-only
            if path.is_file() and path.read_text() == listing.commit:
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_name(f"{path.name}.{threading.get_ident()}.tmp")
            unfinished.write_text(listing.commit)
            unfinished.replace(path)

    def _may_pass(self, error: Exception) -> bool:
        """Whether another try may help."""
        response = getattr(error, "response", None)
        if response is None:
            return isinstance(error, self._broken)
        return bool(response.status_code in {408, 429} or response.status_code >= 500)  # noqa: PLR2004

    def _explained(self, error: Exception) -> ModelError:
        """The error for people."""
        errors, model = self._errors, self._model
        if isinstance(error, errors.GatedRepoError):
            return _gated(model)
        if isinstance(error, errors.RevisionNotFoundError):
            return ModelNotFound(f"{model.repo}: the hub has no revision {quoted(model.revision)} of it.")
        if isinstance(error, errors.RepositoryNotFoundError):
            return _not_there(model)
        if isinstance(error, (errors.HfHubHTTPError, errors.HFValidationError)):
            return ModelNotFound(f"{model}: the hub refused: {sentence(_first_line(error))}")
        if isinstance(error, (ValueError, TypeError, KeyError)):
            return ModelNotFound(
                f"{model}: what answers at {self._endpoint} is no hub: {sentence(_first_line(error))}",
                hint="Check HF_ENDPOINT, and whether a proxy or a login page stands between.",
            )
        return unreachable(model, f"the hub cannot be reached at {self._endpoint}")


def choose_files(what: str, names: Iterable[str], shards: Iterable[str] | None) -> list[str]:
    """The names of the files that are needed to run a repository's model, weights last.

    Args:
        what: the repository's name for messages.
        names: of the files at its root, and of chat templates.
        shards: the files that the index of the weights names; None: there is no index.

    Raises:
        ModelMalformed: a shard is missing, or it is unclear which files make the model.
        ModelNotFound: no weights, or several GGUF files.
        ModelUnsupported: the weights are pickled.
    """
    names = set(names)
    described = CONFIG_NAMES if "tokenizer.json" in names else (*CONFIG_NAMES, *TOKENIZER_NAMES)
    configs = [name for name in described if name in names]
    configs += sorted(name for name in names if _TEMPLATE.fullmatch(name))
    if shards is not None:
        shards = sorted(shards)
        missing = [name for name in shards if name not in names]
        if missing:
            raise ModelMalformed(f"{what}: {INDEX_NAME} names {quoted(missing[0])}, which the repository lacks.")
        return [*configs, INDEX_NAME, *shards]
    if SINGLE_NAME in names:
        return [*configs, SINGLE_NAME]
    # consolidated*.safetensors repeats the weights under other names (Mistral's and Meta's own layout).
    others = sorted(name for name in names if name.endswith(".safetensors") and not name.startswith("consolidated"))
    if len(others) == 1:
        return [*configs, *others]
    if others:
        raise ModelMalformed(
            f"{what}: {len(others)} .safetensors files ({_some(others)}) and neither {INDEX_NAME} nor {SINGLE_NAME}, "
            "so nothing says which make the model."
        )
    gguf = sorted(name for name in names if name.endswith(".gguf"))
    if len(gguf) == 1:
        return gguf
    if gguf:
        repo = what.partition("@")[0]
        raise ModelNotFound(
            f"{what}: {len(gguf)} GGUF files in this repository: {_some(gguf)}.",
            hint=f"Fetch one (hf download {repo} {gguf[0]}) and name the file that this prints.",
        )
    pickled = sorted(name for name in names if name.endswith(_PICKLE_SUFFIXES))
    if pickled:
        raise ModelUnsupported(
            f"{what}: the weights are in {pickled[0]}; pickle files can run code and are never read.",
            hint="Look for a revision or a repository with safetensors.",
        )
    raise ModelNotFound(f"{what}: no weights in this repository: no safetensors and no GGUF file.")


def is_weights(name: str) -> bool:
    """Whether a file holds weights."""
    return name.endswith((".safetensors", ".gguf"))


def _shards_of(index: Path) -> set[str]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelMalformed(f"{INDEX_NAME}: no weight_map that maps tensors to files.")
    return {str(name) for name in weight_map.values()}


def refusal(model: HubModel, error: Refused) -> ModelNotFound:
    """The error for people when the hub refuses to send a file."""
    if error.code == "GatedRepo":
        return _gated(model)
    if error.code == "RepoNotFound":
        return _not_there(model)
    hint = f"Try: hf download {model.repo} (it fetches into the same cache)."
    if error.status in {_UNAUTHORIZED, _FORBIDDEN}:
        hint = "Check HF_TOKEN."
    return ModelNotFound(f"{model}: the hub refused a file: {error}.", hint=hint)


def _gated(model: HubModel) -> ModelNotFound:
    return ModelNotFound(
        f"{model}: the hub gives this model only to those who accepted its terms.",
        hint=f"Accept them at https://huggingface.co/{model.repo} and set HF_TOKEN.",
    )


def _not_there(model: HubModel) -> ModelNotFound:
    return ModelNotFound(
        f"{model}: neither a path here nor a model on the hub.", hint="For a private model, set HF_TOKEN."
    )


def unreachable(model: HubModel, why: str) -> ModelNotFound:
    """The error for people when the model is nowhere on this machine and cannot be downloaded."""
    return ModelNotFound(
        f"{model}: no such file or folder, not complete in the hub's cache, and {why}.",
        hint="Check the network, or name a local file or folder.",
    )


def _first_line(error: BaseException) -> str:
    return one_line((str(error).strip().splitlines() or [type(error).__name__])[0])


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
