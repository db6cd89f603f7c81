"""Rounds of prompts as a stream of groups, over servers that the tests script."""

import threading
from dataclasses import replace

import pytest
from scripted_server import ScriptedServer

from rlad_megatron.config import SamplingConfig
from rlad_megatron.errors import DataError, RolloutError
from rlad_megatron.servers.sampling import request_seed
from rlad_megatron.servers.stream import Lost, RolloutStream, Round
from rlad_megatron.types import EVALUATION, Prompt

SEED = 7


def prompts(*numbers):
    return [Prompt(str(number), (number,), "", "", "") for number in numbers]


def a_round(number, batch, *, group_size=2, needed=None):
    return Round(number, batch, group_size, SamplingConfig(), needed or len(batch))


def open_stream(*servers, max_concurrency=64, stages=()):
    stream = RolloutStream(max_concurrency=max_concurrency, timeout_s=5.0, eos_ids=[1], first_seed=SEED, stages=stages)
    stream.admit(servers)
    return stream


def take(stream, count):
    """The next `count` events."""
    events = []
    while len(events) < count:
        events += stream.next_events()
    return events


def test_each_group_comes_when_its_last_member_ends_with_the_seeds_of_its_place():
    server = ScriptedServer("a", pace=0.01)
    server.version = "5"
    with open_stream(server) as stream:
        stream.submit(a_round(3, prompts(5, 1)))
        slow_last = take(stream, 2)
    assert [(group.round, group.index) for group in slow_last] == [(3, 1), (3, 0)]
    for group, number in zip(slow_last, (1, 5), strict=True):
        seeds = [request_seed(SEED + 3, group.index, member) for member in range(2)]
        assert [rollout.tokens for rollout in group.rollouts] == [[number, seed] for seed in seeds]
        assert {rollout.prompt.id for rollout in group.rollouts} == {str(number)}
        assert group.rollouts[0].versions == [(0, 1), (5, 1)]


def test_a_round_asks_for_experts_or_not():
    with open_stream(ScriptedServer("a")) as stream:
        stream.submit(replace(a_round(3, prompts(5)), experts=True))
        stream.submit(a_round(EVALUATION, prompts(5)))
        groups = {group.round: group for group in take(stream, 2)}
    assert [rollout.experts.tolist() for rollout in groups[3].rollouts] == [[[[5]], [[5]]]] * 2
    assert [rollout.experts for rollout in groups[EVALUATION].rollouts] == [None] * 2


def test_rounds_are_first_in_first_out_but_for_urgent_ones():
    server = ScriptedServer("a", pace=0.005)
    with open_stream(server, max_concurrency=2) as stream:
        stream.submit(a_round(1, prompts(1, 2)))
        stream.submit(a_round(2, prompts(3)))
        stream.submit(a_round(-1, prompts(4, 5)), urgent=True)
        take(stream, 5)
    assert [prompt for prompt, _ in server.asked] == [1, 4, 5, 2, 3]
    assert server.most == 2


def test_the_server_with_most_room_is_asked_and_a_group_above_the_limit_goes_to_an_idle_one():
    servers = ScriptedServer("a", pace=0.01), ScriptedServer("b", pace=0.01)
    with open_stream(*servers, max_concurrency=4) as stream:
        stream.submit(a_round(1, prompts(1, 1, 1, 1)))
        take(stream, 4)
        stream.submit(a_round(2, prompts(1), group_size=9))
        take(stream, 1)
    assert [len(server.asked) for server in servers] == [3, 2]


def test_what_a_lost_server_had_not_answered_goes_to_the_others():
    lost, other = ScriptedServer("lost", dies_after=1), ScriptedServer("other")
    with open_stream(lost) as stream:
        stream.submit(a_round(3, prompts(1, 2), group_size=3))
        (event,) = take(stream, 1)
        assert isinstance(event, Lost) and event.server is lost and event.why == "lost is gone"
        stream.admit([other])
        groups = take(stream, 2)
        assert len(lost.asked) == 2
        stream.submit(a_round(4, prompts(3)))
        take(stream, 1)
    assert len(lost.asked) == 2
    asked = {prompt: seeds for prompt, seeds in other.asked}
    assert sorted(len(asked[number]) for number in (1, 2)) == [2, 3]  # one member had ended
    for group in groups:
        assert [rollout.tokens[1] for rollout in group.rollouts] == [
            request_seed(SEED + 3, group.index, member) for member in range(3)
        ]


