"""The direction of imports (docs/architecture.md): a package imports those below it, never those above."""

import ast
from pathlib import Path

import rlad_megatron

ROOT = Path(rlad_megatron.__file__).parent
LAYERS = [
    {"errors"},
    {"types", "config"},
    {"objectives", "kernels", "platform"},
    {"parallel"},
    {"data"},
    {"models"},
    {"trainer", "servers", "teacher", "rewards", "observe", "command", "plan", "convert"},
    {"evaluate"},
    {"run"},
    {"setup"},
    {"loop"},
    {"launch"},
    {"cli"},
]
ONLY = {"vllm": {"servers"}, "nemo_run": {"launch"}}


def imports():
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
        if name[0] != "rlad_megatron" or len(name) < 2 or name[1] == owner:
            continue
        assert level(name[1]) < level(owner), f"{file} imports {'.'.join(name)}"


def test_objectives_need_nothing_but_torch():
    for file, owner, name in imports():
        if owner == "objectives":
            allowed = {"__future__", "torch", "collections", "importlib"}
            own = name[0] == "rlad_megatron" and name[1] in ("objectives", "types", "config")
            assert name[0] in allowed or own, f"{file}: {name}"


def test_vllm_and_nemo_stay_in_their_packages():
    for file, owner, name in imports():
        if name[0] in ONLY:
            assert owner in ONLY[name[0]], f"{file} imports {name[0]}"
        if name[0] in ("nemo_run", "torchx"):
            assert file == Path("launch/nemo.py"), f"{file} imports {name[0]}"


def test_the_loop_is_short():
    assert len((ROOT / "loop.py").read_text().splitlines()) < 120
