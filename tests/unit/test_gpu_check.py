"""tools/gpu_kit.sh all the way through on the CPU, where nothing is installed but what that machine has."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch
from gpu_check import LIMITS, Record, run_tests
from gpu_parts import SIZES
from gpu_steps import qwen3_like
from packaging.requirements import Requirement
from packaging.tags import sys_tags

from rlad_megatron.plan.cost import UPDATE_PASSES, forward_flops

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
ON_THAT_MACHINE = ("torch", "triton", "pip")
KIT = [line.split("==")[0] for line in (ROOT / "requirements" / "gpu-kit.txt").read_text().split()]
LEFT_BY_PIP = ("INSTALLER", "REQUESTED", "direct_url.json")


def with_requirements(names):
    """The distributions and all that they require, as far as they are installed here."""
    found, left = {}, list(names)
    while left:
        name = left.pop().lower().replace("_", "-")
        if name in found:
            continue
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        requirements = [Requirement(text) for text in found[name].requires or []]
        left += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found.values()


def own_files(distribution):
    return [file for file in distribution.files if ".." not in file.parts and file.suffix != ".pyc"]


def bare_python(folder):
    """An environment with the packages of `ON_THAT_MACHINE`, as links to those of this one."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for distribution in with_requirements(ON_THAT_MACHINE):
        for top in {file.parts[0] for file in own_files(distribution)}:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    return folder / "bin" / "python"


def make_wheel(distribution, folder):
    """The wheel that a distribution was installed from."""
    described = distribution.read_text("WHEEL").splitlines()
    tags = [line.removeprefix("Tag: ") for line in described if line.startswith("Tag: ")]
    here = set(map(str, sys_tags()))
    tag = next(tag for tag in tags if tag in here)
    name = distribution.metadata["Name"].replace("-", "_")
    with zipfile.ZipFile(folder / f"{name}-{distribution.version}-{tag}.whl", "w") as wheel:
        for file in own_files(distribution):
            if file.name not in LEFT_BY_PIP:
                wheel.write(distribution.locate_file(file), file)


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A checkout and the Python of a machine without anything else."""
    folder = tmp_path_factory.mktemp("machine")
    left_out = shutil.ignore_patterns("__pycache__", "results")
    for name in ("rlad_megatron", "recipes", "benchmarks", "tools", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=left_out)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder, bare_python(folder / "python")


def run_kit(machine, *options):
    folder, python = machine
    return subprocess.run(
        [folder / "tools" / "gpu_kit.sh", *options],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(python), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


def test_without_wheels_it_says_so_and_names_what_did_not_run(machine):
    folder, _ = machine
    done = run_kit(machine, "--size", "tiny", "--output", str(folder / "without.json"))
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.startswith("gpu_kit: wheels/ is empty; run tools/gpu_wheels.sh")
    assert "- steps: failed: ModuleNotFoundError: No module named" in done.stdout
    parts = json.loads((folder / "without.json").read_text())["parts"]
    assert all(part["ended"] for part in parts.values()) and not parts["server"]["failed"]


def test_wheels_for_another_python_cost_a_line(machine):
    folder, _ = machine
    (folder / "wheels").mkdir()
    (folder / "wheels" / "numpy-2.3.5-cp27-cp27m-manylinux1_x86_64.whl").touch()
    try:
        done = run_kit(machine, "--size", "tiny", "--minutes", "0", "--output", str(folder / "other.json"))
    finally:
        shutil.rmtree(folder / "wheels")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cannot install wheels/, made for Python 3.12 on Linux x86-64" in done.stdout
    assert "- steps: not run, time is up (--minutes)" in done.stdout
    assert not json.loads((folder / "other.json").read_text())["complete"]


def test_it_runs_with_torch_and_the_wheels_alone(machine):
    folder, _ = machine
    (folder / "wheels").mkdir()
    for name in KIT:
        make_wheel(metadata.distribution(name), folder / "wheels")
    output = folder / "result.json"
    done = run_kit(machine, "--size", "tiny", "--output", str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(output.read_text())
    assert result["complete"] and not list(folder.glob("*.tmp"))
    parts = result["parts"]
    assert list(parts) == list(LIMITS)
    assert all(part["ended"] and part["tries"] == 1 and not part["failed"] for part in parts.values())
    assert "passed" in parts["kernels"]["tests"] and "passed" in parts["tests"]["tests"]
    assert [(row["variant"], row["loss from"]) for row in parts["small model"]["errors"]] == [
        (variant, loss) for variant in ("fp32", "bf16") for loss in ("fused", "all logits")
    ]
    for name, loss in (("steps", "fused"), ("all logits", "all logits")):
        (row,) = parts[name]["steps"]
        phases = [row[f"{phase} s"] for phase in ("teacher", "old", "update")]
        assert row["loss from"] == loss and min(phases) > 0 and row["step s"] == pytest.approx(sum(phases))
        assert row["tokens/s"] == pytest.approx(128 / row["step s"])
    # What MFU counts. It may exceed 1: on CPUs the products that it is measured against may be the slower ones.
    rate = parts["steps"]["product_tflops"] * 1e12
    (row,) = parts["steps"]["steps"]
    teacher, old, update = (row[f"{phase} MFU"] * row[f"{phase} s"] * rate for phase in ("teacher", "old", "update"))
    assert old == pytest.approx(forward_flops(qwen3_like(**SIZES["tiny"].student), [32] * 4, 4 * 24))
    assert update == pytest.approx(UPDATE_PASSES * old) and teacher > old
    assert [row["chunk budget MB"] for row in parts["loss"]["loss"]] == [512, 1024, 2048, 4096]
    assert all(row["fused / products"] > 0 for row in parts["loss"]["loss"])
    assert parts["transport"]["transport"]["bytes"] > 1e6
    assert "- Transformer Engine: no CUDA device" in done.stdout and "- server: no CUDA device" in done.stdout
    assert "update MFU" in done.stdout and "fused / products" in done.stdout


# Each process runs main() with these parts: one ends its process each time, one hangs the first time, one fails.
FAULTY = """
import os, sys, time
sys.path.insert(0, sys.argv.pop(1))
import gpu_check
gpu_check.LEAST_S = 0
gpu_check.LIMITS = {"good": 60, "crash": 60, "hang": 1, "bad": 60}
def make_actions(record, size):
    def hang(seconds):
        if record.part["tries"] == 1:
            record.add("errors", {"row": 1})
            time.sleep(60)
        record.add("errors", {"row": 2})
    def bad(seconds):
        raise ValueError("no\\nmore")
    def good(seconds):
        record.keep(found=os.environ["PYTORCH_ALLOC_CONF"])
    return {"good": good, "crash": lambda _: os.abort(), "hang": hang, "bad": bad}
