"""The direction of imports (docs/architecture.md): a package imports only those below it."""

import ast
from pathlib import Path

import rlad_megatron

ROOT = Path(rlad_megatron.__file__).parent
LAYERS = [
    {"errors", "processes", "versions"},
    {"types", "config", "secret"},
    {"objectives", "kernels", "platform"},
    {"parallel"},
    {"data"},
    {"models"},
    {"trainer", "servers", "teacher", "rewards", "observe", "command", "plan", "convert"},
    {"run_prompts", "perf"},
    {"evaluate", "bench_servers", "run", "show_data"},
    {"rl_run", "generate"},
    {"setup"},
    {"loop", "bench", "study"},
    {"launch"},
    {"watch"},
    {"cli"},
]
ONLY_IN = {"vllm": "servers/", "nemo_run": "launch/nemo.py", "torchx": "launch/nemo.py"}
MATH = {"__future__", "collections", "dataclasses", "importlib", "math", "typing", "torch"}


def imports():
    """(file, its package, the imported module's parts) of every import, also of those within functions."""
    for file in sorted(ROOT.rglob("*.py")):
        owner = file.relative_to(ROOT).parts[0].removesuffix(".py")
        if owner == "__init__":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
                if node.module == "rlad_megatron":
                    names = [f"rlad_megatron.{alias.name}" for alias in node.names]
            for name in names:
                yield file.relative_to(ROOT), owner, name.split(".")


def level(package):
    return next(i for i, layer in enumerate(LAYERS) if package in layer)


def test_every_package_has_a_layer():
    assert {owner for _, owner, _ in imports()} <= set().union(*LAYERS)


def test_imports_point_downwards():
    for file, owner, name in imports():
        if name[0] == "rlad_megatron" and len(name) > 1 and name[1] != owner:
            assert level(name[1]) < level(owner), f"{file} imports {'.'.join(name)}"


def test_objectives_need_only_torch():
    for file, owner, name in imports():
        if owner == "objectives":
            ours = name[0] == "rlad_megatron" and name[1] in ("objectives", "types", "config")
            assert ours or name[0] in MATH, f"{file} imports {'.'.join(name)}"


def test_parallel_knows_no_objective():
    for file, owner, name in imports():
        if owner == "parallel":
            assert name[:2] != ["rlad_megatron", "objectives"], f"{file} imports {'.'.join(name)}"


def test_vllm_and_nemo_stay_in_their_places():
    for file, _, name in imports():
        place = ONLY_IN.get(name[0], "")
        assert file.as_posix().startswith(place), f"{file} imports {name[0]}"


def test_the_loop_is_short():
    assert len((ROOT / "loop.py").read_text().splitlines()) < 120
