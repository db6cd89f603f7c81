"""One writer for a run folder: the file `lock` in it says who, from the first check to the last file.

Needs only atomic `link` and `rename`, which NFS and Lustre have. A dead holder on this host is recognised at once. The
holder touches the file, so one that died on another host is recognised after STALE_S.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from rlad_megatron.errors import USER_ERROR, ConfigError
from rlad_megatron.processes import machine, start_of
from rlad_megatron.trainer.run_state import LOCK

TOUCH_S = 10.0
STALE_S = 120.0  # more than clients of a file server cache a time stamp
GUARD_S = 10.0  # the guard of a takeover is held for milliseconds
POLL_S, WAIT_S = 0.02, 1.0  # for a faster process; for a holder that may be dead


@contextmanager
def only_writer(
    folder: Path, verb: str, environment: Mapping[str, str] = os.environ, *, patience_s: float = 0.0
) -> Iterator[None]:
    """Hold the folder. It is created if it is missing, and removed again if it stays empty.

    If another process takes the lock, which it may do when it was not touched for STALE_S, this one ends at once: what
    it would save goes into the other's folder.

    patience_s: how long to wait for a holder that does not touch its lock, and so may be dead.

    Raises:
        ConfigError: another process holds it, or the folder cannot be written.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    lock, content = folder / LOCK, _this_process(verb, environment)
    ended = threading.Event()
    with ExitStack() as stack:
        stack.callback(_remove_empty, created)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _take(lock, content, patience_s)
        except OSError as error:
            why = f"{folder}: cannot be locked ({error.strerror})"
            raise ConfigError(f"{why}; use a folder that you can write") from error
        stack.callback(_release, lock, content)
        keeper = threading.Thread(target=_keep, args=(lock, content, ended), daemon=True)
        keeper.start()
        stack.callback(keeper.join)  # so that it does not put a lock there that has been released
        stack.callback(ended.set)
        yield


def _remove_empty(folders: Sequence[Path]) -> None:
    with suppress(OSError):  # not empty
        for folder in folders:
            folder.rmdir()


def _release(lock: Path, content: dict[str, Any]) -> None:
    with suppress(OSError):  # a lock that stays goes stale
        if _read(lock) == content:
            lock.unlink()


def _this_process(verb: str, environment: Mapping[str, str]) -> dict[str, Any]:
    return {
        "token": secrets.token_hex(8),
        "verb": verb,
        "host": socket.gethostname(),
        "machine": machine(),
        "pid": os.getpid(),
        "started": start_of(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "job": environment.get("SLURM_JOB_ID"),
        "restart": int(environment.get("SLURM_RESTART_COUNT", 0)),
    }


def _take(lock: Path, content: dict[str, Any], patience_s: float) -> None:
    """Put the lock there, complete or not at all. Raises ConfigError if another process holds it."""
    begun, touched = time.monotonic(), _touched(lock)
    guard = lock.with_name(f"{LOCK}.takeover")
    with _own_file(lock, content) as own:
        while not _link(own, lock):
            try:
                if _replace_dead(lock, own, guard, content):
                    return
            except ConfigError:
                if _touched(lock) != touched or time.monotonic() - begun > patience_s:
                    raise
                time.sleep(WAIT_S)
            time.sleep(POLL_S)


@contextmanager
def _own_file(lock: Path, content: dict[str, Any]) -> Iterator[Path]:
    """A file with the lock's content next to it."""
    own = lock.with_name(f"{LOCK}.{content['token']}")
    try:
        own.write_text(json.dumps(content))
        yield own
    finally:
        own.unlink(missing_ok=True)


def _link(own: Path, name: Path) -> bool:
    """Give a file another name, unless it is taken."""
    try:
        os.link(own, name)
    except FileExistsError:  # also if NFS did it, lost its answer and asked again
        with suppress(FileNotFoundError):
            return os.path.samefile(own, name)
        return False
    return True


def _replace_dead(lock: Path, own: Path, guard: Path, content: dict[str, Any]) -> bool:
    """Replace the lock of a dead holder; one process at a time, so that none replaces the lock of a faster one."""
    os.utime(own)  # the time of the file server
    if not _link(own, guard):
        if _age(guard, own) > GUARD_S:  # killed while it held the guard
            guard.unlink(missing_ok=True)
        return False
    try:
        found = _read(lock)
        if found is None:
            return False
        if not _is_dead(found, lock, own, content):
            raise ConfigError(_in_use(lock, found))
        own.rename(lock)
        return True
    finally:
        guard.unlink(missing_ok=True)


def _age(file: Path, own: Path) -> float:
    """Seconds since a file was touched. own: one that has just been."""
    touched = _touched(file)
    return 0.0 if touched is None else own.stat().st_mtime - touched


def _touched(file: Path) -> float | None:
    try:
        with file.open() as opened:  # opening asks the server for the time stamp
            return os.fstat(opened.fileno()).st_mtime
    except FileNotFoundError:
        return None


def _read(lock: Path) -> dict[str, Any] | None:
    """What the lock says; None if there is none, {} if it says nothing."""
    try:
        content = json.loads(lock.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _is_dead(found: dict[str, Any], lock: Path, own: Path, content: dict[str, Any]) -> bool:
    """Whether the holder has ended, as far as this process can know. own: a file that has just been touched."""
    if found.get("machine") == content["machine"]:
        return start_of(found["pid"]) != found["started"]  # the present one is never None
    if found.get("job") is not None and found["job"] == content["job"] and found["restart"] < content["restart"]:
        return True  # an earlier start of the same job
    return _age(lock, own) > STALE_S


def _in_use(lock: Path, holder: dict[str, Any]) -> str:
    job = f", job {holder['job']}" if holder.get("job") else ""
    who = f"`rlad {holder.get('verb')}` on {holder.get('host')} (process {holder.get('pid')}{job})"
    return (
        f"{lock.parent} is in use by {who} since {holder.get('since')}; wait for its end or choose another name (if "
        f"that host has died, its lock ends {STALE_S:g} s later)"
    )


def _keep(lock: Path, content: dict[str, Any], ended: threading.Event) -> None:
    while not ended.wait(TOUCH_S):
        with suppress(OSError):
            found = _read(lock)
            if found is None:  # it was removed meanwhile
                with _own_file(lock, content) as own:
                    _link(own, lock)
            elif found == content:
                os.utime(lock)
            elif found:
                print(f"rlad: another process has taken {lock}; this one ends", file=sys.stderr, flush=True)
                os._exit(USER_ERROR)
