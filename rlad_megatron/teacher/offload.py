"""Keeps a frozen model's weights in host memory while nothing computes with them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from rlad_megatron import platform
from rlad_megatron.models.load import is_quantized


class HostWeights:
    """The parameters of a frozen model: on the device within `on_device()`, on the host otherwise.

    The host's copies never change, so leaving the device only drops the device's copies. They are pinned if there is a
    GPU. On CPUs the code path is the same, without a benefit.
    """

    def __init__(self, chunks: Iterable[torch.nn.Module]) -> None:
        """chunks: this rank's part of the model."""
        self._device = platform.device()
        # (parameter, attribute that holds a tensor, the host's copy)
        self._held: list[tuple[torch.Tensor, str, torch.Tensor]] = []
        for parameter in itertools.chain.from_iterable(chunk.parameters() for chunk in chunks):
            for name in _tensor_attributes(parameter):
                tensor = getattr(parameter, name)
                host = torch.empty_like(tensor, device="cpu", pin_memory=platform.has_cuda()).copy_(tensor)
                self._held.append((parameter, name, host))
        self._leave_device()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Keep the weights on the device within the block. Not reentrant."""
        try:
            for parameter, name, host in self._held:
                setattr(parameter, name, torch.empty_like(host, device=self._device).copy_(host, non_blocking=True))
            yield
        finally:
            self._leave_device()

    def _leave_device(self) -> None:
        for parameter, name, host in self._held:
            setattr(parameter, name, host)


def _tensor_attributes(parameter: torch.nn.Parameter) -> list[str]:
    """The attributes that hold a parameter's bytes: `data`, or the parts of a Transformer Engine FP8 tensor."""
    if not is_quantized(parameter):
        return ["data"]
    return [name for name, value in vars(parameter).items() if isinstance(value, torch.Tensor)]
