"""A pool of processes that score responses, with a time limit for each response.

Pools of the standard library cannot end a worker that hangs without losing the work of the others, so this is one of
our own. A worker gets one response at a time, and is killed and replaced when it exceeds the limit.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path

from rlad_megatron.config import DataConfig
from rlad_megatron.data.tokenizers import Tokenizer
from rlad_megatron.errors import ConfigError, DataError
from rlad_megatron.rewards.registry import TIMED_OUT, RewardResult
from rlad_megatron.rewards.worker import Fault
from rlad_megatron.types import Prompt, Rollout

START_TIMEOUT_S = 300.0  # to start Python and import the reward
EXIT_S = 1.0  # for a worker to exit after it closed its connection

WORKER = "rlad_megatron.rewards.worker"

Scores = list[tuple[str, RewardResult]]


class RewardPool:
    """`data.reward_workers` processes that hold the reward. A context manager: they run from enter to exit.

    Enter it, and score, in a thread that lives as long as the pool: the kernel kills a process with the thread that
    started it.
    """

    def __init__(self, config: DataConfig, run_dir: Path, ranks_on_host: int = 1) -> None:
        """What the reward prints goes to `logs/rewards.log` in run_dir. ranks_on_host: these share the host's cores."""
        cores = min(len(os.sched_getaffinity(0)), (os.cpu_count() or 1) // ranks_on_host)
        self.size = config.reward_workers or max(1, cores)
        self._config = config
        self._log = run_dir / "logs" / "rewards.log"
        self._workers: list[_Worker] = []

    def __enter__(self) -> RewardPool:
        """Start the processes, without waiting for them."""
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._workers = [_Worker(self._config.reward, self._log) for _ in range(self.size)]
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.end()
        self._workers = []

    def score(self, responses: Sequence[tuple[Prompt, str]]) -> list[RewardResult]:
        """The result of each (prompt, text), in order.

        With data.on_reward_error=zero, a response that the reward fails on gets 0, and a line says how many did.
        Raises, and ends the pool:
            DataError: the reward failed on a response or exceeded the limit, with data.on_reward_error=stop.
            ConfigError: the reward cannot be imported.
        """
        assert self._workers, "the pool is not open"
        results: dict[int, RewardResult] = {}
        faults: list[str] = []
        waiting = deque(range(len(responses)))
        try:
            while len(results) < len(responses):
                self._hand_out(responses, waiting)
                for index, outcome in self._collect():
                    if isinstance(outcome, Fault):
                        faults.append(f"{outcome.text} for prompt {responses[index][0].id!r}")
                        if self._config.on_reward_error == "stop":
                            raise DataError(
                                f"{faults[0]}; fix the function, or set data.on_reward_error=zero to score it 0"
                            )
                        outcome = RewardResult(0.0, solved=False)
                    results[index] = outcome
        except BaseException:
            self.__exit__()  # workers are busy with this call's responses
            raise
        if faults:
            with self._log.open("a", errors="backslashreplace") as log:
                log.writelines(f"scored 0: {fault}\n" for fault in faults)
            count = f"{len(faults)} of {len(responses)} responses score 0"
            print(f"{count}, see {self._log}; the first: {faults[0]}", file=sys.stderr, flush=True)
        return [results[index] for index in range(len(responses))]

    def _hand_out(self, responses: Sequence[tuple[Prompt, str]], waiting: deque[int]) -> None:
        """Give each idle worker a response."""
        for worker in list(self._workers):
            if worker.ready and worker.index is None and waiting:
                try:
                    worker.connection.send(responses[waiting[0]])
                except OSError:  # it died while idle
                    self._replace(worker)
                else:
                    worker.index = waiting.popleft()
                    worker.deadline = time.monotonic() + self._config.reward_timeout_s

    def _collect(self) -> Iterator[tuple[int, RewardResult | Fault]]:
        """Wait until a worker starts, answers, exits or is late. Yields the outcomes of responses."""
        watched = [worker for worker in self._workers if worker.index is not None or not worker.ready]
        timeout = min(worker.deadline for worker in watched) - time.monotonic()
        answered = wait([worker.connection for worker in watched], max(0.0, timeout))
        for worker in watched:
            late = worker.connection not in answered
            if late and time.monotonic() < worker.deadline:
                continue
            outcome = self._of_late(worker) if late else worker.receive()
            if outcome is None:
                worker.ready = True
            elif worker.index is None:
                assert isinstance(outcome, Fault)
                raise ConfigError(f"data.reward={self._config.reward!r}: {outcome.text}; see {self._log}")
            else:
                index, worker.index = worker.index, None
                if late or (isinstance(outcome, Fault) and outcome.ends_worker):
                    self._replace(worker)
                yield index, outcome

    def _of_late(self, worker: _Worker) -> RewardResult | Fault:
        if not worker.ready:
            return Fault(f"importing it took more than {START_TIMEOUT_S:g} s")
        late = Fault(f"data.reward took more than data.reward_timeout_s={self._config.reward_timeout_s:g}")
        return TIMED_OUT.get(self._config.reward, late)

    def _replace(self, worker: _Worker) -> None:
        worker.end()
        self._workers[self._workers.index(worker)] = _Worker(self._config.reward, self._log)


class _Worker:
    """One process."""

    def __init__(self, reward: str, log: Path) -> None:
        self.ready = False  # it has imported the reward
        self.index: int | None = None  # of the response that it scores
        self.deadline = time.monotonic() + START_TIMEOUT_S  # to get ready, then for the response
        self.connection, theirs = multiprocessing.Pipe()
        # Not multiprocessing: that imports the main module, and with it torch. No PYTHONPATH, which programs that the
        # reward starts would inherit.
        paths = [path or os.getcwd() for path in sys.path]
        call = f"main({theirs.fileno()}, {reward!r}, {os.getpid()})"
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"import sys; sys.path[:] = {paths!r}\nfrom {WORKER} import main; {call}"],
                env={**os.environ, "OMP_NUM_THREADS": "1"},  # there is a worker for every core
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # no Ctrl-C from the terminal, and `end` reaches what the reward started
            )
        theirs.close()

    def receive(self) -> RewardResult | Fault | None:
        """The next message. None: the reward is imported."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(EXIT_S)
            return Fault(f"data.reward ended its process with exit code {self._process.poll()}", ends_worker=True)

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self.connection.close()


def score_responses(rollouts: list[Rollout], tokenizer: Tokenizer, pool: RewardPool) -> Scores:
    """(text, result) of each rollout. Raises as `RewardPool.score`."""
    texts = [tokenizer.decode(rollout.tokens) for rollout in rollouts]
    results = pool.score([(rollout.prompt, text) for rollout, text in zip(rollouts, texts, strict=True)])
    return list(zip(texts, results, strict=True))


def apply_scores(rollouts: list[Rollout], scores: Scores) -> None:
    """Write scores into their rollouts."""
    for rollout, (text, result) in zip(rollouts, scores, strict=True):
        rollout.text, rollout.reward = text, result.score
        rollout.solved, rollout.reward_parts = result.solved, result.parts
