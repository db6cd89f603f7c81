"""benchmarks/gpu_check.py all the way through on the CPU, with nothing importable but what it may use."""

import json
import logging
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.py"
ALLOWED = ("torch", "megatron-core", "pydantic", "pyyaml", "rlad-megatron")
# Packages are not found where they are installed, as on a machine that does not have them.
RUNNER = """
import runpy, sys, sysconfig
from importlib.machinery import PathFinder
absent = set(sys.argv.pop(1).split(","))
installed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
find = PathFinder.find_spec
def find_others(name, path=None, target=None):
    if path is None and name in absent:
        path = [folder for folder in sys.path if folder not in installed]
    return find(name, path, target)
PathFinder.find_spec = find_others
del sys.argv[0]
sys.path[0] = sys.argv[0].rpartition("/")[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def without_extras(names):
    """The distributions and all that they require, as a machine has them where nothing else is installed."""
    found, left = set(), list(names)
    while left:
        name = left.pop().lower().replace("_", "-")
        if name in found:
            continue
        found.add(name)
        if name == "rlad-megatron":  # this repository, without what its other parts need
            continue
        try:
            requirements = [Requirement(text) for text in metadata.requires(name) or []]
        except metadata.PackageNotFoundError:
            continue
        left += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def absent():
    kept = without_extras(ALLOWED)
    return sorted(
        package
        for package, owners in metadata.packages_distributions().items()
        if not kept & {owner.lower().replace("_", "-") for owner in owners}
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    output = tmp_path_factory.mktemp("gpu_check") / "result.json"
    hidden = absent()
    assert {"transformers", "safetensors", "rich", "httpx", "reasoning_gym"} <= set(hidden)
    assert "vllm" in hidden or find_spec("vllm") is None  # not there in the environment of `make test-compat`
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, ",".join(hidden), str(SCRIPT), "--size", "tiny", "--output", str(output)],
        capture_output=True,
        text=True,
        cwd=output.parent,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    return done, output


def test_it_runs_with_torch_and_megatron_core_alone(run):
    done, output = run
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(output.read_text())
    assert result["failed"] == [] and list(output.parent.iterdir()) == [output]
    assert result["complete"] and [row["loss from"] for row in result["steps"]] == ["fused", "all logits"]
    assert [(row["variant"], row["loss from"]) for row in result["errors"]] == [
        (variant, loss) for variant in ("fp32", "bf16") for loss in ("fused", "all logits")
    ]
    for row in result["steps"]:
        phases = [row[f"{phase} s"] for phase in ("teacher", "old", "update")]
        assert min(phases) > 0 and row["step s"] == pytest.approx(sum(phases))
        assert 0 < row["update MFU"] < 1.5 and row["tokens/s"] == pytest.approx(128 / row["step s"])
    assert len(result["steps"]) == 2 and result["fused_loss"]["ratio"] > 0
    assert "- Transformer Engine: no CUDA device" in done.stdout
    assert "update MFU" in done.stdout


def test_a_run_that_is_cut_off_has_left_what_it_measured(monkeypatch, tmp_path, caplog):
    import gpu_check
    import gpu_steps

    output = tmp_path / "result.json"
    rows = iter([{"tokens": 64, **dict.fromkeys(("teacher", "old", "update", "teacher_gb", "peak_gb"), 1.0)}])

    def fitting_steps(self, variant, loss):
        return next(rows, None) or sys.exit("cut off")  # in the second measurement of steps

    monkeypatch.setattr(gpu_check.Check, "fitting_steps", fitting_steps)
    monkeypatch.setattr(gpu_check.Check, "errors", lambda self, variants: self.add("errors", {"variant": "fp32"}))
    monkeypatch.setattr(gpu_check.Check, "head_ratio", lambda self: {"ratio": 1.0})
    monkeypatch.setattr(gpu_steps, "join", lambda: None)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--size", "tiny", "--output", str(output)])
    # The script quiets Megatron's loggers, which this limits to the test.
    with caplog.at_level(logging.WARNING, "megatron"), pytest.raises(SystemExit, match="cut off"):
        gpu_check.main()
    result = json.loads(output.read_text())
    assert not result["complete"] and result["machine"] and result["product_tflops"] > 0
    assert result["errors"] == [{"variant": "fp32"}] and result["fused_loss"] == {"ratio": 1.0}
    assert [(row["variant"], row["loss from"]) for row in result["steps"]] == [("bf16", "fused")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_full_check_without_a_device_is_refused_in_one_line(monkeypatch):
    import gpu_check

    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    with pytest.raises(SystemExit, match="no CUDA device; --size tiny runs the same code path on a CPU"):
        gpu_check.main()
