"""Steps of a run as discrete events: who waits for whom under a schedule (docs/schedules.md), for drawn lengths.

Servers are those of plan/simulated_servers.py. Waves, deferred prompts and rounds that begin ahead are those of
rl_run.py and data/window.py. A response's length belongs to its prompt: a deferred prompt, which a run samples again,
gets responses as long as those that were cancelled. Not simulated: rewards, and groups that are replaced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle

from rlad_megatron.config import AHEAD, PHASED
from rlad_megatron.plan.simulated_servers import Fleet, Group, ServerSpeed

MOST_STEPS = 24  # simulated of a longer cycle
SPENT = ("time/rollout", "time/teacher", "time/update", "time/weight_sync", "teacher wait", "tokens")


@dataclass(frozen=True)
class TrainerSpeed:
    """What the ranks of trainer and teacher take. The functions get the tokens of each response of a wave or update."""

    wave_tokens: int  # of prompts and responses, from which on a wave fills every rank
    teacher_s: Callable[[Sequence[int]], float]
    score_s: Callable[[Sequence[int]], float]  # of a wave: the student's passes without gradients, and a reference's
    update_s: Callable[[Sequence[int]], float]  # forward and backward: of a wave, of several updates after all waves
    finish_s: float  # of each update: sums of gradients, optimizer
    push_s: float  # until servers, which are stopped, have the new weights and are checked
    updates: int = 1  # of a step
    teacher_apart: bool = False  # on dedicated ranks


@dataclass(frozen=True)
class Rounds:
    """What a step samples, and when."""

    prompts: int
    group_size: int
    prompt_tokens: float
    schedule: str  # PHASED, STREAMING or AHEAD
    ahead: int = 0
    overprovision: int = 0
    servers: int = 1


@dataclass(frozen=True)
class Simulated:
    """Means over the simulated steps, in seconds, named as a run's metrics."""

    times: dict[str, float]  # time/...
    idle: dict[str, float]  # idle/...
    tokens: float  # of prompts and responses, of a step


def simulate(
    rounds: Rounds, server: ServerSpeed, trainer: TrainerSpeed, draw: Callable[[int], Sequence[int]], trained: float = 1
) -> Simulated:
    """Simulate steps of a run from its beginning, and average over those after the first ones.

    draw: lengths of so many further responses. trained: the share of groups that have a gradient.
    """
    run = _Run(rounds, server, trainer, draw, trained)
    warm_up = 2 + rounds.ahead
    run.steps(warm_up)
    # Deferred prompts fill a round of their own once in so many steps.
    steps = rounds.prompts / rounds.overprovision + 1 if rounds.overprovision else 4
    if steps <= warm_up + MOST_STEPS + rounds.ahead:
        steps = math.ceil(steps)
        total = run.steps(steps)
    else:  # before any such round
        short = run.steps(MOST_STEPS)
        run.fill_deferred()
        last = 2 + rounds.ahead
        total = {name: (steps - last) * short[name] / MOST_STEPS + value for name, value in run.steps(last).items()}
    seconds = total.pop("seconds")
    busy = total.pop("busy")
    times = {name: spent / steps for name, spent in total.items()}
    step = seconds / steps
    idle = {"idle/trainer": (times["time/rollout"] + times["teacher wait"]) / step}
    idle["idle/servers"] = 1 - busy / seconds
    if times["time/teacher"]:
        idle["idle/teacher"] = 1 - times["time/teacher"] / step
    return Simulated(
        {name: times[name] for name in SPENT if name.startswith("time/")} | {"time/step": step},
        {name: min(max(share, 0.0), 1.0) for name, share in idle.items()},
        times["tokens"],
    )


