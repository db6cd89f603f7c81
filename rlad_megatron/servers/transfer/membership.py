"""How the owners of the weights and the servers' workers meet before they form a group.

The trainer's first rank holds a store (`Meeting`). Members connect to it, say that they are there, and wait until it
says that all are (`attend`). So whoever does not come is named, and nobody waits for a member that will not come.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from urllib.parse import urlsplit

import torch.distributed as dist

POLL_S = 0.05
VERDICT = "verdict"  # key: empty if all members are there, else why not


class MembershipError(Exception):
    """A member did not come, or could not be reached."""


def address_towards(host: str, port: int = 80) -> str:
    """This host's address as `host` sees it: that of the network interface that leads there. OSError if none does."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # UDP: nothing is sent
        return probe.getsockname()[0]


def host_of(url: str) -> str:
    return urlsplit(url).hostname or ""


class Meeting:
    """The store of one group."""

    def __init__(self, addresses: Sequence[str]) -> None:
        """addresses: of this host, as members reach it."""
        # Nobody else's network can reach the store if all members use the same address.
        (address, *others) = set(addresses)
        listener = socket.create_server(("" if others else address, 0))
        self.port: int = listener.getsockname()[1]
        self.store = dist.TCPStore(
            address, self.port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )

    def gather(self, members: Sequence[str], timeout_s: float, given_up: Callable[[], bool]) -> None:
        """Wait for all members and tell them to go on.

        given_up: whether one is known not to come. Raises MembershipError naming who did not come; those who did raise
        it too.
        """
        deadline = time.monotonic() + timeout_s
        missing = list(members)
        while missing := [name for name in missing if not self.store.check([_key(name)])]:
            if given_up() or time.monotonic() > deadline:
                why = f"{', '.join(missing)} did not come within {timeout_s:g} s"
                self.store.set(VERDICT, why)
                raise MembershipError(why)
            time.sleep(POLL_S)
        self.store.set(VERDICT, "")


def attend(name: str, address: str, port: int, timeout_s: float) -> tuple[dist.Store, str]:
    """Meet the others at the trainer's store; returns it, and this process's own address.

    Raises MembershipError: the store cannot be reached, or another member did not come.
    """
    try:
        # TCPStore would try again for longer than this, and write a stack trace.
        with socket.create_connection((address, port), timeout_s) as probe:
            own = probe.getsockname()[0]
    except OSError as error:
        raise MembershipError(
            f"{name} on {socket.gethostname()} does not reach the trainer at {address}:{port} within {timeout_s:g} s "
            f"({error}); see the firewalls between them"
        ) from error
    # Longer than the first rank waits for members, so that its verdict names them.
    limit = timedelta(seconds=1.5 * timeout_s)
    try:
        store = dist.TCPStore(address, port, is_master=False, timeout=limit, wait_for_workers=False)
        store.set(_key(name), own)
        verdict = store.get(VERDICT).decode()
    except RuntimeError as error:
        raise MembershipError(f"{name} at {own} lost the trainer at {address}:{port}: {first_line(error)}") from error
    if verdict:
        raise MembershipError(verdict)
    return store, own


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [repr(error)])[0]


def _key(name: str) -> str:
    return f"member {name}"
