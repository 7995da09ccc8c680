"""Reads a folder's tokenizer, from whichever files it has, and its chat templates.

``tokenizer.json`` is used as it is. Without it the tokenizer is made from a SentencePiece model or a rank file
(``tokenizer.model``), Mistral's ``tekken.json``, a ``*.tiktoken`` file, or ``vocab.json`` with ``merges.txt``. Then
the added and special tokens that other files list are added, as in transformers.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tokenizers import AddedToken, Tokenizer, models, processors

from rbee_worker.errors import ModelMalformed, sentence
from rbee_worker.escape import one_line, quoted
from rbee_worker.panics import Panic, panics_as_errors
from rbee_worker.runtime.files import read_bytes, read_text
from rbee_worker.runtime.formats.safetensors import TEMPLATES_FOLDER
from rbee_worker.runtime.tokenizer.bombs import growth_of
from rbee_worker.runtime.tokenizer.ranks import (
    MERGES_FAMILIES,
    RANK_FAMILIES,
    build_from_merges,
    build_from_ranks,
    build_tekken,
    family_of,
    read_ranks,
)
from rbee_worker.runtime.tokenizer.sentencepiece import build_sentencepiece
from rbee_worker.runtime.tokenizer.sentencepiece_model import is_sentencepiece, read_sentencepiece
from rbee_worker.runtime.untrusted import read_json_object

SPECIAL_TOKEN_KEYS: Final = (
    "bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token",
)  # fmt: skip


_CONFIG_LIMIT: Final = 16 * 1024 * 1024
_TOKENIZER_LIMIT: Final = 256 * 1024 * 1024
_HIGHEST_ID: Final = 2**22
_MAX_RESERVED: Final = 2**16
"""Ids that may lie between the tokenizer's own tokens and a listed one. Known files leave a few hundred."""

_HINT: Final = "Download the file again."


@dataclass(frozen=True, slots=True)
class FolderTokenizer:
    """A tokenizer read from a folder.

    Attributes:
        backend: the tokenizer, ready to use.
        json: the same as text of a tokenizer.json.
    """

    backend: Tokenizer
    json: str


def find_tokenizer(folder: Path) -> Path | None:
    """The file that the tokenizer is read from; None: the folder has no such file."""
    for name in ("tokenizer.json", "tokenizer.model", "tekken.json", "tiktoken.model"):
        if (folder / name).is_file():
            return folder / name
    ranks = sorted(folder.glob("*.tiktoken"))
    if len(ranks) == 1:
        return ranks[0]
    pair = (folder / "vocab.json", folder / "merges.txt")
    return pair[0] if all(path.is_file() for path in pair) else None


def load_tokenizer(folder: Path, config: Mapping[str, Any], tokenizer_config: Mapping[str, Any]) -> FolderTokenizer:
    """Read a folder's tokenizer.

    Args:
        folder: holds the files.
        config: what config.json holds. Its ``model_type`` names the family where a tokenizer's file needs it.
        tokenizer_config: what tokenizer_config.json and special_tokens_map.json hold.

    Raises:
        ModelNotFound: the folder has no tokenizer.
        ModelMalformed: a file is damaged, or files disagree.
        ModelUnsupported: a file needs the family, and the family is not known; or a SentencePiece model has a setting
            that is not supported.
    """
    path = find_tokenizer(folder) or folder / "tokenizer.json"
    with panics_blamed_on(path):
        return _load(path, config, tokenizer_config)


@contextmanager
def panics_blamed_on(path: Path) -> Iterator[None]:
    """Turn a panic of the tokenizers library into an error. The library panics on some damaged files.

    Raises:
        ModelMalformed: the library panicked; the message names ``path``.
    """
    try:
        with panics_as_errors():
            yield
    except Panic as panic:
        raise ModelMalformed(
            f"{path}: the tokenizers library cannot use it: {sentence(str(panic))}", hint=_HINT
        ) from panic


def _load(path: Path, config: Mapping[str, Any], tokenizer_config: Mapping[str, Any]) -> FolderTokenizer:
    listed = _listed(path.parent, tokenizer_config)
    if path.name == "tokenizer.json":
        text = read_text(path, limit=_TOKENIZER_LIMIT, hint="Download the model's tokenizer.json into the same folder.")
        backend = _parse(path, text)
        _require_known(backend, path)
        adds = _asked_for(tokenizer_config)
        changed = _complete(backend, path.parent, listed, tokenizer_config)
    else:
        text, changed = "", True
        backend, adds = _convert(path, config, tokenizer_config, listed)
        _require_known(backend, path)
        _complete(backend, path.parent, listed, tokenizer_config)
        adds |= _asked_for(tokenizer_config)
    changed |= _put_around(backend, adds, tokenizer_config)
    return FolderTokenizer(backend, backend.to_str() if changed else text)


