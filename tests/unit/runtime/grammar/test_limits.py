"""Grammars that would take hours, gigabytes or the process down: refused at bounded cost, or followed."""

import gc
import json
import os
import signal
import threading

import psutil
import pytest

from rbee_worker.config import GrammarKind, GrammarSpec
from rbee_worker.errors import InferenceError, InvalidRequest, Unavailable
from rbee_worker.runtime.grammar.compiler import GrammarCompiler
from rbee_worker.runtime.grammar.trial import Trial
from tests.unit.runtime.grammar.case import BYTES, VOCAB, allowed, matches, numbers, refused, walk


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    """For one token per byte; the two tokens that end a text are none of the tokenizer's."""
    return GrammarCompiler(BYTES, VOCAB)


def chain(name: str, count: int) -> str:
    """Rules of which each is the next."""
    rules = [f"{name}{index}: {name}{index + 1}\n" for index in range(count)]
    return f"start: {name}0\n" + "".join(rules) + f'{name}{count}: "a"'


def patterns(count: int) -> str:
    return json.dumps({"patternProperties": {f"^{index + 4096:x}": {} for index in range(count)}})


BOMBS: dict[str, tuple[GrammarKind, str]] = {
    "hours of comparing patterns": ("json_schema", patterns(500)),
    "gigabytes of states": ("regex", "a?" * 20_000 + "a" * 20_000),
    "an endless first mask": (
        "lark",
        "start: " + " ".join(["(a|b|c|d|e)?"] * 4000) + "".join(f'\n{c}: "x"|"y" {c}' for c in "abcde"),
    ),
    "doubled forty times": (
        "lark",
        "\n".join(["start: T0"] + [f"T{n}: T{n + 1} T{n + 1}" for n in range(40)] + ['T40: "a"']),
    ),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_refused(compiler: GrammarCompiler, bomb: str):
    refused(compiler, *BOMBS[bomb])
    before = compiler._trial._process
    refused(compiler, *BOMBS[bomb])
    assert compiler._trial._process is before, "tried out again"
    assert matches(compiler.compile(GrammarSpec("regex", "a")), "a"), "the next one is served"


HARMLESS: dict[str, tuple[GrammarKind, str]] = {
    "rules deeper than a stack": ("lark", chain("r", 4000)),
    "terminals deeper than a stack": ("lark", chain("T", 4000)),
    "a million": ("regex", "((a{1000}){1000})"),
    "nested repetition": ("regex", "((a{1,100}){1,100}){1,100}"),
    "exponential": ("regex", "(a|b)*a(a|b){300}"),
    "deep parentheses": ("regex", "(" * 30_000 + "a" + ")" * 30_000),
    "deep JSON": ("json_schema", '{"a":' * 10_000 + "1" + "}" * 10_000),
    "deep anyOf": ("json_schema", '{"anyOf":[' * 60 + '{"type":"null"}' + "]}" * 60),
    "recursive": ("json_schema", json.dumps({"properties": {"a": {"$ref": "#"}, "b": {"$ref": "#"}}})),
    "huge enum": ("json_schema", json.dumps({"enum": [f"{n * 7919:x}" for n in range(4000)]})),
    "huge counts": ("json_schema", json.dumps({"type": "array", "minItems": 10**9, "items": {"type": "null"}})),
    "ambiguous": ("lark", 'start: s\ns: s s | "a" |'),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("bomb", HARMLESS)
def test_others_are_refused_or_can_be_followed(compiler: GrammarCompiler, bomb: str):
    kind, text = HARMLESS[bomb]
    try:
        matcher = compiler.compile(GrammarSpec(kind, text))
    except InvalidRequest:
        return
    rng = numbers(0)
    for _ in range(30):
        try:
            if matcher.finished:
                break
            matcher.accept(rng.choice(allowed(matcher)))
        except InferenceError:
            break


def test_a_grammar_that_becomes_too_complex_ends_its_own_text(compiler: GrammarCompiler):
    spec = GrammarSpec("regex", "((a{1,100}){1,100}){1,100}")
    matcher = compiler.compile(spec)
    (a,) = BYTES.encode("a")

    def follow() -> None:
        for _ in range(200):
            matcher.mask()
            matcher.accept(a)

    with pytest.raises(InferenceError, match="behind token"):
        follow()
    with pytest.raises(InferenceError):
        matcher.mask()
    assert a in allowed(compiler.compile(spec)), "the next text begins anew"


def test_following_a_grammar_has_a_budget_of_processor_time(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch):
    matcher = compiler.compile(GrammarSpec("regex", "a*"))
    matcher.mask()
    monkeypatch.setattr("rbee_worker.runtime.grammar.compiler._CPU_SECONDS", 0.0)
    monkeypatch.setattr("rbee_worker.runtime.grammar.compiler._CPU_SECONDS_A_TOKEN", 0.0)
    with pytest.raises(InferenceError, match="processor time"):
        matcher.mask()


def test_many_threads_at_once(compiler: GrammarCompiler):
    found: list[str] = []

    def work(seed: int) -> None:
        found.append(walk(compiler.compile(GrammarSpec("regex", f"x{{{seed % 4 + 1}}}")), numbers(seed)))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted("x" * (seed % 4 + 1) for seed in range(12))


def test_a_compiler_that_is_busy_for_long_says_so(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rbee_worker.runtime.grammar.compiler._WAIT_SECONDS", 0.01)
    with compiler._lock, pytest.raises(Unavailable) as caught:
        compiler.compile(GrammarSpec("json_object"))
    assert caught.value.retry_after is not None


def test_the_trial_ends_with_its_compiler_and_begins_again_after_a_crash():
    mine = GrammarCompiler(BYTES, VOCAB)
    mine.compile(GrammarSpec("regex", "a"))
    process = mine._trial._process
    assert process is not None
    os.kill(process.pid, signal.SIGSEGV)
    mine.compile(GrammarSpec("regex", "b"))
    again = mine._trial._process
    assert again is not None
    assert again.pid != process.pid
    del mine
    gc.collect()
    assert not psutil.pid_exists(again.pid)


def test_a_trial_that_does_not_begin_is_an_error():
    trial = Trial()
    trial.start("no tokenizer", 10, [0])
    with pytest.raises(InferenceError, match="status 1"):
        trial.refusal("{}")


def test_a_trial_that_cannot_be_started_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.executable", "/no/such/python")
    trial = Trial()
    with pytest.raises(InferenceError, match=r"tries grammars out cannot be started: .*No such file"):
        trial.start("", 10, [0])
    assert not trial.running
    trial.close()
    with pytest.raises(InferenceError, match="was not started"):
        trial.refusal("{}")


def test_a_trial_that_is_silent_is_given_up(monkeypatch: pytest.MonkeyPatch):
    own = GrammarCompiler(BYTES, VOCAB)
    own.compile(GrammarSpec("regex", "a"))
    process = own._trial._process
    assert process is not None
    os.kill(process.pid, signal.SIGSTOP)
    monkeypatch.setattr("rbee_worker.runtime.grammar.trial._ANSWER_SECONDS", 0.05)
    assert "takes more than" in refused(own, "regex", "b").message
    assert process.returncode == -signal.SIGKILL
    monkeypatch.undo()
    assert matches(own.compile(GrammarSpec("regex", "c")), "c")
