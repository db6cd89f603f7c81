"""For all tests."""

import os

# Before torch is loaded, and for the processes of tests too: several share a core, and a thread that spins may keep it
# from the one it waits for. (A run's ranks spin, which is faster where they have cores to themselves.)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
