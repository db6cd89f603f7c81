"""How the owners of the weights and the servers' workers meet before they form a group.

The trainer's first rank holds a store (`Meeting`). Members connect to it, say that they are there, wait until all are,
and then try the way to their neighbour in each group (`attend`). So whoever does not come or cannot be reached is named
in time. gloo would wait for minutes, and name no one.
"""

from __future__ import annotations

import ipaddress
import socket
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from urllib.parse import urlsplit

import torch.distributed as dist

POLL_S = 0.05
BROKEN_OFF = "broken off"  # said by members that lost another one or were told so; the cause is elsewhere
# Keys: empty if all members have got there, else why not.
PRESENT, CONNECTED = "present", "connected"


class MembershipError(Exception):
    """A member did not come, could not be reached, is gone, or does not fit."""


def error_of(name: str, action: Callable[[], object]) -> str:
    """Run `action`; returns its error in one line, which says that it is that of `name`, or nothing."""
    try:
        action()
    except MembershipError as error:
        return str(error)
    except Exception as error:  # of any kind: others wait for an answer
        traceback.print_exc()
        return f"{name}: {type(error).__name__}: {first_line(error)}"
    return ""


def address_towards(host: str, port: int = 80) -> str:
    """This host's address as `host` sees it: that of the network interface that leads there. OSError if none does."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # UDP: nothing is sent
        return probe.getsockname()[0]


def without_loopback(addresses: Sequence[str]) -> list[str]:
    """This host's addresses, but no loopback one if there is another.

    A member is known by the address through which it came, and other hosts do not reach a loopback one.
    """
    routable = [address for address in addresses if not ipaddress.ip_address(address).is_loopback]
    return [address if address in routable else routable[0] for address in addresses] if routable else list(addresses)


def listen(*addresses: str) -> socket.socket:
    """A listening socket at this host's address, or at all of them if several are given. OSError if there is none."""
    several, ipv6 = len(addresses) > 1, any(":" in address for address in addresses)
    return socket.create_server(
        ("" if several else addresses[0], 0),
        family=socket.AF_INET6 if ipv6 else socket.AF_INET,
        dualstack_ipv6=several and ipv6,
    )


def host_of(url: str) -> str:
    return urlsplit(url).hostname or ""


class Meeting:
    """The store of one group."""

    def __init__(self, addresses: Sequence[str]) -> None:
        """addresses: of this host, as members reach it. OSError if it cannot listen there."""
        # If all members use one address, only its network can reach the store.
        listener = listen(*set(addresses))
        self.port: int = listener.getsockname()[1]
        self.store = dist.TCPStore(
            addresses[0], self.port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )

    def gather(self, members: Sequence[str], timeout_s: float, given_up: Callable[[], bool]) -> None:
        """Wait for all members, then until each has reached its neighbours, and tell them to go on.

        given_up: whether one is known not to come. Raises MembershipError naming who did not come, or both ends of a
        way that is closed; those who are there raise it too.
        """
        for key, step in ((_member, PRESENT), (_way, CONNECTED)):
            why = self._wait_for({name: key(name) for name in members}, timeout_s, given_up)
            self.store.set(step, why)
            if why:
                raise MembershipError(why)

    def _wait_for(self, keys: Mapping[str, str], timeout_s: float, given_up: Callable[[], bool]) -> str:
        """Why some members did not set their key, or what one says there instead of nothing; empty if all is well."""
        begin = time.monotonic()
        missing = dict(keys)
        while missing:
            for name in [name for name, key in missing.items() if self.store.check([key])]:
                if said := self.store.get(missing.pop(name)).decode():
                    return said
            waited = time.monotonic() - begin
            if missing and (waited > timeout_s or given_up()):
                return f"{', '.join(missing)} did not come within {waited:.0f} s"
            time.sleep(POLL_S)
        return ""


def reach(name: str, address: str, port: int, timeout_s: float) -> str:
    """This process's own address on the way to the trainer's store. Raises MembershipError if it is not reached."""
    try:
        # TCPStore would try again for longer than this, and write a stack trace.
        with socket.create_connection((address, port), timeout_s) as probe:
            return probe.getsockname()[0]
    except OSError as error:
        raise MembershipError(
            f"{name} on {socket.gethostname()} does not reach the trainer at {address}:{port} within {timeout_s:g} s "
            f"({error}); see the firewalls between them"
        ) from error


def attend(
    name: str, address: str, port: int, timeout_s: float, places: Mapping[int, int], last: int
) -> tuple[dist.Store, str]:
    """Meet the others at the trainer's store; returns it, and this process's own address.

    places: this member's rank by group. last: the last rank of each group.
    Raises MembershipError: the store or a neighbour cannot be reached, or another member did not come.
    """
    own = reach(name, address, port, timeout_s)
    # Longer than the first rank waits for members, so that it says who is missing.
    limit = timedelta(seconds=1.5 * timeout_s)
    try:
        store = dist.TCPStore(address, port, is_master=False, timeout=limit, wait_for_workers=False)
        with listen(own) as listener:
            for group, rank in places.items():
                store.set(_place(group, rank), f"{own} {listener.getsockname()[1]} {name}")
            store.set(_member(name), "")
            _go_on(store, PRESENT)
            ways = {store.get(_place(group, rank + 1)).decode() for group, rank in places.items() if rank < last}
            store.set(_way(name), _closed_way(f"{name} at {own}", ways, timeout_s / 2))
            _go_on(store, CONNECTED)
    except (RuntimeError, OSError) as error:
        raise MembershipError(
            f"{name} at {own} could not meet the others at {address}:{port}: {first_line(error)}"
        ) from error
    return store, own


def _go_on(store: dist.Store, step: str) -> None:
    if why := store.get(step).decode():
        raise MembershipError(f"{BROKEN_OFF}: {why}")


def _closed_way(here: str, ways: Iterable[str], timeout_s: float) -> str:
    """Which neighbour cannot be reached, in words; empty if all can. ways: as members write them to the store."""
    for way in ways:
        address, port, name = way.split(" ", 2)
        try:
            socket.create_connection((address, int(port)), timeout_s).close()
        except OSError as error:
            return f"{here} does not reach {name} at {address} ({error}); see the firewalls between them"
    return ""


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [repr(error)])[0]


def _member(name: str) -> str:
    return f"member {name}"


def _way(name: str) -> str:
    return f"way {name}"


def _place(group: int, rank: int) -> str:
    return f"place {group} {rank}"
