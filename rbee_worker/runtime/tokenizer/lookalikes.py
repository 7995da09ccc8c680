"""Special tokens written out in a message stay text: only the chat template's own become special tokens.

A message that says ``<|im_end|>`` must not end its own turn. Which characters of a rendered prompt come from messages
is found by rendering twice: once as it is, and once with the first and last characters of special tokens, wherever
messages, tools or documents hold them, replaced by letters of a dead script that occur nowhere else. Where both
renderings agree but for those letters, as they do unless the template looks for such text in a message, a special
token that is still whole in the second is the template's own. What a template does look for, such as ``</think>``
where that is no special token, is left alone. A template that treats a special token in a message in a way of its own
is tried with the assistant's messages left as they are; failing that too, the messages are refused.

Such a prompt is encoded by a copy of the tokenizer in which the special tokens go by secret names, and which is given
the prompt with the template's own so named: no other text can become one, and all else is cut and merged as always.
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
"""Anatolian hieroglyphs: letters, so that nothing trims, folds or escapes them; nobody chats in them."""

Render = Callable[[Sequence[Message], Mapping[str, Any]], str]


class _Finder:
    """Finds texts as the tokenizers library finds added tokens: the leftmost, and of those the longest.

    There can be thousands of them, nearly all beginning alike, which a regular expression would try one by one.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = frozenset(text for text in texts if text)
        self._lengths = sorted({len(text) for text in self.texts}, reverse=True)
        self._begin = re.compile("|".join(_beginnings(self.texts)) or r"(?!)")

    def find(self, text: str) -> Iterator[tuple[int, str]]:
        """Where they are in a text, from left to right, without overlaps."""
        at = 0
        while (match := self._begin.search(text, at)) is not None:
            start = match.start()
            found = next((n for n in self._lengths if text[start : start + n] in self.texts), 0)
            if found:
                yield start, text[start : start + found]
            at = start + max(found, 1)

    def replace(self, text: str, inside: Callable[[str], str], between: Callable[[str], str]) -> str:
        """The text with one change made to what is found and another to the rest."""
        parts, end = [], 0
        for start, found in self.find(text):
            parts += [between(text[end:start]), inside(found)]
            end = start + len(found)
        return "".join([*parts, between(text[end:])])


def _beginnings(texts: Iterable[str]) -> Iterator[str]:
    """Expressions for the first two characters of texts: they rule out nearly all that begins with the same one."""
    seconds: dict[str, set[str]] = {}
    for text in texts:
        seconds.setdefault(text[0], set()).add(text[1:2])
    for first, following in sorted(seconds.items()):
        any_way = "" in following  # a text of one character
        yield re.escape(first) + ("" if any_way else f"[{re.escape(''.join(sorted(following)))}]")


class SecretNames:
    """A copy of a tokenizer in which its special tokens go by names that nobody can guess.

    It takes as long to make as the tokenizer took to load, and as much memory: make it when it is needed.

    Args:
        backend: the tokenizer.
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
        content["post_processor"] = None  # names tokens too, and nothing is put around a conversation
        self._names = names
        self._own = _Finder(token.content for token in backend.get_added_tokens_decoder().values())
        self._backend = tokenizers.Tokenizer.from_str(json.dumps(content))

    def encode(self, text: str, marked: str) -> list[int]:
        """Ids of a text whose special tokens are those that are whole in ``marked``, a text of the same length."""
        parts, end = [], 0
        for start, found in self._own.find(marked):
            name = self._names.get(found)
            if name is not None:
                parts += [text[end:start], name]
                end = start + len(found)
        return self._backend.encode("".join([*parts, text[end:]]), add_special_tokens=False).ids


def _rename(model: dict[str, Any], names: Mapping[str, str]) -> None:
    """Give the special tokens of a vocabulary their names; nothing merges into them any more."""
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
    """The special tokens of one model, looked for in messages.

    Args:
        special: their texts.
        added: those of all added tokens, special or not.
        constants: the texts that the chat template compares with.
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
        """The text with the look-alikes in it broken, character for character; None: there are none.

        Args:
            text: the rendered prompt.
            render: renders messages and variables.
            messages: what it was rendered from.
            variables: the further values it was rendered from.

        Raises:
            InvalidRequest: a message holds a special token, and the template does not leave it as it is.
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
        """Letters that occur nowhere, and the character that each stands for."""
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
        except InvalidRequest:  # the template does not know the message any more
            return None

    def _owned(self, text: str) -> list[tuple[int, str]]:
        return [(start, found) for start, found in self._own.find(text) if found in self._whole.texts]


class _Marking:
    """Puts letters in the place of the ends of special tokens."""

    def __init__(self, letters: Mapping[str, str], whole: _Finder, kept: _Finder, *, only_whole: bool) -> None:
        self._table = {ord(char): letter for char, letter in letters.items()}
        self._whole = whole
        self._kept = kept
        self._only_whole = only_whole

    def value(self, value: Any) -> Any:
        """A value of JSON with all of its strings marked, keys of objects too."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.value(key): self.value(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(item) for item in value]
        return value

    def text(self, text: str) -> str:
        """Special tokens first, then what is between them, but for what the template looks for."""
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
