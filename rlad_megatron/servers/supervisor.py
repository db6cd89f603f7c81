"""Runs one vLLM server and makes sure that none of its processes is left behind.

    python -m rlad_megatron.servers.supervisor PARENT_PID COMMAND ...

vLLM's engine is a separate process. When the API server in front of it is killed, the engine lives on and keeps its
memory; and vLLM ignores a SIGTERM during start-up. So this small process (standard library only) stands between the
trainer and vLLM. It ends the server's whole process group when

- the server's first process ends, for whatever reason;
- the process that asked for the server (PARENT_PID) is gone, killed or not;
- it gets a SIGTERM.

Its exit code is the server's; 128 + N when the server died from signal N.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rlad_megatron.processes import PR_SET_CHILD_SUBREAPER, SESSION, prctl, start_of

POLL_S = 0.1
GRACE_S = 5.0  # between SIGTERM (vLLM then removes its sockets and shared memory) and SIGKILL


def end_group(process: subprocess.Popen) -> int:
    """Stop a process, which may be gone, and its whole group, with SIGTERM first; returns the process's exit code."""
    for signum, wait_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, 1.0)):
        deadline = time.monotonic() + wait_s
        with contextlib.suppress(ProcessLookupError):  # raised when the group is empty
            os.killpg(process.pid, signum)
            while time.monotonic() < deadline:
                with contextlib.suppress(ChildProcessError):  # an uncollected process counts as a member
                    while process.poll() is not None and os.waitpid(-process.pid, os.WNOHANG)[0]:
                        pass
                os.killpg(process.pid, 0)
                time.sleep(POLL_S)
    return process.wait()


def main(arguments: list[str]) -> int:
    # Orphans of the group become our children, and not those of a launcher that collects none.
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    parent, command = int(arguments[0]), arguments[1:]
    stop_requests: list[int] = []
    signal.signal(signal.SIGTERM, lambda signum, frame: stop_requests.append(signum))
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    # For launch/scratch.py, if this process is killed. vLLM writes its title over the environment that marks it.
    session = Path(tempfile.gettempdir(), SESSION.format(process.pid, start_of(process.pid) or 0))
    with contextlib.suppress(OSError):  # a full disk must not end the server
        session.touch()
    while process.poll() is None and not stop_requests and os.getppid() == parent:
        time.sleep(POLL_S)
    code = end_group(process)
    session.unlink(missing_ok=True)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
