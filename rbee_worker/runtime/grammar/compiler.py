"""Structured output: compiles and follows grammars that generated text must match, with the optional llguidance."""

import importlib.util
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import tokenizers

from rbee_worker.config import MAX_GRAMMAR_BYTES, GrammarKind, GrammarSpec
from rbee_worker.errors import FieldError, InferenceError, InvalidRequest, Unavailable
from rbee_worker.panics import Panic, panics_as_errors
from rbee_worker.runtime.grammar.build import Refused, build, large_stack, load_tokenizer, source, trouble
from rbee_worker.runtime.grammar.mask import GrammarMask
from rbee_worker.runtime.grammar.trial import Trial
from rbee_worker.runtime.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_NAMES: Mapping[GrammarKind, str] = {
    "json_object": "JSON object",
    "json_schema": "JSON schema",
    "regex": "regular expression",
    "lark": "grammar",
}
_VERDICTS = 64
_WAIT_SECONDS = 5.0
_CPU_SECONDS = 2.0
_CPU_SECONDS_A_TOKEN = 0.005
"""Processor time that following a grammar may take: both together. Usual ones take 0.1 to 0.9 ms a token."""
_END = "<|rbee-worker: end of text|>"


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """A model's tokens in llguidance's form.

    Attributes:
        tokenizer: llguidance's form of the tokenizer.
        size: how many columns the logits have.
        ends: ids that end the text.
        unreal: llguidance needs a token that ends the text. Where the model has none, this is the id of one that was
            added only for llguidance.
    """

    tokenizer: "LLTokenizer"
    size: int
    ends: tuple[int, ...]
    unreal: int | None


