"""The plan of a run: what each GPU holds, and whether it fits. count.py makes it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain

from rlad_megatron.config import RunConfig
from rlad_megatron.plan.memory import Model

EXACT, ESTIMATED = "exact", "estimated"
PHASES = ("update", "teacher", "reference")
RESERVE_GB = 4.0  # of every rank; what is known to need it is added up in `count.py:_work_space`
SERVER_RESERVE_GB = 4.0  # the same plus vLLM's CUDA graphs and the activations of a prefill
MEMORY_BYTES_PER_S = 4.8e12  # an H200 reads its memory at this rate; most GPUs are slower


@dataclass(frozen=True)
class Item:
    """One line of a GPU's memory."""

    name: str
    size: int  # bytes
    why: str  # what it is made of
    how: str = ESTIMATED  # exact | estimated
    phase: str = ""  # "" is always held; the others, of `PHASES`, exclude each other


@dataclass(frozen=True)
class RankMemory:
    """The memory of one rank of the trainer or of a dedicated teacher; stands for all ranks that hold the same."""

    rank: int  # the first of them, in its world
    items: tuple[Item, ...]

    def held(self, phase: str) -> int:
        return sum(item.size for item in self.items if item.phase == phase)

    @property
    def resting(self) -> int:
        """Bytes held while servers generate."""
        return self.held("")

    @property
    def size(self) -> int:
        """Peak bytes."""
        return self.resting + max(map(self.held, PHASES))


