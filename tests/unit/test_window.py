"""Which prompts each round has: drawn once, deferred whole, and found again by a resumed run."""

import pytest
from prompt_table import as_prompts

from rlad_megatron.data.prompts import PromptSource
from rlad_megatron.data.window import PromptWindow
from rlad_megatron.errors import DataError
from rlad_megatron.types import Prompt

PROMPTS = [Prompt(f"p{i}", (i,), "", "", "") for i in range(24)]


def window(size=4, extra=0, prompts=PROMPTS):
    return PromptWindow(PromptSource(as_prompts(prompts), seed=1), size, extra)


def ids(prompts):
    return [prompt.id for prompt in prompts]


def test_a_round_keeps_its_prompts_until_it_is_closed():
    rounds = window()
    first = rounds.round(1)
    second = rounds.round(2)
    assert rounds.round(1) == first and not {*ids(first)} & {*ids(second)}
    rounds.close(1, range(4))
    assert rounds.round(2) == second


def test_the_slowest_wait_for_a_round_of_their_own():
    rounds = window(size=4, extra=2)
    slow = []
    for number in (1, 2):
        prompts = rounds.round(number)
        assert len(prompts) == 6
        rounds.close(number, used=[0, 1, 3, 4])
        slow += [prompts[2], prompts[5]]
    assert rounds.round(3) == slow
    rounds.close(3, range(4))
    assert len(rounds.round(4)) == 6


def test_an_epoch_has_every_prompt_once_whoever_is_slow():
    rounds, seen, number = window(size=4, extra=2), [], 0
    slow = {f"p{i}" for i in range(8)}
    while len(seen) < len(PROMPTS):
        number += 1
        prompts = rounds.round(number)
        order = sorted(range(len(prompts)), key=lambda i: (prompts[i].id in slow, i))
        used = order[:4]
        seen += [prompts[i].id for i in used]
        rounds.close(number, used)
    assert sorted(seen) == sorted(ids(PROMPTS))


def test_a_restored_window_goes_on_with_rounds_in_progress_and_deferred_prompts():
    original = window(size=4, extra=2)
    original.round(1)
    original.close(1, used=[0, 1, 2, 3])
    original.round(2)
    original.round(3)
    original.close(2, used=[2, 3, 4, 5])
    state = original.state_dict()
    restored = window(size=4, extra=2)
    restored.load_state_dict(state)
    for number in (3, 4, 5):
        assert restored.round(number) == original.round(number)
    assert len(original.round(4)) == 4, "the deferred ones"


def test_a_larger_round_takes_the_prompts_of_smaller_ones_in_progress_first():
    before = window(size=4)
    begun = ids([*before.round(1), *before.round(2)])
    after = window(size=6)
    after.load_state_dict(before.state_dict())
    assert ids(after.round(1)) == begun[:6]
    second = ids(after.round(2))
    assert len(second) == 6 and begun[6] not in second, "two are too few for a round, and wait"


def test_a_round_grows_by_the_next_prompts_and_a_resumed_one_by_the_same():
    original = window()
    first, second = original.round(1), original.round(2)
    original.grow(1)
    original.grow(2)
    original.grow(1)
    assert [len(first), len(second)] == [6, 5] and len({*ids(first), *ids(second)}) == 11
    restored = window()
    restored.load_state_dict(original.state_dict())
    assert restored.round(1) == first[:4] and restored.round(2) == second[:4]
    for _ in range(2):
        restored.grow(1)
    restored.grow(2)
    assert restored.round(1) == first and restored.round(2) == second
    restored.close(1, range(6))
    original.close(1, range(6))
    assert restored.round(3) == original.round(3), "no prompt is lost or used twice"


def test_a_state_of_other_prompts_is_refused():
    state = window().state_dict()
    with pytest.raises(DataError, match="other prompts"):
        window(prompts=PROMPTS[1:]).load_state_dict(state)
    named = window()
    named.round(1)
    renamed = [Prompt("x" + prompt.id, prompt.tokens, "", "", "") for prompt in PROMPTS]
    with pytest.raises(DataError, match=r"id 'p\d+', which the data lacks"):
        window(prompts=renamed).load_state_dict(named.state_dict())


def test_a_checkpoint_from_before_rounds_were_saved_is_read():
    source = PromptSource(as_prompts(PROMPTS), seed=1)
    source.next_batch(4)
    restored = window()
    restored.load_state_dict(source.state_dict())
    assert restored.round(2) == source.next_batch(4)
