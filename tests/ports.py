"""Ports for servers that tests start, which listen seconds after the test has chosen.

The kernel may give away a port that it has lent (bind to port 0), but none of these. Each process of pytest starts in
a different part of the range, and takes another port each time.
"""

import itertools
import os

from rlad_megatron.parallel import ports

EACH = 4  # a configuration of several servers takes the next ones too
_seeds = itertools.count(os.getpid() * 100, EACH)


def free_port() -> int:
    return ports.free_port("127.0.0.1", next(_seeds))
