"""Weights that rest in the host's memory while nobody computes with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rlad_megatron import platform
from rlad_megatron.models.load import is_quantized


class HostWeights:
    """The parameters of a frozen model, on the host but for the time of `on_device()`.

    The host's copies are pinned where there is a GPU and never change, so leaving the device is to forget what is
    there. On CPUs both places are the same memory: the way is the same, and nothing is gained.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._device = platform.device()
        # (what holds a tensor, by which name, the host's copy)
        self._held: list[tuple[torch.Tensor, str, torch.Tensor]] = []
        for parameter in model.parameters():
            for name in _tensors_of(parameter):
                tensor = getattr(parameter, name)
                host = torch.empty_like(tensor, device="cpu", pin_memory=platform.has_cuda()).copy_(tensor)
                self._held.append((parameter, name, host))
        self._rest()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """The weights are on the device within; not to be entered twice."""
        try:
            for parameter, name, host in self._held:
                setattr(parameter, name, torch.empty_like(host, device=self._device).copy_(host, non_blocking=True))
            yield
        finally:
            self._rest()

    def _rest(self) -> None:
        for parameter, name, host in self._held:
            setattr(parameter, name, host)


def _tensors_of(parameter: torch.nn.Parameter) -> list[str]:
    """Attributes that hold a parameter's bytes: `data`, or the parts of one of Transformer Engine's FP8 tensors."""
    if not is_quantized(parameter):
        return ["data"]
    return [name for name, value in vars(parameter).items() if isinstance(value, torch.Tensor)]
