"""Tasks of one job find each other through small files in a folder that all nodes see.

A task writes `<role>_<index>.json` when it is there, and who needs it waits for the file. Every wait has an end and
names the tasks and nodes that are missing.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from rlad_megatron.errors import RolloutError
from rlad_megatron.launch.placement import Task

POLL_S = 0.2
# Below the range from which the kernel takes ports of outgoing connections (32768 and up on Linux).
PORTS = range(20000, 30000)


def announce(folder: Path, task: Task, **facts: object) -> None:
    """Say that a task is there. The file appears complete."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{task.file_stem}.json.tmp"
    temporary.write_text(json.dumps(facts) + "\n")
    os.replace(temporary, folder / f"{task.file_stem}.json")


def wait_for(folder: Path, tasks: Sequence[Task], timeout_s: float, fact: str) -> list[dict]:
    """What the tasks announced, in their order, once it has `fact`: a task may announce itself again with more.

    Raises RolloutError after `timeout_s`, naming the tasks that did not and their nodes.
    """
    deadline = time.monotonic() + timeout_s
    found: dict[Task, dict] = {}
    while missing := [task for task in tasks if task not in found]:
        for task in missing:
            path = folder / f"{task.file_stem}.json"
            if path.is_file() and fact in (said := json.loads(path.read_text())):
                found[task] = said
        if len(found) < len(tasks) and time.monotonic() > deadline:
            late = [task for task in missing if task not in found]
            names = ", ".join(task.name for task in late[:4]) + (f" and {len(late) - 4} more" if len(late) > 4 else "")
            raise RolloutError(
                f"waited {timeout_s:g} s (rollout.startup_timeout_s) for {names}; see {folder / late[0].file_stem}.log "
                "and the state of the node, or raise the timeout"
            )
        time.sleep(POLL_S if len(found) < len(tasks) else 0)
    return [found[task] for task in tasks]


def own_address(node: str, *, others: bool) -> str:
    """The address under which other nodes reach this one.

    others: whether there are any. Raises RolloutError if the node's name means a loopback address then.
    """
    try:
        address = str(socket.getaddrinfo(node, 0, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise RolloutError(
            f"node name {node!r} has no address here ({error}); add it to the hosts of the job"
        ) from error
    if others and address.startswith("127."):
        raise RolloutError(
            f"node name {node!r} is {address} on the node itself, which the others cannot reach; mend its /etc/hosts"
        )
    return address


def free_port(address: str, seed: int) -> int:
    """A port of `address` that nobody listens on. Different seeds start to look at different places."""
    for offset in range(len(PORTS)):
        port = PORTS[(seed + offset) % len(PORTS)]
        with socket.socket() as probe:
            try:
                probe.bind((address, port))
            except OSError:
                continue
            return port
    raise RolloutError(f"no free port from {PORTS.start} to {PORTS.stop - 1} on {address}; see what holds them")
