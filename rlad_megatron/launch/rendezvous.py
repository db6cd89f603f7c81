"""How the tasks of a job find each other: small files in a folder that all nodes see.

A task publishes `<role>_<index>.json`, and the tasks that need it wait for the file. Every wait has a timeout, and its
error names the missing tasks and nodes.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from rlad_megatron.config.placement import Task
from rlad_megatron.errors import RolloutError

POLL_S = 0.2


def publish(folder: Path, task: Task, **facts: object) -> None:
    """Write a task's file, atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{task.file_stem}.json.tmp"
    temporary.write_text(json.dumps(facts) + "\n")
    os.replace(temporary, folder / f"{task.file_stem}.json")


def wait_for(folder: Path, tasks: Sequence[Task], timeout_s: float, fact: str) -> list[dict]:
    """What each of the tasks published, once it includes `fact`: a task may publish again with more.

    Raises RolloutError after `timeout_s`, naming the missing tasks and their nodes.
    """
    deadline = time.monotonic() + timeout_s
    found: dict[Task, dict] = {}
    while True:
        for task in tasks:
            path = folder / f"{task.file_stem}.json"
            if task not in found and path.is_file() and fact in (facts := json.loads(path.read_text())):
                found[task] = facts
        missing = [task for task in tasks if task not in found]
        if not missing:
            return [found[task] for task in tasks]
        if time.monotonic() > deadline:
            more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
            raise RolloutError(
                f"waited {timeout_s:g} s (rollout.startup_timeout_s) for "
                f"{', '.join(task.name for task in missing[:4])}{more}; see {folder / missing[0].file_stem}.log and "
                "the state of the node, or raise the timeout"
            )
        time.sleep(POLL_S)


def node_address(host: str, *, multi_node: bool) -> str:
    """The IPv4 address at which other nodes reach this one, whose name is `host`.

    Raises RolloutError if the name has no address, or in a job of several nodes a loopback address.
    """
    try:
        address = str(socket.getaddrinfo(host, 0, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise RolloutError(
            f"node name {host!r} has no address here ({error}); add it to the hosts of the job"
        ) from error
    if multi_node and address.startswith("127."):
        raise RolloutError(
            f"node name {host!r} is {address} on the node itself, which the others cannot reach; fix its /etc/hosts"
        )
    return address


def set_rank_environment(me: Task, world: Sequence[Task], address: str, port: int) -> None:
    """Describe the process group in this process's environment, as torchrun would. address, port: of rank 0."""
    local = [task for task in world if task.node == me.node]
    os.environ |= {
        "RANK": str(me.index),
        "LOCAL_RANK": str(me.gpus[0] if me.gpus else local.index(me)),
        "WORLD_SIZE": str(len(world)),
        "LOCAL_WORLD_SIZE": str(len(local)),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }
