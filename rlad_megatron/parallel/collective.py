"""Work that only the first rank can do, with its result on all ranks."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from rlad_megatron.errors import RladError

T = TypeVar("T")


def is_first_rank(group: dist.ProcessGroup | None) -> bool:
    """True on rank 0 of the group, and where there is no group."""
    return group is None or dist.get_rank(group) == 0


def on_first_rank(action: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """Run `action` on rank 0 of the group and return its result, or raise its error, on every rank.

    group: a gloo group of the ranks that call this together, or None for one process. The others wait in a
    broadcast, so the group's timeout has to be longer than the action.
    The result must be picklable. An error that is not picklable becomes a RuntimeError with the same text.
    """
    if group is None:
        return action()
    message: list = [None]
    error: Exception | None = None
    if is_first_rank(group):
        try:
            message = [(True, action())]
        except Exception as caught:  # of any kind: the other ranks wait for an answer
            error = caught
            if not isinstance(caught, RladError):
                # Other ranks raise it without its frames, and theirs may be the report that is shown.
                caught.add_note(f"On rank 0:\n{traceback.format_exc()}")
            message = [(False, _portable(caught))]
    dist.broadcast_object_list(message, src=dist.get_global_rank(group, 0), group=group)
    if error is not None:
        raise error
    succeeded, value = message[0]
    if not succeeded:
        raise value
    return value


def barrier(group: dist.ProcessGroup | None) -> None:
    """Return when every rank of a gloo group has called this."""
    if group is not None:
        dist.all_reduce(torch.zeros(1), group=group)


def _portable(error: Exception) -> Exception:
    """The error itself if it survives pickling, else one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # a third-party error class may fail in its own way
        return RuntimeError("\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])]))
    return error
