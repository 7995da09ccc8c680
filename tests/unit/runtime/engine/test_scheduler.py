"""Whose turn it is, and who gives way."""

from collections import Counter
from typing import Any

import pytest

from rbee_worker.config import GenerationRequest, SamplingParams
from rbee_worker.runtime.cache.block_pool import BLOCK_TOKENS, BlockPool
from rbee_worker.runtime.cache.kv_cache import Rotation, SequenceCache
from rbee_worker.runtime.engine import scheduler
from rbee_worker.runtime.engine.scheduler import Scheduler
from rbee_worker.runtime.engine.sequence import Sequence
from rbee_worker.runtime.engine.waiting import WaitingQueue
from rbee_worker.runtime.tokenizer.tokenizer import Tokenizer
from tests.tiny import byte_tokenizer


def sequence(tokens: int, client: str = "", **sampling: Any) -> Sequence:
    request = GenerationRequest(prompt="any", client=client, sampling=SamplingParams(temperature=0, **sampling))
    tokenizer = Tokenizer(byte_tokenizer(), eos_ids=frozenset())
    return Sequence(f"{client}-{tokens}", [1] * tokens, request, 0, tokenizer, context_length=10_000)


class Loop:
    """A scheduler, a pool, and steps in which every share is computed."""

    def __init__(self, blocks: int, places: int = 8, chunk: int = 64, *, prefix_cache: bool = True) -> None:
        self.pool = BlockPool(blocks, prefix_cache=prefix_cache)
        self.scheduler = Scheduler(places, chunk, prefix_cache=prefix_cache)

    def add(self, tokens: int, client: str = "", **sampling: Any) -> Sequence:
        added = sequence(tokens, client, **sampling)
        self.scheduler.add(added)
        return added

    def step(self) -> dict[Sequence, int]:
        """Tokens of each sequence that ran; those with nothing left pending get a new token."""
        for admitted, cache in self.scheduler.admit(lambda _: SequenceCache(self.pool)):
            list(admitted.admit("model", cache))
        ran = {}
        for share in self.scheduler.schedule():
            share.cache.advance(share.sequence.tokens, share.cache.length + share.count)
            if not share.sequence.pending:
                share.sequence.tokens.append(1)
            ran[share.sequence] = share.count
        return ran

    def end(self, ended: Sequence) -> None:
        ended.fail("X", "over")
        self.scheduler.remove(ended)


def test_prompts_share_the_chunk_in_order_of_arrival() -> None:
    loop = Loop(100)
    first, second = loop.add(50), loop.add(50)
    assert loop.step() == {first: 50, second: 14}
    # The first one decodes now: prompts get an eighth, but never less than a block.
    assert loop.step() == {first: 1, second: 16}


def test_a_short_prompt_behind_a_long_one_starts_soon() -> None:
    loop = Loop(1000, prefix_cache=False)
    long, short, middle = loop.add(2000), loop.add(40), loop.add(300)
    assert loop.step() == {long: 32, short: 32}
    assert loop.step() == {long: 56, short: 8}
    # The short one decodes now, and prompts get less; the next one has the least left.
    assert loop.step() == {long: 8, short: 1, middle: 8}


def test_a_long_prompt_never_stands_still_behind_short_ones() -> None:
    loop = Loop(1000, places=100, prefix_cache=False)
    long = loop.add(2000)
    for _ in range(20):
        loop.add(40)
        assert loop.step()[long] >= 8


def test_no_more_than_the_places() -> None:
    loop = Loop(100, places=2)
    first, second, third = (loop.add(4) for _ in range(3))
    assert set(loop.step()) == {first, second}
    loop.end(first)
    assert set(loop.step()) == {second, third}


def test_a_prompt_waits_until_the_cache_has_room_for_all_of_it() -> None:
    loop = Loop(4)
    first, second = loop.add(3 * BLOCK_TOKENS - 1), loop.add(2 * BLOCK_TOKENS - 1)
    assert set(loop.step()) == {first}
    assert second.cache is None
    loop.end(first)
    assert set(loop.step()) == {second}
    assert loop.scheduler.preemptions == 0


def test_the_latest_gives_way_and_comes_back() -> None:
    loop = Loop(4)
    first, second = loop.add(BLOCK_TOKENS), loop.add(BLOCK_TOKENS)
    while not loop.scheduler.preemptions:
        ran = loop.step()
        assert first in ran
    assert second.cache is None
    assert len(second.tokens) > BLOCK_TOKENS + 1
    assert list(loop.scheduler.waiting) == [second]
    loop.end(first)
    assert loop.step() == {second: len(second.tokens) - 1}


def test_what_gave_way_comes_before_what_never_ran() -> None:
    loop = Loop(4)
    first, second = loop.add(BLOCK_TOKENS), loop.add(BLOCK_TOKENS)
    while not loop.scheduler.preemptions:
        loop.step()
    late = loop.add(1)
    loop.end(first)
    assert list(loop.step()) == [second, late]


def test_what_gave_way_comes_back_in_order_of_arrival() -> None:
    loop = Loop(8)
    first, second, third = (loop.add(BLOCK_TOKENS) for _ in range(3))
    while loop.scheduler.preemptions < 2:
        loop.step()
    assert loop.scheduler.running == [first]
    assert list(loop.scheduler.waiting) == [second, third]


