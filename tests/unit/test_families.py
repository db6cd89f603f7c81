"""What is particular to a family is data in its table, never a branch on its name."""

import re
from pathlib import Path

import rlad_megatron
from rlad_megatron.models.registry import FAMILIES, WITH_VISION

ROOT = Path(rlad_megatron.__path__[0])


def test_no_code_asks_for_a_family_by_name():
    names = "|".join(map(re.escape, [*FAMILIES, *WITH_VISION]))
    for file in ROOT.rglob("*.py"):
        if file.name in ("registry.py", "known.py"):
            continue
        found = re.findall(rf"^.*[\"'](?:{names})[\"'].*$", file.read_text(), flags=re.MULTILINE)
        assert not found, (file, found)
        assert "model_type ==" not in file.read_text() and "model_type in" not in file.read_text(), file