def read_templates(folder: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates by name; ``default`` is the one without a name.

    Where the folder has template files (``chat_template.jinja``, ``additional_chat_templates/NAME.jinja``), those in
    tokenizer_config.json are ignored.

    Raises:
        ModelMalformed: a template is not a string, or its file cannot be read, is too large or not UTF-8.
    """
    paths = {path.stem: path for path in sorted((folder / TEMPLATES_FOLDER).glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        paths["default"] = folder / "chat_template.jinja"
    if paths:
        return {name: read_text(path, limit=_CONFIG_LIMIT, hint=_HINT) for name, path in paths.items()}
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):  # [{"name": …, "template": …}, …]
        template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
    named = template if isinstance(template, dict) else {} if template is None else {"default": template}
    for text in named.values():
        if not isinstance(text, str):
            raise ModelMalformed(
                f"tokenizer_config.json: chat_template is a {type(text).__name__}, not a string or a list of named "
                "templates."
            )
    return {str(name): text for name, text in named.items()}


def token_text(value: object) -> str | None:
    """The text of a token in one of the JSON files: a string, or an object with ``content``. None: neither.

    Raises:
        ModelMalformed: it is not valid Unicode.
    """
    if isinstance(value, Mapping):
        value = value.get("content")
    if not isinstance(value, str):
        return None
    _require_characters(value, "tokenizer_config.json")
    return value


def _require_characters(text: str, file: str) -> None:
    """Refuse a text that no tokenizer can take: JSON can hold halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ord(text[error.start])
        raise ModelMalformed(
            f"{file}: the token {quoted(text)} holds half of a surrogate pair (U+{half:04X}).", hint=_HINT
        ) from None


def _parse(path: Path, text: str) -> Tokenizer:
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelMalformed(
            f"{path}: the tokenizers library refuses it: {sentence(one_line(first))}", hint=_HINT
        ) from error


def _require_known(backend: Tokenizer, path: Path) -> None:
    """Refuse a tokenizer that makes too much of a text, or that cannot encode a word that it does not know."""
    growth_of(backend, str(path))
    model = backend.model
    if isinstance(model, models.WordLevel | models.WordPiece) and backend.token_to_id(model.unk_token) is None:
        raise ModelMalformed(
            f"{path}: the vocabulary lacks {quoted(model.unk_token)}, which stands for words that it does not know.",
            hint=_HINT,
        )


def _convert(
    path: Path, config: Mapping[str, Any], tokenizer_config: Mapping[str, Any], listed: Mapping[int, AddedToken]
) -> tuple[Tokenizer, dict[str, bool]]:
    """Make a tokenizer from another file than tokenizer.json.

    Returns:
        The tokenizer; and for ``bos``, whether it is put before a text unless tokenizer_config.json decides.
    """
    data = read_bytes(path, limit=_TOKENIZER_LIMIT, hint=_HINT)
    if path.name == "tekken.json":
        return build_tekken(data), {"bos": True}
    if path.name == "vocab.json":
        family = family_of(config, MERGES_FAMILIES, file=path.name)
        merges = read_bytes(path.with_name("merges.txt"), limit=_TOKENIZER_LIMIT, hint=_HINT)
        return build_from_merges(data, merges, family), {"bos": family.add_bos}
    if path.name != "tokenizer.model" or not is_sentencepiece(data):
        family = family_of(config, RANK_FAMILIES, file=path.name)
        return build_from_ranks(read_ranks(data, file=path.name), family), {"bos": family.add_bos}
    model = read_sentencepiece(data, file=path.name)
    backend = build_sentencepiece(model, legacy=_legacy(tokenizer_config), file=path.name, listed=listed)
    return backend, {"bos": model.bos_id is not None}


def _legacy(tokenizer_config: Mapping[str, Any]) -> bool:
    """The argument ``legacy`` of :func:`build_sentencepiece`. Without the key, it is false for the Llama classes."""
    given = tokenizer_config.get("legacy")
    if isinstance(given, bool):
        return given
    name = str(tokenizer_config.get("tokenizer_class", "")).removesuffix("Fast")
    return name not in {"LlamaTokenizer", "CodeLlamaTokenizer"}


def _complete(
    backend: Tokenizer, folder: Path, listed: Mapping[int, AddedToken], tokenizer_config: Mapping[str, Any]
) -> bool:
    """Add the tokens that the other files list and the tokenizer lacks. Returns whether there were any."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    end = free = backend.get_vocab_size(with_added_tokens=True)
    new: list[AddedToken] = []
    ids: dict[str, int] = {}
    for index, token in sorted(listed.items()):
        own = backend.token_to_id(token.content)
        if token.content in known or (index < end and own != index):
            continue  # where files disagree, the tokenizer's own file counts
        if index - free > _MAX_RESERVED:
            raise ModelMalformed(
                f"{folder}: the token {quoted(token.content)} is listed with id {index}, but the tokenizer has "
                f"{free} tokens before it.",
                hint=_HINT,
            )
        gap = range(free, index)
        new += [AddedToken(f"<|reserved_token_{i}|>", special=True, normalized=False) for i in gap] + [token]
        free = max(free, index) + (own is None)
        ids[token.content] = index
        known.add(token.content)
    backend.add_tokens(new)  # all at once: each call takes as long as all tokens do
    for text, index in ids.items():
        if backend.token_to_id(text) != index:
            raise ModelMalformed(
                f"{folder}: the token {quoted(text)} is listed with id {index}, but gets {backend.token_to_id(text)}.",
                hint=_HINT,
            )
    named = [text for text in _named(tokenizer_config) if text not in known and backend.token_to_id(text) is not None]
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in named])
    return bool(new or named)


def _listed(folder: Path, tokenizer_config: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Added tokens by id, from added_tokens_decoder of tokenizer_config.json and from added_tokens.json."""
    named = _named(tokenizer_config)
    path = folder / "added_tokens.json"
    older = read_json_object(path, limit=_CONFIG_LIMIT) if path.is_file() else {}
    listed = {}
    for text, index in older.items():
        _require_characters(text, "added_tokens.json")
        listed[_id(index, "added_tokens.json")] = AddedToken(text, special=text in named, normalized=text not in named)
    decoder = tokenizer_config.get("added_tokens_decoder")
    for index, value in (decoder if isinstance(decoder, Mapping) else {}).items():
        content = token_text(value)
        if not content:
            raise ModelMalformed(f"tokenizer_config.json: added_tokens_decoder has no token for id {quoted(index)}.")
        flags = value if isinstance(value, Mapping) else {}
        special = bool(flags.get("special", content in named))
        listed[_id(index, "tokenizer_config.json: added_tokens_decoder")] = AddedToken(
            content,
            special=special,
            normalized=bool(flags.get("normalized", not special)),
            **{key: bool(flags.get(key, False)) for key in ("single_word", "lstrip", "rstrip")},
        )
    return listed


def _id(value: object, what: str) -> int:
    number = int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value
    if type(number) is not int or not 0 <= number < _HIGHEST_ID:
        raise ModelMalformed(f"{what} has the id {quoted(value)}; it must be a number below {_HIGHEST_ID}.")
    return number


def _named(tokenizer_config: Mapping[str, Any]) -> list[str]:
    """The texts of the special tokens that have a role, and of additional ones."""
    values = [tokenizer_config.get(key) for key in SPECIAL_TOKEN_KEYS]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = tokenizer_config.get(key)
        values += more.values() if isinstance(more, Mapping) else more if isinstance(more, list) else []
    return [text for value in values if (text := token_text(value))]


def _asked_for(tokenizer_config: Mapping[str, Any]) -> dict[str, bool]:
    given = {role: tokenizer_config.get(f"add_{role}_token") for role in ("bos", "eos")}
    return {role: value for role, value in given.items() if isinstance(value, bool)}


def _put_around(backend: Tokenizer, adds: Mapping[str, bool], tokenizer_config: Mapping[str, Any]) -> bool:
    """Make the tokenizer put BOS and EOS around a text, where ``adds`` says so. Returns whether that changed it."""
    if not adds:
        return False
    found: dict[str, tuple[str, int]] = {}
    for role, usual in (("bos", "<s>"), ("eos", "</s>")):
        text = token_text(tokenizer_config.get(f"{role}_token", usual))
        index = backend.token_to_id(text) if text is not None else None
        if adds.get(role) and text is not None and index is not None:
            found[role] = (text, index)
    if backend.encode("").ids == [index for _, index in found.values()]:
        return False
    parts = [f"{found['bos'][0]}:0"] if "bos" in found else []
    parts += ["$A:0"] + ([f"{found['eos'][0]}:0"] if "eos" in found else [])
    backend.post_processor = processors.TemplateProcessing(single=parts, special_tokens=list(found.values()))
    return True
