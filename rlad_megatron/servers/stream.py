"""Rollouts as a stream: rounds of prompts go in, and each prompt's group comes out when its last member has ended.

Lives on rank 0. A thread with an event loop sends the requests. Further threads work on finished groups, one for each
stage (the reward, a remote teacher), so neither waits for the trainer and the trainer waits for neither.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from queue import Empty, SimpleQueue
from typing import Any

from rlad_megatron.config import SamplingConfig
from rlad_megatron.servers.client import UNPUSHED, ServerDownError, open_session
from rlad_megatron.servers.frames import Completion
from rlad_megatron.servers.process import VllmServer
from rlad_megatron.servers.sampling import request_seed, sampling_body
from rlad_megatron.types import Group, Prompt, Rollout

STAGE_TIMEOUT_S = 5.0  # for a stage to end with the stream


@dataclass(frozen=True, eq=False)
class Round:
    """Prompts that are sampled together."""

    number: int  # of the step it is for; decides the seeds, so every round of a run needs its own
    prompts: Sequence[Prompt]
    group_size: int
    sampling: SamplingConfig
    needed: (
        int  # groups, and one for each that is replaced; when so many are finished, the other requests are cancelled
    )
    experts: bool = False  # whether to ask for the experts that were chosen
    # Of each finished group, on rank 0: whether `prompts` has just got one more, because this one counts for nothing.
    replaces: Callable[[Group], bool] = lambda group: False


@dataclass(frozen=True)
class Lost:
    """A server that takes no more requests. Its unfinished ones go to other servers."""

    server: VllmServer
    why: str
    restarts: int  # of the server when it was admitted


@dataclass
class _Job:
    """One group's request."""

    round: Round
    index: int  # of its prompt in the round
    answers: dict[int, Completion] = field(default_factory=dict)  # by member

    @property
    def missing(self) -> list[int]:
        return [member for member in range(self.round.group_size) if member not in self.answers]


@dataclass(eq=False)
class _Open:
    """A server that takes requests, from its admission until it is lost."""

    server: VllmServer
    free: int  # responses that it may be asked for now
    restarts: int  # of the server at its admission


Stage = Callable[[list[Group]], None]
Event = Group | Lost | Exception


