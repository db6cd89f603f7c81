"""Small fine-tuning runs, which start quickest, and what they may leave behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from resource import RLIMIT_FSIZE, setrlimit

import psutil
from processes import children

import recipes
from rlad_megatron.launch.scratch import remove_dead
from rlad_megatron.servers.transfer.weights_file import possible_files

STUDENT = Path(recipes.__path__[0]) / "assets" / "kk_tiny_student"
SFT = [
    "sft",
    "kk_tiny_teacher_sft",
    f"student.path={STUDENT}",
    "data.train_size=64",
    "sft.batch_size=8",
    "checkpoint.export_hf=false",
    "observe.tensorboard=false",
]
LEFT_S = 30.0  # after the end of a run nothing of it is left


def prepare(largest_file: int | None) -> None:
    """In the child, before it is another program."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a job in the background ignores it
    if largest_file is not None:
        setrlimit(RLIMIT_FSIZE, (largest_file,) * 2)


class Run:
    """A run in a process of its own, in its own temporary folder."""

    def __init__(
        self,
        runs: Path,
        name: str,
        *words: str,
        verb: Sequence[str] = SFT,
        largest_file: int | None = None,
        **environment: str,
    ) -> None:
        """largest_file: in bytes; for a disk that is full."""
        self.folder = runs / name
        self.tmp = Path(tempfile.mkdtemp(prefix="f", dir="/tmp"))  # short: sockets are in it
        command = [sys.executable, "-m", "rlad_megatron.cli", *verb, f"runs_dir={runs}", f"name={name}", *words]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=partial(prepare, largest_file),
            env=os.environ | {"TMPDIR": str(self.tmp)} | environment,
        )

    def wait_for(self, what, seconds: float = 300.0) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline, "it did not happen in time"
            time.sleep(0.01)

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: any(line["step"] >= step for line in self.metrics()))

    def metrics(self) -> list[dict]:
        file = self.folder / "metrics.jsonl"
        lines = file.read_text().split("\n")[:-1] if file.exists() else []
        return [json.loads(line) for line in lines]

    @property
    def ranks(self) -> list[psutil.Process]:
        """In the order of their start."""
        return children(self.process.pid, "spawn_main")

    def end(self, seconds: float = 300.0) -> tuple[int, str, str]:
        """(exit code, stdout, stderr)."""
        out, err = self.process.communicate(timeout=seconds)
        return self.process.returncode, out, err

    def said(self) -> str:
        """The one line on stderr of a run that fails with it. No traceback reaches the terminal."""
        code, out, err = self.end()
        lines = [line for line in err.splitlines() if line.startswith("rlad: ")]
        assert code in (1, 2) and len(lines) == 1 and "Traceback" not in out + err, (code, out, err)
        return lines[0]

    def left(self) -> list[str]:
        """Processes and files of the run that are there LEFT_S after its end."""
        deadline = time.monotonic() + LEFT_S
        while (found := self._left()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return found

    def _left(self) -> list[str]:
        marks = (str(self.tmp), str(self.folder), str(self.folder.parent))
        processes = []
        for process in psutil.process_iter():
            try:
                if process.status() == psutil.STATUS_ZOMBIE or process.pid == os.getpid():
                    continue
                command = process.cmdline()
                words = [*command, process.environ().get("TMPDIR", "")]
            except psutil.Error:
                continue
            if any(word.startswith(mark) or f"={mark}" in word for word in words for mark in marks):
                processes.append(f"{process.pid}: {' '.join(command)[:100]}")
        # torch's cache of compiled code is for later runs.
        files = [path for path in self.tmp.rglob("*") if "torchinductor_" not in str(path)]
        shared, _ = possible_files(self.folder)
        return processes + [str(path) for path in [*files, *([shared] if shared.exists() else [])]]


@contextmanager
def run(runs: Path, name: str, *words: str, **options) -> Iterator[Run]:
    started = Run(runs, name, *words, **options)
    try:
        yield started
    finally:
        started.process.kill()
        started.process.communicate()
        remove_dead(started.tmp)