class _Run:
    """The trainer's side: rounds, waves, updates and pushes."""

    def __init__(
        self,
        rounds: Rounds,
        server: ServerSpeed,
        trainer: TrainerSpeed,
        draw: Callable[[int], Sequence[int]],
        trained: float,
    ) -> None:
        self.now = 0.0
        self.spent = dict.fromkeys(SPENT, 0.0)
        self.fleet = Fleet(server, rounds.servers, rounds.prompt_tokens)
        self._rounds, self._trainer, self._draw, self._trained = rounds, trainer, draw, trained
        self._number = self._begun = 0  # rounds that are trained on, and that servers have been given
        self._share = 0.0
        self._deferred: list[Group] = []
        self._ended: dict[int, int] = {}  # groups whose responses have all ended, by round
        # Those that were not collected, and since when they are ready.
        self._ready: dict[int, list[tuple[float, Group]]] = {}
        self._teacher_free = 0.0  # a dedicated one's time

    def steps(self, count: int) -> dict[str, float]:
        """Simulate so many steps. What was spent in them; all their "seconds"; those in which servers were "busy"."""
        before = self._totals()
        for _ in range(count):
            self._step()
        return {name: value - before[name] for name, value in self._totals().items()}

    def _totals(self) -> dict[str, float]:
        return self.spent | {"seconds": self.now, "busy": self.fleet.busy(self.now)}

    def fill_deferred(self) -> None:
        """Have deferred prompts fill the next round that begins: repeat those that there are."""
        again = cycle(list(self._deferred))
        missing = range(self._rounds.prompts - len(self._deferred))
        self._deferred += [Group(group.lengths, group.trained) for _, group in zip(missing, again, strict=False)]

    def _step(self) -> None:
        self._number += 1
        self._begin_rounds()
        found: list[Group] = []
        while len(found) < self._rounds.prompts:
            groups = self._collect(self._rounds.prompts - len(found))
            self._train(groups)
            found += groups
        self._finish_updates(found)
        self._catch_up()
        if self._rounds.schedule == AHEAD:
            self.fleet.pause(self.now, self._trainer.push_s)
        self._spend("time/weight_sync", self._trainer.push_s)

    def _spend(self, what: str, seconds: float) -> None:
        self.spent[what] += seconds
        self.now += seconds

    def _begin_rounds(self) -> None:
        rounds = self._rounds
        ahead = rounds.ahead if rounds.schedule == AHEAD else 0
        while self._begun < self._number + ahead:
            self._begun += 1
            if len(self._deferred) >= rounds.prompts:
                groups, self._deferred = self._deferred[: rounds.prompts], self._deferred[rounds.prompts :]
            else:
                groups = [self._new_group() for _ in range(rounds.prompts + rounds.overprovision)]
            for group in groups:
                group.round, group.missing = self._begun, rounds.group_size
            self._ended[self._begun], self._ready[self._begun] = 0, []
            self.fleet.submit(groups, self.now)

    def _new_group(self) -> Group:
        self._share += self._trained  # evenly over the groups
        trained = self._share >= 1 - 1e-9
        self._share -= trained
        return Group(list(self._draw(self._rounds.group_size)), trained)

    def _collect(self, most: int) -> list[Group]:
        """The next groups of the round: `most`, or those that fill a wave. Waits for them."""
        begin, ready = self.now, self._ready[self._number]
        self._catch_up()
        while True:
            groups = [group for when, group in ready if when <= self.now]
            if len(groups) == most or self._fills_a_wave(groups):
                break
            scored = min((when for when, _ in ready if when > self.now), default=math.inf)
            if scored <= self.fleet.next_end:
                self.now = scored
            else:
                self.now = max(self.now, self._end_response())
        ready[:] = [entry for entry in ready if entry[0] > self.now]
        self.spent["time/rollout"] += self.now - begin
        return groups

    def _fills_a_wave(self, groups: Sequence[Group]) -> bool:
        if self._rounds.schedule == PHASED:
            return False
        tokens = sum(self._tokens(group) for group in groups if group.trained)
        return tokens >= self._trainer.wave_tokens

    def _tokens(self, group: Group) -> float:
        return self._rounds.prompt_tokens * len(group.lengths) + sum(group.lengths)

    def _catch_up(self) -> None:
        """Let servers work until now."""
        while self.fleet.next_end <= self.now:
            self._end_response()

    def _end_response(self) -> float:
        now, group = self.fleet.end_response()
        if group.missing:
            return now
        self._ended[group.round] += 1
        if self._ended[group.round] == self._rounds.prompts:
            self._deferred += self.fleet.cancel(group.round, now)
        ready = now
        if self._trainer.teacher_apart and self._rounds.schedule != PHASED and group.trained:
            seconds = self._trainer.teacher_s(group.lengths)
            ready = self._teacher_free = max(self._teacher_free, now) + seconds
            self.spent["time/teacher"] += seconds
        self._ready[group.round].append((ready, group))
        return now

    def _train(self, groups: Sequence[Group]) -> None:
        """What a run does with a wave (run.py:train_on): with several updates, it only scores it."""
        trainer = self._trainer
        self.spent["tokens"] += sum(map(self._tokens, groups))
        lengths = _trained_lengths(groups)
        if not lengths:
            return
        if not trainer.teacher_apart or self._rounds.schedule == PHASED:
            seconds = trainer.teacher_s(lengths)
            self._spend("time/teacher", seconds)
            self.spent["teacher wait"] += seconds * trainer.teacher_apart
        self._spend("time/update", trainer.score_s(lengths) + trainer.update_s(lengths) * (trainer.updates == 1))

    def _finish_updates(self, groups: Sequence[Group]) -> None:
        """What it does after all waves (rl_run.py:finish_updates). Each update has its share of long responses."""
        updates = self._trainer.updates
        for part in (groups[number::updates] for number in range(updates)):
            if updates > 1 and (lengths := _trained_lengths(part)):
                self._spend("time/update", self._trainer.update_s(lengths))
            self._spend("time/update", self._trainer.finish_s)


def _trained_lengths(groups: Sequence[Group]) -> list[int]:
    return [length for group in groups if group.trained for length in group.lengths]
