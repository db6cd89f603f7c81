"""Ports at which processes of a group meet. Torch-free."""

from __future__ import annotations

import socket
from contextlib import suppress

from rlad_megatron.errors import RolloutError

# Below the range from which the kernel takes the ports of outgoing connections (32768 and up on Linux).
PORTS = range(20000, 30000)


def free_port(address: str, seed: int) -> int:
    """A free port of `address`. Different seeds start the search at different ports."""
    for offset in range(len(PORTS)):
        port = PORTS[(seed + offset) % len(PORTS)]
        with suppress(OSError), socket.socket() as probe:
            probe.bind((address, port))
            return port
    raise RolloutError(f"no free port from {PORTS.start} to {PORTS.stop - 1} on {address}; see what holds them")
