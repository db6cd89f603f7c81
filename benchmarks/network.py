"""Hosts made of network namespaces, whose links have a limited bandwidth. Linux, as root, with iproute2."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from types import TracebackType

SWITCH = "rlad-switch"
DEVICE = "eth0"  # of every host


class Network:
    """A context manager: entering makes the hosts, leaving removes them. Each is joined to one switch."""

    def __init__(self, mbit: Mapping[str, float]) -> None:
        """mbit: bandwidth of each host's link, in either direction, in 1e6 bits per second."""
        self.mbit = dict(mbit)
        self.address = {host: f"198.18.0.{number}" for number, host in enumerate(mbit, start=1)}

    def __enter__(self) -> Network:
        self._remove()
        _ip("netns", "add", SWITCH)
        _ip("-n", SWITCH, "link", "add", "br0", "type", "bridge")
        _ip("-n", SWITCH, "link", "set", "br0", "up")
        for number, (host, rate) in enumerate(self.mbit.items()):
            space, port = namespace(host), f"port{number}"
            _ip("netns", "add", space)
            _ip("link", "add", DEVICE, "netns", space, "type", "veth", "peer", "name", port, "netns", SWITCH)
            _ip("-n", SWITCH, "link", "set", port, "master", "br0", "up")
            _ip("-n", space, "addr", "add", f"{self.address[host]}/24", "dev", DEVICE)
            for device in (DEVICE, "lo"):
                _ip("-n", space, "link", "set", device, "up")
            for where, device in ((space, DEVICE), (SWITCH, port)):
                limit = ["rate", f"{rate:g}mbit", "burst", "128kb", "limit", "1mb"]
                _run("ip", "netns", "exec", where, "tc", "qdisc", "add", "dev", device, "root", "tbf", *limit)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._remove()

    def _remove(self) -> None:
        for space in (SWITCH, *map(namespace, self.mbit)):
            subprocess.run(["ip", "netns", "del", space], stderr=subprocess.DEVNULL, check=False)


def namespace(host: str) -> str:
    return f"rlad-{host}"


def on_host(host: str, command: list[str]) -> list[str]:
    """The command, as it runs on that host."""
    return ["ip", "netns", "exec", namespace(host), *command]


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    subprocess.run(command, check=True)
