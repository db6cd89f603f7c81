"""Rollout servers as discrete events: which response ends next, and when. For plan/simulate.py.

A response takes one token of every decode step of its server, whose time depends on how many responses it decodes and
on what they have in the KV cache. Groups go to the server with most room, as in servers/stream.py. Not simulated:
requests and answers on their way, preempted requests, lost servers.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count


@dataclass(frozen=True)
class ServerSpeed:
    """What one rollout server takes."""

    step_s: tuple[float, ...]  # seconds of a decode step, by the number of responses that it decodes: 1, 2, ...
    context_s: float  # added for each token of those responses in the KV cache
    prefill_s: float  # of a prompt, during which nothing is decoded
    request_s: float  # of the prompts that come at the same time, once, likewise
    room: int  # responses that it is asked for at the same time; those beyond len(step_s) wait

    def seconds(self, responses: int, context: float, tokens: float) -> float:
        """Of so many decode steps of `responses`, which have `context` tokens in the cache before the first one.

        Step i (0, 1, ...) reads context + i * responses tokens; summed up, for any real number of steps.
        """
        return tokens * (self.step_s[responses - 1] + self.context_s * context) + (
            self.context_s * responses * tokens**2 / 2
        )

    def tokens(self, responses: int, context: float, seconds: float) -> float:
        """Decode steps in so many seconds: the inverse of `seconds`."""
        linear = self.step_s[responses - 1] + self.context_s * context
        # 2 s / (b + sqrt(b^2 + 4 a s)), which also holds for a = 0.
        return 2 * seconds / (linear + math.sqrt(linear**2 + 2 * self.context_s * responses * seconds))


@dataclass
class Group:
    """The responses to a prompt."""

    lengths: list[int]  # of its responses
    trained: bool
    round: int = 0
    missing: int = 0


@dataclass
class _Server:
    speed: ServerSpeed
    prompt: float
    free: int
    time: float = 0.0  # its state is of this moment
    asked: float = -1.0  # when it last got a prompt
    done: float = 0.0  # decode steps since the start: every running response has taken part
    context: float = 0.0  # tokens of running responses in the cache
    running: list[tuple[float, int, Group, int]] = field(default_factory=list)  # heap: `done` at the end, ..., length
    queued: deque[tuple[Group, int]] = field(default_factory=deque)
    busy: float = 0.0  # seconds with a response in flight, up to `since`
    since: float = 0.0

    @property
    def next_end(self) -> float:
        """When the next response ends."""
        if not self.running:
            return math.inf
        left = self.running[0][0] - self.done
        if left <= 0:  # in the step that has just been made: a prompt that came since does not delay it
            return self.since
        return self.time + self.speed.seconds(len(self.running), self.context, left)

    def advance(self, until: float) -> None:
        """Decode until then; no response may end before."""
        if until > self.since:
            self.busy += (until - self.since) * bool(self.running)
            self.since = until
        if until > self.time:
            if self.running:
                steps = self.speed.tokens(len(self.running), self.context, until - self.time)
                self.done += steps
                self.context += steps * len(self.running)
            self.time = until

    def fill(self, number: count) -> None:
        """Start queued responses while there are slots."""
        while self.queued and len(self.running) < len(self.speed.step_s):
            group, length = self.queued.popleft()
            heapq.heappush(self.running, (self.done + length, next(number), group, length))
            self.context += self.prompt

    def drop(self, groups: Mapping[int, Group]) -> int:
        """Forget the responses of groups, given by their ids; returns how many there were."""
        before = len(self.running) + len(self.queued)
        gone = [entry for entry in self.running if id(entry[2]) in groups]
        self.context -= sum(self.prompt + length - (end - self.done) for end, _, _, length in gone)
        self.running = [entry for entry in self.running if id(entry[2]) not in groups]
        heapq.heapify(self.running)
        self.queued = deque(entry for entry in self.queued if id(entry[0]) not in groups)
        return before - len(self.running) - len(self.queued)


class Fleet:
    """All servers, and the groups that wait for one."""

    def __init__(self, speed: ServerSpeed, servers: int, prompt_tokens: float) -> None:
        self.servers = [_Server(speed, prompt_tokens, speed.room) for _ in range(servers)]
        self._waiting: deque[Group] = deque()
        self._number = count()
        # Heaps with entries that may be out of date: (free responses, negative; server), (next end; server).
        self._roomiest = [(-speed.room, index) for index in range(servers)]
        self._ends: list[tuple[float, int]] = []

    def submit(self, groups: Sequence[Group], now: float) -> None:
        self._waiting.extend(groups)
        self._dispatch(now)

    def _dispatch(self, now: float) -> None:
        while self._waiting:
            while -self._roomiest[0][0] != self.servers[self._roomiest[0][1]].free:
                heapq.heappop(self._roomiest)
            index = self._roomiest[0][1]
            server, group = self.servers[index], self._waiting[0]
            if server.free < min(len(group.lengths), server.speed.room):
                return
            self._waiting.popleft()
            server.advance(now)
            server.queued.extend((group, length) for length in group.lengths)
            server.fill(self._number)
            server.time += server.speed.prefill_s + server.speed.request_s * (now != server.asked)
            server.asked = now
            self._changed(index, -len(group.lengths))

    def _changed(self, index: int, more_free: int) -> None:
        server = self.servers[index]
        server.free += more_free
        if more_free:
            heapq.heappush(self._roomiest, (-server.free, index))
        if server.running:
            heapq.heappush(self._ends, (server.next_end, index))

    @property
    def next_end(self) -> float:
        """When the next response ends."""
        while self._ends and self._ends[0][0] != self.servers[self._ends[0][1]].next_end:
            heapq.heappop(self._ends)
        return self._ends[0][0] if self._ends else math.inf

    def end_response(self) -> tuple[float, Group]:
        """The next response ends: when, and its group."""
        now = self.next_end
        _, index = heapq.heappop(self._ends)
        server = self.servers[index]
        server.advance(now)
        end, _, group, length = heapq.heappop(server.running)
        server.done = end  # exactly: no rounding adds up
        server.context = max(0.0, server.context - server.prompt - length) if server.running else 0.0
        server.fill(self._number)
        self._changed(index, 1)
        self._dispatch(now)
        group.missing -= 1
        return now, group

    def cancel(self, round: int, now: float) -> list[Group]:
        """Forget the unfinished groups of a round; returns them."""
        waiting = [group for group in self._waiting if group.round == round]
        self._waiting = deque(group for group in self._waiting if group.round != round)
        found = {id(group): group for group in waiting}
        for index, server in enumerate(self.servers):
            flying = [entry[2] for entry in server.running] + [entry[0] for entry in server.queued]
            ours = {id(group): group for group in flying if group.round == round}
            if ours:
                found |= ours
                server.advance(now)
                dropped = server.drop(ours)
                server.fill(self._number)
                self._changed(index, dropped)
        self._dispatch(now)
        return list(found.values())

    def pause(self, now: float, seconds: float) -> None:
        """Stop decoding for so long; afterwards each running response is read in like a prompt."""
        for index, server in enumerate(self.servers):
            if server.running:
                server.advance(now)
                again = server.context / max(server.prompt, 1) * server.speed.prefill_s
                server.time = max(server.time, now) + seconds + again
                self._changed(index, 0)

    def busy(self, now: float) -> float:
        """Mean over servers of the seconds with a response in flight until now."""
        times = [server.busy + max(0.0, now - server.since) * bool(server.running) for server in self.servers]
        return sum(times) / len(times)
