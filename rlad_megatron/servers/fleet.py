"""The run's rollout servers, as every rank calls them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from rlad_megatron.config import RunConfig, SamplingConfig
from rlad_megatron.errors import RolloutError, StepDropped
from rlad_megatron.models.spec import ModelSpec
from rlad_megatron.parallel.collective import is_first_rank, on_first_rank
from rlad_megatron.secret import read_token, shared_token
from rlad_megatron.servers.client import (
    UNPUSHED,
    ServerClient,
    ServerDownError,
    ServerTimeoutError,
    for_each_server,
    raise_file_limit,
)
from rlad_megatron.servers.process import VllmServer, check_ports, own_server
from rlad_megatron.servers.pusher import WeightPusher, open_transfer, release_cached_memory
from rlad_megatron.servers.sampling import SEEDS_PER_RUN
from rlad_megatron.servers.stream import Event, Lost, RolloutStream, Round, Stage
from rlad_megatron.servers.transfer.choice import ON_CPUS, TransferChoice
from rlad_megatron.servers.transfer.proof import Agreement, Student
from rlad_megatron.types import Group, Prompt, Rollout

POLL_S = 1.0
PROGRESS_COLUMNS = ("rollout", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())


@dataclass
class _Progress:
    """A round's, on rank 0."""

    batch: Round
    begun: int  # the version of the weights then
    needed: int  # groups, with those that are replaced
    groups: list[Group] = field(default_factory=list)  # finished and not handed out
    finished: int = 0  # those handed out too


