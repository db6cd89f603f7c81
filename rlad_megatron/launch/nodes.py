"""The nodes of a Slurm job seen from one of them: clocks, the shared folder, the same packages. Torch-free.

python -m rlad_megatron.launch.nodes FILE       on each node, started by `check_nodes`
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlad_megatron.launch.findings import Finding, fine, note, wrong
from rlad_megatron.versions import installed

CLOCK_S = 1.0  # the answer's way is part of the difference
TIMEOUT_S = 120.0
# File systems that only one host has.
LOCAL = ("ext4", "ext3", "xfs", "btrfs", "overlay", "tmpfs", "zfs")


def check_nodes(environment: Mapping[str, str], folder: Path) -> Iterator[Finding]:
    """What the nodes of this job have in common. folder: where runs are started."""
    kind = file_system(folder, Path("/proc/mounts").read_text())
    nodes = int(environment.get("SLURM_JOB_NUM_NODES", 1))
    if nodes == 1:
        if shutil.which("sbatch") and kind in LOCAL:
            remedy = "jobs on several nodes need a folder that all of them see"
            yield note("file system", f"{folder} is on {kind}, of this host only", remedy)
        else:
            yield fine("file system", f"{folder} is on {kind}")
        return
    answers, said = ask_nodes(nodes, folder)
    if len(answers) < nodes:
        names = ", ".join(sorted(answer["host"] for answer in answers)) or "none"
        yield wrong("nodes", f"{len(answers)} of {nodes} answered ({names})", said or "see `srun hostname`")
    yield from compare(answers)


def ask_nodes(nodes: int, folder: Path) -> tuple[list[dict[str, Any]], str]:
    """What each node answers, with "offset": the seconds that its clock is ahead. And what srun said last."""
    with tempfile.NamedTemporaryFile("w", dir=folder, prefix=".rlad_doctor_") as file:
        nonce = secrets.token_hex(8)
        file.write(nonce)
        file.flush()
        # --overlap: in a job whose tasks hold all cores.
        command = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--overlap", "--unbuffered"]
        command += [sys.executable, "-m", "rlad_megatron.launch.nodes", file.name]
        try:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder)
        except OSError as error:
            return [], f"srun: {error.strerror}"
        found: list[dict[str, Any]] = []
        errors = [""]
        end = threading.Timer(TIMEOUT_S, process.kill)
        end.start()
        assert process.stdout is not None
        for line in process.stdout:
            arrived = time.time()
            if line.startswith("{"):
                told = json.loads(line)
                found.append(told | {"offset": told["time"] - arrived, "shared": told["content"] == nonce})
            else:
                errors.append(line.strip())
        end.cancel()
        process.wait()
        return found, errors[-1]


def compare(answers: list[dict[str, Any]]) -> Iterator[Finding]:
    """What the answers of several nodes say."""
    blind = sorted(answer["host"] for answer in answers if not answer["shared"])
    if blind:
        remedy = "work in a folder of a file system that all nodes mount"
        yield wrong("file system", f"this folder is not shared with {', '.join(blind)}", remedy)
    elif answers:
        yield fine("file system", f"{len(answers)} nodes share this folder")
    off = {answer["host"]: answer["offset"] for answer in answers if abs(answer["offset"]) > CLOCK_S}
    if off:
        text = ", ".join(f"{name} by {seconds:+.1f} s" for name, seconds in sorted(off.items()))
        yield wrong(
            "clocks",
            f"differ from this host's: {text}",
            "run chrony or ntpd on the nodes: the timeline and locks need it",
        )
    elif answers:
        yield fine("clocks", f"agree to {CLOCK_S:g} s")
    versions = {json.dumps(answer["versions"], sort_keys=True) for answer in answers}
    if len(versions) > 1:
        names = {name for answer in answers for name in answer["versions"]}
        differing = sorted(name for name in names if len({answer["versions"].get(name) for answer in answers}) > 1)
        yield wrong(
            "nodes' packages", f"{', '.join(differing)} differ", "use one environment, or container, on all nodes"
        )


def file_system(folder: Path, mounts: str) -> str:
    """The type of the file system that holds a folder. mounts: the text of /proc/mounts."""
    found = {Path(re.sub(r"\\040", " ", target)): kind for _, target, kind, *_ in map(str.split, mounts.splitlines())}
    return next((found[path] for path in (folder, *folder.parents) if path in found), "an unknown file system")


def answer(file: str) -> dict[str, Any]:
    """What this node says of itself."""
    try:
        content = Path(file).read_text()
    except OSError:
        content = ""
    said = {"host": socket.gethostname(), "content": content, "versions": installed()}
    return said | {"time": time.time()}


if __name__ == "__main__":
    print(json.dumps(answer(sys.argv[1])), flush=True)
