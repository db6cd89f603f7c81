"""A temporary folder for a run and all of its processes, neither of which outlives the process that owns them.

The folder becomes TMPDIR, so it holds what libraries leave behind (vLLM's sockets, its rendezvous file), and it marks
the run's processes. When the owner is killed, a child of it ends them and removes the folder; when that is killed too,
the next start on this host does. The child is this module, so it imports only the standard library:

    python -m rlad_megatron.launch.scratch FOLDER
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from pathlib import Path

from rlad_megatron.processes import PR_SET_CHILD_SUBREAPER, PR_SET_PDEATHSIG, SESSION, prctl, start_of, stat_of

FILES = "files"  # elsewhere, one on a line, which go with the folder
GRACE_S = 8.0  # for processes to notice that their parent is gone; vLLM takes 5 at most
END_S = 10.0  # for killed processes to be gone
POLL_S = 0.1


@contextmanager
def scratch(files: Sequence[Path] = ()) -> Iterator[Path]:
    """Own a scratch folder, and remove it at the end with `files` and every process that has it as TMPDIR.

    Enter it in the main thread: Linux tells the child of the end of the thread that started it. Within it, orphans of
    child processes become children of this one.
    """
    folders = Path(tempfile.gettempdir())
    remove_dead(folders)
    me = os.getpid()
    folder = Path(tempfile.mkdtemp(prefix=f"rlad_{me}_{start_of(me)}_"))  # mode 0700
    (folder / FILES).write_text("".join(f"{path.resolve()}\n" for path in files))
    before = {name: os.environ.get(name) for name in ("TMPDIR", "TORCHINDUCTOR_CACHE_DIR")}
    # A cache for later runs, which torch would put into TMPDIR.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folders / f"torchinductor_{os.geteuid()}"))
    resource_tracker.ensure_running()  # without the mark: it outlives its users, and then ends by itself
    null = subprocess.DEVNULL
    watcher = subprocess.Popen(
        [sys.executable, "-m", __name__, str(folder)], stdin=null, stdout=null, stderr=null, start_new_session=True
    )
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


def remove_dead(folders: Path) -> None:
    """Remove the scratch folders of this user whose owner has ended, with their processes and files."""
    for folder in folders.glob("rlad_*_*_*"):
        found = re.fullmatch(r"rlad_(\d+)_(\d+)_\w+", folder.name)
        with suppress(FileNotFoundError):
            facts = folder.lstat()
            ours = facts.st_uid == os.geteuid() and stat.S_ISDIR(facts.st_mode)
            if found and ours and start_of(int(found[1])) != int(found[2]):
                remove(folder)


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
    with suppress(FileNotFoundError):
        for name in (folder / FILES).read_text().splitlines():
            with suppress(OSError):  # gone, or another user's under this name
                os.unlink(name)
    shutil.rmtree(folder, ignore_errors=True)


def processes_of(folder: Path) -> list[int]:
    """The living processes that were started with the folder as TMPDIR, or belong to a session that it names."""
    mark = b"TMPDIR=" + os.fsencode(folder)
    sessions = {path.name for path in folder.glob(SESSION.format("*"))}
    found = []
    for pid in (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()):
        fields = stat_of(pid)
        if fields is None or fields[0] in "ZX" or pid == os.getpid():
            continue
        with suppress(OSError):  # another user's, or gone
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if mark in environment or SESSION.format(fields[3]) in sessions:
                found.append(pid)
    return found


def main(folder: Path) -> None:
    """Wait for the end of the owner, then remove what is its. Signals to a whole job do not end this earlier."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1})
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