class ServerFleet:
    """All rollout servers. Its methods are collective: every rank calls them with the same arguments.

    Rank 0 talks to the servers, and owns their processes; an error there is raised on every rank. A context manager:
    entering starts the servers or waits for external ones, leaving stops those it started.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        model_path: str,
        max_model_len: int,
        vocab_size: int | None = None,
        replay: ModelSpec | None = None,
        eos_ids: Sequence[int],
        run_dir: Path,
        devices: Sequence[str] | None = None,
        transfer: TransferChoice = ON_CPUS,
        find_urls: Callable[[], Sequence[str]] | None = None,
        token_file: Path | None = None,
        drop_requested: Callable[[], bool] = lambda: False,
        student: Student | None = None,
        probe: Sequence[Sequence[int]] = (),
        stages: Sequence[Stage] = (),
        on_load: Callable[[int, int], None] = lambda server, count: None,
    ) -> None:
        """
        model_path: the Hugging Face folder that servers load first, which is version 0 of the weights. max_model_len:
        prompt and response tokens together. replay: the model, if its choice of experts is replayed. eos_ids: the
        tokens that end a response; nothing else does. run_dir: for the servers' logs and a file of weights. devices:
        CUDA_VISIBLE_DEVICES of each own server; None: all inherit this process's. transfer: how weights are pushed.
        find_urls: called on rank 0, waits for servers that the launcher has started; default: those of rollout.urls,
        else own ones. token_file: with their secret. drop_requested: whether `collect` gives up its round; called on
        rank 0. student: whose weights are pushed, held by the ranks that call this together; None for one process whose
        servers keep the weights of model_path. With a student, probe: the prompts that `verify` and the canary decode.
        stages: what rank 0 does with each finished group, for example to score it, and on_load: what it does when the
        number of responses in flight at a server (index, number) changes; both as in servers/stream.py.
        """
        self.config, self._run_config = config.rollout, config
        self.servers: list[VllmServer] = []  # on every rank; only those of rank 0 may have a process
        self.console = Console(stderr=True)  # of the progress bar
        self.version = 0  # of the weights that servers must hold
        self._run_dir, self._choice, self._vocab_size, self._replay = run_dir, transfer, vocab_size, replay
        self._token_file = token_file or (Path(config.rollout.token_file) if config.rollout.token_file else None)
        self._drop_requested = drop_requested
        self._find_urls = find_urls or (lambda: config.rollout.urls)
        self._own_server = lambda index, token_file: own_server(
            config.rollout,
            index,
            model_path=model_path,
            max_model_len=max_model_len,
            run_dir=run_dir,
            seed=config.train.seed,
            devices=devices[index] if devices else None,
            transfer=transfer,
            token_file=token_file,
            returns_experts=replay is not None,
        )
        self.agreement = Agreement.of(config)  # of the servers and the student
        self._student, self._probe = student, probe
        self._proven: set[tuple[int, int]] = set()  # on rank 0: (index, restarts) of servers that passed the canary
        self._group = student.weights.group if student is not None else None
        self._pusher: WeightPusher  # with a student, once the servers are up
        self._stack = ExitStack()
        self._new_stream = lambda: RolloutStream(
            max_concurrency=config.rollout.max_concurrency,
            timeout_s=config.rollout.request_timeout_s,
            eos_ids=eos_ids,
            first_seed=config.train.seed * SEEDS_PER_RUN,
            stages=stages,
            on_load=on_load,
        )
        # All on rank 0.
        self._stream: RolloutStream | None = None
        self._lost: set[int] = set()  # servers that get no requests
        self._progress: dict[int, _Progress] = {}  # by round

    def __enter__(self) -> ServerFleet:
        """Raises ConfigError (port taken) or RolloutError (a server did not come up; none is left running)."""
        self._release_cached_memory()
        with ExitStack() as stack:  # Ctrl-C too must not leave servers behind
            urls = on_first_rank(lambda: self._start(stack), self._group)
            self.servers = self.servers or self._external(urls)
            if self._student is not None:
                self._pusher = self._open_pusher(self._student, stack)
            if is_first_rank(self._group):
                self._stream = stack.enter_context(self._new_stream())
            if self._student is None:
                self._admit(self.servers)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    @property
    def clients(self) -> list[ServerClient]:
        return [server.client for server in self.servers]

    def generate(
        self, prompts: Sequence[Prompt], group_size: int, sampling: SamplingConfig, *, batch: int
    ) -> list[list[Rollout]]:
        """`group_size` responses to each prompt: [prompts][group_size], on every rank. Goes before rounds in progress.

        batch: decides the seeds, as a round's number. Raises as `submit` and `collect`.
        """
        everything = Round(batch, prompts, group_size, sampling, needed=len(prompts))
        self.submit(everything, urgent=True)
        return [group.rollouts for group in self.collect(everything)]

    def submit(self, batch: Round, *, urgent: bool = False) -> None:
        """Have the servers begin a round after those before it, or, if urgent, before those that have not begun.

        Raises RolloutError if a server holds other weights than those pushed last.
        """
        self._release_cached_memory()  # a server that is restarted needs its share of the GPU
        on_first_rank(self._check_weights, self._group)
        if self._stream is not None:
            self._progress[batch.number] = _Progress(batch, self.version, batch.needed)
            self._stream.submit(batch, urgent=urgent)

    def collect(self, batch: Round, enough: Callable[[list[Group]], bool] = lambda groups: False) -> list[Group]:
        """The next finished groups of a round, on every rank, in the order of their prompts.

        enough: whether to hand out these groups already; otherwise they are all that the round still needs. Requests
        of a server that dies go to the others, and it is back after the next push. If none is left, they are restarted
        and get the current weights here.
        Raises RolloutError when a server died more than rollout.max_restarts times, sampled with other weights than
        those pushed, refuses a request, or does not answer in time; the error of a stage; and StepDropped.
        """
        while True:
            groups = on_first_rank(partial(self._collect, batch, enough), self._group)
            if groups:
                return groups
            self._bring_back([server.index for server in self.servers])

    def push(self, version: int) -> dict[str, float]:
        """Give all servers the trainer's present weights as `version`. Restarts dead servers, wakes sleeping ones.

        Returns metrics `sync/...` of the transfer itself, without the canary.

        A server that has not passed it since its start goes through the canary first (transfer/proof.py). A file of
        weights is written only if `version` differs from that of the last push. Raises WeightSyncError or RolloutError
        naming the server; servers are then left paused, because their weights may be half old, half new.
        """
        self._release_cached_memory()
        self._prove(on_first_rank(self._restart_dead, self._group))
        self.version = version
        metrics = self._pusher.send(self.servers, version)
        self._admit(self.servers)
        return metrics

    def verify(self) -> dict[str, float]:
        """Decode the probe greedily on every server and compare with the student: metrics `sync/...`, gaps in nats.

        Raises WeightSyncError, as `Agreement.check`.
        """
        return self._pusher.verify(self.servers)

    def sleep(self) -> None:
        """Have servers on the trainer's GPUs free their memory until the next push. No-op for others.

        An own server that fails to is stopped, so that its memory is free; `push` starts it again.
        """
        if self._choice.sleep_level:
            on_first_rank(lambda: for_each_server(self._put_to_sleep, self.servers), self._group)

    def _start(self, stack: ExitStack) -> list[str]:
        """On rank 0. Returns the servers' URLs. The servers end with the stack."""
        raise_file_limit()
        urls = self._find_urls()
        if urls:
            self.servers = self._external(urls)
        else:
            check_ports(self.config)
            self._token_file = Path(stack.enter_context(TemporaryDirectory())) / "token"
            shared_token(self._token_file)
            indices = range(self.config.servers)
            self.servers = [self._checked(self._own_server(index, self._token_file)) for index in indices]
        for server in self.servers:
            stack.callback(server.stop)
            server.start()
        for server in self.servers:
            server.wait_ready()
        return [client.url for client in self.clients]

    def _external(self, urls: Sequence[str]) -> list[VllmServer]:
        token = read_token(self._token_file) if self._token_file else ""
        return [self._checked(VllmServer(self.config, index, url, token=token)) for index, url in enumerate(urls)]

    def _checked(self, server: VllmServer) -> VllmServer:
        server.client.vocab_size, server.client.replay = self._vocab_size, self._replay
        return server

    def _open_pusher(self, student: Student, stack: ExitStack) -> WeightPusher:
        urls = [client.url for client in self.clients]
        transfer = open_transfer(self._run_config, self._choice, student.weights, urls, self._run_dir)
        return WeightPusher(
            self._run_config,
            student,
            self._probe,
            transfer=stack.enter_context(transfer),
            sleep_level=self._choice.sleep_level,
            agreement=self.agreement,
        )

    def _collect(self, batch: Round, enough: Callable[[list[Group]], bool]) -> list[Group]:
        """On rank 0, as `collect`. No groups: no server is left, and all have been restarted."""
        assert self._stream is not None
        progress = self._progress[batch.number]
        hidden = not self.console.is_terminal
        with Progress(*PROGRESS_COLUMNS, console=self.console, disable=hidden, transient=True) as bar:
            task = bar.add_task("rollout", total=batch.needed)
            while progress.finished < progress.needed and not enough(progress.groups):
                bar.update(task, completed=progress.finished, total=progress.needed)
                if len(self._lost) == len(self.servers):
                    return []
                if self._drop_requested():
                    raise StepDropped
                self._handle(self._stream.next_events(POLL_S))
        groups, progress.groups = progress.groups, []
        if progress.finished == progress.needed:
            del self._progress[batch.number]
        return sorted(groups, key=lambda group: group.index)

    def _handle(self, events: Iterable[Event]) -> None:
        assert self._stream is not None
        for event in events:
            if isinstance(event, Exception):
                raise event
            if isinstance(event, Lost):
                if event.restarts == event.server.restarts:  # else it has been restarted since
                    self._restart(event.server, event.why)
                continue
            progress = self._progress[event.round]
            for version in {version for rollout in event.rollouts for version, _ in rollout.versions}:
                if not progress.begun <= version <= self.version:
                    raise RolloutError(
                        f"a server sampled with weights {version}, not {progress.begun} to {self.version}; restart it"
                    )
            progress.groups.append(event)
            progress.finished += 1
            if progress.batch.replaces(event):
                progress.needed += 1
                self._stream.extend(progress.batch, len(progress.batch.prompts) - 1)

    def _restart(self, server: VllmServer, why: str) -> None:
        self._lose(server)
        server.restart(why)

    def _lose(self, server: VllmServer) -> None:
        """Send no requests to a server until it has the current weights."""
        assert self._stream is not None
        self._stream.dismiss(server)
        self._lost.add(server.index)

    def _check_weights(self) -> None:
        """On rank 0: every server must hold `version`. Dead ones are restarted; they are back after the next push."""
        assert self._stream is not None
        self._handle(self._stream.next_events(0))

        def held_by(server: VllmServer) -> str | RolloutError:
            try:
                return server.client.weight_version()
            except (ServerDownError, ServerTimeoutError) as error:
                return error

        servers = [server for server in self.servers if server.index not in self._lost]
        for server, held in zip(servers, for_each_server(held_by, servers), strict=True):
            if isinstance(held, RolloutError):
                self._restart(server, str(held))
            elif held == UNPUSHED and self.version > 0:  # it was restarted from outside
                self._lose(server)
            elif held != UNPUSHED and held != str(self.version):
                raise RolloutError(f"{server.name} holds weights {held!r}, not {self.version}; push the weights first")

    def _bring_back(self, indices: Sequence[int]) -> None:
        """Give servers that were restarted the current weights, and send them requests."""
        servers = [self.servers[index] for index in indices]
        on_first_rank(lambda: for_each_server(lambda server: server.wait_ready(), servers), self._group)
        if self._student is not None:
            self._prove(indices)
            self._pusher.send(servers, self.version)
        self._admit(servers)

    def _prove(self, indices: Sequence[int]) -> None:
        if indices:
            self._pusher.prove([self.servers[index] for index in indices], self.version)
            self._proven |= {(index, self.servers[index].restarts) for index in indices}

    def _admit(self, servers: Iterable[VllmServer]) -> None:
        self._lost -= {server.index for server in servers}
        if self._stream is not None:
            self._stream.admit(servers)

    def _restart_dead(self) -> list[int]:
        """On rank 0. A server may have died while the trainer was busy. Returns those that have not passed the canary.

        An external server that was restarted has lost the weights that were pushed to it.
        """
        assert self._stream is not None
        self._handle(self._stream.next_events(0))

        def is_unproven(server: VllmServer) -> bool:
            if server.index in self._lost:
                server.wait_ready()
            known = (server.index, server.restarts) in self._proven
            return not known or (server.launch is None and server.client.weight_version() == UNPUSHED)

        for server in self.servers:
            # One that was lost is starting again; an external one is not alive until it has.
            if not server.alive() and (server.launch is not None or server.index not in self._lost):
                self._restart(server, "its process is gone")
        return [index for index, found in enumerate(for_each_server(is_unproven, self.servers)) if found]

    def _put_to_sleep(self, server: VllmServer) -> None:
        if not server.alive():
            return
        try:
            server.client.sleep(self._choice.sleep_level)
        except RolloutError as error:
            if server.launch is None:
                raise
            print(f"{server.name} is stopped: {error}", file=sys.stderr)
            server.stop()

    def _release_cached_memory(self) -> None:
        """Collective. Servers on the trainer's GPUs are about to start or to wake up."""
        if self.config.colocate:
            release_cached_memory(self._group)
