"""Under which names a Hugging Face folder stores the tensors of a text model. Torch-free.

Two things differ between folders. A model with a vision tower has the text model below `model.language_model.`, next to
tensors that are left out here. And the experts of a layer may be stored as one tensor: `gate_up_proj`
[experts, 2 * width, hidden] and `down_proj` [experts, hidden, width], as transformers 5 holds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from rlad_megatron.models.box import Box

Shape = tuple[int, ...]
_TEXT, _TEXT_OF_WHOLE = "model.", "model.language_model."
# The vision tower, and the layers for multi-token prediction.
_LEFT_OUT = ("model.visual.", "mtp.")
_GATE_UP, _DOWN = ".experts.gate_up_proj", ".experts.down_proj"


@dataclass(frozen=True)
class Stored:
    """Where a tensor is in the files."""

    name: str  # of the tensor that holds it
    part: Box | None = None  # of that tensor, with an axis of 1 for the expert in front; None: all of it

    def slices(self, box: Box) -> Box:
        """The part of the holding tensor that is `box` of this one."""
        if self.part is None:
            return box
        (expert, *inner) = self.part
        return Box((expert, *((start + a, start + b) for (start, _), (a, b) in zip(inner, box, strict=True))))

    def shape(self, holding: Shape) -> Shape:
        return holding if self.part is None else self.part.sizes[1:]


def is_left_out(name: str) -> bool:
    """Whether a tensor belongs to a part of a model that the text model lacks."""
    return name.startswith(_LEFT_OUT)


def stored_tensors(names: Iterable[str], shape_of: Callable[[str], Shape]) -> dict[str, Stored]:
    """Where the text model's tensors are, by their names in the shard plan.

    names: of all tensors in the files. shape_of: the shape of one; called only for experts that are stored together.
    """
    found: dict[str, Stored] = {}
    for stored in names:
        if is_left_out(stored):
            continue
        name = _TEXT + stored.removeprefix(_TEXT_OF_WHOLE) if stored.startswith(_TEXT_OF_WHOLE) else stored
        if name.endswith((_GATE_UP, _DOWN)):
            found |= _experts(name, stored, shape_of(stored))
        else:
            found[name] = Stored(stored)
    return found


def _experts(name: str, stored: str, shape: Shape) -> Iterator[tuple[str, Stored]]:
    path, _, kind = name.rpartition(".")
    experts, rows, columns = shape
    width = rows // 2 if kind == "gate_up_proj" else rows
    parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    for expert in range(experts):
        for number, part in enumerate(parts):
            yield (
                f"{path}.{expert}.{part}.weight",
                Stored(stored, Box.at((expert, number * width, 0), (1, width, columns))),
            )
