"""A pool of processes that score responses, with a time limit for each response.

pebble kills and replaces a worker that exceeds the limit or exits. Its pool breaks if a worker exits while idle, or so
soon that pebble does not know yet what the worker was scoring; `RewardPool` then starts a new one.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import Future, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TypeVar

from pebble import ProcessExpired, ProcessPool

from rlad_megatron import platform
from rlad_megatron.config import DataConfig
from rlad_megatron.data.presets import reward_name
from rlad_megatron.data.tokenizers import Tokenizer
from rlad_megatron.errors import ConfigError, DataError
from rlad_megatron.rewards import worker
from rlad_megatron.rewards.registry import REWARDS, RewardResult
from rlad_megatron.types import Group, Prompt

T = TypeVar("T")
START_TIMEOUT_S = 300.0  # for a process to import the reward
CHECK_EVERY_S = 0.5  # whether the pool broke


class RewardPool:
    """`data.reward_workers` processes that hold the reward. A context manager: they run from enter to exit.

    Enter it, and score, in a thread that lives as long as the pool: the kernel kills a process with the thread that
    started it.
    """

    def __init__(self, config: DataConfig, run_dir: Path, ranks_on_host: int = 1) -> None:
        """What the reward prints goes to `logs/rewards.log` in run_dir. ranks_on_host: these share the host's cores."""
        self.size = config.reward_workers or platform.cores_of_rank(ranks_on_host)
        self._config, self._reward = config, reward_name(config)
        self._log = run_dir / "logs" / "rewards.log"

    def __enter__(self) -> RewardPool:
        """Start the processes, without waiting for them."""
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._start()
        return self

    def _start(self) -> None:
        self._pool = ProcessPool(
            self.size,
            initializer=worker.start,
            initargs=(self._reward, str(self._log), START_TIMEOUT_S),
            context=worker.WorkerContext(),
        )
        self._ready = self._pool.schedule(os.getpid)  # pebble starts all workers with the first task

    def __exit__(self, *_: object) -> None:
        self._pool.stop()
        self._pool.join()

    def score(self, responses: list[tuple[Prompt, str]]) -> list[RewardResult]:
        """The result of each (prompt, text), in order.

        With data.on_reward_error=zero, a response that the reward fails on gets 0, and a line says how many did.
        Raises:
            DataError: the reward failed on a response or exceeded the limit, with data.on_reward_error=stop.
            ConfigError: the reward cannot be imported.
        """
        results: list[RewardResult] = []
        faults: list[str] = []
        while rest := responses[len(results) :]:
            try:
                self._wait_for(self._ready)
            except BrokenProcessPool as error:
                message = f"data.reward={self._reward!r}: importing it ends its process; see {self._log}"
                raise ConfigError(message) from error
            try:
                limit = self._config.reward_timeout_s
                futures = [self._pool.schedule(worker.score, response, timeout=limit) for response in rest]
                for (prompt, _), future in zip(rest, futures, strict=True):
                    results.append(self._result(prompt, future, faults))
            except RuntimeError:  # pebble's pool broke
                self.__exit__()
                self._start()
        if faults:
            with self._log.open("a", errors="backslashreplace") as log:
                log.writelines(f"scored 0: {fault}\n" for fault in faults)
            count = f"{len(faults)} of {len(responses)} responses score 0"
            print(f"{count}, see {self._log}; the first: {faults[0]}", file=sys.stderr, flush=True)
        return results

    def _wait_for(self, future: Future[T]) -> T:
        """pebble forgets a task that it takes from its queue as the pool breaks."""
        while not wait([future], CHECK_EVERY_S).done:
            if not self._pool.active and not future.done():
                raise BrokenProcessPool
        return future.result()

    def _result(self, prompt: Prompt, future: Future[RewardResult], faults: list[str]) -> RewardResult:
        try:
            return self._wait_for(future)
        except DataError as error:
            fault = str(error)
        except TimeoutError:
            if self._reward in REWARDS:
                return RewardResult(0.0, solved=False)  # no fault of the user
            fault = f"took more than data.reward_timeout_s={self._config.reward_timeout_s:g}"
        except ProcessExpired as error:
            fault = f"ended its process with exit code {error.exitcode}"
        faults.append(f"data.reward {fault} for prompt {prompt.id!r}")
        if self._config.on_reward_error == "stop":
            raise DataError(f"{faults[0]}; fix the function, or set data.on_reward_error=zero to score it 0")
        return RewardResult(0.0, solved=False)


def score_groups(groups: list[Group], tokenizer: Tokenizer, pool: RewardPool) -> None:
    """Decode the responses and score them, in place. Raises as `RewardPool.score`."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    for rollout in rollouts:
        rollout.text = tokenizer.decode(rollout.tokens)
    results = pool.score([(rollout.prompt, rollout.text) for rollout in rollouts])
    for rollout, result in zip(rollouts, results, strict=True):
        rollout.reward, rollout.solved, rollout.reward_parts = result.score, result.solved, result.parts