class GrammarMatcher:
    """Follows one text through a grammar. Not thread-safe."""

    def __init__(self, matcher: "LLMatcher", vocabulary: _Vocabulary) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._ended = False
        self._tokens = 0
        self._seconds = 0.0

    @property
    def finished(self) -> bool:
        """Whether the text is complete and no further text may follow."""
        return self._ended or (self._matcher.is_stopped() and not trouble(self._matcher))

    def mask(self) -> GrammarMask:
        """The tokens that may come next: int32 [ceil(vocab_size / 32)], see :data:`GrammarMask`.

        Where the text may end, the tokens that end it are allowed too. If it must end (:attr:`finished`) and the model
        has no such tokens, the mask is empty.

        Raises:
            InferenceError: the grammar became too complex, or no token can continue the text.
        """
        started = time.thread_time()
        with _followed():
            words = np.frombuffer(self._matcher.compute_bitmask(), dtype="<i4")
            complete = self._matcher.is_accepting() or self.finished
        self._spent(time.thread_time() - started)
        vocabulary = self._vocabulary
        mask = np.zeros(-(-vocabulary.size // 32), dtype=np.int32)
        if not self.finished:
            mask[:] = words[: len(mask)]
            _clear(mask, vocabulary)
        if complete:
            for end in vocabulary.ends:
                mask.view(np.uint32)[end // 32] |= np.uint32(1 << end % 32)
        if not mask.any() and not self.finished:
            raise InferenceError("No token of the model continues the text as the grammar demands.")
        return mask

    def accept(self, token: int) -> None:
        """Add a token to the text.

        Raises:
            InferenceError: the grammar does not allow the token, or became too complex.
        """
        with _followed():
            if token in self._vocabulary.ends and (self._matcher.is_accepting() or self.finished):
                self._ended = True
                return
        if self.finished:
            raise InferenceError("The text is complete by its grammar; no token may follow.")
        started = time.thread_time()
        with _followed():
            accepted = self._matcher.consume_token(token)
        self._tokens += 1
        self._spent(time.thread_time() - started)
        if not accepted:
            raise InferenceError("The grammar does not allow the token.")

    def _spent(self, seconds: float) -> None:
        """Count processor time. Raise if llguidance failed meanwhile, or if the time is used up."""
        if problem := trouble(self._matcher):
            raise InferenceError(f"The grammar cannot be followed behind token {self._tokens}: {problem}.")
        self._seconds += seconds
        allowed = _CPU_SECONDS + _CPU_SECONDS_A_TOKEN * self._tokens
        if self._seconds > allowed:
            raise InferenceError(
                f"The grammar is too complex: following it for {self._tokens} tokens took {self._seconds:.1f} s of "
                f"processor time; {allowed:.1f} s are allowed.",
                hint="Simplify it; make right-recursive rules left-recursive.",
            )


class GrammarCompiler:
    """Compiles grammars for one model, one at a time. Thread-safe.

    Each new grammar is first tried out in a process of its own (see :mod:`.trial`). The process starts when it is first
    needed and ends with this object.

    Args:
        tokenizer: the model's tokenizer.
        vocab_size: how many columns the logits have.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._vocabulary: _Vocabulary | None = None
        self._trial = Trial()
        self._verdicts: OrderedDict[GrammarSpec, str] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, spec: GrammarSpec) -> GrammarMatcher:
        """Compile a grammar. This may take seconds: do not call it on an event loop.

        Returns:
            A matcher at the beginning of a text.

        Raises:
            InvalidRequest: the grammar is malformed, impossible, unsupported or too complex, or llguidance is not
                installed.
            Unavailable: other grammars are being compiled, for longer than 5 s.
            InferenceError: the process that tries grammars out cannot be started or has ended.
        """
        _check_size(spec)
        if importlib.util.find_spec("llguidance") is None:
            message = "This worker cannot follow grammars: llguidance is not installed."
            field = FieldError(spec.field, "not supported by this worker", message)
            raise InvalidRequest(
                message, fields=[field], hint="Install it, in a checkout of rbee-worker: pip install '.[grammar]'."
            )
        if not self._lock.acquire(timeout=_WAIT_SECONDS):
            raise Unavailable("Other grammars are being compiled.", retry_after=int(_WAIT_SECONDS))
        try:
            return self._compile(spec)
        except Refused as refused:
            name = _NAMES[spec.kind]
            message = f"The {name} cannot be used: {refused}."
            raise InvalidRequest(message, fields=[FieldError(spec.field, f"supported {name}", message)]) from None
        finally:
            self._lock.release()

    def _compile(self, spec: GrammarSpec) -> GrammarMatcher:
        verdict = self._verdicts.get(spec)
        if verdict is None or self._vocabulary is None:
            text = source(spec)
            vocabulary = self._prepare()
            while (verdict := self._trial.refusal(text)) is None:
                self._prepare()
            self._verdicts[spec] = verdict
            if len(self._verdicts) > _VERDICTS:
                self._verdicts.popitem(last=False)
        else:
            text, vocabulary = source(spec), self._vocabulary
            self._verdicts.move_to_end(spec)
        if verdict:
            raise Refused(verdict)
        # Compiled again for each text: copies of one matcher share a lexer, and one could use up the limits of all.
        with large_stack() as thread:
            return GrammarMatcher(thread.submit(build, vocabulary.tokenizer, text).result(), vocabulary)

    def _prepare(self) -> _Vocabulary:
        """Start the trial's process, and load the tokenizer here meanwhile, unless this was done before."""
        if self._vocabulary is not None and self._trial.running:
            return self._vocabulary
        text, size = self._tokenizer.to_json(), self._tokenizer.vocab_size
        ends = tuple(sorted(end for end in self._tokenizer.eos_ids if end < self._vocab_size))
        known = [end for end in ends if self._tokenizer.token_bytes(end)]
        unreal = None
        if not known:
            backend = tokenizers.Tokenizer.from_str(text)
            backend.add_special_tokens([_END])
            text, size = backend.to_str(), backend.get_vocab_size(with_added_tokens=True)
            unreal = backend.token_to_id(_END)
            known = [] if unreal is None else [unreal]
        setup = (text, max(size, self._vocab_size), known)
        if not self._trial.running:
            self._trial.start(*setup)
        if self._vocabulary is None:
            self._vocabulary = _Vocabulary(load_tokenizer(*setup), self._vocab_size, ends, unreal)
        return self._vocabulary


@contextmanager
def _followed() -> Iterator[None]:
    """Turn a panic of llguidance into an error without the panic's message, which may hold parts of the text."""
    try:
        with panics_as_errors():
            yield
    except Panic as panic:
        raise InferenceError("llguidance cannot follow the grammar: it panicked.", hint="Simplify it.") from panic


def _check_size(spec: GrammarSpec) -> None:
    name = _NAMES[spec.kind]
    try:
        size = len(spec.text.encode())
    except UnicodeEncodeError:
        message = f"The {name} is not valid Unicode."
        raise InvalidRequest(message, fields=[FieldError(spec.field, "valid Unicode", message)]) from None
    if size > MAX_GRAMMAR_BYTES:
        message = f"The {name} has {size} bytes; {MAX_GRAMMAR_BYTES} are allowed."
        raise InvalidRequest(message, fields=[FieldError(spec.field, f"at most {MAX_GRAMMAR_BYTES} bytes", message)])


def _clear(mask: GrammarMask, vocabulary: _Vocabulary) -> None:
    """Forbid ids that the model has no column for, and the token that was added only for llguidance."""
    words = mask.view(np.uint32)
    if used := vocabulary.size % 32:
        words[-1] &= np.uint32((1 << used) - 1)
    if vocabulary.unreal is not None and vocabulary.unreal < vocabulary.size:
        words[vocabulary.unreal // 32] &= np.uint32(0xFFFFFFFF ^ (1 << vocabulary.unreal % 32))