class RolloutStream:
    """Sends rounds to the servers, first in first out. A context manager: requests in flight are cancelled at its end.

    Each group is one request, to the server with most room. Seeds depend only on (round, prompt, member), so neither
    timing nor the choice of server changes what is sampled.
    """

    def __init__(
        self,
        *,
        max_concurrency: int,
        timeout_s: float,
        eos_ids: Sequence[int],
        first_seed: int,
        stages: Sequence[Stage] = (),
        on_load: Callable[[int, int], None] = lambda server, count: None,
    ) -> None:
        """
        max_concurrency: responses in flight at each server. stages: what to do with finished groups, in order; each is
        called with one or more groups, in a separate thread. on_load(server, count): called in the stream's thread when
        the number of responses in flight at a server changes.
        """
        self._max_concurrency, self._timeout_s = max_concurrency, timeout_s
        self._eos_ids, self._first_seed = eos_ids, first_seed
        self._on_load = on_load
        self._closing = threading.Event()
        self._events: SimpleQueue[Event] = SimpleQueue()
        # From one stage to the next; the last one's groups are events.
        queues: list[SimpleQueue] = [*(SimpleQueue() for _ in stages), self._events]
        self._finished, self._stage_queues = queues[0], queues[:-1]
        self._stages = [
            threading.Thread(target=_run_stage, args=(stage, *ends, self._events, self._closing), daemon=True)
            for stage, ends in zip(stages, pairwise(queues), strict=True)
        ]
        self._open: list[_Open] = []
        self._waiting: deque[_Job] = deque()
        self._running: dict[asyncio.Task[None], _Job] = {}
        self._needed: dict[Round, int] = {}  # groups that unfinished rounds still need
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(self._on_error)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> RolloutStream:
        self._stop = asyncio.Event()
        for thread in (*self._stages, self._thread):
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()
        for queue in self._stage_queues:
            queue.put(None)
        for thread in self._stages:  # daemons: a teacher that does not answer keeps nobody
            thread.join(STAGE_TIMEOUT_S)

    def submit(self, batch: Round, *, urgent: bool = False) -> None:
        """Sample a round after those before it; an urgent one before those that have not begun."""
        self._loop.call_soon_threadsafe(self._submit, batch, urgent)

    def extend(self, batch: Round, index: int) -> None:
        """Sample one more prompt of a round, which then needs one group more; before the rounds after it."""
        self._loop.call_soon_threadsafe(self._extend, batch, index)

    def admit(self, servers: Iterable[VllmServer]) -> None:
        """Send requests to these servers from now on: they hold the current weights."""
        self._loop.call_soon_threadsafe(self._admit, list(servers))

    def dismiss(self, server: VllmServer) -> None:
        """Send no more requests to this server, until it is admitted again."""
        self._loop.call_soon_threadsafe(self._dismiss, server)

    def next_events(self, timeout_s: float | None = None) -> list[Event]:
        """What has happened since the last call; waits for the first event, or until the timeout.

        An exception ends the run.
        """
        events: list[Event] = []
        try:
            events.append(self._events.get(timeout=timeout_s))
            while True:
                events.append(self._events.get_nowait())
        except Empty:
            return events

    def _on_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Of a callback: asyncio would only print it, and the main thread would go on waiting."""
        self._events.put(context.get("exception") or RuntimeError(context["message"]))

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._main())
        except Exception as error:  # of any kind: the main thread waits for an event
            self._events.put(error)

    async def _main(self) -> None:
        async with open_session(self._timeout_s) as self._session:
            await self._stop.wait()
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)

    def _submit(self, batch: Round, urgent: bool) -> None:
        self._needed[batch] = batch.needed
        jobs = [_Job(batch, index) for index in range(len(batch.prompts))]
        if urgent:
            self._waiting.extendleft(reversed(jobs))
        else:
            self._waiting.extend(jobs)
        self._dispatch()

    def _extend(self, batch: Round, index: int) -> None:
        self._needed[batch] = self._needed.get(batch, 0) + 1
        numbers = [job.round.number for job in self._waiting]
        place = next((i for i, number in enumerate(numbers) if number > batch.number), len(numbers))
        self._waiting.insert(place, _Job(batch, index))
        self._dispatch()

    def _admit(self, servers: list[VllmServer]) -> None:
        known = [opened.server for opened in self._open]
        new = (server for server in servers if server not in known)
        self._open += [_Open(server, self._max_concurrency, server.restarts) for server in new]
        self._dispatch()

    def _dismiss(self, server: VllmServer) -> None:
        self._open = [opened for opened in self._open if opened.server is not server]

    def _dispatch(self) -> None:
        """Send waiting requests while a server has room for them; an idle one has room for any."""
        while self._waiting and self._open and not self._stop.is_set():
            roomiest = max(self._open, key=lambda opened: opened.free)
            if roomiest.free < min(len(self._waiting[0].missing), self._max_concurrency):
                return
            job = self._waiting.popleft()
            self._take(roomiest, len(job.missing))
            task = self._loop.create_task(self._ask(roomiest, job))
            self._running[task] = job
            task.add_done_callback(partial(self._ended, roomiest, job))

    def _take(self, opened: _Open, count: int) -> None:
        opened.free -= count
        self._on_load(opened.server.index, self._max_concurrency - opened.free)

    async def _ask(self, opened: _Open, job: _Job) -> None:
        batch, members = job.round, job.missing
        seed = self._first_seed + batch.number
        seeds = [request_seed(seed, job.index, member) for member in members]
        tokens = batch.prompts[job.index].tokens
        body = sampling_body(tokens, batch.sampling, seeds, self._eos_ids, experts=batch.experts)
        try:
            async for place, completion in opened.server.client.sample(self._session, body):
                job.answers[members[place]] = completion
                self._take(opened, -1)
                self._dispatch()
            self._finish(job)
        except ServerDownError as error:
            if job.missing:
                self._waiting.appendleft(job)
            else:  # it died after its last answer
                self._finish(job)
            if opened in self._open:  # its first request to notice
                self._open.remove(opened)
                self._events.put(Lost(opened.server, str(error), opened.restarts))
        except Exception as error:  # of any kind: the main thread waits for an event
            self._events.put(error)

    def _ended(self, opened: _Open, job: _Job, task: asyncio.Task[None]) -> None:
        """Also of a request that was cancelled before it began."""
        del self._running[task]
        self._take(opened, -len(job.missing))
        self._dispatch()

    def _finish(self, job: _Job) -> None:
        batch = job.round
        prompt, answers = batch.prompts[job.index], (job.answers[member] for member in range(batch.group_size))
        self._finished.put(Group(batch.number, job.index, [_rollout(prompt, answer) for answer in answers]))
        self._needed[batch] -= 1
        if not self._needed[batch]:
            del self._needed[batch]
            self._waiting = deque(waiting for waiting in self._waiting if waiting.round is not batch)
            for task, running in self._running.items():
                if running.round is batch and running is not job:
                    task.cancel()


def _rollout(prompt: Prompt, answer: Completion) -> Rollout:
    versions = [(0 if label == UNPUSHED else int(label), count) for label, count in answer.versions]
    return Rollout(prompt, answer.tokens, answer.log_probs, answer.finish_reason, versions, experts=answer.experts)


def _run_stage(
    stage: Stage, source: SimpleQueue, target: SimpleQueue, failed: SimpleQueue, closing: threading.Event
) -> None:
    """Call `stage` with the groups in `source`, as many as there are, and hand them on. None or an error ends it."""
    while (group := source.get()) is not None and not closing.is_set():
        groups = [group]
        while not source.empty() and (group := source.get()) is not None:
            groups.append(group)
        try:
            stage(groups)
        except Exception as error:  # of any kind: the main thread waits for an event
            failed.put(error)
            return
        for done in groups:
            target.put(done)
        if group is None:
            return
