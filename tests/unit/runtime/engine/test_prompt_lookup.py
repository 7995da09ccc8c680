from hypothesis import given
from hypothesis import strategies as st

from rbee_worker.runtime.engine.prompt_lookup import PromptLookup


def test_what_followed_the_same_tokens_before_is_guessed():
    lookup = PromptLookup(4)
    assert lookup.draft([1, 2, 3, 4, 5, 6, 7, 1, 2, 3]) == (4, 5, 6, 7)


def test_the_latest_occurrence_and_the_longest_match_count():
    assert PromptLookup(2).draft([1, 2, 3, 9, 1, 2, 3, 8, 1, 2, 3]) == (8, 1)
    assert PromptLookup(2).draft([5, 2, 3, 9, 4, 2, 3, 8, 5, 2, 3]) == (9, 4)
    assert PromptLookup(1).draft([2, 3, 9, 7, 2, 3]) == (9,)


def test_nothing_alike_gives_no_draft():
    assert PromptLookup(4).draft([1, 2, 3, 4]) == ()
    assert PromptLookup(4).draft([1]) == ()


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 5))
def test_growing_step_by_step_gives_what_one_look_gives(tokens, width):
    growing = PromptLookup(width)
    for end in range(1, len(tokens) + 1):
        assert growing.draft(tokens[:end]) == PromptLookup(width).draft(tokens[:end])
