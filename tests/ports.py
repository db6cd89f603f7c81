"""Ports for servers that tests start, which listen seconds after the test has chosen.

A port that the kernel lends (bind to port 0) may by then be that of somebody's connection; these it gives to nobody.
Processes of pytest begin in parts of their own, and take other ones each time.
"""

import itertools
import os

from rlad_megatron.parallel import ports

EACH = 4  # a configuration of several servers takes the next ones too
_seeds = itertools.count(os.getpid() * 100, EACH)


def free_port() -> int:
    return ports.free_port("127.0.0.1", next(_seeds))
