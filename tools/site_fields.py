"""Comments on fields and constants, as the Python API shows them (an extension of griffe, see mkdocs.yml).

The code describes a field by the comment behind or above it; griffe knows docstrings alone.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from griffe import Attribute, Class, Docstring, Extension, Module


class Comments(Extension):
    """Gives classes a section of their fields, and constants of modules a docstring."""

    def on_class_members(self, *, cls: Class, **_: Any) -> None:
        fields = {name: field for name, field in cls.attributes.items() if "property" not in field.labels}
        if fields and cls.docstring:
            section = "".join(f"\n    {name}: {_comment(field) or '–'}" for name, field in fields.items())
            cls.docstring.value += f"\n\nAttributes:{section}"

    def on_module_members(self, *, mod: Module, **_: Any) -> None:
        for constant in mod.attributes.values():
            if constant.docstring is None and (comment := _comment(constant)):
                constant.docstring = Docstring(comment, parent=constant)


def _comment(attribute: Attribute) -> str:
    """The comment behind the attribute's last line, else the lines of comment above it; "" if there is none."""
    if attribute.is_alias or attribute.lineno is None or attribute.endlineno is None:
        return ""
    lines = Path(str(attribute.filepath)).read_text().splitlines()
    if behind := re.search(r"\s{2}#\s+(.*)$", lines[attribute.endlineno - 1]):
        return behind[1]
    above: list[str] = []
    for line in reversed(lines[: attribute.lineno - 1]):
        if not line.lstrip().startswith("#"):
            break
        above.insert(0, line.strip(" #"))
    return " ".join(above)