def test_a_dismissed_server_is_not_asked_until_it_is_admitted_again():
    first, second = ScriptedServer("first"), ScriptedServer("second")
    with open_stream(first, second, max_concurrency=2) as stream:
        stream.dismiss(first)
        stream.submit(a_round(1, prompts(1, 2, 3)))
        take(stream, 3)
        assert not first.asked
        stream.admit([first])
        stream.submit(a_round(2, prompts(1, 2)))
        take(stream, 2)
    assert len(first.asked) == 1


def test_a_round_that_has_what_it_needs_cancels_the_slowest():
    server = ScriptedServer("a", pace=0.05)
    with open_stream(server, max_concurrency=6) as stream:
        stream.submit(a_round(1, prompts(9, 1, 2, 8), needed=2))
        groups = take(stream, 2)
        stream.submit(a_round(2, prompts(1, 1, 1)))
        take(stream, 3)
    assert [group.index for group in groups] == [1, 2]
    assert 9 in server.cancelled and server.most <= 6


@pytest.mark.parametrize("is_over", [False, True])
def test_a_round_that_grows_samples_one_more_before_later_rounds(is_over):
    server = ScriptedServer("a", pace=0.01)
    with open_stream(server, max_concurrency=2) as stream:
        growing = a_round(1, prompts(1, 2))
        stream.submit(growing)
        groups = take(stream, 2 if is_over else 1)
        stream.submit(a_round(2, prompts(7, 8)))
        growing.prompts.append(*prompts(3))
        stream.extend(growing, 2)
        groups += take(stream, 5 - len(groups))
    assert sorted((group.round, group.index) for group in groups) == [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1)]
    order = [prompt for prompt, _ in server.asked]
    assert order.index(3) < order.index(8) and not server.cancelled
    (added,) = (group for group in groups if (group.round, group.index) == (1, 2))
    assert added.rollouts[0].tokens == [3, request_seed(SEED + 1, 2, 0)]
    assert not stream._needed


def test_stages_see_every_group_once_in_order_and_hand_it_on():
    seen = []

    def first(groups):
        for group in groups:
            group.rollouts[0].reward = 1.0

    def second(groups):
        seen.append((threading.current_thread(), [group.rollouts[0].reward for group in groups]))

    with open_stream(ScriptedServer("a"), stages=[first, second]) as stream:
        stream.submit(a_round(1, prompts(*range(20))))
        groups = take(stream, 20)
    assert sorted(group.index for group in groups) == list(range(20))
    assert [reward for _, rewards in seen for reward in rewards] == [1.0] * 20
    assert {thread for thread, _ in seen}.isdisjoint({threading.main_thread()})


@pytest.mark.parametrize(
    ("server", "stage", "error"),
    [
        (ScriptedServer("a", error=RolloutError("refused")), lambda groups: None, RolloutError),
        (ScriptedServer("a"), lambda groups: (_ for _ in ()).throw(DataError("reward")).send(None), DataError),
    ],
)
def test_an_error_is_an_event(server, stage, error):
    with open_stream(server, stages=[stage]) as stream:
        stream.submit(a_round(1, prompts(1)))
        (event,) = take(stream, 1)
    assert isinstance(event, error)


def test_leaving_cancels_requests_in_flight():
    server = ScriptedServer("a", pace=60.0)
    with open_stream(server) as stream:
        stream.submit(a_round(1, prompts(1)))
        while not server.asked:
            threading.Event().wait(0.01)
    assert server.cancelled == [1]


def test_a_round_that_is_over_before_a_request_began_leaves_its_room():
    server = ScriptedServer("a")
    with open_stream(server, max_concurrency=2) as stream:
        stream.submit(a_round(1, prompts(1, 2), needed=1))
        take(stream, 1)
        stream.submit(a_round(2, prompts(3, 4)))
        take(stream, 2)
    assert server.most <= 2


def test_a_server_that_dies_after_its_last_answer_owes_nothing():
    server = ScriptedServer("a", dies_at_the_end=True)
    with open_stream(server) as stream:
        stream.submit(a_round(1, prompts(1)))
        group, lost = take(stream, 2)
    assert [rollout.tokens[0] for rollout in group.rollouts] == [1, 1] and isinstance(lost, Lost)


def test_leaving_does_not_wait_for_what_is_queued_at_a_stage():
    began, scored = threading.Event(), []

    def slow(groups):
        scored.extend(groups)
        began.set()
        threading.Event().wait(0.3)

    with open_stream(ScriptedServer("a"), stages=[slow]) as stream:
        for number in range(5):
            stream.submit(a_round(number, prompts(1)))
            began.wait()
    assert len(scored) < 5


def test_events_can_be_asked_for_without_waiting():
    with open_stream(ScriptedServer("a")) as stream:
        assert stream.next_events(0) == []
