"""Keeps special tokens that are written out in a message as text. Only those of the chat template become tokens.

A message that holds ``<|im_end|>`` must not end its own turn. So the special tokens of the template must be told from
look-alikes in messages. For this the conversation is rendered a second time, with marks: in messages, tools and
documents, every first or last character of a special token is replaced by a letter that occurs nowhere else. A special
token that is still whole in this rendering comes from the template.

This needs a template that treats the marked text as it treats the other. The two renderings are compared, and must be
equal but for the marks. Text that the template looks for, such as ``</think>`` where that is not a special token, is
therefore not marked. Where the renderings still differ, only whole special tokens are marked; then only those outside
of the assistant's messages. If that fails too, the request is refused.

The prompt is then encoded by a copy of the tokenizer in which each special token has a secret name. In the prompt, the
template's own special tokens are replaced by these names. So no other text can become a special token, and the rest is
encoded as usual.
"""

import json
import re
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import tokenizers

from rbee_worker.config import Message
from rbee_worker.errors import InvalidRequest

_LETTERS: Final = range(0x14400, 0x14647)
"""Anatolian hieroglyphs. They are letters, so no template trims, folds or escapes them, and nobody writes with them."""

Render = Callable[[Sequence[Message], Mapping[str, Any]], str]
"""(messages, variables) -> prompt text."""


class _Finder:
    """Finds texts as the tokenizers library finds added tokens: from left to right, the longest at each place.

    There can be thousands of texts, and nearly all may begin alike. One regular expression for all would try them one
    by one.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = frozenset(text for text in texts if text)
        self._lengths = sorted({len(text) for text in self.texts}, reverse=True)
        self._begin = re.compile("|".join(_beginnings(self.texts)) or r"(?!)")

    def find(self, text: str) -> Iterator[tuple[int, str]]:
        """The places of the texts in ``text`` (index, text found), from left to right, without overlaps."""
        at = 0
        while (match := self._begin.search(text, at)) is not None:
            start = match.start()
            found = next((n for n in self._lengths if text[start : start + n] in self.texts), 0)
            if found:
                yield start, text[start : start + found]
            at = start + max(found, 1)

    def replace(self, text: str, inside: Callable[[str], str], between: Callable[[str], str]) -> str:
        """``text`` with ``inside`` applied to what is found, and ``between`` to the rest."""
        parts, end = [], 0
        for start, found in self.find(text):
            parts += [between(text[end:start]), inside(found)]
            end = start + len(found)
        return "".join([*parts, between(text[end:])])


def _beginnings(texts: Iterable[str]) -> Iterator[str]:
    """Regular expressions for the first two characters of texts. The second character rules out most places."""
    seconds: dict[str, set[str]] = {}
    for text in texts:
        seconds.setdefault(text[0], set()).add(text[1:2])
    for first, following in sorted(seconds.items()):
        any_way = "" in following  # a text of one character
        yield re.escape(first) + ("" if any_way else f"[{re.escape(''.join(sorted(following)))}]")


class SecretNames:
    """A copy of a tokenizer in which each special token has a name that nobody can guess.

    To make it takes as long as to load the tokenizer, and as much memory, so make it only when it is needed.

    Attributes:
        backend: the copy.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        content: dict[str, Any] = json.loads(backend.to_str())
        key = secrets.token_hex(16)
        added = content["added_tokens"]
        names = {token["content"]: f"{key}{i:06d}" for i, token in enumerate(added) if token["special"]}
        for token in added:
            if token["special"]:
                token |= {"content": names[token["content"]], "normalized": False, "single_word": False}
        _rename(content["model"], names)
        content["post_processor"] = None  # it would use the old names, and conversations do not need it
        self._names = names
        self._own = _Finder(token.content for token in backend.get_added_tokens_decoder().values())
        self.backend = tokenizers.Tokenizer.from_str(json.dumps(content))

    def named(self, text: str, marked: str) -> str:
        """``text`` with the names of its special tokens: those that are whole in ``marked``, a text of the same length.

        :attr:`backend` encodes it.
        """
        parts, end = [], 0
        for start, found in self._own.find(marked):
            name = self._names.get(found)
            if name is not None:
                parts += [text[end:start], name]
                end = start + len(found)
        return "".join([*parts, text[end:]])