@dataclass(frozen=True)
class ServerMemory:
    """The memory of one GPU of a server."""

    items: tuple[Item, ...]
    limit: int  # bytes of the GPU that the server may take; on CPUs the bytes it takes
    kv_tokens: int  # tokens that the KV cache holds
    longest: int  # tokens of the longest request

    @property
    def responses(self) -> int:
        """How many of the longest requests fit at the same time."""
        return self.kv_tokens // self.longest

    def queue_seconds(self, requests: int, tokens: int) -> float:
        """The least that so many of the longest requests take, whose responses have so many tokens.

        Each token reads the weights and, on average, half of the cache.
        """
        weights, *_, cache = (item.size for item in self.items)
        turns = -(-requests // max(1, self.responses))
        return turns * tokens * (weights + cache / 2) / MEMORY_BYTES_PER_S


@dataclass(frozen=True)
class Plan:
    """What a run needs and what it has."""

    config: RunConfig
    student: Model
    teacher: Model | None
    longest: int  # tokens of the longest sample; a micro-batch holds at least as many
    tokens: int  # of the longest micro-batch
    student_stages: tuple[tuple[Item, ...], ...]  # what a rank of each pipeline stage holds
    teacher_stages: tuple[tuple[Item, ...], ...]
    server: ServerMemory | None

    @cached_property
    def ranks(self) -> tuple[RankMemory, ...]:
        """The trainer's, one of each kind."""
        shared = () if self.config.teacher_is_dedicated else self.teacher_stages
        return self._rank_kinds(self.config.train.world_size, self.student_stages, shared)

    @cached_property
    def teacher_ranks(self) -> tuple[RankMemory, ...]:
        """A dedicated teacher's, one of each kind."""
        own = self.teacher_stages if self.config.teacher_is_dedicated else ()
        return self._rank_kinds(self.config.teacher_world_size, own) if own else ()

    def _rank_kinds(self, world: int, *models: tuple[tuple[Item, ...], ...]) -> tuple[RankMemory, ...]:
        """One rank for each combination of stages of the models that a world holds. models: the stages of each."""
        models = tuple(filter(None, models))
        reserve = (reserve_item(RESERVE_GB),) if self.config.train.gpus_per_node else ()
        return tuple(
            RankMemory(rank, (*chain(*(stages[stage] for stages, stage in zip(models, at, strict=True))), *reserve))
            for rank, at in stage_kinds(world, *map(len, models))
        )

    def fits_with_teacher_of(self, other: Plan) -> bool:
        """Whether this student and the other plan's teacher fit. Both must have as many tokens, and the same ranks."""
        if self.config.teacher_is_dedicated or self.teacher is None:
            return not (self.trainer_shortage or other.teacher_shortage)
        limit, resting_limit = self.trainer_limit, self.resting_limit
        if limit is None:
            return True
        reserve = int(RESERVE_GB * 1e9)
        students, teachers = self._student_sizes, other._teacher_sizes
        for _, (stage, of_teacher) in stage_kinds(self.config.train.world_size, len(students), len(teachers)):
            resting = students[stage][0] + teachers[of_teacher][0] + reserve
            working = max(*students[stage][1:], *teachers[of_teacher][1:])
            if resting + working > limit or (resting_limit is not None and resting > resting_limit):
                return False
        return True

    @cached_property
    def _student_sizes(self) -> list[tuple[int, ...]]:
        return [_by_phase(items) for items in self.student_stages]

    @cached_property
    def _teacher_sizes(self) -> list[tuple[int, ...]]:
        return [_by_phase(items) for items in self.teacher_stages]

    @cached_property
    def fullest(self) -> RankMemory:
        return max(self.ranks, key=lambda rank: rank.size)

    @cached_property
    def fullest_teacher(self) -> RankMemory:
        return max(self.teacher_ranks, key=lambda rank: rank.size)

    @property
    def gpu_limit(self) -> int | None:
        """Bytes of a GPU; None on CPUs, where nothing is refused."""
        train = self.config.train
        return int(train.gpu_memory_gb * 1e9) if train.gpus_per_node else None

    @property
    def resting_limit(self) -> int | None:
        """Bytes that a rank may hold while a server generates on its GPU; None if no server shares it."""
        if self.gpu_limit is None or self.server is None or not self.config.rollout.colocate:
            return None
        return self.gpu_limit - self.server.limit

    @property
    def trainer_limit(self) -> int | None:
        """Bytes that a rank may take while it works; None on CPUs."""
        if self.gpu_limit is None or self.resting_limit is None:
            return self.gpu_limit
        # A sleeping server frees weights and cache; its CUDA context and graphs stay.
        return self.gpu_limit - int(SERVER_RESERVE_GB * 1e9) if self.config.rollout.sleep_level else self.resting_limit

    @property
    def neighbour(self) -> str:
        """The server that shares a working rank's GPU, in a few words; empty if there is none."""
        if self.resting_limit is None:
            return ""
        return f" next to {'a sleeping server' if self.config.rollout.sleep_level else 'a server that stays awake'}"

    @cached_property
    def trainer_shortage(self) -> str:
        """Why a rank does not fit on its GPU, in a few words; empty if it does."""
        at_rest = max(self.ranks, key=lambda rank: rank.resting)
        share = f"rollout.gpu_memory_utilization={self.config.rollout.gpu_memory_utilization:g}"
        generating = f" next to a server with {share} while it generates"
        return self._lack(self.fullest, self.fullest.size, self.trainer_limit, self.neighbour) or self._lack(
            at_rest, at_rest.resting, self.resting_limit, generating
        )

    @cached_property
    def teacher_shortage(self) -> str:
        """Why a dedicated teacher's rank does not fit on its GPU, in a few words; empty if it does."""
        if not self.teacher_ranks:
            return ""
        lack = self._lack(self.fullest_teacher, self.fullest_teacher.size, self.gpu_limit, "")
        return lack and f"teacher {lack}"

    def _lack(self, rank: RankMemory, size: int, limit: int | None, where: str) -> str:
        if limit is None or size <= limit:
            return ""
        # At rest no item of a phase is held, so none of them is the reason.
        largest = max(
            (item for item in rank.items if size > rank.resting or not item.phase), key=lambda item: item.size
        )
        return (
            f"rank {rank.rank} needs {gb(size)} GB ({largest.name} {gb(largest.size)}) and has {gb(limit)} GB"
            f"{where} (train.gpu_memory_gb={self.config.train.gpu_memory_gb:g})"
        )

    @cached_property
    def server_shortage(self) -> str:
        """Why a server does not fit, in a few words; empty if it does."""
        if self.server is None or self.gpu_limit is None or self.server.responses:
            return ""
        return (
            f"a server's KV cache would hold {self.server.kv_tokens} tokens, fewer than the {self.server.longest} of "
            f"one prompt and response (rollout.tensor_parallel={self.config.rollout.tensor_parallel})"
        )

    @property
    def shortage(self) -> str:
        return self.trainer_shortage or self.teacher_shortage or self.server_shortage


@lru_cache(maxsize=1024)
def stage_kinds(world: int, *stages: int) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """For models of so many pipeline stages on the same ranks: each combination of stages, and its first rank."""
    kinds: dict[tuple[int, ...], int] = {}
    for rank in range(0, world, world // math.lcm(*stages)):
        kinds.setdefault(tuple(rank * number // world for number in stages), rank)
    return tuple((rank, at) for at, rank in kinds.items())


def _by_phase(items: tuple[Item, ...]) -> tuple[int, ...]:
    """Bytes held always, and in each of `PHASES`."""
    return tuple(sum(item.size for item in items if item.phase == phase) for phase in ("", *PHASES))


def gb(size: float) -> str:
    return f"{size / 1e9:.1f}"


def reserve_item(size: float) -> Item:
    return Item("reserve", int(size * 1e9), "CUDA context, NCCL, work space of kernels, fragmentation")