gpu_check.make_actions = make_actions
gpu_check.main()
"""


def test_each_process_goes_on_where_the_last_one_ended(tmp_path):
    output = tmp_path / "result.json"
    command = [sys.executable, "-c", FAULTY, str(BENCHMARKS), "--size", "tiny", "--output", str(output)]
    codes, texts = [], []
    for _ in range(4):
        done = subprocess.run(command, capture_output=True, text=True)
        codes.append(done.returncode)
        texts.append(done)
    # Twice in the crash; after the first, the hang and then the other parts.
    assert codes == [-signal.SIGABRT, -signal.SIGALRM, -signal.SIGABRT, 1], [done.stderr for done in texts]
    assert "in hang" in texts[1].stderr, "no traceback of the part that hung"
    result = json.loads(output.read_text())
    parts = result["parts"]
    assert result["complete"] and [name for name in parts if not parts[name]["failed"]] == ["good", "hang"]
    assert parts["good"]["found"] == "expandable_segments:True"
    assert parts["good"]["tries"] == 1 and parts["hang"]["errors"] == [{"row": 2}]
    assert parts["bad"]["failed"] == ["bad: failed: ValueError: no"]
    assert parts["crash"]["failed"] == ["crash: the process ended twice, at the time limit or in a crash"]


TESTS = """
import os, subprocess, sys, time

def test_passes():
    assert "PYTORCH_ALLOC_CONF" not in os.environ

def test_fails():
    assert "no" == "yes"

def test_hangs():
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "left behind by test_hangs"])
    time.sleep(600)
"""


def runs(word):
    """Whether a process has this argument."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended since
            if word.encode() in file.read_bytes().split(b"\0"):
                return True
    return False


def test_a_part_that_runs_tests_names_those_that_fail_and_ends_what_they_started(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    (tmp_path / "test_some.py").write_text(TESTS)
    record = Record(tmp_path / "result.json", {})
    record.begin("tests")
    run_tests(record, 120, str(tmp_path), "-k", "not hangs")
    (failed,) = record.failed
    assert failed.startswith("FAILED ") and "test_fails" in failed and "1 failed, 1 passed" in record.part["tests"]
    with pytest.raises(TimeoutError, match="took over 6 s"):
        run_tests(record, 8, str(tmp_path), "-k", "hangs")
    deadline = time.monotonic() + 30  # the signal is sent, and a busy machine may take its time
    while runs("left behind by test_hangs"):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_results_of_another_machine_or_of_a_finished_run_are_not_continued(tmp_path):
    about = {"machine": {"device": "one"}, "size": "tiny"}

    def parts_after(**changes):
        output = tmp_path / "result.json"
        first = Record(output, about)
        first.begin("kernels")
        output.write_text(json.dumps(first.found | changes))
        return list(Record(output, about).parts)

    assert parts_after() == ["kernels"]
    assert parts_after(machine={"device": "other"}) == parts_after(complete=True) == parts_after(size="full") == []


def test_the_kit_starts_the_check_again_after_a_signal(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\necho "$@" >> calls\n[ $(wc -l < calls) = 1 ] && kill -SEGV $$\nexit 3\n')
    python.chmod(0o755)
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    done = subprocess.run(
        [tmp_path / "tools" / "gpu_kit.sh", "--minutes", "5"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": str(python)},
    )
    assert done.returncode == 3, done.stdout + done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 2 and all(c.startswith("benchmarks/gpu_check.py --minutes 5 --spent ") for c in calls)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_full_check_without_a_device_is_refused_in_one_line(monkeypatch):
    import gpu_check

    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    with pytest.raises(SystemExit, match="no CUDA device; --size tiny runs the same code path on a CPU"):
        gpu_check.main()


def test_collecting_the_tests_for_a_gpu_imports_nothing_that_machine_lacks(machine):
    folder, _ = machine
    code = (
        "import sys, pytest\n"
        "assert pytest.main(['--collect-only', '-q', 'tests/gpu']) == 0\n"
        "print('IMPORTED', [name for name in ('omegaconf', 'vllm', 'transformer_engine', 'transformers', 'megatron')"
        " if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and "IMPORTED []" in done.stdout, done.stdout + done.stderr
