"""A temporary folder for a run and all of its processes, neither of which outlives the process that owns them.

The folder becomes TMPDIR, so it holds what libraries leave behind (vLLM's sockets, its rendezvous file), and it marks
the run's processes. When the owner is killed, a child of it ends them and removes the folder; when that is killed too,
the next start on this host does. Hosts may share the folder above it, so the file `owner` says whose it is. The child
is this module, so it imports only the standard library:

    python -m rlad_megatron.launch.scratch FOLDER
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from pathlib import Path

from rlad_megatron.processes import PR_SET_CHILD_SUBREAPER, PR_SET_PDEATHSIG, SESSION, machine, prctl, start_of, stat_of

OWNER = "owner"
FILES = "files"  # elsewhere, one on a line, which go with the folder
LONGEST = 37  # bytes of the path above the folder; a socket of vLLM in it is 70 longer, and Linux allows 107
SHORT = Path("/tmp")
GRACE_S = 8.0  # for processes to notice that their parent is gone; vLLM takes 5 at most
END_S = 10.0  # for killed processes to be gone
POLL_S = 0.1
KEPT_FROM_WATCHER = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1}  # it waits for the last one


@contextmanager
def scratch(files: Sequence[Path] = ()) -> Iterator[Path]:
    """Own a scratch folder, and remove it at the end with `files` and every process that has it as TMPDIR.

    Enter it in the main thread: Linux tells the child of the end of the thread that started it. Within it, orphans of
    child processes become children of this one.
    """
    temporary = Path(tempfile.gettempdir())
    folders = temporary if len(os.fsencode(temporary)) <= LONGEST else SHORT
    remove_dead(folders)
    me = os.getpid()
    folder = Path(tempfile.mkdtemp(prefix=f"rlad_{me}_{start_of(me)}_", dir=folders))  # mode 0700
    (folder / OWNER).write_text(json.dumps({"host": socket.gethostname(), "machine": machine()}))
    (folder / FILES).write_text("".join(f"{path.absolute()}\n" for path in files))
    before = {name: os.environ.get(name) for name in ("TMPDIR", "TORCHINDUCTOR_CACHE_DIR")}
    # A cache for later runs, which torch would put into TMPDIR.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(temporary / f"torchinductor_{os.geteuid()}"))
    resource_tracker.ensure_running()  # without the mark: it outlives its users, and then ends by itself
    watcher = _start_watcher(folder)
    os.environ["TMPDIR"] = str(folder)
    tempfile.tempdir = None
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield folder
    finally:
        remove(folder)
        prctl(PR_SET_CHILD_SUBREAPER, 0)
        watcher.kill()
        watcher.wait()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        tempfile.tempdir = None


def _start_watcher(folder: Path) -> subprocess.Popen[bytes]:
    null = subprocess.DEVNULL
    command = [sys.executable, "-m", __name__, str(folder)]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, KEPT_FROM_WATCHER)  # which inherits it
    try:
        return subprocess.Popen(command, stdin=null, stdout=null, stderr=null, start_new_session=True)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def remove_dead(folders: Path) -> None:
    """Remove the scratch folders of this user whose owner on this host has ended, with their processes and files."""
    host, here = socket.gethostname(), machine()
    for folder in folders.glob("rlad_*_*_*"):
        found = re.fullmatch(r"rlad_(\d+)_(\d+)_\w+", folder.name)
        with suppress(OSError, ValueError):  # gone, or another process is making it
            facts = folder.lstat()
            if not (found and facts.st_uid == os.geteuid() and stat.S_ISDIR(facts.st_mode)):
                continue
            owner = json.loads((folder / OWNER).read_text())
            if owner["machine"] == here and start_of(int(found[1])) != int(found[2]):
                remove(folder)
            elif owner["host"] == host and owner["machine"][0] != here[0]:
                _remove_files(folder)  # its processes ended with that boot; others have their numbers now


def remove(folder: Path) -> None:
    """End the folder's processes, and remove it and the files that go with it."""
    deadline = time.monotonic() + END_S
    while (left := processes_of(folder)) and time.monotonic() < deadline:
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(POLL_S)
    _remove_files(folder)


def _remove_files(folder: Path) -> None:
    with suppress(FileNotFoundError):
        for name in (folder / FILES).read_text().splitlines():
            with suppress(OSError):  # gone, or another user's under this name
                os.unlink(name)
    shutil.rmtree(folder, ignore_errors=True)


def processes_of(folder: Path) -> list[int]:
    """The living processes that were started with the folder as TMPDIR, or belong to a session that it names."""
    mark = b"TMPDIR=" + os.fsencode(folder)
    sessions = {}
    for path in folder.glob(SESSION.format("*", "*")):
        _, leader, start = path.name.split("_")
        if start_of(int(leader)) in (None, int(start)):  # else another process has its number by now
            sessions[leader] = int(start)
    found = []
    for pid in (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()):
        fields = stat_of(pid)
        if fields is None or fields[0] in "ZX" or pid == os.getpid():
            continue
        with suppress(OSError):  # another user's, or gone
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            in_session = fields[3] in sessions and int(fields[19]) >= sessions[fields[3]]
            if mark in environment or in_session:
                found.append(pid)
    return found


def main(folder: Path) -> None:
    """Wait for the end of the owner, then remove what is its. Signals to a whole job do not end this earlier."""
    prctl(PR_SET_PDEATHSIG, signal.SIGUSR1)
    _, owner, *_ = folder.name.split("_")
    if os.getppid() == int(owner):
        signal.sigwait({signal.SIGUSR1})
    deadline = time.monotonic() + GRACE_S
    while processes_of(folder) and time.monotonic() < deadline:  # they are about to end by themselves
        time.sleep(POLL_S)
    remove(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