def _rename(model: dict[str, Any], names: Mapping[str, str]) -> None:
    """Give the special tokens of a vocabulary their names, and remove the merges that make one."""
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(text, text): index for text, index in vocab.items()}
    else:  # unigram: [text, score]
        model["vocab"] = [[names.get(text, text), score] for text, score in vocab]
    if "merges" in model:
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [pair for pair in pairs if not {"".join(pair), *pair} & names.keys()]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])


class LookAlikes:
    """Finds text in messages that looks like a special token of the model.

    Args:
        special: the texts of the special tokens.
        added: the texts of all added tokens, special or not.
        constants: the strings in the chat template.
    """

    def __init__(self, special: Collection[str], added: Iterable[str], constants: Iterable[str]) -> None:
        self._whole = _Finder(special)
        self._own = _Finder({*added, *special})
        self._ends = {end for token in self._whole.texts for end in (token[0], token[-1])}
        self._kept = _Finder(
            text
            for text in constants
            if not self._ends.isdisjoint(text)
            and not any(self._whole.find(text))
            and not any(text in token for token in special)
        )

    def mark(self, text: str, render: Render, messages: Sequence[Message], variables: Mapping[str, Any]) -> str | None:
        """Mark the look-alikes in a rendered prompt.

        Args:
            text: the rendered prompt.
            render: renders messages and variables.
            messages: the messages that it was rendered from.
            variables: the further values that it was rendered from.

        Returns:
            A text of the same length, in which only the template's own special tokens are whole. None: ``text`` has no
            look-alikes.

        Raises:
            InvalidRequest: a message holds a special token, and the template does not copy it as plain text.
        """
        given = [part for value in (messages, variables) for part in _strings(value)]
        if not any(end in part for part in given for end in self._ends):
            return None
        back = self._letters(text, given)
        whole = any(any(self._whole.find(part)) for part in given)
        letters = {char: letter for letter, char in back.items()}
        for only_whole, assistant in ((False, True), (True, True), (True, False)):
            if only_whole and not whole:
                return None
            marking = _Marking(letters, self._whole, self._kept, only_whole=only_whole)
            marked = self._try(marking, render, messages, variables, assistant=assistant)
            if marked is not None and _translated(marked, back) == text:
                return marked if self._owned(marked) != self._owned(text) else None
        raise InvalidRequest(
            "A message holds one of the model's special tokens, and the model's chat template gives it a meaning of "
            "its own.",
            hint="Leave it out of the message.",
        )

    def _letters(self, text: str, given: Iterable[str]) -> dict[str, str]:
        """Letter that occurs nowhere -> the character that it stands for."""
        used = {char for part in (text, *given) for char in part if ord(char) in _LETTERS}
        free = [chr(code) for code in _LETTERS if chr(code) not in used]
        if len(free) < len(self._ends):
            raise InvalidRequest("The messages hold every letter of a script that is needed to take them apart.")
        return dict(zip(free, sorted(self._ends), strict=False))

    def _try(
        self,
        marking: "_Marking",
        render: Render,
        messages: Sequence[Message],
        variables: Mapping[str, Any],
        *,
        assistant: bool,
    ) -> str | None:
        changed = [
            marking.value(message) if assistant or message.get("role") != "assistant" else message
            for message in messages
        ]
        try:
            return render(changed, marking.value(dict(variables)))
        except InvalidRequest:  # the template does not accept the marked messages
            return None

    def _owned(self, text: str) -> list[tuple[int, str]]:
        return [(start, found) for start, found in self._own.find(text) if found in self._whole.texts]


class _Marking:
    """Replaces first and last characters of special tokens by letters.

    ``whole`` finds special tokens. ``kept`` finds texts that are not changed. ``only_whole``: change characters only
    inside special tokens.
    """

    def __init__(self, letters: Mapping[str, str], whole: _Finder, kept: _Finder, *, only_whole: bool) -> None:
        self._table = {ord(char): letter for char, letter in letters.items()}
        self._whole = whole
        self._kept = kept
        self._only_whole = only_whole

    def value(self, value: Any) -> Any:
        """A JSON value with all of its strings marked, the keys of objects too."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.value(key): self.value(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(item) for item in value]
        return value

    def text(self, text: str) -> str:
        """A text, marked."""
        return self._whole.replace(text, self._mark, self._between)

    def _mark(self, text: str) -> str:
        return text.translate(self._table)

    def _between(self, text: str) -> str:
        return text if self._only_whole else self._kept.replace(text, str, self._mark)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _translated(text: str, letters: Mapping[str, str]) -> str:
    return text.translate({ord(letter): char for letter, char in letters.items()})
