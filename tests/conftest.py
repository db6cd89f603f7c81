"""For all tests."""

import os

# Before torch is loaded, and for the processes of tests too: several share a core, where a thread that spins waits for
# one that does not run.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