def test_who_came_first_comes_first_also_when_it_got_its_place_later() -> None:
    loop = Loop(100, places=2)
    first, second = loop.add(4, "busy"), loop.add(4, "busy")
    little = loop.add(4, "little")
    loop.step()
    assert loop.scheduler.running == [first, little]
    loop.end(first)
    loop.step()
    assert loop.scheduler.running == [second, little]


def test_guesses_cost_nobody_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(4)
    first, second = loop.add(2 * BLOCK_TOKENS - 4), loop.add(2 * BLOCK_TOKENS - 4)
    loop.step()
    monkeypatch.setattr(first, "draft", lambda: (1,) * 16)
    assert loop.step() == {first: 1, second: 1}
    assert loop.scheduler.preemptions == 0


def test_guesses_do_not_go_beyond_the_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(8)
    only = loop.add(8)
    cache = SequenceCache(loop.pool, rotation=Rotation(tokens=12))
    monkeypatch.setattr(only, "draft", lambda: (1, 1))
    [(admitted, _)] = loop.scheduler.admit(lambda _: cache)
    list(admitted.admit("model", cache))
    cache.advance(only.tokens, 8)
    drafts = []
    while True:
        only.tokens.append(1)
        shares = loop.scheduler.schedule()
        if not shares:
            break
        drafts.append(len(shares[0].drafts))
        cache.advance(only.tokens, cache.length + 1)
    assert drafts == [2, 2, 0, 0]  # a share and its drafts fit below 12 tokens
    assert list(loop.scheduler.waiting) == [only]  # to be computed again with another rotation


@pytest.mark.parametrize("busy", [1, 3])
def test_a_client_with_much_to_do_does_not_hold_up_one_with_little(busy: int) -> None:
    loop = Loop(100, places=2)
    for _ in range(6 * busy):
        loop.add(4, "busy")
    little = loop.add(4, "little")
    ran = loop.step()
    assert little in ran
    assert Counter(one.client for one in ran) == {"busy": 1, "little": 1}


def test_clients_take_turns_and_each_keeps_its_order() -> None:
    queue = WaitingQueue()
    waiting = {name: [sequence(size, name) for size in range(1, 4)] for name in "ab"}
    for name in "ab":
        for one in waiting[name]:
            queue.add(one)
    served = []
    while len(queue):
        # One place: nobody is running when the next is chosen.
        chosen = next(iter(queue.in_turn(Counter())))
        turns = queue.in_turn(Counter())
        assert next(turns) is chosen
        queue.remove(chosen)
        next(turns, None)
        served.append(chosen)
    assert [one.client for one in served] == ["a", "b", "a", "b", "a", "b"]
    assert [one for one in served if one.client == "a"] == waiting["a"]


def test_the_client_with_fewer_running_goes_first_whoever_was_served_longest_ago() -> None:
    queue = WaitingQueue()
    for client in ("busy", "idle"):
        queue.add(sequence(1, client))
    # Both wait since the same turn; "busy" would be first by its arrival.
    turn = queue.in_turn(Counter({"busy": 2, "idle": 1}))
    assert [one.client for one in turn] == ["idle", "busy"]


def test_a_client_that_comes_anew_each_time_does_not_keep_another_waiting() -> None:
    loop = Loop(100, places=1)
    for _ in range(3):
        loop.add(4, "patient")
    served = []
    for _ in range(6):
        # One runs, one waits, and its queue is empty in between: two connections do that.
        if not any(waiting.client == "eager" for waiting in loop.scheduler.waiting):
            loop.add(4, "eager")
        (ran,) = loop.step()
        served.append(ran.client)
        loop.end(ran)
    assert served == ["patient", "eager"] * 3


def test_prompts_whose_log_probabilities_are_wanted_share_few_rows_of_logits() -> None:
    loop = Loop(100, chunk=512)
    for _ in range(3):
        loop.add(100, prompt_logprobs=0)
    plain = loop.add(100)
    ran = loop.step()
    assert sum(count for one, count in ran.items() if one is not plain) == 64
    assert ran[plain] == 100


def test_who_waits_for_a_prompt_is_not_compared_with_it_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    real = scheduler._common_prefix

    def counted(one: list[int], other: list[int]) -> int:
        compared.append(one)
        return real(one, other)

    monkeypatch.setattr(scheduler, "_common_prefix", counted)
    loop = Loop(400, chunk=64)
    first, *others = [loop.add(1000) for _ in range(4)]
    for _ in range(10):
        assert set(loop.step()) == {first}
    assert len(compared) == 3
    loop.end(first)
    # Now one of them computes it, and the others wait for that one.
    assert list(loop.step()) == others[:1]


def test_without_a_prefix_cache_nobody_waits_for_what_it_could_not_use() -> None:
    loop = Loop(100, chunk=300, prefix_cache=False)
    alike = {loop.add(100) for _ in range(3)}
    assert set(loop.step()) == alike


def test_one_prompt_being_computed_is_not_computed_beside() -> None:
    loop = Loop(100, chunk=32)
    first, second, other = loop.add(100), loop.add(100), loop.add(3)
    ran = loop.step()
    assert first in ran
    assert second not in ran
    assert list(loop.scheduler.waiting) == [second]
    assert other.cache is not None
